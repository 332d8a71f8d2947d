"""From data as people have it to a bundle that the runtime serves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export import bundle as bundles
from runtime.bundle import open_bundle
from runtime.session import open_session, self_test
from training import collection
from training import recipe as recipes
from training.recipe import RecipeError
from training.slices import MATRIX, Slices
from training.sources.case import Case, Entry
from training.train import load_checkpoint, train

RECIPE = """
name = "coco"
version = "0"
training_data = "squares"
classes = ["background", "subdural"]
[network]
architecture = "attention_unet"
channels = [4, 8]
classes = 1
[input]
windows_hu = [[0, 80]]
grid = 64
[data]
kind = "coco"
shows_hu = [0, 80]
patient = '^(?P<patient>[^_]+)_'
classes = { SDH = "subdural" }
[split]
fractions = [0.7, 0.3]
seed = 1
[training]
epochs = 2
batch = 4
optimiser = "rmsprop"
learning_rate = 1e-3
schedule = "plateau"
seed = 1
"""


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Six patients with two pictures each, a bright square on each first one."""
    images, annotations = [], []
    for number in range(12):
        picture = np.full((64, 48), 100, np.uint8)
        name = f"p{number // 2}_{number % 2}.png"
        if number % 2 == 0:
            picture[10:30, 8:28] = 220
            outline = [8, 10, 28, 10, 28, 30, 8, 30]
            annotations.append(
                {"id": number + 1, "image_id": number, "category_id": 1, "segmentation": [outline], "iscrowd": 0}
            )
        Image.fromarray(picture).save(tmp_path / name)
        images.append({"id": number, "file_name": name, "height": 64, "width": 48})
    path = tmp_path / "annotations.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "SDH"}]})
    )
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> recipes.Recipe:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return recipes.load(tmp_path / "recipe.toml")


def test_from_a_coco_export_to_a_bundle_that_serves(recipe: recipes.Recipe, coco: Path, tmp_path: Path):
    checkpoint = train(recipe, tmp_path / "run", coco)
    recipe, graph = load_checkpoint(checkpoint)
    hu = np.random.default_rng(0).integers(0, 80, (2, 1, 128, 128)).astype(np.int16)
    assert bundles.write(recipe, graph, recipe.classes, hu, tmp_path / "bundle", minimum_ml=0.5)["passed"]
    bundle = open_bundle(tmp_path / "bundle")
    assert bundle.classes == ("background", "subdural")
    self_test(open_session(bundle), bundle)


def test_pictures_become_hounsfield_units_at_one_size_and_patients_stay_on_one_side(
    recipe: recipes.Recipe, coco: Path, tmp_path: Path
):
    sides = collection.divide(collection.entries(recipe.data, recipe.classes, coco), recipe.split)
    assert {side: len({entry.patient for entry in listed}) for side, listed in sides.items()} == {
        "training": 4,
        "validation": 2,
    }
    slices = collection.collect(sides["training"], recipe, tmp_path / "slices", "training", lambda *_: None)
    assert slices.hu.shape == slices.labels.shape == (8, MATRIX, MATRIX)
    shown = slices.hu[slices.by_class[1][0]]
    assert (shown.min(), shown.max()) == (round(100 / 255 * 80), round(220 / 255 * 80))
    blood = slices.labels[slices.by_class[1][0]] == 1
    assert blood.mean() == pytest.approx(20 * 20 / (64 * 48), abs=1e-3)
    assert [len(indices) for indices in slices.by_class] == [4, 4]


def test_neighbours_are_of_the_same_case(tmp_path: Path, recipe: recipes.Recipe):
    def case(name: str, values: tuple[int, ...]) -> Entry:
        images = np.ones((len(values), MATRIX, MATRIX), np.int16) * np.array(values, np.int16)[:, None, None]
        return Entry(name, name, lambda: Case(name, name, images, np.zeros(images.shape, np.uint8), "HU"))

    listed = (case("a", (1, 2, 3)), case("b", (7,)))
    wider = recipe.model_copy(update={"input": recipe.input.model_copy(update={"neighbours": 1})})
    for _ in range(2):  # the second time from the arrays of the first
        slices = collection.collect(listed, wider, tmp_path, "training", lambda *_: None)
        assert slices.hu[slices.around][..., 0, 0].tolist() == [[1, 1, 2], [1, 2, 3], [2, 3, 3], [7, 7, 7]]
        assert slices.own.tolist() == [0, 1, 2, 3]


def test_a_recipe_of_a_data_set_asks_for_it(recipe: recipes.Recipe, tmp_path: Path):
    with pytest.raises(RecipeError, match="say where it is"):
        train(recipe, tmp_path / "run")


def test_an_mr_volume_is_scaled_by_its_percentiles():
    images = np.linspace(0, 4000, 64, dtype=np.int16).reshape(1, 8, 8)
    hu = collection.to_hu(Case("p", "v", images, np.zeros((1, 8, 8), np.uint8), "grey"), (0, 255))
    assert (hu.min(), hu.max()) == (0, 255)


def test_every_slice_comes_once_an_epoch_and_a_step_depends_on_nothing_before_it():
    slices = Slices(np.zeros((10, 2, 2), np.int16), np.zeros((10, 2, 2), np.uint8), np.arange(10)[:, None], 2)
    drawn = np.concatenate([slices.pick(step, 5, "shuffled", seed=3) for step in (1, 2)])
    assert sorted(drawn) == list(range(10))
    assert (slices.pick(7, 5, "shuffled", seed=3) == slices.pick(7, 5, "shuffled", seed=3)).all()
    assert (slices.pick(1, 5, "shuffled", seed=4) != slices.pick(1, 5, "shuffled", seed=3)).any()


def test_a_side_that_is_not_there_is_named(recipe: recipes.Recipe, coco: Path):
    assert len(collection.side(recipe, coco, "all", recipe.classes)) == 12
    assert len(collection.side(recipe, coco, "validation", recipe.classes)) == 4
    with pytest.raises(RecipeError, match="has no test side: choose from training, validation, all"):
        collection.side(recipe, coco, "test", recipe.classes)


def test_a_bundle_of_other_classes_is_refused(recipe: recipes.Recipe, coco: Path):
    with pytest.raises(RecipeError, match="coco has the classes background, subdural; the bundle background, epidural"):
        collection.side(recipe, coco, "all", ("background", "epidural"))


def test_a_recipe_of_phantoms_reads_no_data(coco: Path):
    phantoms = recipes.load(Path(collection.__file__).parent / "recipes" / "phantom-unet.toml")
    with pytest.raises(RecipeError, match="reads no data set"):
        collection.side(phantoms, coco, "all", phantoms.classes)
