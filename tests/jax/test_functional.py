"""Compare `adamss_jax.linear` under JAX's transformations with the float64 NumPy reference."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_helpers import run_python

import adamss_jax
from adamss import core
from adamss.core import Factors
from adamss.core.cost import ORDERS
from adamss.errors import ConfigError
from adamss_conformance.cases import Problem
from adamss_conformance.drivers.nnx import NnxDriver
from adamss_conformance.laws.linear import assert_gradients, assert_update
from adamss_conformance.tolerances import RELATIVE_TOLERANCE, assert_agrees

D, N, K, R = 5, 9, 3, 4
VARIANTS = {
    "shared, rank 1": ((1, 1, 1), True, 0),
    "shared, ranks 3 1 2, bias": ((3, 1, 2), True, 1),
    "per subspace, rank 1, bias": ((1, 1, 1), False, 1),
    "per subspace, ranks 3 1 2": ((3, 1, 2), False, 0),
}


def problem(variant="shared, ranks 3 1 2, bias", *, tokens=(2, 3), d=D, n=N, seed=0):
    """Return a problem in float64, in which subspace 1 is frozen."""
    ranks, shared, bias_row = VARIANTS[variant]
    rng, ranks = np.random.default_rng(seed), np.asarray(ranks)
    labels = rng.permutation(np.arange(n) % K)
    C = np.where(np.arange(ranks.max())[:, None] < ranks[labels], rng.standard_normal((ranks.max(), n)), 0.0)
    A = rng.standard_normal((1 if shared else K, d + bias_row, R))
    B = rng.standard_normal((R, ranks.sum()))
    factors = Factors(A, B, C, labels, ranks, np.asarray([True, False, True]))
    x, kernel, bias = (rng.standard_normal(shape) for shape in ((*tokens, d), (d, n), n))
    return Problem(x, kernel, bias, factors, rng.standard_normal((*tokens, n)))


def on_device(tree, dtype="float64"):
    """Convert NumPy arrays to JAX, with floating-point arrays in this dtype."""
    return jax.tree.map(lambda a: jnp.asarray(a, dtype if a.dtype.kind == "f" else None), tree)


def run(trained, x, kernel, bias, factors, *, order=None):
    return adamss_jax.linear(x, kernel, bias, factors._replace(**trained), order=order)


def by(order):
    return partial(run, order=order)


def gradients(p, apply=run):
    """Return y, and the gradients of ``sum(dy * y)`` with respect to the trained factors and x."""
    trained = {"B": p.factors.B, "C": p.factors.C}
    y, vjp = jax.vjp(lambda trained, x: apply(trained, x, p.W, p.b, p.factors), trained, p.x)
    return (y, *vjp(p.dy))


def agrees(actual, expected, what):
    assert_agrees(actual, expected, dtype="float64", what=what, scale=max(1.0, float(np.abs(expected).max())))


def assert_reference(found, p):
    y, trained, dx = found
    agrees(y, core.linear(p.x, p.W, p.b, p.factors), "y")
    expected = core.linear_vjp(p.dy, p.x, p.W, p.factors)
    agrees(dx, expected.x, "gradient of x")
    for name, gradient in trained.items():
        wanted = getattr(expected, name)
        agrees(gradient, wanted, f"gradient of {name}")
        assert not np.any(np.asarray(gradient)[wanted == 0]), f"gradient of {name} that is frozen, or padding"


CASES = [(variant, "factors_first") for variant in VARIANTS]
CASES += [(variant, "input_first") for variant, (_, shared, _) in VARIANTS.items() if shared]
each_case = pytest.mark.parametrize(
    ("variant", "order"), CASES, ids=[f"{order}: {variant}" for variant, order in CASES]
)
each_order = pytest.mark.parametrize("order", ORDERS)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@each_case
@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint], ids=["jit", "checkpoint"])
def test_values_and_gradients(variant, order, transform, x64):
    p = problem(variant)
    assert_reference(jax.jit(gradients, static_argnums=1)(on_device(p), transform(by(order))), p)


@each_order
@pytest.mark.parametrize("tokens", [(), (1,), (2, 3), (0,), (2, 0, 3)], ids=str)
def test_any_leading_axes(tokens, order, x64):
    p = problem(tokens=tokens)
    y, trained, dx = gradients(on_device(p), by(order))
    assert (y.shape, dx.shape) == ((*tokens, N), (*tokens, D))
    if 0 not in tokens:
        assert_reference((y, trained, dx), p)
    assert all(np.isfinite(gradient).all() for gradient in trained.values())


@each_case
def test_vmap_over_inputs_is_the_batched_call(variant, order, x64):
    p = problem(variant)
    batched = jax.vmap(jax.vmap(by(order), (None, 0, None, None, None)), (None, 0, None, None, None))
    assert_reference(jax.jit(gradients, static_argnums=1)(on_device(p), batched), p)


@each_case
def test_vmap_over_layers_and_their_factors(variant, order, x64):
    """Labels and masks differ between the layers, so the program must not treat them as constants."""
    layers = [problem(variant, seed=seed) for seed in range(3)]
    layers[2] = layers[2]._replace(factors=layers[2].factors._replace(active=np.asarray([False, True, True])))
    assert len({tuple(p.factors.labels) for p in layers}) == 3
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *map(on_device, layers))
    y, trained, dx = gradients(stacked, jax.jit(jax.vmap(by(order))))
    for i, p in enumerate(layers):
        assert_reference((y[i], {name: gradient[i] for name, gradient in trained.items()}, dx[i]), p)


@pytest.mark.parametrize("remat", [False, True], ids=["", "remat"])
@each_case
def test_scan_over_stacked_layers(variant, order, remat, x64):
    layers = [problem(variant, n=D, seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *(on_device(p) for p in layers))
    x, dy = on_device(layers[0].x), on_device(layers[0].dy)

    def scanned(trained, x):
        def body(x, layer):
            trained, p = layer
            return run(trained, x, p.W, p.b, p.factors, order=order), None

        return jax.lax.scan(jax.checkpoint(body) if remat else body, x, (trained, stacked))[0]

    trained = {"B": stacked.factors.B, "C": stacked.factors.C}
    y, vjp = jax.vjp(jax.jit(scanned), trained, x)
    found, dx = vjp(dy)

    between = [layers[0].x]
    for p in layers:
        between.append(core.linear(between[-1], p.W, p.b, p.factors))
    agrees(y, between[-1], "y")
    upstream = layers[0].dy
    for i in (2, 1, 0):
        expected = core.linear_vjp(upstream, between[i], layers[i].W, layers[i].factors)
        for name in "BC":
            agrees(found[name][i], getattr(expected, name), f"gradient of {name} in layer {i}")
        upstream = expected.x
    agrees(dx, upstream, "gradient of x")


def test_gradients_of_what_is_frozen(x64):
    """Kernel and bias have gradients, for users who train them too; the basis A is a constant."""
    p = problem()
    arrays = on_device(p)
    trained = {"B": arrays.factors.B, "C": arrays.factors.C}

    def value(kernel, bias, A):
        return jnp.sum(arrays.dy * run(trained, arrays.x, kernel, bias, arrays.factors._replace(A=A)))

    dkernel, dbias, dA = jax.grad(value, argnums=(0, 1, 2))(arrays.W, arrays.b, arrays.factors.A)
    agrees(dkernel, np.einsum("abd,abn->dn", p.x, p.dy), "gradient of kernel")
    agrees(dbias, p.dy.sum((0, 1)), "gradient of bias")
    assert not np.any(dA)


@each_case
def test_second_derivatives_in_reverse_mode(variant, order, x64):
    """Compare the gradient of a slope with central differences of that slope along every coordinate."""
    p = on_device(problem(variant, tokens=(2,)))
    point = {"B": p.factors.B, "C": p.factors.C}, p.x
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape)), point)

    @jax.jit
    def slope(point):
        def value(point):
            return jnp.sum(jnp.tanh(0.3 * by(order)(*point, p.W, p.b, p.factors)))

        pairs = zip(jax.tree.leaves(jax.grad(value)(point)), jax.tree.leaves(direction), strict=True)
        return sum(jnp.vdot(gradient, along) for gradient, along in pairs)

    flat, restore = jax.flatten_util.ravel_pytree(point)
    second, _ = jax.flatten_util.ravel_pytree(jax.jit(jax.grad(slope))(point))
    steps = 1e-4 * jnp.eye(flat.size)
    differences = (
        jax.vmap(lambda step: slope(restore(flat + step)) - slope(restore(flat - step)))(steps) / 2e-4
    )
    # Frozen values are constants in the gradient and in its derivative.
    columns, rows = core.trained_elements(p.factors)
    trained = jax.tree.map(
        lambda mask, array: jnp.broadcast_to(mask, array.shape), {"B": columns, "C": rows}, point[0]
    )
    mask, _ = jax.flatten_util.ravel_pytree((trained, jnp.ones_like(p.x, bool)))
    # The error of a central difference is of the order of the squared step, far above the rounding error of the sums.
    assert_agrees(second, differences * mask, dtype="float32", what="second derivative")


def test_hessian(x64):
    """Forward mode over the gradient works, because the gradient is an ordinary function."""
    p = on_device(problem(tokens=()))

    def value(C):
        trained = {"B": p.factors.B, "C": C}
        return jnp.sum(jnp.square(run(trained, p.x, p.W, p.b, p.factors)))

    hessian = jax.jit(jax.hessian(value))(p.factors.C)
    reverse = jax.jit(jax.jacrev(jax.jacrev(value)))(p.factors.C)
    assert_agrees(hessian, reverse, dtype="float64", what="Hessian of C")
    # By hand: y_j = ... + sum_i z_ij C_ij, so that d2 y_j^2 / dC_ij dC_kj = 2 z_ij z_kj.
    z = np.asarray(p.x) @ np.asarray(core.contract(p.factors))[:D] + np.asarray(core.contract(p.factors))[D]
    ranks, labels = np.asarray(p.factors.ranks), np.asarray(p.factors.labels)
    for j, k in enumerate(labels):
        own = np.zeros(ranks.max())
        own[: ranks[k]] = z[ranks[:k].sum() :][: ranks[k]] * (k != 1)
        expected = 2 * np.outer(own, own)
        agrees(hessian[:, j, :, j], expected, f"Hessian of column {j}")


@pytest.mark.parametrize(
    "differentiate",
    [
        lambda f, x: jax.jvp(f, (x,), (jnp.ones_like(x),)),
        lambda f, x: jax.jacfwd(f)(x),
        lambda f, x: jax.jvp(jax.jit(f), (x,), (jnp.ones_like(x),)),
    ],
    ids=["jvp", "jacfwd", "jvp of jit"],
)
def test_forward_mode_raises(differentiate):
    p = on_device(problem(), "float32")
    trained = {"B": p.factors.B, "C": p.factors.C}
    with pytest.raises(TypeError, match=r"forward-mode.*custom_vjp"):
        differentiate(lambda x: run(trained, x, p.W, p.b, p.factors), p.x)


each_half = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


@each_half
@each_case
def test_half_precision(variant, order, dtype):
    """Outputs have the dtype of the base and gradients that of the factors, with errors of the inputs' rounding."""
    linear, p = jax.jit(partial(adamss_jax.linear, order=order)), problem(variant, tokens=(20,))
    assert_update(NnxDriver(), linear, p, dtype)
    assert_gradients(NnxDriver(), linear, p, dtype)


