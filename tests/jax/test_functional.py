"""`adamss_jax.linear` under JAX's transformations, against the float64 NumPy reference."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adamss_jax
from adamss import core
from adamss.core import Factors
from adamss_conformance.tolerances import RELATIVE_TOLERANCE, assert_agrees

D, N, K, R = 5, 9, 3, 4
VARIANTS = {
    "shared, rank 1": ((1, 1, 1), True, 0),
    "shared, ranks 3 1 2, bias": ((3, 1, 2), True, 1),
    "per subspace, rank 1, bias": ((1, 1, 1), False, 1),
    "per subspace, ranks 3 1 2": ((3, 1, 2), False, 0),
}


class Problem(NamedTuple):
    """Arrays of a layer, and what is added up of its output."""

    x: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray
    factors: Factors
    dy: np.ndarray


def problem(variant="shared, ranks 3 1 2, bias", *, tokens=(2, 3), d=D, n=N, seed=0):
    """Return a problem in float64 whose subspace 1 is frozen."""
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
    """Return NumPy arrays as JAX's, floating point in this dtype."""
    return jax.tree.map(lambda a: jnp.asarray(a, dtype if a.dtype.kind == "f" else None), tree)


def run(trained, x, kernel, bias, factors):
    return adamss_jax.linear(x, kernel, bias, factors._replace(**trained))


def gradients(p, apply=run):
    """Return y, and the gradients of ``sum(dy * y)`` with respect to the trained factors and x."""
    trained = {"B": p.factors.B, "C": p.factors.C}
    y, vjp = jax.vjp(lambda trained, x: apply(trained, x, p.kernel, p.bias, p.factors), trained, p.x)
    return (y, *vjp(p.dy))


def agrees(actual, expected, what):
    assert_agrees(actual, expected, dtype="float64", what=what, scale=max(1.0, float(np.abs(expected).max())))


def assert_reference(found, p):
    y, trained, dx = found
    agrees(y, core.linear(p.x, p.kernel, p.bias, p.factors), "y")
    expected = core.linear_vjp(p.dy, p.x, p.kernel, p.factors)
    agrees(dx, expected.x, "gradient of x")
    for name, gradient in trained.items():
        agrees(gradient, getattr(expected, name), f"gradient of {name}")


each_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


# ---- transformations ---------------------------------------------------------------------------------


def test_values_and_gradients_without_a_transformation(x64):
    assert_reference(gradients(on_device(problem())), problem())


@each_variant
@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint], ids=["jit", "checkpoint"])
def test_values_and_gradients(variant, transform, x64):
    p = problem(variant)
    assert_reference(jax.jit(gradients, static_argnums=1)(on_device(p), transform(run)), p)


@pytest.mark.parametrize("tokens", [(), (1,), (0,), (2, 0, 3)], ids=str)
def test_any_leading_axes(tokens, x64):
    p = problem(tokens=tokens)
    y, trained, dx = gradients(on_device(p))
    assert (y.shape, dx.shape) == ((*tokens, N), (*tokens, D))
    if 0 not in tokens:
        assert_reference((y, trained, dx), p)
    assert all(np.isfinite(gradient).all() for gradient in trained.values())


@each_variant
def test_vmap_over_inputs_is_the_batched_call(variant, x64):
    p = problem(variant)
    batched = jax.vmap(jax.vmap(run, (None, 0, None, None, None)), (None, 0, None, None, None))
    assert_reference(jax.jit(gradients, static_argnums=1)(on_device(p), batched), p)


@each_variant
def test_vmap_over_layers_and_their_factors(variant, x64):
    """Labels and masks differ from layer to layer: nothing of them is a constant of the program."""
    layers = [problem(variant, seed=seed) for seed in range(3)]
    layers[2] = layers[2]._replace(factors=layers[2].factors._replace(active=np.asarray([False, True, True])))
    assert len({tuple(p.factors.labels) for p in layers}) == 3
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *map(on_device, layers))
    y, trained, dx = gradients(stacked, jax.jit(jax.vmap(run)))
    for i, p in enumerate(layers):
        assert_reference((y[i], {name: gradient[i] for name, gradient in trained.items()}, dx[i]), p)


