"""CUDA's runtime and TensorRT without a GPU: the calls that scanside makes, on the host's memory.

Streams are queues. What lies in them runs when an event is asked for, one step of a random stream after the other and
no further than waits allow: copies and engines overlap in any order that a GPU might choose.
"""

from __future__ import annotations

import ctypes
import enum
import json
import random
from collections import deque
from functools import lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from runtime.engine import COUNTS, OUTPUTS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Stream(deque):
    """What is still to be done, in order."""


class Error(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorNotReady = 600
    cudaErrorIllegalAddress = 700


class Cuda:
    """Stands in for ``cuda.bindings.runtime``.

    Attributes
    ----------
    held : handles that were given out and not given back
    fails : calls by name that return an error from now on
    hangs : streams make no step any more

    """

    __name__ = "stand-in for CUDA"
    cudaError_t = Error
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)
    cudaStreamNonBlocking = 1
    cudaEventDisableTiming = 2
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, seed: int = 0, free: int = 8 << 30) -> None:
        self.held: dict[int, Any] = {}
        self.fails: dict[str, Error] = {}
        self.hangs = False
        self.free = free
        self.launches = 0
        self._random = random.Random(seed)
        self._capturing: dict[int, deque[Callable[[], bool]]] = {}

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        fails = object.__getattribute__(self, "__dict__").get("fails", {})
        if name not in fails:
            return found
        if name == "cudaStreamEndCapture":
            self._capturing.clear()  # it ends all the same
        return lambda *_: (fails[name], None)[: 1 + (name not in NOTHING)]

    def cudaSetDevice(self, ordinal: int) -> tuple[Error]:
        return (Error.cudaSuccess,)

    def cudaGetErrorString(self, error: Error) -> tuple[Error, bytes]:
        return Error.cudaSuccess, b"in words"

    def cudaRuntimeGetVersion(self) -> tuple[Error, int]:
        return Error.cudaSuccess, 12040

    cudaDriverGetVersion = cudaRuntimeGetVersion

    def cudaGetDeviceProperties(self, ordinal: int) -> tuple[Error, Any]:
        told = SimpleNamespace(name=b"Stand-in GPU", major=8, minor=6, totalGlobalMem=self.free)
        return Error.cudaSuccess, told

    def cudaMemGetInfo(self) -> tuple[Error, int, int]:
        return Error.cudaSuccess, self.free, self.free

    def cudaMalloc(self, size: int) -> tuple[Error, int]:
        memory = ctypes.create_string_buffer(bytes([7]) * size, size)  # what was there before is no zero
        return Error.cudaSuccess, self._hold(ctypes.addressof(memory), memory)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[Error, int]:
        return self.cudaMalloc(size)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Error, int]:
        stream = Stream()
        return Error.cudaSuccess, self._hold(id(stream), stream)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[Error, int]:
        event = {"asked": 0, "done": 0}
        return Error.cudaSuccess, self._hold(id(event), event)

    def cudaEventCreate(self) -> tuple[Error, int]:
        return self.cudaEventCreateWithFlags(0)

    def cudaEventElapsedTime(self, begin: int, end: int) -> tuple[Error, float]:
        return Error.cudaSuccess, 1.5

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> tuple[Error]:
        self.put(stream, lambda: bool(ctypes.memmove(target, source, size)))
        return (Error.cudaSuccess,)

    def cudaMemsetAsync(self, target: int, value: int, size: int, stream: int) -> tuple[Error]:
        self.put(stream, lambda: bool(ctypes.memset(target, value, size)))
        return (Error.cudaSuccess,)

    def cudaEventRecord(self, event: int, stream: int) -> tuple[Error]:
        self.held[event]["asked"] += 1
        turn = self.held[event]["asked"]

        def record() -> bool:
            self.held[event]["done"] = turn
            return True

        self.put(stream, record)
        return (Error.cudaSuccess,)

    def cudaStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[Error]:
        turn = self.held[event]["asked"]
        self.put(stream, lambda: self.held[event]["done"] >= turn)
        return (Error.cudaSuccess,)

    def cudaEventQuery(self, event: int) -> tuple[Error]:
        for _ in range(self._random.randrange(6)):
            self._step()
        told = self.held[event]
        return (Error.cudaSuccess if told["done"] == told["asked"] else Error.cudaErrorNotReady,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Error]:
        while self.held[stream]:
            assert not self.hangs, "who waits for this waits for ever"
            self._step()
        return (Error.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[Error]:
        self._capturing[stream] = deque()
        return (Error.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Error, int]:
        graph = self._capturing.pop(stream)
        return Error.cudaSuccess, self._hold(id(graph), graph)

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Error, int]:
        copy = deque(self.held[graph])
        return Error.cudaSuccess, self._hold(id(copy), copy)

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[Error]:
        self.launches += 1
        for step in self.held[graph]:
            self.put(stream, step)
        return (Error.cudaSuccess,)

    def _release(self, handle: int) -> tuple[Error]:
        del self.held[handle]
        return (Error.cudaSuccess,)

    cudaFree = cudaFreeHost = cudaEventDestroy = cudaStreamDestroy = cudaGraphDestroy = cudaGraphExecDestroy = _release

    def put(self, stream: int, step: Callable[[], bool]) -> None:
        """Put work into a stream, or into the graph that is being captured from it."""
        self._capturing.get(stream, self.held[stream]).append(step)

    def _hold(self, handle: int, thing: Any) -> int:
        self.held[handle] = thing
        return handle

    def _step(self) -> None:
        streams = [one for one in self.held.values() if isinstance(one, Stream) and one]
        if streams and not self.hangs:
            stream = self._random.choice(streams)
            if stream[0]():
                stream.popleft()


