"""What the commands of the node show on a terminal, in whole identifiers and at any width."""

from __future__ import annotations

import textwrap
import time
from collections import Counter
from datetime import datetime
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from dicom_node.alerts import text
from dicom_node.delivery.outbox import DELIVERED
from runtime.millilitres import said
from runtime.types import IN_PLACE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rich.console import Console

    from dicom_node.alerts.alert import Alert, Message
    from dicom_node.status import Delivery, Series, Status

LEVEL_STYLES = {"critical": "bold red", "urgent": "bold yellow", "incomplete": "bold magenta", "routine": "green"}


def show_status(told: Status, out: Console) -> None:
    """A line for each series, its newest result or what is open of it; below it its UID and what is missing."""
    _show_node(
        out,
        told.node_running,
        {
            "series without a result": sum(one.is_open for one in told.series),
            "results to be sent": told.results_unsent,
            "results to be confirmed": told.results_unconfirmed,
            "results parked": told.results_parked,
        },
    )
    _show_other_nodes(told, out)
    for one in told.alerts:
        what = f"alert {one.id} {one.level} ({one.state}), raised {_clock(one.raised)}: {one.reason}"
        untold = f"; not told yet: {', '.join(one.untold)}" if one.untold else ""
        state = "acknowledged" if one.acknowledged else "NOT ACKNOWLEDGED"
        _say(out, f"{what}; {state}{untold}", style="" if one.acknowledged else LEVEL_STYLES[one.level])
    if told.refusing:
        _say(out, f"slices are refused: {told.refusing}", style="bold red")
    if told.idle:
        _say(out, f"no engine: slices are taken, and wait; {told.idle}", style="bold red")
    newest = {(one.study_uid, one.series_uid): one.revision for one in told.series if not one.is_open}
    # results stand where a later revision has none: what they say must not vanish behind it
    stands = {(one.study_uid, one.series_uid): one.revision for one in told.series if one.decision}
    rows = [
        one
        for one in told.series
        if one.is_open or one.revision in {each.get((one.study_uid, one.series_uid)) for each in (newest, stands)}
    ]
    if not rows:
        out.print("no series yet")
        return
    cells = [((one.node,) if len(told.nodes) > 1 else ()) + _cells(one) for one in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    study_uid = None
    for one, texts in zip(rows, cells, strict=True):
        if one.study_uid != study_uid:
            study_uid = one.study_uid
            _say(out, f"study {study_uid}", style="dim")
        _say_in_columns(out, texts, widths, indent=2, style=LEVEL_STYLES.get((one.decision or {}).get("level", ""), ""))
        _say(out, f"series {one.series_uid}", indent=4, style="dim")
        if one.engine and IN_PLACE in one.engine:
            _say(out, f"engine: {one.engine}", indent=4, style="yellow")
        for sentence in one.missing:
            _say(out, sentence, indent=4, style="yellow" if one.provisional else "dim")


def _show_other_nodes(told: Status, out: Console) -> None:
    """Which nodes share the journal, where there are several."""
    if len(told.nodes) < 2:
        return
    heard = ", ".join(one.name for one in told.nodes if one.lives)
    _say(out, f"nodes heard of: {heard or 'none'}")
    for one in (one for one in told.nodes if not one.lives):
        since = f"is not running, or can't reach the database, since {_clock(one.seen)}"
        _say(out, f"node {one.name} {since}", style="yellow")


def _cells(one: Series) -> tuple[str, ...]:
    """When, state, slices (analysed/received), triage level, what was found."""
    state = {True: "provisional", False: "final", None: one.state.replace("_", " ")}[one.provisional]
    slices = str(one.slices_received) if one.slices_analysed is None else f"{one.slices_analysed}/{one.slices_received}"
    if one.decision is None:
        found = one.reason or "acknowledged, no result yet"
    elif one.findings:
        found = ", ".join(f"{each['class']} {said(each['volume_ml'])}" for each in one.findings)
    else:
        found = one.decision["reason"]
    if one.revision > 1:
        found += f" (revision {one.revision})"
    return _clock(one.composed or one.changed), state, slices, one.decision["level"] if one.decision else "", found


def show_outbox(told: Sequence[Delivery], destinations: Iterable[str], out: Console, *, node_running: bool) -> None:
    """A line for each result under its series; below it the last error, once for a run of the same."""
    states = Counter(one.item.state for one in told)
    parked, unconfirmed = states["parked"], states["unconfirmed"]
    unsent = len(told) - sum(states[each] for each in DELIVERED) - parked - unconfirmed
    owed = {"results to be sent": unsent, "results to be confirmed": unconfirmed, "results parked": parked}
    _show_node(out, node_running, owed)
    if not told:
        out.print("nothing has been owed to anybody yet")
        return
    cells = [(str(o.item.id), o.item.role, o.item.destination, _way(o, destinations, node_running)) for o in told]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def series(pair: tuple[Delivery, object]) -> tuple[str, str, int]:
        return pair[0].item.study_uid, pair[0].item.series_uid, pair[0].item.revision

    for (study_uid, series_uid, revision), pairs in groupby(zip(told, cells, strict=True), series):
        _say(out, f"study {study_uid}", style="dim")
        _say(out, f"series {series_uid}" + (f" (revision {revision})" if revision > 1 else ""), style="dim")
        by_destination = sorted(pairs, key=lambda pair: pair[0].item.destination)  # they share their errors
        for error, run in groupby(by_destination, lambda pair: pair[0].item.last_error):
            for _, texts in run:
                _say_in_columns(out, texts, widths, indent=2)
            if error:
                _say(out, error, indent=4, style="yellow")


def show_alerts(told: Sequence[Alert], channels: Iterable[str], out: Console, *, node_running: bool) -> None:
    """A line for each alert, whose it is, and below it a line for each message with what became of it."""
    if not told:
        out.print("no alert yet")
    for one in told:
        _say(out, f"alert {one.id}  {text.sentence(one)}", style=LEVEL_STYLES[one.level] if one.is_open else "")
        whose = [one.patient[key] for key in ("PatientName", "PatientID", "AccessionNumber") if key in one.patient]
        by = f"acknowledged {_clock(one.acknowledged)} by {one.acknowledged_by}" if one.acknowledged else ""
        taken = by or ("NOT ACKNOWLEDGED" if one.is_open else "not acknowledged")
        _say(out, f"{', '.join(whose) or 'patient not known'}; raised {_clock(one.raised)}; {taken}", indent=2)
        _say(out, f"study {one.study_uid}, series {one.series_uid}", indent=2, style="dim")
        rows = [
            (str(each.id), each.channel, each.occasion, _fate(each, channels, node_running)) for each in one.messages
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            _say_in_columns(out, row, widths, indent=4)


def _fate(message: Message, channels: Iterable[str], node_running: bool) -> str:
    """What became of a message, and of those that are owed when and why."""
    tries = f", {message.attempts} {'try' if message.attempts == 1 else 'tries'}" if message.attempts else ""
    error = f": {message.last_error}" if message.last_error else ""
    if message.state == "sent":
        return f"sent {_clock(message.sent or 0.0)}" + (tries if message.attempts > 1 else "")
    if message.state in ("parked", "cancelled"):
        return f"{message.state}{tries}{error}"
    if message.channel not in channels:
        return f"{message.state}{tries}; its channel is not in the configuration"
    seconds = message.due - time.time()
    if not node_running and seconds < 1:
        return f"{message.state}{tries}; due when the node starts{error}"
    due = f"at {_clock(message.due)}" if seconds >= 120 else f"in {seconds:.0f} s" if seconds >= 1 else "now"
    return f"{message.state}{tries}; due {due}{error}"


def _way(one: Delivery, destinations: Iterable[str], node_running: bool) -> str:
    """Where a result is on its way: sent when, or how often tried and when next."""
    item = one.item
    tries = f", {item.tries} {'try' if item.tries == 1 else 'tries'}" if item.tries else ""
    if item.state in DELIVERED:
        confirmed = f", confirmed {_clock(item.confirmed)}" if item.confirmed else ""
        return f"sent {_clock(item.sent)}{confirmed}" + (tries if item.tries > 1 else "")
    if item.state == "parked":
        return f"parked{tries}"
    if item.destination not in destinations:
        return f"{item.state}{tries}; its destination is not in the configuration"
    if item.state == "sending" and node_running:
        return f"sending{tries}"
    state = item.state if node_running else "waiting"
    if item.state == "unconfirmed":
        state, tries = (
            f"sent {_clock(item.sent)}, unconfirmed",
            f", asked {item.asked} time{'s' * (item.asked > 1)}" if item.asked else "",
        )
    if not node_running:
        return f"{state}{tries}; next when the node starts"
    seconds = one.next_try - time.time()
    return f"{state}{tries}; next {f'in {seconds:.0f} s' if seconds >= 1 else 'now'}"


def _show_node(out: Console, running: bool, owed: Mapping[str, int]) -> None:
    waits = ", ".join(f"{n} {what.replace('results', 'result') if n == 1 else what}" for what, n in owed.items() if n)
    state = "the node is running" if running else "the node is not running"
    _say(out, f"{state}: {waits}" if waits else state, style="bold yellow" if waits and not running else "")


def _say(out: Console, text: str, indent: int = 0, style: str = "") -> None:
    _say_in_columns(out, [text], [], indent, style)


def _say_in_columns(out: Console, texts: Sequence[str], widths: Sequence[int], indent: int, style: str = "") -> None:
    """One row, its last column wrapped within itself. Some words are a peer's: no markup, nothing a terminal obeys."""
    *cells, last = ("".join(each if each.isprintable() else "?" for each in text) for text in texts)
    first = " " * indent + "".join(f"{cell:<{width}}  " for cell, width in zip(cells, widths, strict=False))
    wrap = textwrap.TextWrapper(max(out.width, len(first) + 20), first, " " * len(first), break_on_hyphens=False)
    out.print(wrap.fill(last), style=style, markup=False, highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    """Local time; with the date where that is not today's."""
    at, now = datetime.fromtimestamp(seconds).astimezone(), datetime.now().astimezone()
    return f"{at:%H:%M}" if at.date() == now.date() else f"{at:%m-%d %H:%M}"


def show_demo(told: dict[str, Any], out: Console) -> None:
    """What a demonstration found beside its truth, how long it took, and where everything lies."""
    table = Table("found", "ml", "truth ml", title=f"{told['model']} on {told['backend']}", title_justify="left")
    for finding in told["findings"]:
        table.add_row(finding["class"], f"{finding['volume_ml']:.1f}", f"{finding['truth_ml']:.1f}")
    out.print(table, soft_wrap=False)
    decision = told["decision"]
    level = decision["level"], LEVEL_STYLES[decision["level"]]
    out.print(Text.assemble("triage: ", level, f" ({decision['reason']})"))
    if told["provisional"]:
        out.print(f"provisional: {'; '.join(told['missing'])}", style="yellow", highlight=False)
    times = told["timings_ms"]
    out.print(
        f"  {told['slices']} slices pushed in {times['push']:.0f} ms, {told['slices_per_s']:.0f} a second",
        highlight=False,
    )
    out.print(f"  last slice acknowledged -> findings       {times['last_slice_to_findings']:7.0f} ms", highlight=False)
    out.print(f"  last slice acknowledged -> all in the PACS {times['last_slice_to_pacs']:6.0f} ms", highlight=False)
    for role in ("sr", "sc", "seg"):
        out.print(f"  {role.upper():<4} {told['pacs'][role]}", highlight=False)
    for picture in told["pictures"]:
        out.print(f"  look at {picture}", highlight=False)
    out.print(
        "Synthetic phantom, model trained on phantoms alone. Research use only; not a medical device.", style="dim"
    )


def show_series(one: dict[str, Any], out: Console) -> None:
    """What `scanside analyse` found in one series, or why it found nothing."""
    state = one["state"].replace("_", " ")
    out.print(f"series {one['series_uid'] or 'without a UID'}: {one['files']} files, {state}", highlight=False)
    for each in one["refused"][:5]:
        out.print(f"  not analysed: {each['path']}: {each['reason']}", style="yellow", markup=False, highlight=False)
    if len(one["refused"]) > 5:
        out.print(f"  and {len(one['refused']) - 5} more: see --json", style="yellow", highlight=False)
    report = one["report"]
    if report is None:
        out.print(f"  {one['reason']}", style="yellow", markup=False, highlight=False)
        return
    for finding in report["findings"]:
        out.print(f"  {finding['name']} {said(finding['volume_ml'])}", highlight=False)
    if not report["findings"]:
        out.print("  no haemorrhage found")
    out.print(f"  triage: {report['decision']['level']} ({report['decision']['reason']})", highlight=False)
    for sentence in report["missing"]:
        out.print(
            f"  {'provisional' if report['provisional'] else 'note'}: {sentence}", style="yellow", highlight=False
        )
    out.print(f"  trained on: {report['model']['training_data']}", style="dim", highlight=False)
    out.print(f"  results in {one['folder']}", highlight=False)
