"""Networks that others trained: an ONNX file, a PyTorch module of one's own."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from export import bundle as bundles
from export.errors import ExportError
from export.foreign import surround
from models.graph import HeadCT
from runtime.bundle import open_bundle
from runtime.errors import NotVerified
from runtime.session import open_session, self_test
from runtime.types import OperatingPoint
from training.recipe import Contract, RecipeError, load

POINT = OperatingPoint(0.5)
CONTRACT = """
name = "theirs"
version = "2"
training_data = "40 head CTs of one hospital"
licence = "CC-BY-4.0"
classes = ["background", "intracerebral", "subdural"]
[input]
windows_hu = [[0, 80], [-20, 180]]
grid = 64
"""


CODES = """
[codes.hygroma]
finding = { value = "1", scheme = "99SITE", meaning = "Hygroma" }
site = { value = "2", scheme = "99SITE", meaning = "Dura" }
"""


class Theirs(nn.Module):
    """As MONAI's UNet does: strided convolutions down, transposed ones up, a skip, PReLU."""

    def __init__(self, channels: int = 2, classes: int = 3) -> None:
        super().__init__()
        self.config = type("Config", (), {"classes": classes})()
        self.down = nn.Sequential(nn.Conv2d(channels, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.PReLU())
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 8, 2, 2), nn.PReLU())
        self.head = nn.Conv2d(8 + channels, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.up(self.down(x)), x], 1))


def network(**sizes: int) -> Theirs:
    torch.manual_seed(1)
    return Theirs(**sizes).eval()


def contract(tmp_path: Path, text: str = CONTRACT) -> Contract:
    (tmp_path / "contract.toml").write_text(text)
    return load(tmp_path / "contract.toml", Contract)


@pytest.fixture
def golden() -> np.ndarray:
    rng = np.random.default_rng(4)
    return np.kron(rng.normal(40, 60, (3, 1, 12, 12)), np.ones((8, 8))).astype(np.int16)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:ONNX export mode")
def write(path: Path, module: nn.Module, *, channels: int = 2, opset: int = 17) -> Path:
    buffer = io.BytesIO()
    asked = torch.zeros(1, channels, 64, 64)
    axes = {"image": {0: "batch"}, "logits": {0: "batch"}}
    torch.onnx.export(
        module, (asked,), buffer, input_names=["image"], output_names=["logits"], dynamic_axes=axes,
        opset_version=opset, dynamo=False,
    )  # fmt: skip
    path.write_bytes(buffer.getvalue())
    return path


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("opset", [13, 17])
def test_a_network_in_onnx_becomes_a_bundle_that_answers_as_it_did(tmp_path: Path, golden: np.ndarray, opset: int):
    said = contract(tmp_path)
    graph, model = surround(write(tmp_path / "theirs.onnx", network(), opset=opset), said)
    parity = bundles.write(said, graph, golden, tmp_path / "bundle", point=POINT, learnt_from="unknown", model=model)
    assert parity["passed"]
    bundle = open_bundle(tmp_path / "bundle")
    assert (bundle.name, bundle.manifest.licence, bundle.learnt_from) == ("theirs", "CC-BY-4.0", "unknown")
    assert set(bundle.manifest.precisions) == {"fp32", "fp16"}
    with pytest.raises(NotVerified):
        bundle.check_ruling("fp16")
    session = open_session(bundle)
    assert self_test(session, bundle) < 1e-4
    with torch.no_grad():
        expected = HeadCT(network(), said.input.windows_hu, 64).eval()(torch.from_numpy(golden.astype(np.int32)))[0]
    for answer, truth in zip(session.infer(golden), expected.numpy(), strict=True):
        assert (answer.labels != truth).mean() < 1e-3
    assert len({int(c) for c in np.unique(expected)}) > 1


def test_ones_own_module_becomes_a_bundle(tmp_path: Path, golden: np.ndarray):
    """The lines that docs/export.md shows."""
    said = contract(tmp_path)
    graph = HeadCT(network(), said.input.windows_hu, said.input.grid).eval()
    assert bundles.write(said, graph, golden, tmp_path / "b", point=POINT, learnt_from="unknown")["passed"]
    assert open_session(open_bundle(tmp_path / "b")).infer(golden)


def test_codes_of_a_contract_reach_every_answer(tmp_path: Path, golden: np.ndarray):
    said = contract(tmp_path, (CONTRACT + CODES).replace("intracerebral", "hygroma"))
    graph = HeadCT(network(), said.input.windows_hu, said.input.grid).eval()
    bundles.write(said, graph, golden, tmp_path / "b", point=POINT, learnt_from="unknown")
    own = open_session(open_bundle(tmp_path / "b")).identity.codes
    assert own.keys() == {"hygroma"}
    assert own["hygroma"].finding.meaning == "Hygroma"


