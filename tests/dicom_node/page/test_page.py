"""What the triage page shows, and to whom: order, reasons, pictures, and what of it must never be there."""

from __future__ import annotations

import io
import re
import shutil
import sqlite3
import time

import numpy as np
import pytest
from PIL import Image

from dicom_node.alerts.settings import Hl7
from dicom_node.delivery.outbox import Outbox
from dicom_node.page import board, records
from dicom_node.page.cache import Cache
from dicom_node.page.guard import HEADERS
from dicom_node.page.palette import Palette
from dicom_node.page.slices import Pictures
from dicom_node.results import writing
from dicom_node.results.result_set import Form
from dicom_node.storage import spool
from dicom_node.storage.journal import ResultFile, SeriesState
from runtime.types import SliceLabels
from tests.dicom_node import ct
from tests.dicom_node.page.conftest import Folder, browse


def order(text: str) -> list[str]:
    """The patients of the list, from the top."""
    return re.findall(r"Doe, John(\d+)</b>", text)


def test_who_has_to_be_seen_first_stands_first(folder: Folder):
    names = ("routine", "acked", "urgent", "critical", "older", "arriving", "failed")
    rows = {name: folder.place(number) for number, name in enumerate(names, 1)}
    folder.analyse(rows["routine"], "routine")
    for name, level in (("acked", "critical"), ("urgent", "urgent"), ("critical", "critical"), ("older", "critical")):
        folder.analyse(rows[name], level)
    folder.ledger.acknowledge(
        next(a.id for a in folder.ledger.alerts() if a.series_uid == rows["acked"].series_uid), "A"
    )
    folder.record(rows["failed"], SeriesState.FAILED, "KeyError at sr.py:1")
    folder.age(rows["older"], 600)
    folder.age(rows["urgent"], 6000)
    text = browse(folder).get("/").text
    assert order(text)[:5] == ["5", "4", "3", "7", "6"]  # older critical, critical, urgent, failed, arriving
    assert set(order(text)[5:]) == {"1", "2"}
    assert "KeyError at sr.py:1" in text
    assert 'data-unseen="3"' in text


def test_every_level_has_a_word_and_a_shape_of_its_own(folder: Folder):
    for number, level in enumerate(("critical", "urgent", "routine", "incomplete"), 1):
        folder.analyse(folder.place(number), level, provisional=level == "incomplete")
    text = browse(folder).get("/").text
    shapes = dict(re.findall(r'class="badge (\w+)">\s*<svg[^>]*>\s*(.*?)\s*</svg>', text, re.DOTALL))
    assert set(shapes) == {"critical", "urgent", "routine", "incomplete"}
    assert len(set(shapes.values())) == 4
    for level in shapes:
        assert f"<b>{level}</b>" in text


def test_what_was_no_head_stands_apart_with_its_reason(folder: Folder):
    folder.record(folder.place(1), SeriesState.NOT_ANALYSED, "a localizer")
    folder.record(
        folder.place(2), SeriesState.NOT_ANALYSED, "lossy compressed: Hounsfield units are not those measured"
    )
    folder.record(folder.place(3), SeriesState.NOT_ANALYSED, "too few slices: 3, 5 needed")
    folder.record(folder.place(4), SeriesState.NOT_ANALYSED, "too few slices: 3, 5 needed; closed after 10 s")
    text = browse(folder).get("/").text
    listed, _, apart = text.partition("<h2>Not analysed")
    assert sorted(order(listed)) == ["2", "4"]
    assert "lossy compressed" in listed
    assert "a localizer" in apart
    assert "Doe, John3" in apart


def test_names_are_hidden_everywhere(folder: Folder):
    placed = folder.place(1, PatientBirthDate="19510203")
    folder.analyse(placed)
    page = browse(folder, hide_names=True)
    for address in ("/", placed.address, f"{placed.address}/panel", f"{placed.address}/slices"):
        text = page.get(address).text
        assert "Doe" not in text, address
        assert "1951" not in text, address
    assert "ID P1" in page.get(placed.address).text
    assert "1951-02-03" in browse(folder).get(placed.address).text


