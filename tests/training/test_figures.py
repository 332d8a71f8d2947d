"""Every figure can be drawn, says what its axes are, and shows what it was given."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from training import detection, figures, statistics

CLASSES = ("background", "intracerebral", "subdural")


def picture(figure: Figure) -> np.ndarray:
    """The figure as it would be saved, ``(H, W, 4)``."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=60)
    return np.asarray(Image.open(file).convert("RGBA"))


def slice_of(shape: tuple[int, int] = (40, 50)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """HU with a head in it, truth and prediction."""
    hu, truth, predicted = np.full(shape, -1000, np.int16), np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    hu[5:35, 10:40] = 30
    truth[10:20, 15:25], predicted[12:22, 15:25], predicted[25:28, 30:35] = 1, 1, 2
    return hu, truth, predicted


def test_an_overlay_is_in_millimetres_and_names_what_it_shows():
    figure = figures.draw_overlay(*slice_of(), (0.5, 0.8), CLASSES)
    ct, truth, predicted = figure.axes
    assert ct.get_xlabel() == ct.get_ylabel() == "mm"
    assert ct.get_xlim() == pytest.approx((10 * 0.8, 40 * 0.8))
    assert ct.get_ylim() == pytest.approx((35 * 0.5, 5 * 0.5))  # rows run down
    assert predicted.images[1].get_extent() == [0, 50 * 0.8, 40 * 0.5, 0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["intracerebral", "subdural"]
    painted = predicted.images[1].get_array()
    assert (painted[..., 3] > 0).sum() == 100 + 15
    assert np.array(painted[26, 31, :3]) == pytest.approx([0x56 / 255, 0xB4 / 255, 0xE9 / 255])
    assert len(predicted.collections) > len(truth.collections)  # the outline is on the prediction only
    assert picture(figure).std() > 10


def test_an_outline_follows_the_edges_of_pixels():
    hu, truth, predicted = slice_of()
    axes = figures.draw_overlay(hu, truth, predicted, (0.5, 0.8), CLASSES).axes[2]
    white = [c for c in axes.collections if hasattr(c, "get_segments") and c.get_color()[0][:3].min() == 1]
    points = np.concatenate([np.concatenate(c.get_segments()) for c in white])
    assert points.min(axis=0) == pytest.approx([15 * 0.8, 10 * 0.5])
    assert points.max(axis=0) == pytest.approx([25 * 0.8, 20 * 0.5])
    length = sum(np.abs(np.diff(c.get_segments(), axis=1)).sum() for c in white)
    assert length == pytest.approx(2 * 10 * 0.8 + 2 * 10 * 0.5)


def test_an_overlay_without_blood_or_head_is_drawn():
    nothing = np.zeros((20, 20), np.uint8)
    figure = figures.draw_overlay(np.full((20, 20), -1000, np.int16), nothing, nothing, (1, 1), CLASSES)
    assert not figure.legends
    picture(figure)


def test_bland_altman_shows_the_limits_in_ml():
    agreement = statistics.bland_altman([10, 21, 33, 47], [11, 20, 30, 50])
    axes = figures.draw_bland_altman(agreement, title="subdural").axes[0]
    assert axes.get_xlabel().endswith("ml")
    assert axes.get_ylabel().endswith("ml")
    heights = {float(line.get_ydata()[0]) for line in axes.lines}
    assert {agreement.bias.estimate, agreement.lower.estimate, agreement.upper.estimate, 0.0} == heights
    assert axes.collections[0].get_offsets().data == pytest.approx(
        np.column_stack([agreement.mean, agreement.difference])
    )
    picture(axes.figure)


def test_violins_take_any_number_of_patients():
    scores = {
        "intracerebral": np.random.default_rng(1).beta(8, 2, 40),
        "subdural": np.array([0.8, np.nan]),
        "epidural": np.array([np.nan]),
        "contusion": np.array([0.5, 0.5]),
    }
    axes = figures.draw_violins(scores).axes[0]
    labels = [text.get_text() for text in axes.get_xticklabels()]
    assert labels == ["intracerebral\nn = 40", "subdural\nn = 1", "epidural\nn = 0", "contusion\nn = 2"]
    assert axes.get_ylabel() == "Dice"
    picture(axes.figure)


def test_a_reliability_diagram_shows_frequency_against_confidence():
    rng = np.random.default_rng(2)
    probability = rng.uniform(0, 0.7, 3000)
    reliability = detection.bin_probabilities(probability, rng.uniform(size=3000) < probability)
    figure = figures.draw_reliability(reliability)
    observed = figure.axes[0].lines[-1]
    assert observed.get_xdata() == pytest.approx(reliability.confidence[:7])  # empty bins are not drawn
    assert observed.get_ydata() == pytest.approx(reliability.frequency[:7])
    assert any(f"ECE {reliability.expected_error:.3f}" == text.get_text() for text in figure.axes[0].texts)
    assert figure.axes[1].get_xlabel() == "predicted probability"
    picture(figure)
    picture(figures.draw_reliability(detection.bin_probabilities(np.zeros(0), np.zeros(0, bool))))


def test_training_curves_mark_the_best_mean():
    dice = {"intracerebral": [0.1, 0.8, 0.9], "subdural": [np.nan, 0.9, 0.5], "epidural": [np.nan] * 3}
    figure = figures.draw_training([100, 200, 300], [1.0, 0.5, 0.4], dice)
    left, right = figure.axes
    assert left.get_ylabel() == "training loss"
    assert right.collections[0].get_offsets().data == pytest.approx(np.array([[200, 0.85]]))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*dice, "mean"]
    picture(figure)
    picture(figures.draw_training([100], [1.0], {"subdural": [np.nan]}))


def test_colours_are_told_apart_by_dichromats():
    """Smallest distance in CIE Lab between any two of the first six, as a protanope and a deuteranope see them.

    Matrices of Machado, Oliveira & Fernandes, IEEE TVCG 15:1291 (2009), severity 1, on linear RGB.
    """
    machado = {
        "protanopia": [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
        "deuteranopia": [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.01182, 0.04294, 0.968881],
        ],
    }
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    srgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in figures.COLOURS[:6]])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    for name, matrix in machado.items():
        xyz = np.clip(linear @ np.array(matrix).T, 0, 1) @ to_xyz.T / [0.9505, 1, 1.089]
        f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
        lab = np.column_stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])])
        apart = np.linalg.norm(lab[:, None] - lab, axis=2) + 1000 * np.eye(len(lab))
        assert apart.min() > 10, name


def test_matplotlib_is_imported_only_to_draw():
    ask = "import training.figures, sys; print('matplotlib' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
