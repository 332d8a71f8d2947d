"""Alerts as e-mail, to a server that another library runs."""

from __future__ import annotations

import email
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, AuthResult
from structlog.testing import capture_logs

from dicom_node.alerts.channel import Refused, Unreachable, Unready
from dicom_node.alerts.mail import MailChannel, compose
from dicom_node.alerts.settings import Email
from tests.dicom_node.alerts.made import EARLY, PATIENT, note, report, written
from tests.dicom_node.certificates import Authority

SENDER, PEOPLE = "scanside@hospital.example", ("on-call@hospital.example", "chief@hospital.example")


class Box:
    """What a server does with what it gets."""

    def __init__(self, **answers: str) -> None:
        self.answers, self.got = answers, []

    async def handle_RCPT(self, _server, _session, envelope, address, _options):  # noqa: N802 (aiosmtpd's name)
        said = self.answers.get(address.partition("@")[0])
        if said is None:
            envelope.rcpt_tos.append(address)
        return said or "250 OK"

    async def handle_DATA(self, _server, _session, envelope):  # noqa: N802 (likewise)
        self.got.append(email.message_from_bytes(envelope.content))
        return self.answers.get("DATA", "250 OK")


@contextmanager
def serving(box: Box, **options) -> Iterator[Controller]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    controller = Controller(box, hostname="127.0.0.1", port=port, ready_timeout=20, **options)
    controller.start()
    try:
        yield controller
    finally:
        controller.stop()


def settings(port: int, **changed) -> Email:
    told = {"name": "ed", "host": "127.0.0.1", "security": "none", "sender": SENDER, "recipients": PEOPLE}
    return Email.model_validate(told | {"port": port} | changed)


@pytest.fixture
def box() -> Box:
    return Box()


def text_of(letter) -> str:
    return letter.get_payload(decode=True).decode(letter.get_content_charset())


def test_a_letter_says_what_is_known_and_not_whose_head_it_is(ledger, box):
    note(ledger, EARLY, final=False)
    message, alert = written(ledger)
    with serving(box) as server:
        channel = MailChannel(settings(server.port, link="https://node/#{alert}"))
        assert channel.send(message, alert) == "taken by the server"
        assert "answers" in channel.reach()
    (letter,) = box.got
    assert letter["Message-ID"] == f"<{message.control_id}@hospital.example>"
    assert letter["Auto-Submitted"] == "auto-generated"
    assert letter["Importance"] == "high"
    assert "CRITICAL: Intracerebral haemorrhage 31.2 ml" in letter["Subject"]
    for words in ("provisional: the series is still arriving", "Research use only, not a medical device.",
                  "https://node/#1", "31.2 ml on 3 of 30 slices"):  # fmt: skip
        assert words in text_of(letter)
    for value in (*PATIENT.values(), "Muster", "Änne"):
        assert value == "F" or value not in text_of(letter) + str(letter["Subject"])


def test_whose_head_it_is_where_that_is_wanted(ledger):
    note(ledger, report())
    letter = compose(settings(25, identify=True), *written(ledger))
    assert "Patient: Muster^Änne" in letter.get_content()
    assert "P1" not in letter["Subject"]


def test_a_repetition_is_the_same_letter_and_what_follows_names_the_first(ledger):
    note(ledger, EARLY, final=False)
    message, alert = written(ledger)
    first = bytes(compose(settings(25), message, alert))
    assert bytes(compose(settings(25), *written(ledger))) == first
    ledger.sent(message, "taken")
    note(ledger, report("routine"))
    second = compose(settings(25), *written(ledger))
    assert second["In-Reply-To"] == f"<{message.control_id}@hospital.example>"
    assert "WITHDRAWN" in second["Subject"]
    note(ledger, report("urgent", 3), series="1.9")
    assert "Importance" not in compose(settings(25), *reversed_claim(ledger))


def reversed_claim(ledger):
    """What comes after the message under way."""
    ledger.sent(written(ledger)[0], "taken")
    return written(ledger)


def test_words_of_a_patient_make_no_header(ledger):
    note(ledger, report(), patient={"PatientName": "A\r\nBcc: x@y.z\r\n\r\nhello"})
    letter = compose(settings(25, identify=True), *written(ledger))
    assert letter["Bcc"] is None
    assert "\nBcc" not in letter.get_content()


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        ({"on-call": "550 no such user Muster", "chief": "550 no such user"}, Refused),
        ({"on-call": "550 no such user", "chief": "450 greylisted"}, Unreachable),
        ({"DATA": "554 spam"}, Refused),
        ({"DATA": "451 try later"}, Unreachable),
    ],
)
def test_what_a_server_does_not_take(ledger, answers, error):
    note(ledger, report())
    with serving(Box(**answers)) as server, pytest.raises(error) as raised:
        MailChannel(settings(server.port)).send(*written(ledger))
    assert "Muster" not in str(raised.value)


def test_one_of_two_takes_it_and_that_is_said(ledger):
    note(ledger, report())
    with serving(Box(chief="550 no such user")) as server, capture_logs() as logs:
        assert "but for 1 of 2" in MailChannel(settings(server.port)).send(*written(ledger))
    assert [(line["event"], line["log_level"], line["refused"]) for line in logs if line["event"] != "alert"] == [
        ("recipients_refused", "warning", 1)
    ]


def test_over_starttls_with_a_login_from_a_file(ledger, box, tmp_path: Path):
    authority = Authority(tmp_path / "pki")
    files = authority.issue("mail")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)

    def login(server: SMTP, session, envelope, mechanism: str, data) -> AuthResult:
        return AuthResult(success=(data.login, data.password) == (b"node", b"secret"), handled=False)

    note(ledger, report())
    message, alert = written(ledger)
    password = tmp_path / "password"
    password.write_text("secret\n")
    told = {"security": "starttls", "user": "node", "password": password, "ca": authority.certificate}
    with serving(box, tls_context=context, require_starttls=True, auth_required=True, authenticator=login) as server:
        channel = MailChannel(settings(server.port, **told))
        assert channel.send(message, alert) == "taken by the server"
        assert "takes the login" in channel.reach()
        with pytest.raises(Unreachable, match="certificate is not taken"):
            MailChannel(settings(server.port, **told | {"ca": None})).send(message, alert)
        password.write_text("wrong")
        with pytest.raises(Unreachable, match="does not take the login") as error:
            channel.send(message, alert)
        assert "wrong" not in error.value.full
        password.unlink()
        with pytest.raises(Unready, match="No such file"):
            channel.send(message, alert)
    assert len(box.got) == 1


def test_a_server_without_tls_gets_nothing(ledger, box):
    note(ledger, report())
    with serving(box) as server, pytest.raises(Unreachable, match="see `security`"):
        MailChannel(settings(server.port, security="starttls")).send(*written(ledger))
    assert box.got == []
    with pytest.raises(Unreachable, match="refused"):
        MailChannel(settings(server.port)).reach()


def test_what_is_no_mail_server(ledger, monkeypatch):
    from tests.dicom_node.alerts.listener import Listener

    monkeypatch.setattr("dicom_node.alerts.mail.IDLE_S", 1.0)
    note(ledger, report())
    with Listener() as listener, pytest.raises(Unreachable):
        # it waits for a message before it says a word
        MailChannel(settings(listener.port, security="tls")).send(*written(ledger))
