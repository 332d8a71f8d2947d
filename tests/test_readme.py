"""What the README says can be done: its commands exist, and those that need no scanner and no hour are run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(text: str) -> list[str]:
    """Lines of the blocks that are typed."""
    return [line for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]


COMMANDS = commands(README)
EVERYWHERE = dict.fromkeys(line for page in PAGES for line in commands(page.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("target", [line.split()[1] for line in COMMANDS if line.startswith("make ")])
def test_make_targets_exist(target: str):
    assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("line", [line for line in EVERYWHERE if line.startswith("scanside ")])
def test_commands_and_their_options_exist(line: str):
    words = shlex.split(line.partition(">")[0])[1:]
    name = words[:2] if words[0] in ("alerts", "outbox", "bundle") else words[:1]
    shown = subprocess.run(
        [sys.executable, "-m", "scanside", *name, "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    for option in (word for word in words if word.startswith("--")):
        assert option in shown, f"{line}: no {option}"


def test_the_five_minutes_work_as_written(tmp_path: Path):
    """Configuration, check, phantom and analyse, in the README's own words."""
    shell = [line for line in COMMANDS if re.match(r"scanside (config|check|phantom|analyse) ", line)]
    assert len(shell) == 4
    for line in shell:
        command = line.replace("scanside", f"{shlex.quote(sys.executable)} -m scanside", 1)
        shown = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
        if line.startswith("scanside check"):  # the example's PACS does not exist: that, and only that, is the fault
            assert shown.stdout.count("fault") == 1, shown.stdout
            assert "destination pacs" in shown.stdout
        else:
            assert shown.returncode == 0, shown.stderr
    assert len(list((tmp_path / "results").rglob("sr.dcm"))) == 1


def test_research_use_is_said_where_it_is_seen():
    for path in ("README.md", "runtime/bundles/phantom-unet/MODEL_CARD.md", "scanside.py", "dicom_node/results/sr.py"):
        assert re.search(r"not a medical device", (ROOT / path).read_text(), re.IGNORECASE), path
