"""The same case through what one would build instead, with the same weights: files on the disk to labels.

PyTorch as it is and compiled, ONNX Runtime by hand, and MONAI's sliding window; each reads the same DICOM files with
pydicom, slice after slice, as a script does when a series is complete. scanside's own analysis beside them, to labels
and to results on the disk.

A pipeline that stores first and then processes adds its quiet period: how long no slice may have come before it takes a
series for complete. Those are their projects' defaults, named and not measured; what is measured is the processing, by
ONNX Runtime by hand, which is the fastest of those a script would use.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import torch
from monai.inferers import SlidingWindowInferer
from onnx import numpy_helper
from pydicom import dcmread
from torch import nn

from benchmarks import cases, floors
from benchmarks.record import Record, measuring
from benchmarks.timing import once_ms
from calibration.weights import load
from dicom_node.analysis.series import Series
from models.graph import HeadCT
from models.res_unet import ResUNet, ResUNetConfig
from runtime.bundle import open_bundle
from runtime.errors import ScansideError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from runtime.bundle import Bundle

INT8 = "int8-cpu"
# seconds without another slice before a series is taken for complete, by default
QUIET_S = {
    "mercure": 60.0,  # series_complete_trigger
    "Orthanc": 60.0,  # StableAge
    "MONAI Deploy Informatics Gateway": 5.0,  # the timeout of a DICOM association's payload
}
LARGEST_DIFFERENCE = 1e-3  # of the pixels: more are not the same weights


class PeerMismatch(ScansideError):
    """A peer that does not compute what the bundle computes."""


def measure(*, slices: int = 40, rounds: int = 5, bundle: Path | None = None, compiled: bool = True) -> Record:
    """Every way in turn, round by round.

    Raises
    ------
    PeerMismatch : a way's labels are not the bundle's

    """
    opened = open_bundle(bundle)
    ways = _ways(opened, compiled=compiled)
    asked = {"slices": slices, "rounds": rounds}
    with measuring("peers", **asked) as record, tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        record.about |= {"model": f"{opened.name} {opened.version}", "quiet_s": QUIET_S, "pixels_that_differ": {}}
        paths = cases.head(slices, folder / "head").write(folder / "series", 1)
        engines = {"scanside": stack.enter_context(floors.rehearsed(bundle))}
        if INT8 in opened.manifest.rulings and opened.manifest.rulings[INT8].passed:
            engines["scanside_int8"] = stack.enter_context(floors.rehearsed(bundle, INT8))
        reference = np.stack([one.labels for one in _labels(engines["scanside"], paths).values()])
        for way, answer in ways.items():  # this warms up, too
            differing = float((np.stack(_analysed(answer, paths)) != reference).mean())
            if differing > LARGEST_DIFFERENCE:
                raise PeerMismatch(f"{way}: {differing:.2%} of the pixels have another label: not the same weights")
            record.about["pixels_that_differ"][way] = round(differing, 6)
        for number in range(rounds):
            for way, answer in ways.items():
                record.add(f"{way}_series_ms", [once_ms(lambda answer=answer: _analysed(answer, paths))])
            for engine, one in engines.items():
                record.add(f"{engine}_labels_ms", [once_ms(lambda one=one: _labels(one, paths))])
                made = folder / f"{engine}-{number}"
                record.add(f"{engine}_results_ms", [once_ms(lambda one=one, made=made: _whole(one, paths, made))])
        for pipeline, quiet_s in QUIET_S.items():
            words = pipeline.replace(" ", "_").lower()
            processing = record.samples["onnxruntime_by_hand_series_ms"]
            record.add(f"{words}_last_slice_to_labels_ms", [1e3 * quiet_s + ms for ms in processing])
    return record


def same_weights(bundle: Bundle) -> HeadCT:
    """The network that ships in PyTorch, batch norm folded as in its graph.

    Convolutions come in the graph in the order in which PyTorch calls them.

    Raises
    ------
    PeerMismatch : the bundle holds another network

    """
    graph = load(bundle.graph("fp32")).graph
    values = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    view = bundle.view
    contract = bundle.manifest.input
    widths = tuple(dict.fromkeys(values[node.input[1]].shape[0] for node in convolutions[:-1]))
    network = ResUNet(ResUNetConfig(len(contract["windows_hu"]) * view.shown, len(bundle.classes), widths)).eval()
    with torch.no_grad():
        called = _order(network)
        if len(called) != len(convolutions):
            raise PeerMismatch(f"{bundle.name}: {len(convolutions)} convolutions, a res_unet has {len(called)}")
        for (parent, name, module), node in zip(called, convolutions, strict=True):
            weight, bias = (torch.from_numpy(values[each].copy()) for each in node.input[1:3])
            if module.weight.shape != weight.shape:
                raise PeerMismatch(f"{bundle.name}: its convolutions are not a res_unet's")
            folded = nn.Conv2d(
                module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding
            )
            folded.weight.copy_(weight)
            folded.bias.copy_(bias)
            setattr(parent, name, folded)
        for module in list(network.modules()):
            if isinstance(module, nn.Sequential) and len(module) == 2 and isinstance(module[1], nn.BatchNorm2d):
                module[1] = nn.Identity()
    windows = tuple(map(tuple, contract["windows_hu"]))
    return HeadCT(network, windows, contract["grid"], view.shown, view.answered)


def _order(network: nn.Module) -> list[tuple[nn.Module, str, nn.Conv2d]]:
    """Convolutions with their parents and names, in the order in which they are called."""
    places = {child: (parent, name) for parent in network.modules() for name, child in parent.named_children()}
    called: list[nn.Conv2d] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, _: called.append(module))
        for module in network.modules()
        if isinstance(module, nn.Conv2d)
    ]
    network(torch.zeros(1, network.config.in_channels, 64, 64))
    for hook in hooks:
        hook.remove()
    return [(*places[module], module) for module in called]


def _ways(bundle: Bundle, *, compiled: bool) -> dict[str, Callable[[NDArray[np.int16]], NDArray[np.uint8]]]:
    """HU of a slice to its labels, by the name of what does it."""
    graph = same_weights(bundle).eval()
    engine = onnxruntime.InferenceSession(bundle.graph("fp32"), providers=["CPUExecutionProvider"])
    grid = bundle.manifest.input["grid"]
    window = SlidingWindowInferer((grid, grid), sw_batch_size=4, overlap=0.25)

    def sliding(hu: torch.Tensor) -> torch.Tensor:
        return graph.answer(window(graph.prepare(hu), graph.network), hu)[0]

    def by_torch(work: Callable[[torch.Tensor], Any]) -> Callable[[NDArray[np.int16]], NDArray[np.uint8]]:
        def answer(hu: NDArray[np.int16]) -> NDArray[np.uint8]:
            with torch.inference_mode():
                labels = work(torch.from_numpy(hu[None, None].astype(np.int32)))
            return (labels if isinstance(labels, torch.Tensor) else labels[0])[0].numpy()

        return answer

    def by_hand(hu: NDArray[np.int16]) -> NDArray[np.uint8]:
        return engine.run(["labels"], {"hu": hu[None, None].astype(np.int32)})[0][0]

    ways = {"pytorch_eager": by_torch(graph), "monai_sliding_window": by_torch(sliding)}
    if compiled:
        ways["torch_compile"] = by_torch(torch.compile(graph))
    return ways | {"onnxruntime_by_hand": by_hand}


def _analysed(
    answer: Callable[[NDArray[np.int16]], NDArray[np.uint8]], paths: Sequence[Path]
) -> list[NDArray[np.uint8]]:
    """A script's way through a folder."""
    labels = []
    for path in paths:
        image = dcmread(path)
        hu = image.pixel_array * float(image.RescaleSlope) + float(image.RescaleIntercept)
        labels.append(answer(np.rint(hu).astype(np.int16)))
    return labels


def _labels(own: floors.Analyser, paths: Sequence[Path]) -> dict[str, Any]:
    series = Series()
    own.feed(series, paths)
    return series.labels


def _whole(own: floors.Analyser, paths: Sequence[Path], folder: Path) -> None:
    series = Series()
    own.feed(series, paths)
    own.close(series, folder, revision=1, missing=())
