"""The budget of a whole model against DESIGN 2.6 and 2.7, written as loops over subspaces in float64 NumPy.

Weights and gradients are small whole numbers and the decays powers of two, so that every average is exact in every
framework and dtype: ties are real ties, and what is compared is compared with ``==``.
"""

import functools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adamss import BudgetConfig, core
from adamss.core import Factors
from adamss.errors import ArrayTypeError, ConfigError
from adamss_conformance.tolerances import assert_agrees

EXACT = {"sensitivity_decay": 0.5, "uncertainty_decay": 0.5}


def layer(rng, sizes=(1, 2, 4), P=4, r=2, basis="shared", padding=0):
    """Factors of subspaces of these sizes, whole numbers in them and in all padding but that of B's own columns.

    Ranks go down from r to 0, the last ones; every mean is over a power of two of numbers where sizes and P are.
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
    """The factors with other values of B and C."""
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
        for f in layers.values():  # infinity times zero is for a test of its own
            f.B[0, -1] = f.C[0, -1] = 1
    return gradients


class ByLoop:
    """One model under a schedule. The subspaces stand in a list, by module path, then by number."""

    def __init__(self, layers, config, allocate, dtype="float64"):
        self.config, self.allocate, self.dtype = config, allocate, dtype
        self.paths = sorted(layers)
        self.step = self.left_out = 0
        self.waiting = False
        self.active = [bool(on) for path in self.paths for on in layers[path].active]
        self.costs = [cost for path in self.paths for cost in self.costs_of(layers[path])]
        self.layers = [i for i, path in enumerate(self.paths) for _ in layers[path].ranks]
        self.total = sum(self.costs) if config.unit == "parameters" else len(self.costs)
        self.forget(layers)

    def forget(self, layers):
        self.averages = {
            path: [[np.zeros(w.shape) for _ in range(2)] for w in (f.B, f.C)] for path, f in layers.items()
        }

    @staticmethod
    def costs_of(f):
        sizes = np.bincount(f.labels)
        P = f.A.shape[2]
        R = [P if f.A.shape[0] == 1 else min(P, size) for size in sizes]
        return [max(1, int(r * (n + R))) for r, n, R in zip(f.ranks, sizes, R, strict=True)]

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
            self.active = self.allocate(
                np.asarray(scores, dtype=self.dtype),
                self.budget(),
                self.costs if c.unit == "parameters" else None,
                None if c.revive else self.active,
                self.layers,
                c.minimum_per_layer,
            )
            if c.window == "reset":
                self.forget(layers)


def assert_same_decisions(state, reference, to_numpy=np.asarray):
    masks = [bool(on) for path in reference.paths for on in to_numpy(state.active[path])]
    found = int(state.step), bool(state.waiting), int(state.left_out), masks
    assert found == (reference.step, reference.waiting, reference.left_out, reference.active)


def assert_same_averages(state, reference, to_numpy=np.asarray, dtype=None):
    for path, pair in reference.averages.items():
        for name, actual, expected in zip("BC", state.importance[path], pair, strict=True):
            for a, b in zip(actual, expected, strict=True):
                if dtype is None:
                    assert np.array_equal(to_numpy(a), b), f"{path}: averages of {name}"
                else:
                    assert_agrees(to_numpy(a), b, dtype=dtype, what=f"{path}: averages of {name}")


def as_arrays(xp, tree, floating="float32"):
    """The arrays of layers or gradients in another framework; floating point in a dtype."""

    def convert(array):
        kind = {"f": floating, "i": "int32", "b": "bool"}[array.dtype.kind]
        return xp.asarray(array.astype(kind))

    return {
        path: Factors(*map(convert, arrays)) if isinstance(arrays, Factors) else tuple(map(convert, arrays))
        for path, arrays in tree.items()
    }


def numpy_equal(first, second):
    """Whether two states hold the same, to the bit."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(numpy_equal(first[key], second[key]) for key in first)
    if isinstance(first, tuple):
        return all(numpy_equal(a, b) for a, b in zip(first, second, strict=True))
    return np.array_equal(np.asarray(first), np.asarray(second))


# ---- the plan --------------------------------------------------------------------------------------


