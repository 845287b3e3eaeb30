"""Law 15: a batch whose rows go through different adapters gives the outputs of separate runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

import adamss
from adamss.errors import AdamssError, LayerError, StateError
from adamss_conformance.cases import INPUTS, TARGETS
from adamss_conformance.driver import Driver
from adamss_conformance.laws.helpers import case, each_dtype, layers_run
from adamss_conformance.laws.names import OTHERS, with_adapters
from adamss_conformance.tolerances import assert_agrees

__all__ = ["RoutingLaws"]

NAMES = ("b", "c", "d")
"""Adapters that can be routed, since they save no module, which all rows would share. Each adapts other layers."""

ROUTES = (
    ["b", "c", "d", None, "b", "c", None],
    ["c"] * 7,
    [None] * 7,
    ["d", None, None, "b", "b", "b", "b"],
)


class RoutingLaws:
    """Tests that each row of a batch gets the update of its own adapter, and of no other."""

    @each_dtype
    def test_law_15_routing(self, driver: Driver, dtype: str) -> None:
        """The outputs of rows, and of blocks of flattened rows, equal those of runs with one adapter each."""
        with case(driver, dtype, "models", "routes"):
            model = with_adapters(driver, dtype, *NAMES, settings=OTHERS)
            for tokens in (1, 60):
                inputs = {
                    path: np.stack([INPUTS[path] * (1 + token / 60) for token in range(tokens)], axis=1)
                    for path in TARGETS
                }
                arrays = {path: driver.array(x, dtype) for path, x in inputs.items()}
                alone = {
                    name: _run(driver, adamss.activate(model, name or []), arrays) for name in (*NAMES, None)
                }
                model = adamss.activate(model, {"b": -2.0, "d": 0.5})  # a route must ignore these weights
                for route in ROUTES:
                    with adamss.routed(model, route) as mixed:
                        outputs = _run(driver, mixed, arrays)
                        flat = {
                            path: driver.array(x.reshape(-1, x.shape[-1]), dtype)
                            for path, x in inputs.items()
                        }
                        flattened = _run(driver, mixed, flat)
                    for path, output in outputs.items():
                        expected = np.stack([alone[name][path][row] for row, name in enumerate(route)])
                        scale = float(np.abs(expected).max())
                        what = f"{path}, {route}, {tokens} tokens"
                        assert_agrees(output, expected, dtype=dtype, what=what, scale=scale)
                        again = flattened[path].reshape(output.shape)
                        assert_agrees(again, expected, dtype=dtype, what=f"{what}, flattened", scale=scale)

    def test_law_15_routing_compiles_once(self, driver: Driver) -> None:
        """Another route does not cause another compilation."""
        with case(driver, "float32", "models", "routes", "compiles"):
            model, path = with_adapters(driver, "float32", *NAMES, settings=OTHERS), TARGETS[0]
            x = driver.array(INPUTS[path], "float32")
            compiled = driver.compile(lambda model, x: driver.call(model, path, x))
            for route in ROUTES:
                with adamss.routed(model, route) as mixed:
                    eager = driver.numpy(driver.call(mixed, path, x))
                    assert_agrees(driver.numpy(compiled(mixed, x)), eager, dtype="float32", what=str(route))
            assert driver.compilations(compiled) == 1

    def test_law_15_routing_refuses(self, driver: Driver) -> None:
        """A route that is not possible is an error and changes nothing."""
        with case(driver, "float32", "models", "routes"):
            model = with_adapters(driver, "float32", "a", *NAMES, settings=OTHERS)
            before = {name: each.weight for name, each in adamss.adapters(model).items()}
            for names, match in (
                (["a"] * 7, "'a' has modules_to_save"),
                (["z"], "no adapter is called 'z'"),
                ([], "empty"),
            ):
                with pytest.raises(AdamssError, match=match), adamss.routed(model, names):
                    pass
            with adamss.routed(model, ROUTES[0]) as mixed:
                # Layers that take one row are mapped over by the caller, who gets an error of the framework instead.
                with pytest.raises((LayerError, TypeError)):
                    layers_run(driver, mixed, {TARGETS[0]: driver.array(INPUTS[TARGETS[0]][:3], "float32")})
                with pytest.raises(StateError, match="routed"):
                    adamss.activate(mixed, "b")
                with pytest.raises(StateError, match="routed"):
                    adamss.merge(mixed)
                with pytest.raises(StateError, match="routed"):
                    adamss.detach(mixed, name="b")
            assert {name: each.weight for name, each in adamss.adapters(model).items()} == before
            merged = adamss.merge(adamss.activate(model, "b"))
            with pytest.raises(StateError, match="unmerge"), adamss.routed(merged, ["b"] * 7):
                pass


def _run(driver: Driver, model: Any, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    outputs = layers_run(driver, model, arrays)
    return {path: driver.numpy(y).astype(np.float64) for path, y in outputs.items()}