@pytest.mark.parametrize("remat", [False, True], ids=["", "remat"])
@each_variant
def test_scan_over_stacked_layers(variant, remat, x64):
    layers = [problem(variant, n=D, seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *(on_device(p) for p in layers))
    x, dy = on_device(layers[0].x), on_device(layers[0].dy)

    def scanned(trained, x):
        def body(x, layer):
            trained, p = layer
            return run(trained, x, p.kernel, p.bias, p.factors), None

        return jax.lax.scan(jax.checkpoint(body) if remat else body, x, (trained, stacked))[0]

    trained = {"B": stacked.factors.B, "C": stacked.factors.C}
    y, vjp = jax.vjp(jax.jit(scanned), trained, x)
    found, dx = vjp(dy)

    between = [layers[0].x]
    for p in layers:
        between.append(core.linear(between[-1], p.kernel, p.bias, p.factors))
    agrees(y, between[-1], "y")
    upstream = layers[0].dy
    for i in (2, 1, 0):
        expected = core.linear_vjp(upstream, between[i], layers[i].kernel, layers[i].factors)
        for name in "BC":
            agrees(found[name][i], getattr(expected, name), f"gradient of {name} in layer {i}")
        upstream = expected.x
    agrees(dx, upstream, "gradient of x")


def test_gradients_of_what_is_frozen(x64):
    """Kernel and bias have theirs, of use to whoever trains them too; the basis is a constant."""
    p = problem()
    arrays = on_device(p)
    trained = {"B": arrays.factors.B, "C": arrays.factors.C}

    def value(kernel, bias, A):
        return jnp.sum(arrays.dy * run(trained, arrays.x, kernel, bias, arrays.factors._replace(A=A)))

    dkernel, dbias, dA = jax.grad(value, argnums=(0, 1, 2))(arrays.kernel, arrays.bias, arrays.factors.A)
    agrees(dkernel, np.einsum("abd,abn->dn", p.x, p.dy), "gradient of kernel")
    agrees(dbias, p.dy.sum((0, 1)), "gradient of bias")
    assert not np.any(dA)


@each_variant
def test_frozen_subspaces_get_a_gradient_of_exactly_zero(variant, x64):
    p = problem(variant)
    _, trained, _ = jax.jit(gradients)(on_device(p))
    ranks, labels = p.factors.ranks, p.factors.labels
    columns = np.repeat(np.arange(K), ranks) == 1
    assert np.all(trained["B"][:, columns] == 0)
    assert np.all(trained["B"][:, ~columns] != 0)
    padding = np.arange(ranks.max())[:, None] >= ranks[labels]
    assert np.all((trained["C"] == 0) == (padding | (labels == 1)))


@each_variant
def test_second_derivatives_in_reverse_mode(variant, x64):
    """The gradient of a slope, against differences of that slope along every coordinate."""
    p = on_device(problem(variant, tokens=(2,)))
    point = {"B": p.factors.B, "C": p.factors.C}, p.x
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape)), point)

    @jax.jit
    def slope(point):
        def value(point):
            return jnp.sum(jnp.tanh(0.3 * run(*point, p.kernel, p.bias, p.factors)))

        pairs = zip(jax.tree.leaves(jax.grad(value)(point)), jax.tree.leaves(direction), strict=True)
        return sum(jnp.vdot(gradient, along) for gradient, along in pairs)

    flat, restore = jax.flatten_util.ravel_pytree(point)
    second, _ = jax.flatten_util.ravel_pytree(jax.jit(jax.grad(slope))(point))
    steps = 1e-4 * jnp.eye(flat.size)
    differences = (
        jax.vmap(lambda step: slope(restore(flat + step)) - slope(restore(flat - step)))(steps) / 2e-4
    )
    # The error of a central difference is of the order of the step squared, far above that of the sums.
    assert_agrees(second, differences, dtype="float32", what="second derivative")


def test_hessian(x64):
    """Forward mode over the gradient is allowed: the gradient is an ordinary function."""
    p = on_device(problem(tokens=()))

    def value(C):
        trained = {"B": p.factors.B, "C": C}
        return jnp.sum(jnp.square(run(trained, p.x, p.kernel, p.bias, p.factors)))

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
        differentiate(lambda x: run(trained, x, p.kernel, p.bias, p.factors), p.x)


# ---- half precision ----------------------------------------------------------------------------------

each_half = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


