"""Test that all kinds of layers in NNX and Equinox behave alike, and that other kinds and stores can be added."""

import contextlib
from dataclasses import dataclass
from functools import cache, partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax_helpers import inputs, train

import adamss
import adamss_jax
import adamss_jax.equinox
import adamss_jax.flax
from adamss import core, errors
from adamss.backend import Kind, Store, View, backend_for
from adamss.backend.ledger import put
from adamss.backend.sites import owner_of
from adamss_conformance import assert_agrees

CONFIG = adamss.AdamssConfig(targets="0", rank=6, subspaces=3, subspace_rank=2)
REVIVES = adamss.BudgetConfig(target=1, end_step=2, revive=True)


def config(**changes):
    return adamss.AdamssConfig(**(CONFIG.to_dict() | changes))


# ---- kinds from outside ------------------------------------------------------------------------------


class Turned(nnx.Module):
    """A linear layer whose weight is (n, d), optionally in eight bits with a scale for each output."""

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
    """`nnx.ConvTranspose` over one axis, which maps every input to a window of outputs; `adamss` refuses it."""

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


@dataclass(frozen=True, eq=False)
class Case:
    """A layer, which a model has at the path ``0``.

    Attributes
    ----------
    make : callable
        ``(dtype, key) -> layer``: makes a layer with parameters of this dtype.
    run : callable
        ``(layer, x) -> y``: calls the layer.
    x : jax.Array
        Input of the layer.
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
    """Return the case of two layers whose arrays share a leading axis, as `scan` and `vmap` over layers need."""

    def make(dtype, key):
        return vmap(lambda key: case.make(dtype, key))(jax.random.split(key))

    return Case(make, vmap(case.run, in_axes=(axis, None)), case.x)


# test_stacks.py tests stacks of `nnx.Linear`.
STACKED = {name: stacked(case, nnx.vmap, 0) for name, case in NNX.items() if "Linear" not in name} | {
    name: stacked(case, eqx.filter_vmap, eqx.if_array(0)) for name, case in EQUINOX.items()
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


@cache
def moved(case, settings, dtype, mask):
    """Return factors with random C and, if given, this mask of active subspaces, and the shapes of the layers."""
    model = adamss.attach(case.model(dtype), settings)
    adaptation, layers = backend_for(model).bank(model).only(), {}
    for seed, (path, f) in enumerate(adaptation.layers.items()):
        within = jnp.arange(f.C.shape[0])[:, None] < f.ranks[f.labels][None]
        C = jnp.where(within, 0.3 * inputs(*f.C.shape, seed=seed), 0).astype(f.C.dtype)
        layers[path] = f._replace(C=C, active=f.active if mask is None else jnp.asarray(mask))
    return layers, adaptation.shapes


def filled(case, settings=CONFIG, dtype="float32", mask=(True, False, True)):
    """Return a model of the case with the factors of `moved`."""
    layers, shapes = moved(case, settings, dtype, mask)
    model = case.model(dtype)
    return put(backend_for(model), model, layers, shapes, config=settings, saved={})


def parted(model):
    """Return the trained arrays of a model, its other arrays, and a function that rebuilds the model from both."""
    if isinstance(model, nnx.Module):
        graph, trained, rest = nnx.split(model, nnx.LoRAParam, ...)
        return trained, rest, partial(nnx.merge, graph, copy=True)
    adapted = bool(backend_for(model).bank(model))
    trained, rest = eqx.partition(model, adapted and adamss_jax.equinox.trainable_filter(model))
    arrays, rest = eqx.partition(rest, eqx.is_array)
    return trained, arrays, lambda trained, arrays: eqx.combine(trained, arrays, rest)


def dense(adapted, model):
    """Return a model without adapters, with W + delta in place of each weight that `adapted` adapts."""
    backend = backend_for(adapted)
    modules = backend.modules(model)
    for path, f in backend.bank(adapted).only().layers.items():
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
    """Check the gradients of B, C and the input. Frozen subspaces get none, unless the budget may revive them."""
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
    """Training resumes bit for bit from a training file."""
    total = 3 * len(adamss.summary(adamss.attach(case.model(), CONFIG)).rows)
    settings = config(budget=adamss.BudgetConfig(target=total - 1, end_step=2))
    model = adamss.attach(case.model(), settings)
    loop = train(model, case.loss, case.x, tx=adamss_jax.budgeted(optax.adam(0.05), model), steps=3)
    model = loop.synchronise()
    layers = backend_for(model).bank(model).only().layers
    assert sum(int(f.active.sum()) for f in layers.values()) == total - 1
    y = case.run(model[0], case.x)
    assert float(jnp.square(y).sum()) < case.loss(case.model(), case.x)
    for training in (False, True):
        adamss.save(model, tmp_path / "a.safetensors", training=training)
        loaded = adamss.load(case.model(), tmp_path / "a.safetensors")
        close(case.run(loaded[0], case.x), y, "from a file")
    for path, factors in backend_for(loaded).bank(loaded).only().layers.items():
        assert all(map(np.array_equal, factors, layers[path])), path


@pytest.mark.parametrize("name", STACKED)
def test_a_stack_is_many_layers(name):
    """Each layer of a stack has its own factors, and everything that holds for a single layer holds for it."""
    case = STACKED[name]
    start = case.model()
    base = case.run(start[0], case.x)
    model = adamss.attach(start, CONFIG)
    assert jnp.array_equal(case.run(model[0], case.x), base)
    paths = [row.path for row in adamss.summary(model).rows]
    assert paths == [f"{owner}[{i}]" for owner in dict.fromkeys(map(owner_of, paths)) for i in range(2)]
    check_gradients(case, CONFIG)
    check_merging(case)


# ---- what some kinds do ------------------------------------------------------------------------------

WINDOWS = st.integers(1, 3).flatmap(
    lambda axes: st.fixed_dictionaries(
        {
            name: st.tuples(*[sizes] * axes)
            for name, sizes in {
                "window": st.integers(1, 3),
                "stride": st.integers(1, 2),
                "dilation": st.integers(1, 2),
                "input_dilation": st.integers(1, 2),
                "pads": st.tuples(st.integers(0, 2), st.integers(0, 2)),
            }.items()
        }
    )
)


def check_convolution(case):
    model = case.model()
    base = case.run(model[0], case.x)
    assert jnp.array_equal(case.run(adamss.attach(model, CONFIG)[0], case.x), base)
    model = filled(case, config(subspaces=2), mask=None)
    close(case.run(model[0], case.x), case.run(dense(model, case.model())[0], case.x), "output")


@settings(max_examples=8)
@given(
    WINDOWS, st.sampled_from(["SAME", "VALID", "CIRCULAR", "REFLECT", "CAUSAL", "pads"]), st.integers(0, 2)
)
def test_convolutions_of_nnx(w, padding, batch_axes):
    padding = w["pads"] if padding == "pads" else padding
    assume(padding != "CAUSAL" or len(w["window"]) == 1)
    make = partial(
        nnx.Conv,
        2,
        5,
        w["window"],
        w["stride"],
        padding=padding,
        kernel_dilation=w["dilation"],
        input_dilation=w["input_dilation"] if padding == w["pads"] else 1,  # for Flax only with numeric pads
        use_bias=batch_axes > 0,
    )
    check_convolution(of_nnx(make, inputs(*[2] * batch_axes, *[6] * len(w["window"]), 2)))


@settings(max_examples=8)
@given(
    WINDOWS,
    st.sampled_from(["SAME", "SAME_LOWER", "VALID", "pads"]),
    st.sampled_from(["ZEROS", "REFLECT", "REPLICATE", "CIRCULAR"]),
)
def test_convolutions_of_equinox(w, padding, mode):
    axes, padding = len(w["window"]), w["pads"] if padding == "pads" else padding
    make = partial(
        eqx.nn.Conv, axes, 2, 5, w["window"], w["stride"], padding, w["dilation"], padding_mode=mode
    )
    check_convolution(of_equinox(make, inputs(2, *[6] * axes)))


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (partial(nnx.Conv, 6, 8, 3, dtype="bfloat16"), inputs(2, 5, 6)),
        (partial(nnx.Conv, 6, 8, 3, dtype="bfloat16", preferred_element_type="float32"), inputs(2, 5, 6)),
        (partial(nnx.Conv, 6, 8, 3), inputs(2, 5, 6, dtype="bfloat16")),
        (partial(nnx.Conv, 6, 8, 3), IDS[..., None] + jnp.arange(6)),
        (partial(nnx.Embed, 11, 8, dtype="bfloat16"), IDS.astype("uint8")),
        (partial(nnx.Embed, 1, 8), IDS),
        (partial(nnx.Embed, 11, 8), IDS + 5),
    ],
    ids=["half", "wide sums", "half input", "integers", "half rows", "one row", "ids out of range"],
)
def test_dtypes_are_promoted_as_by_the_layer(make, x):
    case = of_nnx(make, x)
    model = case.model()
    base = case.run(model[0], x)
    start = case.run(adamss.attach(model, CONFIG)[0], x)
    assert start.dtype == base.dtype
    assert jnp.array_equal(start, base, equal_nan=True)
    model = filled(case, mask=None)
    y, expected = case.run(model[0], x), case.run(dense(model, case.model())[0], x)
    assert y.dtype == base.dtype
    known = jnp.isfinite(expected)
    assert jnp.array_equal(jnp.isfinite(y), known)
    close(
        jnp.where(known, y, 0),
        jnp.where(known, expected, 0),
        "output",
        jnp.dtype(model[0].dtype or "float32").name,
    )


SAME_LAYERS = {
    "1d": (partial(eqx.nn.Conv1d, 6, 8, 3), partial(nnx.Conv, 6, 8, 3, padding="VALID"), inputs(6, 5)),
    "3d": (
        partial(eqx.nn.Conv3d, 2, 8, (2, 1, 3)),
        partial(nnx.Conv, 2, 8, (2, 1, 3), padding="VALID"),
        inputs(2, 4, 2, 3),
    ),
    "embedding": (partial(eqx.nn.Embedding, 11, 8), partial(nnx.Embed, 11, 8), jnp.asarray(3)),
}


@pytest.mark.parametrize("name", SAME_LAYERS)
def test_files_travel_between_libraries(name, tmp_path):
    """Files have the orientation of PyTorch's weights, also for the arrays of `modules_to_save`."""
    make, other, x = SAME_LAYERS[name]
    here, there = of_equinox(make, x), of_nnx(other, x)
    weight, twin = here.model()[0].weight, there.model()
    kernel = weight if name == "embedding" else jnp.moveaxis(weight, (0, 1), (-1, -2))
    (twin[0].embedding if name == "embedding" else twin[0].kernel).set_value(kernel)
    if name != "embedding":
        twin[0].bias.set_value(here.model()[0].bias.reshape(-1))
    W = weight if name == "embedding" else weight.reshape(8, -1).T
    for model in (here.model(), twin):
        backend = backend_for(model)
        site = backend.site(backend.modules(model)["0"], "0")
        assert jnp.array_equal(site.weight(backend.own_arrays(site)).W, W)
        arrays = backend.arrays(backend.modules(model)["0"])
        assert jnp.array_equal(arrays["weight"], weight)
        assert "bias" not in arrays or arrays["bias"].shape == (8,)
    model = filled(here)
    adamss.save(model, tmp_path / "a.safetensors")
    loaded = adamss.load(twin, tmp_path / "a.safetensors")
    close(jnp.moveaxis(loaded[0](jnp.moveaxis(x, 0, -1) if x.ndim else x), -1, 0), model[0](x), "there")


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (NNX["nnx.MultiHeadAttention"].model, ["query", "key", "value", "out"]),
        (
            EQUINOX["equinox.nn.MultiheadAttention"].model,
            ["query_proj", "key_proj", "value_proj", "output_proj"],
        ),
    ],
    ids=["nnx", "equinox"],
)
def test_an_attention_means_its_four_projections(model, names):
    def paths(*targets):
        return [row.path for row in adamss.summary(adamss.attach(model(), config(targets=targets))).rows]

    assert sorted(paths("0")) == sorted(paths("0", names[0])) == sorted(f"0.{name}" for name in names)
    assert paths(names[0], f"0.{names[3]}") == [
        path for path in paths("0") if path[2:] in (names[0], names[3])
    ]


