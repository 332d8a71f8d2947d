"""The three-dimensional networks, which are MONAI's: shapes, gradients, an ONNX graph that agrees."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from models import catalogue
from tests.models.reduced import export

pytest.importorskip("monai", reason="3D networks need MONAI: pip install monai einops")
SETTINGS: dict[str, dict[str, Any]] = {
    "unet_3d": {"channels": (4, 8, 8, 12, 16, 4)},
    "unetr": {"size": (32, 48, 32), "features": 4, "hidden": 24, "mlp": 32, "heads": 2},
}
SIZE = (32, 48, 32)


@pytest.fixture(scope="module", params=SETTINGS)
def network(request: pytest.FixtureRequest) -> nn.Module:
    if request.param == "unetr":
        pytest.importorskip("einops", reason="MONAI's transformer needs einops: pip install einops")
    torch.manual_seed(0)
    return catalogue.build(request.param, in_channels=2, classes=3, **SETTINGS[request.param])


def volume(batch: int) -> torch.Tensor:
    return torch.rand(batch, 2, *SIZE, generator=torch.Generator().manual_seed(batch))


def test_every_parameter_of_a_3d_network_gets_a_gradient(network: nn.Module):
    logits = network.train()(volume(2))
    assert logits.shape == (2, 3, *SIZE)
    (logits * torch.rand(logits.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


def test_onnx_runtime_answers_as_a_3d_network_does(network: nn.Module):
    with warnings.catch_warnings():
        # instance norm checks sizes in Python, and has no evaluation mode: neither changes the graph
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", message="ONNX export mode is set to")
        model = export(network.eval(), volume(2))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        with torch.no_grad():
            expected = network(volume(batch)).numpy()
        (logits,) = session.run(None, {"x": volume(batch).numpy()})
        assert np.ptp(expected) > 0.1
        assert np.abs(logits - expected).max() <= 1e-4


def test_a_volume_of_another_size_passes_the_3d_unet():
    torch.manual_seed(0)
    network = catalogue.build("unet_3d", **SETTINGS["unet_3d"]).eval()
    with torch.no_grad():
        assert network(torch.rand(1, 1, 16, 32, 48)).shape == (1, 1, 16, 32, 48)
