"""Test Equinox models: trees of layers, filters, and the transformations that users apply to them."""

import copy
import dataclasses
import io
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_helpers import config, filled, inputs, train

import adamss
from adamss import core, errors
from adamss_conformance.tolerances import assert_agrees
from adamss_jax.equinox import trainable_filter
from adamss_jax.optax import hold_frozen


class Block(eqx.Module):
    query: eqx.nn.Linear
    value: eqx.nn.Linear
    norm: eqx.nn.LayerNorm

    def __init__(self, key):
        self.query = eqx.nn.Linear(8, 8, use_bias=False, key=jax.random.fold_in(key, 0))
        self.value = eqx.nn.Linear(8, 8, key=jax.random.fold_in(key, 1))
        self.norm = eqx.nn.LayerNorm(8)

    def __call__(self, x):
        x = self.norm(x)
        return x + jnp.tanh(self.query(x)) * self.value(x)


class Net(eqx.Module):
    blocks: list
    heads: dict
    scale: float = eqx.field(static=True)

    def __init__(self):
        key = jax.random.key(0)
        self.blocks = [Block(jax.random.fold_in(key, i)) for i in range(2)]
        self.heads = {"classifier": eqx.nn.Linear(8, 3, key=key), "other": (eqx.nn.Identity(), jnp.ones(3))}
        self.scale = 0.5

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.heads["classifier"](x) * self.scale + self.heads["other"][1]


PATHS = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("query", "value")]


def adapted(**changes):
    return filled(adamss.attach(Net(), config(modules_to_save=["classifier"], **changes)))


def leaves(tree):
    """Return the structure of a tree, and dtype and bytes of every array in it."""
    flat, structure = jax.tree.flatten(tree)
    return structure, [
        (np.asarray(leaf).dtype, np.asarray(leaf).tobytes()) for leaf in flat if eqx.is_array(leaf)
    ]


def agrees(actual, expected, what):
    assert_agrees(
        actual, expected, dtype="float32", what=what, scale=max(10.0, float(jnp.abs(expected).max()))
    )


def test_modules_lists_and_dictionaries():
    model, x = Net(), inputs(4, 8)
    expected = jax.vmap(model)(x)
    attached = adamss.attach(model, config(modules_to_save=["classifier"], include_bias=True))
    assert [row.path for row in adamss.summary(attached).rows] == PATHS
    assert jnp.array_equal(jax.vmap(attached)(x), expected)
    attached = filled(attached)
    y = jax.vmap(attached)(x)
    assert float(jnp.abs(y - expected).max()) > 0.01
    reference = model
    for i in (0, 1):
        for name in ("query", "value"):
            layer, delta = (
                getattr(model.blocks[i], name),
                core.delta(getattr(attached.blocks[i], name).adapter.factors()),
            )
            where = lambda m, i=i, name=name: getattr(m.blocks[i], name).weight  # noqa: E731
            reference = eqx.tree_at(where, reference, layer.weight + delta[:8].T)
            if layer.bias is not None:
                where = lambda m, i=i, name=name: getattr(m.blocks[i], name).bias  # noqa: E731
                reference = eqx.tree_at(where, reference, layer.bias + delta[8])
    agrees(y, jax.vmap(reference)(x), "outputs")
    merged = adamss.merge(attached)
    agrees(jax.vmap(merged)(x), y, "merged outputs")
    assert jnp.array_equal(jax.vmap(adamss.unmerge(merged))(x), y)
    for back in (adamss.detach(attached), adamss.detach(merged)):
        assert leaves(back) == leaves(model)


def test_containers_without_a_module_around_them():
    def linear():
        return eqx.nn.Linear(8, 8, key=jax.random.key(0))

    models = {"0": [linear(), jnp.ones(2)], "1": ({"a": 3}, linear()), "query.0": {"query": (linear(),)}}
    for path, model in models.items():
        attached = adamss.attach(model, config(targets=[path]))
        assert type(attached) is type(model)
        assert [row.path for row in adamss.summary(attached).rows] == [path]
        assert leaves(adamss.detach(filled(attached))) == leaves(model)


