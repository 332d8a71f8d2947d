"""What is written of a series when something is known of it: result, what is owed for it and alert, all at once."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from dicom_node.storage.journal import SeriesState

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from dicom_node.alerts.ledger import Ledger
    from dicom_node.assembler import Assembly
    from dicom_node.configuration.sections import Destination
    from dicom_node.delivery.outbox import Outbox
    from dicom_node.dispatch import Result
    from dicom_node.storage.database import Execute
    from dicom_node.storage.journal import Journal, Role, SeriesRecord
    from dicom_node.storage.spool import Spool


class Register:
    """The desk's way into the journal.

    Parameters
    ----------
    journal, outbox, ledger : of one file

    """

    def __init__(self, journal: Journal, outbox: Outbox, ledger: Ledger) -> None:
        self._journal, self._outbox, self._ledger = journal, outbox, ledger

    def record(self, assembly: Assembly, result: Result, destinations: Sequence[Destination]) -> None:
        """Write a result, what destinations are owed for it, and what becomes of the alert.

        Raises
        ------
        JournalError

        """
        told = self._journal.last_told(assembly.study_uid, assembly.series_uid)
        # a series that fails at each start anew is no news
        is_news = result.reason is None or told is None or told.reason != result.reason
        # also what corrects a result that has been sent, whatever it says now
        before = self._outbox.destinations_of(assembly.study_uid, assembly.series_uid)
        receivers: dict[str, tuple[Role, ...]] = {
            each.name: each.results for each in destinations if each.wants(result.level) or each.name in before
        }

        def alert(execute: Execute) -> None:
            series = assembly.study_uid, assembly.series_uid, assembly.revision
            if result.report_json is None:
                self._ledger.note_failure(execute, *series, result.reason or "not analysed")
            else:
                document = next((file.sop_uid for file in result.files if file.role == "sr"), None)
                report = json.loads(result.report_json) | {"sr_uid": document}
                of_part = self._journal.reported_elsewhere(execute, *series[:2]) > len(assembly.paths)
                self._ledger.note(execute, *series, report, result.patient, final=True, of_part=of_part)

        self._journal.record_result(
            assembly.study_uid,
            assembly.series_uid,
            assembly.revision,
            state=result.state,
            reason=result.reason,
            slices=len(assembly.paths),
            report_json=result.report_json,
            files=result.files,
            destinations=receivers if is_news else {},
            also=alert,
        )

    def note_early(self, assembly: Assembly, report_json: str, patient: Mapping[str, str]) -> None:
        """Write what the slices of an open series make already.

        Raises
        ------
        JournalError

        """
        with self._journal.transaction() as execute:
            self._ledger.note(
                execute,
                assembly.study_uid,
                assembly.series_uid,
                assembly.revision,
                json.loads(report_json),
                patient,
                final=False,
            )


def without_result(spool: Spool, journal: Journal, node: str) -> Iterator[tuple[str, str, int]]:
    """Series of a node's spool with more or newer instances than its last result covers, or whose analysis failed.

    Returns
    -------
    StudyInstanceUID, SeriesInstanceUID and number of instances of each

    Raises
    ------
    JournalError

    """
    for study_uid, series_uid, count in spool.contents():
        latest = journal.latest(study_uid, series_uid, of=node)
        if latest is None or latest.state is SeriesState.FAILED or not _rests_on_all(latest, spool, count):
            yield study_uid, series_uid, count


def history(spool: Spool, journal: Journal, study_uid: str, series_uid: str) -> tuple[int, list[Path], bool]:
    """What has become of a series so far.

    Returns
    -------
    its last revision that has a result (0: none), its files in order of arrival, and whether the last result of this
    node rests on all of them

    Raises
    ------
    JournalError, OSError

    """
    latest, files = journal.latest(study_uid, series_uid), spool.series(study_uid, series_uid)
    own = journal.latest(study_uid, series_uid, of=journal.node) if latest and files else None
    return latest.revision if latest else 0, files, bool(own) and _rests_on_all(own, spool, len(files))


def _rests_on_all(record: SeriesRecord, spool: Spool, count: int) -> bool:
    """Whether nothing came after it, not even anew after a removal."""
    return count <= record.slices and spool.last_arrival(record.study_uid, record.series_uid) <= record.recorded
