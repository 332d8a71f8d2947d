"""TensorRT on the GPU at hand: builds, latency beside its floor and its peers, memory, and a clinical verdict.

::

    python -m benchmarks.gpu_suite --out benchmarks/results/gpu [BUNDLE ...]
    python -m benchmarks.gpu_peers res_unet attention_unet ...            (PyTorch on the same machine, where it is)

The first needs what `scanside build` and `scanside verify` need, and no torch. After each bundle it writes what it has
so far: ``results.json``, and a table in ``README.md``.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
from rich.console import Console

from benchmarks.timing import WARM_UP, percentiles, wall_ms
from calibration.samples import Series
from calibration.verify import verify
from calibration.weights import load
from runtime import caps, gpu, plans
from runtime.bundle import SHIPPED, open_bundle
from runtime.device import CudaBindings, PyCuda, open_device
from runtime.engine import PRECISIONS
from runtime.errors import ScansideError
from runtime.session import open_session
from runtime.triage import Rule
from runtime.trt import TrtSession
from training import heads

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from runtime.bundle import Bundle
    from runtime.device import Device

BATCHES = (1, 8, 32)
ROUNDS = 100
RULES = (Rule("critical", ("any",), 30.0), Rule("urgent", ("any",), 0.0))
SLICE = (512, 512)


class WithoutGraphs(CudaBindings):
    """Every call goes to the driver by itself."""

    def capture(self, stream: int, work: Callable[[], None]) -> Callable[[], None]:  # noqa: ARG002
        return work


WAYS: dict[str, Callable[[], Device]] = {
    "cuda-bindings": CudaBindings,
    "without CUDA graphs": WithoutGraphs,
    "pycuda": PyCuda,
}


def machine() -> dict[str, Any]:
    """What this runs on.

    Raises
    ------
    BackendError : no TensorRT or no GPU

    """
    trt, device = caps.load(), open_device()
    told = asdict(device.about()) | {"by": device.library}
    device.close()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        state = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603
    except OSError:
        state = "no nvidia-smi"
    versions = {"tensorrt": trt.__version__, "onnxruntime": onnxruntime.__version__}
    return {"gpu": told, "driver, clock, highest clock, power limit": state, "cpu": cpu, **versions}


def constants(path: Path) -> bytes:
    """A graph with its weights as constants."""
    return load(path).SerializeToString()


def compute_times(session: TrtSession, batch: int, rounds: int) -> list[float]:
    """Milliseconds between two events of the GPU around an engine's run: the floor of any latency."""
    cuda = session._device._cuda  # type: ignore[attr-defined]  # noqa: SLF001  # what it does beside this is what is asked
    runner = session._runners[batch, *SLICE]  # noqa: SLF001
    slot, stream = runner._slots[0], runner._streams[1]  # noqa: SLF001
    (_, begin), (_, end) = cuda.cudaEventCreate(), cuda.cudaEventCreate()
    took = []
    for i in range(rounds + WARM_UP):
        cuda.cudaEventRecord(begin, stream)
        slot.run()
        cuda.cudaEventRecord(end, stream)
        cuda.cudaStreamSynchronize(stream)
        if i >= WARM_UP:
            took.append(cuda.cudaEventElapsedTime(begin, end)[1])
    for event in (begin, end):
        cuda.cudaEventDestroy(event)
    return took


