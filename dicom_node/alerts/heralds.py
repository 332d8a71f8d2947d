"""Brings what the ledger owes to its channels: a thread for each, so that one that hangs delays no other.

What is promised: a message that is in the journal is tried until its receiver takes it, parks it by refusing, or nobody
has to be told any more; in order; after a success that the journal has, never again. A process that dies between a
receiver's success and the journal's sends the same message once more, under the same control id.
"""

from __future__ import annotations

import time
import traceback
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING

import structlog

from dicom_node.alerts.channel import Refused, Unreachable
from dicom_node.alerts.hl7 import Hl7Channel
from dicom_node.alerts.settings import Email, Hl7, Settings, Webhook
from dicom_node.alerts.turn import LONGEST_WAIT_S
from dicom_node.storage.journal import JournalError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dicom_node.alerts.alert import Alert, Message
    from dicom_node.alerts.channel import Channel
    from dicom_node.alerts.ledger import Ledger
    from dicom_node.network.tls import Identity

FIRST_WAIT_S = 2.0
LONGEST_SLEEP_S = 2.0  # another process acknowledges or retries, and can't wake this one

log = structlog.get_logger(__name__)


def open_channel(settings: Settings, ae_title: str, identity: Identity | None) -> Channel:
    """The channel that a section of the configuration describes; nothing is connected yet."""
    if isinstance(settings, Hl7):
        return Hl7Channel(settings, identity)
    # loaded for who has them: an HTTP client, a mail client, the DICOM network
    if isinstance(settings, Webhook):
        from dicom_node.alerts.webhook import WebhookChannel  # noqa: PLC0415

        return WebhookChannel(settings)
    if isinstance(settings, Email):
        from dicom_node.alerts.mail import MailChannel  # noqa: PLC0415

        return MailChannel(settings)
    from dicom_node.alerts.worklist import WorklistChannel  # noqa: PLC0415

    return WorklistChannel(settings, ae_title, identity)


class Heralds:
    """All channels, from `start` to `stop`.

    Parameters
    ----------
    ledger : what is owed
    settings : who is told
    ae_title : this node's, for worklists
    identity : for who takes TLS
    on_sent : told of each message that was taken, in its channel's thread

    """

    def __init__(
        self,
        ledger: Ledger,
        settings: Sequence[Settings],
        ae_title: str,
        identity: Identity | None = None,
        on_sent: Callable[[Message, Alert], None] = lambda *_: None,
    ) -> None:
        self._ledger = ledger
        self._way = ae_title, identity, on_sent
        self._heralds = [_Herald(ledger, each, *self._way) for each in settings]
        self._leaving: list[_Herald] = []  # of channels that are gone: they end after the message under way

    def start(self) -> None:
        self._warn_of_the_unknown()
        for herald in self._heralds:
            herald.start()

    def wake(self) -> None:
        """Look at the ledger now: something has been noted."""
        for herald in self._heralds:
            herald.wake()

    def reload(self, settings: Sequence[Settings]) -> None:
        """Tell these from now on; what one that is gone is owed stays in the journal until it is configured again."""
        before = {herald.settings.name: herald for herald in (*self._leaving, *self._heralds)}
        heralds = []
        for each in settings:
            old = before.get(each.name)
            if old in self._heralds and old.settings == each:
                heralds.append(before.pop(each.name))
                continue
            with suppress(JournalError):  # or else later
                self._ledger.hurry(each.name)
            heralds.append(_Herald(self._ledger, each, *self._way, after=old))
            heralds[-1].start()
        for herald in before.values():
            herald.stop()
        self._heralds, self._leaving = heralds, [herald for herald in before.values() if herald.is_alive()]
        self._warn_of_the_unknown()

    def busy(self, within_s: float) -> list[str]:
        """Channels for which something is due by then."""
        return [each.settings.name for each in self._heralds if each.is_busy(within_s)]

    def fault(self) -> str:
        """Whom nobody tells of anything any more: empty where it is well."""
        dead = [each.settings.name for each in self._heralds if not each.is_alive()]
        return f"tells no more to {', '.join(dead)}" if dead else ""

    def stop(self) -> None:
        """Finish what is under way, leave the rest for the next start, and wait for the threads."""
        for herald in self._heralds:
            herald.stop()
        for herald in (*self._heralds, *self._leaving):
            if herald.is_alive():  # a node that could not start stops what it never started
                herald.join()

    def _warn_of_the_unknown(self) -> None:
        known = {herald.settings.name for herald in self._heralds}
        try:
            _, messages = self._ledger.counts()
        except JournalError:  # it will be told at the next start
            return
        owed = {channel for channel, state in messages if state in ("queued", "sending", "waiting")}
        for name in sorted(owed - known):
            remedy = "configure it again, or give its messages up: `scanside alerts cancel`"
            log.warning("channel_not_configured", channel=name, remedy=remedy)


