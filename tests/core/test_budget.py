"""Compare the budget with its definition, written as loops over subspaces in float64 NumPy.

Weights and gradients are small integers and the decays are powers of two, so every average is exact in every
framework and dtype. Ties are therefore real ties, and results are compared with ``==``.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adamss import BudgetConfig, core
from adamss.core import Factors
from adamss.errors import ArrayTypeError, ArrayValueError, ConfigError
from adamss_conformance.tolerances import assert_agrees

# ---- the schedule ----------------------------------------------------------------------------------


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
    t = data.draw(st.integers(0, t0 + 2 * span))
    left = 1 - Fraction(min(max(t, t0), t0 + span) - t0, span)
    assert core.budget_at(t, config, target + surplus) == (target + surplus * left**p).__floor__()


def test_schedule_with_a_fractional_power():
    config = BudgetConfig(target=10, start_step=0, end_step=100, power=1.5)
    budgets = [core.budget_at(t, config, 110) for t in (0, 25, 50, 75, 99, 100, 101)]
    assert budgets == [110, 74, 45, 22, 10, 10, 10]


@given(st.integers(0, 50), st.integers(1, 60), st.integers(1, 70))
def test_allocations_are_on_the_interval_and_always_at_the_end(t0, span, interval):
    config = BudgetConfig(target=1, start_step=t0, end_step=t0 + span, interval=interval)
    expected = sorted({*range(t0 + interval, t0 + span + 1, interval), t0 + span})
    steps = np.arange(t0 + 2 * span + 5)
    assert [t for t in steps.tolist() if core.allocates_at(t, config)] == expected
    assert np.flatnonzero(core.allocates_at(steps, config)).tolist() == expected


def test_initial_budget():
    config = BudgetConfig(target=5, end_step=10, initial=8)
    assert core.budget_at(0, config) == core.budget_at(0, config, total=100) == 8
    with pytest.raises(ConfigError, match="initial budget is not known"):
        core.budget_at(0, BudgetConfig(target=5, end_step=10))
    with pytest.raises(ConfigError, match="target = 5 is more than the initial budget 4"):
        core.budget_at(0, BudgetConfig(target=5, end_step=10), total=4)


def allocate_by_loop(scores, budget, costs=None, candidates=None, layers=None, minimum=0):
    """Return the mask by the law of allocation: every layer's minimum first, then the best scores of all layers."""
    T = len(scores)
    price = [1] * T if costs is None else [int(cost) for cost in costs]
    values = [score / scores.dtype.type(cost) for score, cost in zip(scores, price, strict=True)]
    values = [-np.inf if np.isnan(value) else value for value in values]
    best_first = [i for i in range(T) if candidates is None or candidates[i]]
    best_first.sort(key=lambda i: (-values[i], i))
    safe = []
    if minimum:
        for layer in dict.fromkeys(layers):
            safe += [i for i in best_first if layers[i] == layer][:minimum]
    kept, left = [False] * T, budget
    for i in [i for i in best_first if i in safe] + [i for i in best_first if i not in safe]:
        if price[i] <= left:
            kept[i], left = True, left - price[i]
    return kept


