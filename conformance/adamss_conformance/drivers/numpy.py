"""The driver for the NumPy reference, with explicit gradients and optimisers, since NumPy has neither."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from adamss import BudgetConfig, core
from adamss.backend import NumpyLinear, NumpyModel
from adamss.core import Factors, Gradients
from adamss_conformance.capabilities import TABLE
from adamss_conformance.driver import Budget, Inputs, LoopDriver, Training

__all__ = ["NumpyDriver", "NumpyTraining"]

Array = Any


class NumpyDriver(LoopDriver):
    """A driver for `NumpyModel`; subclasses may use arrays of another namespace."""

    name = "numpy"
    backend_name = "numpy"
    capabilities = TABLE["numpy"]

    def model(self, layers: Mapping[str, tuple[np.ndarray, np.ndarray | None]], dtype: str) -> NumpyModel:
        return NumpyModel(
            {
                path: NumpyLinear(self.array(W, dtype), None if b is None else self.array(b, dtype))
                for path, (W, b) in layers.items()
            }
        )

    def call(self, model: NumpyModel, path: str, x: Array) -> Array:
        layer = model[path]
        if layer.route is not None:
            return core.linear(x, layer.W, layer.b, *layer.computed, route=layer.route(x))
        if not layer.computed:
            return self.base_linear(x, layer.W, layer.b)
        return self.backend.linear(x, layer.W, layer.b, *layer.computed)

    def gradients(
        self, linear: Callable[..., Array], x: Array, W: Array, b: Array | None, factors: Factors, dy: Array
    ) -> Gradients:
        return self.backend.linear_vjp(dy, x, W, factors)  # type: ignore[attr-defined,no-any-return]

    def loop(
        self, model: NumpyModel, inputs: Inputs, optimiser: str, rate: float, budget: Budget, compiled: bool
    ) -> NumpyTraining:
        return NumpyTraining(self, model, inputs, optimiser, rate, budget)

    def hold_frozen(self, before: Factors, after: Factors) -> Factors:
        """Restore the frozen elements to their values before the optimiser's step."""
        return core.hold_frozen(before, after)

    def decide(
        self, state: core.BudgetState, plan: core.BudgetPlan, weights: Array, gradients: Array
    ) -> core.BudgetState:
        """Advance the state of a budget by one step."""
        return core.advance(plan, core.observe(plan, state, weights, gradients))


class NumpyTraining(Training):
    """A training loop with SGD or AdamW, whose budget is computed by the functions of the core."""

    def __init__(
        self,
        driver: NumpyDriver,
        model: NumpyModel,
        inputs: Inputs,
        optimiser: str,
        rate: float,
        budget: BudgetConfig | None,
    ) -> None:
        self._driver, self._model, self._inputs, self._rate = driver, model, inputs, rate
        self._update = {"sgd": _sgd, "adamw": _adamw}[optimiser]
        self._optimiser: dict[str, Any] = {}
        self._number = 0
        self._state: core.BudgetState | None = None
        if budget is not None:
            self._plan = core.plan_budget(self._factors(), budget)
            self._state = core.initial_budget_state(self._plan, self._weights())

    @property
    def model(self) -> NumpyModel:
        return self._model

    def step(self) -> None:
        self._number += 1
        driver, layers = self._driver, dict(self._model.layers)
        before = None if self._state is None else self._weights()
        bank, gradients = self._model.bank, {}
        trained = {name: each for name, each in bank.adapters.items() if each.trained}
        after: dict[str, dict[str, Factors]] = {name: {} for name in trained}
        saved = {path for each in trained.values() for path in each.saved}
        for path, values in self._inputs.items():
            layer = layers[path]
            x = driver.array(values, driver.backend.dtype_name(layer.W))
            y = driver.call(self._model, path, x)
            dy = y * (2 / y.size)
            if path in saved:
                layers[path] = replace(layer, W=layer.W - self._rate * (x.T @ dy))
            for adapter, each in trained.items():
                if path not in each.layers:
                    continue
                own, weight = each.layers[path], each.weight
                (factors,) = replace(bank, adapters={adapter: each}).computed(path)
                if self._state is not None and self._plan.config.revive:
                    # Mark all subspaces as active, because frozen ones need gradients to return.
                    factors = factors._replace(active=factors.active | ~factors.active)
                slopes = driver.backend.linear_vjp(dy, x, layer.W, factors)  # type: ignore[attr-defined]
                slopes = slopes._replace(C=slopes.C * weight)  # chain rule: `factors` has C times the weight
                gradients[path] = slopes.B, slopes.C
                new = {
                    name: self._updated(adapter + path + name, getattr(own, name), getattr(slopes, name))
                    for name in "BC"
                }
                after[adapter][path] = driver.hold_frozen(own, own._replace(**new))
        self._model = replace(self._model, layers=layers)
        for adapter, new_factors in after.items():
            self._model = driver.backend.with_factors(self._model, adapter, new_factors)
        if self._state is not None:
            slopes = self._plan.join_elements(gradients)
            self._state = driver.decide(self._state, self._plan, before, slopes)
            (adapter,) = trained
            self._model = driver.backend.set_active(
                self._model, self._plan.split(self._state.active), adapter
            )

    def save(self, folder: Path) -> None:
        (folder / "state").write_bytes(pickle.dumps((self._number, self._optimiser, self._state)))

    def load(self, folder: Path) -> None:
        self._number, self._optimiser, self._state = pickle.loads((folder / "state").read_bytes())

    def memory(self) -> list[Array]:
        leaves = _leaves((self._number, self._optimiser, self._state))
        return [np.asarray(leaf) if isinstance(leaf, int) else self._driver.numpy(leaf) for leaf in leaves]

    def _factors(self) -> dict[str, Factors]:
        adapters = self._model.bank.adapters.values()
        return {path: factors for each in adapters if each.trained for path, factors in each.layers.items()}

    def _weights(self) -> Array:
        return self._plan.join_elements({path: (f.B, f.C) for path, f in self._factors().items()})

    def _updated(self, name: str, w: Array, g: Array) -> Array:
        new, self._optimiser[name] = self._update(w, g, self._optimiser.get(name), self._rate, self._number)
        return new


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, tuple | dict):
        for child in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(child)
    elif tree is not None:
        yield tree


def _sgd(w: Array, g: Array, momentum: Any, rate: float, number: int) -> tuple[Array, Any]:
    decayed = g + 0.1 * w
    momentum = decayed if momentum is None else 0.9 * momentum + decayed
    return w - rate * momentum, momentum


def _adamw(w: Array, g: Array, state: Any, rate: float, number: int) -> tuple[Array, Any]:
    first, second = (0 * w, 0 * w) if state is None else state
    first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
    size = (second / (1 - 0.999**number)) ** 0.5 + 1e-8
    return w * (1 - 0.1 * rate) - rate * (first / (1 - 0.9**number)) / size, (first, second)
