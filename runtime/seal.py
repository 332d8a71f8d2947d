"""Writing into a bundle: into a copy beside it, which takes its place when it is whole."""

from __future__ import annotations

import hashlib
import json
import shutil
from typing import TYPE_CHECKING, Any

from runtime.bundle import SIGNATURE, open_bundle
from runtime.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Write ``manifest.json`` with the SHA-256 of every other file, and read it back.

    Raises
    ------
    BundleError : the manifest says what it may not

    """
    names = sorted(path.name for path in folder.iterdir() if path.name not in ("manifest.json", SIGNATURE))
    files = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "files": files}, indent=2) + "\n")
    open_bundle(folder)


def make(folder: Path, write: Callable[[Path], dict[str, Any]]) -> None:
    """Let `write` put files into a folder beside `folder`, seal them with the manifest that it returns, and move it.

    Until then `folder` is as it was, or is not: an interruption at any moment leaves no half bundle. A signature does
    not come along.

    Raises
    ------
    BundleError : as of `seal`

    """
    partial, old = (folder.with_name(f"{folder.name}.{kind}") for kind in ("partial", "old"))
    if old.exists() and not folder.exists():
        raise BundleError(f"{old}: left by an interruption, and {folder} is gone: rename it to {folder.name}")
    for rest in (partial, old):
        shutil.rmtree(rest, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        seal(partial, write(partial))
    except BaseException:
        shutil.rmtree(partial)
        raise
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def change(folder: Path, write: Callable[[Path], object], **changes: Any) -> None:
    """Let `write` put files into an intact bundle, change entries of its manifest, and seal it again.

    Raises
    ------
    BundleError : the folder is no intact bundle, or would be none

    """
    manifest = open_bundle(folder).manifest
    folder = folder.absolute()

    def put(partial: Path) -> dict[str, Any]:
        for name in manifest.files:
            shutil.copy2(folder / name, partial / name)
        write(partial)
        return manifest.model_dump(mode="json") | changes

    make(folder, put)


def add(folder: Path, files: dict[str, str], **changes: Any) -> None:
    """Put text files (scores, model card, verdicts) into a bundle, change entries of its manifest, and seal it again.

    Raises
    ------
    BundleError : as of `change`

    """
    change(folder, lambda partial: [(partial / name).write_text(text) for name, text in files.items()], **changes)
