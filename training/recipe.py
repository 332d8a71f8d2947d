"""Recipes: all that makes a training run what it is, in one TOML file; the data's place is not part of it."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from models import catalogue
from runtime.errors import ScansideError
from runtime.geometry import View
from runtime.types import Coded  # noqa: TC001  # pydantic looks it up
from training.lesions import CLASSES

if TYPE_CHECKING:
    from pathlib import Path

Read = TypeVar("Read", bound="Contract")
Names = dict[str, str]  # a source's own name of a class -> the recipe's; "background" leaves it out


def _rising(ends: tuple[float, float]) -> tuple[float, float]:
    if not ends[0] < ends[1]:
        raise ValueError(f"{list(ends)}: the first must be less than the second")
    return ends


Rising = Annotated[tuple[float, float], AfterValidator(_rising)]
Side = Annotated[int, Field(ge=32)]


class RecipeError(ScansideError):
    """A recipe that can't be read or says something impossible."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Network(_Section):
    """An architecture of `models.catalogue`; every other key is a setting of it."""

    model_config = ConfigDict(frozen=True, extra="allow")
    architecture: str

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Input(_Section):
    """What a slice is to the network: each window of it and of its neighbours is a channel."""

    windows_hu: Annotated[tuple[Rising, ...], Field(min_length=1)]
    neighbours: Annotated[int, Field(ge=0, le=4)] = 0  # slices on either side, for a network that sees them as channels
    depth: Annotated[int | None, Field(ge=16, le=256)] = None  # slices of a volume, for a network of three dimensions
    grid: Annotated[int, Field(ge=32, le=1024)]

    @property
    def view(self) -> View:
        """Of a volume, its outer quarters on either side are answered by the next."""
        return View(self.depth, self.depth // 2) if self.depth else View(2 * self.neighbours + 1)


class Phantoms(_Section):
    """Synthetic heads with exact truth, made for the run."""

    kind: Literal["phantoms"] = "phantoms"
    heads: Annotated[int, Field(ge=1)]
    validation_heads: Annotated[int, Field(ge=1)]
    slices_per_head: Annotated[int, Field(ge=5)]  # of them the two outermost at either end
    bleed_free: Annotated[float, Field(ge=0, le=1)]
    hard: Annotated[float, Field(ge=0, le=1)] = 0.0  # share of heads with trouble: motion, metal, decoys, old blood
    seed: int


class _Pictures(_Section):
    """Grey pictures: what Hounsfield units their values 0 and 255 stand for makes them CT again."""

    classes: Names
    patient: str
    shows_hu: Rising
    grey: Rising | None = Field(None, description="values that count as black and white: 0 and 255, or say so")


class Coco(_Pictures):
    kind: Literal["coco"]


class Pairs(_Pictures):
    kind: Literal["pairs"]
    classes: Names = Field({"1": "haemorrhage"}, description="by mask value; black and white is 0 and 1")
    images: str = "images"
    masks: str = "masks"
    mask_suffix: str = ""


class Dicom(_Section):
    kind: Literal["dicom"]
    classes: Names
    unmasked: Literal["refuse", "skip", "negative"] = "refuse"
    shows_hu: Rising | None = None  # for MR: its 1st and 99th percentile stand for these


class Nifti(_Section):
    kind: Literal["nifti"]
    classes: Names
    patient: str
    images: str = "images"
    masks: str = "masks"
    mask_suffix: str = ""
    shows_hu: Rising | None = None  # for what is no CT: its 1st and 99th percentile stand for these
    only_with_blood: bool = False  # slices without are left out of training and validation
    assume: str | None = None  # directions of a file whose header has none, such as "LAS"
    pair_by: Literal["affine", "index"] = "affine"


class CtIch(_Section):
    kind: Literal["ct_ich"]
    classes: Names
    assume: str | None = None
    pair_by: Literal["affine", "index"] = "affine"


Data = Annotated[Phantoms | Coco | Pairs | Dicom | Nifti | CtIch, Field(discriminator="kind")]


class Split(_Section):
    """By patient. Fractions for training, validation and, if there are three, test; or one turn of a k-fold."""

    fractions: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    folds: Annotated[int, Field(ge=2)] | None = None
    fold: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _one_way(self) -> Split:
        if (self.fractions is None) == (self.folds is None):
            raise ValueError("give either fractions or folds")
        if self.fractions is not None and len(self.fractions) not in (2, 3):
            raise ValueError("fractions are two (training, validation) or three (and test)")
        if self.fractions is not None and abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(f"fractions make {sum(self.fractions):g}, not 1: a share that is left out is learnt from")
        if self.folds is not None and self.fold >= self.folds:
            raise ValueError(f"fold {self.fold} of {self.folds}: they count from 0")
        return self


class Augmentation(_Section):
    """How far a slice is changed each time it is drawn; everything evenly within its range."""

    flip: bool = True
    turn_deg: Annotated[float, Field(ge=0, le=180)] = 10.0
    zoom: Annotated[float, Field(ge=0, lt=1)] = 0.07
    shift: Annotated[float, Field(ge=0, lt=1)] = 0.03  # of the edge
    offset_hu: Annotated[float, Field(ge=0)] = 4.0
    gain: Annotated[float, Field(ge=0, lt=1)] = 0.04


class Training(_Section):
    steps: Annotated[int, Field(ge=1)] | None = None
    epochs: Annotated[int, Field(ge=1)] | None = None
    coarse_steps: Annotated[int, Field(ge=0)] = 0
    crop: tuple[Side, Side] | None = None  # rows and columns of the grid's middle that fine steps learn from
    batch: Annotated[int, Field(ge=1)]
    sampling: Literal["by_class", "shuffled"] = "shuffled"
    loss: tuple[Literal["cross_entropy", "dice"], ...] = ("cross_entropy", "dice")
    optimiser: Literal["adam", "adamw", "muon", "rmsprop"]
    learning_rate: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "one_cycle", "plateau"]
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    patience: Annotated[int, Field(ge=1)] = 10  # validations in a row without a better value, after which it cuts
    watch: Literal["dice", "loss"] = "dice"  # of the validation side, or of the training
    precision: Literal["float32", "bfloat16"] = "float32"
    clip_norm: Annotated[float, Field(gt=0)] | None = None  # of all gradients together
    validate_every: Annotated[int, Field(ge=1)] | None = None  # steps; None: once an epoch
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        if self.steps is not None and self.coarse_steps >= self.steps:
            raise ValueError(f"coarse_steps must be fewer than the {self.steps} steps")
        return self


