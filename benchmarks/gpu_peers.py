"""PyTorch on the GPU at hand, to compare `benchmarks.gpu_suite` with: eager and compiled, FP16, channels last.

::

    python -m benchmarks.gpu_peers res_unet attention_unet --out benchmarks/results/gpu/peers.json

Needs torch with CUDA and nothing of TensorRT. The same graph around the network, from int16 in the host's memory to
labels there; weights are random.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.timing import wall_ms
from models import catalogue
from models.graph import HeadCT

if TYPE_CHECKING:
    from collections.abc import Callable

BATCHES = (1, 8, 32)
WINDOWS = ((0.0, 90.0), (-60.0, 140.0), (-200.0, 1000.0))


def measure(name: str, grid: int, rounds: int, device: str = "cuda") -> dict[str, Any]:
    """Median milliseconds of each batch size, eager and compiled."""
    network = catalogue.build(name, in_channels=len(WINDOWS)).eval()
    graph = HeadCT(network, WINDOWS, grid).eval().to(device)
    graph.network.to(torch.float16 if device == "cuda" else torch.float32).to(memory_format=torch.channels_last)

    def answer(hu: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = graph.prepare(hu).to(next(graph.network.parameters()).dtype, memory_format=torch.channels_last)
        return graph.answer(graph.network(x).float(), hu)

    told: dict[str, Any] = {}
    for way, run in {"eager": answer, "compiled": torch.compile(answer)}.items():
        for batch in BATCHES:
            hu = np.random.default_rng(0).integers(-1000, 1500, (batch, 1, 512, 512), dtype=np.int16)
            told.setdefault(way, {})[f"batch {batch}"] = wall_ms(lambda hu=hu, run=run: _once(run, hu, device), rounds)
    return told


@torch.inference_mode()
def _once(run: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], hu: np.ndarray, device: str) -> list[np.ndarray]:
    there = torch.from_numpy(hu.astype(np.int32)).to(device, non_blocking=True)
    return [one.cpu().numpy() for one in run(there)]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu/peers.json"))
    arguments.add_argument("--grid", type=int, default=256)
    arguments.add_argument("--rounds", type=int, default=100)
    flat = [name for name, one in catalogue.ARCHITECTURES.items() if one.dimensions == 2]
    arguments.add_argument("networks", nargs="+", choices=flat, metavar="network")
    asked = arguments.parse_args()
    if not torch.cuda.is_available():
        arguments.exit(
            3, f"{arguments.prog}: torch {torch.__version__} has no CUDA here: `nvidia-smi` tells of a GPU\n"
        )
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "grid": asked.grid}
    for name in asked.networks:
        told[name] = measure(name, asked.grid, asked.rounds)
        print(name, told[name], flush=True)
        asked.out.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