def test_a_single_layer_is_a_model(tmp_path):
    layer = eqx.nn.Linear(8, 6, key=jax.random.key(0))
    attached = filled(adamss.attach(layer, config(targets=".*")))
    adamss.save(attached, tmp_path / "a.safetensors", training=True)
    x = inputs(8)
    assert jnp.array_equal(adamss.load(layer, tmp_path / "a.safetensors")(x), attached(x))


@pytest.mark.parametrize(("d", "n"), [("scalar", 8), (8, "scalar"), ("scalar", "scalar")], ids=str)
@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no bias"])
def test_scalar_features(d, n, use_bias):
    layer = eqx.nn.Linear(d, n, use_bias=use_bias, key=jax.random.key(0))
    x = inputs() if d == "scalar" else inputs(8)
    expected = layer(x)
    attached = adamss.attach([layer], config(targets=["0"], include_bias=use_bias))
    assert jnp.array_equal(attached[0](x), expected)
    assert attached[0](x).shape == expected.shape
    attached = filled(attached)
    assert (attached[0].in_features, attached[0].out_features, attached[0].use_bias) == (d, n, use_bias)
    delta = core.delta(attached[0].adapter.factors())
    row = jnp.concatenate([jnp.reshape(x, -1), jnp.ones(1 if use_bias else 0)])
    agrees(attached[0](x), expected + jnp.reshape(row @ delta, expected.shape), "outputs")
    agrees(adamss.merge(attached)[0](x), attached[0](x), "merged outputs")
    gradient = jax.grad(lambda x: attached[0](x).sum())(x)
    assert gradient.shape == x.shape
    assert leaves(adamss.detach(attached)) == leaves([layer])


@pytest.mark.parametrize(
    ("make", "args", "targets"),
    [
        (lambda key: eqx.nn.MLP(8, 4, 6, 2, key=key), [(8,)], ["layers.0", "layers.2"]),
        (
            lambda key: eqx.nn.MultiheadAttention(2, 8, key=key),
            [(5, 8)] * 3,
            ["query_proj", "key_proj", "value_proj", "output_proj"],
        ),
    ],
    ids=["perceptron", "attention"],
)
def test_models_of_equinox_itself(make, args, targets):
    model, x = make(jax.random.key(0)), [inputs(*shape) for shape in args]
    expected = model(*x)
    attached = adamss.attach(model, config(targets=targets))
    assert [row.path for row in adamss.summary(attached).rows] == targets
    assert jnp.array_equal(attached(*x), expected)
    attached = filled(attached)
    agrees(adamss.merge(attached)(*x), attached(*x), "merged outputs")
    assert not jnp.array_equal(attached(*x), expected)
    assert leaves(adamss.detach(attached)) == leaves(model)


class Tied(eqx.Module):
    """An embedding and a head that share one weight, with a layer to adapt between them."""

    shared: eqx.nn.Shared
    query: eqx.nn.Linear

    def __init__(self):
        embedding = eqx.nn.Embedding(5, 8, key=jax.random.key(0))
        head = eqx.nn.Linear(8, 5, key=jax.random.key(1))
        self.shared = eqx.nn.Shared((embedding, head), lambda p: p[1].weight, lambda p: p[0].weight)
        self.query = eqx.nn.Linear(8, 8, key=jax.random.key(2))

    def __call__(self, token):
        embedding, head = self.shared()
        return head(jnp.tanh(self.query(embedding(token))))


def test_shared_nodes_are_left_as_they_are(tmp_path):
    model, token = Tied(), jnp.asarray(3)
    attached = adamss.attach(model, config(targets=["query"], modules_to_save=["shared"]))
    assert jnp.array_equal(attached(token), model(token))
    paths = [leaf.shape for leaf in jax.tree.leaves(eqx.filter(attached, trainable_filter(attached)))]
    assert paths == [(5, 8), (5,), (5, 6), (2, 8)]
    attached = filled(attached)
    adamss.save(attached, tmp_path / "a.safetensors", training=True)
    assert jnp.array_equal(adamss.load(model, tmp_path / "a.safetensors")(token), attached(token))
    assert leaves(adamss.detach(attached)) == leaves(model)
    with pytest.raises(adamss.errors.LayerTypeError, match=r"shared\.pytree\.1: its weight is a SharedNode"):
        adamss.attach(model, config(targets=["shared.pytree.1"]))


