"""The command line as a user meets it: what it prints, what it ends with, what it says when something is wrong."""

from __future__ import annotations

import errno
import json
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from pydicom import dcmread
from pynetdicom import AE, evt
from pynetdicom.sop_class import CTImageStorage

import scanside as commands
from runtime.bundle import SHIPPED, open_bundle

CORPUS = Path(__file__).parents[2] / "shared" / "corpus"
real_data = pytest.mark.skipif(
    not CORPUS.exists(), reason="the corpus of real DICOM is not here: real data is NOT tested"
)


def scanside(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scanside", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, cwd=cwd)


def refused(shown: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """A user's error: the code, one message on stderr, no traceback, nothing on stdout."""
    said = " ".join(shown.stderr.split())
    assert shown.returncode == code, shown.stderr
    assert "Traceback" not in said
    assert shown.stdout == ""
    for word in words:
        assert word in said, said


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("series") / "head"
    shown = scanside("phantom", folder, "--lesion", "ich:20", "--lesion", "sdh:15", "--spacing", "5", "--tilt", "-15")
    assert shown.returncode == 0, shown.stderr
    return folder


def test_the_phantom_tells_its_truth_beside_a_legal_series(series: Path):
    truth = json.loads((series / "truth.json").read_text())
    assert truth["volume_ml"]["intracerebral"] == pytest.approx(20, rel=0.01)
    images = sorted(series.glob("*.dcm"))
    assert truth["slices"] == len(images)
    if shutil.which("dciodvfy"):
        shown = subprocess.run(["dciodvfy", "-new", str(images[3])], capture_output=True, text=True, check=False)
        assert not [line for line in (shown.stdout + shown.stderr).splitlines() if line.startswith("Error")]


def test_the_phantom_as_one_enhanced_ct_tells_its_truth_and_is_analysed(tmp_path: Path):
    head = tmp_path / "head"
    shown = scanside("phantom", head, "--lesion", "ich:40", "--slices", 14, "--spacing", 10, "--enhanced")
    assert shown.returncode == 0, shown.stderr
    truth = json.loads((head / "truth.json").read_text())
    assert len(list(head.glob("*.dcm"))) == 1
    (series,) = json.loads(scanside("analyse", head, "--out", tmp_path / "out", "--json").stdout)["series"]
    assert (series["files"], series["report"]["slices"], truth["slices"]) == (1, 14, 14)
    found = {finding["name"]: finding["volume_ml"] for finding in series["report"]["findings"]}
    assert found["intracerebral"] == pytest.approx(truth["volume_ml"]["intracerebral"], rel=0.2)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ((), 3, ("TensorRT: it is not installed", "pip install '.[gpu]'")),
        (("--precision", "int4"), 2, ("int4: TensorRT's precisions are fp32, fp16, int8, or say best",)),
        (("--batch", "1,none"), 2, ("--batch 1,none: write 1,8,32",)),
        (("--size", "512"), 2, ("--size 512: write 512x512",)),
        (("no-bundle",), 2, ("no-bundle is no bundle",)),
    ],
)
def test_build_says_what_is_wrong_or_missing(options: tuple[str, ...], code: int, words: tuple[str, ...]):
    refused(scanside("build", *options), code, *words)


