"""The columns of a weight as a graph: its normalised Laplacian, its embedding, the number of its parts.

An affinity ``F_ij >= 0`` between the columns i and j makes them a graph. With the degrees ``D_ii = sum_j F_ij`` its
normalised Laplacian is ``L = I - D^-1/2 F D^-1/2``. L has one eigenvalue 0 for each connected part, and eigenvalues
near 0 for parts that are nearly separate; their eigenvectors show which column belongs to which part.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from adamss.config import SubspaceEstimate
from adamss.core._array import Array, as_numpy, check_concrete, device, eigh, namespace
from adamss.core.decomposition import Decomposition, effective_coordinates
from adamss.errors import ArrayValueError

__all__ = ["directions_of_columns", "estimate_subspaces", "laplacian_spectrum", "spectral_embedding"]

EXACT_COLUMNS = 512
"""Up to so many columns all eigenvectors of the Laplacian are computed; beyond, the wanted ones are searched for."""

LARGEST_FORMED = 10**8
"""Entries of the largest affinity matrix that is kept, 400 MB in float32; larger ones are formed in parts."""

SMALLEST_BLOCK = 16
"""Directions that a search adds at a time; products with fewer cost nearly as much."""

LARGEST_BASIS = 1024
"""Directions after which a search ends, converged or not: eigenvalues that it cannot part bound no clusters."""

BLOCKS = 4
"""Blocks that a search has room for at least; where n columns have not, all eigenvectors are computed."""

EMBEDDING_RESIDUAL = 1e-2
"""Residual ``|L x - s x|`` of an eigenvector x of unit length that is good enough to group columns by.

Planted subspaces under noise are found as well by it as by exact eigenvectors (adjusted Rand index within 0.001)."""

EIGENVALUE_RESIDUAL = 1e-2
"""Residual, over tau, of an eigenvalue that is good enough to be counted. Its error is at most as large.

