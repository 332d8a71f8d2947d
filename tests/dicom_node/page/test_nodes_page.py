"""The page and `scanside status` where several nodes share one journal: each shows what all of them have."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import scanside
from dicom_node import status
from dicom_node.alerts.ledger import Ledger
from dicom_node.configuration import toml
from dicom_node.configuration.config import Config
from dicom_node.page.board import Lookout
from dicom_node.page.views import day
from dicom_node.storage.journal import Journal, SeriesState
from dicom_node.storage.membership import Membership, members
from dicom_node.storage.postgres import Address
from dicom_node.storage.spool import Spool
from tests.dicom_node.conftest import wait_until
from tests.dicom_node.page.conftest import Folder, Placed, browse
from tests.dicom_node.servers import Server
from tests.dicom_node.test_nodes import Desk


class Sharing(Folder):
    """The folder of a node that shares its journal."""

    def __init__(self, path: Path, address: Address, *, shared: bool) -> None:
        super().__init__(path)
        self.journal.close()
        (path / "journal.sqlite").unlink()
        self.address, self.shared = address, shared
        self.journal = Journal(address, node=path.name, shares_storage=shared)
        self.ledger = Ledger(self.journal)
        self.desk = Desk()
        self.member = Membership(self.journal, path, Spool(path / "spool", 0), self.desk, shares_storage=shared)
        self.member.join()

    def config(self, **page: object) -> Config:
        journal = {"database": self.address.url, "password": self.address.password, "shared_storage": self.shared}
        table = super().config(**page).model_dump() | {"journal": journal}
        table["node"]["name"] = self.path.name
        return Config.model_validate(table)


@pytest.fixture(params=[False, True], ids=["apart", "shared"])
def pair(request, tmp_path: Path, postgres: Server, monkeypatch) -> Iterator[tuple[Sharing, Sharing]]:
    monkeypatch.setattr("dicom_node.storage.membership.BEAT_S", 0.05)
    address = postgres.database()
    both = tuple(Sharing(tmp_path / name, address, shared=request.param) for name in ("ct-1", "ct-2"))
    yield both
    for one in both:
        with contextlib.suppress(Exception):
            one.member.stop()
        one.journal.close()


def test_each_node_s_page_shows_all_series_and_whose_they_are(pair):
    first, second = pair
    for folder, number in ((first, 1), (second, 2)):
        folder.analyse(folder.place(number), "critical")
    arriving = {"study_uid": "1.2.3", "series_uid": "1.2.3.1", "revision": 1, "slices_received": 7}
    second.desk.arriving = lambda: [arriving]
    for folder in pair:
        wait_until(lambda folder=folder: "1.2.3.1" in browse(folder).get("/").text or folder is second, "it arrives")
        text = browse(folder).get("/").text
        assert re.findall(r"<b>(ct-\d)</b> is heard of", text) == ["ct-1", "ct-2"]
        notes = dict(re.findall(r'id="row-1\.2\.(\d)-.*?<span class="note">(ct-\d)</span>', text, re.DOTALL))
        assert notes == {"1": "ct-1", "2": "ct-2"} | ({"3": "ct-2"} if folder is first else {})
    # pictures of the other's series, where its folder can be seen
    other = browse(first).get("/series/1.2.2/1.2.2.1")
    assert other.status_code == 200
    assert ("Doe, John2" in other.text) == first.shared
    picture = browse(first).get("/series/1.2.2/1.2.2.1/slices/1.2.2.1.1/brain.png")
    assert picture.status_code == (200 if first.shared else 404)
    assert ("The slices lie with node ct-2: its page shows them" in other.text) != first.shared
    assert "The slices lie with node" not in browse(second).get("/series/1.2.2/1.2.2.1").text
    second.member.stop()
    told = status.look(first.config())
    assert [(one.name, one.lives) for one in told.nodes] == [("ct-1", True), ("ct-2", False)]
    assert {(one.series_uid, one.node) for one in told.series} >= {("1.2.1.1", "ct-1"), ("1.2.2.1", "ct-2")}


def test_an_open_alert_is_on_each_page_though_its_node_died_before_it_told_of_the_series(pair):
    first, second = pair
    second.desk.arriving = lambda: None  # it has had no time to
    placed = second.place(2)
    second.alert(placed, second.report(placed, "critical"), final=False)
    second.member.stop()
    page = browse(first)
    text = page.get("/").text
    assert 'id="row-1.2.2-1.2.2.1"' in text
    assert "not acknowledged, alert provisional" in text
    assert re.search(r'id="row-1\.2\.2-.*?<span class="note">ct-2</span>', text, re.DOTALL)
    (alert,) = Ledger(first.journal).alerts()
    address = page.get(f"/alerts/{alert.id}").headers["location"]
    assert page.get(address).status_code == 200
    told = page.post(f"/alerts/{alert.id}/acknowledge", data={"by": "Dr A", "level": "critical"})
    assert told.headers["location"] == address
    assert "Dr A" in page.get(address).text


def test_how_long_a_scan_has_waited_is_the_same_on_each_page(pair, monkeypatch):
    first, second = pair
    came = time.time() - 60
    told = second.report(second.place(2)) | {"arrived": came}
    second.record(Placed("1.2.2", "1.2.2.1", [Path()] * 12, None, []), SeriesState.ANALYSED, None, report=told)
    (row,) = Lookout(first.config()).look().rows
    assert row.first == ("first slice", came)
    assert f'title="first slice {day(came)}"' in browse(first).get("/").text
    # an older node has not said it, and what has no result can't: nor is that what is told
    unknown = second.place(3)
    second.record(unknown, SeriesState.NOT_ANALYSED, "bad geometry")
    arriving = {"study_uid": "1.2.4", "series_uid": "1.2.4.1", "revision": 1, "slices_received": 7}
    second.desk.arriving = lambda: [arriving]
    lookout = Lookout(first.config())
    monkeypatch.setattr("dicom_node.page.board.FRESH_S", 0.0)
    wait_until(lambda: len(lookout.look().rows) == 3, "it arrives")
    seen = members(first.journal)[1].seen
    wait_until(lambda: members(first.journal)[1].seen > seen, "it is heard of again")
    whats = {row.series: row.first for row in lookout.look().rows}
    assert whats["1.2.3.1"][0] == "result"
    assert whats["1.2.4.1"][0] == "heard of"
    assert whats["1.2.4.1"][1] <= seen


def test_status_names_the_nodes(pair, tmp_path: Path):
    first, second = pair
    second.analyse(second.place(2))
    path = tmp_path / "node.toml"
    path.write_text(toml.show(first.config()))
    shown = CliRunner().invoke(scanside.app, ["status", "--config", str(path)]).output
    assert "nodes heard of: ct-1, ct-2" in shown
    assert re.search(r"^ +ct-2 .*final", shown, re.MULTILINE)
    told = json.loads(CliRunner().invoke(scanside.app, ["status", "--json", "--config", str(path)]).output)
    assert [(one["name"], one["lives"]) for one in told["nodes"]] == [("ct-1", True), ("ct-2", True)]
    second.member.stop()
    shown = CliRunner().invoke(scanside.app, ["status", "--config", str(path)]).output
    assert "node ct-2 is not running, or can't reach the database" in shown
