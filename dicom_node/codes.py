"""The one table of clinical codes and colours: what each class of haemorrhage is called in DICOM.

No DICOM context group holds a subtype of intracranial haemorrhage (all CIDs of PS3.16 searched). So the segment's
property type is always (50960005, SCT, Hemorrhage), which CID 7159 has, with its anatomic region; the subtype is the
Finding of the report. SNOMED CT is used under the DICOM agreement (PS3.16 section 8.1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from pydicom.sr.coding import Code

if TYPE_CHECKING:
    from runtime.types import ModelIdentity

Colour = tuple[int, int, int]

MORPHOLOGICALLY_ABNORMAL = Code("49755003", "SCT", "Morphologically Abnormal Structure")  # CID 7150
HEMORRHAGE = Code("50960005", "SCT", "Hemorrhage")  # CID 7159, included in CID 7151
INTRACRANIAL_HEMORRHAGE = Code("1386000", "SCT", "Intracranial hemorrhage")

PRESENCE = Code("705057003", "SCT", "Presence")
PRESENT = Code("52101004", "SCT", "Present")  # CID 240
ABSENT = Code("2667000", "SCT", "Absent")
INDETERMINATE = Code("82334004", "SCT", "Indeterminate")

VOLUME = Code("118565006", "SCT", "Volume")  # CID 218, CID 7469
NUMBER_OF_LESIONS = Code("246206008", "SCT", "Number of lesions")
CUBIC_CENTIMETER = Code("cm3", "UCUM", "cubic centimeter")
COMPONENTS = Code("{components}", "UCUM", "components")

CT_PROCEDURE = Code("25045-6", "LN", "CT unspecified body region")  # CID 100 has no head CT
QUALITATIVE_EVALUATIONS = Code("C0034375", "UMLS", "Qualitative Evaluations")  # TID 1500 row 12
CONCLUSION = Code("121077", "DCM", "Conclusion")
COMMENT = Code("121106", "DCM", "Comment")
ARTIFICIAL_INTELLIGENCE = Code("123110", "DCM", "Artificial Intelligence")  # CID 7162
PROCESSING_EQUIPMENT = Code("109102", "DCM", "Processing Equipment")  # CID 7005
SOURCE_IMAGE = Code("121322", "DCM", "Source image for image processing operation")  # CID 7202
DEVICE = Code("121007", "DCM", "Device")  # CID 270

BRAIN = Code("12738006", "SCT", "Brain")  # CID 7153
BRAIN_VENTRICLE = Code("35764002", "SCT", "Brain ventricle")  # CID 7153
CRANIAL_SUBARACHNOID_SPACE = Code("33930006", "SCT", "Cranial Subarachnoid Space")  # CID 7140
INTRACRANIAL_STRUCTURE = Code("128319008", "SCT", "Intracranial structure")  # CID 7140


@dataclass(frozen=True, slots=True)
class FindingCode:
    """How one class of haemorrhage is written in DICOM.

    Attributes
    ----------
    title : English name for labels and legends
    finding : subtype, the Finding of the report (TID 1411 row 3b)
    site : where it lies: anatomic region of the segment, Finding Site of the report
    colour : sRGB, told apart with the usual colour-vision deficiencies and bright enough on a brain window
    provenance : where the finding's code was read, and how sure that is

    """

    title: str
    finding: Code
    site: Code
    colour: Colour
    provenance: str


_TABLE = MappingProxyType(
    {
        "intracerebral": FindingCode(
            title="Intracerebral haemorrhage",
            finding=Code("274100004", "SCT", "Cerebral hemorrhage"),
            site=BRAIN,
            colour=(255, 82, 70),
            provenance="FHIR value set of the RES-Q stroke registry, with its fully specified name; confidence good",
        ),
        "subdural": FindingCode(
            title="Subdural haemorrhage",
            finding=Code("35486000", "SCT", "Subdural intracranial hemorrhage"),
            site=INTRACRANIAL_STRUCTURE,
            colour=(80, 180, 255),
            provenance="OHDSI Athena concept list; confidence medium",
        ),
        "epidural": FindingCode(
            title="Epidural haemorrhage",
            finding=Code("82999001", "SCT", "Epidural intracranial hemorrhage"),
            site=INTRACRANIAL_STRUCTURE,
            colour=(255, 160, 0),
            provenance="OHDSI Athena concept list; confidence medium",
        ),
        "subarachnoid": FindingCode(
            title="Subarachnoid haemorrhage",
            finding=Code("21454007", "SCT", "Subarachnoid intracranial hemorrhage"),
            site=CRANIAL_SUBARACHNOID_SPACE,
            colour=(250, 235, 60),
            provenance="FHIR value set of the RES-Q stroke registry; confidence good",
        ),
        "intraventricular": FindingCode(
            title="Intraventricular haemorrhage",
            finding=INTRACRANIAL_HEMORRHAGE,
            site=BRAIN_VENTRICLE,
            colour=(40, 215, 150),
            provenance="fallback: public sources give five codes, so the general finding and the site say it together",
        ),
        "contusion": FindingCode(
            title="Brain contusion",
            finding=Code("34663006", "SCT", "Contusion of brain"),
            site=BRAIN,
            colour=(240, 130, 210),
            provenance="two public code lists that agree; confidence medium",
        ),
    }
)


def look_up(name: str, model: ModelIdentity | None = None) -> FindingCode:
    """Code of a class: the one that its bundle brings, or of this table; any other name is haemorrhage of the brain."""
    own = model.codes.get(name) if model else None
    row = _TABLE.get(name) or _general(name)
    if own is None:
        return row
    finding, site = (Code(one.value, one.scheme, one.meaning) for one in (own.finding, own.site))
    return replace(row, finding=finding, site=site, provenance="the bundle's own")


def _general(name: str) -> FindingCode:
    return FindingCode(
        title=name.replace("_", " ").replace("\\", "/").strip().capitalize()[:64] or "Haemorrhage",
        finding=INTRACRANIAL_HEMORRHAGE,
        site=BRAIN,
        colour=(205, 215, 225),
        provenance=f"general codes: {name!r} is not in the table",
    )
