"""The adaptive budget in training: an optax transformation, and functions that read its state."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from adamss.errors import MissingBackendError

try:
    import optax
except ImportError as error:
    raise MissingBackendError("adamss_jax.budget needs Optax: pip install 'adamss[flax]'") from error

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adamss.backend import Adaptation
from adamss.backend.bank import DEFAULT
from adamss.backend.training import adapter_in_training, identity, same_subspaces, schedule_of
from adamss.config import BudgetConfig
from adamss.core import BudgetState, Factors, advance, initial_budget_state, observe, plan_budget
from adamss.core._array import check_concrete
from adamss.errors import AdamssWarning, ConfigError, StateError
from adamss_jax.arrays import beside, placed_as
from adamss_jax.models import FOLLOWED, models_of

__all__ = ["Allocation", "BudgetedState", "allocation", "budgeted", "synchronise"]


REFUSED = {
    "MultiStepsState": "optax.MultiSteps inside budgeted would make it count every batch as a step; put it around: "
    "optax.MultiSteps(adamss_jax.budgeted(tx, model), every_k_schedule)",
    "ScheduleFreeState": "optax.contrib.schedule_free evaluates other parameters than it trains, to which frozen "
    "elements would be moved; use a transformation that evaluates the parameters it trains",
}
"""States of transformations that `budgeted` must not wrap, by class name, and the reason."""


class BudgetedState(NamedTuple):
    """State of `budgeted`: arrays whose shapes no allocation changes.

    Attributes
    ----------
    inner
        State of the wrapped transformation.
    budget
        Importance averages, masks and step count of all layers, in the order of their paths.
    limit
        Budget of the last allocation, in the unit of the schedule, 0-d integer.
    revive
        Whether a frozen subspace may return, 0-d boolean.
    sizes
        Number K of subspaces by layer path, 0-d integers. Unless the adapter is the default one, its name precedes
        the path: ``"a: encoder.query"``.
    identity
        Fingerprint of each layer's subspaces, (6,) float32, by the same keys. It shows whether the state belongs to a
        model.
    """

    inner: Any
    budget: BudgetState
    limit: Array
    revive: Array
    sizes: dict[str, Array]
    identity: dict[str, Array]


class Allocation(NamedTuple):
    """Progress of a reduction, as `allocation` reports it; all arrays are 0-d.

    Attributes
    ----------
    step
        Number of completed steps of the optimiser.
    budget
        Budget of the last allocation, in the unit of the schedule.
    active
        Number of trained subspaces by layer path.
    total
        Sum of `active`.
    waiting
        Whether an allocation is due but waits for the first step that gives some subspace an importance above zero.
    left_out
        Number of steps that the averages leave out, because a gradient held NaN or infinity.
    """

    step: Array
    budget: Array
    active: dict[str, Array]
    total: Array
    waiting: Array
    left_out: Array


def budgeted(
    tx: optax.GradientTransformation,
    model: Any,
    config: BudgetConfig | None = None,
    *,
    name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optax transformation so that it reduces the trained subspaces and holds frozen ones at their values.

    `budgeted` must be the outermost transformation: clipping, schedules, momentum and weight decay belong in `tx`.
    Each step updates the importance of the subspaces from the gradients and from the parameters before the step. At
    the steps of the schedule, it then chooses the subspaces that stay trained from the next step on. The updates of
    frozen elements are zero. Their gradients are set to zero before `tx` sees them, unless the schedule revives.

    The allocation is compiled as part of the training step and never causes another compilation. The masks are kept
    in the state: call `adamss_jax.synchronise` to write them into the model before `adamss.save` or
    `adamss.summary`. To accumulate gradients, wrap the result in `optax.MultiSteps`, which calls it once per step.
    Several adapters that are trained together may each have a budget: nest one `budgeted` in the other.

    Parameters
    ----------
    tx
        Optax transformation to wrap.
    model
        Adapted model whose parameters are trained (``wrt=nnx.LoRAParam``, or `adamss_jax.equinox.trainable_filter`).
        Its masks are the masks at the start.
    config
        Schedule. None means the schedule of the config that the adapter was attached with.
    name
        Name of the adapter. None means the one that is trained.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        Transformation whose state is a `BudgetedState`, which can be saved and restored like any optimiser's state.
        Its ``update`` requires the parameters.

    Raises
    ------
    StateError
        If the model has no such adapter, if several are trained and `name` is None, or if the adapter is not trained,
        is merged, or is consolidated although the schedule revives. In ``init``, if `tx` already contains a
        `budgeted` of this adapter. In ``init`` and ``update``, if the parameters belong to another model.
    ConfigError
        If there is no schedule, or the model cannot keep to it (see `adamss.core.plan_budget`). If the schedule
        revives and the model has frozen subspaces, but was attached without such a schedule: these subspaces get no
        gradients. In ``init``, if `tx` contains a transformation that cannot be wrapped, such as `optax.MultiSteps`.
        In ``update``, if the parameters are missing.

    References
    ----------
    .. [1] Zheng et al., "Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning",
       NeurIPS 2025.

    Examples
    --------
    >>> import adamss, adamss_jax, jax.numpy as jnp, optax
    >>> from flax import nnx
    >>> model = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
    >>> budget = adamss.BudgetConfig(target=2, end_step=6)
    >>> model = adamss.attach(model, adamss.AdamssConfig(targets=["0"], rank=4, subspaces=4, budget=budget))
    >>> tx = adamss_jax.budgeted(optax.adamw(0.1), model)
    >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    >>> @nnx.jit
    ... def step(model, optimizer):
    ...     loss = lambda model: jnp.square(model(jnp.eye(8)) - 1).mean()
    ...     optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model))
    >>> for _ in range(6):
    ...     step(model, optimizer)
    >>> int(adamss_jax.allocation(optimizer).total)
    2
    >>> adamss.summary(adamss_jax.synchronise(model, optimizer)).total.active
    2
    """
    backend = models_of(model)
    adaptation = adapter_in_training(backend, model, "budgeted", name)
    config = schedule_of(adaptation, config, "budgeted")
    FOLLOWED.add(adaptation.config.budget)
    _check_may_return(config, adaptation)
    leaves = backend.leaves(model, adaptation.name)
    plan = plan_budget(leaves.outlines, config)
    keys = _keys(adaptation)
    sizes = {
        keys[path]: np.asarray(size, np.int32) for path, size in zip(plan.paths, plan.sizes, strict=True)
    }
    names = {keys[path]: np.asarray(_identity(f), np.float32) for path, f in adaptation.layers.items()}
    inner = optax.with_extra_args_support(tx)

    def elements(tree: Any, where: Any) -> Array:
        """Return all elements of B and C as one vector (N,), from a tree of parameters or gradients."""
        flat = jax.tree.leaves(tree)
        found: dict[str, tuple[Array, Array]] = {}
        for owner, (B, C) in where.items():
            found |= leaves.pairs[owner].split(flat[B], flat[C])
        vector: Array = plan.join_elements(found)
        return vector

    @jax.jit
    def advanced(state: BudgetState, weights: Array, gradients: Array) -> BudgetState:
        return advance(plan, observe(plan, state, weights, gradients))

    def init(params: Any) -> BudgetedState:
        state = inner.init(params)
        if any(_adapter_of(own) == adaptation.name for own in _states(state)):
            raise StateError("budgeted: there is another budgeted inside; one of them is enough")
        _check_inner(state)
        where = leaves.positions(params, "budgeted")
        weights = elements(params, where)
        start = initial_budget_state(plan, np.broadcast_to(np.zeros((), weights.dtype), weights.shape))
        own = start, np.asarray(plan.budget_at(0), np.int32), np.asarray(config.revive), sizes, names
        # Copies on the parameters' devices: a buffer shared with the model would become invalid if that is donated.
        like = jax.tree.leaves(params)[next(iter(where.values()))[0]]
        return BudgetedState(state, *jax.tree.map(lambda array: beside(np.array(array), like), own))

    def update(
        updates: Any, state: BudgetedState, params: Any = None, **extra: Any
    ) -> tuple[Any, BudgetedState]:
        if params is None:
            raise ConfigError(
                "budgeted: update needs the parameters, as in tx.update(gradients, state, params)"
            )
        in_params = leaves.positions(params, "budgeted")
        in_updates = leaves.positions(updates, "budgeted, in the gradients")
        # The masks from before the step apply to its updates; those that it chooses apply from the next step on.
        masks = {
            in_updates[owner][number]: mask
            for (owner, number), mask in leaves.masks(plan.split(state.budget.active)).items()
        }
        if not config.revive:
            updates = _masked(updates, masks)
        budget = advanced(state.budget, elements(params, in_params), elements(updates, in_updates))
        due = plan.allocates_at(budget.step) | state.budget.waiting
        limit = jnp.where(due & ~budget.waiting, plan.budget_at(budget.step), state.limit)
        new, inner_state = inner.update(updates, state.inner, params, **extra)
        return _masked(new, masks), state._replace(inner=inner_state, budget=budget, limit=limit)

    return optax.GradientTransformationExtraArgs(init, update)


