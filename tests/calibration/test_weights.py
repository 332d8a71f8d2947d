"""One file for the weights of all graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from calibration.activations import float_tensors
from calibration.half import to_half
from calibration.weights import FILE, load, rounded, store
from tests.calibration.made import unet, views


def answers(model: bytes | str) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {"hu": np.stack(views()).astype(np.int32)})


def test_graphs_come_back_with_the_very_same_weights(tmp_path: Path):
    full = rounded(unet())
    half, _ = to_half(full, dict.fromkeys(float_tensors(full), 1.0))
    store({"a.onnx": full, "b.onnx": half}, tmp_path)
    for name, model in (("a.onnx", full), ("b.onnx", half)):
        expected = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
        got = {one.name: numpy_helper.to_array(one) for one in load(tmp_path / name).graph.initializer}
        assert expected.keys() == got.keys()
        for key, values in expected.items():
            assert got[key].dtype == values.dtype
            assert (got[key] == values).all()
        onnx.checker.check_model(load(tmp_path / name), full_check=True)


def test_both_precisions_share_each_tensor(tmp_path: Path):
    full = rounded(unet())
    half, _ = to_half(full, dict.fromkeys(float_tensors(full), 1.0))
    store({"a.onnx": full}, tmp_path)
    alone = (tmp_path / FILE).stat().st_size
    store({"a.onnx": full, "b.onnx": half}, tmp_path)
    assert (tmp_path / FILE).stat().st_size == alone
    large = sum(w.size for one in full.graph.initializer if (w := numpy_helper.to_array(one)).nbytes >= 2048)
    assert 2 * large <= alone <= 2 * large + 64 * len(full.graph.initializer)


def test_an_engine_reads_the_stored_graph_and_answers_the_same(tmp_path: Path):
    full = rounded(unet())
    store({"a.onnx": full}, tmp_path)
    for one, two in zip(answers(str(tmp_path / "a.onnx")), answers(full.SerializeToString()), strict=True):
        assert (one == two).all()


def test_rounding_changes_kernels_alone_and_those_by_two_to_the_minus_eleven_at_most():
    model = unet()
    window = next(w for w in model.graph.initializer if w.name == "scale")
    window.CopyFrom(numpy_helper.from_array(np.float32(4095), "scale"))  # 4096 in FP16
    for one, two in zip(model.graph.initializer, rounded(model).graph.initializer, strict=True):
        before, after = numpy_helper.to_array(one), numpy_helper.to_array(two)
        assert np.abs(after - before).max() <= np.abs(before).max() * 2.0**-11
        assert (before == after).all() == (not one.name.endswith(".w")), one.name


def test_weights_beyond_half_precision_are_stored_whole(tmp_path: Path):
    model = unet()
    one = next(w for w in model.graph.initializer if w.name == "merge.w")
    huge = numpy_helper.to_array(one) * np.float32(1e7)
    one.CopyFrom(numpy_helper.from_array(huge, "merge.w"))
    store({"a.onnx": rounded(model)}, tmp_path)
    got = {w.name: numpy_helper.to_array(w) for w in load(tmp_path / "a.onnx").graph.initializer}
    assert (got["merge.w"] == huge).all()
