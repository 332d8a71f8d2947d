"""TensorRT on the GPU at hand: builds, latency beside its floor, memory, and the clinical verdict on each precision.

::

    python -m benchmarks.gpu --out benchmarks/results/gpu [BUNDLE ...]

Needs what `scanside build` and `scanside verify` need, and no torch.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
from rich.console import Console

from calibration.samples import Series
from calibration.verify import verify
from dicom_node.config import Config
from runtime import caps, plans
from runtime.bundle import SHIPPED, open_bundle
from runtime.device import open_device
from runtime.engine import PRECISIONS
from runtime.errors import ScansideError
from runtime.session import open_session
from runtime.triage import Rule
from training import heads

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from runtime.bundle import Bundle
    from runtime.trt import TrtSession

BATCHES = (1, 8, 32)
ROUNDS = 100
SLICE = (512, 512)


def machine() -> dict[str, Any]:
    """What this runs on."""
    device = open_device()
    told = asdict(device.about()) | {"by": device.library}
    device.close()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.limit", "--format=csv,noheader"]
    state = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603
    return {
        "gpu": told,
        "state": state,
        "cpu": cpu,
        "tensorrt": caps.load().__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def timed(work: Callable[[], object], rounds: int = ROUNDS) -> dict[str, float]:
    """Milliseconds of a call: median, 90th and 99th percentile, after ten to warm up."""
    took = []
    for i in range(rounds + 10):
        began = time.perf_counter()
        work()
        if i >= 10:
            took.append(1e3 * (time.perf_counter() - began))
    return {f"p{p}": round(float(np.percentile(took, p)), 4) for p in (50, 90, 99)}


def floor_ms(session: TrtSession, batch: int, rounds: int = ROUNDS) -> float:
    """Milliseconds of the engine alone: its CUDA graph again and again, nothing copied, the host waiting at the end."""
    runner = session._runners[batch, *SLICE]  # noqa: SLF001  # what a session does beside this is what is asked
    slot, compute = runner._slots[0], runner._streams[1]  # noqa: SLF001
    began = time.perf_counter()
    for _ in range(rounds):
        slot.run()
    session._device.record(slot.done, compute)  # noqa: SLF001
    session._wait(slot.done)  # noqa: SLF001
    return round(1e3 * (time.perf_counter() - began) / rounds, 4)


def measure(bundle: Bundle, folder: Path, held_out: Sequence[Series], say: Callable[[object], None]) -> dict[str, Any]:
    """Builds, times and verdicts of one bundle."""
    rng = np.random.default_rng(0)
    hu = rng.integers(-1000, 1500, (max(BATCHES), bundle.view.shown, *SLICE), dtype=np.int16)
    shapes = [(batch, *SLICE) for batch in BATCHES]
    told: dict[str, Any] = {"bundle": f"{bundle.name} {bundle.version}", "digest": bundle.digest, "engines": []}
    for row in plans.make_all(bundle, "best", shapes, folder):
        say(row)
        told["engines"].append(row)
    told["sessions"] = {}
    for precision in PRECISIONS:
        try:
            session = open_session(bundle, "tensorrt", precision=precision, plans=folder)
        except ScansideError as error:
            told["sessions"][precision] = {"error": str(error)}
            continue
        figures: dict[str, Any] = {"megabytes": round(session.bytes / 1e6, 1)}
        for batch in BATCHES:
            wall = timed(lambda batch=batch, session=session: session.infer(hu[:batch]))
            figures[f"batch_{batch}"] = {"wall_ms": wall, "engine_ms": floor_ms(session, batch)}
        whole = timed(lambda session=session: session.infer(np.concatenate([hu] * 4)), 20)
        figures["slices_per_s"] = round(4 * max(BATCHES) / (whole["p50"] / 1e3))
        session.close()
        say({precision: figures})
        told["sessions"][precision] = figures
    processor = open_session(bundle, "onnxruntime")
    told["onnxruntime_cpu_ms"] = timed(lambda: processor.infer(hu[:1]), 10)
    rules = [Rule(rule.level, rule.classes, rule.volume_ml) for rule in Config().triage]
    verdicts = verify(bundle, held_out, rules, on_gpu=True, plans=folder)
    told["verdicts"] = {name: asdict(one) for name, one in verdicts.items()}
    return told


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"))
    arguments.add_argument("--plans", type=Path, default=Path("/tmp/plans"))  # noqa: S108  # of a machine lent for this
    arguments.add_argument("--held-out", type=int, default=12, help="phantoms to verify on")
    arguments.add_argument("bundles", nargs="*", type=Path, help="default: the one that ships")
    asked = arguments.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    cases = heads.unseen(asked.held_out, asked.held_out // 3, first=heads.FIRST_VERIFICATION)
    held_out = [Series.of(case.name, case.images, case.spacing_mm[1:], case.thickness_mm, "phantom") for case in cases]
    console = Console(width=160)
    told: dict[str, Any] = {"machine": machine(), "bundles": []}
    for folder in asked.bundles or [SHIPPED]:
        told["bundles"].append(measure(open_bundle(folder), asked.plans, held_out, console.print))
        (asked.out / "results.json").write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
