"""The demo as a process: what it leaves when it is told to stop."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from dicom_node.storage.lock import is_locked

if TYPE_CHECKING:
    from pathlib import Path


def test_a_demo_that_is_told_to_stop_takes_its_node_with_it(tmp_path: Path):
    folder = tmp_path / "demo"
    command = [sys.executable, "-P", "-m", "scanside", "demo", "--out", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not is_locked(folder / "node"):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    assert not is_locked(folder / "node")
