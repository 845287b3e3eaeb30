"""`BackendSuite`: the thirteen laws of the design, for any backend."""

from __future__ import annotations

import inspect
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

import adamss
from adamss import core
from adamss.backend.ledger import base_weight, put
from adamss.backend.registry import using
from adamss.backend.tensors import StoredTensor
from adamss.core import Factors
from adamss.core.fingerprint import fingerprint
from adamss.errors import StateError
from adamss.io import checkpoint as files
from adamss_conformance import cases
from adamss_conformance.capabilities import DTYPES, OPTIMISERS
from adamss_conformance.cases import (
    INPUTS,
    LAYERS,
    SCHEDULES,
    TARGETS,
    VARIANTS,
    Problem,
    config,
    every,
    problems,
)
from adamss_conformance.driver import FROM_TABLE, Driver, Training, find_drivers, require
from adamss_conformance.tolerances import RELATIVE_TOLERANCE, assert_agrees

__all__ = ["BackendSuite"]

EAGER, COMPILED = "eager", "compiled"
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_mode = pytest.mark.parametrize("mode", [EAGER, COMPILED])
each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
each_optimiser = pytest.mark.parametrize("optimiser", OPTIMISERS)

FLOATS = ("A", "B", "C")


class BackendSuite:
    """The laws, each test named after its law's number.

    Run it from the command line with the plugin::

        pytest -p adamss_conformance.plugin --pyargs adamss_conformance --adamss-backend NAME_or_module:Class

    or subclass it, and override the fixture ``driver``::

        class TestMine(BackendSuite):
            @pytest.fixture
            def driver(self):
                return MyDriver()
    """

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run on every driver that ``--adamss-backend`` asks for, unless the fixture is overridden."""
        overridden = inspect.getattr_static(type(self), "driver") is not BackendSuite.__dict__["driver"]
        if not overridden and "driver" in metafunc.fixturenames:
            from adamss_conformance.plugin import requested_drivers

            drivers = requested_drivers(metafunc.config)
            metafunc.parametrize("driver", drivers, indirect=True, ids=str)

    @pytest.fixture
    def driver(self, request: pytest.FixtureRequest) -> Driver:
        """Return the driver under test; override it in a subclass."""
        found: Driver = request.param
        return found

    @pytest.fixture(autouse=True)
    def _registered(self, driver: Driver) -> Iterator[None]:
        # The verbs must find the very backend under test, not one of the same name.
        with using(driver.backend):
            yield

    # ---- 1 start ----------------------------------------------------------------------------------------

    @each_dtype
    @each_mode
    @pytest.mark.parametrize("leading", [(7,), (), (2, 3), (0,)], ids=str)
    def test_law_01_start(self, driver: Driver, dtype: str, mode: str, leading: tuple[int, ...]) -> None:
        """Right after `attach`, outputs ``==`` the base model's."""
        with _case(driver, dtype, "models"):
            x = driver.array(np.random.default_rng(1).standard_normal((*leading, 16)), dtype)
            _assert_starts_equal(driver, dtype, mode, x)

    @each_variant
    @each_mode
    def test_law_01_start_of_every_variant(self, driver: Driver, variant: str, mode: str) -> None:
        """Whatever the segmentation, the basis and the initial B."""
        with _case(driver, "float32", "models"):
            x = driver.array(INPUTS["head"], "float32")
            _assert_starts_equal(driver, "float32", mode, x, VARIANTS[variant])

    @each_dtype
    @each_mode
    @pytest.mark.parametrize("scale", [1e-30, 1e15, "largest"])
    def test_law_01_start_for_extreme_inputs(
        self, driver: Driver, dtype: str, mode: str, scale: float | str
    ) -> None:
        """No finite input makes ``x M`` times C = 0 anything but zero."""
        with _case(driver, dtype, "models"):
            largest = {"float16": 6.5e4, "bfloat16": 3.3e38, "float32": 3.4e38, "float64": 1.7e308}[dtype]
            size = largest if scale == "largest" else float(scale)
            x = driver.array(np.full((2, 16), min(size, largest)), dtype)
            small = {path: (W * 1e-3, b) for path, (W, b) in LAYERS.items()}
            _assert_starts_equal(driver, dtype, mode, x, layers=small)

    # ---- 2 base untouched -------------------------------------------------------------------------------

    @each_variant
    def test_law_02_base_untouched_by_attach(self, driver: Driver, variant: str) -> None:
        """`attach` does not change W0, and `detach` takes off whatever the factors have become."""
        with _case(driver, "float32", "models"):
            before = _everything(driver, driver.model(LAYERS, "float32"))
            outputs = _outputs(driver, driver.model(LAYERS, "float32"))
            model = _trained(driver, "float32", VARIANTS[variant])
            for path, weight in _weights(driver, model).items():
                _assert_same(weight, before[path], f"base of {path}")
            model = adamss.detach(model)
            assert driver.backend.adaptation(model) is None
            for path, arrays in _everything(driver, model).items():
                _assert_same(arrays, before[path], f"{path} after detach")
            for path, output in _outputs(driver, model).items():
                _assert_same(output, outputs[path], f"output of {path} after detach")

    def test_law_02_base_untouched_by_compiled_training(self, driver: Driver) -> None:
        """Nor does training whose step is compiled."""
        with _case(driver, "float32", "models", "compiles"):
            _assert_training_leaves_the_base(driver, {}, compiled=True)

    @each_variant
    def test_law_02_base_untouched_by_training(self, driver: Driver, variant: str) -> None:
        """Training does not change W0, and `detach` gives the very same model back, its head included."""
        with _case(driver, "float32", "models"):
            _assert_training_leaves_the_base(driver, VARIANTS[variant], compiled=False)

    # ---- 3 update ---------------------------------------------------------------------------------------

    @each_dtype
    @every(16, problem=problems())
    def test_law_03_update(self, driver: Driver, dtype: str, problem: Problem) -> None:
        """``linear(x, W, b, f)`` is ``x @ (W + delta) + b``, in the dtype and on the device of its input."""
        with _case(driver, dtype, "arrays"):
            _assert_update(driver, driver.backend.linear, problem, dtype)

    @each_dtype
    @every(4, problem=problems())
    def test_law_03_update_compiled(self, driver: Driver, dtype: str, problem: Problem) -> None:
        """The same compiled."""
        with _case(driver, dtype, "arrays", "compiles"):
            _assert_update(driver, driver.compile(driver.backend.linear), problem, dtype)

    @each_variant
    @each_mode
    def test_law_03_update_of_a_model(self, driver: Driver, variant: str, mode: str) -> None:
        """Each adapted layer of a model computes with ``W + delta`` of its own factors."""
        with _case(driver, "float32", "models"):
            model = _trained(driver, "float32", VARIANTS[variant])
            adaptation = driver.backend.adaptation(model)
            assert adaptation is not None
            for path, factors in adaptation.layers.items():
                W, b = LAYERS[path]
                f = _host(driver, factors)
                x = INPUTS[path]
                expected = core.linear(x, W, b, f)
                y = _runner(driver, mode, path)(model, driver.array(x, "float32"))
                assert driver.backend.dtype_name(y) == "float32", f"{path}: {driver.backend.dtype_name(y)}"
                scale = core.linear(np.abs(x), np.abs(W), None, cases.magnitudes(f)).max()
                assert_agrees(driver.numpy(y), expected, dtype="float32", what=path, scale=float(scale))

    # ---- 4 gradients ------------------------------------------------------------------------------------

    @each_dtype
    @every(12, problem=problems())
    def test_law_04_gradients(self, driver: Driver, dtype: str, problem: Problem) -> None:
        """Of x, B and C: the closed form; those of frozen subspaces are zero."""
        with _case(driver, dtype, "arrays", "gradients"):
            _assert_gradients(driver, driver.backend.linear, problem, dtype)

    @each_dtype
    @every(4, problem=problems())
    def test_law_04_gradients_compiled(self, driver: Driver, dtype: str, problem: Problem) -> None:
        """The same compiled."""
        with _case(driver, dtype, "arrays", "gradients", "compiles"):
            _assert_gradients(driver, driver.compile(driver.backend.linear), problem, dtype)

    @every(8, problem=problems(empty=False))
    def test_law_04_gradients_by_finite_differences(self, driver: Driver, problem: Problem) -> None:
        """The update is linear in each of x, B and C alone, so that a difference has no error but rounding."""
        with _case(driver, "float64", "arrays", "gradients"):
            _assert_finite_differences(driver, problem)

    # ---- 5 merge ----------------------------------------------------------------------------------------

    @each_dtype
    @each_mode
    def test_law_05_merge(self, driver: Driver, dtype: str, mode: str) -> None:
        """``merge`` is the rounded sum; ``unmerge`` and ``detach`` are exact; twice is an error."""
        with _case(driver, dtype, "models"), _unheard():
            layers = cases.layers_without_bias()
            model = _trained(driver, dtype, {}, layers=layers)
            adaptation = driver.backend.adaptation(model)
            assert adaptation is not None
            deltas = {path: core.delta(_host(driver, f)) for path, f in adaptation.layers.items()}
            before, base = _outputs(driver, model, dtype, mode), _weights(driver, model)
            merged = adamss.merge(model)
            for path, delta in deltas.items():
                W0 = base[path]["W"].astype(np.float64)
                seen = _runner(driver, mode, path)(merged, driver.array(np.eye(16), dtype))
                assert driver.backend.dtype_name(seen) == dtype
                error = np.abs(driver.numpy(seen).astype(np.float64) - (W0 + delta))
                slack = RELATIVE_TOLERANCE["float64" if dtype == "float64" else "float32"]
                allowed = EPSILON_HALF[dtype] * np.abs(W0 + delta) + slack * np.abs(delta).max()
                assert np.all(error <= 1.01 * allowed), (
                    f"{path}: {(error - allowed).max():.3g} over half a unit"
                )
                _assert_same(_weights(driver, merged)[path], base[path], f"base of {path} while merged")
            with pytest.raises(StateError, match="merged already"):
                adamss.merge(merged)
            model = adamss.unmerge(merged)
            for path, output in _outputs(driver, model, dtype, mode).items():
                _assert_same(output, before[path], f"{path} after unmerge")
            with pytest.raises(StateError, match="not merged"):
                adamss.unmerge(model)
            model = adamss.detach(adamss.merge(model))
            for path, weight in _weights(driver, model).items():
                _assert_same(weight, base[path], f"{path} after detach of the merged model")

    def test_law_05_merge_without_base(self, driver: Driver) -> None:
        """Without W0 there is no way back, and every verb that needs one says so."""
        with _case(driver, "float32", "models"):
            model = _trained(driver, "float32", {})
            before = _outputs(driver, model)
            model = adamss.merge(model, keep_base=False)
            for path, output in _outputs(driver, model).items():
                assert_agrees(output, before[path], dtype="float32", what=path)
            for verb in (adamss.unmerge, adamss.detach, lambda m: adamss.disabled(m).__enter__()):
                with pytest.raises(StateError, match="keep_base=False"):
                    verb(model)

    @each_dtype
    def test_law_05_merge_and_unload(self, driver: Driver, dtype: str) -> None:
        """What is left has the weights of ``merge``, to the bit, and no adapter; it can be adapted anew."""
        with _case(driver, dtype, "models"), _unheard():
            merged = adamss.merge(_trained(driver, dtype, {}))
            outputs = _outputs(driver, merged, dtype)
            for model in (merged, _trained(driver, dtype, {})):
                plain = adamss.merge_and_unload(model)
                assert driver.backend.adaptation(plain) is None
                for path, output in _outputs(driver, plain, dtype).items():
                    _assert_same(output, outputs[path], f"{path} without adapters")
                with pytest.raises(StateError, match="no adapters"):
                    adamss.merge_and_unload(plain)
            again = adamss.attach(plain, config())
            for path, output in _outputs(driver, again, dtype).items():
                _assert_same(output, outputs[path], f"{path} adapted anew")

    @pytest.mark.parametrize(("relative", "lost"), [(1e-2, 0.17), (1e-3, 0.79)])
    def test_law_05_merge_says_what_rounding_lost(self, driver: Driver, relative: float, lost: float) -> None:
        """A bfloat16 weight loses 17 % of an update of relative size 1e-2, and 79 % at 1e-3: with a warning."""
        with _case(driver, "bfloat16", "models"):
            rng = np.random.default_rng(0)
            W = rng.standard_normal((128, 128))
            model = driver.model({"query": (W, None)}, "bfloat16")
            settings = adamss.AdamssConfig(targets=["query"], rank=128, subspace_rank=12)
            model = _with_random_C(
                driver, model, settings, {"query": (W, None)}, "bfloat16", relative=relative
            )
            with pytest.warns(adamss.AdamssWarning, match=r"lost \d+% of the update of query") as caught:
                adamss.merge(model)
            share = int(str(caught[0].message).split("lost ")[1].split("%")[0]) / 100
            assert abs(share - lost) <= 0.03, f"lost {share}, expected {lost}"

    @each_mode
    @pytest.mark.parametrize("variant", ["default", "bias per subspace"])
    @pytest.mark.parametrize("keep_base", [True, False])
    def test_law_05_merge_of_the_frozen_alone(
        self, driver: Driver, mode: str, variant: str, keep_base: bool, tmp_path: Path
    ) -> None:
        """``consolidate`` folds the frozen subspaces: the same model, the same file, and the base to be had again."""
        with _case(driver, "float32", "models", "consolidates"):
            model, _ = _partly_frozen(driver, _trained(driver, "float32", VARIANTS[variant]))
            base, before, factors = (
                _weights(driver, model),
                _outputs(driver, model, mode=mode),
                _factors(driver, model),
            )
            model = adamss.consolidate(model, keep_base=keep_base)
            for path, output in _outputs(driver, model, mode=mode).items():
                assert_agrees(
                    output, before[path], dtype="float32", what=f"{path}, consolidated", scale=_scale(before)
                )
            for path, f in _factors(driver, model).items():
                for name in Factors._fields:
                    _assert_same(
                        getattr(f, name), getattr(factors[path], name), f"{name} of {path}, consolidated"
                    )
            adamss.save(model, tmp_path / "adapter.safetensors")
            loaded = adamss.load(driver.model(LAYERS, "float32"), tmp_path / "adapter.safetensors")
            for path, output in _outputs(driver, loaded).items():
                assert_agrees(
                    output, before[path], dtype="float32", what=f"{path}, loaded", scale=_scale(before)
                )
            with pytest.raises(StateError, match="no frozen subspace"):
                adamss.consolidate(_trained(driver, "float32", VARIANTS[variant]))
            outputs = _outputs(driver, model, mode=mode)
            model = adamss.consolidate(model)
            for path, output in _outputs(driver, model, mode=mode).items():
                _assert_same(output, outputs[path], f"{path}, consolidated twice")
            if not keep_base:
                with pytest.raises(StateError, match="keep_base=False"):
                    adamss.detach(model)
                return
            model = adamss.unmerge(adamss.merge(model))
            for path, output in _outputs(driver, model).items():
                assert_agrees(
                    output, before[path], dtype="float32", what=f"{path}, unmerged", scale=_scale(before)
                )
            model = adamss.detach(adamss.consolidate(model))
            for path, weight in _weights(driver, model).items():
                _assert_same(weight, base[path], f"{path} after detach of the consolidated model")

    # ---- 6 count ----------------------------------------------------------------------------------------

    @every(
        15,
        sizes=st.tuples(*[st.integers(1, 12)] * 2),
        settings=st.tuples(st.integers(1, 15), st.integers(1, 15), st.integers(1, 4)),
        shared=st.booleans(),
    )
    def test_law_06_count(
        self, driver: Driver, sizes: tuple[int, int], settings: tuple[int, int, int], shared: bool
    ) -> None:
        """``sum_k r_k (n_k + R_k)``, and what the optimiser sees beyond it is padding."""
        with _case(driver, "float32", "models"):
            (d, n), (R, K, r) = sizes, settings
            W = np.random.default_rng(d * n).standard_normal((d, n))
            model = driver.model({"query": (W, None)}, "float32")
            model = adamss.attach(
                model,
                adamss.AdamssConfig(
                    targets=["query"],
                    rank=R,
                    subspaces=K,
                    subspace_rank=r,
                    basis="shared" if shared else "per_subspace",
                ),
            )
            adaptation = driver.backend.adaptation(model)
            assert adaptation is not None
            f = _host(driver, adaptation.layers["query"])
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
        """The sum over the layers, and the whole of ``modules_to_save``; padding stays zero in training."""
        with _case(driver, "float32", "models"):
            optimiser = _an_optimiser(driver)
            model = adamss.attach(driver.model(LAYERS, "float32"), config(subspaces=12, subspace_rank=3))
            summary = adamss.summary(model)
            assert summary.saved == 16 * 5 + 5
            assert summary.total.trained == sum(row.trained for row in summary.rows)
            model = driver.train(model, INPUTS, steps=3, optimiser=optimiser, rate=0.05)
            adaptation = driver.backend.adaptation(model)
            assert adaptation is not None
            padded = 0
            for path, factors in adaptation.layers.items():
                f = _host(driver, factors)
                padding = np.arange(f.C.shape[0])[:, None] >= f.ranks[f.labels]
                padded += int(padding.sum())
                assert not f.C[padding].any(), f"{path}: padding of C is not zero"
            assert padded > 0, "the case holds no padding and tests nothing"

    # ---- 7 allocation -----------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    @pytest.mark.parametrize("unit", ["subspaces", "parameters"])
    @every(25, scores=st.lists(st.integers(0, 6), min_size=1, max_size=24), share=st.floats(0, 1.2))
    def test_law_07_allocation(
        self, driver: Driver, dtype: str, unit: str, scores: list[int], share: float
    ) -> None:
        """Exactly the budget, best first, ties by position; in parameters, never above it."""
        with _case(driver, dtype):
            values = np.asarray(scores, dtype=np.float64)
            costs = 1 + np.arange(len(scores)) * 7 % 5 if unit == "parameters" else None
            budget = int(share * (len(scores) if costs is None else costs.sum()))
            mask = driver.numpy(
                driver.allocate(
                    driver.array(values, dtype), budget, None if costs is None else driver.array(costs)
                )
            )
            kept = int(mask.sum()) if costs is None else int(costs[mask].sum())
            assert kept <= budget, f"kept {kept} of a budget of {budget}"
            if costs is None:
                assert kept == min(budget, len(scores)), (
                    f"kept {kept}, the budget is {budget} of {len(scores)}"
                )
            _assert_same(mask, cases.reference_mask(values, budget, costs), "decision")

    def test_law_07_allocation_reaches_the_model(self, driver: Driver) -> None:
        """The mask that was decided on is the mask of the model, and of its summary."""
        with _case(driver, "float32", "models"):
            model, masks = _partly_frozen(driver, adamss.attach(driver.model(LAYERS, "float32"), config()))
            adaptation = driver.backend.adaptation(model)
            assert adaptation is not None
            for path, factors in adaptation.layers.items():
                _assert_same(driver.numpy(factors.active), masks[path], f"mask of {path}")
            assert adamss.summary(model).total.active == sum(int(mask.sum()) for mask in masks.values())

    @each_schedule
    @each_mode
    def test_law_07_allocation_in_training(self, driver: Driver, schedule: str, mode: str) -> None:
        """The controller keeps exactly the budget, from ``end_step`` on and at every allocation before."""
        with _case(driver, "float32", "models", "budget"):
            training = _training(driver, _attached(driver, schedule), schedule, mode)
            budget = SCHEDULES[schedule]
            plan = core.plan_budget(_factors(driver, training.model), budget)
            for step in range(1, budget.end_step + 3):
                training.step()
                if not plan.allocates_at(step) and step < budget.end_step:
                    continue
                kept, parameters = _active(driver, training.model)
                if step == 1:
                    # C starts at zero: the first step says nothing, and its allocation waits for the second.
                    assert kept == len(plan.costs), f"reduced to {kept} without information"
                elif budget.unit == "subspaces":
                    assert kept == plan.budget_at(step), (
                        f"step {step}: {kept} of a budget of {plan.budget_at(step)}"
                    )
                else:
                    assert parameters <= plan.budget_at(step), f"step {step}: {parameters} parameters"
                assert adamss.summary(training.model).total.active == kept

    @each_schedule
    def test_law_07_allocation_in_training_is_the_references(self, driver: Driver, schedule: str) -> None:
        """The same training in NumPy decides alike: the same masks after every step, in float64."""
        with _case(driver, "float64", "models", "budget", "sgd"):
            (reference,) = find_drivers("numpy")
            factors = _factors(driver, _attached(driver, schedule, "float64"))
            trainings = []
            for each in (driver, reference):
                with using(each.backend):
                    model = _with_factors(each, factors, schedule, "float64")
                    trainings.append(_training(each, model, schedule, EAGER, "sgd"))
            for step in range(1, SCHEDULES[schedule].end_step + 2):
                masks = []
                for each, training in zip((driver, reference), trainings, strict=True):
                    with using(each.backend):
                        training.step()
                        masks.append({p: f.active for p, f in _factors(each, training.model).items()})
                _assert_same(masks[0], masks[1], f"masks after step {step}")

    # ---- 8 frozen ---------------------------------------------------------------------------------------

    @each_optimiser
    @each_mode
    def test_law_08_frozen_in_training(self, driver: Driver, optimiser: str, mode: str) -> None:
        """From the step on at which a controller freezes an element it keeps its value."""
        with _case(driver, "float32", "models", "budget", optimiser):
            _assert_frozen_in_training(driver, "one way", mode, optimiser)

    @each_schedule
    def test_law_08_frozen_under_every_schedule(self, driver: Driver, schedule: str) -> None:
        """Also where a frozen element may return."""
        with _case(driver, "float32", "models", "budget", "adamw"):
            _assert_frozen_in_training(driver, schedule, EAGER, "adamw")

    @each_optimiser
    @each_mode
    def test_law_08_frozen(self, driver: Driver, optimiser: str, mode: str) -> None:
        """No optimiser moves a frozen element, with weight decay and momentum; the others are trained."""
        with _case(driver, "float32", "models", optimiser):
            model, masks = _partly_frozen(driver, _trained(driver, "float32", {}))
            before = _factors(driver, model)
            if mode == COMPILED:
                require(driver, "compiles")
            how: dict[str, Any] = {"steps": 3, "optimiser": optimiser, "rate": 0.05}
            after = _factors(driver, driver.train(model, INPUTS, compiled=mode == COMPILED, **how))
            for path, mask in masks.items():
                f, g = before[path], after[path]
                groups = np.repeat(np.arange(len(mask)), f.ranks)
                for name, frozen in (("B", ~mask[groups]), ("C", ~mask[f.labels])):
                    old, new = getattr(f, name), getattr(g, name)
                    _assert_same(new[:, frozen], old[:, frozen], f"frozen elements of {name} of {path}")
                    assert not np.array_equal(new[:, ~frozen], old[:, ~frozen]), (
                        f"{name} of {path} is not trained"
                    )

    @every(8, problem=problems(empty=False))
    def test_law_08_frozen_have_no_gradient(self, driver: Driver, problem: Problem) -> None:
        """The gradient of a frozen element is zero, so that it does not count in a clipped norm."""
        with _case(driver, "float32", "arrays", "gradients"):
            _assert_no_gradient_of_frozen(driver, driver.backend.linear, problem)

    @every(4, problem=problems(empty=False))
    def test_law_08_frozen_have_no_gradient_compiled(self, driver: Driver, problem: Problem) -> None:
        """The same compiled."""
        with _case(driver, "float32", "arrays", "gradients", "compiles"):
            _assert_no_gradient_of_frozen(driver, driver.compile(driver.backend.linear), problem)

    # ---- 9 travel ---------------------------------------------------------------------------------------

    @each_dtype
    @pytest.mark.parametrize("training", [False, True], ids=["portable", "training"])
    @pytest.mark.parametrize("variant", ["default", "bias per subspace"])
    def test_law_09_travel(
        self, driver: Driver, dtype: str, training: bool, variant: str, tmp_path: Path
    ) -> None:
        """A file holds the update; loaded into any dtype, the same update, segmentation and mask."""
        with _case(driver, dtype, "models"):
            path = tmp_path / "adapter.safetensors"
            model, masks = _partly_frozen(driver, _trained(driver, dtype, VARIANTS[variant]))
            adamss.save(model, path, training=training)
            mine, stored = _factors(driver, model), files.read(path)
            working = "float64" if dtype == "float64" else "float32"
            assert list(stored.layers) == list(mine)
            for layer, f in mine.items():
                there = stored.layers[layer].factors()
                _assert_same(there.labels, f.labels.astype(np.int64), f"labels of {layer} in the file")
                _assert_same(there.active, masks[layer], f"mask of {layer} in the file")
                assert_agrees(core.delta(there), core.delta(f), dtype=working, what=f"{layer} in the file")
            for target in driver.capabilities.dtypes:
                with driver.settings(target):
                    loaded = adamss.load(driver.model(LAYERS, target), path)
                    _assert_travelled(driver, loaded, mine, masks, working)

    def test_law_09_travel_from_the_reference(self, driver: Driver, tmp_path: Path) -> None:
        """A file written from NumPy arrays alone, with the head in PyTorch's orientation."""
        with _case(driver, "float32", "models"):
            mine = _reference_factors()
            path = tmp_path / "adapter.safetensors"
            head = np.random.default_rng(5).standard_normal((5, 16)).astype(np.float32)
            _write(path, mine, head)
            masks = {layer: f.active for layer, f in mine.items()}
            model = adamss.load(driver.model(LAYERS, "float32"), path)
            _assert_travelled(driver, model, mine, masks, "float32")
            y = driver.call(model, "head", driver.array(INPUTS["head"], "float32"))
            expected = INPUTS["head"] @ head.T + 1.0
            assert_agrees(driver.numpy(y), expected, dtype="float32", what="head")
            again = tmp_path / "again.safetensors"
            adamss.save(model, again)
            _assert_same(files.read(again).saved["head"]["weight"].numpy(), head, "head written again")

    def test_law_09_travel_to_a_model_in_another_order(self, driver: Driver, tmp_path: Path) -> None:
        """Layers are found by their paths, whatever the order in which a model has them."""
        with _case(driver, "float32", "models"):
            model = _trained(driver, "float32", {})
            adamss.save(model, tmp_path / "adapter.safetensors")
            turned = dict(reversed(LAYERS.items()))
            loaded = adamss.load(driver.model(turned, "float32"), tmp_path / "adapter.safetensors")
            assert {row.path for row in adamss.summary(loaded).rows} == set(TARGETS)
            expected = _outputs(driver, model)
            for path, output in _outputs(driver, loaded).items():
                assert_agrees(output, expected[path], dtype="float32", what=path)
            loaded = adamss.detach(loaded)
            assert driver.backend.adaptation(loaded) is None

    def test_law_09_travel_refuses_another_base(self, driver: Driver, tmp_path: Path) -> None:
        """The wrong model is an error that names the layer, and is left as it was."""
        with _case(driver, "float32", "models"):
            path = tmp_path / "adapter.safetensors"
            _write(path, _reference_factors(), np.zeros((5, 16), np.float32))
            other = driver.model({name: (W[::-1].copy(), b) for name, (W, b) in LAYERS.items()}, "float32")
            before = _everything(driver, other)
            with pytest.raises(adamss.errors.CheckpointError, match=r"encoder\.0\.value"):
                adamss.load(other, path)
            assert driver.backend.adaptation(other) is None
            for name, arrays in _everything(driver, other).items():
                _assert_same(arrays, before[name], f"{name} after a refused load")

    # ---- 10 resume --------------------------------------------------------------------------------------

    @pytest.mark.parametrize("variant", ["default", "bias per subspace"])
    def test_law_10_resume(self, driver: Driver, variant: str, tmp_path: Path) -> None:
        """On the CPU to the bit, with a part of the subspaces frozen, by steps of an optimiser without state."""
        with _case(driver, "float32", "models", "sgd"):
            half, whole, resumed = (tmp_path / f"{name}.safetensors" for name in ("half", "whole", "resumed"))
            model = adamss.attach(driver.model(LAYERS, "float32"), config(**VARIANTS[variant]))
            model, _ = _partly_frozen(driver, model)
            model = single_steps(driver, model, 3)
            adamss.save(model, half, training=True)
            adamss.save(single_steps(driver, model, 3), whole, training=True)
            kind = type(driver)
            source = sys.modules[kind.__module__].__file__
            backend = type(driver.backend)
            command = [
                *(sys.executable, "-m", "adamss_conformance.resume"),
                *(kind.__module__, str(source), kind.__qualname__, driver.device),
                *(backend.__module__, str(sys.modules[backend.__module__].__file__), backend.__qualname__),
                *(str(half), "3", str(resumed)),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            one, other = files.read(whole), files.read(resumed)
            for path, layer in one.layers.items():
                for name, tensor in layer.tensors().items():
                    actual = other.layers[path].tensors()[name].numpy()
                    if driver.device == "cpu" or name not in FLOATS:
                        _assert_same(actual, tensor.numpy(), f"{name} of {path} after resuming")
                    else:
                        assert_agrees(actual, tensor.numpy(), dtype="float32", what=f"{name} of {path}")

    @pytest.mark.parametrize("variant", ["default", "bias per subspace"])
    def test_law_10_resume_from_the_very_factors(self, driver: Driver, variant: str, tmp_path: Path) -> None:
        """A training file gives A, B, C, segmentation and mask back to the bit."""
        with _case(driver, "float32", "models"):
            path = tmp_path / "adapter.safetensors"
            model, _ = _partly_frozen(driver, _trained(driver, "float32", VARIANTS[variant]))
            adamss.save(model, path, training=True)
            loaded = _factors(driver, adamss.load(driver.model(LAYERS, "float32"), path))
            for layer, factors in _factors(driver, model).items():
                for name in Factors._fields:
                    _assert_same(getattr(loaded[layer], name), getattr(factors, name), f"{name} of {layer}")

    @pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
    @each_schedule
    def test_law_10_resume_of_a_budget(
        self, driver: Driver, optimiser: str, schedule: str, tmp_path: Path
    ) -> None:
        """From every step on, mid-window too: model, optimiser, averages, masks and step, with fresh objects."""
        with _case(driver, "float32", "models", "budget", optimiser):
            training = _training(driver, _attached(driver, schedule), schedule, EAGER, optimiser)
            steps = SCHEDULES[schedule].end_step + 1
            for step in range(steps):
                folder = tmp_path / str(step)
                folder.mkdir()
                adamss.save(training.model, folder / "model", training=True)
                training.save(folder)
                training.step()
            expected, memory = _factors(driver, training.model), training.memory()
            for step in range(steps):
                folder = tmp_path / str(step)
                model = adamss.load(driver.model(LAYERS, "float32"), folder / "model")
                training = _training(driver, model, schedule, EAGER, optimiser)
                training.load(folder)
                for _ in range(step, steps):
                    training.step()
                for path, f in _factors(driver, training.model).items():
                    for name in Factors._fields:
                        actual, wanted = getattr(f, name), getattr(expected[path], name)
                        if driver.device == "cpu" or name not in FLOATS:
                            _assert_same(actual, wanted, f"{name} of {path}, resumed at step {step}")
                        else:
                            assert_agrees(actual, wanted, dtype="float32", what=f"{name} of {path}")
                for actual, wanted in zip(training.memory(), memory, strict=True):
                    if driver.device == "cpu":
                        _assert_same(actual, wanted, f"optimiser or controller, resumed at step {step}")

    # ---- 11 compilation ---------------------------------------------------------------------------------

    @each_schedule
    def test_law_11_compilation_of_a_training_under_a_budget(self, driver: Driver, schedule: str) -> None:
        """One compilation for the whole schedule."""
        with _case(driver, "float32", "models", "budget", "compiles"):
            training = _training(driver, _attached(driver, schedule), schedule, COMPILED)
            training.step()
            before = training.compilations()
            assert before == 1, f"compiled {before} times for one step"
            for _ in range(SCHEDULES[schedule].end_step + 1):
                training.step()
            assert training.compilations() == before, "the schedule made it compile again"

    @each_dtype
    @pytest.mark.parametrize("variant", ["default", "bias per subspace"])
    def test_law_11_compilation(self, driver: Driver, dtype: str, variant: str) -> None:
        """Compiled, a model gives the eager results; an allocation compiles nothing anew."""
        with _case(driver, dtype, "models", "compiles"):
            model = _trained(driver, dtype, VARIANTS[variant])
            path = TARGETS[0]
            x = driver.array(INPUTS[path], dtype)
            compiled = driver.compile(lambda model, x: driver.call(model, path, x))
            eager = driver.numpy(driver.call(model, path, x))
            assert_agrees(driver.numpy(compiled(model, x)), eager, dtype=dtype, what="compiled")
            before = driver.compilations(compiled)
            assert before == 1, f"compiled {before} times for one call"
            model, _ = _partly_frozen(driver, model)
            assert_agrees(driver.numpy(compiled(model, x)), eager, dtype=dtype, what="after an allocation")
            assert driver.compilations(compiled) == before, "an allocation made it compile again"

    def test_law_11_compilation_leaves_a_model_that_the_verbs_know(
        self, driver: Driver, tmp_path: Path
    ) -> None:
        """A model that has been through a compiled function is still adapted: it can be saved, merged, detached."""
        with _case(driver, "float32", "models", "compiles"):
            outputs = _outputs(driver, driver.model(LAYERS, "float32"))
            model = _trained(driver, "float32", {})
            adapted = _outputs(driver, model, mode=COMPILED)
            summary = adamss.summary(model)
            assert {row.path for row in summary.rows} == set(TARGETS)
            adamss.save(model, tmp_path / "adapter.safetensors")
            loaded = adamss.load(driver.model(LAYERS, "float32"), tmp_path / "adapter.safetensors")
            for path, output in _outputs(driver, loaded).items():
                assert_agrees(output, adapted[path], dtype="float32", what=f"{path}, saved after compilation")
            model = adamss.detach(adamss.merge(model))
            for path, output in _outputs(driver, model, mode=COMPILED).items():
                assert_agrees(output, outputs[path], dtype="float32", what=f"{path} after detach")

    # ---- 12 determinism ---------------------------------------------------------------------------------

    @each_variant
    def test_law_12_determinism(self, driver: Driver, variant: str) -> None:
        """One seed, one result; the global random state of NumPy and the framework is left alone."""
        with _case(driver, "float32", "models"):
            first_model, second_model = (driver.model(LAYERS, "float32") for _ in range(2))
            numpy_state = _numpy_random_state()
            state = driver.random_state()
            first = _factors(driver, adamss.attach(first_model, config(**VARIANTS[variant])))
            assert _numpy_random_state() == numpy_state, "NumPy's global random state"
            assert driver.random_state() == state, "the framework's global random state"
            second = _factors(driver, adamss.attach(second_model, config(**VARIANTS[variant])))
            for path, f in first.items():
                for name in Factors._fields:
                    _assert_same(getattr(second[path], name), getattr(f, name), f"{name} of {path}")

    def test_law_12_determinism_follows_the_seed(self, driver: Driver) -> None:
        """Another seed, another random segmentation."""
        with _case(driver, "float32", "models"):
            labels = [
                _factors(
                    driver,
                    adamss.attach(driver.model(LAYERS, "float32"), config(segmentation="random", seed=seed)),
                )[TARGETS[0]].labels
                for seed in (0, 1)
            ]
            assert not np.array_equal(*labels), "the seed has no effect"

    # ---- 13 agreement -----------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    @pytest.mark.parametrize("shape", [(48, 64), (64, 48), (560, 600)], ids=str)
    def test_law_13_agreement(self, driver: Driver, dtype: str, shape: tuple[int, int]) -> None:
        """Attached to the same weight: the labels and the captured energy of the float64 reference."""
        with _case(driver, dtype, "models"):
            W = cases.planted(*shape, groups=6)
            reference = core.decompose(W, 6)
            model = driver.model({"query": (W, None)}, dtype)
            model = adamss.attach(model, adamss.AdamssConfig(targets=["query"], rank=6, subspaces=6))
            f = _factors(driver, model)["query"]
            _assert_agreement(W, f.A[0], f.labels, reference, core.segment(reference, 6))

    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    def test_law_13_agreement_of_core_on_arrays(self, driver: Driver, dtype: str) -> None:
        """The core's functions on the framework's own arrays."""
        with _case(driver, dtype, "arrays"):
            W = cases.planted(48, 64, groups=6)
            reference = core.decompose(W, 6)
            decomposition = core.decompose(driver.array(W, dtype), 6)
            assert driver.backend.dtype_name(decomposition.U) == dtype
            assert driver.device_of(decomposition.U) == driver.device
            labels = driver.numpy(core.segment(decomposition, 6))
            _assert_agreement(W, driver.numpy(decomposition.U), labels, reference, core.segment(reference, 6))


EPSILON_HALF = {dtype: epsilon / 2 for dtype, epsilon in cases.EPSILON.items()}


def _training(driver: Driver, model: Any, schedule: str, mode: str, optimiser: str | None = None) -> Training:
    if mode == COMPILED:
        require(driver, "compiles")
    return driver.training(
        model,
        INPUTS,
        optimiser=optimiser or _an_optimiser(driver),
        rate=0.05,
        budget=SCHEDULES[schedule],
        compiled=mode == COMPILED,
    )


def _active(driver: Driver, model: Any) -> tuple[int, int]:
    """Return how many subspaces are trained, and how many parameters."""
    layers = _factors(driver, model).values()
    kept = sum(int(f.active.sum()) for f in layers)
    return kept, sum(core.count_factors(f, active_only=True) for f in layers)


def _assert_frozen_in_training(driver: Driver, schedule: str, mode: str, optimiser: str) -> None:
    training = _training(driver, _attached(driver, schedule), schedule, mode, optimiser)
    for step in range(1, SCHEDULES[schedule].end_step + 3):
        before = _factors(driver, training.model)
        training.step()
        after = _factors(driver, training.model)
        for path, f in before.items():
            _assert_frozen_kept(f, after[path], f"{path}, step {step}")


def _assert_frozen_kept(before: Factors, after: Factors, what: str) -> None:
    for name, trained in zip("BC", core.trained_elements(before), strict=True):
        frozen = ~trained[0]
        _assert_same(
            getattr(after, name)[:, frozen], getattr(before, name)[:, frozen], f"frozen {name} of {what}"
        )


def _attached(driver: Driver, schedule: str, dtype: str = "float32") -> Any:
    return adamss.attach(driver.model(LAYERS, dtype), config(budget=SCHEDULES[schedule]))


def _with_factors(driver: Driver, factors: dict[str, Factors], schedule: str, dtype: str) -> Any:
    """Return a model with these very factors."""
    layers = {
        path: Factors(
            **{
                name: driver.array(getattr(f, name), dtype if name in FLOATS else None)
                for name in Factors._fields
            }
        )
        for path, f in factors.items()
    }
    settings = config(budget=SCHEDULES[schedule])
    return put(driver.backend, driver.model(LAYERS, dtype), layers, config=settings, saved={"head": None})


def single_steps(driver: Driver, model: Any, count: int) -> Any:
    """Train by steps of an optimiser that is made anew for each: all the state there is lies in the model."""
    for _ in range(count):
        model = driver.train(model, INPUTS, steps=1, optimiser="sgd", rate=0.05)
    return model


@contextmanager
def _case(driver: Driver, dtype: str, *capabilities: str) -> Iterator[None]:
    """Enter the settings of a case that the table admits; within it, nothing may be left out."""
    for capability in (dtype, *capabilities):
        require(driver, capability)
    try:
        with driver.settings(dtype):
            yield
    except (pytest.skip.Exception, pytest.xfail.Exception) as outcome:
        if not hasattr(outcome, FROM_TABLE):
            raise AssertionError(
                f"left out for a reason that the capability table does not give: {outcome}"
            ) from None
        raise


def _scale(outputs: dict[str, np.ndarray]) -> float:
    return max(float(np.abs(output).max()) for output in outputs.values())


@contextmanager
def _unheard() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", adamss.AdamssWarning)
        yield


def _numpy_random_state() -> list[int]:
    state = np.random.get_state(legacy=False)  # noqa: NPY002 (the legacy generator is what is watched)
    assert isinstance(state, dict)
    return [int(state["state"]["pos"]), *state["state"]["key"].tolist()]


def _an_optimiser(driver: Driver) -> str:
    for optimiser in OPTIMISERS:
        if optimiser in driver.capabilities.optimisers:
            return optimiser
    require(driver, OPTIMISERS[0])
    raise AssertionError("the table gives a reason for every optimiser that is lacking")


def _assert_same(actual: Any, expected: Any, what: str) -> None:
    """Assert equality to the bit, of arrays or dictionaries of arrays."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), f"{what}: {list(actual)}, expected {list(expected)}"
        for name, array in expected.items():
            _assert_same(actual[name], array, f"{what}: {name}")
        return
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    assert np.array_equal(actual, expected), f"{what}: not equal to the bit"


# ---- models ----------------------------------------------------------------------------------------


def _outputs(driver: Driver, model: Any, dtype: str = "float32", mode: str = EAGER) -> dict[str, np.ndarray]:
    return {
        path: driver.numpy(_runner(driver, mode, path)(model, driver.array(x, dtype)))
        for path, x in INPUTS.items()
    }


def _weights(driver: Driver, model: Any) -> dict[str, dict[str, np.ndarray]]:
    """Return W and b of the target layers, without the update."""
    modules = driver.backend.modules(model)
    weights = {}
    for path in TARGETS:
        site = driver.backend.site(modules[path], path)
        W, b = base_weight(driver.backend, site, driver.backend.adaptation(model))
        arrays = {"W": driver.numpy(W)} if b is None else {"W": driver.numpy(W), "b": driver.numpy(b)}
        # A copy: a model that is changed in place must not change what it is compared with.
        weights[path] = {name: array.copy() for name, array in arrays.items()}
    return weights


def _everything(driver: Driver, model: Any) -> dict[str, dict[str, np.ndarray]]:
    """Return all that the layers of a model without adapters hold."""
    head = driver.backend.arrays(driver.backend.modules(model)["head"])
    return _weights(driver, model) | {"head": {name: driver.numpy(a).copy() for name, a in head.items()}}


def _host(driver: Driver, factors: Factors) -> Factors:
    """Return factors as NumPy arrays: floating point in float64, the rest as it is."""
    arrays = {name: driver.numpy(getattr(factors, name)).copy() for name in Factors._fields}
    return Factors(
        **{name: array.astype(np.float64) if name in FLOATS else array for name, array in arrays.items()}
    )


def _factors(driver: Driver, model: Any) -> dict[str, Factors]:
    adaptation = driver.backend.adaptation(model)
    assert adaptation is not None
    return {path: _host(driver, factors) for path, factors in adaptation.layers.items()}


def _assert_training_leaves_the_base(driver: Driver, changes: Any, *, compiled: bool) -> None:
    optimiser = _an_optimiser(driver)
    model = driver.model(LAYERS, "float32")
    before = _everything(driver, model)
    outputs = _outputs(driver, model)
    model = adamss.attach(model, config(**changes))
    model = driver.train(model, INPUTS, steps=3, optimiser=optimiser, rate=0.05, compiled=compiled)
    for path, weight in _weights(driver, model).items():
        _assert_same(weight, before[path], f"base of {path} after training")
    assert not np.array_equal(_outputs(driver, model)["head"], outputs["head"]), "the head was not trained"
    for path in TARGETS:
        assert not np.array_equal(_outputs(driver, model)[path], outputs[path]), f"{path} was not trained"
    with adamss.disabled(model) as base:
        for path, output in _outputs(driver, base).items():
            _assert_same(output, outputs[path], f"{path}, disabled")
    model = adamss.detach(model)
    assert driver.backend.adaptation(model) is None
    for path, arrays in _everything(driver, model).items():
        _assert_same(arrays, before[path], f"{path} after detach")
    for path, output in _outputs(driver, model).items():
        _assert_same(output, outputs[path], f"output of {path} after detach")


def _with_random_C(
    driver: Driver,
    model: Any,
    settings: adamss.AdamssConfig,
    layers: Any,
    dtype: str,
    *,
    relative: float | None = None,
) -> Any:
    """Return a model whose C is as after training: through `Backend.insert`, by no optimiser's luck."""
    attached = driver.backend.adaptation(adamss.attach(model, settings))
    assert attached is not None
    new = {}
    for number, (path, factors) in enumerate(attached.layers.items()):
        f = _host(driver, factors)
        C = cases.random_C(f, np.random.default_rng(number)) * 0.3
        if relative is not None:
            size = np.linalg.norm(core.delta(f._replace(C=C)))
            C *= relative * np.linalg.norm(layers[path][0]) / size
        new[path] = factors._replace(C=driver.array(C, driver.backend.dtype_name(factors.C)))
    base = driver.model(layers, dtype)
    return put(driver.backend, base, new, config=settings, saved=dict.fromkeys(attached.saved))


def _trained(driver: Driver, dtype: str, changes: Any, layers: Any = LAYERS) -> Any:
    return _with_random_C(driver, driver.model(layers, dtype), config(**changes), layers, dtype)


def _partly_frozen(driver: Driver, model: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """Freeze every second subspace, and return the masks."""
    masks = {
        path: np.arange(len(f.ranks)) % 2 == number % 2
        for number, (path, f) in enumerate(_factors(driver, model).items())
    }
    arrays = {path: driver.array(mask) for path, mask in masks.items()}
    return driver.backend.set_active(model, arrays), masks


def _runner(driver: Driver, mode: str, path: str) -> Callable[[Any, Any], Any]:
    def run(model: Any, x: Any) -> Any:
        return driver.call(model, path, x)

    if mode == COMPILED:
        require(driver, "compiles")
        return driver.compile(run)
    return run


def _assert_starts_equal(
    driver: Driver, dtype: str, mode: str, x: Any, changes: Any = None, layers: Any = LAYERS
) -> None:
    model = driver.model(layers, dtype)
    runners = {path: _runner(driver, mode, path) for path in LAYERS}
    expected = {path: driver.numpy(run(model, x)).copy() for path, run in runners.items()}
    model = adamss.attach(model, config(**(changes or {})))
    for path in LAYERS:
        y = _runner(driver, mode, path)(model, x)
        assert driver.backend.dtype_name(y) == dtype, (
            f"{path}: {driver.backend.dtype_name(y)}, expected {dtype}"
        )
        assert np.isfinite(expected[path]).all(), f"{path}: the base overflows, and the case tests nothing"
        _assert_same(driver.numpy(y), expected[path], f"{path}, {mode}")


# ---- arrays ----------------------------------------------------------------------------------------


def _arrays(driver: Driver, problem: Problem, dtype: str) -> tuple[Any, ...]:
    """Return x, W, b, factors and dy of a problem as arrays of the framework; factors are float32 or wider."""
    x, W, b, f, dy = problem
    working = "float64" if dtype == "float64" else "float32"
    wide = {name: driver.array(getattr(f, name), working) for name in FLOATS}
    rest = {name: driver.array(getattr(f, name)) for name in ("labels", "ranks", "active")}
    low = [None if array is None else driver.array(array, dtype) for array in (x, W, b, dy)]
    return low[0], low[1], low[2], Factors(**wide, **rest), low[3]


def _exactly(driver: Driver, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what the framework was given, in float64: its own rounding of the inputs is not its error."""
    x, W, b, f, dy = arrays
    low = [None if array is None else driver.numpy(array).astype(np.float64) for array in (x, W, b, dy)]
    return low[0], low[1], low[2], _host(driver, f), low[3]


def _assert_update(driver: Driver, linear: Callable[..., Any], problem: Problem, dtype: str) -> None:
    arrays = _arrays(driver, problem, dtype)
    y = linear(*arrays[:4])
    x, W, b, f, _ = _exactly(driver, arrays)
    assert driver.backend.dtype_name(y) == dtype, f"dtype {driver.backend.dtype_name(y)}, expected {dtype}"
    assert driver.device_of(y) == driver.device, f"on {driver.device_of(y)}, expected {driver.device}"
    merged = W + core.delta(f)[: W.shape[0]]
    bias_update = core.delta(f)[W.shape[0]] if f.A.shape[1] > W.shape[0] else 0.0
    expected = x @ merged + bias_update + (0.0 if b is None else b)
    absolute = None if b is None else np.abs(b)
    terms = core.linear(np.abs(x), np.abs(W), absolute, cases.magnitudes(f))
    scale = float(terms.max(initial=0.0)) + 1e-6
    assert_agrees(driver.numpy(y), expected, dtype=dtype, what="y against x @ (W + delta) + b", scale=scale)
    base = driver.numpy(driver.base_linear(*arrays[:3]))
    zero = arrays[3]._replace(C=driver.array(np.zeros(f.C.shape), driver.backend.dtype_name(arrays[3].C)))
    start = driver.numpy(linear(*arrays[:3], zero))
    assert_agrees(start, base, dtype=dtype, what="y with C = 0 against the base", scale=scale)


def _assert_gradients(driver: Driver, linear: Callable[..., Any], problem: Problem, dtype: str) -> None:
    arrays = _arrays(driver, problem, dtype)
    gradients = driver.gradients(linear, *arrays)
    x, W, _, f, dy = _exactly(driver, arrays)
    expected = core.linear_vjp(dy, x, W, f)
    terms = core.linear_vjp(np.abs(dy), np.abs(x), np.abs(W), cases.magnitudes(f))
    given = {"x": arrays[0], "B": arrays[3].B, "C": arrays[3].C}
    for name, array in given.items():
        actual = getattr(gradients, name)
        wanted = driver.backend.dtype_name(array)
        assert driver.backend.dtype_name(actual) == wanted, (
            f"gradient of {name} is {driver.backend.dtype_name(actual)}"
        )
        scale = float(getattr(terms, name).max(initial=0.0)) + 1e-6
        assert_agrees(
            driver.numpy(actual),
            getattr(expected, name),
            dtype=dtype,
            what=f"gradient of {name}",
            scale=scale,
        )


def _assert_no_gradient_of_frozen(driver: Driver, linear: Callable[..., Any], problem: Problem) -> None:
    f = problem.factors
    gradients = driver.gradients(linear, *_arrays(driver, problem, "float32"))
    groups = np.repeat(np.arange(len(f.ranks)), f.ranks)
    assert not driver.numpy(gradients.B)[:, ~f.active[groups]].any(), "gradient of frozen B"
    assert not driver.numpy(gradients.C)[:, ~f.active[f.labels]].any(), "gradient of frozen C"


def _assert_finite_differences(driver: Driver, problem: Problem) -> None:
    x, W, b, factors, dy = _arrays(driver, problem, "float64")
    gradients = driver.gradients(driver.backend.linear, x, W, b, factors, dy)
    f, rng = problem.factors, np.random.default_rng(0)
    groups = np.repeat(np.arange(len(f.ranks)), f.ranks)
    moves = {
        "x": rng.standard_normal(problem.x.shape),
        "B": rng.standard_normal(f.B.shape) * f.active[groups],
        # Padding is no parameter: C may move where the subspace has the rank, and is trained.
        "C": cases.random_C(f, rng) * f.active[f.labels],
    }

    def value(move: dict[str, np.ndarray]) -> float:
        moved = factors._replace(
            **{name: driver.array(getattr(f, name) + move[name]) for name in ("B", "C") if name in move}
        )
        y = driver.backend.linear(driver.array(problem.x + move.get("x", 0.0)), W, b, moved)
        return float(np.sum(driver.numpy(y) * problem.dy))

    for name, move in moves.items():
        difference = (value({name: move}) - value({name: -move})) / 2
        slope = float(np.sum(driver.numpy(getattr(gradients, name)) * move))
        terms = core.linear(np.abs(problem.x) + 3, np.abs(problem.W), None, cases.magnitudes(f))
        scale = 10 * float(np.sum(np.abs(problem.dy) * terms)) + 1e-6
        assert_agrees(slope, difference, dtype="float64", what=f"slope along {name}", scale=scale)


# ---- files -----------------------------------------------------------------------------------------


def _reference_factors() -> dict[str, Factors]:
    rng = np.random.default_rng(3)
    made = {}
    for path in TARGETS:
        decomposition = core.decompose(LAYERS[path][0].astype(np.float32), 6)
        f = core.initial_factors(decomposition, core.segment(decomposition, 3), 2)
        C = cases.random_C(f, rng).astype(np.float32)
        made[path] = f._replace(C=C, active=np.asarray([True, False, True]))
    return made


def _write(path: Path, layers: dict[str, Factors], head: np.ndarray) -> None:
    stored = {}
    for name, f in layers.items():
        small = {key: StoredTensor.of(getattr(f, key).astype(np.uint8)) for key in ("labels", "ranks")}
        stored[name] = files.StoredLayer(
            C=StoredTensor.of(f.C),
            active=StoredTensor.of(f.active),
            M=StoredTensor.of(core.contract(f)),
            base=fingerprint(LAYERS[name][0]),
            **small,
        )
    saved = {
        "head": {
            "weight": StoredTensor.of(head),
            "bias": StoredTensor.of(np.ones(5, np.float32)),
        }
    }
    files.write(path, files.Checkpoint(config(), stored, saved, {"adamss": adamss.__version__}))


def _assert_travelled(
    driver: Driver, model: Any, sent: dict[str, Factors], masks: dict[str, np.ndarray], dtype: str
) -> None:
    arrived = _factors(driver, model)
    assert list(arrived) == list(sent)
    for layer, f in arrived.items():
        _assert_same(f.labels.astype(np.int64), sent[layer].labels.astype(np.int64), f"labels of {layer}")
        _assert_same(f.active, masks[layer], f"mask of {layer}")
        assert_agrees(
            core.delta(f),
            core.delta(sent[layer]),
            dtype="float32" if dtype == "float64" else dtype,
            what=f"update of {layer}, loaded",
        )


# ---- agreement -------------------------------------------------------------------------------------


def _assert_agreement(
    W: np.ndarray, U: np.ndarray, labels: np.ndarray, reference: core.Decomposition, expected: np.ndarray
) -> None:
    agreement = cases.adjusted_rand_index(labels, expected)
    assert agreement >= 0.99, f"adjusted Rand index {agreement:.4f} with the reference's labels"
    captured, best = (float(np.sum((basis.T @ W) ** 2)) for basis in (U.astype(np.float64), reference.U))
    assert abs(captured / best - 1) <= 1e-5, f"captured energy {captured / best:.7f} of the reference's"
