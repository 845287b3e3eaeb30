"""Grouping the columns of a weight into subspaces."""

from __future__ import annotations

import math

import numpy as np

from adamss.config import SEGMENTATIONS, SubspaceEstimate
from adamss.core._array import Array, check_concrete, device, eigh, namespace, one_hot
from adamss.core.decomposition import Decomposition, check_count, effective_coordinates
from adamss.core.spectral import directions_of_columns, spectral_embedding
from adamss.errors import ArrayValueError, ConfigError

__all__ = ["segment", "subspace_sizes"]

RESTARTS = 5
TRIAL_ITERATIONS = 5
FINAL_ITERATIONS = 20
SUBSPACE_ITERATIONS = 30

ROUNDING = 10 * float(np.finfo(np.float32).eps)
"""Rounding error, in float32, of a product of two points or a sum over points, relative to the size of the terms.

Smaller differences must not decide, since they vary with the library and with the weights that share a matrix
product. They arise where points coincide or are equally distant, as with duplicate and zero columns. The same
value is used in float64, so that both dtypes lead to the same groups."""

WINNING_MARGIN = 1e-3
"""Relative reduction of the inertia by which a later restart wins. It is larger than any effect of rounding."""


def segment(
    decomposition: Decomposition,
    subspaces: int,
    method: str = "kmeans",
    dimension: int | None = None,
    seed: int = 0,
    exponent: float = 2.0,
) -> Array:
    """Group the columns of a weight, or of each of several weights of one shape, into subspaces.

    The groups ``{0, ..., n-1} = I_0 + ... + I_{K-1}`` are a partition without empty parts. The methods are:

    - ``"kmeans"``: Euclidean k-means on the rows of V.
    - ``"ncut"``: the paper's Algorithm 2, which is normalised cuts of the graph with the affinity
      ``|<v_i, v_j>|^exponent``, where v_i is row i of V scaled to unit length.
    - ``"spectral"``: normalised cuts with the affinity ``|Z*| = |V V^T|``, for which the rows of V are not scaled.
    - ``"ksubspaces"``: alternate between fitting a subspace of the given dimension to each group of columns of
      ``W_hat`` and moving each column to the subspace that retains most of its energy. The initial groups are those
      of ``"spectral"`` on the leading ``K * dimension`` directions.
    - ``"contiguous"`` and ``"random"``: groups of nearly equal size, of consecutive columns or of random ones. They
      serve as controls in an ablation.

    Parameters
    ----------
    decomposition
        Truncated SVD of the weight, as `decompose` returns it. Its arrays may have leading axes, ``V: (..., n, R)``.
        Each weight then gets the groups that it would get by itself. For small weights, one such call takes a
        fraction of the time of separate calls.
    subspaces
        Number K of groups. It is clamped to n.
    method
        Name of the method, see above.
    dimension
        Dimension of each subspace. Required for ``"ksubspaces"``, and not accepted for the other methods.
    seed
        Seed of all random choices: the k-means restarts, the search for eigenvectors, and ``"random"``.
    exponent
        Positive exponent of the affinity of ``"ncut"``. Liu et al. use 2.

    Returns
    -------
    Array
        Labels of shape (..., n), integers in ``0 .. K - 1``. Groups are numbered by their lowest column.

    Raises
    ------
    ConfigError, ConfigTypeError
        If the method is unknown, ``subspaces`` is not a positive integer, ``dimension`` is not a positive integer for
        ``"ksubspaces"`` or is given for another method, or the exponent is not a positive number.
    ArrayTypeError
        If an array is traced and so has no values.
    ArrayValueError
        If the leading axes of U, S and V differ.

    References
    ----------
    D. Arthur and S. Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007.
    P. S. Bradley and O. L. Mangasarian, "k-plane clustering", Journal of Global Optimization 16, 2000.
    G. Liu, Z. Lin, S. Yan, J. Sun, Y. Yu and Y. Ma, "Robust recovery of subspace structures by low-rank
    representation", IEEE Transactions on Pattern Analysis and Machine Intelligence 35(1), 2013.
    A. Y. Ng, M. I. Jordan and Y. Weiss, "On spectral clustering: analysis and an algorithm", NeurIPS 2001.
    J. Shi and J. Malik, "Normalized cuts and image segmentation", IEEE Transactions on Pattern Analysis and Machine
    Intelligence 22(8), 2000.

    Examples
    --------
    >>> import numpy as np
    >>> from adamss.core import decompose
    >>> W = np.asarray([[1.0, 0.0, 2.0, 0.0], [0.0, 3.0, 0.0, 1.0]])
    >>> segment(decompose(W, 2), 2, "spectral").tolist()
    [0, 1, 0, 1]
    """
    if method not in SEGMENTATIONS:
        raise ConfigError(
            f"method must be one of {', '.join(map(repr, SEGMENTATIONS))}, found {method!r}; choose one"
        )
    subspaces = check_count(subspaces, name="subspaces", remedy="use 1 or more subspaces")
    if method == "ksubspaces":
        remedy = "method 'ksubspaces' needs the dimension of each subspace"
        dimension = check_count(dimension, name="dimension", remedy=remedy)
    elif dimension is not None:
        raise ConfigError(
            f"dimension is for method 'ksubspaces' only, found {dimension!r} with method {method!r}; "
            "leave it out"
        )
    exponent = SubspaceEstimate(exponent=exponent).exponent
    check_concrete(*decomposition, name="decomposition")
    U, S, V = decomposition
    *outer, n, _ = V.shape
    if not tuple(outer) == tuple(S.shape[:-1]) == tuple(U.shape[:-2]):
        raise ArrayValueError(
            "decomposition must have U (..., d, R), S (..., R) and V (..., n, R) with the same leading axes, found "
            f"{tuple(U.shape)}, {tuple(S.shape)} and {tuple(V.shape)}; stack all three alike"
        )
    xp = namespace(V)
    if 0 in outer:
        return xp.zeros((*outer, n), dtype=xp.arange(1).dtype, device=device(V))
    each = _stacked(decomposition)
    labels = _segment(each, min(subspaces, n), method, dimension, exponent, np.random.default_rng(seed))
    return xp.reshape(labels, (*outer, n))


