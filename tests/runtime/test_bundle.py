"""Bundles that can be trusted, and those that can't; the engine that opens them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from runtime import seal
from runtime.bundle import SHIPPED, open_bundle
from runtime.errors import BackendError, BundleError, BundleTampered, InferenceError, SelfTestFailed
from runtime.manifest import Manifest
from runtime.ort import OrtSession
from runtime.session import checked, open_session, self_test
from runtime.types import OperatingPoint, SliceLabels
from tests import older_graphs


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return shutil.copytree(SHIPPED, tmp_path / "bundle")


def reseal(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


def test_the_shipped_bundle_is_whole_small_and_says_what_it_was_trained_on():
    bundle = open_bundle()
    assert bundle.classes[0] == "background"
    assert len(bundle.classes) == 7
    assert "phantoms" in bundle.training_data
    assert "not a medical device" in bundle.intended_use
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 12_000_000
    assert json.loads((SHIPPED / "parity.json").read_text())["passed"]
    assert set(json.loads((SHIPPED / "scores.json").read_text())["classes"]) == set(bundle.classes[1:])
    assert "not a medical device" in (SHIPPED / "MODEL_CARD.md").read_text()


def test_of_its_probabilities_it_says_what_its_own_scores_say(copy: Path):
    bundle = open_bundle(copy)
    told = {"bundle": {"digest": bundle.digest}, "calibration": {"expected_error": 0.0254}, "data": "some heads"}
    scores = copy / "scores.json"
    scores.write_text(json.dumps(told))
    assert "0.025" in bundle.calibration
    assert "some heads" in bundle.calibration
    for wrong in (told | {"bundle": {"digest": "0" * 64}}, told | {"calibration": None}, []):
        scores.write_text(json.dumps(wrong))
        assert bundle.calibration == "not calibrated"
    scores.unlink()
    assert bundle.calibration == "not calibrated"


def test_the_manifests_schema_is_what_the_docs_show():
    shown = Path(__file__).parents[2] / "docs" / "manifest.schema.json"
    assert json.loads(shown.read_text()) == Manifest.model_json_schema()


def test_a_bundle_of_the_first_format_loads_and_serves_full_precision(copy: Path):
    manifest = json.loads((copy / "manifest.json").read_text())
    kept = ("name", "version", "intended_use", "training_data", "input", "view", "minimum_volume_ml", "learnt_from")
    old = {key: manifest[key] for key in kept} | {
        "format": "scanside-bundle/1",
        "classes": [one["name"] for one in manifest["classes"]],
        "precisions": {"fp32": "model.onnx"},
        "files": manifest["files"],
    }
    (copy / "manifest.json").write_text(json.dumps(old))
    bundle = open_bundle(copy)
    assert bundle.classes == open_bundle().classes
    assert self_test(open_session(bundle), bundle) <= 1e-3
    with pytest.raises(BundleError, match="no int8-cpu graph, only fp32: `scanside calibrate` makes it"):
        open_session(bundle, precision="int8-cpu")


def test_an_operating_point_of_before_asks_for_a_volume_alone(copy: Path):
    """And leaves a bundle's digest, which is in the UIDs of its results, as it was."""
    manifest = json.loads((copy / "manifest.json").read_text())
    for entry in ("minimum_probability", "minimum_slices"):
        manifest.pop(entry, None)
    manifest["minimum_volume_ml"]["subdural"] = 2.0
    (copy / "manifest.json").write_text(json.dumps(manifest))
    before = open_bundle(copy)
    assert before.operating_point["subdural"] == OperatingPoint(2.0, 0.0, 1)
    reseal(copy, minimum_probability=None, minimum_slices=None)
    assert open_bundle(copy).digest == before.digest
    reseal(copy, minimum_probability={"subdural": 0.9}, minimum_slices={"epidural": 2})
    after = open_bundle(copy)
    assert after.operating_point["subdural"] == OperatingPoint(2.0, 0.9, 1)
    assert after.operating_point["epidural"].minimum_slices == 2
    assert after.digest != before.digest


