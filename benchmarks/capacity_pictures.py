"""The picture of docs/scale.md: how long results take by scanners of a node, and which part limits where."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import stations
from training.figures import COLOURS, DARK

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.capacity import Capacity
    from benchmarks.costs import Assumptions, Costs

SLICES = np.unique(np.geomspace(10, 2000, 60).astype(int))
INFERENCE_MS = np.geomspace(0.1, 300, 60)
NAMES = {"processor": "processor, measured costs", "gpu": "GPU, assumed costs"}


def draw(found: Capacity, path: Path) -> None:
    """Write both panels."""
    from matplotlib.figure import Figure  # noqa: PLC0415 (a second to import)

    figure = Figure(figsize=(11, 4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    _percentiles(found, left)
    _regions(found, right)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Software": None})


def limits(measured: Costs, assumed: Assumptions) -> np.ndarray:
    """Of series of so many slices, with so many milliseconds of inference for each, which station limits a node.

    Returns
    -------
    (len(INFERENCE_MS), len(SLICES)) indices into `stations.STATIONS`

    """
    answer = np.empty((len(INFERENCE_MS), len(SLICES)), int)
    for column, slices in enumerate(SLICES):
        load = stations.load(measured, assumed, "processor", (int(slices),))
        for row, ms in enumerate(INFERENCE_MS):
            changed = replace(load, parts=load.parts | {"inference": float(slices * ms)})
            answer[row, column] = stations.STATIONS.index(changed.bottleneck)
    return answer


def _percentiles(found: Capacity, axes: Any) -> None:
    for (engine, points), colour in zip(found.curves.items(), (COLOURS[2], COLOURS[5]), strict=True):
        counts = [one.scanners for one in points]
        for at, style, percent in ((0, ":", 50), (1, "-", 95), (2, "--", 99)):
            label = f"{NAMES[engine]}: p{percent}"
            axes.plot(counts, [one.first_s[at] for one in points], style, color=colour, label=label)
        if found.full[engine]:
            axes.axvline(found.full[engine], color=colour, lw=0.8, alpha=0.5)
    axes.axhline(found.assumed.target_s, color=DARK, lw=0.8)
    axes.set(
        xscale="log", yscale="log", xlabel="scanners on one node (line: it is full)",
        ylabel="seconds", title=f"Last slice to archive, first series ({found.assumed.exam[0]} slices)",
    )  # fmt: skip
    axes.legend(frameon=False, fontsize=6, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.18))


def _regions(found: Capacity, axes: Any) -> None:
    from matplotlib.colors import ListedColormap  # noqa: PLC0415 (as above)
    from matplotlib.patches import Patch  # noqa: PLC0415

    region = limits(found.costs, found.assumed)
    shown = ListedColormap(["#dddddd", *COLOURS])
    axes.pcolormesh(
        SLICES, INFERENCE_MS, region, cmap=shown, vmin=0, vmax=len(stations.STATIONS) - 1, shading="nearest", alpha=0.6
    )
    present = [stations.STATIONS[at] for at in np.unique(region)]
    axes.legend(
        handles=[Patch(color=shown(stations.STATIONS.index(name)), alpha=0.6, label=name) for name in present],
        fontsize=7,
        loc="lower right",
    )
    middle = found.assumed.exam[0]
    own = float(found.costs.of_slice(middle).mean() - found.costs.decode_ms.mean())
    for ms, words in ((own, "measured: processor"), (found.assumed.gpu_ms + found.assumed.trip_ms, "assumed: GPU")):
        axes.axhline(ms, color=DARK, lw=0.8)
        axes.text(SLICES[0], ms, f" {words}", fontsize=7, va="bottom")
    axes.set(
        xscale="log", yscale="log", xlabel="slices of a series", ylabel="inference, milliseconds a slice",
        title="What limits a node",
    )  # fmt: skip
