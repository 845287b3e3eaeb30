"""Layers of which not everything is trained, or computed, any more: what `compact` and `consolidate` make.

Some subspaces leave the trained arrays (`Rest`), some the products (`Part`). The canonical factors, of all subspaces,
are put together from what there is, so that files, merging and summaries see no difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adamss import core
from adamss.core import Factors
from adamss_jax.functional import update
from adamss_jax.stacks import over_axes

__all__ = [
    "Part",
    "Places",
    "Rest",
    "added",
    "compacted",
    "outline",
    "part_of",
    "placed",
    "present_subspaces",
    "taken",
    "whole",
]

Index = tuple[int, ...]
"""Where in a stack a layer lies; ``()`` if there is no stack."""

Host = np.ndarray[Any, Any]


class Places(NamedTuple):
    """Where the columns of compacted arrays stand in the whole, ascending; one beyond its end is padding.

    Attributes
    ----------
    directions
        Of B, (q',) integers.
    columns
        Of C, (n',) integers.
    """

    directions: Any
    columns: Any


class Rest(NamedTuple):
    """What `adamss_jax.compact` has taken out of the trained arrays of a layer; all None if it has not.

    Attributes
    ----------
    B, C
        (P, q) and (r, n): the values of what was frozen, zero where the rest stands.
    directions, columns
        See `Places`.
    """

    B: Any = None
    C: Any = None
    directions: Any = None
    columns: Any = None


class Part(NamedTuple):
    """What of a layer is computed, where it is not everything; all None if it is.

    Attributes
    ----------
    labels
        (n,) integers: number of each column's subspace among those that get gradients, -1 if it is not one of them.
    subspaces, directions
        (K',) and (q',) integers: those subspaces, and their columns of B. None if there are none.
    M, E
        (d, q'') and (q'', n) of the subspaces that are constant. None if there are none.
    """

    labels: Any = None
    subspaces: Any = None
    directions: Any = None
    M: Any = None
    E: Any = None

    @property
    def empty(self) -> bool:
        """Whether nothing is computed: the weights hold the update of every subspace."""
        return self.labels is not None and self.subspaces is None and self.M is None


# ---- in the model ----------------------------------------------------------------------------------


def placed(part: Array, places: Array, into: Array) -> Array:
    """Return an array (m, w) with other columns at some places; undoes `taken`."""
    return into.at[:, places].set(part, mode="drop")


def taken(array: Array, places: Array) -> Array:
    """Return the columns (m, w') of an array at some places; zero, or False, for padding."""
    return jnp.take(array, places, axis=-1, mode="fill", fill_value=0)


def whole(factors: Factors, rest: Rest) -> Factors:
    """Return canonical factors from those of a compacted layer, or stack of layers."""
    if rest.B is None:
        return factors
    put = over_axes(placed, factors.ranks.ndim - 1)
    B, C = put(factors.B, rest.directions, rest.B), put(factors.C, rest.columns, rest.C)
    return factors._replace(B=B, C=C)


def added(x: Array, factors: Factors, part: Part, order: str | None = None) -> Array:
    """Return what a layer adds to its frozen product: see `adamss_jax.update`.

    Parameters
    ----------
    x
        Inputs (..., d).
    factors
        Canonical.
    part
        What of them is computed; not `Part.empty`.
    order
        See `adamss_jax.update`.
    """
    if part.labels is None:
        return update(x, factors, order=order)
    constant = None if part.M is None else (part.M, part.E)
    if part.subspaces is None:
        return update(x, None, constant, order=order)
    A, B, C, _, ranks, active = factors
    if A.shape[0] > 1:
        A = jnp.take(A, part.subspaces, axis=0, mode="fill", fill_value=0)
    ranks, active = taken(ranks, part.subspaces), taken(active, part.subspaces)
    own = Factors(A, taken(B, part.directions), C, part.labels, ranks, active)
    return update(x, own, constant, order=order)


# ---- made on the host: JAX would compile every gather for every new count of subspaces ---------------


def outline(factors: Factors) -> Factors:
    """Return labels, ranks and mask as NumPy arrays, and A, B, C that have shapes alone."""
    A, B, C = (np.broadcast_to(np.zeros(()), array.shape) for array in factors[:3])
    return Factors(A, B, C, *map(np.asarray, factors[3:]))


def compacted(
    layers: Mapping[Index, Factors], present: Mapping[Index, Host], leading: Index
) -> tuple[Host, Host, Rest]:
    """Return B and C of some subspaces alone, and the `Rest` of the layer, or stack of layers.

    They are never empty, which Orbax would not store: where no subspace is left there is a column of padding.

    Parameters
    ----------
    layers
        Canonical factors of each layer of the stack.
    present
        (K,) booleans: the subspaces that stay.
    leading
        Axes of the stack.
    """
    found: dict[str, dict[Index, Host]] = {name: {} for name in ("own_B", "own_C", *Rest._fields)}
    for index, factors in layers.items():
        part = _restricted(factors, present[index])
        B, C = np.array(factors.B), np.array(factors.C)
        B[:, part.directions] = 0
        C[:, part.columns] = 0
        for name, array in zip(found, (part.factors.B, part.factors.C, B, C, *part[2:]), strict=True):
            found[name][index] = array
    rest = Rest(_padded(found["B"], leading), _padded(found["C"], leading))
    for name, end in (("directions", rest.B.shape[-1]), ("columns", rest.C.shape[-1])):
        places = _padded(found[name], leading, fill=end, least=1).astype(np.int32)
        rest = rest._replace(**{name: places})
    B, C = (_padded(found[name], leading, least=1) for name in ("own_B", "own_C"))
    return B, C, rest


def part_of(layers: Mapping[Index, Factors], rest: Rest, folded: Any, leading: Index) -> Part:
    """Return what of a layer, or stack of layers, is to be computed.

    Parameters
    ----------
    layers
        Canonical factors of each layer of the stack.
    rest
        What has left the trained arrays.
    folded
        (*leading, K) booleans, the subspaces whose update the weight holds; None for none.
    leading
        Axes of the stack.
    """
    present = present_subspaces(layers, rest)
    held = {
        i: np.zeros(m.shape, bool) if folded is None else np.asarray(folded[i]) for i, m in present.items()
    }
    if all(mask.all() for mask in present.values()) and not any(mask.any() for mask in held.values()):
        return Part()
    found: dict[str, dict[Index, Host]] = {name: {} for name in Part._fields}
    for index, factors in layers.items():
        trained = _restricted(factors, present[index] & ~held[index])
        constant = _restricted(factors, ~present[index] & ~held[index]).directions
        labels = np.full(factors.labels.shape, -1, np.asarray(factors.labels).dtype)
        labels[trained.columns] = trained.factors.labels
        with jax.default_matmul_precision("highest"):
            M, E = np.asarray(core.contract(factors)), np.asarray(core.expand(factors))
        values = (labels, trained.subspaces, trained.directions, M[:, constant], E[constant])
        for name, array in zip(found, values, strict=True):
            found[name][index] = array
    ends = {
        "subspaces": max(factors.ranks.shape[0] for factors in layers.values()),
        "directions": max(factors.B.shape[1] for factors in layers.values()),
    }
    arrays = {name: _padded(values, leading, fill=ends.get(name, 0)) for name, values in found.items()}
    return Part(**{name: array if array.size else None for name, array in arrays.items()})


def present_subspaces(layers: Mapping[Index, Factors], rest: Rest) -> dict[Index, Host]:
    """Return which subspaces of each layer of a stack have trained arrays, (K,) booleans."""
    if rest.columns is None:
        return {index: np.ones(factors.ranks.shape, bool) for index, factors in layers.items()}
    columns = np.asarray(rest.columns)
    present = {}
    for index, factors in layers.items():
        labels, own = np.asarray(factors.labels), columns[index]
        present[index] = np.isin(np.arange(factors.ranks.shape[0]), labels[own[own < labels.size]])
    return present


def _restricted(factors: Factors, chosen: Host) -> core.Restriction:
    host = Factors(np.zeros((1, 1, 1)), *map(np.asarray, factors[1:]))
    return core.restrict(host, chosen)


def _padded(arrays: Mapping[Index, Host], leading: Index, *, fill: int = 0, least: int = 0) -> Host:
    """Stack arrays along leading axes, each padded to the largest, the last axis to no less than `least`."""
    *others, last = np.max([array.shape for array in arrays.values()], axis=0)
    sizes = (*others, max(last, least))
    result = np.full((*leading, *sizes), fill, next(iter(arrays.values())).dtype)
    for index, array in arrays.items():
        result[index][tuple(map(slice, array.shape))] = array
    return result
