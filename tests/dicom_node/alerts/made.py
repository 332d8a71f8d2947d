"""Reports, patients and channels for tests of alerts."""

from __future__ import annotations

import time
from dataclasses import dataclass

from dicom_node.alerts.alert import OCCASIONS
from dicom_node.alerts.ledger import Ledger

STUDY, SERIES = "1.2.3.4", "1.2.3.4.5"
PATIENT = {"PatientID": "P1", "PatientName": "Muster^Änne", "PatientBirthDate": "19500102", "PatientSex": "F"}


def report(level: str = "critical", ml: float = 31.2, *, missing: tuple[str, ...] = (), **changed: object) -> dict:
    """What `dicom_node.results.result_set.to_json` makes of an analysis, read again."""
    found = level in ("critical", "urgent")
    finding = {
        "label": 1,
        "name": "intracerebral",
        "title": "Intracerebral haemorrhage",
        "code": ["274100004", "SCT", "Cerebral hemorrhage"],
        "volume_ml": ml,
        "components": 1,
        "largest_ml": ml,
        "probability": 0.98,
        "keys": ["1.2.3.4.5.7", "1.2.3.4.5.8", "1.2.3.4.5.9"],
        "key_slice": "1.2.3.4.5.8",
    }
    return {
        "composed": 0.0,
        "received": 30,
        "findings": [finding] if found else [],
        "absent": [],
        "below_threshold": [],
        "decision": {"level": level, "reason": f"intracerebral {ml:.1f} ml, rule: any from 30 ml" if found else "none"},
        "model": {
            "name": "phantom-unet",
            "version": "1.0",
            "digest": "ab" * 32,
            "precision": "fp32",
            "backend": "onnxruntime",
            "training_data": "synthetic phantoms",
            "codes": {},
        },
        "slices": 30,
        "provisional": bool(missing),
        "missing": list(missing),
        "thickness_mm": [5.0, 5.0],
        "coverage_mm": 150.0,
        "tilt_deg": 0.0,
        **changed,
    }


EARLY = report(missing=("the series is still arriving",))


@dataclass(frozen=True)
class Channel:
    """A channel's settings."""

    name: str = "ed"
    levels: tuple[str, ...] = ("critical", "urgent")
    after_s: float = 0.0
    occasions: frozenset[str] = OCCASIONS
    night: tuple[float, float] | None = None  # quiet from, until

    def quiet_until(self, now: float) -> float | None:
        return self.night[1] if self.night and self.night[0] <= now < self.night[1] else None


def note(ledger: Ledger, said: dict, revision: int = 1, *, final: bool = True, series: str = SERIES, **kwargs) -> None:
    """Note a report in a transaction of its own."""
    with ledger._journal.transaction() as execute:
        ledger.note(execute, STUDY, series, revision, said, kwargs.pop("patient", PATIENT), final=final)


def written(ledger: Ledger, channel: str = "ed"):
    """The next message of a channel and its alert, as a herald gets them."""
    claimed = ledger.claim(channel, time.time())
    assert claimed is not None
    return claimed
