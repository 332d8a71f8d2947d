"""The audit trail: what is told of a node's life, in which words, where it goes, and that it holds nobody up."""

from __future__ import annotations

import re
import socket
import ssl
import stat
import threading
import time
from base64 import b64decode
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from pydicom import dcmread
from pydicom.uid import CTImageStorage
from pynetdicom import AE
from pynetdicom.sop_class import Verification
from structlog.testing import capture_logs

from dicom_node import reload
from dicom_node.configuration.config import Config, ConfigError, load
from dicom_node.configuration.sections import Audit, Destination, Tls
from dicom_node.delivery.outbox import DeliveryState, OutboxItem
from dicom_node.monitoring import syslog
from dicom_node.monitoring.audit import Participant
from dicom_node.monitoring.metrics import Metrics
from dicom_node.monitoring.trail import Trail
from dicom_node.network.refusal import Refusal
from dicom_node.network.services import Peer
from dicom_node.network.tls import Identity
from dicom_node.operation import trial
from dicom_node.retention import DAY_S, Retention
from dicom_node.simulation.pacs import Pacs
from dicom_node.simulation.scanner import push
from dicom_node.storage.journal import Journal, SeriesState
from dicom_node.storage.spool import Instance, Outcome, Spool
from tests.dicom_node.certificates import Authority, Files
from tests.dicom_node.conftest import Pushable, config_for, running, wait_until
from tests.dicom_node.instances import SERIES, STUDY, Recorder, encoded, image, receiving, write

SCHEMA = Path(__file__).with_name("audit_message.rng")
FRAME = re.compile(r"<85>1 (\S+)T\S+\+00:00 \S+ scanside \d+ DICOM\+RFC3881 - \ufeff(<AuditMessage>.*</AuditMessage>)")


def messages(file: Path) -> list[ET.Element]:
    """What a file holds, each line a frame of syslog."""
    if not file.exists():
        return []
    return [ET.fromstring(FRAME.fullmatch(line)[2]) for line in file.read_text("utf-8").splitlines()]


def told(message: ET.Element) -> tuple[str, str, str]:
    """Event, type and outcome."""
    event = message.find("EventIdentification")
    kind = event.find("EventTypeCode")
    return (
        event.find("EventID").get("csd-code"),
        "" if kind is None else kind.get("originalText"),
        event.get("EventOutcomeIndicator"),
    )


def objects(message: ET.Element) -> dict[str, str]:
    """IDs of the objects that took part, by the type of the ID."""
    found = message.findall("ParticipantObjectIdentification")
    return {
        one.find("ParticipantObjectIDTypeCode").get("originalText"): one.get("ParticipantObjectID") for one in found
    }


def counts(message: ET.Element) -> dict[str, int]:
    return {one.get("UID"): int(one.get("NumberOfInstances")) for one in message.iter("SOPClass")}


def who(message: ET.Element) -> list[tuple[str | None, str | None, str]]:
    """AE title, address and role of those who took part."""
    return [
        (
            one.get("AlternativeUserID"),
            one.get("NetworkAccessPointID"),
            getattr(one.find("RoleIDCode"), "attrib", {}).get("originalText", ""),
        )
        for one in message.findall("ActiveParticipant")
    ]


def validated(file: Path) -> int:
    """Hold every message of a file against the schema; how many there are."""
    etree = pytest.importorskip(
        "lxml.etree", reason="lxml is not installed: audit messages are NOT held against the schema of PS3.15"
    )
    schema = etree.RelaxNG(etree.parse(SCHEMA))
    found = messages(file)
    for message in found:
        schema.assertValid(etree.fromstring(ET.tostring(message)))
    return len(found)


