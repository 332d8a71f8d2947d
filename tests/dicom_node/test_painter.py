"""Pictures that are drawn in another process: the same ones, whatever becomes of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs

from dicom_node import montage, results
from dicom_node.painter import Painter
from tests.dicom_node import ct

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydicom.dataset import Dataset

CASE = ct.cases()["six findings"]


@pytest.fixture
def painter() -> Iterator[Painter]:
    with closing(Painter()) as one:
        yield one


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie, which whoever adopted it may leave for a while."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def pictures(painter: Painter) -> list[Dataset]:
    hu = {key: CASE.hu[CASE.keys.index(key)] for key in montage.pictured(CASE.report, CASE.keys)}
    made = results.build(
        CASE.sources, CASE.labels, hu, CASE.report, revision=CASE.revision, started=ct.STARTED, draw=painter.draw
    )
    return [*made.sc]


def test_it_draws_what_the_worker_would(painter: Painter) -> None:
    expected = [*CASE.build().sc]
    assert len(expected) > 4
    with capture_logs() as logs:
        assert pictures(painter) == expected
        assert pictures(painter) == expected
    assert not [line for line in logs if line["event"] == "painter_lost"]


def test_where_it_is_lost_the_worker_draws_and_starts_another(painter: Painter) -> None:
    expected = pictures(painter)
    lost = painter._process.pid
    os.kill(lost, signal.SIGKILL)
    with capture_logs() as logs:
        assert pictures(painter) == expected
        assert pictures(painter) == expected
    assert sum(line["event"] == "painter_lost" for line in logs) == 1
    assert painter._process.pid != lost
    assert not is_alive(lost)


def test_what_it_cannot_draw_is_the_series_fault_and_said_as_in_the_worker(
    painter: Painter, capfd: pytest.CaptureFixture
) -> None:
    with pytest.raises(AttributeError, match="findings"):
        list(painter.draw([], {}, "no report", {}))
    assert capfd.readouterr().err == ""  # it might quote the patient


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_to_the_whole_group_are_the_nodes(painter: Painter, number: signal.Signals) -> None:
    expected = pictures(painter)
    painter._process.send_signal(number)
    with capture_logs() as logs:
        assert pictures(painter) == expected
    assert not [line for line in logs if line["event"] == "painter_lost"]


def test_it_ends_with_the_worker_however_that_ends() -> None:
    code = "from dicom_node.painter import Painter; p = Painter(); print(p._process.pid, flush=True); input()"
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    painter = int(parent.stdout.readline())
    assert is_alive(painter)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 20
    while is_alive(painter):
        assert time.monotonic() < deadline
        time.sleep(0.05)
