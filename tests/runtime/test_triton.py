"""Models on servers: a real Triton where there is one, and servers that misbehave everywhere."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import grpc
import numpy as np
import pytest

from benchmarks.tritonserver import NoTriton, TritonServer
from calibration.weights import load
from dicom_node import dispatch
from runtime import kserve, triton
from runtime.bundle import open_bundle
from runtime.client import Address
from runtime.errors import BackendError, DeviceLost, InferenceError, NoPlan, OutOfTime, ServerLost
from runtime.kserve import BUNDLE, CHECKED, GRAPH, PRECISION, Server
from runtime.ort import OrtSession
from runtime.session import Session, open_session, self_test, together
from runtime.triton import Servers
from tests.runtime.kserve_stub import Stub, serving
from tests.runtime.triton_servers import repository, started

BUNDLE_THAT_SHIPS = open_bundle()
HU, LABELS = BUNDLE_THAT_SHIPS.golden()
PATIENCE_S = 10.0  # for what has a deadline of a second or less: the rest is a busy machine's


def opened(*addresses: str, deadline_s: float = 20.0, fail_over: str | None = None) -> Session:
    return open_session(BUNDLE_THAT_SHIPS, "triton", servers=Servers(addresses, deadline_s, fail_over), threads=1)


@pytest.fixture(scope="module")
def local() -> Session:
    return open_session(BUNDLE_THAT_SHIPS, "onnxruntime", threads=1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repository(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with started(models, tmp_path_factory.mktemp("triton")) as one:
        yield one


@pytest.fixture
def stub() -> Stub:
    return Stub(BUNDLE_THAT_SHIPS)


@contextmanager
def closing(session: Session) -> Iterator[Session]:
    try:
        yield session
    finally:
        session.close()


def same(answers: list, others: list) -> bool:
    return len(answers) == len(others) and all(
        (one.labels == other.labels).all() and (one.voxels == other.voxels).all()
        for one, other in zip(answers, others, strict=True)
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


# a real Triton


@pytest.mark.parametrize("way", ["gRPC with shared memory", "gRPC", "HTTP", "HTTP, tensors as text"])
def test_a_triton_answers_as_the_local_engine_does(
    server: TritonServer, local: Session, way: str, monkeypatch: pytest.MonkeyPatch
):
    if way == "gRPC":
        monkeypatch.setattr(Address, "is_here", property(lambda _: False))
    if way == "HTTP, tensors as text":
        genuine = Server._look
        without = lambda one: (  # noqa: E731
            (told := genuine(one))[0] | {"extensions": ["model_configuration"]},
            told[1],
        )
        monkeypatch.setattr(Server, "_look", without)
    with closing(opened(server.http if way.startswith("HTTP") else server.grpc)) as session:
        assert f", {way}; hashes as the bundle says, the graph's by its file" in session.why
        assert session.identity.backend == "triton 2.51.0 python"
        assert session.identity.digest == BUNDLE_THAT_SHIPS.digest
        assert self_test(session, BUNDLE_THAT_SHIPS) == self_test(local, BUNDLE_THAT_SHIPS)
        for hu in (HU[:1], HU, np.repeat(HU, 2, 0).astype(np.int32), HU[:, :, :256, :128]):
            assert same(session.infer(hu), local.infer(hu))
        assert not [*kserve.SHARED.glob(f"scanside-{os.getpid()}-*")], "what is shared has no name any more"


def test_without_room_for_what_is_shared_it_goes_the_other_way(
    server: TritonServer, local: Session, monkeypatch: pytest.MonkeyPatch
):
    genuine = os.posix_fallocate

    def small(handle: int, offset: int, size: int) -> None:
        if size > 1 << 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        genuine(handle, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", small)
    with closing(opened(server.grpc)) as session:
        assert "with shared memory" in session.why
        assert "which is full (No space left on device)" in session.why
        assert same(session.infer(HU), local.infer(HU))
    monkeypatch.setattr(kserve, "SHARED", Path("/nowhere"))
    with closing(opened(server.grpc)) as session:
        assert "no shared memory ([Errno 2] No such file" in session.why
        assert same(session.infer(HU), local.infer(HU))
    monkeypatch.undo()
    assert not [*kserve.SHARED.glob(f"scanside-{os.getpid()}-*")]


def test_memory_that_the_server_does_not_let_go_yet_is_no_fault(
    server: TritonServer, local: Session, monkeypatch: pytest.MonkeyPatch
):
    genuine, refused = Server._call, []

    def in_use(self: Server, name: str, *arguments, **options):
        if name == "unregister_system_shared_memory":
            refused.append(arguments)
            raise ServerLost("Cannot unregister shared memory region, it is currently in use.")
        return genuine(self, name, *arguments, **options)

    monkeypatch.setattr(Server, "_call", in_use)
    with closing(opened(server.grpc)) as session:
        assert refused
        assert "with shared memory" in session.why
        assert same(session.infer(HU), local.infer(HU))


@pytest.mark.parametrize(
    ("written", "message"),
    [(0, "label 255 of 7 classes"), (1, "evidence is no probability")],
    ids=["nothing", "labels"],
)
def test_what_a_server_does_not_write_is_not_the_answer_before(
    server: TritonServer, monkeypatch: pytest.MonkeyPatch, written: int, message: str
):
    genuine, answered = Server._call, []

    def idle(self: Server, name: str, *arguments, **options):
        if name != "infer":
            return genuine(self, name, *arguments, **options)
        memory = self._memory._map
        if not answered:
            answered.extend([genuine(self, name, *arguments, **options), memory[:]])
        ends = [one._get_tensor().parameters["shared_memory_offset"].int64_param for one in options["outputs"]]
        memory[ends[0] : ends[written]] = answered[1][ends[0] : ends[written]]
        return answered[0]

    with closing(opened(server.grpc)) as session:
        monkeypatch.setattr(Server, "_call", idle)
        session.infer(HU[:1])
        with pytest.raises(InferenceError, match=message):
            session.infer(HU[:1])


def test_memory_that_the_server_can_not_open_is_not_shared(
    server: TritonServer, local: Session, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(kserve, "SHARED", tmp_path)  # as a container's /dev/shm, which is its own
    with closing(opened(server.grpc)) as session:
        assert "gRPC, no shared memory (" in session.why
        assert same(session.infer(HU), local.infer(HU))
    assert not [*tmp_path.iterdir()]


def test_a_model_of_another_bundle_is_refused_and_both_hashes_are_named(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    other = shutil.copytree(models, tmp_path / "other")
    config = next(other.glob("*/config.pbtxt"))
    config.write_text(config.read_text().replace(BUNDLE_THAT_SHIPS.digest, "f" * 64))
    with started(models, tmp_path / "one") as right:
        session = opened(right.grpc)
        right.kill()
        with started(other, tmp_path / "two", right.ports) as wrong:
            with pytest.raises(BackendError, match=f"{BUNDLE}.*{'f' * 64}.*{BUNDLE_THAT_SHIPS.digest}"):
                opened(wrong.grpc)
            monkeypatch.setattr(kserve, "CHECK_S", 0.0)
            monkeypatch.setattr(triton, "RETRY_S", 0.0)
            for _ in range(2):  # on a connection that has come back by itself, and on a new one
                with pytest.raises(ServerLost, match="f" * 64):
                    session.infer(HU[:1])
            with closing(opened(wrong.http, fail_over="onnxruntime")) as failed_over:
                assert "f" * 64 in failed_over.why
                assert failed_over.identity.backend.endswith("CPUExecutionProvider in place of triton")
        session.close()


def test_a_graph_that_is_not_the_configuration_s_is_not_loaded(models: Path, tmp_path: Path):
    other = shutil.copytree(models, tmp_path / "other")
    (graph,) = other.glob("*/1/model.onnx")
    graph.write_bytes(load(BUNDLE_THAT_SHIPS.graph("int8-cpu")).SerializeToString())
    with pytest.raises(NoTriton), started(other, tmp_path / "one"):
        pass
    assert "model.onnx is another graph: its SHA-256 is" in (tmp_path / "one" / "tritonserver.log").read_text()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({CHECKED: "model.py"}, "hashes as the bundle says, the graph's by its file"),
        ({}, "its configuration says the bundle's hashes, which nobody holds against the files"),
    ],
)
def test_what_a_configuration_alone_says_is_not_called_proved(stub: Stub, more: dict[str, str], words: str):
    bundle = BUNDLE_THAT_SHIPS
    stub.parameters = {BUNDLE: bundle.digest, GRAPH: bundle.sha256("fp32"), PRECISION: "fp32"} | more
    with serving(stub) as address, closing(opened(address)) as session:
        assert session.why == f"{address}, gRPC; {words}"


def test_a_server_that_is_killed_is_stood_in_for_until_it_is_back(
    models: Path, local: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(triton, "RETRY_S", 0.0)
    with started(models, tmp_path / "triton") as server, closing(opened(server.grpc, fail_over="onnxruntime")) as own:
        said = []
        for event in (lambda: None, server.kill, server.start):
            event()
            assert same(own.infer(HU), local.infer(HU))
            said += [own.identity] * len(HU)
        backends = [one.backend for one in said]
        stand_in = f"{local.identity.backend} in place of triton"
        assert backends == ["triton 2.51.0 python"] * 5 + [stand_in] * 5 + ["triton 2.51.0 python"] * 5
        assert together(said).backend == f"10 slices by triton 2.51.0 python, fp32; 5 slices by {stand_in}, fp32"


def test_when_one_of_two_replicas_dies_the_other_answers(models: Path, local: Session, tmp_path: Path):
    with (
        started(models, tmp_path / "one") as one,
        started(models, tmp_path / "two") as two,
        closing(opened(one.grpc, two.http)) as session,
    ):
        session.infer(HU[:1])
        assert one.grpc in session.why
        session.infer(HU[:1])
        assert two.http in session.why, "each in its turn"
        one.kill()
        for _ in range(3):
            assert same(session.infer(HU), local.infer(HU))
            assert two.http in session.why
        two.kill()
        with pytest.raises(ServerLost, match=f"no server answers.*{one.grpc}.*{two.http}|{two.http}.*{one.grpc}"):
            session.infer(HU)


@pytest.mark.parametrize("way", ["grpc", "http"])
def test_a_server_that_hangs_is_given_up_in_time(models: Path, tmp_path: Path, way: str):
    with started(models, tmp_path / "triton") as server:
        address = getattr(server, way)
        with closing(opened(address)) as session:
            session._replicas[0].server._deadline_s = 0.5
            server.signal(signal.SIGSTOP)
            began = time.monotonic()
            with pytest.raises(ServerLost, match=address):
                session.infer(HU[:1])
            with pytest.raises(BackendError, match="no server can be used"):
                opened(address)
            assert time.monotonic() - began < PATIENCE_S
            server.signal(signal.SIGCONT)


# servers that speak the protocol alone, and some not even that


def test_a_session_may_be_closed_again(stub: Stub):
    with serving(stub) as address:
        session = opened(address, fail_over="onnxruntime")
        server = session._replicas[0].server
        for one in (session, session, server, server):
            one.close()
    assert session.servers == {address: ""}


@pytest.mark.parametrize("failing", ["runtime.session.self_test", "runtime.triton.library"])
def test_the_engine_that_was_to_stand_in_is_closed_where_nothing_opens(monkeypatch: pytest.MonkeyPatch, failing: str):
    closed = []

    def fail(*_: object) -> None:
        raise BackendError("as it is asked to")

    monkeypatch.setattr(OrtSession, "close", lambda one, work=OrtSession.close: (closed.append(one), work(one)))
    monkeypatch.setattr(failing, fail)
    with pytest.raises(BackendError, match="as it is asked to"):
        opened("grpc://127.0.0.1:1", fail_over="onnxruntime")
    assert len(closed) == 1


def test_any_server_that_speaks_the_protocol_will_do(stub: Stub, local: Session):
    with serving(stub) as address, closing(opened(address)) as session:
        assert session.why == f"{address}, gRPC; known by its name: it tells no hashes"
        assert session.identity.backend == "stub 1 onnx"
        assert same(session.infer(HU), local.infer(HU))


def test_a_model_with_one_shape_gets_it(stub: Stub, local: Session):
    stub.shape = (2, 1, *HU.shape[2:])
    with serving(stub) as address, closing(opened(address)) as session:
        assert session.sizes == (HU.shape[2:],)
        assert same(session.infer(HU), local.infer(HU))
        assert {*stub.asked} == {(2, 1, *HU.shape[2:])}
        asked = len(stub.asked)
        with pytest.raises(NoPlan, match=r"not of \(64, 64\)"):
            session.infer(HU[:, :, :64, :64])
        assert len(stub.asked) == asked, "for that nobody has to be asked"


SPOILT = {
    "evidence is missing": lambda told: {"labels": told["labels"]},
    "labels is int64": lambda told: told | {"labels": told["labels"].astype(np.int64)},
    "answers of shape": lambda told: told | {"labels": told["labels"][:, :-1].copy()},
    "label 9 of 7 classes": lambda told: told | {"labels": np.full_like(told["labels"], 9)},
    "no probability": lambda told: told | {"evidence": np.full_like(told["evidence"], np.nan)},
}


@pytest.mark.parametrize("fault", SPOILT)
def test_what_is_no_answer_is_never_taken_for_one(stub: Stub, local: Session, fault: str):
    with serving(stub) as address, closing(opened(address, fail_over="onnxruntime")) as session:
        assert session.identity.backend == "stub 1 onnx"
        stub.spoil = SPOILT[fault]
        assert same(session.infer(HU), local.infer(HU))
        assert session.identity.backend.endswith("in place of triton")
        assert fault in session.why
        with pytest.raises(BackendError, match=fault):
            opened(address)


def test_answers_that_are_another_networks_open_no_session(stub: Stub):
    def shifted(told: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return told | {"labels": np.roll(told["labels"], 3, axis=1)}

    stub.spoil = shifted
    with serving(stub) as address, pytest.raises(BackendError, match="pixels differ from PyTorch"):
        opened(address)


def test_a_request_that_a_well_server_refuses_is_the_series_fate_and_not_the_servers(stub: Stub, local: Session):
    genuine = stub.ModelInfer

    def choosy(request, context):
        if request.inputs[0].shape[2] == 64:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "64 rows are too few")
        return genuine(request, context)

    stub.ModelInfer = choosy
    with serving(stub) as address:
        with closing(opened(address)) as session:
            with pytest.raises(InferenceError, match="64 rows are too few") as refused:
                session.infer(HU[:, :, :64])
            assert not isinstance(refused.value, DeviceLost)
            assert same(session.infer(HU), local.infer(HU))
        with closing(opened(address, fail_over="onnxruntime")) as session:
            assert same(session.infer(HU[:, :, :64]), local.infer(HU[:, :, :64]))
            assert session.why == f"fail-over: {address}: 64 rows are too few"
            assert same(session.infer(HU), local.infer(HU))
            assert session.identity.backend == "stub 1 onnx", "and the server answers what it takes"


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND])
def test_a_server_that_can_not_go_on_is_lost(stub: Stub, code: grpc.StatusCode):
    with serving(stub) as address, closing(opened(address)) as session:
        stub.status = code, "the GPU is gone"
        with pytest.raises(ServerLost, match=f"{address}: the GPU is gone"):
            session.infer(HU[:1])


def test_a_lost_server_is_not_asked_with_each_slice(stub: Stub, local: Session):
    with serving(stub) as address, closing(opened(address, fail_over="onnxruntime")) as session:
        stub.status = grpc.StatusCode.INTERNAL, "the GPU is gone"
        session.infer(HU[:1])
        asked = len(stub.asked)
        for _ in range(3):
            assert same(session.infer(HU[:1]), local.infer(HU[:1]))
        assert len(stub.asked) == asked


def test_of_two_servers_the_one_that_is_lost_is_known(stub: Stub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(triton, "RETRY_S", 0.0)
    monkeypatch.setattr(triton, "COST", 0)
    with serving(stub) as lost, serving(Stub(BUNDLE_THAT_SHIPS)) as well, closing(opened(lost, well)) as session:
        assert session.servers == {lost: "", well: ""}
        stub.status = grpc.StatusCode.INTERNAL, "the GPU is gone"
        session.infer(HU[:1])
        assert session.servers == {lost: f"{lost}: the GPU is gone", well: ""}
        stub.status = None
        session.infer(HU[:1])
        assert session.servers == {lost: "", well: ""}


def test_a_slow_answer_is_given_up_in_time(stub: Stub):
    with serving(stub) as address, closing(opened(address)) as session:
        session._replicas[0].server._deadline_s = 0.2
        stub.slow_s = 3.0
        began = time.monotonic()
        with pytest.raises(ServerLost, match="Deadline Exceeded"):
            session.infer(HU[:2])
        assert time.monotonic() - began < 2.5


def test_however_many_servers_hang_they_get_one_minute_together(local: Session, monkeypatch: pytest.MonkeyPatch):
    stubs = [Stub(BUNDLE_THAT_SHIPS) for _ in range(4)]
    with contextlib.ExitStack() as stack:
        addresses = [stack.enter_context(serving(one)) for one in stubs]
        session = stack.enter_context(closing(opened(*addresses, deadline_s=1.0, fail_over="onnxruntime")))
        monkeypatch.setattr(triton, "LONGEST_S", 1.5)
        for one in stubs:
            one.slow_s = 2.0
            one.asked.clear()
        assert same(session.infer(HU[:1]), local.infer(HU[:1]))
        assert [len(one.asked) for one in stubs] == [1, 0, 0, 0], "half a second is no time for another"
        assert same(session.infer(HU[:1]), local.infer(HU[:1]))
        assert [len(one.asked) for one in stubs] == [1, 1, 0, 0], "and the next slice asks the next one"
        monkeypatch.setattr(triton, "LONGEST_S", 0.0)
        with closing(opened(addresses[2], fail_over="onnxruntime")) as without_time:
            assert "no time was left to ask it" in without_time.why
            assert "does a server" not in without_time.why, "nobody knows"


def test_two_of_the_longest_requests_fit_into_what_the_node_waits():
    assert 2 * kserve.LONGEST_S <= dispatch.HANG_S, "and the local engine has as long again"
    assert 2 * triton.MOST_DEADLINE_S * kserve.MOST_VIEWS <= kserve.LONGEST_S


def test_large_requests_to_servers_that_hang_leave_time_for_one_that_is_well(
    local: Session, monkeypatch: pytest.MonkeyPatch
):
    stubs = [Stub(BUNDLE_THAT_SHIPS) for _ in range(3)]
    with contextlib.ExitStack() as stack:
        for one in stubs:
            one.shape = (4, 1, *HU.shape[2:])
        addresses = [stack.enter_context(serving(one)) for one in stubs]
        session = stack.enter_context(closing(opened(*addresses, deadline_s=1.75)))
        for module in (kserve, triton):
            monkeypatch.setattr(module, "LONGEST_S", 8.0)  # a full request alone would have seven of them
        stubs[0].slow_s = 9.0
        assert same(session.infer(HU[:1]), local.infer(HU[:1]))
        assert session.why.startswith(addresses[1])
        session._replicas.rotate(1)  # whose turn was the third's is the second's again
        session._replicas[-1].next_try = session._next_look = 0.0
        stubs[1].slow_s = 9.0
        lost = [address for address, fault in session.servers.items() if fault]
        assert lost == addresses[:1]
        assert same(session.infer(HU[:1]), local.infer(HU[:1]))
        assert session.why.startswith(addresses[2]), "after a search and a request that both came to nothing"


def test_a_server_is_not_lost_for_the_time_that_others_took(stub: Stub, local: Session):
    with serving(stub) as address, closing(opened(address)) as session:
        (replica,) = session._replicas
        before = replica.server._client
        replica.server._memory = kserve._Shared(1)
        replica.server._memory.unlink()
        stub.slow_s = 2.0
        with pytest.raises(OutOfTime, match=rf"{address}: .*Deadline Exceeded.* \(0\.\d s were left for it\)"):
            replica.infer(HU[:1], time.monotonic() + 0.5)
        with pytest.raises(OutOfTime, match=f"{address}: no time was left to ask it"):
            replica.infer(HU[:1], time.monotonic())
        assert session.servers == {address: ""}
        assert replica.server._client is not before, "the late answer comes by the old connection"
        assert replica.server._memory is None, "or is written into the old memory"
        stub.slow_s = 0.0
        assert same(session.infer(HU[:1]), local.infer(HU[:1]))


def test_what_a_server_is_asked_anew_ends_with_the_slice_s_time(stub: Stub):
    """It refuses a request, and hangs where it has to show that it is well."""
    genuine = stub.ModelInfer

    def choosy(request, context):
        if request.inputs[0].shape[2] == 64:
            stub.slow_s = 3.0
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "64 rows are too few")
        return genuine(request, context)

    stub.ModelInfer = choosy
    with serving(stub) as address, closing(opened(address)) as session:
        replica = session._replicas[0]
        began = time.monotonic()
        with pytest.raises(ServerLost, match="Deadline Exceeded"):
            replica.infer(HU[:1, :, :64], began + 1.0)
        assert time.monotonic() - began < 2.5


def test_a_server_that_hangs_is_looked_for_after_its_back_off_and_one_at_a_time(
    local: Session, monkeypatch: pytest.MonkeyPatch
):
    later_s = 0.0
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + later_s)
    monkeypatch.setattr(triton, "RETRY_S", 0.0)
    stubs = [Stub(BUNDLE_THAT_SHIPS) for _ in range(2)]
    with contextlib.ExitStack() as stack:
        addresses = [stack.enter_context(serving(one)) for one in stubs]
        session = stack.enter_context(closing(opened(*addresses, deadline_s=0.5, fail_over="onnxruntime")))
        monkeypatch.setattr(triton, "time", clock)
        for one in stubs:  # they say that they are well, and answer nothing
            one.slow_s = 1.0
            one.asked.clear()

        def asked() -> list[int]:
            assert same(session.infer(HU[:1]), local.infer(HU[:1]))
            return [len(one.asked) for one in stubs]

        assert asked() == [1, 1]
        assert asked() == [1, 1], "ten times as long as it took"
        later_s += triton.LONGEST_RETRY_S
        assert asked() == [2, 1], "one request, and no other server"
        assert asked() == [2, 1]
        later_s += triton.LONGEST_RETRY_S
        assert asked() == [2, 2], "each in its turn"
        for one in stubs:
            one.slow_s = 0.0
        for _ in range(10):  # on a busy machine half a second may pass by itself
            later_s += triton.LONGEST_RETRY_S
            asked()
            if session.identity.backend == "stub 1 onnx":
                break
        assert session.identity.backend == "stub 1 onnx"


def test_a_server_that_is_not_ready_opens_no_session(stub: Stub):
    stub.is_ready = False
    with serving(stub) as address, pytest.raises(BackendError, match="the server is not ready: see its log"):
        opened(address)


def test_a_model_that_is_not_there_says_what_writes_it(stub: Stub):
    stub._name = "another"
    with (
        serving(stub) as address,
        pytest.raises(BackendError, match=r"no model phantom_unet_fp32_\w{12} that is ready.*bundle triton"),
    ):
        opened(address)


def test_a_model_of_another_contract_is_refused(stub: Stub):
    stub.shape = (-1, 3, -1, -1)
    with serving(stub) as address, pytest.raises(BackendError, match=r"takes INT32 \[-1, 3, -1, -1\].*\(N, 1, H, W\)"):
        opened(address)


def _silent(connection: socket.socket) -> None:
    connection.recv(1)


def _rubbish(connection: socket.socket) -> None:
    connection.recv(1)
    connection.sendall(b"\xff\x00 none of your protocols\r\n\r\n")


def _no_json(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"name": ')


def _other_json(connection: socket.socket) -> None:
    while connection.recv(65536):
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]")


def _drip(connection: socket.socket) -> None:
    connection.recv(1)
    for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + bytes(200):
        connection.sendall(bytes([byte]))
        time.sleep(0.1)


@contextmanager
def talking(behaviour) -> Iterator[int]:
    """A port at which every connection is treated so."""
    ended = threading.Event()
    open_ones: list[socket.socket] = []

    def treat(connection: socket.socket) -> None:
        try:
            behaviour(connection)
            ended.wait(PATIENCE_S if behaviour in (_silent, _drip) else 0)
        except OSError:
            pass
        finally:
            connection.close()

    threads: list[threading.Thread] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.2)

        def serve() -> None:
            while not ended.is_set():
                try:
                    connection, _ = listening.accept()
                except TimeoutError:
                    continue
                connection.settimeout(PATIENCE_S)
                open_ones.append(connection)
                threads.append(threading.Thread(target=treat, args=(connection,), daemon=True))
                threads[-1].start()

        serving_thread = threading.Thread(target=serve, daemon=True)
        serving_thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            ended.set()
            serving_thread.join()
            for one in open_ones:
                one.close()
            for one in threads:
                one.join()


def test_json_of_something_else_is_told():
    with talking(_other_json) as port, pytest.raises(BackendError, match="an answer that is none of KServe v2"):
        opened(f"http://127.0.0.1:{port}")


@pytest.mark.parametrize("scheme", ["grpc", "http"])
@pytest.mark.parametrize("behaviour", [_silent, _rubbish, _no_json, _drip])
def test_what_is_no_server_is_told_in_time(scheme: str, behaviour):
    with talking(behaviour) as port:
        began = time.monotonic()
        with pytest.raises(BackendError, match=f"{scheme}://127.0.0.1:{port}: .*does a server that speaks KServe v2"):
            opened(f"{scheme}://127.0.0.1:{port}")
        assert time.monotonic() - began < PATIENCE_S


@pytest.mark.parametrize("name", ["http_proxy", "https_proxy", "grpc_proxy"])
def test_a_proxy_of_the_environment_gets_nothing(stub: Stub, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    for each in (name, name.upper()):
        monkeypatch.setenv(each, "http://127.0.0.1:9")
    with serving(stub) as address, closing(opened(address)) as session:
        assert session.identity.backend == "stub 1 onnx"
    with talking(_other_json) as port, pytest.raises(BackendError, match="an answer that is none of KServe v2"):
        opened(f"http://127.0.0.1:{port}")  # which it has got, then


def test_nobody_there_is_told(local: Session):
    address = f"grpc://127.0.0.1:{free_port()}"
    with pytest.raises(BackendError, match=f"no server can be used: {address}"):
        opened(address)
    with closing(opened(address, fail_over="onnxruntime")) as session:
        assert session.why.startswith(f"fail-over: {address}")
        assert same(session.infer(HU), local.infer(HU))


def test_without_servers_there_is_no_session():
    with pytest.raises(BackendError, match=r"triton has no servers: name them in \[triton\]"):
        open_session(BUNDLE_THAT_SHIPS, "triton")


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_without_tritonclient_its_extra_is_named(scheme: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, f"tritonclient.{scheme}", None)
    address, remedy = f"{scheme}://127.0.0.1:1", r"in scanside's checkout, pip install '\.\[triton\]'"
    with pytest.raises(BackendError, match=rf"^{address}: tritonclient is missing \(.*\): {remedy}$"):
        opened(address, fail_over="onnxruntime")


@pytest.mark.parametrize(
    "text", ["127.0.0.1:8001", "ftp://a:1", "grpc://a", "grpc://a:0", "grpc://a:70000", "http://a b:1"]
)
def test_an_address_that_is_none_is_refused(text: str):
    with pytest.raises(ValueError, match="write grpc://HOST:PORT"):
        Address.parse(text)


@pytest.mark.parametrize(
    ("text", "is_here"),
    [("grpc://localhost:1", True), ("http://[::1]:1", True), ("grpc://10.0.0.1:1", False), ("grpc://triton:1", False)],
)
def test_which_servers_are_on_this_machine(text: str, is_here: bool):
    assert Address.parse(text).is_here is is_here


def test_one_engine_alone_is_told_as_it_is(local: Session):
    assert together([local.identity] * 3) == local.identity
