"""What a layer computes beside its frozen product, for every kind of layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from adamss.backend import Kind
from adamss.core import contract, expand
from adamss_jax.arrays import restored
from adamss_jax.functional import update, with_constants
from adamss_jax.parts import computed

__all__ = ["ExampleKind", "MatrixKind", "Rest", "example_input", "must_be_tried", "with_update"]

Rest: TypeAlias = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional and named arguments of a call."""


class ExampleKind(Kind):
    """A kind that is not linear and can make an input for its layers.

    A layer whose class has a forward of its own is tried on it, before and after its update is merged.
    """

    @abstractmethod
    def example(self, layer: Any) -> Array:
        """Return an input that the layer takes."""


class MatrixKind(Kind):
    """A layer that is a product with one matrix, but for where the axes of inputs and outputs lie.

    Its update is computed by `adamss_jax.update`, whose gradient is written by hand.
    """

    def inputs(self, layer: Any, x: Array, /, *args: Any, **kwargs: Any) -> Array:
        """Return the input of the layer as (..., d); the other arguments are those of the layer's call."""
        return x

    def outputs(self, layer: Any, u: Array, /, *args: Any, **kwargs: Any) -> Array:
        """Return (..., n) in the axes of the layer's output."""
        return u


def example_input(kind: Kind, layer: Any, d: int) -> Array:
    """Return an input to try a layer on, whose weight has d rows."""
    return (
        kind.example(layer) if isinstance(kind, ExampleKind) else jax.random.normal(jax.random.key(0), (d,))
    )


def must_be_tried(kind: Kind, layer: type) -> bool:
    """Return whether a class of layers has a forward of its own, of which `example_input` tells what it computes."""
    return (kind.linear or isinstance(kind, ExampleKind)) and not kind.defines(layer, "__call__")


def with_update(
    kind: Kind, layer: Any, y: Array, x: Array, adapter: Any, *, revive: bool, rest: Rest
) -> Array:
    """Return the output of a layer: its frozen product y, and the update of its input x.

    Parameters
    ----------
    kind, layer
        The layer, and its kind.
    y, x
        Its output and input. `Kind.project` gets an input of integers as it is, since these may be ids.
    adapter
        With `factors()`, the `part` of them that is computed, and the `order` of `adamss_jax.update`.
    revive
        Whether frozen subspaces get gradients all the same, because they may return.
    rest
        Positional and named arguments of the layer's call, without its input.
    """
    part, order = restored(adapter.part), adapter.order
    if part.empty:
        return y
    factors, x = computed(adapter.factors(), part), jnp.asarray(x)
    if kind.linear or not jnp.issubdtype(x.dtype, jnp.integer):
        x = x.astype(y.dtype)
    if revive:
        factors = factors._replace(active=jnp.ones_like(factors.active))
    if isinstance(kind, MatrixKind):
        args, kwargs = rest
        u = update(kind.inputs(layer, x, *args, **kwargs), factors, order=order)
        return y + kind.outputs(layer, u, *args, **kwargs)
    if kind.linear:
        return y + update(x, factors, order=order)
    factors = with_constants(factors)
    M, E = contract(factors), expand(factors)
    # Law 1: what overflows in z must be finite, or infinity times C = 0 would be NaN.
    z = jnp.nan_to_num(kind.project(layer, x, M.astype(y.dtype)))
    result: Array = y + kind.spread(layer, z, E.astype(y.dtype))
    return result