@pytest.mark.parametrize(
    ("name", "charset", "shown"),
    [
        ("Yamada^Tarou=山田^太郎", "ISO_IR 192", "Yamada, Tarou 山田, 太郎"),
        ("Müller^Jörg", "ISO_IR 100", "Müller, Jörg"),
        ("<script>alert(1)</script>", "ISO_IR 192", "&lt;script&gt;alert(1)&lt;/script&gt;"),
    ],
)
def test_a_name_is_shown_as_it_is_written_and_never_as_markup(folder: Folder, name, charset, shown):
    folder.place(1, PatientName=name, SpecificCharacterSet=charset)
    text = browse(folder).get("/").text
    assert f"<b>{shown}</b>" in text
    assert "<script>alert" not in text


def test_a_series_that_arrives_shows_its_count_and_what_was_seen_early(folder: Folder):
    placed = folder.place(1, classes=(1, 2))
    report = folder.report(placed, "critical", provisional=True)
    folder.alert(placed, report, final=False)
    seen = np.zeros(8, np.int64), np.zeros(8, np.float32)
    labels = {
        str(header.SOPInstanceUID): SliceLabels(mask, *seen)
        for header, mask in zip(placed.headers, placed.labels, strict=True)
    }
    early = folder.path / "results" / placed.study_uid / placed.series_uid / "revision-1"
    writing.write_early(ct.report(placed.headers, placed.labels), labels, early)
    page = browse(folder)
    text = page.get("/").text
    assert '<b class="count">12</b> slices arriving' in text
    assert "so far" in text
    assert "Intracerebral" in text
    stack = page.get(f"{placed.address}/slices").json()
    assert {name for one in stack["slices"] for name in one["classes"]} == {"intracerebral", "subdural"}
    assert page.get(next(one["mask"] for one in stack["slices"] if one["mask"])).status_code == 200
    assert "nothing is final" in page.get(placed.address).text


# pictures


def picture_of(answer) -> np.ndarray:
    assert answer.headers["content-type"] == "image/png"
    return np.asarray(Image.open(io.BytesIO(answer.content)))


def test_slices_come_in_order_at_each_window_with_what_was_found_on_them(folder: Folder):
    placed = folder.place(1, classes=(1, 2))
    folder.analyse(placed)
    page = browse(folder)
    stack = page.get(f"{placed.address}/slices").json()
    assert [one["number"] for one in stack["slices"]] == list(range(1, 13))
    assert stack["sides"] == ["R", "L"]
    assert stack["slices"][stack["key"]]["classes"]
    shown = stack["slices"][5]
    for window, (level, width) in {"brain": (40, 80), "subdural": (80, 200), "bone": (600, 2800)}.items():
        picture = picture_of(page.get(f"{shown['picture']}{window}.png"))
        assert picture.shape == (64, 64)
        assert picture[0, 0] == np.clip((-1000 - level + width / 2) * 255 / width, 0, 255).astype(np.uint8), window
    mask = picture_of(page.get(shown["mask"]))
    drawn = mask[..., 3] > 0
    assert mask.shape == (128, 128, 4)
    inside = np.kron(placed.labels[5] > 0, np.ones((2, 2), bool))
    assert (drawn & inside).sum() == inside.sum()
    assert drawn.sum() < inside.sum() + 40 * np.sqrt(inside.sum())  # the mask, and a line around it
    assert [bool(one["mask"]) for one in stack["slices"]] == [bool(m.any()) for m in placed.labels]


def test_a_mask_of_an_older_result_is_that_of_the_newest_and_not_kept(folder: Folder):
    placed = folder.place(1)
    folder.analyse(placed)
    page = browse(folder)
    stack = page.get(f"{placed.address}/slices").json()["slices"]
    with_mask = next(one for one in stack if one["mask"])
    version = with_mask["mask"].split("/")[-2]
    older = page.get(with_mask["mask"].replace(version, "revision-0-1"))
    assert older.headers["cache-control"] == "no-store"
    assert older.content == page.get(with_mask["mask"]).content
    without = next(one for one in stack if not one["mask"])
    name = without["picture"].rstrip("/").rpartition("/")[2]
    assert picture_of(page.get(f"{placed.address}/masks/{version}/{name}.png")).shape == (1, 1, 4)


