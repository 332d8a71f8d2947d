"""A server that speaks KServe v2 over gRPC and nothing more: no extension, and whatever a test wants it to answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceServicer, add_GRPCInferenceServiceServicer_to_server

from runtime.bundle import Bundle
from runtime.kserve import OUTPUTS, VERSION, model_name
from runtime.session import open_session

KINDS = {np.uint8: "UINT8", np.float32: "FP32", np.int64: "INT64"}


class Stub(GRPCInferenceServiceServicer):
    """Answers by ONNX Runtime.

    Attributes
    ----------
    spoil : what becomes of the answers before they go, by name
    slow_s : how long it takes for them
    status : that it answers with instead, and its words
    shape : of the input, as the model's metadata tell it
    asked : shapes of the requests
    parameters : of the model's configuration, which it tells only where there are any

    """

    def __init__(self, bundle: Bundle) -> None:
        self._name = model_name(bundle, "fp32")
        self._session = open_session(bundle, "onnxruntime", threads=1)
        self.shape = (-1, bundle.view.shown, -1, -1)
        self.spoil: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = dict
        self.slow_s = 0.0
        self.status: tuple[grpc.StatusCode, str] | None = None
        self.is_ready = True
        self.asked: list[tuple[int, ...]] = []
        self.parameters: dict[str, str] = {}

    def ServerLive(self, request: Any, context: Any) -> Any:
        return messages.ServerLiveResponse(live=True)

    def ServerReady(self, request: Any, context: Any) -> Any:
        return messages.ServerReadyResponse(ready=self.is_ready)

    def ModelReady(self, request: Any, context: Any) -> Any:
        return messages.ModelReadyResponse(ready=(request.name, request.version) == (self._name, VERSION))

    def ServerMetadata(self, request: Any, context: Any) -> Any:
        extensions = ["model_configuration"] if self.parameters else []
        return messages.ServerMetadataResponse(name="stub", version="1", extensions=extensions)

    def ModelConfig(self, request: Any, context: Any) -> Any:
        told = messages.ModelConfigResponse()
        for key, value in self.parameters.items():
            told.config.parameters[key].string_value = value
        return told

    def ModelMetadata(self, request: Any, context: Any) -> Any:
        told = messages.ModelMetadataResponse(name=self._name, versions=[VERSION], platform="onnx")
        told.inputs.add(name="hu", datatype="INT32", shape=self.shape)
        for name, kind in OUTPUTS.items():
            told.outputs.add(name=name, datatype=KINDS[kind], shape=(-1, -1))
        return told

    def ModelInfer(self, request: Any, context: Any) -> Any:
        (hu,) = request.inputs
        self.asked.append(tuple(hu.shape))
        if self.status:
            context.abort(*self.status)
        time.sleep(self.slow_s)
        answers = self._session.infer(np.frombuffer(request.raw_input_contents[0], np.int32).reshape(hu.shape))
        arrays = {
            name: np.stack([getattr(one, name) for one in answers]).astype(kind) for name, kind in OUTPUTS.items()
        }
        response = messages.ModelInferResponse(model_name=self._name, model_version=VERSION)
        for name, array in self.spoil(arrays).items():
            response.outputs.add(name=name, datatype=KINDS[array.dtype.type], shape=array.shape)
            response.raw_output_contents.append(array.tobytes())
        return response


@contextmanager
def serving(stub: Stub) -> Iterator[str]:
    """Its address, while it is served."""
    server = grpc.server(ThreadPoolExecutor(4))
    add_GRPCInferenceServiceServicer_to_server(stub, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"grpc://127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
