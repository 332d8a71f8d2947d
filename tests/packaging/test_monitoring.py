"""Dashboard and alert rules: each metric, label and value in them is one that a node has; Prometheus takes them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args
from unittest.mock import MagicMock

import pytest
import yaml

from dicom_node.alerts.alert import MessageState
from dicom_node.delivery.outbox import DeliveryState
from dicom_node.monitoring.metrics import Metrics, Stage
from dicom_node.node import Node
from tests.packaging.places import PACKAGING, found, run
from tests.packaging.test_kubernetes import pods

if TYPE_CHECKING:
    from collections.abc import Iterator

RULES = PACKAGING / "prometheus/alerts.yml"
DASHBOARD = json.loads((PACKAGING / "grafana/scanside.json").read_text())
INSTALL = "apt-get install prometheus"
WORDS = {"or", "unless", "offset"}
NOT_OURS = {"up", "ALERTS"}  # Prometheus'; Triton's begin with nv_
SCRAPED = {"instance", "job", "le"}
VALUES = {
    ("scanside_stage_seconds", "stage"): set(get_args(Stage)),
    ("scanside_outbox", "state"): {str(one) for one in DeliveryState},
    ("scanside_alert_messages", "state"): set(get_args(MessageState)),
    ("scanside_associations_total", "end"): {"released", "aborted"},
    ("scanside_series_total", "state"): {"analysed", "not_analysed", "failed"},
    ("scanside_instances_total", "outcome"): {"new", "repeated", "conflict", "refused"},
}


def expressions() -> Iterator[tuple[str, str]]:
    """What is asked of Prometheus, by where."""
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


EXPRESSIONS = sorted(set(expressions()))


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Labels of each metric that a node tells, by its name there."""
    metrics, outbox, ledger = Metrics(), MagicMock(), MagicMock()
    ledger.acknowledgements.return_value = []
    ledger.counts.return_value = ({("urgent", "confirmed"): 1}, {("hl7", "sent"): 1})
    outbox.undelivered.return_value.items.return_value = [(("pacs", "parked"), 1)]
    now = Node._gauges(MagicMock(_ask_desk=lambda _: ({}, 0)))
    metrics.watch(outbox, ledger, tmp_path_factory.mktemp("disk"), lambda: now)
    found: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        labels = {*getattr(family, "_labelnames", ())} | {each for one in family.samples for each in one.labels}
        ends = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}.get(family.type, ("",))
        found |= {family.name + end: labels for end in ends}
    for each in vars(metrics).values():  # what has not been counted yet has no sample
        if names := getattr(each, "_labelnames", None):
            for told in each.describe():
                ends = {"counter": ("_total",), "gauge": ("",)}.get(told.type, ("_bucket", "_count", "_sum"))
                found |= {told.name + end: set(names) for end in ends}
    return found


def faults(expression: str, known: dict[str, set[str]]) -> list[str]:
    """What no node has."""
    bare = re.sub(r'"[^"]*"|\[[^\]]*\]|\b(by|on|without) \([^)]*\)', "", expression)
    bare = re.sub(r"\{[^}]*\}", "{}", bare)
    names = set(re.findall(r"\b[a-zA-Z_]\w*\b(?!\s*\()", bare)) - set(known) - NOT_OURS - WORDS
    told = [f"no metric {name}" for name in sorted(names) if not name.startswith("nv_")]
    for name, selectors in re.findall(r"\b(scanside_\w+)\{([^}]*)\}", expression):
        for label, value in re.findall(r'(\w+)[=!]~?"([^"]*)"', selectors):
            if label not in known.get(name, set()) | SCRAPED:
                told.append(f"{name} has no label {label}")
            values = VALUES.get((re.sub(r"_(bucket|count|sum)$", "", name), label))
            if values and not set(value.split("|")) <= values:
                told.append(f"{name}: {label} is never {value}")
    return told


