"""Writing into a bundle: the manifest comes last and at once, so that half a bundle has none."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

from runtime.bundle import SIGNATURE, open_bundle

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Write ``manifest.json`` with the SHA-256 of every other file. A signature that was there holds no longer."""
    (folder / SIGNATURE).unlink(missing_ok=True)
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != "manifest.json")
    files = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    partial = folder.parent / f"{folder.name}.manifest.partial"
    partial.write_text(json.dumps({**manifest, "files": files}, indent=2) + "\n")
    os.replace(partial, folder / "manifest.json")  # noqa: PTH105  # replace() of a path to another name, atomically


def add(folder: Path, files: dict[str, str], **changes: Any) -> None:
    """Put text files (scores, model card, verdicts) into a bundle, change entries of its manifest, and seal it again.

    Raises
    ------
    BundleError : the folder is no intact bundle

    """
    change(folder, lambda _: [(folder / name).write_text(text) for name, text in files.items()], **changes)


def change(folder: Path, write: Callable[[Path], object], **changes: Any) -> None:
    """Let `write` put files into an intact bundle, and seal it again.

    Between the two the manifest does not fit its files: who reads then is told of a changed file, never served half.
    """
    manifest = open_bundle(folder).manifest.model_dump(mode="json")
    write(folder)
    seal(folder, manifest | changes)