def test_a_changed_byte_is_noticed(copy: Path):
    raw = bytearray((copy / "model.onnx").read_bytes())
    raw[len(raw) // 2] ^= 1
    (copy / "model.onnx").write_bytes(raw)
    with pytest.raises(BundleTampered, match="model.onnx: SHA-256"):
        open_bundle(copy)


def test_a_file_that_the_manifest_does_not_list_is_refused(copy: Path):
    """It could be weights that a graph refers to."""
    (copy / "unlisted.bin").touch()
    with pytest.raises(BundleError, match=r"unlisted.bin: not in the manifest"):
        open_bundle(copy)


def test_a_change_that_fails_leaves_the_bundle_as_it_was(copy: Path):
    before = {path.name: path.read_bytes() for path in copy.iterdir()}

    def breaks(partial: Path) -> None:
        (partial / "model.onnx").write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        seal.change(copy, breaks)
    with pytest.raises(BundleError, match="budget.dice: Input should be less than or equal to 1"):
        seal.add(copy, {}, budget=json.loads(before["manifest.json"])["budget"] | {"dice": 98})
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert sorted(path.name for path in copy.parent.iterdir()) == ["bundle"]


def test_an_interruption_between_two_names_is_told(copy: Path):
    copy.rename(copy.with_name("bundle.old"))
    with pytest.raises(BundleError, match=r"bundle.old: left by an interruption.* rename it to bundle"):
        seal.make(copy, lambda _: {})


def test_the_digest_changes_with_anything(copy: Path):
    before = open_bundle(copy).digest
    reseal(copy, version="9")
    assert open_bundle(copy).digest != before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), "is no bundle: manifest.json"),
        (lambda f: (f / "manifest.json").write_text("{"), "is no JSON"),
        (lambda f: reseal(f, format="scanside-bundle/9"), "is in format 'scanside-bundle/9'.* export it again"),
        (lambda f: (f / "manifest.json").write_text("[]"), "is in format None"),
        (lambda f: reseal(f, classes="many", version=3), r"version: Input should.*; classes: Input should"),
        (lambda f: reseal(f, classes=[{"name": "background"}]), "classes: Tuple should have at least 2 items"),
        (lambda f: reseal(f, colour="red"), "colour: Extra inputs are not permitted"),
        (lambda f: reseal(f, minimum_volume_ml={}), "no minimum_volume_ml for intracerebral"),
        (lambda f: reseal(f, minimum_slices={"subdural": 0}), "minimum_slices.subdural: Input should be greater"),
        (lambda f: reseal(f, minimum_probability={"subdural": 1.1}), "minimum_probability.subdural: Input should be"),
        (
            lambda f: reseal(f, minimum_probability={"hygroma": 0.5}),
            "minimum_probability for hygroma: there is no",
        ),
        (lambda f: (f / "golden.npz").unlink(), "golden.npz: No such file"),
        (lambda f: reseal(f, precisions={"fp32": "elsewhere.onnx"}), "elsewhere.onnx without a hash"),
        (lambda f: reseal(f, precisions={"fp16": "model.fp16.onnx"}), "no fp32 graph"),
        (lambda f: reseal(f, precisions={"fp32": "../model.onnx"}), "precisions.fp32: String should match"),
        (lambda f: reseal(f, files={"../manifest.json": "0" * 64}), "files.*String should match"),
    ],
)
def test_what_is_no_bundle_is_refused_by_name(copy: Path, spoil, message: str):
    spoil(copy)
    with pytest.raises(BundleError, match=message):
        open_bundle(copy)


@pytest.mark.parametrize("key", ["classes", "intended_use", "training_data", "budget"])
def test_a_key_that_is_missing_is_named(copy: Path, key: str):
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest[key]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=f"{key}: Field required"):
        open_bundle(copy)


@pytest.mark.parametrize(
    "view",
    [{}, {"shown": 3}, {"shown": 3, "answered": 0}, {"shown": "3", "answered": 1}, {"shown": True, "answered": 1}],
)
def test_a_view_is_two_counts(copy: Path, view: dict[str, object]):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["view"] = view
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"view\.(shown|answered): "):
        open_bundle(copy)


def test_the_engine_answers_the_golden_slices_one_by_one_and_in_a_batch():
    bundle = open_bundle()
    session = open_session(bundle)
    assert self_test(session, bundle) <= 1e-3
    hu, expected = bundle.golden()
    assert (expected > 0).any(), "golden slices without blood test nothing"
    for one, truth in zip(hu, expected, strict=True):
        (answer,) = session.infer(one[None])
        assert (answer.labels != truth).mean() <= 1e-3
        assert answer.voxels.sum() == truth.size
        assert (np.bincount(answer.labels.ravel(), minlength=7) == answer.voxels).all()
    session.close()


@pytest.mark.parametrize("shape", [(1, 256, 256), (2, 768, 512), (1, 1024, 1024)])
def test_slices_of_any_size_keep_their_size(shape: tuple[int, int, int]):
    bundle = open_bundle()
    hu = np.full((shape[0], bundle.view.shown, *shape[1:]), -1000, np.int16)
    answers = open_session(bundle).infer(hu)
    assert [answer.labels.shape for answer in answers] == [shape[1:]] * shape[0]
    assert all(not answer.labels.any() for answer in answers), "blood in air"