NOTHING = {
    "cudaSetDevice", "cudaMemcpyAsync", "cudaMemsetAsync", "cudaEventRecord", "cudaStreamWaitEvent", "cudaEventQuery",
    "cudaStreamSynchronize", "cudaStreamBeginCapture", "cudaGraphLaunch",
}  # fmt: skip  # that return a status and nothing else


class Trt:
    """Stands in for ``tensorrt``: its plans name graph and shape, its engines are ONNX Runtime's.

    Attributes
    ----------
    spoil : changes an engine's outputs, by name, before they are written
    refuses : names of calls that fail as TensorRT's do: False, or None

    """

    __name__ = "stand-in for TensorRT"
    __version__ = "10.13.0"
    float32, float16, uint8, int32 = np.float32, np.float16, np.uint8, np.int32
    ILogger = type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 0})
    LayerInformationFormat = SimpleNamespace(JSON=1)
    BuilderFlag = SimpleNamespace(TF32=0)
    MemoryPoolType = SimpleNamespace(WORKSPACE=0)
    ProfilingVerbosity = SimpleNamespace(DETAILED=2)
    TacticSource = SimpleNamespace(EDGE_MASK_CONVOLUTIONS=3, JIT_CONVOLUTIONS=4)
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.spoil: Callable[[str, np.ndarray], np.ndarray] = lambda _, values: values
        self.refuses: set[str] = set()
        self.types = "FP16"
        self.runs = 0
        self.contexts = 0  # alive

    @staticmethod
    def nptype(kind: type) -> type:
        return kind

    def Runtime(self, logger: Any) -> Any:
        if "runtime" in self.refuses:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return SimpleNamespace(
            deserialize_cuda_engine=lambda plan: None if "deserialize" in self.refuses else Engine(self, plan)
        )

    def Builder(self, logger: Any) -> Any:
        return Builder(self)

    def OnnxParser(self, network: Any, logger: Any) -> Any:
        def parse(graph: bytes) -> bool:
            network.path = graph.decode()
            return "parse" not in self.refuses

        return SimpleNamespace(parse=parse, num_errors=1, get_error=lambda _: "no such operator")


