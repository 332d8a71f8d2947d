"""Nothing that was acknowledged is lost, whatever is killed when: nodes and workers die while scanners push.

Every run has a seed and says it. Two scanners push interleaved studies, again and again, through a node that is killed
(SIGKILL, the node with its worker or the worker alone) at random moments. In the end every slice that was acknowledged
is in its series' last result, every volume is that of an undisturbed run, and the archive has each result once: it
takes another content under a SOP Instance UID for a conflict. (That result may be provisional: a node that was killed
did not hear how the association ended.)
"""

from __future__ import annotations

import gc
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from pydicom import dcmread

from dicom_node.configuration.toml import show
from dicom_node.network.requestor import PeerError
from dicom_node.simulation.pacs import Pacs
from dicom_node.simulation.scanner import Sent, push
from dicom_node.status import look
from tests.dicom_node.conftest import PATIENCE_S, Pushable, config_for

# pynetdicom leaves the socket of a connection that could not be opened to garbage collection
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    """Sockets that pynetdicom left go within the test that is known for it, not in a later one."""
    yield
    gc.collect()


SLICES, SLICES_PER_S = 8, 8
LIVES_S = (0.3, 1.5, 6)  # one of these at most: some nodes die before they have done anything, some while they deliver
BACKLOG = 12  # series without a result for which scanners wait: or the killing would keep every node at its start

SERVE = "from scanside import main; main()"
# a node that answers before the slice has its name: what the harness is there to find
HASTY = textwrap.dedent("""
    import threading, time
    from dicom_node.storage import spool
    genuine = spool.Spool.keep
    def hasty(self, incoming, instance):
        os.link(incoming, incoming.with_suffix(".kept"))
        later = lambda: (time.sleep(0.5), genuine(self, incoming.with_suffix(".kept"), instance))
        threading.Thread(target=later, daemon=True).start()
        return spool.Outcome.REPEATED, instance
    import os
    spool.Spool.keep = hasty
""")


