"""The page as a process of its own: what the node does with it, and what it does without."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from dicom_node.configuration.config import ConfigError, load
from dicom_node.page.child import Page
from dicom_node.page.login import LoginError
from dicom_node.page.peers import Peers
from dicom_node.page.server import PageError
from tests.dicom_node.certificates import Authority
from tests.dicom_node.conftest import config_for, wait_until
from tests.dicom_node.page.conftest import Folder

pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")  # of pynetdicom


def answers(url: str, **options: object) -> bool:
    try:
        return httpx.get(url, timeout=20, **options).status_code == 200
    except httpx.HTTPError:
        return False


def test_the_page_is_started_again_at_the_same_port_and_ends_with_the_node(folder: Folder):
    placed = folder.place(1)
    page = Page(folder.config())
    page.start()
    url = f"http://127.0.0.1:{page.port}"
    try:
        assert answers(url)
        first = page.pid
        os.kill(first, signal.SIGSEGV)  # as a decoder may
        wait_until(lambda: page.pid not in (None, first), "another page")
        assert answers(url + placed.address)
        second = page.pid
        page.reload(folder.config(hide_names=True))
        wait_until(lambda: page.pid not in (None, second), "a page with the new configuration")
        assert "Doe" not in httpx.get(url, timeout=20).text
        last = page.pid
    finally:
        page.stop()
    assert not Path(f"/proc/{last}").exists()
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_without_a_port_there_is_no_page(folder: Folder):
    page = Page(folder.config(port=None))
    page.start()
    page.stop()
    assert page.port is None


def test_what_keeps_the_page_from_starting_is_said_before(folder: Folder, tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PageError, match=rf"{port} \(Address already in use\).* set another page\.port"):
            Page(folder.config(port=port)).start()
    with pytest.raises(LoginError, match="page-password"):
        Page(folder.config(users=tmp_path / "none")).start()


def test_by_itself_it_serves_tls(folder: Folder, tmp_path: Path):
    authority = Authority(tmp_path / "tls")
    settings = authority.issue("127.0.0.1")
    text = (
        f'[node]\nfolder = "{folder.path}"\nfree_floor_gb = 0\n[page]\nport = 0\ntls = true\n'
        f'[tls]\ncertificate = "{settings.certificate}"\nkey = "{settings.key}"\nca = "{settings.ca}"\n'
    )
    (tmp_path / "node.toml").write_text(text)
    command = [sys.executable, "-m", "scanside", "page", "--config", str(tmp_path / "node.toml")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        url = process.stderr.readline().split()[-1]
        assert url.startswith("https://127.0.0.1:")
        import ssl

        context = ssl.create_default_context(cafile=str(settings.ca))
        wait_until(lambda: answers(url, verify=context), "a page over TLS")
        assert "max-age" in httpx.get(url, verify=context, timeout=20).headers["strict-transport-security"]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)
        process.stderr.close()


def test_a_line_for_a_user_is_made_from_stdin():
    made = subprocess.run(
        [sys.executable, "-m", "scanside", "page-password", "doctor"],
        input="correct horse\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert made.stdout.startswith("doctor:scrypt:")
    assert "correct" not in made.stdout


def test_destinations_are_asked_whether_they_answer(tmp_path: Path, pacs):
    config = config_for(tmp_path / "node", pacs.port)
    peers = Peers(config)
    assert peers.look()[0].answers is None
    peers.ask()
    assert peers.look()[0].answers is True
    pacs.stop()
    peers.ask()
    (told,) = peers.look()
    assert (told.answers, "PACS at 127.0.0.1" in told.problem) == (False, True)
    assert told.at == pytest.approx(time.time(), abs=60)


@pytest.mark.parametrize(
    ("page", "mistake"),
    [
        ('address = "0.0.0.0"', 'page.address: "0.0.0.0" is seen from the network: name page.users'),
        ('address = "ct-room.hospital"', "is seen from the network"),
        ("tls = true", "page.tls: true needs certificate, key and ca in [tls]"),
        ('viewer = "https://v/{study}"', "has placeholders that nothing fills (study)"),
        ('viewer = "https://v/{study_uid"', "is no template"),
        ('viewer = "javascript:alert(1)"', "is no address of a viewer"),
        ('viewer = "https://v/{study_uid!r}"', "has a placeholder with more"),
    ],
)
def test_a_page_that_should_not_be_served_is_refused(tmp_path: Path, page: str, mistake: str):
    path = tmp_path / "node.toml"
    path.write_text(f"[page]\nport = 8443\n{page}\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert mistake in str(caught.value)


@pytest.mark.parametrize(
    "page",
    ['address = "0.0.0.0"\nusers = "users"', 'address = "0.0.0.0"\nopen_to_all = true', 'address = "::1"', ""],
)
def test_a_page_that_may_be_served_is_not(tmp_path: Path, page: str):
    path = tmp_path / "node.toml"
    path.write_text(f"[page]\nport = 8443\n{page}\n")
    config = load(path)
    assert config.page.users in (None, tmp_path / "users")
