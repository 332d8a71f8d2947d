"""The page in a real browser, with a real node: from the push to the alert, its acknowledgement, and an escalation."""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydicom import dcmread

from dicom_node.configuration.config import Config
from dicom_node.page.child import Page
from dicom_node.simulation.pacs import Pacs
from dicom_node.simulation.scanner import push
from tests.dicom_node.alerts.listener import Listener
from tests.dicom_node.conftest import Pushable, config_for, running, wait_until
from tests.dicom_node.page.conftest import Folder

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ESCALATION_S = 20.0  # longer than a person, and a machine that has other work, take to acknowledge

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: nobody has clicked through the page"),
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),  # of pynetdicom
]


@contextmanager
def browser(width: int, height: int, *, is_touched: bool = False) -> Iterator:
    """A page of a browser that has complained of nothing by its end."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        context = started.new_context(viewport={"width": width, "height": height}, has_touch=is_touched)
        page = context.new_page()
        page.set_default_timeout(60_000)
        complaints: list[str] = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.on("request", lambda one: complaints.append(one.url) if "//127.0.0.1:" not in one.url else None)
        yield page
        context.close()
        started.close()
    assert [one for one in complaints if not one.startswith("htmx:")] == []  # of a page that was stopped on purpose


def with_page(folder: Path, pacs: Pacs, listener: Listener) -> Config:
    told = config_for(folder, pacs.port, idle_timeout_s=3.0).model_dump()
    told["page"] = {"port": 0}
    told["hl7"] = [{"name": "escalation", "host": "127.0.0.1", "port": listener.port, "after_s": ESCALATION_S}]
    return Config.model_validate(told)


def another(series: Pushable, folder: Path) -> list[Path]:
    """The same head as another patient's."""
    paths = []
    for number, path in enumerate(series.paths):
        image = dcmread(path)
        image.StudyInstanceUID, image.SeriesInstanceUID = "1.2.777", "1.2.777.1"
        image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = f"1.2.777.1.{number + 1}"
        image.PatientName, image.PatientID = "Second^Patient", "P2"
        paths.append(folder / f"{number}.dcm")
        image.save_as(paths[-1])
    return paths


def test_from_the_push_to_the_acknowledgement(bleeding: Pushable, tmp_path: Path, pacs: Pacs):
    (tmp_path / "second").mkdir()
    second = another(bleeding, tmp_path / "second")
    first_uid = str(dcmread(bleeding.paths[0], stop_before_pixels=True).SeriesInstanceUID)
    with (
        Listener() as listener,
        running(with_page(tmp_path / "node", pacs, listener)) as node,
        browser(1400, 900) as page,
    ):
        port = ("127.0.0.1", node.port)
        page.goto(f"http://127.0.0.1:{node.page.port}/")
        page.get_by_text("No scan has arrived yet").wait_for()
        page.get_by_text("answers", exact=False).first.wait_for()
        scanner = threading.Thread(
            target=push, args=(bleeding.paths, port), kwargs={"calling_ae": "CT1", "called_ae": "SCANSIDE", "rate": 30}
        )
        scanner.start()
        page.locator(".rows .badge.arriving, .rows .badge.critical").first.wait_for()  # without a reload
        page.locator(".row.unseen .badge.critical").wait_for()
        page.keyboard.press("j")
        assert page.evaluate("document.activeElement.closest('.row.unseen') !== null")
        page.keyboard.press("Enter")
        page.locator("#slice[src]").wait_for()
        page.get_by_label("Your name").fill("Dr. Grün")
        page.wait_for_timeout(2200)  # two updates later the name is there still
        assert page.get_by_label("Your name").input_value() == "Dr. Grün"
        page.get_by_role("button", name="Acknowledge").click()
        page.locator(".signed", has_text="Acknowledged by Dr. Grün").wait_for()
        scanner.join()
        sent = push(second, port, calling_ae="CT1", called_ae="SCANSIDE")
        assert not sent.failed
        _turn_through(page)
        page.keyboard.press("Escape")
        page.locator(".row.unseen", has_text="Second, Patient").wait_for()
        assert page.locator(".rows .row").first.inner_text().count("Second") == 1  # who is unseen stands first
        assert re.search(r"✓ Dr\. Grün", page.locator(".rows").inner_text())
        wait_until(lambda: listener.got, "the escalation of what nobody acknowledged")
        page.locator(".row.unseen", has_text="Second, Patient").locator("a").click()
        page.get_by_role("cell", name="escalation delivered to escalation").wait_for()
        wait_until(lambda: not owed(node), "all messages")
        _is_said_to_be_stale(page, node)
    assert all("1.2.777" in message for message in listener.got)
    assert not any(first_uid in message for message in listener.got)


