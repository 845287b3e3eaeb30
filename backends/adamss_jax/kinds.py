"""What a layer computes beside its frozen product, for every kind of layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from adamss.backend import Kind
from adamss.backend.bank import scaled
from adamss.core import contract, expand
from adamss_jax.arrays import restored
from adamss_jax.functional import update, with_constants
from adamss_jax.parts import computed

if TYPE_CHECKING:
    from adamss_jax.models import Record

__all__ = ["ExampleKind", "MatrixKind", "Rest", "example_input", "must_be_tried", "with_updates"]

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


def with_updates(
    kind: Kind, layer: Any, y: Array, x: Array, adapters: Mapping[str, Any], *, record: Record, rest: Rest
) -> Array:
    """Return the output of a layer: its frozen product y, and the updates of its input x by the active adapters.

    Parameters
    ----------
    kind, layer
        The layer, and its kind.
    y, x
        Its output and input. `Kind.project` gets an input of integers as it is, since these may be ids.
    adapters
        By name, each with `factors()`, the `part` of them that is computed, and the `order` of `adamss_jax.update`.
    record
        Of the model: which adapters are active.
    rest
        Positional and named arguments of the layer's call, without its input.
    """
    active = [
        (own, own.weight, adapters[name], restored(adapters[name].part))
        for name, own in record.adapters
        if own.weight is not None and name in adapters
    ]
    active = [each for each in active if not each[-1].empty]
    if not active:
        return y
    x = jnp.asarray(x)
    if kind.linear or not jnp.issubdtype(x.dtype, jnp.integer):
        x = x.astype(y.dtype)
    for own, weight, adapter, part in active:
        factors, order = scaled(computed(adapter.factors(), part), weight), adapter.order
        if own.revives:
            # Frozen subspaces get gradients all the same, because they may return.
            factors = factors._replace(active=jnp.ones_like(factors.active))
        if isinstance(kind, MatrixKind):
            args, kwargs = rest
            u = update(kind.inputs(layer, x, *args, **kwargs), factors, order=order)
            y = y + kind.outputs(layer, u, *args, **kwargs)
        elif kind.linear:
            y = y + update(x, factors, order=order)
        else:
            factors = with_constants(factors)
            M, E = contract(factors), expand(factors)
            # Law 1: what overflows in z must be finite, or infinity times C = 0 would be NaN.
            z = jnp.nan_to_num(kind.project(layer, x, M.astype(y.dtype)))
            y = y + kind.spread(layer, z, E.astype(y.dtype))
    return y
