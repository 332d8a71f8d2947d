"""Every name that scanside takes from TensorRT, against the real bindings of 8.6, 10.3, 10.16 and 11.4.

NVIDIA's wheels with the bindings (a megabyte each) import without a GPU if their libraries are there; empty ones do.
Nothing can be built so, but a call of what a version has not, or a setting it does not know, is found out.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

WHEELS = {
    "8.6.1": "tensorrt-bindings==8.6.1",
    "10.3.0": "tensorrt-cu12-bindings==10.3.0",
    "10.16.1.11": "tensorrt-cu13-bindings==10.16.1.11",
    "11.4.0.106": "tensorrt-cu13-bindings==11.4.0.106",
}
ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".tensorrt-bindings"  # git ignores it
FUNCTIONS = """
void *createInferBuilder_INTERNAL() { return 0; }
void *createInferRefitter_INTERNAL() { return 0; }
void *createInferRuntime_INTERNAL() { return 0; }
void *createNvOnnxParser_INTERNAL() { return 0; }
void *createNvOnnxParserRefitter_INTERNAL() { return 0; }
void *getBuilderPluginRegistry() { return 0; }
void *getPluginRegistry() { return 0; }
int initLibNvInferPlugins() { return 1; }
int getInferLibVersion() { return 0; }
int getNvOnnxParserVersion() { return 0; }
void *_ZN11nvuffparser15createUffParserEv() { return 0; }
void *_ZN11nvuffparser8FieldMapC1EPKcPKvNS_9FieldTypeEi() { return 0; }
void *_ZN14nvcaffeparser117createCaffeParserEv() { return 0; }
void *_ZN14nvcaffeparser123shutdownProtobufLibraryEv() { return 0; }
"""
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser", "nvparsers")


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Empty ones under the names of TensorRT's."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc: TensorRT's bindings are NOT asked whether they have what scanside calls")
    folder = tmp_path_factory.mktemp("libraries")
    (folder / "empty.c").write_text(FUNCTIONS)
    for major in (8, 10, 11):
        for name in LIBRARIES:
            soname = f"lib{name}.so.{major}"
            command = ["gcc", "-w", "-shared", "-fPIC", "-o", soname, "empty.c", f"-Wl,-soname,{soname}"]
            subprocess.run(command, cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module", params=WHEELS)
def told(request: pytest.FixtureRequest, libraries: Path) -> dict[str, Any]:
    """What a build and a run over the mocks of one version say."""
    folder = CACHE / request.param
    if not folder.exists():
        arguments = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(CACHE), WHEELS[request.param]]
        done = subprocess.run([sys.executable, "-m", "pip", "download", *arguments], capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"{WHEELS[request.param]} can't be downloaded: these bindings are NOT asked")
        (wheel,) = CACHE.glob(f"*{request.param}-cp*.whl")
        zipfile.ZipFile(wheel).extractall(folder)
    environment = os.environ | {"LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": f"{folder}:{ROOT}"}
    run = [sys.executable, "-m", "tests.runtime.bindings_run"]
    done = subprocess.run(run, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {"asked": request.param} | json.loads(done.stdout.splitlines()[-1])


def test_all_that_scanside_calls_is_there(told: dict[str, Any]):
    assert told["version"] == told["asked"]
    assert told["ran"].startswith("label 255 of 7 classes"), "the session went all the way to the poison"


def test_calls_fit_the_signatures(told: dict[str, Any]):
    assert told["misfits"] == []
    wanted = {
        "IBuilderConfig.set_timing_cache",
        "IExecutionContext.execute_async_v3",
        "IExecutionContext.set_tensor_address",
        "OnnxParser.parse",
        "Runtime.deserialize_cuda_engine",
    }
    assert wanted <= set(told["checked"])


def test_types_are_the_graphs_by_the_means_of_each_version(told: dict[str, Any]):
    number = tuple(map(int, told["version"].split(".")[:2]))
    builds = told["builds"]
    assert told["typed"] == (number >= (10, 12))
    assert all(one["cleared"] == ["TF32"] for one in builds.values()), "FP32 is not TF32"
    if told["typed"]:
        assert all((one["set"], one["held"]) == ([], {}) for one in builds.values())
        return
    assert (builds["fp32"]["set"], builds["fp32"]["held"]) == ([], {})
    assert builds["fp16"]["set"] == ["FP16", "OBEY_PRECISION_CONSTRAINTS"]
    assert builds["int8"]["set"] == ["FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS"]
    held = {
        "first": "HALF"
    }  # `sum` ends in a Q, and `quantised` begins at a DQ: a constraint would keep them off bytes
    assert builds["fp16"]["held"] == builds["int8"]["held"] == held


def test_progress_is_told_where_there_is_any(told: dict[str, Any]):
    assert told["tells_progress"] == (told["version"] != "8.6.1")
