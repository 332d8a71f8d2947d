"""What flows through a graph on samples: how far each tensor reaches, and how often it does.

`onnxruntime.quantization` collects the same, but keeps every tensor of every sample until the end (gigabytes at
512 x 512) and knows no ranges of least squared error; so these histograms grow by themselves in one pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, shape_inference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import NDArray

BINS = 2048
SIGNED, UNSIGNED = 127, 255  # steps from zero to the largest value of a byte


def float_tensors(model: onnx.ModelProto) -> list[str]:
    """Names of all that nodes compute in floating point, in the order of the graph; constants are not computed."""
    inferred = shape_inference.infer_shapes(model, strict_mode=True)
    known = [*inferred.graph.value_info, *inferred.graph.output]
    kinds = {value.name: value.type.tensor_type.elem_type for value in known}
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16)
    return [
        name
        for node in model.graph.node
        if node.op_type not in ("Constant", "DequantizeLinear")
        for name in node.output
        if kinds.get(name) in floats
    ]


class Probe:
    """A graph on the processor, any tensor of which can be read.

    Parameters
    ----------
    model : with its weights (`calibration.weights.load`)
    tensors : names of those to read

    """

    def __init__(self, model: onnx.ModelProto, tensors: Iterable[str]) -> None:
        self.tensors = list(tensors)
        opened = onnx.ModelProto()
        opened.CopyFrom(model)
        already = {output.name for output in opened.graph.output}
        opened.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in self.tensors if n not in already)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # nothing may be fused: a tensor between a convolution and its activation would be gone
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = onnxruntime.InferenceSession(
            opened.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def read(self, view: NDArray[np.int16]) -> dict[str, NDArray[np.float32]]:
        """Values of the tensors on one view, ``(shown, H, W)`` HU."""
        values = self._session.run(self.tensors, {"hu": view[None].astype(np.int32)})
        return dict(zip(self.tensors, values, strict=True))


class Histogram:
    """How often a tensor's magnitude falls into each of 2,048 bins of equal width, and its smallest and largest value.

    The width doubles when a value lies beyond the last bin, so one pass over the samples is enough.

    Attributes
    ----------
    counts : ``(2048,)`` int64
    width : of a bin
    low, high : smallest and largest value; not finite where the tensor was not

    """

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(BINS, np.int64)
        self.width = 0.0
        self.low, self.high = np.inf, -np.inf

    @property
    def peak(self) -> float:
        """Largest magnitude; infinite where a value was not finite, so that no limit lets it pass."""
        peak = max(-self.low, self.high)
        return float(peak) if np.isfinite(peak) else float("inf")

    def add(self, values: NDArray[np.float32]) -> None:
        low, high = float(values.min(initial=np.inf)), float(values.max(initial=-np.inf))
        self.low, self.high = float(np.minimum(self.low, low)), float(np.maximum(self.high, high))  # NaN stays NaN
        top = max(-low, high)
        if not np.isfinite(top) or top == 0:
            self.counts[0] += values.size if top == 0 else 0
            return
        if self.width == 0:
            self.width = 2.0 ** np.ceil(np.log2(top)) / BINS
        while top > self.width * BINS:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(BINS // 2, np.int64)])
            self.width *= 2
        places = np.minimum(np.abs(values).ravel() * np.float32(1 / self.width), BINS - 1).astype(np.int32)
        self.counts += np.bincount(places, minlength=BINS)

    def reach(self, method: str, steps: int = SIGNED) -> float:
        """Magnitude up to which the tensor is quantised; beyond it values are clipped.

        Parameters
        ----------
        method : one of `METHODS`
        steps : `SIGNED` or `UNSIGNED`

        """
        if self.peak == 0 or not np.isfinite(self.peak):
            return self.peak
        return min(self.peak, METHODS[method](self.counts, steps) * self.width)

    def span(self, method: str, steps: int = SIGNED) -> tuple[float, float]:
        """(lowest, highest) value that is quantised, zero always among them."""
        reach = self.reach(method, steps)
        return max(min(self.low, 0.0), -reach), min(max(self.high, 0.0), reach)


def observe(
    model: onnx.ModelProto,
    tensors: Iterable[str],
    views: Iterable[NDArray[np.int16]],
    on_view: Callable[[int], None] = lambda _: None,
) -> dict[str, Histogram]:
    """Histograms of tensors over views ``(shown, H, W)`` HU."""
    probe = Probe(model, tensors)
    seen = {name: Histogram() for name in probe.tensors}
    for view in views:
        for name, values in probe.read(view).items():
            seen[name].add(values)
        on_view(1)
    return seen


def _largest(counts: NDArray[np.int64], _: int = 0) -> float:
    return float(np.flatnonzero(counts)[-1] + 1)


def _percentile(counts: NDArray[np.int64], _: int = 0) -> float:
    """Covers 99.99 % of the magnitudes."""
    share = np.cumsum(counts) / counts.sum()
    return float(np.searchsorted(share, 0.9999) + 1)


def _least_squares(counts: NDArray[np.int64], steps: int) -> float:
    """Least mean squared error, of rounding within the range and of clipping beyond it."""
    centre, weight = np.arange(BINS) + 0.5, counts.astype(np.float64)
    errors = {}
    for reach in _candidates(counts, steps + 1):
        step = reach / steps
        rounded = np.minimum(np.round(centre / step), steps) * step
        errors[reach] = float((weight * (rounded - centre) ** 2).sum())
    return min(errors, key=errors.__getitem__)


def _entropy(counts: NDArray[np.int64], steps: int) -> float:
    """Least divergence of the clipped distribution from its quantised one.

    Migacz, "8-bit Inference with TensorRT", GTC 2017. The bin of zero is left out, as there: what rectifiers cut off
    would otherwise be all that counts.
    """
    weight = counts.astype(np.float64)
    weight[0] = 0
    if not weight.any():
        return _largest(counts)
    divergence = {}
    levels = steps + 1
    for reach in _candidates(counts, levels):
        clipped = weight[:reach].copy()
        kept = clipped > 0
        clipped[-1] += weight[reach:].sum()
        level = np.arange(reach) * levels // reach
        filled = np.bincount(level, weights=kept, minlength=levels)
        mean = np.bincount(level, weights=weight[:reach], minlength=levels) / np.maximum(filled, 1)
        quantised = np.where(kept, mean[level], 0)
        if not kept.any() or clipped[kept].sum() < clipped.sum():
            continue  # what was clipped falls where nothing was: infinitely far
        p, q = clipped[kept] / clipped.sum(), quantised[kept] / quantised.sum()
        divergence[reach] = float((p * np.log(p / q)).sum())
    return min(divergence, key=divergence.__getitem__) if divergence else _largest(counts)


def _candidates(counts: NDArray[np.int64], levels: int) -> Iterator[int]:
    last = int(_largest(counts))
    yield from range(min(levels, last), last, 16)
    yield last


METHODS: dict[str, Callable[[NDArray[np.int64], int], float]] = {
    "minmax": _largest,
    "percentile": _percentile,
    "mse": _least_squares,
    "entropy": _entropy,
}
