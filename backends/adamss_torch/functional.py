"""The update of a linear layer as one autograd function: a few matrix products, whatever K is.

Operands are kept in the orientation in which all three of forward, input gradient and factor gradients
read them along contiguous rows: ``B: (q, P)``, ``M: (q, d)``, ``E: (q, n)``; each is the transpose of its namesake
in `adamss.core.factors`, but for E, which is the same.

M is kept times a power of two (`adamss.core.factors.HEADROOM`) and E over it, which every product of the two
cancels. E, and M for many tokens, get rows of zeros up to a multiple of 16: products of an odd width take up to
twice as long.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from adamss.core import cheapest_order
from adamss.core.cost import check_order, device_balance
from adamss.core.factors import HEADROOM

__all__ = ["MULTIPLE", "Constants", "Layout", "Plan", "make_layout", "update"]

FLOAT16_MAX = torch.finfo(torch.float16).max
NO_CONTEXT = nullcontext()
MULTIPLE = 16
"""Rows of M and E of which products take the least time for each."""

FEW = 16
"""Tokens up to which each column picks its z, as E would take longer to form than it saves."""
MANY = 512
"""Tokens from which a product pays for padding M first."""


class Layout(NamedTuple):
    """Where the entries of B and C stand; a function of labels and ranks, and of which subspaces B and C hold.

    Attributes
    ----------
    rows
        (r, n') int64: row of E in which ``C[i, j]`` stands; q' where it is padding.
    groups
        (q',) int64: subspace of each row of M.
    slots
        (q',) int64: place ``k * r + i`` of each row of M among K padded groups of r.
    mask
        (q'', n) with the padding of E: the inverse of the headroom where E has an entry, and zero. None for r > 1,
        where E is not C times something.
    columns
        (n',) int64: column of W for each of C; None for all n of them in their order.
    padded
        Whether C may have padding.
    """

    rows: Tensor
    groups: Tensor
    slots: Tensor
    mask: Tensor | None
    columns: Tensor | None = None
    padded: bool = True


class Constants(NamedTuple):
    """The part of the update that is not trained any more, with rows of zeros for speed.

    Attributes
    ----------
    M
        (p, d): rows like those of ``B A^T``; (p, d + 1) where the bias is adapted too.
    E
        (p, n): rows of the expanded C.
    """

    M: Tensor
    E: Tensor


class Plan(NamedTuple):
    """All of an update that is not trained.

    Attributes
    ----------
    A
        Frozen basis, (G, d, P), or (G, d + 1, P) where the bias is adapted too.
    active
        (K,) booleans; the gradients of the other subspaces are zero. None for the gradients of all.
    layout
        Of B and C.
    constants
        More rows of M and E, which have no gradient; None for none.
    order
        One of `adamss.core.ORDERS`; None for the one that costs less.
    weight
        (n, d), frozen, if the base product is ``x weight^T`` and a frozen bias: the gradient of x is then that of
        the whole layer, in one sum, and the base product has none.
    overwrite
        Whether the result may be written into the base product, which nobody else has seen.
    input_kept
        Whether x is kept for the backward anyway, as by a layer whose own weight is trained.
    """

    A: Tensor
    active: Tensor | None
    layout: Layout
    constants: Constants | None = None
    order: str | None = None
    weight: Tensor | None = None
    overwrite: bool = False
    input_kept: bool = False


def make_layout(
    labels: Tensor,
    ranks: Tensor,
    r: int,
    q: int,
    chosen: Tensor | None = None,
    *,
    dtype: torch.dtype,
) -> Layout:
    """Return the layout of C: (r, n) and of q rows of M for these labels (n,) and ranks (K,) of sum q.

    With `chosen`, (K,) booleans, that of the columns of C and rows of M that belong to these subspaces; `dtype` is
    that of C.
    """
    labels, ranks = labels.to(torch.int64), ranks.to(torch.int64)
    ends = ranks.cumsum(0)
    starts = ends - ranks
    places = torch.arange(r, device=labels.device)[:, None]
    rows = torch.where(places < ranks[labels], starts[labels] + places, q)
    # Not by `repeat_interleave`, whose length depends on values: a compiler must know it.
    directions = torch.arange(q, device=labels.device)
    groups = torch.searchsorted(ends, directions, right=True)
    slots = groups * r + directions - starts[groups]
    padded = q < ranks.shape[0] * r
    if chosen is None:
        return Layout(rows, groups, slots, _mask(rows, q, dtype), None, padded)
    kept, columns = chosen[groups].nonzero()[:, 0], chosen[labels].nonzero()[:, 0]
    renumbered = directions.new_full((q + 1,), kept.numel())
    renumbered[kept] = torch.arange(kept.numel(), device=labels.device)
    # A column of no chosen subspace stands nowhere in E, as padding does.
    rows = renumbered[rows]
    mask = _mask(rows, kept.numel(), dtype)
    return Layout(rows[:, columns], groups[kept], slots[kept], mask, columns, padded)


def _mask(rows: Tensor, q: int, dtype: torch.dtype) -> Tensor | None:
    """Return what C is times in E, if that has one entry in a column at most."""
    if rows.shape[0] > 1:
        return None
    numbers = torch.arange(_height(q, padded=False), device=rows.device)[:, None]
    return ((numbers == rows) & (rows < q)).to(dtype) * (1 / _headroom(dtype))


def _height(q: int, *, padded: bool) -> int:
    """Return how many rows E has: q, one for the padding of C where there may be some, and more padding."""
    return -(-(q + padded) // MULTIPLE) * MULTIPLE if q else 0


def update(base: Tensor, x: Tensor, B: Tensor, C: Tensor, plan: Plan) -> Tensor:
    """Return ``base + (x M^T) E`` in the dtype of `base`.

    The base product is an input, not redone: with C = 0 the result equals it to the bit.

    Parameters
    ----------
    base
        Output of the frozen layer, (..., n).
    x
        Its input, (..., d).
    B
        Trained, (q', P).
    C
        Trained, (r, n').
    plan
        The rest.

    Returns
    -------
    Tensor
        (..., n), differentiable once in base, x, B and C.

    Raises
    ------
    ConfigError
        If the order is unknown.
    """
    check_order(plan.order)
    if plan.A.shape[0] > 1 or plan.constants is not None or B.shape[0] == 0:
        plan = plan._replace(order="factors_first")
    elif plan.order is None:
        plan = plan._replace(order=_cheapest(base, x, B, C, plan))
    if plan.weight is not None:
        base = base.detach()
    d = x.shape[-1]
    training = torch.is_grad_enabled()
    plain = plan.order == "input_first" and plan.layout.mask is not None and plan.layout.columns is None
    # Autocast would round A B to half precision; it is to be rounded once, as M.
    with _without_autocast(base):
        if plain and not training and 0 < x.numel() <= FEW * d:
            return _forward_of_few(base, x, B, C, plan)
        rows = B
        if plan.order == "factors_first":
            rows = _directions(plan.A, B, plan.layout.slots, C.shape[0], _headroom(base.dtype), base.dtype)
        if training:
            result: Tensor = _Update.apply(base, x, rows, C, plan)  # type: ignore[no-untyped-call]
            return result
        return _forward(base, x, rows, C, plan)[0]


def _cheapest(base: Tensor, x: Tensor, B: Tensor, C: Tensor, plan: Plan) -> str:
    training = torch.is_grad_enabled() and (B.requires_grad or C.requires_grad)
    find = _cheapest_of.__wrapped__ if torch.compiler.is_compiling() else _cheapest_of
    on_cpu = base.device.type == "cpu"
    shapes = x.shape, base.shape[-1], plan.A.shape[-1], B.shape[0]
    return find(*shapes, training, plan.input_kept, base.element_size(), on_cpu)


@lru_cache(maxsize=4096)
def _cheapest_of(
    shape: tuple[int, ...],
    n: int,
    rank: int,
    directions: int,
    training: bool,
    kept: bool,
    itemsize: int,
    on_cpu: bool,
) -> str:
    """Return `cheapest_order` for inputs of this shape, (..., d); a training has few."""
    *outer, d = shape
    return cheapest_order(
        tokens=prod(outer),
        d=d,
        n=n,
        rank=rank,
        directions=directions,
        training=training,
        input_kept=kept,
        balance=device_balance(itemsize, cpu=on_cpu),
    )


class _Products(NamedTuple):
    """What the forward computes of use to the backward."""

    inputs: Tensor
    z: Tensor
    M: Tensor | None
    E: Tensor


def _forward(base: Tensor, x: Tensor, rows: Tensor, C: Tensor, plan: Plan) -> tuple[Tensor, _Products]:
    """Return the update of `rows`, which are M, or B if it is projected."""
    q, n, dtype = rows.shape[0], base.shape[-1], base.dtype
    headroom, M = _headroom(dtype), None
    inputs = _in(x.reshape(-1, x.shape[-1]), dtype)
    E = _expand(C, plan.layout, q, n, dtype)
    if plan.order == "input_first":
        inputs = _bounded(_with_bias(inputs, _times(_in(plan.A[0], dtype), headroom).t()))
        z = F.linear(inputs, _in(rows, dtype))
    else:
        M = rows
        if plan.constants is not None:
            M = torch.cat([M, _times(_in(plan.constants.M, dtype), headroom)])
            E = torch.cat([E[:q], _times(_in(plan.constants.E, dtype), 1 / headroom)])
        elif E.shape[0] > q and inputs.shape[0] >= MANY:
            M = torch.cat([M, M.new_zeros(E.shape[0] - q, M.shape[1])])
        z = _with_bias(inputs, M)
    z = _bounded(z)
    used = E if E.shape[0] == z.shape[1] else E[: z.shape[1]]
    if plan.overwrite:
        base.view(-1, n).addmm_(z, used)
        return base, _Products(inputs, z, M, E)
    y = torch.addmm(base.reshape(-1, n), z, used)
    # Not a view, which autograd would not let anyone change in place (`ReLU(inplace=True)`).
    return torch.ops.aten._unsafe_view(y, base.shape), _Products(inputs, z, M, E)


def _forward_of_few(base: Tensor, x: Tensor, B: Tensor, C: Tensor, plan: Plan) -> Tensor:
    """Return the same for the few tokens of generation, projected, of one row of E for each column."""
    A, d, n, dtype = plan.A[0], x.shape[-1], base.shape[-1], base.dtype
    headroom = _headroom(dtype)
    # x is smaller than A here.
    u = _times(_in(x.reshape(-1, d), dtype), headroom) @ _in(A[:d], dtype)
    if A.shape[0] > d:
        u = u + _times(_in(A[d], dtype), headroom)
    z = _bounded(F.linear(_bounded(u), _in(B, dtype)))
    own = z.index_select(1, plan.layout.rows[0])
    y = base.reshape(-1, n)
    update = torch.Tensor.addcmul_ if plan.overwrite else torch.addcmul
    return update(y, own, _in(_times(C, 1 / headroom), dtype)).view(base.shape)


class _Update(torch.autograd.Function):
    """``y = base + z E``, ``z = x M^T``; by hand ``dz = dy E^T``, ``dx = dz M``, ``dM = dz^T x``, ``dE = z^T dy``.

    `rows` is M, made of B outside, by products that autograd knows: it then finds the gradient of B without Python,
    which takes longer than the arithmetic. With the order ``"input_first"``, `rows` is B.

    Kept for the backward are x and the columns of z of trained rows of M, and M and E; none that no gradient wants.
    Projecting is for those who are short of memory: it keeps ``x A`` for x, and forms M and E anew.
    """

    @staticmethod
    def forward(ctx: Any, base: Tensor, x: Tensor, rows: Tensor, C: Tensor, plan: Plan) -> Tensor:
        y, (inputs, z, M, E) = _forward(base, x, rows, C, plan)
        _, x_wanted, rows_wanted, C_wanted, _ = ctx.needs_input_grad
        q = rows.shape[0]
        trained_z = z if z.shape[1] == q else z[:, :q].contiguous()
        projected = M is None
        ctx.save_for_backward(
            inputs if rows_wanted and q else None,
            trained_z if C_wanted and q else None,
            (rows if projected else M) if x_wanted else None,
            (C if projected else E) if x_wanted or rows_wanted else None,
            plan.weight if x_wanted else None,
        )
        # Not trained, and never changed in place: no need of what `save_for_backward` watches over.
        ctx.plan = plan._replace(weight=None, constants=None)
        ctx.x_shape, ctx.rows_shape, ctx.r = x.shape, rows.shape, C.shape[0]
        ctx.x_dtype, ctx.rows_dtype, ctx.C_dtype = x.dtype, rows.dtype, C.dtype
        ctx.whole = plan.weight is not None
        if plan.overwrite:
            ctx.mark_dirty(base)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        inputs, z, M, E, weight = ctx.saved_tensors
        _, x_wanted, rows_wanted, C_wanted, _ = ctx.needs_input_grad
        A, active, layout = ctx.plan.A, ctx.plan.active, ctx.plan.layout
        (q, _), r, d = ctx.rows_shape, ctx.r, ctx.x_shape[-1]
        headroom = _headroom(dy.dtype)
        dx = d_rows = dC = frozen = None
        dy2 = dy.reshape(-1, dy.shape[-1])
        with _without_autocast(dy):
            if ctx.plan.order == "input_first":
                M = None if M is None else _directions(A, M, layout.slots, r, headroom, dy.dtype)
                E = None if E is None else _expand(E, layout, q, dy2.shape[1], dy.dtype)
            if active is not None and q and (rows_wanted or C_wanted):
                frozen = active.logical_not()
                # With one row for each subspace, the rows are in the order of these.
                frozen = (frozen if q == frozen.shape[0] and r == 1 else frozen[layout.groups])[:, None]
            if x_wanted or (rows_wanted and q):
                dz = F.linear(dy2, E)
            if x_wanted:
                M = M if M.shape[1] == d else M[:, :d]
                all_dz = dz if dz.shape[1] == M.shape[0] else dz[:, : M.shape[0]]
                dx = all_dz @ M if weight is None else (dy2 @ weight).addmm_(all_dz, M)
                dx = _in(dx, ctx.x_dtype).view(ctx.x_shape)
            if rows_wanted and q:
                dz = dz if dz.shape[1] == q else dz[:, :q]
                d_rows = dz.t() @ inputs
                if d_rows.shape[1] != ctx.rows_shape[1]:
                    d_rows = torch.cat([d_rows, dz.sum(0)[:, None]], dim=1)
                if frozen is not None:
                    d_rows.masked_fill_(frozen, 0.0)
                d_rows = _in(d_rows, ctx.rows_dtype)
            elif rows_wanted:
                d_rows = dy2.new_zeros(ctx.rows_shape, dtype=ctx.rows_dtype)
            if C_wanted and q:
                dE = _product(z.t(), dy2, 1 / headroom)
                if frozen is not None:
                    dE.masked_fill_(frozen, 0.0)
                dC = _expand_vjp(_in(dE, ctx.C_dtype), layout)
            elif C_wanted:
                dC = dy2.new_zeros(r, 0, dtype=ctx.C_dtype)
        return (None if ctx.whole else dy), dx, d_rows, dC, None


def _headroom(dtype: torch.dtype) -> float:
    """Return what M is times, and E over; in float16 nothing, for want of exponents."""
    return 1.0 if dtype == torch.float16 else HEADROOM


def _bounded(array: Tensor) -> Tensor:
    """Clip what overflowed for want of headroom: infinity times zero would be NaN."""
    return array.clamp(-FLOAT16_MAX, FLOAT16_MAX) if array.dtype == torch.float16 else array


def _without_autocast(array: Tensor) -> AbstractContextManager[object]:
    kind = array.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else NO_CONTEXT


def _in(array: Tensor, dtype: torch.dtype) -> Tensor:
    return array if array.dtype == dtype else array.to(dtype)


def _times(array: Tensor, factor: float) -> Tensor:
    return array if factor == 1.0 else array * factor


def _with_bias(x: Tensor, rows: Tensor) -> Tensor:
    """``x M^T``, the bias column of M added rather than a column of ones appended to x."""
    d = x.shape[1]
    return F.linear(x, rows) if rows.shape[1] == d else F.linear(x, rows[:, :d]) + rows[:, d]


def _product(left: Tensor, right: Tensor, factor: float) -> Tensor:
    """``left right`` times a power of two, in one call."""
    return (
        left @ right if factor == 1.0 else torch.addmm(left.new_empty(1), left, right, beta=0, alpha=factor)
    )


def _directions(A: Tensor, B: Tensor, slots: Tensor, r: int, factor: float, dtype: torch.dtype) -> Tensor:
    """``M = B A^T`` times a factor, (q, d), each row with the basis of its own subspace."""
    if B.dtype == torch.float16 and factor != 1.0:
        return _in(_directions(A, B, slots, r, 1.0, torch.float32) * factor, dtype)
    if A.shape[0] == 1:
        return _in(_product(B, A[0].t(), factor), dtype)
    stacked = B.new_zeros(A.shape[0] * r, B.shape[1]).index_copy(0, slots, B).view(A.shape[0], r, -1)
    M = torch.bmm(stacked, A.transpose(1, 2)).flatten(0, 1).index_select(0, slots)
    return _in(_times(M, factor), dtype)


def _expand(C: Tensor, layout: Layout, q: int, n: int, dtype: torch.dtype) -> Tensor:
    """``E[rows[i, j], columns[j]] = C[i, j]``, (q'', n), over the headroom of the dtype."""
    rows, columns = layout.rows, layout.columns
    if layout.mask is not None:
        E = (C if columns is None else C.new_zeros(1, n).index_copy(1, columns, C)) * layout.mask
    else:
        # The padding of C is zero, and goes to row q, which is padding too.
        height = _height(q, padded=layout.padded)
        E = C.new_zeros(height, C.shape[1]).scatter(0, rows, C * (1 / _headroom(C.dtype)))
        E = E if columns is None else C.new_zeros(E.shape[0], n).index_copy(1, columns, E)
    if _headroom(C.dtype) != _headroom(dtype):
        E = E.to(torch.float32) * (_headroom(C.dtype) / _headroom(dtype))
    return _in(E, dtype)


def _expand_vjp(dE: Tensor, layout: Layout) -> Tensor:
    if layout.columns is not None:
        dE = dE.index_select(1, layout.columns)
    return (F.pad(dE, (0, 0, 0, 1)) if layout.padded else dE).gather(0, layout.rows)