def test_analyse_looks_at_the_folder_for_results_before_the_work(series: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    refused(scanside("analyse", series, "--out", "file", cwd=tmp_path), 2, "file is not a folder: choose another")


def test_analyse_does_the_nodes_work_on_a_folder(series: Path, tmp_path: Path):
    shown = scanside("analyse", series, "--out", tmp_path / "out", "--json")
    assert shown.returncode == 0, shown.stderr
    told = json.loads(shown.stdout)
    (one,) = told["series"]
    assert one["state"] == "analysed"
    assert {Path(name).name for name in told["not_dicom"]} == {"truth.json", "truth.npz"}
    assert {"sr", "seg", "sc-1"} <= one["results"].keys()
    assert all(Path(path).exists() for path in one["results"].values())
    assert one["report"]["decision"]["level"] == "critical"
    refused(scanside("analyse", series, "--out", tmp_path / "out"), 2, "holds the results of an earlier run")


def test_analyse_takes_the_nodes_own_rules_and_names_what_it_could_not_read(series: Path, tmp_path: Path):
    shutil.copytree(series, tmp_path / "head")
    first, *_ = sorted((tmp_path / "head").glob("*.dcm"))
    first.write_bytes(first.read_bytes()[:-20_000])
    rules = '[[triage]]\nlevel = "urgent"\nclasses = ["any"]\nvolume_ml = 0\n'
    results = '[results]\nsegmentation = "labelmap"\npdf = true\n'
    codes = '[[codes]]\nname = "intracerebral"\nfinding = ["ICH", "99SITE", "A"]\nsite = ["1", "99SITE", "B"]\n'
    (tmp_path / "node.toml").write_text(f"[series]\nmin_coverage_mm = 0\n{results}{rules}{codes}")
    arguments = ("analyse", tmp_path / "head", "--out", tmp_path / "out", "--config", tmp_path / "node.toml")
    shown = scanside(*arguments)
    assert shown.returncode == 0, shown.stderr
    assert f"not analysed: {first}: a truncated file" in shown.stdout
    assert "triage: urgent" in shown.stdout
    (folder,) = (tmp_path / "out").iterdir()
    assert dcmread(folder / "seg.dcm", stop_before_pixels=True).SegmentationType == "LABELMAP"
    assert dcmread(folder / "pdf.dcm").EncapsulatedDocument.startswith(b"%PDF")
    assert "99SITE" in str(dcmread(folder / "sr.dcm"))


def test_a_failed_series_is_a_failed_analysis(series: Path, tmp_path: Path):
    (name,) = {dcmread(path, stop_before_pixels=True).SeriesInstanceUID for path in series.glob("*.dcm")}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).touch()  # where its results should go
    shown = scanside("analyse", series, "--out", tmp_path / "out")
    assert shown.returncode == 1, shown.stderr
    assert "failed" in shown.stdout
    assert "left alone: 2 files that are no DICOM (truth.json, truth.npz)" in shown.stdout


def test_a_path_that_can_not_be_used_is_one_line_and_code_3(series: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "node.toml").write_text("[node]\nport = 0\nfolder = 'file'\n")
    below = tmp_path / "file" / "below"
    for command, words in (
        (["demo", "--out", "file"], "file: Not a directory; there is a file where a folder should be"),
        (["demo", "--out", "file/below", "--json"], "Not a directory"),
        (["demo", "--out", "/proc/scanside"], "/proc/scanside: No such file or directory; name another path"),
        (["phantom", "file/below"], "Not a directory"),
        (["phantom", "/proc/scanside"], "/proc/scanside: No such file or directory; name another path"),
        (["serve", "--config", "node.toml"], f"{tmp_path / 'file'}: File exists; there is a file"),
        (["analyse", series, "--out", below], f"{below}: Not a directory"),
    ):
        shown = scanside(*command, cwd=tmp_path)
        refused(shown, 3, words)
        assert len(shown.stderr.splitlines()) == 1, shown.stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "ro/head"), "ro/head: Permission denied; name a path that"),
        (OSError(errno.EROFS, "Read-only file system", "ro"), "ro: Read-only file system; name a path on a disk"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; make room"),
        (ModuleNotFoundError("no torch", name="torch"), "in scanside's checkout, pip install '.[train,export]'"),
    ],
)
def test_what_the_machine_lacks_is_one_line(error: Exception, said: str, monkeypatch, capsys):
    def fail() -> None:
        raise error

    monkeypatch.setattr(commands, "app", fail)
    with pytest.raises(SystemExit) as ended:
        commands.main()
    assert ended.value.code == 3
    line = capsys.readouterr().err
    assert line.startswith("scanside: ")
    assert said in line
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    "bug", [OSError("no file, no errno"), ModuleNotFoundError("x", name="scansied"), KeyError("x")]
)
def test_a_bug_stays_a_traceback(bug: Exception, monkeypatch):
    def fail() -> None:
        raise bug

    monkeypatch.setattr(commands, "app", fail)
    with pytest.raises(type(bug)):
        commands.main()


