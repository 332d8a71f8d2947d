"""The search for layers that do not bear 8 bits."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calibration.sensitivity import Scorer, search
from runtime.verdict import Budget
from tests.calibration.made import CLASSES, unet, views

LAYERS = ["first", "second", "deep", "merge"]


def spoilt(amounts: dict[str, float]):
    """A placement that, in place of 8 bits, multiplies the kernels of layers by what each does not bear."""

    def place(model: onnx.ModelProto, span: object, quantised: Collection[str]) -> onnx.ModelProto:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        for one in copy.graph.initializer:
            layer = one.name.removesuffix(".w")
            if layer in quantised and one.name != layer:
                one.CopyFrom(
                    numpy_helper.from_array(numpy_helper.to_array(one) * np.float32(amounts.get(layer, 1)), one.name)
                )
        return copy

    return place


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer(unet(), views(), CLASSES)


def test_a_graph_agrees_with_itself(scorer: Scorer):
    same = scorer.compare(unet())
    assert same.loss == 0
    assert set(same.area_percent.values()) == {0.0}
    assert same.within(Budget())
    assert "intracerebral" in scorer.told


def test_nothing_is_left_out_where_all_layers_bear_it(scorer: Scorer):
    found = search(unet(), spoilt({}), {}, LAYERS, scorer, Budget())
    assert found.left_out == ()
    assert found.inside
    assert len(found.path) == 1


def test_the_layer_that_does_not_is_left_out_and_no_other(scorer: Scorer):
    done = []
    found = search(unet(), spoilt({"deep": 3.0}), {}, LAYERS, scorer, Budget(), done.append)
    assert found.left_out == ("deep",)
    assert next(iter(found.alone)) == "deep"
    assert found.alone["deep"] > 0.01 > found.alone["first"]
    assert found.inside
    assert len(done) == len(LAYERS) + 2


def test_layers_are_given_up_worst_first_until_the_budget_holds(scorer: Scorer):
    found = search(unet(), spoilt({"second": -1.0, "merge": -1.0}), {}, LAYERS, scorer, Budget())
    assert set(found.left_out) == {"second", "merge"}
    assert found.alone[found.left_out[0]] >= found.alone[found.left_out[1]]
    assert [one.loss for one in found.path][-1] == 0


def test_a_budget_that_nothing_keeps_is_said_to_be_broken(scorer: Scorer):
    def always_wrong(model: onnx.ModelProto, span: object, quantised: object) -> onnx.ModelProto:
        return spoilt({"merge": -1.0})(model, span, ["merge"])

    found = search(unet(), always_wrong, {}, LAYERS, scorer, Budget())
    assert not found.inside
    assert len(found.path) == len(LAYERS), "one layer at least is quantised, or it is FP32 by another name"


def test_the_search_keeps_half_of_the_budget_for_other_series(scorer: Scorer):
    agreement = scorer.compare(spoilt({"first": 1.02})(unet(), {}, ["first"]))
    assert 0 < agreement.loss < 0.1
    most = max(abs(change) for change in agreement.area_percent.values())
    just = Budget(dice=1 - 2.1 * agreement.loss, volume_percent=2.1 * most)
    assert agreement.within(just)
    assert not agreement.within(Budget(dice=1 - 1.9 * agreement.loss, volume_percent=2.1 * most))
    assert not agreement.within(Budget(dice=1 - 2.1 * agreement.loss, volume_percent=1.9 * most))