def synchronise(model: Any, opt_state: Any, *, name: str | None = None) -> Any:
    """Write the masks of the optimiser's state into the model, where `adamss.save` and `adamss.summary` read them.

    Parameters
    ----------
    model
        Adapted model that is being trained.
    opt_state
        An `nnx.Optimizer`, or any tree that contains the state of `budgeted`.
    name
        Name of the adapter. None means the one that is trained.

    Returns
    -------
    Model
        The same object for NNX, a new tree for Equinox.

    Raises
    ------
    StateError
        If `opt_state` contains no state of `budgeted`, or one that belongs to another model or adapter. If a mask
        thaws a subspace that was consolidated into the weight.
    ArrayTypeError
        If the state is being traced.

    Warns
    -----
    AdamssWarning
        If steps were left out of the averages because a gradient held NaN or infinity. If frozen subspaces may
        return, but the model was attached without such a schedule and so gives them no gradients.

    Examples
    --------
    >>> import adamss, adamss_jax, jax, jax.numpy as jnp, optax
    >>> from flax import nnx
    >>> model = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
    >>> budget = adamss.BudgetConfig(target=2, end_step=1)
    >>> model = adamss.attach(model, adamss.AdamssConfig(targets=["0"], rank=4, subspaces=4, budget=budget))
    >>> optimizer = nnx.Optimizer(model, adamss_jax.budgeted(optax.sgd(0.1), model), wrt=nnx.LoRAParam)
    >>> _ = optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.LoRAParam)))
    >>> adamss.summary(model).total.active
    4
    >>> adamss.summary(adamss_jax.synchronise(model, optimizer)).total.active
    2
    """
    backend = models_of(model)
    adaptation = adapter_in_training(backend, model, "synchronise", name)
    state = budgeted_state(opt_state, adaptation, "synchronise")
    keys = _keys(adaptation)
    paths = sorted(keys)
    ends = np.cumsum([int(state.sizes[keys[path]]) for path in paths])
    active = dict(zip(paths, np.split(np.asarray(state.budget.active), ends[:-1]), strict=True))
    left_out = int(state.budget.left_out)
    if left_out:
        warnings.warn(
            f"{left_out} of {int(state.budget.step)} steps were left out of the importance averages: a gradient held "
            "NaN or infinity; look at the loss, or clip",
            AdamssWarning,
            stacklevel=2,
        )
    if bool(state.revive) and not adaptation.revives and not all(mask.all() for mask in active.values()):
        warnings.warn(
            "the model was attached without a budget that revives, so that its frozen subspaces get no gradients "
            "from here on; to train further, attach it with AdamssConfig(budget=...) of this schedule",
            AdamssWarning,
            stacklevel=2,
        )
    layers = adaptation.layers
    masks = {path: placed_as(active[path], layers[path].active) for path in layers}
    return backend.set_active(model, masks, adaptation.name)


