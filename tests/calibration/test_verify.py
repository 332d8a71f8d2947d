"""Nothing serves that has not passed, and faults do not pass."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from calibration import placement
from calibration.calibrate import calibrate, parse_budget, write
from calibration.samples import SampleError
from calibration.verify import check_held_out, logits, record, verify
from calibration.weights import load, store
from runtime import seal
from runtime.bundle import SHIPPED, Bundle, open_bundle
from runtime.errors import BackendError, BundleError, NotVerified
from runtime.manifest import FILES
from runtime.session import open_session, self_test
from runtime.triage import Rule
from runtime.verdict import Budget
from tests.calibration.made import heads

RULES = (Rule("critical", ("any",), 12.0), Rule("urgent", ("any",), 0.0))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """The one that ships, without rulings."""
    folder = shutil.copytree(SHIPPED, tmp_path / "bundle")
    seal.add(folder, {}, rulings={})
    return open_bundle(folder)


def with_graphs(bundle: Bundle, **graphs: onnx.ModelProto) -> Bundle:
    """The bundle with other graphs of its own precisions, and no others but FP32."""
    files = {name.replace("_", "-"): graph for name, graph in graphs.items()}
    kept = {"fp32": load(bundle.graph("fp32")), **files}

    def put(folder: Path) -> None:
        for name in FILES.values():
            (folder / name).unlink(missing_ok=True)
        store({FILES[name]: graph for name, graph in kept.items()}, folder)

    seal.change(bundle.folder, put, precisions={name: FILES[name] for name in kept})
    return open_bundle(bundle.folder)


def behind_logits(model: onnx.ModelProto, operator: str, *constants: np.ndarray, **attributes: int) -> None:
    """Put an operator between the logits and all that reads them."""
    name = logits(model)
    for node in model.graph.node:
        for place, source in enumerate(node.input):
            if source == name and node.op_type != "Shape":
                node.input[place] = "faulty"
    given = [f"faulty.{i}" for i in range(len(constants))]
    model.graph.initializer.extend(numpy_helper.from_array(c, n) for c, n in zip(constants, given, strict=True))
    made = helper.make_node(operator, [name, *given], ["faulty"], name="faulty", **attributes)
    at = next(i for i, node in enumerate(model.graph.node) if name in node.output)
    model.graph.node.insert(at + 1, made)


def wrong_scale(model: onnx.ModelProto) -> None:
    """One activation comes back from 8 bits twice as large as it went in."""
    back = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and "Relu" in node.input[0]][12]
    old, new = back.input[1], f"{back.input[1]}_wrong"
    value = next(numpy_helper.to_array(w) for w in model.graph.initializer if w.name == old)
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value * np.float32(2)), new))
    back.input[1] = new


def dropped_layer(model: onnx.ModelProto) -> None:
    """The decoder's last residual block passes on its shortcut alone."""
    block = [node for node in model.graph.node if node.op_type == "Add"][-1]
    made = {name: node for node in model.graph.node for name in node.output}
    block.input[0] = next(name for name in block.input if "side" in name or "side" in made[name].input[0])
    zero = "faulty.zero"
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0), zero))
    block.input[1] = zero


def swapped_classes(model: onnx.ModelProto) -> None:
    """Subdural and epidural change places."""
    behind_logits(model, "Gather", np.array([0, 1, 3, 2, 4, 5, 6]), axis=1)


def shifted_resize(model: onnx.ModelProto) -> None:
    """The way back to the slice's own size starts at a corner, not at a centre: half a coarse pixel."""
    resize = [node for node in model.graph.node if node.op_type == "Resize"][-1]
    (mode,) = (one for one in resize.attribute if one.name == "coordinate_transformation_mode")
    mode.s = b"asymmetric"


def nothing_at_all(model: onnx.ModelProto) -> None:
    """An engine that leaves its output as it was: zeros."""
    behind_logits(model, "Mul", np.float32(0))


def overflow(model: onnx.ModelProto) -> None:
    """Infinity less infinity."""
    behind_logits(model, "Mul", np.float32(np.nan))


FAULTS = (wrong_scale, dropped_layer, swapped_classes, shifted_resize, nothing_at_all, overflow)


