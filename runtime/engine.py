"""From a typed ONNX graph to an engine of TensorRT, and what the engine says it really computes in."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from runtime import caps
from runtime.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from types import ModuleType

PRECISIONS = ("fp32", "fp16", "int8")
NAMES = {"fp32": ("fp32", "float"), "fp16": ("fp16", "half"), "int8": ("int8",)}  # in the inspector's report
WORKSPACE = 1 << 30
OUTPUTS = ("labels", "voxels", "evidence")


def build(
    trt: ModuleType,
    graph: Path,
    precision: str,
    shape: tuple[int, int, int, int],
    timing_cache: bytes = b"",
    on_step: Callable[[str, int, int], None] = lambda *_: None,
) -> tuple[bytes, bytes]:
    """Build an engine for one shape on the GPU that is there.

    Parameters
    ----------
    graph : ONNX, with its weights beside it
    precision : that its types are
    shape : of the input, ``(batch, shown, H, W)``
    on_step : told of progress (`runtime.caps.watch`)

    Returns
    -------
    the plan, and the timing cache as it is now

    Raises
    ------
    BackendError : TensorRT does not take the graph, or finds no kernel for it

    """
    logger = Logger.of(trt)
    builder = trt.Builder(logger)
    network = caps.create_network(trt, builder)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise BackendError(f"{graph}: TensorRT {trt.__version__} does not take the graph: {errors}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or the inspector tells no types
    caps.use_own_kernels(trt, config)
    caps.hold_to_types(trt, network, config, precision)
    profile = builder.create_optimization_profile()
    profile.set_shape(network.get_input(0).name, shape, shape, shape)
    config.add_optimization_profile(profile)
    if not config.set_timing_cache(config.create_timing_cache(timing_cache), ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)  # of another GPU: begin anew
    watcher = caps.watch(trt, config, on_step)
    plan = builder.build_serialized_network(network, config)
    del watcher  # the builder holds no reference
    if plan is None:
        raise BackendError(f"{graph}: TensorRT {trt.__version__} built no engine: {logger.last}")
    return bytes(plan), bytes(config.get_timing_cache().serialize())


def deserialize(trt: ModuleType, plan: bytes) -> Any:
    """A plan's engine.

    Raises
    ------
    BackendError : TensorRT does not take it

    """
    logger = Logger.of(trt)
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        raise BackendError(f"TensorRT {trt.__version__} does not take the plan: {logger.last}: `scanside build` again")
    return engine


def inspect(trt: ModuleType, engine: Any) -> str:
    """What an engine says of its layers, as JSON."""
    return engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)


def layer_types(report: str) -> dict[str, int]:
    """How many of an engine's convolutions compute in each type, by the inspector's report.

    By what they read, for no report names another type. Of an engine without layers of that name, all layers.
    """
    layers = [one for one in json.loads(report).get("Layers", ()) if isinstance(one, dict)]
    found = dict.fromkeys(PRECISIONS, 0)
    for layer in [one for one in layers if "conv" in one.get("LayerType", "").lower()] or layers:
        first = next(iter(layer.get("Inputs", ())), {})
        words = re.split(r"[^a-z0-9]+", str(first.get("Format/Datatype", first.get("DataType", ""))).lower())
        for precision, names in NAMES.items():
            if any(name in words for name in names):
                found[precision] += 1
                break
    return found


def check_types(precision: str, layers: Mapping[str, int]) -> None:
    """Refuse an engine that computes in another precision than was asked for.

    Raises
    ------
    BackendError

    """
    told = ", ".join(f"{count} in {name}" for name, count in layers.items() if count) or "none that tells its type"
    if not layers[precision] or (precision == "fp32" and layers["fp16"] + layers["int8"]):
        raise BackendError(f"asked for {precision}, and of the engine's convolutions are {told}: it is not accepted")


class Logger:
    """TensorRT's logger: one for the process, as it wants. It keeps the last error for our own messages."""

    _one: Any = None

    @classmethod
    def of(cls, trt: ModuleType) -> Any:
        if cls._one is None:

            class Kept(trt.ILogger):
                last = "it gives no reason"

                def log(self, severity: Any, msg: str) -> None:
                    if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                        self.last = msg

            cls._one = Kept()
        return cls._one
