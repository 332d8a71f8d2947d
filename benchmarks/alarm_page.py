"""What `benchmarks.alarms` found, for people: a page and two pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import binomtest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

PAGE = """# Alarms

Made by `python -m benchmarks.alarms` with {name} {version} on {cpu}, {threads} threads. Synthetic phantoms only: these
figures say nothing about human heads.

## Dampers

An alarm is a head without blood whose report is urgent or critical, by the usual rules ({rules}). "Hard"
heads have calcifications, old cavities, metal, motion and pale blood. {grid} operating points, the same for every
class, were tried on {chosen_clean} heads without blood and {chosen_bleeding} with it. Of those that lose no bleed of
1 ml or more that is found without dampers, the one with the fewest alarms is {uniform}. Classes in which it takes away
no alarm keep what they had, {before}; so chosen is: **{chosen}**. This is what it does on other heads, {told_clean}
without blood and {told_bleeding} with it:

{dampers}
In brackets: 95 % (Wilson). Bleeds are counted by class and head, as found where their own class is a finding.
"Uniform" is the same point for every class. That classes are told apart was thought of when it had cost a bleed of the
second set's ordinary heads (1.7 ml of subarachnoid blood, drawn in one slice), which "chosen" keeps: so for these the
figures flatter it a little.

Of these heads, {raised} without blood raise an alarm while they arrive, {withdrawn} of which the report withdraws. No
damper helps against metal: by what makes the hard heads hard, alarms of heads without blood are

| metal | motion, no metal | calcifications and old cavities alone |
|---:|---:|---:|
| {metal[0]} of {metal[1]} | {motion[0]} of {motion[1]} | {neither[0]} of {neither[1]} |

A clip's streaks are drawn as several millilitres of several classes in slices beside each other. A minimum volume that
takes them for what they are loses as much true blood.

What each damper does by itself, on the heads it was chosen on:

{alone}
A minimum probability does nothing up to 0.99: the highest probability of what the network finds is 1.00 nearly always,
wrong or right.

![alarms and lost bleeds over operating points](sweep.png)

## How early an alert is

Slices come from the base up. Of the {bleeding} heads with blood of the second set, {alerted} alert, {early} before
their last slice; {same} say their final level before it, and {over} a higher one than the report at the end. In slices,
from the first that shows blood, which is 1 (nothing is told of fewer than {min_slices} slices in all):

| | median | 10 % to 90 % |
|---|---:|---:|
{in_slices}
On the clock, {clocked} ordinary heads pushed at 20 slices a second to `scanside serve`, one after the other, its
worker on the processor; seconds from when the first slice that shows blood was acknowledged. {in_time} alert before
their last slice is acknowledged: where the network is slower than the scanner, slices wait for it, and so does the
alert.