def test_layers_within_a_recurrent_cell():
    make = lambda param_dtype, rngs: nnx.RNN(nnx.GRUCell(6, 8, param_dtype=param_dtype, rngs=rngs))  # noqa: E731
    case = of_nnx(make, inputs(2, 5, 6))
    base = case.run(case.model()[0], case.x)
    model = filled(case, config(targets=["dense_i", "dense_h"]))
    y = case.run(model[0], case.x)
    assert float(jnp.abs(y - base).max()) > 0.1
    close(y, case.run(dense(model, case.model())[0], case.x), "output")


def test_an_embedding_changes_alone_and_not_the_head_that_has_its_weight():
    case, x = NNX["nnx.Embed"], inputs(2, 8)
    head = case.model()[0].attend(x)
    model = filled(case)

    def attend(model):
        with pytest.warns(errors.AdamssWarning, match="attend of an adapted nnx.Embed .* head of the base"):
            return model[0].attend(x)

    assert jnp.array_equal(attend(model), head)
    for verb in (adamss.consolidate, adamss.merge):
        verb(model)
        close(attend(model), head, verb.__name__)
        with adamss.disabled(model):
            assert jnp.array_equal(model[0].attend(x), head)
    assert jnp.array_equal(attend(adamss.unmerge(model)), head)
    assert jnp.array_equal(adamss.detach(model)[0].attend(x), head)