class Builder:
    def __init__(self, trt: Trt) -> None:
        self.trt = trt

    def create_network(self, flags: int) -> Any:
        hu = SimpleNamespace(name="hu", shape=(-1, 1, -1, -1))
        outputs = [SimpleNamespace(name=name) for name in (*OUTPUTS, COUNTS)]  # as of an older bundle
        return SimpleNamespace(
            get_input=lambda _: hu,
            num_outputs=len(outputs),
            get_output=outputs.copy().__getitem__,
            unmark_output=outputs.remove,
            outputs=outputs,
        )

    def create_builder_config(self) -> Any:
        return SimpleNamespace(
            set_memory_pool_limit=lambda *_: None,
            clear_flag=lambda _: None,
            set_tactic_sources=lambda _: True,
            create_timing_cache=lambda data: data,
            set_timing_cache=lambda cache, **_: cache != b"another GPU's",
            get_timing_cache=lambda: SimpleNamespace(serialize=lambda: b"what was timed"),
        )

    def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
        assert [one.name for one in network.outputs] == [*OUTPUTS]
        return None if "build" in self.trt.refuses else plan(network.path, network.get_input(0).shape)


def plan(graph: Path | str | None, shape: tuple[int, ...]) -> bytes:
    return json.dumps({"graph": graph and str(graph), "shape": shape}).encode()


def answer(hu: np.ndarray) -> list[np.ndarray]:
    """What a plan without a graph computes of HU ``(N, 1, H, W)``: labels of seven classes, and their shares."""
    labels = (hu[:, 0] // 16 % 7).astype(np.uint8)
    return [labels, np.stack([(labels == c).mean((1, 2)) for c in range(7)], axis=1).astype(np.float32)]


@lru_cache(maxsize=4)
def _opened(graph: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])


class Engine:
    device_memory_size_v2 = 10 << 20

    def __init__(self, trt: Trt, data: bytes) -> None:
        told = json.loads(data)
        self.trt, self.shape = trt, tuple(told["shape"])
        self.graph = told["graph"]

    def create_execution_context(self) -> Any:
        return None if "context" in self.trt.refuses else Context(self)

    def create_engine_inspector(self) -> Any:
        kind = f"Row major linear {self.trt.types}" if -1 not in self.shape else "N/A due to dynamic shapes"
        layer = {"LayerType": "CaskConvolution", "Inputs": [{"Format/Datatype": kind}]}
        return SimpleNamespace(get_engine_information=lambda _: json.dumps({"Layers": [layer, layer]}))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        batch, _, *size = self.shape
        return {"labels": (batch, *size), "evidence": (batch, 7)}[name]

    def get_tensor_dtype(self, name: str) -> type:
        return {"labels": np.uint8, "hu": np.int32}.get(name, np.float32)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.addresses = engine, {}
        engine.trt.contexts += 1

    def __del__(self) -> None:
        self.engine.trt.contexts -= 1

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self.addresses[name] = pointer
        return True

    def execute_async_v3(self, stream: int) -> bool:
        trt, addresses = self.engine.trt, dict(self.addresses)
        if "execute" in trt.refuses:
            return False

        def compute() -> bool:
            trt.runs += 1
            size = 4 * int(np.prod(self.engine.shape))
            hu = np.frombuffer(ctypes.string_at(addresses["hu"], size), np.int32).reshape(self.engine.shape)
            for name, values in self._run(hu).items():
                spoilt = trt.spoil(name, values)
                if spoilt is not None:
                    ctypes.memmove(addresses[name], spoilt.tobytes(), spoilt.nbytes)
            return True

        trt.cuda.put(stream, compute)
        return True

    def _run(self, hu: np.ndarray) -> dict[str, np.ndarray]:
        graph = self.engine.graph
        return dict(zip(OUTPUTS, _opened(graph).run(OUTPUTS, {"hu": hu}) if graph else answer(hu), strict=True))
