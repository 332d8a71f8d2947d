"""A bundle's graph in Triton's Python backend, for servers that have no backend of ONNX Runtime.

Copied into a model repository as ``model.py``; it runs in the server's own Python, which needs numpy and onnxruntime.
It loads no graph but that of which the configuration has the hash: no node sees the server's files.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before it starts, or it tells Microsoft of models and sessions

import onnxruntime
import triton_python_backend_utils as triton  # brought by the server

OUTPUTS = ("labels", "evidence")
THREADS = "intra_op_thread_count"  # as Triton's own backend of ONNX Runtime calls it


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(parameters[THREADS]["string_value"])
        graph = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        content, said = graph.read_bytes(), parameters[f"sha256 {graph.name}"]["string_value"]
        found = hashlib.sha256(content).hexdigest()
        if found != said:
            raise triton.TritonModelException(
                f"{graph} is another graph: its SHA-256 is {found}, config.pbtxt says {said}: remove the model's "
                "folder, and write it anew by `scanside bundle triton`"
            )
        self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request by itself: one that fails must not take the others with it."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        hu = triton.get_input_tensor_by_name(request, "hu").as_numpy()
        try:
            answers = self._session.run(OUTPUTS, {"hu": hu})
        except Exception as error:  # noqa: BLE001  # onnxruntime's exceptions share no base class below Exception
            return triton.InferenceResponse(error=triton.TritonError(str(error)))
        tensors = [triton.Tensor(name, array) for name, array in zip(OUTPUTS, answers, strict=True)]
        return triton.InferenceResponse(tensors)
