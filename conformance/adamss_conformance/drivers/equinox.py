"""The driver for Equinox models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import adamss_jax
from adamss_conformance.capabilities import TABLE
from adamss_conformance.driver import Budget, Inputs, Training
from adamss_conformance.drivers.jax import JaxDriver
from adamss_jax.equinox import route_axes, trainable_filter

__all__ = ["EquinoxDriver", "EquinoxTraining"]


class EquinoxDriver(JaxDriver):
    """A driver whose models are `equinox.nn.Linear` layers in nested dictionaries."""

    name = "jax-equinox"
    backend_name = "equinox"
    capabilities = TABLE["jax-equinox"]

    def jit(self, function: Callable[..., Any]) -> Callable[..., Any]:
        compiled: Callable[..., Any] = eqx.filter_jit(function)
        return compiled

    def model(self, layers: Mapping[str, tuple[np.ndarray, np.ndarray | None]], dtype: str) -> Any:
        root: dict[str, Any] = {}
        for path, (W, b) in layers.items():
            d, n = W.shape
            # Without values, because JAX takes a third of a second to compile random ones of a new shape.
            layer = eqx.filter_eval_shape(eqx.nn.Linear, d, n, use_bias=b is not None, key=jax.random.key(0))
            layer = eqx.tree_at(lambda layer: layer.weight, layer, self.array(W.T, dtype))
            if b is not None:
                layer = eqx.tree_at(lambda layer: layer.bias, layer, self.array(b, dtype))
            *parents, name = path.split(".")
            place = root
            for parent in parents:
                place = place.setdefault(parent, {})
            place[name] = layer
        return root

    def call(self, model: Any, path: str, x: Array) -> Array:
        layer = self._layer(model, path)
        adapters = getattr(layer, "adapters", {}).values()
        gates = [adapter.gate for adapter in adapters if adapter.gate is not None]
        if gates:
            # Map over the rows together with their gates, and within a row over its tokens, which share one gate.
            tokens = jnp.reshape(x, (len(gates[0]), -1, x.shape[-1]))
            of_a_row = eqx.filter_vmap(lambda layer, x: layer(x), in_axes=(None, 0))
            outputs = eqx.filter_vmap(of_a_row, in_axes=(route_axes(layer), 0))(layer, tokens)
            return jnp.reshape(outputs, (*x.shape[:-1], outputs.shape[-1]))
        flat = jax.vmap(layer)(jnp.reshape(x, (-1, x.shape[-1])))
        return jnp.reshape(flat, (*x.shape[:-1], flat.shape[-1]))

    def dtype_of(self, model: Any, path: str) -> str:
        layer = self._layer(model, path)
        return str(getattr(layer, "base", layer).weight.dtype)

    def loop(
        self, model: Any, inputs: Inputs, optimiser: str, rate: float, budget: Budget, compiled: bool
    ) -> EquinoxTraining:
        tx = self.transformation(model, optimiser, rate, budget)
        return EquinoxTraining(self, model, inputs, tx, budget is not None, compiled)

    def _layer(self, model: Any, path: str) -> Any:
        layer = model
        for name in path.split("."):
            layer = layer[name]
        return layer


class EquinoxTraining(Training):
    """A training loop with an optax transformation, which is `adamss_jax.budgeted` if there is a budget."""

    def __init__(
        self,
        driver: EquinoxDriver,
        model: Any,
        inputs: Inputs,
        tx: optax.GradientTransformation,
        budgeted: bool,
        compiled: bool,
    ) -> None:
        self._trained, self._frozen = eqx.partition(model, trainable_filter(model))
        self._state, self._budgeted = tx.init(self._trained), budgeted

        def step(trained: Any, frozen: Any, state: Any) -> Any:
            gradients = jax.grad(lambda trained: driver.loss(eqx.combine(trained, frozen), inputs))(trained)
            updates, state = tx.update(gradients, state, trained)
            return eqx.apply_updates(trained, updates), state

        self._step: Any = driver.compile(step) if compiled else step

    @property
    def model(self) -> Any:
        model = eqx.combine(self._trained, self._frozen)
        return adamss_jax.synchronise(model, self._state) if self._budgeted else model

    def step(self) -> None:
        self._trained, self._state = self._step(self._trained, self._frozen, self._state)

    def save(self, folder: Path) -> None:
        eqx.tree_serialise_leaves(folder / "state", self._state)

    def load(self, folder: Path) -> None:
        self._state = eqx.tree_deserialise_leaves(folder / "state", self._state)

    def memory(self) -> list[np.ndarray]:
        return [np.asarray(leaf) for leaf in jax.tree.leaves(self._state)]

    def compilations(self) -> int:
        return int(self._step.compilations())
