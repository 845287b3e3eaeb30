"""What the tests of JAX share."""

from collections.abc import Callable

import numpy as np
import pytest

pytest.importorskip("jax", reason="the jax session has JAX; the core and torch sessions have not")
pytest.importorskip("flax", reason="the jax session has Flax; the core and torch sessions have not")

import jax
import jax.numpy as jnp
from flax import nnx

import adamss
from adamss_jax.flax import Adapter


class Net(nnx.Module):
    """A layer norm, two layers side by side as in attention, and a head."""

    def __init__(self, width: int, *, use_bias: bool, param_dtype, rngs: nnx.Rngs) -> None:
        def linear(d, n, **options):
            return nnx.Linear(d, n, param_dtype=param_dtype, rngs=rngs, **options)

        self.norm = nnx.LayerNorm(width, param_dtype=param_dtype, rngs=rngs)
        self.blocks = nnx.List(
            [
                nnx.Dict({name: linear(width, width, use_bias=use_bias) for name in ("query", "value")})
                for _ in range(2)
            ]
        )
        self.classifier = linear(width, 3)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.norm(x)
        for block in self.blocks:
            x = x + jnp.tanh(block["query"](x)) * block["value"](x)
        return self.classifier(x)


@pytest.fixture
def net() -> Callable[..., Net]:
    """Return a maker of networks with the same weights every time, no bias of them zero."""

    def make(*, use_bias: bool = True, dtype=jnp.float32, seed: int = 0) -> Net:
        model = Net(8, use_bias=use_bias, param_dtype=dtype, rngs=nnx.Rngs(seed))
        rng = np.random.default_rng(seed)
        for path, variable in sorted(nnx.to_flat_state(nnx.state(model)), key=lambda pair: str(pair[0])):
            if path[-1] == "bias":
                variable.set_value(jnp.asarray(rng.standard_normal(variable.shape), dtype))
        return model

    return make


@pytest.fixture
def config() -> Callable[..., adamss.AdamssConfig]:
    def make(**changes) -> adamss.AdamssConfig:
        settings = {"targets": ["query", "value"], "rank": 5, "subspaces": 3, "subspace_rank": 2}
        return adamss.AdamssConfig(**(settings | changes))

    return make


@pytest.fixture
def inputs() -> Callable[..., jax.Array]:
    def make(*shape: int, dtype=jnp.float32, seed: int = 1) -> jax.Array:
        return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)

    return make


@pytest.fixture
def filled() -> Callable[..., nnx.Module]:
    """Return a function that gives every C of an adapted NNX model other values than zero, without training."""

    def fill(model: nnx.Module, *, seed: int = 2) -> nnx.Module:
        rng = np.random.default_rng(seed)
        for _, node in nnx.iter_graph(model):
            if isinstance(node, Adapter):
                f = node.factors()
                within = np.arange(f.C.shape[0])[:, None] < np.asarray(f.ranks)[np.asarray(f.labels)]
                node.C.set_value(jnp.where(within, rng.standard_normal(f.C.shape), 0).astype(f.C.dtype))
        return model

    return fill


@pytest.fixture
def variables() -> Callable[[nnx.Module], dict]:
    """Return a function of a model: class and value of each of its Variables, and class of each node, by path."""

    def read(model: nnx.Module) -> dict:
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

    return read