@st.composite
def models(draw, count=4):
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    names = draw(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=count, unique=True))
    layers = {}
    for name in names:
        layers[f"block.{name}"] = layer(
            rng,
            sizes=draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)),
            P=draw(st.integers(1, 4)),
            r=draw(st.integers(1, 3)),
            basis=draw(st.sampled_from(["shared", "per_subspace"])),
            padding=draw(st.integers(0, 1)),
        )
    return rng, layers


def needed(layers, unit, minimum, *, revive=False):
    """The least target: what every layer keeps, and the whole model, whichever of the subspaces that will be."""
    costs = [ByLoop.costs_of(f) for f in layers.values()]
    if unit == "subspaces":
        return sum(min(minimum, len(layer)) for layer in costs)
    last = (min if revive else max)(cost for layer in costs for cost in layer)
    return max(last, sum(sum(sorted(layer, reverse=True)[:minimum]) for layer in costs))


UNITS = st.sampled_from(["subspaces", "parameters"])


class TestPlan:
    @given(models(), UNITS)
    def test_one_row_by_path_then_number(self, model, unit):
        _, layers = model
        config = BudgetConfig(target=max(1, needed(layers, unit, 0)), end_step=10, unit=unit)
        plan = core.plan_budget(layers, config)
        assert plan.paths == tuple(sorted(layers))
        assert plan.sizes == tuple(len(layers[path].ranks) for path in sorted(layers))
        costs = [cost for path in sorted(layers) for cost in ByLoop.costs_of(layers[path])]
        assert plan.costs == tuple(costs)
        assert plan.total == (sum(costs) if unit == "parameters" else len(costs))
        assert plan == core.plan_budget(dict(reversed(layers.items())), config)

        row = plan.join(
            {path: np.arange(len(f.ranks)) + 10 * i for i, (path, f) in enumerate(layers.items())}
        )
        order = sorted(range(len(layers)), key=list(layers).__getitem__)
        assert row.tolist() == [10 * i + k for i in order for k in range(len(list(layers.values())[i].ranks))]
        parts = plan.split(row)
        assert list(parts) == sorted(layers)
        assert np.array_equal(plan.join(parts), row)

    @given(models(), UNITS)
    def test_schedule_starts_from_the_total(self, model, unit):
        _, layers = model
        config = BudgetConfig(
            target=max(1, needed(layers, unit, 0)), start_step=2, end_step=9, interval=4, unit=unit
        )
        plan = core.plan_budget(layers, config)
        assert [plan.budget_at(t) for t in range(12)] == [
            core.budget_at(t, config, plan.total) for t in range(12)
        ]
        assert plan.budget_at(2) == plan.total
        assert [t for t in range(12) if plan.allocates_at(t)] == [6, 9]
        assert [t for t, due in enumerate(plan.allocates_at(np.arange(12))) if due] == [6, 9]

    @given(models(), UNITS, st.integers(0, 3))
    def test_least_target(self, model, unit, minimum):
        """What ``needed`` says can be kept to; one less cannot, and the message says what it takes."""
        _, layers = model
        least = max(1, needed(layers, unit, minimum))

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
            ({"target": 9}, "^budget: target = 9 is more than the 8 subspaces of the model; lower it$"),
            (
                {"target": 65, "unit": "parameters"},
                "^budget: target = 65 is more than the 64 parameters of the model; lower it$",
            ),
            (
                {"target": 3, "initial": 9},
                "^budget: initial = 9 is more than the 8 subspaces of the model; lower it$",
            ),
            (
                {"target": 7, "unit": "parameters"},
                "^budget: target = 7 parameters cannot be kept to: one subspace may need 8; raise the target$",
            ),
            (
                {"target": 3, "minimum_per_layer": 2},
                "^budget: target = 3 subspaces cannot be kept to: minimum_per_layer = 2 in 2 layers may need 4; "
                "raise the target, or lower minimum_per_layer$",
            ),
            (
                {"target": 31, "minimum_per_layer": 2, "unit": "parameters"},
                "^budget: target = 31 parameters cannot be kept to: minimum_per_layer = 2 in 2 layers may need 32; "
                "raise the target, or lower minimum_per_layer$",
            ),
        ],
    )
    def test_what_cannot_be_kept_to_is_refused(self, changes, match):
        labels = np.repeat(np.arange(4), 3)
        f = Factors(
            np.zeros((1, 6, 5)), np.zeros((5, 4)), np.zeros((1, 12)), labels, np.ones(4, int), labels[:4] == 0
        )
        assert core.plan_budget({"q": f, "v": f}, BudgetConfig(target=8, end_step=5)).costs == (8,) * 8
        with pytest.raises(ConfigError, match=match):
            core.plan_budget({"q": f, "v": f}, BudgetConfig(**{"end_step": 5} | changes))

    def test_no_layers(self):
        with pytest.raises(ConfigError, match="a budget needs at least one adapted layer"):
            core.plan_budget({}, BudgetConfig(target=1, end_step=5))

    def test_traced_factors_are_refused_by_name(self):
        jax = pytest.importorskip("jax")
        layers = as_arrays(jax.numpy, {"block.q": layer(np.random.default_rng(0))})
        config = BudgetConfig(target=1, end_step=5)
        with pytest.raises(ArrayTypeError, match=r"^block\.q: the values are needed here"):
            jax.jit(lambda layers: core.plan_budget(layers, config).total)(layers)


