"""A network for volumes, from phantoms to a bundle that segments a series."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dicom_node.analysis.analyser import Analyser
from dicom_node.analysis.series import Series
from dicom_node.simulation import phantom as writer
from dicom_node.storage.journal import SeriesState
from export import bundle as bundles
from runtime.bundle import open_bundle
from runtime.geometry import View
from runtime.session import open_session, self_test
from runtime.types import OperatingPoint
from training import evaluate, heads
from training import recipe as recipes
from training.lesions import Lesion
from training.phantom import Scan, make
from training.recipe import RecipeError
from training.train import load_checkpoint, train

pytest.importorskip("monai", reason="3D networks need MONAI: pip install monai einops")
VOLUMES = """
name = "volumes"
version = "0"
training_data = "two phantoms"
[network]
architecture = "unet_3d"
channels = [4, 4, 8, 8, 8, 4]
[input]
windows_hu = [[0, 90], [-200, 1000]]
grid = 64
depth = 16
[data]
kind = "phantoms"
heads = 2
validation_heads = 1
slices_per_head = 6
bleed_free = 0
seed = 1
[training]
steps = 2
batch = 2
crop = [64, 32]
learning_rate = 0.01
optimiser = "muon"
schedule = "one_cycle"
validate_every = 2
seed = 1
"""


def recipe(folder: Path, text: str = VOLUMES) -> recipes.Recipe:
    path = folder / "volumes.toml"
    path.write_text(text)
    return recipes.load(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a network for volumes."""
    run = tmp_path_factory.mktemp("run")
    made, graph, _ = load_checkpoint(train(recipe(run), run))
    bundles.write(made, graph, heads.golden_slices(made.input.view), run / "bundle", point=OperatingPoint(0.5))
    return run / "bundle"


def test_the_bundle_shows_volumes_and_answers_their_middle(folder: Path):
    bundle = open_bundle(folder)
    assert bundle.view == View(16, 8)
    session = open_session(bundle)
    assert self_test(session, bundle) == 0
    hu, labels = bundle.golden()
    assert (hu.shape[1], len(labels)) == (16, 8 * len(hu))


def test_a_series_goes_through_whole(folder: Path, tmp_path: Path):
    bundle = open_bundle(folder)
    phantom = make((Lesion("subdural", 20.0),), Scan((5.0,), matrix=128), seed=5)
    analyser = Analyser(bundle, session := open_session(bundle), (), min_slices=5, min_coverage_mm=0, max_batch=2)
    series = Series()
    analyser.feed(series, writer.write(phantom.slices, tmp_path / "series"))
    assert series.labels == {}
    outcome = analyser.close(series, tmp_path / "out", revision=1, missing=())
    assert outcome.state is SeriesState.ANALYSED
    assert len(series.labels) == len(phantom.slices)
    case = heads.as_case(phantom)
    scored = evaluate.score(case, case.images, bundle, session)
    by_place = np.stack([series.labels[key].voxels for _, key in series.order])
    assert scored.measured_ml[1:] == pytest.approx(case.voxel_ml @ by_place[:, 1:])


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (VOLUMES.replace("depth = 16", ""), "unet_3d needs one"),
        (VOLUMES.replace("depth = 16", "depth = 24"), "24 is no multiple of 16"),
        (VOLUMES.replace("steps = 2", "steps = 2\ncoarse_steps = 1", 1), "two dimensions"),
        (VOLUMES.replace("unet_3d", "res_unet"), "res_unet has no use for one"),
    ],
)
def test_depth_goes_with_volumes_alone(wrong: str, reason: str, tmp_path: Path):
    with pytest.raises(RecipeError, match=reason):
        recipe(tmp_path, wrong)
