"""Schedule and allocation: exact where the law is exact."""

import functools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
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


def test_every_framework_decides_alike(xp, to_numpy, allocate_by_loop):
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 8, 200).astype(np.float32)  # with many ties
    costs = rng.integers(1, 50, 200)
    candidates, layers = rng.random(200) < 0.7, rng.integers(0, 20, 200)
    for budget in (0, 1, 66, 199, 200, 1000):
        by_count = to_numpy(core.allocate(xp.asarray(scores), budget))
        assert np.array_equal(by_count, core.allocate(scores, budget))
        by_cost = to_numpy(core.allocate(xp.asarray(scores), budget, xp.asarray(costs)))
        assert np.array_equal(by_cost, core.allocate(scores, budget, costs))
        arrays = {"candidates": candidates, "layers": layers}
        on_xp = {name: xp.asarray(array) for name, array in arrays.items()}
        least_of_each = to_numpy(core.allocate(xp.asarray(scores), budget, **on_xp, minimum=2))
        assert least_of_each.tolist() == allocate_by_loop(scores, budget, **arrays, minimum=2)


@st.composite
def allocations(draw, sizes, minima):
    """Scores with ties, NaN and infinity; candidates, unsorted layers, costs or none, a budget from 0 to too much."""
    T = draw(sizes)

    def each(values):
        return draw(st.lists(values, min_size=T, max_size=T))

    scores = np.asarray(
        each(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0, math.nan, math.inf])), dtype=np.float32
    )
    costs = np.asarray(each(st.integers(1, 6)), dtype=np.int32)
    by_cost = draw(st.booleans())
    return {
        "scores": scores,
        "budget": draw(st.integers(0, (int(costs.sum()) if by_cost else T) + 3)),
        "costs": costs if by_cost else None,
        "candidates": draw(st.sampled_from([None, np.zeros(T, bool)]) | each_mask(T) | each_mask(T)),
        "layers": np.asarray(each(st.integers(0, 2)), dtype=np.int32),
        "minimum": draw(minima),
    }


def each_mask(T):
    return st.lists(st.booleans(), min_size=T, max_size=T).map(functools.partial(np.asarray, dtype=bool))


@settings(max_examples=300)
@given(allocations(st.integers(0, 14), st.integers(0, 4)))
def test_allocation_is_the_loop_over_the_best_first(allocate_by_loop, problem):
    """Candidates alone; of every layer the best ones first; with costs, what no longer fits is passed over."""
    assert core.allocate(**problem).tolist() == allocate_by_loop(**problem)


@settings(max_examples=30)
@given(allocations(st.just(9), st.integers(0, 4)))
def test_every_framework_allocates_alike(xp, to_numpy, allocate_by_loop, problem):
    arrays = {
        name: xp.asarray(value) if isinstance(value, np.ndarray) else value for name, value in problem.items()
    }
    expected = allocate_by_loop(**problem)
    mask = core.allocate(**arrays)
    assert mask.dtype == xp.bool
    assert to_numpy(mask).tolist() == expected
    as_array = core.allocate(**arrays | {"budget": xp.asarray(problem["budget"], dtype=xp.int32)})
    assert to_numpy(as_array).tolist() == expected


@functools.cache
def compiled(minimum):
    jax = pytest.importorskip("jax")
    traces = []

    def allocate(scores, budget, costs, candidates, layers):
        traces.append(minimum)
        return core.allocate(scores, budget, costs, candidates=candidates, layers=layers, minimum=minimum)

    return jax.jit(allocate), traces


@settings(max_examples=100)
@given(allocations(st.just(9), st.sampled_from([0, 2])))
def test_compiled_with_a_traced_budget_it_allocates_alike(allocate_by_loop, problem):
    allocate, traces = compiled(problem["minimum"])
    expected = allocate_by_loop(**problem)
    arguments = {name: value for name, value in problem.items() if name != "minimum"}
    if problem["candidates"] is None:
        arguments["candidates"] = np.ones(9, bool)
    assert np.asarray(allocate(**arguments)).tolist() == expected
    assert len(traces) <= 2, "one trace with costs and one without"


def test_of_every_layer_its_best_ones_are_taken_first():
    """A layer with fewer than the minimum keeps all it has, and a budget too small goes to the best of them."""
    scores, layers = np.asarray([9.0, 8.0, 7.0, 1.0, 2.0, 0.5]), np.asarray([0, 0, 0, 1, 1, 2])
    kept = [
        np.flatnonzero(core.allocate(scores, budget, layers=layers, minimum=2)).tolist()
        for budget in range(7)
    ]
    assert kept == [[], [0], [0, 1], [0, 1, 4], [0, 1, 3, 4], [0, 1, 3, 4, 5], [0, 1, 2, 3, 4, 5]]


def test_the_minimum_of_a_layer_is_of_candidates():
    """What may not be taken does not stand for what may, however high its score."""
    scores, layers = np.asarray([5.0, 4.0, 9.0, 1.0]), np.asarray([0, 0, 1, 1])
    candidates = np.asarray([True, True, False, True])
    mask = core.allocate(scores, 2, candidates=candidates, layers=layers, minimum=1)
    assert mask.tolist() == [True, False, False, True]


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
    with pytest.raises(ConfigError, match="budget must not be negative, found -1"):
        core.allocate(np.ones(2), np.asarray(-1))
    for name in ("candidates", "layers"):
        with pytest.raises(
            ArrayValueError, match=rf"scores and {name} must be 1-d .* found \(2,\) and \(3,\)"
        ):
            core.allocate(np.ones(2), 1, **{name: np.ones(3, dtype=bool)})
    with pytest.raises(ConfigError, match="minimum must not be negative, and needs layers; found -1"):
        core.allocate(np.ones(2), 1, layers=np.zeros(2, dtype=np.int64), minimum=-1)
    with pytest.raises(ConfigError, match="minimum must not be negative, and needs layers; found 1"):
        core.allocate(np.ones(2), 1, minimum=1)
