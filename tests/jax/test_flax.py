"""Test Flax NNX: its layers and models, and the transformations that users apply to them."""

import copy
import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax_helpers import agrees, config, filled, gradient, inputs, net, program, train, variables
from safetensors.numpy import load_file

import adamss
from adamss import core, errors
from adamss.core.cost import ORDERS
from adamss_conformance.tolerances import assert_agrees
from adamss_jax.flax import AdamssParam

general, einsum = partial(partial, nnx.LinearGeneral), partial(partial, nnx.Einsum)
FORMS = {
    # name: (layer, shape of the input, axes of the kernel in the order of rows and columns of W, number of row axes)
    "linear": (partial(nnx.Linear, 6, 8), (2, 6), (0, 1), 1),
    "linear of one vector": (partial(nnx.Linear, 6, 8, use_bias=False), (6,), (0, 1), 1),
    "heads": (general(6, (2, 4)), (2, 3, 6), (0, 1, 2), 1),
    "three output axes": (general(6, (2, 1, 4)), (3, 6), (0, 1, 2, 3), 1),
    "two contracted axes": (general((2, 3), 8, axis=(-2, -1)), (2, 5, 2, 3), (0, 1, 2), 2),
    "positive axis": (general(6, 8, axis=1), (3, 6, 4), (0, 1), 1),
    "axes of both signs": (general((2, 3), (4, 2), axis=(0, -1), use_bias=False), (2, 5, 3), (0, 1, 2, 3), 2),
    # Flax sorts the axes, so the first axis of the kernel belongs to the first axis of the input.
    "axes out of order": (general((2, 3), 8, axis=(-1, -2)), (5, 2, 3), (0, 1, 2), 2),
    "BTD,NDH->BTNH": (einsum("BTD,NDH->BTNH", (2, 6, 4), (2, 4)), (2, 3, 6), (1, 0, 2), 1),
    # The bias has the order of the output axes, whatever shape was given.
    "BTD,NDH->BTHN": (einsum("BTD,NDH->BTHN", (2, 6, 4), (2, 4)), (2, 3, 6), (1, 2, 0), 1),
    "...d,df->...f": (einsum("...d, df -> ...f", (6, 8), (8,)), (2, 3, 6), (0, 1), 1),
    "d...,df->f...": (einsum("d...,df->f...", (6, 8)), (6, 2, 3), (0, 1), 1),
    "BSD,CKDH->CBSKH": (einsum("BSD,CKDH->CBSKH", (2, 1, 6, 4)), (3, 2, 6), (2, 0, 1, 3), 1),
    "bthd,hdo->bto": (einsum("bthd,hdo->bto", (2, 3, 8)), (2, 4, 2, 3), (0, 1, 2), 2),
}


class Holder(nnx.Module):
    """A model with one layer."""

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return self.layer(x)


def with_bias(layer):
    """Give the bias of a layer, which starts at zero, random values."""
    if layer.bias is not None:
        layer.bias.set_value(
            jnp.asarray(np.random.default_rng(5).standard_normal(layer.bias.shape), "float32")
        )
    return layer


def add_delta(layer, factors, order, rows):
    """Add the update to kernel and bias of a layer without adapter, along explicitly given axes."""
    delta = np.asarray(core.delta(factors))
    d = int(np.prod([layer.kernel.shape[axis] for axis in order[:rows]]))
    split = delta[:d].reshape([layer.kernel.shape[axis] for axis in order])
    layer.kernel.set_value(layer.kernel.get_value() + np.transpose(split, np.argsort(order)))
    if len(delta) > d:
        layer.bias.set_value(layer.bias.get_value() + delta[d].reshape(layer.bias.shape))
    return layer


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_layer(name):
    make, shape, order, rows = FORMS[name]
    model, x = Holder(with_bias(make(rngs=nnx.Rngs(0)))), inputs(*shape)
    before, expected = variables(model), model(x)
    adamss.attach(model, config(targets=["layer"], include_bias=True))
    assert jnp.array_equal(model(x), expected)
    y = filled(model)(x)
    assert float(jnp.abs(y - expected).max()) > 0.01
    reference = add_delta(
        with_bias(make(rngs=nnx.Rngs(0))), model.layer.adamss.default.factors(), order, rows
    )
    scale = float(jnp.abs(y).max()) * 4
    agrees(y, reference(x), "outputs", scale)
    adamss.merge(model)
    agrees(model.layer.kernel.get_value(), reference.kernel.get_value(), "merged kernel")
    agrees(model(x), y, "merged outputs", scale)
    assert jnp.array_equal(adamss.unmerge(model)(x), y)
    adamss.detach(adamss.merge(model))
    assert variables(model) == before
    assert jnp.array_equal(model(x), expected)


