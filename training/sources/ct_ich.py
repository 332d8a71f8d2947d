"""PhysioNet's CT-ICH: volumes, binary masks, and a table of the haemorrhage types that each slice shows.

Hssayeni et al., Data 5(1):14 (2020), https://physionet.org/content/ct-ich/1.3.1/. The masks say where blood is, the
table says which types a slice shows; only together they say which blood is which. So:

- a slice whose types have one class index between them: its mask has that class;
- a slice without a type and without a mask: background;
- every other slice is left out of its case, by one of the reasons below, and counted in `Case.excluded`.

With all types mapped to one class no slice is ambiguous by its types.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from training.sources import folder, labels, nifti
from training.sources.case import Case, Entry
from training.sources.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from training.sources.nifti import PairBy

TABLE = "hemorrhage_diagnosis_raw_ct.csv"
TYPES = ("Intraventricular", "Intraparenchymal", "Subarachnoid", "Epidural", "Subdural")
SEVERAL = "several classes on the slice, and one mask"
UNTYPED = "a mask, and no type in the table"
UNMASKED = "a type in the table, and no mask"
CONTRADICTED = "a type and No_Hemorrhage in one row of the table, or neither"
UNLISTED = "no row in the table"
_COLUMNS = ("PatientNumber", "SliceNumber", *TYPES, "No_Hemorrhage")


@dataclass(frozen=True, slots=True)
class _Row:
    """What the table says of one slice: class indices of its types, and whether it contradicts itself."""

    classes: frozenset[int]
    contradicted: bool


def entries(
    root: Path, *, classes: Mapping[str, int], assume: str | None = None, pair_by: PairBy = "affine"
) -> tuple[Entry, ...]:
    """List the data set's volumes, one case a patient (the number that names the file).

    Parameters
    ----------
    root : the folder with ``ct_scans/``, ``masks/`` and the table
    classes : class index of each of `TYPES`
    assume, pair_by : as for `nifti.entries`

    Raises
    ------
    SourceError : folders that do not pair, a table that is none or has no row of a volume's patient, or a type that is
        not in `classes`

    """
    labels.check_classes(classes, root / TABLE)
    table = _read_table(root / TABLE, classes)
    found = []
    for name, (image, mask) in folder.match(root / "ct_scans", root / "masks", nifti.SUFFIXES).items():
        if not name.isdecimal():
            raise SourceError(image, "no patient's number", "name it by the patient's number, such as 049.nii")
        rows = table.get(int(name))
        if rows is None:
            raise SourceError(image, f"patient {int(name)} has no row in {TABLE}", "use the table of the same release")
        found.append(Entry(name, name, partial(_load, name, image, mask, rows, root / TABLE, assume, pair_by)))
    return tuple(found)


def _read_table(path: Path, classes: Mapping[str, int]) -> dict[int, dict[int, _Row]]:
    """What the table says, by patient number and slice number; rows without any value are passed over."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SourceError(path, f"no table ({type(error).__name__})", "take it from the data set's release") from error
    header = [title.strip() for title in lines[0]] if lines else []
    missing = [column for column in _COLUMNS if column not in header]
    if missing:
        raise SourceError(path, f"no column {', '.join(missing)}", "take the table from the data set's release")
    table: dict[int, dict[int, _Row]] = {}
    for number, line in enumerate(lines[1:], start=2):
        if not any(cell.strip() for cell in line):
            continue
        cells = _whole(dict(zip(header, line, strict=False)), path, number)
        slices = table.setdefault(cells["PatientNumber"], {})
        if cells["SliceNumber"] in slices:
            raise SourceError(path, f"line {number}: a second row of one slice", "remove one of the two")
        shown = frozenset(labels.look_up(classes, each, path) for each in TYPES if cells[each])
        slices[cells["SliceNumber"]] = _Row(shown, bool(shown) == bool(cells["No_Hemorrhage"]))
    return table


def _whole(cells: Mapping[str, str], path: Path, number: int) -> dict[str, int]:
    """Read a row's numbers; some releases of the table write them as 49.0."""
    try:
        values = {column: float(cells[column]) for column in _COLUMNS}
        if all(value == int(value) for value in values.values()):
            return {column: int(value) for column, value in values.items()}
    except (KeyError, ValueError, OverflowError):
        pass
    raise SourceError(path, f"line {number} is no row of whole numbers", "repair it, or take the release's table")


def _load(
    patient: str,
    image: Path,
    mask: Path,
    rows: Mapping[int, _Row],
    table: Path,
    assume: str | None,
    pair_by: PairBy,
) -> Case:
    volume, truth = nifti.read_pair(image, mask, assume=assume, pair_by=pair_by)
    if volume.file_slice is None:
        raise SourceError(image, "its slices do not lie along its third axis", "the table's slice numbers need that")
    beyond = [number for number in rows if not 1 <= number <= len(volume.values)]
    if beyond:
        reason = f"row of slice {beyond[0]} of patient {int(patient)}, whose volume has {len(volume.values)}"
        raise SourceError(table, reason, "use volumes and table of the same release")
    blood = _binary(truth, mask)
    kept, excluded, indices = [], dict[str, int](), []
    for i, in_file in enumerate(volume.file_slice.tolist()):
        verdict = _judge(rows.get(in_file + 1), shown=bool(blood[i].any()))  # the table counts from 1
        if isinstance(verdict, str):
            excluded[verdict] = excluded.get(verdict, 0) + 1
        else:
            kept.append(i)
            indices.append(verdict)
    if not kept:
        raise SourceError(image, f"no slice is left ({'; '.join(excluded)})", "leave this patient out")
    return Case(
        patient=patient,
        name=patient,
        images=nifti.to_hounsfield(volume.values[kept], image),
        labels=np.ascontiguousarray(blood[kept] * np.array(indices, np.uint8)[:, np.newaxis, np.newaxis]),
        quantity="HU",
        spacing_mm=volume.spacing_mm,
        thickness_mm=np.full(len(kept), volume.spacing_mm[0]),
        origin_mm=np.array(kept)[:, None] * np.array([volume.spacing_mm[0], 0.0, 0.0]),
        excluded=tuple(excluded.items()),
    )


def _judge(row: _Row | None, *, shown: bool) -> int | str:
    """Class index of a slice's mask, or the reason why there is none.

    Parameters
    ----------
    shown : the mask shows blood on the slice

    """
    if row is None:
        return UNLISTED
    if row.contradicted:
        return CONTRADICTED
    if not row.classes:
        return UNTYPED if shown else 0
    if not shown:
        return UNMASKED
    return SEVERAL if len(row.classes) > 1 else min(row.classes)


def _binary(values: NDArray[Any], path: Path) -> NDArray[np.uint8]:
    """1 where the mask is: its values are 0 and one other, often 255, not always whole after scaling."""
    high = values.max()
    return labels.map_values(values, {round(float(high)): 1} if high > 0 else {}, path)
