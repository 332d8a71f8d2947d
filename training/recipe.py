"""Recipes: all that makes a training run what it is, in one TOML file."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from runtime.errors import ScansideError

if TYPE_CHECKING:
    from pathlib import Path


class RecipeError(ScansideError):
    """A recipe that can't be read or says something impossible."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Network(_Section):
    architecture: Literal["res_unet"]
    channels: tuple[int, ...]


class Input(_Section):
    windows_hu: tuple[tuple[float, float], ...]
    grid: Annotated[int, Field(ge=32, le=1024)]


class Phantoms(_Section):
    heads: Annotated[int, Field(ge=1)]
    validation_heads: Annotated[int, Field(ge=1)]
    slices_per_head: Annotated[int, Field(ge=4)]
    bleed_free: Annotated[float, Field(ge=0, le=1)]
    seed: int


class Training(_Section):
    coarse_steps: Annotated[int, Field(ge=0)]
    crop: tuple[Annotated[int, Field(ge=32)], Annotated[int, Field(ge=32)]]
    steps: Annotated[int, Field(ge=1)]
    batch: Annotated[int, Field(ge=1)]
    learning_rate: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    bfloat16: bool
    validate_every: Annotated[int, Field(ge=1)]
    seed: int


class Recipe(_Section):
    """A recipe: names, network, input contract, data, optimisation."""

    name: str
    version: str
    training_data: str
    network: Network
    input: Input
    phantoms: Phantoms
    training: Training

    @model_validator(mode="after")
    def _grid_fits(self) -> Recipe:
        step = 2 ** len(self.network.channels)
        wrong = [side for side in self.training.crop if side % step or side > self.input.grid]
        if wrong:
            raise ValueError(f"training.crop {wrong[0]} is no multiple of {step} up to input.grid {self.input.grid}")
        step *= 1 + (self.training.coarse_steps > 0)
        if self.input.grid % step:
            raise ValueError(
                f"input.grid {self.input.grid} is no multiple of {step}, which network.channels asks for"
                + " at half the grid (training.coarse_steps)" * (self.training.coarse_steps > 0)
            )
        if self.training.coarse_steps >= self.training.steps:
            raise ValueError(f"training.coarse_steps must be fewer than the {self.training.steps} steps")
        return self


def load(path: Path) -> Recipe:
    """Read a recipe.

    Raises
    ------
    RecipeError : the file is missing, is no TOML, or has wrong or unknown keys; every error is listed

    """
    try:
        return Recipe.model_validate(tomllib.loads(path.read_text("utf-8")))
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: no valid TOML: {error}") from None
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise RecipeError(f"{path}:\n  " + "\n  ".join(lines)) from None