def times(bundle: Bundle, precision: str, folder: Path, way: str) -> dict[str, Any]:
    """Latency and throughput of one precision over one CUDA library.

    Raises
    ------
    ScansideError : there is no plan, or the library is not there

    """
    trt, device = caps.load(), WAYS[way]()
    gpu = device.about()
    keys = [plans.Key.of(bundle, precision, (batch, *SLICE), trt, gpu) for batch in BATCHES]
    try:
        found = {key.shape: plans.load(folder, key, bundle) for key in keys}
    except ScansideError:
        device.close()
        raise
    data = {shape: (data, plan.batch_ms) for shape, (plan, data) in found.items()}
    session = TrtSession(bundle, precision, data, device=device, trt=trt)
    rng = np.random.default_rng(0)
    hu = rng.integers(-1000, 1500, (4 * max(BATCHES), bundle.view.shown, *SLICE), dtype=np.int16)
    told: dict[str, Any] = {"megabytes": round(session.bytes / 1e6, 1)}
    for batch in BATCHES:
        figures = {"wall_ms": wall_ms(lambda batch=batch: session.infer(hu[:batch]), ROUNDS)}
        if isinstance(device, CudaBindings):
            figures["compute_ms"] = percentiles(compute_times(session, batch, ROUNDS))
        told[f"batch {batch}"] = figures
    whole = wall_ms(lambda: session.infer(hu), max(1, ROUNDS // 5))
    told["slices_per_s"] = round(len(hu) * bundle.view.answered / (whole["p50"] / 1e3))
    session.close()
    return told


def measure(bundle: Bundle, folder: Path, held_out: Sequence[Series], say: Callable[[object], None]) -> dict[str, Any]:
    """Builds, times and verdicts of one bundle; what can't be had says why in its place."""
    told: dict[str, Any] = {"bundle": f"{bundle.name} {bundle.version}", "digest": bundle.digest}
    told["engines"] = []
    for row in gpu.make_all(bundle, "best", [(batch, *SLICE) for batch in BATCHES], folder, read=constants):
        say(row)
        told["engines"].append(row)
    told["plan_bytes"] = {path.stem: path.stat().st_size for path in sorted(folder.glob(f"{bundle.name}-*.plan"))}
    told["times"] = {}
    for precision in PRECISIONS:
        for way in WAYS:
            try:
                figures = times(bundle, precision, folder, way)
            except ScansideError as error:
                figures = {"error": str(error)}
            say({f"{precision}, {way}": figures})
            told["times"][f"{precision}, {way}"] = figures
    rng = np.random.default_rng(0)
    hu = rng.integers(-1000, 1500, (1, bundle.view.shown, *SLICE), dtype=np.int16)
    for backend in ("onnxruntime", "onnxruntime-cuda"):
        try:
            session = open_session(bundle, backend)
            told["times"][backend] = {"batch 1": {"wall_ms": wall_ms(lambda one=session: one.infer(hu), 10)}}
        except ScansideError as error:
            told["times"][backend] = {"error": str(error)}
    told["verdicts"] = {}
    try:
        there, _ = gpu.to_judge(bundle, folder, writing=False)
        verdicts = verify(bundle, held_out, RULES, on_gpu=there, plans=folder)
        told["verdicts"] = {name: asdict(one) for name, one in verdicts.items()}
    except ScansideError as error:
        told["no_verdict"] = str(error)
    return told


PAGE = """# TensorRT on a GPU

Made by `python -m benchmarks.gpu_suite` on {gpu} ({cpu}; TensorRT {tensorrt}, {by}). `wall`: HU of 512 x 512 in the
host's memory as int16 to labels in the host's memory, pre- and post-processing included. `compute`: between two events
of the GPU around the engine alone. Medians of {rounds}. Weights are trained on phantoms alone; the verdict is on
{held_out} phantoms.

{table}

Every percentile, the engines' layers by type, plan sizes and reasons are in `results.json`.
"""


def table(bundles: Sequence[Mapping[str, Any]]) -> str:
    """The figures as Markdown."""
    heads_ = [f"{kind} {batch}, ms" for batch in BATCHES for kind in ("compute", "wall")]
    lines = [
        f"| network | | {' | '.join(heads_)} | slices/s | verdict |",
        "|---|---|" + "---:|" * (len(heads_) + 1) + "---|",
    ]
    for one in bundles:
        for name, figures in one["times"].items():
            cells = []
            for batch in BATCHES:
                each = figures.get(f"batch {batch}", {})
                cells += [str(each.get(kind, {}).get("p50", "")) for kind in ("compute_ms", "wall_ms")]
            verdict = one["verdicts"].get(name.partition(",")[0])
            ruled = "" if verdict is None else "passed" if verdict["passed"] else "failed"
            row = [f"`{one['bundle']}`", name, *cells, str(figures.get("slices_per_s", "")), ruled]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def write(told: Mapping[str, Any], held_out: int, folder: Path) -> None:
    """``results.json`` and ``README.md``."""
    (folder / "results.json").write_text(json.dumps(told, indent=2) + "\n")
    about = told["machine"]
    page = PAGE.format(
        gpu=about["gpu"]["name"],
        by=about["gpu"]["by"],
        cpu=about["cpu"],
        tensorrt=about["tensorrt"],
        rounds=ROUNDS,
        held_out=held_out,
        table=table(told["bundles"]),
    )
    (folder / "README.md").write_text(page)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"))
    arguments.add_argument("--plans", type=Path, help="default: plans in --out")
    arguments.add_argument("--held-out", type=int, default=12, help="phantoms to verify on")
    arguments.add_argument("bundles", nargs="*", type=Path, help="default: the one that ships")
    asked = arguments.parse_args()
    if asked.held_out < 1:
        arguments.error(f"--held-out {asked.held_out}: a verdict needs one head at least")
    try:
        _run(asked)
    except ScansideError as error:
        arguments.exit(error.exit_code, f"{arguments.prog}: {error}\n")


def _run(asked: argparse.Namespace) -> None:
    bundles = [open_bundle(folder) for folder in asked.bundles or [SHIPPED]]
    told: dict[str, Any] = {"machine": machine(), "bundles": []}
    folder = asked.plans or asked.out / "plans"
    plans.make_writable(folder)
    asked.out.mkdir(parents=True, exist_ok=True)
    cases = heads.unseen(asked.held_out, asked.held_out // 3, first=heads.FIRST_VERIFICATION)
    held_out = [Series.of(case.name, case.images, case.spacing_mm[1:], case.thickness_mm, "phantom") for case in cases]
    console = Console(width=160)
    for bundle in bundles:
        told["bundles"].append(measure(bundle, folder, held_out, console.print))
        write(told, len(held_out), asked.out)


if __name__ == "__main__":
    main()
