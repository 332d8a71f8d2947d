"""The rehearsal makes every kind of result once, and leaves nothing."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from dicom_node.analysis import rehearsal, worker
from dicom_node.results import capture, montage, painter, result_set, sc, seg, sr
from runtime.bundle import open_bundle
from runtime.session import open_session


@pytest.fixture(scope="module")
def engine():
    bundle = open_bundle()
    session = open_session(bundle, "onnxruntime", precision="fp32", threads=1)
    yield bundle, session
    session.close()


def test_every_writer_is_used_once_and_nothing_stays(engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made: dict[str, int] = {}
    writers = {seg: "build", sr: "build", sc: "build", capture: "draw", montage: "draw"}
    for module, does in writers.items():
        writer = getattr(module, does)

        def noted(*arguments: object, work=writer, name=module.__name__, **options: object) -> object:
            built = work(*arguments, **options)
            made[name] = made.get(name, 0) + bool(built)
            return built

        monkeypatch.setattr(module, does, noted)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with capture_logs() as logs:
        assert rehearsal.rehearse(*engine, result_set.USUAL)
    assert made == {module.__name__: 1 for module in writers}
    assert list(tmp_path.iterdir()) == []
    assert logs == []


def test_a_worker_goes_on_where_there_is_no_room_to_rehearse(engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with capture_logs() as logs:
        worker._rehearse(*engine, result_set.USUAL, painter.draw)
    assert [one["event"] for one in logs] == ["not_rehearsed"]
