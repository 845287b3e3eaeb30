"""The update of a linear layer as one autograd function: a few matrix products, whatever K is.

Operands are kept in the orientation in which all three of forward, input gradient and factor gradients
read them along contiguous rows: ``B: (q, P)``, ``M: (q, d)``, ``E: (q, n)``; each is the transpose of its namesake
in `adamss.core.factors`, but for E, which is the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from adamss.core.factors import HEADROOM

__all__ = ["Constants", "Layout", "make_layout", "update"]

FLOAT16_MAX = torch.finfo(torch.float16).max


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
    columns
        (n',) int64: column of W for each of C; None for all n of them in their order.
    """

    rows: Tensor
    groups: Tensor
    slots: Tensor
    columns: Tensor | None = None


class Constants(NamedTuple):
    """The part of the update that is not trained any more.

    Attributes
    ----------
    M
        (p, d): rows like those of ``B A^T``; (p, d + 1) where the bias is adapted too.
    E
        (p, n): rows of the expanded C.
    """

    M: Tensor
    E: Tensor


def make_layout(labels: Tensor, ranks: Tensor, r: int, q: int, chosen: Tensor | None = None) -> Layout:
    """Return the layout of C: (r, n) and of q rows of M for these labels (n,) and ranks (K,) of sum q.

    With `chosen`, (K,) booleans, that of the columns of C and rows of M that belong to these subspaces.
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
    if chosen is None:
        return Layout(rows, groups, slots)
    kept, columns = chosen[groups].nonzero()[:, 0], chosen[labels].nonzero()[:, 0]
    renumbered = directions.new_full((q + 1,), kept.numel())
    renumbered[kept] = torch.arange(kept.numel(), device=labels.device)
    return Layout(renumbered[rows[:, columns]], groups[kept], slots[kept], columns)


def update(
    base: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    active: Tensor | None,
    layout: Layout,
    constants: Constants | None = None,
) -> Tensor:
    """Return ``base + (x M^T) E`` in the dtype of `base`.

    The base product is an input, not redone: with C = 0 the result equals it to the bit.

    Parameters
    ----------
    base
        Output of the frozen layer, (..., n).
    x
        Its input, (..., d).
    A
        Frozen basis, (G, d, P), or (G, d + 1, P) where the bias is adapted too.
    B
        Trained, (q', P).
    C
        Trained, (r, n').
    active
        (K,) booleans; the gradients of the other subspaces are zero. None for the gradients of all.
    layout
        Of B and C.
    constants
        More rows of M and E, which have no gradient; None for none.

    Returns
    -------
    Tensor
        (..., n), differentiable once in base, x, B and C.
    """
    more_M, more_E = (None, None) if constants is None else constants
    result: Tensor = _Update.apply(base, x, A, B, C, active, *layout, more_M, more_E)  # type: ignore[no-untyped-call]
    return result


class _Update(torch.autograd.Function):
    """``y = base + z E``, ``z = x M^T``; by hand ``dz = dy E^T``, ``dx = dz M``, ``dM = dz^T x``, ``dE = z^T dy``.

    Kept for the backward are x and the columns of z of trained rows of M; neither where there are none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        active: Tensor | None,
        rows: Tensor,
        groups: Tensor,
        slots: Tensor,
        columns: Tensor | None,
        more_M: Tensor | None,
        more_E: Tensor | None,
    ) -> Tensor:
        d, n, q = x.shape[-1], base.shape[-1], B.shape[0]
        _, _, _, B_wanted, C_wanted, *_ = ctx.needs_input_grad
        # Autocast would round A B to half precision; it is to be rounded once, as M.
        with torch.autocast(base.device.type, enabled=False):
            directions = _directions(A, B, slots, C.shape[0])
            E = _expand(C, rows, q, columns, n)
            if more_M is not None and more_E is not None:
                directions, E = torch.cat([directions, more_M]), torch.cat([E, more_E])
            directions, E = directions.to(base.dtype), E.to(base.dtype)
            M = directions[:, :d]
            x2 = x.reshape(-1, d).to(base.dtype)
            scale = 1.0 if x2.dtype == torch.float16 else HEADROOM
            scaled = directions if scale == 1.0 else directions * scale
            z = F.linear(x2, scaled[:, :d])
            if directions.shape[1] > d:
                z = z + scaled[:, d]
            if z.dtype == torch.float16:
                # For want of exponents there is no headroom here, and infinity times C = 0 would be NaN.
                z = z.clamp(-FLOAT16_MAX, FLOAT16_MAX)
            # Not by `alpha`, with which some libraries multiply z.
            y = torch.addmm(base.reshape(-1, n), z, E if scale == 1.0 else E * (1 / scale))
        trained_z = z if more_M is None else z[:, :q].clone()
        kept = (x2 if B_wanted and q else None, trained_z if C_wanted and q else None)
        ctx.save_for_backward(*kept, M, E, A, active, rows, groups, slots, columns)
        ctx.dtypes = x.dtype, B.dtype, C.dtype
        ctx.shape, ctx.scale = x.shape, scale
        ctx.q, ctx.rank, ctx.width = q, C.shape[0], directions.shape[1]
        # Not a view, which autograd would not let anyone change in place (`ReLU(inplace=True)`).
        result: Tensor = torch.ops.aten._unsafe_view(y, base.shape)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x2, z, M, E, A, active, rows, groups, slots, columns = ctx.saved_tensors
        _, x_wanted, _, B_wanted, C_wanted, *_ = ctx.needs_input_grad
        x_dtype, B_dtype, C_dtype = ctx.dtypes
        q, r = ctx.q, ctx.rank
        dx = dB = dC = None
        dy2 = dy.reshape(-1, dy.shape[-1])
        with torch.autocast(dy.device.type, enabled=False):
            if x_wanted:
                dz = F.linear(dy2, E)
                dx = (dz @ M).to(x_dtype).view(ctx.shape)
            elif B_wanted:
                dz = F.linear(dy2, E[:q])
            if B_wanted and q:
                trained = dz[:, :q]
                dM = trained.t() @ x2
                if ctx.width > M.shape[1]:
                    dM = torch.cat([dM, trained.sum(0)[:, None]], dim=1)
                dB = _directions_vjp(dM.to(B_dtype), A, slots, r)
                if active is not None:
                    dB = torch.where(active[groups][:, None], dB, 0)
            elif B_wanted:
                dB = A.new_zeros(0, A.shape[2], dtype=B_dtype)
            if C_wanted and q:
                # z was kept with its headroom.
                dE = (z.t() @ dy2).to(C_dtype)
                dC = _expand_vjp(dE, rows, columns) * (1 / ctx.scale)
                if active is not None:
                    # A row of padding belongs to no subspace: its gradient is zero already.
                    dC = torch.where(_column_is_active(active, groups, rows), dC, 0)
            elif C_wanted:
                dC = dy2.new_zeros(r, 0, dtype=C_dtype)
        return dy, dx, None, dB, dC, *[None] * 7


def _directions(A: Tensor, B: Tensor, slots: Tensor, r: int) -> Tensor:
    """``M = B A^T``, (q, d), each row with the basis of its own subspace."""
    if A.shape[0] == 1:
        return F.linear(B, A[0])
    stacked = B.new_zeros(A.shape[0] * r, B.shape[1]).index_copy(0, slots, B).view(A.shape[0], r, -1)
    return torch.bmm(stacked, A.transpose(1, 2)).flatten(0, 1).index_select(0, slots)


def _directions_vjp(dM: Tensor, A: Tensor, slots: Tensor, r: int) -> Tensor:
    """``dB = dM A``, (q, P)."""
    A = A.to(dM.dtype)
    if A.shape[0] == 1:
        return dM @ A[0]
    stacked = dM.new_zeros(A.shape[0] * r, dM.shape[1]).index_copy(0, slots, dM).view(A.shape[0], r, -1)
    return torch.bmm(stacked, A).flatten(0, 1).index_select(0, slots)


def _expand(C: Tensor, rows: Tensor, q: int, columns: Tensor | None, n: int) -> Tensor:
    """``E[rows[i, j], columns[j]] = C[i, j]``, (q, n); the padding of C goes to a row q that is cut off."""
    E = C.new_zeros(q + 1, C.shape[1]).scatter(0, rows, C)[:q]
    return E if columns is None else C.new_zeros(q, n).index_copy(1, columns, E)


def _expand_vjp(dE: Tensor, rows: Tensor, columns: Tensor | None) -> Tensor:
    if columns is not None:
        dE = dE.index_select(1, columns)
    return F.pad(dE, (0, 0, 0, 1)).gather(0, rows)


def _column_is_active(active: Tensor, groups: Tensor, rows: Tensor) -> Tensor:
    """(r, n') booleans: whether the subspace in whose row ``C[i, j]`` stands is trained."""
    return F.pad(active[groups], (0, 1))[rows]
