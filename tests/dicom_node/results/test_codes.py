from __future__ import annotations

import itertools

import pytest
from highdicom.color import CIELabColor
from pydicom.sr.codedict import codes as dictionary

from dicom_node.configuration import snomed
from dicom_node.results import codes
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


def test_the_configuration_goes_before_the_bundle_and_the_bundle_before_the_table():
    brought = Coded(Concept("1", "99SITE", "Hygroma"), Concept("2", "99SITE", "Dura"))
    model = ModelIdentity("m", "1", "0", "fp32", "b", "t", {"hygroma": brought, "subdural": brought})
    own = {"subdural": codes.OwnCode(codes.HEMORRHAGE, codes.BRAIN, "Subdural haematoma", (1, 2, 3))}
    configured, bundles, tables = (codes.look_up(name, model, own) for name in ("subdural", "hygroma", "epidural"))
    assert (configured.finding, configured.site) == (codes.HEMORRHAGE, codes.BRAIN)
    assert (configured.title, configured.colour) == ("Subdural haematoma", (1, 2, 3))
    assert configured.provenance == "the configuration's"
    assert bundles.provenance == "the bundle's own"
    assert tables == codes.look_up("epidural")
    plain = codes.look_up("subdural", None, {"subdural": codes.OwnCode(codes.HEMORRHAGE, codes.BRAIN)})
    assert (plain.title, plain.colour) == (codes.look_up("subdural").title, codes.look_up("subdural").colour)


def test_codes_of_classes_that_the_model_does_not_have_are_refused():
    codes.check_names(["subdural"], ["background", "subdural"])
    with pytest.raises(codes.CodeError, match="name subdurla; the model has subdural"):
        codes.check_names(["subdurla", "subdural"], ["background", "subdural"])


def test_every_snomed_code_of_the_table_has_its_check_digit():
    for name in NAMES:
        for code in (codes.look_up(name).finding, codes.look_up(name).site):
            assert snomed.is_identifier(code.value), code


@pytest.mark.parametrize("place", range(8))
def test_a_wrong_digit_and_swapped_neighbours_are_found(place: int):
    value = "35486000"
    for digit in set("0123456789") - {value[place]}:
        assert not snomed.is_identifier(value[:place] + digit + value[place + 1 :])
    swapped = value[:place] + value[place : place + 2][::-1] + value[place + 2 :]
    assert snomed.is_identifier(swapped) == (swapped == value)


@pytest.mark.parametrize("value", ["", "0", "00000", "T-A0100", "12345", "3" * 19])
def test_what_has_not_the_shape_of_a_snomed_code(value: str):
    assert not snomed.is_identifier(value)
