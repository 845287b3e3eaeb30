"""Layers whose weight already holds the update of some or all subspaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from adamss.backend.sites import Index
from adamss.core import Factors
from adamss.core.factors import select

__all__ = ["Part", "computed", "part_of"]


class Part(NamedTuple):
    """The subspaces of a layer whose update its weight holds, and those whose update is computed.

    All fields are None if the weight holds no update.

    Attributes
    ----------
    held
        Whether the weight holds the update of each subspace, (K,) booleans.
    labels
        Number of each column's subspace among the computed ones, (n,) integers; -1 if its subspace is held.
    subspaces, directions
        Computed subspaces, (K',) integers, and their columns of B, (q',) integers. In a stack, shorter ones are
        padded with an index past the end. They are None if no subspace is computed, because Orbax refuses to store
        empty arrays.
    """

    held: Any = None
    labels: Any = None
    subspaces: Any = None
    directions: Any = None

    @property
    def empty(self) -> bool:
        """Whether no subspace is computed, since the weight holds the update of all."""
        return self.labels is not None and self.subspaces is None


def computed(factors: Factors, part: Part) -> Factors:
    """Select the computed subspaces from the factors of all."""
    if part.labels is None:
        return factors
    A, B, C, _, ranks, active = factors
    A = _taken(A, part.subspaces, axis=0) if A.shape[0] > 1 else A
    B = _taken(B, part.directions, axis=1)
    ranks, active = _taken(ranks, part.subspaces, axis=0), _taken(active, part.subspaces, axis=0)
    return Factors(A, B, C, part.labels, ranks, active)


def part_of(
    layers: Mapping[Index, Factors], held: Mapping[Index, np.ndarray[Any, Any]], leading: Index
) -> Part:
    """Return the `Part` of a layer, or of a stack of layers.

    Its arrays are made with NumPy, because JAX would compile every gather again for each new number of subspaces.

    Parameters
    ----------
    layers
        Factors of each layer, by its index in the stack.
    held
        Subspaces whose update the weight holds, (K,) booleans for each layer.
    leading
        Sizes of the stack's axes; ``()`` for a single layer.
    """
    labels, subspaces, directions = {}, {}, {}
    for index, factors in layers.items():
        on_host = np.asarray(factors.labels), np.asarray(factors.ranks)
        labels[index], subspaces[index], directions[index] = select(*on_host, ~held[index])
    K, q = (max(f[axis].shape[-1] for f in layers.values()) for axis in (4, 1))
    return Part(
        _padded(held, leading),
        _padded(labels, leading),
        _padded(subspaces, leading, K),
        _padded(directions, leading, q),
    )


def _taken(array: Array, places: Array, *, axis: int) -> Array:
    """Take entries of an array along an axis; indices past the end, which are padding, give zero or False."""
    return jnp.take(array, places, axis=axis, mode="fill", fill_value=0)


def _padded(
    arrays: Mapping[Index, np.ndarray[Any, Any]], leading: Index, fill: int = 0
) -> np.ndarray[Any, Any] | None:
    """Stack vectors along leading axes, each padded to the longest; return None if all of them are empty."""
    length = max(array.size for array in arrays.values())
    result = np.full((*leading, length), fill, next(iter(arrays.values())).dtype)
    for index, array in arrays.items():
        result[index][: array.size] = array
    return result if length else None
