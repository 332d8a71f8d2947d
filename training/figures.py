"""Figures of an evaluation, for a report or a page: each function returns a figure, the caller saves it.

No pyplot: no window, no state, no figure that somebody must close. Colours are those of Okabe & Ito (Color Universal
Design, 2008), which readers with any of the common colour deficiencies can tell apart.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from training.detection import Reliability
    from training.statistics import Agreement

# By class, the background left out: neighbours in the head far apart, and yellow, faint on white, last.
COLOURS = ("#E69F00", "#56B4E9", "#D55E00", "#CC79A7", "#009E73", "#0072B2", "#F0E442")
DARK, BLUE, VERMILION, GREY = "#222222", "#0072B2", "#D55E00", "#888888"
MARKERS = "os^Dv<>"
BRAIN_HU = (0.0, 90.0)
AIR_HU = -300
DPI = 150


def draw_overlay(
    hu: NDArray[np.int16],
    truth: NDArray[np.uint8],
    predicted: NDArray[np.uint8],
    spacing_mm: tuple[float, float],
    classes: Sequence[str],
    *,
    window_hu: tuple[float, float] = BRAIN_HU,
) -> Figure:
    """One slice three times, cut to the head: as it is, with the truth, with the prediction and the truth's outline.

    Parameters
    ----------
    hu, truth, predicted : ``(H, W)``
    spacing_mm : distance between rows, between columns
    classes : names by label, 0 the background; the legend has those that either map shows

    """
    figure = _new_figure(10.5, 5.2)
    panels = figure.subplots(1, 3, sharey=True)
    height_mm, width_mm = hu.shape[0] * spacing_mm[0], hu.shape[1] * spacing_mm[1]
    place: dict[str, Any] = {"extent": (0, width_mm, height_mm, 0), "interpolation": "nearest"}
    for axes, title in zip(panels, ("CT", "truth", "prediction, truth outlined"), strict=True):
        axes.imshow(hu, cmap="gray", vmin=window_hu[0], vmax=window_hu[1], **place)
        axes.set(title=title, xlabel="mm")
    panels[0].set_ylabel("mm")
    for axes, labels in zip(panels[1:], (truth, predicted), strict=True):
        axes.imshow(_paint(labels), **place)
    _outline(panels[2], truth, spacing_mm)
    rows, columns = (np.nonzero((hu > AIR_HU).any(axis=axis))[0] for axis in (1, 0))
    if len(rows):
        panels[0].set_ylim((rows[-1] + 1) * spacing_mm[0], rows[0] * spacing_mm[0])
        for axes in panels:
            axes.set_xlim(columns[0] * spacing_mm[1], (columns[-1] + 1) * spacing_mm[1])
    shown = [label for label in range(1, len(classes)) if (truth == label).any() or (predicted == label).any()]
    for label in shown:
        panels[2].scatter([], [], marker="s", s=60, color=_colour(label), label=classes[label])
    if shown:
        figure.legend(loc="outside lower center", ncols=len(shown), frameon=False)
    return figure


def draw_bland_altman(agreement: Agreement, *, title: str = "", unit: str = "ml") -> Figure:
    """Differences against means with bias and limits of agreement; the bands are their confidence intervals.

    Parameters
    ----------
    agreement : of two methods, measured and true, over the patients
    unit : of both, for the axes

    """
    figure = _new_figure(6.4, 4.2)
    axes = figure.subplots()
    axes.scatter(agreement.mean, agreement.difference, s=18, color=BLUE, alpha=0.65, linewidths=0, zorder=3)
    axes.axhline(0, color=GREY, linewidth=0.8, linestyle=":")
    lines = {
        "+1.96 SD": (agreement.upper, VERMILION, "--"),
        "bias": (agreement.bias, DARK, "-"),
        "\N{MINUS SIGN}1.96 SD": (agreement.lower, VERMILION, "--"),
    }
    for line, colour, style in lines.values():
        axes.axhspan(line.low, line.high, color=colour, alpha=0.12, linewidth=0)
        axes.axhline(line.estimate, color=colour, linestyle=style, linewidth=1.3)
    right = axes.secondary_yaxis("right")
    right.set_yticks(
        [line.estimate for line, *_ in lines.values()],
        [f"{name}\n{_signed(line.estimate)} {unit}" for name, (line, *_) in lines.items()],
        fontsize=9,
    )
    right.tick_params(length=0)
    axes.set(
        title=title,
        xlabel=f"mean of measured and true volume, {unit}",
        ylabel=f"measured \N{MINUS SIGN} true volume, {unit}",
    )
    return figure


def draw_violins(scores: Mapping[str, NDArray[np.float64]], *, title: str = "", ylabel: str = "Dice") -> Figure:
    """Distribution of a score from 0 to 1 for each class or model (paper 004, figure 4), with every patient in it.

    The curves end at the extreme values: a kernel that runs on promises a Dice above 1.

    Parameters
    ----------
    scores : by name, one score per patient; NaN is left out, and the axis says how many are shown

    """
    figure = _new_figure(max(4.5, 1.15 * len(scores) + 1), 4.2)
    axes = figure.subplots()
    rng = np.random.default_rng(0)  # only for the dots' places beside each other
    names = []
    for place, (name, values) in enumerate(scores.items()):
        known = values[~np.isnan(values)]
        names.append(f"{name}\nn = {len(known)}")
        colour = COLOURS[place % len(COLOURS)]
        if len(known) > 1 and np.ptp(known) > 0:  # a kernel needs some spread
            body = axes.violinplot(known, [place], widths=0.85, showextrema=False)["bodies"][0]
            body.set(facecolor=colour, edgecolor=DARK, alpha=0.55, linewidth=0.8)
        axes.scatter(place + rng.uniform(-0.06, 0.06, len(known)), known, s=7, color=DARK, alpha=0.5, linewidths=0)
        if len(known):
            low, middle, high = np.quantile(known, [0.25, 0.5, 0.75])
            axes.vlines(place, low, high, color=DARK, linewidth=4, alpha=0.8)
            axes.scatter(place, middle, s=34, color="white", edgecolors=DARK, zorder=4)
    axes.set(title=title, ylabel=ylabel, ylim=(-0.02, 1.02))
    axes.set_xticks(range(len(names)), names)
    axes.grid(axis="y", alpha=0.3)
    return figure


def draw_reliability(reliability: Reliability, *, title: str = "") -> Figure:
    """Reliability diagram: what came true against what was said, and how often each probability was said."""
    figure = _new_figure(4.8, 5.4)
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="perfect")
    known = reliability.count > 0
    axes.vlines(
        reliability.confidence[known],
        reliability.confidence[known],
        reliability.frequency[known],
        color=VERMILION,
        linewidth=2,
        label="gap",
    )
    axes.plot(reliability.confidence[known], reliability.frequency[known], "o-", color=BLUE, label="observed")
    axes.text(0.97, 0.04, f"ECE {reliability.expected_error:.3f}", transform=axes.transAxes, ha="right")
    axes.set(title=title, ylabel="share that came true", xlim=(0, 1), ylim=(0, 1))
    axes.legend(loc="upper left", frameon=False)
    widths = np.diff(reliability.edges)
    below.bar(reliability.edges[:-1], reliability.count, widths, align="edge", color=BLUE, alpha=0.6, edgecolor="white")
    below.set(xlabel="predicted probability", ylabel="predictions", ylim=(0.5, 2 * reliability.count.max() + 1))
    below.set_yscale("log")
    return figure


def draw_training(
    steps: Sequence[int], loss: Sequence[float], dice: Mapping[str, Sequence[float]], *, title: str = ""
) -> Figure:
    """Loss and each class's validation Dice over the steps of a run; a ring marks the step of the best mean Dice.

    Parameters
    ----------
    steps, loss : ``(V,)`` at each validation
    dice : by class, ``(V,)``; NaN where the validation slices show none of it

    """
    figure = _new_figure(10.5, 4.0)
    left, right = figure.subplots(1, 2)
    left.plot(steps, loss, color=BLUE)
    left.set(xlabel="step", ylabel="training loss")
    table = np.array(list(dice.values()), dtype=np.float64)  # (C, V)
    for place, (name, values) in enumerate(dice.items()):
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        right.plot(steps, values, color=colour, marker=marker, markersize=4, linewidth=1.4, label=name)
    known = ~np.isnan(table)
    if known.any():
        mean = np.where(known, table, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
        best = int(mean.argmax())
        right.plot(steps, mean, color=DARK, linewidth=2.2, label="mean")
        right.scatter(steps[best], mean[best], s=90, facecolors="none", edgecolors=DARK, linewidths=1.5, zorder=4)
    right.set(xlabel="step", ylabel="Dice on validation slices", ylim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=9, frameon=False)
    figure.suptitle(title)
    return figure


def _new_figure(width_in: float, height_in: float) -> Figure:
    from matplotlib.figure import Figure  # noqa: PLC0415  # a second to import, and only drawing needs it

    return Figure(figsize=(width_in, height_in), dpi=DPI, layout="constrained")


def _colour(label: int) -> str:
    return COLOURS[(label - 1) % len(COLOURS)]


def _paint(labels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Label map ``(H, W)`` to RGBA ``(H, W, 4)``, transparent where there is none."""
    picture = np.zeros((*labels.shape, 4))
    for label in np.unique(labels[labels > 0]).tolist():
        rgb = [int(_colour(label)[i:j], 16) / 255 for i, j in pairwise((1, 3, 5, 7))]
        picture[labels == label] = [*rgb, 0.75]
    return picture


def _outline(axes: Axes, labels: NDArray[np.uint8], spacing_mm: tuple[float, float]) -> None:
    """Draw the border of each class along the edges of its pixels, white on black: blood and bone are white too."""
    padded = np.pad(labels, 1)
    upper, lower = padded[:-1, 1:-1], padded[1:, 1:-1]
    left, right = padded[1:-1, :-1], padded[1:-1, 1:]
    row_mm, column_mm = spacing_mm
    for colour, width in (("black", 2.4), ("white", 0.9)):
        rows, columns = np.nonzero(upper != lower)
        axes.hlines(rows * row_mm, columns * column_mm, (columns + 1) * column_mm, color=colour, linewidth=width)
        rows, columns = np.nonzero(left != right)
        axes.vlines(columns * column_mm, rows * row_mm, (rows + 1) * row_mm, color=colour, linewidth=width)


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")
