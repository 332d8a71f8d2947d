"""Build and run over the real classes of one TensorRT, none of which can be made without a GPU: mocks with their names.

Run by `test_bindings` in a process of its own. Whatever scanside calls or sets must exist in this version; what it sets
is printed as JSON.
"""

from __future__ import annotations

import json
import re
import sys
from types import ModuleType
from unittest.mock import create_autospec

import numpy as np
import tensorrt_bindings as real

from runtime import caps, engine
from runtime.bundle import open_bundle
from runtime.device import CudaBindings
from runtime.errors import InferenceError
from runtime.trt import TrtSession
from tests.runtime.stand_ins import Cuda

SHAPE = (2, 1, 64, 64)


SPECS: list[tuple[str, object]] = []
CHECKED: set[str] = set()


def spec(name: str) -> object:
    one = create_autospec(getattr(real, name), instance=True, spec_set=True)
    SPECS.append((name, one))
    return one


def signatures(owner: type, name: str) -> list[tuple[list[str], int]]:
    """Names of a bound method's parameters, and how many of them have no default, from pybind11's docstring."""
    found = re.findall(rf"\b{name}\((.*?)\) -> ", getattr(owner, name).__doc__ or "")
    told = []
    for text in found:
        parameters = [one.strip() for one in re.split(r",(?![^\[]*\])", text)][1:]  # without self
        told.append(
            (
                [one.partition(":")[0] for one in parameters],
                sum("=" not in one for one in parameters),
            )
        )
    return told


def misfits() -> list[str]:
    """Calls that were made of the mocks and fit no signature of the real method."""
    wrong = []
    for owner, one in SPECS:
        for name, given, named in one.method_calls:
            fits = [
                len(given) + len(named) <= len(names)
                and len(given) + len(named) >= needed
                and set(named) <= set(names[len(given) :])
                for names, needed in signatures(getattr(real, owner), name)
            ]
            if "." not in name and fits and not any(fits):
                wrong.append(f"{owner}.{name}{given}{named}")
            CHECKED.update([f"{owner}.{name}"] if fits else [])
    return wrong


def tensor(name: str, dtype: object) -> object:
    one = spec("ITensor")
    one.name, one.dtype, one.is_shape_tensor = name, dtype, False
    return one


def layer(kind: str, inputs: list[object], outputs: list[object]) -> object:
    one = spec("ILayer")
    one.type = getattr(real.LayerType, kind)
    one.num_inputs, one.num_outputs = len(inputs), len(outputs)
    one.get_input.side_effect = inputs.__getitem__
    one.get_output.side_effect = outputs.__getitem__
    return one


def network() -> tuple[object, dict[str, object]]:
    """HU through a convolution in FP16, a quantised one, and a reduction in FP32."""
    hu, half = tensor("hu", real.int32), tensor("half", real.float16)
    bytes_, back = tensor("bytes", real.int8), tensor("back", real.float32)
    full, counted = tensor("full", real.float32), tensor("counted", real.float32)
    layers = {
        "first": layer("CONVOLUTION", [hu], [half]),
        "sum": layer("REDUCE", [half], [counted]),
        "quantise": layer("QUANTIZE", [counted], [bytes_]),
        "dequantise": layer("DEQUANTIZE", [bytes_], [back]),
        "quantised": layer("CONVOLUTION", [back], [full]),
    }
    one = spec("INetworkDefinition")
    one.num_layers = len(layers)
    one.get_layer.side_effect = list(layers.values()).__getitem__
    one.get_input.side_effect = [hu].__getitem__
    outputs = [tensor(name, full.dtype) for name in ("labels", "voxels", "evidence")]
    one.num_outputs, one.get_output.side_effect = len(outputs), outputs.__getitem__
    return one, layers


def module(builder: object, engine_: object) -> ModuleType:
    """TensorRT with what needs a GPU replaced."""
    trt = ModuleType("tensorrt")
    trt.__dict__.update(vars(real))
    parser, runtime = spec("OnnxParser"), spec("Runtime")
    parser.parse.return_value = True
    runtime.deserialize_cuda_engine.return_value = engine_
    trt.Builder = lambda _: builder
    trt.OnnxParser = lambda *_: parser
    trt.Runtime = lambda _: runtime
    return trt


def built(precision: str) -> dict[str, object]:
    builder, config = spec("Builder"), spec("IBuilderConfig")
    found, layers = network()
    trt = module(builder, spec("ICudaEngine"))
    builder.create_network.return_value = found
    builder.create_builder_config.return_value = config
    builder.build_serialized_network.return_value = b"plan"
    config.set_timing_cache.side_effect = [False, True]
    config.get_timing_cache.return_value.serialize.return_value = b"times"
    assert engine.build(trt, b"graph", precision, SHAPE) == (b"plan", b"times")
    assert found.get_input(0).shape == SHAPE
    assert [call.args[0].name for call in found.unmark_output.call_args_list] == ["voxels"]
    return {
        "network": builder.create_network.call_args.args[0],
        "set": [call.args[0].name for call in config.set_flag.call_args_list],
        "cleared": [call.args[0].name for call in config.clear_flag.call_args_list],
        "held": {
            name: one.precision.name
            for name, one in layers.items()
            if isinstance(getattr(one, "precision", None), real.DataType)
        },
    }


def ran() -> str:
    """Open a session and infer: an engine that does nothing leaves the poison."""
    found, context = spec("ICudaEngine"), spec("IExecutionContext")
    types = {"labels": real.uint8, "evidence": real.float32}
    shapes = {"labels": (2, 64, 64), "evidence": (2, 7)}
    found.get_tensor_dtype.side_effect = types.__getitem__
    found.create_execution_context.return_value = context
    for name in ("device_memory_size_v2", "device_memory_size"):
        if hasattr(found, name):
            setattr(found, name, 1 << 20)
    found.get_tensor_shape.side_effect = lambda name: real.Dims(shapes[name])
    for name in ("set_tensor_address", "execute_async_v3"):
        getattr(context, name).return_value = True
    found.create_engine_inspector.return_value.get_engine_information.return_value = "{}"
    trt = module(spec("Builder"), found)
    assert engine.inspect(trt, found) == "{}"
    assert caps.activation_bytes(found) == 1 << 20
    cuda = Cuda()
    session = TrtSession(
        open_bundle(), "fp16", {(2, 64, 64): (b"plan", 1.0)}, device=CudaBindings(runtime=cuda), trt=trt
    )
    try:
        session.infer(np.zeros(SHAPE, np.int16))
    except InferenceError as error:
        return str(error)
    finally:
        session.close()
    return "nothing"


sys.modules["tensorrt"] = real
print(
    json.dumps(
        {
            "version": caps.load().__version__,
            "typed": caps.is_strongly_typed(real),
            "tells_progress": hasattr(real, "IProgressMonitor"),
            "builds": {precision: built(precision) for precision in engine.PRECISIONS},
            "ran": ran(),
            "misfits": misfits(),
            "checked": sorted(CHECKED),
        }
    )
)
