"""Crowds at the port: more scanners than places, and connections that are opened to take them all."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from pynetdicom.sop_class import CTImageStorage

from dicom_node.configuration.sections import Tls
from dicom_node.network import dimse
from dicom_node.network.acceptor import MOST_WAITING
from dicom_node.network.tls import Identity
from tests.dicom_node.certificates import Authority
from tests.dicom_node.instances import SERIES, Recorder, encoded, image, receiving
from tests.dicom_node.network.test_connection import RELEASE_RP, RELEASE_RQ, Peer, request, store

PLACES = 10  # of node.max_associations

RECEIVER = """
    import sys
    from pathlib import Path
    from dicom_node.monitoring import log
    from dicom_node.configuration.sections import Tls
    from dicom_node.network.tls import Identity
    from tests.dicom_node.instances import Recorder, receiving

    folder, *pem = map(Path, sys.argv[1:])
    log.configure("error", "json")
    identity = Identity(Tls(certificate=pem[0], key=pem[1], ca=pem[2])) if pem else None
    with receiving(folder, Recorder(), identity=identity) as receiver:
        print(receiver.port, flush=True)
        sys.stdin.read()
"""


@contextmanager
def alone(folder: Path, *pem: Path):
    """A receiver in a process of its own, whose threads, files and memory are all of it: process id and port."""
    command = [sys.executable, "-c", textwrap.dedent(RECEIVER), str(folder), *map(str, pem)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process.pid, int(process.stdout.readline())
        process.stdin.close()
        assert process.wait(20) == 0


def held(pid: int) -> dict[str, int]:
    """What a process holds: threads, open files, and memory in MB."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    files = len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 (names, and nothing looked up)
    return {"threads": int(status["Threads"]), "files": files, "mb": int(status["VmRSS"].split()[0]) // 1024}


class Rejected(Exception):
    """No place, for now."""


class Scanner(Peer):
    """A peer with an address of its own."""

    def __init__(self, port: int, address: str, identity: Identity | None = None) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30, source_address=(address, 0))
        if identity:
            self.socket = identity.requestor().wrap_socket(self.socket, server_hostname="127.0.0.1")

    def push(self, *numbers: int) -> list[int]:
        """Statuses of slices, from the request for an association to its release."""
        with self.socket:
            self.socket.sendall(request(CTImageStorage))
            kind, body = self.receive()
            if (kind, body[1:]) == (3, bytes([2, 3, 2])):  # transient, by the presentation layer, local limit exceeded
                raise Rejected
            assert kind == 2
            statuses = []
            for number in numbers:
                self.message(store(number), encoded(image(number)))
                statuses.append(self.answer().number(dimse.STATUS))
            self.send(RELEASE_RQ, bytes(4))
            assert self.receive()[0] == RELEASE_RP
            return statuses


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("said", "address", "is_tls"),
    [
        (b"", "127.0.0.1", False),
        (request(CTImageStorage)[:40], "127.0.0.2", False),
        (b"", "127.0.0.1", True),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100), "127.0.0.2", True),
    ],
    ids=["silent", "half a request, from elsewhere", "silent, TLS", "half a hello, from elsewhere, TLS"],
)
def test_a_flood_takes_no_place_and_leaves_nothing(tmp_path, said, address, is_tls, count):
    """A scanner is served all the while: the one that is silent goes first, of the address that has opened most."""
    identity, pem = None, ()
    if is_tls:
        authority = Authority(tmp_path / "pki")
        ours, theirs = authority.issue("node"), authority.issue("ct")
        pem = ours.certificate, ours.key, ours.ca
        identity = Identity(Tls(certificate=theirs.certificate, key=theirs.key, ca=theirs.ca))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    with alone(tmp_path / "spool", *pem) as (pid, port):
        before, most, pushed = held(pid), Counter(), 0
        with ExitStack() as crowd:

            def flood() -> None:
                for _ in range(count):
                    peer = crowd.enter_context(socket.create_connection(("127.0.0.1", port), 10))
                    with suppress(OSError):  # cut already
                        peer.sendall(said)

            flooding = threading.Thread(target=flood)
            flooding.start()
            while flooding.is_alive():
                pushed += 1
                assert Scanner(port, address, identity).push(pushed) == [0]
                most |= Counter(held(pid))
            flooding.join()
            pushed += 1
            assert Scanner(port, address, identity).push(pushed) == [0]
            most |= Counter(held(pid))
        assert pushed >= 2
        deadline = time.monotonic() + 20
        while held(pid)["threads"] > before["threads"] and time.monotonic() < deadline:
            time.sleep(0.05)
        after = held(pid)
    print(f"{count} connections beside {pushed} slices: before {before}, most {dict(most)}, after {after}")
    assert most["threads"] <= before["threads"] + MOST_WAITING + PLACES
    assert most["files"] <= before["files"] + MOST_WAITING + PLACES + 5  # and what is written
    assert (after["threads"], after["files"]) == (before["threads"], before["files"])
    assert most["mb"] <= before["mb"] + 30
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_fifty_scanners_at_once_all_come_in_the_end(tmp_path):
    """Who finds no place is rejected for now, and comes back: nothing that was acknowledged is lost."""
    intake, rejected, statuses = Recorder(), Counter(), Counter()
    start = threading.Barrier(50)

    def scan(number: int, port: int) -> None:
        start.wait()
        while True:
            try:
                statuses.update(Scanner(port, "127.0.0.1").push(*range(10 * number, 10 * number + 4)))
            except Rejected:
                rejected[number] += 1
                time.sleep(0.05)
            else:
                return

    with receiving(tmp_path / "spool", intake, max_associations=PLACES) as receiver:
        threads = [threading.Thread(target=scan, args=(number, receiver.port)) for number in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        intake.wait(lambda intake: len(intake.ended()) == 50)
    assert intake.ended() == [True] * 50
    assert statuses == {0: 200}
    assert sum(rejected.values()) > 0, "there was a place for everybody"
    stored = [instance.sop_uid for instance in intake.stored()]
    assert sorted(stored) == sorted(f"{SERIES}.{10 * number + n}" for number in range(50) for n in range(4))
