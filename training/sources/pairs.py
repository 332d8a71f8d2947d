"""Pictures with a mask each in two folders, matched by their stems.

Such a set trained the networks for subarachnoid haemorrhage of paper 002: grey pictures, masks at a threshold of 0.5.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from training.sources import folder, labels, naming, pictures
from training.sources.case import Case, Entry
from training.sources.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def entries(
    images: Path, masks: Path, *, patient: str, classes: Mapping[int, int] | None = None, mask_suffix: str = ""
) -> tuple[Entry, ...]:
    r"""List pictures and masks (PNG, JPEG, TIFF) at any depth, one case a picture.

    Parameters
    ----------
    images, masks : two folders; or one, where `mask_suffix` tells the masks apart
    patient : regular expression with a group named ``patient``, sought in the path within `images` without its suffix,
        such as ``r"^(?P<patient>\d+)/"`` for a folder a patient
    classes : class index of each mask value; None for masks in black and white, with a threshold of 0.5 and class 1
    mask_suffix : what a mask's stem has after its image's, such as ``"_mask"``

    Raises
    ------
    SourceError : folders that do not pair, or a pattern that does not name each picture's patient

    """
    if classes is not None:
        labels.check_classes(classes, masks)
    pattern = naming.compile_pattern(patient, images)
    found = []
    for name, (image, mask) in folder.match(images, masks, pictures.SUFFIXES, mask_suffix).items():
        whose = naming.find_patient(pattern, name, image)
        found.append(Entry(whose, name, partial(_load, whose, name, image, mask, classes)))
    return tuple(found)


def _load(patient: str, name: str, image: Path, mask: Path, classes: Mapping[int, int] | None) -> Case:
    grey, truth = pictures.read_grey(image), pictures.read_mask(mask, classes)
    if grey.shape != truth.shape:
        raise SourceError(
            mask,
            f"{truth.shape[0]} x {truth.shape[1]} pixels beside an image of {grey.shape[0]} x {grey.shape[1]}",
            "export image and mask at one size",
        )
    return Case(patient, name, grey[np.newaxis], truth[np.newaxis], "grey")