def test_a_negative_head_has_slices_and_no_mask(folder: Folder):
    placed = folder.place(1, classes=())
    folder.analyse(placed, "routine")
    page = browse(folder)
    stack = page.get(f"{placed.address}/slices").json()
    assert not any(one["mask"] for one in stack["slices"])
    assert stack["key"] == 6
    assert "No haemorrhage segmented" in page.get(placed.address).text


def test_files_that_are_damaged_hide_no_others(folder: Folder):
    placed = folder.place(1)
    placed.paths[0].write_bytes(b"no DICOM")
    placed.paths[1].write_bytes(placed.paths[1].read_bytes()[:-3000])
    placed.paths[2].write_bytes(b"")
    page = browse(folder)
    assert order(page.get("/").text) == ["1"]
    slices = page.get(f"{placed.address}/slices").json()["slices"]
    assert [one["number"] for one in slices] == [2, *range(4, 13)]
    cut = page.get(f"{slices[0]['picture']}brain.png")
    assert (cut.status_code, "ends before its pixels do" in cut.text) == (404, True)
    assert page.get(f"{slices[1]['picture']}brain.png").status_code == 200


def test_a_segmentation_that_is_damaged_takes_no_slice_away(folder: Folder):
    placed = folder.place(1)
    folder.analyse(placed)
    (folder.path / "results" / placed.study_uid / placed.series_uid / "revision-1" / "seg.dcm").write_bytes(b"x" * 300)
    page = browse(folder)
    slices = page.get(f"{placed.address}/slices").json()["slices"]
    assert len(slices) == 12
    assert not any(one["mask"] for one in slices)


def test_a_series_may_go_while_it_is_looked_at(folder: Folder):
    placed = folder.place(1)
    folder.analyse(placed)
    page = browse(folder)
    stack = page.get(f"{placed.address}/slices").json()
    shutil.rmtree(folder.path / "spool" / placed.study_uid)
    shutil.rmtree(folder.path / "results")
    assert page.get(stack["slices"][3]["picture"] + "brain.png").status_code == 404
    for address in ("/board", placed.address, f"{placed.address}/panel", f"{placed.address}/slices"):
        assert page.get(address).status_code == 200, address
    assert page.get(f"{placed.address}/slices").json()["slices"] == []


@pytest.mark.parametrize(
    "address",
    [
        "/series/1.2.9/1.2.9.1",
        "/series/..%2f..%2fetc/passwd",
        "/series/%2e%2e/%2e%2e",
        "/series/1.2.1/1.2.1.1/slices/..%2f..%2fjournal/brain.png",
        "/series/1.2.1/1.2.1.1/slices/1.2.1.1.1/lung.png",
        "/series/1.2.1/1.2.1.1/slices/1.2.1.1.99/brain.png",
        "/series/1.2.1/1.2.1.1/masks/none/1.2.1.1.99.png",
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/..%2fapp.py",
        "/alerts/99",
        "/nothing",
    ],
)
def test_what_is_not_there_is_not_there(folder: Folder, address):
    folder.place(1)
    assert browse(folder).get(address).status_code == 404


def test_only_what_updates_itself_says_that_it_does_not_without_its_script(folder: Folder):
    placed = folder.place(1)
    folder.analyse(placed, "critical")
    page = browse(folder)
    assert ["unscripted" in page.get(address).text for address in ("/", placed.address, "/nothing")] == [
        True,
        True,
        False,
    ]


# the journal


def test_a_journal_that_is_not_there_is_said_loudly(folder: Folder):
    (folder.path / "journal.sqlite").unlink()
    answer = browse(folder).get("/")
    assert answer.status_code == 200
    assert re.search(r'class="trouble" role="alert">The list can&#39;t be made: .*has not run yet', answer.text)
    assert browse(folder).get("/series/1.2/1.2.1").status_code == 503


def test_what_is_not_known_is_not_called_none(folder: Folder):
    """A journal that can't be read says nothing of what is owed, not that nothing is."""
    folder.analyse(folder.place(1))
    known = browse(folder).get("/board").text
    (folder.path / "journal.sqlite").rename(folder.path / "elsewhere")
    unknown = browse(folder).get("/board").text
    for each in ("to be sent", "parked", "No scan has arrived", "Nothing: no localizer", "data-unseen"):
        assert each not in unknown
    assert "Unknown: the journal can't be read." in unknown
    assert "Unknown" not in known
    assert "data-unseen" in known


