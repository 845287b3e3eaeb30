"""Test layers whose arrays are stacked for `scan` or `vmap` in Flax NNX and Equinox; each is a separate layer."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax_helpers import Stack, agrees, train

import adamss
from adamss import core
from adamss.backend import backend_for
from adamss.backend.ledger import put
from adamss.core import Factors
from adamss.errors import LayerError, StateError
from adamss_conformance.cases import random_C

LAYERS, WIDTH = 3, 8
SETTINGS = {"targets": ["query", "value"], "rank": 6, "subspaces": 4, "subspace_rank": 3}


class EquinoxBlock(eqx.Module):
    query: eqx.nn.Linear

    def __init__(self, key):
        self.query = eqx.nn.Linear(WIDTH, WIDTH, key=key)


class EquinoxStack(eqx.Module):
    block: EquinoxBlock

    def __init__(self):
        self.block = eqx.filter_vmap(EquinoxBlock)(jax.random.split(jax.random.key(0), LAYERS))

    def __call__(self, x):
        arrays, rest = eqx.partition(self.block, eqx.is_array)

        def run(x, layer):
            return x + jnp.tanh(eqx.combine(layer, rest).query(x)), None

        return jax.lax.scan(run, x, arrays)[0]


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (4, WIDTH))


@pytest.fixture(params=[{}, {"basis": "per_subspace", "include_bias": True}, {"subspace_rank": 1}], ids=str)
def config(request):
    return adamss.AdamssConfig(**(SETTINGS | request.param))


def step(model, x):
    return train(model, lambda model, x: jnp.square(model(x)).mean(), x, tx=optax.sgd(0.05), steps=2).model


def test_every_layer_of_a_stack_has_factors_of_its_own(config):
    model = adamss.attach(Stack(LAYERS), config)
    rows = adamss.summary(model).rows
    assert [row.path for row in rows] == [
        f"block.{n}[{i}]" for n in ("query", "value") for i in range(LAYERS)
    ]
    assert {row.shape for row in rows} == {(WIDTH, WIDTH)}
    kernels = np.asarray(Stack(LAYERS).block.query.kernel[...])
    for index, row in enumerate(rows[:LAYERS]):
        W = kernels[index]
        if config.include_bias:
            W = np.concatenate([W, np.zeros((1, WIDTH), np.float32)])  # the biases are zero
        expected = core.segment(core.decompose(W, 6), 4)
        factors = backend_for(model).bank(model).only().layers[row.path]
        np.testing.assert_array_equal(factors.labels, expected)
        assert row.trained == core.count_factors(factors)
        core.check_factors(factors, shape=(WIDTH, WIDTH))


def test_layers_of_a_stack_have_the_highest_number_of_subspaces_that_one_of_them_finds(x):
    blocks = [np.kron(np.eye(K), np.ones((WIDTH // K, WIDTH // K))) for K in (2, 4, 1)]
    weight = jnp.asarray(np.stack(blocks), jnp.float32)
    model = eqx.tree_at(lambda model: model.block.query.weight, EquinoxStack(), weight)
    estimate = adamss.SubspaceEstimate(minimum=1)
    model = adamss.attach(model, adamss.AdamssConfig(targets=["query"], rank=6, subspaces=estimate))
    assert [row.K for row in adamss.summary(model).rows] == [4, 4, 4]
    step(model, x[0])


def test_scanned_models_start_equal_train_and_come_back(config, x, tmp_path):
    model = Stack(LAYERS)
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))
    start = model(x)
    adamss.attach(model, config)
    assert jnp.array_equal(model(x), start)
    trained = step(model, x)(x)
    assert float(jnp.abs(trained - start).max()) > 1e-3
    for training in (False, True):
        adamss.save(model, tmp_path / "a.safetensors", training=training)
        loaded = adamss.load(Stack(LAYERS), tmp_path / "a.safetensors")
        agrees(loaded(x), trained, f"loaded, training = {training}")
    adamss.merge(model)
    agrees(model(x), trained, "merged")
    with adamss.disabled(model):
        assert jnp.array_equal(model(x), start)
    adamss.unmerge(model)
    assert jnp.array_equal(model(x), trained)
    adamss.detach(model)
    after = nnx.to_pure_dict(nnx.state(model))
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), after, before))
    assert type(model.block.query) is nnx.Linear


def test_masks_and_frozen_elements(x):
    model = step(adamss.attach(Stack(LAYERS), adamss.AdamssConfig(**SETTINGS)), x)
    backend = backend_for(model)
    mask = jnp.asarray([True, False, True, False])
    backend.set_active(model, {"block.query[1]": mask})
    before = backend.bank(model).only().layers
    assert [int(f.active.sum()) for f in before.values()] == [4, 2, 4, 4, 4, 4]
    shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(backend.trained_elements(model)))
    q = model.block.query.adamss.default.B.shape[-1]
    assert shapes["block"]["query"]["adamss"]["default"] == {"B": (LAYERS, 1, q), "C": (LAYERS, 1, WIDTH)}
    after = backend.bank(step(model, x)).only().layers
    frozen = ~mask[before["block.query[1]"].labels]
    old, new = (layers["block.query[1]"].C for layers in (before, after))
    assert jnp.array_equal(new[:, frozen], old[:, frozen])
    assert not jnp.array_equal(new[:, ~frozen], old[:, ~frozen])


def test_padding_of_a_stack_is_never_trained(x):
    model = step(adamss.attach(Stack(LAYERS), adamss.AdamssConfig(**(SETTINGS | {"subspaces": 5}))), x)
    adapter = model.block.query.adamss.default
    ranks = adapter.ranks[...]
    padding = jnp.arange(adapter.B.shape[-1])[None, :] >= ranks.sum(1)[:, None]
    assert int(padding.sum()) > 0, "the layers have equal ranks, and the case tests nothing"
    assert not jnp.any(jnp.where(padding[:, None, :], adapter.B[...], 0.0))


@pytest.mark.parametrize("targets", [r"block\.query\[[01]\]", ["query[0]", "query[2]"]])
def test_a_part_of_a_stack_is_refused(targets):
    model = Stack(LAYERS)
    with pytest.raises(LayerError, match=r"block\.query is a stack of 3 layers, of which 1 match no target"):
        adamss.attach(model, adamss.AdamssConfig(targets=targets))
    assert type(model.block.query) is nnx.Linear


def test_axes_of_the_stack_that_do_not_lead_are_refused():
    model = Stack(LAYERS)
    kernel = model.block.query.kernel
    kernel.set_value(jnp.moveaxis(kernel[...][:, :, :5], 0, 1))
    with pytest.raises(LayerError, match=r"block\.query\[0\].*must come first"):
        adamss.attach(model, adamss.AdamssConfig(**SETTINGS))


def test_scanned_equinox_models(config, x, tmp_path):
    settings = adamss.AdamssConfig(**(config.to_dict() | {"targets": ["query"]}))
    model = EquinoxStack()
    run = jax.vmap
    start = run(model)(x)
    adapted = adamss.attach(model, settings)
    assert jnp.array_equal(run(adapted)(x), start)
    assert [row.path for row in adamss.summary(adapted).rows] == [f"block.query[{i}]" for i in range(LAYERS)]
    backend = backend_for(model)
    layers, shapes = backend.bank(adapted).only().layers, backend.bank(adapted).only().shapes
    rng = np.random.default_rng(0)
    moved = {
        path: f._replace(C=jnp.asarray(random_C(Factors(*map(np.asarray, f)), rng), f.C.dtype))
        for path, f in layers.items()
    }
    adapted = put(backend, model, moved, shapes, config=settings, saved={})
    trained = run(adapted)(x)
    assert float(jnp.abs(trained - start).max()) > 0.1
    merged = adamss.merge(adapted)
    agrees(run(merged)(x), trained, "merged")
    assert jnp.array_equal(run(adamss.unmerge(merged))(x), trained)
    assert eqx.tree_equal(adamss.detach(merged), model)
    adamss.save(adapted, tmp_path / "a.safetensors")
    loaded = adamss.load(model, tmp_path / "a.safetensors")
    agrees(run(loaded)(x), trained, "loaded")


def test_experts_of_stacked_layers(tmp_path):
    """The arrays have two leading axes: the layers, and the experts of each layer."""

    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def make(rngs):
        return nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: nnx.Linear(6, 6, rngs=rngs)))(rngs)

    model = nnx.Dict(expert=make(nnx.Rngs(0)))
    kernels = np.array(model.expert.kernel[...])
    adamss.attach(model, adamss.AdamssConfig(targets=["expert"], rank=4, subspaces=2))
    assert model.expert.adamss.default.B.shape == (2, 3, 4, 2)
    paths = [row.path for row in adamss.summary(model).rows]
    assert paths == [f"expert[{i},{j}]" for i in range(2) for j in range(3)]
    adamss.save(model, tmp_path / "a.safetensors")
    adamss.merge(model)
    assert np.array_equal(model.expert.kernel[...], kernels)
    adamss.load(adamss.detach(model), tmp_path / "a.safetensors")


def test_a_layer_of_a_stack_is_no_lora(tmp_path):
    model = adamss.attach(Stack(LAYERS), adamss.AdamssConfig(**SETTINGS))
    with pytest.raises(StateError, match=r"block\.query\[0\].*PyTorch"):
        adamss.to_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
