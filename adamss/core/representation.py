"""The lowest-rank representation of a weight's columns by one another, and what it says of a segmentation."""

from __future__ import annotations

from adamss.core._array import Array, namespace, one_hot
from adamss.core.decomposition import Decomposition

__all__ = [
    "block_diagonality",
    "effective_coordinates",
    "lowest_rank_representation",
    "ordering",
    "subspace_energy",
]


def effective_coordinates(decomposition: Decomposition) -> Array:
    """Return V with the columns of null directions set to zero.

    A singular value at or below ``eps max(d, n) S[0]`` is rounding. Its singular vector is arbitrary, and
    as long as every other: left in, it would drown the structure of the columns.

    Parameters
    ----------
    decomposition
        As from `decompose`; its arrays may have leading axes.

    Returns
    -------
    Array
        Of shape (..., n, R).
    """
    U, S, V = decomposition
    xp = namespace(V)
    rounding = xp.finfo(S.dtype).eps * max(U.shape[-2], V.shape[-2]) * S[..., :1]
    return V * xp.astype(rounding < S, V.dtype)[..., None, :]


def lowest_rank_representation(decomposition: Decomposition) -> Array:
    """Represent each column of ``W_hat`` by all columns.

    ``Z* = V V^T``, the matrix of least nuclear norm among those with ``W_hat = W_hat Z``, where V has the
    right singular vectors of the non-zero singular values. For columns that come from independent
    subspaces it is block diagonal once they are ordered by subspace.

    Parameters
    ----------
    decomposition
        As from `decompose`.

    Returns
    -------
    Array
        ``Z*`` of shape (n, n), a projection; zero for a zero matrix.

    References
    ----------
    G. Liu, Z. Lin, S. Yan, J. Sun, Y. Yu and Y. Ma, "Robust recovery of subspace structures by low-rank
    representation", IEEE Transactions on Pattern Analysis and Machine Intelligence 35(1), 2013.

    Examples
    --------
    >>> import numpy as np
    >>> from adamss.core import decompose
    >>> W = np.asarray([[2.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    >>> Z = lowest_rank_representation(decompose(W, 3))
    >>> bool(np.allclose(Z, [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]))
    True
    """
    coordinates = effective_coordinates(decomposition)
    return coordinates @ coordinates.T


def block_diagonality(Z: Array, labels: Array) -> Array:
    """Measure how much of a representation stays inside its subspaces.

    ``sum of Z_ij^2 over labels_i = labels_j``, divided by ``||Z||_F^2``: 1 for a block diagonal matrix (and
    for a zero one), about ``1 / K`` for labels that have nothing to do with it.

    Parameters
    ----------
    Z
        Representation of shape (n, n), real floating point.
    labels
        Integers of shape (n,).

    Returns
    -------
    Array
        A scalar in [0, 1].

    Examples
    --------
    >>> import numpy as np
    >>> float(block_diagonality(np.asarray([[1.0, 1.0], [1.0, 1.0]]), np.asarray([0, 1])))
    0.5
    """
    xp = namespace(Z, labels)
    squares = _normalised(Z) ** 2
    outside = xp.astype(labels[:, None] != labels[None, :], Z.dtype)
    total = xp.sum(squares)
    return 1 - xp.sum(squares * outside) / xp.where(total > 0, total, xp.ones_like(total))


def subspace_energy(decomposition: Decomposition, labels: Array, subspaces: int) -> Array:
    """Return each subspace's share of the energy of the weight.

    ``e_k = ||W_hat[:, I_k]||_F^2 / ||W_hat||_F^2 = ||V_k diag(S)||_F^2 / ||S||^2``.

    Parameters
    ----------
    decomposition
        As from `decompose`.
    labels
        Integers of shape (n,), in ``0 .. subspaces - 1``.
    subspaces
        Number K of subspaces.

    Returns
    -------
    Array
        Of shape (K,). The sum is 1, or 0 for a zero matrix.

    Examples
    --------
    >>> import numpy as np
    >>> from adamss.core import decompose
    >>> energy = subspace_energy(decompose(np.diag([1.0, 2.0, 2.0]), 3), np.asarray([0, 1, 1]), 2)
    >>> bool(np.allclose(energy, [1 / 9, 8 / 9]))
    True
    """
    _, S, V = decomposition
    xp = namespace(V, labels)
    columns = xp.sum((V * _normalised(S)) ** 2, axis=1)
    total = xp.sum(columns)
    shares = columns / xp.where(total > 0, total, xp.ones_like(total))
    return one_hot(labels, subspaces, dtype=V.dtype).T @ shares


def ordering(labels: Array) -> Array:
    """Return the permutation that sorts columns by subspace and, within one, leaves them in order.

    Parameters
    ----------
    labels
        Integers of shape (n,).

    Returns
    -------
    Array
        Integers of shape (n,): ``labels[ordering(labels)]`` is ascending.

    Examples
    --------
    >>> import numpy as np
    >>> ordering(np.asarray([1, 0, 1, 0])).tolist()
    [1, 3, 0, 2]
    """
    return namespace(labels).argsort(labels, stable=True)


def _normalised(array: Array) -> Array:
    """Divide by the largest magnitude, so that squares neither over- nor underflow."""
    xp = namespace(array)
    largest = xp.max(xp.abs(array))
    return array / xp.where(largest > 0, largest, xp.ones_like(largest))
