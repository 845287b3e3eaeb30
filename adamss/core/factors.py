"""The factors A, B, C of the update: their form, initial values, checks, and the selection of subspaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from adamss.config import BASES, INITIAL_B, Basis, InitialB
from adamss.core._array import (
    Array,
    as_numpy,
    check_concrete,
    compiled_as_one,
    device,
    eigh,
    namespace,
    one_hot,
)
from adamss.core.decomposition import Decomposition, check_count
from adamss.core.segmentation import subspace_sizes
from adamss.errors import ArrayValueError, ConfigError

__all__ = [
    "Factors",
    "Selection",
    "basis_ranks",
    "check_factors",
    "column_index",
    "factors_from_directions",
    "hold_frozen",
    "initial_factors",
    "join",
    "only",
    "outline",
    "positions",
    "select",
    "split",
    "trained_elements",
]

SMALLEST_BATCH = 16
"""Size to which smaller subspaces are padded, since eigenvectors of so few columns cost less than another call."""


class Factors(NamedTuple):
    """Factors of the update of one weight ``W: (d, n)`` with K subspaces, in stacked form.

    ``delta[:, j] = M[:, columns of k] @ C[:ranks[k], j]`` with ``k = labels[j]`` and
    ``M = [A_1 B_1 ... A_K B_K]``.

    Attributes
    ----------
    A
        Frozen bases, (G, d, P) floating point. G = 1 if all subspaces share one basis. G = K if each subspace has its
        own, padded with zero columns to the width of the largest. Any other G means that K / G consecutive
        subspaces share a basis, such as the subspaces of one expert (see `join`). If the bias is adapted too, A has
        d + 1 rows.
    B
        Trained factor, (P, q) floating point. Its columns are the ``ranks[0]`` columns of subspace 0, then those of
        subspace 1, and so on.
    C
        Trained factor, (r, n) floating point, with r = max(ranks). The entries of a column at or beyond the rank of
        its subspace are padding, which is never read, trained or counted.
    labels
        Subspace of each column, (n,) integers in 0 .. K - 1.
    ranks
        Trained rank r_k of each subspace, (K,) integers that sum to q.
    active
        Whether each subspace is trained, (K,) booleans. A frozen subspace still contributes to the update.
    """

    A: Array
    B: Array
    C: Array
    labels: Array
    ranks: Array
    active: Array


class Selection(NamedTuple):
    """A selection of subspaces of a layer, as NumPy arrays that index into its factors.

    Attributes
    ----------
    labels
        Subspace of each column, (n,) integers that number the chosen subspaces from 0. A column of a subspace
        that is not chosen has -1.
    subspaces
        Numbers of the chosen subspaces, (K',) integers, ascending.
    directions
        Columns of B that belong to the chosen subspaces, (q',) integers, ascending.
    """

    labels: np.ndarray[Any, Any]
    subspaces: np.ndarray[Any, Any]
    directions: np.ndarray[Any, Any]


def initial_factors(
    decomposition: Decomposition,
    labels: Array,
    subspace_rank: int,
    *,
    basis: Basis = "shared",
    initial_B: InitialB = "orthonormal",
    reconstruct: bool = False,
) -> Factors:
    """Return the factors at the start of training, where C = 0 makes the update zero.

    Let ``W_hat = U S V^T``, let V_k be the rows I_k of V, and Q_k the leading r_k right singular vectors of V_k^T.
    Then the options of `initial_B` are::

        B_k = A_k^T W_hat[:, I_k] Q_k           ("weighted", the paper's B_w B_z)
        B_k = orth(V_k^T Q_k)                   ("orthonormal", shared basis)
        B_k = orth(A_k^T W_hat[:, I_k] Q_k)     ("orthonormal", basis per subspace)
        B_k = Q of the QR of A_k^T W_hat[:, I_k] Z*_k, its first r_k columns    ("qr", Algorithm 1 as written)

    where ``Z*_k = V_k V_k^T``. The option ``"qr"`` depends on the order of the columns: B_k spans what the first r_k
    columns of the subspace span, whatever these are. The other options start with the leading directions of the
    subspace.

    Parameters
    ----------
    decomposition
        Truncated SVD of the weight: U (d, R), S (R,), V (n, R).
    labels
        Subspace of each column, (n,) integers. Every subspace 0 .. K - 1 must occur.
    subspace_rank
        Requested trained rank r_k of every subspace. It is clamped to min(n_k, R_k).
    basis
        Basis of the subspaces. ``"shared"`` uses A_k = U for all of them. ``"per_subspace"`` gives each subspace an
        orthonormal basis A_k of min(d, R, n_k) columns whose span contains the columns I_k of W_hat.
    initial_B
        Initial value of B; see the equations above.
    reconstruct
        Whether to start with ``C_k = Q_k^T`` instead of zero. With ``"weighted"`` B and r_k = rank(V_k) the update
        then equals W_hat, which is the identity ``W_hat[:, I_k] = A_k B_w B_z C_k`` of the paper.

    Returns
    -------
    Factors
        Factors in the dtype and on the device of the decomposition, with every subspace active.

    Raises
    ------
    ConfigError
        If an option is unknown, or subspace_rank is not a positive integer.
    ArrayValueError
        If the labels do not fit the decomposition, or a subspace has no column.

    References
    ----------
    .. [1] Zheng et al., "Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning",
       NeurIPS 2025.

    Examples
    --------
    >>> import numpy as np
    >>> from adamss import core
    >>> W = np.random.default_rng(0).standard_normal((6, 8))
    >>> decomposition = core.decompose(W, 4)
    >>> labels = core.segment(decomposition, 3, "contiguous")
    >>> factors = core.initial_factors(decomposition, labels, 2)
    >>> factors.A.shape, factors.B.shape, factors.C.shape
    ((1, 6, 4), (4, 6), (2, 8))
    """
    check_concrete(*decomposition, labels, name="decomposition and labels")
    if basis not in BASES:
        raise ConfigError(f"basis must be one of {', '.join(BASES)}; found {basis!r}")
    if initial_B not in INITIAL_B:
        raise ConfigError(f"initial_B must be one of {', '.join(INITIAL_B)}; found {initial_B!r}")
    subspace_rank = check_count(subspace_rank, name="subspace_rank", remedy="train 1 or more ranks")
    n = decomposition.V.shape[0]
    if tuple(labels.shape) != (n,):
        raise ArrayValueError(f"labels must have shape ({n},), one per column, found {tuple(labels.shape)}")

    xp = namespace(decomposition.U, labels)
    subspaces = int(xp.max(labels)) + 1
    sizes = [int(size) for size in subspace_sizes(labels, subspaces)]
    if int(xp.min(labels)) < 0 or min(sizes) < 1:
        raise ArrayValueError(
            f"labels must use every number 0 .. {subspaces - 1}; subspace sizes are {sizes}"
        )

    R = decomposition.S.shape[0]
    limits = [R if basis == "shared" else min(R, size) for size in sizes]
    ranks = [min(subspace_rank, size, limit) for size, limit in zip(sizes, limits, strict=True)]
    r = max(ranks)
    leading = _leading_directions(decomposition.V, labels, sizes, r)
    # orth(V_k^T Q_k) equals `leading`, whose columns are orthonormal even where V_k^T Q_k has zero columns.
    A, stacked = decomposition.U[None, :, :], leading
    plain = basis == "shared" and initial_B == "orthonormal"
    if not plain or reconstruct:
        members = one_hot(labels, subspaces, dtype=decomposition.V.dtype)
        principal = _principal_columns(decomposition.V, members, leading)
    if not plain:
        columns = _first_columns(decomposition.V, members, sizes, r) if initial_B == "qr" else principal
        stacked = decomposition.S[:, None] * (xp.matrix_transpose(decomposition.V) @ columns)
    if basis == "per_subspace":
        coordinates = _column_spaces(decomposition, labels, sizes, max(limits))  # (K, R, P)
        A = decomposition.U @ coordinates
        stacked = xp.matrix_transpose(coordinates) @ stacked
    if initial_B == "qr" or (initial_B == "orthonormal" and basis == "per_subspace"):
        stacked = xp.linalg.qr(stacked, mode="reduced")[0]
    P = stacked.shape[1]
    on = device(stacked)
    kept = xp.asarray([k * r + i for k, rank in enumerate(ranks) for i in range(rank)], device=on)
    B = xp.take(xp.reshape(xp.permute_dims(stacked, (1, 0, 2)), (P, subspaces * r)), kept, axis=1)

    integer = labels.dtype
    rank_array = xp.asarray(ranks, dtype=integer, device=on)
    if reconstruct:
        C = xp.matrix_transpose(xp.sum(principal, axis=0))
        within = xp.arange(r, dtype=integer, device=on)[:, None] < xp.take(rank_array, labels)[None, :]
        C = xp.where(within, C, xp.zeros_like(C))
    else:
        C = xp.zeros((r, n), dtype=B.dtype, device=on)
    return Factors(A, B, C, labels, rank_array, xp.ones((subspaces,), dtype=xp.bool, device=on))


def factors_from_directions(
    M: Array, C: Array, labels: Array, ranks: Array, active: Array, *, U: Array | None = None
) -> Factors:
    """Return factors with a shared basis whose update is ``M @ expand(C)``.

    A is the first max(q, R) columns of ``orth([M, U])``, and ``B = A^T M``. The update is preserved because A spans
    M. The directions that U adds let training continue in R directions.

    Parameters
    ----------
    M
        Input directions, (d, q), as `contract` returns them.
    C, labels, ranks, active
        Fields of `Factors`.
    U
        Leading left singular vectors of the weight, (d, R). None means that the basis spans only M.

    Returns
    -------
    Factors
        Factors with A of shape (1, d, P), where P = max(q, R), but at most d.
    """
    xp = namespace(M, C)
    spanning = M if U is None else xp.concat([M, xp.astype(U, M.dtype)], axis=1)
    columns = M.shape[1] if U is None else max(M.shape[1], U.shape[1])
    A = xp.linalg.qr(spanning, mode="reduced")[0][:, :columns]
    return Factors(A[None, :, :], xp.matrix_transpose(A) @ M, C, labels, ranks, active)


def column_index(factors: Factors) -> tuple[Array, Array]:
    """Return, for each column c of M, its subspace k(c) and its position i(c) within the subspace, both (q,).

    A column beyond the sum of the ranks is padding, which occurs in stacks, whose layers share one q. Its subspace
    is given as K, which no column of W has as a label, and its position is arbitrary.
    """
    return positions(factors.ranks, q=factors.B.shape[1], highest=factors.C.shape[0])


@compiled_as_one
def positions(ranks: Array, *, q: int, highest: int) -> tuple[Array, Array]:
    """Return `column_index` from the ranks, the number q of columns and the number of rows of C."""
    xp = namespace(ranks)
    columns = xp.arange(q, dtype=ranks.dtype, device=device(ranks))
    if highest == 1 and q == ranks.shape[0]:
        # No rank is above 1 and the ranks sum to K, so all of them are 1, and column k belongs to subspace k.
        return columns, xp.zeros_like(columns)
    ends = xp.cumulative_sum(ranks, axis=0, dtype=ranks.dtype)
    before = xp.astype(columns[:, None] >= ends[None, :], ranks.dtype)
    group = xp.sum(before, axis=1, dtype=ranks.dtype)
    last = xp.full_like(group, ranks.shape[0] - 1)
    place = columns - xp.take(ends - ranks, xp.minimum(group, last))
    return group, xp.minimum(place, xp.full_like(place, highest - 1))


def outline(factors: Factors, *, name: str = "factors") -> Factors:
    """Return an outline of the factors in NumPy: labels, ranks and mask, and zeros for A, B and C.

    The outline is all that counting, checking and planning need, and it does not depend on the framework and the
    device of the factors. The zeros are broadcast from one number and take no memory.

    Parameters
    ----------
    factors
        Factors of one layer. Of A, B and C only ``shape`` is read.
    name
        Name of the factors in messages, such as the module path of the layer.

    Returns
    -------
    Factors
        Factors of the same shapes. Labels, ranks and mask are not copied if NumPy can use their memory.

    Raises
    ------
    ArrayTypeError
        If labels, ranks or mask are traced and so have no values.
    """
    A, B, C, *small = factors
    check_concrete(*small, name=name)
    zeros = (np.broadcast_to(np.float32(0), tuple(array.shape)) for array in (A, B, C))
    return Factors(*zeros, *map(as_numpy, small))


def basis_ranks(factors: Factors) -> Array:
    """Return R_k, the number of basis columns of each subspace without padding.

    ``R_k = P`` if subspaces share a basis, and ``R_k = min(P, n_k)`` if each subspace has its own.

    Parameters
    ----------
    factors
        Factors of one layer.

    Returns
    -------
    Array
        Numbers R_k, (K,) integers.
    """
    xp = namespace(factors.labels)
    groups, _, P = factors.A.shape
    if groups == 1 or groups < factors.ranks.shape[0]:
        return xp.full(factors.ranks.shape, P, dtype=factors.ranks.dtype, device=device(factors.ranks))
    sizes = subspace_sizes(factors.labels, groups)
    return xp.astype(xp.minimum(sizes, xp.full_like(sizes, P)), factors.ranks.dtype)


def hold_frozen(before: Factors, after: Factors) -> Factors:
    """Restore the frozen subspaces of `after` to their values in `before`, bit for bit.

    This undoes what an optimiser does to frozen elements, such as weight decay and momentum.

    Parameters
    ----------
    before, after
        Factors of one layer before and after a step of an optimiser. The mask of `before` decides which
        subspaces are frozen.

    Returns
    -------
    Factors
        Factors with combined B and C. All other fields are those of `before`.
    """
    xp = namespace(before.B)
    trained_B, trained_C = trained_elements(before)
    return before._replace(B=xp.where(trained_B, after.B, before.B), C=xp.where(trained_C, after.C, before.C))


def trained_elements(factors: Factors) -> tuple[Array, Array]:
    """Return which columns of B and which columns of C belong to an active subspace.

    Parameters
    ----------
    factors
        Factors of one layer.

    Returns
    -------
    tuple of Array
        Booleans of shape (1, q) for B and (1, n) for C, which broadcast against them.
    """
    q, highest = factors.B.shape[1], factors.C.shape[0]
    masks: tuple[Array, Array] = _trained_elements(
        factors.labels, factors.ranks, factors.active, q=q, highest=highest
    )
    return masks


@compiled_as_one
def _trained_elements(
    labels: Array, ranks: Array, active: Array, *, q: int, highest: int
) -> tuple[Array, Array]:
    xp = namespace(labels)
    group, _ = positions(ranks, q=q, highest=highest)
    last = xp.full_like(group, ranks.shape[0] - 1)
    trained_B = xp.take(active, xp.minimum(group, last)) & (group <= last)
    return trained_B[None, :], xp.take(active, labels)[None, :]


def only(factors: Factors, chosen: Array) -> Factors:
    """Set the update of all subspaces except the chosen ones to zero. The shapes stay the same.

    Parameters
    ----------
    factors
        Factors of one layer.
    chosen
        Which subspaces contribute, (K,) booleans.

    Returns
    -------
    Factors
        Factors whose C is zero in the columns of the other subspaces.
    """
    xp = namespace(factors.C)
    own = xp.take(chosen, factors.labels)[None, :]
    return factors._replace(C=xp.where(own, factors.C, xp.zeros_like(factors.C)))


def select(labels: Any, ranks: Any, chosen: Any) -> Selection:
    """Return which columns of W and of B belong to some of the subspaces of a layer.

    All arguments are NumPy arrays, as `outline` returns them.

    Parameters
    ----------
    labels
        Subspace of each column, (n,) signed integers.
    ranks
        Trained rank of each subspace, (K,) integers.
    chosen
        Which subspaces are chosen, (K,) booleans. If none is, the arrays of numbers are empty.

    Returns
    -------
    Selection
        Selection whose labels have the dtype of `labels`.

    Examples
    --------
    >>> import numpy as np
    >>> part = select(np.asarray([0, 0, 1, 2]), np.asarray([2, 1, 1]), np.asarray([True, False, True]))
    >>> part.labels.tolist(), part.subspaces.tolist(), part.directions.tolist()
    ([0, 0, -1, 1], [0, 2], [0, 1, 3])
    """
    number = np.where(chosen, np.cumsum(chosen) - 1, -1).astype(labels.dtype)
    return Selection(number[labels], np.flatnonzero(chosen), np.flatnonzero(np.repeat(chosen, ranks)))


def join(blocks: Sequence[Factors]) -> Factors:
    """Join the factors of several weights to factors of the matrix ``[W_1, ..., W_L]: (d, n_1 + ... + n_L)``.

    The weights of the experts of one layer form such a matrix. However many experts there are, they then have one
    array, one set of factors and one mask. A subspace of one block contains no column of another block, and
    ``update([W_1, ...]) = [update(W_1), ...]``.

    Parameters
    ----------
    blocks
        Factors of each weight, with the same d, the same number of subspaces K and the same number of bases G.

    Returns
    -------
    Factors
        Factors with L G bases and L K subspaces, in the order of the blocks, padded with zeros to the largest P and
        r.

    Raises
    ------
    ArrayValueError
        If the blocks differ in K.

    Examples
    --------
    >>> import numpy as np
    >>> one = Factors(np.ones((1, 2, 2)), np.ones((2, 3)), np.ones((1, 4)), np.asarray([0, 1, 1, 2]),
    ...               np.asarray([1, 1, 1]), np.asarray([True, True, False]))
    >>> both = join([one, one])
    >>> both.A.shape, both.B.shape, both.labels.tolist()
    ((2, 2, 2), (2, 6), [0, 1, 1, 2, 3, 4, 4, 5])
    """
    if len(blocks) == 1:
        return blocks[0]
    xp, K = namespace(blocks[0].B), blocks[0].ranks.shape[0]
    if any(f.ranks.shape[0] != K for f in blocks):
        raise ArrayValueError(
            f"blocks must have equally many subspaces, found {[f.ranks.shape[0] for f in blocks]}; segment them alike"
        )
    P, r = max(f.B.shape[0] for f in blocks), max(f.C.shape[0] for f in blocks)
    return Factors(
        xp.concat([_padded(f.A, 2, P) for f in blocks], axis=0),
        xp.concat([_padded(f.B, 0, P) for f in blocks], axis=1),
        xp.concat([_padded(f.C, 0, r) for f in blocks], axis=1),
        xp.concat([f.labels + number * K for number, f in enumerate(blocks)]),
        *(xp.concat([getattr(f, name) for f in blocks]) for name in ("ranks", "active")),
    )


def split(factors: Factors, count: int) -> list[Factors]:
    """Undo `join`: return the factors of `count` weights with the same number of columns. The padding is kept."""
    if count == 1:
        return [factors]
    A, B, C, labels, ranks, active = factors
    K, n, G = ranks.shape[0] // count, labels.shape[0] // count, A.shape[0] // count
    ends = [0, *np.cumsum(np.sum(np.reshape(as_numpy(ranks), (count, K)), axis=1)).tolist()]
    return [
        Factors(
            A[i * G : (i + 1) * G, :, :],
            B[:, ends[i] : ends[i + 1]],
            C[:, i * n : (i + 1) * n],
            labels[i * n : (i + 1) * n] - i * K,
            ranks[i * K : (i + 1) * K],
            active[i * K : (i + 1) * K],
        )
        for i in range(count)
    ]


def check_factors(factors: Factors, *, shape: tuple[int, int] | None = None, name: str = "factors") -> None:
    """Check that the arrays of factors fit together, and fit the weight.

    Parameters
    ----------
    factors
        Factors of one layer.
    shape
        Shape (d, n) of the weight, or None if it is not known. A may have one input row more, for the bias.
    name
        Name of the factors in messages, such as the module path of the layer.

    Raises
    ------
    ArrayTypeError
        If labels or ranks are traced and so have no values.
    ArrayValueError
        If an array does not fit. The message names the array, what was found and what was expected.
    """

    def expect(condition: bool, what: str, found: Any) -> None:
        if not condition:
            raise ArrayValueError(f"{name}: {what}, found {found}")

    A, B, C, labels, ranks, active = factors
    check_concrete(labels, ranks, name=f"{name}: labels and ranks")
    for array, axes in ((A, 3), (B, 2), (C, 2), (labels, 1), (ranks, 1), (active, 1)):
        expect(array.ndim == axes, f"an array of {axes} axes is needed", tuple(array.shape))
    xp = namespace(labels)
    K, n = ranks.shape[0], labels.shape[0]
    expect(
        min(K, n, *A.shape, *B.shape, *C.shape) > 0, "no axis may be empty", [tuple(a.shape) for a in factors]
    )
    expect(K % A.shape[0] == 0, f"A must hold 1 or K = {K} bases, or a divisor of K", A.shape[0])
    expect(B.shape[0] == A.shape[2], f"B must have P = {A.shape[2]} rows", B.shape[0])
    expect(C.shape[1] == n, f"C must have n = {n} columns", C.shape[1])
    expect(active.shape[0] == K, f"active must have K = {K} entries", active.shape[0])
    lowest, highest = int(xp.min(labels)), int(xp.max(labels))
    expect(lowest >= 0 and highest < K, f"labels must lie in 0 .. {K - 1}", f"{lowest} .. {highest}")
    q, r = int(xp.sum(ranks)), int(xp.max(ranks))
    expect(int(xp.min(ranks)) >= 0, "ranks must not be negative", int(xp.min(ranks)))
    expect(q == B.shape[1], f"ranks must sum to the q = {B.shape[1]} columns of B", q)
    expect(r <= C.shape[0], f"ranks must not exceed the r = {C.shape[0]} rows of C", r)
    if shape is not None:
        d, columns = shape
        expect(A.shape[1] in (d, d + 1), f"A must have d = {d} rows (or one more, for the bias)", A.shape[1])
        expect(n == columns, f"labels must have n = {columns} entries", n)


def _padded(array: Array, axis: int, size: int) -> Array:
    """Pad an array with zeros at the end of an axis, to the given size along this axis."""
    missing = size - array.shape[axis]
    if not missing:
        return array
    shape = tuple(missing if at == axis else length for at, length in enumerate(array.shape))
    xp = namespace(array)
    return xp.concat([array, xp.zeros(shape, dtype=array.dtype, device=device(array))], axis=axis)


def _leading_directions(V: Array, labels: Array, sizes: list[int], r: int) -> Array:
    """Return the leading r left singular vectors of every V_k^T, (K, R, r), orthonormal.

    Vectors beyond n_k are arbitrary or zero. The vectors are computed from the smaller of V_k V_k^T and V_k^T V_k.
    Subspaces whose sizes round up to the same power of two form a batch, which needs few calls with few shapes.
    """
    xp = namespace(V)
    R, on = V.shape[1], device(V)
    batches: dict[int, list[int]] = {}
    for k, size in enumerate(sizes):
        side = max(SMALLEST_BATCH, 1 << (size - 1).bit_length())
        batches.setdefault(min(side, R), []).append(k)
    ordered = _by_subspace(V, labels)
    found = []
    for side, chosen in batches.items():
        rows = _member_rows(ordered, sizes, chosen, side)
        columns = xp.matrix_transpose(rows)
        _, vectors = eigh(columns @ rows if side == R else rows @ columns)
        leading = xp.flip(vectors[:, :, -min(r, side) :], axis=-1)
        if side < R:
            # Columns of V_k^T Q_k are zero for a zero singular value, and not quite orthogonal for an inexact one.
            leading, _ = xp.linalg.qr(columns @ leading, mode="reduced")
            if side < r:
                nothing = xp.zeros((len(chosen), R, r - side), dtype=V.dtype, device=on)
                leading = xp.concat([leading, nothing], axis=-1)
        found.append(leading)
    place = np.argsort([k for chosen in batches.values() for k in chosen])
    leading = xp.take(xp.concat(found), xp.asarray(place, device=on), axis=0)
    pivots = xp.argmax(xp.abs(leading), axis=1)[:, None, :]
    signs = xp.sign(xp.take_along_axis(leading, pivots, axis=1))
    return leading * signs


def _by_subspace(matrix: Array, labels: Array) -> Array:
    """Return the rows of an (n, m) matrix sorted by subspace, followed by a row of zeros: (n + 1, m)."""
    xp = namespace(matrix)
    nothing = xp.zeros((1, matrix.shape[1]), dtype=matrix.dtype, device=device(matrix))
    return xp.concat([xp.take(matrix, xp.argsort(labels, stable=True), axis=0), nothing])


def _member_rows(ordered: Array, sizes: list[int], chosen: list[int], width: int) -> Array:
    """Return the rows of some subspaces from the result of `_by_subspace`, stacked and padded with zero rows.

    The result has the shape (K', s, m), where s is the larger of `width` and the largest of the sizes n_k.
    """
    xp = namespace(ordered)
    ends = np.cumsum(sizes)[chosen, None]
    own = np.asarray(sizes)[chosen, None]
    places = np.arange(max(width, int(own.max())))
    index = np.where(places < own, ends - own + places, ordered.shape[0] - 1)
    rows = xp.take(ordered, xp.asarray(index.reshape(-1), device=device(ordered)), axis=0)
    return xp.reshape(rows, (*index.shape, -1))


def _first_columns(V: Array, members: Array, sizes: list[int], r: int) -> Array:
    """Return the first r columns of every Z*_k, (K, n, r), with zero rows outside I_k.

    If Z*_k has fewer than r columns, its last column is repeated.
    """
    xp = namespace(V)
    order = xp.argsort(xp.argmax(members, axis=1), stable=True)
    ends = np.cumsum(sizes)
    places = [
        int(end) - size + min(i, size - 1) for end, size in zip(ends, sizes, strict=True) for i in range(r)
    ]
    first = xp.take(V, xp.take(order, xp.asarray(places, dtype=order.dtype, device=device(V))), axis=0)
    Z = xp.reshape(V @ first.T, (V.shape[0], len(sizes), r))
    return xp.permute_dims(Z * members[:, :, None], (1, 0, 2))


def _principal_columns(V: Array, members: Array, leading: Array) -> Array:
    """Return orthonormal Q_k that span V_k times the leading directions, (K, n, r) with zero rows outside I_k.

    Q_k comes from a QR decomposition and not from the Gram matrix, which cannot resolve singular values of V_k below
    the square root of the rounding unit.
    """
    xp = namespace(V)
    own = xp.matrix_transpose(members)[:, :, None]
    Q, upper = xp.linalg.qr(own * (V @ leading), mode="reduced")
    # Libraries differ in the signs of Q and R; a non-negative diagonal of R makes them unique.
    diagonal = xp.sum(upper * xp.eye(upper.shape[-1], dtype=upper.dtype, device=device(upper)), axis=-1)
    signs = xp.where(diagonal < 0, -xp.ones_like(diagonal), xp.ones_like(diagonal))
    return own * Q * signs[:, None, :]


def _column_spaces(decomposition: Decomposition, labels: Array, sizes: list[int], P: int) -> Array:
    """Return orthonormal bases of the columns I_k of W_hat in the coordinates of U, (K, R, P), zero-padded."""
    xp = namespace(labels)
    on = device(labels)
    ordered = _by_subspace(decomposition.V * decomposition.S, labels)
    rows = _member_rows(ordered, sizes, list(range(len(sizes))), 1)
    Q, _ = xp.linalg.qr(xp.matrix_transpose(rows), mode="reduced")
    # A subspace of n_k < P columns uses only the first n_k columns of Q. The remaining columns are arbitrary.
    limits = xp.asarray(np.minimum(sizes, P), device=on)
    used = xp.arange(Q.shape[-1], dtype=limits.dtype, device=on)[None, :] < limits[:, None]
    return xp.where(used[:, None, :], Q, xp.zeros_like(Q))[:, :, :P]
