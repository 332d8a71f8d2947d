"""Names and values of a data set to class indices.

A data set's own name for a class (a COCO category, a segment's label, a grey value) is given its index by a mapping.
What is mapped to 0 is left out on purpose; what is not in the mapping is an error. Where two classes claim a pixel,
the higher class index has it: the order in which a file happens to list its objects decides nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from training.sources.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

WHOLE = 1e-3  # a label that a file's own scaling has moved this far is still a whole number


def check_classes(classes: Mapping[Any, int], source: Path) -> None:
    """Refuse a mapping whose class indices do not fit a label map of uint8.

    Raises
    ------
    SourceError : an index that is no whole number between 0 and 255, or none above 0

    """
    for key, index in classes.items():
        if not isinstance(index, int) or not 0 <= index <= 255:
            raise SourceError(source, f"{key!r} is mapped to class {index!r}", "use class indices from 0 to 255")
    if not any(classes.values()):
        raise SourceError(source, "no class has an index above 0", "map at least one class of the data set")


def look_up(classes: Mapping[Any, int], key: object, path: Path) -> int:
    """Class index of a data set's own name or value for it.

    Raises
    ------
    SourceError : the mapping does not have it

    """
    try:
        return classes[key]
    except KeyError:
        known = ", ".join(repr(known) for known in classes)
        raise SourceError(
            path,
            f"unknown class {key!r} (known: {known})",
            'add it to [data.classes], as a class of the recipe or as "background" to leave it out',
        ) from None


def map_values(values: NDArray[Any], classes: Mapping[Any, int], path: Path) -> NDArray[np.uint8]:
    """Mask values to class indices, any shape, uint8; the value 0 is background.

    Raises
    ------
    SourceError : values that are no whole numbers, or are not in the mapping

    """
    if not np.issubdtype(values.dtype, np.integer):
        whole = np.rint(values)
        if not np.all(np.abs(values - whole) <= WHOLE):
            raise SourceError(path, "mask values are no whole numbers", "save the mask as integers, without resampling")
        values = whole
    labels = np.zeros(values.shape, np.uint8)
    for value in np.unique(values[values != 0]).tolist():
        index = look_up(classes, int(value), path)
        labels[values == value] = index
    return labels


def paint(labels: NDArray[np.uint8], mask: NDArray[Any], index: int) -> None:
    """Give the pixels of a mask to a class, in place, but for those that a higher class has.

    Parameters
    ----------
    labels, mask : of one shape; the mask is nonzero where the class is

    """
    np.maximum(labels, (mask != 0) * np.uint8(index), out=labels)