def test_a_node_s_life_is_told(bleeding: Pushable, tmp_path: Path, pacs: Pacs):
    """Start, a study in, results out, somebody who may not, a reload, stop; and PatientID nowhere but there."""
    file = tmp_path / "audit.log"
    base = config_for(tmp_path / "node", pacs.port)
    config = base.model_copy(
        update={
            "audit": Audit(file=file),
            "node": base.node.model_copy(update={"allowed_calling_aes": ("CT1",)}),
        }
    )
    with capture_logs() as events, running(config) as node:
        assert not push(bleeding.paths, ("127.0.0.1", node.port), calling_ae="CT1", called_ae="SCANSIDE").failed
        stranger = AE("CT9")
        stranger.add_requested_context(Verification)
        assert not stranger.associate("127.0.0.1", node.port).is_established
        wait_until(lambda: [told(one)[0] for one in messages(file)].count("110104") == 2, "both transfers")
        wanted, changed, _ = reload.merge(node.config, config.model_copy(update={"triage": ()}))
        node.reload(wanted)
        node.trail.reconfigured(changed)
    found = messages(file)
    assert Counter(map(told, found)) == {
        ("110100", "Application Start", "0"): 1,
        ("110104", "", "0"): 2,
        ("110113", "Node Authentication", "4"): 1,
        ("110102", "", "0"): 1,
        ("110113", "Software Configuration", "0"): 1,
        ("110100", "Application Stop", "0"): 1,
    }
    assert (told(found[0])[1], told(found[-1])[1]) == ("Application Start", "Application Stop")
    source = dcmread(bleeding.paths[0])
    received, sent = [one for one in found if told(one)[0] == "110104"]
    mine = f"AETITLES={config.node.ae_title}"
    assert who(received) == [
        ("AETITLES=CT1", "127.0.0.1", "Source Role ID"),
        (mine, socket.gethostname(), "Destination Role ID"),
    ]
    assert counts(received) == {CTImageStorage: len(bleeding.paths)}
    assert received.find("EventIdentification").get("EventActionCode") == "C"
    assert [role for _, _, role in who(sent)] == ["Source Role ID", "Destination Role ID"]
    assert who(sent)[1][0] == "AETITLES=PACS"
    assert sum(counts(sent).values()) == len(pacs.received)
    for message in (received, sent):
        assert objects(message) == {"Study Instance UID": source.StudyInstanceUID, "Patient Number": source.PatientID}
    (refused,) = [one for one in found if told(one)[1] == "Node Authentication"]
    assert who(refused)[1][:2] == ("AETITLES=CT9", "127.0.0.1")
    assert objects(refused) == {"Node ID": "127.0.0.1"}
    why = b64decode(refused.find(".//ParticipantObjectDetail").get("value")).decode()
    assert why == "its AE title is not in node.allowed_calling_aes"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert str(source.PatientName) not in file.read_text()
    assert source.PatientID not in str(events)
    assert validated(file) == len(found)


@contextmanager
def on(settings: Audit, **more: object) -> Iterator[tuple[Trail, Metrics]]:
    metrics = Metrics()
    trail = Trail(settings, "SCANSIDE", metrics=metrics, **more)
    trail.start()
    try:
        yield trail, metrics
    finally:
        trail.stop()


def lost(metrics: Metrics, where: str) -> float:
    return metrics.registry.get_sample_value("scanside_audit_lost_total", {"where": where}) or 0


def peer(ae_title: str = "CT1", port: int = 1) -> Peer:
    return Peer(ae_title, "192.0.2.7", port, {})


def instance(path: Path, study: str = "1.2", sop_class: str = CTImageStorage) -> Instance:
    return Instance(study, "1.2.3", sop_class, "1.2.3.4", "1.2.840.10008.1.2.1", path, "")


def test_a_message_for_each_association_study_and_outcome(tmp_path: Path):
    first, second = write(
        tmp_path, image(1, PatientID="A"), image(2, PatientID="Bø", SpecificCharacterSet="ISO_IR 192")
    )
    file = tmp_path / "audit.log"
    with on(Audit(file=file)) as (trail, _):
        for outcome, path, study in (
            (Outcome.NEW, first, "1.1"),
            (Outcome.NEW, first, "1.1"),
            (Outcome.REPEATED, first, "1.1"),
            (Outcome.NEW, second, "1.2"),
            (Outcome.CONFLICT, tmp_path / "gone", "1.3"),
        ):
            trail.kept(peer(), outcome, instance(path, study))
        trail.kept(peer(port=2), Outcome.NEW, instance(first, "1.1"))
        trail.ended(peer())
        trail.ended(peer())  # says nothing twice
    transfers = [one for one in messages(file) if told(one)[0] == "110104"]
    assert [
        (*objects(one).values(), *counts(one).values(), one[0].get("EventActionCode"), told(one)[2])
        for one in transfers
    ] == [
        ("1.1", "A", 2, "C", "0"),
        ("1.1", "A", 1, "R", "0"),
        ("1.2", "Bø", 1, "C", "0"),
        ("1.3", "", 1, "C", "4"),
    ]
    assert validated(file) == 6


