"""Test situations that were reported as bugs in other libraries for adapters, averaging and transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

eqx, nnx, optax = (pytest.importorskip(name) for name in ("equinox", "flax.nnx", "optax"))

import adamss  # noqa: E402
import adamss_jax  # noqa: E402
from adamss import AdamssConfig, BudgetConfig, core  # noqa: E402
from adamss.backend import backend_for  # noqa: E402
from adamss.errors import ConfigError, LayerError, StateError  # noqa: E402

MODELS = {
    "nnx": (lambda: nnx.List([nnx.Linear(16, 24, rngs=nnx.Rngs(0))]), lambda model: model[0]),
    "equinox": (
        lambda: [eqx.nn.Linear(16, 24, key=jax.random.key(0))],
        lambda model: jax.vmap(model[0]),
    ),
}
EACH = pytest.mark.parametrize("kind", MODELS)
X = jax.random.normal(jax.random.key(1), (5, 16))


def attached(kind, *, seed=2, consolidated=False, **settings):
    """Return an adapted model with an update, whose second subspace is frozen, or folded if `consolidated`."""
    model = adamss.attach(
        MODELS[kind][0](), AdamssConfig(**{"targets": ["0"], "rank": 8, "subspaces": 4, **settings})
    )
    backend = backend_for(model)
    model = backend.set_active(model, {"0": jnp.arange(4) != 1})
    C = jax.random.normal(jax.random.key(seed), backend.bank(model).only().layers["0"].C.shape)
    if kind == "nnx":
        model[0].adamss.default.C.set_value(C)
    else:
        model = eqx.tree_at(lambda m: m[0].adapters["default"].C, model, C)
    return adamss.consolidate(model) if consolidated else model


def averaged(kind, first, second):
    """Return the weighted mean of all arrays of two models, as if all of them were weights."""
    if kind == "equinox":
        return jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b if eqx.is_array(a) else a, first, second)
    structure, state = nnx.split(first)
    return nnx.merge(structure, jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, state, nnx.state(second)))


@EACH
@pytest.mark.parametrize("consolidated", [False, True])
def test_an_average_of_all_arrays(kind, consolidated, tmp_path):
    first, second = attached(kind), attached(kind, seed=3)
    expected = 0.9 * MODELS[kind][1](first)(X) + 0.1 * MODELS[kind][1](second)(X)
    if consolidated:
        first, second = adamss.consolidate(first), adamss.consolidate(second)
    mean = averaged(kind, first, second)
    np.testing.assert_allclose(MODELS[kind][1](mean)(X), expected, rtol=1e-5, atol=1e-5)
    if not consolidated:  # no mask describes which subspaces a mean of folded weights contains
        adamss.save(mean, tmp_path / "a.safetensors")
        again = adamss.load(MODELS[kind][0](), tmp_path / "a.safetensors")
        np.testing.assert_allclose(MODELS[kind][1](again)(X), expected, rtol=1e-5, atol=1e-5)
        merged = adamss.merge(mean)
        np.testing.assert_allclose(MODELS[kind][1](merged)(X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", core.cost.ORDERS)
@pytest.mark.parametrize("hessian", [jax.hessian, lambda f, n: jax.jacrev(jax.jacrev(f, n), n)])
def test_second_derivatives(hessian, order):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        kernel, x = jnp.asarray(rng.standard_normal((6, 8))), jnp.asarray(rng.standard_normal((4, 6)))
        decomposition = core.decompose(kernel, 5)
        f = core.initial_factors(decomposition, core.segment(decomposition, 3), 2)
        f = f._replace(C=jnp.asarray(rng.standard_normal(f.C.shape)), active=jnp.asarray([True, False, True]))
        masks = core.trained_elements(f)

        def adapted(x, B, C):
            return jnp.square(
                jnp.tanh(adamss_jax.linear(x, kernel, None, f._replace(B=B, C=C), order=order))
            ).sum()

        def plain(x, B, C):
            B, C = (jnp.where(m, a, jax.lax.stop_gradient(a)) for m, a in zip(masks, (B, C), strict=True))
            return jnp.square(jnp.tanh(x @ (kernel + core.delta(f._replace(B=B, C=C))))).sum()

        found, expected = (hessian(g, (0, 1, 2))(x, f.B, f.C) for g in (adapted, plain))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@EACH
@pytest.mark.parametrize("form", ["adapted", "consolidated", "merged"])
def test_exported_for_any_number_of_inputs(kind, form):
    model = attached(kind, consolidated=form == "consolidated")
    model = adamss.merge(model) if form == "merged" else model
    (rows,) = jax.export.symbolic_shape("rows")
    call = jax.jit(lambda x: MODELS[kind][1](model)(x))
    exported = jax.export.export(call)(jax.ShapeDtypeStruct((rows, 16), jnp.float32))
    for x in (X, X[:1], jnp.tile(X, (40, 1))):
        np.testing.assert_allclose(exported.call(x), MODELS[kind][1](model)(x), rtol=1e-5, atol=1e-5)


def test_where_no_rank_is_promoted():
    schedule = BudgetConfig(target=2, end_step=3)
    with jax.numpy_rank_promotion("raise"):
        model = adamss.attach(
            MODELS["nnx"][0](),
            AdamssConfig(targets=["0"], rank=8, subspaces=4, include_bias=True, budget=schedule),
        )
        optimizer = nnx.Optimizer(model, adamss_jax.budgeted(optax.adamw(1e-2), model), wrt=nnx.LoRAParam)

        @nnx.jit
        def step(model, optimizer, x):
            of = nnx.DiffState(0, nnx.LoRAParam)
            optimizer.update(model, nnx.grad(lambda m: jnp.square(m[0](x)).mean(), argnums=of)(model))

        for _ in range(4):
            step(model, optimizer, X)
        model = adamss_jax.synchronise(model, optimizer)
        assert adamss.summary(model).total.active == 2
        y = model[0](X)
        for verb in (adamss.consolidate, adamss.merge, adamss.unmerge):
            model = verb(model)
            np.testing.assert_allclose(model[0](X), y, rtol=1e-4, atol=1e-5)
        f = backend_for(model).bank(model).only().layers["0"]
        base = adamss.detach(model)
        kernel, bias = base[0].kernel.get_value(), base[0].bias.get_value()
        np.testing.assert_allclose(adamss_jax.linear(X, kernel, bias, f), y, rtol=1e-4, atol=1e-5)


class Half(nnx.Linear):
    def __call__(self, x):
        return super().__call__(x) / 2


class HalfOfEquinox(eqx.nn.Linear):
    def __call__(self, x, *, key=None):
        return super().__call__(x) / 2


@EACH
@pytest.mark.parametrize("verb", [adamss.merge, adamss.consolidate])
def test_a_layer_that_is_not_linear_in_its_weight_is_not_merged(kind, verb, monkeypatch):
    make = {
        "nnx": lambda: nnx.List([Half(16, 24, rngs=nnx.Rngs(0))]),
        "equinox": lambda: [HalfOfEquinox(16, 24, key=jax.random.key(0))],
    }[kind]
    monkeypatch.setitem(MODELS, kind, (make, MODELS[kind][1]))
    model = attached(kind)
    y = MODELS[kind][1](model)(X)
    with pytest.raises(LayerError, match="0: its forward is not that of its weight alone"):
        verb(model)
    np.testing.assert_array_equal(MODELS[kind][1](model)(X), y)
    base = adamss.detach(model)
    np.testing.assert_array_equal(MODELS[kind][1](base)(X), MODELS[kind][1](make())(X))


class Two(nnx.Module):
    def __init__(self):
        self.first, self.second = (nnx.Linear(16, 16, rngs=nnx.Rngs(seed)) for seed in (0, 1))


def test_a_layer_that_was_replaced_is_named(tmp_path):
    settings = AdamssConfig(targets=["first", "second"], rank=8, subspaces=4)
    nnx_model = adamss.attach(Two(), settings)
    nnx_model.second = nnx.Linear(16, 16, rngs=nnx.Rngs(2))
    keys = jax.random.split(jax.random.key(0), 3)
    tree = {
        name: eqx.nn.Linear(16, 16, key=key) for name, key in zip(("first", "second"), keys, strict=False)
    }
    equinox_model = adamss.attach(tree, settings) | {"second": eqx.nn.Linear(16, 16, key=keys[2])}
    for model, fresh in ((nnx_model, Two()), (equinox_model, tree)):
        for verb in (adamss.merge, adamss.detach, adamss.summary, adamss.trainable_parameters):
            with pytest.raises(StateError, match="second has been replaced by another module"):
                verb(model)
        with pytest.warns(adamss.AdamssWarning, match="second has been replaced .* the file is without it"):
            adamss.save(model, tmp_path / "a.safetensors")
        assert [row.path for row in adamss.summary(adamss.load(fresh, tmp_path / "a.safetensors")).rows] == [
            "first"
        ]


def test_a_schedule_that_nobody_follows_is_told_when_saving(tmp_path):
    model = attached("nnx", budget=BudgetConfig(target=2, end_step=7))
    model = backend_for(model).set_active(model, {"0": jnp.ones(4, bool)})
    with pytest.warns(
        adamss.AdamssWarning, match=r"a budget of 2 subspaces, but all 4 .*adamss_jax\.budgeted"
    ):
        adamss.save(model, tmp_path / "a.safetensors")
    adamss_jax.budgeted(optax.sgd(0.1), model)
    adamss.save(model, tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("tx", "why"),
    [
        (
            lambda: optax.MultiSteps(optax.adamw(0.1), 4),
            r"put it around: optax\.MultiSteps\(adamss_jax\.budgeted",
        ),
        (
            lambda: optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
            "count every batch as a step",
        ),
        (
            lambda: optax.chain(optax.clip(1.0), optax.contrib.schedule_free_adamw(0.1)),
            "to which frozen elements would be moved",
        ),
    ],
)
def test_what_cannot_be_inside_a_budget_is_refused(tx, why):
    model = attached("nnx", budget=BudgetConfig(target=2, end_step=4))
    with pytest.raises(ConfigError, match=why):
        adamss_jax.budgeted(tx(), model).init(adamss.trainable_parameters(model))
