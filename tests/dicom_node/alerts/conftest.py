"""A journal and a ledger of its own for every test."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from dicom_node.alerts.ledger import Ledger
from dicom_node.storage.journal import Journal
from tests.dicom_node.alerts.made import Channel


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with contextlib.closing(Journal(tmp_path / "journal.sqlite")) as opened:
        yield opened


@pytest.fixture
def ledger(journal: Journal) -> Ledger:
    """With one channel, "ed", that is told of everything at once."""
    return Ledger(journal, [Channel()])
