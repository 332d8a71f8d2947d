"""A report for whoever has no PACS at hand: one HTML file with all in it, and a montage as PNG. Neither asks a network.

The file opens in any browser, also in ten years: slices at three windows, masks on them, what was found and what not.
"""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from PIL import Image, ImageDraw, ImageFont

from dicom_node.images.gate import NotAnalysed
from dicom_node.page import slices, study, views
from dicom_node.page.app import STATIC
from dicom_node.page.slices import Pictures
from dicom_node.results import panel, picture
from runtime import millilitres

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from dicom_node.page.palette import Palette
    from dicom_node.page.slices import Entry, Masks

MOST_SLICES = 200  # in the report; of a thinner series every second, third ... and the key slices: 0.08 MB each
TILES, COLUMNS, TILE = 30, 6, 256  # of the montage
HEADER, FOOTER, MARGIN = 64, 34, 14


def write(
    paths: Sequence[Path],
    folder: Path,
    report: Mapping[str, Any],
    series_uid: str,
    *,
    palette: Palette,
    hide_names: bool,
) -> tuple[Path, Path]:
    """Write ``report.html`` and ``montage.png`` beside the results of a series.

    Parameters
    ----------
    paths : files of the series
    folder : of its results; the masks are those of ``seg.dcm`` there
    report : as ``report.json`` has it
    series_uid : to name it by
    palette : titles and colours of the classes
    hide_names : leave the patient's name and birth date out

    """
    pictures = Pictures(palette)
    stacked = pictures.entries(paths)
    masks = pictures.masks(folder / "seg.dcm")
    html, montage = folder / "report.html", folder / "montage.png"
    html.write_text(
        _page(pictures, stacked, masks, report, slices.patient(paths), series_uid, palette, hide_names=hide_names),
        encoding="utf-8",
    )
    montage.write_bytes(picture.png(_montage(pictures, stacked, masks, report, palette)))
    return html, montage


def _page(
    pictures: Pictures,
    stacked: Sequence[Entry],
    masks: Masks,
    report: Mapping[str, Any],
    patient: Mapping[str, str],
    series_uid: str,
    palette: Palette,
    *,
    hide_names: bool,
) -> str:
    keys = {each["key_slice"] for each in report["findings"]}
    every = -(-len(stacked) // MOST_SLICES) or 1
    chosen = [one for place, one in enumerate(stacked) if place % every == 0 or one.key in keys]
    shown = [
        told
        for entry in chosen
        if not isinstance(hu := pictures.hu(entry), NotAnalysed)
        for told in [_slice(entry, hu, masks)]
    ]
    listed = study.Study(dict(report), None, (), (), tuple(chosen), masks)
    left, right = slices.sides(chosen)
    stack = {
        "key": min(listed.key_slice, max(0, len(shown) - 1)),
        "sides": [left, right],
        "colours": {name: palette.hexadecimal(name) for name in masks.classes.values()},
        "slices": shown,
    }
    environment = views.environment(palette)
    environment.globals["hide_names"] = hide_names
    return environment.get_template("report.html").render(
        report=report,
        level=report["decision"]["level"],
        patient=patient,
        series_uid=series_uid,
        every=every,
        of=len(stacked),
        windows=picture.WINDOWS,
        style=_inlined("page.css"),
        script=_inlined("viewer.js"),
        stack=Markup(json.dumps(stack).replace("<", "\\u003c")),  # noqa: S704 (no tag can end the script)
    )


def _inlined(name: str) -> Markup:
    """A file of ours as it is."""
    return Markup((STATIC / name).read_text(encoding="utf-8"))  # noqa: S704


def _slice(entry: Entry, hu: NDArray[np.int16], masks: Masks) -> dict[str, Any]:
    labels = masks.labels.get(entry.key)
    above = None if labels is None else _data("png", picture.small_png(picture.overlay(labels, masks.colours)))
    return {
        "number": entry.number,
        "size": picture.shown_size(entry.plane, entry.shape),
        "pictures": {
            name: _data("jpeg", picture.jpeg(picture.grey(hu, window))) for name, window in picture.WINDOWS.items()
        },
        "mask": above,
        "classes": masks.shown(entry.key),
    }


def _data(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _montage(
    pictures: Pictures, stacked: Sequence[Entry], masks: Masks, report: Mapping[str, Any], palette: Palette
) -> NDArray[np.uint8]:
    """Slices from foot to head at the brain window with contours, under what was decided."""
    places = sorted(set(np.linspace(0, len(stacked) - 1, min(TILES, len(stacked))).round().astype(int).tolist()))
    chosen = [
        (stacked[place], hu) for place in places if not isinstance(hu := pictures.hu(stacked[place]), NotAnalysed)
    ]
    rows = -(-len(chosen) // COLUMNS) or 1
    canvas = Image.new("RGB", (COLUMNS * TILE, HEADER + rows * TILE + FOOTER), panel.BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    small, normal, large = (ImageFont.load_default(points) for points in (14, 18, 26))
    for index, (entry, hu) in enumerate(chosen):
        corner = TILE * (index % COLUMNS), HEADER + TILE * (index // COLUMNS)
        tile = picture.drawn(hu, masks.labels.get(entry.key), masks.colours)
        width, height = picture.shown_size(entry.plane, entry.shape)
        size = round(TILE * width / max(width, height)), round(TILE * height / max(width, height))
        tile = tile.resize(size, Image.Resampling.LANCZOS)
        canvas.paste(tile, (corner[0] + (TILE - size[0]) // 2, corner[1] + (TILE - size[1]) // 2))
        draw.text((corner[0] + 6, corner[1] + 4), str(entry.number), panel.WHITE, small)
    level = report["decision"]["level"]
    wide = 2 * MARGIN + int(large.getlength(level.upper()))
    draw.rectangle((0, 0, wide, HEADER - 8), panel.LEVEL_COLOURS.get(level, panel.LEVEL_COLOURS["routine"]))
    draw.text((MARGIN, (HEADER - 8) / 2), level.upper(), panel.WHITE, large, anchor="lm")
    x = wide + 2 * MARGIN
    for each in report["findings"]:
        said = f"{palette.title(each['name'])} {millilitres.said(each['volume_ml'])}"
        draw.rectangle((x, 12, x + 14, 26), fill=palette.colour(each["name"]))
        draw.text((x + 22, 19), said, panel.WHITE, normal, anchor="lm")
        x += 22 + int(normal.getlength(said)) + 2 * MARGIN
    told = [report["decision"]["reason"], *report["missing"]] if not report["provisional"] else report["missing"]
    state = "PROVISIONAL: " if report["provisional"] else ""
    draw.text((wide + 2 * MARGIN, 42), f"{state}{'; '.join(told)}"[:170], panel.DIM, small, anchor="lm")
    model = f"{report['model']['name']} {report['model']['version']}"
    window = f"W {panel.BRAIN.width_hu} L {panel.BRAIN.level_hu}"
    draw.text(
        (MARGIN, canvas.height - FOOTER / 2),
        f"Research use only, not a medical device. {report['slices']} slices, {window}, {model}",
        panel.WHITE,
        small,
        anchor="lm",
    )
    return np.asarray(canvas)
