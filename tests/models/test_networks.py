"""What every two-dimensional network owes: shapes, gradients, samples that do not mix, an ONNX graph that agrees."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import ModelProto
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from models import catalogue
from models.att_focus_net import FocusPool
from models.pranet import ReverseAttention
from models.resnet34_unet import ResNet34, ResNet34UNetConfig
from tests.models.reduced import CHANNELS, CLASSES, NAMES, build, export, picture, settle

PARITY = 1e-4  # largest difference between a logit of ONNX Runtime and of PyTorch, of logits up to about ten
# those of our graphs; TensorRT 8.6 parses each of them (onnx-tensorrt, docs/operators.md, already that of 8.5)
TENSORRT_8_6 = {
    "Add", "AveragePool", "BatchNormalization", "Concat", "Constant", "Conv", "ConvTranspose", "DepthToSpace", "Div",
    "Elu", "Exp", "Identity", "MaxPool", "Mul", "Neg", "ReduceMean", "Relu", "Resize", "Sigmoid", "Slice",
    "Softmax", "Split", "Sqrt", "Sub", "Transpose",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are faster without a second one, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def biases_before_batch_norm(network: nn.Module) -> set[str]:
    """Convolutions' biases: batch norm takes some of them out again, so that their gradient is rounding or nothing."""
    return {f"{name}.bias" for name, part in network.named_modules() if isinstance(part, nn.Conv2d)}


@pytest.mark.parametrize("name", NAMES)
def test_logits_have_the_size_of_the_input(name: str):
    network, multiple = build(name)
    network.eval()
    for height, width in ((2 * multiple, 3 * multiple), (4 * multiple, 2 * multiple)):
        with torch.no_grad():
            logits = network(picture(1, height, width))
        assert logits.shape == (1, CLASSES, height, width)
        assert logits.dtype == torch.float32
        assert logits.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name: str):
    network, multiple = build(name)
    x = picture(2, 2 * multiple, 2 * multiple)
    outputs = tree_leaves(network(x))
    # not the sum, which a softmax or a normalisation may hold constant
    sum((out * torch.rand(out.shape, generator=torch.Generator().manual_seed(2))).sum() for out in outputs).backward()
    may_vanish = biases_before_batch_norm(network)
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert key in may_vanish or parameter.grad.any(), key


@pytest.mark.parametrize("name", NAMES)
def test_a_slice_does_not_see_the_others_of_its_batch(name: str):
    network, multiple = build(name)
    side = 2 * multiple
    settle(network, side).double()  # batches of different size are summed in different order
    x = picture(3, side, side).double()
    with torch.no_grad():
        together, alone = network(x), network(x[1:2])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_a_network_leaves_its_input_alone(name: str):
    network, multiple = build(name)
    x = picture(2, 2 * multiple, 2 * multiple)
    network(x)
    assert torch.equal(x, picture(2, 2 * multiple, 2 * multiple))


@pytest.fixture(scope="module", params=NAMES)
def exported(request: pytest.FixtureRequest) -> tuple[nn.Module, ModelProto, int]:
    network, multiple = build(request.param)
    side = 2 * multiple
    settle(network, side)
    return network, export(network, picture(2, side, side)), side


def test_onnx_runtime_answers_as_pytorch(exported: tuple[nn.Module, ModelProto, int]):
    network, model, side = exported
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = picture(batch, side, side, seed=batch)
        with torch.no_grad():
            expected = network(x).numpy()
        (logits,) = session.run(None, {"x": x.numpy()})
        assert logits.shape == expected.shape
        assert np.ptp(expected) > 0.1  # a constant would agree with itself
        assert np.abs(logits - expected).max() <= PARITY


def test_the_graph_has_only_operators_of_tensorrt_8_6(exported: tuple[nn.Module, ModelProto, int]):
    _, model, _ = exported
    assert {node.op_type for node in model.graph.node} <= TENSORRT_8_6


def test_pranet_shows_its_sides_in_training_only():
    network, multiple = build("pranet")
    x = picture(2, 2 * multiple, 2 * multiple)
    outputs = network(x)
    assert isinstance(outputs, tuple)
    assert [out.shape for out in outputs] == [(2, CLASSES, 2 * multiple, 2 * multiple)] * 4
    settle(network, 2 * multiple)
    with torch.no_grad():
        answer = network(x)
        network.train()
        network.apply(lambda part: part.eval() if isinstance(part, nn.BatchNorm2d) else part)
        assert torch.equal(network(x)[0], answer)


@pytest.mark.parametrize("classes", [1, 2])
def test_reverse_attention_of_several_classes_is_the_published_one_of_one(classes: int):
    """Of two classes the background's softmax is one minus the sigmoid of their difference."""
    torch.manual_seed(0)
    found, features = torch.randn(2, 1, 4, 4), torch.randn(2, 8, 4, 4)
    branch = ReverseAttention(8, 4, kernel=3, layers=1, classes=classes)
    seen = []
    branch.reduce.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    branch(found if classes == 1 else torch.cat([torch.zeros_like(found), found], dim=1), features)
    torch.testing.assert_close(seen[0], (1 - torch.sigmoid(found)) * features)


def test_the_focus_is_a_convolution_of_the_sampled_map():
    """As published: four maps sampled with a step of two, joined, convolved 3 x 3."""
    torch.manual_seed(0)
    layer = FocusPool(4).eval()
    x = torch.randn(2, 4, 12, 8)
    convolution = layer.focus[0]
    sampled = torch.cat([x[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1)], dim=1)
    weight = torch.cat(
        [convolution.weight[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1)], dim=1
    )  # (2, 16, 3, 3)
    with torch.no_grad():
        expected = functional.relu(layer.focus[1](functional.conv2d(sampled, weight, convolution.bias, padding=1)))
        torch.testing.assert_close(layer(x), torch.cat([functional.max_pool2d(x, 2), expected], dim=1))


def test_the_encoder_has_the_names_and_shapes_of_torchvisions_resnet34():
    shapes = {
        key: tuple(value.shape) for key, value in ResNet34(ResNet34UNetConfig(in_channels=3)).state_dict().items()
    }
    assert len(shapes) == 216  # torchvision's 218 without fc.weight and fc.bias
    assert shapes["conv1.weight"] == (64, 3, 7, 7)
    assert shapes["layer1.2.bn2.running_var"] == (64,)
    assert shapes["layer2.0.downsample.0.weight"] == (128, 64, 1, 1)
    assert shapes["layer3.5.conv1.weight"] == (256, 256, 3, 3)
    assert shapes["layer4.0.downsample.1.bias"] == (512,)
    assert not any(key.startswith("layer1.0.downsample") for key in shapes)


def test_reduced_networks_are_those_of_the_catalogue():
    flat = {name for name, architecture in catalogue.ARCHITECTURES.items() if architecture.dimensions == 2}
    assert set(NAMES) == flat
    assert CHANNELS != 1 != CLASSES
