"""The training loop: a recipe in, a checkpoint, curves and a log of every validation out."""

from __future__ import annotations

import csv
from concurrent.futures import ThreadPoolExecutor
from pickle import UnpicklingError  # torch.load raises it; weights_only: nothing is unpickled but tensors
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from models.graph import HeadCT
from models.res_unet import ResUNet, ResUNetConfig
from training.data import Slices, phantoms
from training.lesions import CLASSES
from training.losses import cross_entropy_and_dice, soft_targets

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from training.recipe import Recipe


def build(recipe: Recipe) -> HeadCT:
    """The recipe's network between its pre- and post-processing."""
    config = ResUNetConfig(len(recipe.input.windows_hu), len(CLASSES), recipe.network.channels)
    return HeadCT(ResUNet(config), recipe.input.windows_hu, recipe.input.grid, len(CLASSES))


def train(recipe: Recipe, run: Path) -> Path:
    """Train from scratch and keep the best by validation.

    Writes ``best.pt`` (weights and recipe), ``curves.csv`` and ``curves.png`` into `run`.

    Returns
    -------
    path of the best checkpoint

    """
    run.mkdir(parents=True, exist_ok=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        data = {}
        for kind in ("training", "validation"):
            bar = progress.add_task(f"{kind} phantoms", total=None)
            data[kind] = phantoms(
                recipe.phantoms,
                run / "phantoms",
                validation=kind == "validation",
                on_head=lambda done, total, bar=bar: progress.update(bar, completed=done, total=total),
            )
            progress.update(bar, visible=False)
        return _optimise(recipe, run, data["training"], data["validation"], progress)


def _optimise(recipe: Recipe, run: Path, training: Slices, validation: Slices, progress: Progress) -> Path:
    settings = recipe.training
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    graph = build(recipe).to(device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(graph.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, settings.learning_rate, total_steps=settings.steps, pct_start=0.2
    )
    best, best_path, rows, running = -1.0, run / "best.pt", [], 0.0
    bar = progress.add_task("steps", total=settings.steps)
    batches = _ahead(training, settings.batch, recipe.input.grid, rng)
    for step in range(1, settings.steps + 1):
        hu, target = next(batches)
        x, target = graph.prepare(hu.to(device)), target.to(device)
        if step <= settings.coarse_steps:  # the classes and their places are learnt at a quarter of the pixels
            x, target = torch.nn.functional.avg_pool2d(x, 2), torch.nn.functional.avg_pool2d(target, 2)
        else:  # the edges then, without the air around the head
            x, target = _middle(x, settings.crop), _middle(target, settings.crop)
        graph.train()
        with torch.autocast(device, torch.bfloat16, enabled=settings.bfloat16):
            logits = graph.network(x.contiguous(memory_format=torch.channels_last))
        loss = cross_entropy_and_dice(logits.float(), target)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(graph.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        running += (loss.item() - running) / min(step, 50)
        progress.update(bar, completed=step, description=f"steps (loss {running:.3f}, best Dice {max(best, 0):.3f})")
        if step % settings.validate_every == 0 or step == settings.steps:
            dice = dice_by_class(graph, validation)
            rows.append(
                {
                    "step": step,
                    "loss": running,
                    **{f"dice_{name}": d for name, d in zip(CLASSES[1:], dice, strict=True)},
                }
            )
            _write_curves(rows, run)
            if not np.nanmean(dice) <= best:
                best = float(np.nanmean(dice))
                state = {
                    "recipe": recipe.model_dump(mode="json"),
                    "weights": graph.state_dict(),
                    "step": step,
                    "validation_dice": best,
                }
                torch.save(state, best_path)
    return best_path


def _middle(images: Tensor, sides: tuple[int, int]) -> Tensor:
    """The middle of ``(N, C, H, W)``, of the given height and width."""
    top, left = ((whole - side) // 2 for whole, side in zip(images.shape[2:], sides, strict=True))
    return images[:, :, top : top + sides[0], left : left + sides[1]]


def _ahead(slices: Slices, count: int, grid: int, rng: np.random.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end, the next one made on a thread of its own while the last is learnt from."""
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        coming = pool.submit(_augmented, slices, count, grid, rng)
        while True:
            batch = coming.result()
            coming = pool.submit(_augmented, slices, count, grid, rng)
            yield batch


def _augmented(slices: Slices, count: int, grid: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A batch with what a scanner and a head can differ in: side, place, size, turn, calibration.

    Returns
    -------
    HU ``(N, H, W)`` float32 and soft targets ``(N, classes, G, G)``

    """
    hu, labels = slices.draw(rng, count)
    turn, zoom = np.radians(rng.uniform(-10, 10, count)), rng.uniform(0.93, 1.07, count)
    flip = rng.choice((-1.0, 1.0), count)
    affine = np.zeros((count, 2, 3), np.float32)
    affine[:, 0, 0], affine[:, 0, 1] = flip * np.cos(turn) / zoom, -np.sin(turn) / zoom
    affine[:, 1, 0], affine[:, 1, 1] = flip * np.sin(turn) / zoom, np.cos(turn) / zoom
    affine[:, :, 2] = rng.uniform(-0.06, 0.06, (count, 2))
    field = torch.nn.functional.affine_grid(torch.from_numpy(affine), [count, 1, *hu.shape[1:]], align_corners=False)

    def warp(images: NDArray[np.int16 | np.uint8], mode: str) -> Tensor:
        x = torch.from_numpy(images).to(torch.float32)[:, None]
        return torch.nn.functional.grid_sample(x, field, mode, padding_mode="border", align_corners=False)[:, 0]

    offset = torch.from_numpy(rng.uniform(-4, 4, (count, 1, 1)).astype(np.float32))
    gain = torch.from_numpy(rng.uniform(0.96, 1.04, (count, 1, 1)).astype(np.float32))
    warped = warp(labels, "nearest").to(torch.uint8)
    return warp(hu, "bilinear") * gain + offset, soft_targets(warped, len(CLASSES), grid)


@torch.no_grad()
def dice_by_class(graph: HeadCT, slices: Slices, batch: int = 8) -> list[float]:
    """Dice of each foreground class over all pixels of all slices; NaN where the slices show none of it."""
    graph.eval()
    both, total = np.zeros(len(CLASSES)), np.zeros(len(CLASSES))
    device = next(graph.parameters()).device
    for start in range(0, len(slices.hu), batch):
        hu = torch.from_numpy(np.array(slices.hu[start : start + batch])).to(device)
        predicted = graph(hu)[0].cpu().numpy()
        truth = slices.labels[start : start + batch]
        total += np.bincount(predicted.ravel(), minlength=len(CLASSES)) + np.bincount(
            truth.ravel(), minlength=len(CLASSES)
        )
        both += np.bincount(truth[predicted == truth].ravel(), minlength=len(CLASSES))
    return [float(2 * b / t) if t else float("nan") for b, t in zip(both[1:], total[1:], strict=True)]


def _write_curves(rows: list[dict[str, float]], run: Path) -> None:
    from matplotlib.figure import Figure  # noqa: PLC0415  # matplotlib takes a second to import and only the curves need it

    with (run / "curves.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = [row["step"] for row in rows]
    for name in CLASSES[1:]:
        axes.plot(steps, [row[f"dice_{name}"] for row in rows], marker=".", label=name)
    axes.set(xlabel="step", ylabel="Dice on validation phantoms", ylim=(0, 1))
    axes.legend(loc="lower right")
    figure.savefig(run / "curves.png", dpi=120)


def load_checkpoint(path: Path) -> tuple[Recipe, HeadCT]:
    """Recipe and network of a checkpoint, in evaluation mode. Weights only: nothing in the file is executed.

    Raises
    ------
    RecipeError : the file is no checkpoint of ours

    """
    from training.recipe import Recipe, RecipeError  # noqa: PLC0415

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        recipe = Recipe.model_validate(state["recipe"])
    except (OSError, KeyError, RuntimeError, ValueError, TypeError, EOFError, UnpicklingError) as error:
        raise RecipeError(f"{path} is no checkpoint of `scanside train`: {error}") from None
    graph = build(recipe)
    graph.load_state_dict(state["weights"])
    return recipe, graph.eval()
