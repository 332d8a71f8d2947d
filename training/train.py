"""The training loop: a recipe and data in; a checkpoint, curves and a log of every validation out.

What a step learns from depends on the seed and the step alone, and after every validation and every minute the whole
state is on disk: a run that is killed goes on where it was, to the same weights.

Several GPUs: ``torchrun --nproc-per-node 4 -m scanside train ...``; each process takes its share of every batch.
"""

from __future__ import annotations

import csv
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pickle import UnpicklingError  # torch.load raises it; weights_only: nothing is unpickled but tensors
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import distributed
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from models import catalogue
from models.graph import HeadCT
from training import card, collection, heads
from training.augmentation import augment
from training.figures import draw_training
from training.losses import loss, soft_targets
from training.metrics import count_classes, dice, total
from training.optimisers import optimiser, schedule
from training.recipe import Phantoms, Recipe, RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor

    from training.slices import Slices
    from training.sources.case import Entry

T = TypeVar("T")
SAVE_EVERY_S = 60
BEST, LAST = "best.pt", "last.pt"
COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)


def build(recipe: Recipe) -> HeadCT:
    """The recipe's network between its pre- and post-processing."""
    network = catalogue.build(recipe.network.architecture, **recipe.settings)
    view = recipe.input.view
    return HeadCT(network, recipe.input.windows_hu, recipe.input.grid, view.shown, view.answered)


def train(recipe: Recipe, run: Path, data: Path | None = None) -> Path:
    """Train, or go on with a run that was interrupted, and keep the best by validation.

    Writes ``best.pt`` and ``last.pt`` (weights, recipe, state), ``curves.csv``, ``curves.png`` and ``MODEL_CARD.md``
    into `run`.

    Parameters
    ----------
    data : the source's folder or file; None for phantoms

    Returns
    -------
    path of the best checkpoint

    """
    with _group(recipe) as rank, Progress(*COLUMNS, console=Console(stderr=True), disable=rank > 0) as progress:
        run.mkdir(parents=True, exist_ok=True)
        divided = _of_first(lambda: _divided(recipe, data))
        if rank > 0:
            _together()  # the first process reads the data; the others find it made
        slices = _slices(recipe, run, data, divided, progress)
        if rank == 0:
            _together()
        if not any(slices["validation"].labels[shown].any() for shown in slices["validation"].around):
            raise RecipeError("no slice of the validation side shows any class: nothing would choose the best weights")
        learnt_from = collection.fingerprint(divided) if divided else None
        loop = _Loop(recipe, run, slices["training"], slices["validation"], learnt_from)
        loop.resume()
        loop.run(progress)
        return run / BEST