@real_data
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("23_geom_notavolume_001", "too few slices"),
        ("30_enhanced_ct_perfusion_map", "a derived image"),
        ("51_ct_dose_and_screen_saves", "not a CT image"),
        ("60_charset_names", "not a CT image"),
        ("70_malformed_pydicom", "not a CT image"),
    ],
)
def test_what_is_no_head_ct_is_turned_away_with_a_reason(case: str, reason: str, tmp_path: Path):
    shown = scanside("analyse", CORPUS / case, "--out", tmp_path / "out", "--json")
    assert shown.returncode == 0, shown.stderr
    told = json.loads(shown.stdout)["series"]
    assert {one["state"] for one in told} == {"not_analysed"}
    assert any(reason in one["reason"] for one in told), told


@pytest.mark.parametrize(
    ("where", "words"),
    [
        (["127.0.0.1:99999"], "port: 99999 is above 65535"),
        (["127.0.0.1:104", "--calling", "A" * 17], "calling AE title: "),
    ],
)
def test_push_to_what_is_no_address_says_so(series: Path, where: list[str], words: str):
    refused(scanside("push", series, *where), 2, words)


def test_push_to_nobody_says_so(series: Path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shown = scanside("push", series, f"127.0.0.1:{port}")
    refused(shown, 3, "refused")
    assert len(shown.stderr.splitlines()) == 1, "pynetdicom speaks too"


def test_push_does_not_complain_of_the_phantoms_own_truth(series: Path):
    ae = AE("SCANSIDE")
    ae.add_supported_context(CTImageStorage)
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, lambda _: 0x0000)])
    try:
        shown = scanside("push", series, f"127.0.0.1:{server.socket.getsockname()[1]}")
    finally:
        ae.shutdown()
    assert shown.returncode == 0, shown.stderr
    assert shown.stderr == ""
    assert [line for line in shown.stdout.splitlines() if "not sent" in line] == [
        "not sent: 2 files that are no DICOM (truth.json, truth.npz)"
    ]


