"""Test the lifecycle of an adapter on Flax NNX and Equinox models, as in the table of docs/comparison.md.

Other modules test copies, compilation, donated buffers, tied modules, and so on.
"""

import copy
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax_helpers import agrees, config, filled, gradient, inputs, run_python, train

import adamss
from adamss import errors
from adamss_conformance.tolerances import assert_agrees


class Nnx:
    """Flax NNX, where models change in place."""

    half = "float16"

    @staticmethod
    def make(dtype=jnp.float32):
        rngs = nnx.Rngs(0)
        layer = lambda n: nnx.Linear(8, n, param_dtype=dtype, rngs=rngs)  # noqa: E731
        return nnx.Dict(query=layer(8), value=layer(8), head=layer(3))

    @staticmethod
    def call(model, x):
        return model["head"](jnp.tanh(model["query"](x)) * model["value"](x))

    structure = staticmethod(nnx.graphdef)

    @staticmethod
    def arrays(model):
        return {str(path): value for path, value in nnx.to_flat_state(nnx.state(model, nnx.Variable))}

    @staticmethod
    def with_nan(model):
        C = model["value"].adamss.default.C
        C.set_value(C.get_value().at[0, 0].set(jnp.nan))
        return model

    @staticmethod
    def with_values(abstract, values, folder):
        nnx.update(abstract, nnx.state(values))
        return abstract

    abstract = staticmethod(nnx.eval_shape)


class Equinox:
    """Equinox, where every verb returns a new tree."""

    half = "bfloat16"

    @staticmethod
    def make(dtype=jnp.float32):
        layer = lambda n, key: eqx.nn.Linear(8, n, dtype=dtype, key=jax.random.key(key))  # noqa: E731
        return {"query": layer(8, 0), "value": layer(8, 1), "head": layer(3, 2)}

    @staticmethod
    def call(model, x):
        return jax.vmap(lambda x: model["head"](jnp.tanh(model["query"](x)) * model["value"](x)))(x)

    structure = staticmethod(jax.tree.structure)

    @staticmethod
    def arrays(model):
        leaves = jax.tree_util.tree_leaves_with_path(model)
        return {jax.tree_util.keystr(path): leaf for path, leaf in leaves if eqx.is_array(leaf)}

    @staticmethod
    def with_nan(model):
        return eqx.tree_at(
            lambda m: m["value"].adapter.C, model, model["value"].adapter.C.at[0, 0].set(jnp.nan)
        )

    @staticmethod
    def with_values(abstract, values, folder):
        eqx.tree_serialise_leaves(folder / "base.eqx", values)
        return eqx.tree_deserialise_leaves(folder / "base.eqx", abstract)

    abstract = staticmethod(eqx.filter_eval_shape)


@pytest.fixture(params=[Nnx, Equinox], ids=["nnx", "equinox"])
def library(request):
    return request.param


@pytest.fixture
def values(library):
    """Return a function that returns dtype and bytes of each array of a model, by path."""
    return lambda model: {
        path: (a.dtype, np.asarray(a).tobytes()) for path, a in library.arrays(model).items()
    }


SAVED = ["head"]


def trained(library, model, x):
    return train(model, lambda m, x: jnp.square(library.call(m, x).astype(jnp.float32)).sum(), x).model


def with_frozen(model):
    """Freeze every second subspace."""
    backend = adamss.backend.backend_for(model)
    masks = {
        path: jnp.arange(len(factors.active)) % 2 == 0
        for path, factors in backend.bank(model).only().layers.items()
    }
    return backend.set_active(model, masks)


