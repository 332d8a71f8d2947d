"""Ask TensorRT's own ONNX parser which operators it takes, on a machine without a GPU.

::

    LD_LIBRARY_PATH=STUBS python ask_parser.py libnvonnxparser.so.8 Conv Softmax ...

A parser needs a network, and that needs a builder, which needs a GPU. But ``IParser::supportsOperator`` (fifth virtual
method of NvOnnxParser.h in 8.6) only looks a name up. So the parser is made over stand-ins: libraries in the folder
STUBS for those that it links to, and for the network and the logger objects whose methods do nothing.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path

SOURCE = """
int initLibNvInferPlugins(void* logger, const char* space) { return 1; }
void* getPluginRegistry(void) { return 0; }
"""
METHODS = 128
SUPPORTS_OPERATOR = 4


def build_stubs(folder: Path) -> None:
    """Empty stand-ins for the libraries that the parser links to."""
    (folder / "stub.c").write_text(SOURCE)
    for name in ("libnvinfer.so.8", "libnvinfer_plugin.so.8"):
        command = ["gcc", "-shared", "-fPIC", "-o", folder / name, f"-Wl,-soname,{name}", folder / "stub.c"]
        subprocess.run(command, check=True)


def ask(library: str, operators: list[str]) -> dict[str, bool]:
    parser = ctypes.CDLL(library)
    nothing = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(lambda _: 0)
    methods = (ctypes.c_void_p * METHODS)(*[ctypes.cast(nothing, ctypes.c_void_p).value] * METHODS)
    network = (ctypes.c_void_p * 64)(ctypes.addressof(methods))
    network[1] = ctypes.addressof(network)  # the implementation that INetworkDefinition's methods forward to
    logger = (ctypes.c_void_p * 64)(ctypes.addressof(methods))
    create = parser.createNvOnnxParser_INTERNAL
    create.restype, create.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
    made = create(ctypes.addressof(network), ctypes.addressof(logger), 8600)
    table = ctypes.cast(ctypes.cast(made, ctypes.POINTER(ctypes.c_void_p))[0], ctypes.POINTER(ctypes.c_void_p))
    takes = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_char_p)(table[SUPPORTS_OPERATOR])
    return {name: takes(made, name.encode()) for name in operators}


if __name__ == "__main__":
    print(json.dumps(ask(sys.argv[1], sys.argv[2:])))