def test_a_single_logit_is_blood_of_two_classes(tmp_path: Path, golden: np.ndarray):
    text = CONTRACT.replace('"intracerebral", "subdural"', '"any"')
    said = contract(tmp_path, text)
    graph, model = surround(write(tmp_path / "one.onnx", network(classes=1)), said)
    assert bundles.write(said, graph, golden, tmp_path / "b", point=POINT, model=model)["passed"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 3}, r"does not take an input of shape \(2, 2, 64, 64\), as theirs shows it \(2 windows"),
        ({"classes": 5}, r"answers with \(2, 5, 64, 64\): theirs has 3 classes"),
        ({"classes": 1}, r"answers with \(2, 1, 64, 64\): theirs has 3 classes"),
    ],
)
def test_a_network_that_does_not_fit_its_contract_is_refused(tmp_path: Path, change: dict[str, int], message: str):
    path = write(tmp_path / "x.onnx", network(**change), channels=change.get("channels", 2))
    with pytest.raises(ExportError, match=message):
        surround(path, contract(tmp_path))


@pytest.mark.parametrize(("said", "answered"), [(3, 5), (7, 3), (1, 1)])
def test_a_module_that_answers_for_other_classes_is_refused(
    tmp_path: Path, golden: np.ndarray, said: int, answered: int
):
    module = network(classes=answered)
    module.config.classes = said
    wanted = contract(tmp_path) if answered != 3 else contract(tmp_path, CONTRACT.replace(', "subdural"', ""))
    graph = HeadCT(module, wanted.input.windows_hu, 64).eval()
    with pytest.raises(ExportError, match=r"the network answers with \d logits; theirs has [23] classes"):
        bundles.write(wanted, graph, golden, tmp_path / "b", point=POINT)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(("last", "classes"), [(nn.Softmax(dim=1), 3), (nn.Sigmoid(), 1)])
def test_probabilities_are_not_taken_for_logits(tmp_path: Path, golden: np.ndarray, last: nn.Module, classes: int):
    module = network(classes=classes)
    module.head = nn.Sequential(module.head, last)
    said = contract(tmp_path, CONTRACT.replace('"intracerebral", "subdural"', '"any"') if classes == 1 else CONTRACT)
    graph, model = surround(write(tmp_path / "p.onnx", module), said)
    with pytest.raises(ExportError, match="answers with probabilities, as after a softmax or a sigmoid"):
        bundles.write(said, graph, golden, tmp_path / "b", point=POINT, model=model)


def test_a_network_for_one_slice_at_a_time_is_refused(tmp_path: Path):
    buffer = io.BytesIO()
    torch.onnx.export(network(), (torch.zeros(1, 2, 64, 64),), buffer, opset_version=17, dynamo=False)
    (tmp_path / "one.onnx").write_bytes(buffer.getvalue())
    with pytest.raises(ExportError, match=r"takes batches of 1 alone: export it with a dynamic first axis"):
        surround(tmp_path / "one.onnx", contract(tmp_path))


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ('["intracerebral", "background"]', "the first is \"background\", not 'intracerebral'"),
        ('["background", "subdural", "subdural"]', "classes: subdural is there twice"),
    ],
)
def test_classes_are_background_and_then_others(tmp_path: Path, classes: str, message: str):
    with pytest.raises(RecipeError, match=message):
        contract(tmp_path, CONTRACT.replace('["background", "intracerebral", "subdural"]', classes))


def test_what_is_no_onnx_is_refused_by_name(tmp_path: Path):
    said = contract(tmp_path)
    (tmp_path / "text.onnx").write_text("hello")
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(ExportError, match="nowhere.onnx: No such file"):
        surround(tmp_path / "nowhere.onnx", said)
    for name in ("text", "empty"):
        with pytest.raises(ExportError, match=f"{name}.onnx: no valid ONNX model"):
            surround(tmp_path / f"{name}.onnx", said)
    two = onnx.load(write(tmp_path / "two.onnx", network()))
    two.graph.output.append(two.graph.output[0])
    two.graph.output[1].name = two.graph.node[0].output[0]
    onnx.save(two, tmp_path / "two.onnx")
    with pytest.raises(ExportError, match="1 inputs and 2 outputs"):
        surround(tmp_path / "two.onnx", said)


def test_a_contract_is_read_as_strictly_as_a_recipe(tmp_path: Path):
    with pytest.raises(RecipeError, match="learning_rate"):
        contract(tmp_path, "learning_rate = 3\n" + CONTRACT)
    with pytest.raises(RecipeError, match="codes of hygroma, which is no class"):
        contract(tmp_path, CONTRACT + CODES)
    with pytest.raises(RecipeError, match="grid"):
        contract(tmp_path, CONTRACT.replace("grid = 64", ""))