@each_half
@each_variant
def test_half_precision(variant, dtype):
    """Outputs in the dtype of the base, gradients in that of the factors, both as near as the inputs' rounding."""
    p = problem(variant, tokens=(20,))
    rounded = on_device(p, dtype)._replace(factors=on_device(p.factors, "float32"))
    exact = jax.tree.map(
        lambda a: np.asarray(a, "float64") if a.dtype.kind not in "bi" else np.asarray(a), rounded
    )
    y, trained, dx = jax.jit(gradients)(rounded)
    assert {array.dtype for array in (y, dx)} == {jnp.dtype(dtype)}
    assert {gradient.dtype for gradient in trained.values()} == {jnp.dtype("float32")}
    magnitudes = exact.factors._replace(**{name: np.abs(getattr(exact.factors, name)) for name in "ABC"})
    bound = core.linear(np.abs(exact.x), np.abs(exact.kernel), np.abs(exact.bias), magnitudes)
    expected = core.linear(exact.x, exact.kernel, exact.bias, exact.factors)
    assert_agrees(y, expected, dtype=dtype, what="y", scale=float(bound.max()))
    expected = core.linear_vjp(exact.dy, exact.x, exact.kernel, exact.factors)
    bound = core.linear_vjp(np.abs(exact.dy), np.abs(exact.x), np.abs(exact.kernel), magnitudes)
    for name, gradient in (*trained.items(), ("x", dx)):
        scale = float(getattr(bound, name).max())
        assert_agrees(gradient, getattr(expected, name), dtype=dtype, what=f"gradient of {name}", scale=scale)


@each_half
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("bias_row", ["shared, rank 1", "shared, ranks 3 1 2, bias"])
def test_start_equals_the_base_for_inputs_at_the_end_of_float16(dtype, transform, bias_row):
    p = problem(bias_row, tokens=(4,))
    p = on_device(p._replace(kernel=p.kernel * 1e-3), dtype)._replace(factors=on_device(p.factors, "float32"))
    x = jnp.full_like(p.x, jnp.finfo("float16").max).at[0].multiply(-1)
    zero = {"B": p.factors.B, "C": jnp.zeros_like(p.factors.C)}
    expected = transform(lambda x: x @ p.kernel + p.bias)(x)
    y = transform(partial(run, zero))(x, p.kernel, p.bias, p.factors)
    assert np.isfinite(expected).all()
    assert y.dtype == dtype
    assert jnp.array_equal(y, expected)


@each_half
def test_sums_over_many_tokens_are_not_done_in_half_precision(dtype):
    """2,049 ones add up to 2,049, which neither type can hold."""
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
    _, trained, _ = jax.jit(gradients)(p)
    assert float(trained["C"][0, 0]) == 2 * tokens  # z is 2: one from the input, one from the bias row
    assert float(trained["B"][0, 0]) == 2 * tokens


# ---- sharding ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_a_mesh():
    """Return what `on_a_mesh.py` found: four devices need a process of their own."""
    command = [sys.executable, str(Path(__file__).with_name("on_a_mesh.py"))]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


LINEAR = [
    "Auto: kernel on d",
    "Auto: kernel on n",
    "Auto: C and labels on n",
    "Auto: kernel and C on n",
    "Auto: all on n",
    "Auto: x on batch",
    "Auto: x on d, kernel on d",
    "Auto: A on d, B on P",
    "Explicit: kernel on n",
    "Explicit: x on batch",
]
MODELS = [
    "Auto: kernel on d",
    "Auto: kernel on n",
    "Auto: x on batch",
    "Explicit: kernel on d",
    "Explicit: x on batch",
]


@pytest.mark.parametrize("case", LINEAR)
def test_sharded_arrays_give_the_same_values_and_gradients(case, on_a_mesh):
    assert list(on_a_mesh["linear"]) == LINEAR
    assert on_a_mesh["linear"][case] <= RELATIVE_TOLERANCE["float32"]


@pytest.mark.parametrize("case", MODELS)
def test_verbs_on_a_model_that_is_sharded(case, on_a_mesh):
    assert list(on_a_mesh["attach"]) == MODELS
    found = on_a_mesh["attach"][case]
    assert all(value for value in found.values() if isinstance(value, bool)), found
    numbers = {name: value for name, value in found.items() if not isinstance(value, bool)}
    assert set(numbers) == {"outputs", "merged", "gradients"}
    assert max(numbers.values()) <= RELATIVE_TOLERANCE["float32"], found