# ---- the state machine -----------------------------------------------------------------------------


@st.composite
def schedules(draw, layers, **fixed):
    """Any schedule that the layers can keep to, of no more than 8 steps, so that averages stay exact."""
    unit = fixed.get("unit", draw(UNITS))
    minimum = draw(st.integers(0, 3))
    costs = [cost for f in layers.values() for cost in ByLoop.costs_of(f)]
    total = sum(costs) if unit == "parameters" else len(costs)
    revive = draw(st.booleans())
    target = draw(st.integers(max(1, needed(layers, unit, minimum, revive=revive)), total))
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


@given(models(), st.data())
def test_every_step_is_that_of_the_loop(allocate_by_loop, model, data):
    """Averages, scores, schedule, waiting, what is left out, reset and masks: all exact, whatever the schedule."""
    rng, layers = model
    for path, f in layers.items():  # as after `load`: some are frozen from the start
        layers[path] = f._replace(active=rng.random(f.active.size) < 0.9)
    config = data.draw(schedules(layers))
    plan, state = core.plan_budget(layers, config), core.initial_budget_state(layers)
    reference = ByLoop(layers, config, allocate_by_loop)
    assert_same_decisions(state, reference)
    kinds = st.sampled_from(["any", "any", "any", "zero", "nan", "inf"])
    for _ in range(config.end_step + 3):
        layers = {path: at_step(rng, f) for path, f in layers.items()}
        gradients = gradients_of(rng, layers, data.draw(kinds))
        state = core.advance_budget(plan, state, layers, gradients)
        reference.advance(layers, gradients)
        assert_same_decisions(state, reference)
        assert_same_averages(state, reference)


def whole_gradients(rng, layers, step=None):
    """Every subspace in use, so that every step is informative, and no two scores are equal."""
    layers = {
        path: f._replace(B=np.ones_like(f.B), C=rng.standard_normal(f.C.shape)) for path, f in layers.items()
    }
    gradients = {
        path: tuple(rng.standard_normal(array.shape) for array in (f.B, f.C)) for path, f in layers.items()
    }
    return layers, gradients


@given(models(), st.data())
def test_exactly_the_budget_at_every_allocation_and_from_the_end_on(model, data):
    rng, layers = model
    config = data.draw(schedules(layers, unit="subspaces", initial=None))
    plan, state = core.plan_budget(layers, config), core.initial_budget_state(layers)
    expected = plan.total
    for step in range(1, config.end_step + 4):
        before = plan.join(state.active)
        state = core.advance_budget(plan, state, *whole_gradients(rng, layers))
        active = plan.join(state.active)
        t = step - config.start_step
        if step == config.end_step or (t > 0 and step < config.end_step and t % config.interval == 0):
            expected = core.budget_at(step, config, plan.total)
        else:
            assert np.array_equal(active, before), f"step {step} is no allocation"
        assert active.sum() == expected, f"step {step}"
        for path, f in layers.items():
            assert state.active[path].sum() >= min(config.minimum_per_layer, f.ranks.size)
        if not config.revive:
            assert not (active & ~before).any(), "a frozen subspace has come back"
    assert expected == config.target


