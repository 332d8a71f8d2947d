"""The spool: what it acknowledged is there, byte for byte, whatever the UIDs are and whenever the process dies."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.config import disable_value_validation
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)
from structlog.testing import capture_logs

from dicom_node.images.part10 import DataSetError, DataSetMismatch, DataSetUnreadable, identity
from dicom_node.storage import spool as spool_module
from dicom_node.storage.spool import Outcome, Spool, SpoolFull, read
from tests.dicom_node.instances import SERIES, STUDY, data_set_of, encoded, image, instances

SYNTAXES = [
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
    RLELossless,
]
HOSTILE = [
    "../../outside",
    "/etc/passwd",
    "1.2/3",
    "1." * 100 + "1",
    "1.2\0.3",
    "..",
    ".",
    "1..2",
    "1.2\n",
    "1.2é",
    "-1",
]


def store(spool, slice_, *, sop_uid=None, data_set=None, calling_ae="CT01"):
    return spool.store(
        encoded(slice_) if data_set is None else data_set,
        sop_class_uid=CTImageStorage,
        sop_uid=sop_uid or str(slice_.SOPInstanceUID),
        transfer_syntax_uid=slice_.file_meta.TransferSyntaxUID,
        calling_ae=calling_ae,
    )


def files_under(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


@pytest.fixture
def spool(tmp_path):
    return Spool(tmp_path / "spool", free_floor_gb=0)


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: syntax.name)
@pytest.mark.parametrize("as_view", [False, True], ids=["bytes", "memoryview"])
def test_stored_byte_for_byte_and_replayed(tmp_path, spool, syntax, as_view):
    slice_ = image(7, syntax)
    sent = encoded(slice_)
    outcome, instance = store(spool, slice_, data_set=memoryview(sent) if as_view else sent)

    assert outcome is Outcome.NEW
    assert (instance.study_uid, instance.series_uid, instance.sop_uid) == (STUDY, SERIES, f"{SERIES}.7")
    assert (instance.sop_class_uid, instance.transfer_syntax_uid) == (CTImageStorage, syntax)
    assert instance.path == tmp_path / "spool" / STUDY / SERIES / f"{SERIES}.7.dcm"
    assert instance.sha256 == hashlib.sha256(sent).hexdigest()
    assert data_set_of(instance.path) == sent
    assert files_under(tmp_path / "spool") == [instance.path]

    read = dcmread(instance.path)  # another reader finds a proper Part 10 file
    assert read.file_meta.SourceApplicationEntityTitle == "CT01"
    assert read.file_meta.MediaStorageSOPInstanceUID == read.SOPInstanceUID
    assert (read.pixel_array == slice_.pixel_array).all()

    assert instances(Spool(tmp_path / "spool", free_floor_gb=0)) == [instance]


def test_a_restart_keeps_the_order_of_arrival_within_each_series(tmp_path, spool):
    numbers = random.Random(3).sample(range(1, 41), 40)
    for number in numbers:
        store(spool, image(number))
        store(spool, image(1000 + number, SeriesInstanceUID="1.2.3.4.6"))

    replayed = instances(Spool(tmp_path / "spool", free_floor_gb=0))

    assert [i.sop_uid for i in replayed if i.series_uid == SERIES] == [f"{SERIES}.{n}" for n in numbers]
    assert spool.series(STUDY, "1.2.3.4.6") == [i.path for i in replayed if i.series_uid == "1.2.3.4.6"]
    assert {series: count for _, series, count in spool.contents()} == Counter(i.series_uid for i in replayed)
    assert list(spool.series(STUDY, "9.9")) == []


def test_repeat_is_stored_once_also_after_a_restart(tmp_path, spool):
    _, first = store(spool, image())
    written = first.path.read_bytes()

    assert store(spool, image(), calling_ae="ANOTHER") == (Outcome.REPEATED, first)
    assert store(Spool(tmp_path / "spool", free_floor_gb=0), image()) == (Outcome.REPEATED, first)

    assert files_under(tmp_path / "spool") == [first.path]
    assert first.path.read_bytes() == written


def test_what_a_failing_disk_took_and_nobody_was_told_of_is_news_when_it_is_sent_again(spool, monkeypatch):
    """Its name is there, but its directory could not be synced: the peer was refused, and the desk heard nothing."""

    def fail(_: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    store(spool, image(1))  # the directory is there
    with monkeypatch.context() as failing:
        failing.setattr("dicom_node.storage.spool.sync_directory", fail)
        with pytest.raises(OSError, match="Input/output"):
            store(spool, image(2))
        with pytest.raises(OSError, match="Input/output"):
            store(spool, image(2))
        with pytest.raises(OSError, match="Input/output"):
            store(spool, image(1, PatientID="P2"))
    assert store(spool, image(2))[0] is Outcome.NEW
    assert store(spool, image(2))[0] is Outcome.REPEATED
    assert store(spool, image(1, PatientID="P2"))[0] is Outcome.CONFLICT, "which is no slice to be analysed"


def test_other_content_under_a_taken_uid_goes_to_quarantine(tmp_path, spool):
    _, first = store(spool, image())
    other = image(PatientID="P2")
    for again in (spool, spool, Spool(tmp_path / "spool", free_floor_gb=0)):
        outcome, second = store(again, other)
        assert outcome is Outcome.CONFLICT
        assert second.path.parent == tmp_path / "spool" / "quarantine"
        assert data_set_of(second.path) == encoded(other)
    _, third = store(spool, image(PatientID="P3"))

    assert data_set_of(first.path) == encoded(image())
    assert files_under(tmp_path / "spool") == sorted([first.path, second.path, third.path])
    assert instances(spool) == [first]


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom on markers of 200 characters
@pytest.mark.parametrize("uid", HOSTILE, ids=ascii)
@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"])
def test_hostile_uids_name_nothing_outside_and_come_back(tmp_path, spool, keyword, uid):
    # pydicom encodes no such UID: it is put in afterwards, in the place of a marker of the same length
    marker = "9" * len(uid)
    slice_ = image()
    slice_.ensure_file_meta()
    data_set = encoded(image(**{keyword: marker})).replace(marker.encode(), uid.encode("latin-1"))
    outcome, instance = store(spool, slice_, data_set=data_set, sop_uid=uid if keyword == "SOPInstanceUID" else None)

    assert outcome is Outcome.NEW
    assert files_under(tmp_path) == [instance.path]
    assert len(instance.path.relative_to(tmp_path / "spool").parts) == 3
    assert ".." not in instance.path.parts
    assert uid in (instance.study_uid, instance.series_uid, instance.sop_uid)
    assert instances(spool) == [instance]
    assert store(spool, slice_, data_set=data_set, sop_uid=instance.sop_uid)[0] is Outcome.REPEATED


@pytest.mark.parametrize("padding", [" ", "\0", "\0\0", "  "], ids=ascii)
def test_padding_is_no_part_of_a_uid(spool, padding):
    wanted, marker = "1.2.3" + padding, "9" * len("1.2.3" + padding)
    data_set = encoded(image(StudyInstanceUID=marker)).replace(marker.encode(), wanted.encode())
    _, instance = store(spool, image(), data_set=data_set)
    assert instance.study_uid == "1.2.3"


@pytest.mark.parametrize("value", [None, ""], ids=["missing", "empty"])
@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"])
def test_without_its_uids_a_data_set_is_refused(tmp_path, spool, keyword, value):
    tag = {"StudyInstanceUID": "0020,000D", "SeriesInstanceUID": "0020,000E", "SOPInstanceUID": "0008,0018"}[keyword]
    with pytest.raises(DataSetMismatch, match=tag):
        store(spool, image(), data_set=encoded(image(**{keyword: value})))
    assert files_under(tmp_path) == []


def test_request_and_data_set_must_name_the_same_instance(tmp_path, spool):
    with pytest.raises(DataSetMismatch, match="SOPInstanceUID is not the request's"):
        store(spool, image(), sop_uid="9.9")
    assert files_under(tmp_path) == []


def nested(depth: int) -> bytes:
    opening = b"\x08\x00\x06\x00SQ\x00\x00\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    return opening * depth


@pytest.mark.parametrize(
    ("syntax", "data_set"),
    [
        (ExplicitVRLittleEndian, b""),
        (ExplicitVRLittleEndian, b"no DICOM at all, but long enough to be taken for elements"),
        (ExplicitVRLittleEndian, nested(5000)),
        (ExplicitVRLittleEndian, encoded(image())[:100]),
        (ImplicitVRLittleEndian, encoded(image(1, ImplicitVRLittleEndian))[:100]),
        (ExplicitVRBigEndian, encoded(image())),
        (DeflatedExplicitVRLittleEndian, encoded(image())),
        (DeflatedExplicitVRLittleEndian, encoded(image(1, DeflatedExplicitVRLittleEndian))[:20]),
    ],
    ids=[
        "nothing",
        "text",
        "nested",
        "truncated",
        "truncated implicit",
        "other endian",
        "not deflated",
        "cut deflated",
    ],
)
def test_what_is_no_data_set_is_refused_and_leaves_nothing(tmp_path, spool, syntax, data_set):
    with pytest.raises((DataSetUnreadable, DataSetMismatch)):
        store(spool, image(1, syntax), data_set=data_set)
    assert files_under(tmp_path) == []


def test_a_uid_cut_short_is_not_taken_for_a_uid(tmp_path, spool):
    data_set = encoded(image())
    end = data_set.index(SERIES.encode(), data_set.index(b"\x20\x00\x0e\x00")) + len(SERIES)
    store(spool, image(), data_set=data_set[:end] + b"\0")
    with pytest.raises(DataSetUnreadable, match=r"cut off within \(0020,000E\)"):
        store(spool, image(2), data_set=encoded(image(2))[: end - 2])
    assert len(files_under(tmp_path)) == 1


def test_a_data_set_cut_in_its_pixels_is_kept_as_it_came(spool):
    cut = encoded(image())[:-100]
    outcome, instance = store(spool, image(), data_set=cut)
    assert outcome is Outcome.NEW
    assert data_set_of(instance.path) == cut


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom on what hypothesis makes of a data set
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    syntax=st.sampled_from([s for s in SYNTAXES if s != RLELossless]),
    cut=st.integers(0, 700),
    changes=st.lists(st.tuples(st.integers(0, 699), st.integers(0, 255)), max_size=12),
)
def test_no_bytes_bring_anything_but_the_spools_own_errors(syntax, cut, changes):
    data = bytearray(encoded(image(1, syntax)))
    for place, value in changes:
        data[place % len(data)] = value
    try:
        uids = identity(bytes(data[: len(data) - cut]), syntax)
    except DataSetError:
        return
    assert all(uids)


def test_below_the_floor_nothing_is_taken(tmp_path):
    spool = Spool(tmp_path / "spool", free_floor_gb=1e9)
    with pytest.raises(SpoolFull, match=r"GB free, below node.free_floor_gb, 1e\+09: make room"):
        store(spool, image())
    assert files_under(tmp_path) == []


def test_a_full_disk_leaves_nothing_behind(tmp_path, spool, monkeypatch):
    def full(_handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spool_module.os, "fdatasync", full)
    with pytest.raises(OSError, match="No space left"):
        store(spool, image())
    assert files_under(tmp_path) == []


@pytest.mark.parametrize("same", [True, False], ids=["same content", "other content"])
def test_threads_that_store_one_uid_at_once(spool, same):
    slices = [image(PatientID="P" if same else f"P{i}") for i in range(8)]
    start = threading.Barrier(len(slices))
    stored = []

    def one(slice_):
        start.wait()
        stored.append((store(spool, slice_), encoded(slice_)))

    threads = [threading.Thread(target=one, args=[slice_]) for slice_ in slices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    outcomes = sorted(outcome for (outcome, _), _ in stored)
    assert outcomes == sorted([Outcome.NEW] + [Outcome.REPEATED if same else Outcome.CONFLICT] * 7)
    assert all(data_set_of(instance.path) == sent for (_, instance), sent in stored)
    assert len(instances(spool)) == 1


def test_content_is_on_disk_before_its_name_and_the_name_before_the_answer(tmp_path, spool, monkeypatch):
    done = []

    def note(name):
        genuine = getattr(os, name)

        def noting(*args):
            at = Path(f"/proc/self/fd/{args[0]}").readlink() if isinstance(args[0], int) else Path(args[1])
            done.append((name, (*at.relative_to(tmp_path / "spool").parts, "")[0]))
            return genuine(*args)

        monkeypatch.setattr(spool_module.os, name, noting)

    for name in ("fdatasync", "fsync", "link"):
        note(name)
    _, first = store(spool, image(1))
    store(spool, image(2))
    store(spool, image(2))
    content, name, directory = ("fdatasync", "incoming"), ("link", STUDY), ("fsync", STUDY)

    assert done == [
        *[("fsync", STUDY), ("fsync", "")],  # the new directories' parents
        *[content, name, directory] * 3,  # a repeat too: the thread that stored the first may not have come so far
    ]
    assert first.path.exists()


def test_start_removes_what_was_being_written(tmp_path, spool):
    _, instance = store(spool, image())
    (tmp_path / "spool" / "incoming" / "half").write_bytes(b"half a slice")
    (tmp_path / "spool" / "lost+found").mkdir(mode=0)  # a spool may be a partition of its own
    again = Spool(tmp_path / "spool", free_floor_gb=0)
    assert files_under(tmp_path / "spool") == [instance.path]
    assert instances(again) == [instance]


@pytest.mark.filterwarnings("ignore:Expected explicit VR:UserWarning")  # pydicom on zeros in place of elements
@pytest.mark.parametrize(
    "damaged", [b"", b"x" * 200, bytes(128) + b"DICM" + bytes(100)], ids=["empty", "text", "no meta"]
)
def test_a_start_names_a_damaged_file_and_goes_on(spool, damaged):
    _, first = store(spool, image(1))
    _, second = store(spool, image(2))
    first.path.write_bytes(damaged)
    os.utime(first.path, ns=(0, 0))  # still the first to arrive
    with capture_logs() as events:
        assert list(spool.contents()) == [(STUDY, SERIES, 2)]
    assert [(event["event"], event["path"]) for event in events] == [("spool_file_unreadable", str(first.path))]
    assert read(second.path) == second
    assert store(spool, image(1))[0] is Outcome.CONFLICT  # what is there is not what comes


def test_what_lies_there_can_be_counted_beside_the_spool(tmp_path, spool):
    root = tmp_path / "spool"
    assert spool_module.count(tmp_path / "nowhere") == {}
    before = time.time() - 1
    _, first = store(spool, image(1))
    store(spool, image(2))
    store(spool, image(2))  # repeated
    store(spool, image(2, StudyID="another"))  # to quarantine
    with disable_value_validation():
        store(spool, image(3, SeriesInstanceUID="no/uid"))
    (root / "incoming" / "half").write_bytes(b"being written")
    first.path.write_bytes(b"damaged, and not looked into")
    found = spool_module.count(root)
    assert {key: count for key, (count, _) in found.items()} == {(STUDY, SERIES): 2, (STUDY, "no/uid"): 1}
    assert all(before < last <= time.time() + 1 for _, last in found.values())
    assert (root / "incoming" / "half").exists()


STORE_UNTIL_KILLED = """
    import os, random, signal, sys, time
    from pathlib import Path
    from dicom_node.storage.spool import Spool
    from tests.dicom_node.instances import encoded, image

    root, rounds = Path(sys.argv[1]), int(sys.argv[2])
    for round_ in range(rounds):
        ready, told = os.pipe()
        child = os.fork()
        if child == 0:
            spool = Spool(root, free_floor_gb=0)
            for number in range(1000):
                slice_ = image(round_ * 1000 + number, side=128, SeriesInstanceUID=f"1.2.{number % 3}")
                _, instance = spool.store(encoded(slice_), sop_class_uid="1.2", sop_uid=str(slice_.SOPInstanceUID),
                                          transfer_syntax_uid="1.2.840.10008.1.2.1", calling_ae="CT01")
                os.write(1, f"{instance.sha256}\\n".encode())
                os.write(told, b".")
        os.close(told)
        os.read(ready, 1)
        time.sleep(random.random() * 0.05)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
