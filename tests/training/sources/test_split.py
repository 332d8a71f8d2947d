"""Splits: each patient on exactly one side, in the asked-for numbers, alike in what they show; and leaks are found."""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.sources import split
from training.sources.case import Case, Entry
from training.sources.errors import LeakError, SplitError

patients = st.dictionaries(
    st.text(min_size=1, max_size=4), st.frozensets(st.integers(0, 6), max_size=4), min_size=10, max_size=60
)
ratios = st.lists(st.floats(0.05, 20), min_size=2, max_size=5)


@given(patients, ratios, st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_each_patient_is_in_exactly_one_part_and_parts_have_their_sizes(shown, fractions, seed):
    parts = split.by_fractions(shown, fractions, seed=seed)
    assert sorted(p for part in parts for p in part) == sorted(shown)
    exact = np.array(fractions) / sum(fractions) * len(shown)
    for part, size in zip(parts, exact, strict=True):
        assert part
        if exact.min() >= 1:
            assert abs(len(part) - size) < 1


@given(patients, st.integers(2, 10), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_folds_test_each_patient_once_and_never_train_with_whom_they_test(shown, count, seed):
    folds = split.into_folds(shown, count, seed=seed)
    assert len(folds) == count
    assert sorted(p for fold in folds for p in fold.test) == sorted(shown)
    for fold in folds:
        assert not fold.train & fold.test
        assert fold.train | fold.test == set(shown)
    sizes = [len(fold.test) for fold in folds]
    assert max(sizes) - min(sizes) <= 1


@given(st.lists(st.integers(0, 6), min_size=20, max_size=200), st.sampled_from([(80, 20), (7, 1, 2), (1,) * 10]))
@settings(max_examples=60, deadline=None)
def test_patients_of_one_class_each_are_spread_in_the_ratio(classes, fractions):
    shown = {f"p{i}": {index} for i, index in enumerate(classes)}
    parts = split.by_fractions(shown, fractions, seed=1)
    for index, total in Counter(classes).items():
        for part, fraction in zip(parts, fractions, strict=True):
            expected = total * fraction / sum(fractions)
            # whole patients, and the parts' own sizes are rounded too
            assert abs(sum(index in shown[p] for p in part) - expected) < 1.5


def test_a_set_like_paper_000_is_split_evenly():
    rng = np.random.default_rng(0)
    shown = {
        f"{i}": frozenset(rng.choice(6, size=rng.choice((1, 2, 3), p=(0.6, 0.3, 0.1)), replace=False) + 1)
        for i in range(1347)
    }
    totals = Counter(index for classes in shown.values() for index in classes)
    for fold in split.into_folds(shown, 10, seed=3):
        counts = Counter(index for patient in fold.test for index in shown[patient])
        for index, total in totals.items():
            assert counts[index] == pytest.approx(total / 10, abs=1)
    train, test = split.by_fractions(shown, (80, 20), seed=3)
    assert (len(train), len(test)) == (1078, 269)
    assert [len(part) for part in split.by_fractions(shown, (7, 1, 2), seed=3)] == [943, 135, 269]


def test_a_class_of_two_patients_is_on_both_sides():
    shown = {f"p{i}": {1} for i in range(38)} | {"a": {2}, "b": {2}}
    for seed in range(10):
        halves = split.by_fractions(shown, (1, 1), seed=seed)
        assert [sum(2 in shown[p] for p in half) for half in halves] == [1, 1]


def test_the_seed_decides_and_the_order_of_the_patients_does_not():
    shown = {f"p{i}": {i % 3} for i in range(40)}
    backwards = dict(reversed(shown.items()))
    once = split.by_fractions(shown, (7, 1, 2), seed=4)
    assert once == split.by_fractions(backwards, (7, 1, 2), seed=4)
    assert len({split.by_fractions(shown, (7, 1, 2), seed=seed) for seed in range(8)}) == 8


@pytest.mark.parametrize("fractions", [(), (1,), (1, 0), (1, -1), (1, float("nan")), (1, float("inf"))])
def test_fractions_that_are_none_are_refused(fractions):
    with pytest.raises(SplitError, match="give two or more positive numbers"):
        split.by_fractions({"a": {1}, "b": {1}}, fractions, seed=0)


def test_too_few_patients_or_folds_are_refused():
    with pytest.raises(SplitError, match="2 patients do not fill 3 parts"):
        split.by_fractions({"a": {1}, "b": {1}}, (7, 1, 2), seed=0)
    with pytest.raises(SplitError, match="1 folds"):
        split.into_folds({"a": {1}, "b": {1}}, 1, seed=0)


def load(patient, name, classes):
    labels = np.zeros((1, 4, 4), np.uint8)
    labels.ravel()[: len(classes)] = classes
    return Case(patient, name, np.zeros((1, 4, 4), np.int16), labels, "HU")


def entry(patient, name, classes=()):
    return Entry(patient, name, partial(load, patient, name, classes))


def test_a_survey_joins_what_a_patients_cases_show():
    found = split.survey([entry("a", "1", (1, 3)), entry("b", "2"), entry("a", "3", (3, 6))])
    assert found == {"a": {1, 3, 6}, "b": set()}


def test_leaks_are_counted_and_not_named():
    cases = [entry(patient, f"{patient}{i}") for patient in ("SECRET1", "SECRET2", "SECRET3") for i in range(3)]
    split.check_no_leak(cases[:3], cases[3:])
    split.check_no_leak(cases[:3], cases[3:6], cases[6:])
    with pytest.raises(LeakError, match="2 of 3 patients on more than one side") as raised:
        split.check_no_leak(cases[:5], iter(cases[4:7]), cases[7:])
    assert "SECRET" not in str(raised.value)
    train, test = split.by_fractions(split.survey(cases), (2, 1), seed=0)
    split.check_no_leak(split.take(cases, train), split.take(cases, test))
    assert len(split.take(cases, train)) == 6
