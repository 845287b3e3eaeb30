"""Law 14: several adapters on one model do not disturb each other."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adamss
from adamss import core
from adamss.errors import StateError
from adamss_conformance import cases
from adamss_conformance.cases import INPUTS, LAYERS, config
from adamss_conformance.driver import Driver
from adamss_conformance.laws.helpers import (
    an_optimiser,
    assert_outputs_agree,
    assert_same,
    case,
    each_dtype,
    each_mode,
    everything_of,
    on_host,
    outputs_of,
)

__all__ = ["NameLaws", "with_adapters"]

SETTINGS: dict[str, dict[str, Any]] = {
    "a": {},
    "b": {"targets": ["query"], "subspaces": 2, "seed": 5, "modules_to_save": []},
    "c": {"targets": ["value", "query"], "basis": "per_subspace", "include_bias": True},
}
"""Settings of three adapters, whose layers overlap; two of the adapters save the head."""

OTHERS: dict[str, dict[str, Any]] = SETTINGS | {
    "c": SETTINGS["c"] | {"modules_to_save": []},
    "d": {"targets": ["value"], "subspaces": 4, "modules_to_save": []},
}
"""Settings of four adapters, of which only the first saves a module."""

WEIGHTS: tuple[dict[str, float], ...] = ({"a": 0.7, "b": -0.3}, {"b": 2.0}, {"a": 1.0, "b": 1.0}, {})


class NameLaws:
    """Tests that the update of an adapter does not depend on the other adapters."""

    @each_dtype
    @each_mode
    def test_law_14_one_at_a_time(self, driver: Driver, dtype: str, mode: str) -> None:
        """With one active adapter, outputs equal those of a model that has only it; with none, those of the base.

        They are equal bit for bit.
        """
        with case(driver, dtype, "models"):
            alone = {
                name: outputs_of(driver, with_adapters(driver, dtype, name), dtype, mode) for name in SETTINGS
            }
            base = outputs_of(driver, driver.model(LAYERS, dtype), dtype, mode)
            model = with_adapters(driver, dtype, *SETTINGS)
            assert_same(outputs_of(driver, model, dtype, mode), alone["c"], "the last one is active")
            for name in ("a", "b", "c", "a"):
                model = adamss.activate(model, name)
                assert_same(outputs_of(driver, model, dtype, mode), alone[name], f"{name} is active")
                assert [one for one, each in adamss.adapters(model).items() if each.active] == [name]
            model = adamss.activate(model, [])
            assert_same(outputs_of(driver, model, dtype, mode), base, "none is active")

    @each_mode
    @pytest.mark.parametrize("weights", WEIGHTS, ids=str)
    def test_law_14_updates_add_up(self, driver: Driver, mode: str, weights: dict[str, float]) -> None:
        """Outputs agree with ``W0 + sum of weight * delta``, computed in float64, also after a merge."""
        with case(driver, "float32", "models"):
            model = adamss.activate(with_adapters(driver, "float32", "a", "b"), weights)
            expected = _expected(driver, model, weights)
            actual = {path: outputs_of(driver, model, mode=mode)[path] for path in expected}
            assert_outputs_agree(actual, expected, f"weights {weights}")
            if weights:
                merged = outputs_of(driver, adamss.merge(model), mode=mode)
                assert_outputs_agree({p: merged[p] for p in expected}, expected, f"merged with {weights}")

    def test_law_14_in_any_order(self, driver: Driver) -> None:
        """After adapters were added and removed in any order, the rest behave as if they had always been alone.

        They do so bit for bit.
        """
        with case(driver, "float32", "models"):
            base = everything_of(driver, driver.model(LAYERS, "float32"))
            for added, removed in zip(
                permutations(SETTINGS), reversed([*permutations(SETTINGS)]), strict=True
            ):
                model, left = with_adapters(driver, "float32", *added), set(added)
                for name in removed:
                    model = adamss.detach(model, name=name)
                    left.remove(name)
                    assert adamss.adapters(model).keys() == left
                    for one in left:
                        alone = outputs_of(driver, with_adapters(driver, "float32", one))
                        model = adamss.activate(model, one)
                        assert_same(outputs_of(driver, model), alone, f"{one} without {name}")
                assert_same(everything_of(driver, model), base, f"detached as {removed}")

    def test_law_14_training_one(self, driver: Driver) -> None:
        """While one adapter is trained, the other keeps its factors and its head bit for bit."""
        with case(driver, "float32", "models"):
            optimiser = an_optimiser(driver)
            model = with_adapters(driver, "float32", "a", "c")
            before = _numbers(driver, model)
            alone = with_adapters(driver, "float32", "c")
            model = driver.train(model, INPUTS, steps=3, optimiser=optimiser, rate=0.05)
            alone = driver.train(alone, INPUTS, steps=3, optimiser=optimiser, rate=0.05)
            assert_same(_numbers(driver, model)["a"], before["a"], "a, while c is trained")
            assert_same(_numbers(driver, model)["c"], _numbers(driver, alone)["c"], "c, trained beside a")
            outputs = outputs_of(driver, model)
            model = adamss.activate(adamss.activate(model, "a"), "c")
            assert_same(outputs_of(driver, model), outputs, "c, after a was active")

    def test_law_14_merged_one_after_the_other(self, driver: Driver) -> None:
        """Merging a and b and then unmerging a equals merging only b, bit for bit; unmerging both restores W0."""
        with case(driver, "float32", "models"):
            model = adamss.activate(with_adapters(driver, "float32", "a", "b"), ["a", "b"])
            both = outputs_of(driver, model)
            only_b = outputs_of(driver, adamss.merge(model, name="b"))
            # A framework that changes models in place has merged `model` itself.
            model = adamss.unmerge(model) if adamss.adapters(model)["b"].merged else model
            model = adamss.merge(adamss.merge(model, name="a"), name="b")
            assert_outputs_agree(outputs_of(driver, model), both, "both merged")
            for what in ("a", {"a": 2.0, "b": 1.0}):
                with pytest.raises(StateError, match="unmerge"):
                    adamss.activate(model, what)
            model = adamss.unmerge(model, name="a")
            assert_same(outputs_of(driver, model), only_b, "b alone merged")
            model = adamss.detach(adamss.unmerge(model), name=["a", "b"])
            assert_same(
                everything_of(driver, model),
                everything_of(driver, driver.model(LAYERS, "float32")),
                "detached",
            )

    def test_law_14_files(self, driver: Driver, tmp_path: Path) -> None:
        """Any adapter can be saved and loaded, active or not; a file can replace an adapter of the same name."""
        with case(driver, "float32", "models"):
            model = with_adapters(driver, "float32", *SETTINGS)
            loaded = driver.model(LAYERS, "float32")
            for name in SETTINGS:
                adamss.save(model, tmp_path / name, name=name, training=True)
                loaded = adamss.load(loaded, tmp_path / name, name=name)
            assert_same(_numbers(driver, loaded), _numbers(driver, model), "loaded")
            for name in SETTINGS:
                one, other = adamss.activate(model, name), adamss.activate(loaded, name)
                assert_same(outputs_of(driver, other), outputs_of(driver, one), f"{name}, loaded")
            fresh = with_adapters(driver, "float32", "b", "a", seed=7)
            fresh = adamss.load(fresh, tmp_path / "a", name="a", replace=True)
            alone = with_adapters(driver, "float32", "a")
            assert_same(outputs_of(driver, fresh), outputs_of(driver, alone), "a, replaced")


def with_adapters(
    driver: Driver, dtype: str, *names: str, seed: int = 0, settings: Mapping[str, Any] = SETTINGS
) -> Any:
    """Return the small model with these adapters, each with a random C; the last one is active."""
    model = driver.model(LAYERS, dtype)
    for name in names:
        model = adamss.attach(model, config(**settings[name]), name=name)
        adaptation = driver.backend.bank(model).adapters[name]
        new = {}
        for number, (path, factors) in enumerate(adaptation.layers.items()):
            f = on_host(driver, factors)
            C = cases.random_C(f, np.random.default_rng([seed, ord(name), number])) * 0.3
            new[path] = factors._replace(C=driver.array(C, driver.backend.dtype_name(factors.C)))
        model = driver.backend.with_factors(model, name, new)
    return model


def _numbers(driver: Driver, model: Any) -> dict[str, dict[str, Any]]:
    """Return the factors of each adapter as NumPy arrays."""
    adapters = driver.backend.bank(model).adapters
    return {
        name: {path: on_host(driver, factors) for path, factors in each.layers.items()}
        for name, each in adapters.items()
    }


def _expected(driver: Driver, model: Any, weights: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Return the expected outputs of the adapted layers, computed in float64."""
    numbers, outputs = _numbers(driver, model), {}
    for path in cases.TARGETS:
        W, b = LAYERS[path]
        deltas = [
            weight * core.delta(numbers[name][path])[: len(W)]
            for name, weight in weights.items()
            if path in numbers[name]
        ]
        outputs[path] = INPUTS[path] @ sum(deltas, start=W) + (0 if b is None else b)
    return outputs
