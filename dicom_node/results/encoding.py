"""Elements in Explicit VR Little Endian: above all sequences, encoded once however many frames or items have them.

pydicom takes them as they are in a data set that says it is encoded as it will be written
(`pydicom.dataset.Dataset.set_original_encoding`), and decodes them for whoever looks at them.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from operator import attrgetter
from typing import TYPE_CHECKING

from pydicom.charset import default_encoding
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import correct_ambiguous_vr, write_sequence_item
from pydicom.tag import Tag
from pydicom.valuerep import EXPLICIT_VR_LENGTH_32

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pydicom.multival import MultiValue
    from pydicom.tag import BaseTag

LONGEST_SHORT = 0xFFFF
_SHORT, _LONG, _ITEM = struct.Struct("<HH2sH"), struct.Struct("<HH2sxxL"), struct.Struct("<HHL")


def settle(dataset: Dataset) -> None:
    """Make a data set ready to be written, without another look level by level, and for sequences that are encoded.

    One that it has by now is decoded again.
    """
    correct_ambiguous_vr(dataset, is_little_endian=True)
    _settle(dataset)


def _settle(dataset: Dataset) -> None:
    for element in list(dataset.values()):
        if element.VR != "SQ" or element.is_raw:
            continue
        if element.keyword.endswith("CodeSequence") and len(element.value) == 1:
            said = tuple((each.tag, each.VR, each.value) for each in element.value[0])
            if all(isinstance(value, str) and value.isascii() for *_, value in said):
                put(dataset, _code(element.tag, said))
                continue
        for item in element.value:
            _settle(item)
    _mark(dataset)


@lru_cache(maxsize=1024)
def _code(tag: BaseTag, said: tuple[tuple[BaseTag, str, str], ...]) -> RawDataElement:
    """A code, of which a report has the same few again and again."""
    item = Dataset()
    for one in said:
        item.add_new(*one)
    return encoded(tag, item)


def put(dataset: Dataset, element: RawDataElement) -> None:
    """Put an encoded sequence into a data set; one that is to be settled decodes it."""
    dataset[element.tag] = element


def encoded(keyword: str | BaseTag, *items: Dataset) -> RawDataElement:
    """A sequence as it is written: encoded once, however many data sets have it. Its text must be ASCII."""
    stream = DicomBytesIO()
    stream.is_little_endian, stream.is_implicit_VR = True, False
    for item in items:
        write_sequence_item(stream, _mark(item), [default_encoding])
    return _element(keyword, "SQ", stream.getvalue())


def sequence(keyword: str, items: Iterable[Iterable[RawDataElement]]) -> RawDataElement:
    """A sequence of items whose elements are encoded (PS3.5 sections 7.1.2 and 7.5)."""
    encoded_items = [b"".join(map(_written, sorted(item, key=attrgetter("tag")))) for item in items]
    return _element(keyword, "SQ", b"".join(_ITEM.pack(0xFFFE, 0xE000, len(one)) + one for one in encoded_items))


def numbers(keyword: str, *values: int) -> RawDataElement:
    """Unsigned integers of 16 or 32 bits, as the dictionary has it."""
    vr = dictionary_VR(keyword)
    return _element(keyword, vr, struct.pack(f"<{len(values)}{'H' if vr == 'US' else 'L'}", *values))


def text(keyword: str, *values: str | MultiValue) -> RawDataElement:
    """Text of an even length (PS3.5 section 6.2)."""
    vr = dictionary_VR(keyword)
    each = (value if isinstance(value, str) else "\\".join(value) for value in values)
    value = "\\".join(each).encode(default_encoding)
    return _element(keyword, vr, value + (b"\0" if vr == "UI" else b" ") * (len(value) % 2))


def _element(keyword: str | BaseTag, vr: str, value: bytes) -> RawDataElement:
    return RawDataElement(Tag(keyword), vr, len(value), value, 0, is_implicit_VR=False, is_little_endian=True)


def element_header(tag: BaseTag, vr: str, length: int) -> bytes:
    """What stands before the value of an element (PS3.5 section 7.1.2)."""
    if length > LONGEST_SHORT and vr not in EXPLICIT_VR_LENGTH_32:
        vr = "UN"  # PS3.5 section 6.2.2
    head = _LONG if vr in EXPLICIT_VR_LENGTH_32 else _SHORT
    return head.pack(tag.group, tag.elem, vr.encode(), length)


def _written(element: RawDataElement) -> bytes:
    return element_header(element.tag, element.VR, len(element.value)) + element.value


def _mark(dataset: Dataset) -> Dataset:
    character_set = dataset._character_set  # noqa: SLF001  # its own or, of an item, that of what it is in
    dataset.set_original_encoding(is_implicit_vr=False, is_little_endian=True, character_encoding=character_set)
    return dataset