@each_order
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("bias_row", ["shared, rank 1", "shared, ranks 3 1 2, bias"])
def test_start_equals_the_base_for_inputs_at_the_end_of_the_dtype(dtype, transform, bias_row, order):
    p = problem(bias_row, tokens=(4,))
    p = on_device(p._replace(W=p.W * 1e-3), dtype)._replace(factors=on_device(p.factors, "float32"))
    x = jnp.full_like(p.x, jnp.finfo(dtype).max).at[0].multiply(-1)
    zero = {"B": p.factors.B, "C": jnp.zeros_like(p.factors.C)}
    expected = transform(lambda x: x @ p.W + p.b)(x)
    y = transform(partial(run, zero, order=order))(x, p.W, p.b, p.factors)
    assert np.isfinite(expected).all()
    assert y.dtype == dtype
    assert jnp.array_equal(y, expected)


@each_half
@each_order
def test_sums_over_many_tokens_are_not_done_in_half_precision(dtype, order):
    """Neither half-precision type can represent 2,049, so a sum of 2,049 ones in it would stop earlier."""
    tokens, ones = 2049, partial(jnp.ones, dtype=dtype)
    f = Factors(
        jnp.ones((1, 2, 1)),
        jnp.ones((1, 1)),
        jnp.ones((1, 1)),
        jnp.zeros(1, int),
        jnp.ones(1, int),
        jnp.ones(1, bool),
    )
    p = Problem(ones((tokens, 1)), ones((1, 1)), ones(1), f, ones((tokens, 1)))
    _, trained, _ = jax.jit(gradients, static_argnums=1)(p, by(order))
    assert float(trained["C"][0, 0]) == 2 * tokens  # z is 2, one from the input and one from the bias row
    assert float(trained["B"][0, 0]) == 2 * tokens


