"""What the page has from the journal: the newest of each series, alerts, and what is owed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dicom_node import status
from dicom_node.alerts.ledger import Ledger
from dicom_node.delivery.outbox import Outbox
from dicom_node.storage import spool
from dicom_node.storage.journal import Journal, JournalError
from dicom_node.storage.membership import members

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dicom_node.alerts.alert import Alert
    from dicom_node.configuration.config import Config
    from dicom_node.delivery.outbox import OutboxItem
    from dicom_node.storage.journal import SeriesRecord
    from dicom_node.storage.membership import Member

LOCKED_S = 1.0  # a journal that another process has to itself is waited for, and no longer


class Records:
    """The journal, read again only where another process has written."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._journal: Journal | None = None
        self._file: tuple[int, int] = (0, 0)
        self._version: Any = None
        self._known: dict[tuple[str, str], tuple[SeriesRecord, status.Series]] = {}
        self._told: tuple[Sequence[status.Series], Sequence[Alert], Sequence[OutboxItem]] = ((), (), ())
        self.twins: Sequence[SeriesRecord] = ()
        # of the newest revision of a series that this node has made: how many files it rests on, and when that was
        self.here: dict[tuple[str, str], tuple[int, float]] = {}
        self.nodes: Sequence[Member] = ()

    def read(self) -> tuple[Sequence[status.Series], Sequence[Alert], Sequence[OutboxItem]]:
        """The newest revision of each series, all alerts, and all that is owed or was.

        Raises
        ------
        JournalError : there is none, or it can't be read

        """
        place = self._config.journal_place
        try:
            file = place.stat() if isinstance(place, Path) else None
        except OSError as error:
            self._forget()
            raise JournalError(f"{place}: {error.strerror}: the node of this configuration has not run yet") from error
        which = (file.st_dev, file.st_ino) if file else (0, 0)
        if self._journal is None or which != self._file:
            self._forget()
            self._journal = Journal(place, read_only=True, patience_s=LOCKED_S, node=self._config.node_name)
            self._file = which
        try:
            with self._journal.statements() as execute:
                version = self._journal.database.change(execute)
            if version != self._version:
                self._told = self._read(self._journal)
                self._version = version
        except JournalError:
            self._forget()
            raise
        return self._told

    def _read(self, journal: Journal) -> tuple[Sequence[status.Series], Sequence[Alert], Sequence[OutboxItem]]:
        self.nodes, self.twins = members(journal), journal.twins()
        newest: dict[tuple[str, str], SeriesRecord] = {}
        self.here = {}
        # twins first: of one revision the row of the node that recorded it wins
        for record in sorted([*self.twins, *journal.series()], key=lambda one: one.revision):
            key = (spool.file_name(record.study_uid), spool.file_name(record.series_uid))
            newest[key] = record
            if not self.nodes or record.node == journal.node:
                self.here[key] = record.slices, record.recorded
        known = {}
        for key, record in newest.items():
            before = self._known.get(key)
            known[key] = before if before and before[0] == record else (record, status.recorded(record))
        self._known = known
        return [told for _, told in known.values()], Ledger(journal).alerts(), Outbox(journal).items()

    def _forget(self) -> None:
        if self._journal:
            self._journal.close()
        self._journal, self._version = None, None
