"""What `tests.fuzz` has come upon, again; and good files, changed at random: an answer, or a refusal by name."""

from __future__ import annotations

import logging

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import fuzz

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom on what is wrong with the bytes

SEEDS = {target: sorted(path for path in (fuzz.SEEDS / target).iterdir()) for target in fuzz.TARGETS}
GOOD = {
    target: [path for path in paths if len(path.name) != 12] for target, paths in SEEDS.items()
}  # others are hashes


@pytest.fixture(autouse=True)
def _quiet():
    """`fuzz` has its own way with the log."""
    before = structlog.get_config()
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)
    structlog.configure(**before)


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_what_was_found_once_is_answered(target: str):
    """A crash of a decoder ends this process: run what is left of it one by one."""
    assert len(SEEDS[target]) > 100
    for path in SEEDS[target]:
        try:
            fuzz.TARGETS[target](path.read_bytes())
        except Exception as error:
            raise AssertionError(path.name) from error


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_good_bytes_changed_at_random_are_answered(target: str):
    good = [path.read_bytes() for path in GOOD[target]]
    assert good

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(
        data=st.sampled_from(good),
        seeds=st.lists(st.integers(0, 1 << 32), max_size=4),
        flips=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=6),
        cut=st.integers(0, 1 << 14),
    )
    def changed(data: bytes, seeds: list[int], flips: list[tuple[int, int]], cut: int) -> None:
        for seed in seeds:
            data = fuzz.mutate(data or b"\0", seed)
        content = bytearray(data[: fuzz.LONGEST])
        for place, value in flips:
            if content:
                content[place % len(content)] = value
        fuzz.TARGETS[target](bytes(content[: max(len(content) - cut // 64, 0)]))

    changed()
