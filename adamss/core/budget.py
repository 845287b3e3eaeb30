"""How many subspaces may train at each step, and which."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from adamss.core._array import Array, check_concrete, device, namespace
from adamss.errors import ArrayValueError, ConfigError

__all__ = ["Schedule", "allocate", "allocates_at", "budget_at"]


class Schedule(Protocol):
    """What `budget_at` reads; `adamss.BudgetConfig` is one."""

    @property
    def target(self) -> int:
        """Budget b_end from ``end_step`` on."""

    @property
    def initial(self) -> int | None:
        """Budget b_start up to ``start_step``; None for the total of the model."""

    @property
    def start_step(self) -> int:
        """Step t0 at which the reduction starts."""

    @property
    def end_step(self) -> int:
        """Step t1 at which the target is reached."""

    @property
    def interval(self) -> int:
        """Steps between allocations."""

    @property
    def power(self) -> float:
        """Exponent p of the schedule."""


def budget_at(step: int, config: Schedule, total: int | None = None) -> int:
    """Return the budget after ``step`` completed optimiser steps.

    ::

        b(t) = floor(b_end + (b_start - b_end) (1 - (t - t0) / (t1 - t0))^p)   for t0 <= t <= t1,

    b_start before t0 and b_end after t1. Exact in integers where p is one.

    Parameters
    ----------
    step
        Completed, not skipped, optimiser steps t >= 0.
    config
        The schedule, as `adamss.BudgetConfig`.
    total
        Number of subspaces (or of trained parameters, as ``config.unit`` says) of the model: b_start
        where ``config.initial`` is None.

    Returns
    -------
    int
        Subspaces or parameters that may train.

    Raises
    ------
    ConfigError
        If b_start is known neither from the schedule nor from `total`, or is below the target.

    References
    ----------
    .. [1] Zhu and Gupta, "To prune, or not to prune", 2017 (the cubic schedule).

    Examples
    --------
    >>> from adamss import BudgetConfig, core
    >>> config = BudgetConfig(target=10, start_step=100, end_step=200, interval=10)
    >>> [core.budget_at(step, config, total=40) for step in (0, 100, 150, 199, 200, 1000)]
    [40, 40, 13, 10, 10, 10]
    """
    start = config.initial if config.initial is not None else total
    if start is None:
        raise ConfigError("the budget at the start is not known: give total= or BudgetConfig(initial=...)")
    if start < config.target:
        raise ConfigError(
            f"target = {config.target} is more than the {start} there are at the start; choose a lower target"
        )
    if step <= config.start_step:
        return start
    if step >= config.end_step:
        return config.target
    left, span = config.end_step - step, config.end_step - config.start_step
    if float(config.power).is_integer():
        p = int(config.power)
        reduction: int = (start - config.target) * left**p // span**p
        return config.target + reduction
    return math.floor(config.target + (start - config.target) * math.pow(left / span, config.power))


def allocates_at(step: int, config: Schedule) -> bool:
    """Return whether there is an allocation after ``step`` completed steps.

    Every ``interval`` steps after t0, and always at t1; none before or after.

    Parameters
    ----------
    step
        Completed, not skipped, optimiser steps.
    config
        The schedule, as `adamss.BudgetConfig`.

    Returns
    -------
    bool
        Whether to call `allocate`.
    """
    if not config.start_step < step <= config.end_step:
        return False
    return step == config.end_step or (step - config.start_step) % config.interval == 0


def allocate(scores: Array, budget: int, costs: Array | None = None) -> Array:
    """Return which subspaces stay trained: the best that the budget affords.

    Without costs, exactly ``min(budget, T)`` subspaces, highest scores first. With costs, in order of
    score over cost, each that still fits is taken and one that does not is passed over, so that the
    costs never sum to more than the budget. Equal scores: the lower index first; order the subspaces by
    module path, then by number, and every framework and process decides alike.

    Parameters
    ----------
    scores
        Score of every subspace of the model, (T,) floating point. NaN ranks below everything.
    budget
        Number of subspaces, or of parameters where costs are given; an integer >= 0.
    costs
        Trained parameters of each subspace, (T,) positive integers: an array, or the list that
        `adamss.core.subspace_costs` returns.

    Returns
    -------
    Array
        (T,) booleans.

    Raises
    ------
    ArrayValueError
        If scores or costs are not (T,), or a cost is not positive.
    ConfigError
        If the budget is negative.

    Examples
    --------
    >>> import numpy as np
    >>> from adamss.core import allocate
    >>> allocate(np.asarray([3.0, 1.0, 3.0, 2.0]), 2)
    array([ True, False,  True, False])
    >>> allocate(np.asarray([9.0, 8.0, 1.0]), 5, np.asarray([3, 4, 2]))
    array([ True, False,  True])
    """
    xp = namespace(scores)
    if isinstance(costs, Sequence):
        costs = xp.asarray(costs, device=device(scores))
    if scores.ndim != 1 or (costs is not None and costs.shape != scores.shape):
        found = tuple(scores.shape) if costs is None else (tuple(scores.shape), tuple(costs.shape))
        raise ArrayValueError(f"scores and costs must be 1-d and of equal length, found {found}")
    if budget < 0:
        raise ConfigError(f"budget must not be negative, found {budget}")
    scores = xp.where(xp.isnan(scores), xp.full_like(scores, -float("inf")), scores)
    if costs is None:
        return _rank_of(scores) < budget
    check_concrete(scores, costs, name="scores and costs")
    if scores.shape[0] and int(xp.min(costs)) < 1:
        raise ArrayValueError(f"costs must be positive, found {int(xp.min(costs))}")
    order = xp.argsort(scores / xp.astype(costs, scores.dtype), descending=True, stable=True)
    kept = _fill(xp.take(costs, order), budget)
    return xp.take(kept, xp.argsort(order))


def _rank_of(scores: Array) -> Array:
    """Place of each score in descending order, the lower index first among equals."""
    xp = namespace(scores)
    return xp.argsort(xp.argsort(scores, descending=True, stable=True))


def _fill(costs: Array, budget: int) -> Array:
    """Take the costs in order, passing over each that no longer fits; booleans (T,).

    Each round takes as long a run as fits; what is dearer than the rest of the budget can never fit
    again and leaves, with it at least the entry that ended the run. So there are at most as many rounds
    as distinct costs, where a loop over entries would take T.
    """
    xp = namespace(costs)
    kept = xp.zeros(costs.shape, dtype=xp.bool, device=device(costs))
    candidates = costs <= budget
    while bool(xp.any(candidates)):
        spent = xp.cumulative_sum(xp.where(candidates, costs, xp.zeros_like(costs)))
        kept = kept | (candidates & (spent <= budget - _cost(costs, kept)))
        candidates = candidates & ~kept & (costs <= budget - _cost(costs, kept))
    return kept


def _cost(costs: Array, kept: Array) -> int:
    xp = namespace(costs)
    return int(xp.sum(xp.where(kept, costs, xp.zeros_like(costs))))
