"""Cost of the update of a layer, depending on the order in which its matrix products are computed."""

from __future__ import annotations

from typing import NamedTuple

from adamss.errors import ConfigError

__all__ = ["ORDERS", "UpdateCost", "cheapest_order", "check_order", "device_balance", "update_cost"]

ORDERS = ("factors_first", "input_first")
"""Orders in which ``x A B C`` can be computed: ``(x (A B)) C`` or ``((x A) B) C``."""

CPU_BALANCE = 12.0
"""Multiply-adds that take as long as moving one number, measured on a CPU whose cache held the activations."""

ACCELERATOR_BALANCE = {"wide": 32.0, "half": 200.0}
"""The same for a GPU in float32 or wider, and in half precision: orders of magnitude from current data sheets."""


def device_balance(itemsize: int, *, cpu: bool) -> float:
    """Return the `balance` of `cheapest_order` for numbers of `itemsize` bytes, on a CPU or an accelerator."""
    return CPU_BALANCE if cpu else ACCELERATOR_BALANCE["half" if itemsize < 4 else "wide"]


def check_order(order: str | None) -> None:
    """Check that a setting is one of `ORDERS`, or None, which means the cheaper order.

    Raises
    ------
    ConfigError
        If the setting is anything else.
    """
    if order is not None and order not in ORDERS:
        raise ConfigError(
            f"order must be one of {', '.join(map(repr, ORDERS))}, found {order!r}; choose one, or None "
            "for the one that costs less"
        )


class UpdateCost(NamedTuple):
    """Cost of the update of one layer.

    Attributes
    ----------
    multiply_adds
        Multiply-adds of all products of the forward pass and, in training, of the backward pass.
    moved
        Numbers that these products read and write.
    kept
        Numbers that the update alone keeps in memory from the forward to the backward pass.
    """

    multiply_adds: int
    moved: int
    kept: int


def update_cost(
    order: str,
    *,
    tokens: int,
    d: int,
    n: int,
    rank: int,
    directions: int,
    training: bool = True,
    input_kept: bool = False,
) -> UpdateCost:
    """Return the cost of ``y += x A B C`` and of its gradients.

    - ``"factors_first"`` computes ``M = A B``, then ``z = x M`` and ``y += z C``. The backward pass needs x and z.
    - ``"input_first"`` computes ``u = x A``, then ``z = u B`` and ``y += z C``. The backward pass needs u and z, and
      it computes M for the gradient of x.

    Parameters
    ----------
    order
        One of `ORDERS`.
    tokens
        Number N of rows of x.
    d, n
        Numbers of inputs and outputs of the layer.
    rank
        Number R of columns of A.
    directions
        Number q of columns of B, the sum of the trained ranks.
    training
        Whether a backward pass computes the gradients of x, B and C.
    input_kept
        Whether x is kept for the backward pass anyway, as by a layer whose own weight is trained.

    Returns
    -------
    UpdateCost
        Cost of one step.

    Raises
    ------
    ConfigError
        If the order is unknown.

    Examples
    --------
    >>> update_cost("factors_first", tokens=2048, d=768, n=768, rank=100, directions=10).kept == 2048 * (768 + 10)
    True
    >>> update_cost("input_first", tokens=2048, d=768, n=768, rank=100, directions=10).kept == 2048 * (100 + 10)
    True
    """
    check_order(order)
    N, R, q = tokens, rank, directions
    contraction, contraction_moves = d * R * q, d * R + R * q + d * q
    if order == "factors_first":
        products = contraction + N * d * q
        moved = contraction_moves + N * d + d * q + N * q
    else:
        products = N * d * R + N * R * q
        moved = N * d + d * R + 2 * N * R + R * q + N * q
    # y += z C, which reads y as well as writing it
    products += N * q * n
    moved += N * q + q * n + 2 * N * n
    if not training:
        return UpdateCost(products, moved, 0)
    # dz = dy C^T, dC = z^T dy, dx += dz M^T
    products += 2 * N * n * q + N * q * d
    moved += 2 * (N * n + N * q + q * n) + N * q + d * q + 2 * N * d
    if order == "factors_first":
        # dM = x^T dz, dB = A^T dM
        products += N * d * q + contraction
        moved += N * d + N * q + d * q + contraction_moves
        kept = N * q if input_kept else N * (d + q)
    else:
        # M = A B for dx, and dB = u^T dz
        products += contraction + N * R * q
        moved += contraction_moves + N * R + N * q + R * q
        kept = N * (R + q)
    return UpdateCost(products, moved, kept)


def cheapest_order(
    *,
    tokens: int,
    d: int,
    n: int,
    rank: int,
    directions: int,
    training: bool = True,
    input_kept: bool = False,
    balance: float = CPU_BALANCE,
) -> str:
    """Return the order of products with the lowest estimated time.

    The estimate counts the multiply-adds, the moved numbers and the kept numbers, with a kept number costing as much
    as a moved one. For a single token, the product A B is the largest cost, so ``"input_first"`` is cheaper. For a
    batch on a processor that multiplies much faster than it moves numbers, keeping x is the largest cost, so
    ``"input_first"`` is cheaper there too.

    Parameters
    ----------
    tokens, d, n, rank, directions, training, input_kept
        As for `update_cost`.
    balance
        Number of multiply-adds that take as long as moving one number: about ten on a CPU, tens to hundreds on an
        accelerator. See `device_balance`.

    Returns
    -------
    str
        One of `ORDERS`.

    Examples
    --------
    >>> layer = {"d": 3072, "n": 3072, "rank": 100, "directions": 32}
    >>> cheapest_order(tokens=1, training=False, **layer)
    'input_first'
    >>> cheapest_order(tokens=2048, **layer), cheapest_order(tokens=2048, balance=200.0, **layer)
    ('factors_first', 'input_first')
    """

    def time(order: str) -> float:
        cost = update_cost(
            order,
            tokens=tokens,
            d=d,
            n=n,
            rank=rank,
            directions=directions,
            training=training,
            input_kept=input_kept,
        )
        return cost.multiply_adds / balance + cost.moved + cost.kept

    return "factors_first" if time("factors_first") <= time("input_first") else "input_first"
