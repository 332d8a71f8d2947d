"""The small archive: takes every kind of object, keeps it, and says when."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time

import pytest
from pydicom import dcmread
from pydicom.uid import Comprehensive3DSRStorage, CTImageStorage, SecondaryCaptureImageStorage, SegmentationStorage

from dicom_node.simulation.pacs import Pacs
from dicom_node.simulation.scanner import push
from tests.dicom_node.instances import SERIES, image, write

RESULTS = (SegmentationStorage, Comprehensive3DSRStorage, SecondaryCaptureImageStorage, CTImageStorage)


@pytest.fixture
def pacs(tmp_path):
    pacs = Pacs(tmp_path / "pacs")
    pacs.start()
    yield pacs
    pacs.stop()


def objects(folder):
    made = []
    for number, sop_class in enumerate(RESULTS, start=1):
        one = image(number, SOPClassUID=sop_class)
        one.file_meta.MediaStorageSOPClassUID = sop_class
        made.append(one)
    return write(folder, *made)


def test_results_of_every_kind_are_kept_and_noted(tmp_path, pacs):
    before = time.time()
    report = push(objects(tmp_path / "results"), ("127.0.0.1", pacs.port), calling_ae="SCANSIDE", called_ae="PACS")
    assert report.failed == ()
    assert pacs.wait_for(len(RESULTS), timeout_s=10)

    assert [sop_class for _, sop_class, _ in pacs.received] == list(RESULTS)
    assert [dcmread(path).SOPInstanceUID for _, _, path in pacs.received] == [f"{SERIES}.{n}" for n in (1, 2, 3, 4)]
    assert all(path.is_relative_to(pacs.folder) for _, _, path in pacs.received)
    assert before < pacs.received[0][0] <= pacs.received[-1][0] < time.time()


def test_wait_for_wakes_on_arrival_and_gives_up_in_time(tmp_path, pacs):
    assert not pacs.wait_for(1, timeout_s=0.05)
    has_sr = []

    def wait():
        has_sr.append(
            pacs.wait_for(lambda received: any(kind == Comprehensive3DSRStorage for _, kind, _ in received), 1e4)
        )

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    push(objects(tmp_path / "results"), ("127.0.0.1", pacs.port), calling_ae="SCANSIDE", called_ae="PACS")
    waiting.join(20)
    assert has_sr == [True]
    assert not pacs.wait_for(lambda received: len(received) > len(RESULTS), timeout_s=0.05)


@pytest.mark.skipif(shutil.which("echoscu") is None, reason="echoscu not installed: apt-get install dcmtk")
def test_echo(pacs):
    run = ["echoscu", "-aec", "PACS", "127.0.0.1", str(pacs.port)]
    assert subprocess.run(run, capture_output=True, timeout=30, check=False).returncode == 0
