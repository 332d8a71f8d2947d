"""A GPU over pycuda, on a stand-in of its driver; cuda-bindings is `test_trt`'s. On a GPU both: `test_gpu`."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtime.device import PyCuda
from runtime.errors import BackendError, DeviceLost


class Driver:
    """Stands in for ``pycuda.driver``, on the host's memory; what is put into a stream is done at once."""

    __name__ = "stand-in for pycuda"
    Error = type("Error", (Exception,), {})
    MemoryError = type("MemoryError", (Error,), {})
    event_flags = SimpleNamespace(DISABLE_TIMING=2)

    def __init__(self) -> None:
        self.contexts = 0
        self.fails = False

    def init(self) -> None:
        pass

    def get_driver_version(self) -> int:
        return 12020

    def Device(self, ordinal: int) -> Any:
        if self.fails:
            raise self.Error("cuDeviceGet failed: invalid device ordinal")

        def count(by: int) -> None:
            self.contexts += by

        context = SimpleNamespace(push=lambda: count(1), pop=lambda: count(-1), synchronize=lambda: None)
        return SimpleNamespace(
            retain_primary_context=lambda: context,
            name=lambda: "Stand-in GPU",
            compute_capability=lambda: (8, 6),
            total_memory=lambda: 8 << 30,
        )

    def mem_get_info(self) -> tuple[int, int]:
        return 4 << 30, 8 << 30

    def mem_alloc(self, size: int) -> Any:
        if size > 1 << 40:
            raise self.MemoryError("cuMemAlloc failed: out of memory")
        return Allocation(size)

    def pagelocked_empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return np.empty(shape, dtype)

    def Stream(self, flags: int) -> Any:
        assert flags == 1, "not blocking"
        return SimpleNamespace(handle=id(object()), wait_for_event=lambda event: None)

    def Event(self, flags: int) -> Any:
        return SimpleNamespace(record=lambda stream: None, query=lambda: True)

    def memcpy_htod_async(self, target: int, source: np.ndarray, stream: Any) -> None:
        if self.fails:
            raise self.Error("cuMemcpyHtoDAsync failed: an illegal memory access was encountered")
        ctypes.memmove(target, source.ctypes.data, source.nbytes)

    def memcpy_dtoh_async(self, target: np.ndarray, source: int, stream: Any) -> None:
        ctypes.memmove(target.ctypes.data, source, target.nbytes)

    def memcpy_dtod_async(self, target: int, source: int, size: int, stream: Any) -> None:
        ctypes.memmove(target, source, size)

    def memset_d8_async(self, target: int, value: int, size: int, stream: Any) -> None:
        ctypes.memset(target, value, size)


class Allocation:
    def __init__(self, size: int) -> None:
        self.memory = ctypes.create_string_buffer(size)

    def __int__(self) -> int:
        return ctypes.addressof(self.memory)


def test_what_goes_to_the_gpu_comes_back():
    device = PyCuda(driver=Driver())
    stream, event = device.stream(), device.event()
    sent = device.pinned((3, 4), np.int32)
    sent[:] = np.arange(12).reshape(3, 4)
    one, two = device.alloc(sent.nbytes), device.alloc(sent.nbytes)
    device.h2d(one, sent, stream)
    device.d2d(two, one, sent.nbytes, stream)
    back = device.pinned((3, 4), np.int32)
    device.d2h(back, two, stream)
    device.record(event, stream)
    device.wait(stream, event)
    assert device.is_done(event)
    assert (back == sent).all()
    device.poison(two, sent.nbytes, stream)
    device.d2h(back, two, stream)
    assert (back == -1).all()


def test_it_knows_its_gpu():
    device = PyCuda(driver=Driver())
    gpu = device.about()
    assert (gpu.name, gpu.capability, gpu.driver, gpu.memory) == ("Stand-in GPU", "8.6", "12.2", 8 << 30)
    assert device.free_bytes() == 4 << 30


def test_the_primary_context_is_left_as_it_was():
    driver = Driver()
    device = PyCuda(driver=driver)
    assert driver.contexts == 1
    device.close()
    device.close()
    assert driver.contexts == 0


def test_a_failure_is_a_lost_device():
    driver = Driver()
    device = PyCuda(driver=driver)
    stream, target = device.stream(), device.alloc(4)
    driver.fails = True
    with pytest.raises(DeviceLost, match=r"pycuda: cuMemcpyHtoDAsync failed: .* must start anew"):
        device.h2d(target, np.zeros(1, np.int32), stream)


def test_memory_that_runs_out_harms_nobody():
    device = PyCuda(driver=Driver())
    with pytest.raises(BackendError, match="out of memory: other processes hold the GPU's memory"):
        device.alloc(1 << 60)
    assert device.alloc(4)


def test_no_gpu_says_what_to_look_at():
    driver = Driver()
    driver.fails = True
    with pytest.raises(BackendError, match=r"GPU 0: cuDeviceGet failed.*`nvidia-smi` tells"):
        PyCuda(driver=driver)


def test_without_the_library_the_message_names_the_remedy():
    with pytest.raises(BackendError, match=r"in scanside's checkout, pip install '\.\[gpu\]'"):
        PyCuda()