def test_one_object_in_two_places_is_two_layers():
    """A tree holds values without identity, so the two are trained separately, as Equinox documents."""
    layer, x = eqx.nn.Linear(8, 8, key=jax.random.key(0)), inputs(8)
    model = {"first": layer, "second": layer}
    attached = adamss.attach(model, config(targets=["first", "second"]))
    assert [row.path for row in adamss.summary(attached).rows] == ["first", "second"]
    attached = filled(attached)
    assert not jnp.array_equal(attached["first"](x), attached["second"](x))
    single = adamss.attach(model, config(targets=["second"]))
    assert [row.path for row in adamss.summary(single).rows] == ["second"]
    assert leaves(adamss.detach(attached)) == leaves(model)


def test_a_model_within_a_larger_one_and_a_part_of_it():
    model = adapted()
    whole = {"encoder": model, "other": eqx.nn.Linear(3, 3, key=jax.random.key(0))}
    assert [row.path for row in adamss.summary(whole).rows] == PATHS
    base = adamss.detach(adamss.unmerge(adamss.merge(whole)))
    assert leaves(base["encoder"]) == leaves(Net())
    for part in (model.blocks, model.blocks[0], model.blocks[0].query):
        with pytest.raises(adamss.errors.StateError, match="adapters are attached already"):
            adamss.summary(part)
    parts = [adamss.attach(block, config()) for block in Net().blocks]
    with pytest.raises(adamss.errors.StateError, match="one by one"):
        adamss.summary(parts)


def test_training_changes_what_is_trained_and_nothing_else():
    model, x = adapted(), inputs(4, 8)
    model = adamss.backend.backend_for(model).set_active(model, {PATHS[0]: np.asarray([True, False, True])})
    tx = hold_frozen(optax.adamw(0.05, weight_decay=0.1), model)
    loop = train(model, lambda model, x: jnp.mean(jnp.square(jax.vmap(model)(x))), x, tx=tx)
    assert loop.traces == 1
    after = loop.model
    assert jax.tree.structure(after) == jax.tree.structure(model)
    before, after_leaves = (jax.tree_util.tree_leaves_with_path(tree) for tree in (model, after))
    changed = {
        jax.tree_util.keystr(path, simple=True, separator=".")
        for (path, a), (_, b) in zip(before, after_leaves, strict=True)
        if eqx.is_array(a) and not jnp.array_equal(a, b)
    }
    expected = {f"{path}.adapters.default.{name}" for path in PATHS for name in "BC"}
    assert changed == expected | {"heads.classifier.weight", "heads.classifier.bias"}
    layer, was = (tree.blocks[0].query.adapter for tree in (after, model))
    own = np.asarray(layer.labels) == 1
    assert jnp.array_equal(layer.C[:, own], was.C[:, own])
    assert not np.any(layer.C[0, ~own] == was.C[0, ~own])


def test_the_order_of_the_products_of_a_layer():
    """Under vmap each input is a vector. The default order then multiplies with M = A B; a layer may set another."""

    def ordered(model, order):
        replaced = lambda adapter: dataclasses.replace(adapter, order=order)  # noqa: E731
        where = lambda m: [block.query.adapter for block in m.blocks]  # noqa: E731
        return eqx.tree_at(where, model, replace_fn=replaced)

    @eqx.filter_jit
    def run(model, x):
        return jax.vmap(model)(x)

    def program(model):
        return str(jax.make_jaxpr(lambda x: jax.vmap(model)(x))(x))

    model, x = adapted(), inputs(64, 8)
    projected = ordered(model, "input_first")
    assert program(ordered(model, "factors_first")) == program(model) != program(projected)
    agrees(run(projected, x), run(model, x), "outputs")
    backend = adamss.backend.backend_for(model)
    masked = backend.set_active(projected, {PATHS[0]: np.asarray([True, False, True])})
    for other in (masked, adamss.unmerge(adamss.merge(projected)), pickle.loads(pickle.dumps(projected))):
        assert other.blocks[1].query.adapter.order == "input_first"
        assert jax.tree.structure(other) == jax.tree.structure(projected)
    with pytest.raises(errors.ConfigError, match="'expand'"):
        ordered(model, "expand")(x[0])


