"""TLS both ways, against DCMTK and Orthanc's library; certificates of strangers, silent peers, files that change."""

from __future__ import annotations

import gc
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator

import pytest
from pynetdicom import AE, build_context
from pynetdicom.sop_class import Verification
from structlog.testing import capture_logs

from dicom_node.configuration.sections import Destination, Tls
from dicom_node.network.requestor import PeerError, associate
from dicom_node.network.tls import Identity, TlsError
from tests.dicom_node.certificates import Authority
from tests.dicom_node.conftest import wait_until
from tests.dicom_node.instances import Recorder, image, receiving, write

# pynetdicom leaves the socket of a connection that could not be opened to garbage collection
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <s:ResourceWarning")


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    """Sockets that pynetdicom left go within the test that is known for it, not in a later one."""
    yield
    gc.collect()


dcmtk = pytest.mark.skipif(shutil.which("storescu") is None, reason="DCMTK is not installed: apt-get install dcmtk")


def settings(files) -> Tls:
    return Tls(certificate=files.certificate, key=files.key, ca=files.ca)


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path / "pki")


@pytest.fixture
def identity(authority):
    return Identity(settings(authority.issue("node")))


@pytest.fixture
def receiver(tmp_path, identity):
    with receiving(tmp_path / "spool", Recorder(), identity=identity) as receiver:
        yield receiver


def echo(receiver, identity) -> int:
    """Status of a C-ECHO to the receiver, as one destination of another node."""
    peer = Destination(name="node", ae_title="SCANSIDE", host="127.0.0.1", port=receiver.port, tls=identity is not None)
    association = associate(peer, "CT01", [build_context(Verification)], identity=identity)
    status = association.send_c_echo().Status
    association.release()
    return status


def options(files) -> list[str]:
    return ["+tls", str(files.key), str(files.certificate), "+cf", str(files.ca)]


@dcmtk
def test_dcmtk_pushes_over_tls(tmp_path, receiver, authority):
    paths = write(tmp_path / "scanner", *(image(number, side=256) for number in range(1, 6)))
    sent = subprocess.run(
        ["storescu", *options(authority.issue("ct")), "127.0.0.1", str(receiver.port), *map(str, paths)],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert sent.returncode == 0, sent.stderr
    assert len(list((tmp_path / "spool").rglob("*.dcm"))) == 5


@dcmtk
def test_results_go_to_dcmtk_over_tls(tmp_path, authority):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["storescp", *options(authority.issue("pacs")), "-od", str(tmp_path), str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as pacs:
        try:
            peer = Destination(name="pacs", ae_title="PACS", host="127.0.0.1", port=port, tls=True)
            identity = Identity(settings(authority.issue("node")))
            deadline = time.monotonic() + 10
            while True:
                try:
                    association = associate(peer, "SCANSIDE", [build_context(Verification)], identity=identity)
                    break
                except PeerError:
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
            assert association.dul.socket.socket.version() in ("TLSv1.2", "TLSv1.3")
            assert association.send_c_echo().Status == 0
            association.release()
        finally:
            pacs.terminate()


def test_strangers_and_plain_peers_stay_out(tmp_path, receiver, authority):
    stranger = Authority(tmp_path / "elsewhere", "other").issue("ct")
    with capture_logs() as events:
        trusting = Tls(certificate=stranger.certificate, key=stranger.key, ca=authority.certificate)
        with pytest.raises(PeerError, match="no TLS with it: .* unknown ca; see"):
            echo(receiver, Identity(trusting))
        with pytest.raises(PeerError, match="without TLS"):
            echo(receiver, None)
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.set_ciphers("AES128-SHA")
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with socket.create_connection(("127.0.0.1", receiver.port)) as raw, pytest.raises((ssl.SSLError, OSError)):
            old.wrap_socket(raw)
        wanted = {"CERTIFICATE_VERIFY_FAILED", "NO_SHARED_CIPHER"}
        wait_until(lambda: wanted <= {event.get("reason") for event in events}, "both refusals in the log")
    assert echo(receiver, Identity(settings(authority.issue("ct")))) == 0


def test_a_node_trusts_no_strange_archive(tmp_path, receiver, authority):
    own = authority.issue("node2")
    other = Authority(tmp_path / "elsewhere", "other").certificate
    with pytest.raises(PeerError, match="its certificate is not taken: .*self-signed certificate.*; see"):
        echo(receiver, Identity(Tls(certificate=own.certificate, key=own.key, ca=other)))


def test_an_archive_that_speaks_no_tls(tmp_path, identity):
    with (
        receiving(tmp_path / "spool", Recorder()) as plain,
        pytest.raises(PeerError, match="no TLS with it: .*; does it speak TLS at this port"),
    ):
        echo(plain, identity)


def test_silent_peers_delay_nobody(receiver, identity):
    silent = [socket.create_connection(("127.0.0.1", receiver.port)) for _ in range(5)]
    began = time.monotonic()
    assert echo(receiver, identity) == 0
    assert time.monotonic() - began < 5  # a handshake within accept() would wait 30 s
    for connection in silent:
        connection.close()


def test_certificates_that_are_replaced_serve_the_next_connection(tmp_path, authority):
    files = authority.issue("node")
    node = Identity(settings(files))
    first, _ = node.acceptor(), node.requestor()
    assert node.acceptor() is first
    renewed = Authority(tmp_path / "renewed").issue("node")
    with capture_logs() as events:
        shutil.copy(renewed.key, files.key)  # and not yet its certificate
        assert node.acceptor() is first
        shutil.copy(renewed.certificate, files.certificate)
        assert node.acceptor() is not first
    assert [event["event"] for event in events] == ["certificates_not_reloaded", "certificates_reloaded"]
    with receiving(tmp_path / "spool", Recorder(), identity=node) as receiver:
        client = Tls(certificate=renewed.certificate, key=renewed.key, ca=renewed.ca)
        with pytest.raises(PeerError):  # its own authority is still the old one, which did not sign this client
            echo(receiver, Identity(client))


@pytest.mark.parametrize(
    ("broken", "reason"),
    [("certificate", "No such file"), ("key", "No such file"), ("ca", "No such file")],
)
def test_files_that_are_not_there_are_named(authority, broken, reason):
    given = settings(authority.issue("node"))
    missing = getattr(given, broken)
    missing.unlink()
    with pytest.raises(TlsError, match=reason):
        Identity(given)


def test_files_that_do_not_belong_together_are_named(authority):
    one, other = authority.issue("one"), authority.issue("other")
    with pytest.raises(TlsError, match=r"one\.pem: .*MISMATCH.*\[tls\]"):
        Identity(Tls(certificate=one.certificate, key=other.key, ca=one.ca))
    one.ca.write_text("no certificate")
    with pytest.raises(TlsError, match=r"ca\.pem"):
        Identity(settings(one))


def test_pynetdicom_as_it_is_gets_in_too(receiver, authority):
    files = authority.issue("ct")
    context = ssl.create_default_context(cafile=str(files.ca))
    context.load_cert_chain(files.certificate, files.key)
    ae = AE("CT01")
    ae.add_requested_context(Verification)
    association = ae.associate("127.0.0.1", receiver.port, tls_args=(context, "localhost"))
    assert association.send_c_echo().Status == 0
    association.release()