class _Herald(Thread):
    """The way to one channel."""

    def __init__(
        self,
        ledger: Ledger,
        settings: Settings,
        ae_title: str,
        identity: Identity | None,
        on_sent: Callable[[Message, Alert], None],
        after: _Herald | None = None,
    ) -> None:
        super().__init__(name=f"herald-{settings.name}", daemon=True)
        self.settings = settings
        self._after = after  # who served it before: a channel has one sender
        self._ledger, self._on_sent = ledger, on_sent
        self._channel = open_channel(settings, ae_title, identity)
        self._log = log.bind(channel=settings.name)
        self._news = Event()
        self._stopping = False
        self._fruitless = 0  # attempts in a row that found nobody; the back-off of the channel
        self._taken: tuple[Message, Alert, str] | None = None  # what a receiver has, and the journal doesn't know yet

    def wake(self) -> None:
        self._news.set()

    def stop(self) -> None:
        self._stopping = True
        self._news.set()

    def is_busy(self, within_s: float) -> bool:
        """Whether something is due by then."""
        try:
            return self._ledger.is_due(self.settings.name, time.time() + within_s)
        except JournalError:  # a disk that fails is not waited for
            return False

    def run(self) -> None:
        if self._after:
            self._after.join()
            self._after = None
        while not self._stopping:
            self._news.clear()  # before the ledger is read: what is noted from here on cuts the sleep short
            try:
                sleep_s = self._turn()
            except JournalError as error:  # a full disk
                self._fruitless += 1
                sleep_s = back_off_s(self._fruitless)
                self._log.warning("alert_not_recorded", reason=str(error), retry_s=sleep_s)
            except Exception:  # noqa: BLE001 (a bug in one turn must not end all telling)
                self._fruitless += 1
                sleep_s = back_off_s(self._fruitless)
                self._log.exception("telling_failed", retry_s=sleep_s)
            if sleep_s:
                self._news.wait(sleep_s)

    def _turn(self) -> float:
        """Send what is due first; for how long there is nothing to do then."""
        self._record()
        now = time.time()
        claimed = self._ledger.claim(self.settings.name, now, self.settings.quiet_until(now))
        if claimed is None:
            due = self._ledger.next_due(self.settings.name, now)
            return LONGEST_SLEEP_S if due is None else min(due - now, LONGEST_SLEEP_S)
        message, alert = claimed
        told = {"alert": alert.id, "occasion": message.occasion, "control_id": message.control_id}
        try:
            answer = self._channel.send(message, alert)
        except Unreachable as error:
            self._fruitless += 1
            wait_s = back_off_s(self._fruitless) if error.wait_s is None else error.wait_s
            self._log.warning("channel_waits", **told, reason=str(error), retry_s=wait_s)
            self._ledger.unreachable(message, error.full, wait_s, asked=error.wait_s is not None)
        except Refused as error:
            self._refused(message, error, told)
        except Exception as error:  # noqa: BLE001 (one message must not end the others; its words may quote the patient)
            frame = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"
            self._refused(message, Refused(reason), told)
        else:
            self._fruitless = 0
            self._taken = message, alert, answer
            self._record()
            self._log.info("alert_told", **told, triage=message.level)
        return 0.0

    def _record(self) -> None:
        """Have the journal know what a receiver has taken; nothing else is sent before that."""
        if self._taken:
            message, alert, answer = self._taken
            self._ledger.sent(message, answer)
            self._taken = None
            self._on_sent(message, alert)

    def _refused(self, message: Message, error: Refused, told: dict[str, object]) -> None:
        self._fruitless = 0  # it is there
        times = message.refusals + 1
        wait_s = back_off_s(times) if times < error.attempts else None
        self._ledger.refused(message, error.full, wait_s)
        if wait_s is None:
            remedy = f"mend the cause, then `scanside alerts retry {message.id}`"
            self._log.error("alert_parked", **told, message=message.id, reason=str(error), remedy=remedy)
        else:
            self._log.warning("alert_not_taken", **told, reason=str(error), retry_s=wait_s)


def back_off_s(times: int) -> float:
    """Seconds to wait after the n-th failure: 2, 4, 8 ... 60."""
    return min(FIRST_WAIT_S * 2 ** min(times - 1, 16), LONGEST_WAIT_S)
