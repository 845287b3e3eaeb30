"""Test several adapters on one model in Flax NNX and Equinox: each computes what it computes alone."""

import copy
import itertools
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax_helpers import Stack, config, inputs, loop_of, train
from test_lifecycle import Equinox, Nnx

import adamss
import adamss_jax
from adamss import BudgetConfig, core, errors
from adamss.backend import backend_for
from adamss_conformance.cases import random_C
from adamss_jax.equinox import route_axes
from adamss_jax.flax import AdamssParam
from adamss_jax.optax import hold_frozen

SETTINGS = {
    "a": config(targets=["query", "value"], modules_to_save=["head"]),
    "b": config(targets=["value"], rank=3, subspaces=2),
    "c": config(targets=["query"], segmentation="contiguous", modules_to_save=["head"]),
}


@pytest.fixture(params=[Nnx, Equinox], ids=["nnx", "equinox"])
def library(request):
    return request.param


@pytest.fixture
def x():
    return inputs(5, 8)


def loss_of(library):
    return lambda model, x: jnp.mean(jnp.square(library.call(model, x) - jnp.sin(3 * x[:, :3])))


def with_values(model, name, seed):
    """Return the model with random values in the C of an adapter."""
    backend, rng = backend_for(model), np.random.default_rng(seed)
    layers = {
        path: f._replace(C=jnp.asarray(0.3 * random_C(jax.tree.map(np.asarray, f), rng), f.C.dtype))
        for path, f in backend.bank(model).adapters[name].layers.items()
    }
    return backend.with_factors(model, name, layers)


def adapted(library, names="bac"):
    """Return a model with these adapters, as after training. Adapters that save the head have different heads."""
    model = library.make()
    for name in names:
        model = with_values(adamss.attach(model, SETTINGS[name], name=name), name, seed=ord(name))
        if SETTINGS[name].modules_to_save:
            head = backend_for(model).arrays(backend_for(model).modules(model)["head"])
            moved = {key: array + ord(name) / 100 for key, array in head.items()}
            model, _ = backend_for(model).exchange_saved(model, {"head": moved})
    return model


def same(one, other):
    np.testing.assert_array_equal(one, other)


def held_values(library, model):
    return {path: np.asarray(array).copy() for path, array in library.arrays(model).items()}


def same_values(one, other):
    assert one.keys() == other.keys()
    for path, array in one.items():
        np.testing.assert_array_equal(array, other[path], err_msg=path)


def test_one_that_is_active_computes_what_it_does_alone(library, x):
    model, base = adapted(library), library.call(library.make(), x)
    for names in (["a"], ["b"], ["c"], ["a"], [], ["b"]):
        model = adamss.activate(model, names)
        same(library.call(model, x), library.call(adapted(library, names), x) if names else base)
    with adamss.disabled(model) as off:
        same(library.call(off, x), base)
    same(library.call(model, x), library.call(adapted(library, "b"), x))


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1.0}, {"a": 0.7, "b": -0.3}, {"b": 2.0}])
def test_weighted_updates_add_up(library, weights, x):
    model = adamss.activate(adapted(library), weights)
    backend = backend_for(model)
    bank, modules = backend.bank(model), backend.modules(model)

    def expected(path, x):
        layer = modules[path]
        W = np.asarray(layer.kernel.get_value() if library is Nnx else layer.weight.T, np.float64)
        b = np.asarray(layer.bias.get_value() if library is Nnx else layer.bias, np.float64)
        for name, weight in weights.items():
            if (f := bank.adapters[name].layers.get(path)) is not None:
                W = W + weight * core.delta(type(f)(*(np.asarray(array) for array in f))).astype(np.float64)
        return x @ W + b

    wide = np.asarray(x, np.float64)
    y = expected("head", np.tanh(expected("query", wide)) * expected("value", wide))
    np.testing.assert_allclose(library.call(model, x), y, rtol=2e-5, atol=2e-5)
    merged = adamss.merge(copy.deepcopy(model))
    np.testing.assert_allclose(library.call(merged, x), y, rtol=2e-5, atol=2e-5)


