"""A configuration that is read again: what changes at once, what waits, what is refused, and that nothing is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydicom.uid import SegmentationStorage
from pynetdicom import AE
from pynetdicom.sop_class import Verification

from dicom_node import reload
from dicom_node.configuration.config import Config, ConfigError
from dicom_node.node import Node
from dicom_node.results.codes import CodeError
from dicom_node.simulation.pacs import Pacs
from dicom_node.simulation.scanner import push
from runtime.triage import RuleError
from tests.dicom_node.conftest import PATIENCE_S, Pushable, config_for

PACS = {"name": "pacs", "ae_title": "PACS", "host": "pacs.local", "port": 104}
CODE = {"name": "subdural", "finding": ["1", "99X", "a"], "site": ["2", "99X", "b"]}
RULE = {"level": "urgent", "classes": ["any"], "volume_ml": 1}


def merged(wanted: dict, running: dict | None = None) -> tuple[Config, list[str], list[str]]:
    return reload.merge(Config.model_validate(running or {}), Config.model_validate(wanted))


@pytest.mark.parametrize(
    ("wanted", "key"),
    [
        ({"node": {"free_floor_gb": 1}}, "node.free_floor_gb"),
        ({"node": {"allowed_calling_aes": ["CT1"]}}, "node.allowed_calling_aes"),
        ({"node": {"allowed_addresses": ["10.0.0.0/8"]}}, "node.allowed_addresses"),
        ({"node": {"max_instance_mb": 1}}, "node.max_instance_mb"),
        ({"node": {"keep_days": 1}}, "node.keep_days"),
        ({"node": {"max_associations": 1}}, "node.max_associations"),
        ({"node": {"max_associations_per_peer": 1}}, "node.max_associations_per_peer"),
        ({"series": {"idle_timeout_s": 1}}, "series.idle_timeout_s"),
        ({"series": {"min_slices": 1}}, "series.min_slices"),
        ({"destinations": [PACS]}, "destinations"),
        ({"scanners": [{"ae_title": "CT1", "host": "ct", "port": 104}]}, "scanners"),
        ({"triage": [RULE]}, "triage"),
        ({"results": {"pdf": True}}, "results.pdf"),
        ({"codes": [CODE]}, "codes"),
        ({"log": {"level": "error"}}, "log.level"),
    ],
)
def test_what_changes_at_once(wanted, key):
    assert merged(wanted) == (Config.model_validate(wanted), [key], [])


@pytest.mark.parametrize(
    ("wanted", "key"),
    [
        ({"node": {"ae_title": "OTHER"}}, "node.ae_title"),
        ({"node": {"port": 104}}, "node.port"),
        ({"node": {"folder": "/elsewhere"}}, "node.folder"),
        ({"model": {"threads": 1}}, "model.threads"),
        ({"web": {"port": 8080}}, "web.port"),
        ({"tls": {"certificate": "a", "key": "b", "ca": "c"}}, "tls"),
    ],
)
def test_what_needs_a_restart_stays_as_it_is(wanted, key):
    assert merged(wanted) == (Config(), [], [key])
    both = wanted | {"log": {"level": "error"}}
    assert merged(both) == (Config.model_validate({"log": {"level": "error"}}), ["log.level"], [key])


def test_what_would_not_fit_is_refused_whole():
    """TLS to an archive from a node that was started without: the merge would send in plain."""
    tls = {"certificate": "a", "key": "b", "ca": "c"}
    with pytest.raises(ConfigError) as caught:
        merged({"tls": tls, "destinations": [PACS | {"tls": True}], "log": {"level": "error"}})
    (mistake,) = reload.mistakes(caught.value)
    assert mistake == "destinations[0].tls: true needs certificate, key and ca in [tls]"
    with pytest.raises(ConfigError, match="this node itself"):
        merged({"node": {"port": 104}, "destinations": [PACS | {"host": "127.0.0.1", "port": 11112}]})


def test_rules_that_the_model_does_not_know_are_refused():
    with pytest.raises(RuleError, match="triage rules name tumour"):
        merged({"triage": [RULE | {"classes": ["tumour"]}]})


def test_a_code_that_the_bundle_has_no_class_for_is_refused():
    with pytest.raises(CodeError, match="codes.* name tumour"):
        merged({"codes": [CODE | {"name": "tumour"}]})


def may_call(node: Node, ae_title: str) -> bool:
    ae = AE(ae_title)
    ae.add_requested_context(Verification)
    association = ae.associate("127.0.0.1", node.port)
    accepted = association.is_established
    if accepted:
        association.release()
    return accepted


def test_a_node_that_is_reloaded_in_mid_series_goes_on_by_the_new_configuration(
    bleeding: Pushable, node: Node, pacs: Pacs, tmp_path: Path
):
    """No slice and no result is lost; the open series is judged by the new rules and goes to the new archive too."""
    assert may_call(node, "CT9")
    second = Pacs(tmp_path / "second")
    second.start()
    also = config_for(tmp_path, second.port).destinations[0].model_copy(update={"name": "second"})
    wanted = node.config.model_copy(
        update={
            "node": node.config.node.model_copy(update={"allowed_calling_aes": ("CT1",)}),
            "destinations": (*node.config.destinations, also),
            "triage": (),
        }
    )
    seen = []

    def reload_at_the_tenth(_: object) -> None:
        seen.append(1)
        if len(seen) == 10:
            node.reload(reload.merge(node.config, wanted)[0])

    try:
        sent = push(
            bleeding.paths,
            ("127.0.0.1", node.port),
            calling_ae="CT1",
            called_ae="SCANSIDE",
            on_slice=reload_at_the_tenth,
        )
        assert not sent.failed
        for archive in (pacs, second):
            assert archive.wait_for(
                lambda objects: any(one == SegmentationStorage for _, one, _ in objects), PATIENCE_S
            )
    finally:
        second.stop()
    assert not may_call(node, "CT9")
    record = node._journal.series()[0]
    assert f'"slices": {len(bleeding.paths)}' in record.report_json
    assert '"level": "routine"' in record.report_json  # critical, by the rules with which it began


def test_the_parts_hear_of_a_reload(node: Node):
    wanted = {
        "node": {"free_floor_gb": 3, "max_instance_mb": 4, "keep_days": 5, "max_associations": 6},
        "series": {"idle_timeout_s": 7, "min_coverage_mm": 8},
        "scanners": [{"ae_title": "CT1", "host": "ct", "port": 104}],
    }
    node.reload(reload.merge(node.config, Config.model_validate(wanted))[0])
    node.progress()  # asked after the reload, answered after it
    assert (node._spool._free_floor_gb, node._spool.max_instance_mb) == (3, 4)
    assert node._retention._keep_s == 5 * 86400
    assert node._receiver._acceptor._most == 6
    assert (node._assembler._idle_timeout_s, node._assembler._min_coverage_mm) == (7, 8)
    assert list(node._commitments._scanners) == ["CT1"]
    assert node.supervisor._opening["min_coverage_mm"] == 8
    assert node._sender._couriers == []