@given(models(), st.data())
def test_never_more_parameters_than_the_budget(model, data):
    rng, layers = model
    config = data.draw(schedules(layers, unit="parameters", initial=None))
    plan, state = core.plan_budget(layers, config), core.initial_budget_state(layers)
    for step in range(1, config.end_step + 4):
        state = core.advance_budget(plan, state, *whole_gradients(rng, layers))
        spent = sum(np.asarray(plan.costs)[plan.join(state.active)])
        if step >= config.end_step or plan.allocates_at(step):
            assert spent <= plan.budget_at(step)
        for path, f in layers.items():
            assert state.active[path].sum() >= min(config.minimum_per_layer, f.ranks.size)


def test_a_target_that_the_last_subspace_could_exceed_is_refused():
    """Once only that one is left, nothing could be trained. Where a subspace may return, a cheaper one can."""
    labels = np.asarray([0, 0, 1])  # costs 4 and 3
    f = Factors(
        np.zeros((1, 4, 2)), np.ones((2, 2)), np.ones((1, 3)), labels, np.ones(2, int), np.ones(2, bool)
    )
    settings = {"end_step": 2, "power": 1, "unit": "parameters"}
    with pytest.raises(ConfigError, match="target = 3 parameters cannot be kept to: one subspace may need 4"):
        core.plan_budget({"q": f}, BudgetConfig(target=3, **settings))
    plan = core.plan_budget({"q": f}, BudgetConfig(target=3, revive=True, **settings))
    assert (plan.costs, plan.budget_at(1)) == ((4, 3), 5)
    state = core.initial_budget_state({"q": f})
    for kept in ([True, False], [False, True]):
        state = core.advance_budget(plan, state, {"q": f}, pointing_at(f, 0, 1))
        assert state.active["q"].tolist() == kept


@pytest.mark.parametrize(("interval", "start"), [(1, 0), (7, 0), (7, 3), (1000, 5)])
def test_eight_layers_of_five_subspaces_end_at_exactly_ten(interval, start):
    """PEFT keeps one fewer than its target, and reaches it only where an interval ends on the last step."""
    rng = np.random.default_rng(0)
    layers = {f"layer.{i}.query": layer(rng, sizes=[2, 1, 2, 3, 1], r=6) for i in range(8)}
    plan = core.plan_budget(layers, BudgetConfig(target=10, start_step=start, end_step=20, interval=interval))
    state = core.initial_budget_state(layers)
    counts = []
    for _ in range(25):
        state = core.advance_budget(plan, state, *whole_gradients(rng, layers))
        counts.append(sum(int(mask.sum()) for mask in state.active.values()))
    steps = range(1, 26)
    last = [max([t for t in (*range(start, 20, interval), 20) if t <= step], default=0) for step in steps]
    assert counts == [plan.budget_at(t) for t in last]
    assert counts[19:] == [10] * 6


def one_layer(K=3):
    """K subspaces of rank one and two columns, on a shared basis of two."""
    return Factors(
        np.zeros((1, 4, 2)),
        np.ones((2, K)),
        np.zeros((1, 2 * K)),
        np.repeat(np.arange(K), 2),
        np.ones(K, int),
        np.ones(K, bool),
    )


def pointing_at(f, *subspaces):
    """Gradients of B that make these subspaces important, the first most."""
    gradient = np.zeros_like(f.B)
    for i, k in enumerate(subspaces):
        gradient[:, k] = len(subspaces) - i
    return {"q": (gradient, np.zeros_like(f.C))}


