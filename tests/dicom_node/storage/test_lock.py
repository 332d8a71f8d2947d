"""One node to a folder, and whoever asks whether there is one gets in nobody's way."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from dicom_node.storage.lock import FolderLock, LockedError, is_locked

HOLD = """
import sys, time
from pathlib import Path
from dicom_node.storage.lock import FolderLock

lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_it_is_held_until_released(tmp_path):
    assert not is_locked(tmp_path)
    assert list(tmp_path.iterdir()) == []  # asking leaves nothing
    lock = FolderLock(tmp_path)
    assert is_locked(tmp_path)
    with pytest.raises(LockedError):
        FolderLock(tmp_path)
    assert is_locked(tmp_path)  # the second's end has not taken it from the first
    lock.release()
    assert not is_locked(tmp_path)
    FolderLock(tmp_path).release()


def test_it_ends_with_a_process_that_is_killed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        assert is_locked(tmp_path)
        with pytest.raises(LockedError):
            FolderLock(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not is_locked(tmp_path)


def test_asking_never_stops_a_node_from_starting(tmp_path):
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            is_locked(tmp_path)

    asking = [threading.Thread(target=ask) for _ in range(2)]
    for thread in asking:
        thread.start()
    try:
        for _ in range(300):
            FolderLock(tmp_path).release()
    finally:
        done.set()
        for thread in asking:
            thread.join()
