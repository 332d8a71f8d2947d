"""Every network of two dimensions in every precision, at widths small enough for a test."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from calibration import lint, placement
from calibration.activations import float_tensors, observe
from calibration.emulation import rounded_everywhere
from calibration.graph import Graph
from calibration.half import to_half
from calibration.verify import logits
from calibration.weights import rounded
from export.graph import to_onnx
from models import catalogue
from models.graph import HeadCT
from tests.models import reduced

WINDOWS = ((0.0, 90.0), (-60.0, 140.0), (-200.0, 1000.0))
GRID, CLASSES = 64, 4
CONVOLVES = ("Conv", "FusedConv")


@lru_cache(maxsize=1)
def made(name: str) -> tuple[onnx.ModelProto, np.ndarray]:
    """The graph of a network with random weights and statistics, and views."""
    torch.manual_seed(3)
    settings = reduced.SETTINGS[name]
    network = catalogue.build(name, in_channels=len(WINDOWS), classes=CLASSES, **settings)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    rng = np.random.default_rng(4)
    hu = np.kron(rng.normal(40, 80, (3, 1, 16, 16)), np.ones((6, 6))).astype(np.int16)
    return rounded(to_onnx(HeadCT(network, WINDOWS, GRID).eval())), hu


def answers(model: onnx.ModelProto, hu: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return tuple(session.run(["labels", "evidence"], {"hu": hu.astype(np.int32)}))


@pytest.fixture(params=sorted(reduced.SETTINGS))
def network(request: pytest.FixtureRequest) -> tuple[onnx.ModelProto, np.ndarray]:
    return made(request.param)


def test_every_engine_takes_the_graph(network):
    model, _ = network
    assert lint.check(model) == []
    assert logits(model)
    assert Graph.of(model).body


def test_half_precision_is_typed_and_answers_alike(network):
    model, hu = network
    seen = observe(model, float_tensors(model), hu)
    half, full = to_half(model, {name: one.peak for name, one in seen.items()})
    assert lint.check(half) == []
    assert all(reason for reason in full.values())
    kinds = Counter(one.data_type for one in half.graph.initializer)
    assert kinds[onnx.TensorProto.FLOAT16] >= len(Graph.of(model).convolutions())
    (labels, evidence), (others, theirs) = answers(model, hu), answers(rounded_everywhere(half), hu)
    assert (labels != others).mean() < 0.02
    assert 0 < np.abs(evidence - theirs).max() < 0.02


@pytest.mark.parametrize("precision", placement.PLACEMENTS)
def test_eight_bits_are_placed_and_answer_nearly_alike(network, precision: str, tmp_path: Path):
    model, hu = network
    layers = placement.layers(model)
    assert layers
    span = placement.spans(model, observe(model, placement.tensors(model), hu), "minmax")
    quantised = placement.PLACEMENTS[precision](model, span, layers)
    evidence, theirs = answers(model, hu)[1], answers(quantised, hu)[1]
    assert np.abs(evidence - theirs).max() < 0.25, "random weights: the mechanism, not the accuracy"
    if precision == "int8":
        assert lint.check(quantised) == []
        return
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(quantised.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    left = sum(node.op_type == "Conv" for node in model.graph.node) - len(layers)
    assert kinds["QLinearConv"] == len(layers)
    assert sum(kinds[kind] for kind in CONVOLVES) == left