def test_the_demo_ends_with_one_json_document_and_everything_in_the_archive(tmp_path: Path):
    shown = scanside("demo", "--out", tmp_path / "demo", "--slices", "20", "--rate", "100", "--json", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    told = json.loads(shown.stdout)
    assert told["ok"] is True
    assert told["slices"] == 20
    assert {"class", "volume_ml", "truth_ml"} <= told["findings"][0].keys()
    assert told["decision"]["level"] == "critical"
    assert {"push", "last_slice_to_findings", "last_slice_to_pacs"} == told["timings_ms"].keys()
    assert all((tmp_path / told["pacs"][role]).exists() for role in ("seg", "sr", "sc"))
    assert all((tmp_path / picture).exists() for picture in told["pictures"])
    assert (tmp_path / told["bundle"] / "manifest.json").exists()
    events = [json.loads(line)["event"] for line in (tmp_path / "demo" / "node.log").read_text().splitlines()]
    assert events.index("rehearsed") < events.index("association_accepted"), "as a node that has been up for a while"


def test_the_demo_does_not_empty_a_folder_that_is_not_its_own(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    refused(scanside("demo", "--out", tmp_path), 1, "not empty and not a demo's")
    assert (tmp_path / "thesis.txt").exists()


def test_models_lists_every_network_with_its_cost():
    rows = {row["name"]: row for row in json.loads(scanside("models", "--json").stdout)}
    assert len(rows) == 14
    assert rows["ema_attention_unet"]["parameters"] == 7_794_805
    assert rows["vanilla_unet"]["gflops"].keys() == {"256", "512"}


def test_verify_answers_for_the_shipped_bundle():
    told = json.loads(scanside("bundle", "verify", "--json").stdout)
    assert "not a medical device" in told["intended_use"]
    assert told["precision"] == "fp32"
    assert told["self_test_worst_disagreement"] <= 1e-3
    assert len(told["digest"]) == 64


def test_the_example_configuration_is_one(tmp_path: Path):
    example = scanside("config", "--example")
    (tmp_path / "node.toml").write_text(example.stdout)
    shown = scanside("config", "--show", tmp_path / "node.toml")
    assert shown.returncode == 0, shown.stderr
    assert 'ae_title = "SCANSIDE"' in shown.stdout


def test_check_tells_every_mistake_of_a_file_at_once(tmp_path: Path):
    (tmp_path / "file").touch()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (tmp_path / "node.toml").write_text(
        '[node]\nport = 70000\nae_titel = "X"\nfolder = "file"\nfree_floor_gb = 1e9\n[log]\nlevel = "loud"\n'
        '[model]\nbundle = "nowhere"\n[[triage]]\nlevel = "urgent"\nclasses = ["sdh"]\nvolume_ml = 1\n'
        f'[[destinations]]\nname = "pacs"\nae_title = "PACS"\nhost = "127.0.0.1"\nport = {port}\n'
    )
    shown = scanside("check", "--config", tmp_path / "node.toml", "--json")
    assert (shown.returncode, shown.stderr) == (2, "")
    items = {item["name"]: item for item in json.loads(shown.stdout)}
    assert {name for name, item in items.items() if item["ok"] is False} == {
        "node.port",
        "node.ae_titel",
        "log.level",
        "folder",
        "disk",
        "bundle",
        "destination pacs",
    }
    assert "did you mean ae_title?" in items["node.ae_titel"]["message"]
    assert "triage rules name sdh" in items["triage"]["message"]


def test_serve_on_a_port_that_is_taken_ends_with_the_reason(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (tmp_path / "node.toml").write_text(f"[node]\nport = {port}\nfree_floor_gb = 0.1\n[log]\nlevel = 'error'\n")
        shown = scanside("serve", "--config", tmp_path / "node.toml")
    refused(shown, 3, str(port))


def test_serve_with_a_broken_bundle_does_not_open_its_port(tmp_path: Path):
    (tmp_path / "node.toml").write_text("[node]\nport = 0\nfree_floor_gb = 0.1\n[model]\nbundle = 'nowhere'\n")
    refused(scanside("serve", "--config", tmp_path / "node.toml"), 3, "nowhere is no bundle")


def test_status_and_outbox_before_the_first_start_say_so(tmp_path: Path):
    (tmp_path / "node.toml").write_text("[node]\nport = 0\n")
    for command in (["status"], ["outbox", "list"], ["outbox", "retry"]):
        refused(scanside(*command, "--config", tmp_path / "node.toml"), 3, "has not run yet")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["phantom", "new", "--lesion", "tumour:5"], "no haemorrhage class"),
        (["phantom", "new", "--spacing", "thick"], "write millimetres"),
        (["phantom", "."], "not empty"),
        (["analyse", "nowhere", "--out", "x"], "is no folder"),
        (["analyse", ".", "--out", "x"], "no DICOM file"),
        (["push", "nowhere", "127.0.0.1:1"], "nowhere: no such file or folder"),
        (["push", ".", "somewhere"], "is not HOST:PORT"),
        (["phantom", "new", "--seed", "-1"], "Invalid value"),
        (["phantom", "new", "--tilt", "nan"], "tilts by 30 degrees"),
        (["phantom", "note.txt"], "not empty"),
        (["serve", "--config", "nowhere.toml"], "No such file"),
        (["check", "--config", "."], ".: is a folder; name the configuration file itself"),
        (["analyse", ".", "--out", "x", "--min-slices", "-4"], "Invalid value"),
        (["verify", "nowhere"], "is no bundle"),
        (["bundle", "verify", "nowhere"], "is no bundle"),
        (["bundle", "show", "nowhere"], "is no bundle"),
        (["bundle", "diff", "nowhere", "nowhere"], "is no bundle"),
        (["calibrate", "nowhere"], "is no bundle"),
        (["train", "nowhere.toml", "--out", "x"], "No such file"),
        (["config"], "either --example or --show"),
    ],
)
def test_wrong_arguments_are_one_line_and_code_2(arguments: list[str], words: str, tmp_path: Path):
    (tmp_path / "note.txt").write_text("not DICOM")
    refused(scanside(*arguments, cwd=tmp_path), 2, words)


