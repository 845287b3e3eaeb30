"""The adaptive budget: how important each subspace is, how many may be trained at each step, and which.

The budget is a pure state machine on flat vectors, so that a step takes few array operations even for many layers.
Set it up by ``plan = plan_budget(layers, config)`` and ``state = initial_budget_state(plan, weights)``. Then, in
every step, call `observe` before the optimiser and `advance` after it. Shapes and Python control flow do not depend
on values, so that `observe` and `advance` run under ``jax.jit``.
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

    The budget is b_start before t0 and b_end after t1. If p is an integer, the computation is exact.

    Parameters
    ----------
    step
        Number t >= 0 of completed optimiser steps. Skipped steps do not count.
    config
        The schedule.
    total
        Number of subspaces of the model, or of its trained parameters, depending on ``config.unit``. It is b_start
        if ``config.initial`` is None.

    Returns
    -------
    int
        Number of subspaces or parameters that may be trained.

    Raises
    ------
    ConfigError
        If b_start is given neither by the schedule nor by `total`, or b_start is below the target.

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
        raise ConfigError("the initial budget is not known; pass total= or BudgetConfig(initial=...)")
    if start < config.target:
        raise ConfigError(
            f"target = {config.target} is more than the initial budget {start}; choose a lower target"
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
    """Return whether an allocation takes place after ``step`` completed steps.

    Allocations take place every ``interval`` steps after t0, and always at t1. There are none up to t0 or after t1.

    Parameters
    ----------
    step
        Number of completed optimiser steps, an integer or an array of integers. Skipped steps do not count.
    config
        The schedule.

    Returns
    -------
    bool
        Whether to call `allocate`. If `step` is an array, an array of booleans.

    Examples
    --------
    >>> from adamss import BudgetConfig, core
    >>> config = BudgetConfig(target=10, start_step=100, end_step=125, interval=10)
    >>> [step for step in range(200) if core.allocates_at(step, config)]
    [110, 120, 125]
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
    """Choose the subspaces that stay trained, the best ones that the budget allows.

    Without costs, the ``min(budget, T)`` subspaces with the highest scores are chosen. With costs, the subspaces are
    visited in order of score over cost, and each one that still fits the budget is chosen. The costs of the chosen
    subspaces therefore never sum to more than the budget. Of equal scores, the lower index comes first. If the
    subspaces are ordered by module path and then by number, every framework and every process makes the same choice.
    The function can be called under ``jax.jit``.

    Parameters
    ----------
    scores
        Score of every subspace of the model, (T,) floating point. NaN ranks below every number.
    budget
        Number of subspaces, or of parameters if `costs` is given. An integer >= 0, or a 0-d array.
    costs
        Trained parameters of each subspace, (T,) positive integers, as an array or as the list that
        `adamss.core.subspace_costs` returns.
    candidates
        Which subspaces may be chosen, (T,) booleans: those still trained, if a frozen one may not return. None means
        all of them.
    layers
        Layer of each subspace, (T,) integers. Only `minimum` uses it.
    minimum
        Number of subspaces per layer that are chosen first. The best `minimum` candidates of every layer come
        before all other candidates, as far as the budget allows.

    Returns
    -------
    Array
        Which subspaces are chosen, (T,) booleans.

    Raises
    ------
    ArrayValueError
        If scores, costs, candidates or layers do not have the shape (T,), or a cost is not positive.
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
    """Move the entries of `order` that are marked in `last` to the end, keeping the order within both groups."""
    xp = namespace(order)
    return xp.take(order, xp.argsort(xp.astype(last, xp.int8), stable=True))


def _place_in_layer(layers: Array) -> Array:
    """Return, for each entry, how many earlier entries belong to the same layer."""
    xp = namespace(layers)
    grouped = xp.argsort(layers, stable=True)
    sorted_layers = xp.take(layers, grouped)
    positions = xp.arange(layers.shape[0], dtype=grouped.dtype, device=device(layers))
    first = xp.astype(xp.searchsorted(sorted_layers, sorted_layers), grouped.dtype)
    return xp.take(positions - first, xp.argsort(grouped))


def _fill(costs: Array, candidates: Array, budget: int | Array) -> Array:
    """Take candidates in order, skipping each one that no longer fits the budget; return booleans (T,).

    Each round takes the longest run of candidates that fits. Then all candidates that cost more than the remaining
    budget are dropped, since the budget only shrinks; the candidate that ended the run is one of them. Hence the
    number of rounds is at most the number of distinct costs, where a loop over the entries would need T rounds.
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
    """Communication of `observe` and `advance` with the other processes; this class is for a single process.

    A controller whose arrays are distributed over processes overrides the methods. Its vectors may then hold only the
    elements of its own process, in any order, because only `scores` needs to know which subspace each belongs to.

    Examples
    --------
    A process that adopts the choice of another one, here instead of its own choice of the second subspace:

    >>> import numpy as np
    >>> from adamss import BudgetConfig, core
    >>> class Follower(core.Processes):
    ...     def agree(self, active):
    ...         return np.asarray([True, False])  # as received from the first process
    >>> factors = core.initial_factors(core.decompose(np.eye(4), 4), np.asarray([0, 0, 1, 1]), 1)
    >>> plan = core.plan_budget({"query": factors}, BudgetConfig(target=1, end_step=1))
    >>> weights = plan.join_elements({"query": (np.ones((4, 2)), np.asarray([[1.0, 1.0, 2.0, 2.0]]))})
    >>> state = core.observe(plan, core.initial_budget_state(plan, weights), weights, weights)
    >>> core.advance(plan, state).active.tolist(), core.advance(plan, state, Follower()).active.tolist()
    ([False, True], [True, False])
    """

    def all_usable(self, usable: Array) -> Array:
        """Return whether the gradients are usable on every process (0-d boolean)."""
        return usable

    def scores(self, plan: BudgetPlan, products: Array) -> Array:
        """Return the score (T,) of every subspace, from the products ``Ibar Ubar`` of the elements."""
        return plan.scores(products)

    def agree(self, active: Array) -> Array:
        """Return the choice of subspaces (T,) that all processes adopt."""
        return active