| | median | 10 % to 90 % |
|---|---:|---:|
{on_the_clock}
![first alert, last slice and results](clock.png)
"""


def page(found: dict[str, Any]) -> str:
    told, chosen_on = found["told_of"], found["chosen_on"]
    heads = [one for one in found["in_slices"] if one["bleeds"]]
    clean = [one for one in found["in_slices"] if not one["bleeds"]]
    clock = found["on_the_clock"]
    return PAGE.format(
        **found["bundle"],
        **found["machine"],
        rules="; ".join(found["rules"]),
        grid=len(found["sweep"]),
        chosen_clean=chosen_on["before"]["all"]["bleed_free"],
        chosen_bleeding=chosen_on["before"]["all"]["bleeding"],
        told_clean=told["before"]["all"]["bleed_free"],
        told_bleeding=told["before"]["all"]["bleeding"],
        chosen=found["chosen"],
        uniform=found["uniform"],
        before=found["before"],
        dampers=_dampers(told),
        raised=sum(one["highest_early"] is not None for one in clean),
        withdrawn=sum(one["highest_early"] is not None and one["final"] is None for one in clean),
        metal=found["trouble"]["metal"],
        motion=found["trouble"]["motion, no metal"],
        neither=found["trouble"]["neither"],
        alone=_alone(found["sweep"]),
        bleeding=len(heads),
        alerted=sum(one["final"] is not None for one in heads),
        early=sum(_is_before_the_end(one, "to_first_alert") for one in heads),
        same=sum(_is_before_the_end(one, "to_final_level") for one in heads),
        over=sum(one["highest_early"] == "critical" != one["final"] for one in heads),
        min_slices=found["min_slices"],
        in_slices="".join(
            _row(what, [one[key] for one in heads])
            for what, key in (
                ("the first alert", "to_first_alert"),
                ("the final level", "to_final_level"),
                ("the last slice", "to_the_end"),
            )
        ),
        clocked=len(clock),
        in_time=sum(one["first_alert_s"] is not None and one["first_alert_s"] < one["last_slice_s"] for one in clock),
        on_the_clock="".join(
            _row(what, [one[key] for one in clock], 2)
            for what, key in (
                ("the first alert", "first_alert_s"),
                ("the final level, where it is another", "final_level_s"),
                ("the last slice is acknowledged", "last_slice_s"),
                ("the series is complete", "closed_s"),
                ("results are on the disk", "results_s"),
            )
        ),
    )


def _is_before_the_end(one: dict[str, Any], key: str) -> bool:
    return one[key] is not None and one[key] < one["to_the_end"]


def _row(what: str, values: Iterable[float | None], digits: int = 0) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return f"| {what} | | |\n"
    low, middle, high = np.percentile(known, (10, 50, 90))
    return f"| {what} | {middle:.{digits}f} | {low:.{digits}f} to {high:.{digits}f} |\n"


def _dampers(told: dict[str, Any]) -> str:
    rows = [["heads", "", "without an alarm (specificity)", "critical alarms", "with blood that alert"]]
    strata = told["before"]["all"]["lesions"]
    rows[0] += [f"bleeds of {_size(one)} found" for one in strata]
    rows.append(["---"] * len(rows[0]))
    for kind in ("ordinary", "hard", "all"):
        for when in ("before", "uniform", "chosen"):
            one = told[when][kind]
            count, of = one["without_alarm"], one["bleed_free"]
            within = binomtest(count, of).proportion_ci(method="wilson")
            rows.append(
                [
                    kind,
                    when,
                    f"{count} of {of}, {count / of:.1%} ({within.low:.1%} to {within.high:.1%})",
                    str(one["critical"]),
                    f"{one['bleeding_with_alarm']} of {one['bleeding']}",
                    *(f"{stratum['found']} of {stratum['lesions']}" for stratum in one["lesions"]),
                ]
            )
    return _table(rows)


def _alone(sweep: Sequence[dict[str, Any]]) -> str:
    """Rows of the sweep in which one damper alone is on."""
    rows = [
        ["operating point", "ordinary: without an alarm", "hard: without an alarm", "bleeds of 1 to 5 ml", "larger"]
    ]
    rows.append(["---"] * len(rows[0]))
    for row in sweep:
        volume_ml, probability, slices = row["point"].values()
        if ((volume_ml != 0.5) + (probability > 0) + (slices > 1)) > 1:
            continue
        small, *large = row["all"]["lesions"]
        rows.append(
            [
                row["words"],
                *(f"{row[kind]['without_alarm']} of {row[kind]['bleed_free']}" for kind in ("ordinary", "hard")),
                f"{small['found']} of {small['lesions']}",
                f"{sum(one['found'] for one in large)} of {sum(one['lesions'] for one in large)}",
            ]
        )
    return _table(rows)


def _size(stratum: dict[str, Any]) -> str:
    if stratum["to_ml"] is None:
        return f"{stratum['from_ml']:g} ml or more"
    return f"{stratum['from_ml']:g} to {stratum['to_ml']:g} ml"


def _table(rows: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def draw_sweep(found: dict[str, Any], path: Path) -> None:
    """Alarms, and bleeds that are not found, over the minimum volume; a line for each number of neighbours."""
    from matplotlib.figure import Figure  # noqa: PLC0415  # a second to import

    figure = Figure(figsize=(9, 3.4), dpi=120, layout="constrained")
    alarms, lost = figure.subplots(1, 2)
    for slices, style in ((1, "-"), (2, "--"), (3, ":")):
        rows = [
            row
            for row in found["sweep"]
            if row["point"]["minimum_slices"] == slices and not row["point"]["minimum_probability"]
        ]
        at = [row["point"]["minimum_volume_ml"] for row in rows]
        for kind, colour in (("ordinary", "#1f77b4"), ("hard", "#d62728")):
            share = [100 * (1 - row[kind]["without_alarm"] / row[kind]["bleed_free"]) for row in rows]
            alarms.plot(at, share, style, color=colour, label=f"{kind}, {slices} in a row", marker="o", markersize=3)
            small = [row[kind]["lesions"][0] for row in rows]
            missed = [100 * (1 - one["found"] / max(1, one["lesions"])) for one in small]
            lost.plot(at, missed, style, color=colour, marker="o", markersize=3)
    alarms.set(xlabel="minimum volume, ml", ylabel="heads without blood that alarm, %", ylim=(0, None))
    lost.set(xlabel="minimum volume, ml", ylabel="bleeds of 1 to 5 ml not found, %", ylim=(0, None))
    for axes in (alarms, lost):
        axes.spines[["top", "right"]].set_visible(False)
    alarms.legend(frameon=False, fontsize=7)
    figure.savefig(path)


def draw_clock(found: dict[str, Any], path: Path) -> None:
    """For each head that was pushed: first blood at 0, first alert, last slice, results on the disk."""
    from matplotlib.figure import Figure  # noqa: PLC0415  # a second to import

    clock = sorted(found["on_the_clock"], key=lambda one: one["last_slice_s"])
    figure = Figure(figsize=(8, 0.4 + 0.16 * len(clock) + 0.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for row, one in enumerate(clock):
        axes.plot([0, one["results_s"]], [row, row], color="#cccccc", linewidth=2, zorder=1)
    marks = (
        ("first_alert_s", "first alert", "#d62728", "o"),
        ("final_level_s", "final level", "#ff9896", "."),
        ("last_slice_s", "last slice", "#1f77b4", "|"),
        ("results_s", "results", "#2ca02c", "|"),
    )
    for key, name, colour, marker in marks:
        pairs = [(one[key], row) for row, one in enumerate(clock) if one[key] is not None]
        if pairs:
            axes.scatter(*zip(*pairs, strict=True), color=colour, marker=marker, label=name, zorder=2)
    axes.set(xlabel="seconds after the first slice that shows blood", yticks=[], ylabel="heads")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7)
    figure.savefig(path)
