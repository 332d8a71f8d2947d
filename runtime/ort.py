"""ONNX Runtime: the default engine, on any machine."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime

from runtime.engine import OUTPUTS
from runtime.errors import BackendError, InferenceError
from runtime.session import checked, identity

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from runtime.bundle import Bundle
    from runtime.types import SliceLabels

    Outputs = list[NDArray]


TENSORS = {"hu": "tensor(int32)", "labels": "tensor(uint8)", "evidence": "tensor(float)"}  # of a bundle's graph
MOST_AT_ONCE = 4  # views in work side by side: each has its own activations in memory


class OrtSession:
    """A bundle's graph of one precision on the processor, or on the GPU through ONNX Runtime's CUDA provider.

    Views go as one batch, with all threads. On a processor with several, `max_batch` views and more (as many as there
    are threads, but not more than `MOST_AT_ONCE`) go side by side with a thread or more each, which on two cores takes
    a quarter to a third less time than one after the other or as a batch: operators that don't divide well no longer
    keep cores waiting. The answers are the same to the bit.

    Parameters
    ----------
    bundle : whose graph it is
    precision : one that the bundle has
    graph : another graph in its place, serialised: one that shows more of itself
    threads : of the processor; 0 takes all cores
    provider : ``"CPUExecutionProvider"`` or ``"CUDAExecutionProvider"``, and no other in its place
    why : as of `runtime.session.Session`

    Raises
    ------
    BundleError : the bundle has no such precision
    BackendError : this ONNX Runtime has no such provider or it does not start, or it does not take the graph, which may
        be none of a bundle

    """

    sizes = None

    def __init__(
        self,
        bundle: Bundle,
        precision: str = "fp32",
        *,
        graph: bytes | None = None,
        threads: int = 0,
        provider: str = "CPUExecutionProvider",
        why: str = "asked for",
    ) -> None:
        path = bundle.graph(precision)
        has = onnxruntime.get_available_providers()
        if provider not in has:
            raise BackendError(
                f"ONNX Runtime {onnxruntime.__version__} has {', '.join(has)}, not {provider}: replace onnxruntime by "
                "onnxruntime-gpu"
            )

        def opened(threads: int) -> onnxruntime.InferenceSession:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            # threads that wait sleep: spinning, they take the core that receives slices and draws pictures (measured
            # beside another load: 56 instead of 92 ms a slice, 54 instead of 89 ms of processor)
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            options.log_severity_level = 3  # errors; its warnings are about graphs, which export has checked
            # TF32 would be no FP32: it has FP16's mantissa
            asked = (provider, {"use_tf32": "0"}) if provider == "CUDAExecutionProvider" else provider
            return onnxruntime.InferenceSession(graph or path, options, providers=[asked])

        cores = threads or _cores()
        at_once = min(cores, MOST_AT_ONCE) if provider == "CPUExecutionProvider" else 1
        try:
            self._session = opened(threads)
            # those that call are at work, too
            self._beside = opened(cores - at_once + 1) if at_once > 1 else None
        except Exception as error:  # onnxruntime's exceptions share no base class below Exception
            raise BackendError(
                f"{path}: ONNX Runtime {onnxruntime.__version__} does not take the graph: {error}"
            ) from error
        if self._session.get_providers()[0] != provider:  # it falls back in silence
            raise BackendError(f"ONNX Runtime {onnxruntime.__version__}: {provider} does not start: see `nvidia-smi`")
        found = {one.name: one.type for one in (*self._session.get_inputs(), *self._session.get_outputs())}
        if not TENSORS.items() <= found.items():
            has, wanted = (", ".join(f"{name} {kind}" for name, kind in each.items()) for each in (found, TENSORS))
            raise BackendError(f"{path}: takes and answers {has}; a bundle's graph {wanted}: export it again")
        self._callers = ThreadPoolExecutor(at_once, "view")
        self.max_batch = at_once if provider == "CPUExecutionProvider" else MOST_AT_ONCE
        self._classes, self._answered = len(bundle.classes), bundle.view.answered
        self.identity = identity(bundle, precision, f"onnxruntime {onnxruntime.__version__} {provider}")
        self.why = why

    def infer(self, hu: NDArray[np.int16] | NDArray[np.int32]) -> list[SliceLabels]:
        """Labels of the slices that N views answer, from HU ``(N, shown, H, W)``.

        Raises
        ------
        InferenceError : the engine fails, or its answer is not valid

        """
        answers = self.run(np.ascontiguousarray(hu, dtype=np.int32))
        shape = len(hu) // len(answers) * self._answered, *hu.shape[2:]
        return [one for outputs in answers for one in checked(*outputs, self._classes, shape)]

    def run(self, hu: NDArray[np.int32]) -> list[Outputs]:
        """Outputs of the graph of views ``(N, shown, H, W)``, in their order; of all together, or of each.

        Raises
        ------
        InferenceError : the engine fails

        """
        if self._beside is None or len(hu) < self.max_batch:
            return [self._run(self._session, hu)]
        return list(self._callers.map(partial(self._run, self._beside), np.split(hu, len(hu))))

    @staticmethod
    def _run(session: onnxruntime.InferenceSession, hu: NDArray[np.int32]) -> Outputs:
        try:
            return session.run(OUTPUTS, {"hu": hu})
        except Exception as error:  # as above
            raise InferenceError(f"ONNX Runtime failed on a batch of shape {hu.shape}: {error}") from error

    def close(self) -> None:
        self._callers.shutdown()
        self._session = self._beside = None


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
