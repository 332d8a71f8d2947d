"""What a worker opens, and what it refuses to."""

from __future__ import annotations

import json
import queue
import shutil
import subprocess
import sys
from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dicom_node.analysis import worker
from dicom_node.configuration.config import Config
from dicom_node.configuration.sections import Model
from dicom_node.configuration.sections import Node as NodeSettings
from dicom_node.opening import opening
from dicom_node.operation.check import check
from dicom_node.simulation import phantom
from runtime import seal, signature
from runtime.bundle import SHIPPED, open_bundle
from runtime.types import Plane, Slice
from tests.runtime.test_signature import keys


def opened(model: Model, **sections: object) -> dict[str, object]:
    """The first answer of a worker that is told to open a model."""
    told = json.dumps(opening(Config(model=model, **sections))) + "\n"
    command = [sys.executable, "-m", "dicom_node.analysis.worker"]
    shown = subprocess.run(command, input=told, capture_output=True, text=True, check=False, timeout=60)
    return json.loads(shown.stdout.splitlines()[0])


def checked(model: Model, folder: Path) -> str:
    """What `scanside check` says of the bundle."""
    config = Config(model=model, node=NodeSettings(folder=folder / "data", port=0))
    return next(item.message for item in check(config, ()) if item.name == "bundle")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return shutil.copytree(SHIPPED, tmp_path / "bundle")


def test_a_worker_serves_what_is_asked_for(bundle: Path):
    told = opened(Model(bundle=bundle, precision="int8-cpu"))
    assert (told["is"], told["model"]) == ("ready", f"{open_bundle().name} {open_bundle().version}")
    assert 0 < told["self_test"] < 0.01, "FP32 would differ by nothing"


def test_a_worker_refuses_codes_of_classes_that_there_are_not(bundle: Path):
    code = {"finding": ["1", "99X", "a"], "site": ["2", "99X", "b"]}
    told = opened(Model(bundle=bundle), codes=[code | {"name": "tumour"}])
    assert told["is"] == "broken"
    assert "[[codes]] name tumour" in told["error"]
    assert opened(Model(bundle=bundle), codes=[code | {"name": "subdural"}])["is"] == "ready"


def test_a_worker_refuses_a_precision_that_has_not_passed(bundle: Path):
    seal.add(bundle, {}, rulings={})
    told = opened(Model(bundle=bundle, precision="int8-cpu"))
    assert told["is"] == "broken"
    assert "int8-cpu is not verified" in told["error"]
    assert opened(Model(bundle=bundle))["is"] == "ready", "FP32 needs no verdict"


def test_where_keys_are_trusted_only_their_bundles_are_served(bundle: Path, tmp_path: Path):
    (mine, public), (_, other) = keys(tmp_path, "mine"), keys(tmp_path, "other")
    trusting = Model(bundle=bundle, trusted_keys=[public])
    for said in (str(opened(trusting)["error"]), checked(trusting, tmp_path)):
        assert "not signed, but must be" in said
    signature.sign(bundle, mine)
    assert opened(trusting)["is"] == "ready"
    assert "every hash" in checked(trusting, tmp_path)
    strangers = Model(bundle=bundle, trusted_keys=[other])
    for said in (str(opened(strangers)["error"]), checked(strangers, tmp_path)):
        assert "not of" in said
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["minimum_volume_ml"]["subdural"] = 1e6
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    for said in (str(opened(trusting)["error"]), checked(trusting, tmp_path)):
        assert "or the bundle has changed since it was signed" in said
    assert opened(Model(bundle=bundle))["is"] == "ready", "without keys, any whole bundle"


LOSES_ITS_GPU = """
import dicom_node.analysis.worker as worker
from runtime.errors import DeviceLost
from runtime.session import open_session

def opened(*given, **how):
    session = open_session(*given, **how)
    infer, calls = session.infer, []
    def losing(hu):
        calls.append(hu)
        if len(calls) > 2:  # the self-test, and one slice
            raise DeviceLost("a batch is not done after 10 s: the GPU hangs")
        return infer(hu)
    session.infer = losing
    return session

worker.open_session = opened
worker.main()
"""


def test_a_worker_that_loses_its_gpu_says_so_and_ends(tmp_path: Path):
    """The node starts another: `test_node` kills workers to see that."""
    plane = Plane((-8.0, -8.0, 0.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (1.0, 1.0), 5.0)
    slices = [
        Slice(str(i), replace(plane, origin_lps=(-8.0, -8.0, 5.0 * i)), np.full((64, 64), i, np.int16))
        for i in range(6)
    ]
    requests = [opening(Config(model=Model(max_batch=1)))]
    told = {"do": "slice", "series": "one", "folder": str(tmp_path / "results")}
    requests += [told | {"path": str(path)} for path in phantom.write(slices, tmp_path)]
    shown = subprocess.run(
        [sys.executable, "-c", LOSES_ITS_GPU],
        input="".join(f"{json.dumps(one)}\n" for one in requests),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    answers = [json.loads(line) for line in shown.stdout.splitlines()]
    assert [one["is"] for one in answers] == ["ready", "slice", "broken"]
    assert answers[-1]["error"] == "a batch is not done after 10 s: the GPU hangs"
    assert shown.returncode == 3


@pytest.mark.parametrize(("is_there", "made"), [(False, 2), (True, 0)], ids=["nobody waits", "a slice waits"])
def test_tiles_are_made_while_nobody_waits(is_there: bool, made: int):
    """The second tile is the last; with it a request comes."""
    request, requests, waiting = {"do": "slice"}, queue.SimpleQueue(), deque()
    calls = []

    class Open:
        def make_tile(self) -> bool:
            calls.append(None)
            if len(calls) == 2:
                requests.put(request)
            return True

    if is_there:
        requests.put(request)
    worker._wait(requests, waiting, {"1.2/1.2.3/1": Open()})
    assert (len(calls), list(waiting)) == (made, [request])