def allocation(rng, T):
    """Return random arguments of `core.allocate`.

    They have scores with ties, NaN and infinity, candidates, unsorted layers, costs or none, and a budget from 0 to
    more than everything costs.
    """
    costs = rng.integers(1, 7, T).astype(np.int32)
    by_cost = rng.random() < 0.5
    return {
        "scores": rng.choice([0.0, 0.5, 1.0, 2.0, 3.0, math.nan, math.inf], T).astype(np.float32),
        "budget": int(rng.integers((costs.sum() if by_cost else T) + 4)),
        "costs": costs if by_cost else None,
        "candidates": rng.random(T) < rng.choice([0, 0.3, 0.7, 1]),
        "layers": rng.integers(0, 3 + T // 10, T).astype(np.int32),
        "minimum": int(rng.choice([0, 2])),
    }


SEEDS = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@settings(max_examples=300)
@given(SEEDS, st.integers(0, 14))
def test_allocation_is_the_loop_over_the_best_first(rng, T):
    problem = allocation(rng, T)
    assert core.allocate(**problem).tolist() == allocate_by_loop(**problem)
    everyone = problem | {"candidates": None}
    assert core.allocate(**everyone).tolist() == allocate_by_loop(**everyone)


@pytest.mark.parametrize("T", [9, 200])  # an unstable sort shows only with many elements
def test_every_framework_allocates_alike_also_compiled(xp, to_numpy, T):
    rng = np.random.default_rng(T)
    allocate, traces = core.allocate, []
    if "jax" in xp.__name__:

        def traced(*arguments, **options):
            traces.append(T)
            return core.allocate(*arguments, **options)

        allocate = pytest.importorskip("jax").jit(traced, static_argnames="minimum")
    for _ in range(12):
        problem = allocation(rng, T)
        arrays = {
            name: xp.asarray(value) if isinstance(value, np.ndarray) else value
            for name, value in problem.items()
        }
        expected = allocate_by_loop(**problem)
        mask = core.allocate(**arrays)
        assert mask.dtype == xp.bool
        assert to_numpy(mask).tolist() == expected
        arrays["budget"] = xp.asarray(problem["budget"], dtype=xp.int32)
        assert to_numpy(allocate(**arrays)).tolist() == expected
    assert len(traces) <= 4, "one trace with costs and one without, for each minimum"


def test_costs_may_be_the_list_that_counting_returns():
    costs = core.subspace_costs([3, 2], [1, 1], [2, 2])
    assert core.allocate(np.asarray([1.0, 1.0]), 4, costs).tolist() == [False, True]


def test_nan_ranks_below_everything():
    scores = np.asarray([np.nan, -1.0, 0.0, -np.inf])
    assert core.allocate(scores, 2).tolist() == [False, True, True, False]
    assert core.allocate(scores, 3, np.ones(4, dtype=np.int64)).tolist() == [True, True, True, False]


ONES = np.ones(3, dtype=np.int64)


@pytest.mark.parametrize(
    ("scores", "budget", "options", "error", "match"),
    [
        (np.ones((2, 2)), 1, {}, ArrayValueError, "1-d and of equal length"),
        (np.ones(2), 1, {"costs": ONES}, ArrayValueError, r"scores and costs must be .* \(2,\) and \(3,\)"),
        (np.ones(2), 1, {"candidates": ONES > 0}, ArrayValueError, "scores and candidates must be 1-d"),
        (np.ones(2), 1, {"layers": ONES}, ArrayValueError, "scores and layers must be 1-d"),
        (np.ones(2), 1, {"costs": np.arange(2)}, ArrayValueError, "costs must be positive, found 0"),
        (np.ones(2), -1, {}, ConfigError, "budget must not be negative, found -1"),
        (np.ones(2), np.asarray(-1), {}, ConfigError, "budget must not be negative, found -1"),
        (np.ones(3), 1, {"layers": ONES, "minimum": -1}, ConfigError, "minimum must not .* found -1"),
        (np.ones(3), 1, {"minimum": 1}, ConfigError, "minimum must not .* needs layers; found 1"),
    ],
)
def test_what_cannot_be_allocated_is_refused(scores, budget, options, error, match):
    with pytest.raises(error, match=match):
        core.allocate(scores, budget, **options)


EXACT = {"sensitivity_decay": 0.5, "uncertainty_decay": 0.5}


def layer(rng, sizes=(1, 2, 4), P=4, r=2, basis="shared", padding=0):
    """Return factors of subspaces of these sizes, filled with integers.

    The padding is filled too, except within the columns of B that belong to a subspace. Ranks fall from r to 0. If
    the sizes and P are powers of two, every mean is over a power of two of numbers, and so exact.
    """
    K, sizes = len(sizes), np.asarray(sizes)
    P = min(P, sizes.max()) if basis == "per_subspace" else P
    R = np.minimum(P, sizes) if basis == "per_subspace" else np.full(K, P)
    ranks = np.minimum([max(r - k, int(k < 2)) for k in range(K)], np.minimum(sizes, R))
    f = Factors(
        A=np.zeros((1 if basis == "shared" else K, 5, P)),
        B=np.zeros((P, ranks.sum() + padding)),
        C=np.zeros((ranks.max() + padding, sizes.sum())),
        labels=rng.permutation(np.repeat(np.arange(K), sizes)),
        ranks=ranks,
        active=np.ones(K, bool),
    )
    return at_step(rng, f)


def at_step(rng, f):
    """Return the factors with other integers in B and C, as after a step."""
    B, C = (rng.integers(-2, 3, array.shape).astype(np.float64) for array in (f.B, f.C))
    within = np.arange(f.B.shape[0])[:, None] < np.repeat(core.basis_ranks(f), f.ranks)
    q = f.ranks.sum()
    B[:, :q] = np.where(within, B[:, :q], 0)
    return f._replace(B=B, C=C)


def gradients_of(rng, layers, kind="any"):
    gradients = {
        path: tuple(rng.integers(-2, 3, array.shape).astype(np.float64) for array in (f.B, f.C))
        for path, f in layers.items()
    }
    if kind == "zero":
        gradients = {path: tuple(np.zeros_like(g) for g in pair) for path, pair in gradients.items()}
    if kind in ("nan", "inf"):
        path = sorted(layers)[rng.integers(len(layers))]
        gradients[path][rng.integers(2)][0, -1] = float(kind) * rng.choice([-1, 1])
        for f in layers.values():  # a separate test covers infinity times zero
            f.B[0, -1] = f.C[0, -1] = 1
    return gradients


@st.composite
def models(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    names = draw(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4, unique=True))
    options = st.fixed_dictionaries(
        {
            "sizes": st.lists(st.integers(1, 5), min_size=1, max_size=4),
            "P": st.integers(1, 4),
            "r": st.integers(1, 3),
            "basis": st.sampled_from(["shared", "per_subspace"]),
            "padding": st.integers(0, 1),
        }
    )
    return rng, {f"block.{name}": layer(rng, **draw(options)) for name in names}


UNITS = st.sampled_from(["subspaces", "parameters"])


def costs_of(f):
    sizes, P = np.bincount(f.labels), f.A.shape[2]
    R = [P if f.A.shape[0] == 1 else min(P, size) for size in sizes]
    return [max(1, int(r * (n + R))) for r, n, R in zip(f.ranks, sizes, R, strict=True)]


def needed(layers, unit, minimum, *, revive=False):
    """Return the lowest possible target: enough for the minimum of every layer, whichever subspaces are kept."""
    costs = [costs_of(f) for f in layers.values()]
    if unit == "subspaces":
        return max(1, sum(min(minimum, len(layer)) for layer in costs))
    last = (min if revive else max)(cost for layer in costs for cost in layer)
    return max(last, sum(sum(sorted(layer, reverse=True)[:minimum]) for layer in costs))


@st.composite
def schedules(draw, layers, **fixed):
    """Draw a schedule that the layers can keep to, of at most 8 steps, so that the averages stay exact."""
    unit = fixed.get("unit", draw(UNITS))
    minimum = draw(st.integers(0, 3))
    costs = [cost for f in layers.values() for cost in costs_of(f)]
    total = sum(costs) if unit == "parameters" else len(costs)
    revive = draw(st.booleans())
    target = draw(st.integers(needed(layers, unit, minimum, revive=revive), total))
    start = draw(st.integers(0, 2))
    return BudgetConfig(
        **{
            "target": target,
            "unit": unit,
            "minimum_per_layer": minimum,
            "start_step": start,
            "end_step": start + draw(st.integers(1, 6)),
            "interval": draw(st.integers(1, 5)),
            "power": draw(st.integers(1, 3)),
            "initial": draw(st.none() | st.integers(target, total)),
            "window": draw(st.sampled_from(["reset", "running"])),
            "revive": revive,
            "sensitivity_decay": 0.5,
            "uncertainty_decay": draw(st.sampled_from([0.0, 0.25, 0.5])),
        }
        | fixed
    )


def elements(plan, layers):
    return plan.join_elements({path: (f.B, f.C) for path, f in layers.items()})


def started(layers, config):
    plan = core.plan_budget(layers, config)
    return plan, core.initial_budget_state(plan, elements(plan, layers))


def step_of(plan, state, layers, gradients, *processes):
    """Take one step of the budget: call `observe` and `advance` on the vectors of all layers."""
    weights, slopes = elements(plan, layers), plan.join_elements(gradients)
    return core.advance(plan, core.observe(plan, state, weights, slopes, *processes), *processes)


class ByLoop:
    """The reference: one model under a schedule, with its subspaces in a list, by module path and then by number."""

    def __init__(self, layers, config, dtype="float64"):
        self.config, self.dtype = config, dtype
        self.paths = sorted(layers)
        self.step = self.left_out = 0
        self.waiting = False
        self.active = [bool(on) for path in self.paths for on in layers[path].active]
        self.costs = [cost for path in self.paths for cost in costs_of(layers[path])]
        self.layers = [i for i, path in enumerate(self.paths) for _ in layers[path].ranks]
        self.total = sum(self.costs) if config.unit == "parameters" else len(self.costs)
        self.forget(layers)

    def forget(self, layers):
        self.averages = {
            path: [[np.zeros(w.shape) for _ in range(2)] for w in (f.B, f.C)] for path, f in layers.items()
        }

    def budget(self):
        c = self.config
        start = self.total if c.initial is None else c.initial
        left = 1 - Fraction(
            min(max(self.step, c.start_step), c.end_step) - c.start_step, c.end_step - c.start_step
        )
        return (c.target + (start - c.target) * left ** int(c.power)).__floor__()

    def scores(self, layers):
        found = []
        for path in self.paths:
            f, (B, C) = layers[path], (Ibar * Ubar for Ibar, Ubar in self.averages[path])
            start = 0
            for k, r in enumerate(f.ranks):
                columns = np.flatnonzero(f.labels == k)
                R = f.A.shape[2] if f.A.shape[0] == 1 else min(f.A.shape[2], columns.size)
                own = B[:R, start : start + r], C[:r, columns]
                found.append(sum(float(s.mean()) for s in own if s.size))
                start += r
        return found

    def allocates(self):
        c, t = self.config, self.step
        return c.start_step < t <= c.end_step and ((t - c.start_step) % c.interval == 0 or t == c.end_step)

    def advance(self, layers, gradients):
        c = self.config
        self.step += 1
        if self.step > c.end_step and not self.waiting:
            return
        products = {
            path: [np.abs(w * g) for w, g in zip((f.B, f.C), gradients[path], strict=True)]
            for path, f in layers.items()
        }
        if all(np.isfinite(product).all() for pair in products.values() for product in pair):
            for path, pair in products.items():
                for average, product in zip(self.averages[path], pair, strict=True):
                    b1, b2 = c.sensitivity_decay, c.uncertainty_decay
                    average[0] = b1 * average[0] + (1 - b1) * product
                    average[1] = b2 * average[1] + (1 - b2) * np.abs(product - average[0])
        else:
            self.left_out += 1
        self.waiting = self.waiting or self.allocates()
        scores = self.scores(layers)
        informative = any(
            score > 0 and (c.revive or on) for score, on in zip(scores, self.active, strict=True)
        )
        if self.waiting and informative:
            self.waiting = False
            self.active = allocate_by_loop(
                np.asarray(scores, dtype=self.dtype),
                self.budget(),
                self.costs if c.unit == "parameters" else None,
                None if c.revive else self.active,
                self.layers,
                c.minimum_per_layer,
            )
            if c.window == "reset":
                self.forget(layers)

    def check(self, plan, state, layers, to_numpy=np.asarray, dtype=None):
        """Check that a state equals the reference: to the bit, or within the tolerance of `dtype` if given."""
        active = to_numpy(state.active).tolist()
        found = int(state.step), bool(state.waiting), int(state.left_out), active
        assert found == (self.step, self.waiting, self.left_out, self.active)
        expected = [plan.join_elements({p: [w[i] for w in self.averages[p]] for p in layers}) for i in (0, 1)]
        scores = plan.scores(state.sensitivity * state.uncertainty)
        averages = map(to_numpy, (state.sensitivity, state.uncertainty))
        for what, actual, wanted in zip(("Ibar", "Ubar"), averages, expected, strict=True):
            if dtype is None:
                assert np.array_equal(actual, wanted), what
            else:
                assert_agrees(actual, wanted, dtype=dtype, what=what)
        assert_agrees(to_numpy(scores), self.scores(layers), dtype=dtype or "float32", what="scores")


class TestPlan:
    @given(models(), UNITS)
    def test_one_row_and_one_vector_by_path_then_number(self, model, unit):
        _, layers = model
        config = BudgetConfig(target=needed(layers, unit, 0), start_step=2, end_step=9, interval=4, unit=unit)
        plan, paths = core.plan_budget(layers, config), sorted(layers)
        costs = tuple(cost for path in paths for cost in costs_of(layers[path]))
        sizes = tuple(len(layers[path].ranks) for path in paths)
        total = sum(costs) if unit == "parameters" else len(costs)
        assert (plan.paths, plan.sizes, plan.costs, plan.total) == (tuple(paths), sizes, costs, total)
        other = core.plan_budget(dict(reversed(layers.items())), config)
        assert (other.paths, other.sizes, other.costs, other.total) == (plan.paths, sizes, costs, total)
        assert [plan.budget_at(t) for t in range(12)] == [core.budget_at(t, config, total) for t in range(12)]
        assert [t for t in range(12) if plan.allocates_at(t)] == [6, 9]

        row = plan.join(
            {path: 10 * paths.index(path) + np.arange(len(f.ranks)) for path, f in layers.items()}
        )
        assert row.tolist() == [10 * i + k for i, K in enumerate(sizes) for k in range(K)]
        parts = plan.split(row)
        assert list(parts) == paths
        assert np.array_equal(plan.join(parts), row)

        vector = elements(plan, layers)
        arrays = [array for path in paths for array in (layers[path].B, layers[path].C)]
        assert np.array_equal(vector, np.concatenate([array.ravel() for array in arrays]))
        pairs = plan.split_elements(vector)
        assert all(np.array_equal(pairs[path][0], layers[path].B) for path in paths)
        assert all(np.array_equal(pairs[path][1], layers[path].C) for path in paths)

    @given(models(), UNITS, st.integers(0, 3))
    def test_least_target(self, model, unit, minimum):
        """A target of `needed` is accepted; one less is refused, and the message gives the lowest target."""
        _, layers = model
        least = needed(layers, unit, minimum)

        def plan(target):
            config = BudgetConfig(target=target, end_step=9, unit=unit, minimum_per_layer=minimum)
            return core.plan_budget(layers, config)

        assert plan(least).total >= least
        if least > 1:
            what = (
                f"minimum_per_layer = {minimum} in {len(layers)} layers may need"
                if minimum
                else "one subspace may need"
            )
            with pytest.raises(
                ConfigError, match=rf"target = {least - 1} {unit} cannot be kept to: {what}.* {least};"
            ):
                plan(least - 1)

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"target": 9}, "target = 9 is more than the 8 subspaces of the model; lower it"),
            (
                {"target": 65, "unit": "parameters"},
                "target = 65 is more than the 64 parameters of the model; lower it",
            ),
            ({"target": 3, "initial": 9}, "initial = 9 is more than the 8 subspaces of the model; lower it"),
            (
                {"target": 7, "unit": "parameters"},
                "target = 7 parameters cannot be kept to: one subspace may need 8; raise the target",
            ),
            (
                {"target": 3, "minimum_per_layer": 2},
                "target = 3 subspaces cannot be kept to: minimum_per_layer = 2 in 2 layers may need 4; "
                "raise the target, or lower minimum_per_layer",
            ),
            (
                {"target": 31, "minimum_per_layer": 2, "unit": "parameters"},
                "target = 31 parameters cannot be kept to: minimum_per_layer = 2 in 2 layers may need 32; "
                "raise the target, or lower minimum_per_layer",
            ),
        ],
    )
    def test_what_cannot_be_kept_to_is_refused(self, changes, match):
        f = one_layer(4, columns=3, P=5)
        assert core.plan_budget({"q": f, "v": f}, BudgetConfig(target=8, end_step=5)).costs == (8,) * 8
        with pytest.raises(ConfigError, match=f"^budget: {match}$"):
            core.plan_budget({"q": f, "v": f}, BudgetConfig(**{"end_step": 5} | changes))

    def test_no_layers(self):
        with pytest.raises(ConfigError, match="a budget needs at least one adapted layer"):
            core.plan_budget({}, BudgetConfig(target=1, end_step=5))

    def test_traced_factors_are_refused_by_name(self):
        jax = pytest.importorskip("jax")
        layers = as_arrays(jax.numpy, {"block.q": layer(np.random.default_rng(0))})
        config = BudgetConfig(target=1, end_step=5)
        with pytest.raises(ArrayTypeError, match=r"^block\.q: values are needed here"):
            jax.jit(lambda layers: core.plan_budget(layers, config).total)(layers)


