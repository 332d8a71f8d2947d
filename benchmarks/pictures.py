"""Pictures of the triage page and of the report for the documents, from the code as it is.

``python -m benchmarks.pictures docs`` runs a node with an archive, pushes phantoms, and has Chromium look at what comes
of it: at a desk and on a phone. Nobody on them is a patient.
"""

from __future__ import annotations

import io
import json
import shutil
import socket
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from pydicom import dcmread

from dicom_node import status
from dicom_node.configuration.config import Config
from dicom_node.monitoring import log as logging
from dicom_node.node import Node
from dicom_node.page import offline
from dicom_node.page.palette import Palette
from dicom_node.simulation import phantom as writer
from dicom_node.simulation.pacs import Pacs
from dicom_node.simulation.scanner import push
from training.lesions import Lesion
from training.phantom import Scan, make

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DESK, PHONE = (1360, 860), (390, 844)
PATIENCE_S = 300.0
# whom the phantoms are of, what bleeds in them, and a seed
HEADS = (
    ("Phantom^Ada", (), 52),
    ("Phantom^Ben", (("epidural", 12.0),), 23),
    ("Phantom^Cleo", (("subdural", 6.0),), 31),
    ("Phantom^Dora", (("intracerebral", 30.0), ("subdural", 14.0)), 21),
)


def main(target: Path) -> None:
    """Write ``page-*.png`` and ``report.png`` into a folder."""
    logging.configure("warning", "auto")
    with tempfile.TemporaryDirectory() as scratch, _node(Path(scratch)) as (node, address):
        series = [_head(Path(scratch) / f"scan-{index}", *head) for index, head in enumerate(HEADS)]
        _push(_localizer(series[0], Path(scratch) / "localizer"), address)
        for paths in series:
            _push(paths, address)
            _wait(lambda paths=paths: _finished(node.config, paths), "a result")
            if paths is series[1]:
                node.acknowledge(1, "Dr. Lee")
        arriving = _head(Path(scratch) / "scan-5", "Phantom^Emil", (("intraventricular", 8.0),), 5)
        threading.Thread(target=_push, args=(arriving, address, 1.5), daemon=True).start()
        time.sleep(8)
        report = _report(node.config, series[3])
        with _browser() as look:
            page = f"http://127.0.0.1:{node.page.port}/"
            for name, size in (("desk", DESK), ("phone", PHONE)):
                look(page, target / f"page-{name}.png", size, None)
            for name, size in (("desk", DESK), ("phone", PHONE)):
                look(page, target / f"page-series-{name}.png", size, "Phantom, Dora")
            look(report.as_uri(), target / "report.png", DESK, None)


class _Shown(Node):
    """A node whose alerts are acknowledged as on the page."""

    def acknowledge(self, alert_id: int, by: str) -> None:
        self._ledger.acknowledge(alert_id, by)


@contextmanager
def _node(scratch: Path) -> Iterator[tuple[_Shown, tuple[str, int]]]:
    pacs = Pacs(scratch / "pacs")
    pacs.start()
    with socket.create_server(("127.0.0.1", 0)) as free:
        down = free.getsockname()[1]
    there = {"host": "127.0.0.1"}
    settings: dict[str, Any] = {
        "node": {"folder": scratch / "node", "port": 0, "free_floor_gb": 0},
        "series": {"idle_timeout_s": 4},
        "page": {"port": 0},
        "destinations": [
            {"name": "pacs", "ae_title": "PACS", "port": pacs.port, **there},
            {"name": "archive", "ae_title": "ARCHIVE", "port": down, "results": ["sr"], **there},
        ],
    }
    node = _Shown(Config.model_validate(settings))
    node.start()
    try:
        yield node, ("127.0.0.1", node.port)
    finally:
        node.stop()
        pacs.stop()


def _head(folder: Path, name: str, blood: tuple[tuple[str, float], ...], seed: int) -> list[Path]:
    made = make(tuple(Lesion(*one) for one in blood), Scan((5.0,), tilt_deg=8), seed=seed)
    paths = writer.write(made.slices, folder, tilt_deg=8)
    for path in paths:
        image = dcmread(path)
        image.PatientName = name
        image.save_as(path)
    return paths


def _localizer(paths: list[Path], folder: Path) -> list[Path]:
    folder.mkdir()
    for path in paths[:2]:
        image = dcmread(path)
        image.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        image.SeriesInstanceUID += ".1"
        image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = f"{image.SOPInstanceUID[:60]}.1"
        image.SeriesDescription = "Scout"
        image.save_as(folder / path.name)
    return sorted(folder.iterdir())


def _push(paths: list[Path], address: tuple[str, int], rate: float | None = None) -> None:
    push(paths, address, calling_ae="CT1", called_ae="SCANSIDE", rate=rate)


def _finished(config: Config, paths: list[Path]) -> bool:
    uid = str(dcmread(paths[0], stop_before_pixels=True).SeriesInstanceUID)
    return any(one.series_uid == uid and not one.is_open for one in status.look(config).series)


def _report(config: Config, paths: list[Path]) -> Path:
    uid = str(dcmread(paths[0], stop_before_pixels=True).SeriesInstanceUID)
    (folder,) = (config.node.folder / "results").glob(f"*/{uid}/revision-1")
    report = json.loads((folder / "report.json").read_text())
    return offline.write(paths, folder, report, uid, palette=Palette(), hide_names=False)[0]


def _wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"never came: {what}")
        time.sleep(0.3)


@contextmanager
def _browser() -> Iterator[Callable[[str, Path, tuple[int, int], str | None], None]]:
    from playwright.sync_api import sync_playwright  # noqa: PLC0415  # of the test group

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("chromium-browser"),
            args=["--no-sandbox", "--disable-gpu"],
        )

        def look(address: str, picture: Path, size: tuple[int, int], row: str | None) -> None:
            page = started.new_page(viewport={"width": size[0], "height": size[1]})
            page.goto(address)
            if row:
                page.locator(".row a", has_text=row).first.click()
                page.locator("#slice[src]").wait_for()
            page.wait_for_timeout(2500)
            shown = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            shown.quantize(256, dither=Image.Dither.NONE).save(picture, optimize=True)
            print(f"{picture}: {picture.stat().st_size // 1000} kB")
            page.close()

        yield look
        started.close()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
