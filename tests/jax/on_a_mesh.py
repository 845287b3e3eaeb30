"""Print, as JSON, the differences between results on a mesh of four devices and on one device.

`test_functional.py` runs this script without arguments, for `adamss_jax.linear`. `test_budget.py` runs it with the
argument ``budget``, for training under a budget. The script needs its own process, because XLA reads the number of
devices when JAX is imported.
"""

import itertools
import json
import os
import sys
from functools import partial

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax_helpers import gradient, loop_of

import adamss
import adamss_jax
from adamss.core import Factors
from adamss.core.cost import ORDERS

D, N, TOKENS, K = 8, 12, 16, 3
SHARDINGS = {
    "kernel on d": {"kernel": P("m", None)},
    "kernel on n": {"kernel": P(None, "m"), "bias": P("m")},
    "C and labels on n": {"C": P(None, "m"), "labels": P("m")},
    "kernel and C on n": {"kernel": P(None, "m"), "bias": P("m"), "C": P(None, "m")},
    "all on n": {"kernel": P(None, "m"), "bias": P("m"), "C": P(None, "m"), "labels": P("m")},
    "x on batch": {"x": P("m", None)},
    "x on d, kernel on d": {"x": P(None, "m"), "kernel": P("m", None)},
    "A on d, B on P": {"A": P(None, "m", None), "B": P("m", None)},
}
EXPLICIT = ("kernel on n", "x on batch")
"""Shardings whose base product JAX computes without an explicit sharding of the result, with replicated factors."""


def problem(*, bias_row):
    rng = np.random.default_rng(0)
    labels, ranks = rng.permutation(np.arange(N) % K), np.asarray([2, 1, 2])
    C = np.where(np.arange(2)[:, None] < ranks[labels], rng.standard_normal((2, N)), 0)
    arrays = {
        "x": rng.standard_normal((TOKENS, D)),
        "kernel": rng.standard_normal((D, N)),
        "bias": rng.standard_normal(N),
        "A": rng.standard_normal((1, D + bias_row, 4)),
        "B": rng.standard_normal((4, 5)),
        "C": C,
        "dy": rng.standard_normal((TOKENS, N)),
    }
    arrays = {name: jnp.asarray(array, "float32") for name, array in arrays.items()}
    return arrays | {"labels": jnp.asarray(labels), "ranks": jnp.asarray(ranks), "active": jnp.ones(K, bool)}


@partial(jax.jit, static_argnames="order")
def results(arrays, order):
    """Return the output and the gradients of x, B and C."""

    def run(x, B, C):
        f = Factors(arrays["A"], B, C, *(arrays[name] for name in ("labels", "ranks", "active")))
        return adamss_jax.linear(x, arrays["kernel"], arrays["bias"], f, order=order)

    y, vjp = jax.vjp(run, arrays["x"], arrays["B"], arrays["C"])
    return dict(zip(("y", "x", "B", "C"), (y, *vjp(arrays["dy"])), strict=True))


