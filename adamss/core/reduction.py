"""The adaptive budget in training: importance, schedule and allocation put together, as a pure function of a state.

A controller of any training loop is a thin shell on it: it hands in factors and gradients at every step and takes
masks. Nothing here depends on values, so that it runs under ``jax.jit`` as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np

from adamss.core._array import (
    Array,
    as_working_precision,
    check_concrete,
    choose,
    device,
    is_traced,
    namespace,
    one_hot,
)
from adamss.core.budget import Schedule, allocate, allocates_at, budget_at
from adamss.core.counting import subspace_costs
from adamss.core.factors import Factors, basis_ranks
from adamss.core.importance import Importance, averaged, initial_importance, scores, sensitivity_of
from adamss.errors import ConfigError

__all__ = [
    "BudgetPlan",
    "BudgetState",
    "Reduction",
    "advance_budget",
    "initial_budget_state",
    "plan_budget",
]


class Reduction(Schedule, Protocol):
    """What `plan_budget` reads; `adamss.BudgetConfig` is one."""

    @property
    def unit(self) -> str:
        """``"subspaces"`` or ``"parameters"``."""

    @property
    def minimum_per_layer(self) -> int:
        """Subspaces that every layer keeps."""

    @property
    def window(self) -> str:
        """``"reset"`` or ``"running"``."""

    @property
    def revive(self) -> bool:
        """Whether a frozen subspace may return."""

    @property
    def sensitivity_decay(self) -> float:
        """Decay b1."""

    @property
    def uncertainty_decay(self) -> float:
        """Decay b2."""


@dataclass(frozen=True)
class BudgetPlan:
    """A schedule, and the subspaces of one model that it is for.

    Made by `plan_budget`. The subspaces of all layers stand in one row, ordered by module path, then by number: the
    order that settles ties, whatever the order of the layers in the model.

    Attributes
    ----------
    config
        The schedule.
    paths
        Module paths of the layers, sorted.
    sizes
        Number K of subspaces of each layer.
    costs
        Trained parameters of each of the T subspaces.
    total
        Number of subspaces, or of parameters, as ``config.unit`` says: the budget at the start.
    """

    config: Reduction
    paths: tuple[str, ...]
    sizes: tuple[int, ...]
    costs: tuple[int, ...]
    total: int

    def budget_at(self, step: Any) -> Any:
        """Return `adamss.core.budget_at` for this model; also of a step that is traced."""
        if not is_traced(step):
            return budget_at(int(step), self.config, self.total)
        xp = namespace(step)
        place = xp.clip(step - self.config.start_step, 0, len(self._budgets) - 1)
        return xp.take(xp.asarray(self._budgets, dtype=step.dtype), place)

    def allocates_at(self, step: Any) -> Any:
        """Return `adamss.core.allocates_at`."""
        return allocates_at(step, self.config)

    def join(self, values: Mapping[str, Array]) -> Array:
        """Return arrays (K,) of every layer in one row (T,)."""
        arrays = [values[path] for path in self.paths]
        return namespace(*arrays).concat(arrays)

    def split(self, row: Array) -> dict[str, Array]:
        """Undo `join`: return (K,) of every layer by its path."""
        ends = np.cumsum(self.sizes)
        return {
            path: row[int(end) - K : int(end)]
            for path, K, end in zip(self.paths, self.sizes, ends, strict=True)
        }

    def decide(self, scores: Array, active: Array, budget: Any) -> Array:
        """Return which subspaces stay trained.

        Parameters
        ----------
        scores
            Score of every subspace, (T,).
        active
            Which are trained up to now, (T,) booleans: the candidates, unless ``config.revive``.
        budget
            Of the step, in ``config.unit``; an integer or a 0-d array.

        Returns
        -------
        Array
            (T,) booleans.
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
        Steps whose gradients held NaN or infinity, 0-d integer; they count as steps, and are not in the averages.
    active
        (K,) booleans by module path: which subspaces are trained.
    importance
        Averages of B and of C, by module path.
    """

    step: Array
    waiting: Array
    left_out: Array
    active: dict[str, Array]
    importance: dict[str, tuple[Importance, Importance]]


def plan_budget(layers: Mapping[str, Factors], config: Reduction) -> BudgetPlan:
    """Return the plan of a schedule for the layers of a model.

    Parameters
    ----------
    layers
        Factors by module path.
    config
        The schedule, as `adamss.BudgetConfig`.

    Returns
    -------
    BudgetPlan
        Of all subspaces of the layers.

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
    paths = tuple(sorted(layers))
    per_layer = [_costs(layers[path], path) for path in paths]
    costs = tuple(cost for layer in per_layer for cost in layer)
    in_parameters = config.unit == "parameters"
    total = sum(costs) if in_parameters else len(costs)
    for name, value in (("target", config.target), ("initial", config.initial)):
        if value is not None and value > total:
            raise ConfigError(
                f"budget: {name} = {value} is more than the {total} {config.unit} of the model; lower it"
            )
    kept = config.minimum_per_layer
    if in_parameters:
        # Whichever subspaces a layer keeps at last, the target must afford them; and whichever is left at last.
        needed = min(costs) if config.revive else max(costs)
        needed = max(needed, sum(sum(sorted(layer)[-kept:]) for layer in per_layer if kept))
    else:
        needed = sum(min(kept, len(layer)) for layer in per_layer)
    if config.target < needed:
        what = (
            f"minimum_per_layer = {kept} in {len(paths)} layers may need" if kept else "one subspace may need"
        )
        raise ConfigError(
            f"budget: target = {config.target} {config.unit} cannot be kept to: {what} {needed}; raise the target"
            + (", or lower minimum_per_layer" if kept else "")
        )
    return BudgetPlan(config, paths, tuple(len(layer) for layer in per_layer), costs, total)


