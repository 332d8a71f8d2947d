"""Networks in every precision: what 8 bits cost them, and what they give back, on a processor.

::

    python -m benchmarks.precisions --runs runs/study --out benchmarks/results/precisions

Takes the networks that `benchmarks.study` trained, makes a bundle of each, calibrates it and lets the code of `scanside
verify` judge it; then times FP32 and INT8 in turn, slice by slice, in one run. Where the verdict or the speed falls
short, the table says which operator is to blame.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
from rich.console import Console

from benchmarks.study import latency, machine
from calibration import placement
from calibration.calibrate import calibrate
from calibration.calibrate import write as write_graphs
from calibration.samples import Series
from calibration.verify import record, verify
from calibration.weights import load
from export import bundle as bundles
from runtime.bundle import open_bundle
from runtime.manifest import PROCESSOR
from runtime.ort import OrtSession
from runtime.triage import Rule
from runtime.types import OperatingPoint
from runtime.verdict import Budget
from training import heads
from training.train import BEST, load_checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from runtime.bundle import Bundle

NOT_MADE = {"passed": False, "reasons": ("not made: no choice of layers is inside the budget",), "figures": {}}
ALL = "all layers"
RULES = (Rule("critical", ("any",), 30.0), Rule("urgent", ("any",), 0.0))
SIZE = 512


@dataclass(frozen=True)
class Row:
    """One precision of one network.

    `steps`: it was trained for. `least`: Dice against FP32 that the budget asks of every class. `dice`: of the
    worst class, against FP32, on heads held out. `volume_ml`: largest change of a class in a head. `slice_ms` and
    `speed_up` where a processor serves the precision. `speed_up_of_all`: with every layer in 8 bits that may be,
    whatever it costs. `share_of_time`: operators by what of INT8's time they take, the three largest.
    """

    network: str
    steps: int
    least: float
    precision: str
    passed: bool
    reasons: tuple[str, ...]
    dice: float | None
    volume_ml: float | None
    decisions_flipped: int | None
    layers: int
    left_out: int
    megabytes: float | None
    slice_ms: float | None
    speed_up: float | None
    speed_up_of_all: float | None
    share_of_time: dict[str, float]


def measure(
    run: Path, calibration: Sequence[Series], held_out: Sequence[Series], folder: Path, views: int, budget: Budget
) -> list[Row]:
    """Bundle, calibration, verdict and times of one trained network, whose layers are chosen within a budget."""
    checkpoint = load_checkpoint(run / BEST)
    recipe, graph = checkpoint.recipe, checkpoint.graph
    if not (folder / "verdicts.json").exists():
        if not (folder / "manifest.json").exists():
            bundles.write(recipe, graph, heads.golden_slices(recipe.input.view), folder, point=OperatingPoint(0.5))
        bundle = open_bundle(folder)
        made = calibrate(bundle, calibration, count=views, budget=budget, on_stage=lambda *_: lambda _: None)
        write_graphs(bundle, made, budget)
        bundle = open_bundle(folder)
        record(bundle, verify(bundle, held_out, RULES), held_out)
    bundle = open_bundle(folder)
    verdicts = json.loads((folder / "verdicts.json").read_text())["verdicts"]
    told = json.loads((folder / "calibration.json").read_text())["precisions"]
    sessions = {name: OrtSession(bundle, name) for name in PROCESSOR if name in bundle.manifest.precisions}
    times = latency(sessions | {ALL: OrtSession(bundle, graph=everything(bundle))})
    rows = []
    for precision in ("fp32", "fp16", "int8", "int8-cpu"):
        how = told.get(precision, {})
        verdict = verdicts.get(precision, NOT_MADE)
        figures = verdict["figures"]
        change = figures.get("worst_volume_change")
        rows.append(
            Row(
                network=recipe.name,
                steps=recipe.training.steps,
                least=budget.dice,
                precision=precision,
                passed=verdict["passed"],
                reasons=tuple(verdict["reasons"]),
                dice=min(figures["dice"].values()) if figures.get("dice") else None,
                volume_ml=change["ml"] if change else None,
                decisions_flipped=figures.get("decisions_flipped"),
                layers=how.get("layers", 0),
                left_out=len(how.get("left_out", how.get("kept_fp32", ()))),
                megabytes=round(weights(bundle, precision) / 1e6, 2) if precision in verdicts else None,
                slice_ms=times.get(precision),
                speed_up=round(times["fp32"] / times[precision], 2) if precision in times else None,
                speed_up_of_all=round(times["fp32"] / times[ALL], 2) if precision == "int8-cpu" else None,
                share_of_time=profile(bundle, precision) if precision == "int8-cpu" and precision in verdicts else {},
            )
        )
    return rows


def everything(bundle: Bundle) -> bytes:
    """The graph with every layer in 8 bits that may be: what the network could gain if 8 bits cost it nothing."""
    model = load(bundle.graph("fp32"))
    ranges = json.loads((bundle.folder / "calibration.json").read_text())["ranges"]
    span = {name: (one["low"], one["high"]) for name, one in ranges.items()}
    return placement.for_onnxruntime(model, span, placement.layers(model)).SerializeToString()


def weights(bundle: Bundle, precision: str) -> int:
    """Bytes that a precision's graph and the tensors that it refers to take."""
    path = bundle.graph(precision)
    model = onnx.load(path, load_external_data=False)
    places = {
        (entry["offset"], int(entry["length"]))
        for one in model.graph.initializer
        if (entry := {item.key: item.value for item in one.external_data})
    }
    return path.stat().st_size + sum(length for _, length in places)


