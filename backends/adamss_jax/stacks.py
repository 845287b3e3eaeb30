"""Factors of layers whose arrays are stacked along leading axes: the factors are stacked in the same way."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from adamss.backend.sites import Index
from adamss.core import Factors
from adamss.errors import LayerError
from adamss_jax.arrays import placed_as

__all__ = ["factors_at", "stacked_factors", "with_layer"]


def stacked_factors(factors: Mapping[Index, Factors], leading: Index, path: str) -> Factors:
    """Stack the factors of all layers of a stack, each padded with zeros to the largest.

    Raises
    ------
    LayerError
        If some layers of the stack match no target, because a stacked array has entries for all layers.
    """
    if not leading:
        return factors[()]
    missing = [index for index in np.ndindex(leading) if index not in factors]
    if missing:
        raise LayerError(
            f"{path} is a stack of {int(np.prod(leading))} layers, of which {len(missing)} match no target; adapt "
            "all layers of a stack, or none"
        )

    def padded(name: str) -> jax.Array:
        arrays = {index: getattr(f, name) for index, f in factors.items()}
        largest = np.max([array.shape for array in arrays.values()], axis=0)
        for index, array in arrays.items():
            missing_entries = [(0, int(entries)) for entries in largest - np.asarray(array.shape)]
            arrays[index] = jnp.pad(array, missing_entries)
        whole = jnp.stack([arrays[index] for index in np.ndindex(leading)])
        return jnp.reshape(whole, (*leading, *whole.shape[1:]))

    return Factors(*(padded(name) for name in Factors._fields))


def factors_at(factors: Factors, index: Index) -> Factors:
    """Return the factors of one layer of a stack, without padding: the inverse of `stacked_factors`."""
    if not index:
        return factors
    A, B, C, labels, ranks, active = (array[index] for array in factors)
    if isinstance(ranks, jax.core.Tracer):
        return Factors(
            A, B, C, labels, ranks, active
        )  # padding stays: its size depends on the values of ranks
    q, r = int(jnp.sum(ranks)), int(jnp.max(ranks))
    P = B.shape[0]
    if A.shape[0] > 1:
        P = min(P, int(jnp.max(jnp.bincount(labels, length=ranks.shape[0]))))
    return Factors(A[:, :, :P], B[:P, :q], C[:r], labels, ranks, active)


def with_layer(whole: jax.Array, index: Index, array: jax.Array) -> jax.Array:
    """Return an array of stacked factors with the entry of one layer replaced, in the dtype of the whole."""
    array = jnp.asarray(array, whole.dtype)
    padding = [(0, size - own) for size, own in zip(whole.shape[len(index) :], array.shape, strict=True)]
    return placed_as(whole.at[index].set(jnp.pad(array, padding)) if index else array, whole)
