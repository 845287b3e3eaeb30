"""Truncated singular value decomposition of a pretrained weight."""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import numpy as np

from adamss.core._array import (
    Array,
    as_constant,
    as_widest_precision,
    as_working_precision,
    check_linear_algebra,
    check_matrix,
    device,
    eigh,
    is_faster_in_float32,
    namespace,
)
from adamss.errors import ConfigError

__all__ = ["Decomposition", "decompose"]

MISSING_ENERGY = 1e-3
"""Share of the optimal energy that may be missing when a search stops, according to an estimate from above.

The share that is really missing is smaller. At rank 100 it was measured as 4e-4 for a Gaussian matrix, which has the
flattest spectrum, and below 2e-4 for matrices with decaying singular values."""

EXACT_SIDE = 512
"""Smaller side up to which computing all eigenvectors of the Gram matrix is faster than a search."""

SMALLEST_REFINED = 128
"""Smaller side from which float32 eigenvectors with a float64 correction take less time than float64 eigenvectors."""

GUARDS = 8
"""Directions kept beyond the rank, so that float64 and not float32 decides which directions are the leading ones."""

LARGEST_CORRECTION = 1e-4
"""Largest accepted entry of a first-order correction. The remaining error, its square, is below float32 rounding."""

SAFE_NORM = 1e-6
"""Weights whose norm lies between this value and its inverse are decomposed without rescaling."""


class Decomposition(NamedTuple):
    """A truncated singular value decomposition ``W_hat = U diag(S) V^T``.

    Attributes
    ----------
    U
        Left singular vectors, of shape (d, R), orthonormal.
    S
        Singular values, of shape (R,), in descending order.
    V
        Right singular vectors, of shape (n, R), orthonormal.

    Examples
    --------
    >>> import numpy as np
    >>> from adamss import core
    >>> decomposition = core.decompose(np.diag([3.0, 2.0, 1.0]), rank=2)
    >>> decomposition.U.shape, np.round(decomposition.S, 6).tolist()
    ((3, 2), [3.0, 2.0])
    >>> W_hat = (decomposition.U * decomposition.S) @ decomposition.V.T
    >>> bool(np.allclose(W_hat, np.diag([3.0, 2.0, 0.0])))
    True
    """

    U: Array
    S: Array
    V: Array


def decompose(W: Array, rank: int, *, seed: int = 0) -> Decomposition:
    """Compute the truncated singular value decomposition of a weight.

    ``W ~ U diag(S) V^T`` with ``U^T U = V^T V = I``, where U captures (nearly) the largest energy
    ``||U^T W||_F^2`` that R orthonormal directions can capture.

    A small matrix is decomposed exactly. For a large one, the singular vectors are searched for in a growing block
    Krylov space of ``W W^T``, until at most 1e-3 of the optimal energy is estimated to be missing. A steep spectrum
    needs few blocks, a flat one many.

    Parameters
    ----------
    W
        Weight of shape (d, n), real floating point. A weight in half precision is decomposed in float32.
    rank
        Number R of singular vectors. It is clamped to ``min(d, n)``.
    seed
        Seed of the random directions with which the search starts. The same seed gives the same result.

    Returns
    -------
    Decomposition
        ``U: (d, R)``, ``S: (R,)`` and ``V: (n, R)`` in the framework and on the device of W, in its dtype or in
        float32 if that is wider. The signs are chosen such that in each column of U the entry of largest magnitude is
        positive, so that all frameworks agree.

    Raises
    ------
    ConfigError
        If ``rank`` is not an integer, or is below 1.
    ArrayTypeError
        If W is not real floating point, has no values because it is traced, or its framework has no linear algebra.
    ArrayValueError
        If W is not a finite, non-empty matrix.

    References
    ----------
    C. Musco and C. Musco, "Randomized block Krylov methods for stronger and faster approximate singular
    value decomposition", NeurIPS 2015.

    Examples
    --------
    >>> import numpy as np
    >>> U, S, V = decompose(np.asarray([[3.0, 0.0], [0.0, -5.0], [0.0, 0.0]]), rank=1)
    >>> float(S[0])
    5.0
    >>> bool(np.allclose(U.T, [[0, 1, 0]])), bool(np.allclose(V.T, [[0, -1]]))
    (True, True)
    """
    check_linear_algebra(W)
    check_matrix(W, name="W")
    W = as_constant(W)
    rank = min(check_count(rank, name="rank", remedy="use 1 or more singular vectors"), *W.shape)
    return _decompose(as_working_precision(W), rank, np.random.default_rng(seed))


def check_count(count: int | None, /, *, name: str, remedy: str) -> int:
    """Return a setting that must be a positive integer as an ``int``.

    Raises
    ------
    ConfigError
        If it is not an integer, or is below 1. The message names `name` and ends with `remedy`.
    """
    try:
        number = operator.index(count)  # type: ignore[arg-type]
    except TypeError as error:
        raise ConfigError(f"{name} must be an integer, found {count!r}; {remedy}") from error
    if isinstance(count, bool) or number < 1:
        raise ConfigError(f"{name} must be an integer of at least 1, found {count!r}; {remedy}")
    return number