"""


def test_a_kill_loses_nothing_that_was_acknowledged_and_leaves_no_half_file(tmp_path):
    root, rounds = tmp_path / "spool", 25
    run = [sys.executable, "-c", textwrap.dedent(STORE_UNTIL_KILLED), str(root), str(rounds)]
    acknowledged = subprocess.run(run, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    assert len(acknowledged) >= rounds

    for path in root.rglob("*.dcm"):  # before any repair
        assert len(dcmread(path).PixelData) == 128 * 128 * 2
    replayed = {instance.sha256 for instance in instances(Spool(root, free_floor_gb=0))}
    assert set(acknowledged) <= replayed
    assert len(replayed) <= len(acknowledged) + rounds  # at most one in each life was on disk and not acknowledged
    assert not list((root / "incoming").iterdir())


DIE_IN_THE_MIDDLE_OF_A_WRITE = """
    import resource, signal, sys
    from pathlib import Path
    from dicom_node.storage.spool import Spool
    from tests.dicom_node.instances import encoded, image

    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    spool = Spool(Path(sys.argv[1]), free_floor_gb=0)
    spool.store(encoded(image(side=512)), sop_class_uid="1.2", sop_uid="1.2.3.4.5.1",
                transfer_syntax_uid="1.2.840.10008.1.2.1", calling_ae="CT01")
"""


def test_dying_in_the_middle_of_a_write_leaves_no_half_file(tmp_path):
    root = tmp_path / "spool"
    run = [sys.executable, "-c", textwrap.dedent(DIE_IN_THE_MIDDLE_OF_A_WRITE), str(root)]
    assert subprocess.run(run, timeout=60, check=False).returncode == -signal.SIGXFSZ
    (half,) = files_under(root)
    assert half.parent == root / "incoming"
    assert half.stat().st_size == 300_000
    assert instances(Spool(root, free_floor_gb=0)) == []
    assert files_under(root) == []
