"""Layers and ways of keeping weights that NNX and Equinox do not have, registered from outside: no other edit."""

import contextlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import adamss
import adamss_jax.equinox
import adamss_jax.flax
from adamss import core, errors
from adamss.backend import Kind, Store, View, backend_for
from adamss.backend.ledger import put
from adamss_conformance import assert_agrees

CONFIG = adamss.AdamssConfig(targets=["0"], rank=6, subspaces=4, subspace_rank=2)
REVIVES = adamss.AdamssConfig(
    **(CONFIG.to_dict() | {"budget": adamss.BudgetConfig(target=1, end_step=2, revive=True)})
)


class NnxWindow(Kind):
    """A convolution over one axis: every window of the input is a row of (window x channels) numbers."""

    classes = (nnx.Conv,)
    weight = "kernel"

    def view(self, layer, path):
        if layer.feature_group_count != 1:
            raise errors.LayerError(f"{path} has groups, so that it is no one matrix")
        return View(rows=(0, 1), columns=(2,))

    def project(self, layer, x, M):
        window = M.reshape(*layer.kernel_size, layer.in_features, -1)
        return jax.lax.conv_general_dilated(x, window, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))

    def spread(self, layer, z, E):
        return z @ E


class EquinoxWindow(Kind):
    classes = (eqx.nn.Conv1d,)

    def view(self, layer, path):
        return View(rows=(1, 2), columns=(0,))

    def project(self, layer, x, M):
        window = M.T.reshape(-1, layer.in_channels, *layer.kernel_size)
        return jax.lax.conv_general_dilated(x[None], window, (1,), [(1, 1)])[0]

    def spread(self, layer, z, E):
        return E.T @ z


class Turned(nnx.Module):
    """A linear layer whose weight is (n, d), perhaps in eight bits, a scale for each output."""

    def __init__(self, *, bits8=False):
        weight = jax.random.normal(jax.random.key(0), (10, 12)) / 4
        scale = jnp.abs(weight).max(1, keepdims=True) / 127 if bits8 else jnp.ones(())
        self.scale = nnx.Variable(scale)
        self.weight = nnx.Param(jnp.round(weight / scale).astype("int8") if bits8 else weight)
        self.bias = None

    def __call__(self, x):
        return x @ (self.weight.get_value() * self.scale.get_value()).T


class TurnedKind(Kind):
    classes = (Turned,)

    def view(self, layer, path):
        return View(rows=(1,), columns=(0,))


class EightBits(Store):
    def holds(self, layer, name):
        return isinstance(layer, Turned) and layer.weight.dtype == "int8"

    def read(self, layer, name):
        return layer.weight.get_value() * layer.scale.get_value()

    def refusal(self, layer, name):
        return "is kept in eight bits, which would round the update away; export it by adamss.to_lora"

    def write(self, layer, name, value):
        raise AssertionError("nobody asked")


@pytest.fixture(autouse=True)
def registered():
    with contextlib.ExitStack() as stack:
        for table, entry in (
            (adamss_jax.flax.kinds, NnxWindow()),
            (adamss_jax.flax.kinds, TurnedKind()),
            (adamss_jax.flax.stores, EightBits()),
            (adamss_jax.equinox.kinds, EquinoxWindow()),
        ):
            table.register(entry)
            stack.callback(table.unregister, entry)
        yield


def inputs(*shape):
    return jax.random.normal(jax.random.key(1), shape)


MODELS = {
    "nnx": (lambda: nnx.List([nnx.Conv(6, 10, (3,), rngs=nnx.Rngs(0))]), (3, 9, 6)),
    "equinox": (lambda: [eqx.nn.Conv1d(6, 10, 3, padding=1, key=jax.random.key(0))], (6, 9)),
    "turned": (lambda: nnx.List([Turned()]), (3, 12)),
    "eight bits": (lambda: nnx.List([Turned(bits8=True)]), (3, 12)),
}


@pytest.fixture(params=MODELS)
def case(request):
    make, shape = MODELS[request.param]
    return make, inputs(*shape)


def filled(model, config=CONFIG, mask=(True, False, True, True)):
    """Return the model, adapted, with other values of C than zero and a frozen subspace."""
    backend = backend_for(model)
    model = adamss.attach(model, config)
    adaptation = backend.adaptation(model)
    f = adaptation.layers["0"]
    within = jnp.arange(f.C.shape[0])[:, None] < f.ranks[f.labels][None]
    f = f._replace(C=jnp.where(within, 0.3 * inputs(*f.C.shape), 0), active=jnp.asarray(mask))
    return put(backend, adamss.detach(model), {"0": f}, adaptation.shapes, config=config, saved={})


