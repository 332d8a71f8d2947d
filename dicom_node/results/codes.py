"""The one table of clinical codes and colours: what each class of haemorrhage is called in DICOM.

A bundle may bring codes for its classes, and a site may have its own in the configuration, which go before both.

No DICOM context group holds a subtype of intracranial haemorrhage (all CIDs of PS3.16 searched). So the segment's
property type is always (50960005, SCT, Hemorrhage), which CID 7159 has, with its anatomic region; the subtype is the
Finding of the report. SNOMED CT is used under the DICOM agreement (PS3.16 section 8.1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pydicom.sr.coding import Code

from runtime.errors import ScansideError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from runtime.types import ModelIdentity

Colour = tuple[int, int, int]
OWN_SCHEME = "99SCANSIDE"  # of what no standard has a code for; 99 makes it a private one (PS3.3 8.2)

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
# in this scheme so that no reader takes either for the finding's volume
LARGEST = Code("largest", OWN_SCHEME, "Size of the largest component")
ABC2 = Code("abc2", OWN_SCHEME, "ABC/2 estimate of the largest component")
COMPONENTS = Code("{components}", "UCUM", "components")

CT_PROCEDURE = Code("25045-6", "LN", "CT unspecified body region")  # CID 100 has no head CT
MEASUREMENT_REPORT = Code("126000", "DCM", "Imaging Measurement Report")  # CID 7021
QUALITATIVE_EVALUATIONS = Code("C0034375", "UMLS", "Qualitative Evaluations")  # TID 1500 row 12
CONCLUSION = Code("121077", "DCM", "Conclusion")
COMMENT = Code("121106", "DCM", "Comment")
ARTIFICIAL_INTELLIGENCE = Code("123110", "DCM", "Artificial Intelligence")  # CID 7162
PROCESSING_EQUIPMENT = Code("109102", "DCM", "Processing Equipment")  # CID 7005
SOURCE_IMAGE = Code("121322", "DCM", "Source image for image processing operation")  # CID 7202
SEGMENTATION = Code("113076", "DCM", "Segmentation")  # CID 7203
DEVICE = Code("121007", "DCM", "Device")  # CID 270
BEST_ILLUSTRATION = Code("121080", "DCM", "Best illustration of finding")  # CID 6028 and others
ILLUSTRATION = Code("125201", "DCM", "Illustration of Finding")

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


@dataclass(frozen=True, slots=True)
class OwnCode:
    """A row of the configuration (``[[codes]]``); title and colour stay as they are where it has none."""

    finding: Code
    site: Code
    title: str | None = None
    colour: Colour | None = None


NONE: Mapping[str, OwnCode] = MappingProxyType({})


class CodeError(ScansideError):
    """A code for a class that the model does not have."""


def check_names(names: Iterable[str], classes: Sequence[str]) -> None:
    """Refuse codes of classes that the model does not have: with a typo, results would keep the code that was replaced.

    Raises
    ------
    CodeError

    """
    if unknown := sorted({*names} - {*classes[1:]}):
        raise CodeError(
            f"[[codes]] name {', '.join(unknown)}; the model has {', '.join(classes[1:])}: write codes for its classes"
        )


def own(rows: Iterable[Mapping[str, Any]]) -> dict[str, OwnCode]:
    """Rows of the configuration (``[[codes]]``), as JSON has them, by the class that each is for."""
    return {
        row["name"]: OwnCode(
            Code(*row["finding"]), Code(*row["site"]), row["title"], tuple(row["colour"]) if row["colour"] else None
        )
        for row in rows
    }


def look_up(name: str, model: ModelIdentity | None = None, own: Mapping[str, OwnCode] = NONE) -> FindingCode:
    """How a class is written: as the configuration says, or its bundle, or this table.

    Any other name is haemorrhage of the brain. `FindingCode.provenance` says which it was.

    Parameters
    ----------
    name : of the class
    model : whose bundle may bring codes
    own : rows of the configuration

    """
    row = _TABLE.get(name) or _general(name)
    if configured := own.get(name):
        return replace(
            row,
            title=configured.title or row.title,
            finding=configured.finding,
            site=configured.site,
            colour=configured.colour or row.colour,
            provenance="the configuration's",
        )
    brought = model.codes.get(name) if model else None
    if brought is None:
        return row
    finding, site = (Code(one.value, one.scheme, one.meaning) for one in (brought.finding, brought.site))
    return replace(row, finding=finding, site=site, provenance="the bundle's own")


def _general(name: str) -> FindingCode:
    return FindingCode(
        title=name.replace("_", " ").replace("\\", "/").strip().capitalize()[:64] or "Haemorrhage",
        finding=INTRACRANIAL_HEMORRHAGE,
        site=BRAIN,
        colour=(205, 215, 225),
        provenance=f"general codes: {name!r} is not in the table",
    )