def serialised(model):
    buffer = io.BytesIO()
    eqx.tree_serialise_leaves(buffer, model)
    buffer.seek(0)
    return eqx.tree_deserialise_leaves(buffer, filled(model, seed=9))


@pytest.mark.parametrize(
    "copy_of",
    [serialised, copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["tree_serialise_leaves", "deepcopy", "copy", "pickle"],
)
def test_copies_keep_adapters_merges_and_saved_modules(copy_of):
    model, x = adapted(), inputs(4, 8)
    model = eqx.tree_at(lambda m: m.heads["classifier"].bias, model, jnp.ones(3))
    y = jax.vmap(model)(x)
    twin = copy_of(adamss.merge(copy_of(model)))
    agrees(jax.vmap(twin)(x), y, "merged copy")
    assert jnp.array_equal(jax.vmap(adamss.unmerge(twin))(x), y)
    assert leaves(adamss.detach(twin)) == leaves(Net())


def test_no_verb_touches_the_tree_it_is_given(tmp_path):
    path = tmp_path / "a.safetensors"
    base = Net()
    base_leaves = leaves(base)
    model = filled(adamss.attach(base, config(modules_to_save=["classifier"])))
    assert leaves(base) == base_leaves
    model = eqx.tree_at(lambda m: m.heads["classifier"].bias, model, jnp.ones(3))
    before = leaves(model)
    adamss.save(model, path)
    adamss.load(base, path)
    assert leaves(base) == base_leaves
    merged = adamss.merge(model)
    merged_leaves = leaves(merged)
    adamss.unmerge(merged)
    with adamss.disabled(merged) as off:
        assert leaves(off) == base_leaves
    adamss.detach(merged)
    assert leaves(merged) == merged_leaves
    adamss.detach(model)
    adamss.summary(model)
    adamss.backend.backend_for(model).set_active(model, {PATHS[0]: np.zeros(3, bool)})
    with adamss.disabled(model) as off:
        assert leaves(off) == base_leaves
    assert leaves(model) == before
    assert leaves(adamss.detach(adamss.load(base, path))) == base_leaves


def test_adapted_layers_can_be_stacked_and_scanned_over():
    """With rank 1 everywhere the factors of all layers have equal shapes."""
    layers = [eqx.nn.Linear(8, 8, key=jax.random.key(i)) for i in range(3)]
    model = filled(adamss.attach(layers, config(targets=["0", "1", "2"], subspace_rank=1)))
    x = expected = inputs(8)
    for layer in model:
        expected = jnp.tanh(layer(expected))
    arrays = [eqx.filter(layer, eqx.is_array) for layer in model]
    rest = eqx.filter(model[0], eqx.is_array, inverse=True)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays)
    y, _ = jax.lax.scan(lambda x, layer: (jnp.tanh(eqx.combine(layer, rest)(x)), None), x, stacked)
    agrees(y, expected, "outputs")


def test_equal_models_have_trees_of_equal_structure():
    """Models can be averaged, and an optimiser state fits a loaded model, only if the structures are equal."""
    first, second = (adamss.attach(Net(), config(modules_to_save=["classifier"])) for _ in range(2))
    assert jax.tree.structure(first) == jax.tree.structure(second)
    mean = jax.tree.map(lambda a, b: a if a.dtype == bool else (a + b) / 2, first, second)
    assert jax.tree.structure(mean) == jax.tree.structure(first)
    again = pickle.loads(pickle.dumps(first))
    assert jax.tree.structure(again) == jax.tree.structure(first)
