"""The adaptive budget: how important each subspace is, how many may be trained at each step, and which.

A pure state machine. It works on flat vectors, so that a step costs a handful of operations whatever the number of
layers: ``plan = plan_budget(layers, config)`` and ``state = initial_budget_state(plan, weights)``, then in every step
`observe` before the optimiser and `advance` after it. Nothing depends on values, so all of it runs under ``jax.jit``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from adamss.config import BudgetConfig
from adamss.core._array import (
    Array,
    as_working_precision,
    choose,
    device,
    is_traced,
    namespace,
    one_hot,
    repeat_while,
)
from adamss.core.counting import subspace_costs
from adamss.core.factors import Factors, basis_ranks, outline
from adamss.core.segmentation import subspace_sizes
from adamss.errors import ArrayValueError, ConfigError

__all__ = [
    "BudgetPlan",
    "BudgetState",
    "Processes",
    "advance",
    "allocate",
    "allocates_at",
    "budget_at",
    "initial_budget_state",
    "observe",
    "plan_budget",
]


def budget_at(step: int, config: BudgetConfig, total: int | None = None) -> int:
    """Return the budget after ``step`` completed optimiser steps.

    ::

        b(t) = floor(b_end + (b_start - b_end) (1 - (t - t0) / (t1 - t0))^p)   for t0 <= t <= t1,

    b_start before t0 and b_end after t1. Exact in integers where p is one.

    Parameters
    ----------
    step
        Completed, not skipped, optimiser steps t >= 0.
    config
        The schedule.
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