@pytest.mark.parametrize("name", ["heads", "two contracted axes", "BSD,CKDH->CBSKH", "BTD,NDH->BTHN"])
def test_gradients_of_every_form(name):
    """Compare the gradients of C and of the input with finite differences, which are exact for a linear function."""
    make, shape, _, _ = FORMS[name]
    model, x = (
        filled(adamss.attach(Holder(make(rngs=nnx.Rngs(0))), config(targets=["layer"]))),
        inputs(*shape),
    )
    weights = inputs(*model(x).shape, seed=8)

    def value(model, x):
        return jnp.sum(weights * model(x))

    slopes, dx = nnx.grad(value, argnums=(nnx.DiffState(0, nnx.LoRAParam), 1))(model, x)
    direction = inputs(*x.shape, seed=9)
    slope = value(model, x + direction) - value(model, x)
    agrees(jnp.sum(dx * direction), slope, "slope along x", 100.0)
    C = model.layer.adamss.default.C
    direction = inputs(*C.shape, seed=9)
    before = value(model, x)
    C.set_value(C.get_value() + direction)
    agrees(
        jnp.sum(slopes.layer.adamss.default.C.get_value() * direction),
        value(model, x) - before,
        "slope",
        100.0,
    )


@pytest.mark.parametrize("kv_heads", [None, 1])
def test_multi_head_attention(kv_heads):
    def make():
        attention = nnx.MultiHeadAttention(2, 8, num_kv_heads=kv_heads, rngs=nnx.Rngs(0))
        for name in ("query", "key", "value", "out"):
            with_bias(getattr(attention, name))
        return attention

    model, x = make(), inputs(2, 5, 8)

    def run(model):
        return model(x, decode=False, is_causal=True)

    before, expected = variables(model), run(model)
    adamss.attach(model, config(targets=["query", "key", "value", "out"], include_bias=True))
    assert [row.path for row in adamss.summary(model).rows] == ["query", "key", "value", "out"]
    assert jnp.array_equal(run(model), expected)
    y = run(filled(model))
    reference = make()
    for name in ("query", "key", "value", "out"):
        add_delta(
            getattr(reference, name),
            getattr(model, name).adamss.default.factors(),
            (0, 1, 2),
            2 if name == "out" else 1,
        )
    agrees(y, run(reference), "outputs", 10.0)
    agrees(run(adamss.merge(model)), y, "merged outputs", 10.0)
    assert jnp.array_equal(run(adamss.unmerge(model)), y)
    assert variables(adamss.detach(model)) == before


