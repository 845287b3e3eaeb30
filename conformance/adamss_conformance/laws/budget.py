"""Laws 6, 7 and 8: what is counted, which subspaces stay trained, and that frozen elements do not move."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

import adamss
from adamss import core
from adamss.backend.ledger import put
from adamss.backend.registry import using
from adamss.core import Factors
from adamss_conformance import cases
from adamss_conformance.capabilities import OPTIMISERS
from adamss_conformance.cases import INPUTS, LAYERS, SCHEDULES, Problem, config, every, problems
from adamss_conformance.driver import Driver, find_drivers
from adamss_conformance.laws.helpers import (
    COMPILED,
    EAGER,
    FLOATS,
    an_optimiser,
    arrays_of,
    assert_budget_kept,
    assert_same,
    attached_with,
    case,
    each_mode,
    each_optimiser,
    each_schedule,
    factors_of,
    linear_of,
    partly_frozen,
    start_training,
    trained_model,
)

__all__ = ["BudgetLaws"]

TRAININGS = [
    *((optimiser, mode, "one way") for optimiser in OPTIMISERS for mode in (EAGER, COMPILED)),
    *(("adamw", EAGER, schedule) for schedule in SCHEDULES if schedule != "one way"),
]
"""Every optimiser with one schedule, and every other schedule with one optimiser."""


class BudgetLaws:
    """Tests that counts equal the formula, an allocation keeps its budget, and frozen elements do not move."""

    @every(
        15,
        sizes=st.tuples(*[st.integers(1, 12)] * 2),
        settings=st.tuples(st.integers(1, 15), st.integers(1, 15), st.integers(1, 4)),
        shared=st.booleans(),
    )
    def test_law_06_count(
        self, driver: Driver, sizes: tuple[int, int], settings: tuple[int, int, int], shared: bool
    ) -> None:
        """The count is ``sum_k r_k (n_k + R_k)``; any further elements that the optimiser gets are padding."""
        with case(driver, "float32", "models"):
            (d, n), (R, K, r) = sizes, settings
            W = np.random.default_rng(d * n).standard_normal((d, n))
            made = adamss.AdamssConfig(
                targets=["query"],
                rank=R,
                subspaces=K,
                subspace_rank=r,
                basis="shared" if shared else "per_subspace",
            )
            model = adamss.attach(driver.model({"query": (W, None)}, "float32"), made)
            f = factors_of(driver, model)["query"]
            row = adamss.summary(model).rows[0]
            groups = np.bincount(f.labels, minlength=min(K, n))
            bases = np.full_like(groups, min(R, d, n)) if shared else np.minimum(min(R, d, n), groups)
            ranks = np.minimum(np.minimum(r, groups), bases)
            assert groups.min() >= 1, "a subspace is empty"
            assert (row.shape, row.K, row.R, row.q) == ((d, n), min(K, n), bases.max(), ranks.sum())
            assert row.trained == (ranks * (groups + bases)).sum()
            padding = ((ranks.max() - ranks) * groups).sum() + (ranks * (bases.max() - bases)).sum()
            assert driver.count(adamss.trainable_parameters(model)) == row.trained + padding

    def test_law_06_count_of_a_model(self, driver: Driver) -> None:
        """The count is the sum over the layers plus all of ``modules_to_save``; training keeps padding at zero."""
        with case(driver, "float32", "models"):
            optimiser = an_optimiser(driver)
            model = adamss.attach(driver.model(LAYERS, "float32"), config(subspaces=12, subspace_rank=3))
            summary = adamss.summary(model)
            assert summary.saved == 16 * 5 + 5
            assert summary.total.trained == sum(row.trained for row in summary.rows)
            model = driver.train(model, INPUTS, steps=3, optimiser=optimiser, rate=0.05)
            padded = 0
            for path, f in factors_of(driver, model).items():
                padding = np.arange(f.C.shape[0])[:, None] >= f.ranks[f.labels]
                padded += int(padding.sum())
                assert not f.C[padding].any(), f"{path}: padding of C is not zero"
            assert padded > 0, "the case holds no padding and tests nothing"

    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    @pytest.mark.parametrize("unit", ["subspaces", "parameters"])
    @every(25, scores=st.lists(st.integers(0, 6), min_size=1, max_size=24), share=st.floats(0, 1.2))
    def test_law_07_allocation(
        self, driver: Driver, dtype: str, unit: str, scores: list[int], share: float
    ) -> None:
        """An allocation keeps the best subspaces, ties by position; the budget is met exactly, or as a limit.

        A budget in subspaces is met exactly. A budget in parameters is never exceeded.
        """
        with case(driver, dtype):
            values = np.asarray(scores, dtype=np.float64)
            costs = 1 + np.arange(len(scores)) * 7 % 5 if unit == "parameters" else None
            budget = int(share * (len(scores) if costs is None else costs.sum()))
            prices = None if costs is None else driver.array(costs)
            mask = driver.numpy(driver.allocate(driver.array(values, dtype), budget, prices))
            kept = int(mask.sum()) if costs is None else int(costs[mask].sum())
            assert kept <= budget, f"kept {kept} of a budget of {budget}"
            if costs is None:
                assert kept == min(budget, len(scores)), (
                    f"kept {kept}, the budget is {budget} of {len(scores)}"
                )
            assert_same(mask, cases.reference_mask(values, budget, costs), "decision")

    def test_law_07_allocation_reaches_the_model(self, driver: Driver) -> None:
        """The chosen mask becomes the mask of the model, and its summary counts it."""
        with case(driver, "float32", "models"):
            model, masks = partly_frozen(driver, adamss.attach(driver.model(LAYERS, "float32"), config()))
            assert_same({path: f.active for path, f in factors_of(driver, model).items()}, masks, "mask")
            assert adamss.summary(model).total.active == sum(int(mask.sum()) for mask in masks.values())

    @each_schedule
    def test_law_07_allocation_in_training(self, driver: Driver, schedule: str) -> None:
        """The controller keeps exactly the budget at every allocation, and at every step from ``end_step`` on."""
        with case(driver, "float32", "models", "budget"):
            assert_budget_kept(driver, schedule, EAGER)

    @each_schedule
    def test_law_07_allocation_in_training_is_the_references(self, driver: Driver, schedule: str) -> None:
        """The same training in NumPy gives the same masks after every step, in float64."""
        with case(driver, "float64", "models", "budget", "sgd"):
            (reference,) = find_drivers("numpy")
            factors = factors_of(driver, attached_with(driver, schedule, "float64"))
            trainings = []
            for each in (driver, reference):
                with using(each.backend):
                    model = _with_factors(each, factors, schedule, "float64")
                    trainings.append(start_training(each, model, schedule, EAGER, "sgd"))
            for step in range(1, SCHEDULES[schedule].end_step + 2):
                masks = []
                for each, training in zip((driver, reference), trainings, strict=True):
                    with using(each.backend):
                        training.step()
                        masks.append({p: f.active for p, f in factors_of(each, training.model).items()})
                assert_same(masks[0], masks[1], f"masks after step {step}")

    @pytest.mark.parametrize(("optimiser", "mode", "schedule"), TRAININGS)
    def test_law_08_frozen_in_training(
        self, driver: Driver, optimiser: str, mode: str, schedule: str
    ) -> None:
        """An element keeps its value from the step at which a controller freezes it until it is revived."""
        with case(driver, "float32", "models", "budget", optimiser):
            training = start_training(driver, attached_with(driver, schedule), schedule, mode, optimiser)
            after = factors_of(driver, training.model)
            for step in range(1, SCHEDULES[schedule].end_step + 3):
                before = after
                training.step()
                after = factors_of(driver, training.model)
                for path, f in before.items():
                    frozen = {
                        name: ~elements[0]
                        for name, elements in zip("BC", core.trained_elements(f), strict=True)
                    }
                    kept, was = (
                        {n: getattr(g, n)[:, where] for n, where in frozen.items()} for g in (after[path], f)
                    )
                    assert_same(kept, was, f"frozen elements of {path}, step {step}")

    @each_optimiser
    @each_mode
    def test_law_08_frozen(self, driver: Driver, optimiser: str, mode: str) -> None:
        """No optimiser moves a frozen element, even with weight decay and momentum; other elements are trained."""
        with case(driver, "float32", "models", optimiser, *(("compiles",) if mode == COMPILED else ())):
            model, masks = partly_frozen(driver, trained_model(driver, "float32", {}))
            before = factors_of(driver, model)
            how: Any = {"steps": 3, "optimiser": optimiser, "rate": 0.05}
            after = factors_of(driver, driver.train(model, INPUTS, compiled=mode == COMPILED, **how))
            for path, mask in masks.items():
                f, g = before[path], after[path]
                groups = np.repeat(np.arange(len(mask)), f.ranks)
                for name, frozen in (("B", ~mask[groups]), ("C", ~mask[f.labels])):
                    old, new = getattr(f, name), getattr(g, name)
                    assert_same(new[:, frozen], old[:, frozen], f"frozen elements of {name} of {path}")
                    assert not np.array_equal(new[:, ~frozen], old[:, ~frozen]), (
                        f"{name} of {path} is not trained"
                    )

    @each_mode
    @every(8, problem=problems(empty=False))
    def test_law_08_frozen_have_no_gradient(self, driver: Driver, mode: str, problem: Problem) -> None:
        """The gradient of a frozen element is zero, so that it does not contribute to a norm that is clipped."""
        with case(driver, "float32", "arrays", "gradients"):
            f = problem.factors
            # At least one subspace is frozen in every example, or the law would hold by chance.
            f = f._replace(active=f.active & (np.arange(len(f.active)) > 0))
            arrays = arrays_of(driver, problem._replace(factors=f), "float32")
            gradients = driver.gradients(linear_of(driver, mode), *arrays)
            groups = np.repeat(np.arange(len(f.ranks)), f.ranks)
            assert not driver.numpy(gradients.B)[:, ~f.active[groups]].any(), "gradient of frozen B"
            assert not driver.numpy(gradients.C)[:, ~f.active[f.labels]].any(), "gradient of frozen C"


def _with_factors(driver: Driver, factors: dict[str, Factors], schedule: str, dtype: str) -> Any:
    """Return the small model with the given factors, so that two frameworks start from the same numbers."""

    def made(f: Factors) -> Factors:
        arrays = f._asdict().items()
        return Factors(**{name: driver.array(a, dtype if name in FLOATS else None) for name, a in arrays})

    layers = {path: made(f) for path, f in factors.items()}
    settings = config(budget=SCHEDULES[schedule])
    shapes = {path: (f.A.shape[1], f.labels.shape[0]) for path, f in factors.items()}
    base = driver.model(LAYERS, dtype)
    return put(driver.backend, base, layers, shapes, config=settings, saved={"head": None})
