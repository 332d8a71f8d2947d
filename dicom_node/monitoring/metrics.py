"""What a node counts and times, for Prometheus. No label is a UID, a title that a peer chose, or about a patient."""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from dicom_node.storage.journal import JournalError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from dicom_node.alerts.alert import Alert, Message
    from dicom_node.alerts.ledger import Ledger
    from dicom_node.delivery.outbox import Outbox

# from a slice's answer to a destination that was down for minutes
BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)

# from the worker's word to somebody who was asleep
ALERT_BUCKETS_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)

Stage = Literal["response", "analysis", "alert", "closing", "results", "delivery"]


class Metrics:
    """Counters and times of one node, with a registry of their own.

    ``scanside_stage_seconds`` has, by stage: *response*, from a C-STORE request to its answer; *analysis*, from a
    slice's arrival to its segmentation; *alert*, from the arrival of the slice that makes a level of triage in an open
    series to the word of it; *closing*, from a series' last slice to the decision that it is complete;
    *results*, from there to results on the disk; *delivery*, from there to a destination that has taken one.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._instances = self._counter("instances", "Instances that peers sent, by what became of them.", "outcome")
        self._associations = self._counter("associations", "Associations that have ended, by how.", "end")
        self._images = self._counter("images_not_analysed", "Images turned away, by reason.", "reason")
        self._series = self._counter("series", "Series with a result, by state and reason.", "state", "reason")
        self._decisions = self._counter("decisions", "Triage decisions, by level.", "level")
        self._audit_lost = self._counter(
            "audit_lost", "Audit messages that did not get into the file, or to the server.", "where"
        )
        self._rejections = self._counter("rejections", "Peers that were not let in, by reason.", "reason")
        self._deaths = self._counter("worker_deaths", "Worker processes that ended by themselves.")
        self._fail_over = Gauge(
            "scanside_fail_over", "Whether a local engine answers in place of servers.", registry=self.registry
        )
        self._servers = Gauge(
            "scanside_server_up", "Whether a server of the model can be asked.", ("server",), registry=self.registry
        )
        self._alerts = Histogram(
            "scanside_alert_seconds",
            "From an alert to the first channel that was told, and to who acknowledged.",
            ("until",),
            registry=self.registry,
            buckets=ALERT_BUCKETS_S,
        )
        self._stages = Histogram(
            "scanside_stage_seconds", "Time by stage.", ("stage",), registry=self.registry, buckets=BUCKETS_S
        )

    def instance(self, outcome: str) -> None:
        self._instances.labels(outcome).inc()

    def association_ended(self, *, released: bool) -> None:
        self._associations.labels("released" if released else "aborted").inc()

    def image_not_analysed(self, reason: str) -> None:
        self._images.labels(reason).inc()

    def series(self, state: str, reason: str | None, level: str | None) -> None:
        self._series.labels(state, reason or "").inc()
        if level:
            self._decisions.labels(level).inc()

    def worker_died(self) -> None:
        self._deaths.inc()

    def engine(self, servers: Mapping[str, str], *, fail_over: bool) -> None:
        """Who answers now: by address, why a server can't be asked, and whether a local engine stands in for all."""
        self._fail_over.set(fail_over)
        if not servers:
            self._servers.clear()
        for address, fault in servers.items():
            self._servers.labels(address).set(not fault)

    def audit_lost(self, where: Literal["file", "server"], count: int) -> None:
        self._audit_lost.labels(where).inc(count)

    def rejected(self, reason: str) -> None:
        self._rejections.labels(reason).inc()

    def stage(self, name: Stage, seconds: float) -> None:
        self._stages.labels(name).observe(max(seconds, 0.0))

    def alert_told(self, message: Message, alert: Alert) -> None:
        """A channel has taken a message; one that is told by escalation waited for that on purpose."""
        if message.occasion == "raised":
            self._alerts.labels("sent").observe(max(time.time() - alert.raised, 0.0))

    def alert_acknowledged(self, seconds: float) -> None:
        self._alerts.labels("acknowledged").observe(max(seconds, 0.0))

    def watch(self, outbox: Outbox, ledger: Ledger, folder: Path, now: Callable[[], dict[str, float]]) -> None:
        """Ask these, too, at every scrape.

        Parameters
        ----------
        outbox : for what destinations are owed
        ledger : for alerts, and what is told of them
        folder : on whose disk the free space counts
        now : gauges by name, without the prefix

        """
        self.registry.register(_Gauges(outbox, folder, now))
        self.registry.register(_Alerts(ledger, self.alert_acknowledged))

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(f"scanside_{name}", documentation, labels, registry=self.registry)


class _Gauges(Collector):
    """What is looked up when somebody asks."""

    def __init__(self, outbox: Outbox, folder: Path, now: Callable[[], dict[str, float]]) -> None:
        self._outbox, self._folder, self._now = outbox, folder, now

    def describe(self) -> list[GaugeMetricFamily]:
        """Nothing: registering must not ask a node that has not started."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for name, value in self._now().items():
            yield GaugeMetricFamily(f"scanside_{name}", name.replace("_", " ").capitalize() + ".", value=value)
        free = shutil.disk_usage(self._folder).free
        yield GaugeMetricFamily("scanside_disk_free_bytes", "Free space where the node keeps its files.", value=free)
        outbox = GaugeMetricFamily(
            "scanside_outbox", "Results on their way, by destination and state.", labels=("destination", "state")
        )
        journal = GaugeMetricFamily("scanside_journal_up", "Whether the journal can be read.")
        try:
            undelivered = self._outbox.undelivered()
        except JournalError:  # how much is owed is not known: no sample, and no 0
            journal.add_metric((), 0)
        else:
            journal.add_metric((), 1)
            for labels, count in undelivered.items():
                outbox.add_metric(labels, count)
            yield outbox
        yield journal


class _Alerts(Collector):
    """How many alerts there are, and where what is told of them stands."""

    def __init__(self, ledger: Ledger, on_acknowledged: Callable[[float], None]) -> None:
        self._ledger, self._on_acknowledged = ledger, on_acknowledged
        # of those before this life others have told
        self._seen = max((each["id"] for each in ledger.acknowledgements()), default=0)

    def describe(self) -> list[GaugeMetricFamily]:
        """Nothing, as above."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        alerts = GaugeMetricFamily("scanside_alerts", "Alerts, by level and state.", labels=("level", "state"))
        messages = GaugeMetricFamily(
            "scanside_alert_messages", "What is told of alerts, by channel and state.", labels=("channel", "state")
        )
        try:
            counts = self._ledger.counts()
            for each in self._ledger.acknowledgements(after=self._seen):  # by whatever process
                self._on_acknowledged(each["at"] - each["raised"])
                self._seen = each["id"]
        except JournalError:
            return
        for family, count in zip((alerts, messages), counts, strict=True):
            for labels, number in count.items():
                family.add_metric(labels, number)
            yield family
