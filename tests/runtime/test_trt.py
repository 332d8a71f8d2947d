"""The TensorRT session: its buffers, its order of work, and what it makes of an engine that fails."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from runtime.bundle import open_bundle
from runtime.device import CudaBindings
from runtime.errors import BackendError, DeviceLost, InferenceError
from runtime.session import self_test
from runtime.trt import TrtSession
from tests.runtime.stand_ins import Cuda, Error, Trt, answer, plan

BUNDLE = open_bundle()
SIDE = 64


def opened(
    batches: tuple[int, ...] = (1, 4), *, seed: int = 0, cuda: Cuda | None = None, watchdog_s: float = 10.0
) -> tuple[TrtSession, Cuda, Trt]:
    cuda = cuda or Cuda(seed)
    trt = Trt(cuda)
    plans = {(n, SIDE, SIDE): (plan(None, (n, 1, SIDE, SIDE)), 1.0 + 0.1 * n) for n in batches}
    device = CudaBindings(runtime=cuda)
    return TrtSession(BUNDLE, "fp32", plans, device=device, trt=trt, watchdog_s=watchdog_s), cuda, trt


def heads(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(-1000, 1500, (count, 1, SIDE, SIDE), dtype=np.int16)


@pytest.mark.parametrize("seed", range(20))
def test_answers_are_those_of_the_graph_in_whatever_order_a_gpu_works(seed: int):
    session, _, _ = opened(seed=seed)
    for count in (11, 1, 6):
        hu = heads(count)
        labels, evidence = answer(hu)
        answers = session.infer(hu)
        assert (np.stack([one.labels for one in answers]) == labels).all()
        counts = [np.bincount(one.ravel(), minlength=7) for one in labels]
        assert (np.stack([one.voxels for one in answers]) == counts).all()
        assert (np.stack([one.evidence for one in answers]) == evidence).all()


def test_a_batch_that_pays_is_taken_even_if_it_is_not_full():
    session, _, trt = opened((1, 4))
    before = trt.runs
    session.infer(heads(3))
    assert trt.runs - before == 1, "three slices in one batch of four: 1.4 ms; one by one 3.3"
    session.infer(heads(1))
    assert trt.runs - before == 2


def test_every_run_is_a_cuda_graph():
    session, cuda, trt = opened((1, 4))
    assert (trt.runs, cuda.launches) == (4, 0), "before capture, each slot of each engine has run once"
    session.infer(heads(5))
    assert cuda.launches == 2


def test_a_call_that_tensorrt_refuses_later_is_an_error_too():
    session, cuda, trt = opened((1,), cuda=without_graphs())
    trt.refuses.add("execute")
    with pytest.raises(InferenceError, match="execute_async_v3 failed"):
        session.infer(heads(1))
    session.close()
    assert cuda.held == {}


def without_graphs() -> Cuda:
    cuda = Cuda()
    cuda.fails["cudaStreamBeginCapture"] = Error.cudaErrorIllegalAddress
    return cuda


def test_a_gpu_that_this_tensorrt_does_not_know_is_said_to_be_so():
    cuda = Cuda()
    trt = Trt(cuda)
    trt.refuses.add("runtime")
    plans = {(1, SIDE, SIDE): (plan(None, (1, 1, SIDE, SIDE)), 1.0)}
    with pytest.raises(BackendError, match=r"TensorRT 10.13.0 finds no GPU: .*driver's CUDA\?"):
        TrtSession(BUNDLE, "fp32", plans, device=CudaBindings(runtime=cuda), trt=trt)
    assert cuda.held == {}


def test_everything_is_given_back():
    session, cuda, trt = opened()
    assert cuda.held
    session.close()
    assert cuda.held == {}
    assert trt.contexts == 0, "contexts hold most of the memory"


def test_what_was_made_is_given_back_when_opening_fails():
    cuda = Cuda()
    trt = Trt(cuda)
    trt.refuses.add("context")
    with pytest.raises(BackendError, match="no execution context"):
        TrtSession(
            BUNDLE,
            "fp32",
            {(1, SIDE, SIDE): (plan(None, (1, 1, SIDE, SIDE)), 1.0)},
            device=CudaBindings(runtime=cuda),
            trt=trt,
        )
    assert cuda.held == {}


def test_memory_is_known_before_any_is_taken():
    cuda = Cuda(free=300 << 20)
    session, _, _ = opened((1,), cuda=cuda)
    taken = session.bytes
    session.close()
    cuda.free = taken + (256 << 20) - 1
    with pytest.raises(BackendError, match=r"MiB are needed and 256 MiB to spare, 2\d\d MiB are free"):
        opened((1,), cuda=cuda)
    assert cuda.held == {}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda _, __: None, "label 255 of 7 classes"),
        (lambda name, values: None if name == "labels" else values, "label 255 of 7 classes"),
        (lambda name, values: None if name == "evidence" else values, "evidence is no probability"),
        (lambda name, values: values * 0 if name == "evidence" else values, "evidence is no probability"),
        (lambda name, values: values + 1 if name == "labels" else values, "label 7 of 7"),
    ],
)
def test_an_engine_that_does_nothing_or_something_else_is_found_out(spoil, message: str):
    session, _, trt = opened()
    session.infer(heads(5))  # good answers lie in the buffers
    trt.spoil = spoil
    with pytest.raises(InferenceError, match=message):
        session.infer(heads(5))
    trt.spoil = lambda _, values: values
    assert len(session.infer(heads(9))) == 9, "the next call finds its buffers free"


def test_a_call_that_tensorrt_refuses_is_an_error_and_not_an_old_answer():
    cuda = Cuda()
    trt = Trt(cuda)
    trt.refuses.add("execute")
    plans = {(1, SIDE, SIDE): (plan(None, (1, 1, SIDE, SIDE)), 1.0)}
    with pytest.raises(BackendError, match="execute_async_v3 failed: it gives no reason"):
        TrtSession(BUNDLE, "fp32", plans, device=CudaBindings(runtime=cuda), trt=trt)
    assert cuda.held == {}


def test_a_gpu_that_hangs_is_lost_and_says_so():
    session, cuda, _ = opened(watchdog_s=0.2)
    cuda.hangs = True
    with pytest.raises(DeviceLost, match=r"a batch is not done after 0.2 s: the GPU hangs"):
        session.infer(heads(1))
    session.close()  # and does not wait for what never ends


def test_a_gpu_that_fails_is_lost_and_names_the_call():
    session, cuda, _ = opened()
    cuda.fails["cudaMemcpyAsync"] = Error.cudaErrorIllegalAddress
    with pytest.raises(DeviceLost, match=r"cudaMemcpyAsync: cudaErrorIllegalAddress \(in words\)"):
        session.infer(heads(1))
    session.close()


def test_no_gpu_says_what_to_look_at():
    cuda = Cuda()
    cuda.fails["cudaSetDevice"] = Error.cudaErrorMemoryAllocation
    with pytest.raises(BackendError, match=r"GPU 0: .* driver for CUDA 12.4\? `nvidia-smi` tells"):
        CudaBindings(runtime=cuda)


def test_slices_of_another_size_name_the_remedy():
    session, _, _ = opened()
    with pytest.raises(InferenceError, match=r"slices of 32 x 48, and plans for 64 x 64 alone: .*--size 32x48"):
        session.infer(np.zeros((1, 1, 32, 48), np.int16))
    with pytest.raises(InferenceError, match="views of 3 slices: the network sees 1"):
        session.infer(np.zeros((1, 3, SIDE, SIDE), np.int16))


def test_what_lies_on_the_gpu_is_read_where_it_lies():
    session, cuda, _ = opened()
    hu = heads(6).astype(np.int32)
    told = {"shape": hu.shape, "typestr": "<i4", "data": (hu.ctypes.data, True), "version": 3, "strides": None}
    copied: list[int] = []
    put = cuda.cudaMemcpyAsync
    cuda.cudaMemcpyAsync = lambda *given: (copied.append(given[3]), put(*given))[1]
    found = session.infer(SimpleNamespace(__cuda_array_interface__=told))
    assert 1 not in copied, "nothing came from the host"
    for one, expected in zip(found, session.infer(hu), strict=True):
        assert (one.labels == expected.labels).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"typestr": "<i2"}, "of <i2 .*int32"),
        ({"shape": (64, 64)}, r"\(64, 64\): int32 \(N, shown, H, W\)"),
        ({"strides": (4, 4, 256, 4)}, "not contiguous"),
    ],
)
def test_another_array_on_the_gpu_is_refused(wrong: dict, message: str):
    session, _, _ = opened()
    told = {"shape": (1, 1, SIDE, SIDE), "typestr": "<i4", "data": (0, True), "version": 3} | wrong
    with pytest.raises(InferenceError, match=message):
        session.infer(SimpleNamespace(__cuda_array_interface__=told))


def test_it_says_which_engine_on_which_gpu():
    session, _, _ = opened()
    assert session.identity.backend == "tensorrt 10.13.0 Stand-in GPU"


def test_golden_slices_pass_through_it():
    hu, _ = BUNDLE.golden()
    shape = (len(hu), *hu.shape[1:])
    plans = {(len(hu), *hu.shape[2:]): (plan(BUNDLE.graph("fp32"), shape), 1.0)}
    cuda = Cuda()
    session = TrtSession(BUNDLE, "fp32", plans, device=CudaBindings(runtime=cuda), trt=Trt(cuda), watchdog_s=120)
    assert self_test(session, BUNDLE) <= 1e-3


CALLS = (
    "cudaGetDeviceProperties", "cudaDriverGetVersion", "cudaMemGetInfo", "cudaMalloc", "cudaHostAlloc",
    "cudaStreamCreateWithFlags", "cudaEventCreateWithFlags", "cudaMemcpyAsync", "cudaMemsetAsync", "cudaEventRecord",
    "cudaEventQuery",
)  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_whatever_fails_while_it_opens_is_named_and_nothing_is_kept(call: str):
    cuda = Cuda()
    cuda.fails[call] = Error.cudaErrorIllegalAddress
    with pytest.raises(DeviceLost, match=f"{call}: cudaErrorIllegalAddress"):
        opened(cuda=cuda)
    assert cuda.held == {}


@pytest.mark.parametrize("call", ["cudaMalloc", "cudaHostAlloc"])
def test_memory_that_runs_out_is_no_lost_gpu(call: str):
    cuda = Cuda()
    cuda.fails[call] = Error.cudaErrorMemoryAllocation
    with pytest.raises(BackendError, match=f"{call}: cudaErrorMemoryAllocation .* other processes hold"):
        opened(cuda=cuda)
    assert cuda.held == {}


@pytest.mark.parametrize("call", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_an_engine_that_can_not_be_captured_runs_as_it_is_and_says_so(call: str):
    cuda = Cuda()
    cuda.fails[call] = Error.cudaErrorIllegalAddress
    session, _, _ = opened(cuda=cuda)
    assert f"without CUDA graphs: {call}" in session.why
    hu = heads(5)
    assert (np.stack([one.labels for one in session.infer(hu)]) == answer(hu)[0]).all()
    assert cuda.launches == 0
    session.close()
    assert cuda.held == {}


def test_a_gpu_that_hangs_while_it_opens_is_not_waited_for():
    cuda = Cuda()
    cuda.hangs = True
    with pytest.raises(DeviceLost, match="the GPU hangs"):
        opened(cuda=cuda, watchdog_s=0.2)


@pytest.mark.parametrize(
    "call", ["cudaMemcpyAsync", "cudaEventRecord", "cudaStreamWaitEvent", "cudaGraphLaunch", "cudaEventQuery"]
)
def test_whatever_fails_while_it_runs_is_named(call: str):
    session, cuda, _ = opened()
    cuda.fails[call] = Error.cudaErrorIllegalAddress
    with pytest.raises(DeviceLost, match=f"{call}: cudaErrorIllegalAddress"):
        session.infer(heads(5))
    cuda.fails.clear()
    session.close()
    assert cuda.held == {}


def test_a_session_may_be_closed_again():
    session, cuda, _ = opened()
    session.close()
    session.close()
    assert cuda.held == {}


def test_a_thousand_sessions_leave_nothing_behind():
    cuda = Cuda()
    trt = None
    for _ in range(1000):
        session, _, trt = opened((1,), cuda=cuda)
        session.close()
    assert cuda.held == {}
    assert trt.contexts == 0