def test_evaluate_wants_a_data_set_and_its_recipe_together(tmp_path: Path):
    shown = scanside("evaluate", SHIPPED, tmp_path)
    assert shown.returncode == 2
    assert "give both or neither" in " ".join(shown.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["DATA", "--recipe", "r.toml", "--hard"], "are of phantoms"),
        (["DATA", "--recipe", "r.toml", "--heads", "3"], "are of phantoms"),
        (["--heads", "0", "--bleed-free", "0"], "leaves nothing to score"),
    ],
)
def test_evaluate_refuses_options_that_would_do_nothing(options: list[str], message: str):
    shown = scanside("evaluate", SHIPPED, *options)
    assert shown.returncode == 2
    assert message in " ".join(shown.stderr.replace("│", " ").split())


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Path:
    """Four phantoms with blood of every class as arrays: three to calibrate on, one to verify on."""
    import numpy as np

    from training.lesions import CLASSES, Lesion
    from training.phantom import Scan, make

    folder = tmp_path_factory.mktemp("samples")
    blood = tuple(Lesion(name, 8.0) for name in CLASSES[1:])
    for seed in range(1, 5):
        phantom = make(blood, Scan((7.0,), matrix=320), seed=seed)
        hu = np.stack([one.hu for one in phantom.slices])
        target = folder / ("heldout" if seed == 4 else "samples")
        target.mkdir(exist_ok=True)
        spacing = phantom.slices[0].plane.spacing_mm
        np.savez(target / f"head{seed}.npz", hu=hu, spacing_mm=spacing, thickness_mm=7.0)
    return folder


@pytest.mark.slow
def test_a_bundle_is_calibrated_verified_signed_and_served_in_8_bits(samples: Path, tmp_path: Path):
    """docs/export.md, in its own order."""
    bundle = shutil.copytree(SHIPPED, tmp_path / "bundle")
    shown = scanside(
        "calibrate", bundle, samples / "samples", "--slices", 24, "--budget", "dice=0.9", "--out", tmp_path / "cal"
    )
    assert shown.returncode == 0, shown.stderr
    assert "int8-cpu" in shown.stdout
    assert {path.name for path in (tmp_path / "cal").iterdir()} == {
        "calibration.json",
        "calibration.md",
        "sensitivity.png",
    }
    head = scanside("phantom", tmp_path / "head", "--slices", 12, "--spacing", 10)
    assert head.returncode == 0, head.stderr
    refused(
        scanside("analyse", tmp_path / "head", "--out", tmp_path / "r", "--bundle", bundle, "--precision", "int8-cpu"),
        1,
        "is not verified",
    )
    refused(scanside("verify", bundle, samples / "samples"), 2, "the bundle was calibrated on it")
    judged = scanside("verify", bundle, samples / "heldout", "--json")
    assert judged.returncode == 0, judged.stdout
    assert all(one["passed"] for one in json.loads(judged.stdout).values())
    told = json.loads(scanside("bundle", "show", bundle, "--json").stdout)
    assert {one["precision"]: one["serves"] for one in told["precisions"]} == dict.fromkeys(
        ("fp32", "int8-cpu"), "yes"
    ) | dict.fromkeys(("fp16", "int8"), "on TensorRT, after `scanside build`")
    assert scanside("bundle", "diff", SHIPPED, bundle).returncode == 1
    analysed = scanside(
        "analyse", tmp_path / "head", "--out", tmp_path / "r", "--bundle", bundle, "--precision", "int8-cpu", "--json"
    )
    assert analysed.returncode == 0, analysed.stderr
    assert json.loads(analysed.stdout)["series"][0]["report"]["model"]["precision"] == "int8-cpu"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["calibrate", SHIPPED, "nowhere"], 2, "nowhere"),
        (["calibrate", SHIPPED, ".", "--budget", "dyce=1"], 2, "there is dice"),
        (["calibrate", SHIPPED, "."], 2, "no DICOM file"),
        (["verify", SHIPPED, "note.txt"], 2, "no .npz with hu"),
        (["export", "x.onnx", "--out", "y"], 2, "go together"),
        (["export", "x.pt", "--out", "y", "--contract", "c.toml"], 2, "go together"),
        (["bundle", "sign", SHIPPED, "--key", "nowhere.key"], 2, "name an Ed25519 private key"),
        (["bundle", "verify", SHIPPED, "--key", "nowhere.pem"], 2, "nowhere.pem: No such file"),
        (["bundle", "triton", SHIPPED, "--precision", "fp8", "--out", "t"], 2, "no fp8 graph, only"),
        (
            ["bundle", "triton", SHIPPED, "--engine", "keras", "--out", "t"],
            2,
            "there are onnxruntime, python, tensorrt",
        ),
        (["bundle", "triton", SHIPPED, "--engine", "tensorrt", "--plans", "p", "--out", "t"], 2, "no fp32 plan of"),
        (["bench", "latency", "--backend", "triton", "--servers", "grpc://127.0.0.1:1"], 3, "no server can be used"),
        (["bundle", "operate", SHIPPED, "--version", "9"], 2, "give one of them"),
        (
            ["bundle", "operate", SHIPPED, "--version", "9", "--minimum-slices", 2, "--class", "sdh"],
            2,
            "sdh: the bundle",
        ),
        (["analyse", ".", "--out", "x", "--precision", "int8"], 2, "no DICOM file"),
    ],
)
def test_what_makes_no_bundle_is_one_line(arguments: list[object], code: int, words: str, tmp_path: Path):
    (tmp_path / "note.txt").write_text("no samples")
    shown = scanside(*arguments, cwd=tmp_path)
    assert shown.returncode == code
    assert "Traceback" not in shown.stderr
    assert words in " ".join(shown.stderr.replace("│", " ").split())