class Head(nnx.Module):
    def __init__(self, embedding):
        self.weight = embedding

    def __call__(self, x):
        return x @ self.weight.get_value().T


def test_a_head_that_shares_the_embedding_is_told_of_and_keeps_it_from_merging():
    embed = nnx.Embed(11, 8, rngs=nnx.Rngs(0))
    model, x = nnx.Dict(embed=embed, head=Head(embed.embedding)), inputs(2, 8)
    head = model.head(x)
    with pytest.warns(errors.AdamssWarning, match=r"^attach: embed\.weight is one tensor with head\.weight"):
        adamss.attach(model, config(targets=["embed"]))
    assert jnp.array_equal(model.head(x), head)
    with pytest.raises(errors.LayerError, match=r"^embed: its embedding is shared with another layer"):
        adamss.merge(model)


def shared(key):
    pair = eqx.nn.Embedding(11, 8, key=key), eqx.nn.Linear(8, 11, key=key)
    return eqx.nn.Shared(pair, lambda pair: pair[1].weight, lambda pair: pair[0].weight)


RNGS, KEY, OUTPUTS = nnx.Rngs(0), jax.random.key(0), jnp.tril(jnp.ones((3, 6, 6)))
REFUSED = {
    "groups": (
        lambda: nnx.Conv(6, 6, 3, feature_group_count=2, rngs=RNGS),
        "0: its 2 groups .*without groups",
    ),
    "depthwise": (lambda: nnx.Conv(6, 6, 3, feature_group_count=6, rngs=RNGS), "0: its 6 groups"),
    "mask": (
        lambda: nnx.Conv(6, 6, 3, mask=OUTPUTS, rngs=RNGS),
        "0: its mask hides inputs from some outputs",
    ),
    "transposed": (lambda: nnx.ConvTranspose(6, 6, 3, rngs=RNGS), "0 is a ConvTranspose, a .*nnx.Conv and"),
    "lora": (lambda: nnx.LoRA(6, 2, 6, rngs=RNGS), "0 is a LoRA, which is an adapter"),
    "weight norm": (
        lambda: nnx.WeightNorm(nnx.Linear(6, 6, rngs=RNGS), rngs=RNGS),
        r"0\.layer_instance lies in a WeightNorm",
    ),
    "spectral norm": (
        lambda: nnx.SpectralNorm(nnx.Conv(6, 6, 3, rngs=RNGS), rngs=RNGS),
        r"0\.layer_instance lies in a SpectralNorm",
    ),
    "batch norm": (lambda: nnx.BatchNorm(6, rngs=RNGS), "0 is a BatchNorm, .*Conv"),
    "equinox, groups": (
        lambda: eqx.nn.Conv2d(6, 6, 3, groups=3, key=KEY),
        "0: its 3 groups .*without groups",
    ),
    "equinox, transposed": (
        lambda: eqx.nn.ConvTranspose1d(6, 6, 3, key=KEY),
        "0 is a ConvTranspose1d, a tra",
    ),
    "equinox, gru": (lambda: eqx.nn.GRUCell(6, 8, key=KEY), "0 is a GRUCell, whose weight_ih .*Linear"),
    "equinox, lstm": (lambda: eqx.nn.LSTMCell(6, 8, key=KEY), "0 is a LSTMCell, whose weight_ih"),
    "equinox, weight norm": (
        lambda: eqx.nn.WeightNorm(eqx.nn.Linear(6, 6, key=KEY)),
        r"0\.layer lies in a WeightNorm",
    ),
    "equinox, shared": (
        lambda: shared(KEY),
        r"0 is an equinox\.nn\.Shared that gives the weight of an adapted",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_adapted_is_refused_by_name_with_the_reason(name):
    make, message = REFUSED[name]
    layer = make()
    model = nnx.List([layer]) if isinstance(layer, nnx.Module) else [layer]
    within = {
        "weight norm": r"0\.layer(_instance)?",
        "spectral norm": r"0\.layer_instance",
        "shared": r"0\.pytree\.0",
    }
    with pytest.raises((errors.LayerError, errors.LayerTypeError), match=f"^{message}"):
        adamss.attach(model, config(targets=within.get(name.removeprefix("equinox, "), "0")))
    assert type(model[0]) is type(layer)


class Twice(nnx.Conv):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Scaled(nnx.Embed):
    def __call__(self, x):
        return 3 * super().__call__(x)


class TwiceOfEquinox(eqx.nn.Conv1d):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Biased(eqx.nn.Embedding):
    def __call__(self, x):
        return 1 + super().__call__(x)


@pytest.mark.parametrize(
    ("case", "right"),
    [
        (of_nnx(partial(Twice, 6, 8, 3), inputs(2, 5, 6)), False),
        (of_nnx(partial(Scaled, 11, 8), IDS), False),
        (of_equinox(partial(TwiceOfEquinox, 6, 8, 3), inputs(6, 5)), False),
        (of_equinox(partial(Biased, 11, 8), IDS[0], each), True),
    ],
)
def test_a_forward_of_its_own_is_tried_before_and_after_merging(case, right):
    model = filled(case)
    y = case.run(model[0], case.x)
    told = (
        contextlib.nullcontext()
        if right
        else pytest.raises(errors.LayerError, match=r"^0: its forward is not that")
    )
    with told:
        model = adamss.merge(model)
    close(case.run(model[0], case.x), y, "merged, or left as it was")


@pytest.mark.parametrize("name", EQUINOX)
def test_sizes_of_an_adapted_layer_of_equinox_are_those_of_the_frozen_one(name):
    layer = EQUINOX[name].model()[0]
    adapted = adamss.attach([layer], CONFIG)[0]
    for field, description in layer.__dataclass_fields__.items():
        if description.metadata.get("static"):
            assert getattr(adapted, field) == getattr(layer, field)
    if hasattr(layer, "weight"):
        with pytest.raises(AttributeError, match=r"'weight' of its own.*adamss\.merge_and_unload"):
            adapted.weight  # noqa: B018


@pytest.mark.parametrize("name", ["nnx.Conv, 1d", "equinox.nn.Conv1d"])
def test_an_overflow_of_the_projection_does_not_reach_the_output(name):
    """Law 1: with C = 0 the output is that of the base, for every input for which the base's output is finite."""
    case = SINGLE[name]
    model, x = case.model(), jnp.full_like(case.x, 3e38)
    if name.startswith("nnx"):
        model[0].kernel.set_value(jnp.full_like(model[0].kernel.get_value(), 1e-30))
    else:
        model[0] = eqx.tree_at(lambda layer: layer.weight, model[0], jnp.full_like(model[0].weight, 1e-30))
    expected = case.run(model[0], x)
    assert jnp.all(jnp.isfinite(expected))
    assert jnp.array_equal(case.run(adamss.attach(model, CONFIG)[0], x), expected)


@pytest.mark.parametrize("name", ["nnx.Conv, 1d", "nnx.Embed"])
def test_a_layer_that_was_resized_since_is_told_of(name):
    model = adamss.attach(SINGLE[name].model(), CONFIG)
    weight = model[0].embedding if name == "nnx.Embed" else model[0].kernel
    weight.set_value(jnp.concatenate([weight.get_value()] * 2))
    with pytest.raises(
        errors.StateError, match=r"0 has a weight of shape .*, which its adapter does not fit"
    ):
        adamss.merge(model)


def test_a_store_from_outside_is_read_and_refuses_to_be_written(registered, tmp_path):
    case = of_nnx(partial(Turned, bits8=True), inputs(2, 5, 6))
    model, base = filled(case), case.run(case.model()[0], case.x)
    assert jnp.array_equal(case.run(adamss.attach(case.model(), CONFIG)[0], case.x), base)
    y = case.run(model[0], case.x)
    close(y - base, case.x @ core.delta(backend_for(model).bank(model).only().layers["0"]), "update")
    adamss.save(model, tmp_path / "a.safetensors")
    close(case.run(adamss.load(case.model(), tmp_path / "a.safetensors")[0], case.x), y, "loaded")
    for verb in (adamss.merge, adamss.consolidate, adamss.merge_and_unload):
        with pytest.raises(errors.LayerError, match=r"^0: its weight is kept in eight bits.*adamss\.to_lora"):
            verb(model)
    assert jnp.array_equal(case.run(model[0], case.x), y)
    assert model[0].weight.dtype == "int8"


def test_all_linear_exclude_and_overrides():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.attn = nnx.MultiHeadAttention(4, 32, decode=False, rngs=rngs)
            self.fc, self.emb = nnx.Linear(32, 16, rngs=rngs), nnx.Embed(9, 32, rngs=rngs)

    config = adamss.AdamssConfig(
        targets="all-linear", exclude=["attn.key"], rank=8, subspaces=3, overrides={"fc": {"rank": 4}}
    )
    rows = adamss.summary(adamss.attach(Block(nnx.Rngs(0)), config)).rows
    assert {row.path: row.R for row in rows} == {"attn.query": 8, "attn.value": 8, "attn.out": 8, "fc": 4}


def test_a_kernel_that_another_library_keeps_is_refused_by_name():
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    model.layers[0].kernel = nnx.data(object())
    with pytest.raises(
        errors.LayerError, match=r"^layers\.0: its kernel is a builtins\.object, which no store"
    ):
        adamss.attach(model, adamss.AdamssConfig(targets=["layers.0"]))
