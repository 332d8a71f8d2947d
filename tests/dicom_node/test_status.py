"""What `scanside status` and `scanside outbox` tell of a node's folder, with a node and without, at 80 columns."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from pathlib import Path

import pytest
from pydicom.config import disable_value_validation
from pydicom.uid import EnhancedCTImageStorage
from rich.console import Console

import scanside
from dicom_node.configuration.config import load
from dicom_node.delivery.outbox import Outbox
from dicom_node.operation import commands
from dicom_node.results.result_set import to_json
from dicom_node.storage.journal import Journal, ResultFile, SeriesState
from dicom_node.storage.lock import FolderLock
from dicom_node.storage.spool import Spool
from runtime.millilitres import said
from runtime.types import Decision
from tests.dicom_node.ct import cases
from tests.dicom_node.instances import encoded, image

ROOT_UID = "1.2.826.0.1.3680043.8.498.10511287519475103258"
STUDY = f"{ROOT_UID}.1{'0' * (64 - len(ROOT_UID) - 2)}"
ROLES = ("sr", "seg")


NONE_FOUND = "no haemorrhage found"
NEGATIVE = dataclasses.replace(cases()["negative"].report, decision=Decision("routine", NONE_FOUND))


class Folder:
    """A node's folder, filled by hand as a node would."""

    def __init__(self, path: Path) -> None:
        self.config = path / "node.toml"
        self.config.write_text(
            "[[destinations]]\nname = 'pacs'\nae_title = 'PACS'\nhost = '127.0.0.1'\nport = 4242\n"
            "[[destinations]]\nname = 'archive'\nae_title = 'ARCHIVE'\nhost = '127.0.0.1'\nport = 4243\n"
        )
        self.path = load(self.config).node.folder
        self.path.mkdir()
        self.spool = Spool(self.path / "spool", free_floor_gb=0)
        self.journal = Journal(self.path / "journal.sqlite")

    def receive(self, series: int, slices: int, study_uid: str = STUDY, **replaced: object) -> str:
        uid = f"{STUDY[:-1]}{series}"
        for number in range(slices):
            uids = {"StudyInstanceUID": study_uid, "SeriesInstanceUID": uid, "SOPInstanceUID": f"{series}.{number}"}
            one = image(**uids, **replaced)
            self.spool.store(
                encoded(one),
                sop_class_uid=one.SOPClassUID,
                sop_uid=one.SOPInstanceUID,
                transfer_syntax_uid=one.file_meta.TransferSyntaxUID,
                calling_ae="CT1",
            )
        return uid

    def record(
        self,
        series_uid: str,
        files: int,
        *,
        received: int = 0,
        revision: int = 1,
        state: str = "analysed",
        reason=None,
        destinations: tuple[str, ...] = ("pacs",),
        **report,
    ) -> None:
        """`report` replaces what the report of a head without findings says; in another state there is no report."""
        analysed = state == "analysed"
        self.journal.record_result(
            STUDY,
            series_uid,
            revision,
            state=SeriesState(state),
            reason=reason,
            slices=files,
            report_json=to_json(dataclasses.replace(NEGATIVE, **report), received or files) if analysed else None,
            files=[
                ResultFile(role, Path(role), "1.2.3", f"{series_uid}.{revision}.{role}") for role in ROLES * analysed
            ],
            destinations=dict.fromkeys(destinations, ROLES),
        )

    def shown(self, capsys: pytest.CaptureFixture[str]) -> str:
        scanside.status(self.config)
        return told(capsys)

    def asked(self, capsys: pytest.CaptureFixture[str]) -> dict:
        scanside.status(self.config, as_json=True)
        return json.loads(capsys.readouterr().out)


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, once it has been seen to fit and to hold nothing that only a programmer reads."""
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80, text
    for word in ("None", "{", "[", "\u2026", "\x1b"):
        assert word not in text, text
    return text


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.setattr(scanside, "out", Console(width=80))
    made = Folder(tmp_path)
    yield made
    made.journal.close()


@contextlib.contextmanager
def node_in(folder: Folder):
    lock = FolderLock(folder.path)
    yield
    lock.release()


FINDINGS = cases()["six findings"].report.findings[:2]
NAMES = [finding.name for finding in cases()["six findings"].report.findings]


def test_a_provisional_result_says_so_and_what_is_missing(folder: Folder, capsys):
    lost = "2 images not analysed: a file or pixels that no installed decoder reads"
    uid = folder.receive(1, 25)
    folder.record(uid, 25, slices=23, provisional=True, missing=(lost,))
    (one,) = folder.asked(capsys)["series"]
    assert (one["state"], one["provisional"], one["missing"]) == ("analysed", True, [lost])
    assert (one["slices_analysed"], one["slices_received"]) == (23, 25)
    assert (one["study_uid"], one["series_uid"]) == (STUDY, uid)
    assert time.time() - 60 < one["composed"] <= time.time()
    text = folder.shown(capsys)
    assert f"provisional  23/25  routine  {NONE_FOUND}" in text
    for words in (lost, STUDY, uid, time.strftime("%H:", time.localtime(one["composed"]))):
        assert words in text


def test_a_final_result_with_its_volumes(folder: Folder, capsys):
    folder.record(folder.receive(1, 12), 12, findings=FINDINGS, decision=Decision("critical", "much blood"))
    told_json = folder.asked(capsys)
    (one,) = told_json["series"]
    assert one["provisional"] is False
    assert one["decision"]["level"] == "critical"
    assert one["findings"] == [{"class": each.name, "volume_ml": each.volume_ml} for each in FINDINGS]
    blood = ", ".join(f"{each.name} {said(each.volume_ml)}" for each in FINDINGS)
    assert f"final  12/12  critical  {blood}\n" in folder.shown(capsys)


def test_more_findings_than_fit_are_wrapped_within_their_column(folder: Folder, capsys):
    folder.record(folder.receive(1, 12), 12, findings=cases()["six findings"].report.findings)
    line, *rest = folder.shown(capsys).partition("    series")[0].splitlines()[2:]
    assert rest
    assert all(each == " " * line.index(NAMES[0]) + each.strip() for each in rest)
    assert all(name in " ".join([line, *rest]) for name in NAMES)


def test_what_is_left_out_of_a_final_result_is_a_note(folder: Folder, capsys):
    folder.record(folder.receive(1, 13), 13, slices=12, missing=("1 image not analysed: a localizer",))
    text = folder.shown(capsys)
    assert f"final  12/13  routine  {NONE_FOUND}" in text
    assert "1 image not analysed: a localizer" in text


@pytest.mark.parametrize(("age_s", "state"), [(0, "receiving"), (60, "waiting")])
def test_a_series_that_arrives_is_there_before_it_has_a_result(folder: Folder, capsys, age_s: int, state: str):
    uid = folder.receive(1, 37)
    series = next((folder.path / "spool").glob(f"*/{uid}"))
    os.utime(series, (time.time() - age_s,) * 2)
    with node_in(folder):
        answer = folder.asked(capsys)
        text = folder.shown(capsys)
    (one,) = answer["series"]
    assert answer["node_running"] is True
    assert (one["state"], one["slices_received"], one["provisional"]) == (state, 37, None)
    assert (one["study_uid"], one["series_uid"]) == (STUDY, uid)
    assert f"{state}  37    acknowledged, no result yet" in text
    assert "the node is running: 1 series without a result" in text


def test_every_frame_counts_as_a_slice(folder: Folder, capsys):
    enhanced = {"SOPClassUID": EnhancedCTImageStorage, "NumberOfFrames": 20}
    arriving = folder.receive(1, 2, **enhanced)
    folder.record(folder.receive(2, 2, **enhanced), 2, received=40, slices=38)
    folder.receive(3, 2, SOPClassUID=EnhancedCTImageStorage)  # they do not say how many frames
    told = {one["series_uid"]: one for one in folder.asked(capsys)["series"]}
    assert told[arriving]["slices_received"] == 40
    assert [one["slices_received"] for one in told.values()] == [40, 40, 2]
    assert "final  38/40  routine" in folder.shown(capsys).replace("final    ", "final  ")


def test_slices_that_wait_for_a_node_that_is_dead(folder: Folder, capsys):
    folder.receive(1, 3)
    answer = folder.asked(capsys)
    assert answer["node_running"] is False
    assert answer["series"][0]["state"] == "waiting"
    assert "the node is not running: 1 series without a result" in folder.shown(capsys)


def test_results_that_wait_for_a_node_that_is_dead(folder: Folder, capsys):
    folder.record(folder.receive(1, 3), 3)
    Outbox(folder.journal).park(Outbox(folder.journal).items()[0].id, "by hand")
    answer = folder.asked(capsys)
    assert (answer["results_unsent"], answer["results_parked"]) == (1, 1)
    text = folder.shown(capsys)
    assert "the node is not running: 1 result to be sent, 1 result parked" in text


def test_late_slices_open_the_next_revision_beside_the_last_result(folder: Folder, capsys):
    uid = folder.receive(1, 25)
    folder.record(uid, 24, slices=24, provisional=True, missing=("1 slice missing",))
    with node_in(folder):
        assert [(one["state"], one["revision"]) for one in folder.asked(capsys)["series"]] == [
            ("analysed", 1),
            ("receiving", 2),
        ]
        text = folder.shown(capsys)
        assert NONE_FOUND in text
        assert "acknowledged, no result yet (revision 2)" in text
    folder.record(uid, 25, revision=2, slices=25)
    assert len(folder.asked(capsys)["series"]) == 2
    text = folder.shown(capsys)
    assert f"{NONE_FOUND} (revision 2)" in text
    assert "provisional" not in text


def test_what_was_not_analysed_says_why(folder: Folder, capsys):
    folder.record(folder.receive(1, 3), 3, state="not_analysed", reason="too few slices: 3, 5 needed")
    folder.record(folder.receive(2, 30), 30, state="failed", reason="ValueError at seg.py:120")
    text = folder.shown(capsys)
    assert "not analysed  3     too few slices: 3, 5 needed" in text
    assert "failed        30    ValueError at seg.py:120" in text


def test_what_was_found_stays_in_sight_where_a_later_revision_has_no_result(folder: Folder, capsys):
    uid = folder.receive(1, 30)
    folder.record(uid, 30, findings=FINDINGS, decision=Decision("critical", "much"))
    folder.record(uid, 31, revision=2, state="failed", reason="ValueError at seg.py:120")
    text = folder.shown(capsys)
    assert "critical" in text
    assert "ValueError at seg.py:120 (revision 2)" in text
    folder.record(uid, 32, revision=3)
    text = folder.shown(capsys)
    assert NONE_FOUND in text
    assert "critical" not in text, "the last result replaces the first"


def test_what_is_old_and_delivered_is_told_to_those_who_ask_for_it(folder: Folder, capsys):
    old, owed, new = (folder.receive(number, 12) for number in (1, 2, 3))
    for uid in (old, owed, new):
        folder.record(uid, 12)
    outbox = Outbox(folder.journal)
    for item in outbox.items():
        if item.series_uid == old:
            outbox.mark_sent(item.id)
    with folder.journal.transaction() as execute:
        execute("UPDATE series SET recorded = recorded - 2 * 86400 WHERE series_uid != ?", (new,))
        execute("UPDATE outbox SET created = created - 2 * 86400 WHERE series_uid != ?", (new,))
    for series in folder.path.glob("spool/*/*"):
        os.utime(series, (1e9, 1e9))  # or it would wait for its next result
    for tell in (scanside.status, commands.outbox_list):
        tell(folder.config)
        text = capsys.readouterr().out
        assert [uid in text for uid in (old, owed, new)] == [False, True, True], text
        tell(folder.config, days=3)
        assert old in capsys.readouterr().out


def test_one_series_looks_as_many_do(folder: Folder, capsys):
    folder.record(folder.receive(1, 5), 5, slices=5)
    alone = folder.shown(capsys).splitlines()[1:]
    folder.record(folder.receive(2, 5), 5, slices=5)
    together = folder.shown(capsys).splitlines()[1:]
    assert together[: len(alone)] == alone
    assert len(together) == 2 * len(alone) - 1  # of one study


def test_a_full_disk_is_told_before_all_series(folder: Folder, capsys):
    assert "refused" not in folder.shown(capsys)
    with folder.config.open("a") as config:
        config.write("[node]\nfree_floor_gb = 1e6\n")
    assert " GB free, below node.free_floor_gb = 1e+06" in folder.shown(capsys).splitlines()[1]


def test_nothing_yet(folder: Folder, capsys):
    assert folder.shown(capsys) == "the node is not running\nno series yet\n"


def test_uids_that_no_peer_should_send(folder: Folder, capsys):
    """Hashed on disk, as they came in what is told, and without effect on the terminal."""
    with disable_value_validation():
        folder.receive(1, 2, study_uid="../\x1b[31m[b]")
    (one,) = folder.asked(capsys)["series"]
    assert one["study_uid"] == "../\x1b[31m[b]"
    scanside.status(folder.config)
    assert "study ../?[31m[b]" in capsys.readouterr().out


def test_no_patient_is_told(folder: Folder, capsys):
    folder.record(folder.receive(1, 5), 5)
    folder.receive(2, 5)
    scanside.status(folder.config)
    scanside.status(folder.config, as_json=True)
    commands.outbox_list(folder.config)
    commands.outbox_list(folder.config, as_json=True)
    shown = capsys.readouterr().out
    assert "Phantom^Head" not in shown
    assert "P1" not in shown


def test_looking_changes_nothing_and_stops_no_node(folder: Folder, capsys):
    """Not a byte and not a lock, and a slice that is being written is left alone."""
    folder.record(folder.receive(1, 5), 5)
    (folder.path / "spool" / "incoming" / "half").write_bytes(b"half a slice")

    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in sorted(folder.path.rglob("*")) if path.is_file()}

    before = {path: data for path, data in content().items() if path.suffix != ".sqlite-shm"}
    folder.shown(capsys)
    commands.outbox_list(folder.config)
    capsys.readouterr()
    after = content()
    assert {path: after[path] for path in before} == before
    assert not (folder.path / "lock").exists()
    with node_in(folder):  # and a node starts as ever
        assert folder.asked(capsys)["node_running"]


# the outbox


def listed(folder: Folder, capsys) -> tuple[list[dict], str]:
    commands.outbox_list(folder.config, as_json=True)
    items = json.loads(capsys.readouterr().out)
    commands.outbox_list(folder.config)
    return items, told(capsys)


def test_results_for_a_dead_peer_tell_their_tries_and_the_next_one(folder: Folder, capsys):
    uid = folder.receive(1, 5)
    folder.record(uid, 5)
    for wait_s in (-1, 100):  # the second try is not yet made
        now = time.time()
        items = Outbox(folder.journal).claim("pacs", now)
        Outbox(folder.journal).postpone(
            [item.id for item in items], now + wait_s, "pacs (PACS at h:1): Connection refused"
        )
    with node_in(folder):
        items, text = listed(folder, capsys)
    assert [(item["tries"], item["not_taken"], item["state"]) for item in items] == [(2, 0, "waiting")] * 2
    assert {item["series_uid"] for item in items} == {uid}
    assert {item["study_uid"] for item in items} == {STUDY}
    assert all(now + 90 < item["next_try"] < now + 110 for item in items)
    assert "1  sr   pacs  waiting, 2 tries; next in " in text
    assert f"series {uid}\n" in text
    assert f"study {STUDY}\n" in text
    assert text.count("pacs (PACS at h:1): Connection refused") == 1
    assert "the node is running: 2 results to be sent" in text
    assert "waiting, 2 tries; next when the node starts" in listed(folder, capsys)[1]


def test_destinations_that_are_down_together_tell_their_errors_once_each(folder: Folder, capsys):
    folder.record(folder.receive(1, 5), 5, destinations=("pacs", "archive"))
    for name in ("pacs", "archive"):
        items = Outbox(folder.journal).claim(name, time.time())
        Outbox(folder.journal).postpone([item.id for item in items], time.time() + 100, f"{name}: Connection refused")
    _, text = listed(folder, capsys)
    assert [text.count(f"{name}: Connection refused") for name in ("pacs", "archive")] == [1, 1]


def test_every_state_of_a_result(folder: Folder, capsys):
    folder.record(folder.receive(1, 5), 5)
    folder.record(folder.receive(2, 5), 5)
    first, second, *_ = Outbox(folder.journal).claim("pacs", time.time())
    Outbox(folder.journal).mark_sent(first.id)
    Outbox(folder.journal).park(second.id, "0x0122 Failure")
    folder.record(folder.receive(3, 5), 5)
    with node_in(folder):
        items, text = listed(folder, capsys)
    assert [item["state"] for item in items] == ["sent", "parked", "sending", "sending", "queued", "queued"]
    assert [item["next_try"] is None for item in items] == [True] * 4 + [False] * 2
    assert f"1  sr   pacs  sent {time.strftime('%H:')}" in text
    assert "2  seg  pacs  parked, 1 try\n" in text.replace(" \n", "\n")
    assert "0x0122 Failure" in text
    assert "3  sr   pacs  sending, 1 try" in text
    assert "5  sr   pacs  queued; next now" in text


def test_a_destination_that_was_taken_out_of_the_configuration(folder: Folder, capsys):
    folder.record(folder.receive(1, 5), 5)
    folder.config.write_text("")
    with node_in(folder):
        items, text = listed(folder, capsys)
    assert items[0]["next_try"] is None
    assert "queued; its destination is not in the configuration" in text


def test_an_empty_outbox(folder: Folder, capsys):
    assert listed(folder, capsys) == ([], "the node is not running\nnothing has been owed to anybody yet\n")


@pytest.mark.parametrize("command", [commands.outbox_retry, commands.outbox_park], ids=lambda c: c.__name__)
def test_retry_and_park_of_what_is_not_there(folder: Folder, capsys, command):
    folder.record(folder.receive(1, 5), 5)
    with pytest.raises(SystemExit) as ended:
        command(folder.config, 55)
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "result 55" in said.err
    assert "see `scanside outbox list`" in said.err


def test_retry_of_what_is_there(folder: Folder, capsys):
    folder.record(folder.receive(1, 5), 5)
    commands.outbox_park(folder.config, 1)
    commands.outbox_retry(folder.config, 1)
    commands.outbox_retry(folder.config, None)
    told = "parked: 1, until `scanside outbox retry 1`\n1 queued again\n0 queued again\n"
    assert capsys.readouterr().out == told
