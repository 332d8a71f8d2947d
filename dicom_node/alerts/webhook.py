"""Alerts as signed POST requests (the Standard Webhooks specification, version 1.0.0).

The receiver knows a repetition by ``webhook-id``, which is the message's control id, and the sender by
``webhook-signature``: HMAC-SHA256 over id, timestamp and body, Base64, ``v1,`` before it; one for each secret.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
import ssl
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import httpx

from dicom_node.alerts import text
from dicom_node.alerts.channel import Deadline, Refused, Unreachable, Unready, read_secret
from dicom_node.alerts.turn import LONGEST_HOLD_S

if TYPE_CHECKING:
    from dicom_node.alerts.alert import Alert, Message
    from dicom_node.alerts.settings import Webhook

CONNECT_S = 5.0
SHORTEST_SECRET, LONGEST_SECRET = 24, 64  # bytes
WAITS = {408, 409, 425, 429}  # of 4xx: not now
ATTEMPTS_AFTER_GONE = 1


class WebhookChannel:
    """An address that takes POST requests.

    Parameters
    ----------
    settings : where it is, and what it is to be told

    """

    def __init__(self, settings: Webhook) -> None:
        self._settings = settings

    def send(self, message: Message, alert: Alert) -> str:
        """Post. Taken is 2xx; 410 and other 4xx are refusals; 429, 408 and 5xx wait, as long as they ask for."""
        body = json.dumps(compose(self._settings, message, alert), ensure_ascii=False, sort_keys=True).encode()
        headers = sign(secrets(self._settings), message.control_id, int(time.time()), body)
        answer = self._request("POST", content=body, headers=headers | {"content-type": "application/json"})
        status = f"HTTP {answer.status_code}"
        if answer.is_success:
            return status
        if answer.status_code == httpx.codes.GONE:
            raise Refused(f"{status}: it takes no messages any more", attempts=ATTEMPTS_AFTER_GONE)
        if answer.is_client_error and answer.status_code not in WAITS:
            raise Refused(status)
        if answer.is_redirect:
            raise Refused(f"{status}: redirects are not followed; set `url` to where it is")
        raise Unreachable(status, wait_s=_wait_s(answer.headers.get("retry-after")))

    def reach(self) -> str:
        secrets(self._settings)
        answer = self._request("HEAD")
        return f"{self._where} answers (HTTP {answer.status_code} to HEAD)"

    @property
    def _where(self) -> str:
        """The address for log and journal: without path and query, where many services have a secret."""
        url = httpx.URL(self._settings.url)
        return f"{url.scheme}://{url.netloc.decode()}"

    def _request(self, method: str, **kwargs: Any) -> httpx.Response:
        """One request; of the answer nobody reads more than its head.

        Raises
        ------
        Unreachable

        """
        with Deadline() as deadline:

            def watch(event: str, info: dict[str, Any]) -> None:
                if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
                    deadline.watch(info["return_value"].get_extra_info("socket"))

            try:
                with (
                    httpx.Client(
                        verify=self._trusted(), timeout=httpx.Timeout(30, connect=CONNECT_S), trust_env=False
                    ) as client,
                    client.stream(method, self._settings.url, extensions={"trace": watch}, **kwargs) as answer,
                ):
                    return answer
            except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
                said = re.sub(r"^\[Errno -?\d+\] ", "", str(error)) or type(error).__name__
                reason = "takes too long" if deadline.has_passed else said
                raise Unreachable(f"{self._where}: {reason}") from error

    def _trusted(self) -> ssl.SSLContext:
        ca = self._settings.ca
        try:
            return ssl.create_default_context(cafile=ca)
        except ssl.SSLError as error:
            raise Unready(f"{ca}: {error.reason or error}: have `ca` name a PEM file of certificates") from error
        except OSError as error:
            raise Unready(f"{ca}: {error.strerror}; have `ca` name a file that can be read") from error


def secrets(settings: Webhook) -> list[bytes]:
    """Read the secrets of a file, a line each.

    Raises
    ------
    Unready : it can't be read, or holds none; no word of what it holds

    """
    keys = []
    for line in read_secret(settings.secret, "`secret` of [[webhooks]]").split():
        try:
            keys.append(base64.b64decode(line.removeprefix("whsec_"), validate=True))
        except binascii.Error:
            raise Unready(f"{settings.secret}: a secret is whsec_ and Base64; write one that is") from None
        if not SHORTEST_SECRET <= len(keys[-1]) <= LONGEST_SECRET:
            needed = f"{SHORTEST_SECRET} to {LONGEST_SECRET} are needed"
            raise Unready(f"{settings.secret}: a secret of {len(keys[-1])} bytes; {needed}")
    return keys


def sign(keys: list[bytes], control_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The three headers of the specification."""
    signed = f"{control_id}.{timestamp}.".encode() + body
    digests = [base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode() for key in keys]
    return {
        "webhook-id": control_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(f"v1,{each}" for each in digests),
    }


def compose(settings: Webhook, message: Message, alert: Alert) -> dict[str, Any]:
    """What is posted: type, timestamp and data, as the specification recommends."""
    evidence = alert.evidence
    data = {
        "alert": alert.id,
        "study_uid": alert.study_uid,
        "series_uid": alert.series_uid,
        "revision": alert.revision,
        "level": alert.level,
        "state": alert.state,
        "standing": message.standing,
        "reason": alert.reason,
        "text": text.sentence(alert),
        "occasion": text.occasion(message, alert),
        "limits": text.limits(alert),
        "raised": _iso(alert.raised),
        "changed": _iso(alert.changed),
        **{name: evidence[name] for name in ("findings", "slices", "key_slice", "missing", "model", "operating_point")},
    }
    if settings.identify:
        data["patient"] = dict(alert.patient)
    if settings.link:
        data["link"] = text.link(settings.link, alert)
    return {"type": f"alert.{message.occasion}", "timestamp": _iso(message.created), "data": data}


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _wait_s(retry_after: str | None) -> float | None:
    """Seconds that Retry-After asks for (RFC 9110 section 10.2.3): a number of them, or a date."""
    if retry_after is None:
        return None
    try:
        if retry_after.strip().isdecimal():
            wait_s = float(retry_after)
        else:
            wait_s = parsedate_to_datetime(retry_after).timestamp() - time.time()
    except (ValueError, OverflowError):
        return None
    return min(max(wait_s, 0.0), LONGEST_HOLD_S)