@pytest.mark.filterwarnings("ignore:rounding to:adamss.AdamssWarning")
@pytest.mark.parametrize("half", [False, True])
def test_the_whole_cycle(library, values, tmp_path, half):
    name = library.half if half else "float32"
    dtype = jnp.dtype(name)
    model, x = library.make(dtype), inputs(5, 8, dtype=dtype)
    base, y_base = values(model), library.call(model, x)

    def same(model, y):
        return bool(jnp.array_equal(library.call(model, x), y))

    def assert_base(model):
        assert values(model) == base
        assert same(model, y_base)

    model = adamss.attach(model, config(modules_to_save=SAVED))
    assert same(model, y_base)
    model = trained(library, model, x)
    y = library.call(model, x)
    assert y.dtype == dtype
    assert not same(model, y_base)
    adamss.save(model, tmp_path / "portable.safetensors")
    adamss.save(model, tmp_path / "training.safetensors", training=True)
    model = adamss.detach(model)
    assert_base(model)

    model = adamss.load(model, tmp_path / "portable.safetensors", trainable=False)
    assert_agrees(library.call(model, x), y, dtype=name, what="outputs of the portable file", scale=10)
    assert not jax.tree.leaves(adamss.trainable_parameters(model))
    model = adamss.detach(model)
    assert_base(model)

    model = adamss.load(model, tmp_path / "training.safetensors")
    assert same(model, y)
    model = adamss.merge(model)
    assert_agrees(library.call(model, x), y, dtype=name, what="merged outputs", scale=10)
    with adamss.disabled(model) as off:
        assert same(off, y_base)
    model = adamss.unmerge(model)
    assert same(model, y)
    with adamss.disabled(model) as off:
        assert same(off, y_base)
    assert same(model, y)
    model = adamss.detach(adamss.merge(model))
    assert_base(model)

    other = config(targets=["head"], rank=3, include_bias=True)
    model = adamss.attach(model, other)
    assert [row.path for row in adamss.summary(model).rows] == ["head"]
    assert same(model, y_base)
    assert_base(adamss.detach(model))


@pytest.mark.parametrize("before", ["adapted", "merged", "merged without base", "consolidated"])
def test_merge_and_unload(library, values, before):
    model, x = library.make(), inputs(4, 8)
    structure = library.structure(model)
    model = trained(library, adamss.attach(model, config(modules_to_save=SAVED)), x)
    if before == "consolidated":
        model = adamss.consolidate(with_frozen(model))
    y = library.call(model, x)
    if before.startswith("merged"):
        model = adamss.merge(model, keep_base=before == "merged")
        y_merged = library.call(model, x)
    model = adamss.merge_and_unload(model)
    assert library.structure(model) == structure
    agrees(library.call(model, x), y, "outputs", scale=10)
    if before.startswith("merged"):
        assert jnp.array_equal(library.call(model, x), y_merged)
    with pytest.raises(errors.StateError, match=r"merge_and_unload: .*no adapters"):
        adamss.merge_and_unload(model)


def test_one_adapter_after_the_other_on_one_base(library, values, tmp_path):
    model, x = library.make(), inputs(4, 8)
    base, outputs = values(model), {}
    for path, changes in (("a", {}), ("b", {"targets": ["value"], "rank": 4, "modules_to_save": SAVED})):
        model = trained(library, adamss.attach(model, config(**changes)), x)
        outputs[path] = library.call(model, x)
        adamss.save(model, tmp_path / path, training=True)
        model = adamss.detach(model)
    assert not jnp.array_equal(outputs["a"], outputs["b"])
    for path in ("a", "b", "a"):
        model = adamss.load(model, tmp_path / path)
        assert jnp.array_equal(library.call(model, x), outputs[path])
        model = adamss.detach(model)
        assert values(model) == base


@pytest.mark.parametrize("verb", [adamss.merge, adamss.consolidate])
def test_states_whose_weights_hold_the_update_fit_no_other_model(library, tmp_path, verb):
    """A model with an adapter would add the update to a weight that already contains it."""
    x = inputs(4, 8)
    after = with_frozen(trained(library, adamss.attach(library.make(), config()), x))
    y, model = library.call(after, x), verb(after)
    with pytest.raises((ValueError, RuntimeError), match=r"in_weight|has changed shape"):
        library.with_values(adamss.attach(library.make(), config()), model, tmp_path)
    same = library.with_values(verb(after) if library is Equinox else copy.deepcopy(model), model, tmp_path)
    agrees(library.call(same, x), y, "outputs", scale=10)


def test_nan_is_not_merged(library, values):
    model = library.make()
    base = values(model)
    model = library.with_nan(adamss.attach(model, config()))
    before = values(model)
    with pytest.raises(errors.ArrayValueError, match="value"):
        adamss.merge(model)
    assert values(model) == before
    assert values(adamss.detach(model)) == base


