"""The results of one analysis: SEG, SR, Secondary Captures and PDF, built together."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
import warnings
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import structlog
from pydicom.config import disable_value_validation

from dicom_node.results import codes, notice, painter, seg, source, sr
from dicom_node.results.capture import Shown
from dicom_node.results.uids import Issue

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from datetime import datetime

    from numpy.typing import NDArray
    from pydicom.dataelem import RawDataElement
    from pydicom.dataset import Dataset

    from runtime.types import ModelIdentity, Report

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Form:
    """What results look like, as a site has configured it.

    Attributes
    ----------
    segmentation : ``"binary"`` or ``"labelmap"``
    pdf : whether the report is written as Encapsulated PDF, too
    codes : of classes by name, in place of the bundle's and the table's

    """

    segmentation: Literal["binary", "labelmap"] = "binary"
    pdf: bool = False
    codes: Mapping[str, codes.OwnCode] = field(default_factory=dict)

    @classmethod
    def of(cls, results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> Form:
        """As the sections ``[results]`` and ``[[codes]]`` say it, in what JSON has.

        Parameters
        ----------
        classes : of the model

        Raises
        ------
        CodeError : a code for a class that the model does not have

        """
        codes.check_names((row["name"] for row in rows), classes)
        return cls(results["segmentation"], results["pdf"], codes.own(rows))


USUAL = Form()


def prepare(header: Dataset) -> source.Own | Dataset:
    """What can be settled of a slice before the others are there; the header as it is, where nothing can."""
    try:
        with quoting_nobody():
            own = source.own(header)
            return dataclasses.replace(own, groups=seg.own_groups(own.copy))
    except Exception:  # noqa: BLE001  # `make` comes upon it again
        return header


def make(
    sources: Sequence[source.Own | Dataset],
    labels: Sequence[NDArray[np.uint8]],
    grey: Mapping[str, NDArray[np.uint8]],
    report: Report,
    *,
    revision: int,
    started: datetime,
    predecessor: Dataset | None = None,
    form: Form = USUAL,
    draw: painter.Draw = painter.draw,
) -> Iterator[tuple[str, Dataset]]:
    """Make the results of one series: each with its name, as soon as it is there.

    The same arguments give the same objects, byte for byte: a result that is made again after a crash is the one an
    archive may already have.

    Parameters
    ----------
    sources : headers of the series without PixelData, in stack order, or what `prepare` made of them
    labels : of each of them ``(H, W)``, class index per pixel
    grey : slices to picture at the brain window, by key (see `montage.pictured`, `capture.Shown`)
    report : what was found
    revision : 1, and one more each time the series is analysed again with other slices
    started : when the analysis began
    predecessor : the SR that this revision's replaces
    form : what they are to look like
    draw : `dicom_node.results.painter.draw`, or that of a `dicom_node.results.painter.Painter`, who does it meanwhile

    """
    if len(sources) != len(labels):
        raise ValueError(f"{len(sources)} source slices and {len(labels)} label maps: each slice needs its own")
    with quoting_nobody():
        legal, repairs = source.normalise(sources)
        first, keys = legal[0], [source.slice_key(one) for one in legal]
        _log_repairs(str(first.SeriesInstanceUID), repairs)
        issue = Issue.of(
            first,
            report.model,
            revision=revision,
            started=started,
            content=_content(keys, labels, report, form),
            codes=form.codes,
        )
    if unknown := ", ".join(sorted(grey.keys() - {*keys})):
        raise ValueError(f"pictures of slices that are not of this series: {unknown}")
    bleeding = {key for finding in report.findings for key in finding.keys}
    shown = {
        key: Shown(source, grey[key], of_slice if key in bleeding else None)
        for key, source, of_slice in zip(keys, legal, labels, strict=True)
        if key in grey
    }
    own = {key: one.groups for key, one in zip(keys, sources, strict=True) if isinstance(one, source.Own)}
    pictures = draw(keys, shown, report, issue)
    with closing(_made(legal, labels, report, issue, form, predecessor, pictures, own)) as made:
        while True:
            with quoting_nobody():  # and not while whoever gets one is at it
                one = next(made, None)
            if one is None:
                return
            _forget_the_clock(one[1])
            yield one


def _made(
    legal: Sequence[Dataset],
    labels: Sequence[NDArray[np.uint8]],
    report: Report,
    issue: Issue,
    form: Form,
    predecessor: Dataset | None,
    pictures: Iterator[Dataset],
    own: Mapping[str, Sequence[RawDataElement]],
) -> Iterator[tuple[str, Dataset]]:
    segmentation = seg.build(legal, labels, report, issue, form.segmentation, own)
    if segmentation is not None:
        yield "seg", segmentation
    yield "sr", sr.build(legal, segmentation, report, issue, predecessor)
    images = []
    for image in pictures:
        images.append(image)
        yield f"sc-{len(images)}", image
    if form.pdf:
        yield "pdf", _print(legal, images, report, issue)


def _print(legal: Sequence[Dataset], images: Sequence[Dataset], report: Report, issue: Issue) -> Dataset:
    from dicom_node.results import pdf  # noqa: PLC0415  # whoever does not want it loads no PDF library

    return pdf.build(legal, images, report, issue)


def _content(keys: Sequence[str], labels: Sequence[NDArray[np.uint8]], report: Report, form: Form) -> str:
    """Hash of all that results are made of, but for what UIDs are derived from anyway.

    Of label maps that is those that show a finding: what else they count is in the report.
    """
    told = {"slices": keys, "report": dataclasses.asdict(report), "form": dataclasses.asdict(form)}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    bleeding = {key for finding in report.findings for key in finding.keys}
    for key, one in zip(keys, labels, strict=True):
        if key in bleeding:
            rows = np.flatnonzero(one.any(axis=1)).astype("<u4")  # the others, of which there are more, show nothing
            digest.update(json.dumps(one.shape).encode())
            digest.update(rows.data)
            digest.update(one[rows].data)
    return digest.hexdigest()


def _log_repairs(series: str, repairs: source.Repairs) -> None:
    """Say by keyword what is not as the source has it, and what is illegal and stays: values may name the patient."""
    if repairs.repaired or repairs.kept:
        log.info("sources_repaired", series=series, keywords=repairs.repaired, kept=repairs.kept)


def build_notice(header: Dataset, reason: str, model: ModelIdentity, **about: Any) -> Dataset:
    """Build what a series gets that was not analysed: parameters are those of `dicom_node.results.notice.build`."""
    with quoting_nobody():
        image, repairs = notice.build(header, reason, model, **about)
    _log_repairs(str(header.get("SeriesInstanceUID", "")), repairs)
    _forget_the_clock(image)
    return image


def whose(header: Dataset) -> dict[str, str]:
    """`dicom_node.results.source.patient`, quoted to no log."""
    with quoting_nobody():
        return source.patient(header)


def to_json(report: Report, received: int, form: Form = USUAL, **at: float | None) -> str:
    """A report as JSON, with when it was composed, what else is told (seconds since the epoch), and how many came.

    What each finding is called in the results stands with it: whoever tells of it later says the same.
    """
    told = {"composed": time.time(), **at, "received": received, **dataclasses.asdict(report)}
    for finding in told["findings"]:
        written = codes.look_up(finding["name"], report.model, form.codes)
        code = written.finding
        finding |= {"title": written.title, "code": [code.value, code.scheme_designator, code.meaning]}
    return json.dumps(told, indent=2) + "\n"


@contextmanager
def quoting_nobody() -> Iterator[None]:
    """Silence what highdicom and pydicom say of values they are given.

    They quote the value, as a warning or in their log, and it may be the patient's: highdicom warns of every name of a
    single component, pydicom of every PatientID that is too long. What had to be repaired is logged by keyword instead.
    """
    with disable_value_validation(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _forget_the_clock(dataset: Dataset) -> None:
    """Remove the wall-clock times that highdicom adds; ContentDate and ContentTime say when the analysis began."""
    dataset.pop("InstanceCreationDate", None)  # a picture that is made of another one has none
    dataset.pop("InstanceCreationTime", None)
    for equipment in dataset.ContributingEquipmentSequence:
        equipment.pop("ContributionDateTime", None)