def equation_at_call(rngs):
    layer = nnx.Einsum("bd,df->bf", (6, 8), rngs=rngs)
    layer.einsum_str = None
    return layer


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (einsum("BNTD,NDH->BNTH", (2, 6, 4)), r"layer: the equation 'BNTD,NDH->BNTH'"),
        (einsum("bd,dfk->bf", (6, 4, 2)), r"layer: the equation 'bd,dfk->bf'"),
        (einsum("bd,dd->b", (6, 6)), r"layer: the equation 'bd,dd->b'"),
        (einsum("bd,d...->b...", (6, 4)), r"layer: the equation"),
        (einsum("bd,f->bdf", (6,), kernel_init=nnx.initializers.ones), r"layer: the equation"),
        (equation_at_call, r"layer: its equation is given at every call"),
        (general(6, 4, batch_axis={0: 3}), r"layer: its batch_axis makes it many matrices"),
    ],
    ids=["batch axis", "summed alone", "diagonal", "ellipsis", "outer product", "at call", "batch_axis"],
)
def test_layers_that_are_no_matrix_are_refused(make, match):
    model = Holder(make(rngs=nnx.Rngs(0)))
    before = variables(model)
    with pytest.raises(errors.LayerError, match=match):
        adamss.attach(model, config(targets=["layer"]))
    assert variables(model) == before


class Shifted(nnx.Linear):
    """A user's layer with another signature."""

    def __call__(self, x, shift, *, negate=False, out_sharding=None):
        y = super().__call__(x, out_sharding=out_sharding)
        return (y - shift) if negate else (y + shift)


def test_a_users_layer_keeps_its_signature_and_class():
    model, x = Holder(Shifted(6, 8, rngs=nnx.Rngs(0))), inputs(2, 6)
    before = variables(model)
    expected = model.layer(x, 3.0, negate=True, out_sharding=None)
    adamss.attach(model, config(targets=["layer"]))
    assert isinstance(model.layer, Shifted)
    assert jnp.array_equal(model.layer(x, 3.0, negate=True, out_sharding=None), expected)
    filled(model)
    update = x @ core.delta(model.layer.adamss.default.factors())
    agrees(model.layer(x, shift=3.0, negate=True) - expected, update, "update", 10.0)
    assert jnp.array_equal(model.layer(shift=3.0, x=x), model.layer(x, 3.0))
    assert variables(adamss.detach(model)) == before
    assert type(model.layer) is Shifted


class Compiled(nnx.Linear):
    @nnx.jit
    def __call__(self, x):
        return super().__call__(x)


class Wrapped(nnx.Linear):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


@pytest.mark.parametrize(("kind", "name"), [(Compiled, "x"), (Wrapped, None), (nnx.Linear, "inputs")])
def test_layers_with_a_decorated_or_generic_call_and_keyword_inputs(kind, name):
    model, x = Holder(kind(6, 8, rngs=nnx.Rngs(0))), inputs(2, 6)
    expected = model(x)
    adamss.attach(model, config(targets=["layer"]))
    assert jnp.array_equal(model(x), expected)
    filled(model)
    agrees(model(x) - expected, x @ core.delta(model.layer.adamss.default.factors()), "update", 10.0)
    if name:
        assert jnp.array_equal(model.layer(**{name: x}), model.layer(x))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_computation_in_another_dtype_than_the_parameters(dtype):
    layer = nnx.Linear(6, 8, dtype=dtype, rngs=nnx.Rngs(0))
    model, x = Holder(layer), inputs(2, 6)
    expected = model(x)
    adamss.attach(model, config(targets=["layer"]))
    y = model(x)
    assert y.dtype == dtype
    assert jnp.array_equal(y, expected)
    filled(model)
    exact = (
        x @ (layer.kernel.get_value() + core.delta(layer.adamss.default.factors())) + layer.bias.get_value()
    )
    assert_agrees(model(x).astype("float32"), exact, dtype=jnp.dtype(dtype).name, what="outputs")
    slopes = gradient(lambda m: m(x).sum().astype("float32"), model)
    assert {leaf.dtype for leaf in jax.tree.leaves(slopes)} == {jnp.dtype("float32")}


class Pair(nnx.Module):
    def __init__(self, first, second):
        self.first, self.second = first, second

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


