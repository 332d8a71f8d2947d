"""`check` tries everything, says what to do about what fails, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pynetdicom import AE, evt
from pynetdicom.sop_class import CTImageStorage, Verification

from dicom_node.configuration.config import Config
from dicom_node.configuration.mistakes import Mistake
from dicom_node.configuration.sections import CodeRow, Destination, Model, Node, Results, Tls, TriageRule
from dicom_node.configuration.triton import Triton
from dicom_node.delivery.storing import SOP_CLASSES
from dicom_node.network import requestor
from dicom_node.operation import trial
from dicom_node.operation.check import check
from dicom_node.operation.trial import Item
from dicom_node.storage.journal import Journal
from dicom_node.storage.lock import FolderLock
from runtime import caps, device, seal, session
from runtime import gpu as gpu_plans
from runtime.bundle import SHIPPED, open_bundle
from runtime.verdict import Verdict
from tests.runtime.kserve_stub import Stub, serving
from tests.runtime.stand_ins import Cuda, Error, Trt

# pynetdicom does not close the socket of a connection that was refused; it is collected at once
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

needs_bundle = pytest.mark.skipif(not (SHIPPED / "manifest.json").exists(), reason="no model bundle in this tree")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    for name in ("CONNECT_TIMEOUT_S", "ACSE_TIMEOUT_S", "DIMSE_TIMEOUT_S"):
        monkeypatch.setattr(requestor, name, 1.0)


@pytest.fixture
def look(tmp_path):
    """Checks a node with one change; gives the items by name. The bundle is one that is not there, unless told."""

    def run(
        *, destinations=(), model=None, triage=None, mistakes=(), files=None, results=None, codes=(), **node
    ) -> dict[str, Item]:
        config = Config(
            node=Node(**{"folder": tmp_path / "data", "port": 0} | node),
            destinations=destinations,
            tls=files,
            model=model or Model(bundle=tmp_path / "no-bundle"),
            triage=Config().triage if triage is None else triage,
            results=results or Results(),
            codes=codes,
        )
        return {item.name: item for item in check(config, mistakes)}

    return run


TAKEN = (Verification, *(classes[0] for classes in SOP_CLASSES.values()))


@contextlib.contextmanager
def peer(*, contexts=TAKEN, status: int = 0x0000, **settings):
    ae = AE("PEER")
    for context in contexts:
        ae.add_supported_context(context)
    for name, value in settings.items():
        setattr(ae, name, value)
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_ECHO, lambda _: status)])
    try:
        yield Destination(name="pacs", ae_title="PEER", host="127.0.0.1", port=server.socket.getsockname()[1])
    finally:
        ae.shutdown()


@pytest.mark.parametrize(
    ("settings", "limits"),
    [
        ({"tls": True}, "only with a certificate that tls.ca vouches for"),
        ({"allowed_addresses": ["10.1.0.0/16"]}, "only from 10.1.0.0/16"),
        ({"allowed_calling_aes": ["CT1"], "allowed_addresses": ["10.1.0.0/16"]}, "only CT1; from 10.1.0.0/16"),
    ],
)
def test_who_may_send(look, tmp_path, settings, limits):
    items = look(files=Tls(**dict.fromkeys(("certificate", "key", "ca"), tmp_path / "none")), **settings)
    assert (items["senders"].ok, items["senders"].message) == (True, limits)


def test_a_node_that_is_well(look, tmp_path):
    with peer() as pacs:
        items = look(destinations=[pacs], allowed_calling_aes=["CT1"])
    del items["bundle"]
    assert {name: item.ok for name, item in items.items()} == dict.fromkeys(
        ["senders", "folder", "disk", "port", "destination pacs"], True
    )
    assert list(tmp_path.iterdir()) == []


def test_what_is_open_or_leads_nowhere_is_a_warning(look):
    items = look(address="0.0.0.0")
    for name in ("senders", "destinations"):
        assert (items[name].ok, items[name].kind) == (None, "configuration")
    assert "anyone who reaches 0.0.0.0" in items["senders"].message
    assert "node.allowed_calling_aes" in items["senders"].message


def test_a_folder_that_can_not_be_written(look, tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "inside", tmp_path / ("x" * 300), Path("/proc/scanside")):
        item = look(folder=folder)["folder"]
        assert (item.ok, item.kind) == (False, "environment"), item
        assert f"{folder}: can't be made or written: " in item.message
        assert "disk" in look(folder=folder)
    assert (tmp_path / "file").read_bytes() == b""


def test_a_folder_that_is_there_already(look, tmp_path):
    (tmp_path / "data").mkdir()
    assert look()["folder"].message == f"{tmp_path / 'data'}: writable"
    assert list((tmp_path / "data").iterdir()) == []


def test_a_disk_below_the_floor(look, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    item = look(free_floor_gb=1e9)["disk"]
    assert (item.ok, item.kind) == (False, "environment")
    assert f"more than the whole disk has ({usage.total / 1e9:.1f} GB): every slice would be refused" in item.message
    item = look(free_floor_gb=(usage.free + usage.total) / 2e9)["disk"]
    assert (item.ok, item.kind) == (False, "environment")
    assert "every slice would be refused; make room or lower it" in item.message


def test_a_journal_that_is_none(look, tmp_path):
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "journal.sqlite"
    assert "journal" not in look()
    path.write_bytes(b"garbage, not a database" * 100)
    item = look()["journal"]
    assert (item.ok, item.kind) == (False, "environment")
    assert item.message.startswith(f"{path}: file is not a database; move it away")
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE contacts (name)")
    assert "not a journal of scanside" in look()["journal"].message
    path.unlink()
    path.touch()  # SQLite takes an empty file for a new database, and so does the node
    assert look()["journal"].ok


def test_a_journal_is_looked_at_without_a_trace(look, tmp_path):
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "journal.sqlite"
    Journal(path).close()
    before = path.read_bytes()
    assert look()["journal"].ok
    assert (path.read_bytes(), list(path.parent.iterdir())) == (before, [path])
    running = Journal(path)
    assert look()["journal"].ok
    running.close()


def test_a_port_in_use(look):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        item = look(port=port)["port"]
    assert (item.ok, item.kind) == (False, "environment")
    assert f"127.0.0.1:{port}: Address already in use; is a node running already?" in item.message


@pytest.mark.parametrize("section", ["web", "page"])
def test_a_port_of_its_pages_in_use(tmp_path, section):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        sections = {"node": {"folder": tmp_path, "port": 0}, "model": {"bundle": tmp_path / "none"}}
        items = {item.name: item for item in check(Config.model_validate(sections | {section: {"port": port}}))}
    assert items[f"{section} port"].ok is False
    assert f"set another {section}.port" in items[f"{section} port"].message


def test_the_port_of_a_node_that_runs_is_no_fault(look, tmp_path):
    (tmp_path / "node").mkdir(exist_ok=True)
    running = FolderLock(tmp_path / "node")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        item = look(port=port, folder=tmp_path / "node")["port"]
    running.release()
    assert (item.ok, item.message) == (True, f"127.0.0.1:{port}: taken; a node runs in {tmp_path / 'node'}")


def test_an_address_of_another_machine(look):
    item = look(address="192.0.2.1")["port"]  # TEST-NET-1: nobody's
    assert item.ok is False
    assert "192.0.2.1:0: Cannot assign requested address; no network of this machine has this address" in item.message
    assert "running already" not in item.message


def test_mistakes_are_faults_and_the_rest_is_looked_at_all_the_same(look, tmp_path):
    (tmp_path / "file").touch()
    rule = TriageRule(level="urgent", classes=["sdh"], volume_ml=1)
    wrong = [Mistake("node.port", "70000 is above 65535"), Mistake("destinations[0].port", "is missing")]
    items = look(mistakes=wrong, folder=tmp_path / "file", free_floor_gb=1e9, triage=[rule])
    assert items["node.port"] == Item("node.port", False, "configuration", "70000 is above 65535")
    assert {name for name, item in items.items() if item.ok is False} == {
        "node.port",
        "destinations[0].port",
        "folder",
        "disk",
        "bundle",
    }
    assert "port" not in items, "the default's place was looked at"
    assert "destinations" not in items, "there is one, though it is wrong"
    if (SHIPPED / "manifest.json").exists():
        assert items["triage"].ok is None
        assert "triage rules name sdh;" in items["triage"].message


def test_a_destination_that_is_down(look):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    item = look(destinations=[Destination(name="pacs", ae_title="PEER", host="127.0.0.1", port=port)])[
        "destination pacs"
    ]
    assert (item.ok, item.kind) == (False, "finding")
    assert item.message == f"pacs (PEER at 127.0.0.1:{port}): Connection refused"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"require_calling_aet": ["SOMEONE"]}, "Calling AE title not recognised"),
        ({"require_called_aet": True, "ae_title": "SOMEONE"}, "Called AE title not recognised"),
        ({"contexts": (CTImageStorage,)}, "accepts none of: Comprehensive 3D SR Storage, "),
        (
            {"contexts": set(TAKEN) - {*SOP_CLASSES["seg"]}},
            "PEER accepts an association, but does not accept Segmentation Storage: have it accept that, or change",
        ),
        ({"status": 0x0122}, "status 0x0122"),
    ],
)
def test_a_destination_that_does_not_want_us_says_why(look, settings, reason):
    with peer(**settings) as pacs:
        item = look(destinations=[pacs])["destination pacs"]
    assert (item.ok, item.kind) == (False, "finding")
    assert reason in item.message


@pytest.mark.parametrize(
    ("results", "asked"),
    [
        (Results(), ""),
        (Results(pdf=True), "does not accept Encapsulated PDF Storage: have it"),
        (Results(segmentation="labelmap"), "does not accept Label Map Segmentation Storage: have it"),
    ],
    ids=str,
)
def test_a_destination_is_asked_for_what_it_will_get_and_no_more(look, results, asked):
    with peer(contexts=set(TAKEN) - {*SOP_CLASSES["pdf"]}) as pacs:
        item = look(destinations=[pacs], results=results)["destination pacs"]
    assert item.ok == (not asked), item
    assert asked in item.message


def test_a_destination_that_will_not_confirm_says_so_before_anything_is_sent(look):
    with peer() as pacs:
        item = look(destinations=[pacs.model_copy(update={"confirm": "commitment"})])["destination pacs"]
    assert item.ok is False
    assert "does not accept Storage Commitment Push Model SOP Class" in item.message


def test_a_port_where_no_dicom_is_spoken(look):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        pacs = Destination(name="pacs", ae_title="PEER", host="127.0.0.1", port=silent.getsockname()[1])
        item = look(destinations=[pacs])["destination pacs"]
    assert item.ok is False
    assert "is it a DICOM port?" in item.message


def test_every_destination_is_asked(look):
    with peer() as pacs:
        dead = Destination(name="dead", ae_title="PEER", host="127.0.0.1", port=1)
        items = look(destinations=[dead, pacs])
    assert (items["destination dead"].ok, items["destination pacs"].ok) == (False, True)


@pytest.mark.skipif(shutil.which("storescp") is None, reason="storescp not installed: apt-get install dcmtk")
def test_dcmtk_answers(look):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    pacs = Destination(name="pacs", ae_title="PEER", host="127.0.0.1", port=port)
    process = subprocess.Popen(["storescp", "--ignore", str(port)])
    try:
        deadline = time.monotonic() + 20
        while not (item := look(destinations=[pacs])["destination pacs"]).ok:
            assert time.monotonic() < deadline, item
    finally:
        process.terminate()
        process.wait()


def test_a_bundle_that_is_not_there(look, tmp_path):
    items = look()
    assert (items["bundle"].ok, items["bundle"].kind) == (False, "configuration")
    assert str(tmp_path / "no-bundle") in items["bundle"].message
    assert "engine" not in items


@needs_bundle
def test_the_shipped_bundle_passes_its_self_test(look):
    items = look(model=Model())
    assert items["bundle"].ok
    assert items["engine"].ok, items["engine"]
    assert "onnxruntime" in items["engine"].message
    assert "triage" not in items


@needs_bundle
def test_a_code_for_a_class_that_the_model_does_not_know(look):
    code = CodeRow(name="sdh", finding=("1", "99X", "a"), site=("2", "99X", "b"))
    item = look(model=Model(), codes=[code])["codes"]
    assert (item.ok, item.kind) == (False, "configuration")
    assert "[[codes]] name sdh; the model has intracerebral" in item.message


@needs_bundle
def test_a_rule_for_a_class_that_the_model_does_not_know(look):
    rules = [
        TriageRule(level="urgent", classes=["any"], volume_ml=1),
        TriageRule(level="urgent", classes=["sdh"], volume_ml=1),
    ]
    items = look(model=Model(), triage=rules)
    assert (items["triage"].ok, items["triage"].kind) == (False, "configuration")
    assert items["triage"].message.startswith("triage rules name sdh;")


@needs_bundle
def test_a_tampered_bundle(look, tmp_path):
    shutil.copytree(SHIPPED, tmp_path / "bundle")
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    with (tmp_path / "bundle" / min(manifest["files"])).open("ab") as file:
        file.write(b"x")
    item = look(model=Model(bundle=tmp_path / "bundle"))["bundle"]
    assert (item.ok, item.kind) == (False, "finding"), "as every other command ends with"
    assert "SHA-256" in item.message


@needs_bundle
def test_a_precision_that_may_not_serve(look, tmp_path):
    shutil.copytree(SHIPPED, tmp_path / "bundle")
    seal.add(tmp_path / "bundle", {}, rulings={})
    item = look(model=Model(bundle=tmp_path / "bundle", precision="int8-cpu"))["engine"]
    assert (item.ok, item.kind) == (False, "finding")
    assert "int8-cpu is not verified: run `scanside verify" in item.message
    assert look(model=Model(precision="int8-cpu"))["engine"].ok


@needs_bundle
def test_an_engine_that_computes_something_else(look, monkeypatch):
    monkeypatch.setitem(session.SELF_TEST_DISAGREEMENT, "fp32", -1.0)
    item = look(model=Model())["engine"]
    assert (item.ok, item.kind) == (False, "finding")
    assert "differ from PyTorch" in item.message


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """A machine with a GPU and TensorRT."""
    cuda = Cuda()
    trt = Trt(cuda)
    monkeypatch.setattr(caps, "load", lambda: trt)
    for module in (device, gpu_plans):
        monkeypatch.setattr(module, "open_device", lambda: device.CudaBindings(runtime=cuda))
    return cuda


def test_a_machine_without_tensorrt_needs_none(look):
    items = look(model=Model())
    assert not {"tensorrt", "gpu", "plans"} & items.keys()
    assert (
        "for want of a GPU's engine: TensorRT: it is not installed: in scanside's checkout, pip"
        in items["engine"].message
    )


def test_where_tensorrt_is_meant_what_is_missing_is_named(look):
    items = look(model=Model(backend="tensorrt"))
    assert items["tensorrt"].ok is False
    assert "pip install '.[gpu]', or where it comes with the system (Jetson)" in items["tensorrt"].message
    assert "engine" not in items, "it could only say the same"


def test_a_gpu_is_described_and_its_plans_are_counted(look, tmp_path: Path, gpu: Cuda, monkeypatch: pytest.MonkeyPatch):
    model = Model(plans=tmp_path / "plans")
    items = look(model=model)
    assert items["tensorrt"].message == "10.13.0, strongly typed"
    assert items["gpu"].message.startswith(
        "Stand-in GPU, compute capability 8.6, driver for CUDA 12.4, 8192 of 8192 MiB"
    )
    assert (items["plans"].ok, "0 for this GPU and bundle; run" in items["plans"].message) == (None, True)
    build_fp16(monkeypatch, tmp_path / "plans")
    item = look(model=model)["plans"]
    assert (item.ok, item.kind) == (None, "finding")
    judge = f"run `scanside verify {SHIPPED} --plans {tmp_path / 'plans'} --tensorrt`"
    counted = "1 for this GPU and bundle: fp16 1 x 512 x 512"
    assert item.message.endswith(f"{counted}; not yet judged: fp16 1 x 512 x 512: {judge}")
    passed = Verdict(passed=True, reasons=(), figures={})
    gpu_plans.rule(tmp_path / "plans", open_bundle(), {"fp16": passed})
    items = look(model=model)
    assert items["plans"].ok
    assert items["plans"].message.endswith(counted)
    assert "tensorrt 10.13.0 Stand-in GPU, fp16: golden slices as recorded" in items["engine"].message
    gpu_plans.rule(
        tmp_path / "plans", open_bundle(), {"fp16": Verdict(passed=False, reasons=("subdural: Dice 0.9",), figures={})}
    )
    items = look(model=model)
    assert items["plan"].message == "fp16 1 x 512 x 512 failed verify: subdural: Dice 0.9"
    assert items["plans"].message.endswith("--again`")
    assert gpu.held == {}


@pytest.mark.parametrize(
    ("suffix", "harm", "said"),
    [
        (".json", lambda path: path.write_bytes(path.read_bytes()[:-9]), "not a plan of this version: Invalid JSON"),
        (".json", lambda path: (path.unlink(), path.mkdir()), "Is a directory: let the node's user read it"),
        (".plan", Path.unlink, "is not there: run `scanside build"),
        (".plan", lambda path: path.write_bytes(b""), "not what was accepted: run `scanside build"),
        (".plan", lambda path: (path.unlink(), path.mkdir()), "Is a directory: let the node's user read it"),
    ],
)
def test_what_is_wrong_with_a_plan_is_an_item(
    look, tmp_path: Path, gpu: Cuda, monkeypatch, suffix: str, harm, said: str
):
    build_fp16(monkeypatch, tmp_path)
    (path,) = tmp_path.glob(f"*{suffix}")
    harm(path)
    items = look(model=Model(plans=tmp_path))
    assert items["plan"].ok is None
    assert items["plan"].message.startswith(f"{path}: ")
    assert said in items["plan"].message
    assert "0 for this GPU and bundle" in items["plans"].message
    assert items["engine"].ok, "and the processor serves"


def test_a_folder_of_plans_that_is_none_is_an_item(look, tmp_path: Path, gpu: Cuda, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    assert look(model=Model(plans=tmp_path / "file"))["plan"].message.startswith(
        f"{tmp_path / 'file'}: Not a directory"
    )

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    assert look(model=Model())["plans"].message == "no home folder: name --plans or model.plans"


def build_fp16(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(gpu_plans, "self_test", lambda *_: 0.0)
    monkeypatch.setattr(gpu_plans, "TIMED", 1)
    shapes = [(1, 512, 512)]
    (row,) = gpu_plans.make_all(open_bundle(), "fp16", shapes, folder, read=lambda path: str(path).encode())
    assert row["state"] == "built"


def test_a_gpu_that_does_not_answer_is_a_fault_where_it_is_meant(look, gpu: Cuda):
    gpu.fails["cudaSetDevice"] = Error.cudaErrorMemoryAllocation
    for backend, ok in (("tensorrt", False), ("auto", None)):
        items = look(model=Model(backend=backend))
        assert items["gpu"].ok is ok
        assert "nvidia-smi" in items["gpu"].message


def test_a_page_without_its_users_is_a_fault_and_an_open_one_a_warning(tmp_path):
    page = {"port": 8443, "address": "0.0.0.0", "users": tmp_path / "none"}
    users, unsafe = trial.page(Config.model_validate({"page": page}))
    assert (users.name, users.ok, users.kind) == ("page users", False, "configuration")
    assert "page-password" in users.message
    assert (unsafe.name, unsafe.ok) == ("page", None)
    assert "unencrypted" in unsafe.message
    assert list(trial.page(Config())) == []


@pytest.mark.parametrize("fail_over", [None, "onnxruntime"])
def test_without_tritonclient_it_is_said_once(tmp_path: Path, fail_over: str | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    config = Config(
        node=Node(folder=tmp_path / "data", port=0),
        model=Model(backend="triton", threads=1),
        triton=Triton(servers=("grpc://127.0.0.1:1", "grpc://127.0.0.1:2"), fail_over=fail_over),
    )
    told = [item for item in check(config) if "tritonclient is missing" in item.message]
    assert [(item.name, item.ok) for item in told] == [("server", False)]
    assert told[0].message.startswith("grpc://127.0.0.1:1: ")


@pytest.mark.parametrize(("fail_over", "ok"), [(None, False), ("onnxruntime", None)])
def test_each_server_is_looked_at(tmp_path: Path, fail_over: str | None, ok: bool | None):
    with serving(Stub(open_bundle())) as well:
        away = "grpc://127.0.0.1:1"
        config = Config(
            node=Node(folder=tmp_path / "data", port=0),
            model=Model(backend="triton", threads=1),
            triton=Triton(servers=(well, away), deadline_s=7, fail_over=fail_over),
        )
        items = [*check(config)]
        told = [item for item in items if item.name == "server"]
        assert [(item.ok, item.kind) for item in told] == [(True, "environment"), (ok, "environment")]
        assert told[0].message.startswith(f"{well}, gRPC")
        assert told[1].message.startswith(f"{away}: ")
        engine = [item for item in items if item.name == "engine"]
        assert [item.ok for item in engine] == ([True] if fail_over else []), "without a fault it says who would answer"
