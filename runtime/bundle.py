"""Model bundles: a folder that says what it is and can prove that nothing in it changed.

::

    BUNDLE/
      manifest.json    name, version, classes, input contract, operating point, SHA-256 of every other file
      model.onnx       HU in, labels, voxel counts and evidence out (fp32)
      golden.npz       slices, and the answers that PyTorch gave on them: parity, and the self-test at every start
      parity.json      how far the graph is from PyTorch
      scores.json      what it scores on data it never saw
      MODEL_CARD.md    the same for people
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.errors import BundleError, BundleTampered
from runtime.geometry import View

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

FORMAT = "scanside-bundle/1"
SHIPPED = Path(__file__).parent / "bundles" / "phantom-unet"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A verified bundle.

    Attributes
    ----------
    folder : where it lies
    digest : SHA-256 of all that decides what it computes: graphs, golden slices, classes, operating point, names; not
        the scores and the card, which are about it
    name, version, training_data : who it is and what it has seen
    intended_use : what it is for, and what it is not
    classes : class names by index; 0 is background
    view : how many slices the network sees at once, and how many of them it answers
    precisions : file name of the graph of each precision
    minimum_volume_ml : per class, the volume under which nothing is reported as a finding
    learnt_from : a hash of which patients were learnt from and which chose the weights, so that an evaluation can tell
        whether it divides them alike; None for phantoms. It names none of them

    """

    folder: Path
    digest: str
    name: str
    version: str
    intended_use: str
    training_data: str
    classes: tuple[str, ...]
    view: View
    precisions: Mapping[str, str]
    minimum_volume_ml: Mapping[str, float]
    learnt_from: str | None = None

    def graph(self, precision: str) -> Path:
        """Path of the ONNX graph of a precision."""
        try:
            return self.folder / self.precisions[precision]
        except KeyError:
            raise BundleError(f"{self.folder}: no {precision} graph, only {', '.join(self.precisions)}") from None

    def golden(self) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
        """Golden views ``(N, shown, H, W)`` HU, and the labels that PyTorch gave them ``(N * answered, H, W)``."""
        with np.load(self.folder / "golden.npz", allow_pickle=False) as arrays:
            return arrays["hu"], arrays["labels"]


def open_bundle(folder: Path | None = None) -> Bundle:
    """Read a bundle and check the hash of each of its files; without a folder, the one that ships with scanside.

    Raises
    ------
    BundleError : no manifest, one of another format, a key or a file missing
    BundleTampered : a file's hash is not the manifest's

    """
    folder = folder or SHIPPED
    path = folder / "manifest.json"
    manifest = _manifest(path)
    files: dict[str, str] = manifest["files"]
    for name, expected in files.items():
        if Path(name).name != name:
            raise BundleError(f"{path}: file {name!r} is outside the bundle")
        try:
            actual = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        except OSError as error:
            raise BundleError(
                f"{folder / name}: {error.strerror}, though the manifest lists it: copy the bundle again"
            ) from None
        if actual != expected:
            raise BundleTampered(
                f"{folder / name}: SHA-256 {actual[:12]}..., the manifest says {expected[:12]}...: "
                "copy the bundle again"
            )
    unlisted = {*manifest["precisions"].values(), "golden.npz"} - files.keys()
    if unlisted:
        raise BundleError(f"{path}: {', '.join(sorted(unlisted))} without a hash: export the bundle again")
    return Bundle(
        folder=folder,
        digest=_digest(manifest),
        name=manifest["name"],
        version=manifest["version"],
        intended_use=manifest["intended_use"],
        training_data=manifest["training_data"],
        classes=tuple(manifest["classes"]),
        view=View(**manifest["view"]),
        precisions=manifest["precisions"],
        minimum_volume_ml=manifest["minimum_volume_ml"],
        learnt_from=manifest.get("learnt_from"),
    )


_KEYS = {
    "name": str,
    "version": str,
    "intended_use": str,
    "training_data": str,
    "classes": list,
    "view": dict,
    "precisions": dict,
    "minimum_volume_ml": dict,
    "files": dict,
}


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        reason = f"manifest.json: {error.strerror}"
        raise BundleError(f"{path.parent} is no bundle: {reason}; name a folder that `scanside export` made") from None
    except ValueError as error:
        raise BundleError(f"{path} is no JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BundleError(f"{path} is not in format {FORMAT!r}, which this version of scanside reads: export it again")
    for key, kind in _KEYS.items():
        if not isinstance(manifest.get(key), kind):
            raise BundleError(f"{path}: {key!r} is missing or no {kind.__name__}: export the bundle again")
    view = manifest["view"]
    if sorted(view) != ["answered", "shown"] or any(type(n) is not int or n < 1 for n in view.values()):
        raise BundleError(f"{path}: view is {view}, not two counts, shown and answered: export the bundle again")
    without = [name for name in manifest["classes"][1:] if name not in manifest["minimum_volume_ml"]]
    if without:
        raise BundleError(f"{path}: no minimum_volume_ml for {', '.join(without)}: export the bundle again")
    return manifest


def _digest(manifest: dict[str, Any]) -> str:
    """SHA-256 over what decides the answers: scores and card may be added later and change nothing."""
    computing = {*manifest["precisions"].values(), "golden.npz"}
    decisive = manifest | {"files": {name: manifest["files"][name] for name in sorted(computing)}}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
