"""The demo: an archive, a node and a scanner on this machine, and a head that bleeds by a known amount.

The node runs as `scanside serve` runs it, in a process of its own, configured by a file that is left behind to look at.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from PIL import Image
from pydicom import dcmread
from pydicom.uid import Comprehensive3DSRStorage, SecondaryCaptureImageStorage, SegmentationStorage

from dicom_node.simulation.pacs import Pacs
from dicom_node.simulation.scanner import PushReport, push
from runtime.bundle import open_bundle
from runtime.errors import ScansideError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from dicom_node.simulation.pacs import Received

ROLES = {SegmentationStorage: "seg", Comprehensive3DSRStorage: "sr", SecondaryCaptureImageStorage: "sc"}
PATIENCE_S = 120.0
MARK = "demo.json"  # tells a folder of ours from somebody else's


class DemoError(ScansideError):
    """The demo could not run to its end."""

    exit_code: ClassVar[int] = 1


def prepare(folder: Path) -> None:
    """Make the demo's folder, or empty the one an earlier demo left.

    Raises
    ------
    DemoError : the folder holds something else

    """
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise DemoError(f"{folder} is not empty and not a demo's: choose another with --out")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARK).write_text("{}\n")


def run(
    images: Sequence[Path],
    truth_ml: Mapping[str, float],
    folder: Path,
    *,
    rate: float | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Push a series through a node into an archive and tell what came out.

    Parameters
    ----------
    images : the CT series
    truth_ml : what is in it
    folder : prepared; configuration, slices, results, archive and pictures go there
    rate : slices a second; None is as fast as it goes
    say : told what is going on

    Returns
    -------
    the JSON document of `scanside demo --json`

    Raises
    ------
    DemoError : the node did not start, or slices were refused

    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the node is stopped with it
    pacs = Pacs(folder / "pacs")
    pacs.start()
    try:
        config = folder / "node.toml"
        config.write_text(_configuration(pacs.port))
        with _node(config, folder) as port:
            say(f"node on port {port}, PACS on port {pacs.port}; the scanner pushes {len(images)} slices")
            sent = push(images, ("127.0.0.1", port), calling_ae="SCANNER", called_ae="SCANSIDE", rate=rate)
            if sent.failed:
                raise DemoError(f"the node refused {len(sent.failed)} slices: {sent.failed[0].reason}")
            complete = pacs.wait_for(lambda received: _is_complete(received, bool(truth_ml)), PATIENCE_S)
        return _tell(folder, truth_ml, sent, list(pacs.received), ok=complete)
    finally:
        pacs.stop()


def _configuration(pacs_port: int) -> str:
    return f"""# written by `scanside demo`; port 0 takes any free one
[node]
port = 0
folder = "node"
allowed_calling_aes = ["SCANNER"]
free_floor_gb = 0.2

[[destinations]]
name = "pacs"
ae_title = "PACS"
host = "127.0.0.1"
port = {pacs_port}

[log]
format = "json"
"""


@contextmanager
def _node(config: Path, folder: Path) -> Iterator[int]:
    """Run `scanside serve` and give its port; at the end ask it to stop."""
    log = folder / "node.log"
    command = [sys.executable, "-P", "-m", "scanside", "serve", "--config", str(config)]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)  # noqa: S603  # our own command
    try:
        yield _wait_until_ready(process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> int:
    """Its port, once it listens and has rehearsed: a node stands there for longer before a scanner calls."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and process.poll() is None:
        told = log.read_text()
        started = re.search(r'"port": (\d+).*"event": "node_started"|"event": "node_started".*"port": (\d+)', told)
        if started and re.search(r'"event": "(rehearsed|not_rehearsed|rehearsal_failed)"', told):
            return int(started[1] or started[2])
        time.sleep(0.02)
    raise DemoError(f"the node did not start; the end of {log}:\n{log.read_text()[-2000:]}")


def _is_complete(received: Sequence[Received], bleeds: bool) -> bool:
    """SR and all Secondary Captures are here, and the SEG; it goes last."""
    roles = {ROLES.get(sop_class) for _, sop_class, _ in received}
    return {"sr", "sc", "seg"} <= roles if bleeds else {"sr", "sc"} <= roles


def _tell(
    folder: Path, truth_ml: Mapping[str, float], sent: PushReport, received: Sequence[Received], *, ok: bool
) -> dict[str, Any]:
    reports = sorted((folder / "node" / "results").glob("*/*/revision-*/report.json"))
    if not reports:
        raise DemoError(f"no report after {PATIENCE_S:g} s: see {folder / 'node.log'}")
    report = json.loads(reports[-1].read_text())
    stored: defaultdict[str, list[str]] = defaultdict(list)
    for _, sop_class, path in received:
        stored[ROLES.get(sop_class, "other")].append(os.path.relpath(path))
    found = {finding["name"]: finding["volume_ml"] for finding in report["findings"]}
    model = report["model"]
    return {
        "ok": ok,
        "findings": [
            {"class": name, "volume_ml": round(found.get(name, 0.0), 3), "truth_ml": round(truth_ml.get(name, 0.0), 3)}
            for name in sorted({*found, *truth_ml}, key=lambda name: -max(found.get(name, 0), truth_ml.get(name, 0)))
        ],
        "decision": report["decision"],
        "slices": report["slices"],
        "provisional": report["provisional"],
        "missing": report["missing"],
        "timings_ms": {
            "push": round(sent.seconds * 1000, 1),
            "last_slice_to_findings": round((report["composed"] - sent.last_acknowledged) * 1000, 1),
            "last_slice_to_pacs": round((max(at for at, _, _ in received) - sent.last_acknowledged) * 1000, 1),
        },
        "slices_per_s": round(len(sent.sent) / sent.seconds, 1),
        "pacs": {role: next(iter(stored[role]), None) for role in ("seg", "sr", "sc")},
        "pictures": [os.path.relpath(path) for path in _pictures(stored["sc"], folder)],
        "backend": model["backend"],
        "model": f"{model['name']} {model['version']}",
        "bundle": os.path.relpath(open_bundle().folder),
        "folder": os.path.relpath(folder),
    }


def _pictures(captures: Sequence[str], folder: Path) -> list[Path]:
    """The Secondary Captures as PNG, for whoever has no DICOM viewer at hand."""
    pictures = []
    for capture in captures:
        image = dcmread(capture)
        pictures.append(folder / f"picture-{image.InstanceNumber}.png")
        Image.fromarray(image.pixel_array).save(pictures[-1])
    return sorted(pictures)