@pytest.mark.parametrize("targets", [["first", "second"], ["first"], ["second"], "second|first"], ids=str)
def test_a_module_that_appears_twice_is_adapted_once(targets, tmp_path):
    def make():
        layer = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        return Pair(layer, layer)

    model, x = make(), inputs(2, 8)
    before, expected = variables(model), model(x)
    adamss.attach(model, config(targets=targets))
    assert [row.path for row in adamss.summary(model).rows] == ["first"]
    assert model.first is model.second
    assert jnp.array_equal(model(x), expected)
    assert len(jax.tree.leaves(adamss.trainable_parameters(model))) == 2
    y = filled(model)(x)
    kernel = model.first.kernel.get_value() + core.delta(model.first.adamss.default.factors())
    agrees(y, jnp.tanh(x @ kernel) @ kernel, "outputs", 10.0)
    adamss.save(model, tmp_path / "a.safetensors", training=True)
    assert jnp.array_equal(adamss.load(make(), tmp_path / "a.safetensors")(x), y)
    agrees(adamss.merge(model)(x), y, "merged outputs", 10.0)
    assert variables(adamss.detach(model)) == before


def sharing():
    """Return two layers that share one kernel."""
    model = Pair(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 8, rngs=nnx.Rngs(1)))
    model.second.kernel = model.first.kernel
    return model


@pytest.mark.parametrize("verb", [adamss.merge, adamss.consolidate])
def test_a_kernel_shared_by_two_layers_cannot_be_merged(verb):
    model, x = filled(adamss.attach(sharing(), config(targets=["first"]))), inputs(2, 8)
    adamss.backend.backend_for(model).set_active(model, {"first": np.asarray([True, False, True])})
    before, y = variables(model), model(x)
    with pytest.raises(errors.LayerError, match="first: its kernel is shared with another layer"):
        verb(model)
    assert variables(model) == before
    assert jnp.array_equal(model(x), y)
    adamss.detach(model)
    assert model.second.kernel is model.first.kernel


def test_a_target_that_shares_its_kernel_with_a_saved_module():
    model = sharing()
    before = variables(model)
    with pytest.raises(errors.TargetError, match="second shares its weight"):
        adamss.attach(model, config(targets=["first"], modules_to_save=["second"]))
    assert variables(model) == before


def call(model, x):
    return model(x)


def mean_square(model, x):
    return jnp.mean(jnp.square(model(x)))


class Traced:
    """A compiled call of a model that counts how often it is traced."""

    def __init__(self):
        self.traces = 0

        @nnx.jit
        def run(model, x):
            self.traces += 1
            return model(x)

        self.run = run

    def __call__(self, model, x):
        return self.run(model, x)


def test_the_order_of_the_products_of_a_layer():
    """Setting an order compiles once more. Copies keep the order, but files do not contain it."""
    model, x, run = filled(adamss.attach(net(), config())), inputs(4, 8), Traced()
    y, programs = run(model, x), []
    for number, order in enumerate(ORDERS):
        for block in model.blocks:
            for layer in block.values():
                layer.adamss.default.order = order
        for _ in range(2):
            agrees(run(model, x), y, f"outputs by {order}", 10.0)
        assert run.traces == number + 2
        forward, arrays = program(model)
        programs.append(str(jax.make_jaxpr(forward)(arrays, x)))
    assert programs[0] != programs[1]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), nnx.clone(model)):
        assert twin.blocks[1]["value"].adamss.default.order == "input_first"
        run(twin, x)
    assert run.traces == 3
    adamss.unmerge(adamss.merge(model))
    train(model, mean_square, x)
    assert model.blocks[1]["value"].adamss.default.order == "input_first"
    model.blocks[0]["query"].adamss.default.order = "expand"
    with pytest.raises(errors.ConfigError, match="'expand'"):
        run(model, x)


