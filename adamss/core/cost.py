"""What the update of a layer costs, by the order in which its products are taken."""

from __future__ import annotations

from typing import NamedTuple

from adamss.errors import ConfigError

__all__ = ["ORDERS", "UpdateCost", "cheapest_order", "check_order", "device_balance", "update_cost"]

ORDERS = ("factors_first", "input_first")
"""Orders in which ``x A B C`` is computed: ``(x (A B)) C``, or ``((x A) B) C``."""

CPU_BALANCE = 12.0
"""Multiply-adds that take the time of moving one number: measured on a CPU whose cache holds the activations."""

ACCELERATOR_BALANCE = {"wide": 32.0, "half": 200.0}
"""The same in float32 and wider, and in half precision, of the order that the data sheets of current GPUs give."""


def device_balance(itemsize: int, *, cpu: bool) -> float:
    """Return the `balance` of `cheapest_order` for numbers of so many bytes, on a CPU or an accelerator."""
    return CPU_BALANCE if cpu else ACCELERATOR_BALANCE["half" if itemsize < 4 else "wide"]


def check_order(order: str | None) -> None:
    """Raise unless a setting is one of `ORDERS`, or None for the one that costs less.

    Raises
    ------
    ConfigError
        If it is something else.
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
        Of all products of one step; of the forward alone where nothing is trained.
    moved
        Numbers read and written by those products.
    kept
        Numbers kept from the forward to the backward that would not be kept otherwise.
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

    - ``"factors_first"`` forms ``M = A B``, then ``z = x M`` and ``y += z C``. Its backward needs x and z.
    - ``"input_first"`` forms ``u = x A`` and ``z = u B``. Its backward needs u and z, and M for the gradient of x.

    Parameters
    ----------
    order
        One of `ORDERS`.
    tokens
        Rows N of x.
    d, n
        Inputs and outputs of the layer.
    rank
        Columns R of A.
    directions
        Columns q of B, the sum of the trained ranks.
    training
        Whether there is a backward, with gradients of x, B and C.
    input_kept
        Whether x is kept for the backward anyway, as by a layer whose own weight is trained.

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
    # y += z C, which reads y too
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
        # M once more, and dB = u^T dz
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
    """Return the order whose products, moves and kept numbers cost the least.

    A kept number counts as one that is moved. For one token contracting A and B costs more than all the rest; for a
    batch on a processor that multiplies much faster than it moves, keeping x does.

    Parameters
    ----------
    tokens, d, n, rank, directions, training, input_kept
        As for `update_cost`.
    balance
        Multiply-adds that take the time of moving one number: about ten on a CPU, tens to hundreds on an
        accelerator.

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
