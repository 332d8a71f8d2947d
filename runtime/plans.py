"""Plans: engines that TensorRT has built for one GPU, accepted once they answer as the bundle says.

::

    PLANS/
      phantom-unet-fp16-b8-512x512-1f0c2a6b9d3e.plan    the engine
      phantom-unet-fp16-b8-512x512-1f0c2a6b9d3e.layers  the inspector's report, JSON
      phantom-unet-fp16-b8-512x512-1f0c2a6b9d3e.json    its key, its types as read back, the gate's figures: accepted
      timing-8.6.1-NVIDIA-RTX-A4000-8.6.cache           what tactics cost on this GPU: later builds take a third

A plan is loaded only where every entry of its key is that of the bundle, the GPU and the TensorRT at hand. Whoever may
write the folder may run code: keep it writable for the node's user alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import re
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime import caps, engine
from runtime.device import open_device
from runtime.errors import BackendError, BundleError, DeviceLost, InferenceError, SelfTestFailed
from runtime.session import self_test
from runtime.trt import TrtSession

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import ModuleType

    from runtime.bundle import Bundle
    from runtime.device import GPU, Device

FORMAT = 1
BATCHES, SIZE = (1, 8, 32), (512, 512)
TIMED = 30  # batches


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

    """

    key: Key
    sha256: str
    layers: Mapping[str, int]
    build_s: float
    batch_ms: float
    golden_disagreement: float


