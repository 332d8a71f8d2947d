"""Alerts of a whole node: told before the series ends, acknowledged from the command line, and safe from any kill."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import hl7
import pytest

from dicom_node.alerts.ledger import Ledger
from dicom_node.alerts.settings import Hl7
from dicom_node.configuration.toml import show
from dicom_node.operation import trial
from dicom_node.simulation.pacs import Pacs
from dicom_node.simulation.scanner import push
from dicom_node.status import deliveries, look
from dicom_node.storage.journal import Journal
from tests.dicom_node.alerts.listener import Listener, taken
from tests.dicom_node.conftest import Pushable, config_for, running, wait_until
from tests.dicom_node.test_crash import Harness, Studies, studies  # noqa: F401 (a fixture)

pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


def with_listener(config, *listeners: Listener, **changed):
    told = [Hl7(name=f"ed-{n}", host="127.0.0.1", port=each.port, **changed) for n, each in enumerate(listeners)]
    return config.model_copy(update={"hl7": tuple(told)})


def field(message: str, segment: str, number: int) -> str:
    return str(hl7.parse(message).segment(segment)(number))


def command(*arguments: object) -> str:
    program = [sys.executable, "-c", "from scanside import main; main()", *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True, check=True).stdout


def test_a_bleed_is_told_of_before_its_series_ends_and_somebody_takes_notice(
    bleeding: Pushable, tmp_path: Path, pacs: Pacs
):
    with Listener() as listener:
        config = with_listener(config_for(tmp_path / "node", pacs.port), listener)
        config = config.model_copy(update={"web": config.web.model_copy(update={"port": 0})})
        assert [item.message for item in trial.channels(config)] == [f"127.0.0.1:{listener.port} takes connections"]
        with running(config) as node:
            for path in bleeding.paths:  # one association a slice: nothing says that the series ends
                push([path], ("127.0.0.1", node.port), calling_ae="CT1", called_ae="SCANSIDE")
            wait_until(lambda: [one.state for one in look(config).alerts] == ["confirmed"], "the result confirms it")
            wait_until(lambda: not look(config).alerts[0].untold, "all is told")
            (told,) = look(config).alerts
            assert (told.level, told.acknowledged) == ("critical", False)
            path = tmp_path / "node.toml"
            path.write_text(show(config))
            command("alerts", "acknowledge", "1", "--by", "Dr A", "--config", path)
            (listed,) = json.loads(command("alerts", "list", "--json", "--config", path))
            sent = [one.item for one in deliveries(config)]
            with urllib.request.urlopen(f"http://127.0.0.1:{node._web.port}/metrics") as answer:
                answer.read()
            with urllib.request.urlopen(f"http://127.0.0.1:{node._web.port}/metrics") as answer:
                metrics = answer.read().decode()
    statuses = [field(message, "OBR", 25) for message in listener.got]
    assert statuses[0] == "P"
    assert statuses[-1] in "PF"  # the last association brought one slice: its end does not say that all are here
    assert field(listener.got[0], "PID", 3)
    assert "(provisional: the series is still arriving)" in listener.got[0], "the alert came with the result"
    assert listed["acknowledged_by"] == "Dr A"
    assert listed["evidence"]["sr_uid"] in {item.sop_uid for item in sent}
    assert listed["messages"][0]["tried"][0]["outcome"] == "taken"
    assert 'scanside_alerts{level="critical",state="confirmed"} 1.0' in metrics
    assert 'scanside_alert_messages{channel="ed-0",state="sent"}' in metrics
    assert 'scanside_alert_seconds_count{until="sent"} 1.0' in metrics
    assert 'scanside_alert_seconds_count{until="acknowledged"} 1.0' in metrics


def test_a_reload_changes_who_is_told(bleeding: Pushable, tmp_path: Path, pacs: Pacs):
    with Listener() as first, Listener() as second:
        config = with_listener(config_for(tmp_path / "node", pacs.port), first)
        with running(config) as node:
            node.reload(config.model_copy(update={"hl7": (config.hl7[0].model_copy(update={"port": second.port}),)}))
            push(bleeding.paths[8:-8], ("127.0.0.1", node.port), calling_ae="CT1", called_ae="SCANSIDE")
            wait_until(lambda: second.got and not look(config).alerts[0].untold, "the second is told")
    assert first.got == []
    assert len({field(message, "PID", 3) for message in second.got}) == 1


class AlertHarness(Harness):
    """A node that is killed when a listener has just got something, or soon after; the listener dies at times, too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.moment = threading.Event()
        self.weather = random.Random(self.seed + 1)
        self.listener = Listener(self.answer)

    def answer(self, message: str) -> bytes | None:
        self.moment.set()
        time.sleep(self.weather.uniform(0, 0.05))
        return None if self.weather.random() < 0.2 else taken(message)

    def kill(self, node: subprocess.Popen) -> bool:
        self.moment.clear()
        self.moment.wait(2)
        time.sleep(self.random.uniform(0, 0.06))
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()
        self.deaths["node"] += 1
        return True

    def is_done(self) -> bool:
        print(
            "DEBUG",
            time.monotonic(),
            look(self.config).results_unsent,
            [(o.series_uid[-5:], o.state, o.slices_analysed, o.slices_received) for o in look(self.config).series],
            len(self.acknowledged),
        )
        with contextlib.closing(Journal(self.folder / "node" / "journal.sqlite", read_only=True)) as journal:
            states = {message.state for alert in Ledger(journal).alerts() for message in alert.messages}
        return super().is_done() and states == {"sent"}


@pytest.mark.slow  # `test_heralds` kills the channels alone, without a node around them
@pytest.mark.parametrize("kills", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_no_kill_loses_an_alert_or_makes_two_of_it(tmp_path: Path, pacs: Pacs, studies: Studies, kills: int):  # noqa: F811
    seed = 20261129 + kills
    harness = AlertHarness(tmp_path, pacs, seed)
    with harness.listener:
        harness.config = with_listener(harness.config, harness.listener)
        harness.path.write_text(show(harness.config))
        harness.run(kills, studies, scanners=1)
    told = f"seed {seed}: {harness.deaths} deaths, {len(harness.acknowledged)} series, {len(harness.listener.got)} sent"
    print(told)
    with contextlib.closing(Journal(tmp_path / "node" / "journal.sqlite", read_only=True)) as journal:
        alerts = Ledger(journal).alerts()
    assert {alert.series_uid for alert in alerts} == set(harness.acknowledged), told
    assert {message.state for alert in alerts for message in alert.messages} == {"sent"}, told
    got: dict[str, set[str]] = {}
    for message in harness.listener.got:
        got.setdefault(field(message, "MSH", 10), set()).add(message)
    assert got.keys() == {message.control_id for alert in alerts for message in alert.messages}, told
    assert all(len(texts) == 1 for texts in got.values()), f"{told}: two contents under one control id"
    assert harness.deaths["node"] == kills
    assert len(alerts) >= 2
    for alert in alerts:  # each thing is told once, and the last word is the last
        occasions = [message.occasion for message in alert.messages]
        assert len(occasions) == len(set(occasions)), f"{told}: {occasions}"
        assert occasions[0] == "raised"
        assert alert.state == "confirmed"
