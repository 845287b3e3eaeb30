"""Layers whose arrays are stacked along leading axes, as ``scan`` over layers and ``vmap`` over experts want them.

Each layer of a stack is one of its own to `adamss`: it has a path, ``layers.query[3]``, and factors. Only where they
are kept do they share arrays, padded with zeros to the largest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from adamss.core import Factors
from adamss.errors import LayerError

__all__ = [
    "StackedLayer",
    "by_owner",
    "factors_at",
    "over_axes",
    "split_path",
    "stack_paths",
    "stacked",
    "stacked_factors",
]

T = TypeVar("T")


@dataclass(frozen=True)
class StackedLayer:
    """One of the layers whose arrays share a module, as ``vmap`` and ``scan`` over layers (or experts) want them.

    Attributes
    ----------
    module
        Its arrays have leading axes.
    index
        Where in them this layer lies.
    """

    module: Any
    index: tuple[int, ...]


def stack_paths(path: str, leading: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Return the paths of the layers of a stack, ``path[i]`` or ``path[i,j]``, and where in it each lies."""
    return {f"{path}[{','.join(map(str, index))}]": index for index in np.ndindex(leading)}


def split_path(path: str) -> tuple[str, tuple[int, ...]]:
    """Undo `stack_paths`: return the path of the module, and where in it a layer lies: ``()`` if not stacked."""
    found = re.fullmatch(r"(.*)\[([\d,]+)\]", path)
    return (path, ()) if found is None else (found[1], tuple(int(part) for part in found[2].split(",")))


def by_owner(layers: Mapping[str, T]) -> dict[str, dict[tuple[int, ...], T]]:
    """Return what belongs to each layer by the path of its module, then by its place in the stack."""
    grouped: dict[str, dict[tuple[int, ...], T]] = {}
    for path, value in layers.items():
        owner, index = split_path(path)
        grouped.setdefault(owner, {})[index] = value
    return grouped


def stacked(arrays: Mapping[tuple[int, ...], Any], leading: tuple[int, ...]) -> jax.Array:
    """Stack an array of each layer, in the order of their places, to leading axes."""
    whole = jnp.stack([arrays[index] for index in np.ndindex(leading)])
    return jnp.reshape(whole, (*leading, *whole.shape[1:]))


def stacked_factors(
    factors: Mapping[tuple[int, ...], Factors], leading: tuple[int, ...], path: str
) -> Factors:
    """Stack the factors of all layers of a stack, each padded with zeros to the largest.

    Raises
    ------
    LayerError
        If some layers of the stack are not to be adapted: their arrays could not be left out.
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
        return stacked(arrays, leading)

    return Factors(*(padded(name) for name in Factors._fields))


def factors_at(factors: Factors, index: tuple[int, ...]) -> Factors:
    """Return the factors of one layer of a stack, without padding; undoes `stacked_factors`."""
    if not index:
        return factors
    A, B, C, labels, ranks, active = (array[index] for array in factors)
    if isinstance(ranks, jax.core.Tracer):
        return Factors(A, B, C, labels, ranks, active)  # how much is padding depends on values
    q, r = int(jnp.sum(ranks)), int(jnp.max(ranks))
    P = B.shape[0]
    if A.shape[0] > 1:
        P = min(P, int(jnp.max(jnp.bincount(labels, length=ranks.shape[0]))))
    return Factors(A[:, :, :P], B[:P, :q], C[:r], labels, ranks, active)


def over_axes(function: Callable[..., Any], axes: int) -> Callable[..., Any]:
    """Return a function of one layer as one of arrays with so many leading axes."""
    for _ in range(axes):
        function = jax.vmap(function)
    return function