def make_all(
    bundle: Bundle,
    precision: str,
    shapes: Sequence[tuple[int, int, int]],
    folder: Path,
    *,
    again: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[dict[str, Any]]:
    """Build plans for the GPU at hand.

    Parameters
    ----------
    precision : one of the bundle's for TensorRT, or ``"best"``: all that have passed
    shapes : ``(batch, H, W)``
    again : build also what is there
    tell : told what is done just now

    Yields
    ------
    for each precision and shape what became of it: ``state`` is built, there already or failed

    Raises
    ------
    BackendError : no TensorRT or no GPU
    BundleError, NotVerified : a precision that the bundle has not, or that has not passed

    """
    names = [name for name in engine.PRECISIONS if _has_passed(bundle, name)] if precision == "best" else [precision]
    for name in names:
        if name not in engine.PRECISIONS:
            raise BackendError(f"{name}: TensorRT's precisions are {', '.join(engine.PRECISIONS)}, or say best")
        bundle.check_ruling(name)
    trt = caps.load()
    device = open_device()
    gpu = device.about()
    device.close()
    for name, shape in itertools.product(names, shapes):
        key = Key.of(bundle, name, shape, trt, gpu)
        batch, height, width = shape
        row: dict[str, Any] = {"precision": name, "batch": batch, "size": f"{height}x{width}"}
        what = f"{name}, batch {batch}, {height} x {width}"
        tell(what)
        state = "there already"
        try:
            found = None if again else next((one for one in fitting(folder, key) if one.key == key), None)
            if found is None:
                state = "built"
                found = make(
                    bundle,
                    key,
                    folder,
                    trt=trt,
                    open_device=open_device,
                    on_step=lambda phase, done, total, what=what: tell(f"{what}: {phase} {done} of {total}"),
                )
        except (BackendError, InferenceError, SelfTestFailed) as error:
            yield row | {"state": "failed", "slice_ms": None, "build_s": None, "types": str(error)}
            if isinstance(error, DeviceLost):
                raise
            continue
        types = ", ".join(f"{count} {kind}" for kind, count in found.layers.items() if count)
        slices = batch * bundle.view.answered
        times = {"slice_ms": round(found.batch_ms / slices, 3), "build_s": round(found.build_s, 1)}
        yield row | {"state": state} | times | {"types": types}


def make(
    bundle: Bundle,
    key: Key,
    folder: Path,
    *,
    trt: ModuleType,
    open_device: Callable[[], Device],
    on_step: Callable[[str, int, int], None] = lambda *_: None,
) -> Plan:
    """Build a plan, hold it against the bundle's golden slices, and keep it if it passes.

    Nothing that failed or was interrupted stays behind, but what it cost to find out (the timing cache).

    Raises
    ------
    BackendError : TensorRT builds none, or one that computes in another precision
    SelfTestFailed, InferenceError : its answers are not the bundle's

    """
    cache = timing_cache(folder, key)
    known = cache.read_bytes() if cache.exists() else b""
    shape = (key.batch, bundle.view.shown, key.height, key.width)
    began = time.perf_counter()
    data, costs = engine.build(trt, bundle.graph(key.precision), key.precision, shape, known, on_step)
    build_s = time.perf_counter() - began
    folder.mkdir(parents=True, exist_ok=True)
    _write(cache, costs)
    report = engine.inspect(trt, engine.deserialize(trt, data))
    layers = engine.layer_types(report)
    engine.check_types(key.precision, layers)
    session = TrtSession(bundle, key.precision, {key.shape: (data, 0.0)}, device=open_device(), trt=trt)
    try:
        worst = self_test(session, bundle)
        batch_ms = _median_ms(session, shape)
    finally:
        session.close()
    plan = Plan(key, hashlib.sha256(data).hexdigest(), layers, build_s, batch_ms, worst)
    _write(folder / f"{key.stem}.plan", data)
    _write(folder / f"{key.stem}.layers", report.encode())
    _write(folder / f"{key.stem}.json", (json.dumps(dataclasses.asdict(plan), indent=2) + "\n").encode())
    return plan


def _median_ms(session: TrtSession, shape: tuple[int, int, int, int]) -> float:
    hu = np.random.default_rng(0).integers(-1000, 1500, shape, dtype=np.int16)
    took = []
    for _ in range(TIMED):
        began = time.perf_counter()
        session.infer(hu)
        took.append(1000 * (time.perf_counter() - began))
    return statistics.median(took)


def open_accepted(
    bundle: Bundle,
    precision: str,
    folder: Path | None = None,
    *,
    on_trial: bool = False,
    is_asked_for: bool = True,
) -> TrtSession:
    """Open the plans that were accepted for a bundle on this GPU.

    Parameters
    ----------
    precision : ``"auto"``: the fastest of those that have passed
    folder : of plans; default: the user's cache

    Raises
    ------
    BackendError : no TensorRT, no GPU, or no plan

    """
    folder = folder or default_folder()
    trt = caps.load()
    device = open_device()
    try:
        plans = _choose(bundle, precision, folder, trt, device.about(), on_trial=on_trial)
        data = {one.key.shape: (load(folder, one.key)[1], one.batch_ms) for one in plans}
        session = TrtSession(bundle, plans[0].key.precision, data, device=device, trt=trt)
    except BaseException:
        device.close()
        raise
    batches = ", ".join(f"{one.key.batch} in {one.batch_ms:.2f} ms" for one in plans)
    fastest = "" if precision != "auto" else ", the fastest that has passed"
    session.why = f"{'asked for' if is_asked_for else 'there are plans for this GPU'}: {batches}{fastest}"
    return session


def _choose(bundle: Bundle, precision: str, folder: Path, trt: ModuleType, gpu: GPU, *, on_trial: bool) -> list[Plan]:
    """Plans of one precision, smallest batch first."""
    if precision != "auto":
        names = [precision]
        if not on_trial:
            bundle.check_ruling(precision)
    else:
        own = [name for name in engine.PRECISIONS if _has(bundle, name)]
        names = own if on_trial else [name for name in own if _has_passed(bundle, name)]
    bases = [Key.of(bundle, name, (1, *SIZE), trt, gpu) for name in names]
    found = [plans for base in bases if (plans := fitting(folder, base))]
    if not found:
        raise BackendError(f"{_why_none(folder, bases[-1])}: run `scanside build`")
    return min(found, key=lambda plans: plans[0].batch_ms)


def _has_passed(bundle: Bundle, precision: str) -> bool:
    try:
        bundle.check_ruling(precision)
    except BundleError:  # the bundle has not that precision, or it has not passed
        return False
    return True


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
    remedy = f"run `scanside build --precision {key.precision} --batch {key.batch}`"
    try:
        plan = _read(path)
        data = path.with_suffix(".plan").read_bytes()
    except FileNotFoundError:
        raise BackendError(f"{_why_none(folder, key)}: {remedy}") from None
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise BackendError(f"{path}: {error}: {remedy}") from None
    if plan.key != key or hashlib.sha256(data).hexdigest() != plan.sha256:
        raise BackendError(f"{path.with_suffix('.plan')}: not what was accepted: {remedy}")
    return plan, data


def _read(path: Path) -> Plan:
    told = json.loads(path.read_text())
    return Plan(**{**told, "key": Key(**told["key"])})


def _why_none(folder: Path, key: Key) -> str:
    """What differs from the plan that is nearest."""
    nearest = min(
        (
            [
                f"{name} {value}, now {getattr(key, name)}"
                for name, value in dataclasses.asdict(one.key).items()
                if value != getattr(key, name)
            ]
            for one in accepted(folder)
            if (one.key.bundle, one.key.precision, one.key.shape) == (key.bundle, key.precision, key.shape)
        ),
        key=len,
        default=None,
    )
    what = f"{folder}: no {key.precision} plan of {key.bundle} for {key.batch} x {key.height} x {key.width}"
    return f"{what}; one is there, of {'; '.join(nearest)}" if nearest else what


def accepted(folder: Path) -> Iterator[Plan]:
    """All accepted plans in a folder, whatever they were built for."""
    for path in sorted(folder.glob("*.json")):
        try:
            yield _read(path)
        except (ValueError, TypeError, KeyError, OSError):  # of another version, or no plan's
            continue


def fitting(folder: Path, key: Key) -> list[Plan]:
    """Accepted plans that differ from the key in their shape alone, smallest batch first."""
    found = (one for one in accepted(folder) if dataclasses.replace(key, **_shape(one.key)) == one.key)
    return sorted(found, key=lambda one: one.key.shape)


def sorted_out(bundle: Bundle, folder: Path, trt: ModuleType, gpu: GPU) -> tuple[list[str], list[str]]:
    """Names of the accepted plans that this bundle can use on this GPU, and of those that it can't."""
    names: tuple[list[str], list[str]] = [], []
    own = {name: Key.of(bundle, name, (1, *SIZE), trt, gpu) for name in engine.PRECISIONS if _has(bundle, name)}
    for one in accepted(folder):
        base = own.get(one.key.precision)
        fits = base is not None and dataclasses.replace(base, **_shape(one.key)) == one.key
        names[not fits].append(f"{one.key.precision} {one.key.batch} x {one.key.height} x {one.key.width}")
    return names


def _has(bundle: Bundle, precision: str) -> bool:
    return precision in bundle.manifest.precisions


def _shape(key: Key) -> dict[str, Any]:
    return {"batch": key.batch, "height": key.height, "width": key.width}


def timing_cache(folder: Path, key: Key) -> Path:
    name = f"timing-{key.tensorrt}-{key.gpu}-{key.capability}.cache"
    return folder / re.sub(r"[^A-Za-z0-9._-]", "-", name)


def _write(path: Path, data: bytes) -> None:
    """Write a file whole, or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            Path(file.name).unlink()
            raise
    Path(file.name).replace(path)
