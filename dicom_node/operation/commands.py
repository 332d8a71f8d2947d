"""Commands about what a node owes: `scanside outbox`, and `scanside alerts`; and how all commands speak."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

if TYPE_CHECKING:
    from dicom_node.alerts.alert import Alert
    from dicom_node.alerts.ledger import Ledger
    from dicom_node.delivery.outbox import Outbox

outbox = typer.Typer(help="What the node still owes to its destinations.", no_args_is_help=True)
alerts = typer.Typer(help="Alerts: who has been told, who has acknowledged.", no_args_is_help=True)

# no markup: paths and the words of others have brackets of their own. A path in a log is one piece
out = Console(width=None if sys.stdout.isatty() else 160, soft_wrap=True, markup=False)
err = Console(stderr=True, markup=False)

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout and nothing else.")]
ConfigFile = Annotated[Path, typer.Option("--config", help="Configuration, see `scanside config --example`.")]
Days = Annotated[float, typer.Option(min=0, help="How far back; what is open or owed is told in any case.")]


def end(message: str, code: int) -> NoReturn:
    """End with a user's error in one line."""
    err.print(f"scanside: {message}", style="bold red", highlight=False, soft_wrap=True)
    sys.exit(code)


@outbox.command("list")
def outbox_list(config: ConfigFile, days: Days = 1.0, as_json: Json = False) -> None:
    """Every result and where it stands on its way."""
    from dicom_node import status as looks
    from dicom_node.configuration import config as configuration
    from dicom_node.operation import tables
    from dicom_node.storage import lock

    settings = configuration.load(config)
    told = looks.deliveries(settings, days)
    if as_json:
        print(json.dumps([one.told() for one in told], indent=2))
    else:
        names = {one.name for one in settings.destinations}
        tables.show_outbox(told, names, out, node_running=lock.is_locked(settings.node.folder))


@outbox.command("retry")
def outbox_retry(
    config: ConfigFile, item: Annotated[int | None, typer.Argument(help="Its id; default: all that are parked.")] = None
) -> None:
    """Send results again, from a clean slate: all that are parked, or one, whatever became of it."""
    count = _outbox(config).retry(item)
    if item is not None and not count:
        end(f"no such result {item}, or it is being sent: see `scanside outbox list`", 1)
    out.print(f"{count} queued again")


@outbox.command("park")
def outbox_park(config: ConfigFile, item: Annotated[int, typer.Argument(help="Its id.")]) -> None:
    """Take a result out of the sender's way until it is retried."""
    if not _outbox(config).park(item, "parked by hand"):
        end(f"no result {item} that is unsent or unconfirmed: see `scanside outbox list`", 1)
    out.print(f"parked: {item}, until `scanside outbox retry {item}`", highlight=False)


@alerts.command("list")
def alerts_list(config: ConfigFile, as_json: Json = False) -> None:
    """Every alert, newest first: whose head it is, who has been told, who has acknowledged."""
    import contextlib

    from dicom_node import status as looks
    from dicom_node.alerts.ledger import Ledger
    from dicom_node.configuration import config as configuration
    from dicom_node.operation import tables
    from dicom_node.storage import lock

    settings = configuration.load(config)
    with contextlib.closing(looks.open_journal(settings, read_only=True)) as journal:
        ledger = Ledger(journal)
        told = ledger.alerts()
        if as_json:
            print(json.dumps([_told(one, ledger) for one in told], indent=2))
        else:
            running = lock.is_locked(settings.node.folder)
            tables.show_alerts(told, {one.name for one in settings.channels}, out, node_running=running)


@alerts.command("acknowledge")
def alerts_acknowledge(
    config: ConfigFile,
    alert: Annotated[int, typer.Argument(help="Its id.")],
    by: Annotated[str, typer.Option("--by", help="Who takes notice.")],
) -> None:
    """Take notice of an alert: nobody else is told by escalation."""
    if not by.strip():
        raise typer.BadParameter("--by needs a name")
    ledger = _ledger(config)
    if not ledger.acknowledge(alert, by.strip()):
        known = next((one for one in ledger.alerts() if one.id == alert), None)
        if known is None:
            end(f"there is no alert {alert}: see `scanside alerts list`", 1)
        end(f"alert {alert} has been acknowledged already, by {known.acknowledged_by}", 1)
    out.print(f"acknowledged: {alert}", highlight=False)


@alerts.command("retry")
def alerts_retry(
    config: ConfigFile,
    message: Annotated[int | None, typer.Argument(help="Its id; default: all that are parked or wait.")] = None,
) -> None:
    """Try messages now that have not been taken, under their old control ids."""
    count = _ledger(config).retry(message)
    if message is not None and not count:
        end(f"no message {message} that is parked or waits: see `scanside alerts list`", 1)
    out.print(f"{count} to be tried again")


@alerts.command("cancel")
def alerts_cancel(config: ConfigFile, message: Annotated[int, typer.Argument(help="Its id.")]) -> None:
    """Give a message up, such as one for a channel that is not configured any more."""
    if not _ledger(config).cancel(message):
        end(f"no message {message} that has not been sent: see `scanside alerts list`", 1)
    out.print(f"given up: {message}", highlight=False)


def _told(alert: Alert, ledger: Ledger) -> dict[str, Any]:
    """What `--json` has of an alert: all of it, with each attempt of each message."""
    import dataclasses

    messages = [{**dataclasses.asdict(one), "tried": ledger.attempts(one.id)} for one in alert.messages]
    given = [one for one in ledger.acknowledgements() if one["alert_id"] == alert.id]
    return {**dataclasses.asdict(alert), "messages": messages, "acknowledgements": given, "is_open": alert.is_open}


def _outbox(config: Path) -> Outbox:
    from dicom_node import status as looks
    from dicom_node.configuration import config as configuration
    from dicom_node.delivery.outbox import Outbox

    return Outbox(looks.open_journal(configuration.load(config), read_only=False))


def _ledger(config: Path) -> Ledger:
    from dicom_node import status as looks
    from dicom_node.alerts.ledger import Ledger
    from dicom_node.configuration import config as configuration

    settings = configuration.load(config)
    return Ledger(looks.open_journal(settings, read_only=False), settings.channels)
