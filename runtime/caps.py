"""What differs between TensorRT 8.6, 10.3 to 10.16 and 11: here, and nowhere else.

Types are the graph's (`calibration.half`). From 10.12 on a network is strongly typed and keeps them. Before, a builder
chooses types by speed; flags allow it FP16 and INT8, and a constraint on each layer holds it to what the graph says.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from runtime.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

OLDEST, TOO_NEW = (8, 6), (12,)
TELL_EVERY_S = 0.5
STRONGLY_TYPED_SINCE = (10, 12)  # it exists since 9.1, but not for every layer


def load() -> ModuleType:
    """Import TensorRT.

    Raises
    ------
    BackendError : it is not installed, a library of it is missing, or its version is another one

    """
    try:
        import tensorrt  # noqa: PLC0415  # where there is a GPU
    except ImportError as error:
        missing = "it is not installed" if getattr(error, "name", None) == "tensorrt" else str(error)
        raise BackendError(
            f"TensorRT: {missing}: in scanside's checkout, pip install '.[gpu]', or where it comes with the system "
            "(Jetson) make the environment with --system-site-packages"
        ) from None
    numbers = _version(tensorrt)
    if not OLDEST <= numbers < TOO_NEW:
        raise BackendError(f"TensorRT {tensorrt.__version__}: this version of scanside knows 8.6 to 11")
    return tensorrt


def is_strongly_typed(trt: ModuleType) -> bool:
    return _version(trt) >= STRONGLY_TYPED_SINCE


def create_network(trt: ModuleType, builder: Any) -> Any:
    """An empty network, strongly typed where that is dependable."""
    flags = trt.NetworkDefinitionCreationFlag
    if is_strongly_typed(trt):
        return builder.create_network(1 << int(flags.STRONGLY_TYPED))
    return builder.create_network(1 << int(flags.EXPLICIT_BATCH))


def hold_to_types(trt: ModuleType, network: Any, config: Any, precision: str) -> None:
    """See to it that a builder computes what the graph says; of FP32 no TF32, which has FP16's mantissa.

    A layer beside Q or DQ is left alone: a constraint there would keep it from being computed on bytes.
    """
    config.clear_flag(trt.BuilderFlag.TF32)
    if is_strongly_typed(trt) or precision == "fp32":
        return
    for name in ("FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS"):
        if name != "INT8" or precision == "int8":
            config.set_flag(getattr(trt.BuilderFlag, name))
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    kinds = trt.LayerType
    on_bytes = {layer.get_output(0).name for layer in layers if layer.type == kinds.DEQUANTIZE}
    on_bytes |= {layer.get_input(0).name for layer in layers if layer.type == kinds.QUANTIZE}
    free = {kinds.QUANTIZE, kinds.DEQUANTIZE, kinds.CONSTANT, kinds.SHAPE, kinds.CAST, kinds.IDENTITY}
    for layer in layers:
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
        beside = any(one is not None and one.name in on_bytes for one in (*inputs, *outputs))
        floats = all(one.dtype in (trt.float32, trt.float16) and not one.is_shape_tensor for one in outputs)
        if layer.type not in free and floats and not beside:
            layer.precision = outputs[0].dtype
            for i, one in enumerate(outputs):
                layer.set_output_type(i, one.dtype)


def use_own_kernels(trt: ModuleType, config: Any) -> None:
    """Take TensorRT's kernels alone: cuBLAS and cuDNN, which 8.6 would load, are neither needed nor shipped."""
    sources = trt.TacticSource
    config.set_tactic_sources(1 << int(sources.EDGE_MASK_CONVOLUTIONS) | 1 << int(sources.JIT_CONVOLUTIONS))


def watch(trt: ModuleType, config: Any, on_step: Callable[[str, int, int], None]) -> None:
    """Tell of a build's progress, where the version can: phase, steps done, steps in all. 8.6 tells nothing.

    Of the outermost phases alone, and not often: the builder waits for the answer while it times kernels.
    """
    if not hasattr(trt, "IProgressMonitor"):
        return

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}
            self.told = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.steps and time.monotonic() - self.told > TELL_EVERY_S:
                self.told = time.monotonic()
                on_step(phase_name, step + 1, self.steps[phase_name])
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    config.progress_monitor = Monitor()


def activation_bytes(engine: Any) -> int:
    """What an execution context of it will take on the GPU beside weights, inputs and outputs."""
    for name in ("device_memory_size_v2", "device_memory_size"):
        if hasattr(engine, name):
            return getattr(engine, name)
    return 0


def _version(trt: ModuleType) -> tuple[int, ...]:
    return tuple(int(part) for part in trt.__version__.split(".")[:2])
