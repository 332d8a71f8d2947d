"""Sessions: one engine, opened for life, that turns Hounsfield units into labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from runtime.errors import BackendError, InferenceError, SelfTestFailed
from runtime.types import ModelIdentity, SliceLabels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from runtime.bundle import Bundle

# share of a golden slice's pixels that may differ from PyTorch's: whether a precision may serve is the verdict's
# business, whether this engine computes it is the self-test's
SELF_TEST_DISAGREEMENT = {"fp32": 1e-3, "fp16": 1e-3, "int8": 1e-2, "int8-cpu": 1e-2}
GOLDEN_PIXELS, GOLDEN_CHANGE = 300, 0.1  # of a class in all golden slices; share by which it may change


class Session(Protocol):
    """An opened engine. Not for use from several threads at once."""

    identity: ModelIdentity

    def infer(self, hu: NDArray[np.int16] | NDArray[np.int32]) -> list[SliceLabels]:
        """Labels of the slices that N views answer, in order, from HU ``(N, shown, H, W)`` (`runtime.geometry.View`).

        Raises
        ------
        InferenceError : the engine fails, or its answer is not valid

        """

    def close(self) -> None:
        """Give back what the engine holds."""


def open_session(
    bundle: Bundle, backend: str = "auto", *, precision: str = "fp32", threads: int = 0, on_trial: bool = False
) -> Session:
    """Open a bundle on a backend.

    Parameters
    ----------
    backend : ``"onnxruntime"`` or ``"auto"``, which takes it too: it is the one engine this version has
    precision : one that the bundle has
    threads : for the processor's engine; 0 takes all cores
    on_trial : open a precision that has not passed, to find out whether it does

    Raises
    ------
    BundleError : the bundle has no such precision
    NotVerified : it has, but no verdict has passed it
    BackendError : an unknown backend, or an engine that does not take the graph

    """
    if backend not in ("auto", "onnxruntime"):
        raise BackendError(f"backend {backend!r} is not one of auto, onnxruntime")
    from runtime.ort import OrtSession  # noqa: PLC0415  # engines load when they are asked for

    bundle.graph(precision)
    if precision not in OrtSession.PRECISIONS:
        raise BackendError(
            f"{precision} is TensorRT's: ONNX Runtime on a processor takes {' or '.join(OrtSession.PRECISIONS)}"
        )
    if not on_trial:
        bundle.check_ruling(precision)
    return OrtSession(bundle, precision, threads=threads)


def checked(
    labels: NDArray[np.uint8],
    voxels: NDArray[np.float32],
    evidence: NDArray[np.float32],
    classes: int,
    shape: tuple[int, ...],
) -> list[SliceLabels]:
    """Split a batch's outputs into slices, each of them checked against itself.

    Parameters
    ----------
    shape : that the labels must have, ``(slices, H, W)``

    Raises
    ------
    InferenceError : fewer or other slices than were asked for, a label that is no class, counts that are not those of
        the labels, or evidence that is no probability (an overflow, a dead engine)

    """
    if labels.shape != shape or voxels.shape != (shape[0], classes) or evidence.shape != voxels.shape:
        raise InferenceError(f"answers of shape {labels.shape}, {voxels.shape}, {evidence.shape} to slices of {shape}")
    if labels.max(initial=0) >= classes:
        raise InferenceError(f"label {labels.max()} of {classes} classes: the engine returned something else")
    counts = voxels.astype(np.int64)
    counted = np.stack([np.bincount(one.ravel(), minlength=classes) for one in labels])
    if (counted != counts).any():
        raise InferenceError(f"voxel counts {counts.tolist()} are not those of the labels: {counted.tolist()}")
    if not np.isfinite(evidence).all() or evidence.min() < 0 or evidence.max() > 1 + 1e-4:
        raise InferenceError("evidence is no probability: the engine overflowed or returned nothing")
    return [SliceLabels(*one) for one in zip(labels, counts, evidence, strict=True)]


def self_test(session: Session, bundle: Bundle) -> float:
    """Run the golden slices and compare with the answers recorded at export.

    Returns
    -------
    share of pixels that differ, over the worst slice

    Raises
    ------
    SelfTestFailed : more than 0.1 % of a slice differs, of INT8 1 %; or a class has changed by more than a tenth

    """
    hu, expected = bundle.golden()
    answers = session.infer(hu)
    worst = max(_disagreements(answers, expected))
    limit = SELF_TEST_DISAGREEMENT[session.identity.precision]
    if worst > limit:
        raise SelfTestFailed(
            f"{session.identity.backend}: {worst:.2%} of a golden slice's pixels differ from PyTorch "
            f"(limit {limit:.2%}): do not use this engine with {bundle.name} {bundle.version}"
        )
    counted, golden = np.sum([one.voxels for one in answers], axis=0), np.bincount(expected.ravel(), minlength=1)
    for c, name in enumerate(bundle.classes[: len(golden)]):
        if golden[c] >= GOLDEN_PIXELS and abs(counted[c] - golden[c]) > GOLDEN_CHANGE * golden[c]:
            raise SelfTestFailed(
                f"{session.identity.backend}: {counted[c]} pixels of {name} in the golden slices, PyTorch {golden[c]}: "
                f"do not use this engine with {bundle.name} {bundle.version}"
            )
    return worst


def _disagreements(answers: Sequence[SliceLabels], expected: NDArray[np.uint8]) -> list[float]:
    return [float((one.labels != truth).mean()) for one, truth in zip(answers, expected, strict=True)]
