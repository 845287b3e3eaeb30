"""Shared code of the JAX tests: small models with values, and gradients and training loops in both libraries."""

import os
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import adamss
import adamss_jax
from adamss.core import Factors
from adamss_conformance.cases import random_C
from adamss_conformance.tolerances import assert_agrees
from adamss_jax.equinox import AdaptedLayer, trainable_filter
from adamss_jax.flax import Adapter


class Net(nnx.Module):
    """A layer norm, two parallel layers as in attention, and a head."""

    def __init__(self, width: int, *, param_dtype, rngs: nnx.Rngs) -> None:
        def linear(n):
            return nnx.Linear(width, n, param_dtype=param_dtype, rngs=rngs)

        self.norm = nnx.LayerNorm(width, param_dtype=param_dtype, rngs=rngs)
        self.blocks = nnx.List([nnx.Dict({n: linear(width) for n in ("query", "value")}) for _ in range(2)])
        self.classifier = linear(3)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.norm(x)
        for block in self.blocks:
            x = x + jnp.tanh(block["query"](x)) * block["value"](x)
        return self.classifier(x)


def net(*, dtype=jnp.float32, seed=0) -> Net:
    """Return a network whose weights depend only on the seed, with biases that are not zero."""
    model = Net(8, param_dtype=dtype, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    for path, variable in sorted(nnx.to_flat_state(nnx.state(model)), key=lambda pair: str(pair[0])):
        if path[-1] == "bias":
            variable.set_value(jnp.asarray(rng.standard_normal(variable.shape), dtype))
    return model


class Block(nnx.Module):
    """Two parallel layers, one of them with heads; float64 if JAX has it enabled."""

    def __init__(self, rngs):
        dtype = jnp.zeros(()).dtype
        self.query = nnx.Linear(8, 8, param_dtype=dtype, rngs=rngs)
        self.value = nnx.LinearGeneral(8, (2, 4), use_bias=False, param_dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.query(x)) * self.value(x).reshape(x.shape)


class Stack(nnx.Module):
    """Blocks whose arrays are stacked for `scan`, and a head."""

    def __init__(self, layers, seed=0):
        self.block = nnx.split_rngs(splits=layers)(nnx.vmap(Block))(nnx.Rngs(seed))
        self.head = nnx.Linear(8, 3, param_dtype=jnp.zeros(()).dtype, rngs=nnx.Rngs(seed + 9))

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(block, x):
            return block(x)

        return self.head(run(self.block, x))


def config(**changes) -> adamss.AdamssConfig:
    settings = {"targets": ["query", "value"], "rank": 5, "subspaces": 3, "subspace_rank": 2}
    return adamss.AdamssConfig(**(settings | changes))


def inputs(*shape, dtype=jnp.float32, seed=1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def filled(model, *, seed=2):
    """Return an adapted model with random values in every C, without training; an NNX model is changed in place."""
    rng = np.random.default_rng(seed)

    def C_of(adapter):
        f = Factors(*map(np.asarray, adapter.factors()))
        return jnp.asarray(random_C(f, rng), f.C.dtype)

    if isinstance(model, nnx.Module):
        for _, node in nnx.iter_graph(model):
            if isinstance(node, Adapter):
                node.C.set_value(C_of(node))
        return model

    def adapted(node):
        return isinstance(node, AdaptedLayer)

    def fill(node):
        return eqx.tree_at(lambda m: m.adapter.C, node, C_of(node.adapter)) if adapted(node) else node

    return jax.tree.map(fill, model, is_leaf=adapted)


def variables(model: nnx.Module) -> dict:
    """Return class and value of each Variable of a model, and the class of each node, by path."""
    found = {}
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Variable):
            value = node.get_value()
            if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
                value = jax.random.key_data(value)
            if not isinstance(value, jax.ShapeDtypeStruct):
                value = (value.dtype, np.asarray(value).tobytes())
            found[path] = (type(node), value)
        elif isinstance(node, nnx.Pytree):
            found[path] = type(node)
    return found


def agrees(actual, expected, what, scale=None):
    assert_agrees(actual, expected, dtype="float32", what=what, scale=scale)


def gradient(loss, model, *batch):
    """Return the gradient of ``loss(model, *batch)`` with respect to the trained arrays."""
    if isinstance(model, nnx.Module):
        return nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, *batch)
    trained, frozen = eqx.partition(model, trainable_filter(model))
    return jax.grad(lambda trained: loss(eqx.combine(trained, frozen), *batch))(trained)


def program(model):
    """Return the forward pass as a function of arrays and x, and the arrays of the model."""
    if isinstance(model, nnx.Module):
        graph, arrays = nnx.split(model)
        return lambda arrays, x: nnx.merge(graph, arrays)(x), arrays
    arrays, rest = eqx.partition(model, eqx.is_array)
    return lambda arrays, x: eqx.combine(arrays, rest)(x), arrays


class NnxLoop:
    """Training with an `nnx.Optimizer` and a compiled step; `traces` counts how often the step is traced."""

    def __init__(self, model, tx, loss):
        self.model, self.traces = model, 0
        self.optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)

        @nnx.jit
        def run(model, optimizer, *batch):
            self.traces += 1
            optimizer.update(model, gradient(loss, model, *batch))

        self.run = run

    def step(self, *batch):
        self.run(self.model, self.optimizer, *batch)
        return self

    @property
    def state(self):
        return adamss_jax.budget.budgeted_state(self.optimizer, None, "test")

    def synchronise(self):
        return adamss_jax.synchronise(self.model, self.optimizer)

    def saved(self):
        return nnx.state(self.optimizer)

    def restore(self, saved):
        nnx.update(self.optimizer, saved)


class EquinoxLoop:
    """Training of an Equinox model with an optax transformation, with the same interface as `NnxLoop`."""

    def __init__(self, model, tx, loss):
        self.model, self.traces = model, 0
        self.state = tx.init(eqx.filter(model, trainable_filter(model)))

        @eqx.filter_jit
        def run(model, state, *batch):
            self.traces += 1
            trained = eqx.filter(model, trainable_filter(model))
            updates, state = tx.update(gradient(loss, model, *batch), state, trained)
            return eqx.apply_updates(model, updates), state

        self.run = run

    def step(self, *batch):
        self.model, self.state = self.run(self.model, self.state, *batch)
        return self

    def synchronise(self):
        self.model = adamss_jax.synchronise(self.model, self.state)
        return self.model


def loop_of(model, tx, loss):
    return (NnxLoop if isinstance(model, nnx.Module) else EquinoxLoop)(model, tx, loss)


def train(model, loss, *batch, tx=None, steps=3):
    """Return the loop after some steps on one batch; the default optimiser is AdamW with weight decay."""
    loop = loop_of(model, tx or optax.adamw(0.05, weight_decay=0.1), loss)
    for _ in range(steps):
        loop.step(*batch)
    return loop


def run_python(*arguments):
    """Run a separate Python interpreter with JAX on the CPU, and return what it prints."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