def test_a_journal_that_another_has_to_itself_is_waited_for_shortly(folder: Folder, monkeypatch):
    placed = folder.place(1)
    folder.analyse(placed)
    monkeypatch.setattr(records, "LOCKED_S", 0.05)
    folder.journal.close()
    holder = sqlite3.connect(folder.path / "journal.sqlite", isolation_level=None)
    holder.execute("PRAGMA locking_mode = EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")
    page = browse(folder)
    assert "The list can&#39;t be made" in page.get("/").text
    holder.close()
    time.sleep(board.FRESH_S)
    assert order(page.get("/board").text) == ["1"]


def test_what_changes_in_the_journal_is_seen_and_what_does_not_is_not_sent_again(folder: Folder):
    placed = folder.place(1)
    page = browse(folder)
    first = page.get("/board")
    again = page.get("/board", params={"have": first.headers["X-Digest"]})
    assert (again.status_code, again.content) == (204, b"")
    assert float(again.headers["X-Now"]) == pytest.approx(time.time(), abs=5)
    folder.analyse(placed, "critical")
    time.sleep(board.FRESH_S)
    assert page.get("/board", params={"have": first.headers["X-Digest"]}).status_code == 200


def test_a_node_that_does_not_run_and_results_that_are_parked_are_said(folder: Folder, tmp_path):
    from tests.dicom_node.page import conftest

    idle = conftest.Folder(tmp_path / "idle")
    assert "The node does not run" in browse(idle).get("/").text
    idle.journal.close()
    assert "The node does not run" not in browse(folder).get("/").text
    (folder.path / "node.json").write_text('{"worker": "none", "since": 1}')
    assert "No engine is ready" in browse(folder).get("/").text


# acknowledging


def test_an_alert_is_acknowledged_by_name_once_and_the_name_is_kept(folder: Folder):
    placed = folder.place(1)
    folder.analyse(placed, "critical")
    page = browse(folder)
    (alert,) = folder.ledger.alerts()
    post = f"/alerts/{alert.id}/acknowledge"
    unnamed = page.post(post, data={"by": "  "})
    assert (unnamed.status_code, unnamed.headers["location"]) == (303, f"{placed.address}?unnamed")
    assert "Say who you are" in page.get(unnamed.headers["location"]).text
    assert folder.ledger.alerts()[0].acknowledged is None
    done = page.post(post, data={"by": "Dr. Grün"})
    assert (done.status_code, done.headers["location"]) == (303, placed.address)
    assert "httponly" in done.headers["set-cookie"].lower()
    browse(folder).post(post, data={"by": "Somebody Else"})
    (alert,) = folder.ledger.alerts()
    assert alert.acknowledged_by == "Dr. Grün"
    shown = page.get(placed.address).text
    assert "Acknowledged by <b>Dr. Grün</b>" in shown
    assert "acknowledged by Dr. Grün" in shown.partition("Timeline")[2]
    other = folder.place(2)
    folder.analyse(other, "critical")
    time.sleep(board.FRESH_S)
    assert 'value="Dr. Grün"' in page.get(other.address).text
    assert page.get(f"/alerts/{alert.id}").headers["location"] == placed.address


@pytest.mark.parametrize("kind", ["binary", "labelmap"])
@pytest.mark.parametrize("classes", [(1,), (1, 2, 3)])
def test_masks_are_those_of_the_segmentation(folder: Folder, classes, kind):
    placed = folder.place(1, classes=classes)
    folder.analyse(placed, form=Form(segmentation=kind))
    pictures = Pictures(Palette())
    masks = pictures.masks(folder.path / "results/1.2.1/1.2.1.1/revision-1/seg.dcm")
    names = {label: name for label, name in enumerate(ct.NAMES) if label in classes}
    for header, labels in zip(placed.headers, placed.labels, strict=True):
        shown = masks.labels.get(str(header.SOPInstanceUID), np.zeros_like(labels))
        for segment, name in masks.classes.items():
            label = next(label for label, one in names.items() if one == name)
            assert np.array_equal(shown == segment, labels == label), (header.SOPInstanceUID, name)