ALONE = Processes()


@dataclass(frozen=True, eq=False)
class BudgetPlan:
    """A schedule applied to the subspaces of one model; created by `plan_budget`.

    The T subspaces of all layers form one row, ordered by module path and then by number. This order breaks ties
    between equal scores, so it must not depend on the order of the layers in the model. The N elements of all B and C
    form one vector ``[B_1, C_1, B_2, C_2, ...]``, in the same order of the layers.

    Attributes
    ----------
    config
        The schedule.
    layers
        Outline of the factors of each layer (`adamss.core.factors.outline`) by module path, sorted by path.
    costs
        Trained parameters of each of the T subspaces.
    total
        Number of subspaces or of parameters of the model, depending on ``config.unit``. It is the budget at the start
        if ``config.initial`` is None.

    Examples
    --------
    >>> import numpy as np
    >>> from adamss import BudgetConfig, core
    >>> factors = core.initial_factors(core.decompose(np.eye(4), 4), np.asarray([0, 0, 1, 1]), 1)
    >>> plan = core.plan_budget({"value": factors, "query": factors}, BudgetConfig(target=1, end_step=10))
    >>> plan.paths, plan.sizes, plan.costs
    (('query', 'value'), (2, 2), (6, 6, 6, 6))
    >>> {path: row.tolist() for path, row in plan.split(np.asarray([0, 1, 2, 3])).items()}
    {'query': [0, 1], 'value': [2, 3]}
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
        """Return `adamss.core.budget_at` for this model. The step may be traced."""
        if not is_traced(step):
            return budget_at(int(step), self.config, self.total)
        xp = namespace(step)
        place = xp.clip(step - self.config.start_step, 0, len(self._budgets) - 1)
        return xp.take(xp.asarray(self._budgets, dtype=step.dtype), place)

    def allocates_at(self, step: Any) -> Any:
        """Return `adamss.core.allocates_at` for this schedule. The step may be traced."""
        return allocates_at(step, self.config)

    def join(self, values: Mapping[str, Array]) -> Array:
        """Concatenate arrays (K,), one per layer, into one row (T,)."""
        arrays = [values[path] for path in self.layers]
        return namespace(*arrays).concat(arrays)

    def split(self, row: Array) -> dict[str, Array]:
        """Undo `join`: return the array (K,) of every layer by module path."""
        return dict(zip(self.layers, _parts(row, self.sizes), strict=True))

    def join_elements(self, values: Mapping[str, tuple[Array, Array]]) -> Array:
        """Concatenate arrays of the shapes of B and C, a pair per layer, into one vector (N,) of float32 or wider."""
        arrays = [array for path in self.layers for array in values[path]]
        xp = namespace(*arrays)
        return xp.concat([xp.reshape(as_working_precision(array), (-1,)) for array in arrays])

    def split_elements(self, vector: Array) -> dict[str, tuple[Array, Array]]:
        """Undo `join_elements`: return the arrays of the shapes of B and C of every layer by module path."""
        xp = namespace(vector)
        shapes = [array.shape for layer in self.layers.values() for array in (layer.B, layer.C)]
        parts = _parts(vector, [math.prod(shape) for shape in shapes])
        arrays = iter([xp.reshape(part, shape) for part, shape in zip(parts, shapes, strict=True)])
        return {path: (next(arrays), next(arrays)) for path in self.layers}

    def scores(self, products: Array) -> Array:
        """Return the score of each subspace, the mean over B_k plus the mean over C_k, without padding.

        Parameters
        ----------
        products
            Sensitivity times uncertainty of each element, (N,).

        Returns
        -------
        Array
            Scores of shape (T,), floating point. A subspace of rank 0 has score 0.
        """
        xp, on, dtype = namespace(products), device(products), products.dtype
        found = []
        for path, (B, C) in self.split_elements(products).items():
            layer = self.layers[path]
            K, r, ranks = layer.ranks.shape[0], layer.C.shape[0], layer.ranks
            if np.any(ranks < r):
                within = np.arange(r)[:, None] < ranks[layer.labels]
                C = xp.where(xp.asarray(within, device=on), C, xp.zeros_like(C))
            owners_B = np.full(layer.B.shape[1], K)  # K stands for padding
            owners_B[: np.sum(ranks)] = np.repeat(np.arange(K), ranks)
            # The sums per subspace are products with a one-hot matrix, as a scatter is not deterministic on a GPU.
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
            Which subspaces are trained so far, (T,) booleans. Only these can stay trained, unless ``config.revive``.
        budget
            Budget of the step in ``config.unit``, an integer or a 0-d array.
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
        """Budget of every step of the schedule, as exact integers for a compiled function to look up."""
        steps = range(self.config.start_step, self.config.end_step + 1)
        return np.asarray([self.budget_at(step) for step in steps])


class BudgetState(NamedTuple):
    """Progress of the reduction of one model. All fields are arrays; save them with the optimiser's state.

    Attributes
    ----------
    step
        Number of completed optimiser steps, 0-d integer.
    waiting
        Whether an allocation is due but waits for an informative step (see `advance`), 0-d boolean.
    left_out
        Number of steps that are not in the averages because their importance was not finite or too large
        (see `observe`), 0-d integer. They count as steps all the same.
    active
        Which subspaces are trained, (T,) booleans.
    sensitivity
        Moving average Ibar of ``I = |w g|`` of each element, (N,) in float32 or wider.
    uncertainty
        Moving average Ubar of ``|I - Ibar|`` of each element, (N,) in float32 or wider.

    Examples
    --------
    A step of a model in which only the second subspace of two has a gradient:

    >>> import numpy as np
    >>> from adamss import BudgetConfig, core
    >>> factors = core.initial_factors(core.decompose(np.eye(4), 4), np.asarray([0, 0, 1, 1]), 1)
    >>> plan = core.plan_budget({"query": factors}, BudgetConfig(target=1, end_step=1))
    >>> weights = np.ones(12)  # 4 x 2 elements of B, then 1 x 4 of C
    >>> B, C = np.asarray([[0.0, 1.0]] * 4), np.asarray([[0.0, 0.0, 1.0, 1.0]])
    >>> gradients = plan.join_elements({"query": (B, C)})
    >>> state = core.observe(plan, core.initial_budget_state(plan, weights), weights, gradients)
    >>> state = core.advance(plan, state)
    >>> int(state.step), state.active.tolist()
    (1, [False, True])
    """

    step: Array
    waiting: Array
    left_out: Array
    active: Array
    sensitivity: Array
    uncertainty: Array


def plan_budget(layers: Mapping[str, Factors], config: BudgetConfig) -> BudgetPlan:
    """Apply a schedule to the layers of a model.

    Parameters
    ----------
    layers
        Factors by module path. The masks are copied. Of A, B and C only the shapes are read.
    config
        The schedule.

    Returns
    -------
    BudgetPlan
        Plan for all subspaces of the layers.

    Raises
    ------
    ConfigError
        If there are no layers, if the target or the budget at the start exceeds what the model has, or if the target
        is too low: less than ``minimum_per_layer`` may need, or less than a single subspace may cost.

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
    # Copy the masks, since a framework that trains in place may later write into the same memory.
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
        # Which subspaces are kept is known only later, so the target must afford the dearest ones. With `revive`, a
        # cheaper subspace can replace the last one, so the cheapest must fit.
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
    """Return the state before the first step: zero averages, and the masks with which the plan was created.

    Parameters
    ----------
    plan
        Plan, as `plan_budget` returns it.
    like
        Vector (N,) of weights as passed to `observe`. It determines the framework, device and dtype.

    Returns
    -------
    BudgetState
        State whose averages are in float32 or wider.
    """
    zeros = as_working_precision(like)
    xp, on = namespace(like), device(like)
    # No array appears twice: a compiled step may donate the buffers of the state, and a buffer can be donated once.
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
    """Update the importance averages with one step. Call this function before the optimiser's step.

    With ``I = |w g|``, and b1 and b2 the two decay rates of the schedule::

        Ibar' = b1 Ibar + (1 - b1) I
        Ubar' = b2 Ubar + (1 - b2) |I - Ibar'|

    A step is left out of the averages, and counted in ``left_out``, if ``I`` holds NaN, infinity or a value whose
    square would overflow (a score multiplies two averages). After the end of the schedule, the state is returned
    unchanged.

    Parameters
    ----------
    plan, state
        Plan and current state; see `plan_budget` and `initial_budget_state`.
    weights
        Elements of all B and C before the optimiser's step, (N,). See `BudgetPlan.join_elements`.
    gradients
        Gradients of `weights`, (N,), unscaled, and summed over all processes that see different data.
    processes
        Communication between processes, for arrays that are distributed over several.

    Returns
    -------
    BudgetState
        State with updated averages. If the optimiser then skips its step, discard it and continue from `state`.

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
            # NaN fails the comparison too.
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
    """Count the optimiser's step, and choose the subspaces if an allocation is due. Call it after the step.

    An allocation is postponed while no candidate has a score above zero, as after the first step, where C = 0 makes
    all importances zero. The allocation then takes place at the first informative step, with the budget of that step.

    Parameters
    ----------
    plan
        Plan, as `plan_budget` returns it.
    state
        State, as `observe` returns it. Its ``step`` and ``waiting`` may be a Python integer and a Python boolean.
        On a GPU this avoids waiting for pending results.
    processes
        Communication between processes, for arrays that are distributed over several.

    Returns
    -------
    BudgetState
        State after the step. ``plan.split(state.active)`` returns the masks of the layers.

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
            # Both branches of a traced `choose` must return the same types, hence `& False` and not a Python bool.
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
    """Split a vector into consecutive parts of the given sizes."""
    ends = np.cumsum(sizes).tolist()
    return [vector[end - size : end] for size, end in zip(sizes, ends, strict=True)]
