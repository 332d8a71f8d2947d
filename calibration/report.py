"""What calibration and verification found, for people: tables, and a picture of the search."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from calibration.calibrate import Calibrated
    from runtime.verdict import Verdict

BLUE, ORANGE, GREY = "#2f6db5", "#d9822b", "#8a8f98"


def rows(made: Calibrated) -> list[dict[str, str]]:
    """One row for each precision that calibration made."""
    told = made.report["precisions"]
    table = [{"precision": "fp16", "ranges": "", "layers": "", "kept FP32": str(len(told["fp16"]["kept_fp32"]))}]
    table[0] |= {"worst Dice": "", "area change": "", "inside budget": ""}
    for name, one in told.items():
        if name == "fp16":
            continue
        dice, area = one["dice_against_fp32"], one["area_change_percent"]
        table.append(
            {
                "precision": name,
                "ranges": one["method"],
                "layers": str(one["layers"]),
                "kept FP32": str(len(one["left_out"])),
                "worst Dice": f"{min(dice.values()):.4f}",
                "area change": f"{max(area.values(), key=abs):+.2f} %",
                "inside budget": "yes" if one["inside_budget"] else "no",
            }
        )
    return table


def verdict_rows(verdicts: Mapping[str, Verdict]) -> list[dict[str, str]]:
    """One row for each precision that was judged."""
    table = []
    for name, one in verdicts.items():
        figures: Mapping[str, Any] = one.figures
        volume, dice = figures.get("worst_volume_change"), figures.get("dice")
        lost, invented = figures.get("small_lesions_lost"), figures.get("small_lesions_invented")
        mean, most = figures.get("logit_mean_difference"), figures.get("logit_largest_difference")
        table.append(
            {
                "precision": name,
                "verdict": "passed" if one.passed else "FAILED" if one.is_decided else "none",
                "worst Dice": f"{min(dice.values()):.4f}" if dice else "",
                "worst volume change": f"{volume['ml']:.2f} of {volume['reference_ml']:.1f} ml" if volume else "",
                "small lesions lost, invented": "" if lost is None else f"{lost}, {invented}",
                "decisions flipped": str(figures.get("decisions_flipped", "")),
                "logits, mean and most": "" if mean is None else f"{mean:.3f}, {most:.2f}",
            }
        )
    return table


def write(made: Calibrated, folder: Path) -> None:
    """``calibration.json``, ``calibration.md`` and ``sensitivity.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "calibration.json").write_text(json.dumps(made.report, indent=2) + "\n")
    (folder / "calibration.md").write_text(_page(made))
    draw(made.report, folder / "sensitivity.png")


def _page(made: Calibrated) -> str:
    head, *_ = table = rows(made)
    lines = [list(head), ["---"] * len(head), *(list(row.values()) for row in table)]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    for name, one in made.report["precisions"].items():
        out = ", ".join(f"`{layer}`" for layer in one.get("left_out", one.get("kept_fp32"))) or "none"
        text += f"\n`{name}`: left in FP32: {out}.\n"
    return text + "\n![Each layer alone, and the search](sensitivity.png)\n"


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Left: what each layer alone loses, in the order of the network. Right: what is lost as layers are given up."""
    from matplotlib.figure import Figure  # noqa: PLC0415  # a second to import
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    searched = {name: one for name, one in report["precisions"].items() if "loss_alone" in one}
    figure = Figure(figsize=(11, 3.2 * len(searched)), dpi=130, layout="constrained")
    panels = figure.subplots(len(searched), 2, squeeze=False, width_ratios=(3, 2))
    for (left, right), (name, one) in zip(panels, searched.items(), strict=True):
        order, alone, losses = one["order"], one["loss_alone"], one["loss_by_layers_left_out"]
        colours = [ORANGE if layer in one["left_out"] else BLUE for layer in order]
        left.bar(range(len(order)), [max(alone[layer], 1e-6) for layer in order], color=colours)
        left.set(yscale="log", title=f"{name}: each layer alone in 8 bits (orange: stays FP32)")
        left.set(xlabel="layer, from the input to the output", ylabel="1 - Dice of the worst class")
        right.plot(range(len(losses)), losses, marker="o", color=BLUE)
        right.axhline(one["limit"], color=GREY, linestyle="--", label="what the search may spend")
        right.set(title="all layers, but the worst ones", xlabel="layers left in FP32", xlim=(-0.5, len(losses) - 0.5))
        right.set_ylim(bottom=0)
        right.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        right.legend(loc="lower left")
    figure.savefig(path)
