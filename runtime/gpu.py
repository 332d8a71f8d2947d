"""Plans on the GPU at hand: built, tried, opened, ruled upon."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import statistics
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime import caps, engine, plans
from runtime.device import open_device
from runtime.errors import BackendError, BundleError, DeviceLost, InferenceError, SelfTestFailed
from runtime.plans import SIZE, Key, Plan
from runtime.session import self_test
from runtime.trt import TrtSession

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path
    from types import ModuleType

    from runtime.bundle import Bundle
    from runtime.device import GPU
    from runtime.verdict import Verdict

TIMED = 30  # batches


def make_all(
    bundle: Bundle,
    precision: str,
    shapes: Sequence[tuple[int, int, int]],
    folder: Path,
    *,
    read: Callable[[Path], bytes],
    again: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[dict[str, Any]]:
    """Build plans for the GPU at hand.

    Parameters
    ----------
    precision : one of the bundle's for TensorRT, or ``"best"``: all that have passed
    shapes : ``(batch, H, W)``
    read : gives a graph with its weights as constants
    again : build also what is there
    tell : told what is done just now

    Yields
    ------
    for each precision and shape what became of it: ``state`` is built, there already or failed, which a plan is too
    that `scanside verify` has something against

    Raises
    ------
    BackendError : no TensorRT, no GPU, or a folder that can't be written
    BundleError, NotVerified : a precision that the bundle has not, or that has not passed

    """
    names = passed(bundle)[0] if precision == "best" else [precision]
    for name in names:
        if name not in engine.PRECISIONS:
            raise BundleError(f"{name}: TensorRT's precisions are {', '.join(engine.PRECISIONS)}, or say best")
        bundle.check_ruling(name)
    trt = caps.load()
    gpu = _gpu()
    plans.make_writable(folder)
    for name, shape in itertools.product(names, shapes):
        key = Key.of(bundle, name, shape, trt, gpu)
        batch, height, width = shape
        row: dict[str, Any] = {"precision": name, "batch": batch, "size": f"{height}x{width}"}
        what = f"{name}, batch {batch}, {height} x {width}"
        tell(what)
        state = "there already"
        try:
            found = None if again else _there(folder, key, bundle)
            if found is None:
                state = "built"
                found = make(
                    bundle,
                    key,
                    folder,
                    trt=trt,
                    read=read,
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


def _there(folder: Path, key: Key, bundle: Bundle) -> Plan | None:
    try:
        found, _ = plans.load(folder, key, bundle)
    except BackendError:
        return None
    if found.failed:
        raise BackendError(f"{found.failed}: use --again")
    return found


def make(
    bundle: Bundle,
    key: Key,
    folder: Path,
    *,
    trt: ModuleType,
    read: Callable[[Path], bytes],
    on_step: Callable[[str, int, int], None] = lambda *_: None,
) -> Plan:
    """Build a plan, hold it against the bundle's golden slices, and keep it if it passes.

    `read` gives a graph with its weights as constants (`calibration.weights.load`, serialised).

    The record comes last, so that nothing which failed or was interrupted is ever taken for a plan. What an engine cost
    to build (the timing cache) is kept, whatever becomes of it.

    Raises
    ------
    BackendError : TensorRT builds none, or one that computes in another precision
    SelfTestFailed, InferenceError : its answers are not the bundle's

    """
    cache = plans.timing_cache(folder, key)
    known = cache.read_bytes() if cache.exists() else b""
    shape = (key.batch, bundle.view.shown, key.height, key.width)
    began = time.perf_counter()
    data, costs = engine.build(trt, read(bundle.graph(key.precision)), key.precision, shape, known, on_step)
    build_s = time.perf_counter() - began
    plans.write(cache, costs)
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
    plans.write(folder / f"{key.stem}.plan", data)
    plans.write(folder / f"{key.stem}.layers", report.encode())
    plans.keep(folder, plan)
    return plan


def _median_ms(session: TrtSession, shape: tuple[int, int, int, int]) -> float:
    hu = np.random.default_rng(0).integers(-1000, 1500, shape, dtype=np.int16)
    took = []
    for _ in range(TIMED):
        began = time.perf_counter()
        session.infer(hu)
        took.append(1000 * (time.perf_counter() - began))
    return statistics.median(took)


def to_judge(bundle: Bundle, folder: Path, *, writing: bool) -> tuple[list[str], list[str]]:
    """Precisions that have plans for this GPU, and those of the bundle that have none.

    Parameters
    ----------
    writing : the verdict is to be written (`rule`)

    Raises
    ------
    BackendError : no TensorRT, no GPU, no plan at all, one that is damaged, or a folder that can't be written

    """
    trt = caps.load()
    gpu = _gpu()
    bases = [Key.of(bundle, n, (1, *SIZE), trt, gpu) for n in engine.PRECISIONS if n in bundle.manifest.precisions]
    found = [one.key for key in bases for one in plans.fitting(folder, key, on_trial=True)]
    if not found:
        raise BackendError(f"{plans.why_none(folder, bases)}: {plans.command('build', bundle, folder)}")
    for key in found:
        plans.load(folder, key, bundle)
    if writing:
        plans.make_writable(folder)
    there = {key.precision: None for key in found}
    return list(there), [key.precision for key in bases if key.precision not in there]


def rule(folder: Path, bundle: Bundle, verdicts: Mapping[str, Verdict]) -> int:
    """Write into this GPU's plans what has been decided of them; gives their number."""
    trt, gpu = caps.load(), _gpu()
    count = 0
    for precision, verdict in verdicts.items():
        if not verdict.is_decided:
            continue
        for one in plans.fitting(folder, Key.of(bundle, precision, (1, *SIZE), trt, gpu), on_trial=True):
            plans.keep(folder, dataclasses.replace(one, verdict="passed" if verdict.passed else tuple(verdict.reasons)))
            count += 1
    return count


