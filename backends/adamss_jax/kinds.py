"""The updates that adapters add to the frozen product of a layer, for every kind of layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from adamss.backend import Kind
from adamss.backend.bank import rows_of, scaled
from adamss.core import contract, expand
from adamss_jax.arrays import restored
from adamss_jax.functional import update, with_constants
from adamss_jax.parts import computed

if TYPE_CHECKING:
    from adamss_jax.models import Record

__all__ = ["ExampleKind", "MatrixKind", "Rest", "example_input", "must_be_tried", "with_updates"]

Rest: TypeAlias = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional and keyword arguments of a call."""


class ExampleKind(Kind):
    """A kind that is not linear and can make an example input for its layers.

    A layer whose class overrides the forward is run on this input before and after a merge, to check that the merge
    keeps the layer's output.
    """

    @abstractmethod
    def example(self, layer: Any) -> Array:
        """Return an input that the layer accepts."""

    def rows(self, layer: Any, x: Array) -> tuple[int, ...]:
        """Return the sizes of the leading axes of an input, which hold the rows of a batch.

        They are ``()`` for a layer that takes a single input.
        """
        return ()

    def last(self, z: Array) -> Array:
        """Move the q directions of a result of `Kind.project` to the last axis; applying it twice undoes it."""
        return z


class MatrixKind(Kind):
    """A layer that is a product with one matrix, except that its inputs and outputs may have other axes.

    Its update is computed by `adamss_jax.update`, which has a custom gradient.
    """

    def inputs(self, layer: Any, x: Array, /, *args: Any, **kwargs: Any) -> Array:
        """Return the input of the layer as (..., d); `args` and `kwargs` are the other arguments of its call."""
        return x

    def outputs(self, layer: Any, u: Array, /, *args: Any, **kwargs: Any) -> Array:
        """Return an update (..., n) with the axes of the layer's output."""
        return u


def example_input(kind: Kind, layer: Any, d: int) -> Array:
    """Return an input on which a layer whose weight has d rows can be tried."""
    return (
        kind.example(layer) if isinstance(kind, ExampleKind) else jax.random.normal(jax.random.key(0), (d,))
    )


def must_be_tried(kind: Kind, layer: type) -> bool:
    """Return whether a class of layers overrides the forward of its kind, and `example_input` can test the result."""
    return (kind.linear or isinstance(kind, ExampleKind)) and not kind.defines(layer, "__call__")


def with_updates(
    kind: Kind, layer: Any, y: Array, x: Array, adapters: Mapping[str, Any], *, record: Record, rest: Rest
) -> Array:
    """Return the output of a layer: its frozen product y plus the updates of the active adapters for its input x.

    Parameters
    ----------
    kind, layer
        Kind of the layer, and the layer itself.
    y, x
        Output of the frozen layer, and its input. `Kind.project` gets integer inputs unchanged, since they may be
        ids.
    adapters
        Adapters by name. Each has `factors()`, the `part` of them that is computed, and the `order` for
        `adamss_jax.update`.
    record
        Record of the model, which says which adapters are active and whether rows are routed.
    rest
        Positional and keyword arguments of the layer's call, without its input.
    """
    if record.route is not None:
        names, axis = record.route
        routed = [adapters[name] for name in names if name in adapters]
        return _with_routed(kind, layer, y, jnp.asarray(x), routed, axis, rest) if routed else y
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
            # Frozen subspaces need gradients too, because their importance decides whether they return.
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
            # Overflow in z must become finite, or infinity times C = 0 would be NaN at the start of training.
            z = jnp.nan_to_num(kind.project(layer, x, M.astype(y.dtype)))
            y = y + kind.spread(layer, z, E.astype(y.dtype))
    return y


def _with_routed(
    kind: Kind, layer: Any, y: Array, x: Array, adapters: list[Any], axis: int, rest: Rest
) -> Array:
    """Return the output of a layer plus, for each row, the update of that row's adapter.

    M and E of all adapters are concatenated, so that one pair of products serves every row. Between the two products,
    a gate sets the directions of all but the row's own adapter to zero.
    """
    factors = [with_constants(adapter.factors()) for adapter in adapters]
    Ms, Es = [contract(each) for each in factors], [expand(each) for each in factors]
    most = max(M.shape[0] for M in Ms)  # adapters that update the bias have one more row
    M = jnp.concatenate([jnp.pad(M, ((0, most - M.shape[0]), (0, 0))) for M in Ms], axis=1).astype(y.dtype)
    E = jnp.concatenate(Es, axis=0).astype(y.dtype)
    gates = [
        jnp.broadcast_to(each.gate[..., None], (*each.gate.shape, M.shape[1]))
        for each, M in zip(adapters, Ms, strict=True)
    ]
    gate = jnp.concatenate(gates, axis=-1)  # (rows, q); (q,) for the single row within a vmap
    args, kwargs = rest
    if isinstance(kind, MatrixKind) or kind.linear:
        inputs = x.astype(y.dtype)
        inputs = kind.inputs(layer, inputs, *args, **kwargs) if isinstance(kind, MatrixKind) else inputs
        d = inputs.shape[-1]
        z = inputs @ M[:d] + (M[d] if most > d else 0)
        leading = inputs.shape[:-1]
    else:
        assert isinstance(kind, ExampleKind)
        x = x if jnp.issubdtype(x.dtype, jnp.integer) else x.astype(y.dtype)
        z, leading = kind.last(kind.project(layer, x, M)), kind.rows(layer, x)
    if gate.ndim > 1:
        # Ids with one axis may be one per row, or positions that all rows share. Positions have no row, so a length
        # that is a larger multiple of the number of rows is refused here.
        exact = len(leading) == 1 and not kind.linear and jnp.issubdtype(x.dtype, jnp.integer)
        share = rows_of(adapters[0].place or type(layer).__name__, leading, len(gate), axis, exact=exact)
        shape = [1] * z.ndim
        shape[axis], shape[-1] = leading[axis], gate.shape[-1]
        gate = jnp.reshape(jnp.repeat(gate, share, axis=0), shape)
    z = jnp.where(gate & jnp.isfinite(z), z, jnp.zeros_like(z))
    if isinstance(kind, MatrixKind):
        return y + kind.outputs(layer, z @ E, *args, **kwargs)
    if kind.linear:
        return y + z @ E
    assert isinstance(kind, ExampleKind)
    result: Array = y + kind.spread(layer, kind.last(z), E)
    return result
