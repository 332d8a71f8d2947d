"""TensorRT: static engines, one for each batch size, opened for life on one GPU."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime import caps, engine
from runtime.engine import OUTPUTS
from runtime.errors import BackendError, DeviceLost, InferenceError, NoPlan
from runtime.session import checked, identity

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType

    from numpy.typing import NDArray

    from runtime.bundle import Bundle
    from runtime.device import Device
    from runtime.types import SliceLabels

SLOTS = 2
SPARE = 256 << 20  # bytes of the GPU that are left to others: CUDA itself, kernels that load late
WATCHDOG_S = 10.0  # a batch takes milliseconds


class TrtSession:
    """A bundle's engines of one precision on one GPU.

    Each batch goes through one of two sets of buffers: while one is computed, the next is copied in and the last one
    out. Outputs are poisoned before each run, so that an engine which does nothing is found out.

    Parameters
    ----------
    plans : serialised engines and the milliseconds of one batch, by shape ``(batch, H, W)``
    device : of this session alone; `close` closes it
    build : gives the command that builds what there is no plan for, with the options that say what
    watchdog_s : after which a batch that is not done has hung

    Raises
    ------
    BackendError : an engine that TensorRT does not take, or more memory than the GPU has free

    """

    def __init__(
        self,
        bundle: Bundle,
        precision: str,
        plans: Mapping[tuple[int, int, int], tuple[bytes, float]],
        *,
        device: Device,
        trt: ModuleType,
        why: str = "asked for",
        build: Callable[..., str] = lambda *options: f"run `scanside build {' '.join(options)}`",
        watchdog_s: float = WATCHDOG_S,
    ) -> None:
        self._device, self._trt, self._watchdog_s = device, trt, watchdog_s
        self._classes, self._view = len(bundle.classes), bundle.view
        self._runners: dict[tuple[int, int, int], _Runner] = {}
        self.why, self._build = why, build
        self._hangs = False
        self.max_batch = SLOTS * max(batch for batch, *_ in plans)
        self.sizes = tuple(sorted({shape[1:] for shape in plans}))
        self.identity = identity(bundle, precision, f"tensorrt {trt.__version__} {device.about().name}")
        try:
            self._check_room(sum(len(plan) for plan, _ in plans.values()))  # weights are most of a plan
            self._open({shape: engine.deserialize(trt, plan) for shape, (plan, _) in plans.items()})
        except BaseException:
            self.close()
            raise
        for shape, (_, batch_ms) in plans.items():
            self._runners[shape].batch_ms = batch_ms

    def _open(self, engines: Mapping[tuple[int, int, int], Any]) -> None:
        """Make contexts and buffers, once it is known that they fit; then run each of them once."""
        answers = {shape: _answer(shape, self._view.answered, self._classes) for shape in engines}
        self.bytes = sum(
            caps.activation_bytes(one) + SLOTS * (_size(self._input(shape), np.int32) + _sizes(answers[shape]))
            for shape, one in engines.items()
        )
        self._check_room(self.bytes)
        streams = self._device.stream(), self._device.stream(), self._device.stream()  # in, compute, out
        for shape, one in engines.items():
            self._runners[shape] = _Runner(one, self._input(shape), answers[shape], streams, self._device, self._trt)
            without = self._runners[shape].prepare(self._wait)
            self.why += f"; without CUDA graphs: {without}" if without else ""

    def _check_room(self, size: int) -> None:
        free = self._device.free_bytes()
        if size + SPARE > free:
            raise BackendError(
                f"{self.identity.backend}: {size >> 20} MiB are needed and {SPARE >> 20} MiB to spare, "
                f"{free >> 20} MiB are free: give the node a GPU of its own, or take large batches out of its plans"
            )

    def _input(self, shape: tuple[int, int, int]) -> tuple[int, int, int, int]:
        return shape[0], self._view.shown, *shape[1:]

    def infer(self, hu: NDArray[np.int16] | NDArray[np.int32] | Any) -> list[SliceLabels]:
        """Labels of the slices that N views answer, from HU ``(N, shown, H, W)``.

        An array with ``__cuda_array_interface__`` (pycuda, CuPy, torch), int32 and contiguous, is read where it lies
        on the GPU; whoever made it has seen to it that it is finished.
        """
        given = getattr(hu, "__cuda_array_interface__", None)
        source: NDArray[Any] | _OnDevice = np.asarray(hu) if given is None else _OnDevice.of(given)
        count, shown, *size = source.shape
        if shown != self._view.shown:
            raise InferenceError(f"views of {shown} slices: the network sees {self._view.shown}")
        runners = [one for shape, one in self._runners.items() if shape[1:] == tuple(size)]
        if not runners:
            sizes = ", ".join(sorted({f"{h} x {w}" for _, h, w in self._runners}))
            raise NoPlan(
                f"slices of {size[0]} x {size[1]}, and plans for {sizes} alone: "
                f"{self._build('--size', f'{size[0]}x{size[1]}')}"
            )
        answers: list[SliceLabels] = []
        waiting: deque[tuple[_Slot, int]] = deque()
        start = 0
        try:
            while start < count or waiting:
                if start < count and len(waiting) < SLOTS:
                    left = count - start
                    runner = min(runners, key=lambda one: (one.batch_ms * -(-left // one.batch), one.batch))
                    stop = start + min(left, runner.batch)
                    waiting.append((runner.begin(source, start, stop), stop - start))
                    start = stop
                    continue
                slot, views = waiting.popleft()
                self._wait(slot.done)
                slices = views * self._view.answered
                labels, evidence = (slot.outputs[name][:slices].copy() for name in OUTPUTS)
                answers += checked(labels, evidence, self._classes, (slices, *size))
        except InferenceError as error:
            if not isinstance(error, DeviceLost):
                for slot, _ in waiting:  # its buffers are the next call's
                    self._wait(slot.done)
            raise
        return answers

    def close(self) -> None:
        """Give back what it holds, on the GPU and of the host's memory; of a GPU that hangs nothing can be had."""
        if self._hangs:
            return
        while self._runners:
            _, runner = self._runners.popitem()
            runner.close()  # the context before the memory that it uses
        self._device.close()

    def _wait(self, event: int) -> None:
        """Wait for an event: spinning at first, for a batch takes about as long as one sleep."""
        began = time.perf_counter()
        while not self._device.is_done(event):
            waited = time.perf_counter() - began
            if waited > self._watchdog_s:
                self._hangs = True
                raise DeviceLost(
                    f"{self.identity.backend}: a batch is not done after {self._watchdog_s:g} s: the GPU hangs, and "
                    "the process that holds it must start anew"
                )
            if waited > 0.05:
                time.sleep(0.001)


