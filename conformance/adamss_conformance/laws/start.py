"""Laws 1 and 2: an adapted model starts as the base, and the base stays as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import adamss
from adamss_conformance.cases import INPUTS, LAYERS, TARGETS, VARIANTS, config
from adamss_conformance.driver import Driver
from adamss_conformance.laws.helpers import (
    COMPILED,
    EAGER,
    an_optimiser,
    assert_same,
    case,
    each_dtype,
    each_mode,
    each_variant,
    everything_of,
    layers_run,
    outputs_of,
    trained_model,
    weights_of,
)

__all__ = ["StartLaws"]


class StartLaws:
    """Tests that the adapted model starts with the base's outputs, and that the base stays untouched."""

    @each_dtype
    @each_mode
    @pytest.mark.parametrize("leading", [(7,), (), (2, 3), (0,)], ids=str)
    def test_law_01_start(self, driver: Driver, dtype: str, mode: str, leading: tuple[int, ...]) -> None:
        """Right after `attach`, outputs equal the base model's bit for bit."""
        with case(driver, dtype, "models"):
            x = driver.array(np.random.default_rng(1).standard_normal((*leading, 16)), dtype)
            _assert_starts_equal(driver, dtype, mode, x)

    @each_variant
    @each_mode
    def test_law_01_start_of_every_variant(self, driver: Driver, variant: str, mode: str) -> None:
        """The same holds for every segmentation, basis and initial B."""
        with case(driver, "float32", "models"):
            x = driver.array(INPUTS["head"], "float32")
            _assert_starts_equal(driver, "float32", mode, x, VARIANTS[variant])

    @each_dtype
    @each_mode
    @pytest.mark.parametrize("scale", [1e-30, 1e15, "largest"])
    def test_law_01_start_for_extreme_inputs(
        self, driver: Driver, dtype: str, mode: str, scale: float | str
    ) -> None:
        """The product of ``x M`` and C = 0 is zero for every finite input, even if ``x M`` overflows."""
        with case(driver, dtype, "models"):
            largest = {"float16": 6.5e4, "bfloat16": 3.3e38, "float32": 3.4e38, "float64": 1.7e308}[dtype]
            size = largest if scale == "largest" else float(scale)
            x = driver.array(np.full((2, 16), min(size, largest)), dtype)
            small = {path: (W * 1e-3, b) for path, (W, b) in LAYERS.items()}
            _assert_starts_equal(driver, dtype, mode, x, layers=small)

    @each_variant
    def test_law_02_base_untouched_by_attach(self, driver: Driver, variant: str) -> None:
        """`attach` does not change W0, and `detach` restores the base whatever values the factors have."""
        with case(driver, "float32", "models"):
            base = driver.model(LAYERS, "float32")
            weights, before = weights_of(driver, base), everything_of(driver, base)
            outputs = outputs_of(driver, base)
            model = trained_model(driver, "float32", VARIANTS[variant])
            assert_same(weights_of(driver, model), weights, "base, adapted")
            model = adamss.detach(model)
            assert not driver.backend.bank(model)
            assert_same(everything_of(driver, model), before, "after detach")
            assert_same(outputs_of(driver, model), outputs, "output after detach")

    @pytest.mark.parametrize(
        ("variant", "mode"), [*((variant, EAGER) for variant in VARIANTS), ("default", COMPILED)]
    )
    def test_law_02_base_untouched_by_training(self, driver: Driver, variant: str, mode: str) -> None:
        """Training does not change W0, and `detach` restores the whole base model, including its head."""
        needs = ("compiles",) if mode == COMPILED else ()
        with case(driver, "float32", "models", *needs):
            how: Any = {"steps": 3, "optimiser": an_optimiser(driver), "rate": 0.05}
            model = driver.model(LAYERS, "float32")
            weights, before = weights_of(driver, model), everything_of(driver, model)
            outputs = outputs_of(driver, model)
            model = adamss.attach(model, config(**VARIANTS[variant]))
            model = driver.train(model, INPUTS, compiled=mode == COMPILED, **how)
            assert_same(weights_of(driver, model), weights, "base after training")
            trained = outputs_of(driver, model)
            for path in ("head", *TARGETS):
                assert not np.array_equal(trained[path], outputs[path]), f"{path} was not trained"
            with adamss.disabled(model) as base:
                assert_same(outputs_of(driver, base), outputs, "disabled")
            model = adamss.detach(model)
            assert not driver.backend.bank(model)
            assert_same(everything_of(driver, model), before, "after detach")
            assert_same(outputs_of(driver, model), outputs, "output after detach")


def _assert_starts_equal(
    driver: Driver, dtype: str, mode: str, x: Any, changes: Any = None, layers: Any = LAYERS
) -> None:
    model, inputs = driver.model(layers, dtype), dict.fromkeys(LAYERS, x)
    expected = {path: driver.numpy(y).copy() for path, y in layers_run(driver, model, inputs, mode).items()}
    model = adamss.attach(model, config(**(changes or {})))
    for path, y in layers_run(driver, model, inputs, mode).items():
        found = driver.backend.dtype_name(y)
        assert found == dtype, f"{path}: {found}, expected {dtype}"
        assert np.isfinite(expected[path]).all(), f"{path}: the base overflows, and the case tests nothing"
        assert_same(driver.numpy(y), expected[path], f"{path}, {mode}")