def test_masks_and_merges_do_and_do_not_compile_anew():
    """A mask is an array, so changing it does not compile; merging changes the program, so it does."""
    model, x, run = filled(adamss.attach(net(), config())), inputs(4, 8), Traced()
    y = run(model, x)
    run(model, x)
    backend = adamss.backend.backend_for(model)
    backend.set_active(model, {"blocks.0.query": np.asarray([True, False, False])})
    assert jnp.array_equal(run(model, x), y)
    assert run.traces == 1
    agrees(run(adamss.merge(model), x), y, "merged outputs", 10.0)
    assert run.traces == 2
    assert jnp.array_equal(run(adamss.unmerge(model), x), y)
    assert run.traces == 2


def test_remat_gives_the_same_gradients():
    model, x = filled(adamss.attach(net(), config(modules_to_save=["classifier"]))), inputs(4, 8)

    def slopes(run):
        return jax.tree.leaves(gradient(lambda m, x: jnp.sum(jnp.square(run(m, x))), model, x))

    for ours, expected in zip(slopes(nnx.remat(call)), slopes(call), strict=True):
        agrees(ours, expected, "gradient")


def test_donated_buffers_do_not_take_the_base_along():
    model, x = net(), inputs(4, 8)
    before, expected = variables(model), model(x)
    filled(adamss.attach(model, config(modules_to_save=["classifier"])))
    y = model(x)
    adamss.merge(model)

    @jax.jit(donate_argnums=(0, 1))
    def step(trained, rest):
        return jax.tree.map(lambda leaf: leaf + 1, trained), rest

    _, trained, rest = nnx.split(model, nnx.LoRAParam, ...)
    buffers = [model.classifier.kernel.get_value(), model.blocks[0]["query"].kernel.get_value()]
    nnx.update(model, *step(trained, rest))
    assert all(buffer.is_deleted() for buffer in buffers)
    assert not jnp.array_equal(model(x), y)
    assert variables(adamss.detach(model)) == before
    assert jnp.array_equal(model(x), expected)


@pytest.mark.parametrize(
    "copy_of",
    [
        lambda model: nnx.merge(*nnx.split(model), copy=True),
        lambda model: nnx.merge(*nnx.split(model, nnx.LoRAParam, ...), copy=True),
        nnx.clone,
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
    ],
    ids=["split and merge", "split by filter", "clone", "deepcopy", "pickle"],
)
def test_copies_keep_adapters_merges_and_saved_modules(copy_of):
    model, x = net(), inputs(4, 8)
    before, base = variables(model), model(x)
    adamss.attach(model, config(modules_to_save=["classifier"]))
    model.classifier.bias.set_value(model.classifier.bias.get_value() + 1)
    adapted = filled(model)(x)
    merged = adamss.merge(copy_of(model))
    twin = copy_of(merged)
    assert jnp.array_equal(twin(x), merged(x))
    agrees(twin(x), adapted, "merged copy", 10.0)
    assert jnp.array_equal(adamss.unmerge(twin)(x), adapted)
    with adamss.disabled(twin):
        assert jnp.array_equal(twin(x), base)
    assert variables(adamss.detach(twin)) == before
    assert jnp.array_equal(model(x), adapted)


def test_a_copy_does_not_share_what_is_trained():
    model, x = filled(adamss.attach(net(), config())), inputs(4, 8)
    y = model(x)
    twin = copy.deepcopy(model)
    train(twin, mean_square, x)
    assert jnp.array_equal(model(x), y)
    assert not jnp.array_equal(twin(x), y)


def test_a_model_within_a_larger_one_is_found(tmp_path):
    model = filled(adamss.attach(net(), config(modules_to_save=["classifier"])))
    whole = Holder(nnx.Dict({"encoder": model, "other": nnx.Linear(3, 3, rngs=nnx.Rngs(0))}))
    paths = [row.path for row in adamss.summary(model).rows]
    assert [row.path for row in adamss.summary(whole).rows] == paths
    for name, target in (("whole", whole), ("part", model)):
        adamss.save(target, tmp_path / f"{name}.safetensors")
    stored, expected = load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "part.safetensors")
    assert stored.keys() == expected.keys()
    assert all(np.array_equal(stored[name], expected[name]) for name in stored)
    x = inputs(2, 8)
    y = model(x)
    agrees(adamss.merge(whole).layer["encoder"](x), y, "merged outputs", 10.0)
    adamss.unmerge(whole)
    with adamss.disabled(whole):
        assert jnp.array_equal(model(x), net()(x))
    with pytest.raises(errors.StateError, match="already"):
        adamss.attach(whole, config(targets=["other"]))
    adamss.detach(whole)
    assert variables(model) == variables(net())