In float32 and with many columns the rounding unit of n sums may be larger, and is then good enough."""

BOUNDARY_RESIDUAL = 1e-2
"""Residual of the first eigenvalue above tau from which on no other below it is expected: those converge sooner."""


def estimate_subspaces(
    decomposition: Decomposition,
    *,
    tau: float = 0.01,
    minimum: int = 10,
    maximum: int | None = None,
    exponent: float = 2.0,
) -> int:
    """Estimate in how many subspaces the columns of a weight lie.

    With the singular values s_i of the normalised Laplacian of the columns (see `segment`, ``"ncut"``)::

        K = n - round(sum_i f(s_i)),   f(s) = 1 if s >= tau, else log2(1 + (s / tau)^2)

    so that eigenvalues far below tau count one subspace each, those above none, and those between a part of one. K is
    then raised to `minimum` (the paper's K0), and cut to `maximum` and to n.

    Parameters
    ----------
    decomposition
        As from `decompose`, of one weight.
    tau
        Soft threshold, in (0, 1].
    minimum
        K0, at least 1.
    maximum
        Upper bound, at least `minimum`; None for the rank R, or `minimum` where that is more: independent subspaces
        take at least one of the R dimensions each.
    exponent
        Of the affinity, positive.

    Returns
    -------
    int
        K.

    Raises
    ------
    ConfigError, ConfigTypeError
        If a setting is out of range.
    ArrayValueError
        If the decomposition is of several weights.

    Notes
    -----
    Liu et al. prove that the number is right for independent subspaces without noise. It is not robust: a few per
    cent of noise, or subspaces that are disjoint but not independent, join the parts of the graph, and the estimate
    falls to `minimum`. Singular vectors count alike, whatever their singular values: R larger than the rank of the
    signal, in a weight whose noise is mere rounding, lets noise decide.

    References
    ----------
    G. Liu, Z. Lin, S. Yan, J. Sun, Y. Yu and Y. Ma, "Robust recovery of subspace structures by low-rank
    representation", IEEE Transactions on Pattern Analysis and Machine Intelligence 35(1), 2013, algorithm 3.

    Examples
    --------
    >>> import numpy as np
    >>> from adamss.core import decompose
    >>> W = np.kron(np.eye(3), np.ones((2, 4)))  # three groups of four equal columns
    >>> estimate_subspaces(decompose(W, 6), minimum=1)
    3
    """
    settings = SubspaceEstimate(tau=tau, minimum=minimum, maximum=maximum, exponent=exponent)
    check_concrete(*decomposition, name="decomposition")
    check_one(decomposition)
    n, rank = decomposition.V.shape
    largest = settings.maximum if settings.maximum is not None else max(settings.minimum, rank)
    points = directions_of_columns(decomposition)
    counted = math.ceil(_count_subspaces(points, settings.exponent, settings.tau, largest) - 0.5)
    return min(max(settings.minimum, counted), largest, int(n))


def laplacian_spectrum(decomposition: Decomposition, *, exponent: float = 2.0) -> Array:
    """Return all eigenvalues of the normalised Laplacian of the columns of a weight, in ascending order.

    Takes a dense eigensolver of (n, n): minutes for n = 10,000. `estimate_subspaces` needs only the smallest.

    Parameters
    ----------
    decomposition
        As from `decompose`, of one weight.
    exponent
        Of the affinity, positive.

    Returns
    -------
    Array
        Of shape (n,), between 0 and 2. A zero column counts with 1: it belongs to no part of the graph.

    Examples
    --------
    >>> import numpy as np
    >>> from adamss.core import decompose
    >>> spectrum = laplacian_spectrum(decompose(np.kron(np.eye(2), np.ones((1, 2))), 2))
    >>> bool(np.allclose(spectrum, [0, 0, 1, 1]))
    True
    """
    exponent = SubspaceEstimate(exponent=exponent).exponent
    check_one(decomposition)
    eigenvalues, _ = eigh(_similarity(directions_of_columns(decomposition), exponent))
    return 1 - namespace(eigenvalues).flip(eigenvalues)


def check_one(decomposition: Decomposition) -> None:
    """Check that a decomposition is of one weight.

    Raises
    ------
    ArrayValueError
        If its arrays have leading axes.
    """
    if decomposition.V.ndim != 2:
        raise ArrayValueError(
            f"decomposition must be of one weight, found V of shape {tuple(decomposition.V.shape)}; call it for each"
        )


def directions_of_columns(decomposition: Decomposition) -> Array:
    """Return the rows of V at unit length, (..., n, R): only the direction of a column tells its subspace.

    Rows that are zero up to rounding stay zero: zero columns have no direction.
    """
    points = effective_coordinates(decomposition)
    xp = namespace(points)
    length = xp.sqrt(xp.sum(points**2, axis=-1, keepdims=True))
    rounding = xp.finfo(points.dtype).eps * points.shape[-2] * xp.max(length, axis=-2, keepdims=True)
    return xp.where(length > rounding, points / xp.where(length > rounding, length, 1.0), 0.0 * points)


def spectral_embedding(points: Array, exponent: float, count: int, rng: np.random.Generator) -> Array:
    """Return points (n, count) of unit length, one for each column, to be grouped by k-means.

    Point i has what the first eigenvectors of the Laplacian say of column i. Normalised cuts divide it by
    ``sqrt(D_ii)`` (Shi and Malik, 2000), which the unit length (Ng, Jordan and Weiss, 2001) makes immaterial.

    Parameters
    ----------
    points
        x of shape (n, R), where ``F_ij = |<x_i, x_j>|^exponent``.
    exponent
        Of the affinity.
    count
        Number of eigenvectors, at most n.
    rng
        For the directions that a search starts from.
    """
    xp = namespace(points)
    # As many at a time as are wanted: they may all belong to one eigenvalue.
    block = max(SMALLEST_BLOCK, count)
    if _all_at_once(points.shape[0], block):
        _, vectors = eigh(_similarity(points, exponent))
        vectors = vectors[:, -count:]
    else:

        def enough(_: np.ndarray, residuals: np.ndarray) -> bool:
            return bool(residuals[:count].max() <= EMBEDDING_RESIDUAL)

        multiply = _times_similarity(points, exponent)
        _, vectors = _search(points, multiply, block, rng, enough, vectors=count)
    length = xp.sqrt(xp.sum(vectors**2, axis=1, keepdims=True))
    unit: Array = vectors / xp.where(length > 0, length, xp.ones_like(length))
    return unit


def _all_at_once(n: int, block: int) -> bool:
    """Return whether all eigenvectors of n columns are computed, and not searched for in blocks."""
    return n <= max(EXACT_COLUMNS, BLOCKS * block)


def _count_subspaces(points: Array, exponent: float, tau: float, largest: int) -> float:
    """Return ``n - sum_i f(s_i)``; once it has reached `largest`, any number from there on."""
    n, block, rng = points.shape[0], SMALLEST_BLOCK, np.random.default_rng(0)
    close = max(EIGENVALUE_RESIDUAL * tau, n * float(namespace(points).finfo(points.dtype).eps))

    def counted(similarities: np.ndarray) -> float:
        # The eigenvalues of the Laplacian, which is positive semidefinite, are its singular values.
        s = np.clip(1 - similarities, 0, tau)
        return float(np.sum(1 - np.log2(1 + (s / tau) ** 2)))

    def enough(similarities: np.ndarray, residuals: np.ndarray) -> bool:
        small = int(np.sum(similarities > 1 - tau))
        if small >= block:
            return True  # an eigenvalue is found as often as a block has directions: a larger one must tell
        if not np.all(residuals[:small] <= close):
            return False
        away = similarities[small] + residuals[small] <= 1 - tau
        return counted(similarities) >= largest or bool(
            residuals[small] <= (BOUNDARY_RESIDUAL if away else close)
        )

    multiply = None if _all_at_once(n, block) else _times_similarity(points, exponent)
    while multiply is not None and not _all_at_once(n, block):
        similarities, _ = _search(points, multiply, block, rng, enough, vectors=0)
        # The values that a search finds are never above the eigenvalues, so that it never counts too many.
        if np.sum(similarities > 1 - tau) < block or counted(similarities) >= largest:
            return counted(similarities)
        block *= 4
    return counted(as_numpy(eigh(_similarity(points, exponent))[0]))


def _affinity(points: Array, others: Array, exponent: float) -> Array:
    xp = namespace(points)
    products = points @ others.T
    if exponent != 2:
        return xp.abs(products) ** exponent
    # In place, where the framework can: to allocate another (n, n) would take a third of the time.
    products *= products
    return products


def _inverse_roots(degrees: Array) -> Array:
    """Return ``D^-1/2``; 0 for a zero column, which has no affinity, not even to itself."""
    xp = namespace(degrees)
    return xp.where(degrees > 0, 1 / xp.sqrt(xp.where(degrees > 0, degrees, 1.0)), 0.0 * degrees)


def _similarity(points: Array, exponent: float) -> Array:
    """Return ``D^-1/2 F D^-1/2 = I - L``: the largest eigenvalues are the least of L."""
    affinity = _affinity(points, points, exponent)
    root = _inverse_roots(namespace(points).sum(affinity, axis=1))
    return affinity * root[:, None] * root[None, :]


def _times_similarity(points: Array, exponent: float) -> Callable[[Array], Array]:
    """Return ``x -> D^-1/2 F D^-1/2 x`` for x (n, m)."""
    xp = namespace(points)
    multiply = _times_affinity(points, exponent)
    root = _inverse_roots(multiply(xp.ones_like(points[:, :1])))
    return lambda x: root * multiply(root * x)


def _times_affinity(points: Array, exponent: float) -> Callable[[Array], Array]:
    """Return ``x -> F x`` for x (n, m), with F formed, formed part by part, or not formed at all."""
    xp = namespace(points)
    n, rank = points.shape
    if exponent == 2 and n > rank**2:
        # With G = X^T diag(x) X, (F x)_i = sum_j <x_i, x_j>^2 x_j = <x_i, G x_i>: n R^2 products in the place of n^2.
        def through_directions(x: Array) -> Array:
            grams = (points.T @ (points * column[:, None]) for column in xp.unstack(x, axis=1))
            return xp.stack([xp.sum((points @ gram) * points, axis=1) for gram in grams], axis=1)

        return through_directions
    if n * n <= LARGEST_FORMED:
        affinity = _affinity(points, points, exponent)
        return lambda x: affinity @ x
    height = max(1, LARGEST_FORMED // n)
    parts = [points[first : first + height, :] for first in range(0, n, height)]
    return lambda x: xp.concat([_affinity(part, points, exponent) @ x for part in parts], axis=0)


def _search(
    points: Array,
    multiply: Callable[[Array], Array],
    size: int,
    rng: np.random.Generator,
    enough: Callable[[np.ndarray, np.ndarray], bool],
    *,
    vectors: int,
) -> tuple[np.ndarray, Array]:
    """Find the largest eigenvalues of a symmetric operator in a growing block Krylov space (Rayleigh and Ritz).

    The space is kept as its blocks, whose shape stays the same: JAX compiles every operation for each shape that it
    meets. The small projected problem is gathered in NumPy, and solved where the points are: the threads of NumPy's
    linear algebra would wait for work on the cores that those of PyTorch need.

    Parameters
    ----------
    points
        (n, R), for the kind of array.
    multiply
        The operator, on (n, size).
    size
        Directions in a block.
    rng
        For the directions to start from, and for those that go on where the Krylov space ends.
    enough
        Of the eigenvalues so far, in descending order, and their residuals: whether to stop.
    vectors
        Number of eigenvectors to return, at most `size`.

    Returns
    -------
    (m,) and (n, vectors) arrays
        Eigenvalues and eigenvectors, in descending order of the eigenvalues.
    """
    xp = namespace(points)
    n, dtype = points.shape[0], points.dtype
    rounding = float(xp.finfo(dtype).eps)

    def random_directions() -> Array:
        draws = rng.standard_normal((n, size), dtype=np.float32)
        return xp.asarray(draws, dtype=dtype, device=device(points))

    block, _ = xp.linalg.qr(random_directions())
    blocks: list[Array] = []
    gram, looked = np.zeros((0, 0)), 0
    while True:
        blocks.append(block)
        rest = multiply(block)
        borders = [each.T @ rest for each in blocks]
        for each, border in zip(blocks, borders, strict=True):
            rest = rest - each @ border
        # Once the Krylov space is exhausted, the random directions go on; else they are negligible.
        rest, triangle = xp.linalg.qr(rest + rounding * random_directions())
        column = np.concatenate([as_numpy(border) for border in borders])
        gram = np.block([[gram, column[:-size]], [column[:-size].T, column[-size:]]])
        last = len(gram) + size > min(n, max(LARGEST_BASIS, BLOCKS * size))
        if last or len(gram) >= 1.25 * looked:
            looked = len(gram)
            values, coordinates = eigh(xp.asarray((gram + gram.T) / 2, dtype=dtype, device=device(points)))
            # Images of all blocks but the last lie within the space, as the operator is symmetric.
            residuals = xp.sqrt(xp.sum((triangle @ coordinates[-size:, :]) ** 2, axis=0))
            similarities = as_numpy(xp.flip(values))
            if last or enough(similarities, as_numpy(xp.flip(residuals))):
                wanted = xp.flip(coordinates, axis=1)[:, :vectors]
                found = xp.zeros((n, vectors), dtype=dtype, device=device(points))
                for number, each in enumerate(blocks):
                    found = found + each @ wanted[number * size : (number + 1) * size, :]
                return similarities, found
        for each in blocks:  # one pass more: rounding is larger beside a small rest
            rest = rest - each @ (each.T @ rest)
        block, _ = xp.linalg.qr(rest)
