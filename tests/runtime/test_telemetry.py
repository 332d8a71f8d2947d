"""Nothing is told to anybody of what runs here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

USE = """
from runtime.bundle import open_bundle
from runtime.session import open_session, self_test
bundle = open_bundle()
session = open_session(bundle, "onnxruntime")
self_test(session, bundle)
"""


@pytest.mark.parametrize("first", ["runtime", "calibration", "export", "benchmarks", "scanside"])
def test_the_switch_is_set_before_it_is_loaded(first: str):
    """By whichever package comes first."""
    seen = f"import {first}, os, sys; print('onnxruntime' in sys.modules, os.environ['ORT_DISABLE_TELEMETRY'])"
    given = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    shown = subprocess.run([sys.executable, "-c", seen], env=given, capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["False", "1"]


def test_onnx_runtime_keeps_nothing_to_tell(tmp_path: Path):
    """Its telemetry would have an identifier and a database in the user's cache, and look for its server."""
    # which switch it off, too
    given = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    environment = given | {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", USE], env=environment, check=True, timeout=120)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