def test_training_one_leaves_the_others(library, x):
    model = adamss.activate(adapted(library), ["a", "b"], train="b")
    before = held_values(library, model)
    parameters = jax.tree.leaves(adamss.trainable_parameters(model))
    assert len(parameters) == len(jax.tree.leaves(adamss.trainable_parameters(model, name="b"))) == 2
    assert not jax.tree.leaves(adamss.trainable_parameters(model, name=["a", "c"]))
    model = train(model, loss_of(library), x).model
    after = held_values(library, model)
    assert {path for path in before if not np.array_equal(before[path], after[path])} == {
        path for path in before if "'b'" in path and ("B" in path[-4:] or "C" in path[-4:])
    }
    both = adamss.activate(model, ["a", "b"], train=["a", "b"])
    sizes = [len(jax.tree.leaves(adamss.trainable_parameters(both, name=n))) for n in ("a", "b", None)]
    assert sizes == [6, 2, 8]  # B and C of two layers and of one, and the head of a
    assert len(jax.tree.leaves(backend_for(both).trained_elements(both))) == 8
    train(both, loss_of(library), x, tx=hold_frozen(optax.adam(0.1), both))


def test_saved_modules_follow_the_active_one_and_come_back(library, x, tmp_path):
    model = adapted(library, "ac")
    heads = {}
    for name in "ac":
        model = adamss.activate(model, name)
        model = train(model, loss_of(library), x, steps=2).model
        heads[name] = library.call(model, x)
        adamss.save(model, tmp_path / name, training=True)
    with pytest.raises(errors.StateError, match="both have values of head"):
        adamss.activate(model, ["a", "c"])
    for name in "aca":
        model = adamss.activate(model, name)
        same(library.call(model, x), heads[name])
        same(library.call(adamss.load(library.make(), tmp_path / name), x), heads[name])
    adamss.save(
        model, tmp_path / "inactive.safetensors", name="c", training=True
    )  # the kept values of its head
    same(library.call(adamss.load(library.make(), tmp_path / "inactive.safetensors"), x), heads["c"])
    if library is Nnx:
        assert isinstance(model["head"].kernel, AdamssParam)
        adamss.activate(model, [])
        assert type(model["head"].kernel) is nnx.Param
        assert not jax.tree.leaves(nnx.state(model, nnx.LoRAParam))


def test_what_is_merged(library, x):
    model = adamss.activate(adapted(library, "bc"), ["b", "c"])
    y = library.call(model, x)
    alone = adamss.merge(copy.deepcopy(model), name="c")
    model = adamss.merge(adamss.merge(model, name="b"), name="c")
    np.testing.assert_allclose(library.call(model, x), y, rtol=2e-5, atol=2e-5)
    with pytest.raises(errors.StateError, match="weights hold the update of 'b'"):
        adamss.activate(model, "c")
    model = adamss.unmerge(model, name="b")
    same(library.call(model, x), library.call(alone, x))
    same_values(held_values(library, model), held_values(library, alone))
    model = adamss.unmerge(model)
    same(library.call(model, x), y)
    plain = adamss.merge_and_unload(copy.deepcopy(model))
    np.testing.assert_allclose(library.call(plain, x), y, rtol=2e-5, atol=2e-5)
    assert not adamss.adapters(plain)


@pytest.mark.parametrize("order", [*itertools.permutations("abc")])
def test_taken_off_in_any_order(library, order, x):
    base = library.make()
    structure, values = library.structure(base), held_values(library, base)
    model = adamss.merge(adapted(library)) if order[0] == "c" else adapted(library)
    own = {path for path in held_values(library, adapted(library, "b")) if "'b'" in path}
    for left in (2, 1, 0):
        model = adamss.detach(model, name=order[2 - left])
        assert len(adamss.adapters(model)) == left
        if left:
            assert (own <= held_values(library, model).keys()) == ("b" in order[3 - left :])
            model = adamss.activate(model, order[-1])
            same(library.call(model, x), library.call(adapted(library, order[-1]), x))
    assert library.structure(model) == structure
    same_values(held_values(library, model), values)


def test_a_file_in_the_place_of_an_adapter_compiles_nothing(library, x, tmp_path):
    adamss.save(adapted(library, "a"), tmp_path / "a.safetensors", training=True)
    model, traces = adapted(library), []
    for name in "bca":  # change each adapter while it is active
        model = with_values(adamss.activate(model, name), name, seed=99)
    expected = library.call(adapted(library, "a"), x)

    @(nnx.jit if library is Nnx else eqx.filter_jit)
    def run(model, x):
        traces.append(model)
        return library.call(model, x)

    compiled = {name: run(model := adamss.activate(model, name), x) for name in "cba"}
    structure = library.structure(model)
    model = adamss.load(model, tmp_path / "a.safetensors", name="a", replace=True)
    assert library.structure(model) == structure
    np.testing.assert_allclose(run(model, x), expected, rtol=1e-5, atol=1e-5)
    for name in "cb":
        model = adamss.activate(model, name)
        same(run(model, x), compiled[name])
    model = adamss.load(model, tmp_path / "a.safetensors", name="a", replace=True)
    same(library.call(adamss.activate(model, "a"), x), expected)
    assert len(traces) == 3
    with pytest.raises(errors.StateError, match="other adapted layers"):
        adamss.load(model, tmp_path / "a.safetensors", name="c", replace=True)


