"""A model repository for NVIDIA Triton from a bundle: the same graph, with its shapes, batches, warm-up and hashes.

https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/model_repository.html
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from export.errors import ExportError
from runtime import plans
from runtime.kserve import BUNDLE, CHECKED, GRAPH, PRECISION, model_name
from runtime.manifest import PROCESSOR

if TYPE_CHECKING:
    from collections.abc import Sequence

    from runtime.bundle import Bundle
    from runtime.plans import Plan

Engine = Literal["onnxruntime", "python", "tensorrt"]
ENGINES = get_args(Engine)
MOST_SLICES = 32  # in one batch
WARM = (1, 8, 32)  # batches of 512 x 512 that are run before the first request
INSTANCES = 2  # of a plan, on each GPU: one copies while the other computes
THREADS = "intra_op_thread_count"  # Triton's name for it; 0 takes all cores
PYTHON = Path(__file__).with_name("python_backend.py")
CONFIG = """\
# {about}
# trained on: {training_data}
name: "{model}"
backend: "{engine}"
max_batch_size: {most}
input [ {{ name: "hu" data_type: TYPE_INT32 dims: [ {shown} ] }} ]
output [
  {{ name: "labels" data_type: TYPE_UINT8 dims: [ {labels} ] }},
  {{ name: "evidence" data_type: TYPE_FP32 dims: [ {classes} ] }}
]
"""
WARM_UP = """\
model_warmup [ {{
  name: "{batch} slices" batch_size: {batch}
  inputs {{ key: "hu" value {{ data_type: TYPE_INT32 dims: [ {dims} ] zero_data: true }} }}
}} ]
"""
GPU = """\
instance_group [ {{ count: {instances} kind: KIND_GPU }} ]
optimization {{ cuda {{
  graphs: true busy_wait_events: true
  graph_spec [ {{ batch_size: 0 input {{ key: "hu" value {{ dim: [ {dims} ] }} }} }} ]
}} }}
"""


@dataclass(slots=True)
class _Model:
    """What goes into a model's folder."""

    shown: str  # dimensions of the input, as the configuration has them
    answered: str  # those before H and W of the labels, and before the classes of the rest
    most: int
    size: str = "-1, -1"
    lines: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)


def write(
    bundle: Bundle,
    precision: str,
    repository: Path,
    *,
    engine: Engine = "onnxruntime",
    threads: int = 0,
    folder: Path | None = None,
    size: tuple[int, int] = plans.SIZE,
) -> Path:
    """Write ``NAME/config.pbtxt`` and ``NAME/1/``, with a graph that holds its own weights, or with plans.

    A volume's batch has no fixed share of answers, and a plan has one shape: Triton then gets no batches to make.

    Parameters
    ----------
    engine : Triton's backend: of ONNX Runtime, of Python, which runs the same graph by ONNX Runtime, both on the
        processor; or of TensorRT, for the plans that were accepted
    threads : for the processor's engines; 0 takes all cores
    folder : of plans; default: the user's cache
    size : (H, W) of the plans

    Raises
    ------
    NotVerified : a precision that has not passed
    BackendError : ONNX Runtime does not take the graph
    ExportError : the repository has a model of this name, the precision is not for the engine, or there is no plan

    """
    bundle.check_ruling(precision)
    name = model_name(bundle, precision)
    target = repository / name
    if target.exists():
        raise ExportError(f"{target} is there already: remove it or name another repository")
    if engine == "tensorrt":
        model = _of_plans(bundle, _plans(bundle, precision, folder or plans.default_folder(), size))
    elif precision in PROCESSOR:
        model = _of_graph(bundle, precision, engine, threads)
    else:
        raise ExportError(f"{precision} is TensorRT's: choose {' or '.join(PROCESSOR)}, or --engine tensorrt")
    classes = f"{model.answered}{len(bundle.classes)}"
    text = CONFIG.format(
        about=f"{bundle.name} {bundle.version}, {precision}: {bundle.intended_use}",
        training_data=" ".join(bundle.training_data.split()),
        model=name,
        engine=engine,
        most=model.most,
        shown=f"{model.shown}, {model.size}",
        labels=f"{model.answered}{model.size}",
        classes=classes,
    )
    hashes = {BUNDLE: bundle.digest, GRAPH: bundle.sha256(precision), PRECISION: precision}
    hashes |= {f"sha256 {file}": hashlib.sha256(data).hexdigest() for file, data in model.files.items()}
    (target / "1").mkdir(parents=True)
    for file, data in model.files.items():
        (target / "1" / file).write_bytes(data)
    text += "".join([*model.lines, *(_parameter(key, value) for key, value in hashes.items())])
    (target / "config.pbtxt").write_text(text)
    return target


