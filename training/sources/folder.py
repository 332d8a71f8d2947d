"""The files of a data set's folders: listed, told apart by their suffix, and matched by their stems."""

from __future__ import annotations

from typing import TYPE_CHECKING

from training.sources.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

# what people keep beside their images
_BESIDE = (".txt", ".csv", ".tsv", ".xls", ".xlsx", ".json", ".xml", ".yaml", ".yml", ".md", ".html", ".pdf", ".py")
_LEFT_BEHIND = ("thumbs.db", "desktop.ini", "dicomdir")


def list_files(folder: Path) -> list[Path]:
    """All files below a folder in order, but for hidden ones, text, tables and what other programs leave behind.

    Raises
    ------
    SourceError : no such folder, or nothing in it

    """
    if not folder.is_dir():
        raise SourceError(folder, "no such folder", "check the path")
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.suffix.lower() not in _BESIDE
        and path.name.lower() not in _LEFT_BEHIND
    ]
    if not found:
        raise SourceError(folder, "empty folder", "check the path, or whether the data set was unpacked")
    return found


def suffix(path: Path) -> str:
    """Suffix in lower case, ``.nii.gz`` as a whole."""
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else path.suffix.lower()


def stem(path: Path, folder: Path) -> str:
    """Path within the folder without its suffix."""
    relative = path.relative_to(folder).as_posix()
    return relative[: len(relative) - len(suffix(path))]


def match(images: Path, masks: Path, suffixes: Collection[str], mask_suffix: str = "") -> dict[str, tuple[Path, Path]]:
    """Image and mask of each stem, at any depth.

    Parameters
    ----------
    images, masks : two folders; or one, where `mask_suffix` tells the masks apart
    suffixes : of the files that are images, in lower case
    mask_suffix : what a mask's stem has after its image's, such as ``"_mask"``

    Raises
    ------
    SourceError : a file of another type, two files of one stem, an image without a mask, a mask without an image

    """
    image_of, mask_of = _by_stem(images, suffixes), _by_stem(masks, suffixes)
    if images == masks:
        if not mask_suffix:
            raise SourceError(images, "images and masks in one folder", "give the suffix that the masks' stems have")
        image_of = {name: path for name, path in image_of.items() if not name.endswith(mask_suffix)}
        mask_of = {name: path for name, path in mask_of.items() if name.endswith(mask_suffix)}
    for name, path in mask_of.items():
        if not name.endswith(mask_suffix) or name[: len(name) - len(mask_suffix)] not in image_of:
            raise SourceError(path, "mask without image", "add the image with the same stem, or take the mask away")
    for name, path in image_of.items():
        if name + mask_suffix not in mask_of:
            raise SourceError(
                path, "image without mask", "add its mask with the same stem (an empty one where there is no blood)"
            )
    return {name: (path, mask_of[name + mask_suffix]) for name, path in image_of.items()}


def _by_stem(folder: Path, suffixes: Collection[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in list_files(folder):
        if suffix(path) not in suffixes:
            raise SourceError(path, f"not one of {', '.join(sorted(suffixes))}", "convert it, or take it away")
        name = stem(path, folder)
        if name in found:
            raise SourceError(path, f"the same stem as {found[name].name}", "keep one of the two")
        found[name] = path
    return found
