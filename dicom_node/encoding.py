"""Sequences that are encoded once, however many frames have them.

pydicom takes them as they are in a data set that says it is encoded as it will be written
(`pydicom.dataset.Dataset.set_original_encoding`), and decodes them for whoever looks at them.
"""

from __future__ import annotations

from pydicom.charset import convert_encodings, default_encoding
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import correct_ambiguous_vr, write_sequence_item
from pydicom.tag import Tag


def settle(dataset: Dataset) -> None:
    """Make a data set ready for sequences that are encoded; one that it has by now is decoded again."""
    correct_ambiguous_vr(dataset, is_little_endian=True)
    _mark(dataset)


def encoded(keyword: str, *items: Dataset) -> RawDataElement:
    """A sequence as it is written: encoded once, however many data sets have it. Its text must be ASCII."""
    stream = DicomBytesIO()
    stream.is_little_endian, stream.is_implicit_VR = True, False
    for item in items:
        write_sequence_item(stream, _mark(item), [default_encoding])
    value = stream.getvalue()
    return RawDataElement(Tag(keyword), "SQ", len(value), value, 0, is_implicit_VR=False, is_little_endian=True)


def item_of(*elements: RawDataElement) -> Dataset:
    """An item of a sequence, of sequences that are encoded."""
    return _mark(Dataset({element.tag: element for element in elements}))


def _mark(dataset: Dataset) -> Dataset:
    character_set = dataset.get("SpecificCharacterSet")
    dataset.set_original_encoding(
        is_implicit_vr=False,
        is_little_endian=True,
        character_encoding=convert_encodings(character_set) if character_set else default_encoding,
    )
    return dataset
