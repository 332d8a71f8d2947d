"""The training loop from a recipe to a bundle, on a recipe small enough for a test."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from export import bundle as bundles
from export.errors import ExportError
from models import catalogue
from runtime import seal
from runtime.bundle import open_bundle
from runtime.errors import BundleError
from runtime.session import open_session, self_test
from runtime.types import OperatingPoint
from training import optimisers
from training import recipe as recipes
from training.lesions import CLASSES
from training.losses import loss, soft_targets
from training.recipe import RecipeError
from training.slices import Slices
from training.train import LAST, build, dice_by_class, load_checkpoint, train

SHIPPED_RECIPE = Path(__file__).parents[2] / "training" / "recipes" / "phantom-unet.toml"
SMALL = """
name = "small"
version = "0"
training_data = "two phantoms"
[network]
architecture = "res_unet"
channels = [4, 8]
[input]
windows_hu = [[0, 90], [-200, 1000]]
neighbours = 1
grid = 64
[data]
kind = "phantoms"
heads = 2
validation_heads = 1
slices_per_head = 8
bleed_free = 0
seed = 1
[training]
coarse_steps = 3
crop = [64, 32]
steps = 6
batch = 2
learning_rate = 0.01
weight_decay = 0
precision = "float32"
optimiser = "adamw"
schedule = "one_cycle"
sampling = "by_class"
validate_every = 3
seed = 1
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> recipes.Recipe:
    path = tmp_path_factory.mktemp("recipe") / "small.toml"
    path.write_text(SMALL)
    return recipes.load(path)