def _of_graph(bundle: Bundle, precision: str, engine: Engine, threads: int) -> _Model:
    from calibration.weights import load  # noqa: PLC0415  # wants onnx, which plans do not
    from runtime.ort import OrtSession  # noqa: PLC0415  # as above

    OrtSession(bundle, precision).close()  # what can't answer here can't there
    shown, batches = str(bundle.view.shown), bundle.view.answered == 1
    model = _Model(shown, "", MOST_SLICES) if batches else _Model(f"-1, {shown}", "-1, ", 0)
    model.lines += ["instance_group [ { count: 1 kind: KIND_CPU } ]\n", _parameter(THREADS, str(threads))]
    if batches:
        model.lines.append("dynamic_batching { }\n")
        warm = WARM[:1] if engine == "python" else WARM  # which runs each request by itself
        model.lines += [WARM_UP.format(batch=batch, dims=f"{shown}, 512, 512") for batch in warm]
    model.files["model.onnx"] = load(bundle.graph(precision)).SerializeToString()
    if engine == "python":
        model.files["model.py"] = PYTHON.read_bytes()
        model.lines.append(_parameter(CHECKED, "model.py"))
    return model


def _of_plans(bundle: Bundle, found: Sequence[tuple[Plan, bytes]]) -> _Model:
    """One model of the plans for several GPUs: Triton takes that of the GPU's compute capability."""
    _, height, width = found[0][0].key.shape
    model = _Model(f"1, {bundle.view.shown}", f"{bundle.view.answered}, ", 0, f"{height}, {width}")
    dims = f"{model.shown}, {model.size}"
    model.lines += [GPU.format(instances=INSTANCES, dims=dims), WARM_UP.format(batch=1, dims=dims)]
    for plan, data in found:
        file = f"model.{plan.key.capability}.plan"
        model.lines.append(f'cc_model_filenames {{ key: "{plan.key.capability}" value: "{file}" }}\n')
        model.lines.append(_parameter(f"tensorrt {plan.key.capability}", plan.key.tensorrt))
        model.files[file] = data
    return model


def _plans(bundle: Bundle, precision: str, folder: Path, size: tuple[int, int]) -> list[tuple[Plan, bytes]]:
    """Accepted plans for one slice, of each compute capability."""
    found = [
        one
        for one in plans.accepted(folder)
        if (one.key.bundle, one.key.precision, one.key.sha256) == (bundle.name, precision, bundle.sha256(precision))
        and (one.key.format, one.key.shape) == (plans.FORMAT, (1, *size))
    ]
    if not found:
        wanted = "--precision", precision, "--batch", "1", "--size", f"{size[0]}x{size[1]}"
        remedy = plans.command("build", bundle, folder, *wanted)
        raise ExportError(f"{folder}: no {precision} plan of {bundle.name} for one slice of {size}: {remedy}")
    by_gpu: dict[str, Plan] = {}
    for one in found:
        if one.verdict != "passed":
            remedy = plans.command("verify", bundle, folder, "--tensorrt")
            raise ExportError(one.failed or f"{one.key} on {one.key.gpu} is not yet judged: {remedy}")
        other = by_gpu.setdefault(one.key.capability, one)
        if other is not one:
            raise ExportError(
                f"{folder}: two plans for compute capability {one.key.capability}, of TensorRT {other.key.tensorrt} "
                f"and {one.key.tensorrt}: keep that of the server's TensorRT, {other.key.stem} or {one.key.stem}"
            )
    return [plans.load(folder, one.key, bundle) for one in by_gpu.values()]


def _parameter(key: str, value: str) -> str:
    return f"parameters {{ key: {json.dumps(key)} value {{ string_value: {json.dumps(value)} }} }}\n"