def kept_shapes(p, apply):
    """Return the shapes of the arrays with a row for each token that the backward pass keeps."""
    arrays = on_device(p, "float32")
    trained = {"B": arrays.factors.B, "C": arrays.factors.C}
    _, vjp = jax.vjp(lambda t: apply(t, arrays.x, arrays.W, arrays.b, arrays.factors), trained)
    tokens = arrays.x.shape[0]
    return sorted(leaf.shape for leaf in jax.tree.leaves(vjp) if leaf.ndim == 2 and leaf.shape[0] == tokens)


@pytest.mark.parametrize(
    ("order", "expected"), [("factors_first", [(37, 6), (37, D)]), ("input_first", [(37, R), (37, 6)])]
)
def test_kept_for_the_backward_is_what_the_order_says(order, expected):
    assert D not in (R, 6)
    assert kept_shapes(problem(tokens=(37,)), by(order)) == sorted(expected)
    assert kept_shapes(problem(tokens=(37,)), jax.jit(by(order))) == sorted(expected)


@pytest.mark.parametrize(
    ("backend", "dtype", "tokens", "expected"),
    [
        ("cpu", "float32", (1, 8), "input_first"),
        ("cpu", "float32", (2, 16), "factors_first"),
        ("cpu", "float32", (), "factors_first"),  # a single vector, as under vmap
        ("cpu", "bfloat16", (4, 2048), "factors_first"),
        ("gpu", "float32", (2, 16), "input_first"),
        ("gpu", "float32", (4, 2048), "factors_first"),
        ("gpu", "bfloat16", (4, 2048), "input_first"),
    ],
)
def test_the_order_that_costs_less_is_chosen(backend, dtype, tokens, expected, monkeypatch):
    d, rank, q = 512, 100, 12
    shapes = (1, d, rank), (rank, q), (1, d)
    factors = Factors(
        *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes),
        *(
            jax.ShapeDtypeStruct((size,), dtype)
            for size, dtype in ((d, jnp.int32), (q, jnp.int32), (q, bool))
        ),
    )
    x = jax.ShapeDtypeStruct((*tokens, d), dtype)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)

    def program(order):
        def apply(x, factors):  # a new function each time, because JAX caches what it has traced
            return adamss_jax.update(x, factors, order=order)

        return str(jax.make_jaxpr(apply)(x, factors))

    assert program("factors_first") != program("input_first")
    assert program(None) == program(expected)