def test_what_the_desk_does_not_say_in_time_is_no_zero():
    assert Node._gauges(MagicMock(_ask_desk=lambda _: None)).keys() == {"worker_ready"}


@pytest.mark.parametrize(("where", "expression"), EXPRESSIONS, ids=lambda one: one[:40])
def test_it_asks_for_what_a_node_has(where: str, expression: str, known: dict[str, set[str]]):
    assert not faults(expression, known), where


@pytest.mark.parametrize(
    ("expression", "fault"),
    [
        ("sum(rate(scanside_slices_total[5m]))", "no metric scanside_slices_total"),
        ('scanside_outbox{status="parked"} > 0', "scanside_outbox has no label status"),
        ('scanside_outbox{state="stuck"} > 0', "scanside_outbox: state is never stuck"),
        ('rate(scanside_stage_seconds_bucket{stage="result"}[5m])', "stage is never result"),
        ("scanside_instances > 0", "no metric scanside_instances"),
    ],
)
def test_what_a_node_has_not_is_found(expression: str, fault: str, known: dict[str, set[str]]):
    assert fault in "; ".join(faults(expression, known))


def test_every_metric_is_watched(known: dict[str, set[str]]):
    """A new metric has to come to the dashboard or into a rule."""
    asked = " ".join(expression for _, expression in EXPRESSIONS)
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in known if not name.endswith("_created")}
    assert not {one for one in families if one not in asked}


def test_panels_and_places_are_their_own():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    provisioned = yaml.safe_load((PACKAGING / "grafana/provisioning/datasources/scanside.yaml").read_text())
    (source,) = provisioned["datasources"]
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"] if "datasource" in panel} == {source["uid"]}


def test_prometheus_takes_configuration_and_rules():
    told = run([found("promtool", INSTALL), "check", "config", PACKAGING / "prometheus/prometheus.yml"])
    assert told.returncode == 0, told.stderr


def test_the_clusters_prometheus_looks_where_the_pods_are():
    """By hand: Debian's promtool is built without Kubernetes."""
    told = yaml.safe_load((PACKAGING / "prometheus/kubernetes.yml").read_text())
    jobs = {one["job_name"]: [each.get("regex") for each in one["relabel_configs"]] for one in told["scrape_configs"]}
    assert jobs == {"scanside": ["scanside", "web", None], "triton": ["triton", "metrics", None]}
    for job, (name, port, _) in jobs.items():
        labels = pods()[job]["metadata"]["labels"]
        assert labels["app.kubernetes.io/name"] == name
        assert port in {each["name"] for one in pods()[job]["spec"]["containers"] for each in one["ports"]}
    own = yaml.safe_load((PACKAGING / "prometheus/prometheus.yml").read_text())
    assert {one["job_name"] for one in own["scrape_configs"]} == set(jobs)


def test_prometheus_takes_what_the_dashboard_asks(tmp_path: Path):
    filled = {"$__rate_interval": "5m", "$instance": ".*"}
    rules: list[dict[str, Any]] = []
    for number, (_, expression) in enumerate(EXPRESSIONS):
        for name, value in filled.items():
            expression = expression.replace(name, value)  # noqa: PLW2901
        rules.append({"record": f"panel_{number}", "expr": expression})
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    told = run([found("promtool", INSTALL), "check", "rules", path])
    assert told.returncode == 0, told.stderr


def test_rules_fire_when_they_should_and_not_otherwise():
    told = run([found("promtool", INSTALL), "test", "rules", Path(__file__).with_name("alerts.test.yml")])
    assert told.returncode == 0, told.stdout + told.stderr


def test_a_broken_rule_is_refused(tmp_path: Path):
    path = tmp_path / "alerts.yml"
    path.write_text(RULES.read_text().replace("sum by (instance)", "sum by instance)", 1))
    assert run([found("promtool", INSTALL), "check", "rules", path]).returncode != 0
