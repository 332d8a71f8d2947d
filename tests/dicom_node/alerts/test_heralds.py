"""The threads: a listener that fails in any way gets every message in the end, under the same control id, and once."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from structlog.testing import capture_logs

from dicom_node.alerts import heralds as module
from dicom_node.alerts.channel import Refused
from dicom_node.alerts.heralds import Heralds, back_off_s
from dicom_node.alerts.hl7 import Hl7Channel
from dicom_node.alerts.ledger import Ledger
from dicom_node.alerts.settings import Hl7
from dicom_node.storage.journal import Journal, JournalError
from tests.dicom_node.alerts.listener import Listener, acknowledgement, taken
from tests.dicom_node.alerts.made import EARLY, PATIENT, note, report
from tests.dicom_node.conftest import wait_until


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch):
    """Short waits: what is tested is what happens, not when."""
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.02)
    monkeypatch.setattr(module, "LONGEST_WAIT_S", 0.1)


def settings(listener: Listener, name: str = "ed", **changed: object) -> Hl7:
    return Hl7(name=name, host="127.0.0.1", port=listener.port, **changed)


@contextmanager
def telling(journal: Journal, *channels: Hl7, **kwargs) -> Iterator[tuple[Ledger, Heralds]]:
    ledger = Ledger(journal, channels)
    heralds = Heralds(ledger, channels, "SCANSIDE", **kwargs)
    heralds.start()
    try:
        yield ledger, heralds
    finally:
        heralds.stop()


def states(ledger: Ledger) -> list[str]:
    return [message.state for alert in ledger.alerts() for message in alert.messages]


def tell(ledger: Ledger, heralds: Heralds, said: dict, **kwargs) -> None:
    note(ledger, said, **kwargs)
    heralds.wake()


def is_sent(ledger: Ledger) -> Callable[[], bool]:
    return lambda: set(states(ledger)) == {"sent"}


def test_what_is_noted_is_told_at_once_and_in_order(journal):
    with Listener() as listener, telling(journal, settings(listener)) as (ledger, heralds):
        tell(ledger, heralds, EARLY, final=False)
        tell(ledger, heralds, report("urgent", 5))
        for number in range(5):
            tell(ledger, heralds, report(), series=f"1.9.{number}")
        wait_until(is_sent(ledger), "all is sent")
        written = [message.control_id for alert in reversed(ledger.alerts()) for message in alert.messages]
    assert listener.control_ids() == written


@pytest.mark.parametrize("code", ["AE", "CE", "AR"])
def test_a_listener_that_refuses_first_gets_it_in_the_end(journal, code):
    answers = Counter()

    def twice_not(message: str) -> bytes:
        answers["n"] += 1
        return acknowledgement(message, code if answers["n"] < 3 else "AA")

    with Listener(twice_not) as listener, telling(journal, settings(listener)) as (ledger, heralds):
        tell(ledger, heralds, report())
        wait_until(is_sent(ledger), "it is taken")
    assert len(set(listener.control_ids())) == 1
    assert len(set(listener.got)) == 1
    assert [one["outcome"] for one in ledger.attempts(1)] == ["refused", "refused", "taken"]


def test_a_listener_that_dies_after_receiving_gets_the_same_again(journal):
    got = Counter()

    def dies(message: str) -> bytes | None:
        got["n"] += 1
        return None if got["n"] < 4 else taken(message)

    with Listener(dies) as listener, telling(journal, settings(listener)) as (ledger, heralds):
        tell(ledger, heralds, report())
        wait_until(is_sent(ledger), "it is taken")
    assert len(listener.got) == 4
    assert len(set(listener.got)) == 1
    assert ledger.alerts()[0].messages[0].attempts == 4


def test_a_listener_that_is_down_gets_it_when_it_is_there_and_is_never_given_up(journal):
    with Listener() as listener:
        pass
    with telling(journal, settings(listener)) as (ledger, heralds):
        tell(ledger, heralds, report())
        wait_until(lambda: ledger.alerts()[0].messages[0].attempts > 8, "it is tried and tried")
        wait_until(lambda: states(ledger) == ["waiting"], "it waits")  # between two attempts; in one it is "sending"
        with Listener() as back:  # at another port, and the configuration says so
            heralds.reload([settings(back)])
            wait_until(is_sent(ledger), "it is taken")
    assert back.control_ids() == [ledger.alerts()[0].messages[0].control_id]


def test_what_is_refused_for_good_is_parked_and_holds_up_no_other_patient(journal):
    def not_this_one(message: str) -> bytes:
        bad = "1.9.1" in message
        return acknowledgement(message, "AE" if bad else "AA", words="no patient Muster" if bad else "")

    with (
        capture_logs() as logs,
        Listener(not_this_one) as listener,
        telling(journal, settings(listener)) as (ledger, heralds),
    ):
        tell(ledger, heralds, report(), series="1.9.1")
        tell(ledger, heralds, report(), series="1.9.2")
        wait_until(lambda: sorted(states(ledger)) == ["parked", "sent"], "one is parked")
        assert Counter(listener.control_ids()).most_common(1)[0][1] == 6
        listener.answer = taken
        assert ledger.retry() == 1
        wait_until(is_sent(ledger), "both are taken")
    (parked,) = [each for each in logs if each["event"] == "alert_parked"]
    assert "scanside alerts retry" in parked["remedy"]
    assert parked["log_level"] == "error"
    assert not any(value in str(logs) for value in ("Muster", PATIENT["PatientBirthDate"]))
    assert "no patient Muster" in ledger.attempts(1)[0]["detail"]


def test_a_channel_that_hangs_delays_no_other(journal):
    import threading

    gate = threading.Event()
    with (
        Listener(lambda message: gate.wait(30) and taken(message)) as slow,
        Listener() as listener,
        telling(journal, settings(slow, "slow"), settings(listener)) as (ledger, heralds),
    ):
        tell(ledger, heralds, report())
        wait_until(lambda: "sent" in states(ledger), "the other is told")
        assert sorted(states(ledger)) == ["sending", "sent"]
        gate.set()
        wait_until(is_sent(ledger), "the slow one, too")


def test_an_acknowledgement_from_another_process_stops_an_escalation(journal, tmp_path):
    with Listener() as listener, telling(journal, settings(listener, after_s=1.0)) as (ledger, heralds):
        tell(ledger, heralds, report())
        tell(ledger, heralds, report("urgent", 3), series="1.9")
        other = Journal(tmp_path / "journal.sqlite")
        assert Ledger(other).acknowledge(1, "Dr A")
        other.close()
        wait_until(lambda: "sent" in states(ledger), "the other alert escalates")
    assert sorted(states(ledger)) == ["cancelled", "sent"]
    assert ["1.9" in message for message in listener.got] == [True]


def test_a_crash_in_the_middle_sends_the_same_again(journal):
    with Listener() as listener:
        ledger = Ledger(journal, [settings(listener)])
        note(ledger, report())
        message, alert = ledger.claim("ed", time.time())
        Hl7Channel(settings(listener), None).send(message, alert)  # and then it was killed
        with telling(journal, settings(listener)) as (ledger, _):
            wait_until(is_sent(ledger), "it is sent again")
    assert listener.got[0] == listener.got[1]
    assert [one["outcome"] for one in ledger.attempts(1)] == ["no end recorded", "taken"]


def test_what_a_receiver_has_is_not_sent_again_because_the_disk_is_full(journal, monkeypatch):
    failing = Counter()
    genuine = Ledger.sent

    def full_at_first(self: Ledger, *args) -> None:
        failing["n"] += 1
        if failing["n"] < 4:
            raise JournalError("disk full")
        genuine(self, *args)

    monkeypatch.setattr(Ledger, "sent", full_at_first)
    with Listener() as listener, telling(journal, settings(listener)) as (ledger, heralds):
        tell(ledger, heralds, report())
        wait_until(is_sent(ledger), "the journal knows")
    assert len(listener.got) == 1


def test_a_bug_in_one_message_is_parked_without_a_word_of_the_patient(journal, monkeypatch):
    def broken(*_: object) -> str:
        raise ValueError(PATIENT["PatientName"])

    with capture_logs() as logs, Listener() as listener, telling(journal, settings(listener)) as (ledger, heralds):
        monkeypatch.setattr(Hl7Channel, "send", broken)
        tell(ledger, heralds, report())
        wait_until(lambda: states(ledger) == ["parked"], "it is parked")
    assert ledger.alerts()[0].messages[0].last_error.startswith("ValueError at test_heralds.py")
    assert PATIENT["PatientName"] not in str(logs)


def test_a_message_for_a_channel_that_is_gone_waits_and_is_told_of(journal):
    with capture_logs() as logs, Listener() as listener, telling(journal, settings(listener)) as (ledger, heralds):
        listener.answer = lambda _: None
        tell(ledger, heralds, report())
        wait_until(lambda: ledger.alerts()[0].messages[0].attempts > 1, "it is tried")
        heralds.reload([])
        assert [each["channel"] for each in logs if each["event"] == "channel_not_configured"] == ["ed"]
        listener.answer = taken
        heralds.reload([settings(listener)])
        wait_until(is_sent(ledger), "it is taken")


def test_channels_can_be_changed_while_the_journal_is_away(journal, monkeypatch):
    def away(_: Ledger) -> None:
        raise JournalError("away")

    with Listener() as listener, telling(journal, settings(listener)) as (ledger, heralds):
        with monkeypatch.context() as meanwhile:
            meanwhile.setattr(Ledger, "counts", away)
            heralds.reload([settings(listener, "other")])
        tell(ledger, heralds, report())
        heralds.reload([settings(listener)])
        wait_until(is_sent(ledger), "it is taken")


def test_who_was_told_is_told_of(journal):
    told = []
    with (
        Listener() as listener,
        telling(
            journal, settings(listener), on_sent=lambda message, alert: told.append((message.channel, alert.id))
        ) as (
            ledger,
            heralds,
        ),
    ):
        tell(ledger, heralds, report())
        wait_until(lambda: told, "it is told of")
    assert told == [("ed", 1)]


# notes an alert after the other, and tells of them, until it is killed; each third is confirmed in the same life
LIFE = """
import contextlib, sys, time
from pathlib import Path
from dicom_node.alerts import heralds
from dicom_node.alerts.ledger import Ledger
from dicom_node.alerts.settings import Hl7
from dicom_node.storage.journal import Journal
from tests.dicom_node.alerts.made import EARLY, note, report

