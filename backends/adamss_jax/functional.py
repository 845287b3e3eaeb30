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

from adamss.core import Factors, cheapest_order, contract, expand, factor_gradients
from adamss.core.cost import check_order, device_balance
from adamss.core.factors import HEADROOM

__all__ = ["linear", "update"]

FLOAT16_MAX = 65504.0


def linear(
    x: Array, kernel: Array, bias: Array | None, factors: Factors, *, order: str | None = None
) -> Array:
    """Return ``x @ (kernel + delta) + bias`` without forming delta.

    ``y = (x @ kernel + bias) + (x @ M) @ E`` with ``M = [A_k B_k]`` and E the expansion of C, or
    ``((x @ A) @ B) @ E`` where that costs less. The base product is that of the frozen layer, to the bit.

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
    y = x @ kernel if bias is None else x @ kernel + bias
    return y + update(x.astype(y.dtype), factors, order=order)


def update(
    x: Array,
    factors: Factors | None,
    constant: tuple[Array, Array] | None = None,
    *,
    order: str | None = None,
) -> Array:
    """Return ``(x @ M) @ E``, what the adapter adds to the output of its frozen layer.

    With `constant` it is ``(x @ [M, M']) @ [E; E']``. Kept for the backward are x and ``x @ M``, not ``x @ M'``;
    without `factors` neither of them. With the order ``"input_first"`` it is ``((x @ A) @ B) @ E``, and ``x @ A`` is
    kept for x.

    Parameters
    ----------
    x
        Inputs (..., d), in the dtype of the output.
    factors
        Factors of the layer, or of its trained subspaces alone, where a label of -1 marks the columns of the others;
        None if none is trained.
    constant
        M' (d, q') and E' (q', n) of subspaces that get no gradient; d + 1 rows where the bias is adapted too. None if
        there are none; one of the two there must be.
    order
        In which order the products are taken, one of `adamss.core.ORDERS`. None for the one that costs less, by
        the shapes: ``"input_first"`` for few tokens, ``"factors_first"`` for many; an x of one axis counts as many,
        since under ``vmap`` nothing tells how many there are. Without a basis that all subspaces share, or with
        `constant`, it is always ``"factors_first"``. Like a shape it is a constant of compiled functions.

    Returns
    -------
    Array
        (..., n), in the dtype of x. With C = 0 it is zero for every finite x.

    Raises
    ------
    ConfigError
        If the order is unknown.
    """
    check_order(order)
    if factors is None or factors.A.shape[0] > 1 or constant is not None:
        order = "factors_first"
    elif order is None:
        order = _cheapest(x, factors)
    result: Array = _update(x, factors, constant, order == "input_first")
    return result


def _cheapest(x: Array, factors: Factors) -> str:
    if x.ndim == 1:
        return "factors_first"
    # Whether there will be a backward JAX does not say. For the few tokens of decoding it makes no difference.
    return cheapest_order(
        tokens=math.prod(x.shape[:-1]),
        d=x.shape[-1],
        n=factors.labels.shape[0],
        rank=factors.A.shape[2],
        directions=factors.B.shape[1],
        balance=device_balance(x.dtype.itemsize, cpu=jax.default_backend() == "cpu"),
    )


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _update(
    x: Array, factors: Factors | None, constant: tuple[Array, Array] | None, projected: bool
) -> Array:
    u, _ = _forward(x, factors, constant, projected)
    return u


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Layout:
    """What the backward knows of x and z where they are not kept: the width d, and how each is spread."""

    width: int
    inputs: Any
    directions: Any


def _forward(
    x: Array, factors: Factors | None, constant: tuple[Array, Array] | None, projected: bool
) -> tuple[Array, tuple[Any, ...]]:
    scale = _headroom(x)
    if projected:
        assert factors is not None
        M, E = None, expand(factors).astype(x.dtype)
        inputs = _directions(x, factors.A[0].astype(x.dtype) * scale)
        z = _directions(inputs, factors.B.astype(x.dtype))
    else:
        M, E = _directions_and_columns(factors, constant, x.dtype)
        inputs, z = x, _directions(x, M * scale)
    layout = _Layout(x.shape[-1], _sharding(x), _sharding(z))
    kept = None if factors is None else (inputs, z[..., : factors.B.shape[-1]])
    return z @ (E * (1 / scale)), (kept, M, E, factors, layout)


def _backward(projected: bool, saved: tuple[Any, ...], du: Array) -> tuple[Array, Factors | None, None]:
    """``dz = du E^T``, ``dx = dz M^T``, ``dM = x^T dz``, ``dE = z^T du``; z was kept with its headroom.

    Projected, ``dB = (x A)^T dz``; ``x A`` was kept with its headroom too.
    """
    kept, M, E, factors, layout = saved
    d = layout.width
    if projected:
        M = contract(factors).astype(du.dtype)
    dz = jnp.matmul(du, E.T, out_sharding=layout.directions)
    dx = jnp.matmul(dz, M[:d].T, out_sharding=layout.inputs)
    if factors is None:
        return dx, None, None
    (inputs, z), leading = kept, tuple(range(du.ndim - 1))
    q = z.shape[-1]
    dz, M, E = dz[..., :q], M[:, :q], E[:q]
    rows = factors.B if projected else M[:d]
    # Sums over all tokens: in half precision the products are rounded, the sums are not. On the CPU dz^T x costs
    # a quarter to a half of x^T dz, into which XLA would turn it back but for the barrier.
    dM_t: Array = jax.lax.optimization_barrier(  # type: ignore[no-untyped-call]
        _contracted(dz, inputs, leading, _sharding(rows.T))
    )
    dM, scale = dM_t.T, _headroom(du)
    if projected:
        dM = dM * (1 / scale)
    elif M.shape[0] > d:
        dM = jnp.concatenate([dM, jnp.sum(dz, axis=leading, dtype=dM.dtype)[None, :]])
    dE = _contracted(z, du, leading, _sharding(E)) * (1 / scale)
    dB, dC = factor_gradients(dM, dE, factors, projected=projected)
    return dx, Factors(None, dB, dC, None, None, None), None


_update.defvjp(_forward, _backward)


def _directions_and_columns(
    factors: Factors | None, constant: tuple[Array, Array] | None, dtype: Any
) -> tuple[Array, Array]:
    """Return ``[M, M']`` and ``[E; E']``."""
    if factors is None:
        assert constant is not None
        return constant[0].astype(dtype), constant[1].astype(dtype)
    M, E = contract(factors), expand(factors)
    if constant is not None:
        M, E = jnp.concatenate([M, constant[0]], axis=1), jnp.concatenate([E, constant[1]])
    return M.astype(dtype), E.astype(dtype)


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
