"""How many subspaces may train at each step, and which."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

from adamss.core._array import Array, device, is_traced, namespace, repeat_while
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


def allocates_at(step: Any, config: Schedule) -> Any:
    """Return whether there is an allocation after ``step`` completed steps.

    Every ``interval`` steps after t0, and always at t1; none before or after.

    Parameters
    ----------
    step
        Completed, not skipped, optimiser steps; an integer, or an array of them.
    config
        The schedule, as `adamss.BudgetConfig`.

    Returns
    -------
    bool
        Whether to call `allocate`; an array of booleans for an array.
    """
    within = (step > config.start_step) & (step <= config.end_step)
    return within & ((step == config.end_step) | ((step - config.start_step) % config.interval == 0))


def allocate(
    scores: Array,
    budget: int | Array,
    costs: Array | None = None,
    *,
    candidates: Array | None = None,
    layers: Array | None = None,
    minimum: int = 0,
) -> Array:
    """Return which subspaces stay trained: the best that the budget affords.

    Without costs, exactly ``min(budget, T)`` subspaces, highest scores first. With costs, in order of
    score over cost, each that still fits is taken and one that does not is passed over, so that the
    costs never sum to more than the budget. Equal scores: the lower index first; order the subspaces by
    module path, then by number, and every framework and process decides alike. Under ``jax.jit`` too.

    Parameters
    ----------
    scores
        Score of every subspace of the model, (T,) floating point. NaN ranks below everything.
    budget
        Number of subspaces, or of parameters where costs are given; an integer >= 0, or a 0-d array.
    costs
        Trained parameters of each subspace, (T,) positive integers: an array, or the list that
        `adamss.core.subspace_costs` returns.
    candidates
        (T,) booleans: which subspaces may be taken, those that are still trained where none may come back. None for
        all.
    layers
        Layer of each subspace, (T,) integers, for `minimum`.
    minimum
        So many of the best candidates of every layer are taken before all others, as far as the budget goes.

    Returns
    -------
    Array
        (T,) booleans.

    Raises
    ------
    ArrayValueError
        If scores, costs, candidates or layers are not (T,), or a cost is not positive.
    ConfigError
        If the budget or the minimum is negative, or there is a minimum and no `layers`.

    Examples
    --------
    >>> import numpy as np
    >>> from adamss.core import allocate
    >>> allocate(np.asarray([3.0, 1.0, 3.0, 2.0]), 2)
    array([ True, False,  True, False])
    >>> allocate(np.asarray([9.0, 8.0, 1.0]), 5, np.asarray([3, 4, 2]))
    array([ True, False,  True])
    >>> allocate(np.asarray([9.0, 8.0, 1.0]), 2, layers=np.asarray([0, 0, 1]), minimum=1)
    array([ True, False,  True])
    """
    xp = namespace(scores)
    if isinstance(costs, Sequence):
        costs = xp.asarray(costs, device=device(scores))
    for name, array in (("costs", costs), ("candidates", candidates), ("layers", layers)):
        if scores.ndim != 1 or (array is not None and array.shape != scores.shape):
            found = "none" if array is None else tuple(array.shape)
            raise ArrayValueError(
                f"scores and {name} must be 1-d and of equal length, found {tuple(scores.shape)} and {found}"
            )
    if not is_traced(budget) and budget < 0:
        raise ConfigError(f"budget must not be negative, found {budget}")
    if minimum < 0 or (minimum and layers is None):
        raise ConfigError(f"minimum must not be negative, and needs layers; found {minimum}")
    if costs is not None and costs.shape[0] and not is_traced(costs) and int(xp.min(costs)) < 1:
        raise ArrayValueError(f"costs must be positive, found {int(xp.min(costs))}")
    if candidates is None:
        candidates = xp.ones(scores.shape, dtype=xp.bool, device=device(scores))
    scores = xp.where(xp.isnan(scores), xp.full_like(scores, -float("inf")), scores)
    density = scores if costs is None else scores / xp.astype(costs, scores.dtype)
    order = xp.argsort(density, descending=True, stable=True)
    order = _stably_sorted(~xp.take(candidates, order), order)
    if minimum and layers is not None:
        place = _place_in_layer(xp.take(layers, order))
        order = _stably_sorted(place >= minimum, order)
    taken = xp.take(candidates, order)
    if costs is None:
        taken = taken & (xp.cumulative_sum(xp.astype(taken, order.dtype)) <= budget)
    else:
        taken = _fill(xp.take(costs, order), taken, budget)
    return xp.take(taken, xp.argsort(order))


def _stably_sorted(last: Array, order: Array) -> Array:
    """Move the entries of an order that are marked behind the others, each kind in its order."""
    xp = namespace(order)
    return xp.take(order, xp.argsort(xp.astype(last, xp.int8), stable=True))


def _place_in_layer(layers: Array) -> Array:
    """How many entries of the same layer come before each."""
    xp = namespace(layers)
    grouped = xp.argsort(layers, stable=True)
    sorted_layers = xp.take(layers, grouped)
    positions = xp.arange(layers.shape[0], dtype=grouped.dtype, device=device(layers))
    first = xp.astype(xp.searchsorted(sorted_layers, sorted_layers), grouped.dtype)
    return xp.take(positions - first, xp.argsort(grouped))


def _fill(costs: Array, candidates: Array, budget: int | Array) -> Array:
    """Take the costs in order, passing over each that no longer fits; booleans (T,).

    Each round takes as long a run as fits; what is dearer than the rest of the budget can never fit
    again and leaves, with it at least the entry that ended the run. So there are at most as many rounds
    as distinct costs, where a loop over entries would take T.
    """
    xp = namespace(costs)

    def cost(chosen: Array) -> Array:
        return xp.where(chosen, costs, xp.zeros_like(costs))

    def take(state: tuple[Array, Array]) -> tuple[Array, Array]:
        kept, candidates = state
        spent = xp.cumulative_sum(cost(candidates))
        kept = kept | (candidates & (spent <= budget - xp.sum(cost(kept))))
        return kept, candidates & ~kept & (costs <= budget - xp.sum(cost(kept)))

    kept = xp.zeros(costs.shape, dtype=xp.bool, device=device(costs))
    kept, _ = repeat_while(lambda state: xp.any(state[1]), take, (kept, candidates & (costs <= budget)))
    return kept
