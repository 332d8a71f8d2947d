"""Model bundles: a folder that says what it is and can prove that nothing in it changed.

::

    BUNDLE/
      manifest.json    name, version, classes, input, operating point, budget, rulings, SHA-256 of every other file
      model.onnx       HU in, labels and evidence out: FP32
      model.fp16.onnx, model.int8.onnx (for TensorRT), model.int8-cpu.onnx (for ONNX Runtime's CPU kernels)
      weights.bin      the tensors of all of them, each once
      golden.npz       slices, and the answers that PyTorch gave on them: parity, and the self-test at every start
      parity.json      how far the FP32 and FP16 graphs are from PyTorch
      calibration.json how the other precisions came about: samples, ranges, layers left out
      verdicts.json    how far they are from FP32 on series held out
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

from runtime.errors import BundleError, BundleTampered, NotVerified
from runtime.geometry import View
from runtime.manifest import FILES, PROCESSOR, Manifest, parse
from runtime.verdict import Budget

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from runtime.types import OperatingPoint

SIGNATURE = "manifest.sig"  # Ed25519 over manifest.json, which holds the hashes of all the rest
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
    operating_point : per class, under what nothing is reported as a finding
    learnt_from : a hash of which patients were learnt from and which chose the weights, so that an evaluation can tell
        whether it divides them alike; None for phantoms. It names none of them
    manifest : all that it says of itself

    """

    folder: Path
    digest: str
    name: str
    version: str
    intended_use: str
    training_data: str
    classes: tuple[str, ...]
    view: View
    operating_point: Mapping[str, OperatingPoint]
    learnt_from: str | None
    manifest: Manifest

    @property
    def budget(self) -> Budget:
        """How far from FP32 its other precisions may be."""
        return Budget(**self.manifest.budget.model_dump())

    @property
    def calibration(self) -> str:
        """What is known of what its probabilities are worth, from the scores of these very bytes if it has any."""
        try:
            scores = json.loads((self.folder / "scores.json").read_text())
            error, data = float(scores["calibration"]["expected_error"]), scores["data"]
            is_its_own = scores["bundle"]["digest"] == self.digest
        except (OSError, ValueError, KeyError, TypeError):  # a bundle may have none, and nothing computes with them
            is_its_own = False
        if not is_its_own:
            return "not calibrated"
        return (
            "not calibrated; as the probability that a slice shows the class, the highest of a slice was off by "
            f"{error:.3f} on average (expected calibration error), on this data: {data}"
        )

    @property
    def is_signed(self) -> bool:
        """Whether somebody vouches for it; by whom, `open_bundle` asks."""
        return (self.folder / SIGNATURE).exists()

    def graph(self, precision: str) -> Path:
        """Path of the ONNX graph of a precision."""
        files: dict[str, str] = {**self.manifest.precisions}
        if precision not in files:
            remedy = "`scanside calibrate` makes it" if precision in FILES else "there is no such precision"
            raise BundleError(f"{self.folder}: no {precision} graph, only {', '.join(files)}: {remedy}")
        return self.folder / files[precision]

    def sha256(self, precision: str) -> str:
        """SHA-256 of a precision's graph and of whatever it may refer to: all that computes but the other graphs."""
        graphs = {*self.manifest.precisions.values()} - {self.graph(precision).name}
        files = sorted(self.manifest.computing - graphs)
        return hashlib.sha256("".join(self.manifest.files[name] for name in files).encode()).hexdigest()

    def check_ruling(self, precision: str) -> None:
        """Refuse a precision that `scanside verify` has not passed in these very bytes.

        FP32 is what the others are held against; its own proof is parity with PyTorch, which export demands.

        Raises
        ------
        BundleError : the bundle has no such precision
        NotVerified : no ruling, one about other bytes, or one that it failed

        """
        sha256 = self.sha256(precision)  # a precision that the bundle has not is no question of rulings
        if precision == "fp32":
            return
        ruling = self.manifest.rulings.get(precision)  # type: ignore[call-overload]
        if ruling is None or ruling.sha256 != sha256:
            raise NotVerified(
                f"{self.name} {self.version}: {precision} is not verified: run `scanside verify {self.folder}`"
            )
        if not ruling.passed:
            raise NotVerified(f"{self.name} {self.version}: {precision} failed: {'; '.join(ruling.reasons)}")

    def golden(self) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
        """Golden views ``(N, shown, H, W)`` HU, and the labels that PyTorch gave them ``(N * answered, H, W)``."""
        with np.load(self.folder / "golden.npz", allow_pickle=False) as arrays:
            return arrays["hu"], arrays["labels"]