def test_a_study_that_is_removed_is_told_with_whose_it_was(tmp_path: Path):
    file = tmp_path / "audit.log"
    spool, journal = Spool(tmp_path / "spool", 0), Journal(tmp_path / "journal.sqlite")
    slice_ = image(1, PatientID="P9")
    spool.store(
        encoded(slice_), sop_class_uid=CTImageStorage, sop_uid=slice_.SOPInstanceUID,
        transfer_syntax_uid="1.2.840.10008.1.2.1", calling_ae="CT1",
    )  # fmt: skip
    journal.record_result(
        STUDY, SERIES, 1, state=SeriesState.ANALYSED, reason=None, slices=1, report_json=None, files=(), destinations={}
    )
    with on(Audit(file=file)) as (trail, _):
        retention = Retention(spool, journal, tmp_path / "results", keep_days=1, trail=trail)
        assert retention.sweep(time.time()) == []
        assert retention.sweep(time.time() + 2 * DAY_S) == [STUDY]
    journal.close()
    (removed,) = [one for one in messages(file) if told(one)[0] == "110105"]
    assert removed.find("EventIdentification").get("EventActionCode") == "D"
    assert objects(removed) == {"Study Instance UID": STUDY, "Patient Number": "P9"}
    assert validated(file) == 3


def test_what_peers_call_themselves_breaks_neither_line_nor_xml(tmp_path: Path):
    file = tmp_path / "audit.log"
    with on(Audit(file=file)) as (trail, _):
        trail.refused("192.0.2.7", 'A<"&\n\x00\ud800B', "because")
    alert = messages(file)[1]
    assert who(alert)[1][0] == 'AETITLES=A<"&???B'
    assert validated(file) == 3


def test_who_may_not_get_in_is_an_alert_and_who_finds_no_place_is_none(tmp_path: Path, authority: Authority):
    file, metrics = tmp_path / "audit.log", Metrics()
    intake = Recorder()
    with on(Audit(file=file)) as (trail, _):
        told_of = {"trail": trail, "metrics": metrics}
        with receiving(tmp_path / "a", intake, allowed_addresses=("192.0.2.0/24",), **told_of) as receiver:
            socket.create_connection(("127.0.0.1", receiver.port)).close()
            wait_until(lambda: rejections(metrics, "address") == 1, "the refusal of an address")
        with (
            receiving(tmp_path / "b", intake, identity=identity(authority), **told_of) as receiver,
            socket.create_connection(("127.0.0.1", receiver.port)) as plain,
        ):
            plain.sendall(b"no TLS, and longer than the head of a record of it")
            wait_until(lambda: rejections(metrics, "tls") == 1, "the refusal of a plain connection")
        with receiving(tmp_path / "c", intake, max_associations=1, **told_of) as receiver:
            one, other = (AE("CT1") for _ in range(2))
            one.add_requested_context(Verification)
            other.add_requested_context(Verification)
            first = one.associate("127.0.0.1", receiver.port)
            assert not other.associate("127.0.0.1", receiver.port).is_established
            wait_until(lambda: rejections(metrics, "limit") == 1, "the refusal for want of a place")
            first.release()
    alerts = [one for one in messages(file) if told(one)[0] == "110113"]
    assert [told(one)[1:] for one in alerts] == [("Node Authentication", "4")] * 2
    assert [b64decode(one.find(".//ParticipantObjectDetail").get("value")).decode() for one in alerts] == [
        Refusal.ADDRESS.why,
        Refusal.TLS.why,
    ]
    assert validated(file) == 4


def rejections(metrics: Metrics, reason: str) -> float:
    return metrics.registry.get_sample_value("scanside_rejections_total", {"reason": reason}) or 0


@pytest.mark.parametrize(
    ("host", "kind"), [("pacs.local", "1"), ("192.0.2.7", "2"), ("fe80::1", "2"), ("0.0.0.0", "2")]
)
def test_an_archive_is_a_machine_s_name_or_an_address(host: str, kind: str):
    made = Participant("pacs", "PACS", host=host).element()
    assert (made.get("NetworkAccessPointID"), made.get("NetworkAccessPointTypeCode")) == (host, kind)


def test_what_an_archive_did_not_take_is_told_apart(tmp_path: Path):
    (path,) = write(tmp_path, image(1))
    file = tmp_path / "audit.log"
    item = OutboxItem(
        1, "1.1", "1.2", 1, "sr", path, "1.9", "1.2.3", "pacs", DeliveryState.SENDING, 0, 0.0, None, 0.0, None
    )
    destination = Destination(name="pacs", ae_title="PACS", host="pacs.local", port=104)
    with on(Audit(file=file)) as (trail, _):
        trail.sending(destination, [item, item])
        trail.sent(destination, [item])
        trail.sent(destination, [item], failure="not taken")
        trail.sent(destination, [])
    begun, taken, other = [one for one in messages(file) if told(one)[0] != "110100"]
    assert (told(begun), counts(begun)) == (("110102", "", "0"), {"1.9": 2})
    assert (told(taken), counts(taken)) == (("110104", "", "0"), {"1.9": 1})
    assert (told(other)[2], other.find(".//EventOutcomeDescription").text) == ("4", "not taken")
    assert who(taken)[1] == ("AETITLES=PACS", "pacs.local", "Destination Role ID")
    assert validated(file) == 5