def test_a_form_that_showed_urgent_does_not_acknowledge_critical(folder: Folder):
    placed = folder.place(1)
    folder.alert(placed, folder.report(placed, "urgent"), final=False)
    page = browse(folder)
    assert '<input type="hidden" name="level" value="urgent">' in page.get(placed.address).text
    folder.alert(placed, folder.report(placed, "critical"), final=False)
    sent = page.post("/alerts/1/acknowledge", data={"by": "A", "level": "urgent"})
    assert (sent.status_code, sent.headers["location"]) == (303, placed.address)
    assert folder.ledger.alerts()[0].is_open
    page.post("/alerts/1/acknowledge", data={"by": "A", "level": "critical"})
    assert not folder.ledger.alerts()[0].is_open


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"sec-fetch-site": "same-origin"}, 303),
        ({"sec-fetch-site": "cross-site", "origin": "http://127.0.0.1"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"origin": "http://127.0.0.1"}, 303),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({}, 403),
    ],
)
def test_no_other_site_acknowledges(folder: Folder, headers, status):
    folder.analyse(folder.place(1), "critical")
    (alert,) = folder.ledger.alerts()
    page = browse(folder)
    del page.headers["sec-fetch-site"]
    assert page.post(f"/alerts/{alert.id}/acknowledge", data={"by": "A"}, headers=headers).status_code == status
    assert (folder.ledger.alerts()[0].acknowledged is not None) == (status == 303)


def test_a_form_without_end_is_not_read(folder: Folder):
    folder.analyse(folder.place(1), "critical")
    (alert,) = folder.ledger.alerts()
    browse(folder).post(f"/alerts/{alert.id}/acknowledge", data={"by": "A" * 5000})
    assert folder.ledger.alerts()[0].acknowledged is None


# what every answer has


def test_every_answer_is_guarded(folder: Folder):
    placed = folder.place(1)
    page = browse(folder)
    picture = page.get(f"{placed.address}/slices").json()["slices"][0]["picture"] + "brain.png"
    for address in ("/", "/board", placed.address, picture, "/static/page.js", "/nothing"):
        headers = page.get(address).headers
        for name, value in HEADERS.items():
            assert headers[name] == value, (address, name)
    assert page.get("/").headers["cache-control"] == "no-store"


def test_no_page_asks_anything_of_anybody_else(folder: Folder):
    placed = folder.place(1)
    folder.analyse(placed)
    page = browse(folder)
    for address in ("/", placed.address, "/nothing"):
        text = page.get(address).text
        assert "not a medical device" in text, address
        assert not re.search(r"""(src|href|action)=["']?(https?:)?//""", text), address
        assert not re.search(r"<script(?! src=)|\sstyle=|\son\w+=", text), address


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:8443", 200), ("localhost", 200), ("ct-room", 200), ("evil.example", 421), ("evil.example:80", 421)],
)
def test_on_this_machine_it_answers_under_its_own_names_alone(folder: Folder, host, status):
    assert browse(folder, hosts=["ct-room"]).get("/", headers={"host": host}).status_code == status


def test_the_viewer_gets_the_study_quoted(folder: Folder):
    placed = folder.place(1, PatientID="A&B/1")
    text = browse(folder, viewer="https://ohif.example/viewer?s={study_uid}&p={patient_id}").get(placed.address).text
    assert "https://ohif.example/viewer?s=1.2.1&amp;p=A%26B%2F1" in text


def test_what_is_unsafe_is_said_as_long_as_it_is(folder: Folder):
    text = browse(folder, address="0.0.0.0", open_to_all=True).get("/").text
    assert "Anyone on the network may see this page" in text
    assert "unencrypted" in text
    assert "hazard" not in browse(folder).get("/").text