class TestWaiting:
    def test_the_first_allocation_waits_for_a_step_that_says_something(self):
        """C starts at zero, and with it the gradient of B: nothing is decided by that, and the averages go on."""
        f = one_layer(4)
        nothing = {"q": (np.zeros_like(f.B), np.ones_like(f.C))}  # C = 0, so that |w g| = 0
        plan = core.plan_budget({"q": f}, BudgetConfig(target=1, end_step=3, power=1, interval=2))
        state = core.initial_budget_state({"q": f})
        seen = []
        for gradients in (nothing, nothing, pointing_at(f, 3, 1), nothing):
            state = core.advance_budget(plan, state, {"q": f}, gradients)
            seen.append((bool(state.waiting), np.flatnonzero(state.active["q"]).tolist()))
        assert seen == [(False, [0, 1, 2, 3]), (True, [0, 1, 2, 3]), (False, [3]), (False, [3])]

    def test_and_beyond_the_end_of_the_schedule(self):
        f = one_layer()
        zero = {"q": (np.zeros_like(f.B), np.zeros_like(f.C))}
        plan = core.plan_budget({"q": f}, BudgetConfig(target=1, end_step=1))
        state = core.initial_budget_state({"q": f})
        for gradients, waiting, active in (
            (zero, True, [0, 1, 2]),
            (zero, True, [0, 1, 2]),
            (pointing_at(f, 2), False, [2]),
            (pointing_at(f, 1), False, [2]),
        ):
            state = core.advance_budget(plan, state, {"q": f}, gradients)
            assert bool(state.waiting) is waiting
            assert np.flatnonzero(state.active["q"]).tolist() == active

    def test_a_step_that_is_left_out_does_not_end_it(self):
        f = one_layer()
        plan = core.plan_budget({"q": f}, BudgetConfig(target=1, end_step=1))
        bad = pointing_at(f, 1)
        bad["q"][1][0, 0] = np.nan
        state = core.advance_budget(plan, core.initial_budget_state({"q": f}), {"q": f}, bad)
        assert bool(state.waiting)
        assert int(state.left_out) == int(state.step) == 1
        assert not any(array.any() for average in state.importance["q"] for array in average)


def test_a_frozen_subspace_comes_back_only_with_revive():
    f = one_layer()
    for revive, expected in ((False, [0]), (True, [2])):
        config = BudgetConfig(target=1, end_step=4, interval=2, power=1, revive=revive)
        plan, state = core.plan_budget({"q": f}, config), core.initial_budget_state({"q": f})
        kept = []
        for gradients in [pointing_at(f, 0, 1)] * 2 + [pointing_at(f, 2)] * 2:
            gradients["q"][0][:, 0] += 0.5  # the first subspace goes on saying a little
            state = core.advance_budget(plan, state, {"q": f}, gradients)
            kept.append(np.flatnonzero(state.active["q"]).tolist())
        assert kept == [[0, 1, 2], [0, 1], [0, 1], expected]


def test_a_window_that_resets_forgets_what_a_running_one_remembers():
    f = one_layer()
    kept = {}
    for window in ("reset", "running"):
        config = BudgetConfig(target=1, end_step=2, power=1, window=window)
        plan, state = core.plan_budget({"q": f}, config), core.initial_budget_state({"q": f})
        loud, quiet = pointing_at(f, 0, 2), pointing_at(f, 2, 0)
        loud["q"][0][...] *= 100
        for gradients in (loud, quiet):
            state = core.advance_budget(plan, state, {"q": f}, gradients)
        kept[window] = np.flatnonzero(state.active["q"]).tolist()
    assert kept == {"reset": [2], "running": [0]}


@given(models(), st.data())
def test_a_finished_schedule_changes_nothing_but_the_step(model, data):
    rng, layers = model
    config = data.draw(schedules(layers, unit="subspaces", end_step=5))
    plan, state = core.plan_budget(layers, config), core.initial_budget_state(layers)
    for _ in range(config.end_step):
        state = core.advance_budget(plan, state, *whole_gradients(rng, layers))
    assert not bool(state.waiting)
    for kind in ("any", "nan"):
        after = core.advance_budget(plan, state, layers, gradients_of(rng, layers, kind))
        assert int(after.step) == int(state.step) + 1
        assert numpy_equal(after._replace(step=state.step), state)
        state = after


@given(models(), st.data())
def test_the_order_of_the_layers_does_not_matter(model, data):
    rng, layers = model
    config = data.draw(schedules(layers))
    shuffled = dict(data.draw(st.permutations(list(layers.items()))))
    first, second = core.initial_budget_state(layers), core.initial_budget_state(shuffled)
    for _ in range(config.end_step):
        gradients = gradients_of(rng, layers)
        first = core.advance_budget(core.plan_budget(layers, config), first, layers, gradients)
        plan = core.plan_budget(shuffled, config)
        second = core.advance_budget(plan, second, shuffled, dict(reversed(gradients.items())))
    assert numpy_equal(first, second)


