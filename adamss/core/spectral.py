"""Spectral methods on the columns of a weight: the normalised Laplacian, the embedding, the number of subspaces.

The columns are the nodes of a graph, with an affinity ``F_ij >= 0`` between the columns i and j. With the degrees
``D_ii = sum_j F_ij``, its normalised Laplacian is ``L = I - D^-1/2 F D^-1/2``. L has one eigenvalue 0 for each
connected component, and an eigenvalue near 0 for each component that is nearly separate. The corresponding
eigenvectors show which column belongs to which component.
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
"""Number of columns up to which all eigenvectors are computed. Beyond it, only the required ones are searched for."""

LARGEST_FORMED = 10**8
"""Number of entries up to which an affinity matrix is stored (400 MB in float32). Larger ones are formed in parts."""

SMALLEST_BLOCK = 16
"""Smallest number of directions in a block of a search, since products with fewer cost nearly as much."""

LARGEST_BASIS = 1024
"""Number of directions after which a search ends even if it has not converged.

Eigenvalues that are still not separated by then do not mark boundaries between clusters."""

BLOCKS = 4
"""Smallest number of blocks that a search must have room for. With fewer columns, all eigenvectors are computed."""

EMBEDDING_RESIDUAL = 1e-2
"""Residual ``|L x - s x|`` at which an eigenvector x of unit length is accurate enough to group columns.

With it, planted subspaces under noise are found as well as with exact eigenvectors (adjusted Rand index within
0.001)."""

EIGENVALUE_RESIDUAL = 1e-2
"""Residual, relative to tau, at which an eigenvalue is accurate enough to be counted. It bounds the error.

In float32 with many columns, the rounding error of sums over n terms may be larger. It is the limit then."""

BOUNDARY_RESIDUAL = 1e-2
"""Residual of the first eigenvalue above tau at which no further eigenvalue below tau is expected.