def test_budgets_of_two(library, x):
    budget = BudgetConfig(target=2, end_step=3)
    model = adamss.activate(adapted(library, "ba"), ["a", "b"], train=["a", "b"])
    with pytest.raises(errors.StateError, match="2 adapters are trained"):
        adamss_jax.budgeted(optax.adam(0.05), model, budget)
    tx = adamss_jax.budgeted(optax.adam(0.05), model, budget, name="b")
    loop = loop_of(model, tx, loss_of(library))
    for _ in range(4):
        loop.step(x)
    state = loop.optimizer if library is Nnx else loop.state
    assert adamss_jax.allocation(state).active.keys() == {"value"}
    model = adamss_jax.synchronise(loop.model, state, name="b")
    assert [adamss.summary(model, name=name).total.active for name in "ab"] == [6, 2]
    with pytest.raises(errors.StateError, match=r"found no states .* there are 'b'"):
        adamss_jax.synchronise(model, state, name="a")
    assert loop.traces == 1

    model = adamss.activate(adapted(library, "ba"), ["a", "b"], train=["a", "b"])
    with pytest.raises(errors.StateError, match="another budgeted inside"):
        loop_of(model, adamss_jax.budgeted(tx, model, budget, name="b"), loss_of(library))
    loop = loop_of(model, adamss_jax.budgeted(tx, model, budget, name="a"), loss_of(library))
    for _ in range(4):
        loop.step(x)
    state = loop.optimizer if library is Nnx else loop.state
    assert [int(adamss_jax.allocation(state, name=name).total) for name in "ab"] == [2, 2]
    with pytest.raises(errors.StateError, match=r"found 2 states .* 'a', 'b'"):
        adamss_jax.allocation(state)


def test_copies(library, x):
    model = adamss.activate(adapted(library), {"a": 0.5, "b": 2.0}, train="b")
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    if library is Nnx:
        others += [nnx.merge(*nnx.split(model), copy=True), nnx.clone(model)]
    else:
        others.append(jax.tree.unflatten(jax.tree.structure(model), jax.tree.leaves(model)))
    y = library.call(model, x)
    for other in others:
        assert adamss.adapters(other) == adamss.adapters(model)
        same(library.call(other, x), y)
        same_values(held_values(library, other), held_values(library, model))
        same(library.call(adamss.activate(other, "c"), x), library.call(adapted(library, "c"), x))
    same(library.call(model, x), y)


def test_a_state_has_the_names(x):
    """Orbax writes such a dictionary of arrays, and another process restores it into an equally adapted model."""
    model = adamss.activate(train(adapted(Nnx), loss_of(Nnx), x).model, "b")
    other = adamss.activate(adapted(Nnx), "b")
    state = nnx.state(other)
    nnx.replace_by_pure_dict(state, nnx.to_pure_dict(nnx.state(model)))
    nnx.update(other, state)
    for name in "bcba":
        same(Nnx.call(adamss.activate(other, name), x), Nnx.call(adamss.activate(model, name), x))


@pytest.mark.parametrize("name", ["base", "off", "record", "train", "task-1", "kept"])
def test_names_that_are_also_something_else(library, name, x):
    settings = config(targets=["query"])
    model = with_values(adamss.attach(adapted(library, "b"), settings, name=name), name, 5)
    y = library.call(model, x)
    model = adamss.activate(adamss.unmerge(adamss.merge(adamss.activate(model, ["b", name]))), name)
    same(library.call(model, x), y)
    same(
        library.call(adamss.detach(adamss.detach(model, name=name), name="b"), x),
        library.call(library.make(), x),
    )


