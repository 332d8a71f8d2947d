"""A checkpoint to a bundle: graph, golden slices, parity against PyTorch, and the seal over all of them."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import torch

from calibration.activations import float_tensors, observe
from calibration.half import to_half
from calibration.weights import FILE as WEIGHTS
from calibration.weights import rounded, store
from export import lint
from export.graph import ExportError, to_onnx
from runtime.bundle import open_bundle
from runtime.manifest import FILES, FORMAT
from runtime.seal import seal
from runtime.session import open_session, self_test
from runtime.verdict import Budget

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from models.graph import HeadCT
    from training.recipe import Contract

PARITY = (1e-4, 1e-3)  # share of a slice's pixels, and probability, in which the graph may differ from PyTorch
ROUNDED = (1e-3, 1e-2)  # and once its weights are rounded to FP16


def write(
    contract: Contract,
    graph: HeadCT,
    golden_hu: NDArray[np.int16],
    folder: Path,
    *,
    minimum_ml: float,
    learnt_from: str | None = None,
    model: onnx.ModelProto | None = None,
) -> dict[str, Any]:
    """Export a trained network into `folder` and prove that ONNX Runtime answers as PyTorch does.

    Parameters
    ----------
    contract : names, classes and input; of a trained network its recipe
    golden_hu : ``(N, shown, H, W)`` views, for parity and self-test; with blood and without
    minimum_ml : operating point, the smallest volume of a class that counts as a finding
    learnt_from : `training.collection.fingerprint` of the patients; None for phantoms, ``"unknown"`` for a network
        from elsewhere
    model : the graph, where `graph` can't be traced (`export.foreign`)

    Returns
    -------
    the parity report

    Raises
    ------
    ExportError : the folder is in use, the graph is not equal to PyTorch within the budget, or holds what an engine
        would refuse; then nothing is written

    """
    if (folder / "manifest.json").exists():
        raise ExportError(f"{folder} holds a bundle: choose another folder or remove it")
    with torch.no_grad():
        expected = [out.numpy() for out in graph(torch.from_numpy(golden_hu.astype(np.int32)))]
    exact = model or to_onnx(graph)
    full = rounded(exact)
    parity = {
        "reference": f"torch {torch.__version__}, float32, CPU",
        "engine": f"onnxruntime {onnxruntime.__version__} CPUExecutionProvider",
        "slices": len(golden_hu),
        "traced": _distance(exact, golden_hu, expected, *PARITY),
        "with_weights_rounded_to_fp16": _distance(full, golden_hu, expected, *ROUNDED),
    }
    parity["passed"] = parity["traced"]["passed"] and parity["with_weights_rounded_to_fp16"]["passed"]
    if not parity["passed"]:
        raise ExportError(f"the exported graph is not PyTorch's network: {parity}")
    seen = observe(full, float_tensors(full), golden_hu)
    half, kept = to_half(full, {name: one.peak for name, one in seen.items()})
    found = [*lint.check(full), *lint.check(half)]
    if found:
        raise ExportError("; ".join(found))
    folder.mkdir(parents=True, exist_ok=True)
    store({FILES["fp32"]: full, FILES["fp16"]: half}, folder)
    (folder / "parity.json").write_text(json.dumps(parity, indent=2) + "\n")
    np.savez_compressed(folder / "golden.npz", hu=golden_hu, labels=expected[0])
    manifest = {
        "format": FORMAT,
        "name": contract.name,
        "version": contract.version,
        "intended_use": "research only; not a medical device",
        "training_data": contract.training_data,
        "licence": contract.licence,
        "classes": [
            {"name": name, "codes": dataclasses.asdict(code) if (code := contract.codes.get(name)) else None}
            for name in contract.classes
        ],
        "input": contract.input.model_dump(mode="json"),
        "view": dataclasses.asdict(contract.input.view),
        "precisions": {name: FILES[name] for name in ("fp32", "fp16")},
        "weights": WEIGHTS,
        "minimum_volume_ml": dict.fromkeys(contract.classes[1:], minimum_ml),
        "budget": dataclasses.asdict(Budget()),
        "learnt_from": learnt_from,
        "provenance": {
            "recipe": contract.model_dump(mode="json"),
            "parameters": sum(one.numel() for one in graph.network.parameters()),
            "fp16_kept_fp32": kept,
            "versions": {"torch": torch.__version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__},
        },
    }
    seal(folder, manifest)
    self_test(open_session(open_bundle(folder)), open_bundle(folder))
    return parity


def _distance(
    model: onnx.ModelProto, hu: NDArray[np.int16], expected: Sequence[NDArray[Any]], labels: float, evidence: float
) -> dict[str, Any]:
    """How far ONNX Runtime's answers with a graph are from PyTorch's, over the worst slice, and whether that may be.

    Parameters
    ----------
    labels : share of a slice's pixels that may differ
    evidence : difference that a class's highest probability may have

    """
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = ["labels", "voxels", "evidence"]
    pairs = list(zip(session.run(names, {"hu": hu.astype(np.int32)}), expected, strict=True))
    (ours, theirs), *_ = pairs
    disagreement = float((ours != theirs).reshape(len(ours), -1).mean(1).max())
    counts, error = (float(np.abs(one - two).max()) for one, two in pairs[1:])
    return {
        "worst_slice_label_disagreement": disagreement,
        "worst_voxel_count_difference": int(counts),
        "worst_evidence_difference": error,
        "budget": {"label_disagreement": labels, "evidence_difference": evidence},
        "passed": disagreement <= labels and error <= evidence,
    }
