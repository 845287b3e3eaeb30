"""The part that the drivers of JAX's model libraries share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import adamss_jax
from adamss.core import Factors, Gradients
from adamss_conformance.driver import Budget, Inputs, LoopDriver
from adamss_jax.optax import hold_frozen

__all__ = ["JaxDriver"]


class JaxDriver(LoopDriver):
    """A driver for JAX on the CPU and, if present, an accelerator; only float64 cases enable 64-bit types."""

    @classmethod
    def has_device(cls, device: str) -> bool:
        try:
            return bool(jax.devices(device))
        except RuntimeError:  # this build of JAX does not support the device, or finds none
            return False

    def array(self, values: np.ndarray, dtype: str | None = None) -> Array:
        array: Array = jax.device_put(super().array(values, dtype), jax.devices(self.device)[0])
        return array

    def device_of(self, array: Array) -> str:
        (device,) = array.devices()
        return str(device.platform)

    @contextmanager
    def settings(self, dtype: str | None = None) -> Iterator[None]:
        # By default, accelerators round the inputs of float32 products to fewer bits.
        with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
            yield

    def count(self, parameters: Any) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(parameters))

    def gradients(
        self, linear: Callable[..., Array], x: Array, W: Array, b: Array | None, factors: Factors, dy: Array
    ) -> Gradients:
        def run(x: Array, B: Array, C: Array) -> Array:
            return linear(x, W, b, factors._replace(B=B, C=C))

        _, vjp = jax.vjp(run, x, factors.B, factors.C)
        return Gradients(*vjp(dy))

    @abstractmethod
    def jit(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function in the library's own ``jit``, which accepts models as arguments."""

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        count = 0

        def traced(*args: Any) -> Any:
            nonlocal count
            count += 1  # this line runs only while JAX traces, once for each compilation
            return function(*args)

        compiled = self.jit(traced)

        def call(*args: Any) -> Any:
            return compiled(*args)

        call.compilations = lambda: count  # type: ignore[attr-defined]
        return call

    def compilations(self, compiled: Callable[..., Any]) -> int:
        return int(compiled.compilations())  # type: ignore[attr-defined]

    def optimiser(self, name: str, rate: float) -> optax.GradientTransformation:
        """Return an optimiser of `OPTIMISERS` as an optax transformation, with weight decay."""
        if name == "sgd":
            return optax.chain(optax.add_decayed_weights(0.1), optax.sgd(rate, momentum=0.9))
        if name == "adamw":
            return optax.adamw(rate, weight_decay=0.1)
        if name == "adafactor":
            return optax.adafactor(rate, weight_decay_rate=0.1, min_dim_size_to_factor=2)
        return optax.contrib.muon(rate, weight_decay=0.1)

    def transformation(
        self, model: Any, name: str, rate: float, budget: Budget
    ) -> optax.GradientTransformation:
        """Return an optimiser that reduces to a budget or, without one, only holds the frozen elements."""
        tx = self.optimiser(name, rate)
        return hold_frozen(tx, model) if budget is None else adamss_jax.budgeted(tx, model, budget)

    def loss(self, model: Any, inputs: Inputs) -> Array:
        """Return the loss that `train` minimises."""
        total = jnp.zeros(())
        for path, values in inputs.items():
            x = self.array(values, self.dtype_of(model, path))
            total = total + jnp.mean(jnp.square(self.call(model, path, x)))
        return total

    @abstractmethod
    def dtype_of(self, model: Any, path: str) -> str:
        """Return the dtype of the weight of a layer."""