@pytest.mark.parametrize("verb", [adamss.summary, adamss.merge, adamss.detach, adamss.trainable_parameters])
def test_a_part_of_an_adapted_model(verb):
    model = adamss.attach(net(), config())
    before = variables(model)
    for part in (model.blocks[0], model.blocks, model.blocks[0]["query"]):
        with pytest.raises(errors.StateError, match="adapters are attached already"):
            verb(part)
    assert variables(model) == before


def test_parts_that_were_adapted_one_by_one():
    model = net()
    for block in model.blocks:
        adamss.attach(block, config())
    with pytest.raises(errors.StateError, match="one by one"):
        adamss.summary(model)
    for block in model.blocks:
        assert [row.path for row in adamss.summary(block).rows] == ["query", "value"]


def test_disabled_nested_and_in_functions_that_were_compiled_before():
    model, x = net(), inputs(4, 8)
    base = model(x)
    adamss.attach(model, config(modules_to_save=["classifier"]))
    model.classifier.bias.set_value(model.classifier.bias.get_value() + 1)
    filled(model)
    run = nnx.jit(lambda model, x: model(x))
    compiled_base, y = run(net(), x), run(model, x)
    for prepare in (lambda m: m, adamss.merge):
        prepare(model)
        y = run(model, x)
        with adamss.disabled(model) as outer:
            assert outer is model
            assert jnp.array_equal(run(model, x), compiled_base)
            assert jnp.array_equal(model(x), base)
            with adamss.disabled(model):
                assert jnp.array_equal(run(model, x), compiled_base)
            assert jnp.array_equal(run(model, x), compiled_base)
            with pytest.raises(errors.StateError, match="switched off"):
                adamss.detach(model)
        assert jnp.array_equal(run(model, x), y)
    with pytest.raises(ZeroDivisionError), adamss.disabled(model):
        _ = 1 / 0
    assert jnp.array_equal(run(model, x), y)


class Heads(nnx.Module):
    """A target, and every kind of module that `modules_to_save` supports."""

    def __init__(self, rngs):
        self.query = nnx.Linear(8, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.rms = nnx.RMSNorm(8, rngs=rngs)
        self.group = nnx.GroupNorm(8, 2, rngs=rngs)
        self.batch = nnx.BatchNorm(8, rngs=rngs)
        self.embed = nnx.Embed(5, 8, rngs=rngs)
        self.conv = nnx.Conv(2, 4, (3, 5), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, dropout_rate=0.1, rngs=rngs)
        self.mixer = nnx.Einsum("BNTD,NDH->BNTH", (2, 6, 4), rngs=rngs)


SAVED = ["norm", "rms", "group", "batch", "embed", "conv", "attention", "mixer"]


def heads():
    model, rng = Heads(nnx.Rngs(0)), np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))):
        variable.set_value(jnp.asarray(rng.standard_normal(variable.shape), "float32"))
    return model


