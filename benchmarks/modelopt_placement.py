"""Our Q/DQ for TensorRT beside NVIDIA's: which inputs of which operators each of them quantises.

nvidia-modelopt patches onnxruntime while it works and pins other versions of it, so it gets an environment of its own::

    pip install --no-deps --target MODELOPT nvidia-modelopt onnx-graphsurgeon polygraphy onnxslim onnxconverter-common \
        cppimport lief ml_dtypes nvidia-ml-py pulp regex safetensors tqdm
    PYTHONPATH=MODELOPT python -m benchmarks.modelopt_placement --out benchmarks/results/modelopt_placement.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx

from calibration import placement
from calibration.activations import observe
from calibration.weights import load
from runtime.bundle import open_bundle

COMPARED = ("Conv", "ConvTranspose", "Add", "Concat", "MaxPool", "Resize")


def quantised(model: onnx.ModelProto) -> dict[str, tuple[bool, ...]]:
    """Of each operator's data and kernel, whether they come from a DequantizeLinear."""
    back = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    data = {"Conv": 2, "ConvTranspose": 2, "Add": 2, "Concat": None, "MaxPool": 1, "Resize": 1}
    return {
        node.name: tuple(name in back for name in node.input[: data[node.op_type]])
        for node in model.graph.node
        if node.op_type in COMPARED
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--bundle", type=Path, help="default: the one that ships")
    arguments.add_argument("--out", type=Path, required=True)
    asked = arguments.parse_args()
    from modelopt.onnx.quantization import quantize  # noqa: PLC0415  # in an environment of its own

    bundle = open_bundle(asked.bundle)
    model, (hu, _) = load(bundle.graph("fp32")), bundle.golden()
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "fp32.onnx", Path(folder) / "theirs.onnx"
        onnx.save(model, source)
        quantize(
            str(source),
            quantize_mode="int8",
            calibration_data={"hu": hu[:1].astype(np.int32)},
            calibration_method="max",
            calibration_eps=["cpu"],
            high_precision_dtype="fp32",
            output_path=str(made),
        )
        theirs = quantised(onnx.load(made))
    seen = observe(model, placement.tensors(model), hu)
    ours = quantised(placement.for_tensorrt(model, placement.spans(model, seen, "minmax"), placement.layers(model)))
    kinds = {node.name: node.op_type for node in model.graph.node}
    differing = {
        name: {"ours": mine, "theirs": theirs.get(name)} for name, mine in ours.items() if mine != theirs.get(name)
    }
    told = {
        "bundle": f"{bundle.name} {bundle.version}",
        "nvidia-modelopt": metadata.version("nvidia-modelopt"),
        "operators": {kind: sum(kinds[name] == kind for name in ours) for kind in COMPARED},
        "alike": {kind: sum(kinds[n] == kind for n in ours if n not in differing) for kind in COMPARED},
        "differing": differing,
    }
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(told, indent=2) + "\n")
    print(json.dumps({key: told[key] for key in ("operators", "alike")}, indent=2))


if __name__ == "__main__":
    main()
