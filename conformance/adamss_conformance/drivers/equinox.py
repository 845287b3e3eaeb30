"""Driver of the JAX backend with Equinox models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adamss_conformance.capabilities import TABLE
from adamss_conformance.drivers.jax import JaxDriver
from adamss_jax.equinox import trainable_filter
from adamss_jax.optax import hold_frozen

__all__ = ["EquinoxDriver"]


class EquinoxDriver(JaxDriver):
    """`equinox.nn.Linear` layers in nested dictionaries."""

    name = "jax-equinox"
    capabilities = TABLE["jax-equinox"]

    def jit(self, function: Callable[..., Any]) -> Callable[..., Any]:
        compiled: Callable[..., Any] = eqx.filter_jit(function)
        return compiled

    def model(self, layers: Mapping[str, tuple[np.ndarray, np.ndarray | None]], dtype: str) -> Any:
        root: dict[str, Any] = {}
        for path, (W, b) in layers.items():
            d, n = W.shape
            layer = eqx.nn.Linear(d, n, use_bias=b is not None, key=jax.random.key(0))
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
        flat = jax.vmap(layer)(jnp.reshape(x, (-1, x.shape[-1])))
        return jnp.reshape(flat, (*x.shape[:-1], flat.shape[-1]))

    def dtype_of(self, model: Any, path: str) -> str:
        layer = self._layer(model, path)
        return str(getattr(layer, "base", layer).weight.dtype)

    def train(
        self,
        model: Any,
        inputs: Mapping[str, np.ndarray],
        *,
        steps: int,
        optimiser: str,
        rate: float,
        compiled: bool = False,
    ) -> Any:
        tx = hold_frozen(self.optimiser(optimiser, rate), model)
        trained, frozen = eqx.partition(model, trainable_filter(model))
        state = tx.init(trained)

        def step(trained: Any, state: Any) -> Any:
            gradients = jax.grad(lambda trained: self.loss(eqx.combine(trained, frozen), inputs))(trained)
            updates, state = tx.update(gradients, state, trained)
            return eqx.apply_updates(trained, updates), state

        run = eqx.filter_jit(step) if compiled else step
        for _ in range(steps):
            trained, state = run(trained, state)
        return eqx.combine(trained, frozen)

    def _layer(self, model: Any, path: str) -> Any:
        layer = model
        for name in path.split("."):
            layer = layer[name]
        return layer
