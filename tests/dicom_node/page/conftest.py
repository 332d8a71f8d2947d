"""A node's folder without a node: slices, results, a journal with alerts; and a browser that asks the page."""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from dicom_node.alerts.ledger import Ledger
from dicom_node.configuration.config import Config
from dicom_node.page.app import Application
from dicom_node.results import result_set, writing
from dicom_node.results.result_set import USUAL, Form
from dicom_node.storage import spool
from dicom_node.storage.journal import Journal, ResultFile, Role, SeriesState
from dicom_node.storage.lock import FolderLock
from tests.dicom_node import ct

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it would rather have httpx2
    from starlette.testclient import TestClient

SAME = {"sec-fetch-site": "same-origin"}  # what a browser says of a form of ours


@dataclasses.dataclass(frozen=True)
class Placed:
    """A series in the folder."""

    study_uid: str
    series_uid: str
    paths: list[Path]
    labels: Any
    headers: list

    @property
    def address(self) -> str:
        return f"/series/{spool.file_name(self.study_uid)}/{spool.file_name(self.series_uid)}"


class Folder:
    """What a node leaves behind, made by hand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "spool").mkdir(parents=True)
        self.journal = Journal(path / "journal.sqlite")
        self.ledger = Ledger(self.journal)

    def config(self, **page: object) -> Config:
        return Config.model_validate({"node": {"folder": self.path, "free_floor_gb": 0}, "page": {"port": 0, **page}})

    def place(self, number: int, *, classes: tuple[int, ...] = (1,), slices: int = 12, **replaced: object) -> Placed:
        """Slices of a series in the spool."""
        study_uid, series_uid = f"1.2.{number}", f"1.2.{number}.1"
        uids = {"StudyInstanceUID": study_uid, "SeriesInstanceUID": series_uid, "PatientID": f"P{number}"}
        headers = ct.headers(slices, **uids | {"PatientName": f"Doe^John{number}"} | replaced)
        labels = ct.bleeds(slices, classes=classes) if classes else ct.bleeds(slices) * 0
        place = self.path / "spool" / spool.file_name(study_uid) / spool.file_name(series_uid)
        place.mkdir(parents=True)
        paths = []
        for index, (header, hu) in enumerate(zip(headers, ct.hounsfield(labels), strict=True)):
            header.SOPInstanceUID = f"{series_uid}.{index + 1}"
            header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID
            header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
            image = header.copy()
            image.file_meta = header.file_meta
            image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
            image.BitsAllocated = image.BitsStored = 16
            image.HighBit, image.PixelRepresentation = 15, 1
            image.RescaleSlope, image.RescaleIntercept = 1, 0
            image.PixelData = hu.tobytes()
            paths.append(place / f"{header.SOPInstanceUID}.dcm")
            image.save_as(paths[-1], enforce_file_format=True)
        return Placed(study_uid, series_uid, paths, labels, headers)

    def report(self, placed: Placed, level: str | None = None, **about: object) -> dict:
        made = ct.report(placed.headers, placed.labels, **about)
        told = json.loads(result_set.to_json(made, len(placed.paths)))
        told["decision"]["level"] = level or told["decision"]["level"]
        return told

    def analyse(
        self, placed: Placed, level: str | None = None, revision: int = 1, form: Form = USUAL, **about: object
    ) -> dict:
        """Results of a series, and its record; an alert where the level has one."""
        told = self.report(placed, level, **about)
        made = ct.report(placed.headers, placed.labels, **about)
        place = self.path / "results" / spool.file_name(placed.study_uid) / spool.file_name(placed.series_uid)
        started = datetime.now(UTC)
        built = ct.build(placed.headers, placed.labels, {}, made, revision=revision, started=started, form=form)
        writing.write(built, place / f"revision-{revision}", json.dumps(told))
        self.record(placed, SeriesState.ANALYSED, None, revision=revision, report=told)
        return told

    def record(
        self,
        placed: Placed,
        state: SeriesState,
        reason: str | None,
        *,
        revision: int = 1,
        report: dict | None = None,
        files: Sequence[ResultFile] = (),
        to: Mapping[str, Collection[Role]] | None = None,
    ) -> None:
        self.journal.record_result(
            placed.study_uid,
            placed.series_uid,
            revision,
            state=state,
            reason=reason,
            slices=len(placed.paths),
            report_json=json.dumps(report) if report else None,
            files=files,
            destinations=to or {},
        )
        if report:
            self.alert(placed, report, final=True, revision=revision)

    def alert(self, placed: Placed, report: dict, *, final: bool, revision: int = 1) -> None:
        with self.journal.transaction() as execute:
            self.ledger.note(execute, placed.study_uid, placed.series_uid, revision, report, {}, final=final)

    def age(self, placed: Placed, seconds: float) -> None:
        """Have a series come so long ago."""
        import os

        for path in (*placed.paths, placed.paths[0].parent):
            os.utime(path, (time.time() - seconds,) * 2)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    made = Folder(tmp_path / "node")
    held = FolderLock(made.path)
    yield made
    held.release()
    made.journal.close()


def browse(folder: Folder, **page: object) -> TestClient:
    """A browser at the page of a folder."""
    application = Application(folder.config(**page))
    return TestClient(application, base_url="http://127.0.0.1", follow_redirects=False, headers=SAME)
