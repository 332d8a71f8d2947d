"""Plans: engines that TensorRT has built for one GPU, accepted once they answer as the bundle says.

::

    PLANS/
      phantom-unet-fp16-b8-512x512-1f0c2a6b9d3e.plan    the engine
      phantom-unet-fp16-b8-512x512-1f0c2a6b9d3e.layers  the inspector's report, JSON
      phantom-unet-fp16-b8-512x512-1f0c2a6b9d3e.json    its key, its types as read back, the gate's figures: accepted;
                                                        and what verify found, once it was asked
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
import shlex
import tempfile
from collections.abc import Mapping  # noqa: TC003  # pydantic looks it up
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ConfigDict, PositiveInt, TypeAdapter, ValidationError

from runtime import engine
from runtime.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from runtime.bundle import Bundle
    from runtime.device import GPU

FORMAT = 2  # of 1 the engines counted pixels: an output to which nobody gives an address
SIZE = (512, 512)
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


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
    batch: PositiveInt
    height: PositiveInt
    width: PositiveInt
    tensorrt: str
    driver: str
    gpu: str
    capability: str
    format: int = FORMAT
    __pydantic_config__: ClassVar = STRICT

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

    def __str__(self) -> str:
        return f"{self.precision} {self.batch} x {self.height} x {self.width}"


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
    verdict : of `scanside verify --tensorrt`: ``"passed"``, or what it has against it: such a plan is not served; None
        until it is asked

    """

    key: Key
    sha256: str
    layers: Mapping[str, int]
    build_s: float
    batch_ms: float
    golden_disagreement: float
    verdict: Literal["passed"] | tuple[str, ...] | None = None
    __pydantic_config__: ClassVar = STRICT

    @property
    def failed(self) -> str:
        """What is against it; empty where nothing is."""
        return "" if self.verdict in ("passed", None) else f"{self.key} failed verify: {'; '.join(self.verdict)}"


_PLAN = TypeAdapter(Plan)


def default_folder() -> Path:
    """The user's cache.

    Raises
    ------
    BackendError : nobody knows where the user's home is, as in a container under a number without a name

    """
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        raise BackendError("no home folder: name --plans or model.plans") from None
    return cache / "scanside" / "plans"


def command(verb: str, bundle: Bundle, folder: Path, *options: str) -> str:
    """The command that does to a bundle's plans in a folder what they lack, as it may be typed anywhere."""
    where = str(bundle.folder.absolute()), "--plans", str(folder.absolute())
    return f"run `{shlex.join(['scanside', verb, *where, *options])}`"


def load(folder: Path, key: Key, bundle: Bundle) -> tuple[Plan, bytes]:
    """Read the accepted plan for a key.

    Raises
    ------
    BackendError : there is none, or not as it was; the message says what differs, and what to run

    """
    path = folder / f"{key.stem}.plan"
    size = f"{key.height}x{key.width}"
    remedy = command("build", bundle, folder, "--precision", key.precision, "--batch", str(key.batch), "--size", size)
    try:
        plan = _read(path.with_suffix(".json"))
        data = path.read_bytes()
    except FileNotFoundError as error:
        missing = why_none(folder, [key]) if error.filename != str(path) else f"{path}: is not there"
        raise BackendError(f"{missing}: {remedy}") from None
    except OSError as error:
        raise BackendError(_unreadable(error, path)) from None
    except ValueError as error:
        raise BackendError(f"{error}: {remedy}") from None
    if plan.key != key or hashlib.sha256(data).hexdigest() != plan.sha256:
        raise BackendError(f"{path}: not what was accepted: {remedy}")
    return plan, data


def _read(path: Path) -> Plan:
    try:
        return _PLAN.validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path}: not a plan of this version: {where}{': ' * bool(where)}{first['msg']}") from None


def _unreadable(error: OSError, path: Path) -> str:
    return f"{error.filename or path}: {error.strerror}: let the node's user read it"


def why_none(folder: Path, keys: Sequence[Key]) -> str:
    """What is against the plan that is nearest to one of the keys, in whatever shape; and what can't be read."""
    found, wrong = survey(folder)
    near: list[tuple[list[str], Plan]] = [
        (_differences(one.key, key), one)
        for one in found
        for key in keys
        if (one.key.bundle, one.key.precision) == (key.bundle, key.precision)
    ]
    what = f"{folder}: no {' or '.join(dict.fromkeys(key.precision for key in keys))} plan of {keys[0].bundle}"
    if near:
        differing, nearest = min(near, key=lambda one: len(one[0]))
        if differing:
            what += f"; the nearest, {nearest.key}, is of {'; '.join(differing)}"
        else:
            what += f" that has passed: {nearest.failed}" if nearest.failed else f" but {nearest.key}"
    return "; ".join([what, *wrong[:1]])


