"""Every precision of a bundle beside FP32 on series that no calibration saw."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime

from calibration.activations import Probe
from calibration.emulation import rounded_everywhere
from calibration.samples import SampleError, check_distinct
from calibration.weights import load
from runtime import seal
from runtime.errors import BundleError, DeviceLost, InferenceError, NoPlan, ScansideError, SelfTestFailed
from runtime.manifest import PROCESSOR
from runtime.ort import OrtSession
from runtime.report import compose
from runtime.session import open_session, self_test
from runtime.verdict import Verdict, compare, judge

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    import onnx
    from numpy.typing import NDArray

    from calibration.samples import Series
    from runtime.bundle import Bundle
    from runtime.session import Session
    from runtime.triage import Rule
    from runtime.types import Report, SliceLabels
    from runtime.verdict import Difference

VIEWS_OF_SERIES = 3  # whose logits are compared: the graph is run without any fusion for that


def check_held_out(series: Sequence[Series], bundle: Bundle) -> None:
    """Refuse series that calibration has seen, or others of their studies; and one that is there twice.

    What it can't see: another study of the same patient, and what the network was trained on.

    Raises
    ------
    SampleError

    """
    check_distinct(series)
    path = bundle.folder / "calibration.json"
    if path.name not in bundle.manifest.files:
        return
    seen = {one[key] for one in json.loads(path.read_text())["series"] for key in ("sha256", "study")}
    for one in series:
        if {one.sha256, one.study} & seen:
            raise SampleError(f"{one.name}: the bundle was calibrated on it: verify on series that it has not seen")


def record(
    bundle: Bundle, verdicts: Mapping[str, Verdict], series: Sequence[Series], rules: Sequence[Rule] = ()
) -> None:
    """Write the rulings into the bundle's manifest, and the figures behind them into ``verdicts.json``."""
    engine = f"onnxruntime {onnxruntime.__version__} CPUExecutionProvider"
    rulings = {
        name: {"passed": one.passed, "engine": engine, "sha256": bundle.sha256(name), "reasons": one.reasons}
        for name, one in verdicts.items()
        if name != "fp32"
    }
    told = {
        "engine": engine,
        "series": [{"name": one.name, "sha256": one.sha256, "scanner": one.scanner} for one in series],
        "triage": [asdict(rule) for rule in rules],
        "verdicts": {name: asdict(one) for name, one in verdicts.items()},
    }
    seal.add(bundle.folder, {"verdicts.json": json.dumps(told, indent=2) + "\n"}, rulings=rulings)


def verify(
    bundle: Bundle,
    series: Iterable[Series],
    rules: Sequence[Rule],
    on_series: Callable[[int], None] = lambda _: None,
    *,
    on_gpu: Sequence[str] = (),
    plans: Path | None = None,
) -> dict[str, Verdict]:
    """Judge every precision of the bundle on ONNX Runtime's CPU provider, or those of TensorRT on the GPU at hand.

    Parameters
    ----------
    series : held out: neither trained nor calibrated on
    rules : of triage; no decision may flip by them
    on_gpu : precisions whose plans are tried in place of the graphs, FP32's own too (`runtime.gpu.to_judge`)
    plans : folder of TensorRT's plans; default: the user's cache

    Returns
    -------
    by precision; on the processor FP32's says whether it answers its golden slices as PyTorch did

    Raises
    ------
    BackendError, DeviceLost, NoPlan : on a GPU, what is the machine's fault and no verdict on the plans' answers

    """
    full = open_session(bundle, "onnxruntime")
    trials: dict[str, _Trial] = {}
    try:
        for name in on_gpu:
            session = open_session(bundle, "tensorrt", precision=name, plans=plans, on_trial=True)
            trials[name] = _Trial(bundle, lambda session=session: (session, None))  # whose logits stay on the GPU
        for name in () if on_gpu else bundle.manifest.precisions:
            if name != "fp32":
                trials[name] = _Trial(bundle, partial(_on_processor, bundle, name))
        reference = _Logits(load(bundle.graph("fp32")))
        for one in series:
            labels = one.answered(full, bundle.view)
            expected = labels, compose(one.stack, labels, bundle, full.identity, rules)
            views = one.views(bundle.view)
            some = [views[i] for i in np.linspace(0, len(views) - 1, VIEWS_OF_SERIES + 2).astype(int)[1:-1]]
            logits = [reference.read(view) for view in some]
            for trial in trials.values():
                trial.run(one, expected, list(zip(some, logits, strict=True)), rules)
            on_series(1)
        verdicts = {name: trial.verdict() for name, trial in trials.items()}
    finally:
        for trial in trials.values():
            trial.close()
    return verdicts if on_gpu else {"fp32": _golden(full, bundle)} | verdicts


