"""ONNX Runtime: the default engine, on any machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnxruntime

from runtime.errors import BackendError, InferenceError
from runtime.manifest import PROCESSOR
from runtime.session import checked
from runtime.types import ModelIdentity, SliceLabels

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from runtime.bundle import Bundle


class OrtSession:
    """A bundle's graph of one precision on the processor.

    Parameters
    ----------
    graph : another graph in its place, serialised: one that shows more of itself
    threads : 0 takes all cores

    """

    PRECISIONS = PROCESSOR

    def __init__(
        self, bundle: Bundle, precision: str = "fp32", *, graph: bytes | None = None, threads: int = 0
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors; its warnings are about graphs, which export has checked
        path = bundle.graph(precision)
        try:
            self._session = onnxruntime.InferenceSession(graph or path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base class below Exception
            raise BackendError(
                f"{path}: ONNX Runtime {onnxruntime.__version__} does not take the graph: {error}"
            ) from error
        self._classes, self._answered = len(bundle.classes), bundle.view.answered
        self.identity = ModelIdentity(
            name=bundle.name,
            version=bundle.version,
            digest=bundle.digest,
            precision=precision,
            backend=f"onnxruntime {onnxruntime.__version__} {self._session.get_providers()[0]}",
            training_data=bundle.training_data,
            codes={one.name: one.codes for one in bundle.manifest.classes if one.codes},
        )

    def infer(self, hu: NDArray[np.int16] | NDArray[np.int32]) -> list[SliceLabels]:
        """Labels of the slices that N views answer, from HU ``(N, shown, H, W)``."""
        try:
            labels, voxels, evidence = self._session.run(
                ["labels", "voxels", "evidence"], {"hu": np.ascontiguousarray(hu, dtype=np.int32)}
            )
        except Exception as error:  # as above
            raise InferenceError(f"ONNX Runtime failed on a batch of shape {hu.shape}: {error}") from error
        return checked(labels, voxels, evidence, self._classes, (len(hu) * self._answered, *hu.shape[2:]))

    def close(self) -> None:
        del self._session