def test_without_a_file_and_a_server_nothing_happens(tmp_path: Path):
    threads = threading.active_count()
    with on(Audit()) as (trail, metrics):
        trail.kept(peer(), Outcome.NEW, instance(tmp_path))
        trail.ended(peer())
        trail.reconfigured(["log.level"])
        assert threading.active_count() == threads
        assert trail._transfers == {}
    assert lost(metrics, "file") == 0


def test_a_change_of_who_may_send_is_one_of_security(tmp_path: Path):
    with on(Audit(file=tmp_path / "audit.log")) as (trail, _):
        trail.reconfigured(["node.allowed_calling_aes", "log.level"])
    assert told(messages(tmp_path / "audit.log")[1])[1] == "Security Configuration"


def test_a_file_that_is_moved_away_is_begun_anew_and_one_that_can_not_be_is_named(tmp_path: Path):
    file = tmp_path / "audit.log"
    with on(Audit(file=file)) as (trail, metrics):
        wait_until(lambda: messages(file), "the start")
        file.rename(tmp_path / "audit.log.1")
        trail.reconfigured(["log.level"])
        wait_until(lambda: messages(file), "a new file")
        file.unlink()
        file.mkdir()
        with capture_logs() as events:
            trail.reconfigured(["log.level"])
            trail.reconfigured(["log.level"])
            wait_until(lambda: lost(metrics, "file") == 2, "two lost messages")
        assert [event["event"] for event in events] == ["audit_messages_lost"]
        assert "Is a directory" in events[0]["reason"]


class Collector:
    """A syslog server over TLS that parses octet counting (RFC 5425 section 4.3)."""

    def __init__(self, files: Files, port: int = 0) -> None:
        self.frames: list[bytes] = []
        self.connections = 0
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(files.certificate, files.key)
        self._context.load_verify_locations(files.ca)
        self._context.verify_mode = ssl.CERT_REQUIRED
        self._socket = socket.create_server(("127.0.0.1", port))
        self.port = self._socket.getsockname()[1]
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                plain, _ = self._socket.accept()
            except OSError:
                return
            try:
                with self._context.wrap_socket(plain, server_side=True) as connection:
                    self.connections += 1
                    self._open = [connection]
                    with connection.makefile("rb") as stream:
                        while size := self._size(stream):
                            self.frames.append(stream.read(size))
                    connection.unwrap()
            except (OSError, ValueError):
                continue

    @staticmethod
    def _size(stream) -> int:
        digits = b""
        while (one := stream.read(1)) not in (b" ", b""):
            assert one.isdigit()
            digits += one
        return int(digits or 0)

    def stop(self) -> None:
        for each in (self._socket, *self._open):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "pki")


def identity(authority: Authority) -> Identity:
    files = authority.issue("node")
    return Identity(Tls(certificate=files.certificate, key=files.key, ca=files.ca))


def test_a_server_gets_every_message_over_tls_also_after_it_was_away(tmp_path: Path, authority: Authority, monkeypatch):
    monkeypatch.setattr(syslog, "FIRST_WAIT_S", 0.05)
    monkeypatch.setattr(syslog, "FAREWELL_S", 20.0)
    collector = Collector(authority.issue("collector"))
    file = tmp_path / "audit.log"
    settings = Audit(host="127.0.0.1", port=collector.port, file=file)
    with capture_logs() as events, on(settings, identity=identity(authority)) as (trail, metrics):
        trail.reconfigured(["log.level"])
        wait_until(lambda: len(collector.frames) == 2, "two messages")
        first = collector.frames
        collector.stop()
        trail.reconfigured(["log.format"])
        wait_until(lambda: any(e["event"] == "audit_server_unreachable" for e in events), "a warning")
        trail.refused("192.0.2.7", "CT9", "because")
        collector = Collector(authority.issue("collector"), collector.port)
        wait_until(lambda: len(collector.frames) == 2, "what waited")
    collector.stop()
    assert collector.connections == 1
    framed = [*first, *collector.frames]
    assert len(framed) == 5  # with the stop, which came before the connection was closed
    assert [one + b"\n" for one in framed] == file.read_bytes().splitlines(keepends=True)
    assert lost(metrics, "server") == 0
    assert [event["event"] for event in events] == ["audit_server_unreachable", "audit_server_reached"]
    assert validated(file) == 5


