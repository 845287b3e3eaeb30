"""The update of a linear layer as a pure function with a gradient written by hand.

Forward and both gradients are skinny matrix products, whatever K is; `Factors` are a pytree, so that ``jit``,
``vmap``, ``remat`` and ``scan`` over stacked layers need nothing special. Arrays stay in the paper's orientation,
which is JAX's own: ``kernel: (d, n)``, ``y = x @ kernel + bias``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType

from adamss.core import Factors, contract, expand, factor_gradients
from adamss.core.factors import HEADROOM

__all__ = ["linear", "update"]

FLOAT16_MAX = 65504.0


def linear(x: Array, kernel: Array, bias: Array | None, factors: Factors) -> Array:
    """Return ``x @ (kernel + delta) + bias`` without forming delta.

    ``y = (x @ kernel + bias) + (x @ M) @ E`` with ``M = [A_k B_k]`` and E the expansion of C. The base product is
    that of the frozen layer, to the bit.

    Parameters
    ----------
    x
        Inputs (..., d), real floating point.
    kernel
        Frozen weight (d, n).
    bias
        (n,) or None.
    factors
        Factors of the layer; trained are B and C. With d + 1 input rows, the last of them moves the bias.
        They may be sharded over mesh axes that XLA manages; over axes of type Explicit they are replicated.

    Returns
    -------
    Array
        (..., n), in the dtype of ``x @ kernel + bias``. Differentiable in reverse mode with respect to x,
        kernel, bias, B and C. A, labels, ranks and active are constants: their gradient is zero.

    Raises
    ------
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
    y = x @ kernel if bias is None else x @ kernel + bias
    return y + update(x.astype(y.dtype), factors)


def update(x: Array, factors: Factors) -> Array:
    """Return ``(x @ M) @ E``, what the adapter adds to the output of its frozen layer.

    Parameters
    ----------
    x
        Inputs (..., d), in the dtype of the output.
    factors
        Factors of the layer.

    Returns
    -------
    Array
        (..., n), in the dtype of x. With C = 0 it is zero for every finite x.
    """
    result: Array = _update(x, *factors)
    return result


@jax.custom_vjp
def _update(x: Array, A: Array, B: Array, C: Array, labels: Array, ranks: Array, active: Array) -> Array:
    u, _ = _forward(x, A, B, C, labels, ranks, active)
    return u


def _forward(
    x: Array, A: Array, B: Array, C: Array, labels: Array, ranks: Array, active: Array
) -> tuple[Array, tuple[Any, ...]]:
    factors = Factors(A, B, C, labels, ranks, active)
    M, E = contract(factors).astype(x.dtype), expand(factors).astype(x.dtype)
    scale = _headroom(x)
    z = _directions(x, M * scale)
    return z @ (E * (1 / scale)), (x, z, M, E, factors)


def _backward(saved: tuple[Any, ...], du: Array) -> tuple[Array | None, ...]:
    """``dz = du E^T``, ``dx = dz M^T``, ``dM = x^T dz``, ``dE = z^T du``; z was kept with its headroom."""
    x, z, M, E, factors = saved
    d, leading = x.shape[-1], tuple(range(x.ndim - 1))
    dz = jnp.matmul(du, E.T, out_sharding=_sharding(z))
    dx = jnp.matmul(dz, M[:d].T, out_sharding=_sharding(x))
    # Sums over all tokens: in half precision the products are rounded, the sums are not. On the CPU dz^T x costs
    # a quarter to a half of x^T dz, into which XLA would turn it back but for the barrier.
    dM_t: Array = jax.lax.optimization_barrier(  # type: ignore[no-untyped-call]
        _contracted(dz, x, leading, _sharding(M[:d].T))
    )
    dM = dM_t.T
    if M.shape[0] > d:
        dM = jnp.concatenate([dM, jnp.sum(dz, axis=leading, dtype=dM.dtype)[None, :]])
    dE = _contracted(z, du, leading, _sharding(E)) * (1 / _headroom(x))
    dB, dC = factor_gradients(dM, dE, factors)
    return dx, None, dB, dC, None, None, None


_update.defvjp(_forward, _backward)


def _directions(x: Array, M: Array) -> Array:
    """``z = x M``, the bias row of M added rather than a column of ones appended to x."""
    d = x.shape[-1]
    z = jnp.matmul(x, M[:d], preferred_element_type=_accumulator(x))
    if M.shape[0] > d:
        z = z + M[d]
    if x.dtype == jnp.float16:
        # For want of exponents there is no headroom here; the sum itself has those of float32.
        z = jnp.clip(z, -FLOAT16_MAX, FLOAT16_MAX)
    return z.astype(x.dtype)


def _headroom(x: Array) -> float:
    return 1.0 if x.dtype == jnp.float16 else HEADROOM


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
