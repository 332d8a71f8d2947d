"""Pictures of the Secondary Captures for the documents, from the code and the model as they are.

``python -m benchmarks.result_pictures docs`` analyses the phantom of `scanside demo` as the node does, and writes the
overview as ``overview.png`` and the first key slice as ``result.png``. Nobody on them is a patient.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image
from pydicom import dcmread

from dicom_node.analysis.analyser import Analyser
from dicom_node.analysis.series import Series
from dicom_node.configuration.config import Config
from dicom_node.simulation import phantom as writer
from runtime.bundle import open_bundle
from runtime.session import open_session
from runtime.triage import Rule
from training.lesions import Lesion
from training.phantom import Scan, make

BLOOD = (Lesion("intracerebral", 30), Lesion("subdural", 14))
PICTURES = {"sc-1": "overview.png", "sc-2": "result.png"}


def main(target: Path) -> None:
    """Write the pictures into a folder."""
    said, bundle = Config(), open_bundle()
    analyser = Analyser(
        bundle,
        open_session(bundle, "onnxruntime"),
        [Rule(**rule.model_dump()) for rule in said.triage],
        min_slices=said.series.min_slices,
        min_coverage_mm=said.series.min_coverage_mm,
        max_batch=4,
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder, series = Path(scratch), Series()
        analyser.feed(series, writer.write(make(BLOOD, Scan(slices=40), seed=1).slices, folder / "scan"))
        outcome = analyser.close(series, folder, revision=1, missing=())
        for role, name in PICTURES.items():
            picture = Image.fromarray(dcmread(folder / f"{role}.dcm").pixel_array)
            # 256 colours, chosen for this picture: a third of the bytes, and no difference that is seen
            picture.quantize(256, dither=Image.Dither.NONE).save(target / name, optimize=True)
            print(f"{target / name}: {(target / name).stat().st_size:,} bytes, {outcome.state}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
