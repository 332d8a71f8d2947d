"""Alerts as e-mail: plain text, over STARTTLS or TLS, under one Message-ID however often it is sent."""

from __future__ import annotations

import smtplib
import ssl
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.message import EmailMessage
from email.utils import format_datetime
from typing import TYPE_CHECKING

import structlog

from dicom_node.alerts import text
from dicom_node.alerts.channel import Deadline, Refused, Unreachable, Unready, read_secret

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dicom_node.alerts.alert import Alert, Message
    from dicom_node.alerts.settings import Email

IDLE_S = 20.0
log = structlog.get_logger(__name__)
_WHOSE = {
    "PatientName": "Patient",
    "PatientID": "Patient ID",
    "PatientBirthDate": "Birth date",
    "PatientSex": "Sex",
    "AccessionNumber": "Accession number",
    "StudyDescription": "Study",
}


class MailChannel:
    """People who get mail.

    Parameters
    ----------
    settings : the server, the people, and what they are to be told

    """

    def __init__(self, settings: Email) -> None:
        self._settings = settings

    def send(self, message: Message, alert: Alert) -> str:
        """Hand it to the server; taken is what it took for one of the people or more."""
        letter = compose(self._settings, message, alert)
        with self._server() as server:
            refused = server.send_message(letter)
        if refused:  # to send it again would tell the others twice
            log.warning("recipients_refused", channel=self._settings.name, refused=len(refused), alert=alert.id)
            return f"taken, but for {len(refused)} of {len(self._settings.recipients)} recipients"
        return "taken by the server"

    def reach(self) -> str:
        """Log in, and do nothing (NOOP)."""
        with self._server() as server:
            server.noop()
        login = " and takes the login" if self._settings.user else ""
        return f"{self._settings.host}:{self._settings.its_port} answers{login}"

    @contextmanager
    def _server(self) -> Iterator[smtplib.SMTP]:
        """A session with the mail server.

        Raises
        ------
        Refused, Unreachable

        """
        settings = self._settings
        where = f"{settings.host}:{settings.its_port}"
        password = read_secret(settings.password, "`password` of [[emails]]") if settings.password else ""
        with Deadline() as deadline:
            try:
                server = self._connected(deadline)
                try:
                    if settings.user:
                        server.login(settings.user, password)
                    yield server
                finally:
                    with suppress(smtplib.SMTPException, OSError):  # what was taken is taken
                        server.quit()
                    server.close()
            except smtplib.SMTPRecipientsRefused as error:
                answers = list(error.recipients.values())
                raise _failure(where, *min(answers, key=lambda each: each[0])) from error
            except smtplib.SMTPAuthenticationError as error:  # a password that is mended later
                raise Unreachable(
                    f"{where} does not take the login: {error.smtp_code}; see `user`, `password`"
                ) from error
            except smtplib.SMTPResponseException as error:
                raise _failure(where, error.smtp_code, error.smtp_error) from error
            except (smtplib.SMTPException, OSError) as error:
                reason = "takes too long" if deadline.has_passed else _words(error)
                raise Unreachable(f"{where}: {reason}") from error

    def _connected(self, deadline: Deadline) -> smtplib.SMTP:
        settings = self._settings
        trusted = _trusted(settings) if settings.security != "none" else None
        if settings.security == "tls":
            server: smtplib.SMTP = smtplib.SMTP_SSL(settings.host, settings.its_port, timeout=IDLE_S, context=trusted)
        else:
            server = smtplib.SMTP(settings.host, settings.its_port, timeout=IDLE_S)
        try:
            deadline.watch(server.sock)
            if settings.security == "starttls":
                server.starttls(context=trusted)
                deadline.watch(server.sock)
        except BaseException:
            server.close()
            raise
        return server


def compose(settings: Email, message: Message, alert: Alert) -> EmailMessage:
    """The letter; without `identify` nothing in it says whose head it is."""
    letter = EmailMessage()
    domain = settings.sender.rpartition("@")[2]
    letter["Message-ID"] = f"<{message.control_id}@{domain}>"
    first = next(each for each in alert.messages if each.channel == message.channel)
    if first.id != message.id:  # readers keep them together
        letter["In-Reply-To"] = letter["References"] = f"<{first.control_id}@{domain}>"
    letter["Date"] = format_datetime(datetime.fromtimestamp(message.created, UTC).astimezone())
    letter["From"], letter["To"] = settings.sender, ", ".join(settings.recipients)
    letter["Subject"] = f"[scanside alert {alert.id}] {text.headline(alert)}"
    letter["Auto-Submitted"] = "auto-generated"  # RFC 3834: no out-of-office replies
    if alert.level == "critical":
        letter["Importance"] = "high"
    lines = [text.occasion(message, alert), "", text.sentence(alert), "", *text.findings(alert)]
    if settings.identify:
        lines += ["", *(f"{label}: {alert.patient[key]}" for key, label in _WHOSE.items() if key in alert.patient)]
    lines += ["", f"Raised: {text.clock(alert.raised)}"]
    if settings.link:
        lines += [f"Look and acknowledge: {text.link(settings.link, alert)}"]
    lines += [f"Study: {alert.study_uid}", f"Series: {alert.series_uid}", "", *text.limits(alert)]
    letter.set_content("\n".join("".join(c if c.isprintable() else " " for c in line) for line in lines) + "\n")
    return letter


def _failure(where: str, code: int, answer: bytes | str) -> Refused | Unreachable:
    """What an answer of the server means: 5yz is for good, 4yz is for now (RFC 5321 section 4.2.1)."""
    words = answer.decode("utf-8", "replace") if isinstance(answer, bytes) else str(answer)
    reason, words = f"{where} answers {code}", "".join(c if c.isprintable() else " " for c in words)[:200]
    return Refused(reason, words) if code >= 500 else Unreachable(reason, words)  # -1 is an answer that is none


def _words(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not taken: {error.verify_message}; see `ca`"
    if isinstance(error, smtplib.SMTPNotSupportedError):
        return f"{error}; see `security`"
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def _trusted(settings: Email) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=settings.ca)
    except ssl.SSLError as error:
        raise Unready(f"{settings.ca}: {error.reason or error}: have `ca` name a PEM file") from error
    except OSError as error:
        raise Unready(f"{settings.ca}: {error.strerror}; have `ca` name a file that can be read") from error