@pytest.fixture(scope="module")
def checkpoint(recipe: recipes.Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(recipe, tmp_path_factory.mktemp("run"))


def test_a_run_leaves_a_checkpoint_and_curves(checkpoint: Path):
    lines = (checkpoint.parent / "curves.csv").read_text().splitlines()
    assert lines[0].startswith("step,loss,learning_rate,dice_intracerebral")
    assert [line.partition(",")[0] for line in lines[1:]] == ["3", "6"]
    assert (checkpoint.parent / "curves.png").read_bytes().startswith(b"\x89PNG")
    words = (checkpoint.parent / "MODEL_CARD.md").read_text()
    assert words.startswith("# small 0: a training run")
    assert all(word in words for word in ("not a medical device", "two phantoms", "res_unet", "6 of 6", "subdural"))


def test_the_same_seed_trains_the_same_network(recipe: recipes.Recipe, checkpoint: Path):
    """Into the same folder, so the phantoms made before are used again."""
    before = load_checkpoint(checkpoint)[1].state_dict()
    (checkpoint.parent / LAST).unlink()
    again = load_checkpoint(train(recipe, checkpoint.parent))[1].state_dict()
    assert all(torch.equal(before[name], again[name]) for name in before)


@pytest.mark.parametrize("optimiser", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_a_run_that_is_killed_goes_on_to_the_same_weights(optimiser: str, checkpoint: Path, tmp_path: Path):
    recipe = tmp_path / "longer.toml"
    longer = SMALL.replace("steps = 6\n", "steps = 60\n").replace("validate_every = 3", "validate_every = 8")
    recipe.write_text(longer.replace('"adamw"', f'"{optimiser}"'))
    for name in ("killed", "unbroken"):
        shutil.copytree(checkpoint.parent / "slices", tmp_path / name / "slices")
    command = [sys.executable, "-P", "-m", "scanside", "train", str(recipe), "--out", str(tmp_path / "killed")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while not (tmp_path / "killed" / LAST).exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    kept = torch.load(tmp_path / "killed" / LAST, weights_only=True)
    assert kept["step"] < 60, "it was over before it was killed"
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    command[-1] = str(tmp_path / "unbroken")
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    states = [torch.load(tmp_path / name / LAST, weights_only=True) for name in ("killed", "unbroken")]
    assert [state["step"] for state in states] == [60, 60]
    assert all(torch.equal(states[0]["weights"][name], weight) for name, weight in states[1]["weights"].items())
    losses = [[row["loss"] for row in state["rows"]] for state in states]
    assert losses[0] == losses[1]


def test_another_recipe_does_not_go_on_with_a_run(recipe: recipes.Recipe, checkpoint: Path):
    with pytest.raises(RecipeError, match="holds a run of another recipe"):
        train(recipe.model_copy(update={"version": "1"}), checkpoint.parent)


@pytest.mark.parametrize("path", sorted(SHIPPED_RECIPE.parent.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_that_ships_builds_its_network(path: Path):
    recipe = recipes.load(path)
    with torch.device("meta"):
        network = catalogue.build(recipe.network.architecture, **recipe.settings)
    channels = 1 if recipe.input.depth else recipe.input.view.shown
    assert network.config.in_channels == channels * len(recipe.input.windows_hu)


def test_a_checkpoint_becomes_a_bundle_that_the_runtime_serves(checkpoint: Path, tmp_path: Path):
    recipe, graph, _ = load_checkpoint(checkpoint)
    hu = np.random.default_rng(0).integers(-1000, 1500, (2, 3, 128, 128)).astype(np.int16)
    parity = bundles.write(recipe, graph, hu, tmp_path / "bundle", point=OperatingPoint(0.5))
    assert parity["passed"]
    bundle = open_bundle(tmp_path / "bundle")
    assert bundle.training_data == "two phantoms"
    self_test(open_session(bundle), bundle)
    seal.add(tmp_path / "bundle", {"scores.json": "{}"})
    assert open_bundle(tmp_path / "bundle").digest == bundle.digest, "scores do not change what it computes"
    with pytest.raises(ExportError, match="holds something, a bundle perhaps"):
        bundles.write(recipe, graph, hu, tmp_path / "bundle", point=OperatingPoint(0.5))


def test_a_graph_that_is_not_the_network_leaves_no_bundle(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe, graph, _ = load_checkpoint(checkpoint)
    other = build(recipe).eval()
    real = bundles.to_onnx
    monkeypatch.setattr(bundles, "to_onnx", lambda _: real(other))
    hu = np.random.default_rng(0).integers(-100, 200, (2, 3, 128, 128)).astype(np.int16)
    with pytest.raises(ExportError, match="the traced graph answers otherwise than PyTorch"):
        bundles.write(recipe, graph, hu, tmp_path / "bundle", point=OperatingPoint(0.5))
    with pytest.raises(BundleError, match="is no bundle"):
        open_bundle(tmp_path / "bundle")


def test_the_graph_takes_hounsfield_units_of_any_type_and_windows_them(recipe: recipes.Recipe):
    graph = build(recipe)
    own = torch.tensor([[-300, 0], [45, 4000]]).repeat(32, 32)  # 64 x 64: the grid's size, so resizing is identity
    hu = torch.stack([own - 5000, own, own + 5000])[None]
    x = graph.prepare(hu)
    assert x.shape == (1, 6, 64, 64)  # two windows of each of three slices
    assert (x[0, :2] == 0).all()
    assert (x[0, 4:] == 1).all()
    assert x[0, 2, :2, :2].tolist() == [[0.0, 0.0], [0.5, 1.0]]
    assert x[0, 3, 0, 0] == 0
    assert torch.equal(x, graph.prepare(hu.to(torch.int16)))


def test_soft_targets_hold_shares():
    labels = torch.zeros(1, 4, 4, dtype=torch.uint8)
    labels[0, 0, 0] = 2
    target = soft_targets(labels, 3, 2)
    assert target[0, :, 0, 0].tolist() == [0.75, 0.0, 0.25]
    assert torch.equal(target.sum(dim=1), torch.ones(1, 2, 2))


def test_the_loss_is_small_for_the_truth_and_large_for_its_opposite():
    target = soft_targets(torch.randint(0, 3, (2, 8, 8), generator=torch.Generator().manual_seed(0)), 3, 8)
    right = loss(target * 20, target, ("cross_entropy", "dice"))
    assert right < 0.05
    assert loss(-target * 20, target, ("cross_entropy", "dice")) > 2


def test_the_shipped_recipe_is_a_recipe():
    assert "never seen a human" in recipes.load(SHIPPED_RECIPE).training_data


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            SMALL.replace("grid = 64", "grid = 36").replace("[64, 32]", "[32, 32]"),
            "input.grid 36 is no multiple of 8, .* at half the grid",
        ),
        (SMALL.replace("crop = [64, 32]", "crop = [64, 34]"), "training.crop 34 is no multiple of 4"),
        (
            SMALL.replace("crop = [64, 32]", "crop = [96, 32]"),
            "training.crop 96 is no multiple of 4 up to input.grid 64",
        ),
        (SMALL.replace("coarse_steps = 3", "coarse_steps = 6"), "coarse_steps must be fewer than the 6 steps"),
        (SMALL.replace("[4, 8]", "[4, 8]\nin_channels = 3"), "network.in_channels is 3; windows and neighbours make 6"),
        (SMALL.replace("[4, 8]", "[4, 8]\nclasses = 2"), "network.classes is 2; the recipe has 7"),
        (SMALL.replace("[4, 8]", "[4, 8]\nwidth = 3"), "(?s)network: .*width"),
        (SMALL.replace('"res_unet"', '"ema_attention_unet"'), "network: ema_attention_unet does not take these"),
        (SMALL.replace("[0, 90]", "[90, 90]"), "(?s)windows_hu.*the first must be less than the second"),
        (SMALL.replace("seed = 1", "seed = -1"), "(?s)training.seed.*greater than or equal to 0"),
        ('classes = ["background", "subdural"]' + SMALL, "classes: phantoms have background, intracerebral"),
        (SMALL.replace("batch", "bach"), "(?s)training.batch.*training.bach: unknown key"),
        (
            SMALL.replace('"res_unet"', '"resunet"'),
            r"\n  no architecture 'resunet': choose from res_unet, vanilla_unet",
        ),
        (SMALL + "[split]\nfractions = [0.7, 0.1]\n", "split: fractions make 0.8, not 1"),
        ("[[[", "no valid TOML"),
    ],
)
def test_a_wrong_recipe_is_refused_with_every_error(tmp_path: Path, text: str, message: str):
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        recipes.load(tmp_path / "r.toml")


@pytest.mark.parametrize("content", [b"nonsense", b""])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(RecipeError, match=r"x\.pt is no checkpoint of `scanside train`: give the best\.pt of a run$"):
        load_checkpoint(tmp_path / "x.pt")
    with pytest.raises(RecipeError, match=r"y\.pt: No such file or directory$"):
        load_checkpoint(tmp_path / "y.pt")


def test_the_losses_are_monais():
    """Dice over the foreground of a batch and cross-entropy with shares as targets, for slices and volumes alike."""
    losses = pytest.importorskip("monai.losses", reason="compared with MONAI's: pip install monai")
    generator = torch.Generator().manual_seed(3)
    for shape in ((4, 3, 16, 12), (2, 3, 5, 8, 8)):
        logits = torch.randn(shape, generator=generator)
        target = torch.rand(shape, generator=generator)
        target /= target.sum(dim=1, keepdim=True)
        theirs = losses.DiceLoss(include_background=False, softmax=True, batch=True, smooth_nr=1, smooth_dr=1)
        torch.testing.assert_close(loss(logits, target, ("dice",)), theirs(logits, target))
        torch.testing.assert_close(
            loss(logits, target, ("cross_entropy",)), torch.nn.functional.cross_entropy(logits, target)
        )


def launch(recipe: str, checkpoint: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Train in two processes by PyTorch's own launcher."""
    (folder / "small.toml").write_text(recipe)
    shutil.copytree(checkpoint.parent / "slices", folder / "run" / "slices")
    launcher = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "scanside", "train", str(folder / "small.toml"), "--out", str(folder / "run")]
    return subprocess.run([*launcher, *command], capture_output=True, text=True, timeout=300, check=False)


def test_several_processes_learn_together(checkpoint: Path, tmp_path: Path):
    """Each takes its share of every batch, the first one scores, cuts the rate for all, and writes."""
    plateau = SMALL.replace("one_cycle", "plateau").replace("validate_every = 3", "validate_every = 1\npatience = 1")
    done = launch(plateau, checkpoint, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in (tmp_path / "run" / "MODEL_CARD.md").read_text()
    state = torch.load(tmp_path / "run" / LAST, weights_only=True)
    assert state["step"] == 6
    alone = torch.load(checkpoint.parent / LAST, weights_only=True)
    assert any(not torch.equal(alone["weights"][name], weight) for name, weight in state["weights"].items())
    assert len(state["rows"]) == 6


def test_a_batch_that_processes_cannot_share_is_refused(checkpoint: Path, tmp_path: Path):
    done = launch(SMALL.replace("batch = 2", "batch = 3"), checkpoint, tmp_path)
    assert done.returncode != 0
    assert "training.batch 3 can't be shared evenly by 2 processes" in done.stderr


def test_how_a_slice_is_turned_says_nothing_of_how_it_was_drawn(
    recipe: recipes.Recipe, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two streams: one generator for both would turn slices that were drawn by class one way, the others the other."""
    drawn = []

    def stop(*arguments: np.random.Generator) -> None:
        drawn.append(arguments[-1].random())
        raise KeyboardInterrupt

    monkeypatch.setattr("training.train.augment", stop)
    shutil.rmtree(checkpoint.parent / "again", ignore_errors=True)
    (checkpoint.parent / "again").mkdir()
    (checkpoint.parent / "again" / "slices").symlink_to(checkpoint.parent / "slices")
    with pytest.raises(KeyboardInterrupt):
        train(recipe, checkpoint.parent / "again")
    assert drawn[0] != np.random.default_rng((recipe.training.seed, 1)).random()


def test_a_class_that_validation_lacks_does_not_choose_the_weights(recipe: recipes.Recipe):
    """Its Dice is unknown, whatever the network says."""
    hu = np.zeros((2, 64, 64), np.int16)
    labels = np.zeros((2, 64, 64), np.uint8)
    labels[0, 10:40, 10:40] = 2
    graph = build(recipe.model_copy(update={"input": recipe.input.model_copy(update={"neighbours": 0})}))
    scores = dice_by_class(graph, Slices(hu, labels, np.arange(2)[:, None], len(CLASSES)))
    assert [np.isnan(score) for score in scores] == [True, False, True, True, True, True]
    nothing = Slices(hu, np.zeros_like(labels), np.arange(2)[:, None], len(CLASSES))
    assert np.isnan(dice_by_class(graph, nothing)).all()


def test_a_rate_is_cut_after_as_many_validations_as_the_recipe_says():
    settings = recipes.load(SHIPPED_RECIPE.parent / "att-focus-net.toml").training
    weights = [torch.nn.Parameter(torch.zeros(2, 2))]
    learner = optimisers.optimiser(settings, weights)
    plan = optimisers.schedule(settings, learner, steps=10)
    rates = []
    for dice in (0.5, 0.4, 0.4, 0.4, 0.4):
        plan.step(dice)
        rates.append(learner.param_groups[0]["lr"] / settings.learning_rate)
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01]), "two epochs, as Peng et al. say"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_learns_on_a_gpu_and_the_processor_reads_what_it_learnt(
    recipe: recipes.Recipe, tmp_path: Path, precision: str
):
    if not torch.cuda.is_available():
        pytest.skip("NOT tried: torch has no CUDA here")
    settings = recipe.training.model_copy(update={"precision": precision})
    found = load_checkpoint(train(recipe.model_copy(update={"training": settings}), tmp_path))
    assert "1 x cuda" in (tmp_path / "MODEL_CARD.md").read_text()
    weights = list(found.graph.parameters())
    assert {one.device.type for one in weights} == {"cpu"}
    assert all(torch.isfinite(one).all() for one in weights)


@pytest.mark.gpu
def test_two_gpus_learn_together(checkpoint: Path, tmp_path: Path):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"NOT tried: {torch.cuda.device_count()} GPUs")
    done = launch(SMALL, checkpoint, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 x cuda" in (tmp_path / "run" / "MODEL_CARD.md").read_text()