@given(models(), st.data())
def test_every_step_is_that_of_the_loop(model, data):
    """Averages, scores, schedule, waiting, skipped steps, resets and masks are all exact, for any schedule."""
    rng, layers = model
    for path, f in layers.items():  # some subspaces are frozen from the start, as after `load`
        layers[path] = f._replace(active=rng.random(f.active.size) < 0.9)
    config = data.draw(schedules(layers))
    plan, state = started(layers, config)
    reference = ByLoop(layers, config)
    reference.check(plan, state, layers)
    kinds = st.sampled_from(["any", "any", "any", "zero", "nan", "inf"])
    for _ in range(config.end_step + 3):
        layers = {path: at_step(rng, f) for path, f in layers.items()}
        gradients = gradients_of(rng, layers, data.draw(kinds))
        state = step_of(plan, state, layers, gradients)
        reference.advance(layers, gradients)
        reference.check(plan, state, layers)


def one_layer(K=3, columns=2, P=2):
    """Return factors with K subspaces of rank one on a shared basis, and C = 0."""
    labels = np.repeat(np.arange(K), columns)
    C = np.zeros((1, K * columns))
    return Factors(np.zeros((1, 4, P)), np.ones((P, K)), C, labels, np.ones(K, int), np.ones(K, bool))


def pointing_at(*subspaces, scale=1.0, K=3):
    """Return gradients that make these subspaces of `one_layer` important, in decreasing order."""
    gradient = np.zeros((2, K))
    for i, k in enumerate(subspaces):
        gradient[:, k] = scale * (len(subspaces) - i)
    return {"q": (gradient, np.ones((1, 2 * K)))}  # C is zero, so |w g| of C is zero whatever its gradient