def allocates_at(step: Any, config: BudgetConfig) -> Any:
    """Return whether there is an allocation after ``step`` completed steps.

    Every ``interval`` steps after t0, and always at t1; none before or after.

    Parameters
    ----------
    step
        Completed, not skipped, optimiser steps; an integer, or an array of them.
    config
        The schedule.

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


class Processes:
    """What `observe` and `advance` need from the other processes of a training; here, that there are none.

    A controller whose arrays are spread over processes overrides the methods. Its vectors may then hold the elements
    of its own process alone, in any order: only `scores` knows where they belong.
    """

    def all_usable(self, usable: Array) -> Array:
        """Return whether the gradients could be used on every process (0-d boolean)."""
        return usable

    def scores(self, plan: BudgetPlan, products: Array) -> Array:
        """Return the score (T,) of every subspace, from ``Ibar Ubar`` of the elements."""
        return plan.scores(products)

    def agree(self, active: Array) -> Array:
        """Return the decision (T,) that all processes take."""
        return active


ALONE = Processes()


@dataclass(frozen=True, eq=False)
class BudgetPlan:
    """A schedule for the subspaces of one model; made by `plan_budget`.

    The T subspaces of all layers stand in one row, ordered by module path, then by number. This order settles ties,
    so it must not depend on the order of the layers in the model. The N elements of all B and C stand in one vector
    ``[B_1, C_1, B_2, C_2, ...]`` in the same order of layers.

    Attributes
    ----------
    config
        The schedule.
    layers
        `adamss.core.factors.outline` of each layer by module path, sorted by path.
    costs
        Trained parameters of each of the T subspaces.
    total
        Number of subspaces, or of parameters, as ``config.unit`` says: the budget at the start.
    """

    config: BudgetConfig
    layers: Mapping[str, Factors] = field(repr=False)
    costs: tuple[int, ...]
    total: int

    @property
    def paths(self) -> tuple[str, ...]:
        """Module paths of the layers, sorted."""
        return tuple(self.layers)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number K of subspaces of each layer."""
        return tuple(layer.ranks.shape[0] for layer in self.layers.values())

    def budget_at(self, step: Any) -> Any:
        """Return `adamss.core.budget_at` for this model; the step may be traced."""
        if not is_traced(step):
            return budget_at(int(step), self.config, self.total)
        xp = namespace(step)
        place = xp.clip(step - self.config.start_step, 0, len(self._budgets) - 1)
        return xp.take(xp.asarray(self._budgets, dtype=step.dtype), place)

    def allocates_at(self, step: Any) -> Any:
        """Return `adamss.core.allocates_at`; the step may be traced."""
        return allocates_at(step, self.config)

    def join(self, values: Mapping[str, Array]) -> Array:
        """Return arrays (K,) of every layer in one row (T,)."""
        arrays = [values[path] for path in self.layers]
        return namespace(*arrays).concat(arrays)

    def split(self, row: Array) -> dict[str, Array]:
        """Undo `join`: return (K,) of every layer by its path."""
        return dict(zip(self.layers, _parts(row, self.sizes), strict=True))

    def join_elements(self, values: Mapping[str, tuple[Array, Array]]) -> Array:
        """Return arrays of the shapes of B and C of every layer in one vector (N,), in float32 or wider."""
        arrays = [array for path in self.layers for array in values[path]]
        xp = namespace(*arrays)
        return xp.concat([xp.reshape(as_working_precision(array), (-1,)) for array in arrays])

    def split_elements(self, vector: Array) -> dict[str, tuple[Array, Array]]:
        """Undo `join_elements`: return arrays of the shapes of B and C by the path of the layer."""
        xp = namespace(vector)
        shapes = [array.shape for layer in self.layers.values() for array in (layer.B, layer.C)]
        parts = _parts(vector, [math.prod(shape) for shape in shapes])
        arrays = iter([xp.reshape(part, shape) for part, shape in zip(parts, shapes, strict=True)])
        return {path: (next(arrays), next(arrays)) for path in self.layers}

    def scores(self, products: Array) -> Array:
        """Return the score of each subspace: the mean over B_k plus the mean over C_k, padding left out.

        Parameters
        ----------
        products
            Sensitivity times uncertainty of the elements, (N,).

        Returns
        -------
        Array
            (T,) floating point; 0 for a subspace of rank 0.
        """
        xp, on, dtype = namespace(products), device(products), products.dtype
        found = []
        for path, (B, C) in self.split_elements(products).items():
            layer = self.layers[path]
            K, r, ranks = layer.ranks.shape[0], layer.C.shape[0], layer.ranks
            if np.any(ranks < r):
                within = np.arange(r)[:, None] < ranks[layer.labels]
                C = xp.where(xp.asarray(within, device=on), C, xp.zeros_like(C))
            owners_B = np.full(layer.B.shape[1], K)  # K: the column is padding
            owners_B[: np.sum(ranks)] = np.repeat(np.arange(K), ranks)
            # A product with a one-hot matrix: a scatter would not be deterministic on a GPU.
            for array, owners, counts in (
                (B, owners_B, ranks * basis_ranks(layer)),
                (C, layer.labels, ranks * subspace_sizes(layer.labels, K)),
            ):
                totals = xp.sum(array, axis=0) @ one_hot(xp.asarray(owners, device=on), K, dtype=dtype)
                found.append(totals / xp.asarray(np.maximum(counts, 1), dtype=dtype, device=on))
        return xp.concat([b + c for b, c in zip(found[::2], found[1::2], strict=True)])

    def decide(self, scores: Array, active: Array, budget: Any) -> Array:
        """Return which subspaces stay trained, (T,) booleans.

        Parameters
        ----------
        scores
            Score of every subspace, (T,).
        active
            Which are trained up to now, (T,) booleans: the candidates, unless ``config.revive``.
        budget
            Of the step, in ``config.unit``; an integer or a 0-d array.
        """
        xp, on = namespace(scores), device(scores)
        integer = xp.int32 if max(self.total, len(self.costs)) < 2**31 else xp.int64
        costs = xp.asarray(self.costs, dtype=integer, device=on) if self.config.unit == "parameters" else None
        layers = np.repeat(np.arange(len(self.sizes)), self.sizes).astype(np.int32)
        return allocate(
            scores,
            budget,
            costs,
            candidates=None if self.config.revive else active,
            layers=xp.asarray(layers, device=on),
            minimum=self.config.minimum_per_layer,
        )

    @cached_property
    def _budgets(self) -> np.ndarray[Any, Any]:
        """Budget of every step of the schedule, exact integers: what a compiled function looks up."""
        steps = range(self.config.start_step, self.config.end_step + 1)
        return np.asarray([self.budget_at(step) for step in steps])


class BudgetState(NamedTuple):
    """Where the reduction of one model stands. All of it is arrays: save it with the optimiser's state.

    Attributes
    ----------
    step
        Completed optimiser steps, 0-d integer.
    waiting
        Whether an allocation is due for which no step has been informative yet, 0-d boolean.
    left_out
        Steps whose gradients held NaN or infinity, 0-d integer; they count as steps, but not in the averages.
    active
        Which subspaces are trained, (T,) booleans.
    sensitivity
        Ibar, the average of ``I = |w g|`` of each element, (N,) in float32 or wider.
    uncertainty
        Ubar, the average of ``|I - Ibar|``, likewise.
    """

    step: Array
    waiting: Array
    left_out: Array
    active: Array
    sensitivity: Array
    uncertainty: Array


