"""Each kind of layer of NNX and Equinox does what all kinds do; other kinds and stores are registered from outside."""

import contextlib
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax_helpers import gradient, inputs, train

import adamss
import adamss_jax
import adamss_jax.equinox
import adamss_jax.flax
from adamss import core, errors
from adamss.backend import Kind, Store, View, backend_for
from adamss.backend.ledger import put
from adamss.backend.sites import owner_of
from adamss_conformance import assert_agrees

CONFIG = adamss.AdamssConfig(targets=["0"], rank=6, subspaces=3, subspace_rank=2)
REVIVES = adamss.BudgetConfig(target=1, end_step=2, revive=True)


def config(**changes):
    return adamss.AdamssConfig(**(CONFIG.to_dict() | changes))


# ---- kinds from outside ------------------------------------------------------------------------------


class Turned(nnx.Module):
    """A linear layer whose weight is (n, d), perhaps in eight bits, a scale for each output."""

    def __init__(self, *, bits8=False, param_dtype=jnp.float32, rngs=None):
        weight = jax.random.normal(jax.random.key(0), (8, 6), param_dtype) / 4
        scale = jnp.abs(weight).max(1, keepdims=True) / 127 if bits8 else jnp.ones((), param_dtype)
        self.scale = nnx.Variable(scale)
        self.weight = nnx.Param(jnp.round(weight / scale).astype("int8") if bits8 else weight)
        self.bias = None

    def __call__(self, x):
        return x @ (self.weight.get_value() * self.scale.get_value()).T


class TurnedKind(Kind):
    classes = (Turned,)

    def view(self, layer, path):
        return View(rows=(1,), columns=(0,))


class TransposedKind(Kind):
    """`nnx.ConvTranspose` over one axis, which is refused otherwise: every input gives a window of outputs."""

    classes = (nnx.ConvTranspose,)
    weight = "kernel"

    def view(self, layer, path):
        return View(rows=(1,), columns=(0, 2))

    def spread(self, layer, z, E):
        window = jnp.moveaxis(E.reshape(-1, *layer.kernel_size, layer.out_features), 0, 1)
        return jax.lax.conv_transpose(z, window, (1,), "SAME")


class EightBits(Store):
    def holds(self, layer, name):
        return isinstance(layer, Turned) and layer.weight.dtype == "int8"

    def read(self, layer, name):
        return layer.weight.get_value() * layer.scale.get_value()

    def refusal(self, layer, name):
        return "is kept in eight bits, which would round the update away; export it by adamss.to_lora"

    def write(self, layer, name, value):
        raise AssertionError("nobody asked")


@pytest.fixture
def registered():
    with contextlib.ExitStack() as stack:
        for table, entry in (
            (adamss_jax.flax.kinds, TurnedKind()),
            (adamss_jax.flax.kinds, TransposedKind()),
            (adamss_jax.flax.stores, EightBits()),
        ):
            table.register(entry)
            stack.callback(table.unregister, entry)
        yield


