"""The lint's list of operators against TensorRT's own parser."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx.defs
import pytest

from calibration.lint import OPERATORS, OPSET
from tests.export import ask_parser

LIBRARY = os.environ.get("SCANSIDE_NVONNXPARSER", "")


@pytest.mark.skipif(
    not LIBRARY,
    reason="SCANSIDE_NVONNXPARSER does not name libnvonnxparser.so.8 (of the wheel tensorrt 8.6.0, cp310): "
    "TensorRT's own parser is NOT asked",
)
def test_the_lint_takes_what_tensorrts_parser_takes(tmp_path: Path):
    ask_parser.build_stubs(tmp_path)
    known = {
        one.name for one in onnx.defs.get_all_schemas_with_history() if not one.domain and one.since_version <= OPSET
    }
    command = [sys.executable, ask_parser.__file__, LIBRARY, *sorted(known), "Nonsense"]
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    told = json.loads(shown.stdout)
    assert not told["Nonsense"]
    assert {name for name, takes in told.items() if takes} - {"Dropout"} == OPERATORS, "Dropout is refused on purpose"
