"""Who may import whom, and what the service must never load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"runtime", "models", "training", "export", "calibration", "dicom_node", "benchmarks"}
ALLOWED = {
    "runtime": set(),
    "models": set(),
    "training": {"models", "runtime"},
    "calibration": {"runtime"},
    "export": {"calibration", "models", "runtime"},
    "dicom_node": {"runtime"},
    "benchmarks": {"calibration", "dicom_node", "export", "models", "runtime", "training"},
}
FORBIDDEN = {
    "runtime": {"pydicom", "pynetdicom", "highdicom", "torch", "onnx"},
    "calibration": {"torch", "pydicom"},
    "dicom_node": {"torch", "onnx"},
}


FOLDERS = (  # of dicom_node: each may import from itself and from those below it
    "operation",
    "page",
    "",  # the node itself
    "analysis",
    "simulation",
    "intake",
    "alerts",
    "delivery",
    "monitoring",
    "network",
    "configuration",
    "storage",
    "results",
    "images",
)
UPWARD = {  # but for these modules
    ("configuration/config.py", "alerts"),  # a channel's section stands beside its channel
    ("node.py", "page"),  # the node starts it
}


def modules_imported(path: Path) -> set[str]:
    """What a module imports anywhere outside `if TYPE_CHECKING`."""
    names: set[str] = set()
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        todo += ast.iter_child_nodes(node)
    return names


def imported(path: Path) -> set[str]:
    """Top-level packages of that."""
    return {name.partition(".")[0] for name in modules_imported(path)}


def test_folders_of_the_service_import_only_from_those_below_them():
    service = ROOT / "dicom_node"
    assert {path.name for path in service.iterdir() if (path / "__init__.py").exists()} | {""} == set(FOLDERS)
    upward = set()
    for module in sorted(service.rglob("*.py")):
        place = module.relative_to(service)
        folder = place.parts[0] if len(place.parts) > 1 else ""
        for name in modules_imported(module):
            package, other, *_ = f"{name}.".split(".")
            other = other if other in FOLDERS else ""
            if package == "dicom_node" and FOLDERS.index(other) < FOLDERS.index(folder):
                upward.add((place.as_posix(), other))
    assert upward == UPWARD


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_only_what_the_design_allows(package: str):
    modules = sorted((ROOT / package).rglob("*.py"))
    assert modules
    for module in modules:
        names = imported(module)
        assert names & OURS <= ALLOWED[package] | {package}, f"{module}: {names & OURS}"
        assert not names & FORBIDDEN.get(package, set()), f"{module}: {names & FORBIDDEN[package]}"


@pytest.mark.parametrize("module", sorted(p for package in ALLOWED for p in (ROOT / package).rglob("*.py")), ids=str)
def test_modules_stay_small(module: Path):
    assert len(module.read_text().splitlines()) <= 400 or "lines" in (
        ast.get_docstring(ast.parse(module.read_text())) or ""
    )


@pytest.mark.parametrize(
    "code",
    ["import scanside", "import dicom_node.node, dicom_node.analysis.worker", "import dicom_node.simulation.demo"],
)
def test_the_service_loads_neither_torch_nor_onnx(code: str):
    """What `scanside serve` and its worker import, asked of a fresh interpreter."""
    research = {"torch", "onnx", "training", "models", "export", "calibration", "benchmarks"}
    ask = f"{code}; import sys; print(sorted({research} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.strip() == "[]"
