"""A real Triton on this machine, of NVIDIA's wheel `nvidia-pytriton`: whole, but with the Python backend alone.

The wheel lives in an environment of its own (`make triton`), for it wants an older numpy.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Self
from urllib.error import URLError
from urllib.request import urlopen

from runtime.errors import ScansideError
from runtime.kserve import SHARED

ENVIRONMENT = Path(__file__).parent.parent / ".venv-triton"
START_S = 60.0
STUB = "triton_python_backend_stub"  # the process in which a model's Python runs


def find() -> Path | None:
    """Where the server lies; None where it is not installed."""
    return next(ENVIRONMENT.glob("lib/python3*/site-packages/pytriton/tritonserver"), None)


class NoTriton(ScansideError):
    """No Triton on this machine, or one that does not start."""


class TritonServer:
    """A server process, of a model repository, until it is stopped or killed.

    Parameters
    ----------
    folder : for its log and the layout of its backends
    ports : of HTTP and gRPC, to start again where another was; None: any that are free

    Raises
    ------
    NoTriton : it is not installed, or does not become ready; with the end of its log

    """

    def __init__(self, repository: Path, folder: Path, ports: tuple[int, int] | None = None) -> None:
        self._repository, self._folder = repository, folder
        self.ports = ports or _free_ports()
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def _prefix(self) -> str:
        return f"scanside-triton-{self.ports[1]}-"

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    @property
    def grpc(self) -> str:
        return f"grpc://127.0.0.1:{self.ports[1]}"

    def start(self) -> None:
        """Start, and wait until every model is ready."""
        home = find()
        if home is None:
            raise NoTriton(f"{ENVIRONMENT} has no nvidia-pytriton: run `make triton`")
        python = home.parents[1]
        version = home.parents[2].name.removeprefix("python")
        backend = self._folder / "backends" / "python"
        backend.mkdir(parents=True, exist_ok=True)
        for file in (*(home / "backends" / "python").iterdir(), home / "python_backend_stubs" / version / STUB):
            if not (backend / file.name).exists():
                (backend / file.name).symlink_to(file)
        words = {
            "model-repository": self._repository,
            "backend-directory": backend.parent,
            "http-address": "127.0.0.1",
            "http-port": self.ports[0],
            "grpc-address": "127.0.0.1",
            "grpc-port": self.ports[1],
            "allow-metrics": "false",
            "exit-timeout-secs": 2,
            "backend-config": f"python,shm-region-prefix-name={self._prefix}",
        }
        path = f"{ENVIRONMENT / 'bin'}:{os.environ['PATH']}"
        with (self._folder / "tritonserver.log").open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603  # of an environment of ours
                [home / "bin" / "tritonserver", *(f"--{name}={value}" for name, value in words.items())],
                stdout=log,
                stderr=log,
                env={**os.environ, "PATH": path, "PYTHONPATH": str(python), "VIRTUAL_ENV": str(ENVIRONMENT)},
                start_new_session=True,
            )
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with urlopen(f"{self.http}/v2/health/ready", timeout=1):  # noqa: S310  # ours
                    return
            except (URLError, OSError, HTTPException):  # or somebody else has taken the port
                time.sleep(0.05)
        self.kill()
        said = (self._folder / "tritonserver.log").read_text(errors="replace")[-2000:]
        raise NoTriton(f"tritonserver is not ready: {said}")

    def signal(self, number: int) -> None:
        """Send a signal to the server and to its models' processes."""
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """End it at once, as a power cut does."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None
            for one in SHARED.glob(f"{self._prefix}*"):  # what its models shared with it
                one.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def _free_ports() -> tuple[int, int]:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        return one.getsockname()[1], other.getsockname()[1]
