"""Published parameter counts, clear refusals, and costs that can be checked by hand."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

from models import catalogue
from models.catalogue import ARCHITECTURES, CatalogueError, build, gflops, parameters, peak_memory, side_multiple
from tests.models import reduced

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("attention_unet", 7_791_285),
        ("ema_attention_unet", 7_794_805),
        ("dr_unet", 10_953_249),
        ("vanilla_unet", 31_114_305),
    ],
)
def test_parameters_are_those_of_the_paper(name: str, published: int):
    with torch.device("meta"):
        assert parameters(build(name)) == published


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("wide_attention_unet", 31.4),
        ("attention_res_unet", 8.2),
        ("resnet34_unet", 24.4),
        ("dense_unet", 7.5),
        ("att_focus_net", 40.8),
        ("unet_plus_plus", 9.0),
        ("pranet", 30.5),
    ],
)
def test_parameters_of_the_widths_we_chose(name: str, millions: float):
    with torch.device("meta"):
        assert parameters(build(name)) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("name", [name for name, row in ARCHITECTURES.items() if row.dimensions == 2])
def test_sides_must_be_multiples_and_of_no_more_than_that(name: str):
    """Shapes alone, at the default widths, inputs and classes."""
    with torch.device("meta"):
        network = build(name).eval()
    multiple = side_multiple(name)
    side = 3 * multiple
    logits = network(torch.empty(1, network.config.in_channels, side, side, device="meta"))
    assert logits.shape == (1, network.config.classes, side, side)
    side = multiple + multiple // 2
    with pytest.raises(RuntimeError, match="[Ss]izes|broadcast"):
        network(torch.empty(1, network.config.in_channels, side, side, device="meta"))


def test_an_unknown_architecture_is_refused_with_those_there_are():
    with pytest.raises(CatalogueError, match="no architecture 'unet': choose from res_unet, vanilla_unet, .*, unetr"):
        build("unet")


def test_an_unknown_setting_is_refused_with_those_there_are():
    with pytest.raises(CatalogueError, match="dr_unet has no setting depth, width: it has in_channels, .*, channels"):
        build("dr_unet", width=3, depth=2)


def test_lists_become_tuples():
    network = build("vanilla_unet", channels=[4, 8], stem=2)
    assert network.config.channels == (4, 8)
    hash(network.config)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    for package in ("monai", "monai.networks"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "models.unet_3d", raising=False)
    with pytest.raises(CatalogueError, match="UNet3D needs .*monai"):
        build("unet_3d")


def test_every_row_is_complete():
    for name, row in ARCHITECTURES.items():
        for text in (row.paper, row.headline, row.widths):
            assert text, name
        assert side_multiple(name) in {8, 16, 32} if row.dimensions == 2 else row.dimensions == 3


def test_listing_the_catalogue_loads_no_network():
    ask = "import models.catalogue, sys; print(sorted(m for m in sys.modules if m.startswith(('monai', 'models.'))))"
    shown = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.strip() == "['models.catalogue']"


class Chain(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.depth = depth

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.scale
        for _ in range(self.depth):
            x = torch.sigmoid(x)
        return x


def test_a_multiply_accumulate_is_two_operations():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, stride=2))
    by_hand = 2 * (16 * 16 * 8 * 3 * 9 + 16 * 16 * 8 * 4 * 4)
    assert gflops(network, (1, 3, 16, 16)) * 1e9 == pytest.approx(by_hand)
    assert gflops(network, (5, 3, 16, 16)) * 1e9 == pytest.approx(5 * by_hand)


def test_peak_memory_counts_what_is_alive():
    """An inference needs the input and two maps at once; a backward pass keeps every sigmoid's output."""
    one = 4 * 64 * 64
    for depth in (3, 8):
        assert peak_memory(Chain(depth), (1, 1, 64, 64)) == 3 * one
        kept = peak_memory(Chain(depth), (1, 1, 64, 64), training=True)
        assert (depth + 3) * one <= kept <= (depth + 3) * one + 64


def test_costs_leave_the_network_as_it_was():
    network = build("vanilla_unet", channels=(4, 8), stem=2)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    gflops(network, (1, 1, 16, 16))
    peak_memory(network, (1, 1, 16, 16), training=True)
    assert network.training
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("name", ["pranet", "ema_attention_unet"])
def test_costs_of_real_networks_grow_with_the_picture(name: str):
    network, _ = reduced.build(name)
    small, large = (gflops(network, (1, reduced.CHANNELS, side, side)) for side in (64, 128))
    assert large == pytest.approx(4 * small, rel=0.05)
    shape = (1, reduced.CHANNELS, 64, 64)
    assert peak_memory(network, shape) < peak_memory(network, shape, training=True)


def test_the_catalogue_cannot_be_changed():
    with pytest.raises(TypeError):
        catalogue.ARCHITECTURES["mine"] = ARCHITECTURES["dr_unet"]


def test_the_documented_table_is_the_catalogues():
    page = (ROOT / "docs" / "models.md").read_text()
    for name in ARCHITECTURES:
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` ") and "recipes/" in line]
        with torch.device("meta"):
            network = build(name)
        assert f"| {parameters(network):,} |" in row
        recipe = ROOT / "docs" / row.partition("](")[2].partition(")")[0]
        assert tomllib.loads(recipe.read_text())["network"]["architecture"] == name