class _Loop:
    """One run: what learns, how far it has come, and how it is kept."""

    def __init__(
        self, recipe: Recipe, run: Path, training: Slices, validation: Slices, learnt_from: str | None
    ) -> None:
        self.recipe, self.folder, self.training, self.validation = recipe, run, training, validation
        self.learnt_from = learnt_from
        settings = recipe.training
        per_epoch = -(-len(training) // settings.batch)
        self.steps = settings.steps or per_epoch * (settings.epochs or 0)
        self.validate_every = settings.validate_every or per_epoch
        self.rank, self.world = (distributed.get_rank(), distributed.get_world_size()) if _is_shared() else (0, 1)
        self.device = torch.device(
            f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}" if torch.cuda.is_available() else "cpu"
        )
        torch.manual_seed(settings.seed)
        self.layout = torch.contiguous_format if recipe.input.depth else torch.channels_last
        self.graph = build(recipe).to(self.device, memory_format=self.layout)
        self.network = DistributedDataParallel(self.graph.network) if self.world > 1 else self.graph.network
        self.optimiser = optimiser(settings, self.graph.parameters())
        self.schedule = schedule(settings, self.optimiser, self.steps)
        self.step, self.best, self.running = 0, -1.0, 0.0
        self.rows: list[dict[str, float]] = []

    def resume(self) -> None:
        """Take up an interrupted run of the same recipe.

        Raises
        ------
        RecipeError : the folder holds a run of another recipe, or of other patients

        """
        path = self.folder / LAST
        if not path.exists():
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["recipe"] != self.recipe.model_dump(mode="json"):
            raise RecipeError(f"{self.folder} holds a run of another recipe: choose another folder with --out")
        if state["learnt_from"] != self.learnt_from:
            raise RecipeError(
                f"{self.folder} holds a run that divided other patients: choose another folder with --out, or take "
                "back what was added to or removed from the data"
            )
        self.graph.load_state_dict(state["weights"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.schedule:
            self.schedule.load_state_dict(state["schedule"])
        self.step, self.best, self.running = state["step"], state["best"], state["loss"]
        self.rows = state["rows"]

    def run(self, progress: Progress) -> None:
        bar = progress.add_task("steps", total=self.steps, completed=self.step)
        saved = time.monotonic()
        for hu, target in self._batches():
            self.step += 1
            self._learn(hu, target)
            due = self.step % self.validate_every == 0 or self.step == self.steps
            if due:
                self._validate()
            if due or time.monotonic() - saved > SAVE_EVERY_S:
                self._save(LAST)
                saved = time.monotonic()
            words = f"steps (loss {self.running:.3f}, best Dice {max(self.best, 0):.3f})"
            progress.update(bar, completed=self.step, description=words)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches to the end, the next one made on a thread of its own while the last is learnt from."""
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            coming = pool.submit(self._batch, self.step + 1)
            for step in range(self.step + 1, self.steps + 1):
                batch = coming.result()
                if step < self.steps:
                    coming = pool.submit(self._batch, step + 1)
                yield batch

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """HU ``(N, K, H, W)`` and soft targets ``(N, classes, [K,] G, G)`` of one step: this process's share."""
        settings = self.recipe.training
        picked = self.training.pick(step, settings.batch, settings.sampling, settings.seed)[self.rank :: self.world]
        rng = np.random.default_rng((settings.seed, step, self.rank + 1))  # 0 would be that of `pick`
        shown = self.training.around[picked]
        learnt = shown if self.graph.volumetric else self.training.own[picked]
        hu, labels = augment(self.training.hu[shown], self.training.labels[learnt], self.recipe.augmentation, rng)
        return hu, soft_targets(labels, len(self.recipe.classes), self.recipe.input.grid)

    def _learn(self, hu: Tensor, target: Tensor) -> None:
        settings = self.recipe.training
        torch.manual_seed(settings.seed + self.step)  # of what a network draws itself, such as dropout
        x, target = self.graph.prepare(hu.to(self.device)), target.to(self.device)
        if self.step <= settings.coarse_steps:  # classes and places are learnt at a quarter of the pixels
            x, target = functional.avg_pool2d(x, 2), functional.avg_pool2d(target, 2)
        elif settings.crop:  # the edges then, without the air around the head
            x, target = _middle(x, settings.crop), _middle(target, settings.crop)
        self.graph.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
            outputs = self.network(x.contiguous(memory_format=self.layout))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)  # PraNet's side outputs learn too
        cost = torch.stack([loss(self.graph.complete(one.float()), target, settings.loss) for one in outputs]).mean()
        self.graph.zero_grad(set_to_none=True)
        cost.backward()
        if settings.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.graph.parameters(), settings.clip_norm)
        self.optimiser.step()
        if isinstance(self.schedule, torch.optim.lr_scheduler.OneCycleLR):
            self.schedule.step()
        self.running += (cost.item() - self.running) / min(self.step, 50)

    def _validate(self) -> None:
        """Score, keep the best, draw the curves: the first process does, for batch norm's statistics are its own."""
        names = self.recipe.classes[1:]
        scores = _of_first(lambda: dice_by_class(self.graph, self.validation))
        mean = float(np.nanmean(scores))
        loss_ = _of_first(lambda: self.running)
        if isinstance(self.schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.schedule.step(mean if self.recipe.training.watch == "dice" else loss_)
        rate = self.optimiser.param_groups[0]["lr"]
        named = {f"dice_{name}": score for name, score in zip(names, scores, strict=True)}
        self.rows.append({"step": self.step, "loss": loss_, "learning_rate": rate, **named})
        if self.rank == 0:
            write_curves(self.rows, names, self.folder)
            (self.folder / "MODEL_CARD.md").write_text(card.of_run(self.recipe, self.rows, self._facts()))
        if mean > self.best:
            self.best = mean
            self._save(BEST)

    def _facts(self) -> dict[str, str]:
        sides = (self.training.left_out, self.validation.left_out)
        left_out = {reason: sum(side.get(reason, 0) for side in sides) for reason in {**sides[0], **sides[1]}}
        return {
            "parameters": f"{catalogue.parameters(self.graph):,}",
            "slices": f"{len(self.training):,} to learn from, {len(self.validation):,} to validate on",
            "left out": ", ".join(f"{count:,} slices: {reason}" for reason, count in left_out.items()) or "nothing",
            "steps": f"{self.step:,} of {self.steps:,}",
            "machine": f"{self.world} x {self.device.type}, PyTorch {torch.__version__}",
        }

    def _save(self, name: str) -> None:
        if self.rank:
            return
        state = {
            "recipe": self.recipe.model_dump(mode="json"),
            "learnt_from": self.learnt_from,
            "weights": self.graph.state_dict(),
            "step": self.step,
            "best": self.best,
        }
        if name == LAST:
            state |= {
                "optimiser": self.optimiser.state_dict(),
                "schedule": self.schedule.state_dict() if self.schedule else None,
                "loss": self.running,
                "rows": self.rows,
            }
        partial = self.folder / f"{name}.partial"
        torch.save(state, partial)
        partial.replace(self.folder / name)  # at once: a run that is killed here has the one before


def _middle(images: Tensor, sides: tuple[int, int]) -> Tensor:
    """The middle of ``(..., H, W)``, of the given height and width."""
    top, left = ((whole - side) // 2 for whole, side in zip(images.shape[-2:], sides, strict=True))
    return images[..., top : top + sides[0], left : left + sides[1]]


def _is_shared() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _together() -> None:
    if _is_shared():
        distributed.barrier()


def _of_first(make: Callable[[], T]) -> T:
    """What the first process makes, in every process."""
    if not _is_shared():
        return make()
    made = [make() if distributed.get_rank() == 0 else None]
    distributed.broadcast_object_list(made)
    return made[0]  # type: ignore[return-value]


@contextmanager
def _group(recipe: Recipe) -> Iterator[int]:
    """Join the processes that torchrun started; alone, be the first of one. Gives this process's rank."""
    if "RANK" not in os.environ:
        yield 0
        return
    if recipe.training.batch % (world := int(os.environ["WORLD_SIZE"])):
        raise RecipeError(f"training.batch {recipe.training.batch} can't be shared evenly by {world} processes")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # one process reads the data and scores while the others wait
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(days=1))
    try:
        yield distributed.get_rank()
    finally:
        distributed.destroy_process_group()


def _divided(recipe: Recipe, data: Path | None) -> dict[str, tuple[Entry, ...]] | None:
    """Cases by side; None of phantoms, which come from two seeds."""
    if isinstance(recipe.data, Phantoms) or recipe.split is None:
        return None
    if data is None:
        raise RecipeError(f"{recipe.name} learns from {recipe.data.kind} data: say where it is, after the recipe")
    return collection.divide(collection.entries(recipe.data, recipe.classes, data), recipe.split)


def _slices(
    recipe: Recipe,
    run: Path,
    data: Path | None,
    divided: dict[str, tuple[Entry, ...]] | None,
    progress: Progress,
) -> dict[str, Slices]:
    """Training and validation slices, made now or by an earlier run."""

    def bar(what: str) -> Callable[[int, int], None]:
        task = progress.add_task(what, total=None, visible=False)
        return lambda done, total: progress.update(task, completed=done, total=total, visible=done < total)

    folder, sides = run / "slices", ("training", "validation")
    if isinstance(recipe.data, Phantoms):
        shown = recipe.input.view.shown
        return {
            side: heads.collect(
                recipe.data, shown, folder, validation=side == "validation", on_head=bar(f"{side} phantoms")
            )
            for side in sides
        }
    files = collection.state(data, besides=run)
    return {
        side: collection.collect(divided[side], recipe, files, folder, side, bar(f"{side} cases")) for side in sides
    }


@torch.no_grad()
def dice_by_class(graph: HeadCT, validation: Slices, batch: int = 4) -> list[float]:
    """Dice of each foreground class over all pixels of the slices that the views answer; NaN where none shows it."""
    graph.eval()
    device = next(graph.parameters()).device
    counted = []
    first = (graph.shown - graph.answered) // 2
    for start in range(0, len(validation), batch):
        shown = validation.around[start : start + batch]
        answered = shown[:, first : first + graph.answered]
        once = np.diff(answered, axis=1, prepend=-1).ravel() > 0  # beyond the end of a stack its last slice is repeated
        predicted = graph(torch.from_numpy(validation.hu[shown]).to(device))[0].cpu().numpy()
        counted.append(count_classes(predicted[once], validation.labels[answered.ravel()[once]], validation.classes))
    counts = total(counted)
    return np.where(counts.true_positive + counts.false_negative > 0, dice(counts), np.nan).tolist()[1:]


def write_curves(rows: list[dict[str, float]], names: tuple[str, ...], folder: Path) -> None:
    """``curves.csv`` and ``curves.png``: loss, learning rate and Dice of each class by step."""
    with (folder / "curves.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    steps = [row["step"] for row in rows]
    dice_ = {name: [row[f"dice_{name}"] for row in rows] for name in names}
    draw_training(steps, [row["loss"] for row in rows], dice_, title="").savefig(folder / "curves.png", dpi=120)


class Checkpoint(NamedTuple):
    """A recipe, its network in evaluation mode, and the fingerprint of the patients that it learnt from."""

    recipe: Recipe
    graph: HeadCT
    learnt_from: str | None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint. Weights only: nothing in the file is executed.

    Raises
    ------
    RecipeError : the file is no checkpoint of ours

    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        recipe = Recipe.model_validate(state["recipe"])
        weights, learnt_from = state["weights"], state["learnt_from"]
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from None
    except (KeyError, RuntimeError, ValueError, TypeError, EOFError, UnpicklingError):  # torch's advice misleads here
        raise RecipeError(f"{path} is no checkpoint of `scanside train`: give the best.pt of a run") from None
    graph = build(recipe)
    graph.load_state_dict(weights)
    return Checkpoint(recipe, graph.eval(), learnt_from)
