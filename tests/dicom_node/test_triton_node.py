"""A node whose model is on a server: the server dies while slices come, and nothing that was acknowledged is lost."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydicom import dcmread
from rich.console import Console
from structlog.testing import capture_logs

from benchmarks.tritonserver import TritonServer
from dicom_node.analysis.analyser import Analyser
from dicom_node.analysis.series import Series
from dicom_node.assembler import Assembler
from dicom_node.configuration.config import Config
from dicom_node.dispatch import Dispatch
from dicom_node.monitoring import nameplate
from dicom_node.monitoring.metrics import Metrics
from dicom_node.node import Node
from dicom_node.operation.tables import show_status
from dicom_node.simulation.pacs import Pacs
from dicom_node.simulation.scanner import push
from dicom_node.status import look
from runtime.bundle import open_bundle
from runtime.errors import BackendError
from runtime.session import open_session
from runtime.types import IN_PLACE
from tests.dicom_node.conftest import Pushable, config_for, running, wait_until
from tests.runtime.triton_servers import repository, started


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repository(tmp_path_factory.mktemp("models"))


@pytest.fixture
def server(models: Path, tmp_path: Path) -> Iterator[TritonServer]:
    with started(models, tmp_path / "triton") as one:
        yield one


@pytest.fixture(scope="module")
def volumes_ml(bleeding: Pushable, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """What the local engine makes of the head."""
    session = open_session(open_bundle(), "onnxruntime")
    analyser = Analyser(open_bundle(), session, (), min_slices=5, min_coverage_mm=100, max_batch=4)
    series = Series()
    analyser.feed(series, bleeding.paths)
    outcome = analyser.close(series, tmp_path_factory.mktemp("local"), revision=1, missing=())
    return {one.name: one.volume_ml for one in outcome.report.findings}


def config(folder: Path, pacs: Pacs, address: str, fail_over: str | None) -> Config:
    served = {"servers": (address,), "deadline_s": 7, "fail_over": fail_over}
    told = config_for(folder / "node", pacs.port).model_dump()
    return Config.model_validate(told | {"model": told["model"] | {"backend": "triton"}, "triton": served})


def push_and_kill(bleeding: Pushable, node: Node, server: TritonServer) -> None:
    """Push a head whose server dies once it has answered some slices."""
    half = len(bleeding.paths) // 2

    def seen() -> int:
        return next((seen for seen, _ in node.progress().values()), 0)

    def kill(_: object, sent: list[object] = []) -> None:  # noqa: B006  # it counts
        sent.append(None)
        if len(sent) == half:
            wait_until(lambda: seen() > 2, "slices that the server has answered")
            server.kill()

    report = push(bleeding.paths, ("127.0.0.1", node.port), calling_ae="CT1", called_ae="SCANSIDE", on_slice=kill)
    assert len(report.sent) == len(bleeding.paths)
    assert not report.failed


def only_report(folder: Path) -> dict:
    (path,) = (folder / "node" / "results").glob("*/*/revision-1/report.json")
    return json.loads(path.read_text())


def has_result(folder: Path) -> bool:
    return any((folder / "node" / "results").glob("*/*/revision-1/sr.dcm"))


def test_the_local_engine_stands_in_and_every_result_says_so(
    bleeding: Pushable, volumes_ml: dict, server: TritonServer, pacs: Pacs, tmp_path: Path, capsys
):
    settings = config(tmp_path, pacs, server.grpc, "onnxruntime")
    with capture_logs() as logs, running(settings) as node:
        wait_until(lambda: nameplate.read(tmp_path / "node"), "a desk that has heard of its worker")
        assert nameplate.read(tmp_path / "node")["backend"] == "triton 2.51.0 python"
        push_and_kill(bleeding, node, server)
        wait_until(lambda: has_result(tmp_path), "a result")
        wait_until(lambda: look(settings).series and not look(settings).series[0].is_open, "its record")
        assert IN_PLACE in nameplate.read(tmp_path / "node")["backend"]
    report = only_report(tmp_path)
    engine = report["model"]["backend"]
    assert engine.count(" by ") == 2
    assert " slices by triton 2.51.0 python, fp32; " in engine
    assert f"{IN_PLACE} triton, fp32" in engine
    assert sum(int(part.split()[0]) for part in engine.split("; ")) == report["slices"] == len(bleeding.paths)
    assert not report["provisional"]
    assert {one["name"]: one["volume_ml"] for one in report["findings"]} == pytest.approx(volumes_ml)
    (sr,) = (tmp_path / "node" / "results").glob("*/*/revision-1/sr.dcm")
    texts = [element.value for element in dcmread(sr).iterall() if element.keyword == "TextValue"]
    assert f"backend={engine}" in texts
    (seg,) = (tmp_path / "node" / "results").glob("*/*/revision-1/seg.dcm")
    assert any(engine in str(element.value) for element in dcmread(seg).iterall() if element.VR in ("LT", "UT"))
    (changed,) = (one for one in logs if one["event"] == "engine_changed")
    assert changed["why"].startswith(f"fail-over: {server.grpc}")
    assert [one["server"] for one in logs if one["event"] == "server_lost"] == [server.grpc]
    (told,) = look(settings).series
    assert told.engine == engine
    show_status(look(settings), Console(width=400))
    assert f"engine: {engine}" in capsys.readouterr().out


def test_without_a_local_engine_the_series_waits_for_the_server(
    bleeding: Pushable, volumes_ml: dict, server: TritonServer, pacs: Pacs, tmp_path: Path, capsys
):
    settings = config(tmp_path, pacs, server.grpc, None)
    with capture_logs() as logs, running(settings) as node:
        push_and_kill(bleeding, node, server)
        wait_until(lambda: any(one["event"] == "worker_broken" for one in logs), "a worker without a server")
        wait_until(lambda: not node.progress() or node.readiness()["worker"], "a node that is not ready")
        assert server.grpc in look(settings).idle
        show_status(look(settings), Console(width=400))
        assert "no engine: slices are taken, and wait; " in capsys.readouterr().out
        time.sleep(settings.series.idle_timeout_s)  # the series closes meanwhile
        assert not has_result(tmp_path)
        server.start()
        wait_until(lambda: has_result(tmp_path), "a result")
    report = only_report(tmp_path)
    assert report["model"]["backend"] == "triton 2.51.0 python"
    assert report["slices"] == len(bleeding.paths)
    assert not report["provisional"]
    assert {one["name"]: one["volume_ml"] for one in report["findings"]} == pytest.approx(volumes_ml)
    broken = [one["error"] for one in logs if one["event"] == "worker_broken"]
    assert any(server.grpc in one for one in broken)


def told(what: str, servers: dict[str, str], backend: str = "triton 2.51.0 python") -> dict:
    """Who answers, as a worker says it."""
    return {"is": what, "worker": 1, "model": "m", "backend": backend, "precision": "fp32", "why": "w"} | {
        "servers": servers
    }


@pytest.fixture
def desk(tmp_path: Path) -> tuple[Dispatch, Metrics]:
    metrics = Metrics()
    (tmp_path / "results").mkdir()
    assembler = Assembler(10, lambda *_: (0, []), min_coverage_mm=0)
    return Dispatch(SimpleNamespace(pid=1), assembler, tmp_path / "results", lambda *_: None, metrics), metrics


def test_a_lost_server_is_told_once_and_so_is_its_return(desk: tuple[Dispatch, Metrics]):
    dispatch, metrics = desk
    value = metrics.registry.get_sample_value
    with capture_logs() as logs:
        dispatch.hear(told("ready", {"grpc://a:1": "", "grpc://b:1": ""}))
        dispatch.hear(told("engine", {"grpc://a:1": "connection refused", "grpc://b:1": ""}))
        dispatch.hear(told("engine", {"grpc://a:1": "connection still refused", "grpc://b:1": ""}))
        assert value("scanside_server_up", {"server": "grpc://a:1"}) == 0
        assert value("scanside_server_up", {"server": "grpc://b:1"}) == 1
        assert value("scanside_fail_over") == 0
        dispatch.hear(told("engine", {"grpc://a:1": "", "grpc://b:1": ""}))
    assert [(one["event"], one["log_level"], one.get("server"), one.get("reason")) for one in logs] == [
        ("worker_ready", "info", None, None),
        ("server_lost", "warning", "grpc://a:1", "connection refused"),
        ("server_back", "info", "grpc://a:1", None),
    ]
    assert value("scanside_server_up", {"server": "grpc://a:1"}) == 1


def test_a_node_that_starts_with_its_stand_in_warns(desk: tuple[Dispatch, Metrics]):
    dispatch, metrics = desk
    value = metrics.registry.get_sample_value
    with capture_logs() as logs:
        dispatch.hear(told("ready", {"grpc://a:1": "connection refused"}, f"onnxruntime {IN_PLACE} triton"))
        assert value("scanside_fail_over") == 1
        dispatch.hear(told("engine", {"grpc://a:1": ""}))
        assert value("scanside_fail_over") == 0
    assert [(one["event"], one["log_level"]) for one in logs] == [
        ("server_lost", "warning"),
        ("worker_ready", "warning"),
        ("server_back", "info"),
        ("engine_changed", "warning"),
    ]


def test_without_a_worker_its_folder_says_why(desk: tuple[Dispatch, Metrics], tmp_path: Path):
    dispatch, metrics = desk
    dispatch.hear(told("ready", {"grpc://a:1": ""}))
    dispatch.hear({"is": "broken", "worker": 1, "error": "no server can be used: grpc://a:1: connection refused"})
    dispatch.hear({"is": "died", "worker": 1})
    engine = nameplate.read(tmp_path)
    assert (engine["worker"], engine["why"]) == ("none", "no server can be used: grpc://a:1: connection refused")
    assert metrics.registry.get_sample_value("scanside_server_up", {"server": "grpc://a:1"}) is None, "nobody knows"
    dispatch.hear({"is": "died", "worker": 2})
    assert nameplate.read(tmp_path)["why"] == "the worker ended by itself: see the node's log"


def test_a_node_without_its_server_does_not_start(pacs: Pacs, tmp_path: Path):
    address = "grpc://127.0.0.1:1"
    node = Node(config(tmp_path, pacs, address, None))
    with pytest.raises(BackendError, match=f"no server can be used: {address}"):
        node.start()
