"""A network between its pre- and post-processing, as one graph: any size and batch, and what PyTorch computes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from calibration import lint
from calibration.weights import rounded
from export.errors import ExportError
from export.graph import OPSET, to_onnx
from models import catalogue
from models.graph import HeadCT

WINDOWS = ((0.0, 90.0), (-60.0, 140.0), (-200.0, 1000.0))
GRID, CLASSES = 32, 3


@dataclass(frozen=True)
class Config:
    classes: int = CLASSES


class Pointwise(nn.Module):
    """The least network: a convolution with batch norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.config = Config()
        self.body = nn.Sequential(nn.Conv2d(channels, CLASSES, 1), nn.BatchNorm2d(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def graph(shown: int = 1, network: nn.Module | None = None) -> HeadCT:
    torch.manual_seed(0)
    network = network or Pointwise(len(WINDOWS) * shown)
    return HeadCT(network, WINDOWS, GRID, shown).eval()


def slices(count: int, shown: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(3).integers(-1024, 3071, (count, shown, height, width)).astype(np.int32)


def opened(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("shown", [1, 3])
def test_a_graph_takes_any_batch_and_any_size_of_slice(shown: int):
    made = graph(shown)
    model = to_onnx(made)
    assert [one.version for one in model.opset_import] == [OPSET]
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}, "folded into the convolution"
    session = opened(model)
    for count, height, width in ((1, 64, 64), (5, 33, 80), (2, 512, 512)):
        hu = slices(count, shown, height, width)
        labels, evidence = session.run(["labels", "evidence"], {"hu": hu})
        with torch.no_grad():
            theirs = [out.numpy() for out in made(torch.from_numpy(hu))]
        assert (labels.dtype, labels.shape) == (np.uint8, (count, height, width))
        assert (labels != theirs[0]).mean() < 1e-3
        assert np.abs(evidence - theirs[1]).max() < 1e-5


@pytest.mark.parametrize("windows", [WINDOWS, ((-1024.0, 3071.0), (0.1, 77.7), (-600.3, 2800.7))])
def test_what_the_network_is_fed_is_in_service_what_it_was_in_training(windows):
    """Windows bit for bit, the resize within two units of the last place: engines differ in the order of its sums."""
    made = HeadCT(Pointwise(3), windows, GRID).eval()
    model = rounded(to_onnx(made))  # as a bundle stores it
    convolution = next(node for node in model.graph.node if node.op_type == "Conv")
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(convolution.input[0]))
    session = opened(model)
    for side in (GRID, 2 * GRID, 75, 512):
        hu = slices(2, 1, side, side)
        fed = session.run([convolution.input[0]], {"hu": hu})[0]
        prepared = made.prepare(torch.from_numpy(hu)).numpy()
        assert fed.shape == prepared.shape == (2, len(WINDOWS), GRID, GRID)
        assert np.abs(fed - prepared).max() <= (0 if side == GRID else 2 * np.finfo(np.float32).eps)


class StillDropping(Pointwise):
    """Dropout that does not stop after training."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), training=True)


class StillCounting(Pointwise):
    """Batch norm by the statistics of the batch, whatever mode the module is in."""

    def forward(self, x: Tensor) -> Tensor:
        convolution, norm = self.body
        seen = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        return nn.functional.batch_norm(convolution(x), *seen, training=True)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # batch norm in training mode looks at the batch's size
@pytest.mark.parametrize("network", [StillDropping, StillCounting])
def test_what_only_training_does_is_found(network: type[Pointwise]):
    (found,) = lint.check(to_onnx(graph(network=network(len(WINDOWS)))))
    assert "of training: call eval() before export" in found


class Beyond(Pointwise):
    """An operator that ONNX has not."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(super().forward(x))


def test_an_operator_that_onnx_has_not_is_named():
    with pytest.raises(ExportError, match="bessel_j0"):
        to_onnx(graph(network=Beyond(len(WINDOWS))))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # instance norm looks at its input's size
def test_the_transformer_of_unetr_takes_any_batch():
    settings = {"size": (32, 32, 32), "features": 4, "hidden": 24, "mlp": 32, "heads": 2}
    network = catalogue.build("unetr", in_channels=1, classes=CLASSES, **settings)
    made = HeadCT(network, WINDOWS[:1], GRID, shown=32, answered=16).eval()
    session = opened(to_onnx(made))
    hu = slices(3, 32, 40, 40)
    with torch.no_grad():
        expected = made(torch.from_numpy(hu))[0].numpy()
    for batch in (1, 3):
        (labels,) = session.run(["labels"], {"hu": hu[:batch]})
        assert (labels != expected[: 16 * batch]).mean() < 1e-3
