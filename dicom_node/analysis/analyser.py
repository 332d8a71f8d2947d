"""One series from files to results: decode, infer as slices come, and when it closes measure, report and write.

The worker process runs this for the node, `scanside analyse` on a folder: the same code with and without a network.
"""

from __future__ import annotations

import traceback
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
import structlog
from pydicom import dcmread

from dicom_node.analysis import decode, kernel
from dicom_node.analysis.series import Seen, Series
from dicom_node.images.gate import BONE_KERNELS, NotAnalysed, Reason
from dicom_node.results import montage, painter, result_set, writing
from dicom_node.storage.journal import ResultFile, Role, SeriesState
from runtime import geometry
from runtime.errors import DeviceLost, GeometryError, InferenceError
from runtime.report import compose
from runtime.session import together
from runtime.triage import is_higher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from pydicom.dataset import Dataset

    from runtime.bundle import Bundle
    from runtime.session import Session
    from runtime.triage import Rule
    from runtime.types import Report, Slice, SliceStack

    Views = Sequence[tuple[tuple[str, ...], tuple[str, ...]]]  # slices that each shows, and those that it answers

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a series.

    Attributes
    ----------
    state, reason : analysed, or not and why
    code : name of the `Reason` where it was not analysed
    report : None when it was not analysed
    files : result files, written and synced
    received : slices that came, those of another kind and those turned away included; frames count one by one
    patient : whose they are, by keyword, as far as one of them says so

    """

    state: SeriesState
    reason: str | None
    report: Report | None
    files: tuple[ResultFile, ...] = ()
    code: str | None = None
    received: int = 0
    patient: Mapping[str, str] = field(default_factory=dict)


class Analyser:
    """An opened bundle, ready for any number of series.

    Parameters
    ----------
    bundle, session : the network and the engine that runs it
    rules : triage
    min_slices : a series with fewer is not analysed
    min_coverage_mm : a series that covers less of the head is reported as provisional
    max_batch : most slices in one inference
    max_lossy_ratio : images that were compressed lossily by more are turned away
    bone_kernels : regular expressions for the ConvolutionKernel of series for bone
    form : what results look like
    draw : as of `dicom_node.results.result_set.make`

    """

    def __init__(
        self,
        bundle: Bundle,
        session: Session,
        rules: Sequence[Rule],
        *,
        min_slices: int,
        min_coverage_mm: float,
        max_batch: int,
        max_lossy_ratio: float = 1.0,
        bone_kernels: Sequence[str] = BONE_KERNELS,
        form: result_set.Form = result_set.USUAL,
        draw: painter.Draw = painter.draw,
    ) -> None:
        self.bundle, self.session, self.max_batch, self._draw = bundle, session, max_batch, draw
        self.reload(
            rules,
            min_slices=min_slices,
            min_coverage_mm=min_coverage_mm,
            max_lossy_ratio=max_lossy_ratio,
            bone_kernels=bone_kernels,
            form=form,
        )

    def reload(
        self,
        rules: Sequence[Rule],
        *,
        min_slices: int,
        min_coverage_mm: float,
        max_lossy_ratio: float,
        bone_kernels: Sequence[str],
        form: result_set.Form,
    ) -> None:
        """Go by other rules and limits, from the next slice and the next series that closes on."""
        self.form = form
        self._rules, self._max_lossy_ratio, self._bone_kernels = tuple(rules), max_lossy_ratio, tuple(bone_kernels)
        self._min_slices, self._min_coverage_mm = min_slices, min_coverage_mm

    def feed(self, series: Series, paths: Sequence[Path], on_more: Callable[[], None] = lambda: None) -> list[Seen]:
        """Decode slices of an open series, and infer those whose neighbours are there, together in batches.

        A network for volumes sees none before the series closes.

        Parameters
        ----------
        paths : files; of a multi-frame image every frame is a slice
        on_more : called after each batch but the last: a file may hold many, and many views may be due

        Raises
        ------
        DeviceLost : the engine's GPU failed or hangs; nothing is wrong with the series

        """
        seen = [Seen(path) for path in paths]
        series.files += paths
        images = ((one, image) for one in seen for image in decode.read(one.path, self._max_lossy_ratio))
        batch = list(islice(images, self.max_batch))  # no more in memory, however many frames a file has
        while batch:
            for one, image in batch:
                self._take(series, one, image)
            self._infer_due(series, on_more)
            if batch := list(islice(images, self.max_batch)):
                on_more()
        return seen

    def _take(self, series: Series, seen: Seen, image: tuple[Dataset, Slice] | NotAnalysed) -> None:
        if isinstance(image, NotAnalysed):
            series.refused.append(image)
            seen.images.append(image)
            return
        header, slice_ = image
        seen.images.append(slice_.plane)
        if slice_.key in series.paths:
            series.repeated += 1
        else:
            series.add(seen.path, header, slice_, result_set.prepare(header))
            series.rank = series.rank or kernel.rank(header, self._bone_kernels)

    def _infer_due(self, series: Series, on_more: Callable[[], None]) -> None:
        """Infer what has its neighbours, and forget HU that no view will need."""
        view = self.bundle.view
        if view.answered == 1:
            ends = view.shown // 2  # slices that may still get other neighbours
            try:
                views = self._views([key for _, key in series.order])[ends : len(series.order) - ends]
                self._infer(series, views, on_more)
            except DeviceLost:
                raise
            except InferenceError as error:  # closing tries again, and what fails then is the series' fate
                log.error("inference_failed", reason=str(error))  # noqa: TRY400
        series.forget(2 * self.max_batch + view.shown)

    def _views(self, keys: Sequence[str]) -> Views:
        """Views of a stack."""
        views = self.bundle.view.over(len(keys))
        return [(tuple(keys[i] for i in shown), tuple(keys[i] for i in answered)) for shown, answered in views]

    def _infer(self, series: Series, views: Views, on_more: Callable[[], None]) -> None:
        """Segment what each view answers, unless that was done with the same slices around it."""
        if len(series.sizes) > 1:  # no stack: closing says so
            return
        due = [view for view in views if series.looked_at.get(view[1][0]) != view[0]]
        for start in range(0, len(due), self.max_batch):
            if start:
                on_more()
            batch = due[start : start + self.max_batch]
            hu = {key: series.hu(key) for shown, _ in batch for key in shown}
            answers = self.session.infer(np.stack([[hu[key] for key in shown] for shown, _ in batch]))
            for number, (shown, answered) in enumerate(batch):
                first = number * self.bundle.view.answered
                for key, answer in zip(answered, answers[first:], strict=False):
                    series.answered(key, answer, shown, self.session.identity)

    def look(self, series: Series) -> Report | None:
        """A provisional report, whenever the slices so far make a higher level of triage than was told before.

        Pixel counts say whether that can be; only then all labels are measured. What may turn out to be no head, or
        not to be needed (a series for bone), says nothing before its end.
        """
        here = len(series.evidence)
        if here < max(self._min_slices, series.next_look) or len(series.sizes) > 1 or not series.rank or series.rank[0]:
            return None
        level = series.evidence.level(self.bundle.operating_point, self._rules)
        if not is_higher(level, series.told):
            return None
        series.next_look = here + here // 8 + 1  # should it come to nothing: not all of them again for every slice
        try:
            stack = geometry.stack({key: series.planes[key] for key in series.labels}, growing=True)
        except GeometryError:  # closing says so
            return None
        model = together([*series.engines.values()])
        report = compose(stack, series.labels, self.bundle, model, self._rules, arriving=True)
        if not is_higher(report.decision.level, series.told):
            return None
        series.told, series.next_look = report.decision.level, 0
        return report

    def close(
        self,
        series: Series,
        folder: Path,
        *,
        revision: int,
        missing: Sequence[str],
        predecessor: Path | None = None,
        siblings: Iterable[Sequence[Path]] = (),
        on_more: Callable[[], None] = lambda: None,
    ) -> Outcome:
        """Measure, report, and write the results and ``report.json`` into `folder`.

        Whatever a series does to the writers, it becomes an outcome: one series must not end the process.

        Parameters
        ----------
        missing : what makes the report provisional, as far as the caller knows
        predecessor : the SR that this one replaces
        siblings : files of each other series of the study, looked at if this one is for bone
        on_more : as of `feed`

        Raises
        ------
        DeviceLost : as of `feed`
        NoRoom : the disk is full; the series stays as it is, to be closed again

        """
        try:
            if series.rank and series.rank[0] and not predecessor:  # what has results gets those that replace them
                kernel.check_needed(
                    series,
                    siblings,
                    self._bone_kernels,
                    min_slices=self._min_slices,
                    max_lossy_ratio=self._max_lossy_ratio,
                )
            stack = self._stack(series)
            self._infer(series, self._views(stack.keys), on_more)
            return self._close(series, stack, folder, revision, missing, predecessor)
        except NotAnalysed as refusal:
            # a series of another kind lacks nothing, whatever ended it
            lacking = (*missing, *(_refusals(series.refused)[0] if series.planes else ()))
            wanting = () if refusal.reason.of_another_kind else lacking
            reason = "; ".join((str(refusal), *wanting))
            is_told = refusal.reason.leaves_out_a_head(wanting)
            files = self._notice(reason, series, folder, revision, predecessor) if is_told else ()
            return Outcome(
                SeriesState.NOT_ANALYSED, reason, None, files, refusal.reason.name, patient=self.whose(series)
            )
        except (DeviceLost, writing.NoRoom):
            raise
        except InferenceError as error:  # of ours, and about no patient
            reason = str(error)
        except Exception as error:  # noqa: BLE001  # see above; its message may quote the patient, its place can't
            frame = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"
            log.error("series_failed", reason=reason)  # noqa: TRY400  # a traceback would quote the message
        return self._failed(reason, series, folder, revision, predecessor)

    def give_up(
        self, reason: str, files: list[Path], folder: Path, *, revision: int, predecessor: Path | None = None
    ) -> Outcome:
        """Say of a series that nothing could be made of it; the reason is the caller's."""
        return self._failed(reason, Series(files=files), folder, revision, predecessor)

    def _failed(self, reason: str, series: Series, folder: Path, revision: int, predecessor: Path | None) -> Outcome:
        notice = self._notice(reason, series, folder, revision, predecessor)
        return Outcome(SeriesState.FAILED, reason, None, notice, patient=self.whose(series))

    @staticmethod
    def whose(series: Series) -> dict[str, str]:
        """Whose images they are, if one of them says so."""
        try:
            return result_set.whose(next(iter(series.headers.values()), None) or decode.legible(series.files))
        except Exception as error:  # noqa: BLE001  # as in `close`: what made the series fail may be in the header
            log.error("patient_unknown", reason=type(error).__name__)  # noqa: TRY400
            return {}

    def _notice(
        self, reason: str, series: Series, folder: Path, revision: int, predecessor: Path | None
    ) -> tuple[ResultFile, ...]:
        """A notice, if the series has an image that says whose it is."""
        try:
            header = next(iter(series.headers.values()), None) or decode.legible(series.files)
            notice = result_set.build_notice(
                header,
                reason,
                self.session.identity,
                revision=revision,
                started=series.started,
                has_results=predecessor is not None,
            )
            return _written([("notice", notice)], folder)
        except writing.NoRoom:
            raise
        except Exception as error:  # noqa: BLE001  # as above: what made the series fail may be in the header
            log.error("no_notice", reason=type(error).__name__)  # noqa: TRY400
            return ()

    def _close(
        self, series: Series, stack: SliceStack, folder: Path, revision: int, missing: Sequence[str], prior: Path | None
    ) -> Outcome:
        incomplete, left_out = _refusals(series.refused)
        incomplete += series.doubts()
        if stack.coverage_mm < self._min_coverage_mm:
            incomplete.append(
                f"the slices cover {stack.coverage_mm:.0f} mm, a whole head at least {self._min_coverage_mm:g}"
            )
        report = compose(
            stack,
            series.labels,
            self.bundle,
            together([series.engines[key] for key in stack.keys]),
            self._rules,
            missing=[*missing, *incomplete],
            left_out=left_out,
        )
        objects = result_set.make(
            [series.sources[key] for key in stack.keys],
            [series.labels[key].labels for key in stack.keys],
            montage.pictured(report, stack.keys, series.tile, series.grey),
            report,
            revision=revision,
            started=series.started,
            predecessor=dcmread(prior, stop_before_pixels=True) if prior else None,
            form=self.form,
            draw=self._draw,
        )
        with closing(objects):  # also where the disk is full: no picture may be left for the next series
            files = _written(objects, folder, result_set.to_json(report, series.received, self.form))
        return Outcome(SeriesState.ANALYSED, None, report, files, received=series.received, patient=self.whose(series))

    def _stack(self, series: Series) -> SliceStack:
        if not series.planes:
            reasons = Counter(refusal.reason for refusal in series.refused)
            # what may be a head decides, however few among reformats
            raise NotAnalysed(
                max(reasons, key=lambda one: (not one.of_another_kind, reasons[one]), default=Reason.TOO_FEW_SLICES)
            )
        if len(series.planes) < self._min_slices:
            raise NotAnalysed(Reason.TOO_FEW_SLICES, f"{len(series.planes)}, {self._min_slices} needed")
        if len(series.sizes) > 1:
            raise NotAnalysed(Reason.MIXED_SIZES)
        try:
            stack = geometry.stack(series.planes)
        except GeometryError as error:
            raise NotAnalysed(Reason.BAD_GEOMETRY, str(error)) from error
        if len(stack) < self._min_slices:
            raise NotAnalysed(Reason.TOO_FEW_SLICES, f"{len(stack)} in different places, {self._min_slices} needed")
        return stack


