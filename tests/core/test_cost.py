"""Compare the cost model of the update with counted products, and test the orders that it chooses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adamss.core.cost import ORDERS, cheapest_order, update_cost
from adamss.errors import ConfigError

SHAPES = st.fixed_dictionaries(
    {name: st.integers(1, 50) for name in ("tokens", "d", "n", "rank", "directions")}
)


def counted(order: str, *, tokens: int, d: int, n: int, rank: int, directions: int, training: bool) -> int:
    """Return the multiply-adds of the products that an order of the update consists of."""
    total = 0

    def product(rows: int, inner: int, columns: int) -> None:
        nonlocal total
        total += rows * inner * columns

    if order == "factors_first":
        product(d, rank, directions)  # M = A B
        product(tokens, d, directions)  # z = x M
    else:
        product(tokens, d, rank)  # u = x A
        product(tokens, rank, directions)  # z = u B
    product(tokens, directions, n)  # y += z C
    if training:
        product(tokens, n, directions)  # dz = dy C^T
        product(directions, tokens, n)  # dC = z^T dy
        product(tokens, directions, d)  # dx = dz M^T
        if order == "factors_first":
            product(d, tokens, directions)  # dM = x^T dz
            product(rank, d, directions)  # dB = A^T dM
        else:
            product(d, rank, directions)  # M = A B, for dx
            product(rank, tokens, directions)  # dB = u^T dz
    return total


@given(SHAPES, st.sampled_from(ORDERS), st.booleans())
def test_multiply_adds_are_those_of_the_products(shape, order, training):
    cost = update_cost(order, training=training, **shape)
    assert cost.multiply_adds == counted(order, training=training, **shape)
    assert cost.moved >= shape["tokens"] * (shape["d"] + shape["n"])


@given(SHAPES)
def test_kept_is_x_and_z_or_u_and_z(shape):
    N, d, R, q = (shape[name] for name in ("tokens", "d", "rank", "directions"))
    assert update_cost("factors_first", **shape).kept == N * (d + q)
    assert update_cost("factors_first", input_kept=True, **shape).kept == N * q
    assert (
        update_cost("input_first", **shape).kept == update_cost("input_first", input_kept=True, **shape).kept
    )
    assert update_cost("input_first", **shape).kept == N * (R + q)
    assert all(update_cost(order, training=False, **shape).kept == 0 for order in ORDERS)


@given(SHAPES, st.booleans(), st.booleans(), st.floats(1.0, 1000.0))
def test_the_cheapest_costs_no_more_than_the_other(shape, training, input_kept, balance):
    options = {"training": training, "input_kept": input_kept}

    def time(order):
        cost = update_cost(order, **shape, **options)
        return cost.multiply_adds / balance + cost.moved + cost.kept

    chosen = cheapest_order(balance=balance, **shape, **options)
    assert time(chosen) == min(map(time, ORDERS))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("tokens", [1, 8])
def test_a_few_tokens_are_projected(tokens, training):
    layer = {"d": 3072, "n": 3072, "rank": 100, "directions": 32}
    assert cheapest_order(tokens=tokens, training=training, **layer) == "input_first"


def test_the_input_that_is_kept_anyway_speaks_for_contracting():
    layer = {"tokens": 2048, "d": 3072, "n": 3072, "rank": 100, "directions": 32, "balance": 30.0}
    assert cheapest_order(**layer) == "input_first"
    assert cheapest_order(input_kept=True, **layer) == "factors_first"


def test_an_unknown_order():
    with pytest.raises(ConfigError, match="order must be one of 'factors_first', 'input_first'"):
        update_cost("expand", tokens=1, d=1, n=1, rank=1, directions=1)