def allocation(opt_state: Any, *, name: str | None = None) -> Allocation:
    """Return the progress of the reduction, for logging.

    Parameters
    ----------
    opt_state
        An `nnx.Optimizer`, or any tree that contains the state of `budgeted`. It may be traced: under ``jit``, return
        the result with the loss or pass it to `jax.debug.callback`.
    name
        Name of the adapter. None means the only one that has a budget.

    Raises
    ------
    StateError
        If `opt_state` contains no state of `budgeted`, or those of several adapters while `name` is None.

    Examples
    --------
    >>> import adamss, adamss_jax, jax, jax.numpy as jnp, optax
    >>> from flax import nnx
    >>> model = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
    >>> budget = adamss.BudgetConfig(target=2, end_step=1)
    >>> model = adamss.attach(model, adamss.AdamssConfig(targets=["0"], rank=4, subspaces=4, budget=budget))
    >>> optimizer = nnx.Optimizer(model, adamss_jax.budgeted(optax.sgd(0.1), model), wrt=nnx.LoRAParam)
    >>> _ = optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.LoRAParam)))
    >>> progress = adamss_jax.allocation(optimizer)
    >>> int(progress.step), int(progress.budget), int(progress.active["layers.0"])
    (1, 2, 2)
    """
    state = budgeted_state(opt_state, None, "allocation", name)
    step, waiting, left_out, mask, *_ = state.budget
    # Take differences of cumulative sums, because the sizes may be traced, and slices cannot have traced bounds.
    up_to, active, end = jnp.cumulative_sum(mask, dtype=int, include_initial=True), {}, jnp.zeros((), int)
    for key in sorted(state.sizes):
        start, end = end, end + state.sizes[key]
        active[key.removeprefix(_prefix(_adapter_of(state)))] = up_to[end] - up_to[start]
    return Allocation(step, state.limit, active, up_to[-1], waiting, left_out)


