"""Quantities that the paper analyses: Z*, how well the subspaces fit a weight, the bound of Theorem 1.

They serve analysis only. Training and applying an adapter do not need them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from adamss.core._array import Array, device, namespace, one_hot
from adamss.core.counting import subspace_costs
from adamss.core.decomposition import Decomposition, effective_coordinates
from adamss.core.factors import Factors, column_index
from adamss.core.linear import expand
from adamss.core.spectral import laplacian_spectrum
from adamss.errors import ConfigError

__all__ = [
    "block_diagonality",
    "cell_means",
    "count_trainable_bound",
    "generalisation_bound",
    "inside_over_between",
    "laplacian_spectrum",
    "lowest_rank_representation",
    "ordering",
    "spectral_norms",
    "subspace_energy",
]


def lowest_rank_representation(decomposition: Decomposition) -> Array:
    """Return the lowest-rank representation of the columns of ``W_hat`` by each other.

    ``Z* = V V^T`` is the matrix of least nuclear norm that satisfies ``W_hat = W_hat Z``. The columns of V are the
    right singular vectors of the non-zero singular values. If the columns of ``W_hat`` come from independent
    subspaces, ``Z*`` is block diagonal once they are ordered by subspace.

    Parameters
    ----------
    decomposition
        Truncated SVD of the weight, as `decompose` returns it.

    Returns
    -------
    Array
        ``Z*`` of shape (n, n), a projection. It is zero for a zero matrix.

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
    """Measure how much of a representation lies within the subspaces.

    The measure is the sum of ``Z_ij^2`` over all pairs with ``labels_i = labels_j``, divided by ``||Z||_F^2``. It
    is 1 for a block diagonal matrix (and for a zero matrix), and about ``1 / K`` for labels that are unrelated to Z.

    Parameters
    ----------
    Z
        Representation of shape (n, n), real floating point.
    labels
        Subspace of each column, integers of shape (n,).

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


def inside_over_between(Z: Array, labels: Array) -> Array:
    """Compare the entries of a representation within subspaces with those between subspaces.

    The result is the mean of ``|Z_ij|`` over pairs i != j with ``labels_i = labels_j``, divided by the mean over
    pairs with ``labels_i != labels_j``. It is about 1 for labels that are unrelated to Z, and infinite for a block
    diagonal matrix.

    Parameters
    ----------
    Z
        Representation of shape (n, n), real floating point.
    labels
        Integers of shape (n,).

    Returns
    -------
    Array
        A scalar. It is NaN if one of the two means has no entries, or if both means are zero.

    Examples
    --------
    >>> import numpy as np
    >>> Z = np.asarray([[1.0, 0.5, 0.1], [0.5, 1.0, 0.1], [0.1, 0.1, 1.0]])
    >>> round(float(inside_over_between(Z, np.asarray([0, 0, 1]))), 6)
    5.0
    """
    xp = namespace(Z, labels)
    columns = xp.arange(Z.shape[0], device=device(Z))
    same = labels[:, None] == labels[None, :]
    sizes = xp.abs(_normalised(Z))

    def mean(chosen: Array) -> Array:
        number = xp.sum(xp.astype(chosen, Z.dtype))
        total = xp.sum(xp.where(chosen, sizes, xp.zeros_like(sizes)))
        return total / xp.where(number > 0, number, xp.full_like(number, math.nan))

    inside = mean(xp.logical_and(same, columns[:, None] != columns[None, :]))
    between = mean(xp.logical_not(same))
    without = xp.where(inside > 0, xp.full_like(inside, math.inf), xp.full_like(inside, math.nan))
    return xp.where(between == 0, without, inside / xp.where(between == 0, xp.ones_like(between), between))


def cell_means(Z: Array, cells: int) -> Array:
    """Return the means of a square matrix over the cells of a grid, for pictures of a large matrix.

    ``M_ab`` is the mean of ``Z_ij`` over i in cell a and j in cell b, where column i belongs to cell
    ``floor(i cells / n)``.

    Parameters
    ----------
    Z
        Matrix of shape (n, n), real floating point.
    cells
        Largest number of cells on a side. Z itself is returned if n is not larger.

    Returns
    -------
    Array
        Array of shape (m, m) with ``m = min(n, cells)``.

    Examples
    --------
    >>> import numpy as np
    >>> cell_means(np.asarray([[1.0, 3.0, 0.0], [5.0, 7.0, 0.0], [2.0, 4.0, 9.0]]), 2).tolist()
    [[4.0, 0.0], [3.0, 9.0]]
    """
    n = Z.shape[0]
    if n <= cells:
        return Z
    xp = namespace(Z)
    members = one_hot(xp.arange(n, device=device(Z)) * cells // n, cells, dtype=Z.dtype)
    means = members / xp.sum(members, axis=0)
    return means.T @ Z @ means


def subspace_energy(decomposition: Decomposition, labels: Array, subspaces: int) -> Array:
    """Return each subspace's share of the energy of the weight.

    ``e_k = ||W_hat[:, I_k]||_F^2 / ||W_hat||_F^2 = ||V_k diag(S)||_F^2 / ||S||^2``.

    Parameters
    ----------
    decomposition
        Truncated SVD of the weight, as `decompose` returns it.
    labels
        Subspace of each column, integers of shape (n,) in ``0 .. subspaces - 1``.
    subspaces
        Number K of subspaces.

    Returns
    -------
    Array
        Shares of shape (K,). They sum to 1, or to 0 for a zero matrix.

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
    """Return the permutation that sorts the columns by subspace and keeps their order within each subspace.

    Parameters
    ----------
    labels
        Subspace of each column, integers of shape (n,).

    Returns
    -------
    Array
        Integers of shape (n,) such that ``labels[ordering(labels)]`` is ascending.

    Examples
    --------
    >>> import numpy as np
    >>> ordering(np.asarray([1, 0, 1, 0])).tolist()
    [1, 3, 0, 2]
    """
    return namespace(labels).argsort(labels, stable=True)