CASES = [(fault, "int8-cpu") for fault in FAULTS] + [
    (overflow, "fp16"),
    pytest.param(swapped_classes, "fp16", marks=pytest.mark.slow),
    pytest.param(wrong_scale, "int8", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("fault", "precision"), CASES, ids=lambda one: getattr(one, "__name__", one))
def test_a_fault_is_caught_and_the_node_does_not_serve_it(bundle: Bundle, fault, precision: str):
    graph = load(bundle.graph(precision))
    fault(graph)
    onnx.checker.check_model(graph)
    faulty = with_graphs(bundle, **{precision.replace("-", "_"): graph})
    verdicts = verify(faulty, heads(), RULES)
    assert verdicts["fp32"].passed
    assert not verdicts[precision].passed
    print(f"\n{fault.__name__} in {precision}: {'; '.join(verdicts[precision].reasons[:3])}")
    record(faulty, verdicts, heads())
    with pytest.raises(NotVerified, match=f"{precision} failed: "):
        open_bundle(faulty.folder).check_ruling(precision)


def test_what_ships_passes_on_other_heads_and_is_served(bundle: Bundle):
    with pytest.raises(NotVerified, match="int8-cpu is not verified: run `scanside verify"):
        open_session(bundle, precision="int8-cpu")
    verdicts = verify(bundle, heads(), RULES)
    assert {name: one.reasons for name, one in verdicts.items()} == dict.fromkeys(FILES, ())
    assert 0 < verdicts["fp16"].figures["logit_mean_difference"] < 0.01, "0: FP16 was computed in FP32"
    record(bundle, verdicts, heads())
    passed = open_bundle(bundle.folder)
    session = open_session(passed, precision="int8-cpu")
    assert session.identity.precision == "int8-cpu"
    assert 0 < self_test(session, passed) < 1e-2
    assert open_bundle(bundle.folder).digest == bundle.digest, "a ruling changes no answer"


def test_a_ruling_is_about_these_very_bytes(bundle: Bundle):
    record(bundle, verify(bundle, heads(), RULES), heads())
    open_session(open_bundle(bundle.folder), precision="int8-cpu")
    graph = load(bundle.graph("int8-cpu"))
    graph.producer_name = "someone else"
    other = with_graphs(open_bundle(bundle.folder), int8_cpu=graph)
    assert "int8-cpu" in other.manifest.rulings
    with pytest.raises(NotVerified, match="is not verified"):
        open_session(other, precision="int8-cpu")


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_processor_does_not_pretend_to_compute_what_is_tensorrts(precision: str):
    with pytest.raises(BackendError, match=f"{precision} is not for onnxruntime: it takes fp32, int8-cpu"):
        open_session(open_bundle(), "onnxruntime", precision=precision)
    with pytest.raises(BundleError, match="no fp8 graph, only"):
        open_session(open_bundle(), precision="fp8")


def test_a_bundle_is_not_verified_on_what_it_was_calibrated_on(bundle: Bundle):
    report = {"series": [{"sha256": heads()[1].sha256, "study": heads()[1].study}]}
    seal.add(bundle.folder, {"calibration.json": json.dumps(report)})
    with pytest.raises(SampleError, match="phantom 2: the bundle was calibrated on it"):
        check_held_out(heads(), open_bundle(bundle.folder))
    check_held_out(heads()[:1], open_bundle(bundle.folder))
    other_kernel = replace(heads()[0], study=heads()[1].study)
    with pytest.raises(SampleError, match="phantom 1: the bundle was calibrated on it"):
        check_held_out([other_kernel], open_bundle(bundle.folder))
    with pytest.raises(SampleError, match="two series with the same pixels"):
        check_held_out([heads()[0]] * 2, open_bundle(bundle.folder))


def test_no_series_is_no_verdict(bundle: Bundle):
    with pytest.raises(SampleError, match="no series to verify on"):
        verify(bundle, [], RULES)


@pytest.mark.parametrize(
    ("series", "message"),
    [(heads()[:2], "series of 2 studies: at least 3"), ((*heads()[:2], heads()[0]), "two series with the same pixels")],
)
def test_too_little_to_calibrate_on_is_refused(bundle: Bundle, series, message: str):
    with pytest.raises(SampleError, match=message):
        calibrate(bundle, series, budget=Budget(), on_stage=lambda *_: lambda _: None)


def test_series_without_blood_are_no_samples(bundle: Bundle):
    from calibration.samples import Series

    air = [Series.of(str(i), np.full((6, 64, 64), i - 1000, np.int16), (1.0, 1.0), np.full(6, 5.0)) for i in range(3)]
    with pytest.raises(SampleError, match="FP32 shows less than 500 pixels of every class in the"):
        calibrate(bundle, air, budget=Budget(), on_stage=lambda *_: lambda _: None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dyce=1", "--budget dyce=1: there is dice, volume_percent"),
        ("dice", "write dice=NUMBER"),
        ("decisions=0.5", "decisions: Input should be a valid integer"),
        ("dice=98", "dice: Input should be less"),
        ("dice=nan", "dice: Input should be"),
    ],
)
def test_a_budget_that_is_none_is_refused(text: str, message: str):
    with pytest.raises(SampleError, match=message):
        parse_budget([text], Budget())


def test_calibration_puts_all_precisions_and_their_record_into_the_bundle(bundle: Bundle, monkeypatch):
    full = with_graphs(bundle)  # FP32 alone
    few = placement.layers(load(bundle.graph("fp32")))[:3]
    monkeypatch.setattr(placement, "layers", lambda _: few)
    stages = []

    def on_stage(what: str, _: int) -> Callable[[int], None]:
        stages.append(what)
        return lambda _: None

    budget = Budget(dice=0.5, volume_percent=50)
    made = calibrate(full, heads(), count=8, budget=budget, on_stage=on_stage)
    write(full, made, Budget(dice=0.5))
    after = open_bundle(bundle.folder)
    assert set(after.manifest.precisions) == set(FILES)
    assert after.budget.dice == 0.5
    told = json.loads((after.folder / "calibration.json").read_text())
    assert len(told["samples"]["measured"]) == 8
    assert {len(one["sha256"]) for one in told["samples"]["measured"]} == {64}
    assert {one["sha256"] for one in told["series"]} == {one.sha256 for one in heads()}
    assert told["precisions"]["int8"]["inside_budget"]
    assert "int8: layer by layer" in stages
    with pytest.raises(NotVerified):
        after.check_ruling("int8")
