"""Plans: engines that TensorRT has built for one GPU, accepted once they answer as the bundle says.

::

    PLANS/
      phantom-unet-fp16-b8-512x512-1f0c2a6b9d3e.plan    the engine
      phantom-unet-fp16-b8-512x512-1f0c2a6b9d3e.layers  the inspector's report, JSON
      phantom-unet-fp16-b8-512x512-1f0c2a6b9d3e.json    its key, its types as read back, the gate's figures: accepted
      timing-8.6.1-NVIDIA-RTX-A4000-8.6.cache           what tactics cost on this GPU, for later builds

A plan is loaded only where every entry of its key is that of the bundle, the GPU and the TensorRT at hand. Whoever may
write the folder may run code: keep it writable for the node's user alone. They are made and opened in `runtime.gpu`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime import engine
from runtime.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import ModuleType

    from runtime.bundle import Bundle
    from runtime.device import GPU

FORMAT = 1
SIZE = (512, 512)


@dataclass(frozen=True, slots=True)
class Key:
    """All that a plan depends on.

    Attributes
    ----------
    bundle, precision : which graph, by name
    sha256 : of the graph and its weights (`Bundle.sha256`)
    batch, height, width : of the input; shapes are static
    tensorrt, driver, gpu, capability : what it was built with, and for
    format : of these files

    """

    bundle: str
    precision: str
    sha256: str
    batch: int
    height: int
    width: int
    tensorrt: str
    driver: str
    gpu: str
    capability: str
    format: int = FORMAT

    @classmethod
    def of(cls, bundle: Bundle, precision: str, shape: tuple[int, int, int], trt: ModuleType, gpu: GPU) -> Key:
        sha256 = bundle.sha256(precision)
        return cls(bundle.name, precision, sha256, *shape, trt.__version__, gpu.driver, gpu.name, gpu.capability)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.batch, self.height, self.width

    @property
    def stem(self) -> str:
        """Name of its files."""
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()
        name = f"{self.bundle}-{self.precision}-b{self.batch}-{self.height}x{self.width}-{digest[:12]}"
        return re.sub(r"[^A-Za-z0-9._-]", "_", name)


@dataclass(frozen=True, slots=True)
class Plan:
    """An accepted engine.

    Attributes
    ----------
    key : what it was built of, with and for
    sha256 : of the plan's bytes
    layers : how many convolutions compute in each type, as the engine's inspector says
    build_s : seconds the build took
    batch_ms : median time of one batch, HU in the host's memory to labels in the host's memory
    golden_disagreement : share of pixels that differ from PyTorch's, over the worst golden slice
    failed : what `scanside verify --tensorrt` has against it; such a plan is not served

    """

    key: Key
    sha256: str
    layers: Mapping[str, int]
    build_s: float
    batch_ms: float
    golden_disagreement: float
    failed: tuple[str, ...] = ()


def default_folder() -> Path:
    """The user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scanside" / "plans"


def load(folder: Path, key: Key) -> tuple[Plan, bytes]:
    """Read the accepted plan for a key.

    Raises
    ------
    BackendError : there is none; the message says what differs from one that is there, and what to run

    """
    path = folder / f"{key.stem}.json"
    size = f"{key.height}x{key.width}"
    remedy = f"run `scanside build --precision {key.precision} --batch {key.batch} --size {size}`"
    try:
        plan = _read(path)
        data = path.with_suffix(".plan").read_bytes()
    except FileNotFoundError:
        raise BackendError(f"{why_none(folder, key)}: {remedy}") from None
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise BackendError(f"{path}: {error}: {remedy}") from None
    if plan.key != key or hashlib.sha256(data).hexdigest() != plan.sha256:
        raise BackendError(f"{path.with_suffix('.plan')}: not what was accepted: {remedy}")
    return plan, data


def _read(path: Path) -> Plan:
    told = json.loads(path.read_text())
    return Plan(**{**told, "key": Key(**told["key"]), "failed": tuple(told.get("failed", ()))})


def why_none(folder: Path, key: Key) -> str:
    """What differs from the plan that is nearest."""
    nearest = min(
        (
            [
                f"{name} {value}, now {getattr(key, name)}"
                for name, value in dataclasses.asdict(one.key).items()
                if value != getattr(key, name)
            ]
            for one in accepted(folder)
            if not one.failed
            and (one.key.bundle, one.key.precision, one.key.shape) == (key.bundle, key.precision, key.shape)
        ),
        key=len,
        default=None,
    )
    what = f"{folder}: no {key.precision} plan of {key.bundle} for {key.batch} x {key.height} x {key.width}"
    failed = next((one for one in accepted(folder) if one.key == key and one.failed), None)
    if failed:
        return f"{what} that has passed: {'; '.join(failed.failed)}"
    return f"{what}; one is there, of {'; '.join(nearest)}" if nearest else what


def accepted(folder: Path) -> Iterator[Plan]:
    """All accepted plans in a folder, whatever they were built for."""
    for path in sorted(folder.glob("*.json")):
        try:
            yield _read(path)
        except PermissionError as error:
            raise BackendError(f"{path}: {error.strerror}: let the node's user read it") from None
        except (ValueError, TypeError, KeyError, OSError):  # of another version, or no plan's
            continue


def fitting(folder: Path, key: Key, *, on_trial: bool = False) -> list[Plan]:
    """Accepted plans that differ from the key in their shape alone, smallest batch first; on trial failed ones too."""
    found = (one for one in accepted(folder) if dataclasses.replace(key, **_shape(one.key)) == one.key)
    return sorted((one for one in found if on_trial or not one.failed), key=lambda one: one.key.shape)


def keep(folder: Path, plan: Plan) -> None:
    write(folder / f"{plan.key.stem}.json", (json.dumps(dataclasses.asdict(plan), indent=2) + "\n").encode())


def sorted_out(bundle: Bundle, folder: Path, trt: ModuleType, gpu: GPU) -> tuple[list[str], list[str]]:
    """Names of the accepted plans that this bundle can use on this GPU, and of those that it can't or must not."""
    names: tuple[list[str], list[str]] = [], []
    own = {
        name: Key.of(bundle, name, (1, *SIZE), trt, gpu)
        for name in engine.PRECISIONS
        if name in bundle.manifest.precisions
    }
    for one in accepted(folder):
        base = own.get(one.key.precision)
        fits = base is not None and not one.failed and dataclasses.replace(base, **_shape(one.key)) == one.key
        names[not fits].append(f"{one.key.precision} {one.key.batch} x {one.key.height} x {one.key.width}")
    return names


def _shape(key: Key) -> dict[str, Any]:
    return {"batch": key.batch, "height": key.height, "width": key.width}


def timing_cache(folder: Path, key: Key) -> Path:
    name = f"timing-{key.tensorrt}-{key.gpu}-{key.capability}.cache"
    return folder / re.sub(r"[^A-Za-z0-9._-]", "-", name)


def write(path: Path, data: bytes) -> None:
    """Write a file whole, or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)  # an administrator builds, the node's user reads
        except BaseException:
            Path(file.name).unlink()
            raise
    Path(file.name).replace(path)
