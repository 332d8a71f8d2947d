"""A bundle and samples to its precisions: FP16 by measured ranges, INT8 for TensorRT and for the processor."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from calibration import lint, placement, samples, sensitivity, weights
from calibration.activations import METHODS, float_tensors, observe
from calibration.graph import Graph
from calibration.half import to_half
from calibration.samples import SampleError
from calibration.weights import load, store
from runtime import seal
from runtime.manifest import FILES, Limits
from runtime.session import open_session
from runtime.verdict import Budget

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import onnx

    from calibration.activations import Histogram
    from calibration.samples import Sample, Series
    from runtime.bundle import Bundle

LEAST_STUDIES = 3


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What calibration made, and the record of how.

    Attributes
    ----------
    graphs : by precision; FP32 is among them as it was
    report : for ``calibration.json``: samples with their hashes, ranges, methods, layers left out and why

    """

    graphs: Mapping[str, onnx.ModelProto]
    report: Mapping[str, Any]


def calibrate(
    bundle: Bundle,
    series: Sequence[Series],
    *,
    count: int = 64,
    budget: Budget,
    on_stage: Callable[[str, int], Callable[[int], None]],
) -> Calibrated:
    """Measure ranges on two thirds of the studies, and choose method and layers on the others.

    Parameters
    ----------
    count : slices to measure on; half as many to choose on
    on_stage : called with a stage's name and its steps; what it returns is called as they are done

    Raises
    ------
    SampleError : fewer than three studies, or too little blood that FP32 sees

    """
    samples.check_distinct(series)
    studies = sorted({one.study for one in series})
    if len(studies) < LEAST_STUDIES:
        raise SampleError(
            f"series of {len(studies)} studies: at least {LEAST_STUDIES} are needed, one of them to choose on"
        )
    ordered = sorted(series, key=lambda one: one.sha256)
    choosing = [one for one in ordered if one.study in studies[::3]]
    measuring = [one for one in ordered if one.study not in studies[::3]]
    model = load(bundle.graph("fp32"))
    session = open_session(bundle, "onnxruntime")
    advance = on_stage("looking for slices that stand for all", len(ordered))
    measured = samples.choose(measuring, session, bundle.view, bundle.classes, count, advance)
    chosen = samples.choose(choosing, session, bundle.view, bundle.classes, max(1, count // 2), advance)
    inner = {
        name for at in Graph.of(model).body for node in [model.graph.node[at]] for name in (*node.input, *node.output)
    }
    wanted = dict.fromkeys([name for name in float_tensors(model) if name in inner] + placement.tensors(model))
    seen = observe(model, wanted, (one.hu for one in measured), on_stage("measuring ranges", len(measured)))
    scorer = sensitivity.Scorer(model, [one.hu for one in chosen], bundle.classes)
    if not scorer.told:
        raise SampleError(
            f"FP32 shows less than {scorer.LEAST_PIXELS} pixels of every class in the {len(chosen)} slices to choose "
            "on: give more samples that bleed, or ask for more --slices"
        )
    peak = {name: one.peak for name, one in seen.items()}
    half, full = to_half(model, peak)
    graphs = {"fp32": model, "fp16": half}
    told: dict[str, Any] = {"fp16": {"kept_fp32": full}}
    for precision, place in placement.PLACEMENTS.items():
        found, how, span = _quantise(model, place, seen, scorer, budget, on_stage, precision)
        told[precision] = how
        if found.inside:
            kept = [layer for layer in found.alone if layer not in found.left_out]
            graphs[precision] = place(model, span, kept)
            if precision == "int8":  # what TensorRT does not compute on bytes, it computes in FP16
                graphs[precision], told[precision]["kept_fp32"] = to_half(graphs[precision], peak)
    wrong = [text for name, graph in graphs.items() if name != "int8-cpu" for text in lint.check(graph)]
    if wrong:
        raise SampleError(f"{bundle.folder}: TensorRT would refuse what came of it: {'; '.join(wrong)}")
    report = {
        "samples": {"measured": _told(measured), "chosen": _told(chosen)},
        "series": [
            {"name": one.name, "sha256": one.sha256, "study": one.study, "scanner": one.scanner} for one in ordered
        ],
        "ranges": {name: {"low": one.low, "high": one.high} for name, one in seen.items()},
        "precisions": told,
    }
    return Calibrated(graphs, report)


def _told(chosen: Sequence[Sample]) -> list[dict[str, object]]:
    return [one.told() for one in chosen]


def _quantise(
    model: onnx.ModelProto,
    place: sensitivity.Place,
    seen: Mapping[str, Histogram],
    scorer: sensitivity.Scorer,
    budget: Budget,
    on_stage: Callable[[str, int], Callable[[int], None]],
    precision: str,
) -> tuple[sensitivity.Search, dict[str, Any], Mapping[str, tuple[float, float]]]:
    """The best way to choose ranges, with every layer quantised; then the search over layers."""
    layers = placement.layers(model)
    if not layers:
        raise SampleError("the network has no convolution that could be quantised: no kernel of it is a constant")
    advance = on_stage(f"{precision}: ranges by {', '.join(METHODS)}", len(METHODS))
    spans, loss = {}, {}
    for method in METHODS:
        spans[method] = placement.spans(model, seen, method, placement.STEPS[precision])
        loss[method] = scorer.compare(place(model, spans[method], layers)).loss
        advance(1)
    method = min(loss, key=loss.__getitem__)
    advance = on_stage(f"{precision}: layer by layer", len(layers) + 1)
    found = sensitivity.search(model, place, spans[method], layers, scorer, budget, advance)
    last = found.path[-1]  # where it is outside of the budget, the precision is not made
    how = {
        "method": method,
        "loss_by_method": loss,
        "layers": len(layers),
        "order": layers,
        "limit": sensitivity.SHARE * (1 - budget.dice),
        "left_out": list(found.left_out),
        "loss_alone": dict(found.alone),
        "loss_by_layers_left_out": [one.loss for one in found.path],
        "inside_budget": found.inside,
        "dice_against_fp32": dict(last.dice),
        "area_change_percent": dict(last.area_percent),
    }
    return found, how, spans[method]


def parse_budget(limits: Sequence[str], budget: Budget) -> Budget:
    """``["dice=0.99"]`` over what the bundle's budget was.

    Raises
    ------
    SampleError : no such limit, or no number

    """
    changed: dict[str, float] = {}
    for text in limits:
        name, _, number = text.partition("=")
        known = [field.name for field in fields(budget)]
        if name not in known:
            raise SampleError(f"--budget {text}: there is {', '.join(known)}")
        try:
            changed[name] = float(number)
        except ValueError:
            raise SampleError(f"--budget {text}: write {name}=NUMBER") from None
    try:
        return Budget(**Limits.model_validate(asdict(budget) | changed).model_dump())
    except ValidationError as error:
        wrong = "; ".join(f"{one['loc'][0]}: {one['msg']}" for one in error.errors())
        raise SampleError(f"--budget: {wrong}") from None


def write(bundle: Bundle, made: Calibrated, budget: Budget) -> None:
    """Put the graphs and the record of how they came about into the bundle; what was ruled before holds no longer."""

    def files(folder: Path) -> None:
        store({FILES[name]: graph for name, graph in made.graphs.items()}, folder)
        (folder / "calibration.json").write_text(json.dumps(made.report, indent=2) + "\n")
        for name in {"verdicts.json", *(FILES[name] for name in FILES.keys() - made.graphs.keys())}:
            (folder / name).unlink(missing_ok=True)

    seal.change(
        bundle.folder,
        files,
        precisions={name: FILES[name] for name in made.graphs},
        weights=weights.FILE,
        budget=asdict(budget),
        rulings={},
    )