# ---- every framework -------------------------------------------------------------------------------

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


def steps_of(layers, seed=1, noise=0.0):
    """Factors and gradients of every step: whole numbers, with ties between subspaces, or without where noisy."""
    rng = np.random.default_rng(seed)
    found = []
    for kind in KINDS:
        layers = {path: at_step(rng, f) for path, f in layers.items()}
        gradients = gradients_of(rng, layers, kind)
        gradients = {
            path: tuple(g * (1 + noise * rng.random(g.shape)) for g in pair)
            for path, pair in gradients.items()
        }
        found.append((layers, gradients))
    return found


def compiled(plan):
    """Return `advance_budget` of a plan under ``jax.jit``, and the list of its traces."""
    traces = []

    def step(state, layers, gradients):
        traces.append(len(traces))
        return core.advance_budget(plan, state, layers, gradients)

    return pytest.importorskip("jax").jit(step), traces


def check_every_step(xp, to_numpy, allocate, name, step, state):
    """Check that from the same gradients the same masks come, those of float64 NumPy, and the same averages."""
    dtype, noise = ("float32", 1.0) if name == "defaults" else (None, 0.0)
    reference = ByLoop(two_layers(), CONFIGS[name], allocate, dtype="float32")
    for factors, gradients in steps_of(two_layers(), noise=noise):
        state = step(state, as_arrays(xp, factors), as_arrays(xp, gradients))
        reference.advance(factors, gradients)
        assert_same_decisions(state, reference, to_numpy)
        assert_same_averages(state, reference, to_numpy, dtype)
    assert reference.left_out == 1
    assert 0 < sum(reference.active) < len(reference.active)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_framework_decides_alike_in_every_step(xp, to_numpy, allocate_by_loop, name):
    layers = as_arrays(xp, two_layers())
    plan, state = core.plan_budget(layers, CONFIGS[name]), core.initial_budget_state(layers)
    assert plan == core.plan_budget(two_layers(), CONFIGS[name])
    step = functools.partial(core.advance_budget, plan)
    check_every_step(xp, to_numpy, allocate_by_loop, name, step, state)


@pytest.mark.parametrize("name", ["defaults", "running, revive"])
def test_compiled_once_for_the_whole_schedule_it_decides_alike(to_numpy, allocate_by_loop, name):
    xp = pytest.importorskip("jax").numpy
    layers = as_arrays(xp, two_layers())
    step, traces = compiled(core.plan_budget(layers, CONFIGS[name]))
    check_every_step(xp, to_numpy, allocate_by_loop, name, step, core.initial_budget_state(layers))
    assert len(traces) == 1


@functools.cache
def compiled_example():
    jax = pytest.importorskip("jax")
    layers = as_arrays(jax.numpy, two_layers())
    return layers, *compiled(core.plan_budget(layers, CONFIGS["exact"]))


@settings(max_examples=15)
@given(st.integers(0, 2**16))
def test_compiled_it_is_the_loop_to_the_bit(allocate_by_loop, seed):
    jax = pytest.importorskip("jax")
    arrays, step, traces = compiled_example()
    state = core.initial_budget_state(arrays)
    reference = ByLoop(two_layers(), CONFIGS["exact"], allocate_by_loop, dtype="float32")
    for factors, gradients in steps_of(two_layers(), seed):
        state = step(state, as_arrays(jax.numpy, factors), as_arrays(jax.numpy, gradients))
        reference.advance(factors, gradients)
        assert_same_decisions(state, reference)
        assert_same_averages(state, reference)
    assert len(traces) == 1


