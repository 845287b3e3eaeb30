"""The driver for Flax NNX models."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax import Array

import adamss_jax
from adamss_conformance.capabilities import TABLE
from adamss_conformance.driver import Budget, Inputs, Training
from adamss_conformance.drivers.jax import JaxDriver

__all__ = ["NnxDriver", "NnxTraining"]


class NnxDriver(JaxDriver):
    """A driver whose models are `nnx.Linear` layers in nested modules."""

    name = "jax-nnx"
    backend_name = "flax"
    capabilities = TABLE["jax-nnx"]

    def jit(self, function: Callable[..., Any]) -> Callable[..., Any]:
        compiled: Callable[..., Any] = nnx.jit(function)
        return compiled

    def model(self, layers: Mapping[str, tuple[np.ndarray, np.ndarray | None]], dtype: str) -> nnx.Module:
        root = nnx.Module()
        for path, (W, b) in layers.items():
            with jax.default_device(jax.devices(self.device)[0]):
                d, n = W.shape
                # JAX takes half a second to compile random values of a new shape, which are replaced below.
                zeros = nnx.initializers.zeros_init()
                layer = nnx.Linear(d, n, use_bias=b is not None, kernel_init=zeros, rngs=nnx.Rngs(0))
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

    def loop(
        self, model: nnx.Module, inputs: Inputs, optimiser: str, rate: float, budget: Budget, compiled: bool
    ) -> NnxTraining:
        tx = self.transformation(model, optimiser, rate, budget)
        return NnxTraining(self, model, inputs, tx, budget is not None, compiled)

    def _layer(self, model: nnx.Module, path: str) -> Any:
        layer: Any = model
        for name in path.split("."):
            layer = getattr(layer, name)
        return layer


class NnxTraining(Training):
    """A training loop with an `nnx.Optimizer`, whose transformation is `adamss_jax.budgeted` if there is a budget."""

    def __init__(
        self,
        driver: NnxDriver,
        model: nnx.Module,
        inputs: Inputs,
        tx: optax.GradientTransformation,
        budgeted: bool,
        compiled: bool,
    ) -> None:
        self._model, self._budgeted = model, budgeted
        self._optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)

        def step(model: Any, optimizer: Any) -> None:
            slope = nnx.grad(driver.loss, argnums=nnx.DiffState(0, nnx.LoRAParam))
            optimizer.update(model, slope(model, inputs))

        self._step: Any = driver.compile(step) if compiled else step

    @property
    def model(self) -> nnx.Module:
        if self._budgeted:
            adamss_jax.synchronise(self._model, self._optimizer)
        return self._model

    def step(self) -> None:
        self._step(self._model, self._optimizer)

    def save(self, folder: Path) -> None:
        (folder / "state").write_bytes(pickle.dumps(self.memory()))

    def load(self, folder: Path) -> None:
        state = nnx.state(self._optimizer)
        leaves = pickle.loads((folder / "state").read_bytes())
        nnx.update(
            self._optimizer, jax.tree.unflatten(jax.tree.structure(state), map(jax.numpy.asarray, leaves))
        )

    def memory(self) -> list[np.ndarray]:
        return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(self._optimizer))]

    def compilations(self) -> int:
        return int(self._step.compilations())
