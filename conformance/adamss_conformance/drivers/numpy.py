"""Driver of the NumPy reference, whose gradients and optimisers are written out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from adamss import core
from adamss.backend import NumpyLinear, NumpyModel
from adamss.core import Factors, Gradients
from adamss_conformance.capabilities import TABLE
from adamss_conformance.driver import Driver

__all__ = ["NumpyDriver"]

Array = Any


class NumpyDriver(Driver):
    """`NumpyModel`, on the arrays of any namespace that a subclass chooses."""

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
        if layer.factors is None or layer.merged:
            return self.base_linear(x, layer.W, layer.b)
        return self.backend.linear(x, layer.W, layer.b, layer.factors)

    def gradients(
        self,
        linear: Callable[..., Array],
        x: Array,
        W: Array,
        b: Array | None,
        factors: Factors,
        dy: Array,
    ) -> Gradients:
        return self.backend.linear_vjp(dy, x, W, factors)  # type: ignore[attr-defined,no-any-return]

    def train(
        self,
        model: NumpyModel,
        inputs: Mapping[str, np.ndarray],
        *,
        steps: int,
        optimiser: str,
        rate: float,
        compiled: bool = False,
    ) -> NumpyModel:
        step = {"sgd": _sgd, "adamw": _adamw}[optimiser]
        states: dict[str, Any] = {}
        for number in range(1, steps + 1):
            layers = dict(model.layers)
            for path, values in inputs.items():
                layer = layers[path]
                x = self.array(values, self.backend.dtype_name(layer.W))
                y = self.call(model, path, x)
                dy = y * (2 / y.size)
                if layer.factors is None:
                    layers[path] = self._step_whole(layer, x, dy, rate)
                    continue
                gradients = self.backend.linear_vjp(dy, x, layer.W, layer.factors)  # type: ignore[attr-defined]
                new = {}
                for name in ("B", "C"):
                    state = states.get(path + name)
                    new[name], states[path + name] = step(
                        getattr(layer.factors, name), getattr(gradients, name), state, rate, number
                    )
                factors = self.hold_frozen(layer.factors, layer.factors._replace(**new))
                layers[path] = NumpyLinear(layer.W, layer.b, factors)
            model = NumpyModel(layers, model.config, model.saved, model.originals)
        return model

    def hold_frozen(self, before: Factors, after: Factors) -> Factors:
        """Undo what an optimiser did to frozen elements."""
        return core.hold_frozen(before, after)

    def _step_whole(self, layer: NumpyLinear, x: Array, dy: Array, rate: float) -> NumpyLinear:
        W = layer.W - rate * (x.T @ dy)
        return NumpyLinear(W, layer.b)


def _sgd(w: Array, g: Array, momentum: Any, rate: float, number: int) -> tuple[Array, Any]:
    decayed = g + 0.1 * w
    momentum = decayed if momentum is None else 0.9 * momentum + decayed
    return w - rate * momentum, momentum


def _adamw(w: Array, g: Array, state: Any, rate: float, number: int) -> tuple[Array, Any]:
    first, second = (0 * w, 0 * w) if state is None else state
    first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
    size = (second / (1 - 0.999**number)) ** 0.5 + 1e-8
    return w * (1 - 0.1 * rate) - rate * (first / (1 - 0.9**number)) / size, (first, second)
