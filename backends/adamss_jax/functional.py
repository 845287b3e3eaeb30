"""The update of a linear layer as a pure function with a custom gradient.

The forward pass and its gradients are a few skinny matrix products, whatever K is. `Factors` are a pytree, so
``jit``, ``vmap``, ``remat`` and ``scan`` over stacked layers work without further code. Arrays have the paper's
orientation, which is also JAX's: ``kernel: (d, n)``, ``y = x @ kernel + bias``.
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

    ``y = (x @ kernel + bias) + (x @ M) @ E`` with ``M = [A_k B_k]`` and E the expansion of C, or with
    ``((x @ A) @ B) @ E`` where that costs less. The base product equals the frozen layer's bit for bit, and the
    updates of the adapters are added to it one after the other.

    Parameters
    ----------
    x
        Inputs (..., d), real floating point.
    kernel
        Frozen weight (d, n).
    bias
        Bias (n,), or None.
    factors
        Factors of the layer, one argument for each adapter. Only B and C are trained. If A has d + 1 rows, the last
        row updates the bias. Factors may be sharded over mesh axes of type Auto, which XLA manages; they must be
        replicated over axes of type Explicit.
    order
        See `update`.

    Returns
    -------
    Array
        Output (..., n), in the dtype of ``x @ kernel + bias``. It can be differentiated in reverse mode with respect
        to x, kernel, bias, B and C. A, labels, ranks and active are constants: their gradient is zero.

    Raises
    ------
    ConfigError
        If `order` is unknown.
    TypeError
        Raised by JAX under forward-mode differentiation (``jax.jvp``, ``jax.jacfwd``), which a function with a custom
        reverse-mode gradient does not support.

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
    """Return ``(x @ M) @ E``, which the adapter adds to the output of its frozen layer.

    The forward pass keeps x and ``x @ M`` for the backward pass. With the order ``"input_first"`` the update is
    ``((x @ A) @ B) @ E``, and ``x @ A`` is kept instead of x.

    Parameters
    ----------
    x
        Inputs (..., d), in the dtype of the output.
    factors
        Factors of the layer or of some of its subspaces. A label of -1 marks the columns of all other subspaces.
    order
        Order of the products, one of `adamss.core.cost.ORDERS`. None chooses the cheaper order from the shapes:
        ``"input_first"`` for few tokens, ``"factors_first"`` for many. An x with one axis counts as many tokens,
        because their number is hidden under ``vmap``. The order is always ``"factors_first"`` if the subspaces do not
        share one basis. Like a shape, the order is a static constant of compiled functions.

    Returns
    -------
    Array
        Update (..., n), in the dtype of x. If C = 0 it is zero for every x, since overflow in ``x @ M`` is replaced
        by finite numbers.

    Raises
    ------
    ConfigError
        If `order` is unknown.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, adamss_jax
    >>> from adamss import core
    >>> kernel = jax.random.normal(jax.random.key(0), (6, 8))
    >>> decomposition = core.decompose(kernel, 4)
    >>> factors = core.initial_factors(decomposition, core.segment(decomposition, 3), 1)
    >>> factors, x = factors._replace(C=jnp.ones((1, 8))), jnp.ones((2, 6))
    >>> bool(jnp.allclose(adamss_jax.update(x, factors), x @ core.delta(factors), atol=1e-5))
    True
    """
    check_order(order)
    if factors.A.shape[0] > 1:
        order = "factors_first"
    elif order is None:
        order = _cheapest(x, factors)
    result: Array = _update(x, with_constants(factors), order == "input_first")
    return result


def with_constants(factors: Factors) -> Factors:
    """Return factors that pass gradients, of any order, only to B and C of the active subspaces."""
    numbers = (factors.A, factors.B, factors.C)
    if all(isinstance(array, Array) and not isinstance(array, jax.core.Tracer) for array in numbers):
        return factors  # nothing is differentiated, so the operations below need not be compiled
    masks = trained_elements(factors)
    B, C = (
        jnp.where(mask, array, jax.lax.stop_gradient(array))
        for mask, array in zip(masks, (factors.B, factors.C), strict=True)
    )
    return factors._replace(A=jax.lax.stop_gradient(factors.A), B=B, C=C)


def _cheapest(x: Array, factors: Factors) -> str:
    if x.ndim == 1 or not all(isinstance(size, int) for size in x.shape):
        return "factors_first"  # the number of tokens is unknown: `jax.export` traces with symbolic sizes
    # Count a backward pass always, because JAX does not tell whether one will follow. For the few tokens of decoding
    # the choice is the same without it.
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
    """Width d and sharding of the inputs, for a backward pass for which only ``x A`` was kept."""

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
    """Return the gradients of x and the factors, given du.

    ``dz = du E^T``, ``dx = dz M^T``, ``dM = x^T dz`` and ``dE = z^T du``; if projected, ``dB = (x A)^T dz``.
    """
    inputs, z, M, E, factors, x = saved
    if projected:
        M = contract(factors).astype(du.dtype)
    dz = jnp.matmul(du, E.T, out_sharding=_sharding(z))
    dx = jnp.matmul(dz, M[: x.width].T, out_sharding=x.sharding)
    leading = tuple(range(du.ndim - 1))
    rows = factors.B if projected else M[: x.width]
    # The sums run over all tokens and are therefore accumulated in float32, also in half precision. On the CPU dz^T x
    # takes a quarter to half the time of x^T dz; without the barrier XLA would rewrite the former into the latter.
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
    """Return ``z = x M`` with every entry finite.

    A sum that overflows gives infinity, or NaN as infinity minus infinity. Either times C = 0 is NaN, so the output
    would differ from the base's. A NaN in the input still reaches the output through the base product.

    A bias row of M is added to z, because appending a column of ones to x would copy x.
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
    """Return the sharding of an array over mesh axes of type Explicit; None where XLA decides.

    A sum over an Explicit axis must be given the sharding of its result. A gradient is sharded like the array that it
    belongs to.
    """
    sharding = jax.typeof(array).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def _accumulator(array: Array) -> Any:
    return jnp.promote_types(array.dtype, jnp.float32)