def difference(actual, expected):
    """Return the largest difference relative to the largest magnitude, over a tree of arrays."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return max(
        float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()) for a, b in pairs
    )


def differences(kind, names):
    """Return the largest difference of each case, over both orders, with and without a bias row."""
    mesh = jax.make_mesh((4,), ("m",), axis_types=(kind,))
    found = {}
    for bias_row, order in itertools.product((0, 1), ORDERS):
        arrays = problem(bias_row=bias_row)
        expected = results(arrays, order)
        for name in names:
            specs = SHARDINGS[name]
            if bias_row and "A" in specs:
                continue  # the d + 1 rows of A are not divisible by 4
            if kind is AxisType.Explicit:
                rows, columns = specs.get("x", P(None, None))[0], specs.get("kernel", P(None, None))[1]
                specs = specs | {"dy": P(rows, columns)}
            placed = {
                key: jax.device_put(array, NamedSharding(mesh, specs.get(key, P(*[None] * array.ndim))))
                for key, array in arrays.items()
            }
            with jax.set_mesh(mesh):
                actual = results(placed, order)
            case = f"{kind.name}: {name}"
            found[case] = max(found.get(case, 0.0), difference(actual, expected))
    return found


class Net(nnx.Module):
    def __init__(self):
        self.query = nnx.Linear(D, N, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(N, 4, rngs=nnx.Rngs(1))

    def __call__(self, x, hidden=None):
        return self.head(jnp.tanh(self.query(x, out_sharding=hidden)))


def attached(kind, specs, *, inputs=None, hidden=None):
    """Return the results of the verbs on a sharded model; `hidden` is the sharding of the first layer's output."""
    mesh = jax.make_mesh((4,), ("m",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        return attached_to(mesh, specs, inputs or P(None, None), hidden)


def attached_to(mesh, specs, inputs, hidden):
    config = adamss.AdamssConfig(targets=["query"], modules_to_save=["head"], rank=4, subspaces=K)
    x = jax.device_put(problem(bias_row=0)["x"], NamedSharding(mesh, inputs))
    run = nnx.jit(lambda model, x: model(x, hidden))
    alone, model = Net(), Net()
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        spec = specs.get(".".join(map(str, path)), P(*[None] * variable.ndim))
        variable.set_value(jax.device_put(variable.get_value(), NamedSharding(mesh, spec)))
    kernel = model.query.kernel.get_value()
    base = run(model, x)
    adamss.attach(alone, config)
    adamss.attach(model, config)
    f = model.query.adamss.default.factors()
    found = {
        "start equals the base": bool(jnp.array_equal(run(model, x), base)),
        "factors on every device": all(len(array.sharding.device_set) == 4 for array in f),
    }
    gradients = []
    for one in (alone, model):
        adapter = one.query.adamss.default
        adapter.C.set_value(jnp.ones_like(adapter.C.get_value()))
        gradients.append(gradient(lambda m: jnp.sum(jnp.square(run(m, x))), one))
    found["gradients"] = difference(*gradients[::-1])
    found["outputs"] = difference(run(model, x), run(alone, x))
    found["merged"] = difference(run(adamss.merge(model), x), run(alone, x))
    merged = model.query.kernel.get_value()
    found["merged keeps the sharding"] = merged.sharding.is_equivalent_to(kernel.sharding, 2)
    adamss.detach(model)
    back = model.query.kernel.get_value()
    found["detach gives the same bits"] = bool(np.array_equal(back, kernel))
    found["detach keeps the sharding"] = back.sharding.is_equivalent_to(kernel.sharding, 2)
    return found


class Pair(nnx.Module):
    def __init__(self):
        self.query = nnx.Linear(D, N, rngs=nnx.Rngs(0))
        self.value = nnx.Linear(D, N, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return jnp.tanh(self.query(x)) * self.value(x)


def trained(*, steps, specs=None, mesh=None, replicated=False):
    """Train under a budget; return the model, the masks after each step, and a function that takes one step more.

    Parameters
    ----------
    specs : mapping
        Sharding of the variables by the end of their paths. Other variables are replicated.
    replicated : bool
        Whether the state of the optimiser is replicated even if the parameters are sharded.
    """
    budget = adamss.BudgetConfig(target=2, end_step=6, interval=2, power=1)
    model = adamss.attach(
        Pair(), adamss.AdamssConfig(targets=["query", "value"], rank=4, subspaces=K, budget=budget)
    )
    x = problem(bias_row=0)["x"]
    if mesh is not None:
        for path, variable in nnx.to_flat_state(nnx.state(model)):
            spec = specs.get(path[-1], P())
            variable.set_value(jax.device_put(variable.get_value(), NamedSharding(mesh, spec)))
        x = jax.device_put(x, NamedSharding(mesh, P("m", None)))
    loss = lambda m, x: jnp.mean(jnp.square(m(x) - x[:, :1]))  # noqa: E731
    loop = loop_of(model, adamss_jax.budgeted(optax.adamw(0.02), model), loss)
    if replicated:
        loop.restore(jax.device_put(loop.saved(), NamedSharding(mesh, P())))
    masks = []
    for _ in range(steps):
        loop.step(x).synchronise()
        layers = (model.query, model.value)
        masks.append([np.asarray(layer.adamss.default.active.get_value()).tolist() for layer in layers])
    return model, masks, lambda: loop.step(x)


def budgets():
    """Return how training under a budget on a mesh differs from training on one device."""
    mesh = jax.make_mesh((4,), ("m",), axis_types=(AxisType.Auto,))
    sharded = {"kernel": P("m", None), "A": P(None, "m", None), "B": P("m", None), "C": P(None, "m")}
    cases = {
        "data parallel": {"specs": {}},
        "fully sharded": {"specs": sharded},
        "fully sharded, state replicated": {"specs": sharded, "replicated": True},
    }
    x = problem(bias_row=0)["x"]
    alone, masks, step = trained(steps=8)
    parameters, y = nnx.to_pure_dict(nnx.state(alone, nnx.LoRAParam)), alone(x)
    adamss.consolidate(alone)
    step()
    later = alone(x)
    report = {}
    for name, options in cases.items():
        model, found, step = trained(steps=8, mesh=mesh, **options)
        B = model.query.adamss.default.B.get_value()
        spread = NamedSharding(mesh, options["specs"].get("B", P()))
        report[name] = {
            "same masks": found == masks,
            "counts": [int(np.sum(both)) for both in found],
            "expected counts": [int(np.sum(both)) for both in masks],
            "parameters": difference(nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam)), parameters),
            "sharded as before": B.sharding.is_equivalent_to(spread, 2),
        }
        adamss.consolidate(model)
        report[name]["consolidated"] = difference(model(x), y)
        step()
        report[name]["a step later"] = difference(model(x), later)
    return report


if __name__ == "__main__":
    assert jax.device_count() == 4
    if "budget" in sys.argv:
        print(json.dumps(budgets()))
        sys.exit()
    on_n = {"query.kernel": P(None, "m"), "query.bias": P("m"), "head.kernel": P("m", None)}
    report = {
        "linear": differences(AxisType.Auto, SHARDINGS) | differences(AxisType.Explicit, EXPLICIT),
        "attach": {
            "Auto: kernel on d": attached(AxisType.Auto, {"query.kernel": P("m", None)}),
            "Auto: kernel on n": attached(AxisType.Auto, on_n),
            "Auto: x on batch": attached(AxisType.Auto, {}, inputs=P("m", None)),
            "Explicit: kernel on d": attached(AxisType.Explicit, {"query.kernel": P("m", None)}, hidden=P()),
            "Explicit: x on batch": attached(AxisType.Explicit, {}, inputs=P("m", None), hidden=P("m", None)),
        },
    }
    print(json.dumps(report))
