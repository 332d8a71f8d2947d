"""From a typed ONNX graph to an engine of TensorRT, and what the engine says it really computes in."""

from __future__ import annotations

import json
import re
import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from runtime import caps
from runtime.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import ModuleType

PRECISIONS = ("fp32", "fp16", "int8")
# what each backend takes, on any machine. A processor would compute FP16 in FP32, and INT8 placed for TensorRT slower
TAKES = {
    "tensorrt": PRECISIONS,
    "onnxruntime": ("fp32", "int8-cpu"),
    "onnxruntime-cuda": ("fp32", "fp16"),
    "triton": (*PRECISIONS, "int8-cpu"),
}
NAMES = {"fp32": ("fp32", "float"), "fp16": ("fp16", "half"), "int8": ("int8",)}  # in the inspector's report
WORKSPACE = 1 << 30
LEAST_SHARE = 1 / 3  # of the convolutions in the asked precision: calibration leaves some out
NO_REASON = "it gives no reason"
OUTPUTS = ("labels", "evidence")  # of `models.graph.HeadCT.forward`
COUNTS = "voxels"  # pixels per class: an output of older bundles that nobody asks for


def build(
    trt: ModuleType,
    graph: bytes,
    precision: str,
    shape: tuple[int, int, int, int],
    timing_cache: bytes = b"",
    on_step: Callable[[str, int, int], None] = lambda *_: None,
) -> tuple[bytes, bytes]:
    """Build an engine for one shape on the GPU that is there.

    Parameters
    ----------
    graph : ONNX, weights within, and every kernel a constant: TensorRT reads none behind a Cast
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
    builder = _made(trt, trt.Builder, logger)
    network = caps.create_network(trt, builder)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph):
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise BackendError(f"TensorRT {trt.__version__} does not take the graph: {errors}")
    network.get_input(0).shape = shape  # static: the inspector tells no types of others, and no CUDA graph holds them
    for one in [network.get_output(i) for i in range(network.num_outputs)]:
        if one.name == COUNTS:
            network.unmark_output(one)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or the inspector tells no types
    caps.use_own_kernels(trt, config)
    caps.hold_to_types(trt, network, config, precision)
    if not config.set_timing_cache(config.create_timing_cache(timing_cache), ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)  # of another GPU: begin anew
    caps.watch(trt, config, on_step)
    with _interruptible():
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BackendError(f"TensorRT {trt.__version__} built no engine: {Logger.reason()}")
    return bytes(plan), bytes(config.get_timing_cache().serialize())


def deserialize(trt: ModuleType, plan: bytes) -> Any:
    """A plan's engine.

    Raises
    ------
    BackendError : TensorRT does not take it

    """
    logger = Logger.of(trt)
    engine = _made(trt, trt.Runtime, logger).deserialize_cuda_engine(plan)
    if engine is None:
        raise BackendError(f"TensorRT {trt.__version__} does not take the plan: {Logger.reason()}")
    return engine


def _made(trt: ModuleType, kind: Any, logger: Any) -> Any:
    """A Builder or a Runtime: without a device that this TensorRT knows the bindings give a TypeError."""
    try:
        return kind(logger)
    except TypeError as error:
        raise BackendError(
            f"TensorRT {trt.__version__} finds no GPU: {Logger.reason()} ({error}): is it built for the driver's CUDA? "
            "`nvidia-smi` tells which that is"
        ) from None


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C end the process: within a build TensorRT swallows what Python raises."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def inspect(trt: ModuleType, engine: Any) -> str:
    """What an engine says of its layers, as JSON."""
    return engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)


def layer_types(report: str) -> dict[str, int]:
    """How many of an engine's convolutions compute in each type, by the inspector's report.

    By what they read, or by their weights where a report tells that. Of an engine without layers of that name, all.
    """
    layers = [one for one in json.loads(report).get("Layers", ()) if isinstance(one, dict)]
    found = dict.fromkeys(PRECISIONS, 0)
    for layer in [one for one in layers if "conv" in one.get("LayerType", "").lower()] or layers:
        first = next(iter(layer.get("Inputs", ())), {})
        told = (
            first.get("Format/Datatype", first.get("DataType", "")),
            dict(layer.get("Weights") or {}).get("Type", ""),
        )
        words = re.split(r"[^a-z0-9]+", " ".join(map(str, told)).lower())
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
    least = 1.0 if precision == "fp32" else LEAST_SHARE
    if not layers[precision] or layers[precision] < least * sum(layers.values()):
        raise BackendError(f"asked for {precision}, and of the engine's convolutions are {told}: it is not accepted")


class Logger:
    """TensorRT's logger: one for the process, as it wants. It keeps the first error, which is the cause of the rest."""

    _one: Any = None

    @classmethod
    def of(cls, trt: ModuleType) -> Any:
        """Return the logger, with nothing in it yet."""
        if cls._one is None:

            class Kept(trt.ILogger):
                first = NO_REASON

                def log(self, severity: Any, msg: str) -> None:
                    if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR) and self.first == NO_REASON:
                        self.first = msg

            cls._one = Kept()
        cls._one.first = NO_REASON
        return cls._one

    @classmethod
    def reason(cls) -> str:
        """What TensorRT said first since `of`."""
        return NO_REASON if cls._one is None else cls._one.first