NOTHING, BAD = pointing_at(), pointing_at(1)
BAD["q"][1][0, 0] = np.nan


@pytest.mark.parametrize(
    ("settings", "steps", "expected"),
    [
        pytest.param(
            {"end_step": 3, "interval": 2},
            [NOTHING, NOTHING, pointing_at(2, 1), NOTHING],
            ["012", "012 waits", "2", "2"],
            id="the first allocation waits for a step that says something",
        ),
        pytest.param(
            {"end_step": 1},
            [NOTHING, NOTHING, pointing_at(2), pointing_at(1)],
            ["012 waits", "012 waits", "2", "2"],
            id="and beyond the end of the schedule",
        ),
        pytest.param(
            {"end_step": 1}, [BAD, pointing_at(1)], ["012 waits", "1"], id="a step left out does not end it"
        ),
        pytest.param(
            {"end_step": 4, "interval": 2},
            [pointing_at(0, 1), pointing_at(0, 1), pointing_at(2, 0), pointing_at(2, 0)],
            ["012", "01", "01", "0"],
            id="what is frozen stays frozen",
        ),
        pytest.param(
            {"end_step": 4, "interval": 2, "revive": True},
            [pointing_at(0, 1), pointing_at(0, 1), pointing_at(2, 0), pointing_at(2, 0)],
            ["012", "01", "01", "2"],
            id="unless it may return",
        ),
        pytest.param(
            {"end_step": 2, "window": "reset"},
            [pointing_at(0, 2, scale=100), pointing_at(2, 0)],
            ["02", "2"],
            id="a window that resets forgets",
        ),
        pytest.param(
            {"end_step": 2, "window": "running"},
            [pointing_at(0, 2, scale=100), pointing_at(2, 0)],
            ["02", "0"],
            id="what a running one remembers",
        ),
    ],
)
def test_by_hand(settings, steps, expected):
    plan, state = started({"q": one_layer()}, BudgetConfig(target=1, power=1, **settings))
    found = []
    for gradients in steps:
        state = step_of(plan, state, {"q": one_layer()}, gradients)
        kept = "".join(map(str, np.flatnonzero(state.active)))
        found.append(f"{kept} waits" if state.waiting else kept)
    assert found == expected
    assert int(state.left_out) == sum(gradients is BAD for gradients in steps)


