"""`compact`: parameters, optimiser and gradients of the subspaces that are still trained, and of no others."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
from jax import Array

from adamss.errors import StateError
from adamss_jax.backend import JaxBackend
from adamss_jax.budget import BudgetedState, budgeted_state, is_variable, synchronise
from adamss_jax.leaves import Leaves, Pair
from adamss_jax.parts import Places, Rest, compacted
from adamss_jax.shell import beside, resized_as

__all__ = ["compact"]


def compact(model: Any, opt_state: Any) -> tuple[Any, Any]:
    """Take the frozen subspaces out of the trained arrays, of the optimiser's state, and of the gradients' work.

    B and C of each layer hold only the subspaces that are active in the state; the others stay in the adapter as
    constants, and the output is the same. Files, summaries, `adamss.merge` and `adamss.detach` go on seeing all of
    them. Training goes on with the same transformation, and compiles once more; for optimisers that treat each
    element by itself the result is the same, up to rounding. What is frozen later, the next call takes out.

    The arrays of a stack of layers are padded to the largest of them. A layer of which nothing is left keeps one
    column of padding, that stays zero. To do without the products of frozen subspaces too, call `adamss.consolidate`.

    Parameters
    ----------
    model
        The adapted model that is being trained.
    opt_state
        Its `nnx.Optimizer`, or whatever holds the state of `adamss_jax.budgeted`. Every array in it that belongs to a
        parameter is cut as the parameter is; factored moments (Adafactor) are too.

    Returns
    -------
    model, opt_state
        NNX models and optimisers: the same objects. All else: new.

    Raises
    ------
    StateError
        If there is no state of `budgeted`, or it is of another model; if frozen subspaces may return
        (``revive=True``); if an array of the state belongs to a parameter and cannot be cut. Nothing is changed.

    Warns
    -----
    AdamssWarning
        As `adamss_jax.synchronise`, which this does first.

    Notes
    -----
    To resume in another process, save after compacting: load the adapter, call `compact` with the model and
    ``tx.init(parameters)``, and restore the state into what it returns.
    """
    backend = JaxBackend()
    adaptation = backend.adaptation(model)
    if adaptation is None:
        raise StateError("compact: the model has no adapters; call adamss.attach first")
    state = budgeted_state(opt_state, adaptation, "compact")
    if bool(state.revive):
        raise StateError("compact: revive = True, and a frozen subspace may return; leave the model as it is")
    leaves, before = backend.leaves(model), backend.places(model)
    if not _equal(before, state.places):
        raise StateError(
            "compact: the model is compacted and the state is not, or another way; compact both together"
        )
    new: dict[str, tuple[Any, Any, Rest]] = {}
    after = dict(before)
    for owner, pair in leaves.pairs.items():
        layers = {index: adaptation.layers[path] for index, path in pair.paths.items()}
        active = {index: np.asarray(state.budget.active[path]) for index, path in pair.paths.items()}
        B, C, rest = compacted(layers, active, pair.leading)
        if (B.shape[-1], C.shape[-1]) != tuple(shape[-1] for shape in pair.shapes(before)):
            new[owner] = B, C, rest
            after |= {
                path: Places(rest.directions[index], rest.columns[index])
                for index, path in pair.paths.items()
            }
    # What can fail comes before the model, or an nnx.Optimizer, is changed.
    cut = _cut(_tree(opt_state), leaves, new.keys(), before, after)
    model = backend.compact(synchronise(model, opt_state), new)
    if hasattr(opt_state, "opt_state"):
        opt_state.opt_state = cut
        return model, opt_state
    return model, cut


def _tree(opt_state: Any) -> Any:
    return getattr(opt_state, "opt_state", opt_state)


def _equal(first: Mapping[str, Places], second: Mapping[str, Places]) -> bool:
    return first.keys() == second.keys() and all(
        np.array_equal(np.asarray(a), np.asarray(b))
        for path in first
        for a, b in zip(first[path], second[path], strict=True)
    )


def _cut(
    opt_state: Any,
    leaves: Leaves,
    owners: Collection[str],
    before: Mapping[str, Places],
    after: Mapping[str, Places],
) -> Any:
    """Return the state with every array that belongs to a leaf of these modules cut as the leaf is."""
    kept, shapes = {}, {}
    for owner in owners:
        pair = leaves.pairs[owner]
        for number, shape in enumerate(pair.shapes(before)):
            shapes[owner, number] = shape
            kept[owner, number] = _kept(pair, number, shape[-1], before, after)

    def own(path: tuple[Any, ...], leaf: Any) -> Any:
        name = leaves.name(path)
        if name is None or name not in kept:
            return leaf
        array = leaf.get_value() if is_variable(leaf) else leaf
        new = _columns(array, shapes[name], kept[name], jax.tree_util.keystr(path))
        return leaf.replace(new) if is_variable(leaf) else new

    def visit(path: tuple[Any, ...], node: Any) -> Any:
        if not isinstance(node, BudgetedState):
            return own(path, node)
        step = node.budget.step
        like = step.get_value() if is_variable(step) else step
        places = jax.tree.map(lambda array: beside(array, like), dict(after))
        if is_variable(step):
            places = jax.tree.map(step.replace, places)
        inner = jax.tree_util.tree_map_with_path(own, node.inner, is_leaf=is_variable)
        return node._replace(inner=inner, places=places)

    def is_leaf(node: Any) -> bool:
        return isinstance(node, BudgetedState) or is_variable(node)

    return jax.tree_util.tree_map_with_path(visit, opt_state, is_leaf=is_leaf)


def _kept(
    pair: Pair, number: int, width: int, before: Mapping[str, Places], after: Mapping[str, Places]
) -> np.ndarray[Any, Any]:
    """Return which columns of a leaf stay, (*leading, w') integers; padding has one beyond its end."""
    found = []
    for path in pair.paths.values():
        old = np.asarray(before[path][number]) if path in before else np.arange(width)
        found.append(np.searchsorted(old, np.asarray(after[path][number])))
    return np.reshape(np.stack(found), (*pair.leading, -1))


def _columns(array: Array, shape: tuple[int, ...], kept: np.ndarray[Any, Any], name: str) -> Array:
    """Return the columns that stay of an array of the optimiser's state.

    Parameters
    ----------
    array
        Of the shape of the parameter, or without its rows (statistics of the columns), or without its columns.
    shape
        Of the parameter, (*leading, rows, columns).
    kept
        See `_kept`.
    name
        What the message calls it.
    """
    *leading, rows, width = shape
    found = tuple(np.shape(array))
    if not np.size(array):
        return array  # what a transformation keeps in the place of a parameter that is not its own
    of_columns = found in ((*leading, 1, width), (*leading, width))
    of_rows = found in ((*leading, rows), (*leading, rows, 1)) or np.size(array) == 1
    if found != shape and of_columns == of_rows:
        raise StateError(
            f"compact: the optimiser's state has an array {name} of shape {found} for a parameter of shape {shape}, "
            f"and {'either axis' if of_rows else 'none'} of it fits; train on without compact"
        )
    if found != shape and of_rows:
        return array
    host = np.asarray(array)
    # One more column, of zeros, for padding.
    host = np.concatenate([host, np.zeros((*host.shape[:-1], 1), host.dtype)], axis=-1)
    index = np.minimum(kept, width)
    index = index[..., None, :] if len(found) == len(shape) else index
    return resized_as(np.take_along_axis(host, index, axis=-1), array)