def initial_budget_state(layers: Mapping[str, Factors]) -> BudgetState:
    """Return the state before the first step: averages of zero, the masks of the factors.

    Parameters
    ----------
    layers
        Factors by module path.

    Returns
    -------
    BudgetState
        On the device of the factors; averages in float32 or wider.
    """
    first = next(iter(layers.values()))
    xp, on = namespace(first.active), device(first.active)
    importance = {
        path: (
            initial_importance(as_working_precision(factors.B)),
            initial_importance(as_working_precision(factors.C)),
        )
        for path, factors in layers.items()
    }
    # Each an array of its own: a buffer may be donated once, and is then no longer the model's.
    return BudgetState(
        step=xp.zeros((), dtype=xp.int32, device=on),
        waiting=xp.zeros((), dtype=xp.bool, device=on),
        left_out=xp.zeros((), dtype=xp.int32, device=on),
        active={path: xp.asarray(factors.active, copy=True) for path, factors in layers.items()},
        importance=importance,
    )


def advance_budget(
    plan: BudgetPlan,
    state: BudgetState,
    layers: Mapping[str, Factors],
    gradients: Mapping[str, tuple[Array, Array]],
) -> BudgetState:
    """Return the state after one more step of the optimiser: averages updated, and subspaces chosen if it is time.

    An allocation for which no average is above zero yet (C starts at zero, so that the first step says nothing) waits
    for the next step, whose budget it then has. A step with NaN or infinity in any gradient is left out of the
    averages.

    Parameters
    ----------
    plan
        Of the same layers.
    state
        Before the step.
    layers
        Factors by module path, B and C as they were before the optimiser's step. Of A the shape is read, no value.
    gradients
        Of B and C, unscaled and summed over all processes, by module path.

    Returns
    -------
    BudgetState
        After the step.

    References
    ----------
    .. [1] Zheng et al., "Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning",
       NeurIPS 2025.
    .. [2] Zhang et al., "PLATON", ICML 2022 (the importance).
    """
    xp = namespace(state.step)
    step = state.step + 1

    def over(state: BudgetState) -> BudgetState:
        return state._replace(step=step)

    def go_on(state: BudgetState) -> BudgetState:
        averages, usable = _averages(plan, state, layers, gradients)
        row = plan.join({path: scores(*averages[path], layers[path]) for path in plan.paths})
        active = plan.join(state.active)
        informative = xp.any((row > 0) & (active | plan.config.revive))
        due = plan.allocates_at(step) | state.waiting

        def allocated(state: BudgetState) -> BudgetState:
            masks = plan.split(plan.decide(row, active, plan.budget_at(step)))
            kept = averages
            if plan.config.window == "reset":
                kept = {
                    path: (_zeros_like(for_B), _zeros_like(for_C)) for path, (for_B, for_C) in kept.items()
                }
            return state._replace(active={path: masks[path] for path in state.active}, importance=kept)

        def averaged_only(state: BudgetState) -> BudgetState:
            return state._replace(importance=averages)

        new: BudgetState = choose(due & informative, allocated, averaged_only, state)
        left_out = state.left_out + xp.astype(~usable, state.left_out.dtype)
        return new._replace(step=step, waiting=due & ~informative, left_out=left_out)

    finished = (step > plan.config.end_step) & ~state.waiting
    new: BudgetState = choose(finished, over, go_on, state)
    return new


def _costs(factors: Factors, path: str) -> list[int]:
    """Trained parameters of each subspace of a layer, at least 1."""
    check_concrete(factors.labels, factors.ranks, name=path)
    xp = namespace(factors.labels)
    members = one_hot(factors.labels, factors.ranks.shape[0], dtype=factors.ranks.dtype)
    sizes = xp.sum(members, axis=0)
    return [max(cost, 1) for cost in subspace_costs(sizes, factors.ranks, basis_ranks(factors))]


def _averages(
    plan: BudgetPlan,
    state: BudgetState,
    layers: Mapping[str, Factors],
    gradients: Mapping[str, tuple[Array, Array]],
) -> tuple[dict[str, tuple[Importance, Importance]], Array]:
    """Return the averages after a step, and whether its gradients could be used: all of them, or none."""
    xp = namespace(state.step)
    decays = plan.config.sensitivity_decay, plan.config.uncertainty_decay
    usable = xp.ones((), dtype=xp.bool, device=device(state.step))
    now: dict[str, list[Array]] = {}
    for path in state.importance:
        for weight, gradient in zip((layers[path].B, layers[path].C), gradients[path], strict=True):
            product, finite = sensitivity_of(as_working_precision(weight), as_working_precision(gradient))
            now.setdefault(path, []).append(product)
            usable = usable & finite
    return {
        path: (averaged(for_B, now[path][0], usable, decays), averaged(for_C, now[path][1], usable, decays))
        for path, (for_B, for_C) in state.importance.items()
    }, usable


def _zeros_like(importance: Importance) -> Importance:
    return initial_importance(importance.sensitivity)
