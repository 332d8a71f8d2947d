"""compose.yaml: the specification's own schema, what it names is there, and the node takes its configuration."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from dicom_node.configuration import config
from tests.packaging.places import PACKAGING, found, run

PATH = PACKAGING / "compose.yaml"
KINDS = ("cpu", "gpu")
WRITES_AND_IS_ROOT = {"archive"}  # Orthanc's entry point


def environment(kind: str) -> dict[str, str]:
    """Variables of cpu.env or gpu.env."""
    lines = (PACKAGING / f"{kind}.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def composed(kind: str, text: str | None = None) -> dict[str, Any]:
    """The file with its variables filled in, as compose does it."""
    known = environment(kind)

    def value(match: re.Match[str]) -> str:
        name, sign, other = match[1], match[2], match[3]
        if sign == ":?" and not known.get(name):
            raise ValueError(f"{name}: {other}")
        return known.get(name) or (other if sign == ":-" else "")

    raw = text or PATH.read_text()
    return yaml.safe_load(re.sub(r"\$\{(\w+)(?:(:-|:\?)([^}]*))?\}", value, raw))


def check(told: dict[str, Any]) -> None:
    """Hold it against the specification, and each name in it against what there is."""
    one = PyCompose.from_yaml(json.dumps(told))
    one.validate()
    for name, service in told["services"].items():
        for other in service.get("depends_on", {}):
            if other not in told["services"]:
                raise ValueError(f"{name} depends on {other}, which is no service")
        for kind in ("secrets", "configs"):
            for each in service.get(kind, ()):
                source = each if isinstance(each, str) else each["source"]
                if source not in told[kind]:
                    raise ValueError(f"{name}: {source} is none of {kind}")
        for each in service.get("volumes", ()):
            if each.partition(":")[0] not in told["volumes"]:
                raise ValueError(f"{name}: {each} is no volume")


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_the_specification_says(kind: str):
    check(composed(kind))


@pytest.mark.parametrize(
    ("good", "broken"),
    [
        ("healthcheck:", "helthcheck:"),
        ("condition: service_healthy", "condition: service_helthy"),
        ('volumes: ["slices:', 'volumes: ["slice:'),
        ("secrets: [database-password]", "secrets: [database-pasword]"),
        ("      database: {condition", "      databse: {condition"),
        ("count: 1,", "count: [1],"),
    ],
)
def test_what_is_broken_is_refused(good: str, broken: str):
    text = PATH.read_text()
    assert good in text
    with pytest.raises(ValueError):
        check(composed("gpu", text.replace(good, broken, 1)))


def test_without_an_environment_it_says_which_file_to_name():
    with pytest.raises(ValueError, match="cpu.env"):
        composed("cpu", PATH.read_text().replace("SCANSIDE_BACKEND", "SCANSIDE_OTHER"))


@pytest.mark.parametrize("kind", KINDS)
def test_docker_takes_it(kind: str, tmp_path: Path):
    docker = found("docker", "install docker with its compose plug-in")
    if run([docker, "compose", "version"]).returncode:
        pytest.skip("docker has no `compose`: install the plug-in; the specification's schema was asked all the same")
    told = run([docker, "compose", "--env-file", PACKAGING / f"{kind}.env", "--file", PATH, "config", "--quiet"])
    assert told.returncode == 0, told.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_every_service_is_confined_pinned_watched_and_limited(kind: str):
    for name, service in composed(kind)["services"].items():
        assert re.search(r":v?\d+\.\d+[\w.-]*$", service["image"]), f"{name}: {service['image']} is not pinned"
        assert service["healthcheck"].get("test") or name == "model", name  # that one ends
        limits = service["deploy"]["resources"]["limits"]
        assert {"cpus", "memory", "pids"} <= set(limits), name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["read_only"] is (name not in WRITES_AND_IS_ROOT), name
        assert (name in WRITES_AND_IS_ROOT) == ("user" not in service), name


def test_without_a_gpu_nothing_asks_for_one():
    services = composed("cpu")["services"]
    assert environment("cpu")["COMPOSE_PROFILES"] == ""
    started = {name: one for name, one in services.items() if not one.get("profiles")}
    assert set(services) - set(started) == {"model", "triton"}
    for name, service in started.items():
        assert "devices" not in json.dumps(service), name
        for other, how in service.get("depends_on", {}).items():
            assert other in started or how["required"] is False, f"{name} waits for {other}"


def test_files_that_it_mounts_are_there_and_secrets_are_not():
    told = composed("cpu")
    for one in told["configs"].values():
        assert (PACKAGING / one["file"]).is_file(), one
    for one in told["secrets"].values():
        assert not (PACKAGING / one["file"]).exists() or run(
            ["git", "check-ignore", "-q", PACKAGING / one["file"]], cwd=PACKAGING
        ).returncode == 0, f"{one['file']} would be committed"  # fmt: skip
    assert json.loads((PACKAGING / "compose/orthanc.json").read_text())["DicomAet"] == "ORTHANC"


@pytest.mark.parametrize("kind", KINDS)
def test_no_port_is_open_to_the_network_until_somebody_says_so(kind: str):
    for name, service in composed(kind)["services"].items():
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), (name, port)
    ports = composed(kind, PATH.read_text().replace("SCANSIDE_ADDRESS:-127.0.0.1", "SCANSIDE_ADDRESS:-0.0.0.0"))
    assert "0.0.0.0:11112:11112" in ports["services"]["node"]["ports"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_node_takes_its_configuration(kind: str, monkeypatch: pytest.MonkeyPatch):
    told = composed(kind)
    for name, value in told["services"]["node"]["environment"].items():
        monkeypatch.setenv(name, value)
    read = config.load(PACKAGING / "compose/node.toml")
    assert read.model.backend == {"cpu": "onnxruntime", "gpu": "triton"}[kind]
    archive = json.loads((PACKAGING / "compose/orthanc.json").read_text())
    (destination,) = read.destinations
    assert (destination.ae_title, destination.port) == (archive["DicomAet"], archive["DicomPort"])
    assert archive["DicomModalities"]["scanside"] == [read.node.ae_title, "node", read.node.port]
    assert {destination.host, "database", "triton"} <= set(told["services"])
    assert Path(read.journal.password) == Path("/run/secrets/database-password")
    assert read.node.allowed_calling_aes, "whoever gets in by the network is not known yet"
    assert f"127.0.0.1:{read.page.port}:{read.page.port}" in told["services"]["node"]["ports"]
    assert Path(read.page.users).name in told["services"]["node"]["secrets"]