def _decompose(W: Array, rank: int, rng: np.random.Generator) -> Decomposition:
    """Decompose W via the Gram matrix of its smaller side, rescaled so that squares do not over- or underflow."""
    xp = namespace(W)
    scale = 1.0
    # The norm is ten times cheaper than the largest entry, but its own squares may overflow.
    with np.errstate(over="ignore"):
        norm = float(xp.linalg.vector_norm(W))
    if not SAFE_NORM <= norm <= 1 / SAFE_NORM:
        scale = float(xp.max(xp.abs(W))) or 1.0
        W = W / scale
    d, n = W.shape
    if d <= n:
        U, S, V = _decompose_wide(W, rank, rng)
    else:
        V, S, U = _decompose_wide(W.T, rank, rng)
    # The entry of largest magnitude is the maximum or the minimum of its column. It is negative if their sum is.
    negative = xp.max(U, axis=0) + xp.min(U, axis=0) < 0
    sign = 1 - 2 * xp.astype(negative, U.dtype)
    return Decomposition(U * sign, S * scale, V * sign)


def _decompose_wide(W: Array, rank: int, rng: np.random.Generator) -> Decomposition:
    xp = namespace(W)
    d, _ = W.shape
    dtype = W.dtype
    if d <= max(EXACT_SIDE, 4 * rank):
        # In float32, rounding mixes the last direction with the first one that is left out. For real weights this is
        # enough to lead k-means to another optimum. In float64 all frameworks find the same groups.
        wide = as_widest_precision(W)
        basis = _leading_span(W, wide, rank)
        image = wide.T if basis is None else wide.T @ basis
        eigenvalues, eigenvectors = eigh(image.T @ image)
        leading, U = xp.flip(eigenvalues[-rank:]), xp.flip(eigenvectors[:, -rank:], axis=1)
        image, U = image @ U, U if basis is None else basis @ U
        if float(leading[-1]) * xp.finfo(dtype).eps > d * xp.finfo(wide.dtype).eps * float(leading[0]):
            # The columns of W^T U are orthogonal up to the rounding of the result, so they only need scaling.
            S = xp.sqrt(leading)
            return _as_dtype((U, S, image / S), dtype)
    else:
        U, image = _search(W, rank, rng)
    # The Gram matrix squares W and so loses the small singular values. An SVD of U^T W, restricted to the subspace
    # found, recovers them.
    Q, triangle = xp.linalg.qr(image)
    right, S, left = xp.linalg.svd(triangle, full_matrices=False)
    return _as_dtype((U @ left.T, S, Q @ right), dtype)


def _leading_span(W: Array, wide: Array, rank: int) -> Array | None:
    """Return an orthonormal basis (d, m), a little wider than `rank`, that contains the leading directions of `wide`.

    All eigenvectors are computed in the precision of W, at half the cost, and then corrected to first order in the
    precision of `wide`. With ``W W^T q_i = t_i q_i + e_i``, each direction j outside the basis is mixed into q_i with
    the coefficient ``q_j^T e_i / (t_i - t_j)``. The remaining error is the square of these coefficients. Return None
    if they are not small enough, or if this way would save no time.
    """
    xp = namespace(W)
    d, _ = W.shape
    width = rank + GUARDS
    if wide.dtype == W.dtype or not is_faster_in_float32(W) or d < SMALLEST_REFINED or 3 * width > d:
        return None
    eigenvalues, eigenvectors = eigh(W @ W.T)
    outer = d - width
    # The coefficients divide by the gap between the leading eigenvalues and those outside of the basis.
    if float(eigenvalues[-rank] - eigenvalues[outer - 1]) <= xp.finfo(W.dtype).eps * float(eigenvalues[-1]):
        return None
    # The guards need no correction: their error enters only scaled by the small mixing coefficients.
    inner, outside = xp.astype(eigenvectors[:, outer:], wide.dtype), eigenvectors[:, :outer]
    guards, kept = inner[:, :GUARDS], inner[:, GUARDS:]
    residual = wide @ (wide.T @ kept) - kept * xp.astype(eigenvalues[-rank:], wide.dtype)
    # The residual is a small difference of large terms and needs the wide precision. The correction needs only a few
    # digits, so from here on the precision of W is enough.
    mixed_in = (outside.T @ xp.astype(residual, W.dtype)) / (eigenvalues[-rank:] - eigenvalues[:outer, None])
    if not float(xp.max(xp.abs(mixed_in))) <= LARGEST_CORRECTION:
        return None
    basis = xp.concat([guards, kept + xp.astype(outside @ mixed_in, wide.dtype)], axis=1)
    # One Newton step orthonormalises a basis that is already nearly orthonormal.
    return 1.5 * basis - 0.5 * (basis @ (basis.T @ basis))