def test_a_server_of_a_stranger_gets_nothing(tmp_path: Path, authority: Authority):
    collector = Collector(Authority(tmp_path / "elsewhere", "other").issue("collector"))
    with (
        capture_logs() as events,
        on(Audit(host="127.0.0.1", port=collector.port), identity=identity(authority)) as (_, metrics),
    ):
        wait_until(lambda: any(e["event"] == "audit_server_unreachable" for e in events), "a warning")
    collector.stop()
    assert "certificate verify failed" in events[0]["reason"].lower().replace("_", " ")
    assert lost(metrics, "server") == 2
    assert collector.frames == []


def test_a_name_that_can_be_no_host_s_is_an_unreachable_server():
    """Python raises no OSError for it."""
    lost = []
    server = syslog.Server(Audit(host="a..b", transport="udp"), None, lost.append)
    server.start()
    with capture_logs() as events:
        server.put(b"frame")
        wait_until(lambda: any(e["event"] == "audit_server_unreachable" for e in events), "a warning")
        server.stop()
    assert lost == [1]


def test_datagrams_are_frames():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(20)
        with on(Audit(host="127.0.0.1", port=server.getsockname()[1], transport="udp")):
            assert FRAME.fullmatch(server.recv(65536).decode())


def test_a_server_that_accepts_and_says_nothing_holds_nobody_up(tmp_path: Path, authority: Authority, monkeypatch):
    """Intake and delivery go on while it hangs; what is too much is counted, and the file has all of it."""
    monkeypatch.setattr(syslog, "MOST_WAITING", 3)
    monkeypatch.setattr(syslog, "TIMEOUT_S", 0.5)
    file = tmp_path / "audit.log"
    intake = Recorder()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings = Audit(host="127.0.0.1", port=silent.getsockname()[1], file=file)
        with on(settings, identity=identity(authority)) as (trail, metrics):
            paths = write(tmp_path / "scanner", *(image(n) for n in range(1, 4)))
            with receiving(tmp_path / "spool", intake, trail=trail) as receiver:
                for number in range(8):
                    sent = push(paths, ("127.0.0.1", receiver.port), calling_ae="CT1", called_ae="SCANSIDE")
                    assert not sent.failed
                    intake.wait(lambda intake, done=number + 1: len(intake.ended()) == done)
            wait_until(lambda: len(messages(file)) == 9, "a start and eight transfers")
            assert lost(metrics, "server") == 6
    assert len(messages(file)) == 10
    assert lost(metrics, "server") == 10
    assert lost(metrics, "file") == 0


def test_check_tries_the_file_and_the_server(tmp_path: Path, authority: Authority):
    files = authority.issue("node")
    tls = Tls(certificate=files.certificate, key=files.key, ca=files.ca)
    collector = Collector(authority.issue("collector"))
    good = Audit(file=tmp_path / "audit.log", host="127.0.0.1", port=collector.port)
    assert [(item.ok, item.message) for item in trial.audit(Config(audit=good, tls=tls))] == [
        (True, str(tmp_path / "audit.log")),
        (True, "127.0.0.1 answers"),
    ]
    collector.stop()
    bad = good.model_copy(update={"file": tmp_path / "nowhere" / "audit.log"})
    file, server = trial.audit(Config(audit=bad, tls=tls))
    assert (file.ok, server.ok) == (False, False)
    assert "can't be written" in file.message
    assert "Connection refused" in server.message
    assert not (tmp_path / "audit.log").exists()


def test_a_frame_is_one_of_rfc_5424():
    framed = syslog.frame("<AuditMessage>ø</AuditMessage>", datetime(2026, 3, 4, 5, 6, 7, 8000, tzinfo=UTC))
    head, _, message = framed.partition(b"\xef\xbb\xbf")
    assert re.fullmatch(rb"<85>1 2026-03-04T05:06:07\.008\+00:00 \S+ scanside \d+ DICOM\+RFC3881 - ", head)
    assert message.decode() == "<AuditMessage>ø</AuditMessage>"


def test_tls_to_a_server_needs_certificates(tmp_path: Path):
    path = tmp_path / "node.toml"
    path.write_text('[audit]\nhost = "audit.hospital"\n')
    with pytest.raises(ConfigError, match=r'audit\.host: "audit\.hospital" needs certificate, key and ca in \[tls\]'):
        load(path)
    path.write_text('[audit]\nhost = "audit.hospital"\ntransport = "udp"\nfile = "audit.log"\n')
    assert load(path).audit.file == tmp_path / "audit.log"
    assert reload.merge(Config(), Config(audit=Audit(file=path)))[2] == ["audit.file"]
