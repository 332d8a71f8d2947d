"""What names a result: UIDs derived from what it was made of, series numbers, equipment.

The UIDs are the 2.25 form of name-based UUIDs (PS3.5 B.2, RFC 9562 version 5), for scanside owns no UID root. The same
series, model, revision and content give the same UIDs on every run and machine, so a result that is built again after a
crash is the same object, and a store that already has it keeps one copy.

A SOP Instance UID depends on what the result is made of (`Issue.content`): other slices, labels, codes or rules never
give another document under a UID that an archive may have, whoever counts revisions, or nobody. Series UIDs depend on
neither: all revisions of one modality lie in one series. Tracking UIDs do not either: they stay with the finding.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from highdicom.base_content import ContributingEquipment
from pydicom.uid import UID

from dicom_node.results.codes import PROCESSING_EQUIPMENT, look_up

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from pydicom.dataset import Dataset

    from dicom_node.results.codes import FindingCode, OwnCode
    from runtime.types import ModelIdentity

MANUFACTURER = "scanside"
SERIES_NUMBERS = {"OT": 991, "SEG": 992, "SR": 993, "DOC": 994}
MAX_SOURCE_SERIES_NUMBER = 2_000_000  # x 1000 + 994 is still an IS (PS3.5 table 6.2-1: below 2^31)

_NAMESPACE = uuid.UUID("65ace1f2-e300-4f29-94e1-58e7b6455e0a")  # scanside's own; changing it renames every result


def derive(*parts: str) -> UID:
    """UID of these parts: the same parts in the same order give the same UID, others another."""
    return UID(f"2.25.{uuid.uuid5(_NAMESPACE, chr(0).join(parts)).int}")


def result_series(study_uid: str, series_uid: str, name: str, version: str, digest: str, modality: str) -> UID:
    """SeriesInstanceUID of what a model's results of one modality for a series lie in, whatever the revision."""
    return derive(study_uid, series_uid, name, version, digest, "series", modality)


def long_string(text: str) -> str:
    """Text as a legal LO value: no backslash, which separates values, and 64 characters at most (PS3.5 table 6.2-1)."""
    return text.replace("\\", "/").strip()[:64]


@dataclass(frozen=True, slots=True)
class Issue:
    """One issue of results: of which series, by which model, which revision, begun when.

    Attributes
    ----------
    study_uid, series_uid : of the source series
    series_number : of the source series, None where it has none
    model : what computed the results
    revision : 1 for the first; counted up each time the series is analysed again with other slices
    started : when the analysis began; ContentDate and ContentTime of every result
    content : a hash of what the results are made of, beside what is named above
    codes : rows of the configuration, which go before the bundle's and the table's

    """

    study_uid: str
    series_uid: str
    series_number: int | None
    model: ModelIdentity
    revision: int
    started: datetime
    content: str
    codes: Mapping[str, OwnCode] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Dataset, model: ModelIdentity, **about: Any) -> Issue:
        """The issue for the series of an image; what else there is to say is as the attributes are named."""
        number = source.get("SeriesNumber")
        return cls(
            study_uid=str(source.StudyInstanceUID),
            series_uid=str(source.SeriesInstanceUID),
            series_number=None if number is None else int(number),
            model=model,
            **about,
        )

    def code(self, name: str) -> FindingCode:
        """How a class is written."""
        return look_up(name, self.model, self.codes)

    def series(self, modality: str) -> UID:
        """SeriesInstanceUID of the results of one modality."""
        model = self.model
        return result_series(self.study_uid, self.series_uid, model.name, model.version, model.digest, modality)

    def instance(self, role: str) -> UID:
        """SOPInstanceUID of the result in a role such as ``"seg"``, ``"sr"`` or ``"sc:<key of the slice>"``."""
        return self._derive("instance", role, str(self.revision), self.content)

    def tracking(self, name: str) -> UID:
        """Tracking UID of a class of finding in this series: the same in SEG and SR, and in every revision."""
        return self._derive("tracking", name)

    @property
    def device(self) -> UID:
        """UID of the observer: this model, whatever it observes."""
        return derive("device", MANUFACTURER, self.model.name, self.model.version, self.model.digest)

    @property
    def equipment(self) -> dict[str, str]:
        """The Enhanced General Equipment Module (PS3.3 C.7.5.2) as highdicom's constructors name it."""
        return {
            "manufacturer": MANUFACTURER,
            "manufacturer_model_name": long_string(self.model.name),
            "software_versions": long_string(self.model.version),
            # there is no serial number: the first half of the bundle's digest says which weights these are
            "device_serial_number": f"sha256 {self.model.digest[:32]}",
        }

    def attributes(self, modality: str, role: str, *, number: int) -> dict[str, Any]:
        """Arguments that highdicom's constructors of SEG, SR and SC share; `number` is the InstanceNumber.

        SeriesNumber is the source's x 1000 + 991 (SC), 992 (SEG), 993 (SR) or 994 (PDF): sorted behind its source,
        never random, and out of the way of the numbers that scanners give (hundreds, hundreds + 1). A source without a
        number, or with one too large for that, counts as 0.
        """
        source_number = self.series_number or 0
        if not 0 < source_number <= MAX_SOURCE_SERIES_NUMBER:
            source_number = 0
        local = self.started.astimezone()  # DICOM's times are local unless TimezoneOffsetFromUTC says otherwise
        kind = {"OT": "SC", "DOC": "PDF"}.get(modality, modality)
        return self.equipment | {
            "series_instance_uid": self.series(modality),
            "series_number": 1000 * source_number + SERIES_NUMBERS[modality],
            "series_description": long_string(
                f"Research AI haemorrhage {kind}: {self.model.name} {self.model.version}"
            ),
            "sop_instance_uid": self.instance(role),
            "instance_number": number,
            "content_date": local.date(),
            "content_time": local.time(),
            "contributing_equipment": [
                ContributingEquipment(purpose_of_reference=PROCESSING_EQUIPMENT, **self.equipment)
            ],
        }

    def _derive(self, *parts: str) -> UID:
        return derive(self.study_uid, self.series_uid, self.model.name, self.model.version, self.model.digest, *parts)