def test_an_operating_point_is_changed_by_command_and_makes_another_bundle(tmp_path: Path):
    bundle = shutil.copytree(SHIPPED, tmp_path / "bundle")
    asked = ("--version", "9", "--class", "subdural", "--minimum-ml", 2, "--minimum-probability", 0.9)
    shown = scanside("bundle", "operate", bundle, *asked)
    assert shown.returncode == 0, shown.stderr
    changed, shipped = open_bundle(bundle), open_bundle()
    assert changed.version == "9"
    assert changed.digest != shipped.digest
    assert changed.operating_point["subdural"] == replace(
        shipped.operating_point["subdural"], minimum_volume_ml=2.0, minimum_probability=0.9
    )
    assert changed.operating_point["epidural"] == shipped.operating_point["epidural"]
    assert "subdural: from 2 ml, probability 0.9" in shown.stdout
    changed.check_ruling("int8-cpu")


def test_samples_of_a_folder_of_dicom_are_whole_series_without_their_names(series: Path, tmp_path: Path):
    """What calibrate and verify measure on: geometry and pixels as `analyse` sees them, the scanner, and no UID."""
    folder = shutil.copytree(series, tmp_path / "samples")
    image = min(folder.glob("*.dcm"))
    changed = dcmread(image)
    uid = str(changed.SeriesInstanceUID)
    changed.Manufacturer, changed.ManufacturerModelName = "Maker", "X 9"
    changed.save_as(image)
    localizer = dcmread(image)
    localizer.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    localizer.SOPInstanceUID = localizer.file_meta.MediaStorageSOPInstanceUID = f"{uid}.999"
    localizer.save_as(folder / "zz.dcm")
    (one,) = commands._series(None, folder, 3, 0)
    truth = json.loads((series / "truth.json").read_text())
    assert len(one.hu) == truth["slices"]
    assert one.scanner == "Maker X 9"
    assert uid not in one.name
    assert one.stack.tilt_deg == pytest.approx(15, abs=0.1)
    import numpy as np

    with np.load(series / "truth.npz") as arrays:
        ml = one.stack.voxel_ml @ (arrays["labels"] == 1).sum(axis=(1, 2))
    assert ml == pytest.approx(truth["volume_ml"]["intracerebral"], rel=0.01)
