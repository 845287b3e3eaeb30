"""Layers whose weight holds the update of some subspaces, as `adamss.consolidate` leaves them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from adamss.core import Factors
from adamss_jax.functional import update

__all__ = ["Index", "Part", "added", "outline", "part_of"]

Index = tuple[int, ...]
"""Where in a stack a layer lies; ``()`` if there is no stack."""


class Part(NamedTuple):
    """The subspaces of a layer that its product computes; all None if it computes every one.

    Attributes
    ----------
    labels
        (n,) integers: number of each column's subspace among those that are computed, -1 if its subspace is not.
    subspaces, directions
        (K',) and (q',) integers: those subspaces, and their columns of B; in a stack one beyond the end is padding.
        None if there are none: Orbax would not store an empty array.
    """

    labels: Any = None
    subspaces: Any = None
    directions: Any = None

    @property
    def empty(self) -> bool:
        """Whether nothing is computed: the weight holds the update of every subspace."""
        return self.labels is not None and self.subspaces is None


def added(x: Array, factors: Factors, part: Part, order: str | None = None) -> Array:
    """Return what a layer adds to its frozen product: see `adamss_jax.update`.

    Parameters
    ----------
    x
        Inputs (..., d).
    factors
        Factors of all subspaces.
    part
        Which of the subspaces are computed; not `Part.empty`.
    order
        See `adamss_jax.update`.
    """
    if part.labels is not None:
        A, B, C, _, ranks, active = factors
        A = _taken(A, part.subspaces, axis=0) if A.shape[0] > 1 else A
        B = _taken(B, part.directions, axis=1)
        ranks, active = _taken(ranks, part.subspaces, axis=0), _taken(active, part.subspaces, axis=0)
        factors = Factors(A, B, C, part.labels, ranks, active)
    return update(x, factors, order=order)


def outline(factors: Factors) -> Factors:
    """Return labels, ranks and mask as NumPy arrays, and A, B, C that have shapes alone."""
    A, B, C = (np.broadcast_to(np.zeros(()), array.shape) for array in factors[:3])
    return Factors(A, B, C, *map(np.asarray, factors[3:]))


def part_of(layers: Mapping[Index, Factors], folded: Any, leading: Index) -> Part:
    """Return which subspaces of a layer, or stack of layers, are to be computed.

    It is made on the host: JAX would compile every gather for every new count of subspaces.

    Parameters
    ----------
    layers
        Factors of each layer of the stack.
    folded
        (*leading, K) booleans, the subspaces whose update the weight holds.
    leading
        Axes of the stack.
    """
    if not np.any(folded):
        return Part()
    labels, subspaces, directions = {}, {}, {}
    for index, factors in layers.items():
        own, kept = np.asarray(factors.labels), ~np.asarray(folded)[index]
        labels[index] = np.where(kept[own], np.cumsum(kept, dtype=own.dtype)[own] - 1, -1).astype(own.dtype)
        subspaces[index] = np.nonzero(kept)[0]
        directions[index] = np.nonzero(np.repeat(kept, factors.ranks))[0]
    ends = (max(f.ranks.shape[0] for f in layers.values()), max(f.B.shape[1] for f in layers.values()))
    return Part(
        _padded(labels, leading), _padded(subspaces, leading, ends[0]), _padded(directions, leading, ends[1])
    )


def _taken(array: Array, places: Array, *, axis: int) -> Array:
    """Return the entries of an array at some places along an axis; zero, or False, for padding."""
    return jnp.take(array, places, axis=axis, mode="fill", fill_value=0)


def _padded(
    arrays: Mapping[Index, np.ndarray[Any, Any]], leading: Index, fill: int = 0
) -> np.ndarray[Any, Any] | None:
    """Stack vectors along leading axes, each padded to the longest; None if all of them are empty."""
    length = max(array.size for array in arrays.values())
    result = np.full((*leading, length), fill, next(iter(arrays.values())).dtype)
    for index, array in arrays.items():
        result[index][: array.size] = array
    return result if length else None
