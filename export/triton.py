"""A model repository for NVIDIA Triton from a bundle: the same graph, with its shapes, batches and warm-up.

https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/model_repository.html
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from calibration.weights import load
from export.graph import ExportError
from runtime.manifest import PROCESSOR

if TYPE_CHECKING:
    from pathlib import Path

    from runtime.bundle import Bundle

MOST_SLICES = 32  # in one batch
WARM = (1, 8, 32)  # batches of 512 x 512 that are run before the first request
CONFIG = """\
# {name} {version}, {precision}: {intended_use}
# trained on: {training_data}
name: "{model}"
backend: "onnxruntime"
max_batch_size: {most}
input [ {{ name: "hu" data_type: TYPE_INT32 dims: [ {ahead}{shown}, -1, -1 ] }} ]
output [
  {{ name: "labels" data_type: TYPE_UINT8 dims: [ {ahead}-1, -1 ] }},
  {{ name: "voxels" data_type: TYPE_FP32 dims: [ {ahead}{classes} ] }},
  {{ name: "evidence" data_type: TYPE_FP32 dims: [ {ahead}{classes} ] }}
]
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
{batching}parameters {{ key: "sha256" value {{ string_value: "{digest}" }} }}
"""
WARM_UP = """\
model_warmup [ {{
  name: "{batch} slices" batch_size: {batch}
  inputs {{ key: "hu" value {{ data_type: TYPE_INT32 dims: [ {ahead}{shown}, 512, 512 ] zero_data: true }} }}
}} ]
"""


def write(bundle: Bundle, precision: str, repository: Path) -> Path:
    """Write ``NAME/config.pbtxt`` and ``NAME/1/model.onnx``, which holds its own weights.

    For processors: what a GPU computes no verdict here is about. A volume's batch has no fixed share of answers: Triton
    then gets no batches to make.

    Raises
    ------
    NotVerified : a precision that has not passed
    ExportError : the repository has a model of this name, or the precision is not one for processors

    """
    bundle.check_ruling(precision)
    if precision not in PROCESSOR:
        raise ExportError(f"{precision} is TensorRT's, and no verdict of this machine is about it: choose another")
    model = f"{bundle.name}-{precision}".replace("-", "_")
    folder = repository / model
    if folder.exists():
        raise ExportError(f"{folder} is there already: remove it or name another repository")
    graph = load(bundle.graph(precision))
    batches = bundle.view.answered == 1
    ahead = "" if batches else "-1, "
    shapes = {"ahead": ahead, "shown": bundle.view.shown}
    warm = [WARM_UP.format(batch=batch, **shapes) for batch in WARM] if batches else []
    config = CONFIG.format(
        name=bundle.name,
        version=bundle.version,
        precision=precision,
        intended_use=bundle.intended_use,
        training_data=" ".join(bundle.training_data.split()),
        model=model,
        most=MOST_SLICES if batches else 0,
        classes=len(bundle.classes),
        batching="dynamic_batching { }\n" + "".join(warm) if batches else "",
        digest=bundle.digest,
        **shapes,
    )
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.onnx").write_bytes(graph.SerializeToString())
    (folder / "config.pbtxt").write_text(config)
    return folder
