"""What ``manifest.json`` of a bundle may say; its JSON schema is ``docs/manifest.schema.json``."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from runtime.engine import TAKES
from runtime.errors import BundleError
from runtime.evidence import MOST_IN_A_ROW
from runtime.types import Coded, OperatingPoint
from runtime.verdict import Budget

if TYPE_CHECKING:
    from pathlib import Path

FORMAT: Literal["scanside-bundle/2"] = "scanside-bundle/2"
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")]  # in the bundle's own folder
FILES = {
    "fp32": "model.onnx", "fp16": "model.fp16.onnx", "int8": "model.int8.onnx", "int8-cpu": "model.int8-cpu.onnx",
}  # fmt: skip
PROCESSOR = TAKES["onnxruntime"]
ABOUT = {"parity.json", "calibration.json", "verdicts.json", "scores.json", "MODEL_CARD.md"}
Precision = Literal["fp32", "fp16", "int8", "int8-cpu"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Class(_Strict):
    """One class of the labels, with codes of its own or those that the node has for its name."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    codes: Coded | None = None


class Views(_Strict):
    """Slices that the network sees at once, and those of them that it answers."""

    shown: Annotated[int, Field(ge=1, strict=True)]
    answered: Annotated[int, Field(ge=1, strict=True)]


class Limits(_Strict):
    """`runtime.verdict.Budget`."""

    dice: Annotated[float, Field(ge=0, le=1)]
    volume_percent: Annotated[float, Field(ge=0)]
    volume_ml: Annotated[float, Field(ge=0)]
    findings: Annotated[int, Field(ge=0)]
    small_lesions: Annotated[int, Field(ge=0)]
    decisions: Annotated[int, Field(ge=0)]
    logit_mean: Annotated[float, Field(ge=0)]


class Ruling(_Strict):
    """A verdict on one precision on one engine, for these very bytes."""

    passed: bool
    engine: str
    sha256: Sha256
    reasons: tuple[str, ...]


class Manifest(_Strict):
    """All that decides what a bundle computes and who vouches for it."""

    format: Literal["scanside-bundle/2"]
    name: Annotated[str, Field(min_length=1)]
    version: str
    intended_use: str
    training_data: str
    licence: str
    classes: Annotated[tuple[Class, ...], Field(min_length=2)]
    input: dict[str, Any]
    view: Views
    precisions: dict[Precision, FileName]
    weights: FileName | None = None
    minimum_volume_ml: dict[str, Annotated[float, Field(ge=0)]]
    minimum_probability: dict[str, Annotated[float, Field(ge=0, le=1)]] | None = None  # 0 of a class that it lacks
    minimum_slices: dict[str, Annotated[int, Field(ge=1, le=MOST_IN_A_ROW, strict=True)]] | None = None  # and 1
    budget: Limits
    learnt_from: str | None = None
    provenance: dict[str, Any]
    rulings: dict[Precision, Ruling] = {}
    files: dict[FileName, Sha256]

    @model_validator(mode="after")
    def _complete(self) -> Manifest:
        names = [one.name for one in self.classes]
        if len(set(names)) < len(names):
            raise ValueError(f"classes {', '.join(names)}: one is there twice")
        without = [one.name for one in self.classes[1:] if one.name not in self.minimum_volume_ml]
        if without:
            raise ValueError(f"no minimum_volume_ml for {', '.join(without)}")
        for entry in ("minimum_volume_ml", "minimum_probability", "minimum_slices"):
            unknown = sorted((getattr(self, entry) or {}).keys() - {*names})
            if unknown:
                raise ValueError(f"{entry} for {', '.join(unknown)}: there is no such class")
        unlisted = self.computing - self.files.keys()
        if unlisted:
            raise ValueError(f"{', '.join(sorted(unlisted))} without a hash")
        if "fp32" not in self.precisions:
            raise ValueError("no fp32 graph: it is what the others are held against")
        return self

    @property
    def operating_point(self) -> dict[str, OperatingPoint]:
        """By class; bundles of before say nothing of probability and slices."""
        probability, slices = self.minimum_probability or {}, self.minimum_slices or {}
        return {
            one.name: OperatingPoint(
                self.minimum_volume_ml[one.name], probability.get(one.name, 0.0), slices.get(one.name, 1)
            )
            for one in self.classes[1:]
        }

    @property
    def computing(self) -> set[str]:
        """Names of the files that decide the answers: all that are not about them."""
        return {*self.precisions.values(), "golden.npz", *(self.files.keys() - ABOUT)}


def parse(data: bytes, path: Path) -> Manifest:
    """Read the bytes of a ``manifest.json`` that lies in `path`.

    Raises
    ------
    BundleError : no JSON, another format; or all that is wrong in it at once

    """
    try:
        told = json.loads(data)
    except ValueError as error:
        raise BundleError(f"{path} is no JSON: {error}") from None
    kind = told.get("format") if isinstance(told, dict) else None
    if kind == "scanside-bundle/1":
        told = _from_1(told)
    elif kind != FORMAT:
        raise BundleError(f"{path} is in format {kind!r}, this version of scanside reads {FORMAT!r}: export it again")
    try:
        return Manifest.model_validate(told)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'manifest'}: {one['msg']}" for one in error.errors())
        raise BundleError(f"{path}: {wrong}: export the bundle again") from None


def _from_1(told: dict[str, Any]) -> dict[str, Any]:
    """Bundles of the first format had FP32 alone: no budget, no rulings, no licence."""
    names = told.get("classes")
    classes = [{"name": name} for name in names] if isinstance(names, list) else names
    added = {"licence": "", "budget": asdict(Budget()), "provenance": {}}
    return {**told, "format": FORMAT, "classes": classes, **added}