def open_accepted(
    bundle: Bundle,
    precision: str,
    folder: Path | None = None,
    *,
    on_trial: bool = False,
    why: str = "asked for",
) -> TrtSession:
    """Open the plans that were accepted for a bundle on this GPU.

    Parameters
    ----------
    precision : ``"auto"``: the fastest of those that have passed
    folder : of plans; default: the user's cache
    why : they are opened, for `Session.why`

    Raises
    ------
    BackendError : no TensorRT, no GPU, no plan, or a precision that is not TensorRT's

    """
    trt = caps.load()
    folder = folder or plans.default_folder()
    device = open_device()
    try:
        chosen = _choose(bundle, precision, folder, trt, device.about(), on_trial=on_trial)
        data = {one.key.shape: (plans.load(folder, one.key, bundle)[1], one.batch_ms) for one in chosen}
    except BaseException:
        device.close()
        raise
    batches = ", ".join(f"{one.key.batch} in {one.batch_ms:.2f} ms" for one in chosen)
    why = f"{why}: {batches}{', the fastest' if precision == 'auto' else ''}"
    if any(one.verdict is None for one in chosen):
        why += f"; not yet judged: {plans.command('verify', bundle, folder, '--tensorrt')}"
    build = partial(plans.command, "build", bundle, folder)
    # which owns the device from here on
    return TrtSession(bundle, chosen[0].key.precision, data, device=device, trt=trt, why=why, build=build)


def _choose(bundle: Bundle, precision: str, folder: Path, trt: ModuleType, gpu: GPU, *, on_trial: bool) -> list[Plan]:
    """Plans of one precision, smallest batch first."""
    if precision == "auto":
        names, wanted = passed(bundle)[0], ()
    else:
        names, wanted = [precision], ("--precision", precision)
        if not on_trial:
            bundle.check_ruling(precision)
    bases = [Key.of(bundle, name, (1, *SIZE), trt, gpu) for name in names]
    found = [some for base in bases if (some := plans.fitting(folder, base, on_trial=on_trial))]
    if not found:
        anew = any(one.failed for base in bases for one in plans.fitting(folder, base, on_trial=True))
        remedy = plans.command("build", bundle, folder, *wanted, *["--again"] * anew)
        raise BackendError(f"{plans.why_none(folder, bases)}: {remedy}")
    usual = [some for some in found if any(one.key.shape[1:] == SIZE for one in some)] or found
    shared = set.intersection(*({one.key.shape for one in some} for some in usual))

    def slice_ms(some: list[Plan]) -> float:
        one = next((one for one in some if one.key.shape in shared), some[0])
        return one.batch_ms / one.key.batch

    return min(usual, key=slice_ms)


def passed(bundle: Bundle) -> tuple[list[str], list[str]]:
    """TensorRT's precisions that may be served, and why each of the others may not."""
    names, others = [], []
    for name in engine.PRECISIONS:
        try:
            bundle.check_ruling(name)
        except BundleError as error:  # the bundle has not that precision, or it has not passed
            others.append(str(error))
        else:
            names.append(name)
    return names, others


def _gpu() -> GPU:
    device = open_device()
    try:
        return device.about()
    finally:
        device.close()