def _refusals(refused: Sequence[NotAnalysed]) -> tuple[list[str], list[str]]:
    """Sentences for slices that should have been analysed, and for images that were none of the head's slices."""
    counts = Counter((refusal.reason, "image" if refusal.frame is None else "frame") for refusal in refused)
    sentences = [
        (reason, f"{n} {what}{'s' * (n > 1)} not analysed: {reason.value}") for (reason, what), n in counts.items()
    ]
    incomplete = [text for reason, text in sentences if not reason.of_another_kind]
    return incomplete, [text for reason, text in sentences if reason.of_another_kind]


def _written(made: Iterable[tuple[str, Dataset]], folder: Path, told: str | None = None) -> tuple[ResultFile, ...]:
    """Result files, those first that go out first; `told` is the report as JSON."""
    uids: dict[str, tuple[str, str]] = {}

    def noted() -> Iterator[tuple[str, Dataset]]:
        for name, dataset in made:
            uids[name] = str(dataset.SOPClassUID), str(dataset.SOPInstanceUID)
            yield name, dataset

    paths = writing.write(noted(), folder, told)
    files = [ResultFile(name.partition("-")[0], path, *uids[name]) for name, path in paths.items()]
    return tuple(sorted(files, key=lambda file: get_args(Role).index(file.role)))
