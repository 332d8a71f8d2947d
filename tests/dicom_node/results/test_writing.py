"""Files of results: whole and synced before they get their names, whatever the disk does."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self

import pydicom
import pytest
from pydicom import dcmwrite

from dicom_node.results import writing
from tests.dicom_node import ct

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def test_files_are_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "results"
    paths = writing.write(ct.built("one finding"), folder)
    assert sorted(folder.iterdir()) == sorted(paths.values())
    assert list(paths)[:2] == ["seg", "sr"]
    for path in paths.values():
        assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == pydicom.uid.ExplicitVRLittleEndian
    assert "seg" not in writing.write(ct.built("negative"), tmp_path)


@pytest.mark.parametrize("missing", [0, 1], ids=["even", "odd"])
def test_files_are_to_the_byte_what_pydicom_writes(missing: int, tmp_path: Path) -> None:
    built = ct.cases()["one finding"].build()
    for dataset in (built.seg, *built.sc):
        dataset.PixelData = dataset.PixelData[missing:]
    for role, path in writing.write(built, tmp_path).items():
        expected = io.BytesIO()
        dcmwrite(expected, dict(built)[role], enforce_file_format=True)
        assert path.read_bytes() == expected.getvalue()


def test_a_file_that_cannot_be_synced_never_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(writing.NoRoom, match="No space left on device: make room"):
        writing.write(ct.built("negative"), tmp_path)
    assert not list(tmp_path.glob("*.dcm"))


class Filling:
    """A file on a disk that has no room for pixels."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def writelines(self, pieces: Iterable[bytes]) -> None:
        for piece in pieces:
            if len(piece) > 1_000_000:
                raise OSError(28, "No space left on device")
            self._file.write(piece)


def test_a_disk_that_fills_while_a_file_is_written_leaves_nothing_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("report.json", "sc-1.dcm"):
        (tmp_path / name).write_text("of an earlier attempt")
    monkeypatch.setattr(Path, "open", lambda path, *how, work=Path.open, **more: Filling(work(path, *how, **more)))
    with pytest.raises(writing.NoRoom, match="No space left on device: make room"):
        writing.write(ct.built("one finding"), tmp_path, "{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "sc-1.dcm"]
    assert (tmp_path / "report.json").read_text() == "of an earlier attempt"


def test_nothing_more_is_made_for_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def watched() -> Iterator[tuple[str, pydicom.Dataset]]:
        for role, dataset in ct.built("one finding"):
            made.append(role)
            yield role, dataset

    monkeypatch.setattr(Path, "open", lambda path, *how, work=Path.open, **more: Filling(work(path, *how, **more)))
    with pytest.raises(writing.NoRoom):
        writing.write(watched(), tmp_path)
    assert made == ["seg", "sr", "sc-1", "sc-2"], "the disk fails with the first picture, beside the second one"


def test_a_report_that_does_not_fit_leaves_the_earlier_one_and_no_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report.json").write_text("of an earlier attempt")
    monkeypatch.setattr(Path, "open", lambda path, *how, work=Path.open, **more: Filling(work(path, *how, **more)))
    with pytest.raises(writing.NoRoom, match="No space left on device: make room"):
        writing.write([("sr", ct.built("negative").sr)], tmp_path, 1_000_001 * " ")
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "of an earlier attempt"


def test_the_report_is_synced_as_the_results_are_and_gets_its_name_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who sees it finds the results it speaks of, after a power cut, too."""
    done = []

    def synced(handle: int, work: object = os.fsync) -> None:
        done.append(("fsync", str(Path(f"/proc/self/fd/{handle}").readlink())))
        work(handle)

    def named(old: Path, new: Path, work: object = os.replace) -> None:
        done.append(("replace", str(old)))
        work(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", named)
    paths = writing.write(ct.built("negative"), tmp_path, "{}")
    assert "report" not in paths
    assert (tmp_path / "report.json").read_text() == "{}"
    *before, last, folder = done
    assert last == ("replace", str(tmp_path / "report.json.tmp"))
    assert folder == ("fsync", str(tmp_path))
    temporary = {f"{path}.tmp" for path in (*paths.values(), tmp_path / "report.json")}
    whats = [what for what, _ in before]
    assert whats == [*["fsync"] * len(temporary), *["replace"] * len(paths)], "all are there before one has its name"
    assert {path for what, path in before if what == "fsync"} == temporary
