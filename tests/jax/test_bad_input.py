"""Test bad input on JAX: type and message of each error, and that models are left unchanged."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax_helpers import config, filled, gradient, inputs, net, variables

import adamss
from adamss import core, errors
from adamss_jax.equinox import trainable_filter

SAVED = ["classifier"]


BUILTIN = {
    errors.ArrayTypeError: TypeError,
    errors.ArrayValueError: ValueError,
    errors.CheckpointError: ValueError,
    errors.ConfigError: ValueError,
    errors.LayerError: ValueError,
    errors.LayerTypeError: TypeError,
    errors.StateError: RuntimeError,
    errors.TargetError: ValueError,
}


def unchanged(kind, match, verb, model, *args):
    """Check that a verb raises this error with a matching message, and leaves the model unchanged."""
    before = variables(model)
    with pytest.raises(kind, match=match) as caught:
        verb(model, *args)
    assert isinstance(caught.value, errors.AdamssError)
    assert isinstance(caught.value, BUILTIN[kind])
    assert variables(model) == before


def equinox_model(seed=0):
    key = jax.random.key(seed)
    return {"query": eqx.nn.Linear(6, 8, key=key), "classifier": eqx.nn.Linear(8, 3, key=key)}


def calling(call):
    """Return a function of a model that calls a verb and returns a number, so that it can be transformed."""

    def function(model):
        call(model)
        return 0.0

    return function


def stacked(model):
    """Return a model with all arrays stacked twice along a new axis, as in training an ensemble."""
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state))


TRANSFORMS = {
    "jit": lambda call, model: nnx.jit(calling(call))(model),
    "grad": lambda call, model: nnx.grad(calling(call))(model),
    "vmap": lambda call, model: nnx.vmap(calling(call))(stacked(model)),
    "remat": lambda call, model: nnx.jit(nnx.remat(calling(call)))(model),
    # In this transformation the base weights are concrete and the factors are traced.
    "grad of what is trained": lambda call, model: gradient(calling(call), model),
}
VERBS_ON_BASE = {
    "attach": lambda m, path: adamss.attach(m, adamss.AdamssConfig(targets=["query"], rank=4, subspaces=2)),
    "load": lambda m, path: adamss.load(m, path),
}
VERBS_ON_ADAPTED = {
    "save": lambda m, path: adamss.save(m, path.with_name("b.safetensors")),
    "summary": lambda m, path: adamss.summary(m),
    "merge": lambda m, path: adamss.merge(m),
}


@pytest.fixture
def file(tmp_path):
    """Return the path of an adapter file for `net`."""
    adamss.save(adamss.attach(net(), config()), tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


VERBS = VERBS_ON_BASE | VERBS_ON_ADAPTED
COUNTED = {("summary", "grad"), ("summary", "grad of what is trained")}
"""Cases in which `summary` works under a gradient, because what it counts is not differentiated."""
CASES = [(v, t) for v in VERBS for t in TRANSFORMS if v not in VERBS_ON_BASE or "trained" not in t]


@pytest.mark.parametrize(("verb", "transform"), CASES)
def test_verbs_within_transformations_name_the_layer_and_leak_nothing(verb, transform, file):
    model = net() if verb in VERBS_ON_BASE else adamss.attach(net(), config(modules_to_save=SAVED))
    call = lambda model: TRANSFORMS[transform](lambda m: VERBS[verb](m, file), model)  # noqa: E731
    if (verb, transform) in COUNTED:
        call(model)
        return
    with jax.checking_leaks():
        unchanged(errors.ArrayTypeError, r"blocks\.0\.query: .*outside of jax\.jit", call, model)
    assert not (file.parent / "b.safetensors").exists()
    assert np.isfinite(model(inputs(2, 8))).all()


@pytest.mark.parametrize("transform", [eqx.filter_jit, eqx.filter_grad], ids=["jit", "grad"])
@pytest.mark.parametrize("verb", VERBS)
def test_verbs_on_equinox_models_within_transformations(verb, transform, tmp_path):
    path = tmp_path / "a.safetensors"
    model = equinox_model()
    adapted = VERBS_ON_BASE["attach"](model, None)
    adamss.save(adapted, path)
    target = model if verb in VERBS_ON_BASE else adapted
    wrapped = transform(calling(lambda m: VERBS[verb](m, path)))
    if (verb, transform) == ("summary", eqx.filter_grad):
        wrapped(target)  # what `summary` counts is not differentiated, so it has values
        return
    with jax.checking_leaks(), pytest.raises(errors.ArrayTypeError, match=r"query: .*outside of jax\.jit"):
        wrapped(target)


KERNEL = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
DECOMPOSITION = core.decompose(KERNEL, 4)
LABELS = core.segment(DECOMPOSITION, 3)
FACTORS = core.initial_factors(DECOMPOSITION, LABELS, 1)
WITHIN_CORE = {
    "decompose": (lambda W: core.decompose(W, 4), KERNEL),
    "segment": (lambda d: core.segment(d, 3), DECOMPOSITION),
    "initial_factors": (lambda pair: core.initial_factors(*pair, 1), (DECOMPOSITION, LABELS)),
    "merge": (lambda pair: core.merge(pair[0], None, pair[1]), (KERNEL, FACTORS)),
    "count_factors": (core.count_factors, FACTORS),
}


@pytest.mark.parametrize("name", WITHIN_CORE)
@pytest.mark.parametrize("transform", ["jit", "grad"])
def test_core_functions_that_need_values_say_so(name, transform):
    function, argument = WITHIN_CORE[name]
    argument = jax.tree.map(jnp.asarray, argument)
    if transform == "jit":
        wrapped = jax.jit(calling(function))
    else:
        wrapped = jax.grad(calling(function), allow_int=True)
        if name == "count_factors":
            wrapped(argument)  # integers are not differentiated, so they have values
            return
    with jax.checking_leaks(), pytest.raises(errors.ArrayTypeError, match=r"tracer.*outside of jax\.jit"):
        wrapped(argument)


VALUE, TYPE = errors.ArrayValueError, errors.ArrayTypeError


@pytest.mark.parametrize(
    ("name", "change", "kind", "match"),
    [
        *(
            ("kernel", lambda kernel, v=v: kernel.at[2, 3].set(v), VALUE, "weight holds NaN")
            for v in (jnp.nan, jnp.inf, -jnp.inf)
        ),
        ("bias", lambda bias: bias.at[2].set(jnp.nan), VALUE, "bias holds NaN"),
        *(
            ("kernel", lambda _, dtype=dtype: jnp.ones((8, 8), dtype), TYPE, f"weight .*dtype.*{dtype}")
            for dtype in ("complex64", "int8", "bool", "float8_e4m3fn")
        ),
        *(
            ("kernel", lambda _, shape=shape: jnp.ones(shape), VALUE, "weight must not be empty")
            for shape in ((0, 8), (8, 0))
        ),
    ],
)
def test_weights_that_cannot_be_adapted(name, change, kind, match):
    model = net()
    # This is the last target, so the others are adapted before the error.
    variable = getattr(model.blocks[1]["value"], name)
    variable.set_value(change(variable.get_value()))
    settings = config(include_bias=name == "bias")
    unchanged(kind, rf"blocks\.1\.value: {match}", adamss.attach, model, settings)


@pytest.mark.parametrize("value", [jnp.nan, 1j, jnp.int8(1)], ids=["NaN", "complex", "integer"])
def test_weights_of_equinox_models(value):
    model = equinox_model()
    model["query"] = eqx.tree_at(lambda layer: layer.weight, model["query"], jnp.full((8, 6), value))
    with pytest.raises((errors.ArrayValueError, errors.ArrayTypeError), match="query: weight"):
        adamss.attach(model, config(targets=["query"]))


def test_models_that_have_shapes_alone(file):
    model = nnx.eval_shape(net)
    for verb, how in ((adamss.attach, config()), (adamss.load, file)):
        unchanged(errors.ArrayTypeError, r"blocks\.0\.query: .*load the weights first", verb, model, how)
    with pytest.raises(errors.ArrayTypeError, match=r"query: .*load the weights first"):
        adamss.attach(eqx.filter_eval_shape(equinox_model), config(targets=["query"]))


def test_the_factors_dtype_needs_64_bits():
    model = net()
    settings = config(factor_dtype="float64")
    match = "factor_dtype = 'float64': flax has no such dtype"
    unchanged(errors.ConfigError, match, adamss.attach, model, settings)
    with jax.enable_x64(True):
        adamss.attach(model, settings)
        assert model.blocks[0]["query"].adamss.default.B.dtype == jnp.float64


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"targets": ["quary"]}, r"targets = \['quary'\].*near matches: query"),
        ({"targets": r".*\.quary"}, r"targets = .*matches no module"),
        ({"targets": ["zzz"]}, r"the model has modules called .*query"),
        ({"modules_to_save": ["clasifier"]}, r"modules_to_save.*near matches: classifier"),
        ({"modules_to_save": ["query"]}, r"blocks\.0\.query.*modules_to_save"),
        ({"modules_to_save": ["blocks"]}, r"blocks\.0\.query.*modules_to_save"),
        ({"targets": ["blocks"]}, "blocks is a List"),
        ({"targets": ["norm"]}, "norm is a LayerNorm"),
        ({"targets": ["0"]}, "0 is a Dict"),
    ],
)
def test_targets_that_do_not_fit(changes, match):
    kind = errors.LayerTypeError if " is a " in match else errors.TargetError
    unchanged(kind, match, adamss.attach, net(), config(**changes))


def test_targets_of_equinox_models():
    with pytest.raises(errors.TargetError, match=r"near matches: query"):
        adamss.attach(equinox_model(), config(targets=["quary"]))
    with pytest.raises(errors.LayerTypeError, match="norm is a LayerNorm"):
        adamss.attach({"norm": eqx.nn.LayerNorm(4)}, config(targets=["norm"]))


def test_an_attribute_where_the_adapter_goes():
    model = net()
    model.blocks[0]["query"].adamss = 3
    unchanged(errors.LayerError, "attribute 'adamss'", adamss.attach, model, config())


def test_models_and_configs_of_the_wrong_kind():
    for model, kind in (({"query": jnp.ones((3, 4))}, r"builtins\.dict"), (jnp.ones((3, 4)), "ArrayImpl")):
        with pytest.raises(errors.BackendError, match=kind) as caught:
            adamss.attach(model, config())
        assert isinstance(caught.value, TypeError)
    for model in (net(), equinox_model()):
        with pytest.raises(errors.ConfigTypeError, match=r"AdamssConfig, found dict"):
            adamss.attach(model, {"targets": ["query"]})


def test_verbs_out_of_order(tmp_path):
    model = net()
    for verb in (
        adamss.detach,
        adamss.merge,
        adamss.unmerge,
        adamss.summary,
        adamss.trainable_parameters,
        lambda m: adamss.save(m, tmp_path / "a.safetensors"),
        lambda m: adamss.disabled(m).__enter__(),
    ):
        unchanged(errors.StateError, "no adapters.*attach", verb, model)
    assert not list(tmp_path.iterdir())
    adamss.attach(model, config())
    unchanged(errors.StateError, "already.*detach", adamss.attach, model, config())
    unchanged(errors.StateError, "not merged", adamss.unmerge, model)
    adamss.merge(model)
    unchanged(errors.StateError, "merged already.*unmerge", adamss.merge, model)


def test_verbs_out_of_order_on_equinox_models(tmp_path):
    model = equinox_model()
    for verb in (adamss.detach, adamss.merge, adamss.unmerge, adamss.summary, adamss.trainable_parameters):
        with pytest.raises(errors.StateError, match="no adapters"):
            verb(model)
    with pytest.raises(errors.StateError, match="no adapters"):
        trainable_filter(model)
    model = adamss.attach(model, config(targets=["query"]))
    with pytest.raises(errors.StateError, match="already"):
        adamss.attach(model, config(targets=["query"]))
    with pytest.raises(errors.StateError, match="not merged"):
        adamss.unmerge(model)
    with pytest.raises(errors.StateError, match="merged already"):
        adamss.merge(adamss.merge(model))


def test_files_that_do_not_fit_the_model(tmp_path):
    path = tmp_path / "a.safetensors"
    adamss.save(filled(adamss.attach(net(), config(modules_to_save=SAVED))), path)

    def refused(model, match):
        unchanged(errors.CheckpointError, match, adamss.load, model, path)

    refused(net(seed=1), r"blocks\.0\.query: the base weight is not the one")
    other = net()
    other.blocks[1]["value"] = nnx.Linear(8, 9, rngs=nnx.Rngs(0))
    refused(other, r"blocks\.1\.value: the weight has shape \(8, 9\).*\(8, 8\)")
    other = net()
    del other.blocks[1]["query"]
    refused(other, r"no layer 'blocks\.1\.query'")
    other = net()
    other.classifier = nnx.Linear(8, 7, rngs=nnx.Rngs(0))
    refused(other, r"classifier\.\w+: the file has shape .*3.*, the model .*7")
    other = net()
    other.classifier = nnx.Linear(8, 3, use_bias=False, rngs=nnx.Rngs(0))
    refused(other, r"classifier: the file holds bias, weight, the model has weight")
    unchanged(errors.StateError, "already", adamss.load, adamss.attach(net(), config()), path)


def test_tied_modules_in_a_file_of_a_model_that_has_two(tmp_path):
    def pair(*, tied):
        model = nnx.Module()
        model.p = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        model.q = model.p if tied else nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        return model

    adamss.save(adamss.attach(pair(tied=False), config(targets=["p", "q"])), tmp_path / "a.safetensors")
    with pytest.raises(errors.CheckpointError, match="'p' and 'q' are one module"):
        adamss.load(pair(tied=True), tmp_path / "a.safetensors")


def test_an_update_that_overflows_cannot_be_merged():
    model = adamss.attach(net(dtype=jnp.float16), config())
    C = model.blocks[1]["query"].adamss.default.C
    C.set_value(jnp.full_like(C.get_value(), 1e6))
    unchanged(errors.ArrayValueError, r"blocks\.1\.query: .*overflows", adamss.merge, model)


RNG = np.random.default_rng(0)
DEGENERATE = {
    "zero": np.zeros((8, 6)),
    "rank one": np.ones((8, 6)),
    "duplicate columns": np.tile(RNG.standard_normal((8, 2)), 3),
    "tiny": np.eye(8, 6) * 1e-30,
    "huge": np.eye(8, 6) * 1e30,
    "one input": RNG.standard_normal((1, 6)),
    "one output": RNG.standard_normal((8, 1)),
    "one number": RNG.standard_normal((1, 1)),
}


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("basis", ["shared", "per_subspace"])
def test_degenerate_weights_work(name, basis):
    W = jnp.asarray(DEGENERATE[name], "float32")
    model, x = nnx.Sequential(nnx.Linear(*W.shape, rngs=nnx.Rngs(0))), inputs(2, W.shape[0])
    model.layers[0].kernel.set_value(W)
    expected = model(x)
    adamss.attach(model, adamss.AdamssConfig(targets=["0"], subspaces=3, subspace_rank=2, basis=basis))
    f = model.layers[0].adamss.default.factors()
    assert all(np.isfinite(array).all() for array in (f.A, f.B, f.C))
    for A, columns in zip(f.A, core.basis_ranks(f), strict=False):
        orthonormal = np.diag(np.arange(A.shape[1]) < columns)
        assert np.abs(A.T @ A - orthonormal).max() <= 1e-5
    assert np.bincount(f.labels, minlength=len(f.ranks)).min() >= 1
    assert jnp.array_equal(model(x), expected)
    slopes = gradient(lambda m: m(x).sum(), model)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
