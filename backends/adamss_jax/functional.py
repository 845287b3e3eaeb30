"""The update of a linear layer as a pure function with a gradient written by hand.

Forward and both gradients are skinny matrix products, whatever K is; `Factors` are a pytree, so that ``jit``,
``vmap``, ``remat`` and ``scan`` over stacked layers need nothing special. Arrays stay in the paper's orientation,
which is JAX's own: ``kernel: (d, n)``, ``y = x @ kernel + bias``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType

from adamss.core import Factors, contract, expand, trained_elements
from adamss.core.cost import cheapest_order, check_order, device_balance
from adamss.core.linear import factor_gradients

__all__ = ["linear", "update", "with_constants"]


def linear(x: Array, kernel: Array, bias: Array | None, *factors: Factors, order: str | None = None) -> Array:
    """Return ``x @ (kernel + sum of delta) + bias`` without forming delta.

    ``y = (x @ kernel + bias) + (x @ M) @ E`` with ``M = [A_k B_k]`` and E the expansion of C, or
    ``((x @ A) @ B) @ E`` where that costs less. The base product is that of the frozen layer, to the bit: the updates
    of several adapters are added to it, one after the other.

    Parameters
    ----------
    x
        Inputs (..., d), real floating point.
    kernel
        Frozen weight (d, n).
    bias
        (n,) or None.
    factors
        Factors of the layer, of each adapter; trained are B and C. With d + 1 input rows, the last of them moves the
        bias. They may be sharded over mesh axes that XLA manages; over axes of type Explicit they are replicated.
    order
        See `update`.

    Returns
    -------
    Array
        (..., n), in the dtype of ``x @ kernel + bias``. Differentiable in reverse mode with respect to x,
        kernel, bias, B and C. A, labels, ranks and active are constants: their gradient is zero.

    Raises
    ------
    ConfigError
        If the order is unknown.
    TypeError
        From JAX, under forward-mode differentiation (``jax.jvp``, ``jax.jacfwd``), which a gradient
        written by hand does not have.

    References
    ----------
    .. [1] Zheng et al., "Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning",
       NeurIPS 2025.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, adamss_jax
    >>> from adamss import core
    >>> kernel = jax.random.normal(jax.random.key(0), (6, 8))
    >>> decomposition = core.decompose(kernel, 4)
    >>> factors = core.initial_factors(decomposition, core.segment(decomposition, 3), 1)
    >>> def loss(trained, x):
    ...     return adamss_jax.linear(x, kernel, None, factors._replace(**trained)).sum()
    >>> gradients = jax.jit(jax.grad(loss))({"B": factors.B, "C": factors.C}, jnp.ones((2, 6)))
    >>> gradients["B"].shape, gradients["C"].shape
    ((4, 3), (1, 8))
    """
    y = x @ kernel
    if bias is not None:
        y = y + jnp.expand_dims(bias, range(y.ndim - 1))
    for each in factors:
        y = y + update(x.astype(y.dtype), each, order=order)
    return y


def update(x: Array, factors: Factors, *, order: str | None = None) -> Array:
    """Return ``(x @ M) @ E``, what the adapter adds to the output of its frozen layer.

    Kept for the backward are x and ``x @ M``. With the order ``"input_first"`` the update is ``((x @ A) @ B) @ E``,
    and ``x @ A`` is kept instead of x.

    Parameters
    ----------
    x
        Inputs (..., d), in the dtype of the output.
    factors
        Factors of the layer, or of some of its subspaces, where a label of -1 marks the columns of the others.
    order
        In which order the products are taken, one of `adamss.core.cost.ORDERS`. None for the one that costs less, by
        the shapes: ``"input_first"`` for few tokens, ``"factors_first"`` for many; an x of one axis counts as many,
        since under ``vmap`` nothing tells how many there are. Without a basis that all subspaces share it is always
        ``"factors_first"``. Like a shape it is a constant of compiled functions.

    Returns
    -------
    Array
        (..., n), in the dtype of x. With C = 0 it is zero for every x, since products that overflow count as the
        largest finite number.

    Raises
    ------
    ConfigError
        If the order is unknown.
    """
    check_order(order)
    if factors.A.shape[0] > 1:
        order = "factors_first"
    elif order is None:
        order = _cheapest(x, factors)
    result: Array = _update(x, with_constants(factors), order == "input_first")
    return result


def with_constants(factors: Factors) -> Factors:
    """Return factors through which gradients of any order reach B and C of the active subspaces alone."""
    masks = trained_elements(factors)
    B, C = (
        jnp.where(mask, array, jax.lax.stop_gradient(array))
        for mask, array in zip(masks, (factors.B, factors.C), strict=True)
    )
    return factors._replace(A=jax.lax.stop_gradient(factors.A), B=B, C=C)


def _cheapest(x: Array, factors: Factors) -> str:
    if x.ndim == 1 or not all(isinstance(size, int) for size in x.shape):
        return "factors_first"  # also for any number of tokens, as `jax.export` has it
    # Whether there will be a backward JAX does not say. For the few tokens of decoding it makes no difference.
    return cheapest_order(
        tokens=math.prod(x.shape[:-1]),
        d=x.shape[-1],
        n=factors.labels.shape[0],
        rank=factors.A.shape[2],
        directions=factors.B.shape[1],
        balance=device_balance(x.dtype.itemsize, cpu=jax.default_backend() == "cpu"),
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _update(x: Array, factors: Factors, projected: bool) -> Array:
    u, _ = _forward(x, factors, projected)
    return u


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Inputs:
    """The width d of the inputs, and how they are sharded: all that the backward knows of them if projected."""

    width: int
    sharding: Any


def _forward(x: Array, factors: Factors, projected: bool) -> tuple[Array, tuple[Any, ...]]:
    E = expand(factors).astype(x.dtype)
    if projected:
        M, inputs = None, _product(x, factors.A[0].astype(x.dtype))
        z = _product(inputs, factors.B.astype(x.dtype))
    else:
        M, inputs = contract(factors).astype(x.dtype), x
        z = _product(x, M)
    return z @ E, (inputs, z, M, E, factors, _Inputs(x.shape[-1], _sharding(x)))


def _backward(projected: bool, saved: tuple[Any, ...], du: Array) -> tuple[Array, Factors]:
    """``dz = du E^T``, ``dx = dz M^T``, ``dM = x^T dz``, ``dE = z^T du``; projected, ``dB = (x A)^T dz``."""
    inputs, z, M, E, factors, x = saved
    if projected:
        M = contract(factors).astype(du.dtype)
    dz = jnp.matmul(du, E.T, out_sharding=_sharding(z))
    dx = jnp.matmul(dz, M[: x.width].T, out_sharding=x.sharding)
    leading = tuple(range(du.ndim - 1))
    rows = factors.B if projected else M[: x.width]
    # Sums over all tokens: in half precision the products are rounded, the sums are not. On the CPU dz^T x costs
    # a quarter to a half of x^T dz, into which XLA would turn it back but for the barrier.
    dM_t: Array = jax.lax.optimization_barrier(  # type: ignore[no-untyped-call]
        _contracted(dz, inputs, leading, _sharding(rows.T))
    )
    dM = dM_t.T
    if not projected and M.shape[0] > x.width:
        dM = jnp.concatenate([dM, jnp.sum(dz, axis=leading, dtype=dM.dtype)[None, :]])
    dE = _contracted(z, du, leading, _sharding(E))
    dB, dC = factor_gradients(dM, dE, factors, projected=projected)
    return dx, Factors(None, dB, dC, None, None, None)


_update.defvjp(_forward, _backward)


def _product(x: Array, M: Array) -> Array:
    """``z = x M``, always finite; the bias row of M is added, where a column of ones would copy x.

    Where a sum overflows, infinity or NaN (infinity less infinity) times C = 0 would be NaN, and the output not
    the base's. A NaN of the input still shows, through the base's product.
    """
    d = x.shape[-1]
    z = jnp.matmul(x, M[:d], preferred_element_type=_accumulator(x))
    if M.shape[0] > d:
        z = z + jnp.expand_dims(M[d], range(z.ndim - 1))
    return jnp.nan_to_num(z.astype(x.dtype))


def _contracted(left: Array, right: Array, leading: tuple[int, ...], sharding: Any) -> Array:
    wide = _accumulator(left)
    return jnp.tensordot(left, right, (leading, leading), preferred_element_type=wide, out_sharding=sharding)


def _sharding(array: Array) -> Any:
    """Return how an array is spread over mesh axes of type Explicit; None where XLA decides.

    A sum over such an axis needs to be told how its result is spread: a gradient is as its namesake is.
    """
    sharding = jax.typeof(array).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def _accumulator(array: Array) -> Any:
    return jnp.promote_types(array.dtype, jnp.float32)