def test_findings_of_an_older_revision_say_so(folder: Folder):
    placed = folder.place(1)
    folder.analyse(placed, "critical")
    said = "Findings of revision 1: revision 2"
    assert said not in browse(folder).get(placed.address).text
    extra = placed.paths[0].with_name("1.2.1.1.99.dcm")
    extra.write_bytes(placed.paths[0].read_bytes())
    assert f"{said} has no result yet." in browse(folder).get(placed.address).text
    placed.paths.append(extra)
    folder.record(placed, SeriesState.FAILED, "a bug", revision=2)
    assert f"{said} has none." in browse(folder).get(placed.address).text


def test_revisions_and_stages_stand_in_order(folder: Folder):
    placed = folder.place(1)
    folder.age(placed, 100)
    folder.analyse(placed, "urgent", provisional=True, missing=("2 slices missing",))
    folder.analyse(placed, "critical", revision=2)
    text = browse(folder).get(placed.address).text
    stages = re.findall(r"<td>([^<]+)</td></tr>", text.partition("Timeline")[2])
    assert stages[:2] == ["first slice", "last slice"]
    assert "results written (revision 1)" in stages
    assert stages.index("results written (revision 1)") < stages.index("results written (revision 2)")
    assert "<b>2</b>: critical" in text


def test_what_is_owed_and_what_has_arrived_is_told(folder: Folder):
    placed = folder.place(1)
    report = folder.report(placed, "routine")
    files = [
        ResultFile("sr", folder.path / "sr.dcm", "1.2", "1.2.3"),
        ResultFile("seg", folder.path / "s", "1.2", "1.2.4"),
    ]
    folder.record(
        placed, SeriesState.ANALYSED, None, report=report, files=files, to={"pacs": ("sr", "seg"), "old": ("sr",)}
    )
    outbox = Outbox(folder.journal)
    for item in outbox.claim("pacs", time.time()):
        outbox.mark_sent(item.id)
    (parked,) = outbox.claim("old", time.time())
    outbox.park(parked.id, "status 0xA900: <no>")
    page = browse(folder)
    text = page.get("/").text
    assert "1 result could not be delivered" in text
    assert "<b>old</b>: 1 parked" in text
    assert "status 0xA900: &lt;no&gt;" in text
    assert "2 of 2 results at pacs" in page.get(placed.address).text


def test_what_could_not_be_told_of_an_alert_is_said(folder: Folder):
    after_s = {"er": 0, "pager": 0, "on-call": 300}
    folder.ledger.reload([Hl7(name=name, host="x", port=1, after_s=wait) for name, wait in after_s.items()])
    placed = folder.place(1)
    folder.analyse(placed, "critical")
    for name, tell in (("er", folder.ledger.unreachable), ("pager", folder.ledger.refused)):
        told, _ = folder.ledger.claim(name, time.time())
        tell(told, f"<{name}>: no", None if name == "pager" else 60.0)
    page = browse(folder)
    side = page.get("/").text.partition("Alerts not told")[2]
    assert side.index("<b>pager</b>: 1 parked") < side.index("<b>er</b>: 1 waiting")
    assert "&lt;er&gt;: no" in side
    assert "on-call" not in side, "an escalation waits for its time"
    panel = page.get(placed.address).text
    assert re.findall(r"<b>([a-z-]+)</b>:\s*due <time[^>]*>[^<]*</time>([^<]*)", panel) == [
        ("on-call", ", unless somebody acknowledges")
    ]
    assert 'waiting <span class="problem">&lt;er&gt;' in panel


def test_a_uid_that_is_no_file_name_has_an_address(folder: Folder):
    placed = folder.place(1)
    odd = placed.paths[0].parent.rename(placed.paths[0].parent.with_name(spool.file_name("no uid")))
    assert odd.name.startswith("uid-")
    page = browse(folder)
    assert page.get(f"/series/1.2.1/{odd.name}").status_code == 200
    assert page.get(f"/series/1.2.1/{odd.name}/slices").json()["slices"]


def test_a_cache_keeps_to_its_bounds():
    cache: Cache[bytes] = Cache(100, len)
    for number in range(10):
        cache.get(number, lambda: b"x" * 30)
    assert cache.bytes <= 100
    assert cache.get(9, lambda: b"other") == b"x" * 30
    assert cache.get(0, lambda: b"other") == b"other"
    assert len(cache.get("large", lambda: b"x" * 1000)) == 1000
    assert cache.bytes <= 100
