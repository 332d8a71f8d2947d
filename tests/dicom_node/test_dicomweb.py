"""Orthanc takes every kind of result by STOW-RS and renders it by WADO-RS: what a viewer in a browser gets."""

from __future__ import annotations

import io
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import Dataset

from dicom_node.results import result_set, writing
from tests.dicom_node import matrix
from tests.dicom_node.test_node import archive, asked

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
pytestmark = pytest.mark.skipif(
    shutil.which("Orthanc") is None or not PLUGIN.exists(),
    reason="Orthanc's DICOMweb is not installed: apt-get install orthanc orthanc-dicomweb",
)


def store(root: str, paths: list[Path]) -> None:
    """STOW-RS (PS3.18 10.5) of files, in one request; Orthanc must take every one."""
    parts = b"".join(
        b"--part\r\nContent-Type: application/dicom\r\n\r\n" + path.read_bytes() + b"\r\n" for path in paths
    )
    kinds = {
        "Content-Type": 'multipart/related; type="application/dicom"; boundary=part',
        "Accept": "application/dicom+json",
    }
    request = urllib.request.Request(f"{root}/dicom-web/studies", parts + b"--part--", kinds, method="POST")
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.status == 200


def rendered(root: str, dataset: Dataset, frame: int = 1) -> np.ndarray:
    """A frame as WADO-RS renders it (PS3.18 10.4.1.1.3)."""
    place = f"studies/{dataset.StudyInstanceUID}/series/{dataset.SeriesInstanceUID}/instances/{dataset.SOPInstanceUID}"
    url = f"{root}/dicom-web/{place}/frames/{frame}/rendered"
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": "image/png"}), timeout=60) as answer:
        return np.asarray(Image.open(io.BytesIO(answer.read())))


@pytest.mark.parametrize("segmentation", ["binary", pytest.param("labelmap", marks=pytest.mark.slow)])
def test_orthanc_stores_and_renders_what_is_sent(segmentation: str, tmp_path: Path) -> None:
    form = result_set.Form(segmentation=segmentation, pdf=True)
    made = matrix.build(matrix.case("positive", 20.0), "positive", form)
    paths = writing.write(made, tmp_path)
    failed = writing.write(matrix.build(matrix.case("negative", 0.0), "failed"), tmp_path)
    files = [*paths.values(), *failed.values()]
    objects = {path: pydicom.dcmread(path) for path in files}
    with archive(tmp_path, (str(PLUGIN),)) as (root, _):
        store(root, files)
        stored = {one["MainDicomTags"]["SOPInstanceUID"]: one["ID"] for one in asked(f"{root}/instances?expand")}
        assert set(stored) == {str(each.SOPInstanceUID) for each in objects.values()}
        for path, picture in objects.items():
            if path.name.startswith(("sc", "notice")):
                np.testing.assert_array_equal(rendered(root, picture), picture.pixel_array, err_msg=path.name)
        masks = hd.seg.segread(paths["seg"])
        for frame, pixels in enumerate(np.atleast_3d(masks.pixel_array), start=1):
            shown = rendered(root, masks, frame)
            np.testing.assert_array_equal(shown > shown.min(), pixels > 0)
        with urllib.request.urlopen(f"{root}/instances/{stored[str(made.pdf.SOPInstanceUID)]}/pdf") as answer:
            assert answer.read().startswith(b"%PDF-")
