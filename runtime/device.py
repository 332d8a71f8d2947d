"""A GPU's memory, streams and events: what a session needs of CUDA, over NVIDIA's cuda-bindings or over pycuda.

Six functions carry the work: `alloc`, `pinned`, `h2d`, `d2h`, `stream`, `event`. All that a device hands out it takes
back in `close`. Everything runs in the primary context, which TensorRT, torch and CuPy use too.
"""

from __future__ import annotations

import atexit
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from runtime.errors import BackendError, DeviceLost

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import DTypeLike, NDArray

NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING, for which pycuda has no name


@dataclass(frozen=True, slots=True)
class GPU:
    """What a GPU is, as far as a plan depends on it.

    Attributes
    ----------
    name : such as ``"NVIDIA RTX A4000"``
    capability : compute capability, such as ``"8.6"``
    driver : newest CUDA that its driver knows, such as ``"12.4"``
    memory : bytes it has

    """

    name: str
    capability: str
    driver: str
    memory: int


class Device(Protocol):
    """One GPU. Handles are integers, as TensorRT takes them; not for use from several threads at once.

    Every method raises `DeviceLost` where CUDA reports an error, after most of which only a new process helps; and
    `BackendError` where memory runs out, which harms nobody.
    """

    library: str  # that drives it, with its version

    def about(self) -> GPU: ...

    def free_bytes(self) -> int: ...

    def alloc(self, size: int) -> int:
        """`size` bytes on the GPU."""

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An array in page-locked memory of the host, which the GPU reads and writes by itself."""

    def h2d(self, target: int, source: NDArray[Any], stream: int) -> None:
        """Copy an array to the GPU, in the stream's order."""

    def d2h(self, target: NDArray[Any], source: int, stream: int) -> None:
        """Copy from the GPU into an array, in the stream's order."""

    def d2d(self, target: int, source: int, size: int, stream: int) -> None:
        """Copy on the GPU, in the stream's order."""

    def poison(self, target: int, size: int, stream: int) -> None:
        """Fill with 0xFF, in the stream's order: no label, and as float32 no number."""

    def stream(self) -> int:
        """Return a stream of its own, which waits for no other."""

    def event(self) -> int:
        """A mark to put into a stream."""

    def record(self, event: int, stream: int) -> None: ...

    def wait(self, stream: int, event: int) -> None:
        """Let what comes in the stream wait for the event; the host goes on."""

    def is_done(self, event: int) -> bool:
        """Whether all that was in the stream before the event is done."""

    def capture(self, stream: int, work: Callable[[], None]) -> Callable[[], None]:
        """What `work` puts into the stream as one CUDA graph; call the result to put it there again.

        `work` itself where the library has no graphs.
        """

    def close(self) -> None:
        """Wait for what runs, and give everything back."""