def test_scanned_over_all_steps_it_decides_alike(allocate_by_loop):
    """``jax.lax.scan`` wants a state of the same shapes and dtypes in every step, whatever those of the factors."""
    jax = pytest.importorskip("jax")
    layers, config = two_layers(), CONFIGS["parameters, minimum"]
    steps = [
        (as_arrays(jax.numpy, factors, "float16"), as_arrays(jax.numpy, gradients, "float16"))
        for factors, gradients in steps_of(layers)
    ]
    plan = core.plan_budget(layers, config)

    def step(state, inputs):
        state = core.advance_budget(plan, state, *inputs)
        return state, (plan.join(state.active), state.waiting)

    stacked = jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *steps)
    last, (active, waiting) = jax.lax.scan(step, core.initial_budget_state(steps[0][0]), stacked)
    reference, expected = ByLoop(layers, config, allocate_by_loop, dtype="float32"), []
    for factors, gradients in steps_of(layers):
        reference.advance(factors, gradients)
        expected.append((reference.active, reference.waiting))
    assert list(zip(active.tolist(), waiting.tolist(), strict=True)) == expected
    assert_same_decisions(last, reference)
    assert_same_averages(last, reference)


def in_half(array):
    """The array in the 16 bits of its framework: bfloat16 for PyTorch and JAX, float16 for NumPy."""
    if isinstance(array, np.ndarray):
        return array.astype(np.float16)
    return array.bfloat16() if hasattr(array, "bfloat16") else array.astype("bfloat16")


def dtypes_of(state):
    return {str(array.dtype) for pair in state.importance.values() for mean in pair for array in mean}


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax.numpy"])
def test_factors_in_half_precision_have_float32_averages(to_numpy, allocate_by_loop, framework):
    """Formed in 16 bits, these products would overflow, or the averages be rounded."""
    xp = pytest.importorskip(framework)
    scale, layers, config = 512.0, two_layers(), CONFIGS["exact"]

    def halved(tree, scale=1.0):
        def convert(array):
            return in_half(array * scale) if "float" in str(array.dtype) else array

        return {
            path: Factors(*map(convert, arrays))
            if isinstance(arrays, Factors)
            else tuple(map(convert, arrays))
            for path, arrays in as_arrays(xp, tree).items()
        }

    plan, state = core.plan_budget(halved(layers), config), core.initial_budget_state(halved(layers))
    assert dtypes_of(state) in ({"float32"}, {"torch.float32"})
    reference = ByLoop(layers, config, allocate_by_loop, dtype="float32")
    for factors, gradients in steps_of(layers):
        state = core.advance_budget(plan, state, halved(factors, scale), halved(gradients, scale))
        reference.advance(
            {path: f._replace(B=scale * f.B, C=scale * f.C) for path, f in factors.items()},
            {path: tuple(scale * g for g in pair) for path, pair in gradients.items()},
        )
        assert dtypes_of(state) in ({"float32"}, {"torch.float32"})
        assert_same_decisions(state, reference, to_numpy)
        assert_same_averages(state, reference, to_numpy)


def test_initial_state_has_the_masks_of_the_factors(xp, to_numpy):
    layers = two_layers()
    layers["q"] = layers["q"]._replace(active=np.asarray([True, False, True, True, False]))
    state = core.initial_budget_state(as_arrays(xp, layers))
    assert {path: to_numpy(mask).tolist() for path, mask in state.active.items()} == {
        "v": [True] * 4,
        "q": [True, False, True, True, False],
    }
    assert [int(state.step), bool(state.waiting), int(state.left_out)] == [0, False, 0]
    for path, pair in state.importance.items():
        for average, array in zip(pair, (layers[path].B, layers[path].C), strict=True):
            for values in average:
                assert to_numpy(values).tolist() == np.zeros(array.shape).tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_step_that_is_not_finite_is_left_out_of_the_averages_of_every_layer(bad):
    rng, layers = np.random.default_rng(0), two_layers()
    config = BudgetConfig(target=2, start_step=5, end_step=9)
    plan, state = core.plan_budget(layers, config), core.initial_budget_state(layers)
    state = core.advance_budget(plan, state, layers, gradients_of(rng, layers))
    assert any(state.importance["v"][0].sensitivity.flat)
    gradients = gradients_of(rng, layers)
    gradients["q"][1][0, 0] = bad
    layers["q"].C[0, 0] = 0  # infinity times zero
    with np.errstate(invalid="ignore"):
        after = core.advance_budget(plan, state, layers, gradients)
    assert (int(after.step), int(after.left_out)) == (2, 1)
    assert numpy_equal(after.importance, state.importance)
    assert numpy_equal(after.active, state.active)
