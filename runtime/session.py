"""Sessions: one engine, opened for life, that turns Hounsfield units into labels."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from runtime.engine import TAKES
from runtime.errors import BackendError, InferenceError, NotForBackend, SelfTestFailed
from runtime.types import ModelIdentity, SliceLabels

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from runtime.bundle import Bundle
    from runtime.triton import Servers

BACKENDS = ("auto", *TAKES)
# share of a golden slice's pixels that may differ from PyTorch's: whether a precision may serve is the verdict's
# business, whether this engine computes it is the self-test's
SELF_TEST_DISAGREEMENT = {"fp32": 1e-3, "fp16": 1e-3, "int8": 1e-2, "int8-cpu": 1e-2}
GOLDEN_PIXELS, GOLDEN_CHANGE = 300, 0.1  # of a class in all golden slices; share by which it may change


class Session(Protocol):
    """An opened engine. Not for use from several threads at once.

    Attributes
    ----------
    identity : what the last answers have to carry, or the first ones
    why : one sentence on how this engine came to be taken
    sizes : (H, W) of the slices that it takes; None for any
    max_batch : views beyond which one call gains nothing

    """

    identity: ModelIdentity
    why: str
    sizes: tuple[tuple[int, int], ...] | None
    max_batch: int

    def infer(self, hu: NDArray[np.int16] | NDArray[np.int32]) -> list[SliceLabels]:
        """Labels of the slices that N views answer, in order, from HU ``(N, shown, H, W)`` (`runtime.geometry.View`).

        Raises
        ------
        InferenceError : the engine fails, or its answer is not valid
        DeviceLost : and only a new process helps

        """

    def close(self) -> None:
        """Give back what the engine holds; a second time it does nothing."""


def open_session(
    bundle: Bundle,
    backend: str = "auto",
    *,
    precision: str = "auto",
    threads: int = 0,
    plans: Path | None = None,
    on_trial: bool = False,
    servers: Servers | None = None,
) -> Session:
    """Open a bundle on a backend.

    Parameters
    ----------
    backend : ``"tensorrt"``, ``"onnxruntime"`` (the processor), ``"onnxruntime-cuda"`` or ``"triton"``, which never
        become another, unless `servers` names one to fail over to; or ``"auto"``: TensorRT where there is a GPU and an
        accepted plan, else ONNX Runtime on the processor. ``Session.why`` says which and why
    precision : one that the bundle has; ``"auto"`` is the fastest that has passed among TensorRT's plans, elsewhere
        FP32
    threads : for the processor's engine; 0 takes all cores
    plans : folder of TensorRT's plans (`runtime.plans`); default: the user's cache
    on_trial : open a precision that has not passed, to find out whether it does
    servers : for ``"triton"``

    Raises
    ------
    BundleError : the bundle has no such precision
    NotVerified : it has, but no verdict has passed it
    BackendError : an unknown backend, or one that can't be had here: no GPU, no plan, a graph that it does not take
    NotForBackend : a precision that the backend takes on no machine

    """
    if backend not in BACKENDS:
        raise BackendError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    if precision != "auto":
        bundle.graph(precision)  # before an engine is blamed for what the bundle has not
        if precision not in TAKES.get(backend, [precision]):
            raise NotForBackend(f"{precision} is not for {backend}: it takes {', '.join(TAKES[backend])}")
    if backend == "triton":
        return _open_triton(bundle, precision, servers, threads=threads, plans=plans, on_trial=on_trial)
    why = "asked for"
    if backend == "tensorrt" or (backend == "auto" and precision != "int8-cpu"):
        from runtime.gpu import open_accepted  # noqa: PLC0415  # engines load when they are asked for

        try:
            taken = "asked for" if backend == "tensorrt" else "there are plans for this GPU"
            return open_accepted(bundle, precision, plans, on_trial=on_trial, why=taken)
        except BackendError as error:
            if backend == "tensorrt":
                raise
            if precision not in ("auto", *TAKES["onnxruntime"]):  # no other precision in silence either
                raise BackendError(f"{error}; or set precision to auto: the processor has no {precision}") from None
            why = f"the processor, for want of a GPU's engine: {error}"
    from runtime.ort import OrtSession  # noqa: PLC0415  # as above

    precision = "fp32" if precision == "auto" else precision
    provider = "CUDAExecutionProvider" if backend == "onnxruntime-cuda" else "CPUExecutionProvider"
    if not on_trial:
        bundle.check_ruling(precision)
    return OrtSession(bundle, precision, threads=threads, provider=provider, why=why)


def _open_triton(
    bundle: Bundle, precision: str, servers: Servers | None, *, threads: int, plans: Path | None, on_trial: bool
) -> Session:
    """Open a bundle on servers, and the engine that answers when they do not: it is tested before it is needed."""
    from runtime.triton import TritonSession  # noqa: PLC0415  # as above

    if servers is None or not servers.addresses:
        raise BackendError("triton has no servers: name them in [triton], or with --server")
    precision = "fp32" if precision == "auto" else precision
    if not on_trial:
        bundle.check_ruling(precision)
    with ExitStack() as opened:
        local = None
        if servers.fail_over:
            local = opened.enter_context(closing(open_session(bundle, servers.fail_over, threads=threads, plans=plans)))
            self_test(local, bundle)
        session = TritonSession(bundle, precision, servers, local)
        opened.pop_all()  # from here on the session closes it
    return session


def identity(bundle: Bundle, precision: str, backend: str) -> ModelIdentity:
    """What every result of a session must carry."""
    return ModelIdentity(
        name=bundle.name,
        version=bundle.version,
        digest=bundle.digest,
        precision=precision,
        backend=backend,
        training_data=bundle.training_data,
        codes={one.name: one.codes for one in bundle.manifest.classes if one.codes},
        calibration=bundle.calibration,
    )


def together(answered: Sequence[ModelIdentity]) -> ModelIdentity:
    """What a result must carry whose slices were answered so: where several engines did, how many by each."""
    counts = Counter((one.backend, one.precision) for one in answered)
    if len(counts) == 1:
        return answered[0]
    backend = "; ".join(f"{n} slice{'s' * (n > 1)} by {engine}, {kind}" for (engine, kind), n in counts.items())
    precisions = ", ".join(dict.fromkeys(kind for _, kind in counts))
    return replace(answered[0], backend=backend, precision=precisions)


def checked(
    labels: NDArray[np.uint8], evidence: NDArray[np.float32], classes: int, shape: tuple[int, ...]
) -> list[SliceLabels]:
    """Split a batch's outputs into slices, each of them checked against itself.

    Parameters
    ----------
    labels : class index of each pixel, ``(slices, H, W)``
    evidence : highest probability of each class in each slice, ``(slices, classes)``
    classes : that there are
    shape : that the labels must have, ``(slices, H, W)``

    Raises
    ------
    InferenceError : fewer or other slices than were asked for, a label that is no class, or evidence that is no
        probability (an overflow, a dead engine)

    """
    if labels.shape != shape or evidence.shape != (shape[0], classes):
        raise InferenceError(f"answers of shape {labels.shape}, {evidence.shape} to slices of {shape}")
    if labels.max(initial=0) >= classes:
        raise InferenceError(f"label {labels.max()} of {classes} classes: the engine returned something else")
    within = np.isfinite(evidence).all() and evidence.min() >= 0 and evidence.max() <= 1 + 1e-4
    # at any one pixel the probabilities make 1; 0.99, for all that engines may round
    if not within or evidence.sum(axis=1).min() < 0.99:
        raise InferenceError("evidence is no probability: the engine overflowed or returned nothing")
    counts = np.array([[np.count_nonzero(one == c) for c in range(classes)] for one in labels])  # bincount's 0.9 ms
    return [SliceLabels(*one) for one in zip(labels, counts, evidence, strict=True)]


def self_test(session: Session, bundle: Bundle) -> float:
    """Run the golden slices and compare with the answers recorded at export.

    Where an engine takes other sizes alone, the slices are made so large, and ONNX Runtime's FP32 says what is right.

    Returns
    -------
    share of pixels that differ, over the worst slice

    Raises
    ------
    SelfTestFailed : more than 0.1 % of a slice differs, of INT8 1 %; or a class has changed by more than a tenth

    """
    hu, expected = bundle.golden()
    if session.sizes is None or session.sizes == (hu.shape[2:],):
        return _compare(session, bundle, hu, expected)
    return max(_compare(session, bundle, *_golden_at(size, bundle)) for size in session.sizes)


def _golden_at(size: tuple[int, int], bundle: Bundle) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Golden slices of another size, each pixel the nearest, and FP32's labels of them."""
    hu, labels = bundle.golden()
    if hu.shape[2:] == size:
        return hu, labels
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, hu.shape[2:], strict=True))
    hu = np.ascontiguousarray(hu[:, :, rows[:, None], columns])
    with closing(open_session(bundle, "onnxruntime")) as engine:
        return hu, np.stack([one.labels for one in engine.infer(hu)])


def _compare(session: Session, bundle: Bundle, hu: NDArray[np.int16], expected: NDArray[np.uint8]) -> float:
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
