"""What is encoded by hand is what pydicom writes."""

from __future__ import annotations

import pytest
from pydicom.dataset import Dataset

from dicom_node.results.encoding import encoded, numbers, sequence, text


@pytest.mark.filterwarnings("ignore:The value for the data element")  # pydicom says of it what is tested
@pytest.mark.parametrize("frames", [1, 2, 20_000], ids=["odd", "even", "longer than its VR may be"])
def test_items_are_to_the_byte_those_of_pydicom(frames: int):
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", "1.2.34"
    item.ReferencedFrameNumber = list(range(1, frames + 1))
    item.DimensionIndexValues, item.ReferencedSegmentNumber = [3, 70_000], 2
    by_hand = [
        numbers("ReferencedSegmentNumber", 2),
        numbers("DimensionIndexValues", 3, 70_000),
        text("ReferencedSOPInstanceUID", "1.2.34"),
        text("ReferencedFrameNumber", *map(str, range(1, frames + 1))),
        text("ReferencedSOPClassUID", "1.2.840.10008.5.1.4.1.1.2"),
    ]
    assert sequence("SourceImageSequence", [by_hand, by_hand]) == encoded("SourceImageSequence", item, item)
