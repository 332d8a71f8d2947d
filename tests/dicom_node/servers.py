"""A PostgreSQL server of the tests' own, on a private port, that may be killed."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dicom_node.storage.postgres import Address

PASSWORD = "correct horse"
DEADLINE_S = 60.0


def programs() -> Path | None:
    """The folder of initdb and postgres: on the path, or where Debian puts the newest."""
    found = shutil.which("initdb")
    places = [Path(found).parent] if found else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda one: float(one.parent.name), reverse=True)
    return next((place for place in places if (place / "initdb").exists()), None)


class Server:
    """A cluster in a folder of its own, reached by TCP with a password, as a hospital's is."""

    def __init__(self) -> None:
        bin_folder = programs()
        if bin_folder is None:
            pytest.skip("PostgreSQL is not installed (apt-get install postgresql): nothing is tested with it")
        pytest.importorskip("psycopg", reason="psycopg is not installed: nothing is tested with PostgreSQL")
        self._bin = bin_folder
        # not pytest's folder: PostgreSQL does not run as root, and whoever it runs as may not see into that
        self.folder = Path(tempfile.mkdtemp(prefix="scanside-postgres-"))
        # the administrator of Debian's package, where the tests run as root
        self._who = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
        if self._who:
            shutil.chown(self.folder, "postgres", "postgres")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.password = self.folder / "password"
        self.password.write_text(PASSWORD + "\n")
        self.password.chmod(0o644)
        self._names = itertools.count(1)
        self._process: subprocess.Popen | None = None
        self._run(
            "initdb", "-D", self.folder / "data", "-U", "scanside", "-A", "scram-sha-256", "--no-sync",
            "-E", "UTF8", "--locale=C", "--pwfile", self.password,
        )  # fmt: skip
        self.start()

    def start(self) -> None:
        """Have it take connections."""
        import psycopg

        with (self.folder / "log").open("a") as log:
            self._process = subprocess.Popen(
                [
                    self._bin / "postgres", "-D", self.folder / "data", "-p", str(self.port), "-k", self.folder,
                    "-c", "listen_addresses=127.0.0.1", "-c", "shared_buffers=16MB", "-c", "max_wal_size=64MB",
                    "-c", "fsync=off",  # a kill leaves what the kernel has
                ],
                stdout=log, stderr=log, **self._who,
            )  # fmt: skip
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            assert self._process.poll() is None, (self.folder / "log").read_text()[-2000:]
            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(self.address("postgres").url, password=PASSWORD).close()
                return
            time.sleep(0.05)
        raise AssertionError("PostgreSQL does not answer")

    def kill(self) -> None:
        """End it as a power cut does: the server, and what it does for its clients."""
        children = self._children()
        self._signal_all(signal.SIGKILL)
        self._process.wait()
        # a new one waits for memory that the old one's children still hold
        while any(Path(f"/proc/{pid}").exists() for pid in children):
            time.sleep(0.01)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Let it do nothing at all, while its kernel keeps its connections, and takes new ones."""
        self._signal_all(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal_all(signal.SIGCONT)

    def _signal_all(self, number: signal.Signals) -> None:
        """Signal the server, and what it does for its clients."""
        for pid in [self._process.pid, *map(int, self._children())]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _children(self) -> list[str]:
        return Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Send all clients away and end; SIGQUIT: without writing anything down."""
        if self._process.poll() is None:
            self._process.send_signal(how)
            self._process.wait(DEADLINE_S)

    def remove(self) -> None:
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder)

    def database(self) -> Address:
        """A new, empty database."""
        name = f"journal_{next(self._names)}"
        self.execute(f"CREATE DATABASE {name}", "postgres")
        return self.address(name)

    def address(self, name: str) -> Address:
        return Address(f"postgresql://scanside@127.0.0.1:{self.port}/{name}", self.password)

    def execute(self, sql: str, name: str) -> list[tuple]:
        """Run a statement beside all journals."""
        import psycopg

        url = self.address(name).url
        with contextlib.closing(psycopg.connect(url, password=PASSWORD, autocommit=True)) as connection:
            cursor = connection.execute(sql)
            return cursor.fetchall() if cursor.description else []

    def _run(self, program: str, *arguments: object) -> None:
        command = [str(part) for part in (self._bin / program, *arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=self.folder, **self._who)
        assert done.returncode == 0, done.stderr


def name_of(address: Address) -> str:
    """The database's name."""
    return address.url.rpartition("/")[2]
