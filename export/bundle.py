"""A checkpoint to a bundle: graph, golden slices, parity against PyTorch, and the seal over all of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from export.graph import ExportError, to_onnx
from runtime.bundle import FORMAT, open_bundle
from runtime.session import open_session

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from models.graph import HeadCT
    from training.recipe import Recipe

PARITY_LABELS = 1e-4  # share of pixels in which the graph may differ from PyTorch, over the worst slice
PARITY_EVIDENCE = 1e-3


def write(
    recipe: Recipe,
    graph: HeadCT,
    classes: tuple[str, ...],
    golden_hu: NDArray[np.int16],
    folder: Path,
    *,
    minimum_ml: float,
    learnt_from: str | None = None,
) -> dict[str, Any]:
    """Export a trained network into `folder` and prove that ONNX Runtime answers as PyTorch does.

    Parameters
    ----------
    golden_hu : ``(N, shown, H, W)`` views, for parity and self-test; with blood and without
    minimum_ml : operating point, the smallest volume of a class that counts as a finding
    learnt_from : `training.collection.fingerprint` of the patients; None for phantoms

    Returns
    -------
    the parity report

    Raises
    ------
    ExportError : the folder is in use, or the graph is not equal to PyTorch within the budget (nothing is left behind
        sealed)

    """
    if (folder / "manifest.json").exists():
        raise ExportError(f"{folder} holds a bundle: choose another folder or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(to_onnx(graph).SerializeToString())
    with torch.no_grad():
        expected = [out.numpy() for out in graph(torch.from_numpy(golden_hu.astype(np.int32)))]
    np.savez_compressed(folder / "golden.npz", hu=golden_hu, labels=expected[0])
    manifest = {
        "format": FORMAT,
        "name": recipe.name,
        "version": recipe.version,
        "intended_use": "research only; not a medical device",
        "training_data": recipe.training_data,
        "classes": list(classes),
        "input": recipe.input.model_dump(mode="json"),
        "view": dataclasses.asdict(recipe.input.view),
        "precisions": {"fp32": "model.onnx"},
        "minimum_volume_ml": dict.fromkeys(classes[1:], minimum_ml),
        "learnt_from": learnt_from,
    }
    seal(folder, manifest)
    parity = _parity(folder, golden_hu, expected)
    if not parity["passed"]:
        (folder / "manifest.json").unlink()
        raise ExportError(f"the exported graph is not PyTorch's network: {parity}")
    (folder / "parity.json").write_text(json.dumps(parity, indent=2) + "\n")
    seal(folder, manifest)
    return parity


def _parity(folder: Path, hu: NDArray[np.int16], expected: list[NDArray[Any]]) -> dict[str, Any]:
    bundle = open_bundle(folder)
    session = open_session(bundle, "onnxruntime")
    answers = session.infer(hu)
    labels, voxels, evidence = expected
    disagreement = max(float((a.labels != truth).mean()) for a, truth in zip(answers, labels, strict=True))
    evidence_error = max(float(np.abs(a.evidence - truth).max()) for a, truth in zip(answers, evidence, strict=True))
    return {
        "reference": f"torch {torch.__version__}, float32, CPU",
        "engine": session.identity.backend,
        "precision": "fp32",
        "slices": len(hu),
        "worst_slice_label_disagreement": disagreement,
        "worst_voxel_count_difference": max(
            int(np.abs(a.voxels - v).max()) for a, v in zip(answers, voxels, strict=True)
        ),
        "worst_evidence_difference": evidence_error,
        "budget": {"label_disagreement": PARITY_LABELS, "evidence_difference": PARITY_EVIDENCE},
        "passed": disagreement <= PARITY_LABELS and evidence_error <= PARITY_EVIDENCE,
    }


def add(folder: Path, files: dict[str, str]) -> None:
    """Put text files (scores, model card) into a bundle and seal it again.

    Raises
    ------
    BundleError : the folder is no intact bundle

    """
    open_bundle(folder)
    for name, text in files.items():
        (folder / name).write_text(text)
    manifest = json.loads((folder / "manifest.json").read_text())
    seal(folder, manifest)


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Write manifest.json with the SHA-256 of every other file: last and at once, so that half a bundle has none."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != "manifest.json")
    manifest["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    partial = folder.parent / f"{folder.name}.manifest.partial"
    partial.write_text(json.dumps(manifest, indent=2) + "\n")
    os.replace(partial, folder / "manifest.json")  # noqa: PTH105  # replace() of a path to another name, atomically