def count_trainable_bound(sizes: Iterable[int], ranks: Iterable[int], basis_ranks: Iterable[int]) -> int:
    """Return the paper's upper bound ``q max_k (n_k + R_k)`` on `count_trainable` (the paper writes r for q).

    Parameters
    ----------
    sizes, ranks, basis_ranks
        As for `count_trainable`.

    Returns
    -------
    int
        The bound, which is at least the result of `count_trainable`.

    Raises
    ------
    ConfigError
        As for `count_trainable`.
    """
    sizes, ranks, basis_ranks = list(sizes), list(ranks), list(basis_ranks)
    widths = subspace_costs(sizes, [1] * len(ranks), basis_ranks)
    return sum(int(rank) for rank in ranks) * max(widths, default=0)


def generalisation_bound(
    empirical_loss: float,
    *,
    spectral_norms: Iterable[float],
    ranks: Iterable[int],
    sizes: Iterable[int],
    input_norm: float,
    samples: int,
    confidence: float = 0.95,
    L_g: float = 1.0,
    L_phi: float = 1.0,
) -> float:
    """Return an upper bound on the expected loss that holds with the given probability.

    With probability ``1 - delta``::

        E[loss] <= empirical_loss + sqrt(L_g pi) L_phi sum_k Rx beta_k sqrt(r_k n_k / m)
                   + sqrt(9 log(2 / delta) / (2 m))

    Parameters
    ----------
    empirical_loss
        Mean loss over the m samples.
    spectral_norms
        Bounds beta_k on the spectral norms of B_k C_k, one per subspace. The function `spectral_norms` computes
        the norms.
    ranks
        Trained ranks r_k, one per subspace.
    sizes
        Numbers of columns n_k, one per subspace.
    input_norm
        Largest Euclidean norm Rx of an input.
    samples
        Number m of samples.
    confidence
        Probability ``1 - delta``, in (0, 1).
    L_g, L_phi
        Constants of the loss in the theorem.

    Returns
    -------
    float
        The bound.

    Raises
    ------
    ConfigError
        If a number is out of range, or the three sequences differ in length.

    References
    ----------
    .. [1] Zheng et al., "Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning",
       NeurIPS 2025, Theorem 1.

    Examples
    --------
    >>> from adamss.core.analysis import generalisation_bound
    >>> round(generalisation_bound(0.1, spectral_norms=[1.0, 0.5], ranks=[1, 1], sizes=[50, 50],
    ...                            input_norm=1.0, samples=10_000), 4)
    0.3287
    """
    beta, r, n = [float(b) for b in spectral_norms], [int(k) for k in ranks], [int(k) for k in sizes]
    if not len(beta) == len(r) == len(n):
        raise ConfigError(
            "spectral_norms, ranks and sizes must have one entry per subspace, "
            f"found {len(beta)}, {len(r)} and {len(n)}"
        )
    if not 0.0 < confidence < 1.0:
        raise ConfigError(f"confidence must lie between 0 and 1, found {confidence}")
    if samples < 1:
        raise ConfigError(f"samples must be at least 1, found {samples}")
    for name, values in (
        ("spectral_norms", beta),
        ("ranks", r),
        ("sizes", n),
        ("input_norm, L_g and L_phi", [input_norm, L_g, L_phi]),
    ):
        if any(not value >= 0 for value in values):
            raise ConfigError(f"{name} must not be negative or NaN, found {values}")
    capacity = sum(b * math.sqrt(rank * size) for b, rank, size in zip(beta, r, n, strict=True))
    complexity = math.sqrt(L_g * math.pi) * L_phi * input_norm * capacity / math.sqrt(samples)
    deviation = math.sqrt(9.0 * math.log(2.0 / (1.0 - confidence)) / (2.0 * samples))
    return float(empirical_loss) + complexity + deviation


def spectral_norms(factors: Factors) -> Array:
    """Return ``|B_k C_k|_2``, the largest singular value of the trained product of each subspace.

    Parameters
    ----------
    factors
        Factors of one layer.

    Returns
    -------
    Array
        Spectral norms of shape (K,), floating point.
    """
    xp = namespace(factors.B)
    group, _ = column_index(factors)
    E = expand(factors)
    subspaces = xp.arange(factors.ranks.shape[0], dtype=group.dtype, device=device(factors.B))
    own = (group[None, :] == subspaces[:, None])[:, None, :]
    blocks = xp.where(own, factors.B[None, :, :], xp.zeros_like(factors.B[None, :, :]))
    return xp.linalg.matrix_norm(blocks @ E, ord=2)


def _normalised(array: Array) -> Array:
    """Divide by the largest magnitude, so that the squares neither overflow nor all vanish."""
    xp = namespace(array)
    largest = xp.max(xp.abs(array))
    return array / xp.where(largest > 0, largest, xp.ones_like(largest))