def test_running_statistics_go_on_and_the_rest_of_a_frozen_norm_stays():
    rngs = nnx.Rngs(0)
    model = nnx.Dict(
        query=nnx.Linear(8, 8, rngs=rngs), norm=nnx.BatchNorm(8, rngs=rngs), head=nnx.Linear(8, 3, rngs=rngs)
    )
    adamss.attach(model, config(targets=["query"], modules_to_save=SAVED))
    before = {path: np.asarray(value) for path, value in Nnx.arrays(model).items()}
    loss = lambda m, x: jnp.square(m["head"](m["norm"](m["query"](x)))).sum()  # noqa: E731
    loop = train(model, loss, inputs(6, 8), tx=optax.adamw(0.05, weight_decay=0.5), steps=1)
    for seed in (1, 2):
        loop.step(inputs(6, 8, seed=seed))
    changed = {path for path, value in Nnx.arrays(model).items() if np.any(before[path] != np.asarray(value))}
    factors = {("query", "adamss", "default", name) for name in "BC"}
    assert changed == {
        str(path)
        for path in factors | {("head", "kernel"), ("head", "bias"), ("norm", "mean"), ("norm", "var")}
    }


@pytest.mark.parametrize("checkpoint", [eqx.filter_checkpoint, jax.checkpoint], ids=["equinox", "jax"])
def test_checkpointing_of_equinox_models_gives_the_same_gradients(checkpoint):
    x = inputs(4, 8)
    model = filled(adamss.attach(Equinox.make(), config(modules_to_save=SAVED)))

    def slopes(wrap):
        run = wrap(lambda model, x: Equinox.call(model, x))
        return jax.tree.leaves(gradient(lambda model: jnp.square(run(model, x)).sum(), model))

    plain = slopes(lambda run: run)
    assert len(plain) == 6
    for ours, expected in zip(slopes(checkpoint), plain, strict=True):
        agrees(ours, expected, "gradient")


IN_A_NEW_PROCESS = """
import pickle, sys
import jax, jax.numpy as jnp
with open(sys.argv[1], "rb") as file:
    kind, base, forms = pickle.load(file)
x = jnp.arange(16.0).reshape(2, 8)
def call(model):
    return model(x) if kind == "Nnx" else jax.vmap(model)(x)
for model, y in forms:
    assert jnp.array_equal(call(model), y)
import adamss
for model, _ in forms:
    assert jnp.array_equal(call(adamss.detach(model)), base)
"""


def test_pickled_models_in_a_process_that_has_not_imported_adamss(library, tmp_path):
    model, x = library.make()["query"], jnp.arange(16.0).reshape(2, 8)
    call = (lambda model: model(x)) if library is Nnx else (lambda model: jax.vmap(model)(x))
    base = call(model)
    model = adamss.attach(model, config(targets=".*"))
    model = filled(model)
    forms = [(form, call(form)) for form in (model, adamss.merge(copy.deepcopy(model)))]
    assert not any(jnp.array_equal(y, base) for _, y in forms)
    (tmp_path / "models.pickle").write_bytes(pickle.dumps((library.__name__, base, forms)))
    run_python("-c", IN_A_NEW_PROCESS, str(tmp_path / "models.pickle"))


def test_load_into_an_abstract_model_that_has_got_its_values(library, values, tmp_path):
    """`load` does not copy the base, so it is in memory only once."""
    x, path = inputs(4, 8), tmp_path / "a.safetensors"
    model = trained(library, adamss.attach(library.make(), config()), x)
    adamss.save(model, path)
    abstract = library.abstract(library.make)
    with pytest.raises(errors.ArrayTypeError, match=r"query: .*nnx\.update.*eqx\.tree_deserialise_leaves"):
        adamss.load(abstract, path, check_base=False, trainable=False)
    lazy = library.with_values(abstract, library.make(), tmp_path)
    before = {a.unsafe_buffer_pointer() for a in library.arrays(lazy).values()}
    lazy = adamss.load(lazy, path, trainable=False)
    assert before < {a.unsafe_buffer_pointer() for a in library.arrays(lazy).values()}
    expected = adamss.load(library.make(), path, trainable=False)
    assert values(lazy) == values(expected)
    assert jnp.array_equal(library.call(lazy, x), library.call(expected, x))
