"""What monitoring sees of a node: of one that works, of one that is ill, and nothing of patients."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING

import httpx
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from pydicom import dcmread

from dicom_node.configuration.sections import Web as Settings
from dicom_node.delivery.outbox import Outbox
from dicom_node.monitoring import http_server
from dicom_node.monitoring.http_server import HttpServer
from dicom_node.monitoring.metrics import BUCKETS_S
from dicom_node.monitoring.web import Web, WebError
from dicom_node.node import Node
from dicom_node.simulation.pacs import Pacs
from dicom_node.simulation.scanner import push
from tests.dicom_node.conftest import Pushable, config_for, running, wait_until

if TYPE_CHECKING:
    from pathlib import Path


def scraped(url: str) -> dict[tuple[str, ...], float]:
    """Values by name and labels' values, in the order of the labels' names."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").raise_for_status().text)
    return {
        (one.name, *(one.labels[label] for label in sorted(one.labels))): one.value
        for family in families
        for one in family.samples
    }


def with_web(folder: Path, pacs: Pacs):
    return config_for(folder, pacs.port).model_copy(update={"web": Settings(port=0)})


def test_a_series_is_counted_and_timed_from_its_first_slice_to_the_archive(
    bleeding: Pushable, tmp_path: Path, pacs: Pacs
):
    with running(with_web(tmp_path / "node", pacs)) as node:
        url = f"http://127.0.0.1:{node._web.port}"
        well = {"desk": "ok", "receiver": "ok", "sender": "ok", "heralds": "ok"}
        assert httpx.get(f"{url}/healthz").json() == well
        ready = httpx.get(f"{url}/readyz")
        assert (ready.status_code, ready.json()) == (200, well | {"worker": "ok", "journal": "ok", "disk": "ok"})
        before = scraped(url)
        assert before["scanside_worker_ready",] == 1
        assert before["scanside_journal_up",] == 1
        sent = push(bleeding.paths, ("127.0.0.1", node.port), calling_ae="CT1", called_ae="SCANSIDE")
        assert not sent.failed
        wait_until(lambda: len(Outbox(node._journal).items()) and not pending(node), "results in the archive")
        told = scraped(url)
        page = httpx.get(f"{url}/metrics").text

    count = len(bleeding.paths)
    assert told["scanside_instances_total", "new"] == count
    assert told["scanside_associations_total", "released"] == 1
    assert told["scanside_series_total", "", "analysed"] == 1
    assert told["scanside_decisions_total", "critical"] == 1
    assert told["scanside_series_open",] == 0
    assert told["scanside_disk_free_bytes",] > 1e8
    for stage, times in {"response": count, "analysis": count, "closing": 1, "results": 1}.items():
        assert told["scanside_stage_seconds_count", stage] == times, stage
    assert told["scanside_stage_seconds_count", "delivery"] == len(node_results(tmp_path))
    assert ("scanside_stage_seconds_bucket", str(float(BUCKETS_S[0])), "results") in told
    source = dcmread(bleeding.paths[0])
    for private in (source.PatientID, str(source.PatientName), source.StudyInstanceUID, source.SeriesInstanceUID):
        assert private not in page


def pending(node: Node) -> list:
    return [item for item in Outbox(node._journal).items() if item.state != "sent"]


def node_results(folder: Path) -> list[Path]:
    return list((folder / "node" / "results").rglob("*.dcm"))


def test_what_was_not_analysed_is_counted_by_its_reason(bleeding: Pushable, tmp_path: Path, pacs: Pacs):
    folder = tmp_path / "scout"
    folder.mkdir()
    for number, path in enumerate(bleeding.paths[:6]):
        image = dcmread(path)
        image.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        image.save_as(folder / f"{number}.dcm")
    with running(with_web(tmp_path / "node", pacs)) as node:
        push(sorted(folder.iterdir()), ("127.0.0.1", node.port), calling_ae="CT1", called_ae="SCANSIDE")
        wait_until(node._journal.series, "its record")
        told = scraped(f"http://127.0.0.1:{node._web.port}")
    assert told["scanside_images_not_analysed_total", "LOCALIZER"] == 6
    assert told["scanside_series_total", "LOCALIZER", "not_analysed"] == 1


def test_without_a_worker_a_node_is_healthy_and_not_ready(tmp_path: Path, pacs: Pacs):
    with running(with_web(tmp_path / "node", pacs)) as node:
        url = f"http://127.0.0.1:{node._web.port}"
        node.supervisor.kill()
        wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 503, "a node that is not ready")
        assert httpx.get(f"{url}/healthz").status_code == 200
        wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 200, "another worker")
        assert scraped(url)["scanside_worker_deaths_total",] == 1


class Ill:
    """A node whose desk hangs."""

    def health(self) -> dict[str, str]:
        return {"desk": "gives no answer within 5 s"}

    def readiness(self) -> dict[str, str]:
        return self.health() | {"disk": ""}


def test_what_is_wrong_is_said():
    web = Web(Ill(), CollectorRegistry(), "127.0.0.1", 0)
    web.start()
    try:
        answer = httpx.get(f"http://127.0.0.1:{web.port}/readyz")
        assert (answer.status_code, answer.json()) == (503, {"desk": "gives no answer within 5 s", "disk": "ok"})
        assert httpx.get(f"http://127.0.0.1:{web.port}/nothing").status_code == 404
    finally:
        web.stop()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{web._requested or 1}/healthz")


def test_a_web_port_in_use_is_named_and_the_node_does_not_start(tmp_path: Path, pacs: Pacs):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = config_for(tmp_path / "node", pacs.port).model_copy(update={"web": Settings(port=port)})
        node = Node(config)
        with pytest.raises(WebError, match=rf"{port} \(Address already in use\): .* set another web\.port"):
            node.start()


def test_a_port_that_nobody_asks_wakes_nobody_and_closes_at_once(monkeypatch: pytest.MonkeyPatch):
    ticks, tick = [], HttpServer.on_tick
    monkeypatch.setattr(http_server, "TICK_S", 3600)
    monkeypatch.setattr(HttpServer, "on_tick", lambda self, counter: ticks.append(counter) or tick(self, counter))
    web = Web(Ill(), CollectorRegistry(), "127.0.0.1", 0)
    web.start()
    assert httpx.get(f"http://127.0.0.1:{web.port}/healthz").status_code == 503
    time.sleep(0.5)
    assert len(ticks) == 1
    web.stop()
    assert len(ticks) == 2