def _as_dtype(found: tuple[Array, Array, Array], dtype: Any) -> Decomposition:
    xp = namespace(*found)
    return Decomposition(*(xp.astype(array, dtype, copy=False) for array in found))


def _search(W: Array, rank: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Grow an orthonormal basis Q until its best ``rank`` directions capture nearly the optimal energy.

    These directions are ``U = Q E``, with E the leading eigenvectors of ``Q^T W W^T Q`` (the Rayleigh-Ritz method).
    Return ``U: (d, R)`` and ``W^T U: (n, R)``.
    """
    xp = namespace(W)
    d, n = W.shape
    # Matrix products are fastest if the number of columns is a multiple of 16.
    size = max(16, rank // 3 // 16 * 16)
    draws = rng.standard_normal((max(d, n), size), dtype=np.float32)
    noise = xp.asarray(draws, dtype=W.dtype, device=device(W))
    basis, _ = xp.linalg.qr(W @ noise[:n, :])
    images = [W.T @ basis]
    gram = images[0].T @ images[0]
    # Once the Krylov space is exhausted, the next block is rounding error. Noise just above that level supplies fresh
    # directions, and is negligible otherwise.
    largest = xp.max(gram)
    noise = noise[:d, :] * xp.finfo(W.dtype).eps * xp.where(largest > 0, largest, xp.ones_like(largest))
    energies: list[tuple[int, float]] = []
    look = 0
    for shift in range(1, d // size):
        # The Gram matrix is block tridiagonal, so only the last two blocks of the basis have to be projected out.
        near = max(0, basis.shape[1] - 2 * size)
        block = W @ images[-1] - basis[:, near:] @ gram[near:, -size:]
        block, _ = xp.linalg.qr(block + xp.roll(noise, shift, axis=0))
        # Rounding destroys the orthogonality to the earlier blocks, especially once a direction has converged, so
        # project them out once more.
        block, _ = xp.linalg.qr(block - basis @ (basis.T @ block))
        image = W.T @ block
        zeros = xp.zeros((basis.shape[1] - size, size), dtype=W.dtype, device=device(W))
        border = xp.concat([zeros, images[-1].T @ image])
        gram = xp.concat(
            [xp.concat([gram, border], axis=1), xp.concat([border.T, image.T @ image], axis=1)], axis=0
        )
        basis = xp.concat([basis, block], axis=1)
        images.append(image)
        if basis.shape[1] >= rank and (shift >= look or shift == d // size - 1):
            eigenvalues, eigenvectors = eigh(gram)
            energies.append((shift, float(xp.sum(eigenvalues[-rank:]))))
            missing, wait = _outlook(energies)
            if missing <= MISSING_ENERGY:
                break
            look = shift + wait
    leading = eigenvectors[:, -rank:]
    return basis @ leading, xp.concat(images, axis=1) @ leading


def _outlook(energies: list[tuple[int, float]]) -> tuple[float, int]:
    """Estimate the share of energy still missing, and the number of blocks to add before the next check.

    The gain per block is extrapolated geometrically, to ``gain ratio / (1 - ratio)``. A Krylov space converges faster
    than that, so the estimate is too high rather than too low. The next check comes after half of the predicted
    blocks, since each check costs an eigendecomposition.

    Parameters
    ----------
    energies
        Number of blocks and captured energy, at each check so far.

    Returns
    -------
    missing, wait
        Estimated share of the energy, and number of blocks.
    """
    if len(energies) < 3:
        return 1.0, 1
    (first, least), (second, middle), (third, most) = energies[-3:]
    before, gain = (middle - least) / (second - first), (most - middle) / (third - second)
    if gain <= 0.0:
        return 0.0, 1
    ratio = min((gain / before) ** (2 / (third - first)), 0.999) if before > 0.0 else 0.999
    missing = gain / most * max(1.0, ratio / (1.0 - ratio))
    return missing, max(1, int(math.log(MISSING_ENERGY / missing) / math.log(ratio) / 2))


def effective_coordinates(decomposition: Decomposition) -> Array:
    """Return V with the columns of negligible singular values set to zero.

    A singular value at or below ``eps max(d, n) S[0]`` is rounding error. Its singular vector is arbitrary, but has
    unit length like every other, so it would hide the structure of the columns if it were kept.

    Parameters
    ----------
    decomposition
        Truncated SVD of the weight, as `decompose` returns it. Its arrays may have leading axes.

    Returns
    -------
    Array
        V with zeroed columns, of shape (..., n, R).
    """
    U, S, V = decomposition
    xp = namespace(V)
    rounding = xp.finfo(S.dtype).eps * max(U.shape[-2], V.shape[-2]) * S[..., :1]
    return V * xp.astype(rounding < S, V.dtype)[..., None, :]
