"""Schedule and allocation: exact where the law is exact."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adamss import BudgetConfig, core
from adamss.errors import ArrayValueError, ConfigError


@given(
    st.integers(1, 10**7),
    st.integers(0, 10**7),
    st.integers(0, 1000),
    st.integers(1, 10**5),
    st.integers(1, 4),
    st.data(),
)
def test_schedule_is_the_floor_of_the_formula(target, surplus, t0, span, p, data):
    config = BudgetConfig(target=target, start_step=t0, end_step=t0 + span, power=p)
    total = target + surplus
    t = data.draw(st.integers(0, t0 + 2 * span))
    left = 1 - Fraction(min(max(t, t0), t0 + span) - t0, span)
    assert core.budget_at(t, config, total) == (target + surplus * left**p).__floor__()


def test_schedule_with_a_fractional_power():
    config = BudgetConfig(target=10, start_step=0, end_step=100, power=1.5)
    budgets = [core.budget_at(t, config, 110) for t in (0, 25, 50, 75, 99, 100, 101)]
    assert budgets == [110, 74, 45, 22, 10, 10, 10]


@given(st.integers(0, 50), st.integers(1, 60), st.integers(1, 70))
def test_allocations_are_on_the_interval_and_always_at_the_end(t0, span, interval):
    config = BudgetConfig(target=1, start_step=t0, end_step=t0 + span, interval=interval)
    steps = [t for t in range(t0 + 2 * span + 5) if core.allocates_at(t, config)]
    assert steps == sorted({*range(t0 + interval, t0 + span + 1, interval), t0 + span})


def test_initial_budget():
    config = BudgetConfig(target=5, end_step=10, initial=8)
    assert core.budget_at(0, config) == core.budget_at(0, config, total=100) == 8
    with pytest.raises(ConfigError, match="budget at the start is not known"):
        core.budget_at(0, BudgetConfig(target=5, end_step=10))
    with pytest.raises(ConfigError, match="target = 5 is more than the 4"):
        core.budget_at(0, BudgetConfig(target=5, end_step=10), total=4)


SCORES = st.lists(st.integers(0, 6), min_size=1, max_size=60)


@given(SCORES, st.integers(0, 70))
def test_keeps_exactly_the_budget_best_first_lower_index_first(scores, budget):
    mask = core.allocate(np.asarray(scores, dtype=np.float32), budget)
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    assert np.flatnonzero(mask).tolist() == sorted(order[:budget])
    assert mask.sum() == min(budget, len(scores))


@given(SCORES, st.data())
def test_parameters_are_filled_in_order_of_density_never_above(scores, data):
    costs = data.draw(st.lists(st.integers(1, 9), min_size=len(scores), max_size=len(scores)))
    budget = data.draw(st.integers(0, sum(costs) + 3))
    mask = core.allocate(np.asarray(scores, dtype=np.float64), budget, np.asarray(costs))
    left, kept = budget, []
    for i in sorted(range(len(scores)), key=lambda i: (-np.float64(scores[i]) / costs[i], i)):
        if costs[i] <= left:
            kept.append(i)
            left -= costs[i]
    assert np.flatnonzero(mask).tolist() == sorted(kept)
    assert (np.asarray(costs) * mask).sum() <= budget


def test_every_framework_decides_alike(xp, to_numpy):
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 8, 200).astype(np.float32)  # with many ties
    costs = rng.integers(1, 50, 200)
    for budget in (0, 1, 66, 199, 200, 1000):
        by_count = to_numpy(core.allocate(xp.asarray(scores), budget))
        assert np.array_equal(by_count, core.allocate(scores, budget))
        by_cost = to_numpy(core.allocate(xp.asarray(scores), budget, xp.asarray(costs)))
        assert np.array_equal(by_cost, core.allocate(scores, budget, costs))


def test_costs_may_be_the_list_that_counting_returns():
    costs = core.subspace_costs([3, 2], [1, 1], [2, 2])
    assert core.allocate(np.asarray([1.0, 1.0]), 4, costs).tolist() == [False, True]


def test_nan_ranks_below_everything():
    scores = np.asarray([np.nan, -1.0, 0.0, -np.inf])
    assert core.allocate(scores, 2).tolist() == [False, True, True, False]
    assert core.allocate(scores, 3, np.ones(4, dtype=np.int64)).tolist() == [True, True, True, False]


def test_bad_input():
    with pytest.raises(ArrayValueError, match="1-d and of equal length"):
        core.allocate(np.ones((2, 2)), 1)
    with pytest.raises(ArrayValueError, match="1-d and of equal length"):
        core.allocate(np.ones(2), 1, np.ones(3, dtype=np.int64))
    with pytest.raises(ArrayValueError, match="costs must be positive, found 0"):
        core.allocate(np.ones(2), 1, np.asarray([0, 1]))
    with pytest.raises(ConfigError, match="budget must not be negative, found -1"):
        core.allocate(np.ones(2), -1)
