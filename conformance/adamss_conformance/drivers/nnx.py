"""Driver of the JAX backend with Flax NNX models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array

from adamss_conformance.capabilities import TABLE
from adamss_conformance.drivers.jax import JaxDriver
from adamss_jax.optax import hold_frozen

__all__ = ["NnxDriver"]


class NnxDriver(JaxDriver):
    """`nnx.Linear` layers."""

    name = "jax-nnx"
    capabilities = TABLE["jax-nnx"]

    def jit(self, function: Callable[..., Any]) -> Callable[..., Any]:
        compiled: Callable[..., Any] = nnx.jit(function)
        return compiled

    def model(self, layers: Mapping[str, tuple[np.ndarray, np.ndarray | None]], dtype: str) -> nnx.Module:
        root = nnx.Module()
        for path, (W, b) in layers.items():
            with jax.default_device(jax.devices(self.device)[0]):
                d, n = W.shape
                layer = nnx.Linear(d, n, use_bias=b is not None, rngs=nnx.Rngs(0))
            layer.kernel.set_value(self.array(W, dtype))
            if b is not None and layer.bias is not None:
                layer.bias.set_value(self.array(b, dtype))
            parent, *names = root, *path.split(".")
            for name in names[:-1]:
                if not hasattr(parent, name):
                    setattr(parent, name, nnx.Module())
                parent = getattr(parent, name)
            setattr(parent, names[-1], layer)
        return root

    def call(self, model: nnx.Module, path: str, x: Array) -> Array:
        output: Array = self._layer(model, path)(x)
        return output

    def dtype_of(self, model: nnx.Module, path: str) -> str:
        return str(self._layer(model, path).kernel.dtype)

    def train(
        self,
        model: nnx.Module,
        inputs: Mapping[str, np.ndarray],
        *,
        steps: int,
        optimiser: str,
        rate: float,
        compiled: bool = False,
    ) -> nnx.Module:
        tx = hold_frozen(self.optimiser(optimiser, rate), model)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)

        def step(model: Any, optimizer: Any) -> None:
            slope = nnx.grad(self.loss, argnums=nnx.DiffState(0, nnx.LoRAParam))
            optimizer.update(model, slope(model, inputs))

        run = nnx.jit(step) if compiled else step
        for _ in range(steps):
            run(model, optimizer)
        return model

    def _layer(self, model: nnx.Module, path: str) -> Any:
        layer: Any = model
        for name in path.split("."):
            layer = getattr(layer, name)
        return layer