def _golden(session: Session, bundle: Bundle) -> Verdict:
    try:
        worst = self_test(session, bundle)
    except SelfTestFailed as error:
        return Verdict(passed=False, reasons=(str(error),), figures={})
    return Verdict(passed=True, reasons=(), figures={"golden_slices_worst_disagreement": worst})


class _Trial:
    """A precision that is being tried; the first thing that breaks ends it."""

    def __init__(self, bundle: Bundle, opened: Callable[[], tuple[Session, _Logits | None]]) -> None:
        self._bundle = bundle
        self._differences: list[Difference] = []
        self._sums: list[tuple[float, float]] = []
        self._broken: str | None = None
        self._session: Session | None = None
        try:
            self._session, self._logits = opened()
        except ScansideError as error:
            self._broken = str(error)

    def run(
        self,
        series: Series,
        expected: tuple[Mapping[str, SliceLabels], Report],
        logits: Sequence[tuple[NDArray[np.int16], NDArray[np.float32]]],
        rules: Sequence[Rule],
    ) -> None:
        if self._broken:
            return
        bundle = self._bundle
        try:
            labels = series.answered(self._session, bundle.view)
        except InferenceError as error:
            if isinstance(error, (DeviceLost, NoPlan)):
                raise
            self._broken = f"{series.name}: {error}"
            return
        answer = labels, compose(series.stack, labels, bundle, self._session.identity, rules)
        self._differences.append(compare(series.name, series.stack, expected, answer, len(bundle.classes), rules))
        for view, one in logits if self._logits else ():
            far = np.abs(_margins(self._logits.read(view)) - _margins(one))
            self._sums.append((float(far.mean()), float(far.max())))

    def close(self) -> None:
        if self._session:
            self._session.close()

    def verdict(self) -> Verdict:
        if self._broken:
            return Verdict(passed=False, reasons=(self._broken,), figures={})
        if not self._differences:
            raise SampleError("no series to verify on: give some that can be analysed")
        logits = None
        if self._sums:
            mean, largest = (np.array(one) for one in zip(*self._sums, strict=True))
            logits = float(mean.mean()), float(largest.max())  # NaN stays NaN, and fails
        return judge(self._differences, self._bundle.budget, self._bundle.classes, logits)


def _on_processor(bundle: Bundle, precision: str) -> tuple[Session, _Logits]:
    """A precision on the processor, rounded as its own engine would round."""
    graph = load(bundle.graph(precision))
    if precision in PROCESSOR:
        return open_session(bundle, "onnxruntime", precision=precision, on_trial=True), _Logits(graph)
    graph = rounded_everywhere(graph)
    return OrtSession(bundle, precision, graph=graph.SerializeToString()), _Logits(graph)


def _margins(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """By how much each class beats the background: of one logit and of seven the same measure."""
    return logits[:, 1:] - logits[:, :1]


class _Logits:
    """What goes into the softmax behind a network, which a bundle's graph keeps to itself."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._name = logits(model)
        self._probe = Probe(model, [self._name])

    def read(self, view: NDArray[np.int16]) -> NDArray[np.float32]:
        return self._probe.read(view)[self._name]


def logits(model: onnx.ModelProto) -> str:
    """Name of the tensor that the softmax of the evidence is taken of."""
    maker = {name: node for node in model.graph.node for name in node.output}
    node = maker.get("evidence")
    if node is None:
        raise BundleError("the graph answers no evidence: export the bundle again")
    while node.op_type in ("ReduceMax", "Div", "Exp"):
        node = maker[node.input[0]]
    return node.input[0]  # of a Softmax, or of the Sub that begins one in parts