@dataclass(frozen=True, slots=True)
class _OnDevice:
    """An array that lies on the GPU, as ``__cuda_array_interface__`` (version 3) describes it."""

    pointer: int
    shape: tuple[int, ...]

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> _OnDevice:
        """Take what is int32, contiguous and four-dimensional.

        Raises
        ------
        InferenceError

        """
        shape = tuple(told["shape"])
        if np.dtype(told["typestr"]) != np.int32 or len(shape) != 4:
            raise InferenceError(f"an array on the GPU of {told['typestr']} {shape}: int32 (N, shown, H, W) is read")
        strides = told.get("strides")
        if strides is not None and tuple(strides) != tuple(4 * int(np.prod(shape[i + 1 :])) for i in range(4)):
            raise InferenceError("an array on the GPU that is not contiguous: make a copy that is")
        return cls(told["data"][0], shape)


@dataclass(slots=True)
class _Slot:
    """One set of buffers, and what runs on it."""

    hu: int  # on the GPU
    staged: NDArray[np.int32]  # the same, pinned
    results: dict[str, int]
    outputs: dict[str, NDArray[Any]]
    copied: int
    computed: int
    done: int
    run: Callable[[], None]


class _Runner:
    """One engine with its context and two slots."""

    def __init__(
        self,
        built: Any,
        shape: tuple[int, int, int, int],
        answer: Mapping[str, tuple[tuple[int, ...], Any]],
        streams: tuple[int, int, int],
        device: Device,
        trt: ModuleType,
    ) -> None:
        self.batch, self.batch_ms = shape[0], 0.0
        self._shape, self._answer = shape, answer
        self._device, self._streams = device, streams
        engine.Logger.of(trt)
        self._context = built.create_execution_context()
        if self._context is None:
            raise BackendError(f"no execution context for {shape}: {engine.Logger.reason()}")
        for name, (expected, dtype) in answer.items():
            found = tuple(built.get_tensor_shape(name)), np.dtype(trt.nptype(built.get_tensor_dtype(name)))
            if found != (expected, np.dtype(dtype)):
                raise BackendError(f"the engine's {name} are {found}, the bundle's {expected} {dtype.__name__}")
        self._slots = [self._slot() for _ in range(SLOTS)]
        self._turn = 0

    def _slot(self) -> _Slot:
        device = self._device
        slot = _Slot(
            hu=device.alloc(_size(self._shape, np.int32)),
            staged=device.pinned(self._shape, np.int32),
            results={name: device.alloc(_size(*each)) for name, each in self._answer.items()},
            outputs={name: device.pinned(*each) for name, each in self._answer.items()},
            copied=device.event(),
            computed=device.event(),
            done=device.event(),
            run=lambda: None,
        )
        slot.run = lambda: self._enqueue(slot)
        return slot

    def prepare(self, wait: Callable[[int], None]) -> str | None:
        """Run each slot once as it is, then keep it as a CUDA graph: that is the order that TensorRT needs.

        Returns
        -------
        why there is no CUDA graph, where there is none

        Raises
        ------
        BackendError : the engine does not run

        """
        without = None
        for slot in self._slots:
            slot.staged[:] = 0
            self._device.h2d(slot.hu, slot.staged, self._streams[1])
            try:
                self._enqueue(slot)
            except DeviceLost:
                raise
            except InferenceError as error:
                raise BackendError(str(error)) from None
            self._device.record(slot.done, self._streams[1])
            wait(slot.done)
            try:
                slot.run = self._device.capture(self._streams[1], slot.run)
            except InferenceError as error:  # an engine may be one that can't be captured: it runs as it is
                without = str(error)
        return without

    def close(self) -> None:
        for slot in self._slots:
            slot.run = lambda: None  # which would hold the context as this holds the slot
        self._slots.clear()
        del self._context

    def begin(self, source: NDArray[Any] | _OnDevice, start: int, stop: int) -> _Slot:
        """Put views `start` to `stop` on their way; their answers are there when ``done`` of the slot is."""
        slot = self._slots[self._turn]
        self._turn = (self._turn + 1) % SLOTS
        device, (inward, compute, outward) = self._device, self._streams
        count = stop - start
        if isinstance(source, _OnDevice):
            size = slot.staged[0].nbytes
            device.d2d(slot.hu, source.pointer + start * size, count * size, inward)
        else:
            slot.staged[:count] = source[start:stop]  # what is behind in a batch that is not full: what was there
            device.h2d(slot.hu, slot.staged[:count], inward)
        device.record(slot.copied, inward)
        device.wait(compute, slot.copied)
        slot.run()
        device.record(slot.computed, compute)
        device.wait(outward, slot.computed)
        for name in OUTPUTS:
            device.d2h(slot.outputs[name], slot.results[name], outward)
        device.record(slot.done, outward)
        return slot

    def _enqueue(self, slot: _Slot) -> None:
        stream = self._streams[1]
        for name in OUTPUTS:
            self._device.poison(slot.results[name], slot.outputs[name].nbytes, stream)
            self._must(self._context.set_tensor_address(name, slot.results[name]), f"set_tensor_address({name})")
        self._must(self._context.set_tensor_address("hu", slot.hu), "set_tensor_address(hu)")
        self._must(self._context.execute_async_v3(stream), "execute_async_v3")

    def _must(self, was_done: bool, what: str) -> None:
        if not was_done:
            raise InferenceError(f"TensorRT: {what} failed: {engine.Logger.reason()}")


def _answer(shape: tuple[int, int, int], answered: int, classes: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and type of each output of a batch (`models.graph.HeadCT.forward`)."""
    slices = shape[0] * answered
    return {"labels": ((slices, *shape[1:]), np.uint8), "evidence": ((slices, classes), np.float32)}


def _size(shape: tuple[int, ...], dtype: Any) -> int:
    return int(np.prod(shape)) * np.dtype(dtype).itemsize


def _sizes(tensors: Mapping[str, tuple[tuple[int, ...], Any]]) -> int:
    return sum(_size(*each) for each in tensors.values())