def test_saved_modules_are_stored_as_pytorch_names_and_orients_them(tmp_path):
    model = adamss.attach(heads(), config(targets="query", modules_to_save=SAVED))
    adamss.save(model, tmp_path / "a.safetensors")
    stored = {n: a for n, a in load_file(tmp_path / "a.safetensors").items() if n.partition(".")[0] in SAVED}
    conv, attention = model.conv.kernel.get_value(), model.attention
    expected = {
        "norm.weight": model.norm.scale,
        "norm.bias": model.norm.bias,
        "rms.weight": model.rms.scale,
        "group.weight": model.group.scale,
        "group.bias": model.group.bias,
        "batch.weight": model.batch.scale,
        "batch.bias": model.batch.bias,
        "batch.running_mean": model.batch.mean,
        "batch.running_var": model.batch.var,
        "embed.weight": model.embed.embedding,
        "conv.bias": model.conv.bias,
        "mixer.kernel": model.mixer.kernel,
    }
    expected = {name: variable.get_value() for name, variable in expected.items()}
    expected["conv.weight"] = np.moveaxis(conv, (3, 2), (0, 1))
    for name in ("query", "key", "value"):
        expected[f"attention.{name}.weight"] = getattr(attention, name).kernel.get_value().reshape(8, 8).T
        expected[f"attention.{name}.bias"] = getattr(attention, name).bias.get_value().reshape(8)
    expected["attention.out.weight"] = attention.out.kernel.get_value().reshape(8, 8).T
    expected["attention.out.bias"] = attention.out.bias.get_value()
    assert set(stored) == set(expected)
    for name, array in expected.items():
        assert stored[name].shape == array.shape, name
        assert np.array_equal(stored[name], array), name


def test_saved_modules_come_back_on_another_model(tmp_path):
    model = adamss.attach(heads(), config(targets="query", modules_to_save=SAVED[:-2]))
    rng = np.random.default_rng(4)
    for _, variable in nnx.to_flat_state(nnx.state(model, (AdamssParam, nnx.BatchStat))):
        variable.set_value(jnp.asarray(rng.standard_normal(variable.shape), "float32"))
    adamss.save(model, tmp_path / "a.safetensors", training=True)
    other = heads()
    before = variables(other)
    adamss.load(other, tmp_path / "a.safetensors")
    assert variables(other) == variables(model)
    assert variables(adamss.detach(other)) == before


def test_what_is_trained_of_a_saved_module():
    """Only the parameters of a saved module are trained: no statistics, no random state, no other layer."""
    model = adamss.attach(heads(), config(targets=["query"], modules_to_save=["batch", "conv"]))
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))}
    adapters = {f"{layer}.adamss.default.{name}" for layer in ("query", "attention.query") for name in "BC"}
    assert paths == adapters | {"batch.scale", "batch.bias", "conv.kernel", "conv.bias"}
    assert type(model.batch.mean) is nnx.BatchStat


def test_equal_models_share_what_is_compiled():
    run = Traced()
    for _ in range(3):
        run(adamss.attach(net(), config()), inputs(2, 8))
    assert run.traces == 1


def test_the_base_within_a_compiled_step():
    """Preference optimisation needs the base's outputs within a step; here the model also has a trained head."""
    x = inputs(2, 8)
    model = adamss.attach(net(), config(modules_to_save=["classifier"]))
    model.classifier.kernel.set_value(model.classifier.kernel[...] * 2)

    @nnx.jit
    def reference(model, x):
        with adamss.disabled(model):
            return model(x)

    agrees(reference(model, x), net()(x), "disabled, compiled")
    assert not jnp.allclose(model(x), net()(x), atol=1e-3)


def test_einsum_called_with_an_equation_of_its_own():
    layer = nnx.Einsum("bd,dn->bn", (6, 6), rngs=nnx.Rngs(0))
    model = nnx.Dict(layer=layer)
    adamss.attach(model, adamss.AdamssConfig(targets=["layer"], rank=4, subspaces=2))
    layer.adamss.default.C.set_value(jnp.full_like(layer.adamss.default.C[...], 0.3))
    x = jax.random.normal(jax.random.key(0), (2, 3, 6))
    same = layer(x, "abd,dn->abn")
    for row, expected in zip(x, same, strict=True):
        assert_agrees(layer(row), expected, dtype="float32", what="one more axis of the input")
    with pytest.raises(errors.LayerError, match="its kernel is another matrix"):
        layer(x[0], "bn,dn->bd")
