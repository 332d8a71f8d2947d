"""Which engine runs in a node's folder, for who looks into it: ``node.json``, written as workers come and go."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import structlog

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

NAME = "node.json"

log = structlog.get_logger(__name__)


def write(folder: Path, engine: Mapping[str, str] | None, fault: str = "") -> None:
    """Say what a worker that is ready has opened, or that none is. Whole or not at all; a full disk is only logged.

    Parameters
    ----------
    engine : ``model``, ``backend``, ``precision`` and ``why``; None while there is none
    fault : why there is none

    """
    told = {"worker": "ready" if engine else "none", **(engine or {"why": fault}), "since": time.time()}
    unfinished = folder / f"{NAME}.tmp"
    try:
        unfinished.write_text(json.dumps(told, indent=2) + "\n")
        unfinished.replace(folder / NAME)
    except OSError as error:
        log.warning("nameplate_not_written", reason=error.strerror)


def read(folder: Path) -> dict[str, Any]:
    """What it says; nothing where it is not there or damaged."""
    try:
        told = json.loads((folder / NAME).read_text())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}
