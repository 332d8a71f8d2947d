"""Pictures that are drawn in another process: the same ones, whatever becomes of it, and never another report's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pydicom import dcmwrite
from structlog.testing import capture_logs

from dicom_node.results import capture, painter, result_set
from dicom_node.results.painter import Painter
from dicom_node.results.source import normalise
from dicom_node.results.uids import Issue
from tests.dicom_node import ct

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydicom.dataset import Dataset

CASES = ct.cases()


@pytest.fixture(scope="module")
def process() -> Iterator[Painter]:
    """One for all tests, as for all reports of a worker: whatever they do to it, it draws the next one's pictures."""
    with closing(Painter()) as one:
        yield one


def made(name: str, draw: painter.Draw, **changed: object) -> Iterator[tuple[str, Dataset]]:
    case = replace(CASES[name], **changed)
    about = {"revision": case.revision, "started": ct.STARTED}
    return result_set.make(case.sources, case.labels, case.pictured(), case.report, **about, draw=draw)


def pictures(draw: painter.Draw, name: str = "six findings") -> list[bytes]:
    return [written(image) for image in ct.ResultSet.of(made(name, draw)).sc]


def written(image: Dataset) -> bytes:
    file = BytesIO()
    dcmwrite(file, image, enforce_file_format=True)
    return file.getvalue()


def issue(case: ct.Case) -> Issue:
    return Issue.of(case.sources[0], case.report.model, revision=1, started=ct.STARTED, content="")


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie, which whoever adopted it may leave for a while."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def lost(logs: list[dict[str, str]]) -> list[str]:
    return [line["reason"] for line in logs if line["event"] == "painter_lost"]


@pytest.mark.parametrize("name", ["six findings", "one finding", "negative"])
def test_it_draws_what_the_worker_would(process: Painter, name: str) -> None:
    expected = pictures(painter.draw, name)
    with capture_logs() as logs:
        assert pictures(process.draw, name) == expected
        assert pictures(process.draw) == pictures(painter.draw)
        assert pictures(process.draw, name) == expected
    assert lost(logs) == []


def test_where_it_is_lost_the_worker_draws_and_the_next_report_starts_another(process: Painter) -> None:
    expected = pictures(process.draw)
    first = process._process.pid
    os.kill(first, signal.SIGKILL)
    with capture_logs() as logs:
        assert pictures(process.draw) == expected
        assert pictures(process.draw) == expected
    assert len(lost(logs)) == 1
    assert process._process.pid != first
    assert not is_alive(first)