def test_without_a_shared_basis_the_factors_come_first(x64):
    p = problem("per subspace, ranks 3 1 2", tokens=(37,))
    assert_reference(gradients(on_device(p), by("input_first")), p)
    assert kept_shapes(p, by("input_first")) == kept_shapes(p, by("factors_first"))


@pytest.mark.parametrize("variant", ["shared, rank 1", "per subspace, ranks 3 1 2"])
def test_an_unknown_order_raises(variant):
    p = on_device(problem(variant), "float32")
    with pytest.raises(ConfigError, match=r"'factors_first', 'input_first'.*'expand'"):
        gradients(p, by("expand"))


@each_order
def test_padding_stays_out_of_the_products_and_gets_no_gradient(order, x64):
    """Stacks and consolidated layers are padded in rank, directions, rows of C, and columns of no subspace."""
    p = problem("shared, ranks 3 1 2, bias")
    f = p.factors
    labels = np.where(f.labels == 1, -1, f.labels)
    garbage = np.where(labels < 0, 7.0, f.C)
    padded = f._replace(
        A=np.pad(f.A, ((0, 0), (0, 0), (0, 2))),
        B=np.pad(f.B, ((0, 2), (0, 3))),
        C=np.pad(garbage, ((0, 1), (0, 0))),
        labels=labels,
    )
    zero = f._replace(C=np.where(labels < 0, 0.0, f.C))
    y, trained, dx = gradients(on_device(p._replace(factors=padded)), by(order))
    expected = core.linear_vjp(p.dy, p.x, p.W, zero)
    agrees(y, core.linear(p.x, p.W, p.b, zero), "y")
    agrees(dx, expected.x, "gradient of x")
    agrees(trained["B"], np.pad(expected.B, ((0, 2), (0, 3))), "gradient of B")
    agrees(trained["C"], np.pad(np.where(labels < 0, 0.0, expected.C), ((0, 1), (0, 0))), "gradient of C")


@pytest.fixture(scope="module")
def on_a_mesh():
    """Return the report of `on_a_mesh.py`, which needs its own process for four devices."""
    return json.loads(run_python(str(Path(__file__).with_name("on_a_mesh.py"))))


def test_sharded_arrays_give_the_same_values_and_gradients(on_a_mesh):
    assert len(on_a_mesh["linear"]) == 10
    for case, difference in on_a_mesh["linear"].items():
        assert difference <= RELATIVE_TOLERANCE["float32"], case


def test_verbs_on_a_model_that_is_sharded(on_a_mesh):
    assert len(on_a_mesh["attach"]) == 5
    for case, found in on_a_mesh["attach"].items():
        numbers = {name: value for name, value in found.items() if not isinstance(value, bool)}
        assert all(value for name, value in found.items() if name not in numbers), (case, found)
        assert set(numbers) == {"outputs", "merged", "gradients"}
        assert max(numbers.values()) <= RELATIVE_TOLERANCE["float32"], (case, found)