# 1e30 is finite in float32, but its square, which a score needs, is not.
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_step_that_cannot_be_scored_leaves_the_averages_of_all_layers_as_they_were(
    xp, to_numpy, bad, weight
):
    rng, layers = np.random.default_rng(0), two_layers()
    plan, state = started(as_arrays(xp, layers), BudgetConfig(target=2, start_step=5, end_step=9))
    state = step_of(plan, state, as_arrays(xp, layers), as_arrays(xp, gradients_of(rng, layers)))
    assert to_numpy(state.sensitivity).any()
    gradients = gradients_of(rng, layers)
    gradients["q"][1][0, 0], layers["q"].C[0, 0] = bad, weight
    after = step_of(plan, state, as_arrays(xp, layers), as_arrays(xp, gradients))
    left_out = not (bad == 1e30 and weight == 0)
    assert (int(after.step), int(after.left_out)) == (2, left_out)
    assert np.array_equal(to_numpy(after.sensitivity), to_numpy(state.sensitivity)) == left_out
    assert np.array_equal(to_numpy(after.uncertainty), to_numpy(state.uncertainty)) == left_out
    assert np.isfinite(to_numpy(after.sensitivity)).all()


class Elsewhere(core.Processes):
    """Processes whose elements are in another order, and where another process rejects a step or decides the mask."""

    def __init__(self, order, usable=True, decision=None):
        self.order, self.usable, self.decision = order, usable, decision

    def all_usable(self, usable):
        return usable & self.usable

    def scores(self, plan, products):
        return plan.scores(products[np.argsort(self.order)])

    def agree(self, active):
        return active if self.decision is None else self.decision


