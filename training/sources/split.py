"""Splits by patient: a patient's images stand on exactly one side.

Slices of one head are alike, so a split by image measures memory. The papers split 80/20 (000), 7:1:2 (004) and into
ten folds (000).
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from training.sources.errors import LeakError, SplitError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from training.sources.case import Case, Entry

LEAST = 1e-9  # a smaller improvement is rounding, and two swaps could undo each other for ever


@dataclass(frozen=True, slots=True)
class Fold:
    """One turn of a cross-validation: patients to train with and patients to test with."""

    train: frozenset[str]
    test: frozenset[str]


def survey(entries: Iterable[Entry]) -> dict[str, frozenset[int]]:
    """Class indices that each patient shows, background left out. Loads every case, one at a time."""
    shown: dict[str, frozenset[int]] = {}
    for entry in entries:
        counts = np.bincount(entry.load().labels.ravel(), minlength=1)
        shown[entry.patient] = shown.get(entry.patient, frozenset()) | frozenset(np.flatnonzero(counts[1:]) + 1)
    return {patient: frozenset(int(index) for index in classes) for patient, classes in shown.items()}


def by_fractions(
    shown: Mapping[str, Collection[int]], fractions: Sequence[float], *, seed: int
) -> tuple[frozenset[str], ...]:
    """Deal patients to parts in a ratio, such as ``(80, 20)`` or ``(7, 1, 2)``.

    Parts have the sizes that the ratio asks for, rounded to whole patients and never empty. Within that, each class is
    spread over the parts in the same ratio as far as patients with several classes let it.

    Parameters
    ----------
    shown : class indices that each patient shows; its order does not matter
    fractions : positive, in any unit
    seed : the same seed and patients give the same parts

    Raises
    ------
    SplitError : fractions that are none, or fewer patients than parts

    """
    if len(fractions) < 2 or not all(np.isfinite(f) and f > 0 for f in fractions):
        raise SplitError(f"fractions {tuple(fractions)}: give two or more positive numbers, such as 7, 1, 2")
    return _deal(shown, _sizes(len(shown), fractions), seed)


def into_folds(shown: Mapping[str, Collection[int]], folds: int, *, seed: int) -> tuple[Fold, ...]:
    """Turns of a cross-validation: each patient is tested with once. Folds differ by one patient at most.

    Parameters
    ----------
    shown, seed : as for `by_fractions`
    folds : two or more

    Raises
    ------
    SplitError : fewer than two folds, or fewer patients than folds

    """
    if folds < 2:
        raise SplitError(f"{folds} folds: a cross-validation has two or more")
    everyone = frozenset(shown)
    return tuple(Fold(everyone - part, part) for part in _deal(shown, _sizes(len(shown), [1.0] * folds), seed))


def take(entries: Iterable[Entry], patients: Collection[str]) -> tuple[Entry, ...]:
    """The entries of some patients, in their order."""
    return tuple(entry for entry in entries if entry.patient in patients)


def check_no_leak(*sides: Iterable[Entry | Case]) -> None:
    """Check that no patient stands on two sides.

    Raises
    ------
    LeakError : with how many patients do, and not who they are

    """
    on_sides = Counter(patient for side in sides for patient in {each.patient for each in side})
    twice = sum(count > 1 for count in on_sides.values())
    if twice:
        raise LeakError(
            f"{twice} of {len(on_sides)} patients on more than one side of the split: "
            "split by patient, and check that the patient pattern gives each patient one name"
        )


def _sizes(patients: int, fractions: Sequence[float]) -> list[int]:
    """Patients per part: largest remainders, and at least one each."""
    if patients < len(fractions):
        raise SplitError(f"{patients} patients do not fill {len(fractions)} parts: ask for fewer, or add patients")
    exact = np.asarray(fractions, np.float64) / float(np.sum(fractions)) * patients
    sizes = np.floor(exact).astype(int)
    remainder = np.argsort(-(exact - sizes), kind="stable")
    sizes[remainder[: patients - int(sizes.sum())]] += 1
    while not sizes.all():
        sizes[int(np.argmax(sizes))] -= 1
        sizes[int(np.argmin(sizes))] += 1
    return sizes.tolist()


def _deal(shown: Mapping[str, Collection[int]], sizes: Sequence[int], seed: int) -> tuple[frozenset[str], ...]:
    """Deal patients to parts at random, then even out the classes. Patients who show none are a class of their own."""
    classes = {patient: frozenset(shown[patient]) - {0} or frozenset({0}) for patient in sorted(shown)}
    kinds = sorted(set(classes.values()), key=sorted)
    indices = sorted(frozenset().union(*kinds))
    shows = np.array([[index in kind for index in indices] for kind in kinds], np.float64)  # (K, C)
    number = {kind: k for k, kind in enumerate(kinds)}
    names = sorted(shown)
    shuffled = iter([names[i] for i in np.random.default_rng(seed).permutation(len(names))])
    parts: list[list[list[str]]] = [[[] for _ in kinds] for _ in sizes]  # per part and kind, patients
    for part, size in zip(parts, sizes, strict=True):
        for patient in itertools.islice(shuffled, size):
            part[number[classes[patient]]].append(patient)
    _even_out(parts, shows)
    return tuple(frozenset(itertools.chain(*part)) for part in parts)


def _even_out(parts: Sequence[Sequence[list[str]]], shows: NDArray[np.float64]) -> None:
    """Swap patients between two parts, in place, as long as that spreads the classes better.

    What becomes smaller is the sum over parts and classes of l^2 / n, where a part lacks l of a class of n patients: so
    a rare class counts as much as a common one. Patients who show the same are of one kind, and alike here.

    Parameters
    ----------
    parts : patients by part and kind
    shows : ``(K, C)``, 1 where patients of a kind show a class

    """
    counts = np.array([[len(members) for members in part] for part in parts], np.float64)  # (P, K)
    total = counts.sum(axis=0) @ shows  # (C,)
    lacks = counts.sum(axis=1, keepdims=True) / counts.sum() * total - counts @ shows  # (P, C)
    change = shows[np.newaxis] - shows[:, np.newaxis]  # (K, K, C): giving a patient of one kind for one of another
    cost = 2 * (change**2 / total).sum(axis=-1)
    improved = True
    while improved:
        improved = False
        for one, other in itertools.combinations(range(len(parts)), 2):
            worth = cost + 2 * change @ ((lacks[other] - lacks[one]) / total)
            possible = np.outer([bool(members) for members in parts[one]], [bool(members) for members in parts[other]])
            give, get = np.unravel_index(np.where(possible, worth, 0).argmin(), worth.shape)
            if possible[give, get] and worth[give, get] < -LEAST:
                given, got = parts[one][give].pop(), parts[other][get].pop()
                parts[one][get].append(got)
                parts[other][give].append(given)
                lacks[one] -= change[give, get]
                lacks[other] += change[give, get]
                improved = True
