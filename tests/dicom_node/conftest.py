"""A running node, an archive, and series to push: shared by the tests that go all the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from dicom_node.configuration.config import Config
from dicom_node.node import Node
from dicom_node.simulation import phantom as writer
from dicom_node.simulation.pacs import Pacs
from dicom_node.storage.postgres import Address
from tests.dicom_node.servers import Server
from training.lesions import Lesion
from training.phantom import Phantom, Scan, make

PATIENCE_S = 120.0


@dataclass(frozen=True)
class Pushable:
    """A phantom as files."""

    phantom: Phantom
    paths: list[Path]

    @property
    def folder(self) -> Path:
        return self.paths[0].parent


@pytest.fixture(scope="session")
def bleeding(tmp_path_factory: pytest.TempPathFactory) -> Pushable:
    """30 ml intracerebral and 14 ml subdural, tilted by 12 degrees, 5 mm."""
    made = make((Lesion("intracerebral", 30), Lesion("subdural", 14)), Scan((5.0,), tilt_deg=12), seed=21)
    return Pushable(made, writer.write(made.slices, tmp_path_factory.mktemp("bleeding"), tilt_deg=12))


@pytest.fixture(scope="session")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Pushable:
    made = make((), Scan((5.0,)), seed=52)  # one of those that test_model holds the model to
    return Pushable(made, writer.write(made.slices, tmp_path_factory.mktemp("healthy")))


def config_for(
    folder: Path, port: int, *, idle_timeout_s: float = 3.0, ae_title: str = "PACS", node_port: int = 0
) -> Config:
    return Config.model_validate(
        {
            "node": {"folder": folder, "port": node_port, "free_floor_gb": 0.1},
            "series": {"idle_timeout_s": idle_timeout_s},
            "destinations": [{"name": "pacs", "ae_title": ae_title, "host": "127.0.0.1", "port": port}],
        }
    )


@contextmanager
def running(config: Config) -> Iterator[Node]:
    node = Node(config)
    node.start()
    try:
        yield node
    finally:
        node.stop()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A server for all tests that do not kill it."""
    server = Server()
    yield server
    server.remove()


@pytest.fixture
def killable() -> Iterator[Server]:
    """A server of one test's own."""
    server = Server()
    yield server
    server.remove()


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | Address:
    """Where a journal may lie: in a file, or in an empty database."""
    if request.param == "sqlite":
        return tmp_path / "journal.sqlite"
    return request.getfixturevalue("postgres").database()


@pytest.fixture
def pacs(tmp_path: Path) -> Iterator[Pacs]:
    archive = Pacs(tmp_path / "pacs")
    archive.start()
    yield archive
    archive.stop()


@pytest.fixture
def node(tmp_path: Path, pacs: Pacs) -> Iterator[Node]:
    with running(config_for(tmp_path / "node", pacs.port)) as started:
        yield started


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Poll a condition until it holds; fail by name after `PATIENCE_S`."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.02)
