"""Helpers of the laws: trained models, their weights and outputs, and bitwise comparisons."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import adamss
from adamss import core
from adamss.backend.ledger import base_weight, put
from adamss.core import Factors
from adamss_conformance import cases
from adamss_conformance.capabilities import DTYPES, OPTIMISERS
from adamss_conformance.cases import INPUTS, LAYERS, SCHEDULES, TARGETS, VARIANTS, Problem, config
from adamss_conformance.driver import FROM_TABLE, Driver, Training, require
from adamss_conformance.tolerances import assert_agrees

EAGER, COMPILED = "eager", "compiled"
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_mode = pytest.mark.parametrize("mode", [EAGER, COMPILED])
each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
each_optimiser = pytest.mark.parametrize("optimiser", OPTIMISERS)

FLOATS = ("A", "B", "C")


def start_training(
    driver: Driver, model: Any, schedule: str, mode: str, optimiser: str | None = None
) -> Training:
    """Return a training of a model under one of `SCHEDULES`."""
    if mode == COMPILED:
        require(driver, "compiles")
    return driver.training(
        model,
        INPUTS,
        optimiser=optimiser or an_optimiser(driver),
        rate=0.05,
        budget=SCHEDULES[schedule],
        compiled=mode == COMPILED,
    )


def attached_with(driver: Driver, schedule: str, dtype: str = "float32") -> Any:
    """Return the small model with an adapter that has a budget."""
    return adamss.attach(driver.model(LAYERS, dtype), config(budget=SCHEDULES[schedule]))


def assert_budget_kept(driver: Driver, schedule: str, mode: str) -> Training:
    """Train under a budget, check it after every allocation, and return the training."""
    training = start_training(driver, attached_with(driver, schedule), schedule, mode)
    budget = SCHEDULES[schedule]
    plan = core.plan_budget(factors_of(driver, training.model), budget)
    for step in range(1, budget.end_step + 3):
        training.step()
        if not plan.allocates_at(step) and step < budget.end_step:
            continue
        layers = factors_of(driver, training.model).values()
        kept = sum(int(f.active.sum()) for f in layers)
        parameters = sum(core.count_factors(f, active_only=True) for f in layers)
        if step == 1:
            # C starts at zero, so every importance is zero at the first step, and its allocation must wait.
            assert kept == len(plan.costs), f"reduced to {kept} without information"
        elif budget.unit == "subspaces":
            assert kept == plan.budget_at(step), f"step {step}: {kept} of a budget of {plan.budget_at(step)}"
        else:
            assert parameters <= plan.budget_at(step), f"step {step}: {parameters} parameters"
        assert adamss.summary(training.model).total.active == kept
    return training


def single_steps(driver: Driver, model: Any, count: int) -> Any:
    """Train with a new optimiser for each step, so that the model holds the whole state of the training."""
    for _ in range(count):
        model = driver.train(model, INPUTS, steps=1, optimiser="sgd", rate=0.05)
    return model


@contextmanager
def case(driver: Driver, dtype: str, *capabilities: str) -> Iterator[None]:
    """Enter the settings of a case, or skip it if the driver lacks a capability; the case itself must not skip."""
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


def an_optimiser(driver: Driver) -> str:
    """Return the first of `OPTIMISERS` that the driver has."""
    for optimiser in OPTIMISERS:
        if optimiser in driver.capabilities.optimisers:
            return optimiser
    require(driver, OPTIMISERS[0])
    raise AssertionError("the table gives a reason for every optimiser that is lacking")


def assert_same(actual: Any, expected: Any, what: str) -> None:
    """Assert that arrays or factors, or dictionaries or lists of them, are equal bit for bit."""
    if isinstance(expected, list):
        actual, expected = dict(enumerate(actual)), dict(enumerate(expected))
    if isinstance(expected, Factors):
        actual, expected = actual._asdict(), expected._asdict()
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), f"{what}: {list(actual)}, expected {list(expected)}"
        for name, array in expected.items():
            assert_same(actual[name], array, f"{what}: {name}")
        return
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    assert np.array_equal(actual, expected), f"{what}: not equal to the bit"


def assert_outputs_agree(actual: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """Assert that outputs of float32 layers, given by path, agree up to rounding."""
    scale = max(float(np.abs(output).max()) for output in expected.values())
    for path, output in expected.items():
        assert_agrees(actual[path], output, dtype="float32", what=f"{path}, {what}", scale=scale)


def outputs_of(
    driver: Driver, model: Any, dtype: str = "float32", mode: str = EAGER
) -> dict[str, np.ndarray]:
    """Return the output of each layer for its inputs, by path."""
    inputs = {path: driver.array(x, dtype) for path, x in INPUTS.items()}
    return {path: driver.numpy(y) for path, y in layers_run(driver, model, inputs, mode).items()}


def weights_of(driver: Driver, model: Any) -> dict[str, dict[str, np.ndarray]]:
    """Return W and b of the target layers, without the update."""
    modules = driver.backend.modules(model)
    weights = {}
    for path in TARGETS:
        site = driver.backend.site(modules[path], path)
        W, b = base_weight(driver.backend, site, driver.backend.bank(model))
        arrays = {"W": driver.numpy(W)} if b is None else {"W": driver.numpy(W), "b": driver.numpy(b)}
        # Copy, because a model that is changed in place would change the arrays that it is compared with later.
        weights[path] = {name: array.copy() for name, array in arrays.items()}
    return weights


def everything_of(driver: Driver, model: Any) -> dict[str, dict[str, np.ndarray]]:
    """Return all arrays of the layers of a model that has no adapters."""
    head = driver.backend.arrays(driver.backend.modules(model)["head"])
    return weights_of(driver, model) | {"head": {name: driver.numpy(a).copy() for name, a in head.items()}}


def on_host(driver: Driver, factors: Factors) -> Factors:
    """Return factors as NumPy arrays: floating-point numbers in float64, others in their own dtype."""
    arrays = {name: driver.numpy(getattr(factors, name)).copy() for name in Factors._fields}
    return Factors(
        **{name: array.astype(np.float64) if name in FLOATS else array for name, array in arrays.items()}
    )


def factors_of(driver: Driver, model: Any) -> dict[str, Factors]:
    """Return the factors of each adapted layer as NumPy arrays."""
    return {path: on_host(driver, factors) for path, factors in own_factors(driver, model).items()}


def own_factors(driver: Driver, model: Any) -> Mapping[str, Factors]:
    """Return the factors of each adapted layer as the framework's arrays."""
    return driver.backend.bank(model).only().layers