class Contract(_Section):
    """What a bundle says of its network, and what the network is shown."""

    name: str
    version: str
    training_data: str
    licence: str = "not stated"  # of the weights that come of it
    classes: Annotated[tuple[str, ...], Field(min_length=2)] = CLASSES
    codes: dict[str, Coded] = {}  # of classes that the node's own table does not know, or that it is to call otherwise
    input: Input

    @model_validator(mode="after")
    def _background_first(self) -> Self:
        twice = sorted({name for name in self.classes if self.classes.count(name) > 1})
        if twice:
            raise ValueError(f"classes: {', '.join(twice)} is there twice")
        if self.classes[0] != "background":
            raise ValueError(f'classes: the first is "background", not {self.classes[0]!r}: all others are blood')
        return self

    @model_validator(mode="after")
    def _codes_are_of_classes(self) -> Self:
        if unknown := sorted(self.codes.keys() - set(self.classes[1:])):
            raise ValueError(f"codes of {', '.join(unknown)}, which is no class")
        return self


class Recipe(Contract):
    """A recipe: names, classes, network, input contract, data, split, optimisation."""

    network: Network
    data: Data
    split: Split | None = None
    augmentation: Augmentation = Augmentation()
    training: Training

    @property
    def settings(self) -> dict[str, Any]:
        """All that the architecture is built with; a network for one class of blood may answer with one logit."""
        depth, grid, windows = self.input.depth, self.input.grid, len(self.input.windows_hu)
        fixed: dict[str, Any] = {
            "in_channels": windows if depth else windows * self.input.view.shown,
            "classes": len(self.classes),
        }
        if self.network.architecture == "unetr":  # its position embedding belongs to one size
            fixed["size"] = (depth, grid, grid)
        return fixed | self.network.settings

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        self._check_depth()
        self._check_network()
        multiple = catalogue.side_multiple(self.network.architecture, **self.settings)
        wrong = [side for side in self.training.crop or () if side % multiple or side > self.input.grid]
        if wrong:
            raise ValueError(
                f"training.crop {wrong[0]} is no multiple of {multiple} up to input.grid {self.input.grid}"
            )
        multiple *= 2 if self.training.coarse_steps else 1
        if self.input.grid % multiple:
            raise ValueError(
                f"input.grid {self.input.grid} is no multiple of {multiple}, which {self.network.architecture} asks for"
                + " at half the grid (training.coarse_steps)" * (self.training.coarse_steps > 0)
            )
        if (self.split is None) != (self.data.kind == "phantoms"):
            raise ValueError("split: every source but phantoms, which come from two seeds, needs one")
        named = {} if isinstance(self.data, Phantoms) else self.data.classes
        if unknown := sorted(set(named.values()) - set(self.classes)):
            raise ValueError(
                f"data.classes names {', '.join(unknown)}; the recipe's classes are {', '.join(self.classes)}"
            )
        return self

    def _check_network(self) -> None:
        """What the recipe says twice must agree, and the architecture must take its settings."""
        channels, classes = self.settings["in_channels"], self.settings["classes"]
        shown = len(self.input.windows_hu) * (1 if self.input.depth else self.input.view.shown)
        if channels != shown:
            raise ValueError(f"network.in_channels is {channels}; windows and neighbours make {shown}")
        if classes != len(self.classes) and (classes, len(self.classes)) != (1, 2):
            raise ValueError(f"network.classes is {classes}; the recipe has {len(self.classes)}, background included")
        if self.data.kind == "phantoms" and self.classes != CLASSES:
            raise ValueError(f"classes: phantoms have {', '.join(CLASSES)}, in this order")
        if self.data.kind in ("coco", "pairs") and self.input.view.shown > 1:
            raise ValueError(f"input: {self.data.kind} has single pictures, which have no neighbours and no depth")
        if self.network.architecture not in catalogue.ARCHITECTURES:
            return
        try:
            with torch.device("meta"):
                catalogue.build(self.network.architecture, **self.settings)
        except (ValueError, RuntimeError, TypeError, IndexError) as error:
            raise ValueError(f"network: {self.network.architecture} does not take these settings: {error}") from None

    def _check_depth(self) -> None:
        """A volume goes with a network of three dimensions, and with nothing that is made for slices."""
        name = self.network.architecture
        if name not in catalogue.ARCHITECTURES:
            return  # which the catalogue says better
        volumetric = catalogue.ARCHITECTURES[name].dimensions == 3
        if volumetric != (self.input.depth is not None):
            raise ValueError(f"input.depth: {name} {'needs' if volumetric else 'has no use for'} one")
        if volumetric and (self.input.neighbours or self.training.coarse_steps):
            raise ValueError("input.neighbours and training.coarse_steps are for networks of two dimensions")
        if volumetric and name == "unetr" and self.training.crop:
            raise ValueError("training.crop: the position embedding of unetr belongs to the whole grid")
        if self.input.depth and self.input.depth % (multiple := catalogue.side_multiple(name, **self.settings)):
            raise ValueError(f"input.depth {self.input.depth} is no multiple of {multiple}")


def load(path: Path, kind: type[Read] = Recipe) -> Read:  # type: ignore[assignment]
    """Read a recipe; or a contract, for a network that is already there.

    Raises
    ------
    RecipeError : the file is missing, is no TOML, or has wrong or unknown keys; every error is listed

    """
    try:
        return kind.model_validate(tomllib.loads(path.read_text("utf-8")))
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: no valid TOML: {error}") from None
    except ValidationError as error:
        lines = [_mistake(one["loc"], one["type"], one["msg"]) for one in error.errors()]
        raise RecipeError(f"{path}:\n  " + "\n  ".join(lines)) from None


def _mistake(place: tuple[int | str, ...], kind: str, message: str) -> str:
    """One mistake in one line: where, and what."""
    said = "unknown key" if kind == "extra_forbidden" else message.removeprefix("Value error, ")
    return f"{'.'.join(map(str, place))}: {said}" if place else said