class CudaBindings:
    """A GPU over NVIDIA's cuda-bindings (the runtime API).

    Parameters
    ----------
    ordinal : which GPU
    runtime : ``cuda.bindings.runtime``, or what stands in for it

    Raises
    ------
    BackendError : no GPU, or a driver older than the library

    """

    def __init__(self, ordinal: int = 0, runtime: Any = None) -> None:
        if runtime is None:
            try:
                from cuda.bindings import runtime  # noqa: PLC0415  # where there is a GPU
            except ImportError as error:
                raise BackendError(
                    f"cuda-bindings: {error}: in scanside's checkout, pip install '.[gpu]', or set model.backend = "
                    '"onnxruntime"'
                ) from None
            self.library = f"cuda-bindings {version('cuda-bindings')}"
        else:
            self.library = runtime.__name__
        self._cuda, self._ordinal = runtime, ordinal
        self._memory: list[int] = []
        self._host: list[int] = []
        self._streams: list[Any] = []
        self._events: list[Any] = []
        self._graphs: list[Any] = []
        (error,) = runtime.cudaSetDevice(ordinal)
        if int(error):
            raise BackendError(
                f"GPU {ordinal}: {self._name(error)}: is there an NVIDIA GPU and a driver for CUDA "
                f"{_dotted(runtime.cudaRuntimeGetVersion()[1])}? `nvidia-smi` tells"
            )

    def about(self) -> GPU:
        properties = self._call("cudaGetDeviceProperties", self._ordinal)
        name = properties.name.decode() if isinstance(properties.name, bytes) else properties.name
        return GPU(
            name,
            f"{properties.major}.{properties.minor}",
            _dotted(self._call("cudaDriverGetVersion")),
            properties.totalGlobalMem,
        )

    def free_bytes(self) -> int:
        free, _ = self._call("cudaMemGetInfo")
        return free

    def alloc(self, size: int) -> int:
        pointer = int(self._call("cudaMalloc", size))
        self._memory.append(pointer)
        return pointer

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        pointer = int(self._call("cudaHostAlloc", size, 0))
        self._host.append(pointer)
        return _array_at(pointer, size).view(dtype).reshape(shape)

    def h2d(self, target: int, source: NDArray[Any], stream: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", target, source.ctypes.data, source.nbytes, kind, stream)

    def d2h(self, target: NDArray[Any], source: int, stream: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", target.ctypes.data, source, target.nbytes, kind, stream)

    def d2d(self, target: int, source: int, size: int, stream: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpyAsync", target, source, size, kind, stream)

    def poison(self, target: int, size: int, stream: int) -> None:
        self._call("cudaMemsetAsync", target, 0xFF, size, stream)

    def stream(self) -> int:
        self._streams.append(self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking))
        return int(self._streams[-1])

    def event(self) -> int:
        self._events.append(self._call("cudaEventCreateWithFlags", self._cuda.cudaEventDisableTiming))
        return int(self._events[-1])

    def record(self, event: int, stream: int) -> None:
        self._call("cudaEventRecord", event, stream)

    def wait(self, stream: int, event: int) -> None:
        self._call("cudaStreamWaitEvent", stream, event, 0)

    def is_done(self, event: int) -> bool:
        (error,) = self._cuda.cudaEventQuery(event)
        if error == self._cuda.cudaError_t.cudaErrorNotReady:
            return False
        self._check("cudaEventQuery", error)
        return True

    def capture(self, stream: int, work: Callable[[], None]) -> Callable[[], None]:
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)
        try:
            work()
        finally:  # a stream that is left capturing takes no other work
            error, graph = self._cuda.cudaStreamEndCapture(stream)
        self._check("cudaStreamEndCapture", error)
        try:
            launchable = self._call("cudaGraphInstantiate", graph, 0)
            self._graphs.append(launchable)
        finally:
            self._cuda.cudaGraphDestroy(graph)
        return lambda: self._call("cudaGraphLaunch", launchable, stream)

    def close(self) -> None:
        for stream in self._streams:
            self._cuda.cudaStreamSynchronize(stream)
        ways = (
            ("cudaGraphExecDestroy", self._graphs),
            ("cudaEventDestroy", self._events),
            ("cudaStreamDestroy", self._streams),
            ("cudaFreeHost", self._host),
            ("cudaFree", self._memory),
        )
        for name, handles in ways:
            while handles:
                getattr(self._cuda, name)(handles.pop())  # of a lost GPU there is nothing more to get back

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *values = getattr(self._cuda, name)(*arguments)
        self._check(name, error)
        return values[0] if len(values) == 1 else tuple(values)

    def _check(self, name: str, error: Any) -> None:
        if error == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            raise BackendError(
                f"{name}: {self._name(error)}: other processes hold the GPU's memory: `nvidia-smi` tells"
            )
        if int(error):
            raise DeviceLost(f"{name}: {self._name(error)}: the process that holds the GPU must start anew")

    def _name(self, error: Any) -> str:
        return f"{error.name} ({self._cuda.cudaGetErrorString(error)[1].decode()})"


class PyCuda:
    """A GPU over pycuda (the driver API). Without CUDA graphs: pycuda has none.

    Parameters
    ----------
    ordinal : which GPU
    driver : ``pycuda.driver``, or what stands in for it

    Raises
    ------
    BackendError : no pycuda, or no GPU

    """

    def __init__(self, ordinal: int = 0, driver: Any = None) -> None:
        if driver is None:
            try:
                from pycuda import driver  # noqa: PLC0415  # where it is installed
            except ImportError as error:
                raise BackendError(
                    f"pycuda: {error}: in scanside's checkout, pip install '.[gpu]' for cuda-bindings, or '.[pycuda]' "
                    "with a CUDA toolkit"
                ) from None
            self.library = f"pycuda {version('pycuda')}"
        else:
            self.library = driver.__name__
        self._cuda = driver
        self._held: dict[int, Any] = {}
        self._is_open = True
        try:
            driver.init()
            self._device = driver.Device(ordinal)
            self._context = _primary(driver, ordinal, self._device)
            self._context.push()
        except driver.Error as error:
            raise BackendError(f"GPU {ordinal}: {error}: is there an NVIDIA GPU? `nvidia-smi` tells") from None
        atexit.register(self.close)  # pycuda ends a process in which a context is still pushed by abort()

    def about(self) -> GPU:
        major, minor = self._device.compute_capability()
        driver = _dotted(self._cuda.get_driver_version())
        return GPU(self._device.name(), f"{major}.{minor}", driver, self._device.total_memory())

    def free_bytes(self) -> int:
        return self._call(self._cuda.mem_get_info)[0]

    def alloc(self, size: int) -> int:
        return self._hold(self._call(self._cuda.mem_alloc, size))

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        array = self._call(self._cuda.pagelocked_empty, shape, dtype)
        self._held[array.ctypes.data] = array
        return array

    def h2d(self, target: int, source: NDArray[Any], stream: int) -> None:
        self._call(self._cuda.memcpy_htod_async, target, source, self._held[stream])

    def d2h(self, target: NDArray[Any], source: int, stream: int) -> None:
        self._call(self._cuda.memcpy_dtoh_async, target, source, self._held[stream])

    def d2d(self, target: int, source: int, size: int, stream: int) -> None:
        self._call(self._cuda.memcpy_dtod_async, target, source, size, self._held[stream])

    def poison(self, target: int, size: int, stream: int) -> None:
        self._call(self._cuda.memset_d8_async, target, 0xFF, size, self._held[stream])

    def stream(self) -> int:
        stream = self._call(self._cuda.Stream, NON_BLOCKING)
        self._held[stream.handle] = stream
        return stream.handle

    def event(self) -> int:
        event = self._call(self._cuda.Event, self._cuda.event_flags.DISABLE_TIMING)
        self._held[id(event)] = event
        return id(event)

    def record(self, event: int, stream: int) -> None:
        self._call(self._held[event].record, self._held[stream])

    def wait(self, stream: int, event: int) -> None:
        self._call(self._held[stream].wait_for_event, self._held[event])

    def is_done(self, event: int) -> bool:
        return self._call(self._held[event].query)

    def capture(self, stream: int, work: Callable[[], None]) -> Callable[[], None]:  # noqa: ARG002  # see the class
        return work

    def close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        atexit.unregister(self.close)
        try:
            self._context.synchronize()
        except self._cuda.Error:
            pass  # of a lost GPU there is nothing more to get back
        finally:
            self._held.clear()
            self._context.pop()

    def _hold(self, thing: Any) -> int:
        self._held[int(thing)] = thing
        return int(thing)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except self._cuda.MemoryError as error:
            raise BackendError(f"pycuda: {error}: other processes hold the GPU's memory: `nvidia-smi` tells") from error
        except self._cuda.Error as error:
            raise DeviceLost(f"pycuda: {error}: the process that holds the GPU must start anew") from error


def _primary(driver: Any, ordinal: int, device: Any) -> Any:
    """The primary context of a GPU, retained once for the life of the process."""
    if (id(driver), ordinal) not in _PRIMARY:
        _PRIMARY[id(driver), ordinal] = device.retain_primary_context()
    return _PRIMARY[id(driver), ordinal]


_PRIMARY: dict[tuple[int, int], Any] = {}


def open_device() -> Device:
    """The first GPU, over cuda-bindings, or over pycuda where only that is installed.

    Raises
    ------
    BackendError : neither, or no GPU

    """
    from importlib.util import find_spec  # noqa: PLC0415  # where there is a GPU

    has_bindings = find_spec("cuda") is not None and find_spec("cuda.bindings") is not None
    return PyCuda() if not has_bindings and find_spec("pycuda") else CudaBindings()


def _array_at(pointer: int, size: int) -> NDArray[np.uint8]:
    import ctypes  # noqa: PLC0415  # where there is a GPU

    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))


def _dotted(number: int) -> str:
    """CUDA writes 12.4 as 12040."""
    return f"{number // 1000}.{number % 1000 // 10}"
