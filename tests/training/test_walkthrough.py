"""docs/training.md in its own words: from a COCO export to a bundle that analyses a series."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training import recipe

SOURCES = (recipe.Phantoms, recipe.Coco, recipe.Pairs, recipe.Dicom, recipe.Nifti, recipe.CtIch)
PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def make_export(folder: Path) -> None:
    """Ten patients with three pictures each; a bright square of either class on two of them."""
    folder.mkdir()
    images, annotations = [], []
    for number in range(30):
        picture = np.full((96, 96), 110, np.uint8)
        name = f"p{number // 3:03d}_{number % 3:03d}.png"
        if kind := number % 3:
            top = 10 + 40 * (kind == 2)
            picture[top : top + 30, 20:50] = 220
            outline = [20, top, 50, top, 50, top + 30, 20, top + 30]
            annotations.append(
                {"id": number, "image_id": number, "category_id": kind, "segmentation": [outline], "iscrowd": 0}
            )
        Image.fromarray(picture).save(folder / name)
        images.append({"id": number, "file_name": name, "height": 96, "width": 96})
    categories = [{"id": 1, "name": "SDH"}, {"id": 2, "name": "ICH"}]
    (folder / "_annotations.coco.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )


def run(line: str, folder: Path) -> str:
    command = line.replace("scanside", f"{shlex.quote(sys.executable)} -P -m scanside", 1)
    done = subprocess.run(["sh", "-c", command], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{line}: {done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_a_new_user_gets_from_a_coco_export_to_a_served_bundle(tmp_path: Path):
    make_export(tmp_path / "bleeds")
    text = blocks("toml")[0]
    smaller = text.replace("epochs = 40", "epochs = 1").replace("[24, 48, 96, 160, 192]", "[4, 8]")
    assert smaller.count("epochs = 1\n") == 1
    (tmp_path / "recipe.toml").write_text(smaller)
    lines = [line for block in blocks("console") for line in block.splitlines() if line.startswith("scanside ")]
    assert [line.split()[1] for line in lines] == ["train", "export", "evaluate", "bundle", "config"]
    for line in lines:
        run(line, tmp_path)
    assert {path.name for path in (tmp_path / "runs" / "bleeds").iterdir()} >= {
        "best.pt", "curves.csv", "curves.png", "MODEL_CARD.md", "last.pt",
    }  # fmt: skip
    scores = json.loads((tmp_path / "runs" / "bundle" / "scores.json").read_text())
    assert (scores["patients"], scores["cases"]) == (2, 6), "a fifth of ten patients"
    assert (tmp_path / "runs" / "scores" / "overlays").is_dir()
    run("scanside phantom head --lesion sdh:20 --spacing 7", tmp_path)
    told = run("scanside analyse head --out results --bundle runs/bundle", tmp_path)
    assert "bleeds" in told or list((tmp_path / "results").rglob("sr.dcm"))
    (tmp_path / "node.toml").write_text(blocks("toml")[1] + blocks("toml")[2])
    checked = subprocess.run(
        [sys.executable, "-P", "-m", "scanside", "check", "--config", "node.toml"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "bleeds 1.0.0" in checked.stdout
    assert checked.returncode == 0, checked.stdout


def test_every_key_of_a_recipe_is_explained():
    for section in (recipe.Recipe, recipe.Input, recipe.Split, recipe.Augmentation, recipe.Training, *SOURCES):
        for key in section.model_fields:
            assert f"`{key}`" in PAGE or f"[{key}]`" in PAGE, f"{section.__name__}.{key}"