Eigenvalues below tau converge sooner, so they would have been found by then."""


def estimate_subspaces(
    decomposition: Decomposition,
    *,
    tau: float = 0.01,
    minimum: int = 10,
    maximum: int | None = None,
    exponent: float = 2.0,
) -> int:
    """Estimate the number K of subspaces in which the columns of a weight lie.

    With the singular values s_i of the normalised Laplacian of the columns (see ``"ncut"`` in `segment`)::

        K = n - round(sum_i f(s_i)),   f(s) = 1 if s >= tau, else log2(1 + (s / tau)^2)

    An eigenvalue far below tau therefore counts as one subspace, an eigenvalue above tau as none, and one in between
    as a fraction. K is then raised to `minimum` (the paper's K0), and clamped to `maximum` and n.

    Parameters
    ----------
    decomposition
        Truncated SVD of one weight, as `decompose` returns it.
    tau
        Soft threshold, in (0, 1].
    minimum
        Lower bound K0, at least 1.
    maximum
        Upper bound, at least `minimum`. None means the rank R, or `minimum` if that is larger. R is a bound because
        each independent subspace takes at least one of the R dimensions.
    exponent
        Positive exponent of the affinity.

    Returns
    -------
    int
        Estimated number K of subspaces.

    Raises
    ------
    ConfigError, ConfigTypeError
        If a setting is out of range or has the wrong type.
    ArrayTypeError
        If an array is traced and so has no values.
    ArrayValueError
        If the decomposition is that of several weights.

    Notes
    -----
    Liu et al. prove that the estimate is exact for independent subspaces without noise. It is sensitive to deviations
    from that: a few per cent of noise, or subspaces that are disjoint but not independent, connect the components of
    the graph, and the estimate falls to `minimum`. The estimate also gives equal weight to all singular vectors,
    whatever their singular values. If R exceeds the rank of the signal, singular vectors of noise therefore decide
    the estimate, even if the noise is mere rounding error.

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

    The function calls a dense eigensolver on an (n, n) matrix, which takes minutes for n = 10,000.
    `estimate_subspaces` computes only the smallest eigenvalues.

    Parameters
    ----------
    decomposition
        Truncated SVD of one weight, as `decompose` returns it.
    exponent
        Positive exponent of the affinity.

    Returns
    -------
    Array
        Eigenvalues of shape (n,), between 0 and 2. Each zero column contributes an eigenvalue 1, because it is not
        connected to any column, not even to itself.

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
    """Check that a decomposition is that of a single weight.

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
    """Return the rows of V scaled to unit length, (..., n, R).

    Only the direction of a column tells its subspace. Rows that are zero up to rounding are set to zero, since zero
    columns have no direction.
    """
    points = effective_coordinates(decomposition)
    xp = namespace(points)
    length = xp.sqrt(xp.sum(points**2, axis=-1, keepdims=True))
    rounding = xp.finfo(points.dtype).eps * points.shape[-2] * xp.max(length, axis=-2, keepdims=True)
    return xp.where(length > rounding, points / xp.where(length > rounding, length, 1.0), 0.0 * points)


def spectral_embedding(points: Array, exponent: float, count: int, rng: np.random.Generator) -> Array:
    """Return points (n, count) of unit length, one for each column, for k-means to group.

    Point i consists of the entries for column i in the first eigenvectors of the Laplacian. Normalised cuts divide it
    by ``sqrt(D_ii)`` (Shi and Malik, 2000), but this division has no effect once the points are scaled to unit length
    (Ng, Jordan and Weiss, 2001).

    Parameters
    ----------
    points
        Points x of shape (n, R), which define the affinity ``F_ij = |<x_i, x_j>|^exponent``.
    exponent
        Exponent of the affinity.
    count
        Number of eigenvectors, at most n.
    rng
        Random generator for the directions with which a search starts.

    Returns
    -------
    Array
        Embedded points of shape (n, count).
    """
    xp = namespace(points)
    # A block has at least `count` directions: all wanted eigenvectors may belong to one eigenvalue, and a search
    # finds no more eigenvectors of an eigenvalue than a block has directions.
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
    """Return whether all eigenvectors are computed for n columns, instead of a search in blocks."""
    return n <= max(EXACT_COLUMNS, BLOCKS * block)


def _count_subspaces(points: Array, exponent: float, tau: float, largest: int) -> float:
    """Return ``n - sum_i f(s_i)``, or any number not below `largest` once the sum has reached `largest`."""
    n, block, rng = points.shape[0], SMALLEST_BLOCK, np.random.default_rng(0)
    close = max(EIGENVALUE_RESIDUAL * tau, n * float(namespace(points).finfo(points.dtype).eps))

    def counted(similarities: np.ndarray) -> float:
        # The eigenvalues of the Laplacian equal its singular values, as it is positive semidefinite.
        s = np.clip(1 - similarities, 0, tau)
        return float(np.sum(1 - np.log2(1 + (s / tau) ** 2)))

    def enough(similarities: np.ndarray, residuals: np.ndarray) -> bool:
        small = int(np.sum(similarities > 1 - tau))
        if small >= block:
            # A block search finds at most `block` eigenvectors of one eigenvalue, so only a larger block can tell.
            return True
        if not np.all(residuals[:small] <= close):
            return False
        # If the first eigenvalue above tau lies there whatever its error is, it need not be found accurately.
        away = similarities[small] + residuals[small] <= 1 - tau
        return counted(similarities) >= largest or bool(
            residuals[small] <= (BOUNDARY_RESIDUAL if away else close)
        )

    multiply = None if _all_at_once(n, block) else _times_similarity(points, exponent)
    while multiply is not None and not _all_at_once(n, block):
        similarities, _ = _search(points, multiply, block, rng, enough, vectors=0)
        # By the Rayleigh-Ritz principle the similarities found are never too large, so the count is never too high.
        if np.sum(similarities > 1 - tau) < block or counted(similarities) >= largest:
            return counted(similarities)
        block *= 4
    return counted(as_numpy(eigh(_similarity(points, exponent))[0]))


def _affinity(points: Array, others: Array, exponent: float) -> Array:
    xp = namespace(points)
    products = points @ others.T
    if exponent != 2:
        return xp.abs(products) ** exponent
    # Multiply in place where the framework can, since allocating another (n, n) array takes a third of the time.
    products *= products
    return products


def _inverse_roots(degrees: Array) -> Array:
    """Return ``D^-1/2``, or 0 for a zero column, which has no affinity to any column."""
    xp = namespace(degrees)
    return xp.where(degrees > 0, 1 / xp.sqrt(xp.where(degrees > 0, degrees, 1.0)), 0.0 * degrees)


def _similarity(points: Array, exponent: float) -> Array:
    """Return ``D^-1/2 F D^-1/2 = I - L``, whose largest eigenvalues correspond to the smallest ones of L."""
    affinity = _affinity(points, points, exponent)
    root = _inverse_roots(namespace(points).sum(affinity, axis=1))
    return affinity * root[:, None] * root[None, :]


def _times_similarity(points: Array, exponent: float) -> Callable[[Array], Array]:
    """Return the function ``x -> D^-1/2 F D^-1/2 x`` for x of shape (n, m)."""
    xp = namespace(points)
    multiply = _times_affinity(points, exponent)
    root = _inverse_roots(multiply(xp.ones_like(points[:, :1])))
    return lambda x: root * multiply(root * x)


def _times_affinity(points: Array, exponent: float) -> Callable[[Array], Array]:
    """Return the function ``x -> F x`` for x of shape (n, m).

    Depending on n, R and the exponent, F is stored, formed part by part in each call, or not formed at all.
    """
    xp = namespace(points)
    n, rank = points.shape
    if exponent == 2 and n > rank**2:
        # For points P and G = P^T diag(x) P, (F x)_i = sum_j <p_i, p_j>^2 x_j = <p_i, G p_i>. This takes n R^2
        # multiplications instead of the n^2 of a product with F.
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
    """Find the largest eigenvalues of a symmetric operator in a growing block Krylov space (Rayleigh-Ritz).

    The basis is kept as a list of blocks of one shape, because JAX compiles every operation for each new shape. The
    small projected problem is assembled in NumPy but solved by the framework of the points. The idle threads of
    NumPy's linear algebra would otherwise occupy cores that PyTorch needs.

    Parameters
    ----------
    points
        Array (n, R), which determines the framework, dtype and device.
    multiply
        The operator, a function on arrays (n, size).
    size
        Number of directions in a block.
    rng
        Random generator for the initial directions, and for those that continue an exhausted Krylov space.
    enough
        Function of the eigenvalues so far, in descending order, and their residuals. It returns whether to stop.
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
        # Once the Krylov space is exhausted, the random directions continue it. Otherwise they are negligible.
        rest, triangle = xp.linalg.qr(rest + rounding * random_directions())
        column = np.concatenate([as_numpy(border) for border in borders])
        gram = np.block([[gram, column[:-size]], [column[:-size].T, column[-size:]]])
        last = len(gram) + size > min(n, max(LARGEST_BASIS, BLOCKS * size))
        if last or len(gram) >= 1.25 * looked:
            looked = len(gram)
            values, coordinates = eigh(xp.asarray((gram + gram.T) / 2, dtype=dtype, device=device(points)))
            # The images of all blocks except the last lie within the space, so only the last block contributes to the
            # residuals.
            residuals = xp.sqrt(xp.sum((triangle @ coordinates[-size:, :]) ** 2, axis=0))
            similarities = as_numpy(xp.flip(values))
            if last or enough(similarities, as_numpy(xp.flip(residuals))):
                wanted = xp.flip(coordinates, axis=1)[:, :vectors]
                found = xp.zeros((n, vectors), dtype=dtype, device=device(points))
                for number, each in enumerate(blocks):
                    found = found + each @ wanted[number * size : (number + 1) * size, :]
                return similarities, found
        # Orthogonalise once more, since rounding errors are relatively large if the remainder is small.
        for each in blocks:
            rest = rest - each @ (each.T @ rest)
        block, _ = xp.linalg.qr(rest)
