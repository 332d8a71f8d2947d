"""What a destination is asked for a result as Storage SCU (PS3.4 annex B), and what its answer means."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from pydicom.filereader import read_file_meta_info
from pydicom.uid import (
    Comprehensive3DSRStorage,
    EncapsulatedPDFStorage,
    ImplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
)
from pynetdicom import build_context
from pynetdicom.sop_class import LabelMapSegmentationStorage
from pynetdicom.status import STORAGE_SERVICE_CLASS_STATUS, code_to_category

if TYPE_CHECKING:
    from pynetdicom.presentation import PresentationContext

    from dicom_node.delivery.outbox import OutboxItem

SOP_CLASSES = MappingProxyType(
    {
        "notice": (SecondaryCaptureImageStorage,),
        "sr": (Comprehensive3DSRStorage,),
        "sc": (SecondaryCaptureImageStorage,),
        "pdf": (EncapsulatedPDFStorage,),
        "seg": (SegmentationStorage, LabelMapSegmentationStorage),
    }
)
# Refusals that trying again will not change (PS3.7 annex C, PS3.4 table B.2-1): invalid SOP instance, SOP class not
# supported, not authorised, data set does not match SOP class. Not Cxxx: archives say that of a broken database, too.
FINAL_STATUSES = frozenset({0x0117, 0x0122, 0x0124, *range(0xA900, 0xAA00)})


def meaning(status: int) -> tuple[str, str]:
    """The category of a status, and the whole answer in words."""
    category, words = STORAGE_SERVICE_CLASS_STATUS.get(status, (code_to_category(status), ""))
    return category, f"0x{status:04X} {category} {words}".rstrip()


def contexts_for(item: OutboxItem) -> dict[tuple[str, str], PresentationContext]:
    """The file's own transfer syntax, and for native pixels the default one, which every SCP has (PS3.5 section 10.1).

    Raises
    ------
    ValueError : the file holds another object than the one that is owed; besides, all that pydicom raises

    """
    meta = read_file_meta_info(item.path)
    sop_class, sop_uid = meta.get("MediaStorageSOPClassUID"), meta.get("MediaStorageSOPInstanceUID")
    syntax = meta.get("TransferSyntaxUID")
    if (sop_class, sop_uid) != (item.sop_class_uid, item.sop_uid) or syntax is None:
        raise ValueError(f"holds {sop_class} {sop_uid} in {syntax}, not {item.sop_class_uid} {item.sop_uid}")
    syntaxes = [syntax] if syntax.is_compressed else [syntax, ImplicitVRLittleEndian]
    return {(sop_class, each): build_context(sop_class, each) for each in syntaxes}
