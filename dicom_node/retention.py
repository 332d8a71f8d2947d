"""Makes room: studies whose results have been where they belong for long enough are removed, and nothing else.

Of the journal goes what nobody needs any more, so that it does not grow for ever.
"""

from __future__ import annotations

import shutil
import time
from math import inf
from threading import Event, Thread
from typing import TYPE_CHECKING

import structlog

from dicom_node.alerts.ledger import Ledger
from dicom_node.delivery.outbox import DELIVERED, Outbox
from dicom_node.monitoring.trail import Trail
from dicom_node.storage.journal import JournalError, SeriesState
from dicom_node.storage.spool import count, file_name

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from dicom_node.storage.journal import Journal
    from dicom_node.storage.spool import Spool

INTERVAL_S = 3600.0
DAY_S = 86400.0
JOURNAL_S = (
    90 * DAY_S
)  # so long the journal knows all of a study that is not here any more, and what scanners announced

log = structlog.get_logger(__name__)


class Retention:
    """Sweeps once an hour, from `start` to `stop`.

    A study goes when `keep_days` have passed since its last result, if every series of it on the disk has one that
    covers all of its instances and is no failure, every destination has all that it is owed, and of its alerts nobody
    is owed a message or has to acknowledge one. What lies in quarantine stays.

    Parameters
    ----------
    spool, journal : what is here, and what became of it
    results : folder of result files
    keep_days : since the last result of a study; None: nothing goes
    trail : what is audited

    """

    def __init__(
        self, spool: Spool, journal: Journal, results: Path, keep_days: float | None, trail: Trail | None = None
    ) -> None:
        self._spool, self._journal, self._results, self._trail = spool, journal, results, trail or Trail()
        self.reload(keep_days)
        self._stopping = Event()
        self._thread = Thread(target=self._run, name="retention", daemon=True)

    def reload(self, keep_days: float | None) -> None:
        """Keep studies for so long, from the next sweep on."""
        self._keep_s = inf if keep_days is None else keep_days * DAY_S

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def sweep(self, now: float) -> list[str]:
        """Remove what may go at `now` (seconds since the epoch); the StudyInstanceUIDs that did."""
        if self._keep_s == inf:
            return []
        removed = []
        for study_uid, counts in self._removable(now):
            patient_id = self._trail.patient_of(self._spool.series(study_uid, next(iter(counts)))[0])
            if self._spool.remove(study_uid, counts):
                self._trail.removed(study_uid, patient_id)
                shutil.rmtree(self._results / file_name(study_uid), ignore_errors=True)
                log.info("study_removed", study=study_uid, instances=sum(counts.values()))
                removed.append(study_uid)
        return removed

    def _removable(self, now: float) -> Iterator[tuple[str, dict[str, int]]]:
        studies: dict[str, dict[str, int]] = {}
        for study_uid, series_uid, here in self._spool.contents():
            studies.setdefault(study_uid, {})[series_uid] = here
        owed = {item.study_uid for item in Outbox(self._journal).items() if item.state not in DELIVERED}
        owed |= Ledger(self._journal).studies_needed()
        for study_uid, counts in studies.items():
            if study_uid in owed or self._stopping.is_set():
                continue
            node = self._journal.node
            latest = [
                (
                    self._journal.latest(study_uid, one, of=node),
                    here,
                    self._spool.last_arrival(study_uid, one),
                )
                for one, here in counts.items()
            ]
            if all(
                record is not None
                and record.state is not SeriesState.FAILED
                and record.slices >= here
                and record.recorded >= arrived  # or it was removed before, and has been sent again
                and record.recorded + self._keep_s < now
                for record, here, arrived in latest
            ):
                yield study_uid, counts

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.sweep(time.time())
                here = {study_uid for study_uid, _ in count(self._spool.root)}
                self._journal.forget(time.time() - JOURNAL_S, here)
                Ledger(self._journal).forget(time.time() - JOURNAL_S, here)
            except (JournalError, OSError) as error:
                log.warning("nothing_removed", reason=str(error))
            except Exception:  # a bug in one study must not end all removal: the disk would fill
                log.exception("removal_failed")
            self._stopping.wait(INTERVAL_S)
