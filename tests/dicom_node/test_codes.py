from __future__ import annotations

import itertools

import pytest
from highdicom.color import CIELabColor
from pydicom.sr.codedict import codes as dictionary

from dicom_node import codes
from runtime.types import Coded, Concept, ModelIdentity

NAMES = ("intracerebral", "subdural", "epidural", "subarachnoid", "intraventricular", "contusion")


@pytest.mark.parametrize("name", NAMES)
def test_every_class_has_codes_that_fit_their_elements(name: str) -> None:
    code = codes.look_up(name)
    for concept in (code.finding, code.site):
        assert concept.scheme_designator == "SCT"
        assert concept.value.isdigit()
        assert len(concept.value) <= 16
        assert len(concept.meaning) <= 64
    assert len(code.title) <= 64
    assert code.provenance


def test_the_table_agrees_with_pydicoms_dictionary_where_that_has_the_concept() -> None:
    assert dictionary.cid7159.Hemorrhage == codes.HEMORRHAGE
    assert dictionary.cid7150.MorphologicallyAbnormalStructure == codes.MORPHOLOGICALLY_ABNORMAL
    assert dictionary.cid7469.Volume == codes.VOLUME
    assert dictionary.cid240.Present == codes.PRESENT
    assert dictionary.UCUM.CubicCentimeter == codes.CUBIC_CENTIMETER
    assert dictionary.cid7162.ArtificialIntelligence == codes.ARTIFICIAL_INTELLIGENCE
    assert dictionary.DCM.ProcessingEquipment == codes.PROCESSING_EQUIPMENT
    assert dictionary.cid7202.SourceImageForImageProcessingOperation == codes.SOURCE_IMAGE
    assert dictionary.cid7153.Brain == codes.BRAIN
    assert dictionary.cid7153.BrainVentricle == codes.BRAIN_VENTRICLE
    assert dictionary.cid7140.CranialSubarachnoidSpace == codes.CRANIAL_SUBARACHNOID_SPACE
    assert dictionary.cid7140.IntracranialStructure == codes.INTRACRANIAL_STRUCTURE
    assert codes.INTRACRANIAL_HEMORRHAGE.value == "1386000"


def test_classes_differ_in_finding_and_site_together_and_in_colour() -> None:
    rows = [codes.look_up(name) for name in NAMES]
    assert len({(row.finding.value, row.site.value) for row in rows}) == len(rows)
    for one, other in itertools.combinations(rows, 2):
        distance = sum((a - b) ** 2 for a, b in zip(one.colour, other.colour, strict=True)) ** 0.5
        assert distance > 90, (one.title, other.title)


def test_colours_survive_cielab() -> None:
    for name in NAMES:
        colour = codes.look_up(name).colour
        assert CIELabColor.from_rgb(*colour).to_rgb() == pytest.approx(colour, abs=1)


@pytest.mark.parametrize("name", ["hygroma", "a\\b", "x" * 80, ""])
def test_a_class_of_the_bundles_own_gets_the_general_codes(name: str) -> None:
    code = codes.look_up(name)
    assert (code.finding, code.site) == (codes.INTRACRANIAL_HEMORRHAGE, codes.BRAIN)
    assert 0 < len(code.title) <= 64
    assert "\\" not in code.title


def test_a_bundle_may_bring_codes_of_its_own() -> None:
    own = Coded(Concept("1", "99SITE", "Hygroma"), Concept("2", "99SITE", "Dura"))
    model = ModelIdentity("m", "1", "0", "fp32", "b", "t", {"hygroma": own, "subdural": own})
    for name in ("hygroma", "subdural"):
        code = codes.look_up(name, model)
        assert (code.finding.value, code.site.meaning) == ("1", "Dura")
    assert codes.look_up("subdural", model).colour == codes.look_up("subdural").colour
    assert codes.look_up("epidural", model) == codes.look_up("epidural")
