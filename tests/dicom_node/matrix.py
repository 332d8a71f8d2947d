"""The matrix of results that validators and readers are held against: kind x gantry tilt x character set."""

from __future__ import annotations

import warnings
from pathlib import Path

from pydicom import dcmread
from pydicom.charset import convert_encodings
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from dicom_node.results import result_set
from tests.dicom_node import ct

CORPUS = Path(__file__).parents[2].parent / "shared" / "corpus" / "60_charset_names"
KINDS = ("positive", "negative", "provisional", "failed")
TILTS = (0.0, 20.0)
CHARSETS = tuple(sorted(path.stem for path in CORPUS.glob("*.dcm"))) or ("chrH32",)
OF_PATIENT = ("SpecificCharacterSet", "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "PatientComments")
REASON = "the sender broke off after 3 of 30 slices"


def case(kind: str, tilt_deg: float, donor: Path | None = None) -> ct.Case:
    """A series of a kind; whose it is, a file of the corpus says, in its own bytes."""
    classes = () if kind == "negative" else (1, 2, 5)
    labels = ct.bleeds(classes=classes)
    sources = [ct.as_received(header) for header in ct.headers(tilt_deg=tilt_deg)]
    missing = ("2 slices missing: a step of 15.0 mm after slice 6",) if kind == "provisional" else ()
    report = ct.report(sources, labels, provisional=bool(missing), missing=missing)
    if donor:
        for source in sources:
            _give(source, dcmread(donor, force=True))
    return ct.Case(sources, labels, ct.hounsfield(labels), report)


def _give(source: Dataset, donor: Dataset) -> None:
    for keyword in OF_PATIENT:
        source.pop(keyword, None)
        if keyword in donor:
            source._dict[Tag(keyword)] = donor.get_item(keyword)  # as it was read, not yet decoded
    source.set_original_encoding(
        *donor.original_encoding, character_encoding=convert_encodings(donor.get("SpecificCharacterSet"))
    )


def build(one: ct.Case, kind: str, form: result_set.Form = result_set.USUAL) -> ct.ResultSet:
    """All objects of the case; of one that failed, the notice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # pydicom warns of the names that this is about
        if kind == "failed":
            notice = result_set.build_notice(one.sources[0], REASON, ct.MODEL, revision=1, started=ct.STARTED)
            return ct.ResultSet(notice=notice)
        about = {"revision": 1, "started": ct.STARTED, "form": form}
        return ct.build(one.sources, one.labels, one.pictured(), one.report, **about)