journal = Journal(Path(sys.argv[1]))
heralds.FIRST_WAIT_S, heralds.LONGEST_WAIT_S = 0.02, 0.1
channels = [Hl7(name="ed", host="127.0.0.1", port=int(sys.argv[2]))]
ledger = Ledger(journal, channels)
told = heralds.Heralds(ledger, channels, "SCANSIDE")
told.start()
for number in range(len(ledger.alerts()), 1000 if sys.argv[3] == "go" else 0):
    note(ledger, EARLY, final=False, series=f"1.{number}")
    told.wake()
    time.sleep(0.005)
    if number % 3 == 0:
        note(ledger, report(), series=f"1.{number}")
        told.wake()
while any(message.state != "sent" for alert in ledger.alerts() for message in alert.messages):
    time.sleep(0.01)
told.stop()
"""


@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_whenever_it_is_killed_every_message_arrives_under_one_control_id(tmp_path, kills):
    seed = 20261130 + kills
    chance, weather = random.Random(seed), random.Random(seed + 1)

    def answer(message: str) -> bytes | None:
        time.sleep(weather.uniform(0, 0.02))
        return None if weather.random() < 0.1 else taken(message)

    path = tmp_path / "journal.sqlite"
    with Listener(answer) as listener:
        for life in range(kills + 1):
            is_last = life == kills
            program = [sys.executable, "-c", LIFE, str(path), str(listener.port), "end" if is_last else "go"]
            before = len(listener.got)
            with subprocess.Popen(program) as process:
                try:
                    if is_last:
                        assert process.wait(120) == 0
                    else:
                        wait_until(lambda before=before: len(listener.got) > before, "it tells of something")
                        time.sleep(chance.uniform(0, 0.3))
                finally:
                    process.kill()
    with contextlib.closing(Journal(path, read_only=True)) as journal:
        written = [message for alert in Ledger(journal).alerts() for message in alert.messages]
    told = f"seed {seed}: {len(written)} messages, sent {len(listener.got)} times"
    print(told)
    contents: dict[str, set[str]] = {}
    for control_id, text in zip(listener.control_ids(), listener.got, strict=True):
        contents.setdefault(control_id, set()).add(text)
    assert contents.keys() == {message.control_id for message in written}, told
    assert all(len(texts) == 1 for texts in contents.values()), told
    first = dict.fromkeys(listener.control_ids())
    by_alert = [[m.control_id for m in written if m.alert_id == n] for n in {m.alert_id for m in written}]
    for ids in by_alert:
        assert sorted(ids, key=list(first).index) == ids, f"{told}: out of order"


def test_back_off_doubles_up_to_a_limit(monkeypatch):
    monkeypatch.undo()
    assert [back_off_s(n) for n in (1, 2, 3, 6, 99)] == [2, 4, 8, 60, 60]
    assert Refused("no").attempts == 6