# ---- the table ---------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A layer, which a model holds at the path ``0``.

    Attributes
    ----------
    make
        Returns a layer, from the dtype of its parameters and a key.
    run
        Returns what a layer computes from `x`.
    x
        Input.
    """

    make: object
    run: object
    x: jax.Array

    def x_in(self, dtype):
        return self.x.astype(dtype) if jnp.issubdtype(self.x.dtype, jnp.inexact) else self.x

    def model(self, dtype="float32"):
        layer = self.make(dtype, jax.random.key(0))
        return nnx.List([layer]) if isinstance(layer, nnx.Module) else [layer]

    def loss(self, model, x):
        return jnp.sum(jnp.square(self.run(model[0], x).astype("float32")))


def call(layer, x):
    return layer(x)


def each(layer, x):
    return jax.vmap(layer)(x)


def of_nnx(make, x):
    return Case(lambda dtype, key: make(param_dtype=dtype, rngs=nnx.Rngs(key)), call, x)


def of_equinox(make, x, run=call):
    return Case(lambda dtype, key: make(dtype=jnp.dtype(dtype), key=key), run, x)


IDS = jnp.asarray([[0, 3, 3], [10, -2, 1]])
ROWS_KEPT = jnp.asarray([1.0, 0.0, 1.0])[:, None, None] * jnp.ones((3, 6, 8))

NNX = {
    "nnx.Linear": of_nnx(partial(nnx.Linear, 6, 8), inputs(2, 5, 6)),
    "nnx.LinearGeneral": of_nnx(
        partial(nnx.LinearGeneral, (2, 3), (4, 2), axis=(-2, -1)), inputs(2, 5, 2, 3)
    ),
    "nnx.Einsum": of_nnx(partial(nnx.Einsum, "...ab,abc->...c", (2, 3, 8), (8,)), inputs(2, 5, 2, 3)),
    "nnx.Conv, 1d": of_nnx(partial(nnx.Conv, 6, 8, 3), inputs(2, 5, 6)),
    "nnx.Conv, 1d, masked": of_nnx(partial(nnx.Conv, 6, 8, 3, mask=ROWS_KEPT), inputs(2, 5, 6)),
    "nnx.Conv, 2d": of_nnx(
        partial(nnx.Conv, 3, 8, (2, 3), 2, kernel_dilation=(1, 2), padding="CIRCULAR"), inputs(2, 7, 6, 3)
    ),
    "nnx.Conv, 3d": of_nnx(partial(nnx.Conv, 2, 8, (2, 1, 2), padding="VALID"), inputs(4, 2, 3, 2)),
    "nnx.Embed": of_nnx(partial(nnx.Embed, 11, 8), IDS),
    "nnx.MultiHeadAttention": of_nnx(partial(nnx.MultiHeadAttention, 2, 6, decode=False), inputs(2, 5, 6)),
}
EQUINOX = {
    "equinox.nn.Linear": of_equinox(partial(eqx.nn.Linear, 6, 8), inputs(5, 6), each),
    "equinox.nn.Conv1d": of_equinox(partial(eqx.nn.Conv1d, 6, 8, 3, padding=1), inputs(6, 5)),
    "equinox.nn.Conv2d": of_equinox(
        partial(eqx.nn.Conv2d, 3, 8, (2, 3), 2, "SAME", (1, 2), padding_mode="REFLECT"), inputs(3, 7, 6)
    ),
    "equinox.nn.Conv3d": of_equinox(partial(eqx.nn.Conv3d, 2, 8, (2, 1, 2)), inputs(2, 4, 2, 3)),
    "equinox.nn.Embedding": of_equinox(partial(eqx.nn.Embedding, 11, 8), IDS[1], each),
    "equinox.nn.MultiheadAttention": of_equinox(
        partial(eqx.nn.MultiheadAttention, 2, 6), inputs(5, 6), lambda layer, x: layer(x, x, x)
    ),
}
OUTSIDE = {
    "of outside, linear": of_nnx(Turned, inputs(2, 5, 6)),
    "of outside, nnx.ConvTranspose": of_nnx(partial(nnx.ConvTranspose, 6, 4, 2), inputs(2, 5, 6)),
}


def stacked(case, vmap, axis):
    """Return two layers whose arrays share a leading axis, as `scan` and `vmap` over layers want them."""

    def make(dtype, key):
        return vmap(lambda key: case.make(dtype, key))(jax.random.split(key))

    return Case(make, vmap(case.run, in_axes=(axis, None)), case.x)


STACKED = {f"stack of {name}": stacked(case, nnx.vmap, 0) for name, case in NNX.items()} | {
    f"stack of {name}": stacked(case, eqx.filter_vmap, eqx.if_array(0)) for name, case in EQUINOX.items()
}
SINGLE = NNX | EQUINOX | OUTSIDE


@pytest.fixture(params=SINGLE)
def case(request, registered):
    return SINGLE[request.param]


def node(model, path):
    """Return the module that holds the arrays of a layer."""
    for name in owner_of(path).split("."):
        model = model[int(name)] if name.isdigit() else getattr(model, name)
    return model


def filled(case, settings=CONFIG, dtype="float32"):
    """Return an adapted model with other values of C than zero, and a frozen subspace in every layer."""
    model = adamss.attach(case.model(dtype), settings)
    backend, layers = backend_for(model), {}
    adaptation = backend.adaptation(model)
    for seed, (path, f) in enumerate(adaptation.layers.items()):
        within = jnp.arange(f.C.shape[0])[:, None] < f.ranks[f.labels][None]
        C = jnp.where(within, 0.3 * inputs(*f.C.shape, seed=seed), 0).astype(f.C.dtype)
        layers[path] = f._replace(C=C, active=jnp.asarray([True, False, True]))
    return put(backend, case.model(dtype), layers, adaptation.shapes, config=settings, saved={})


def parted(model):
    """Return the trained arrays of a model, the others, and the function that makes the model of both."""
    if isinstance(model, nnx.Module):
        graph, trained, rest = nnx.split(model, nnx.LoRAParam, ...)
        return trained, rest, partial(nnx.merge, graph, copy=True)
    adapted = backend_for(model).adaptation(model) is not None
    trained, rest = eqx.partition(model, adapted and adamss_jax.equinox.trainable_filter(model))
    arrays, rest = eqx.partition(rest, eqx.is_array)
    return trained, arrays, lambda trained, arrays: eqx.combine(trained, arrays, rest)


def dense(adapted, model):
    """Return a model without adapters with W + delta in the place of each weight that the other one adapts."""
    backend = backend_for(adapted)
    modules = backend.modules(model)
    for path, f in backend.adaptation(adapted).layers.items():
        site, owner = backend.site(modules[path], path), owner_of(path)
        name = site.kind.weight
        W = getattr(node(model, owner), name)
        W = W.get_value() if isinstance(model, nnx.Module) else W
        delta = site.view.array(core.delta(f), W[site.index].shape)
        W = W.at[site.index].add(delta.astype(W.dtype))
        if isinstance(model, nnx.Module):
            getattr(node(model, owner), name).set_value(W)
        else:
            model = eqx.tree_at(lambda m, owner=owner, name=name: getattr(node(m, owner), name), model, W)
    return model


def close(actual, expected, what, dtype="float32", scale=None):
    scale = float(jnp.abs(expected).max()) if scale is None else scale
    assert_agrees(actual, expected, dtype=dtype, what=what, scale=10 * scale)


# ---- what all kinds do ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_starts_with_the_output_of_the_base_and_computes_with_w_and_delta(case, dtype):
    x, start = case.x_in(dtype), case.model(dtype)
    base = case.run(start[0], x)
    assert jnp.array_equal(case.run(adamss.attach(start, CONFIG)[0], x), base)
    model = filled(case, dtype=dtype)
    y = case.run(model[0], x)
    assert float(jnp.abs(y - base).max()) > 0.1
    close(y, case.run(dense(model, case.model(dtype))[0], x), "output", dtype)
    assert jnp.array_equal(case.run(adamss.detach(model)[0], x), base)


def check_gradients(case, settings):
    """Check those of B, C and the input; none reaches a frozen subspace, unless it may return."""
    model = filled(case, settings)
    (trained, rest, build), (none, base, build_base) = parted(model), parted(case.model())
    argnums = (0,) if jnp.issubdtype(case.x.dtype, jnp.integer) else (0, 1)

    def adapted(trained, x, rest):
        return case.loss(build(trained, rest), x)

    def by_hand(trained, x, rest, base):
        return case.loss(dense(build(trained, rest), build_base(none, base)), x)

    value_and_grad = partial(jax.value_and_grad, argnums=argnums)
    y, found = jax.jit(value_and_grad(adapted))(trained, case.x, rest)
    expected_y, expected = jax.jit(value_and_grad(by_hand))(trained, case.x, rest, base)
    close(y, expected_y, "loss")
    masks = backend_for(model).trained_elements(model)
    masks = [True if settings.budget else mask for mask in jax.tree.leaves(masks)]
    expected = jax.tree.leaves(expected)
    largest = max(float(jnp.abs(each).max()) for each in expected)
    for actual, each, mask in zip(jax.tree.leaves(found), expected, [*masks, True], strict=False):
        close(actual, jnp.where(mask, each, 0), "gradient", scale=largest)


def test_gradients_are_those_of_the_updated_weight(case):
    check_gradients(case, CONFIG)


@pytest.mark.parametrize("name", ["nnx.Conv, 2d", "nnx.Embed", "equinox.nn.Conv2d", "equinox.nn.Embedding"])
def test_a_frozen_subspace_that_may_return_gets_gradients(name):
    check_gradients(SINGLE[name], config(basis="per_subspace", budget=REVIVES))


def test_jit_vmap_and_remat_change_nothing(case):
    model, xs = filled(case), jnp.stack([case.x, case.x[::-1]])
    trained, rest, build = parted(model)

    def loss(trained, xs, rest):
        return jnp.sum(jax.vmap(lambda x: case.loss(build(trained, rest), x))(xs))

    y, gradients = jax.jit(jax.value_and_grad(loss))(trained, xs, rest)
    close(y, sum(case.loss(model, x) for x in xs), "vmap")
    again = jax.jit(jax.grad(jax.checkpoint(loss)))(trained, xs, rest)
    for a, b in zip(*map(jax.tree.leaves, (gradients, again)), strict=True):
        close(a, b, "remat")


def check_merging(case):
    model, x = filled(case), case.x
    base, y = case.run(case.model()[0], x), case.run(model[0], x)
    for verb in (adamss.consolidate, adamss.merge):
        model = verb(model)
        close(case.run(model[0], x), y, verb.__name__)
        with adamss.disabled(model) as off, adamss.disabled(off) as twice:
            assert jnp.array_equal(case.run(twice[0], x), base)
    model = adamss.unmerge(model)
    assert jnp.array_equal(case.run(model[0], x), y)
    told = pytest.warns(errors.AdamssWarning, match="^0 is an nnx.Embed.*attend")
    with told if isinstance(model[0], nnx.Embed) else contextlib.nullcontext():
        plain = adamss.merge_and_unload(model)
    assert type(plain[0]) is type(case.model()[0])
    close(case.run(plain[0], x), y, "unloaded")


def test_the_weight_takes_up_the_update_and_gives_it_back(case):
    check_merging(case)


def test_trains_to_its_budget_and_goes_on_from_a_file(case, tmp_path):
    """To the bit from a file that is made for training."""
    total = 3 * len(adamss.summary(adamss.attach(case.model(), CONFIG)).rows)
    settings = config(budget=adamss.BudgetConfig(target=total - 1, end_step=2))
    model = adamss.attach(case.model(), settings)
    loop = train(model, case.loss, case.x, tx=adamss_jax.budgeted(optax.adam(0.05), model), steps=3)
    model = loop.synchronise()
    layers = backend_for(model).adaptation(model).layers
    assert sum(int(f.active.sum()) for f in layers.values()) == total - 1
    y = case.run(model[0], case.x)
    assert case.loss(model, case.x) < case.loss(case.model(), case.x)
    for training in (False, True):
        adamss.save(model, tmp_path / "a.safetensors", training=training)
        loaded = adamss.load(case.model(), tmp_path / "a.safetensors")
        close(case.run(loaded[0], case.x), y, "from a file")
    gradients = [jax.tree.leaves(gradient(case.loss, m, case.x)) for m in (model, loaded)]
    for a, b in zip(*gradients, strict=True):
        assert jnp.array_equal(a, b)


@pytest.mark.parametrize("name", STACKED)
def test_a_stack_is_many_layers(name):
    """Each has factors of its own, and all that a single layer does holds for them."""
    case = STACKED[name]
    start = case.model()
    base = case.run(start[0], case.x)
    model = adamss.attach(start, CONFIG)
    assert jnp.array_equal(case.run(model[0], case.x), base)
    paths = [row.path for row in adamss.summary(model).rows]
    assert paths == [f"{owner}[{i}]" for owner in dict.fromkeys(map(owner_of, paths)) for i in range(2)]
    check_gradients(case, CONFIG)
    check_merging(case)
