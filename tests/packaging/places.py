"""Where what is tested lies, and which commands of others judge it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGING = Path(__file__).parents[2] / "packaging"
KUBERNETES = PACKAGING / "kubernetes"


def documents(text: str) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(text) if one]


def found(command: str, remedy: str) -> str:
    """Path of a command, of this environment or the system; without it the test is skipped, and says how to get it."""
    path = shutil.which(command) or shutil.which(command, path=str(Path(sys.executable).parent))
    if path is None:
        pytest.skip(f"no {command}: {remedy}")
    return path


def run(command: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=60, **options)