def profile(bundle: Bundle, precision: str) -> dict[str, float]:
    """Share of the time of each kind of operator, the three largest."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(bundle.folder.parent / f"profile-{bundle.name}")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(bundle.graph(precision), options, providers=["CPUExecutionProvider"])
    for _ in range(5):
        session.run(None, {"hu": np.zeros((1, bundle.view.shown, SIZE, SIZE), np.int32)})
    events = json.loads((file := Path(session.end_profiling())).read_text())
    file.unlink()
    spent: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
    return {kind: round(dur / spent.total(), 3) for kind, dur in spent.most_common(3)}


PAGE = """# Precisions

Made by `python -m benchmarks.precisions --views {views} --held-out {held_out}` on {cpu}, {threads} threads, from the
networks of the [study](../networks/README.md), trained for so many steps on synthetic phantoms alone. 150 are too few
for 8 bits to cost little: those that were trained for longer show what they can do, also with a tighter `least` (Dice
against FP32 that every class has to keep, `--dice`). How fast a layer is does not depend on its weights; how many of
them stay in FP32 does.

{table}

Dice and ml: the worst class of {held_out} heads that no calibration saw, against FP32. `left out`: layers that the
search left in FP32 (of FP16: operators). ms: median of a 512 x 512 slice, batch 1, the whole graph with its pre- and
post-processing, precisions in turn; `of all`: the speed-up with every layer in 8 bits that may be, whatever it costs.
`fp16` and `int8` are TensorRT's: a processor holds them to their budget, and times say nothing of them. Where INT8
spends its time, and every reason of a failure, is in `results.json`.
"""


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    columns = "network|steps|least|precision|verdict|Dice|ml|layers|left out|MB|ms|speed-up|of all|most of its time"
    lines = [f"| {columns.replace('|', ' | ')} |"]
    lines.append("|---|---:|---:|---|---|" + "---:|" * 8 + "---|")
    for row in rows:
        dice = "" if row.dice is None else f"{row.dice:.4f}"
        volume = "" if row.volume_ml is None else f"{row.volume_ml:.2f}"
        spent = ", ".join(f"{kind} {share:.0%}" for kind, share in row.share_of_time.items())
        lines.append(
            f"| `{row.network}` | {row.steps} | {row.least} | {row.precision} | {_ruled(row)} | {dice} | {volume} "
            f"| {row.layers or ''} | {row.left_out if row.precision != 'fp32' else ''} | {row.megabytes or ''} "
            f"| {row.slice_ms or ''} | {row.speed_up or ''} | {row.speed_up_of_all or ''} | {spent} |"
        )
    return "\n".join(lines)


def _ruled(row: Row) -> str:
    if row.passed:
        return "passed"
    more = f", and {len(row.reasons) - 1} more" if len(row.reasons) > 1 else ""
    return f"failed: {textwrap.shorten(row.reasons[0], 80, placeholder=' ...')}{more}"


def write(rows: Sequence[Row], held_out: int, views: int, folder: Path) -> None:
    """``README.md`` and ``results.json``."""
    told: dict[str, Any] = {
        "machine": machine(),
        "held_out": held_out,
        "views": views,
        "rows": [asdict(row) for row in rows],
    }
    told["machine"]["onnxruntime"] = onnxruntime.__version__
    (folder / "results.json").write_text(json.dumps(told, indent=2) + "\n")
    text = PAGE.format(
        cpu=told["machine"]["cpu"],
        threads=told["machine"]["threads"],
        held_out=held_out,
        views=views,
        table=table(rows),
    )
    (folder / "README.md").write_text(text)


def series(count: int, first: int) -> list[Series]:
    """Phantoms with blood."""
    cases = heads.unseen(count, 0, first=first)
    return [Series.of(case.name, case.images, case.spacing_mm[1:], case.thickness_mm, "phantom") for case in cases]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, default=Path("benchmarks/results/precisions"))
    arguments.add_argument("--runs", type=Path, default=Path("runs/study"), help="folders of `benchmarks.study`")
    arguments.add_argument("--heads", type=int, default=9, help="to calibrate on")
    arguments.add_argument(
        "--views", type=int, default=32, help="slices to measure ranges on; half as many to search on"
    )
    arguments.add_argument(
        "--held-out", type=int, default=12, help="to verify on; fewer may not show every class, and prove nothing"
    )
    arguments.add_argument(
        "--dice", type=float, default=Budget().dice, help="least against FP32 that the search may leave to a class"
    )
    arguments.add_argument("runs_named", nargs="*", metavar="RUN", help="default: all that are trained")
    asked = arguments.parse_args()
    names = asked.runs_named or sorted(path.parent.name for path in asked.runs.glob("*/training_s"))
    calibration = series(asked.heads, heads.FIRST_CALIBRATION)
    held_out = series(asked.held_out, heads.FIRST_VERIFICATION)
    asked.out.mkdir(parents=True, exist_ok=True)
    console, rows, budget = Console(), [], Budget(dice=asked.dice)
    for name in names:
        folder = asked.runs / "bundles" / (name if budget == Budget() else f"{name}-{asked.dice}")
        rows += measure(asked.runs / name, calibration, held_out, folder, asked.views, budget)
        console.print(rows[-1])
        write(rows, len(held_out), asked.views, asked.out)


if __name__ == "__main__":
    main()