def test_what_processes_say_is_heeded():
    rng, layers = np.random.default_rng(0), two_layers()
    plan, state = started(layers, BudgetConfig(target=2, end_step=6, interval=2))
    order = rng.permutation(state.sensitivity.size)
    shuffled, decision = state, ~state.active
    for seed in range(6):
        gradients = gradients_of(np.random.default_rng(seed), layers)
        vectors = elements(plan, layers), plan.join_elements(gradients)
        state = step_of(plan, state, layers, gradients)
        here = Elsewhere(order)
        observed = core.observe(plan, shuffled, *(vector[order] for vector in vectors), here)
        other = core.advance(plan, observed, Elsewhere(order, decision=decision))
        assert np.array_equal(other.active, decision if seed % 2 else shuffled.active)
        shuffled = core.advance(plan, observed, here)
        assert np.array_equal(shuffled.active, state.active)
        assert np.array_equal(shuffled.sensitivity, state.sensitivity[order])
    start = core.initial_budget_state(plan, vectors[0])
    refused = core.observe(plan, start, *vectors, Elsewhere(order, usable=False))
    assert refused.left_out == 1
    assert not refused.sensitivity.any()


CONFIGS = {
    "defaults": BudgetConfig(target=3, end_step=6, interval=2),
    "exact": BudgetConfig(target=2, start_step=1, end_step=6, interval=2, **EXACT),
    "running, revive": BudgetConfig(target=4, end_step=6, window="running", revive=True, power=1, **EXACT),
    "parameters, minimum": BudgetConfig(
        target=48, end_step=6, interval=4, unit="parameters", minimum_per_layer=1, **EXACT
    ),
}
KINDS = ["zero", "any", "any", "nan", "any", "zero", "any", "any"]


