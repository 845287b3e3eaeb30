"""Laws 3 and 4: the update and its gradients equal the reference's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from adamss import core
from adamss_conformance import cases
from adamss_conformance.cases import INPUTS, LAYERS, VARIANTS, Problem, every, problems
from adamss_conformance.driver import Driver
from adamss_conformance.laws.helpers import (
    arrays_of,
    case,
    each_dtype,
    each_mode,
    each_variant,
    exactly,
    factors_of,
    layers_run,
    linear_of,
    trained_model,
)
from adamss_conformance.tolerances import assert_agrees

__all__ = ["LinearLaws"]


class LinearLaws:
    """Tests of the update on arrays, of its gradients, and of the layers of a model."""

    @each_dtype
    @each_mode
    @every(12, problem=problems())
    def test_law_03_update(self, driver: Driver, dtype: str, mode: str, problem: Problem) -> None:
        """``linear(x, W, b, f)`` equals ``x @ (W + delta) + b``, in the dtype and on the device of its input."""
        with case(driver, dtype, "arrays"):
            assert_update(driver, linear_of(driver, mode), problem, dtype)

    @each_variant
    @each_mode
    def test_law_03_update_of_a_model(self, driver: Driver, variant: str, mode: str) -> None:
        """Each adapted layer of a model computes with ``W + delta`` of its own factors."""
        with case(driver, "float32", "models"):
            model = trained_model(driver, "float32", VARIANTS[variant])
            layers = factors_of(driver, model)
            inputs = {path: driver.array(INPUTS[path], "float32") for path in layers}
            outputs = layers_run(driver, model, inputs, mode)
            for path, f in layers.items():
                (W, b), x, y = LAYERS[path], INPUTS[path], outputs[path]
                expected = core.linear(x, W, b, f)
                assert driver.backend.dtype_name(y) == "float32", f"{path}: {driver.backend.dtype_name(y)}"
                scale = core.linear(np.abs(x), np.abs(W), None, cases.magnitudes(f)).max()
                assert_agrees(driver.numpy(y), expected, dtype="float32", what=path, scale=float(scale))

    @each_dtype
    @each_mode
    @every(12, problem=problems())
    def test_law_04_gradients(self, driver: Driver, dtype: str, mode: str, problem: Problem) -> None:
        """The gradients of x, B and C equal the closed form, and those of frozen subspaces are zero."""
        with case(driver, dtype, "arrays", "gradients"):
            assert_gradients(driver, linear_of(driver, mode), problem, dtype)

    @every(8, problem=problems(empty=False))
    def test_law_04_gradients_by_finite_differences(self, driver: Driver, problem: Problem) -> None:
        """The gradients equal central differences.

        These are exact up to rounding, since the output is affine in each of x, B and C while the others are fixed.
        """
        with case(driver, "float64", "arrays", "gradients"):
            assert_finite_differences(driver, problem)


def assert_update(driver: Driver, linear: Callable[..., Any], problem: Problem, dtype: str) -> None:
    """Assert law 3 for a function that is called like `Backend.linear`."""
    arrays = arrays_of(driver, problem, dtype)
    y = linear(*arrays[:4])
    x, W, b, f, _ = exactly(driver, arrays)
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


def assert_gradients(driver: Driver, linear: Callable[..., Any], problem: Problem, dtype: str) -> None:
    """Assert law 4 for a function that is called like `Backend.linear`."""
    arrays = arrays_of(driver, problem, dtype)
    gradients = driver.gradients(linear, *arrays)
    x, W, _, f, dy = exactly(driver, arrays)
    expected = core.linear_vjp(dy, x, W, f)
    terms = core.linear_vjp(np.abs(dy), np.abs(x), np.abs(W), cases.magnitudes(f))
    given = {"x": arrays[0], "B": arrays[3].B, "C": arrays[3].C}
    for name, array in given.items():
        actual, what = getattr(gradients, name), f"gradient of {name}"
        found = driver.backend.dtype_name(actual)
        assert found == driver.backend.dtype_name(array), f"{what} is {found}"
        scale = float(getattr(terms, name).max(initial=0.0)) + 1e-6
        assert_agrees(driver.numpy(actual), getattr(expected, name), dtype=dtype, what=what, scale=scale)


def assert_finite_differences(driver: Driver, problem: Problem) -> None:
    """Assert that the gradients of `Backend.linear` equal its slopes along random changes of x, B and C."""
    x, W, b, factors, dy = arrays_of(driver, problem, "float64")
    gradients = driver.gradients(driver.backend.linear, x, W, b, factors, dy)
    f, rng = problem.factors, np.random.default_rng(0)
    groups = np.repeat(np.arange(len(f.ranks)), f.ranks)
    moves = {
        "x": rng.standard_normal(problem.x.shape),
        "B": rng.standard_normal(f.B.shape) * f.active[groups],
        # C may change only within the rank of a trained subspace, since padding is not a parameter.
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
        # Estimate the magnitude of the terms in the sums, with a margin for the random moves.
        terms = core.linear(np.abs(problem.x) + 3, np.abs(problem.W), None, cases.magnitudes(f))
        scale = 10 * float(np.sum(np.abs(problem.dy) * terms)) + 1e-6
        assert_agrees(slope, difference, dtype="float64", what=f"slope along {name}", scale=scale)
