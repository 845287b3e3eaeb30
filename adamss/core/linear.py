"""The linear layer with an update, its gradients, and merging the update into the weight.

The update of a weight ``W: (d, n)`` is ``delta = M @ E``, where ``M = [A_1 B_1 ... A_K B_K]: (d, q)`` and
``E: (q, n)`` is the block-structured expansion of C. It is computed by a few matrix products, whatever K is.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from adamss.core._array import (
    Array,
    as_working_precision,
    check_concrete,
    compiled_as_one,
    device,
    namespace,
    one_hot,
)
from adamss.core.factors import Factors, column_index, positions, trained_elements
from adamss.errors import ArrayValueError

__all__ = [
    "Gradients",
    "Merged",
    "contract",
    "delta",
    "expand",
    "factor_gradients",
    "linear",
    "linear_vjp",
    "merge",
]


class Gradients(NamedTuple):
    """Gradients of a scalar with respect to x, B and C, each of the same shape as the array itself.

    Examples
    --------
    >>> import numpy as np
    >>> from adamss import core
    >>> factors = core.Factors(np.ones((1, 2, 1)), np.ones((1, 1)), np.asarray([[2.0, 3.0]]),
    ...                        np.asarray([0, 0]), np.asarray([1]), np.asarray([True]))
    >>> gradients = core.linear_vjp(np.ones((1, 2)), np.asarray([[1.0, 2.0]]), np.eye(2), factors)
    >>> gradients.x.tolist(), gradients.B.tolist(), gradients.C.tolist()
    ([[6.0, 6.0]], [[15.0]], [[3.0, 3.0]])
    """

    x: Array
    B: Array
    C: Array


class Merged(NamedTuple):
    """A weight that contains the update, and the bias.

    Attributes
    ----------
    W
        Merged weight (d, n), in the dtype of the base weight.
    b
        Merged bias (n,), or None if the layer has no bias.
    lost
        Share of the update that is lost by rounding to the dtype of W0,
        ``|round(W0 + delta) - (W0 + delta)| / |delta|`` in Frobenius norm. 0-d floating-point array, 0 for a zero
        update.

    Examples
    --------
    >>> import numpy as np
    >>> from adamss import core
    >>> factors = core.Factors(np.ones((1, 2, 1)), np.ones((1, 1)), np.asarray([[2.0, 3.0]]),
    ...                        np.asarray([0, 0]), np.asarray([1]), np.asarray([True]))
    >>> W0 = np.eye(2, dtype=np.float16)
    >>> core.merge(W0, None, factors).W.tolist()
    [[3.0, 3.0], [2.0, 4.0]]
    >>> small = factors._replace(C=1e-4 * factors.C)  # too small to change the ones in float16
    >>> round(float(core.merge(W0, None, small).lost), 2)
    0.71
    """

    W: Array
    b: Array | None
    lost: Array


def contract(factors: Factors) -> Array:
    """Return ``M = [A_1 B_1 ... A_K B_K]``, the input directions of the update.

    Parameters
    ----------
    factors
        Factors of one layer.

    Returns
    -------
    Array
        M, of shape (d, q), or (d + 1, q) if the bias is adapted too, in the dtype of B.
    """
    if factors.A.shape[0] == 1:
        return factors.A[0, :, :] @ factors.B
    return _from_subspaces(_in_bases(factors.A, _per_subspace(factors.B, factors)), factors)


def expand(factors: Factors) -> Array:
    """Return E, the block-structured form of C.

    ``E[c, j] = C[i, j]`` if column c of M is the i-th column of subspace ``labels[j]``, else ``E[c, j] = 0``.

    Parameters
    ----------
    factors
        Factors of one layer.

    Returns
    -------
    Array
        E, of shape (q, n), in the dtype of C.

    Examples
    --------
    >>> import numpy as np
    >>> from adamss.core import Factors, expand
    >>> expand(Factors(np.ones((1, 2, 2)), np.ones((2, 3)), np.asarray([[1., 2., 3.], [4., 5., 6.]]),
    ...                np.asarray([0, 1, 0]), np.asarray([2, 1]), np.asarray([True, True])))
    array([[1., 0., 3.],
           [4., 0., 6.],
           [0., 2., 0.]])
    """
    return _expand(factors.C, factors.labels, factors.ranks, q=factors.B.shape[1])


@compiled_as_one
def _expand(C: Array, labels: Array, ranks: Array, *, q: int) -> Array:
    xp = namespace(C)
    group, place = positions(ranks, q=q, highest=C.shape[0])
    rows = C if C.shape[0] == 1 else xp.take(C, place, axis=0)
    return xp.where(_own_columns(labels, group), rows, xp.zeros_like(rows))


def delta(factors: Factors) -> Array:
    """Return the update ``sum_k A_k B_k C_k``, where each term fills the columns of its subspace.

    Parameters
    ----------
    factors
        Factors of one layer.

    Returns
    -------
    Array
        Update of shape (d, n), or (d + 1, n) if the bias is adapted too (its update is the last row), in the dtype
        of B.
    """
    return contract(factors) @ expand(factors)


def linear(x: Array, W: Array, b: Array | None, *factors: Factors, route: Array | None = None) -> Array:
    """Return ``x @ (W + sum of delta) + b`` without forming delta.

    ``y = (x @ W + b) + (x @ M) @ E``, in the dtype of ``x @ W``. The base product is bit for bit that of the frozen
    layer, because the updates are added to it one after the other.

    Parameters
    ----------
    x
        Inputs, (..., d).
    W
        Frozen weight, (d, n).
    b
        Bias (n,) or None.
    factors
        Factors of the layer, one set per adapter. If they have d + 1 input rows, the last row adapts the bias.
    route
        Integers that broadcast against x without its last axis. Each is the number of the one set of factors whose
        update is added at that position; a negative number adds none. None adds the updates of all sets everywhere.

    Returns
    -------
    Array
        Outputs, (..., n).
    """
    xp = namespace(x, W)
    y = x @ W if b is None else x @ W + b
    wide = as_working_precision(y).dtype
    for number, each in enumerate(factors):
        M, E = xp.astype(contract(each), wide), xp.astype(expand(each), wide)
        z = _directions(xp.astype(x, wide), M)
        z = z if route is None else xp.where((route == number)[..., None], z, xp.zeros_like(z))
        y = y + xp.astype(z @ E, y.dtype)
    return y


def linear_vjp(dy: Array, x: Array, W: Array, factors: Factors, *, revive: bool = False) -> Gradients:
    """Return the gradients of `linear` with respect to x, B and C in closed form.

    With ``z = x M`` and ``dz = dy E^T``::

        dx = dy W^T + dz M^T,   dB_k = A_k^T (x^T dz)_k,   dC = (z^T dy) restricted to the blocks of E

    Parameters
    ----------
    dy
        Gradient of the output, (..., n).
    x
        Inputs of the forward product, (..., d).
    W
        Frozen weight, (d, n).
    factors
        Factors of the layer.
    revive
        Whether frozen subspaces get gradients too, so that they can return. If False, their gradients are zero.

    Returns
    -------
    Gradients
        Gradients of the shapes of x, B and C. Those of B and C have the dtypes of B and C.
    """
    xp = namespace(dy, x, W)
    d, n = W.shape
    dy2, x2 = xp.reshape(dy, (-1, n)), xp.reshape(x, (-1, d))
    M = xp.astype(contract(factors), dy.dtype)
    E = xp.astype(expand(factors), dy.dtype)
    z, dz = _directions(x2, M), dy2 @ xp.matrix_transpose(E)
    dx = dy2 @ xp.matrix_transpose(W) + dz @ xp.matrix_transpose(M[:d, :])
    dM = xp.matrix_transpose(x2) @ dz
    if M.shape[0] > d:
        dM = xp.concat([dM, xp.sum(dz, axis=0, keepdims=True)], axis=0)
    dB, dC = factor_gradients(dM, xp.matrix_transpose(z) @ dy2, factors, revive=revive)
    return Gradients(xp.reshape(dx, x.shape), dB, dC)


def factor_gradients(
    dM: Array, dE: Array, factors: Factors, *, revive: bool = False, projected: bool = False
) -> tuple[Array, Array]:
    """Return the gradients of B and C, in their dtypes, from those of M = [A_k B_k] and E = expand(C).

    Parameters
    ----------
    dM
        Gradient of M, (d, q), or (d + 1, q) if the bias is adapted too.
    dE
        Gradient of E, (q, n).
    factors
        Factors of the layer.
    revive
        Whether frozen subspaces get gradients too, so that they can return. If False, their gradients are zero.
    projected
        Whether `dM` is already the gradient of B, (P, q).
    """
    xp = namespace(dM)
    dB = xp.astype(dM, factors.B.dtype)
    if not projected:
        dB = _contract_vjp(dB, factors)
    dC = _expand_vjp(xp.astype(dE, factors.C.dtype), factors)
    if revive:
        return dB, dC
    trained_B, trained_C = trained_elements(factors)
    return xp.where(trained_B, dB, xp.zeros_like(dB)), xp.where(trained_C, dC, xp.zeros_like(dC))


def merge(W: Array, b: Array | None, *factors: Factors) -> Merged:
    """Return ``round(W + sum of delta)`` and the share of the sum that is lost by rounding to the dtype of W.

    The sums are computed in the widest of float32 and the dtypes of W and the factors.

    Parameters
    ----------
    W
        Base weight, (d, n).
    b
        Base bias (n,) or None.
    factors
        Factors of the layer, one set per adapter.

    Returns
    -------
    Merged
        Merged weight and bias in the dtypes of W and b, and the lost share.

    Raises
    ------
    ArrayTypeError
        If an array is traced and so has no values.
    ArrayValueError
        If the merged weight or bias is not finite.
    """
    check_concrete(W, b, *(array for each in factors for array in each), name="weight and factors")
    xp = namespace(W)
    d = W.shape[0]
    updates = [
        delta(each._replace(**{name: as_working_precision(getattr(each, name)) for name in "ABC"}))
        for each in factors
    ]
    update = sum((each[:d, :] for each in updates[1:]), start=updates[0][:d, :])
    exact = as_working_precision(W) + update
    merged = xp.astype(exact, W.dtype)
    merged_b = b
    moved = [each[d, :] for each in updates if each.shape[0] > d]
    if moved and b is not None:
        merged_b = xp.astype(sum(moved, start=as_working_precision(b)), b.dtype)
    if not bool(xp.all(xp.isfinite(merged))) or not bool(merged_b is None or xp.all(xp.isfinite(merged_b))):
        raise ArrayValueError("the update holds NaN or infinity, or overflows the weight's dtype: not merged")
    size = xp.linalg.vector_norm(update)
    error = xp.linalg.vector_norm(xp.astype(merged, exact.dtype) - exact)
    lost = xp.where(size > 0, error / xp.where(size > 0, size, xp.ones_like(size)), xp.zeros_like(size))
    return Merged(merged, merged_b, lost)


def _directions(x: Array, M: Array) -> Array:
    """Return ``z = x M`` plus the bias row of M if there is one, with non-finite entries set to zero.

    If x M overflows, infinity times C = 0 would be NaN, and the output would differ from that of the base layer. A
    NaN in the input is not hidden, because the base product contains it too.
    """
    xp, d = namespace(x), x.shape[-1]
    with np.errstate(over="ignore", invalid="ignore"):
        z = x @ M[:d, :]
    z = z if M.shape[0] == d else z + M[d, :]
    return xp.where(xp.isfinite(z), z, xp.zeros_like(z))


def _own_columns(labels: Array, group: Array) -> Array:
    """Return booleans (q, n) that say whether column c of M acts on column j of W."""
    xp = namespace(labels)
    return group[:, None] == xp.astype(labels, group.dtype)[None, :]


def _contract_vjp(dM: Array, factors: Factors) -> Array:
    """Return the gradient (P, q) of B from the gradient (d, q) of M. It is zero at the padding of B."""
    xp = namespace(dM)
    if factors.A.shape[0] == 1:
        return xp.matrix_transpose(factors.A[0, :, :]) @ dM
    return _from_subspaces(_in_bases(xp.matrix_transpose(factors.A), _per_subspace(dM, factors)), factors)


def _expand_vjp(dE: Array, factors: Factors) -> Array:
    """Return the gradient (r, n) of C from the gradient (q, n) of E. It is zero at the padding of C."""
    xp = namespace(dE)
    group, place = column_index(factors)
    own = xp.where(_own_columns(factors.labels, group), dE, xp.zeros_like(dE))
    if factors.C.shape[0] == 1:
        return xp.sum(own, axis=0, keepdims=True)
    return xp.matrix_transpose(one_hot(place, factors.C.shape[0], dtype=dE.dtype)) @ own


def _per_subspace(columns: Array, factors: Factors) -> Array:
    """Rearrange the q columns of an (m, q) array into (K, m, r), with zeros beyond each rank."""
    return _stacked(columns, factors.ranks, highest=factors.C.shape[0])


@compiled_as_one
def _stacked(columns: Array, ranks: Array, *, highest: int) -> Array:
    xp = namespace(columns)
    K, r, q = ranks.shape[0], highest, columns.shape[1]
    ends = xp.cumulative_sum(ranks, axis=0, dtype=ranks.dtype)
    places = xp.arange(r, dtype=ends.dtype, device=device(ends))
    index = (ends - ranks)[:, None] + places[None, :]
    index = xp.minimum(index, xp.full_like(index, q - 1))
    stacked = xp.reshape(xp.take(columns, xp.reshape(index, (-1,)), axis=1), (columns.shape[0], K, r))
    within = places[None, :] < ranks[:, None]
    return xp.permute_dims(xp.where(within[None, :, :], stacked, xp.zeros_like(stacked)), (1, 0, 2))


def _in_bases(bases: Array, stacked: Array) -> Array:
    """Multiply the (K, p, r) stacked matrices by the G bases (G, m, p), each shared by K / G subspaces: (K, m, r)."""
    xp, (K, p, r) = namespace(bases), stacked.shape
    G, m, _ = bases.shape
    if G == K:
        return bases @ stacked
    return xp.reshape(bases[:, None, :, :] @ xp.reshape(stacked, (G, K // G, p, r)), (K, m, r))


def _from_subspaces(stacked: Array, factors: Factors) -> Array:
    """Undo `_per_subspace`: rearrange (K, m, r) into (m, q), with zeros in the columns that are padding."""
    return _side_by_side(stacked, factors.ranks, q=factors.B.shape[1])


@compiled_as_one
def _side_by_side(stacked: Array, ranks: Array, *, q: int) -> Array:
    xp = namespace(stacked)
    K, m, r = stacked.shape
    group, place = positions(ranks, q=q, highest=r)
    index = group * r + place
    index = xp.minimum(index, xp.full_like(index, K * r - 1))
    columns = xp.take(xp.reshape(xp.permute_dims(stacked, (1, 0, 2)), (m, K * r)), index, axis=1)
    return xp.where((group < K)[None, :], columns, xp.zeros_like(columns))