def _differences(one: Key, key: Key) -> list[str]:
    """Entries but the shape in which a plan's key is not the one that is wanted."""
    return [
        f"{name} {value}, now {getattr(key, name)}"
        for name, value in dataclasses.asdict(one).items()
        if name not in _shape(one) and value != getattr(key, name)
    ]


def survey(folder: Path) -> tuple[list[Plan], list[str]]:
    """All accepted plans in a folder, whatever they were built for; and of each other record why it is none."""
    found, wrong = [], []
    try:
        paths = sorted(one for one in folder.iterdir() if one.suffix == ".json")
    except FileNotFoundError:
        return [], []
    except NotADirectoryError as error:
        return [], [f"{folder}: {error.strerror}: name the folder of the plans"]
    except OSError as error:
        return [], [_unreadable(error, folder)]
    for path in paths:
        try:
            found.append(_read(path))
        except OSError as error:
            wrong.append(_unreadable(error, path))
        except ValueError as error:
            wrong.append(str(error))
    return found, wrong


def accepted(folder: Path) -> list[Plan]:
    """All accepted plans in a folder, whatever they were built for."""
    return survey(folder)[0]


def fitting(folder: Path, key: Key, *, on_trial: bool = False) -> list[Plan]:
    """Accepted plans that differ from the key in their shape alone, smallest batch first; on trial failed ones too."""
    found = (one for one in accepted(folder) if not _differences(one.key, key))
    return sorted((one for one in found if on_trial or not one.failed), key=lambda one: one.key.shape)


def keep(folder: Path, plan: Plan) -> None:
    write(folder / f"{plan.key.stem}.json", (json.dumps(dataclasses.asdict(plan), indent=2) + "\n").encode())


@dataclass(frozen=True, slots=True)
class Sorted:
    """The records of a folder, for a bundle on the GPU at hand.

    Attributes
    ----------
    usable : plans that can be served
    failed : what verify has against plans that could be
    others : how many are of another GPU, TensorRT or bundle
    wrong : what is the matter with those that can't be read, or are not as they were

    """

    usable: list[Plan]
    failed: list[str]
    others: int
    wrong: list[str]


def sorted_out(bundle: Bundle, folder: Path, trt: ModuleType, gpu: GPU) -> Sorted:
    """Look at every record and every plan of a folder."""
    names = [name for name in engine.PRECISIONS if name in bundle.manifest.precisions]
    own = {name: Key.of(bundle, name, (1, *SIZE), trt, gpu) for name in names}
    found, wrong = survey(folder)
    fits = [one for one in found if one.key.precision in own and not _differences(one.key, own[one.key.precision])]
    usable = []
    for one in fits:
        try:
            load(folder, one.key, bundle)
        except BackendError as error:
            wrong.append(str(error))
        else:
            usable += [one] * (not one.failed)
    return Sorted(usable, [one.failed for one in fits if one.failed], len(found) - len(fits), wrong)


def _shape(key: Key) -> dict[str, Any]:
    return {"batch": key.batch, "height": key.height, "width": key.width}


def timing_cache(folder: Path, key: Key) -> Path:
    name = f"timing-{key.tensorrt}-{key.gpu}-{key.capability}.cache"
    return folder / re.sub(r"[^A-Za-z0-9._-]", "-", name)


def make_writable(folder: Path) -> None:
    """Make a folder, and see that it can be written before work is put into what goes there.

    Raises
    ------
    BackendError

    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BackendError(_unwritable(folder, error)) from None


def _unwritable(folder: Path, error: OSError) -> str:
    return f"{folder}: plans can't be written: {error.strerror}: name another --plans or model.plans, or make room"


def write(path: Path, data: bytes) -> None:
    """Write a file whole, or not at all.

    Raises
    ------
    BackendError : the folder can't be written

    """
    try:
        _write(path, data)
    except OSError as error:
        raise BackendError(_unwritable(path.parent, error)) from None


def _write(path: Path, data: bytes) -> None:
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
