"""A checkpoint to a bundle: graph, golden slices, parity against PyTorch, and the seal over all of them."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import torch

from calibration import lint
from calibration.activations import float_tensors, observe
from calibration.emulation import rounded_everywhere
from calibration.half import to_half
from calibration.weights import FILE as WEIGHTS
from calibration.weights import rounded, store
from export.errors import ExportError
from export.graph import to_onnx
from runtime import seal
from runtime.engine import OUTPUTS
from runtime.manifest import FILES, FORMAT
from runtime.verdict import Budget

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from models.graph import HeadCT
    from runtime.types import OperatingPoint
    from training.recipe import Contract

PARITY = (1e-4, 1e-3)  # share of a slice's pixels, and probability, in which the graph may differ from PyTorch
ROUNDED = (1e-3, 1e-2)  # and once its kernels are rounded to FP16, which halves a bundle; else they stay as they are
HALF = (2e-2, 0.1)  # and in FP16: whether that is good enough to serve is the verdict's business, broken is export's


def write(
    contract: Contract,
    graph: HeadCT,
    golden_hu: NDArray[np.int16],
    folder: Path,
    *,
    point: OperatingPoint,
    learnt_from: str | None = None,
    model: onnx.ModelProto | None = None,
) -> dict[str, Any]:
    """Export a trained network into `folder` and prove that ONNX Runtime answers as PyTorch does.

    Parameters
    ----------
    contract : names, classes and input; of a trained network its recipe
    golden_hu : ``(N, shown, H, W)`` views, for parity and self-test; with blood and without
    point : operating point of each class
    learnt_from : `training.collection.fingerprint` of the patients; None for phantoms, ``"unknown"`` for a network
        from elsewhere
    model : the graph, where `graph` can't be traced (`export.foreign`)

    Returns
    -------
    the parity report

    Raises
    ------
    ExportError : the folder is in use, the network does not answer with logits of the contract's classes, the graph is
        not equal to PyTorch within the budget, or holds what an engine would refuse; then nothing is written

    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder} holds something, a bundle perhaps: choose another folder or remove it")
    view = contract.input.view
    if (graph.shown, graph.answered) != (view.shown, view.answered):
        raise ExportError(
            f"{contract.name} shows {view.shown} slices and wants {view.answered} answered; "
            f"the network takes {graph.shown} and answers {graph.answered}: make them agree"
        )
    hu = golden_hu.astype(np.int32)
    with torch.no_grad():
        logits = graph.network(graph.prepare(torch.from_numpy(hu)))
        _check_logits(logits, contract)
        expected = [out.numpy() for out in graph.answer(logits, torch.from_numpy(hu))]
    exact = model or to_onnx(graph)
    short = rounded(exact)
    shortened = _distance(short, hu, expected, ROUNDED)
    full = short if shortened["passed"] else exact
    seen = observe(full, float_tensors(full), golden_hu)
    half, kept = to_half(full, {name: one.peak for name, one in seen.items()})
    found = [*lint.check(full), *lint.check(half)]
    if found:
        raise ExportError("; ".join(found))
    parity: dict[str, Any] = {
        "reference": getattr(graph.network, "reference", f"torch {torch.__version__}, float32, CPU"),
        "engine": f"onnxruntime {onnxruntime.__version__} CPUExecutionProvider",
        "slices": len(hu),
        "traced": _distance(exact, hu, expected, PARITY),
        "with_kernels_rounded_to_fp16": {"kept": full is short, **shortened},
        "fp16": {"kept_fp32": kept, **_distance(rounded_everywhere(half), hu, expected, HALF)},
    }
    far = [_in_words(name, parity[name]) for name in ("traced", "fp16") if not parity[name]["passed"]]
    if far:
        raise ExportError("; ".join(far))
    parity["passed"] = True

    def put(partial: Path) -> dict[str, Any]:
        store({FILES["fp32"]: full, FILES["fp16"]: half}, partial)
        (partial / "parity.json").write_text(json.dumps(parity, indent=2) + "\n")
        np.savez_compressed(partial / "golden.npz", hu=golden_hu, labels=expected[0])
        return _manifest(contract, graph, point, learnt_from)

    if folder.exists():
        folder.rmdir()
    seal.make(folder, put)
    return parity


def _in_words(name: str, distance: dict[str, Any]) -> str:
    limits = distance["budget"]
    return (
        f"the {'FP16' if name == 'fp16' else 'traced'} graph answers otherwise than PyTorch: "
        f"{distance['worst_slice_label_disagreement']:.2%} of a slice's labels (limit "
        f"{limits['label_disagreement']:.2%}), a probability by {distance['worst_evidence_difference']:.4f} (limit "
        f"{limits['evidence_difference']:g})"
    )


def _check_logits(logits: torch.Tensor, contract: Contract) -> None:
    """Refuse a network that answers for another number of classes, or with probabilities."""
    answered, classes = logits.shape[1], len(contract.classes)
    if answered != classes and (answered, classes) != (1, 2):
        one = ", or one for blood" if classes == 2 else ""
        raise ExportError(f"the network answers with {answered} logits; {contract.name} has {classes} classes{one}")
    total = logits.sum(dim=1) if answered > 1 else torch.ones(1)
    between = logits.min() >= 0 and logits.max() <= 1 and logits.min() < logits.max()
    if between and torch.allclose(total, torch.ones_like(total), atol=1e-3):
        raise ExportError(
            "the network answers with probabilities, as after a softmax or a sigmoid: scanside takes logits and makes "
            "the probabilities itself, so export the network without its last step"
        )


def _manifest(contract: Contract, graph: HeadCT, point: OperatingPoint, learnt_from: str | None) -> dict[str, Any]:
    versions = {"torch": torch.__version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
    return {
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
        **{name: dict.fromkeys(contract.classes[1:], value) for name, value in dataclasses.asdict(point).items()},
        "budget": dataclasses.asdict(Budget()),
        "learnt_from": learnt_from,
        "provenance": {
            "recipe": contract.model_dump(mode="json"),
            "parameters": sum(one.numel() for one in graph.network.parameters()),
            "versions": versions,
        },
    }


def _distance(
    model: onnx.ModelProto, hu: NDArray[np.int32], expected: Sequence[NDArray[Any]], limits: tuple[float, float]
) -> dict[str, Any]:
    """How far ONNX Runtime's answers with a graph are from PyTorch's, over the worst slice, and whether that may be.

    One view at a time, and all of them together: a trace may have kept the size of its batch.

    Parameters
    ----------
    limits : share of a slice's pixels that may differ, and of the highest probability of a class

    """
    labels, evidence = limits
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        together = session.run(OUTPUTS, {"hu": hu})
        alone = session.run(OUTPUTS, {"hu": hu[:1]})
    except Exception as error:  # onnxruntime's exceptions share no base class below Exception
        raise ExportError(f"the graph does not run on batches of {len(hu)} and 1: {error}") from error
    if any(one.shape[1:] != two.shape[1:] for one, two in zip(alone, together, strict=True)):
        raise ExportError(f"the graph answers a batch of 1 with {[one.shape for one in alone]}")
    (labels_here, evidence_here), (labels_there, evidence_there) = together, expected
    disagreement = float((labels_here != labels_there).reshape(len(labels_here), -1).mean(1).max())
    error = float(np.abs(evidence_here - evidence_there).max())
    return {
        "worst_slice_label_disagreement": disagreement,
        "worst_evidence_difference": error,
        "budget": {"label_disagreement": labels, "evidence_difference": evidence},
        "passed": disagreement <= labels and error <= evidence,
    }