def plan_budget(layers: Mapping[str, Factors], config: BudgetConfig) -> BudgetPlan:
    """Return the plan of a schedule for the layers of a model.

    Parameters
    ----------
    layers
        Factors by module path. The masks are copied; of A, B and C only the shapes are read.
    config
        The schedule.

    Returns
    -------
    BudgetPlan
        For all subspaces of the layers.

    Raises
    ------
    ConfigError
        If the target, or the budget at the start, is more than the model has, or the target is less than
        ``minimum_per_layer`` needs, or less than the one subspace costs that may be left.

    Examples
    --------
    >>> import numpy as np
    >>> from adamss import BudgetConfig, core
    >>> decomposition = core.decompose(np.eye(8), 4)
    >>> factors = core.initial_factors(decomposition, core.segment(decomposition, 4, "contiguous"), 1)
    >>> plan = core.plan_budget({"query": factors, "value": factors}, BudgetConfig(target=3, end_step=10))
    >>> plan.total, plan.budget_at(5), plan.costs[0]
    (8, 3, 6)
    """
    if not layers:
        raise ConfigError("a budget needs at least one adapted layer")
    outlines = {path: outline(layers[path], name=path) for path in sorted(layers)}
    # A framework that trains in place would write its later masks into these.
    outlines = {path: layer._replace(active=layer.active.copy()) for path, layer in outlines.items()}
    per_layer = []
    for layer in outlines.values():
        sizes = subspace_sizes(layer.labels, layer.ranks.shape[0])
        per_layer.append([max(cost, 1) for cost in subspace_costs(sizes, layer.ranks, basis_ranks(layer))])
    costs = tuple(cost for layer_costs in per_layer for cost in layer_costs)
    in_parameters = config.unit == "parameters"
    total = sum(costs) if in_parameters else len(costs)
    for name, value in (("target", config.target), ("initial", config.initial)):
        if value is not None and value > total:
            raise ConfigError(
                f"budget: {name} = {value} is more than the {total} {config.unit} of the model; lower it"
            )
    kept = config.minimum_per_layer
    if in_parameters:
        # The target must afford whichever subspaces a layer keeps at last, and whichever one is left at last.
        needed = min(costs) if config.revive else max(costs)
        needed = max(needed, sum(sum(sorted(layer_costs)[-kept:]) for layer_costs in per_layer if kept))
    else:
        needed = sum(min(kept, len(layer_costs)) for layer_costs in per_layer)
    if config.target < needed:
        what = (
            f"minimum_per_layer = {kept} in {len(layers)} layers may need"
            if kept
            else "one subspace may need"
        )
        raise ConfigError(
            f"budget: target = {config.target} {config.unit} cannot be kept to: {what} {needed}; raise the target"
            + (", or lower minimum_per_layer" if kept else "")
        )
    return BudgetPlan(config, outlines, costs, total)


def initial_budget_state(plan: BudgetPlan, like: Array) -> BudgetState:
    """Return the state before the first step: averages of zero, and the masks that the plan was made with.

    Parameters
    ----------
    plan
        See `plan_budget`.
    like
        The weights as `observe` gets them, (N,): they say framework, device and dtype.

    Returns
    -------
    BudgetState
        Averages in float32 or wider.
    """
    zeros = as_working_precision(like)
    xp, on = namespace(like), device(like)
    # No array appears twice: a compiled step may be given the buffers of the state, each of them once.
    return BudgetState(
        step=xp.zeros((), dtype=xp.int32, device=on),
        waiting=xp.zeros((), dtype=xp.bool, device=on),
        left_out=xp.zeros((), dtype=xp.int32, device=on),
        active=xp.asarray(plan.join({path: layer.active for path, layer in plan.layers.items()}), device=on),
        sensitivity=xp.zeros_like(zeros),
        uncertainty=xp.zeros_like(zeros),
    )


