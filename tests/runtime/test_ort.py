"""ONNX Runtime on the processor: a few views go as one batch, more side by side."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest

from export import triton
from runtime import seal
from runtime.bundle import SHIPPED, open_bundle
from runtime.errors import BackendError, InferenceError
from runtime.ort import MOST_AT_ONCE, OrtSession

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


@pytest.fixture(scope="module")
def hu() -> NDArray[np.int16]:
    return open_bundle().golden()[0]


@pytest.mark.parametrize("precision", ["fp32", "int8-cpu"])
@pytest.mark.parametrize("threads", [2, 6])
def test_views_side_by_side_are_answered_as_alone_to_the_bit_and_in_their_order(hu, precision: str, threads: int):
    session = OrtSession(open_bundle(), precision, threads=threads)
    together = session.infer(hu)
    alone = [session.infer(view[None])[0] for view in hu]
    session.close()
    assert len(together) == len(alone) == len(hu)
    for one, other in zip(together, alone, strict=True):
        for name in ("labels", "voxels", "evidence"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert len({one.labels.tobytes() for one in together}) > 1, "or else their order tells nothing"


def test_as_many_views_are_in_work_at_once_as_there_are_threads_but_not_more_than_memory_allows():
    for threads in (2, 6):
        session = OrtSession(open_bundle(), threads=threads)
        assert session.max_batch == min(threads, MOST_AT_ONCE)
        meet = threading.Barrier(session.max_batch)

        class Watched:
            def __init__(self, engine: object, meet: threading.Barrier) -> None:
                self.engine, self.meet = engine, meet

            def run(self, *arguments: object) -> object:
                self.meet.wait(30)  # and breaks where they come one after the other
                return self.engine.run(*arguments)

        session._beside = Watched(session._beside, meet)
        session.infer(np.zeros((session.max_batch, 1, 64, 64), np.int16))
        session.close()


def test_a_single_thread_takes_a_batch_as_it_is():
    session = OrtSession(open_bundle(), threads=1)
    assert session._beside is None
    assert len(session.infer(np.zeros((3, 1, 64, 64), np.int16))) == 3
    session.close()


def test_one_view_that_fails_among_others_fails_the_batch_and_the_session_goes_on(hu):
    session = OrtSession(open_bundle(), threads=2)
    with pytest.raises(InferenceError, match=r"ONNX Runtime failed on a batch of shape \(1, 2, 320, 320\)"):
        session.infer(np.concatenate([hu[:2], hu[:2]], axis=1))
    assert len(session.infer(hu[:2])) == 2
    session.close()


def test_fewer_views_than_it_takes_at_once_go_as_one_batch(hu):
    session = OrtSession(open_bundle(), threads=4)
    assert [len(session.run(hu[:1].repeat(count, 0).astype(np.int32))) for count in (1, 3, 4, 5)] == [1, 1, 4, 5]
    session.close()


def test_a_session_may_be_closed_again():
    session = OrtSession(open_bundle(), threads=2)
    session.close()
    session.close()
    with pytest.raises(InferenceError, match="ONNX Runtime failed"):
        session.infer(np.zeros((1, 1, 64, 64), np.int16))


def renamed(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.output[:] = ["proof" if name == "evidence" else name for name in node.output]
    next(one for one in model.graph.output if one.name == "evidence").name = "proof"


def wide(model: onnx.ModelProto) -> None:
    last = next(node for node in model.graph.node if "labels" in node.output)
    last.attribute[0].i = onnx.TensorProto.INT64
    next(one for one in model.graph.output if one.name == "labels").type.tensor_type.elem_type = onnx.TensorProto.INT64


@pytest.mark.parametrize(("spoil", "has"), [(renamed, "proof tensor.float"), (wide, "labels tensor.int64")])
def test_a_graph_of_another_contract_is_named_and_not_opened(
    tmp_path: Path, spoil: Callable[[onnx.ModelProto], None], has: str
):
    folder = shutil.copytree(SHIPPED, tmp_path / "bundle")

    def put(partial: Path) -> None:
        path = partial / "model.onnx"
        model = onnx.load(path, load_external_data=False)
        spoil(model)
        path.write_bytes(model.SerializeToString())

    seal.change(folder, put)
    message = rf"model.onnx: takes and answers .*{has}.*a bundle's graph hu tensor.int32.*: export it again"
    with pytest.raises(BackendError, match=message):
        OrtSession(open_bundle(folder))
    with pytest.raises(BackendError, match=message):
        triton.write(open_bundle(folder), "fp32", tmp_path / "repository")
    assert not (tmp_path / "repository").exists()