def test_starts_equal_computes_the_update_and_travels(case, tmp_path):
    make, x = case
    base = make()[0](x)
    assert jnp.array_equal(adamss.attach(make(), CONFIG)[0](x), base)
    model = filled(make())
    y = model[0](x)
    assert float(jnp.abs(y - base).max()) > 0.1
    adamss.save(model, tmp_path / "a.safetensors")
    loaded = adamss.load(make(), tmp_path / "a.safetensors")
    assert_agrees(loaded[0](x), y, dtype="float32", what="loaded", scale=10)
    assert jnp.array_equal(adamss.detach(model)[0](x), base)


@pytest.mark.parametrize("name", ["nnx", "equinox", "turned"])
def test_merges_and_consolidates(name):
    make, shape = MODELS[name]
    model, x = filled(make()), inputs(*shape)
    y = model[0](x)
    for verb in (adamss.consolidate, adamss.merge):
        model = verb(model)
        assert_agrees(model[0](x), y, dtype="float32", what=verb.__name__, scale=10)
        with adamss.disabled(model) as base:
            assert jnp.array_equal(base[0](x), make()[0](x))
    assert jnp.array_equal(adamss.unmerge(model)[0](x), y)


@pytest.mark.parametrize("name", ["nnx", "equinox"])
@pytest.mark.parametrize("config", [CONFIG, REVIVES], ids=["one-way", "revive"])
def test_gradients_are_those_of_the_updated_weight(name, config):
    """None reaches a frozen subspace, unless it may return."""
    make, shape = MODELS[name]
    model, x = filled(make(), config), inputs(*shape)
    backend = backend_for(model)
    f = backend.adaptation(model).layers["0"]
    site = backend.site(backend.modules(model)["0"], "0")
    weight = backend.own_arrays(site)[site.kind.weight]

    def by_hand(B, C):
        delta = site.view.array(core.delta(f._replace(B=B, C=C)), weight.shape)
        layer = make()[0]
        if name == "nnx":
            layer.kernel.set_value(weight + delta)
        else:
            layer = eqx.tree_at(lambda layer: layer.weight, layer, weight + delta)
        return jnp.sum(jnp.square(layer(x)))

    if name == "nnx":
        found = nnx.grad(lambda m: jnp.sum(jnp.square(m[0](x))), argnums=nnx.DiffState(0, nnx.LoRAParam))(
            model
        )
    else:
        trained, rest = eqx.partition(model, adamss_jax.equinox.trainable_filter(model))
        found = jax.grad(lambda t: jnp.sum(jnp.square(eqx.combine(t, rest)[0](x))))(trained)
    masks = core.trained_elements(f) if config is CONFIG else (True, True)
    expected = jax.grad(by_hand, argnums=(0, 1))(f.B, f.C)
    within = jnp.arange(f.C.shape[0])[:, None] < f.ranks[f.labels][None]
    for actual, gradient, mask, real in zip(
        jax.tree.leaves(found), expected, masks, (True, within), strict=True
    ):
        gradient = jnp.where(mask & real, gradient, 0)
        assert_agrees(
            actual, gradient, dtype="float32", what="gradient", scale=float(jnp.abs(gradient).max()) * 10
        )
        assert not np.any(np.asarray(actual)[np.broadcast_to(~np.asarray(mask), actual.shape)])


def test_an_overflow_of_the_projection_does_not_reach_the_output():
    """Law 1: with C = 0 the output is the base's, for every input for which that is finite."""
    model = MODELS["nnx"][0]()
    kernel = model[0].kernel
    kernel.set_value(jnp.full_like(kernel.get_value(), 1e-30))
    x = jnp.full((1, 4, 6), 3e38)
    expected = model[0](x)
    assert jnp.array_equal(adamss.attach(model, CONFIG)[0](x), expected)


def test_what_cannot_be_written_is_refused_with_the_reason_of_its_store():
    model, x = filled(MODELS["eight bits"][0]()), inputs(3, 12)
    y = model[0](x)
    for verb in (adamss.merge, adamss.consolidate, adamss.merge_and_unload):
        with pytest.raises(errors.LayerError, match=r"^0: its weight is kept in eight bits.*adamss\.to_lora"):
            verb(model)
    assert jnp.array_equal(model[0](x), y)
    assert model[0].weight.dtype == "int8"


def test_a_kind_may_refuse_a_layer():
    model = nnx.List([nnx.Conv(6, 6, (3,), feature_group_count=2, rngs=nnx.Rngs(0))])
    with pytest.raises(errors.LayerError, match="0 has groups"):
        adamss.attach(model, CONFIG)