@dataclass
class Harness:
    """A node that is started again and again, and what scanners were told."""

    folder: Path
    pacs: Pacs
    seed: int
    program: str = SERVE
    acknowledged: dict[str, set[str]] = field(default_factory=dict)  # SOP Instance UIDs by series
    deaths: dict[str, int] = field(default_factory=lambda: {"node": 0, "worker": 0})

    def __post_init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.config = config_for(self.folder / "node", self.pacs.port, idle_timeout_s=1.0, node_port=self.port)
        series = self.config.series.model_copy(update={"min_coverage_mm": 0.0})
        self.config = self.config.model_copy(update={"series": series})
        self.path = self.folder / "node.toml"
        self.path.write_text(show(self.config))
        self.random = random.Random(self.seed)
        self.enough, self.over = threading.Event(), threading.Event()

    def start(self) -> subprocess.Popen:
        """A node in a process group of its own, once it listens."""
        with (self.folder / "node.log").open("a") as log:
            node = subprocess.Popen(
                [sys.executable, "-c", self.program, "serve", "--config", str(self.path)],
                stderr=log, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            assert node.poll() is None, (self.folder / "node.log").read_text()[-2000:]
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return node
            time.sleep(0.05)
        raise AssertionError("the node does not listen")

    def scan(self, scanner: str, studies: Studies) -> None:
        """Push studies, each until all of its slices are acknowledged, until the killing is over."""
        while not self.enough.is_set():
            if len(self.acknowledged) - self.analysed() > BACKLOG:
                time.sleep(0.2)
                continue
            left = studies.next()
            series = next(iter(left)).rpartition(".")[0]
            while left and not self.over.is_set():
                try:
                    push(
                        list(left.values()), ("127.0.0.1", self.port), calling_ae=scanner, called_ae="SCANSIDE",
                        rate=SLICES_PER_S, on_slice=partial(self._note, series, left),
                    )  # fmt: skip
                except (PeerError, RuntimeError, OSError):
                    time.sleep(0.1)

    def _note(self, series: str, left: dict[str, Path], one: Sent) -> None:
        if one.is_stored:
            self.acknowledged.setdefault(series, set()).add(one.sop_uid)
            left.pop(one.sop_uid, None)

    def kill(self, node: subprocess.Popen) -> bool:
        """Kill node and worker, or every third time the worker alone; True when the node is dead."""
        if sum(self.deaths.values()) % 3 == 1:
            workers = [
                pid
                for task in Path(f"/proc/{node.pid}/task").iterdir()
                for pid in (task / "children").read_text().split()
            ]
            for pid in workers:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            self.deaths["worker"] += 1
            return False
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()
        self.deaths["node"] += 1
        return True

    def run(self, kills: int, studies: Studies, scanners: int = 2, patience_s: float = PATIENCE_S) -> None:
        """Scanners push, the node dies `kills` times, and lives in the end until all is delivered."""
        threads = [threading.Thread(target=self.scan, args=(f"CT{n}", studies)) for n in range(scanners)]
        node = self.start()
        for thread in threads:
            thread.start()
        try:
            for _ in range(kills):
                time.sleep(self.random.choice(LIVES_S) * self.random.random())
                if self.kill(node):
                    node = self.start()
            self.enough.set()
            for thread in threads:
                thread.join(PATIENCE_S)
            deadline = time.monotonic() + patience_s
            while not self.is_done() and time.monotonic() < deadline:
                time.sleep(0.2)
        finally:
            self.enough.set()
            self.over.set()
            os.killpg(node.pid, signal.SIGTERM)
            node.wait(30)
            for thread in threads:
                thread.join(30)

    def analysed(self) -> int:
        """How many series have a result on the disk."""
        return len(list((self.folder / "node" / "results").glob("*/*/revision-1/report.json")))

    def is_done(self) -> bool:
        """Whether every series has a result of all its slices, and the archive has everything."""
        status = look(self.config)
        whole = {one.series_uid for one in status.series if one.slices_analysed == SLICES}
        is_open = any(one.is_open for one in status.series)
        return not status.results_unsent and len(whole) == len(self.acknowledged) and not is_open

    def verdict(self, expected: dict[str, float] | None = None) -> list[str]:
        """What is wrong: nothing, if the node keeps its word."""
        wrong = []
        status = look(self.config)
        latest = {one.series_uid: one for one in sorted(status.series, key=lambda one: one.revision)}
        for series, uids in self.acknowledged.items():
            kept = {path.stem for path in (self.folder / "node" / "spool").glob(f"*/{series}/*.dcm")}
            if lost := uids - kept:
                wrong.append(f"{len(lost)} acknowledged slices of {series} are not in the spool")
            one = latest.get(series)
            if one is None or one.slices_analysed != len(uids):
                wrong.append(f"the last result of {series} is not of all {len(uids)} slices: {one}")
            elif expected is not None and (volumes := volumes_ml(one)) != expected:
                wrong.append(f"volumes of {series}: {volumes}, undisturbed {expected}")
        if status.results_unsent or status.results_parked:
            wrong.append(f"{status.results_unsent} results unsent, {status.results_parked} parked")
        if list((self.pacs.folder / "quarantine").iterdir()):
            wrong.append("the archive was sent two contents under one SOP Instance UID")
        return wrong


def volumes_ml(series) -> dict[str, float]:
    return {finding["class"]: finding["volume_ml"] for finding in series.findings}


class Studies:
    """Studies of eight slices around the blood, as many as are asked for; all of the same pixels."""

    def __init__(self, sources: list[Path], folder: Path) -> None:
        self._images = [dcmread(path) for path in sources]
        self._folder, self._lock, self._number = folder, threading.Lock(), 0

    def next(self) -> dict[str, Path]:
        """Files by SOP Instance UID; the UIDs of study and series are what stands before their last dots."""
        with self._lock:
            self._number += 1
            study = f"1.2.3.{self._number}"
            paths = {}
            for index, image in enumerate(self._images, start=1):
                image.StudyInstanceUID, image.SeriesInstanceUID = study, f"{study}.1"
                image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = f"{study}.1.{index}"
                paths[image.SOPInstanceUID] = self._folder / f"{image.SOPInstanceUID}.dcm"
                image.save_as(paths[image.SOPInstanceUID])
            return paths


@pytest.fixture
def studies(bleeding: Pushable, tmp_path: Path) -> Studies:
    middle = len(bleeding.paths) // 2
    (tmp_path / "scanner").mkdir()
    return Studies(bleeding.paths[middle - SLICES // 2 : middle + SLICES // 2], tmp_path / "scanner")


@pytest.mark.parametrize("kills", [4, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_no_kill_loses_or_changes_anything(tmp_path: Path, pacs: Pacs, studies: Studies, kills: int):
    seed = 20261122 + kills
    harness = Harness(tmp_path, pacs, seed)
    harness.run(kills, studies, patience_s=PATIENCE_S + 2 * kills)
    expected = next(volumes_ml(one) for one in look(harness.config).series if one.slices_analysed == SLICES)
    assert expected, "no blood was found: volumes say nothing"
    wrong = harness.verdict(expected)
    told = f"seed {seed}: {harness.deaths} deaths, {len(harness.acknowledged)} series acknowledged"
    print(told)
    assert not wrong, "\n".join([told, *wrong])
    assert sum(harness.deaths.values()) >= kills * 0.8
    assert len(harness.acknowledged) >= 3


@pytest.mark.slow
def test_a_node_that_answers_too_early_is_found_out(tmp_path: Path, pacs: Pacs, studies: Studies):
    """The harness itself: of a node that says "stored" before a slice has its name it says what is lost."""
    harness = Harness(tmp_path, pacs, 7, program=HASTY + SERVE)
    harness.run(4, studies, patience_s=10)
    assert any("acknowledged slices" in reason for reason in harness.verdict())