def open_bundle(folder: Path | None = None, trusted_keys: Sequence[Path] = ()) -> Bundle:
    """Read a bundle and check the hash of each of its files; without a folder, the one that ships with scanside.

    Parameters
    ----------
    trusted_keys : public keys (Ed25519, PEM), one of which must have signed it; none: any whole bundle

    Raises
    ------
    BundleError : no manifest, one of another format, a key or a file missing, a file too many, no signature
    BundleTampered : a file's hash is not the manifest's, or the signature is of nobody trusted

    """
    folder = folder or SHIPPED
    path = folder / "manifest.json"
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = f"manifest.json: {error.strerror}"
        raise BundleError(f"{folder} is no bundle: {reason}; name a folder that `scanside export` made") from None
    if trusted_keys:
        from runtime import signature  # noqa: PLC0415  # most bundles are served without

        signature.check(data, folder / SIGNATURE, trusted_keys)
    manifest = parse(data, path)
    strange = {one.name for one in folder.iterdir()} - manifest.files.keys() - {path.name, SIGNATURE}
    if strange:
        raise BundleError(f"{folder}: {', '.join(sorted(strange))}: not in the manifest: take it out of the bundle")
    for name, expected in manifest.files.items():
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
    return Bundle(
        folder=folder,
        digest=_digest(manifest),
        name=manifest.name,
        version=manifest.version,
        intended_use=manifest.intended_use,
        training_data=manifest.training_data,
        classes=tuple(one.name for one in manifest.classes),
        view=View(manifest.view.shown, manifest.view.answered),
        operating_point=manifest.operating_point,
        learnt_from=manifest.learnt_from,
        manifest=manifest,
    )


def describe(bundle: Bundle) -> dict[str, Any]:
    """What a bundle is, and what each of its precisions is worth."""
    manifest = bundle.manifest
    weights = (bundle.folder / manifest.weights).stat().st_size if manifest.weights else 0
    precisions = []
    for name, file in manifest.precisions.items():
        try:
            bundle.check_ruling(name)
            serves = "yes" if name in PROCESSOR else "on TensorRT, after `scanside build`"
        except NotVerified as error:
            serves = str(error)
        size = (bundle.folder / file).stat().st_size
        precisions.append(
            {"precision": name, "file": file, "bytes": size, "sha256": bundle.sha256(name), "serves": serves}
        )
    return {
        "bundle": str(bundle.folder),
        "name": bundle.name,
        "version": bundle.version,
        "digest": bundle.digest,
        "intended_use": bundle.intended_use,
        "training_data": bundle.training_data,
        "licence": manifest.licence,
        "classes": ", ".join(bundle.classes),
        "signed": bundle.is_signed,
        "weights_bytes": weights,
        "precisions": precisions,
    }


def differences(first: Bundle, second: Bundle) -> list[dict[str, str]]:
    """Entries of two manifests that differ: ``entry``, ``first``, ``second``."""
    one, two = (_flat(bundle.manifest.model_dump(mode="json")) for bundle in (first, second))
    return [
        {"entry": key, "first": one.get(key, ""), "second": two.get(key, "")}
        for key in sorted(one.keys() | two.keys())
        if one.get(key) != two.get(key)
    ]


def _flat(value: object, name: str = "") -> dict[str, str]:
    if not isinstance(value, dict):
        return {name: json.dumps(value)}
    return {key: text for k, v in value.items() for key, text in _flat(v, f"{name}.{k}" if name else str(k)).items()}


def _digest(manifest: Manifest) -> str:
    """SHA-256 over what decides the answers: scores, card and rulings may be added later and change nothing."""
    decisive = manifest.model_dump(mode="json", exclude={"rulings", "provenance"}, exclude_none=True)
    decisive["files"] = {name: manifest.files[name] for name in sorted(manifest.computing)}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