def budgeted_state(
    opt_state: Any, adaptation: Adaptation | None, verb: str, name: str | None = None
) -> BudgetedState:
    """Find the state of `budgeted` in an optimiser's state and return it as plain arrays.

    Parameters
    ----------
    opt_state
        See `synchronise`.
    adaptation
        Adapter that the state must belong to, which requires concrete values. None accepts the state of any adapter,
        traced or not.
    verb
        Name of the caller in messages.
    name
        Name of the adapter, used if `adaptation` is None. None means the only state there is.
    """
    name, every = name if adaptation is None else adaptation.name, _states(opt_state)
    found = [state for state in every if name in (None, _adapter_of(state))]
    if len(found) != 1:
        names = ", ".join(repr(_adapter_of(state)) for state in every)
        others = f", and say by name= which adapter is meant: there are {names}" if every else ""
        raise StateError(
            f"{verb}: found {len(found) or 'no'} states of adamss_jax.budgeted in {type(opt_state).__name__}; pass "
            f"the nnx.Optimizer, or the state of the transformation that budgeted returned{others}"
        )
    state: BudgetedState = jax.tree.map(
        lambda leaf: leaf.get_value() if is_variable(leaf) else leaf, found[0], is_leaf=is_variable
    )
    if adaptation is not None:
        check_concrete(*jax.tree.leaves(state), name=f"{verb}: the state of budgeted")
        sizes = {path: int(size) for path, size in state.sizes.items()}
        keys = _keys(adaptation)
        own = {keys[path]: factors.active.shape[0] for path, factors in adaptation.layers.items()}
        if sizes != own:
            differing = sorted(path for path in sizes | own if sizes.get(path) != own.get(path))
            raise StateError(
                f"{verb}: the state belongs to another model, or one attached with other settings: they differ in "
                f"{', '.join(differing[:3])}"
            )
        for path, factors in adaptation.layers.items():
            if not same_subspaces([float(value) for value in state.identity[keys[path]]], _identity(factors)):
                raise StateError(
                    f"{verb}: the state belongs to another model: {path} has other subspaces there"
                )
    return state


def _prefix(name: str) -> str:
    return "" if name == DEFAULT else f"{name}: "


def _keys(adaptation: Adaptation) -> dict[str, str]:
    """Return the key of each layer in `BudgetedState.sizes`, by path of the layer."""
    return {path: _prefix(adaptation.name) + path for path in adaptation.layers}


def _adapter_of(state: BudgetedState) -> str:
    """Return the name of the adapter that a state belongs to."""
    name, colon, _ = next(iter(state.sizes)).partition(": ")
    return name if colon else DEFAULT


def _identity(factors: Factors) -> tuple[float, ...]:
    return identity(np.asarray(factors.A, np.float32), np.asarray(factors.labels))


def is_variable(node: Any) -> bool:
    """Return whether a node is a Flax variable, which `nnx.Optimizer` wraps around each array of its state."""
    return hasattr(node, "get_value")


def _states(opt_state: Any) -> list[BudgetedState]:
    tree = getattr(opt_state, "opt_state", opt_state)
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, BudgetedState))
    found = [node for node in nodes if isinstance(node, BudgetedState)]
    return [state for node in found for state in (node, *_states(node.inner))]


def _check_may_return(config: BudgetConfig, adaptation: Adaptation) -> None:
    if config.revive and adaptation.held:
        raise StateError(
            "budgeted: revive = True, but adamss.consolidate has folded subspaces into the weights: none of them can "
            "return; load the adapter into the base model afresh"
        )
    frozen = any(not bool(factors.active.all()) for factors in adaptation.layers.values())
    if config.revive and frozen and not adaptation.revives:
        raise ConfigError(
            "budgeted: revive = True, but the model has frozen subspaces and was attached without a budget that "
            "revives, so that they get no gradients; attach it with AdamssConfig(budget=...) of this schedule"
        )


def _check_inner(state: Any) -> None:
    """Check that the wrapped transformation counts the same steps and changes parameters only by its updates."""
    for node in jax.tree.leaves(state, is_leaf=lambda node: type(node).__name__ in REFUSED):
        if type(node).__name__ in REFUSED:
            raise ConfigError(f"budgeted: {REFUSED[type(node).__name__]}")


def _masked(tree: Any, masks: Mapping[int, Array]) -> Any:
    """Return a tree in which the leaf at each position of `masks` is zero where its mask is False."""
    leaves, structure = jax.tree.flatten(tree)
    for position, mask in masks.items():
        leaf = leaves[position]
        leaves[position] = jnp.where(mask, leaf, jnp.zeros_like(leaf))
    return jax.tree.unflatten(structure, leaves)
