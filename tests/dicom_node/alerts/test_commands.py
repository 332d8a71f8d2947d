"""`scanside alerts`, and what `scanside status` has of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from structlog.testing import capture_logs

import scanside
from dicom_node.alerts.ledger import Ledger
from dicom_node.operation import commands
from dicom_node.storage.journal import Journal
from tests.dicom_node.alerts.made import PATIENT, note, report, written


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What is logged goes to stdout where nobody has configured it."""
    with capture_logs():
        yield


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "node.toml"
    path.write_text('[node]\nfolder = "."\n[[hl7]]\nname = "ed"\nhost = "127.0.0.1"\nport = 2575\n')
    return path


@pytest.fixture
def ledger(config: Path, journal: Journal) -> Ledger:
    from dicom_node.configuration.config import load

    return Ledger(journal, load(config).channels)


def test_who_is_told_and_who_has_taken_notice(config: Path, ledger: Ledger, capsys):
    commands.alerts_list(config)
    assert capsys.readouterr().out == "no alert yet\n"
    note(ledger, report(), patient=PATIENT | {"PatientName": "Muster^\x1b[2J"})
    ledger.refused(written(ledger)[0], "not taken (AE): no\x1b]0;patient", None)
    commands.alerts_list(config)
    shown = capsys.readouterr().out
    assert "CRITICAL: Intracerebral haemorrhage 31.2 ml (confirmed by the whole series)" in shown
    assert "NOT ACKNOWLEDGED" in shown
    assert "parked, 1 try: not taken (AE): no" in shown
    assert "\x1b]" not in shown
    assert "\x1b[2J" not in shown
    scanside.status(config)
    shown = capsys.readouterr().out
    assert "alert 1 critical (confirmed)" in shown
    assert "NOT ACKNOWLEDGED; not told yet: ed" in shown
    assert "Muster" not in shown
    commands.alerts_acknowledge(config, 1, by=" Dr A ")
    commands.alerts_retry(config, 1)
    commands.alerts_retry(config, None)
    assert capsys.readouterr().out == "acknowledged: 1\n1 to be tried again\n1 to be tried again\n"
    commands.alerts_list(config)
    assert "by Dr A" in capsys.readouterr().out
    commands.alerts_cancel(config, 1)
    assert "given up" in capsys.readouterr().out
    scanside.status(config)
    assert "alert 1" not in capsys.readouterr().out


def test_json_has_all_of_it(config: Path, ledger: Ledger, capsys):
    note(ledger, report())
    ledger.sent(written(ledger)[0], "AA thanks")
    ledger.acknowledge(1, "Dr A")
    commands.alerts_list(config, as_json=True)
    (told,) = json.loads(capsys.readouterr().out)
    assert told["patient"] == PATIENT
    assert told["acknowledgements"][0]["by"] == "Dr A"
    (message,) = told["messages"]
    assert (message["channel"], message["state"], message["tried"][0]["detail"]) == ("ed", "sent", "AA thanks")
    scanside.status(config, as_json=True)
    shown = capsys.readouterr().out
    assert json.loads(shown)["alerts"] == []


def test_what_is_not_there(config: Path, ledger: Ledger):
    with pytest.raises(SystemExit):
        commands.alerts_acknowledge(config, 1, by="Dr A")
    with pytest.raises(typer.BadParameter):
        commands.alerts_acknowledge(config, 1, by=" ")
    for command in (commands.alerts_retry, commands.alerts_cancel):
        with pytest.raises(SystemExit):
            command(config, 1)
