"""Layers whose weight holds the update of some subspaces, or of all."""

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
    """The subspaces of a layer whose update its weight holds, and those that are computed; all None if it holds none.

    Attributes
    ----------
    held
        (K,) booleans: whose update the weight holds.
    labels
        (n,) integers: number of each column's subspace among those that are computed, -1 if its subspace is not.
    subspaces, directions
        (K',) and (q',) integers: those subspaces, and their columns of B; in a stack one beyond the end is padding.
        None if there are none: Orbax would not store an empty array.
    """

    held: Any = None
    labels: Any = None
    subspaces: Any = None
    directions: Any = None

    @property
    def empty(self) -> bool:
        """Whether nothing is computed: the weight holds the update of every subspace."""
        return self.labels is not None and self.subspaces is None


def computed(factors: Factors, part: Part) -> Factors:
    """Return the factors of the subspaces that are computed, from those of all."""
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
    """Return what of a layer, or stack of layers, is to be computed.

    It is made on the host: JAX would compile every gather for every new count of subspaces.

    Parameters
    ----------
    layers
        Factors of each layer of the stack.
    held
        (K,) booleans of each, the subspaces whose update the weight holds.
    leading
        Axes of the stack.
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
