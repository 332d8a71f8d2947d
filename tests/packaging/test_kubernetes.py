"""The manifests: Kubernetes' own schemas, strictly; what they name is there; the nodes take their configuration."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from dicom_node.configuration import config
from tests.packaging.places import KUBERNETES, documents, found, run

VERSIONS = ("1.29", "1.32")
LISTED = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
MANIFESTS = [one for name in LISTED["resources"] for one in documents((KUBERNETES / name).read_text())]


def named(kind: str, name: str) -> dict[str, Any]:
    return next(one for one in MANIFESTS if (one["kind"], one["metadata"]["name"]) == (kind, name))


def pods() -> dict[str, dict[str, Any]]:
    kinds = {"scanside": "StatefulSet", "triton": "Deployment"}
    return {name: named(kind, name)["spec"]["template"] for name, kind in kinds.items()}


def check(manifest: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda one: f"{one['kind']} {one['metadata']['name']}")
def test_they_are_what_kubernetes_says(manifest: dict[str, Any], version: str):
    check(manifest, version)


@pytest.mark.parametrize(
    ("way", "value"),
    [
        (("replicas",), "two"),
        (("template", "spec", "containers", 0, "livenesProbe"), {}),
        (("template", "spec", "containers", 0, "ports", 0, "containerPort"), "dicom"),
        (("template", "spec", "securityContext", "runAsNonRoot"), "yes"),
        (("updateStrategy", "type"), 1),
    ],
    ids=lambda one: str(one)[-30:],
)
def test_what_is_broken_is_refused(way: tuple[str | int, ...], value: object):
    broken = copy.deepcopy(named("StatefulSet", "scanside"))
    place = broken["spec"]
    for step in way[:-1]:
        place = place[step]
    place[way[-1]] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        check(broken, VERSIONS[-1])


def test_every_file_is_listed():
    there = {path.name for path in KUBERNETES.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(LISTED["resources"]) == there


def test_kustomize_builds_them():
    kubectl = found("kubectl", "install Kubernetes' client 1.21 or later")
    told = run([kubectl, "kustomize", KUBERNETES])
    if "unknown field" in told.stderr:  # 1.20, which Debian 12 has
        pytest.skip("kubectl's kustomize is too old: install Kubernetes' client 1.21 or later")
    assert told.returncode == 0, told.stderr
    built = documents(told.stdout)
    for one in built:
        check(one, VERSIONS[-1])
        assert one["kind"] == "Namespace" or one["metadata"]["namespace"] == "scanside"
    (node,) = (one for one in built if one["kind"] == "ConfigMap")
    assert node["data"]["node.toml"] == (KUBERNETES / "node.toml").read_text()
    assert node["metadata"]["name"] in told.stdout.partition("kind: StatefulSet")[2]
    for image in re.findall(r"image: (\S+)", told.stdout):
        assert re.search(r":\d+\.\d+[\w.-]*$", image), f"{image} is not pinned"


def test_names_lead_somewhere():
    labels = {name: pod["metadata"]["labels"] for name, pod in pods().items()}
    ports = {each["name"] for pod in pods().values() for one in pod["spec"]["containers"] for each in one["ports"]}
    replicas = named("StatefulSet", "scanside")["spec"]["replicas"]
    own = [{"statefulset.kubernetes.io/pod-name": f"scanside-{number}"} for number in range(replicas)]
    for one in MANIFESTS:
        spec = one.get("spec", {})
        if one["kind"] == "Service":
            assert spec["selector"] in [*labels.values(), *own], one["metadata"]["name"]
            assert {each["targetPort"] for each in spec["ports"]} <= ports
        if one["kind"] == "PodDisruptionBudget":
            assert spec["selector"]["matchLabels"] in labels.values()
        if one["kind"] == "NetworkPolicy":
            assert not spec["podSelector"] or spec["podSelector"]["matchLabels"] in labels.values()
            used = [each["port"] for rule in spec.get("ingress", ()) for each in rule["ports"]]
            assert set(used) <= ports
    assert named("StatefulSet", "scanside")["spec"]["serviceName"] == named("Service", "nodes")["metadata"]["name"]
    served = [one["spec"]["selector"] for one in MANIFESTS if one["kind"] == "Service"]
    assert all(each in served for each in own), "a node that no scanner can reach"


@pytest.mark.parametrize("name", pods())
def test_pods_are_confined_limited_and_probed(name: str):
    spec = pods()[name]["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    volumes = {each["name"] for each in spec["volumes"]}
    claims = named("StatefulSet", "scanside")["spec"]["volumeClaimTemplates"] if name == "scanside" else []
    for one in (*spec["containers"], *spec.get("initContainers", ())):
        assert one["securityContext"]["readOnlyRootFilesystem"] is True
        assert one["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert {"cpu", "memory"} <= set(one["resources"]["limits"])
        mounted = {each["name"] for each in one["volumeMounts"]}
        assert mounted <= volumes | {each["metadata"]["name"] for each in claims}
    for one in spec["containers"]:
        named_ports = {each["name"] for each in one["ports"]}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert one[probe]["httpGet"]["port"] in named_ports
    if name == "triton":
        assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_the_stop_is_as_long_as_the_unit_of_systemd_allows():
    unit = (KUBERNETES.parent / "scanside.service").read_text()
    seconds = int(re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[1])
    assert pods()["scanside"]["spec"]["terminationGracePeriodSeconds"] == seconds


def test_each_node_takes_the_configuration_under_its_own_title(monkeypatch: pytest.MonkeyPatch):
    (node,) = pods()["scanside"]["spec"]["containers"]
    (variable,) = node["env"]
    assert variable["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"
    for number in range(named("StatefulSet", "scanside")["spec"]["replicas"]):
        monkeypatch.setenv(variable["name"], f"scanside-{number}")
        read = config.load(KUBERNETES / "node.toml")
        assert read.node.ae_title == f"scanside-{number}"
    ports = {each["name"]: each["containerPort"] for each in node["ports"]}
    assert ports == {"dicom": read.node.port, "web": read.web.port, "page": read.page.port}
    assert read.page.users
    assert not read.page.open_to_all
    assert "sslmode=verify-full" in read.journal.database
    (mounted,) = (each["mountPath"] for each in node["volumeMounts"] if each["name"] == "secrets")
    files = [read.page.users, read.journal.password, read.journal.database.partition("sslrootcert=")[2]]
    assert {str(Path(file).parent) for file in files} == {mounted}
    assert str(read.node.folder) in {each["mountPath"] for each in node["volumeMounts"]}
    (triton,) = (one for one in MANIFESTS if one["kind"] == "Service" and one["metadata"]["name"] == "triton")
    assert read.triton.servers == (f"grpc://triton:{triton['spec']['ports'][0]['port']}",)


def test_what_nodes_may_reach_is_where_their_configuration_usually_leads():
    """And the page is reached by the Ingress alone."""
    spec = named("NetworkPolicy", "nodes")["spec"]
    reached = {each["port"] for rule in spec["egress"] for each in rule["ports"]}
    destination = config.load(KUBERNETES / "node.toml").destinations[0].port
    assert reached >= {destination, 11112, 4242, 5432, 2575, 443, 587, 465, 25, 6514, 514}
    (page,) = (rule for rule in spec["ingress"] if {"port": "page"} in rule["ports"])
    assert [list(one) for one in page["from"]] == [["namespaceSelector"]]


def test_a_wrong_configuration_is_refused(tmp_path: Any):
    path = tmp_path / "node.toml"
    path.write_text((KUBERNETES / "node.toml").read_text().replace("free_floor_gb", "free_flor_gb"))
    with pytest.raises(config.ConfigError, match="free_flor_gb"):
        config.load(path)
