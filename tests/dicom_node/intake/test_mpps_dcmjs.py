"""A procedure step by another implementation than pynetdicom's: dcmjs-dimse, which npm has."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.uid import generate_uid

from dicom_node.node import Node
from dicom_node.simulation.pacs import Pacs
from dicom_node.simulation.scanner import push
from dicom_node.status import look
from tests.dicom_node.conftest import Pushable, wait_until

FOLDER = os.environ.get("SCANSIDE_DCMJS", "")
pytestmark = pytest.mark.skipif(
    shutil.which("node") is None or not (Path(FOLDER) / "node_modules" / "dcmjs-dimse").is_dir(),
    reason="SCANSIDE_DCMJS does not name a folder in which `npm install dcmjs-dimse` was run: "
    "procedure steps come from pynetdicom ALONE",
)


def test_a_step_names_what_is_missing_and_closes_what_is_whole(bleeding: Pushable, node: Node, pacs: Pacs):
    headers = [dcmread(path, stop_before_pixels=True) for path in bleeding.paths]
    half = len(headers) // 2
    for path in bleeding.paths[:half]:  # an association a slice: no release tells anything
        push([path], ("127.0.0.1", node.port), calling_ae="CT1", called_ae="SCANSIDE")
    uids = [str(header.SOPInstanceUID) for header in headers]
    command = ["node", str(Path(__file__).with_name("mpps_scu.cjs")), str(node.port), generate_uid()]
    said = subprocess.run(
        [*command, headers[0].SeriesInstanceUID, *uids], capture_output=True, text=True, check=True, timeout=60
    )
    statuses = [line for line in said.stdout.splitlines() if line.startswith("status ")]
    assert statuses == ["status 0", "status 0"], "N-CREATE and N-SET"
    wait_until(lambda: not any(one.is_open for one in look(node.config).series), "a provisional result")
    (first,) = look(node.config).series
    assert first.provisional
    assert any(
        f"{len(headers) - half} of {len(headers)} images that the scanner's procedure step lists are not here" in one
        for one in first.missing
    )
    for path in bleeding.paths[half:]:
        push([path], ("127.0.0.1", node.port), calling_ae="CT1", called_ae="SCANSIDE")
    wait_until(lambda: not look(node.config).series[-1].is_open and len(look(node.config).series) > 1, "the rest")
    last = look(node.config).series[-1]
    assert (last.provisional, last.slices_analysed) == (False, len(headers))
