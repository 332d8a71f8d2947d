"""Queueing formulas that the simulation is held against, with their sources.

Times in any unit, as long as it is one; a rate is its reciprocal. See L. Kleinrock, Queueing Systems 1 (1975).
"""

from __future__ import annotations

import math


class Saturated(ValueError):  # a fact about the load, told as one
    """More comes than can be done: no queue of finite length is there to tell of."""


def utilisation(rate: float, service: float, servers: int = 1) -> float:
    """Share of time that a server is busy: the utilisation law (Denning & Buzen 1978)."""
    return rate * service / servers


def mg1_wait(rate: float, mean: float, second_moment: float) -> float:
    """Mean wait before service of an M/G/1 queue: Pollaczek and Khinchine.

    Raises
    ------
    Saturated : the server can't do what comes

    """
    busy = _checked(utilisation(rate, mean))
    return rate * second_moment / (2 * (1 - busy))


def erlang_c(rate: float, service: float, servers: int) -> float:
    """Share of customers of an M/M/c queue that have to wait: Erlang's second formula.

    Raises
    ------
    Saturated : the servers can't do what comes

    """
    busy = _checked(utilisation(rate, service, servers))
    load = rate * service
    blocked = 1.0  # Erlang's first formula by its recursion, which no factorial overflows
    for number in range(1, servers + 1):
        blocked = load * blocked / (number + load * blocked)
    return blocked / (1 - busy * (1 - blocked))


def mgc_wait(rate: float, service: float, servers: int, variation: float = 1.0) -> float:
    """Mean wait before service of an M/G/c queue, nearly: that of M/M/c times (1 + cv²) / 2 (Lee & Longton 1959).

    Parameters
    ----------
    variation : coefficient of variation of the service; 1 is M/M/c, exactly

    """
    waits = erlang_c(rate, service, servers)
    return waits * service / (servers * (1 - utilisation(rate, service, servers))) * (1 + variation**2) / 2


def servers_needed(rate: float, service: float, most_busy: float) -> int:
    """How many servers it takes for none to be busier than that."""
    return max(1, math.ceil(utilisation(rate, service) / most_busy - 1e-9))


def _checked(busy: float) -> float:
    if busy >= 1:
        raise Saturated(f"servers would have to be busy {busy:.0%} of the time")
    return busy
