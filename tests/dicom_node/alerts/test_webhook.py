"""Alerts as webhooks: signed as another implementation checks it, and patient with every answer."""

from __future__ import annotations

import base64
import json
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from standardwebhooks import Webhook as Verifier
from standardwebhooks import WebhookVerificationError

from dicom_node.alerts import channel as channels
from dicom_node.alerts import text
from dicom_node.alerts.channel import Refused, Unreachable, Unready
from dicom_node.alerts.settings import Webhook
from dicom_node.alerts.webhook import WebhookChannel
from tests.dicom_node.alerts.made import EARLY, PATIENT, note, report, written
from tests.dicom_node.certificates import Authority

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
OLD_SECRET = "whsec_" + base64.b64encode(bytes(range(50, 82))).decode()


class Receiver(BaseHTTPRequestHandler):
    """Keeps what it gets, and answers as its server is told."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
        self.server.answer(self)

    def do_HEAD(self) -> None:
        self.send_response(405)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def answer(status: int, **headers: str):
    def say(request: Receiver) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()

    return say


@pytest.fixture
def receiver() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    server.daemon_threads = True
    server.got, server.answer = [], answer(204)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text(SECRET + "\n")
    return path


def settings(receiver: ThreadingHTTPServer, secret: Path, scheme: str = "http", **changed: object) -> Webhook:
    return Webhook(name="ed", url=f"{scheme}://127.0.0.1:{receiver.server_port}/alerts", secret=secret, **changed)


def test_a_request_is_signed_as_standard_webhooks_has_it(ledger, receiver, secret):
    note(ledger, EARLY, final=False)
    message, alert = written(ledger)
    channel = WebhookChannel(settings(receiver, secret, link="https://node/#{alert}"))
    assert channel.send(message, alert) == "HTTP 204"
    ((headers, body),) = receiver.got
    told = Verifier(SECRET).verify(body, headers)
    assert headers["webhook-id"] == message.control_id
    assert told["type"] == "alert.raised"
    data = told["data"]
    assert (data["level"], data["state"], data["standing"]) == ("critical", "provisional", "preliminary")
    assert data["findings"][0]["volume_ml"] == 31.2
    assert data["link"] == "https://node/#1"
    illegal = replace(alert, study_uid="1.2&x=/ #")
    assert text.link("https://node/?s={study_uid}", illegal) == "https://node/?s=1.2%26x%3D%2F%20%23"
    assert "Research use only, not a medical device." in data["limits"]
    with pytest.raises(WebhookVerificationError):
        Verifier(OLD_SECRET).verify(body, headers)
    with pytest.raises(WebhookVerificationError):
        Verifier(SECRET).verify(body.replace(b"critical", b"urgent!!"), headers)


def test_while_one_secret_replaces_another_both_sign(ledger, receiver, secret):
    note(ledger, report())
    secret.write_text(f"{SECRET}\n{OLD_SECRET}\n")
    WebhookChannel(settings(receiver, secret)).send(*written(ledger))
    ((headers, body),) = receiver.got
    assert Verifier(SECRET).verify(body, headers) == Verifier(OLD_SECRET).verify(body, headers) == json.loads(body)


def test_whose_head_it_is_is_said_only_where_that_is_wanted(ledger, receiver, secret):
    note(ledger, report())
    message, alert = written(ledger)
    WebhookChannel(settings(receiver, secret)).send(message, alert)
    WebhookChannel(settings(receiver, secret, identify=True)).send(message, alert)
    bodies = [body.decode() for _, body in receiver.got]
    assert not any(value in bodies[0] for value in (PATIENT["PatientName"], PATIENT["PatientBirthDate"], '"P1"'))
    assert json.loads(bodies[1])["data"]["patient"] == PATIENT


def test_a_repetition_says_the_same_under_the_same_id(ledger, receiver, secret):
    note(ledger, EARLY, final=False)
    channel = WebhookChannel(settings(receiver, secret))
    channel.send(*written(ledger))
    note(ledger, report("urgent", 12))
    channel.send(*written(ledger))
    (first, second) = receiver.got
    assert first[0]["webhook-id"] == second[0]["webhook-id"]
    assert first[1] == second[1]


@pytest.mark.parametrize(("status", "attempts"), [(400, 6), (401, 6), (404, 6), (410, 1), (302, 6)])
def test_refusals(ledger, receiver, secret, status, attempts):
    receiver.answer = answer(status, location="https://elsewhere.example/")
    note(ledger, report())
    with pytest.raises(Refused, match=str(status)) as refusal:
        WebhookChannel(settings(receiver, secret)).send(*written(ledger))
    assert refusal.value.attempts == attempts
    assert len(receiver.got) == 1, "no redirect is followed"


@pytest.mark.parametrize(
    ("status", "asked", "wait_s"),
    [
        (429, "7", 7),
        (503, None, None),
        (500, "soon", None),
        (429, "in 900 s", 900),
        (503, "999999999", 3600),
        (429, "-5", None),
    ],
)
def test_what_is_not_taken_now_waits_as_long_as_it_is_asked_to(ledger, receiver, secret, status, asked, wait_s):
    if asked == "in 900 s":  # as a date, which must be made when it is asked for
        asked = formatdate(time.time() + 900, usegmt=True)
    receiver.answer = answer(status, **({"retry_after": asked} if asked else {}))
    note(ledger, report())
    with pytest.raises(Unreachable, match=str(status)) as wait:
        WebhookChannel(settings(receiver, secret)).send(*written(ledger))
    assert wait.value.wait_s == (wait_s if wait_s is None else pytest.approx(wait_s, abs=60))


def test_a_server_that_drips_is_cut_off(ledger, receiver, secret, monkeypatch):
    over = threading.Event()

    def drip(request: Receiver) -> None:
        request.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while not over.wait(0.05):
            request.wfile.write(b"x")

    receiver.answer = drip
    monkeypatch.setattr(channels.Deadline.__init__, "__defaults__", (0.3,))
    note(ledger, report())
    with pytest.raises(Unreachable, match="too long"):
        WebhookChannel(settings(receiver, secret)).send(*written(ledger))
    over.set()


def test_of_an_answer_no_more_than_its_head_is_read(ledger, receiver, secret):
    def flood(request: Receiver) -> None:
        answer(200)(request)
        try:
            while True:
                request.wfile.write(b"x" * 65536)
        except OSError:
            receiver.flooded = True

    receiver.answer = flood
    note(ledger, report())
    assert WebhookChannel(settings(receiver, secret)).send(*written(ledger)) == "HTTP 200"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "No such file"),
        (b"", "is empty"),
        (b"whsec_not base64!", "whsec_ and Base64"),
        (b"whsec_c2hvcnQ=", "a secret of 5 bytes"),
        (b"\xff\xfe", "not UTF-8"),
        (b"A" * 5000, "more than 4096"),
    ],
)
def test_a_bad_secret_is_told_of_without_a_word_of_it(ledger, receiver, secret, content, problem):
    secret.unlink()
    if content is not None:
        secret.write_bytes(content)
    note(ledger, report())
    channel = WebhookChannel(settings(receiver, secret))
    for try_it in (lambda: channel.send(*written(ledger)), channel.reach):
        with pytest.raises(Unready, match=problem) as error:
            try_it()
        assert "c2hvcnQ" not in error.value.full
        assert "not base64!" not in error.value.full
    assert receiver.got == []


def test_a_certificate_is_checked_by_the_sites_own_authority(ledger, receiver, secret, tmp_path):
    authority = Authority(tmp_path / "pki")
    files = authority.issue("server")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    receiver.socket = context.wrap_socket(receiver.socket, server_side=True)
    note(ledger, report())
    message, alert = written(ledger)
    channel = WebhookChannel(settings(receiver, secret, "https", ca=authority.certificate))
    assert channel.send(message, alert) == "HTTP 204"
    assert "answers (HTTP 405" in channel.reach()
    with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
        WebhookChannel(settings(receiver, secret, "https")).send(message, alert)
    with pytest.raises(Unready, match="have `ca` name"):
        WebhookChannel(settings(receiver, secret, "https", ca=tmp_path / "none.pem")).send(message, alert)
    with pytest.raises(Unready, match="have `ca` name"):
        WebhookChannel(settings(receiver, secret, "https", ca=secret)).send(message, alert)


def test_nobody_listens(ledger, receiver, secret):
    note(ledger, report())
    told = settings(receiver, secret)
    receiver.shutdown()
    receiver.server_close()
    with pytest.raises(Unreachable, match="refused") as error:
        WebhookChannel(told).send(*written(ledger))
    assert "/alerts" not in error.value.full, "many services have a secret in the path"
