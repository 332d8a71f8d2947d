"""What the vendors write for soft tissue and for bone, and what comes first."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydicom.dataset import Dataset

from dicom_node.analysis.kernel import is_bone, rank
from dicom_node.images.gate import BONE_KERNELS


def header(kernel: object = None, thickness: object = None) -> Dataset:
    made = Dataset()
    if kernel is not None:
        made.ConvolutionKernel = kernel
    if thickness is not None:
        made.SliceThickness = thickness
    return made


@pytest.mark.parametrize(
    "kernel",
    ["BONE", "BONEPLUS", "EDGE", "bone", "H60s", "H70h", "B70f", "J70h", "Hr64", "Hr59d", "FC30", "FC81", "FC30-H",
     "YA", "D", ["Hr64f", "3"]],
)  # fmt: skip
def test_bone(kernel):
    assert is_bone(header(kernel), BONE_KERNELS)


@pytest.mark.parametrize(
    "kernel",
    [None, "", "STANDARD", "STD+", "SOFT", "DETAIL", "H31s", "J40s", "B30s", "Hr38", "Hc40f", ["Hr38f", "3"], "FC21",
     "FC26", "FC68", "UA", "UB", "B", "11", "Br36"],
)  # fmt: skip
def test_soft_tissue(kernel):
    assert not is_bone(header(kernel), BONE_KERNELS)


def test_soft_tissue_before_bone_and_thick_before_thin():
    series = {
        "thin bone": header("H60s", "0.6"),
        "thick bone": header("H60s", "5"),
        "thin": header("H31s", "0.6"),
        "thick": header("H31s", "4.8"),
        "thicker than enough": header("H31s", "10"),
        "of nothing": header(),
    }
    order = sorted(series, key=lambda name: rank(series[name], BONE_KERNELS))
    assert order == ["thicker than enough", "thick", "thin", "of nothing", "thick bone", "thin bone"]


def test_a_site_s_own_patterns():
    assert is_bone(header("Dental-X"), ["dental-.*"])
    assert not is_bone(header("BONE"), [])


def test_a_configuration_is_read_without_the_writers_of_results():
    """The default patterns are in it; highdicom takes longer to load than all else."""
    told = subprocess.run(
        [sys.executable, "-c", "import sys, dicom_node.configuration.sections; print('highdicom' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout == "False\n"
