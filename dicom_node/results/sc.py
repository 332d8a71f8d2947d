"""Pictures as Secondary Captures (PS3.3 A.8.1): what every viewer shows, one series of them for all revisions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from highdicom.sc import SCImage
from highdicom.sr import CodedConcept
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian
from pydicom.valuerep import DA, TM

from dicom_node.results import codes
from dicom_node.results.encoding import encoded, put, sequence
from dicom_node.results.source import directions, instances, named

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from PIL import Image

    from dicom_node.results.uids import Issue

A_REVISION = 9  # instance numbers: an overview, then eight key slices


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of slices.

    Attributes
    ----------
    image : RGB
    shown : normalised headers of the slices that it is made of; the first says how it lies
    role : names the object (`dicom_node.results.uids.Issue.instance`)
    description : DerivationDescription

    """

    image: Image.Image
    shown: Sequence[Dataset]
    role: str
    description: str


def build(pictures: Iterable[Picture], issue: Issue) -> Iterator[Dataset]:
    """One object each, in their order, all of one series and one size.

    highdicom makes the first. The others differ from it in a handful of elements and share the rest: making each anew
    takes three times as long as drawing it.
    """
    first = None
    for place, picture in enumerate(pictures, start=1):
        number = (issue.revision - 1) * A_REVISION + place
        image = _another(first, picture, issue, number) if first else _first(picture, issue, number)
        first = first or image
        yield image


def _first(picture: Picture, issue: Issue, number: int) -> SCImage:
    first = picture.shown[0]
    image = SCImage.from_ref_dataset(
        ref_dataset=first,
        pixel_array=np.asarray(picture.image),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        transfer_syntax_uid=ExplicitVRLittleEndian,
        patient_orientation=directions(first) or ("L", "P"),
        **issue.attributes("OT", picture.role, number=number),
    )
    image.copy_patient_and_study_information(first)
    image.PatientOrientation = directions(first)  # a page of text has none (Type 2C, PS3.3 C.7.6.1)
    image.BodyPartExamined = "HEAD"  # without it Laterality is required (PS3.3 C.7.3.1)
    image.ConversionType = "WSD"
    image.BurnedInAnnotation = "NO"  # nothing that identifies the patient (PS3.3 C.7.6.1)
    image.DerivationDescription = picture.description
    started = issue.started.astimezone()  # highdicom has its own clock
    image.DateOfSecondaryCapture, image.TimeOfSecondaryCapture = DA(started.date()), TM(started.time())
    _name_sources(image, picture)
    return image


def _another(first: Dataset, picture: Picture, issue: Issue, number: int) -> Dataset:
    image = Dataset()
    image.update(first)
    image.file_meta = FileMetaDataset()
    image.file_meta.update(first.file_meta)
    uid = issue.instance(picture.role)
    # new entries: setting an attribute would change the element that both share
    image.file_meta.add_new("MediaStorageSOPInstanceUID", "UI", uid)
    image.add_new("SOPInstanceUID", "UI", uid)
    image.add_new("InstanceNumber", "IS", number)
    image.add_new("PatientOrientation", "CS", directions(picture.shown[0]))
    image.add_new("DerivationDescription", "ST", picture.description)
    _name_sources(image, picture)
    image.add_new("PixelData", "OB", picture.image.tobytes())
    return image


def _name_sources(image: Dataset, picture: Picture) -> None:
    """References to the images that a picture shows, each with its purpose."""
    purpose = encoded("PurposeOfReferenceCodeSequence", CodedConcept.from_code(codes.SOURCE_IMAGE))
    items = ([*named(*sources), purpose] for sources in instances(picture.shown).values())
    put(image, sequence("SourceImageSequence", items))