def owed(node) -> list:
    return [
        message
        for alert in node._ledger.alerts()
        for message in alert.messages
        if message.state in {"sending", "waiting"} or (message.state == "queued" and message.due <= time.time())
    ]


def _turn_through(page) -> None:
    """Wheel, keys, slider, windows and mask: each does what it says."""
    _is_drawn(page)
    place = page.locator("#place")
    before = int(place.input_value())
    page.locator("#stage").hover()
    page.mouse.wheel(0, 80)
    wait_until(lambda: int(place.input_value()) == before + 2, "the slice that the wheel turns to")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("k")
    assert int(place.input_value()) == before
    page.keyboard.press("PageDown")
    page.keyboard.press("PageUp")
    assert int(place.input_value()) == before
    for key, window in (("3", "bone"), ("2", "subdural"), ("1", "brain")):
        page.keyboard.press(key)
        assert page.locator("#slice").get_attribute("src").endswith(f"/{window}.png")
        _is_drawn(page)
    assert page.locator("#mask").is_visible()
    page.keyboard.press("m")
    assert not page.locator("#mask").is_visible()
    assert page.get_by_role("button", name="Mask").get_attribute("aria-pressed") == "false"
    page.keyboard.press("m")
    place.focus()
    page.keyboard.press("Home")
    assert int(place.input_value()) == 0
    assert "slice 1 of" in page.locator("#said").inner_text()


def _is_drawn(page) -> None:
    image = "document.getElementById('slice')"
    wait_until(lambda: page.evaluate(f"{image}.complete && {image}.naturalWidth > 0"), "the slice's picture")


def _is_said_to_be_stale(page, node) -> None:
    """A page that is not answered says so before anything else."""
    page.locator("#unscripted").wait_for(state="detached")  # a click ends before scripts have run
    assert not page.locator("#stale").is_visible()
    os.kill(node.page.pid, signal.SIGSTOP)
    try:
        page.locator("#stale").wait_for(state="visible")
        assert "may be out of date" in page.locator("#stale").inner_text()
    finally:
        os.kill(node.page.pid, signal.SIGCONT)
    page.locator("#stale").wait_for(state="hidden")


@contextmanager
def served(folder: Folder) -> Iterator[Page]:
    """The page of a folder, without a node."""
    folder.journal.close()
    page = Page(folder.config())
    page.start()
    try:
        yield page
    finally:
        page.stop()


def test_a_page_without_its_script_says_that_it_stands_still(tmp_path: Path):
    with served(Folder(tmp_path / "node")) as node_page, browser(1400, 900) as page:
        page.goto(f"http://127.0.0.1:{node_page.port}/")
        page.locator("#unscripted").wait_for(state="detached")
        page.route("**/page.js", lambda route: route.fulfill(body=""))
        page.reload()
        page.locator("#unscripted").wait_for()
        assert "does not update itself" in page.locator("#unscripted").inner_text()


def test_on_a_phone_nothing_is_wider_than_it(tmp_path: Path):
    folder = Folder(tmp_path / "node")
    placed = folder.place(1, classes=(1, 2), PatientName="Wolfeschlegelsteinhausenbergerdorff^Hubert Blaine")
    folder.analyse(placed, "critical")
    with served(folder) as node_page, browser(390, 844, is_touched=True) as page:
        for address in ("/", placed.address):
            page.goto(f"http://127.0.0.1:{node_page.port}{address}")
            page.locator(".badge.critical").first.wait_for()
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, address
        page.locator("#slice[src]").wait_for()
        before = int(page.locator("#place").input_value())
        box = page.locator("#stage").bounding_box()
        page.mouse.move(box["x"] + 60, box["y"] + 100)
        page.mouse.down()
        page.mouse.move(box["x"] + 160, box["y"] + 100, steps=5)
        page.mouse.up()
        assert int(page.locator("#place").input_value()) > before
        for button in page.locator("button").all():
            assert button.bounding_box()["height"] >= 36