def with_random_C(
    driver: Driver,
    model: Any,
    settings: adamss.AdamssConfig,
    layers: Any,
    dtype: str,
    *,
    relative: float | None = None,
) -> Any:
    """Return an adapted model with a random C, as after training, but without depending on an optimiser.

    If `relative` is given, the norm of each update is this share of the norm of its weight.
    """
    attached = driver.backend.bank(adamss.attach(model, settings)).only()
    new = {}
    for number, (path, factors) in enumerate(attached.layers.items()):
        f = on_host(driver, factors)
        C = cases.random_C(f, np.random.default_rng(number)) * 0.3
        if relative is not None:
            size = np.linalg.norm(core.delta(f._replace(C=C)))
            C *= relative * np.linalg.norm(layers[path][0]) / size
        new[path] = factors._replace(C=driver.array(C, driver.backend.dtype_name(factors.C)))
    base = driver.model(layers, dtype)
    return put(
        driver.backend, base, new, attached.shapes, config=settings, saved=dict.fromkeys(attached.saved)
    )


def trained_model(driver: Driver, dtype: str, changes: Any, layers: Any = LAYERS) -> Any:
    """Return an adapted model with a random C, and with changes to the settings."""
    return with_random_C(driver, driver.model(layers, dtype), config(**changes), layers, dtype)


def partly_frozen(driver: Driver, model: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """Freeze every second subspace, and return the model and its masks."""
    masks = {
        path: np.arange(len(f.ranks)) % 2 == number % 2
        for number, (path, f) in enumerate(factors_of(driver, model).items())
    }
    arrays = {path: driver.array(mask) for path, mask in masks.items()}
    return driver.backend.set_active(model, arrays), masks


def layers_run(driver: Driver, model: Any, inputs: Mapping[str, Any], mode: str = EAGER) -> dict[str, Any]:
    """Run the layers at these paths on arrays of the framework, either eagerly or compiled as one function."""

    def run(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {path: driver.call(model, path, x) for path, x in inputs.items()}

    if mode == COMPILED:
        require(driver, "compiles")
        run = driver.compile(run)
    return run(model, inputs)


def linear_of(driver: Driver, mode: str) -> Callable[..., Any]:
    """Return `Backend.linear`, eager or compiled."""
    linear: Callable[..., Any] = driver.backend.linear
    if mode == COMPILED:
        require(driver, "compiles")
        return driver.compile(linear)
    return linear


def arrays_of(driver: Driver, problem: Problem, dtype: str) -> tuple[Any, ...]:
    """Return x, W, b, factors and dy of a problem as arrays of the framework; the factors are at least float32."""
    x, W, b, f, dy = problem
    working = "float64" if dtype == "float64" else "float32"
    wide = {name: driver.array(getattr(f, name), working) for name in FLOATS}
    rest = {name: driver.array(getattr(f, name)) for name in ("labels", "ranks", "active")}
    low = [None if array is None else driver.array(array, dtype) for array in (x, W, b, dy)]
    return low[0], low[1], low[2], Factors(**wide, **rest), low[3]


def exactly(driver: Driver, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the results of `arrays_of` in float64, so that rounding the inputs does not count as an error."""
    x, W, b, f, dy = arrays
    low = [None if array is None else driver.numpy(array).astype(np.float64) for array in (x, W, b, dy)]
    return low[0], low[1], low[2], on_host(driver, f), low[3]
