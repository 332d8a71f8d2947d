"""Results on the disk: each file whole and synced before it gets its name, or not there."""

from __future__ import annotations

import errno
import json
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, BinaryIO, ClassVar

import numpy as np
from pydicom import dcmwrite

from dicom_node.results.encoding import element_header
from dicom_node.results.result_set import quoting_nobody
from runtime.errors import ScansideError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from pydicom.dataset import Dataset

    from runtime.types import Report, SliceLabels

REPORT = "report.json"


class NoRoom(ScansideError):
    """The disk is full: results can be written once there is room."""

    exit_code: ClassVar[int] = 3


def write(results: Iterable[tuple[str, Dataset]], folder: Path, report_json: str | None = None) -> dict[str, Path]:
    """Write each result to a file of its own: temporary file, fsync, rename, and one fsync of the folder at the end.

    Parameters
    ----------
    results : with their names, as they come of `dicom_node.results.result_set.make`
    report_json : goes into ``report.json`` beside them in the same way, and gets its name last

    Returns
    -------
    paths of the results by name

    Raises
    ------
    NoRoom : the disk is full

    """
    try:
        return _write(results, folder, report_json)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoRoom(f"{folder}: {error.strerror}: make room") from error
        raise


def _write(results: Iterable[tuple[str, Dataset]], folder: Path, report_json: str | None) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    names, synced = [], []
    with _unfinished(folder), ExitStack() as opened, ThreadPoolExecutor(1, "disk") as disk:
        for name, parts in _files(results, report_json):
            names.append(name)
            file = opened.enter_context((folder / f"{name}.tmp").open("wb"))
            synced.append(disk.submit(_sync, file, *parts))  # while the next one is encoded
            for one in synced[:-1]:
                one.result()  # no more than two in memory, and none made for a disk that is full
        for one in synced:
            one.result()
    for name in reversed(names):  # the report last: who finds it finds the results
        (folder / f"{name}.tmp").replace(folder / name)
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    return {name.removesuffix(".dcm"): folder / name for name in names if name != REPORT}


def _files(results: Iterable[tuple[str, Dataset]], report_json: str | None) -> Iterator[tuple[str, Sequence[bytes]]]:
    """Names and contents; the report first, for it is there before anything is made."""
    if report_json is not None:
        yield REPORT, (report_json.encode(),)
    for role, dataset in results:
        yield f"{role}.dcm", _encoded(dataset)


def _encoded(dataset: Dataset) -> tuple[bytes, ...]:
    """A file in parts: what pydicom writes before the pixels, and these as they are, not copied."""
    head, pixels = BytesIO(), dataset.pop("PixelData", None)
    with quoting_nobody():
        dcmwrite(head, dataset, enforce_file_format=True)
    if pixels is None:
        return (head.getvalue(),)
    dataset[pixels.tag] = pixels
    pad = b"\0" * (len(pixels.value) % 2)
    # the last by its tag; OB as all native pixels of no more than 8 bits (PS3.5 section A.2)
    return head.getvalue(), element_header(pixels.tag, "OB", len(pixels.value) + len(pad)), pixels.value, pad


def _sync(file: BinaryIO, *parts: bytes) -> None:
    file.writelines(parts)
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _unfinished(folder: Path) -> Iterator[None]:
    """Leave no file behind that was begun, where something goes wrong."""
    try:
        yield
    except BaseException:
        for path in folder.glob("*.tmp"):
            path.unlink()
        raise


def write_early(report: Report, labels: Mapping[str, SliceLabels], folder: Path) -> Path:
    """Leave the label maps of the slices that show a finding, by their keys, as ``early.npz``: whole or not at all.

    What its labels are, the largest finding first, stands in the archive's comment: nobody has to know which model made
    it. What an earlier one showed is replaced.

    Raises
    ------
    OSError

    """
    folder.mkdir(parents=True, exist_ok=True)
    path, unfinished = folder / "early.npz", folder / "early.npz.tmp"
    keys = dict.fromkeys(key for finding in report.findings for key in finding.keys)
    with unfinished.open("wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:  # savez takes no key "file"
            archive.comment = json.dumps({finding.label: finding.name for finding in report.findings}).encode()
            for key in keys:
                with archive.open(f"{key}.npy", "w") as member:
                    np.lib.format.write_array(member, labels[key].labels, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    return path
