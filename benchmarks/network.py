"""A series through a network of the catalogue, from files to labels, in FP32 and in INT8 on the processor.

The network is as its paper has it and has learnt nothing: how fast a layer is does not depend on its weights, and what
it answers is looked at by nobody. Every layer is in 8 bits that may be (`calibration.placement`); after training
`scanside calibrate` may leave some out, and is then that much slower.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydicom import dcmread

from benchmarks import cases, floors
from benchmarks.record import Record, measuring
from benchmarks.study import recipe_of
from benchmarks.timing import once_ms
from calibration import placement
from calibration.activations import observe
from calibration.weights import load
from dicom_node.analysis.analyser import Analyser
from dicom_node.analysis.series import Series
from export import bundle as bundles
from models import catalogue
from runtime.bundle import open_bundle
from runtime.ort import OrtSession
from runtime.types import OperatingPoint
from training import heads
from training.train import build

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from runtime.bundle import Bundle

ALONE = 4  # slices that the engine alone is timed on


def measure(architecture: str, *, grids: Sequence[int] = (128, 512), slices: int = 40, rounds: int = 3) -> Record:
    """Both precisions in turn, grid by grid.

    Parameters
    ----------
    grids : sides of the squares that the network sees a slice on

    """
    asked = {"architecture": architecture, "grids": tuple(grids), "slices": slices, "rounds": rounds}
    with measuring("network", **asked) as record, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = cases.head(slices, folder / "head").write(folder / "series", 1)
        record.about |= {"parameters": 0, "gflops": {}}
        for grid in grids:
            bundle = _untrained(architecture, grid, folder / f"bundle-{grid}", record)
            views = heads.golden_slices(bundle.view)
            sessions = {"fp32": OrtSession(bundle), "int8": OrtSession(bundle, graph=_in_8_bits(bundle, views[:1]))}
            hu = np.concatenate([_view(path, bundle.view.shown) for path in paths[:: max(1, slices // ALONE)]])
            hu = hu.astype(np.int32)
            for session in sessions.values():
                session.infer(hu)  # warms up
            for _ in range(rounds):
                for precision, session in sessions.items():
                    figure = f"grid_{grid}_{precision}"
                    limits = {"min_slices": 5, "min_coverage_mm": 100.0, "max_batch": session.max_batch}
                    one = Analyser(bundle, session, floors.RULES, **limits)
                    took = once_ms(lambda one=one: one.feed(Series(), paths))
                    record.add(f"{figure}_series_ms", [took], floor=f"{figure}_engine_alone_ms")
                    parts = np.array_split(hu, -(-len(hu) // session.max_batch))
                    took = once_ms(lambda s=session, parts=parts: [s.run(each) for each in parts])
                    record.add(f"{figure}_engine_alone_ms", [slices / len(hu) * took])
            for session in sessions.values():
                session.close()
    return record


def _untrained(architecture: str, grid: int, folder: Path, record: Record) -> Bundle:
    """A bundle of the network at its paper's widths, and what it costs."""
    torch.manual_seed(0)
    recipe = recipe_of(architecture, 1, grid)
    graph = build(recipe).eval()
    with torch.no_grad():  # biases that are all alike would be one tensor in the graph, and none of a convolution's own
        for values in graph.network.state_dict().values():
            if values.is_floating_point():
                values.add_(0.01 * torch.rand_like(values))
    bundles.write(recipe, graph, heads.golden_slices(recipe.input.view)[:2], folder, point=OperatingPoint(0.5))
    record.about["parameters"] = catalogue.parameters(graph.network)
    shape = (1, recipe.settings["in_channels"], grid, grid)
    record.about["gflops"][str(grid)] = round(catalogue.gflops(graph.network, shape), 1)
    return open_bundle(folder)


def _in_8_bits(bundle: Bundle, views: NDArray[np.int16]) -> bytes:
    """The graph with every layer in 8 bits that may be, its ranges those of a few views."""
    model = load(bundle.graph("fp32"))
    seen = observe(model, placement.tensors(model), views)
    ranges = placement.spans(model, seen, "minmax", placement.STEPS["int8-cpu"])
    return placement.for_onnxruntime(model, ranges, placement.layers(model)).SerializeToString()


def _view(path: Path, shown: int) -> NDArray[np.int16]:
    """A slice's HU, ``(1, shown, H, W)``, as its own neighbours."""
    image = dcmread(path)
    hu = np.rint(image.pixel_array * float(image.RescaleSlope) + float(image.RescaleIntercept)).astype(np.int16)
    return np.repeat(hu[None, None], shown, axis=1)