def observe(
    plan: BudgetPlan, state: BudgetState, weights: Array, gradients: Array, processes: Processes = ALONE
) -> BudgetState:
    """Return the state with the importance averages of one more step; call it before the optimiser's step.

    With ``I = |w g|``, b1 and b2 the two decays of the schedule::

        Ibar' = b1 Ibar + (1 - b1) I
        Ubar' = b2 Ubar + (1 - b2) |I - Ibar'|

    A step with NaN or infinity in ``I``, or with a value whose square, which a score needs, would overflow, leaves
    the averages as they were and is counted in ``left_out``. Once the schedule has ended the state is returned as it
    is.

    Parameters
    ----------
    plan, state
        See `plan_budget` and `initial_budget_state`.
    weights
        Elements of all B and C before the optimiser's step, (N,); see `BudgetPlan.join_elements`.
    gradients
        Their gradients, (N,), unscaled, and summed over all processes that see different data.
    processes
        Where the arrays are spread over several.

    Returns
    -------
    BudgetState
        With other averages. If the optimiser then skips its step, go on from the former state.

    References
    ----------
    .. [1] Zhang et al., "PLATON: Pruning Large Transformer Models with Upper Confidence Bound of Weight
       Importance", ICML 2022.
    """

    def averaged(state: BudgetState) -> BudgetState:
        xp = namespace(state.sensitivity)
        b1, b2 = plan.config.sensitivity_decay, plan.config.uncertainty_decay
        with np.errstate(over="ignore", invalid="ignore"):
            now = xp.abs(as_working_precision(weights) * as_working_precision(gradients))
            # The comparison is False for NaN too.
            usable = processes.all_usable(xp.all(now <= xp.finfo(now.dtype).max ** 0.5))
            sensitivity = b1 * state.sensitivity + (1 - b1) * now
            uncertainty = b2 * state.uncertainty + (1 - b2) * xp.abs(now - sensitivity)
        return state._replace(
            left_out=state.left_out + xp.astype(~usable, state.left_out.dtype),
            sensitivity=xp.where(usable, sensitivity, state.sensitivity),
            uncertainty=xp.where(usable, uncertainty, state.uncertainty),
        )

    goes_on = (state.step < plan.config.end_step) | state.waiting
    new: BudgetState = choose(goes_on, averaged, _unchanged, state)
    return new


def advance(plan: BudgetPlan, state: BudgetState, processes: Processes = ALONE) -> BudgetState:
    """Return the state after the optimiser's step: the step counted, and subspaces chosen if an allocation is due.

    An allocation waits while no candidate has a score above zero (C starts at zero, so the first step says nothing).
    It then takes place at the first step that is informative, with the budget of that step.

    Parameters
    ----------
    plan
        See `plan_budget`.
    state
        As `observe` returned it. Its ``step`` and ``waiting`` may be a Python integer and boolean, which on a GPU
        spare the wait for its results.
    processes
        Where the arrays are spread over several.

    Returns
    -------
    BudgetState
        After the step; ``plan.split(state.active)`` gives the masks of the layers.

    References
    ----------
    .. [1] Zheng et al., "Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning",
       NeurIPS 2025.
    """

    def due(state: BudgetState) -> BudgetState:
        scores = processes.scores(plan, state.sensitivity * state.uncertainty)
        xp = namespace(scores)

        def allocated(state: BudgetState) -> BudgetState:
            decided = plan.decide(scores, state.active, plan.budget_at(state.step))
            state = state._replace(waiting=state.waiting & False, active=processes.agree(decided))
            if plan.config.window == "running":
                return state
            return state._replace(
                sensitivity=xp.zeros_like(state.sensitivity), uncertainty=xp.zeros_like(state.uncertainty)
            )

        def waits(state: BudgetState) -> BudgetState:
            return state._replace(waiting=state.waiting | True)

        informative = xp.any((scores > 0) & (state.active | plan.config.revive))
        new: BudgetState = choose(informative, allocated, waits, state)
        return new

    state = state._replace(step=state.step + 1)
    new: BudgetState = choose(plan.allocates_at(state.step) | state.waiting, due, _unchanged, state)
    return new


def _unchanged(state: BudgetState) -> BudgetState:
    return state


def _parts(vector: Array, sizes: Sequence[int]) -> list[Array]:
    """Cut a vector into pieces of these sizes."""
    ends = np.cumsum(sizes).tolist()
    return [vector[end - size : end] for size, end in zip(sizes, ends, strict=True)]
