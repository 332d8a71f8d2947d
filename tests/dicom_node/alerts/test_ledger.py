"""What alerts become, whom they are told, in which order, and that nothing of it is lost."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dicom_node.alerts.ledger import Ledger
from dicom_node.alerts.text import headline
from dicom_node.alerts.turn import LONGEST_HOLD_S
from dicom_node.storage.journal import Journal, JournalError, SeriesState
from dicom_node.storage.postgres import Address
from tests.dicom_node.alerts.made import EARLY, PATIENT, SERIES, STUDY, Channel, note, report

# all of this in both databases


@pytest.fixture
def journal(place: Path | Address) -> Iterator[Journal]:
    with contextlib.closing(Journal(place)) as opened:
        yield opened


OWED = ("queued", "sending", "waiting", "parked")


def messages(ledger: Ledger, channel: str = "ed") -> list[tuple[str, str]]:
    return [
        (one.occasion, one.state)
        for alert in reversed(ledger.alerts())
        for one in alert.messages
        if one.channel == channel
    ]


def deliver(ledger: Ledger, channel: str = "ed", now: float | None = None, quiet_until: float | None = None):
    """Send what is due; what each said."""
    told = []
    while claimed := ledger.claim(channel, time.time() if now is None else now, quiet_until):
        message, alert = claimed
        told.append((message.occasion, alert.state, alert.level, message.standing))
        ledger.sent(message, "AA")
    return told


def test_early_evidence_raises_and_the_result_confirms(ledger: Ledger):
    before = time.time()
    note(ledger, EARLY, final=False)
    (alert,) = ledger.alerts()
    assert (alert.study_uid, alert.series_uid, alert.revision) == (STUDY, SERIES, 1)
    assert (alert.level, alert.state, alert.acknowledged, alert.is_open) == ("critical", "provisional", None, True)
    assert before <= alert.raised == alert.changed <= time.time()
    assert alert.patient == PATIENT
    assert alert.evidence["findings"] == [
        {
            "name": "intracerebral",
            "title": "Intracerebral haemorrhage",
            "code": ["274100004", "SCT", "Cerebral hemorrhage"],
            "volume_ml": 31.2,
            "probability": 0.98,
            "slices": 3,
            "key_slice": "1.2.3.4.5.8",
        }
    ]
    assert alert.evidence["missing"] == ["the series is still arriving"]
    assert deliver(ledger) == [("raised", "provisional", "critical", "preliminary")]
    note(ledger, report(ml=33))
    assert deliver(ledger) == [("confirmed", "confirmed", "critical", "final")]
    (alert,) = ledger.alerts()
    assert (alert.state, alert.evidence["findings"][0]["volume_ml"]) == ("confirmed", 33)


def test_the_same_again_changes_nothing(ledger: Ledger):
    for said, final in ((EARLY, False), (EARLY, False), (report(), True), (report(), True), (EARLY, False)):
        note(ledger, said, final=final)
    assert messages(ledger) == [("raised", "queued"), ("confirmed", "queued")]
    assert len(ledger.alerts()) == 1


@pytest.mark.parametrize("level", ["routine", "incomplete"])
def test_what_does_not_alarm_raises_nothing_and_withdraws(ledger: Ledger, level: str):
    note(ledger, report(level), series="1.9")
    assert ledger.alerts() == []
    note(ledger, EARLY, final=False)
    note(ledger, report(level))
    (alert,) = ledger.alerts()
    assert (alert.state, alert.level, alert.is_open) == ("withdrawn", "critical", False)
    assert alert.reason == report(level)["decision"]["reason"]
    assert headline(alert) == "WITHDRAWN (critical): no finding", "part of a head does not show that there is no blood"
    assert [told[:2] for told in deliver(ledger)] == [("raised", "provisional"), ("withdrawn", "withdrawn")]


def test_a_message_says_what_was_so_when_it_was_written(ledger: Ledger):
    note(ledger, EARLY, final=False)
    note(ledger, report("urgent", 12))
    assert deliver(ledger) == [
        ("raised", "provisional", "critical", "preliminary"),
        ("changed", "confirmed", "urgent", "final"),
    ]


def test_a_level_that_goes_up_wants_a_new_acknowledgement_and_one_that_goes_down_does_not(ledger: Ledger):
    note(ledger, report("urgent", 5, missing=("x",)), final=False)
    (alert,) = ledger.alerts()
    assert ledger.acknowledge(alert.id, "Dr A")
    assert not ledger.acknowledge(alert.id, "Dr B")
    assert not ledger.acknowledge(77, "Dr B")
    note(ledger, EARLY, final=False)
    assert ledger.alerts()[0].is_open
    assert ledger.acknowledge(alert.id, "Dr B")
    note(ledger, report("urgent", 5))
    (alert,) = ledger.alerts()
    assert (alert.acknowledged_by, alert.level, alert.state) == ("Dr B", "urgent", "confirmed")
    assert [(one["by"], one["level"]) for one in ledger.acknowledgements()] == [
        ("Dr A", "urgent"),
        ("Dr B", "critical"),
    ]
    assert [one["by"] for one in ledger.acknowledgements(after=1)] == ["Dr B"]


def test_who_looked_at_urgent_has_not_taken_notice_of_critical(ledger: Ledger):
    note(ledger, report("urgent", 5, missing=("x",)), final=False)
    note(ledger, EARLY, final=False)  # between the look and the click
    assert not ledger.acknowledge(1, "Dr A", "urgent")
    assert not ledger.acknowledge(1, "Dr A", "nonsense")
    assert ledger.alerts()[0].is_open
    note(ledger, report("urgent", 5))
    assert ledger.acknowledge(1, "Dr A", "critical")


def test_a_later_revision_raises_again_what_was_withdrawn(ledger: Ledger):
    note(ledger, report())
    ledger.acknowledge(1, "Dr A")
    note(ledger, report("routine"), revision=2)
    note(ledger, report("urgent", 3), revision=1)  # comes too late
    assert ledger.alerts()[0].state == "withdrawn"
    note(ledger, report("urgent", 3), revision=3)
    (alert,) = ledger.alerts()
    assert (alert.state, alert.level, alert.is_open) == ("confirmed", "urgent", True)
    assert deliver(ledger) == [
        ("raised", "confirmed", "critical", "final"),
        ("withdrawn", "withdrawn", "critical", "corrected"),
        ("raised", "confirmed", "urgent", "corrected"),
    ]


def test_a_result_of_the_same_level_is_no_news_unless_it_makes_the_head_whole(ledger: Ledger):
    note(ledger, report(missing=("2 slices missing",)))
    note(ledger, report(ml=33, missing=("1 slice missing",)), revision=2)
    assert messages(ledger) == [("raised", "queued")]
    assert (ledger.alerts()[0].revision, ledger.alerts()[0].evidence["findings"][0]["volume_ml"]) == (2, 33)
    note(ledger, report(ml=34), revision=3)
    note(ledger, report(ml=35), revision=4)
    assert [told[0] for told in deliver(ledger)] == ["raised", "confirmed"]


def test_a_series_that_can_not_be_analysed_after_all_leaves_its_alert_open(ledger: Ledger, journal: Journal):
    note(ledger, EARLY, final=False)
    for _ in range(2):
        with journal.transaction() as execute:
            ledger.note_failure(execute, STUDY, SERIES, 1, "the worker died 3 times")
            ledger.note_failure(execute, STUDY, "1.9", 1, "never heard of")
    (alert,) = ledger.alerts()
    assert (alert.state, alert.reason, alert.is_open) == ("unresolved", "the worker died 3 times", True)
    assert [told[:2] for told in deliver(ledger)] == [("raised", "provisional"), ("unresolved", "unresolved")]
    note(ledger, report(), revision=2)
    assert deliver(ledger) == [("confirmed", "confirmed", "critical", "final")]


def test_an_alert_and_its_result_are_written_together_or_not_at_all(ledger: Ledger, journal: Journal):
    what = {
        "state": SeriesState.ANALYSED, "reason": None, "slices": 3, "report_json": "{}", "files": (), "destinations": {}
    }  # fmt: skip

    def fails(execute) -> None:
        ledger.note(execute, STUDY, SERIES, 1, report(), PATIENT, final=True)
        raise JournalError("the disk is full")

    with pytest.raises(JournalError):
        journal.record_result(STUDY, SERIES, 1, **what, also=fails)
    assert (ledger.alerts(), journal.series()) == ([], [])
    for _ in range(2):
        journal.record_result(
            STUDY, SERIES, 1, **what,
            also=lambda execute: ledger.note(execute, STUDY, SERIES, 1, report(), PATIENT, final=True),
        )  # fmt: skip
    assert messages(ledger) == [("raised", "queued")]


def test_the_patient_is_kept_from_the_first_word_on(ledger: Ledger):
    note(ledger, EARLY, final=False, patient={})
    note(ledger, report(missing=("x",)))
    note(ledger, report(), revision=2, patient={"PatientID": "another"})
    assert ledger.alerts()[0].patient == PATIENT


# who is told


def test_channels_are_told_of_their_levels_and_of_what_corrects_what_they_were_told(journal: Journal):
    ledger = Ledger(journal, [Channel("ed", ("critical",)), Channel("all"), Channel("ris", occasions={"raised"})])
    note(ledger, report("urgent", 3, missing=("x",)), final=False)
    assert messages(ledger, "ed") == []
    note(ledger, EARLY, final=False)
    note(ledger, report("urgent", 12))
    assert messages(ledger, "ed") == [("raised", "queued"), ("changed", "queued")]
    assert messages(ledger, "all") == [("raised", "queued"), ("changed", "queued"), ("changed", "queued")]
    assert messages(ledger, "ris") == [("raised", "queued")]
    levels = [one.level for one in ledger.alerts()[0].messages if one.channel == "ed"]
    assert levels == ["critical", "critical"], "who was told critical is told at once that it is not"


def test_an_escalation_goes_if_nobody_acknowledges_and_says_what_is_so_then(journal: Journal):
    ledger = Ledger(journal, [Channel("phone", after_s=300)])
    note(ledger, EARLY, final=False)
    now = time.time()
    assert deliver(ledger, "phone", now + 299) == []
    note(ledger, report("urgent", 12))
    assert messages(ledger, "phone") == [("escalated", "queued")]
    assert deliver(ledger, "phone", now + 301) == [("escalated", "confirmed", "urgent", "final")]


def test_acknowledgement_stops_an_escalation_also_the_moment_before_it_goes(journal: Journal):
    ledger = Ledger(journal, [Channel("phone", after_s=300)])
    later = time.time() + 301
    note(ledger, report())
    Ledger(journal).acknowledge(1, "Dr A")  # another process
    assert messages(ledger, "phone") == [("escalated", "cancelled")]
    assert deliver(ledger, "phone", later) == []
    note(ledger, report(), series="1.9")
    (message, _) = ledger.claim("phone", later)
    ledger.unreachable(message, "down", 0)
    ledger.acknowledge(2, "Dr A")
    assert messages(ledger, "phone")[-1] == ("escalated", "waiting"), "it may have been taken: what corrects it follows"
    assert deliver(ledger, "phone", later + 9) == []
    assert messages(ledger, "phone")[-1] == ("escalated", "cancelled")
    note(ledger, report("routine"), revision=2, series="1.9")
    assert deliver(ledger, "phone", later + 9) == [("withdrawn", "withdrawn", "critical", "corrected")]


def test_withdrawal_and_a_level_that_is_not_wanted_stop_an_escalation(journal: Journal):
    ledger = Ledger(journal, [Channel("phone", ("critical",), after_s=300)])
    note(ledger, EARLY, final=False)
    note(ledger, report("routine"))
    note(ledger, EARLY, final=False, series="1.9")
    note(ledger, report("urgent", 12), series="1.9")
    assert messages(ledger, "phone") == [("escalated", "cancelled")] * 2


def test_quiet_hours_put_off_what_is_not_critical_and_only_that(journal: Journal):
    now = time.time()
    ledger = Ledger(journal, [Channel("ed", night=(now - 10, now + 3600))])
    note(ledger, report("urgent", 5, missing=("x",)), final=False)
    assert deliver(ledger, now=now + 1, quiet_until=now + 3600) == []
    note(ledger, report("urgent", 6))
    assert messages(ledger) == [("raised", "queued")], "what is put off says in the end what is so then"
    note(ledger, report("critical", 40), revision=2)
    assert messages(ledger)[0][0] == "raised"
    assert deliver(ledger, now=now + 1, quiet_until=now + 3600) == [("raised", "confirmed", "critical", "final")]
    note(ledger, report("urgent", 6), series="1.9")
    note(ledger, report("urgent", 6), series="1.8")
    ledger.acknowledge(2, "Dr A")
    assert deliver(ledger, now=now + 3601) == [("raised", "confirmed", "urgent", "final")]


def test_quiet_hours_that_begin_while_a_message_waits_hold_it_back_too(ledger: Ledger):
    note(ledger, report("urgent", 5))
    now = time.time()
    (message, _) = ledger.claim("ed", now)
    ledger.unreachable(message, "down", 5)
    assert ledger.claim("ed", now + 10, quiet_until=now + 3600) is None
    note(ledger, report(), series="1.9")
    assert deliver(ledger, now=now + 20, quiet_until=now + 3600) == [("raised", "confirmed", "critical", "final")]
    assert deliver(ledger, now=now + 3601) == [("raised", "confirmed", "urgent", "final")]


# how it gets there


def test_a_message_keeps_its_control_id_whatever_happens(ledger: Ledger, journal: Journal):
    note(ledger, report())
    now = time.time()
    (message, _) = ledger.claim("ed", now)
    assert len(message.control_id) <= 20
    assert message.control_id.isalnum()
    (again, alert) = Ledger(journal, [Channel()]).claim("ed", now)  # the first claim's process was killed
    assert (again.control_id, again.attempts) == (message.control_id, 2)
    assert alert.evidence == {**ledger.alerts()[0].evidence, "retracted": []}
    ledger.refused(again, "AE", 2.0)
    (third, _) = ledger.claim("ed", now + 3)
    assert (third.control_id, third.refusals, third.last_error) == (message.control_id, 1, "AE")
    ledger.sent(third, "AA")
    assert ledger.claim("ed", now + 9) is None
    assert [one["outcome"] for one in ledger.attempts(message.id)] == ["no end recorded", "refused", "taken"]
    assert ledger.retry(message.id) == 0, "what was taken is never sent again"


def test_a_channel_that_can_not_be_reached_waits_as_a_whole_until_there_is_news(ledger: Ledger):
    note(ledger, report())
    note(ledger, report(), series="1.8")  # nobody is there for it either
    now = time.time()
    (first, _) = ledger.claim("ed", now)
    ledger.unreachable(first, "connection refused", 30)
    with ledger._journal.transaction() as execute:
        execute("UPDATE message SET due = ? WHERE id = ?", (now + 30, first.id))
    assert ledger.claim("ed", now) is None
    assert ledger.next_due("ed", now) == pytest.approx(now + 30)
    note(ledger, report(), series="1.9")
    (first, _) = ledger.claim("ed", time.time())
    ledger.unreachable(first, "HTTP 503", 30, asked=True)
    note(ledger, report(), series="1.7")
    assert ledger.claim("ed", time.time()) is None, "it asked for that wait"
    assert len(deliver(ledger, now=now + 60)) == 4


def test_what_was_refused_holds_up_its_own_alert_alone_and_is_parked_in_the_end(ledger: Ledger):
    note(ledger, EARLY, final=False)
    note(ledger, report())
    note(ledger, report("urgent", 5), series="1.9")
    now = time.time()
    (bad, _) = ledger.claim("ed", now)
    ledger.refused(bad, "AE: no such patient", 60)
    assert deliver(ledger) == [("raised", "confirmed", "urgent", "final")]
    (bad, _) = ledger.claim("ed", now + 99)
    ledger.refused(bad, "AE: no such patient", None)
    assert messages(ledger)[0] == ("raised", "parked")
    assert ledger.retry() == 1
    assert [told[0] for told in deliver(ledger)] == ["raised", "confirmed"]


def test_what_was_overtaken_while_it_was_parked_is_not_told_any_more(ledger: Ledger):
    note(ledger, EARLY, final=False)
    note(ledger, report("routine"))
    (bad, _) = ledger.claim("ed", time.time())
    ledger.refused(bad, "AE: no such patient", None)
    assert deliver(ledger) == [("withdrawn", "withdrawn", "critical", "final")]
    assert (ledger.retry(), deliver(ledger)) == (0, [])
    assert messages(ledger)[0] == ("raised", "cancelled")


def test_a_clock_that_is_set_back_holds_up_nothing_for_good(ledger: Ledger):
    note(ledger, report())
    now = time.time()
    (message, _) = ledger.claim("ed", now)
    ledger.unreachable(message, "down", 2)
    assert deliver(ledger, now=now - 10 * LONGEST_HOLD_S)


@pytest.mark.parametrize("back_s", [600.0, 5 * LONGEST_HOLD_S])
def test_a_clock_that_is_set_back_delays_nothing(journal: Journal, back_s: float):
    ledger = Ledger(journal, [Channel("ed"), Channel("down"), Channel("phone", after_s=300)])
    note(ledger, report())
    now = time.time()
    (message, _) = ledger.claim("down", now)
    ledger.unreachable(message, "down", 60)
    assert ledger.claim("phone", now - 1) is None, "a look that began a moment before it was written"
    for name in ("ed", "down", "phone"):
        assert len(deliver(ledger, name, now=now - back_s)) == 1, name


def test_a_clock_that_is_set_back_breaks_no_quiet_hours(journal: Journal):
    now = time.time()
    ledger = Ledger(journal, [Channel("ed", night=(now - 3600, now + 3600))])
    note(ledger, report("urgent", 5))
    assert deliver(ledger, now=now - 600, quiet_until=now + 3600) == []
    assert len(deliver(ledger, now=now + 3601)) == 1


def test_who_gives_a_message_up_frees_its_alert(ledger: Ledger):
    note(ledger, report())
    assert ledger.cancel(1)
    assert not ledger.cancel(1)
    ledger.acknowledge(1, "Dr A")
    assert ledger.studies_needed() == set()


def test_counts(ledger: Ledger):
    note(ledger, report())
    note(ledger, report("urgent", 5), series="1.9")
    ledger.claim("ed", time.time())
    alerts, told = ledger.counts()
    assert alerts == {("critical", "confirmed"): 1, ("urgent", "confirmed"): 1}
    assert told == {("ed", "sending"): 1, ("ed", "queued"): 1}


# what is forgotten


def test_only_what_nobody_needs_is_forgotten_and_the_patient_goes_with_the_study(ledger: Ledger):
    late = time.time() + 1000
    note(ledger, report())
    for forgotten in (lambda: ledger.forget(late, []), lambda: None):
        forgotten()
        assert ledger.alerts()[0].patient == PATIENT
        assert ledger.studies_needed() == {STUDY}
        deliver(ledger)
    ledger.forget(late, [])  # sent, but nobody has acknowledged it
    assert ledger.alerts()[0].patient == PATIENT
    ledger.acknowledge(1, "Dr A")
    assert ledger.studies_needed() == set()
    ledger.forget(late, [STUDY])
    assert ledger.alerts()[0].patient == PATIENT
    ledger.forget(0, [])
    assert (ledger.alerts()[0].patient, len(ledger.alerts()[0].messages)) == ({}, 1)
    ledger.forget(late, [])
    assert ledger.alerts() == []
    assert ledger.attempts(1) == ledger.acknowledgements() == []


def test_an_older_journal_gets_its_tables(tmp_path: Path):
    from dicom_node.storage import schema

    path = tmp_path / "old.sqlite"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dicom_node.storage.database.VERSIONS", schema.VERSIONS[:5])
        Journal(path).close()
    with contextlib.closing(Journal(path, read_only=True)) as journal:
        assert Ledger(journal).alerts() == []
    with contextlib.closing(Journal(path)) as journal:
        note(Ledger(journal), report())
        assert len(Ledger(journal).alerts()) == 1