def test_an_engine_that_answers_differently_fails_the_self_test():
    bundle = open_bundle()
    session = open_session(bundle)
    honest = session.infer
    session.infer = lambda hu: honest(hu + np.int16(25))  # a calibration gone wrong
    with pytest.raises(SelfTestFailed, match="differ from PyTorch"):
        self_test(session, bundle)


def test_the_engine_that_says_what_is_right_of_another_size_is_closed(monkeypatch: pytest.MonkeyPatch):
    closed = []
    monkeypatch.setattr(OrtSession, "close", lambda one, work=OrtSession.close: (closed.append(one), work(one)))
    bundle = open_bundle()
    session = open_session(bundle)
    session.sizes = ((64, 96),)
    assert self_test(session, bundle) <= 1e-3
    assert len(closed) == 1
    assert session not in closed
    session.close()


def test_a_graph_that_counts_pixels_still_answers(copy: Path):
    older = open_bundle(older_graphs.bundle(copy, 7))
    session = open_session(older)
    assert self_test(session, older) <= 1e-3
    assert [one.name for one in session._session.get_outputs()] == ["labels", "evidence", "voxels"]
    session.close()


def test_an_unknown_backend_is_refused():
    with pytest.raises(BackendError, match="'cuda' is not one of"):
        open_session(open_bundle(), "cuda")


def test_a_graph_that_is_no_graph_is_refused(copy: Path):
    import hashlib

    (copy / "model.onnx").write_bytes(b"nonsense")
    files = json.loads((copy / "manifest.json").read_text())["files"]
    reseal(copy, files=files | {"model.onnx": hashlib.sha256(b"nonsense").hexdigest()})
    with pytest.raises(BackendError, match="does not take the graph"):
        open_session(open_bundle(copy))


@pytest.mark.parametrize("evidence", [[np.nan, 1], [np.inf, 1], [3, 0], [1, -0.5], [0, 0], [0.4, 0.5]], ids=str)
def test_evidence_that_is_no_probability_is_refused(evidence: list[float]):
    with pytest.raises(InferenceError, match="no probability"):
        checked(np.zeros((2, 4, 4), np.uint8), np.array([[1, 0], evidence], np.float32), 2, (2, 4, 4))


def test_answers_to_other_slices_than_were_asked_for_are_refused():
    evidence = np.array([[1, 0]], np.float32)
    with pytest.raises(InferenceError, match=r"answers of shape \(1, 4, 4\)"):
        checked(np.zeros((1, 4, 4), np.uint8), evidence, 2, (2, 4, 4))
    with pytest.raises(InferenceError, match="label 255 of 2 classes"):
        checked(np.full((1, 4, 4), 255, np.uint8), evidence, 2, (1, 4, 4))


def test_a_class_that_vanishes_fails_the_self_test_however_few_its_pixels_are():
    bundle = open_bundle()
    session = open_session(bundle)
    honest = session.infer
    _, expected = bundle.golden()
    counts = np.bincount(expected.ravel(), minlength=7)
    assert (counts[1:] >= 300).all(), "golden slices that show enough of every class"
    for c in range(1, 7):

        def without(hu: np.ndarray, lost: int = c) -> list[SliceLabels]:
            made = []
            for one in honest(hu):
                labels = np.where(one.labels == lost, 0, one.labels).astype(np.uint8)
                made.append(SliceLabels(labels, np.bincount(labels.ravel(), minlength=7), one.evidence.copy()))
            return made

        session.infer = without
        with pytest.raises(SelfTestFailed, match=rf"0 pixels of {bundle.classes[c]} in the golden slices|differ"):
            self_test(session, bundle)


def test_the_cuda_provider_is_no_other_in_silence():
    with pytest.raises(BackendError, match=r"ONNX Runtime .* has .*, not CUDAExecutionProvider: .* onnxruntime-gpu"):
        open_session(open_bundle(), "onnxruntime-cuda")
    with pytest.raises(BackendError, match="int8-cpu is not for onnxruntime-cuda: it takes fp32, fp16"):
        open_session(open_bundle(), "onnxruntime-cuda", precision="int8-cpu")


@pytest.mark.parametrize("version", ["8.5.3", "12.0.0", "7.2"])
def test_a_tensorrt_that_nobody_tried_is_refused(version: str, monkeypatch: pytest.MonkeyPatch):
    from types import ModuleType

    from runtime import caps

    module = ModuleType("tensorrt")
    module.__version__ = version
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    with pytest.raises(BackendError, match=f"TensorRT {version}: this version of scanside knows 8.6 to 11"):
        caps.load()
