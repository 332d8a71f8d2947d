"""Every 2D network under the same conditions on phantoms that are hard to read: one table, one picture.

::

    python -m benchmarks.study --out benchmarks/results/networks

The network alone is the paper's. Data, steps, optimiser and input are the same for all, because their protocols
(40 epochs at a rate of 1e-5 on a thousand patients, say) cannot be shortened to what fits here: in so short a time
they learn nothing. So this says which network learns most from little, and what it costs to run; not which paper is
right.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console

from export import bundle as bundles
from models import catalogue
from runtime.bundle import open_bundle
from runtime.session import open_session
from runtime.types import OperatingPoint
from training import evaluate, heads
from training.figures import COLOURS, DARK
from training.recipe import Recipe
from training.statistics import bootstrap, by_patient
from training.train import BEST, LAST, load_checkpoint, train

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from runtime.session import Session
    from training.sources.case import Case

TOOK = "training_s"  # beside a whole run: the seconds that it took
ALIKE = {
    "data": {
        "kind": "phantoms", "heads": 240, "validation_heads": 12, "slices_per_head": 16, "bleed_free": 0.15,
        "hard": 0.6, "seed": 40961,
    },
    "input": {"windows_hu": [[0.0, 90.0], [-60.0, 140.0], [-200.0, 1000.0]]},
    "training": {
        "batch": 8, "sampling": "by_class", "optimiser": "muon", "schedule": "one_cycle", "learning_rate": 2e-2,
        "weight_decay": 1e-2, "clip_norm": 1.0, "precision": "bfloat16", "seed": 7,
    },
}  # fmt: skip

# widths, the paper's in proportion, at which a slice on a grid of 128 costs what it costs `res_unet`: 1.1 GFLOPs
SLIM: dict[str, dict[str, Any]] = {
    "res_unet": {},
    "vanilla_unet": {"stem": 8, "channels": [8, 24, 48, 96, 184, 368]},
    "dr_unet": {"stem": 8, "channels": [24, 48, 88, 176, 352, 704]},
    "dense_unet": {"stem": 24, "growth": 4, "bottleneck": 8, "decoder": [184, 96, 48, 24, 8]},
    "attention_unet": {"channels": [16, 32, 56, 112]},
    "wide_attention_unet": {"channels": [16, 24, 48, 104, 208]},
    "ema_attention_unet": {"channels": [16, 32, 56, 112], "factor": 8},
    "attention_res_unet": {"channels": [16, 24, 48, 96, 192]},
    "resnet34_unet": {"stages": [32, 64, 136, 272], "decoder": [136, 64, 32, 16, 8]},
    "att_focus_net": {"channels": [16, 24, 48, 96, 192]},
    "unet_plus_plus": {"channels": [8, 16, 40, 80, 152]},
    "pranet": {"stem": 40, "base_width": 16, "decoder": 24, "reverse": [40, 40, 176]},
}


@dataclass(frozen=True)
class Row:
    """One network: what it costs, what it scores (over the classes' means), and how long it took to learn.

    `missed` of `lesions`: classes of blood in a head of which nothing was found.
    """

    network: str
    parameters: int
    gflops: float
    slice_ms: float
    dice: float
    dice_low: float
    dice_high: float
    hausdorff_95_mm: float | None
    volume_icc: float | None
    abc_icc: float | None
    specificity: float | None
    missed: int
    lesions: int
    training_s: float


def recipe_of(network: str, steps: int, grid: int, *, slim: bool = False) -> Recipe:
    """The network with its paper's widths, or slim ones, under the conditions that all share."""
    return Recipe.model_validate(
        {
            "name": network,
            "version": "study",
            "training_data": "hard synthetic head CT phantoms only",
            "network": {"architecture": network, **(SLIM[network] if slim else {})},
            **ALIKE,
            "input": ALIKE["input"] | {"grid": grid},
            "training": ALIKE["training"] | {"steps": steps, "validate_every": steps},
        }
    )


def learn(network: str, runs: Path, steps: int, grid: int, *, slim: bool = False) -> Path:
    """Train a network into its folder of `runs`, or find it trained there; one that was broken off starts again."""
    recipe, run = recipe_of(network, steps, grid, slim=slim), runs / f"{network}{'-slim' * slim}-{steps}-{grid}"
    run.mkdir(parents=True, exist_ok=True)
    shared = runs / "slices"
    shared.mkdir(exist_ok=True)
    if not (run / "slices").exists():
        (run / "slices").symlink_to(shared.resolve(), target_is_directory=True)
    took = run / TOOK
    if not took.exists():
        (run / LAST).unlink(missing_ok=True)
        for validation in (True, False):
            heads.collect(recipe.data, 1, shared, validation=validation, on_head=lambda *_: None)
        started = time.monotonic()
        train(recipe, run)
        took.write_text(f"{time.monotonic() - started:.1f}")
    return run


def score(run: Path, cases: Sequence[Case], folder: Path) -> tuple[Row, dict[str, Any]]:
    """Export a trained network into `folder`, and score its bundle on the cases."""
    checkpoint = load_checkpoint(run / BEST)
    recipe, graph = checkpoint.recipe, checkpoint.graph
    bundles.write(recipe, graph, heads.golden_slices(recipe.input.view), folder, point=OperatingPoint(0.5))
    bundle = open_bundle(folder)
    session = open_session(bundle, "onnxruntime")
    scored = [evaluate.score(case, case.images, bundle, session) for case in cases]
    summary = evaluate.summarise(scored, bundle, session, "hard synthetic phantoms that no network trained on")
    classes = summary["classes"].values()
    dice = bootstrap(by_patient(scored, [one.patient for one in scored]), _dice, seed=0, resamples=1000)
    grid, channels = recipe.input.grid, recipe.settings["in_channels"]
    row = Row(
        network=recipe.name,
        parameters=catalogue.parameters(graph.network),
        gflops=round(catalogue.gflops(graph.network, (1, channels, grid, grid)), 2),
        slice_ms=summary.pop("slice_ms"),  # beside whatever else ran: measured again, all in turn
        dice=round(dice.estimate, 4),
        dice_low=round(dice.low, 4),
        dice_high=round(dice.high, 4),
        hausdorff_95_mm=_mean([one["hausdorff_95_mm"] for one in classes]),
        volume_icc=_mean([(one.get("volume_icc") or {}).get("estimate") for one in classes]),
        abc_icc=_mean([(one.get("abc_icc") or {}).get("estimate") for one in classes]),
        specificity=summary["bleed_free"]["specificity"],
        missed=sum(one["without_distance"] for one in classes),
        lesions=sum(one["cases"] for one in classes),
        training_s=float((run / TOOK).read_text()),
    )
    return row, summary


def latency(sessions: Mapping[str, Session], rounds: int = 5) -> dict[str, float]:
    """Median milliseconds of a slice of 512 x 512, batch 1: in turn, so that all meet the same machine.

    A few slices at a time, the first two of them to warm up, after a pause: ONNX Runtime's threads go on looking for
    work when a session is done, and would take the next one's cores.
    """
    hu = np.random.default_rng(0).integers(-1000, 1500, (1, 1, 512, 512)).astype(np.int16)
    took: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(rounds):
        for name, session in sessions.items():
            time.sleep(0.1)
            for call in range(6):
                started = time.perf_counter()
                session.infer(hu)
                if call >= 2:
                    took[name].append(1e3 * (time.perf_counter() - started))
    return {name: round(float(np.median(times)), 2) for name, times in took.items()}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(float(np.mean(known)), 4) if known else None


def _told(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _dice(scored: Sequence[Sequence[evaluate.Scored]]) -> float:
    """Mean over classes of the mean Dice over the cases that show the class."""
    cases = [one for patient in scored for one in patient]
    classes = range(1, len(cases[0].dice))
    of_class = [[one.dice[c] for one in cases if one.shows(c)] for c in classes]
    return float(np.mean([np.mean(dice) for dice in of_class if dice])) if any(of_class) else float("nan")


def machine() -> dict[str, str | int]:
    """What this ran on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"cpu": model, "threads": torch.get_num_threads(), "gpu": gpu, "torch": torch.__version__}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Accuracy against latency; the area of a mark is the network's parameters."""
    from matplotlib.figure import Figure  # noqa: PLC0415  # a second to import, at the end of an hour
    from matplotlib.ticker import LogLocator  # noqa: PLC0415

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        error = [[row.dice - row.dice_low], [row.dice_high - row.dice]]
        axes.errorbar(row.slice_ms, row.dice, error, color=COLOURS[place % len(COLOURS)], alpha=0.4)
        axes.scatter(row.slice_ms, row.dice, s=row.parameters / 1e5, color=COLOURS[place % len(COLOURS)], alpha=0.7)
        axes.annotate(
            row.network, (row.slice_ms, row.dice), xytext=(6, 4), textcoords="offset points", color=DARK, fontsize=8
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.margins(x=0.2)  # names stand to the right of their marks
    axes.set(
        xlabel="ms a slice, batch 1, on the processor", ylabel="Dice, mean over six classes",
        title="Hard phantoms, all networks trained alike",
    )  # fmt: skip
    axes.grid(alpha=0.3)
    figure.savefig(path)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, default=Path("benchmarks/results/networks"))
    arguments.add_argument("--runs", type=Path, default=Path("runs/study"), help="what is there is not trained again")
    arguments.add_argument("--steps", type=int, default=300)
    arguments.add_argument("--grid", type=int, default=128)
    arguments.add_argument("--heads", type=int, default=24)
    arguments.add_argument("--bleed-free", type=int, default=12)
    arguments.add_argument("--slim", action="store_true", help="widths at which all cost what `res_unet` does")
    arguments.add_argument("networks", nargs="*", help="default: all of two dimensions")
    asked = arguments.parse_args()
    names = asked.networks or [name for name, one in catalogue.ARCHITECTURES.items() if one.dimensions == 2]
    runs = {name: learn(name, asked.runs, asked.steps, asked.grid, slim=asked.slim) for name in names}  # hours
    cases = list(heads.unseen(asked.heads, asked.bleed_free, hard=True))
    asked.out.mkdir(parents=True, exist_ok=True)
    console, rows, summaries = Console(), [], {}
    with tempfile.TemporaryDirectory() as made:
        for name, run in runs.items():
            row, summaries[name] = score(run, cases, Path(made) / name)
            rows.append(row)
            console.print(row)
        took = latency({name: open_session(open_bundle(Path(made) / name), "onnxruntime") for name in runs})
    rows = [replace(row, slice_ms=took[row.network]) for row in rows]
    write(rows, summaries, vars(asked), asked.out)


WIDTHS = (
    "Each network has the widths of its paper.",
    "Each network has the widths of its paper cut in proportion, until a slice costs about what it costs `res_unet`.",
)
PAGE = """# Networks alike, on phantoms that are hard to read

Made by `python -m benchmarks.study {arguments}`. {widths}

**What is phantom here: everything.** Heads, blood and noise are synthetic, and so is what makes them hard: pale blood,
motion, metal streaks, old bleeds, calcifications. The truth is exact, which no outline by hand is. Every network learnt
for {steps} steps of {batch} slices on a grid of {grid} pixels, far less than in its paper, once, with the same seed,
data, optimiser and input. So the table tells which network learns most from little and what it costs to run. **What
would need patients:** how well any of them finds blood in people, how they rank after a whole training, and everything
that a phantom does not have: other scanners' kernels, surgery, tumours, infarcts, children.

{table}

Dice: the mean over six classes of the mean over the cases that show the class, with its 95 % interval by bootstrap over
heads (of this one training: another seed is not in it). Missed: lesions, a class in a head, of {lesions} of which
nothing was found; HD95 is over the others. ICC of volumes beside that of ABC/2 from the truth's own outlines.
Specificity: heads without blood in which nothing was found. {heads} heads, {bleed_free} of them without blood. `ms`: a
slice of 512 x 512, batch 1, the whole graph, networks in turn, on {cpu} with {threads} threads. Training took its
seconds on the same machine beside other work, so they only tell minutes from hours. Scores by class and by size of
lesion are in `results.json`.

![Dice against milliseconds a slice](accuracy-latency.png)
"""


def page(rows: Sequence[Row], asked: dict[str, Any]) -> str:
    """The results as a page, what they can't say above them."""
    head = (
        "| network | Dice | 95 % interval | HD95, mm | volume ICC | ABC/2 ICC | specificity | missed | parameters "
        "| GFLOPs | ms | training, s |"
    )
    lines = [head, "|---|" + "---:|" * 11]
    lines += [
        f"| `{r.network}` | {_told(r.dice, 3)} | {_told(r.dice_low, 2)} to {_told(r.dice_high, 2)} "
        f"| {_told(r.hausdorff_95_mm, 1)} | {_told(r.volume_icc, 2)} | {_told(r.abc_icc, 2)} "
        f"| {_told(r.specificity, 2)} | {r.missed} | {r.parameters:,} | {r.gflops:g} | {r.slice_ms:.1f} "
        f"| {r.training_s:.0f} |"
        for r in rows
    ]
    told = machine()
    return PAGE.format(
        arguments=f"--steps {asked['steps']} --grid {asked['grid']} --heads {asked['heads']} "
        f"--bleed-free {asked['bleed_free']}{' --slim' * asked['slim']}",
        widths=WIDTHS[asked["slim"]], steps=asked["steps"], grid=asked["grid"],
        heads=asked["heads"] + asked["bleed_free"], bleed_free=asked["bleed_free"], cpu=told["cpu"],
        threads=told["threads"], table="\n".join(lines), batch=ALIKE["training"]["batch"],
        lesions=rows[0].lesions,
    )  # fmt: skip


def write(rows: Sequence[Row], summaries: dict[str, Any], asked: dict[str, Any], folder: Path) -> None:
    """``README.md``, ``results.json``, ``table.csv`` and ``accuracy-latency.png``, best Dice first."""
    ranked = sorted(rows, key=lambda row: -row.dice)
    told = {"asked": {key: str(value) for key, value in asked.items()}, "alike": ALIKE, "machine": machine()}
    results = {**told, "rows": [vars(row) for row in ranked], "summaries": summaries}
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(vars(ranked[0])))
        writer.writeheader()
        writer.writerows(vars(row) for row in ranked)
    draw(ranked, folder / "accuracy-latency.png")
    (folder / "README.md").write_text(page(ranked, asked))


if __name__ == "__main__":
    main()