def test_stacks(x, tmp_path):
    """The kept head goes through `scan` together with the arrays of the layers."""

    def make():
        return Stack(3)

    def run(model):
        return nnx.jit(lambda model, x: model(x))(model, x)

    one = config(modules_to_save=["head"], segmentation="kmeans")
    other = config(targets=["query"], rank=4, subspaces=2, modules_to_save=["head"])

    def filled(*names):
        model = make()
        for name in names:
            model = adamss.attach(model, {"a": one, "b": other}[name], name=name)
            model = with_values(model, name, seed=ord(name))
            model.head.kernel.set_value(model.head.kernel.get_value() + ord(name) / 100)
        return model

    model = filled("a", "b")
    expected = {name: run(filled(name)) for name in "ab"}
    for name in "bab":
        same(run(adamss.activate(model, name)), expected[name])
    adamss.save(model, tmp_path / "a.safetensors", name="a")
    np.testing.assert_allclose(
        run(adamss.load(make(), tmp_path / "a.safetensors")), expected["a"], rtol=1e-4, atol=1e-5
    )
    backend_for(model).set_active(model, {"block.query[1]": jnp.asarray([True, False])}, "b")
    loss = lambda model, x: jnp.square(model(x)).mean()  # noqa: E731
    train(model, loss, x, tx=hold_frozen(optax.adam(0.05), model))
    active = [f.active.tolist() for f in backend_for(model).bank(model).adapters["b"].layers.values()]
    assert active == [[True, True], [True, False], [True, True]]
    adamss.detach(adamss.consolidate(model), name="b")
    same(run(adamss.activate(model, "a")), expected["a"])
    same(run(adamss.detach(model)), run(make()))


def test_the_head_of_an_embedding_stays_that_of_the_base(x):
    table = nnx.Dict(embed=nnx.Embed(12, 8, rngs=nnx.Rngs(0)))
    base, ids = table["embed"].attend(x), jnp.arange(12)
    for name, seed in (("a", 1), ("b", 2)):
        settings = config(targets=["embed"], segmentation="random", seed=seed)
        table = with_values(adamss.attach(table, settings, name=name), name, seed)
    table = adamss.activate(table, {"a": 0.5, "b": -2.0})
    y = table["embed"](ids)
    with pytest.warns(errors.AdamssWarning, match="attend of an adapted"):
        same(table["embed"].attend(x), base)
    merged = adamss.merge(table)
    np.testing.assert_allclose(merged["embed"](ids), y, atol=2e-5)
    with pytest.warns(errors.AdamssWarning, match="attend of an adapted"):
        np.testing.assert_allclose(merged["embed"].attend(x), base, atol=2e-5)
    same(adamss.detach(merged)["embed"].attend(x), base)


# ---- rows of a batch -----------------------------------------------------------------------------------------


def test_rows_go_through_a_scan_over_layers(x):
    model, route = Stack(3), ["a", None, "b", "a", "b"]
    for name in "ab":
        settings = config(targets=["query"], rank=3 + ord(name) % 2, subspaces=2, segmentation="kmeans")
        model = with_values(adamss.attach(model, settings, name=name), name, seed=ord(name))
    run = nnx.jit(lambda model, x: model(x))
    with adamss.routed(model, route):
        mixed = run(model, x)
        with pytest.raises(errors.LayerError, match=r"^block\.query: .* 5 rows"):
            run(model, x[:3])
    for row, name in enumerate(route):
        expected = run(adamss.activate(model, name), x)[row]
        np.testing.assert_allclose(mixed[row], expected, rtol=1e-5, atol=1e-5)


KINDS = {
    "nnx conv": (
        lambda: nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)),
        lambda: inputs(3 * 36, 3).reshape(3, 6, 6, 3),
    ),
    "nnx embed": (lambda: nnx.Embed(9, 6, rngs=nnx.Rngs(0)), lambda: jnp.arange(12).reshape(3, 4) % 9),
    "equinox conv": (
        lambda: eqx.nn.Conv2d(3, 4, 3, key=jax.random.key(0)),
        lambda: inputs(3 * 36, 3).reshape(3, 3, 6, 6),
    ),
    "equinox embedding": (lambda: eqx.nn.Embedding(9, 6, key=jax.random.key(0)), lambda: jnp.arange(3)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_other_kinds(kind):
    make, batch = KINDS[kind]
    model, x, route = {"layer": make()}, batch(), ["a", None, "b"]
    library = "nnx" if kind.startswith("nnx") else "equinox"
    model = nnx.Dict(model) if library == "nnx" else model
    for name in "ab":
        settings = adamss.AdamssConfig(
            targets=["layer"], rank=4, subspaces=2, subspace_rank=ord(name) % 2 + 1
        )
        model = with_values(adamss.attach(model, settings, name=name), name, seed=ord(name))

    def run(model, axes=None):
        if library == "nnx":
            return model["layer"](x)
        return eqx.filter_vmap(lambda model, x: model["layer"](x), in_axes=(axes, 0))(model, x)

    with adamss.routed(model, route) as routed:
        mixed = run(routed, None if library == "nnx" else route_axes(routed))
    for row, name in enumerate(route):
        expected = run(adamss.activate(model, name))[row]
        np.testing.assert_allclose(mixed[row], expected, rtol=1e-5, atol=1e-5)
