"""A real Triton for tests, with the bundle that ships; where there is none, who needs it is skipped and says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.tritonserver import ENVIRONMENT, TritonServer, find
from export import triton
from runtime.bundle import open_bundle


def repository(folder: Path) -> Path:
    """A model repository with the bundle that ships, for a Triton with the Python backend alone."""
    triton.write(open_bundle(), "fp32", folder / "repository", engine="python", threads=1)
    return folder / "repository"


@contextmanager
def started(models: Path, folder: Path, ports: tuple[int, int] | None = None) -> Iterator[TritonServer]:
    if find() is None:
        pytest.skip(f"no Triton in {ENVIRONMENT.name}, models on servers are NOT tested: run `make triton`")
    folder.mkdir(exist_ok=True)
    with TritonServer(models, folder, ports) as server:
        yield server