def two_layers():
    rng = np.random.default_rng(0)
    return {
        "v": layer(rng, sizes=(4, 1, 2, 4), basis="per_subspace"),
        "q": layer(rng, sizes=(4, 2, 1, 2, 2), r=4, padding=1),
    }


def steps_of(layers, noise=0.0, scale=1.0):
    """Yield factors and gradients of every step: integers with ties between subspaces, or without ties if `noise`."""
    rng = np.random.default_rng(1)
    for kind in KINDS:
        layers = {path: at_step(rng, f) for path, f in layers.items()}
        gradients = gradients_of(rng, layers, kind)
        yield (
            {path: f._replace(B=scale * f.B, C=scale * f.C) for path, f in layers.items()},
            {
                path: tuple(scale * g * (1 + noise * rng.random(g.shape)) for g in pair)
                for path, pair in gradients.items()
            },
        )


def as_arrays(xp, tree, floating="float32"):
    """Convert the arrays of layers or gradients to another framework, with floating-point arrays in this dtype."""

    def convert(array):
        kind = {"f": floating, "i": "int32", "b": "bool"}[array.dtype.kind]
        if kind == "bfloat16":  # NumPy has no bfloat16
            return xp.asarray(array.astype("float32"), dtype=xp.bfloat16)
        return xp.asarray(array.astype(kind))

    return {
        path: Factors(*map(convert, arrays)) if isinstance(arrays, Factors) else tuple(map(convert, arrays))
        for path, arrays in tree.items()
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_every_framework_decides_alike_in_every_step(xp, to_numpy, name):
    check_every_step(xp, to_numpy, name)


def check_every_step(xp, to_numpy, name, scale=1.0, floating="float32"):
    """Check that the same gradients give the same masks and averages as the reference in float64 NumPy."""
    dtype, noise = ("float32", 1.0) if name == "defaults" else (None, 0.0)
    layers = two_layers()
    plan, state = started(as_arrays(xp, layers, floating), CONFIGS[name])
    reference = ByLoop(layers, CONFIGS[name], dtype="float32")
    for factors, gradients in steps_of(layers, noise, scale):
        state = step_of(plan, state, as_arrays(xp, factors, floating), as_arrays(xp, gradients, floating))
        reference.advance(factors, gradients)
        reference.check(plan, state, factors, to_numpy, dtype)
        assert str(state.sensitivity.dtype).endswith("float32")
    assert reference.left_out == 1
    assert 0 < sum(reference.active) < len(reference.active)


@pytest.mark.parametrize(
    ("framework", "floating"), [("numpy", "float16"), ("torch", "bfloat16"), ("jax.numpy", "bfloat16")]
)
def test_factors_in_half_precision_have_float32_averages(to_numpy, framework, floating):
    """In 16 bits the products would overflow or the averages would be rounded."""
    xp = pytest.importorskip(framework)
    check_every_step(xp, to_numpy, "exact", scale=512.0, floating=floating)


def test_step_and_waiting_may_be_python_numbers(xp, to_numpy):
    """A controller on a GPU keeps them as Python numbers, so that it need not wait for the device in every step."""
    layers, config = two_layers(), CONFIGS["exact"]
    plan, state = started(as_arrays(xp, layers), config)
    state, reference = state._replace(step=0, waiting=False), ByLoop(layers, config, dtype="float32")
    for factors, gradients in steps_of(layers):
        state = step_of(plan, state, as_arrays(xp, factors), as_arrays(xp, gradients))
        reference.advance(factors, gradients)
        reference.check(plan, state, factors, to_numpy)
        assert (type(state.step), type(state.waiting)) == (int, bool)


def test_scanned_over_all_steps_it_decides_alike():
    """``jax.lax.scan`` needs a state with the same shapes and dtypes in every step, for factors of any dtype."""
    jax = pytest.importorskip("jax")
    layers, config = two_layers(), CONFIGS["parameters, minimum"]
    steps = [[as_arrays(jax.numpy, tree, "float16") for tree in step] for step in steps_of(layers)]
    plan, start = started(steps[0][0], config)

    def step(state, inputs):
        state = step_of(plan, state, *inputs)
        return state, (state.active, state.waiting)

    stacked = jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *steps)
    last, (active, waiting) = jax.lax.scan(step, start, stacked)
    reference, expected = ByLoop(layers, config, dtype="float32"), []
    for factors, gradients in steps_of(layers):
        reference.advance(factors, gradients)
        expected.append((reference.active, reference.waiting))
    assert list(zip(active.tolist(), waiting.tolist(), strict=True)) == expected
    reference.check(plan, last, factors)


def test_initial_state_has_the_masks_of_the_factors(xp, to_numpy):
    layers = two_layers()
    layers["q"] = layers["q"]._replace(active=np.asarray([True, False, True, True, False]))
    arrays = layers if xp is np else as_arrays(xp, layers)
    plan = core.plan_budget(arrays, CONFIGS["exact"])
    layers["q"].active[:] = False  # a framework that trains in place changes the array later
    state = core.initial_budget_state(plan, elements(plan, arrays))
    masks = {path: to_numpy(mask).tolist() for path, mask in plan.split(state.active).items()}
    assert masks == {"q": [True, False, True, True, False], "v": [True] * 4}
    assert [int(state.step), bool(state.waiting), int(state.left_out)] == [0, False, 0]
    assert state.sensitivity.shape == state.uncertainty.shape == elements(plan, layers).shape
    assert not to_numpy(state.sensitivity).any() and not to_numpy(state.uncertainty).any()
