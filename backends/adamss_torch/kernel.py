"""The update of a linear layer as one autograd function: a few matrix products, whatever K is.

All operands have few, long rows: ``B: (q, P)``, ``M: (q, d)``, ``E: (q, n)``, and ``z: (q, N)`` for N tokens. B, M
and z are the transposes of their namesakes in `adamss.core`, while E is the same. All products of forward and
backward read the operands along contiguous rows, since a product with few rows takes up to a third less time than one
with few columns.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from adamss.core.cost import cheapest_order, check_order, device_balance
from adamss.errors import StateError

__all__ = [
    "Layout",
    "Plan",
    "block_places",
    "block_products",
    "is_transformed",
    "make_layout",
    "trained_elements",
    "update",
    "without_autocast",
]

NO_CONTEXT = nullcontext()
NO_SECOND_DERIVATIVES = (
    "the input of an adapted layer was not kept for second derivatives: set layer.adamss.default.order = "
    "'factors_first' (by default many rows of a narrow layer keep less), and compute in one dtype"
)


class Layout(NamedTuple):
    """Positions of the entries of B and C among the rows of M and E.

    The layout follows from the labels, the ranks, and the subspaces that the weight of the layer holds. M and E have
    q' rows, those of the subspaces that the weight does not hold.

    Attributes
    ----------
    rows
        (r, n) int64: row of E that holds ``C[i, j]``. It is q' for an entry that has no place in E, because it is
        padding of C or belongs to a subspace that the weight holds.
    groups
        (q',) int64: subspace of each row of M.
    slots
        (q',) int64: position ``k * r + i`` of each row of M when all K subspaces are padded to r rows.
    mask
        (q', n), in the dtype of C: one where E has an entry, zero elsewhere. None for r > 1, where E is not C times a
        mask, and for several blocks, where the mask would be mostly zeros.
    directions
        (q',) int64: row of B that each row of M is made of. None where M has all rows of B.
    padded
        Whether some entry of C may have no place in E.
    """

    rows: Tensor
    groups: Tensor
    slots: Tensor
    mask: Tensor | None
    directions: Tensor | None
    padded: bool


class Plan(NamedTuple):
    """The parts of an update that are not trained.

    Attributes
    ----------
    A
        Frozen basis, (G, d, P), or (G, d + 1, P) where the bias is adapted too.
    layout
        Layout of B and C.
    order
        One of `adamss.core.cost.ORDERS`. None chooses the one that costs less.
    weight
        Frozen weight (n, d) of a layer whose base product is ``x weight^T`` plus a frozen bias. The gradient of x is
        then that of the whole layer, computed in one sum, and the base product gets no gradient. None leaves the base
        product to autograd.
    overwrite
        Whether the result may overwrite the base product, because no other code has seen it.
    input_kept
        Whether x is kept for the backward anyway, as it is by a layer whose own weight is trained.
    """

    A: Tensor
    layout: Layout
    order: str | None = None
    weight: Tensor | None = None
    overwrite: bool = False
    input_kept: bool = False


def make_layout(
    labels: Tensor,
    ranks: Tensor,
    r: int,
    q: int,
    held: Tensor | None = None,
    *,
    dtype: torch.dtype,
    masked: bool = True,
) -> Layout:
    """Return the layout of B: (q, P) and C: (r, n) for labels (n,) and ranks (K,), whose sum is q.

    M and E leave out the subspaces in `held`, (K,) booleans. The layout has a mask, in the dtype `dtype` of C, if
    `masked` is True and r is 1.
    """
    masked = masked and r == 1
    labels, ranks = labels.to(torch.int64), ranks.to(torch.int64)
    ends = ranks.cumsum(0)
    starts = ends - ranks
    places = torch.arange(r, device=labels.device)[:, None]
    rows = torch.where(places < ranks[labels], starts[labels] + places, q)
    directions = torch.arange(q, device=labels.device)
    # `repeat_interleave` would do as well, but the length of its result depends on values, which no compiler knows.
    groups = torch.searchsorted(ends, directions, right=True)
    slots = groups * r + directions - starts[groups]
    if held is None:
        return Layout(
            rows, groups, slots, _mask(rows, q, dtype) if masked else None, None, q < ranks.shape[0] * r
        )
    directions = (~held)[groups].nonzero()[:, 0]
    rest = directions.numel()
    numbers = labels.new_full((q + 1,), rest)
    numbers[directions] = torch.arange(rest, device=labels.device)
    rows = numbers[rows]
    mask = _mask(rows, rest, dtype) if masked else None
    return Layout(rows, groups[directions], slots[directions], mask, directions, True)


def trained_elements(active: Tensor, labels: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return boolean masks of the rows of B, (q, 1), and the columns of C, (1, n), that belong to active subspaces.

    Parameters
    ----------
    active, labels
        As in `adamss.core.Factors`.
    groups
        (q,) int64: subspace of each row of B.
    """
    return active[groups][:, None], active[labels.to(torch.int64)][None, :]


def _mask(rows: Tensor, q: int, dtype: torch.dtype) -> Tensor:
    return (rows == torch.arange(q, device=rows.device)[:, None]).to(dtype)


def update(base: Tensor, x: Tensor, B: Tensor, C: Tensor, plan: Plan) -> Tensor:
    """Return ``base + (x M^T) E`` in the dtype of `base`.

    The base product is an argument and is not computed again, so with C = 0 the result equals it to the bit. For the
    same reason, entries of ``x M^T`` that overflow are replaced by finite numbers: infinity times zero would be NaN.

    Parameters
    ----------
    base
        Output of the frozen layer, (..., n).
    x
        Input of the layer, (..., d).
    B
        Trained factor, (q, P).
    C
        Trained factor, (r, n).
    plan
        The parts of the update that are not trained.

    Returns
    -------
    Tensor
        Output (..., n), differentiable in x, B and C, and in `base` if `plan.weight` is None. Gradients can be
        differentiated again where x itself was kept for the backward; elsewhere the second differentiation raises
        `StateError`.

    Raises
    ------
    ConfigError
        If the order is unknown.
    """
    check_order(plan.order)
    layout = plan.layout
    if layout.directions is not None:
        B = B.index_select(0, layout.directions)
    if plan.A.shape[0] > 1:
        plan = plan._replace(order="factors_first")
    elif plan.order is None:
        plan = plan._replace(order=_cheapest(base, x, B, C, plan))
    # Autocast would round A and B to half precision. Only their product M may be rounded, and only once.
    with without_autocast(base):
        rows = B
        if plan.order == "factors_first":
            rows = _directions(plan.A, B, layout.slots, C.shape[0], base.dtype)
        if is_transformed():
            _, _, z = _projected(x, rows, plan, base.dtype)
            return base + (z.t() @ _expand(C, layout, base.dtype)).view(base.shape)
        if plan.weight is not None:
            base = base.detach()
        if torch.is_grad_enabled():
            result: Tensor = _Update.apply(base, x, rows, C, plan)  # type: ignore[no-untyped-call]
            return result
        return _forward(base, x, rows, C, plan)[0]


def is_transformed() -> bool:
    """Return whether compilation, a `torch.func` transformation, forward-mode differentiation or tracing is going on.

    These need plain products: some reject an autograd function whose backward is written by hand, and others treat
    its gradient as a constant.
    """
    return torch.compiler.is_compiling() or (
        bool(torch._C._are_functorch_transforms_active())
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
    )


def _cheapest(base: Tensor, x: Tensor, B: Tensor, C: Tensor, plan: Plan) -> str:
    compiling = torch.compiler.is_compiling()
    if torch.compiler.is_exporting() or (not compiling and torch._C._is_tracing()):
        return "factors_first"  # an exported graph must serve any number of tokens
    training = torch.is_grad_enabled() and (B.requires_grad or C.requires_grad)
    find = _cheapest_of.__wrapped__ if compiling else _cheapest_of
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
    """Return `cheapest_order` for inputs of shape (..., d), cached because a training sees few shapes."""
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


def _projected(x: Tensor, rows: Tensor, plan: Plan, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return the operands `inputs` and `rows` of ``z = rows inputs^T``, and z (q', N).

    The rows are M with the inputs x, or, with the order ``"input_first"``, B with the inputs x A.
    """
    inputs = _in(x.reshape(-1, x.shape[-1]), dtype)
    if plan.order == "input_first":
        inputs = _in_basis(inputs, _in(plan.A[0], dtype)).nan_to_num()
        rows = _in(rows, dtype)
    return inputs, rows, _transposed_z(rows, inputs).nan_to_num()


def _forward(
    base: Tensor, x: Tensor, rows: Tensor, C: Tensor, plan: Plan
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the result, the inputs of the product z, z itself, and E.

    The rows are M, or B with the order ``"input_first"``.
    """
    n = base.shape[-1]
    E = _expand(C, plan.layout, base.dtype)
    inputs, _, z = _projected(x, rows, plan, base.dtype)
    if plan.overwrite:
        base.view(-1, n).addmm_(z.t(), E)
        return base, inputs, z, E
    y = torch.addmm(base.reshape(-1, n), z.t(), E)
    # Autograd forbids in-place changes (`ReLU(inplace=True)`) of a view that an autograd function returns, and
    # `_unsafe_view` does not mark its result as a view.
    return torch.ops.aten._unsafe_view(y, base.shape), inputs, z, E


class _Update(torch.autograd.Function):
    """Compute ``y = base + z^T E`` with ``z = M x^T``.

    The backward is written by hand: ``dz = E dy^T``, ``dx = dz^T M``, ``dM = dz x``, ``dE = z dy``.

    With the order ``"factors_first"``, `rows` is M. M is formed from B outside of this function, by products that
    autograd differentiates itself: a backward in Python would take longer than its arithmetic. With the order
    ``"input_first"``, `rows` is B.

    The forward keeps x, z, M and E for the backward, except those that no wanted gradient needs. The order
    ``"input_first"`` saves memory: it keeps ``x A`` instead of x, and forms M and E again. Second derivatives compute
    everything again from x, so they are not available where ``x A``, or x in another dtype, was kept instead of x.
    """

    @staticmethod
    def forward(ctx: Any, base: Tensor, x: Tensor, rows: Tensor, C: Tensor, plan: Plan) -> Tensor:
        y, inputs, z, E = _forward(base, x, rows, C, plan)
        _, x_wanted, rows_wanted, C_wanted, _ = ctx.needs_input_grad
        first = plan.order == "factors_first"
        as_it_is = first and x.dtype == base.dtype
        # With so few tokens x is no larger than M, so it is kept for second derivatives whatever the order.
        few = x.numel() <= rows.shape[0] * x.shape[-1]
        ctx.save_for_backward(
            x if (rows_wanted or C_wanted) and (as_it_is or few) else None,
            inputs if rows_wanted and not as_it_is else None,
            z if C_wanted else None,
            rows,
            E if first and (x_wanted or rows_wanted) else None,
            C,
            plan.weight if x_wanted else None,
        )
        # The rest of the plan is neither trained nor changed in place, so it does not need the checks of
        # `save_for_backward`.
        ctx.plan, ctx.whole = plan._replace(weight=None), plan.weight is not None
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        if plan.overwrite:
            ctx.mark_dirty(base)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, inputs, z, rows, E, C, weight = ctx.saved_tensors
        _, x_wanted, rows_wanted, C_wanted, _ = ctx.needs_input_grad
        plan, layout, d = ctx.plan, ctx.plan.layout, ctx.x_shape[-1]
        dx = d_rows = dC = None
        dy2 = dy.reshape(-1, dy.shape[-1])
        with without_autocast(dy):
            if torch.is_grad_enabled():
                # The gradients will be differentiated again, so autograd must see how they depend on x, rows and C.
                if rows_wanted or C_wanted:
                    if x is None:
                        raise StateError(NO_SECOND_DERIVATIVES)
                    inputs, _, z = _projected(x, rows, plan, dy.dtype)
                E = _expand(C, layout, dy.dtype)
            elif inputs is None and x is not None:
                inputs = x.reshape(-1, d)
            if E is None and (x_wanted or rows_wanted):
                E = _expand(C, layout, dy.dtype)
            if x_wanted or rows_wanted:
                dz = F.linear(E, dy2)
            if x_wanted:
                M = rows
                if plan.order == "input_first":
                    M = _directions(plan.A, rows, layout.slots, C.shape[0], dy.dtype)
                M = M if M.shape[1] == d else M[:, :d]
                dx = dz.t() @ M if weight is None else (dy2 @ weight).addmm_(dz.t(), M)
                dx = _in(dx, ctx.x_dtype).view(ctx.x_shape)
            if rows_wanted:
                d_rows = dz @ inputs
                if d_rows.shape[1] != rows.shape[1]:
                    d_rows = torch.cat([d_rows, dz.sum(1, keepdim=True)], dim=1)
                d_rows = _in(d_rows, rows.dtype)
            if C_wanted:
                dC = _expand_vjp(_in(z @ dy2, C.dtype), layout)
        return (None if ctx.whole else dy), dx, d_rows, dC, None


def block_places(labels: Tensor, r: int, K: int, blocks: int) -> Tensor:
    """Return the row, among the K r / L rows of its block's E, of each entry of C: (L, r, n / L) int64."""
    rows = (labels.to(torch.int64) % (K // blocks)) * r + torch.arange(r, device=labels.device)[:, None]
    return rows.view(r, blocks, -1).transpose(0, 1).contiguous()


def block_products(
    A: Tensor, B: Tensor, C: Tensor, layout: Layout, places: Tensor, K: int
) -> tuple[Tensor, Tensor]:
    """Return M: (L, d, q') and E: (L, q', n / L) of L weights that lie next to each other in the columns.

    Every block has q' = r K / L directions. M is zero for the directions that a subspace of lower rank lacks, and for
    those that the weight holds. Where A has a row for the bias, so has M.

    Parameters
    ----------
    A, B, C, layout
        As for `update` and `Plan`.
    places
        See `block_places`.
    K
        Number of subspaces.
    """
    blocks, r, n = places.shape
    if layout.padded:
        if layout.directions is not None:
            B = B.index_select(0, layout.directions)
        B = B.new_zeros(K * r, B.shape[1]).index_copy(0, layout.slots, B)
    stacked = B.view(A.shape[0], -1, B.shape[1])
    M = (A @ stacked.transpose(1, 2)) if A.shape[0] == blocks else _by_block(A, stacked, blocks)
    entries = C.view(r, blocks, n).transpose(0, 1)
    E = C.new_zeros(blocks, K * r // blocks, n).scatter(1, places, entries)
    return M, E


def _by_block(A: Tensor, stacked: Tensor, blocks: int) -> Tensor:
    """Return ``A_g stacked_g^T`` for every basis, with the results of one block next to each other: (L, d, q')."""
    M = A @ stacked.transpose(1, 2)
    return M.view(blocks, -1, *M.shape[1:]).transpose(1, 2).reshape(blocks, A.shape[1], -1)


def without_autocast(array: Tensor) -> AbstractContextManager[object]:
    """Return a context in which autocast is off on the device of an array."""
    kind = array.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else NO_CONTEXT


def _in(array: Tensor, dtype: torch.dtype) -> Tensor:
    return array if array.dtype == dtype else array.to(dtype)


def _in_basis(x: Tensor, A: Tensor) -> Tensor:
    """Return ``x A``. Where the bias is adapted, the last row of A is added, which saves appending ones to x."""
    d = x.shape[1]
    return x @ A if A.shape[0] == d else torch.addmm(A[d], x, A[:d])


def _transposed_z(M: Tensor, x: Tensor) -> Tensor:
    """Return ``M x^T``, (q', N), plus the last column of M where the bias is adapted."""
    d = x.shape[1]
    return M @ x.t() if M.shape[1] == d else torch.addmm(M[:, d:], M[:, :d], x.t())


def _directions(A: Tensor, B: Tensor, slots: Tensor, r: int, dtype: torch.dtype) -> Tensor:
    """Return ``M = B A^T``, (q', d), where each row uses the basis of its own subspace."""
    if A.shape[0] == 1:
        return _in(B @ A[0].t(), dtype)
    stacked = B.new_zeros(A.shape[0] * r, B.shape[1]).index_copy(0, slots, B).view(A.shape[0], r, -1)
    return _in(torch.bmm(stacked, A.transpose(1, 2)).flatten(0, 1).index_select(0, slots), dtype)


def _expand(C: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Return E, (q', n), with ``E[rows[i, j], j] = C[i, j]`` and zeros elsewhere."""
    if layout.mask is not None:
        return _in(C * layout.mask, dtype)
    q = layout.groups.shape[0]
    # The last row collects the entries that have no place in E, and is cut off.
    zeros = torch.zeros((q + int(layout.padded), C.shape[1]), dtype=C.dtype, device=C.device)
    return _in(zeros.scatter(0, layout.rows, C)[:q], dtype)


def _expand_vjp(dE: Tensor, layout: Layout) -> Tensor:
    return (F.pad(dE, (0, 0, 0, 1)) if layout.padded else dE).gather(0, layout.rows)
