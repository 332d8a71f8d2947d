"""From data as people have it to a bundle that the runtime serves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export import bundle as bundles
from runtime.bundle import Bundle, open_bundle
from runtime.session import open_session, self_test
from runtime.types import OperatingPoint
from training import collection
from training import recipe as recipes
from training.recipe import RecipeError
from training.slices import MATRIX, Slices
from training.sources.case import Case, Entry
from training.sources.errors import LeakError
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
    recipe, graph, _ = load_checkpoint(checkpoint)
    hu = np.random.default_rng(0).integers(0, 80, (2, 1, 128, 128)).astype(np.int16)
    assert bundles.write(recipe, graph, hu, tmp_path / "bundle", point=OperatingPoint(0.5))["passed"]
    bundle = open_bundle(tmp_path / "bundle")
    assert bundle.classes == ("background", "subdural")
    self_test(open_session(bundle), bundle)


def test_pictures_become_hounsfield_units_at_their_size_and_patients_stay_on_one_side(
    recipe: recipes.Recipe, coco: Path, tmp_path: Path
):
    sides = collection.divide(collection.entries(recipe.data, recipe.classes, coco), recipe.split)
    assert {side: len({entry.patient for entry in listed}) for side, listed in sides.items()} == {
        "training": 4,
        "validation": 2,
    }
    slices = collection.collect(sides["training"], recipe, "", tmp_path / "slices", "training", lambda *_: None)
    assert slices.hu.shape == slices.labels.shape == (8, 64, 48), "as service feeds them"
    shown = slices.hu[slices.by_class[1][0]]
    assert (shown.min(), shown.max()) == (round(100 / 255 * 80), round(220 / 255 * 80))
    blood = slices.labels[slices.by_class[1][0]] == 1
    assert blood.mean() == pytest.approx(20 * 20 / (64 * 48), abs=1e-3)
    assert [len(indices) for indices in slices.by_class] == [4, 4]


def test_neighbours_are_of_the_same_case(tmp_path: Path, recipe: recipes.Recipe):
    def case(name: str, values: tuple[int, ...]) -> Entry:
        images = np.ones((len(values), 16, 16), np.int16) * np.array(values, np.int16)[:, None, None]
        return Entry(name, name, lambda: Case(name, name, images, np.zeros(images.shape, np.uint8), "HU"))

    listed = (case("a", (1, 2, 3)), case("b", (7,)))
    wider = recipe.model_copy(update={"input": recipe.input.model_copy(update={"neighbours": 1})})
    for _ in range(2):  # the second time from the arrays of the first
        slices = collection.collect(listed, wider, "", tmp_path, "training", lambda *_: None)
        assert slices.hu[slices.around][..., 0, 0].tolist() == [[1, 1, 2], [1, 2, 3], [2, 3, 3], [7, 7, 7]]
        assert slices.own.tolist() == [0, 1, 2, 3]


def test_a_recipe_of_a_data_set_asks_for_it(recipe: recipes.Recipe, tmp_path: Path):
    with pytest.raises(RecipeError, match="say where it is"):
        train(recipe, tmp_path / "run")


def grey(images: np.ndarray) -> Case:
    return Case("p", "v", images, np.zeros(images.shape, np.uint8), "grey")


def test_grey_values_become_what_the_recipe_says(recipe: recipes.Recipe):
    """A volume by its percentiles, whatever its type; a picture by fixed values, whatever it shows."""
    ramp = np.linspace(0, 4000, 64, dtype=np.int16).reshape(1, 8, 8)
    volumes = recipes.Nifti(kind="nifti", classes={"1": "subdural"}, patient="", shows_hu=(0, 255))
    for images in (ramp, (ramp // 20).astype(np.uint8)):
        hu = collection.to_hu(grey(images), volumes)
        assert (hu.min(), hu.max()) == (0, 255)
    pictures = recipe.data.model_copy(update={"grey": (0.0, 8000.0)})
    assert collection.to_hu(grey(ramp), pictures).max() == 40, "half of what counts as white"
    with pytest.raises(RecipeError, match=r"v has 16 bits: say data\.grey"):
        collection.to_hu(grey(ramp), recipe.data)
    with pytest.raises(RecipeError, match=r"v has grey values, not Hounsfield units: say data\.shows_hu"):
        collection.to_hu(grey(ramp), recipes.Dicom(kind="dicom", classes={"1": "subdural"}))


def test_slices_of_several_sizes_are_brought_to_one(recipe: recipes.Recipe, tmp_path: Path):
    def case(name: str, side: int) -> Entry:
        return Entry(name, name, lambda: grey(np.full((1, side, side), 255, np.uint8)))

    slices = collection.collect((case("a", 32), case("b", 48)), recipe, "", tmp_path, "training", lambda *_: None)
    assert slices.hu.shape == (2, MATRIX, MATRIX)
    assert (slices.hu == 80).all()


def test_slices_without_blood_are_left_out_where_the_recipe_says_so(recipe: recipes.Recipe, tmp_path: Path):
    """And what a source leaves out is counted by its reason."""
    labels = np.zeros((4, 16, 16), np.uint8)
    labels[2, 3, 3] = 1
    case = Case("p", "v", np.zeros((4, 16, 16), np.int16), labels, "HU", excluded=(("no mask", 3),))
    section = recipes.Nifti(kind="nifti", classes={"1": "subdural"}, patient="", only_with_blood=True)
    with_blood = recipe.model_copy(update={"data": section})
    slices = collection.collect((Entry("p", "v", lambda: case),), with_blood, "", tmp_path, "training", lambda *_: None)
    assert slices.own.tolist() == [2]
    assert slices.left_out == {"no mask": 3, "shows no blood": 3}


def test_a_view_of_a_volume_is_shown_once(tmp_path: Path):
    """Not once a slice: an epoch reads each voxel about twice, and validation counts each slice once."""
    volumes = recipes.load(Path(collection.__file__).parent / "recipes" / "unet-3d.toml")
    case = Case("p", "v", np.zeros((40, 16, 16), np.int16), np.zeros((40, 16, 16), np.uint8), "HU")
    slices = collection.collect((Entry("p", "v", lambda: case),), volumes, "", tmp_path, "training", lambda *_: None)
    assert slices.around.shape == (3, 32)


def test_every_slice_comes_once_an_epoch_and_a_step_depends_on_nothing_before_it():
    slices = Slices(np.zeros((10, 2, 2), np.int16), np.zeros((10, 2, 2), np.uint8), np.arange(10)[:, None], 2)
    drawn = np.concatenate([slices.pick(step, 5, "shuffled", seed=3) for step in (1, 2)])
    assert sorted(drawn) == list(range(10))
    assert (slices.pick(7, 5, "shuffled", seed=3) == slices.pick(7, 5, "shuffled", seed=3)).all()
    assert (slices.pick(1, 5, "shuffled", seed=4) != slices.pick(1, 5, "shuffled", seed=3)).any()


@pytest.fixture
def bundle(recipe: recipes.Recipe, coco: Path) -> Bundle:
    """One that says it was trained by the recipe on these patients."""
    divided = collection.divide(collection.entries(recipe.data, recipe.classes, coco), recipe.split)
    return replace(open_bundle(), classes=recipe.classes, learnt_from=collection.fingerprint(divided))


def test_a_side_that_is_not_there_is_named(recipe: recipes.Recipe, coco: Path, bundle: Bundle):
    assert len(collection.side(recipe, coco, "all", bundle)) == 12
    assert len(collection.side(recipe, coco, "validation", bundle)) == 4
    with pytest.raises(RecipeError, match="has no test side: choose from training, validation, all"):
        collection.side(recipe, coco, "test", bundle)


def test_patients_that_were_learnt_from_are_not_evaluated_as_others(recipe: recipes.Recipe, coco: Path, bundle: Bundle):
    """Another seed, or one patient more, deals them anew."""
    dealt_anew = recipe.model_copy(update={"split": recipe.split.model_copy(update={"seed": 5})})
    with pytest.raises(LeakError, match="not trained on this division of these patients"):
        collection.side(dealt_anew, coco, "validation", bundle)
    assert len(collection.side(dealt_anew, coco, "training", bundle)) == 8


def test_a_run_does_not_go_on_with_other_patients(recipe: recipes.Recipe, coco: Path, tmp_path: Path):
    train(recipe, tmp_path / "run", coco)
    truth = json.loads(coco.read_text())
    Image.fromarray(np.full((64, 48), 100, np.uint8)).save(coco.parent / "p9_0.png")
    truth["images"].append({"id": 99, "file_name": "p9_0.png", "height": 64, "width": 48})
    coco.write_text(json.dumps(truth))
    with pytest.raises(RecipeError, match="holds a run that divided other patients"):
        train(recipe, tmp_path / "run", coco)


def test_a_mask_that_was_corrected_is_learnt_anew(recipe: recipes.Recipe, coco: Path, tmp_path: Path):
    def learnt() -> int:
        listed = collection.entries(recipe.data, recipe.classes, coco)
        files = collection.state(coco, besides=tmp_path / "run")
        folder = tmp_path / "run" / "slices"
        return int((collection.collect(listed, recipe, files, folder, "training", lambda *_: None).labels > 0).sum())

    before = learnt()
    (tmp_path / "run" / "last.pt").write_bytes(b"the run's own files are not the data set's")
    assert learnt() == before
    made = len(list((tmp_path / "run" / "slices").glob("training-hu-*")))
    truth = json.loads(coco.read_text())
    truth["annotations"][0]["segmentation"] = [[8, 10, 18, 10, 18, 30, 8, 30]]
    coco.write_text(json.dumps(truth))
    assert (learnt(), made) == (before - 200, 1)


def test_a_bundle_of_other_classes_is_refused(recipe: recipes.Recipe, coco: Path, bundle: Bundle):
    with pytest.raises(RecipeError, match="coco has the classes background, subdural; the bundle background, epidural"):
        collection.side(recipe, coco, "all", replace(bundle, classes=("background", "epidural")))


def test_a_recipe_of_phantoms_reads_no_data(coco: Path, bundle: Bundle):
    phantoms = recipes.load(Path(collection.__file__).parent / "recipes" / "phantom-unet.toml")
    with pytest.raises(RecipeError, match="reads no data set"):
        collection.side(phantoms, coco, "all", replace(bundle, classes=phantoms.classes))
