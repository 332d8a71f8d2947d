"""Pictures of records: percentile curves, stacked stages, bars and curves of growth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from training.figures import COLOURS, GREY

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from benchmarks.record import Record


def percentile_curve(record: Record, path: Path) -> None:
    """Every time of a record over the share of calls that stayed below it; its floor in the same colour, dashed."""
    names = [name for name in record.samples if name.endswith("_ms")]
    figure, axes = _figure(6.5, 3.6)
    shares = np.linspace(0, 99.9, 400)
    floors = set(record.floors.values())
    for name, colour in zip(names, _colours(len(names)), strict=True):
        style = "--" if name in floors else "-"
        axes.plot(shares, np.percentile(record.samples[name], shares), style, color=colour, label=_words(name))
    axes.set(xlabel="percent of calls", ylabel="milliseconds", ylim=(0, None), title=_title(record))
    axes.legend(frameon=False)
    figure.savefig(path)


def bars(record: Record, path: Path) -> None:
    """Medians as bars, the floor of each behind it."""
    floors = set(record.floors.values())
    names = [name for name in record.samples if name not in floors][::-1]
    units = dict.fromkeys(name.rsplit("_", 2)[-2:][0] == "per" for name in names)
    figure, axes = _figure(7.5, 1.2 + 0.32 * len(names))
    at = np.arange(len(names))
    behind = [record.median(record.floors[name]) if name in record.floors else 0 for name in names]
    axes.barh(at, behind, 0.7, color="#d0d7de", label="limit")
    drawn = axes.barh(at, [record.median(name) for name in names], 0.4, color=_colours(1)[0])
    axes.bar_label(drawn, fmt="%.4g", padding=3, fontsize=8)
    axes.set_yticks(at, [_words(name) for name in names])
    axes.set(xlabel="per second" if True in units else "milliseconds", title=_title(record))
    axes.margins(x=0.12)
    if any(behind):
        axes.legend(frameon=False)
    figure.savefig(path)


def stacked(stages: Mapping[str, Mapping[str, float]], path: Path, title: str, *, marks: Mapping[str, float]) -> None:
    """One bar for each case, its stages one after the other.

    Parameters
    ----------
    stages : by case, milliseconds of each stage in order
    marks : by case, where its target lies

    """
    figure, axes = _figure(8, 1.4 + 0.6 * len(stages))
    names = list(dict.fromkeys(name for of_case in stages.values() for name in of_case))
    colours = dict(zip(names, _colours(len(names)), strict=True))
    for at, (case, of_case) in enumerate(stages.items()):
        left = 0.0
        for name, ms in of_case.items():
            axes.barh(at, ms, 0.5, left=left, color=colours[name], label=name)
            left += ms
        axes.text(left, at, f" {left:.0f} ms", va="center", fontsize=8)
        if case in marks:
            axes.plot([marks[case]] * 2, [at - 0.35, at + 0.35], color="black", lw=1)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), frameon=False, fontsize=7, ncols=4, loc="upper center",
                bbox_to_anchor=(0.5, -0.35))  # fmt: skip
    axes.set_yticks(range(len(stages)), list(stages))
    axes.set(xlabel="milliseconds after the last slice was acknowledged (line: target)", title=title)
    axes.margins(x=0.1)
    figure.savefig(path)


def growth(curves: Sequence[tuple[str, str, Sequence[float], Mapping[str, Sequence[float]]]], path: Path) -> None:
    """Cost over the size of work, a panel for each kind: its title, its axis, the sizes, and curves by name."""
    from matplotlib.figure import Figure  # noqa: PLC0415 (a second to import)

    figure = Figure(figsize=(4.2 * len(curves), 3.6), dpi=120, layout="constrained")
    for axes, (title, label, sizes, values) in zip(
        figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True
    ):
        for (name, took), colour in zip(values.items(), _colours(len(values)), strict=True):
            axes.plot(sizes, took, "o-", ms=3, color=colour, label=name)
        axes.set(title=title, xlabel=label, ylabel="milliseconds", xscale="log", yscale="log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7)
    figure.savefig(path)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # noqa: PLC0415 (a second to import)

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _colours(count: int) -> list[str]:
    colours = (*COLOURS, GREY)
    return [colours[number % len(colours)] for number in range(count)]


def _words(name: str) -> str:
    return name.removesuffix("_ms").removesuffix("_per_s").replace("_", " ")


def _title(record: Record) -> str:
    model = record.about.get("model", "")
    return f"{record.kind}: {model}, {record.machine['threads']} threads" if model else record.kind