def _stacked(decomposition: Decomposition) -> Decomposition:
    """Flatten the leading axes into one: return ``U: (L, d, R)``, ``S: (L, R)``, ``V: (L, n, R)``."""
    xp = namespace(decomposition.V)
    U, S, V = decomposition
    return Decomposition(
        xp.reshape(U, (-1, *U.shape[-2:])),
        xp.reshape(S, (-1, S.shape[-1])),
        xp.reshape(V, (-1, *V.shape[-2:])),
    )


def _segment(
    each: Decomposition,
    subspaces: int,
    method: str,
    dimension: int | None,
    exponent: float,
    rng: np.random.Generator,
) -> Array:
    """Return labels (L, n) for L weights, after the arguments have been checked."""
    V = each.V
    xp = namespace(V)
    count, n, _ = V.shape
    columns = xp.arange(n, device=device(V))
    # Under jax.jit, new arrays are traced even if the decomposition has values.
    check_concrete(columns, name="decomposition")
    if subspaces == n or method == "contiguous":
        return xp.stack([columns * subspaces // n] * count)
    coordinates = effective_coordinates(each)
    match method:
        case "random":
            labels = xp.stack([xp.asarray(rng.permutation(n), device=device(V)) % subspaces] * count)
        case "kmeans":
            labels = _kmeans(coordinates, subspaces, rng)
        case "ncut":
            labels = _spectral(directions_of_columns(each), exponent, subspaces, rng)
        case "spectral":
            labels = _spectral(coordinates, 1.0, subspaces, rng)
        case "ksubspaces":
            assert dimension is not None
            # K subspaces span at most K * dimension directions; the remaining directions are noise.
            leading = min(subspaces * dimension, coordinates.shape[2])
            starts = _spectral(coordinates[:, :, :leading], 1.0, subspaces, rng)
            layers = zip(map(Decomposition, *map(xp.unstack, each)), xp.unstack(starts), strict=True)
            labels = xp.stack([_ksubspaces(one, start, subspaces, dimension) for one, start in layers])
        case _:
            raise AssertionError(f"method {method!r} is among SEGMENTATIONS, and has no case here")
    return _renumber(labels, subspaces)


def subspace_sizes(labels: Array, subspaces: int) -> Array:
    """Count the columns of each subspace, ``n_k = |I_k|``.

    Parameters
    ----------
    labels
        Integers of shape (n,), in ``0 .. subspaces - 1``.
    subspaces
        Number K of subspaces.

    Returns
    -------
    Array
        Integers of shape (K,).

    Examples
    --------
    >>> import numpy as np
    >>> subspace_sizes(np.asarray([0, 1, 0]), 3).tolist()
    [2, 1, 0]
    """
    # A one-hot matrix (n, K) could exhaust the memory. In a hostile file K may be as large as n, so that the matrix
    # has the square of the file's size.
    xp = namespace(labels)
    numbers = xp.arange(subspaces, dtype=labels.dtype, device=device(labels))
    ordered = xp.sort(labels)
    return xp.searchsorted(ordered, numbers, side="right") - xp.searchsorted(ordered, numbers, side="left")


def _spectral(points: Array, exponent: float, subspaces: int, rng: np.random.Generator) -> Array:
    """Cluster L sets of points (L, n, R) with the affinity ``|<x_i, x_j>|^exponent``; return labels (L, n)."""
    xp = namespace(points)
    # Every search starts from the same directions, since the labels of a layer must not depend on its batch.
    seed = int(rng.integers(2**32))
    embedded = [
        spectral_embedding(one, exponent, subspaces, np.random.default_rng(seed))
        for one in xp.unstack(points)
    ]
    return _kmeans(xp.stack(embedded), subspaces, rng)


def _kmeans(points: Array, clusters: int, rng: np.random.Generator) -> Array:
    """Cluster L sets of points (L, n, R), independently and with the same random draws; return labels (L, n).

    A few Lloyd iterations run from several starts at once. Then only the best start of each set is continued.
    """
    xp = namespace(points)
    points = points - xp.mean(points, axis=1, keepdims=True)
    squares = xp.sum(points**2, axis=2)
    centres = _kmeans_start(points, squares, clusters, rng)
    centres = _lloyd(points, squares, centres, TRIAL_ITERATIONS)
    _, distances = _nearest(points, squares, centres)
    best = _winners(xp.sum(distances, axis=2), xp.sum(squares, axis=1))
    centres = _lloyd(points, squares, _rows(centres, best[:, None]), FINAL_ITERATIONS)
    labels, distances = _nearest(points, squares, centres)
    labels = xp.astype(labels[:, 0, :], xp.arange(1).dtype)
    distances = distances[:, 0, :]
    rounding = _rounding(squares)[:, 0]
    if bool(xp.all(xp.any(one_hot(labels, clusters, dtype=xp.bool), axis=1))):
        return labels
    each = zip(xp.unstack(labels), xp.unstack(distances), xp.unstack(rounding), strict=True)
    return xp.stack([_fill_empty(own, clusters, misfits, error) for own, misfits, error in each])


def _winners(inertias: Array, spreads: Array) -> Array:
    """Return, for each set of points, the restart with the least inertia: (L,) from inertias (L, T).

    A later restart must win by `WINNING_MARGIN`, so that rounding does not decide.
    """
    xp = namespace(inertias)
    rounding = ROUNDING * spreads
    best, least = 0 * xp.arange(inertias.shape[0], device=device(inertias)), inertias[:, 0]
    for restart in range(1, inertias.shape[1]):
        wins = inertias[:, restart] < (1 - WINNING_MARGIN) * least - rounding
        best = xp.where(wins, xp.full_like(best, restart), best)
        least = xp.where(wins, inertias[:, restart], least)
    return best


def _rounding(squares: Array) -> Array:
    """Return the rounding error (L, 1) of squared distances between points with squared lengths (L, n)."""
    xp = namespace(squares)
    return ROUNDING * xp.max(squares, axis=1, keepdims=True)


def _largest(values: Array, rounding: Array) -> Array:
    """Return the index of the largest value along the last axis, or the first of those within rounding of it."""
    xp = namespace(values)
    candidates = values >= xp.max(values, axis=-1, keepdims=True) - rounding
    return xp.argmax(xp.astype(candidates, xp.int8), axis=-1)


def _lloyd(points: Array, squares: Array, centres: Array, iterations: int) -> Array:
    """Move the centres (L, T, K, R) to the means of their nearest points, up to `iterations` times.

    The iterations stop early once no label changes. A centre without points stays where it is.
    """
    xp = namespace(points)
    count, restarts, clusters, _ = centres.shape
    classes = xp.arange(clusters, dtype=xp.int32, device=device(points))[:, None]
    labels = xp.full((count, restarts, points.shape[1]), -1, dtype=xp.int32, device=device(points))
    for _ in range(iterations):
        labels, before = _nearest(points, squares, centres)[0], labels
        if bool(xp.all(labels == before)):
            break
        members = xp.astype(labels[:, :, None, :] == classes, points.dtype)
        sizes = xp.sum(members, axis=3)[..., None]
        sums = xp.reshape(xp.reshape(members, (count, restarts * clusters, -1)) @ points, centres.shape)
        centres = xp.where(sizes > 0, sums / xp.clip(sizes, min=1), centres)
    return centres


def _nearest(points: Array, squares: Array, centres: Array) -> tuple[Array, Array]:
    """Return the labels (L, T, n), int32, of the nearest of the centres (L, T, K, R), and the squared distances.

    Among centres that are equally near up to rounding, the first one is chosen.
    """
    xp = namespace(points)
    count, restarts, clusters, _ = centres.shape
    flat = xp.reshape(centres, (count, restarts * clusters, -1))
    lengths = xp.sum(flat**2, axis=2)
    # Closeness is (|x|^2 - |x - c|^2) / 2. The points lie along the last axis, so that reductions over K read memory
    # in order.
    closeness = flat @ xp.matrix_transpose(points) - lengths[..., None] / 2
    closeness = xp.reshape(closeness, (count, restarts, clusters, -1))
    largest = xp.max(closeness, axis=2)
    longest = xp.max(xp.reshape(lengths, (count, restarts, clusters)), axis=2)[..., None]
    rounding = ROUNDING * xp.sqrt((squares[:, None, :] + longest) * longest)
    candidates = closeness >= (largest - rounding)[:, :, None, :]
    # The labels have 32 bits, since reductions of 64-bit integers are a hundred times slower in PyTorch.
    classes = xp.arange(clusters, dtype=xp.int32, device=device(points))[:, None]
    labels = xp.min(xp.where(candidates, classes, xp.full_like(classes, clusters)), axis=2)
    return labels, squares[:, None, :] - 2 * largest


def _kmeans_start(points: Array, squares: Array, clusters: int, rng: np.random.Generator) -> Array:
    """Choose points as initial centres (L, T, K, R) by greedy k-means++.

    Points are drawn with probability proportional to their squared distance from the nearest centre so far. Of
    several draws, the one that leaves the least inertia becomes the next centre.
    """
    xp = namespace(points)
    count, n, _ = points.shape
    trials = 2 + int(math.log(clusters))
    draws = rng.random((clusters, RESTARTS, trials))
    # The first centre is a single uniform draw, as in plain k-means++, so all of its trials are the same.
    draws[0, :, 1:] = draws[0, :, :1]
    uniform = xp.asarray(draws, dtype=points.dtype, device=device(points))
    rounding = _rounding(squares)
    spread_rounding = ROUNDING * xp.sum(squares, axis=1, keepdims=True)
    # |x - y|^2 is a single product, of (x, |x|^2, 1) with (-2 y, 1, |y|^2).
    one = xp.ones((count, n, 1), dtype=points.dtype, device=device(points))
    left_factors = xp.concat([points, squares[:, :, None], one], axis=2)
    right_factors = xp.matrix_transpose(xp.concat([-2 * points, one, squares[:, :, None]], axis=2))
    nearest = xp.ones((count, RESTARTS, n), dtype=points.dtype, device=device(points))
    centres = []
    for k in range(clusters):
        cumulative = xp.cumulative_sum(nearest, axis=2)
        below = cumulative[:, :, None, :] <= (uniform[k, ...] * cumulative[:, :, -1:])[:, :, :, None]
        drawn = xp.clip(xp.sum(xp.astype(below, xp.int32), axis=3), max=n - 1)
        distances = _rows(left_factors, xp.reshape(drawn, (count, -1))) @ right_factors
        distances = xp.where(distances > rounding[:, :, None], distances, xp.zeros_like(distances))
        left = xp.reshape(distances, (count, RESTARTS, trials, n))
        if k:
            left = xp.minimum(nearest[:, :, None, :], left)
        chosen = _largest(-xp.sum(left, axis=3), spread_rounding[:, :, None])
        chosen = chosen + trials * xp.arange(RESTARTS, device=device(points))
        nearest = _rows(xp.reshape(left, (count, -1, n)), chosen)
        centres.append(_rows(xp.reshape(drawn, (count, -1)), chosen))
    chosen = xp.reshape(xp.stack(centres, axis=2), (count, -1))
    return xp.reshape(_rows(points, chosen), (count, RESTARTS, clusters, -1))


def _rows(arrays: Array, indices: Array) -> Array:
    """Return ``arrays[l, indices[l, i], ...]`` of shape (L, m, ...) for indices of shape (L, m)."""
    xp = namespace(arrays)
    count, m = indices.shape
    starts = arrays.shape[1] * xp.arange(count, dtype=indices.dtype, device=device(indices))
    flat = xp.reshape(arrays, (-1, *arrays.shape[2:]))
    taken = xp.take(flat, xp.reshape(indices + starts[:, None], (-1,)), axis=0)
    return xp.reshape(taken, (count, m, *arrays.shape[2:]))


def _ksubspaces(decomposition: Decomposition, labels: Array, subspaces: int, dimension: int) -> Array:
    _, S, V = decomposition
    xp = namespace(V)
    # In the coordinates of U, the columns of W_hat are the rows of V diag(S). Scaling S keeps the squares in range.
    points = V * (S / xp.where(S[0] > 0, S[0], xp.ones_like(S[0])))
    squares = xp.sum(points**2, axis=1)
    rounding = 10 * ROUNDING * squares
    for _ in range(SUBSPACE_ITERATIONS):
        members = one_hot(labels, subspaces, dtype=V.dtype)
        scatter = (members.T[:, None, :] * points.T) @ points
        _, vectors = eigh(scatter)
        bases = vectors[:, :, -min(dimension, V.shape[1]) :]
        kept = xp.sum((points @ bases) ** 2, axis=2).T
        own = xp.sum(kept * members, axis=1)
        best = xp.max(kept, axis=1)
        moved = xp.where(best > own + rounding, _largest(kept, rounding[:, None]), labels)
        moved = _fill_empty(moved, subspaces, squares - best, xp.max(rounding))
        if bool(xp.all(moved == labels)):
            break
        labels = moved
    return labels


def _fill_empty(labels: Array, groups: int, misfits: Array, rounding: Array) -> Array:
    """Move to each empty group the column with the largest misfit among the groups that have more than one column.

    Among columns whose misfits are equal up to rounding, the first one is moved.
    """
    xp = namespace(labels)
    columns = xp.arange(labels.shape[0], device=device(labels))
    sizes = subspace_sizes(labels, groups)
    if bool(xp.all(sizes > 0)):
        return labels
    for group in range(groups):
        if int(sizes[group]) == 0:
            spare = xp.take(sizes, labels, axis=0) > 1
            worst = _largest(xp.where(spare, misfits, xp.full_like(misfits, -xp.inf)), rounding)
            labels = xp.where(columns == worst, xp.full_like(labels, group), labels)
            sizes = subspace_sizes(labels, groups)
    return labels


def _renumber(labels: Array, groups: int) -> Array:
    """Renumber the groups in each row of labels (L, n) in the order of their lowest columns."""
    xp = namespace(labels)
    first = xp.argmax(one_hot(labels, groups, dtype=labels.dtype), axis=1)
    return _rows(xp.argsort(xp.argsort(first, axis=1), axis=1), labels)