def test_what_it_had_drawn_when_it_was_lost_is_not_drawn_twice(
    process: Painter, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = pictures(process.draw)
    got = Painter._received

    def dying(self: Painter) -> Iterator[Dataset]:
        yield from islice(got(self), 2)
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._socket.recv()
        raise AssertionError

    monkeypatch.setattr(Painter, "_received", dying)
    with capture_logs() as logs:
        assert pictures(process.draw) == expected
    assert len(lost(logs)) == 1


def test_one_that_cannot_be_started_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", none)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with capture_logs() as logs, closing(Painter()) as one:
        assert pictures(one.draw) == pictures(painter.draw)
        assert lost(logs) == ["BlockingIOError"]
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_one_that_says_nothing_is_not_waited_for(process: Painter, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = pictures(process.draw)
    monkeypatch.setattr(painter, "PATIENCE_S", 0.5)
    process._process.send_signal(signal.SIGSTOP)
    stopped = process._process.pid
    with capture_logs() as logs:
        assert pictures(process.draw) == expected
    assert lost(logs) == ["it has said nothing for 0.5 s"]
    assert not is_alive(stopped)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_is_left_of_one_report_is_not_taken_for_the_next_ones(process: Painter, count: int) -> None:
    expected = pictures(painter.draw, "one finding")
    with capture_logs() as logs:
        with closing(made("six findings", process.draw)) as one:  # SEG, SR, then pictures: as on a full disk
            list(islice(one, count))
        assert pictures(process.draw, "one finding") == expected
    assert lost(logs) == []


def test_reports_that_nobody_wants_to_their_end_fill_no_socket(process: Painter) -> None:
    """As on a disk that stays full: both ends would wait for each other at the 19th."""
    keys, case = CASES["one finding"].keys, CASES["one finding"]
    source = normalise(case.sources)[0][5]
    shown = {keys[5]: capture.Shown(source, case.grey[5], case.labels[5])}
    with capture_logs() as logs:
        for _ in range(60):
            process.draw(keys, shown, case.report, issue(case))
        assert len(list(process.draw(keys, shown, case.report, issue(case)))) > 0
    assert lost(logs) == []


def test_what_is_left_in_the_socket_is_not_taken_for_the_next_reports(process: Painter) -> None:
    expected = pictures(painter.draw, "one finding")
    pictures(process.draw)
    process._reports += 1
    case = CASES["six findings"]
    asked = painter._put((case.keys, {}, case.report, issue(case)), process._memory)
    process._socket.send((process._reports, *asked))
    with capture_logs() as logs:
        assert pictures(process.draw, "one finding") == expected
    assert lost(logs) == ["it is at another report"]


def test_what_it_cannot_draw_is_told_by_its_place_and_comes_upon_the_worker(
    capfd: pytest.CaptureFixture, process: Painter
) -> None:
    with capture_logs() as logs, pytest.raises(AttributeError, match="findings"):
        list(process.draw([], {}, "no report", issue(CASES["six findings"])))
    (reason,) = lost(logs)
    assert reason.startswith("it has ended: AttributeError at panel.py:")
    assert capfd.readouterr().err == ""  # it might quote the patient


def test_it_quotes_nobody(capfd: pytest.CaptureFixture, process: Painter, recwarn: pytest.WarningsRecorder) -> None:
    """Pydicom warns of an illegal UID whenever it makes one, also of what was pickled."""
    case = ct.cases()["one finding"]
    case.sources[0].SOPInstanceUID = "1.2.03.bad-DOE"
    recwarn.clear()
    keys = ["1.2.03.bad-DOE", *case.keys[1:]]
    findings = tuple(
        replace(one, keys=tuple(keys[case.keys.index(key)] for key in one.keys)) for one in case.report.findings
    )
    shown = dict(zip(keys, case.grey, strict=True))
    report = replace(case.report, findings=findings)
    about = {"revision": 1, "started": ct.STARTED}
    list(result_set.make(case.sources, case.labels, shown, report, **about, draw=process.draw))
    told = capfd.readouterr()
    assert "DOE" not in told.err + "".join(str(one.message) for one in recwarn)


def test_memory_follows_the_size_of_the_reports(process: Painter) -> None:
    pictures(process.draw)
    usual = os.fstat(process._shared).st_size
    process._make_room(10 * usual)
    assert os.fstat(process._shared).st_size == 10 * usual
    assert pictures(process.draw) == pictures(painter.draw)
    assert os.fstat(process._shared).st_size == usual


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_to_the_whole_group_are_the_nodes(process: Painter, number: signal.Signals) -> None:
    expected = pictures(process.draw)
    process._process.send_signal(number)
    with capture_logs() as logs:
        assert pictures(process.draw) == expected
    assert lost(logs) == []


def test_it_imports_nothing_from_the_current_folder(
    process: Painter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "PIL.py").write_text("raise SystemExit('poisoned')\n")
    monkeypatch.chdir(tmp_path)
    with capture_logs() as logs:
        pictures(process.draw)
    assert lost(logs) == []


def test_it_leaves_no_handle_open(process: Painter) -> None:
    pictures(process.draw)
    process.close()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        pictures(process.draw, "one finding")
        process.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_it_ends_with_the_worker_however_that_ends() -> None:
    code = (
        "from dicom_node.results.painter import Painter\n"
        "p = Painter(); p._start(); print(p._process.pid, flush=True); input()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child = int(parent.stdout.readline())
    assert is_alive(child)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 20
    while is_alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)
