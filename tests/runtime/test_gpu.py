"""On a real GPU: both CUDA libraries, plans of the bundle that ships, and what a session gives back."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from calibration.weights import load
from runtime import caps, device, plans
from runtime import gpu as at_hand
from runtime.bundle import open_bundle
from runtime.device import CudaBindings, Device, PyCuda
from runtime.errors import BackendError, DeviceLost
from runtime.plans import Key
from runtime.session import open_session, self_test

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]


@pytest.fixture(params=[CudaBindings, PyCuda])
def gpu(request: pytest.FixtureRequest) -> Iterator[Device]:
    try:
        opened = request.param()
    except BackendError as error:
        pytest.skip(f"NOT tried: {error}")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plans of every precision that has passed, for batches of 1 and 8."""
    where = tmp_path_factory.mktemp("plans")
    shapes = [(1, 512, 512), (8, 512, 512)]
    try:
        rows = list(at_hand.make_all(open_bundle(), "best", shapes, where, read=constants))
    except BackendError as error:
        pytest.skip(f"NOT tried: {error}")
    assert all(row["state"] == "built" for row in rows), rows
    return where


def constants(path: Path) -> bytes:
    return load(path).SerializeToString()


def heads(count: int) -> np.ndarray:
    hu, _ = open_bundle().golden()
    rows = np.arange(512) * hu.shape[2] // 512
    large = hu[:, :, rows[:, None], rows]
    return np.stack([np.roll(large[i % len(large)], 3 * i, axis=-1) for i in range(count)])


def test_what_goes_to_the_gpu_comes_back(gpu: Device):
    stream, event = gpu.stream(), gpu.event()
    sent, back = gpu.pinned((512, 512), np.int32), gpu.pinned((512, 512), np.int32)
    sent[:] = np.random.default_rng(0).integers(-1000, 3000, sent.shape)
    one, two = gpu.alloc(sent.nbytes), gpu.alloc(sent.nbytes)
    gpu.h2d(one, sent, stream)
    gpu.d2d(two, one, sent.nbytes, stream)
    gpu.d2h(back, two, stream)
    gpu.record(event, stream)
    while not gpu.is_done(event):
        pass
    assert (back == sent).all()


def test_poison_is_no_label_and_no_number(gpu: Device):
    stream, event = gpu.stream(), gpu.event()
    where, back = gpu.alloc(16), gpu.pinned((4,), np.float32)
    gpu.poison(where, 16, stream)
    gpu.d2h(back, where, stream)
    gpu.record(event, stream)
    while not gpu.is_done(event):
        pass
    assert np.isnan(back).all()
    assert (back.view(np.uint8) == 255).all()


def test_a_captured_graph_does_it_again(gpu: Device):
    stream, event = gpu.stream(), gpu.event()
    sent, back = gpu.pinned((4,), np.int32), gpu.pinned((4,), np.int32)
    where = gpu.alloc(16)

    def work() -> None:
        gpu.h2d(where, sent, stream)
        gpu.d2h(back, where, stream)

    work()
    again = gpu.capture(stream, work)
    for value in (3, 4):
        sent[:] = value
        again()
        gpu.record(event, stream)
        while not gpu.is_done(event):
            pass
        assert (back == value).all()


def test_a_call_that_fails_says_so(gpu: Device):
    with pytest.raises((BackendError, DeviceLost)):
        gpu.alloc(1 << 60)


def test_every_precision_was_built_and_computes_in_it(folder: Path):
    found = list(plans.accepted(folder))
    assert {one.key.precision for one in found} == {"fp32", "fp16", "int8"}
    for one in found:
        assert one.layers[one.key.precision] > 0
        assert one.golden_disagreement <= 1e-2


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_answers_are_those_of_the_processor(folder: Path, precision: str):
    session = open_session(open_bundle(), "tensorrt", precision=precision, plans=folder)
    hu = heads(11)
    far = [
        float((one.labels != expected.labels).mean())
        for one, expected in zip(session.infer(hu), open_session(open_bundle(), "onnxruntime").infer(hu), strict=True)
    ]
    session.close()
    assert max(far) < {"fp32": 1e-4, "fp16": 1e-3, "int8": 1e-2}[precision]


def test_a_batch_and_one_by_one_answer_alike(folder: Path):
    session = open_session(open_bundle(), "tensorrt", precision="fp16", plans=folder)
    hu = heads(8)
    together, alone = session.infer(hu), [session.infer(hu[i : i + 1])[0] for i in range(8)]
    session.close()
    assert max(float((a.labels != b.labels).mean()) for a, b in zip(together, alone, strict=True)) < 1e-3


def test_the_same_slices_get_the_same_answer_a_thousand_times(folder: Path):
    session = open_session(open_bundle(), "tensorrt", precision="fp16", plans=folder)
    hu = heads(9)
    first = np.stack([one.labels for one in session.infer(hu)])
    for _ in range(111):
        assert (np.stack([one.labels for one in session.infer(hu)]) == first).all()
    session.close()


def test_an_array_of_torch_is_read_where_it_lies(folder: Path):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("NOT tried: torch has no CUDA here")
    session = open_session(open_bundle(), "tensorrt", precision="fp16", plans=folder)
    hu = heads(9)
    there = torch.from_numpy(hu.astype(np.int32)).cuda()
    torch.cuda.synchronize()
    pairs = zip(session.infer(there), session.infer(hu), strict=True)
    assert all((one.labels == other.labels).all() for one, other in pairs)
    session.close()


def test_a_thousand_sessions_leave_nothing_behind(folder: Path):
    bundle = open_bundle()

    def cycle() -> None:
        session = open_session(bundle, "tensorrt", precision="fp16", plans=folder)
        session.infer(heads(1))
        session.close()

    watcher = CudaBindings()
    for _ in range(20):
        cycle()
    gc.collect()
    before = watcher.free_bytes()
    for _ in range(1000):
        cycle()
    gc.collect()
    after = watcher.free_bytes()
    watcher.close()
    assert before - after < 16 << 20, f"{(before - after) >> 20} MiB are gone"


def test_a_session_takes_what_it_said(folder: Path):
    watcher = CudaBindings()
    before = watcher.free_bytes()
    session = open_session(open_bundle(), "tensorrt", precision="fp16", plans=folder)
    taken = before - watcher.free_bytes()
    said = session.bytes
    session.close()
    watcher.close()
    assert taken < said + (256 << 20), f"said {said >> 20} MiB, took {taken >> 20}"


def test_a_plan_that_is_damaged_is_refused_before_tensorrt_sees_it(folder: Path, tmp_path: Path):
    copy = shutil.copytree(folder, tmp_path / "plans")
    for path in copy.glob("*.plan"):
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(BackendError, match="not what was accepted"):
        open_session(open_bundle(), "tensorrt", precision="fp16", plans=copy)


def test_a_second_build_is_quicker_for_the_timing_cache(folder: Path):
    bundle, trt = open_bundle(), caps.load()
    found = device.open_device()
    key = Key.of(bundle, "fp16", (1, 512, 512), trt, found.about())
    found.close()
    first = next(one for one in plans.accepted(folder) if one.key == key)
    again = at_hand.make(bundle, key, folder, trt=trt, read=constants)
    assert again.build_s < first.build_s


def test_the_best_is_taken_and_its_golden_slices_pass(folder: Path):
    bundle = open_bundle()
    session = open_session(bundle, "auto", plans=folder)
    assert "there are plans for this GPU" in session.why
    assert session.identity.backend.startswith("tensorrt")
    assert self_test(session, bundle) <= 1e-2
    session.close()
