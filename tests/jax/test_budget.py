"""Test the adaptive budget as an optax transformation: `budgeted`, `synchronise` and `allocation`."""

import dataclasses
import json
import re
import textwrap
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as orbax
import pytest
from flax import nnx
from jax_helpers import Block, Stack, gradient, loop_of, program, run_python
from safetensors.numpy import load_file

import adamss
import adamss_jax
from adamss import AdamssConfig, BudgetConfig, core
from adamss.backend import backend_for
from adamss.backend.ledger import base_weight, sites_of
from adamss.backend.sites import split_path
from adamss.core import Factors
from adamss.core.cost import ORDERS
from adamss.errors import AdamssWarning, ConfigError, ConfigTypeError, StateError
from adamss_conformance.capabilities import OPTIMISERS
from adamss_conformance.drivers.nnx import NnxDriver
from adamss_conformance.tolerances import RELATIVE_TOLERANCE
from adamss_jax.equinox import trainable_filter

WIDTH, LAYERS, K = 8, 2, 4
SETTINGS = {"targets": ["query", "value"], "rank": 5, "subspaces": K, "subspace_rank": 2}
SCHEDULES = {
    "interval does not divide": {"target": 3, "start_step": 2, "end_step": 12, "interval": 3},
    "parameters": {"target": 40, "unit": "parameters", "end_step": 9, "interval": 2},
    "reset": {"target": 2, "end_step": 8, "interval": 2, "window": "reset"},
    "running": {"target": 2, "end_step": 8, "interval": 2, "window": "running"},
    "revive": {"target": 4, "end_step": 12, "interval": 1, "revive": True, "window": "reset"},
    "minimum": {"target": 4, "end_step": 8, "interval": 1, "minimum_per_layer": 1},
    "initial": {"target": 2, "initial": 7, "start_step": 3, "end_step": 7},
}


@pytest.fixture(autouse=True, scope="module")
def quickly_compiled():
    """Turn off most optimisations of XLA, since these tests spend most of their time compiling."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


class NnxNet(nnx.Module):
    def __init__(self, seed=0):
        self.block = Block(nnx.Rngs(seed))
        # Both layers have the same input array without heads, so the backward pass keeps it only once.
        dtype = jnp.zeros(()).dtype
        self.block.value = nnx.Linear(
            WIDTH, WIDTH, use_bias=False, param_dtype=dtype, rngs=nnx.Rngs(seed + 1)
        )
        self.head = nnx.Linear(WIDTH, 3, param_dtype=dtype, rngs=nnx.Rngs(seed + 9))

    def __call__(self, x):
        return self.head(self.block(x))


class EquinoxNet(eqx.Module):
    block: dict
    head: eqx.nn.Linear

    def __init__(self, seed=0):
        query, value, head = jax.random.split(jax.random.key(seed), 3)
        self.block = {
            "query": eqx.nn.Linear(WIDTH, WIDTH, key=query),
            "value": eqx.nn.Linear(WIDTH, WIDTH, use_bias=False, key=value),
        }
        self.head = eqx.nn.Linear(WIDTH, 3, key=head)

    def __call__(self, x):
        return jax.vmap(lambda x: self.head(x + jnp.tanh(self.block["query"](x)) * self.block["value"](x)))(x)


MODELS = {"nnx": NnxNet, "equinox": EquinoxNet, "stack": partial(Stack, LAYERS)}
KINDS = list(MODELS)


def config(budget=None, **changes):
    return AdamssConfig(**(SETTINGS | changes), budget=None if budget is None else BudgetConfig(**budget))


def attached(kind, budget=None, **changes):
    # By k-means, each layer of the stack gets subspaces of other sizes, so their arrays are padded.
    changes = {"segmentation": "kmeans" if kind == "stack" else "contiguous"} | changes
    return adamss.attach(MODELS[kind](), config(budget, **changes))


def inputs(seed=1, rows=6):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((rows, WIDTH)), jnp.zeros(()).dtype)


def loss(model, x):
    return jnp.mean(jnp.square(model(x) - jnp.sin(3 * x[:, :3])))


def trained(kind, tx, budget, *, steps=0, **changes):
    """Return the loop of a model adapted with this budget, after some steps."""
    model = attached(kind, budget, **changes)
    return steps_of(loop_of(model, adamss_jax.budgeted(tx, model), loss), range(steps))


def steps_of(loop, numbers):
    for number in numbers:
        loop.step(inputs(number))
    return loop


def factors(model):
    return backend_for(model).bank(model).only().layers


def same_file(first, second):
    one, other = load_file(first), load_file(second)
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def masks(state):
    """Return the mask of each layer; the state concatenates them in the order of the paths."""
    paths = sorted(state.sizes)
    ends = np.cumsum([int(state.sizes[path]) for path in paths])
    return dict(zip(paths, np.split(np.asarray(state.budget.active), ends[:-1]), strict=True))


def count(state):
    return sum(int(mask.sum()) for mask in masks(state).values())


def numpy_layer(params, path, outline):
    """Return B and C of a layer from a tree of parameters or gradients, as NumPy arrays without padding."""
    owner, index = split_path(path)
    ends = [f"{owner}.{kind}.default.{name}" for kind in ("adamss", "adapters") for name in "BC"]
    found = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = re.sub(r"[\[\].']+", ".", jax.tree_util.keystr(keys)).strip(".").removesuffix(".value")
        if name in ends:
            found.append(np.asarray(leaf)[index])
    B, C = found
    return B[: outline.B.shape[0], : outline.B.shape[1]], C[: outline.C.shape[0]]


def elements_of(layers):
    return {path: (f.B, f.C) for path, f in layers.items()}


def random_like(params, rng):
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), params)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_it_decides_what_the_state_machine_in_numpy_decides(schedule, kind):
    """The gradients are the same at every step. The averages must agree up to rounding, and the masks exactly."""
    budget = BudgetConfig(**SCHEDULES[schedule])
    with jax.enable_x64(True):
        model = attached(kind)
        layers = {path: Factors(*map(np.asarray, f)) for path, f in factors(model).items()}
        plan = core.plan_budget(layers, budget)
        expected = core.initial_budget_state(plan, plan.join_elements(elements_of(layers)))
        tx = adamss_jax.budgeted(optax.sgd(0.1), model, budget)
        params = adamss.trainable_parameters(model)
        state = tx.init(params)
        update = jax.jit(tx.update)
        rng = np.random.default_rng(0)
        decisions = 0
        for step in range(1, budget.end_step + 2):
            gradients = random_like(params, rng)
            active, before, slopes = plan.split(expected.active), {}, {}
            for path, f in layers.items():
                before[path], slopes[path] = (numpy_layer(tree, path, f) for tree in (params, gradients))
                if not budget.revive:
                    mask = core.trained_elements(f._replace(active=active[path]))
                    slopes[path] = tuple(np.where(m, g, 0) for m, g in zip(mask, slopes[path], strict=True))
            old = expected
            expected = core.observe(plan, old, *map(plan.join_elements, (before, slopes)))
            expected = core.advance(plan, expected)
            updates, state = update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            assert int(state.budget.step) == int(expected.step) == step
            assert bool(state.budget.waiting) == bool(expected.waiting)
            np.testing.assert_array_equal(state.budget.active, expected.active, err_msg=f"step {step}")
            decisions += int((expected.active != old.active).sum())
            for name in ("sensitivity", "uncertainty"):
                actual = getattr(state.budget, name)
                np.testing.assert_allclose(actual, getattr(expected, name), rtol=1e-12, atol=1e-300)
            if plan.allocates_at(step) and not expected.waiting:
                limit = plan.budget_at(step)
                assert int(state.limit) == limit
                if budget.unit == "subspaces":
                    assert count(state) == limit
                else:
                    assert np.asarray(plan.costs)[expected.active].sum() <= limit
                assert min(mask.sum() for mask in masks(state).values()) >= budget.minimum_per_layer
    if budget.unit == "subspaces":
        assert count(state) == budget.target
    assert decisions > plan.total - budget.target if budget.revive else decisions > 0


def test_a_mask_holds_from_the_step_after_its_allocation():
    """An allocation is decided after a step, as in PyTorch's hook, so that step still moves what it freezes."""
    loop = trained("nnx", optax.sgd(0.1), {"target": 1, "end_step": 2, "interval": 2}, steps=1)
    before = factors(loop.model)
    loop.step(inputs(1))
    allocated = factors(loop.model)
    loop.step(inputs(2))
    after = factors(loop.model)
    assert count(loop.state) == 1
    for path, mask in masks(loop.state).items():
        frozen = ~mask[np.asarray(allocated[path].labels)]
        assert np.any(np.asarray(before[path].C)[:, frozen] != np.asarray(allocated[path].C)[:, frozen])
        np.testing.assert_array_equal(allocated[path].C[:, frozen], after[path].C[:, frozen])


def test_the_first_reduction_waits_for_a_step_that_says_something():
    """C is zero at first, so only C has a gradient, and |w g| is zero everywhere."""
    loop = trained("nnx", optax.sgd(0.1), {"target": 2, "end_step": 1})
    loop.step(inputs(0))
    first = adamss_jax.allocation(loop.optimizer)
    assert (int(first.step), bool(first.waiting), int(first.total)) == (1, True, 8)
    assert int(first.budget) == 8
    loop.step(inputs(1))
    second = adamss_jax.allocation(loop.optimizer)
    assert (int(second.step), bool(second.waiting), int(second.total), int(second.budget)) == (2, False, 2, 2)


def test_a_step_with_nan_is_left_out_of_the_averages_and_warned_of():
    loop = trained(
        "equinox",
        optax.apply_if_finite(optax.sgd(0.1), 5),
        {"target": 2, "end_step": 8, "interval": 8},
        steps=3,
    )
    before = loop.state.budget
    loop.step(inputs(3).at[0, 0].set(jnp.nan))
    for name in ("sensitivity", "uncertainty"):
        np.testing.assert_array_equal(getattr(loop.state.budget, name), getattr(before, name))
    assert (int(loop.state.budget.step), int(loop.state.budget.left_out)) == (4, 1)
    loop.step(inputs(4))
    assert int(loop.state.budget.left_out) == 1
    with pytest.warns(AdamssWarning, match="1 of 5 steps were left out of the importance averages"):
        adamss_jax.synchronise(loop.model, loop.state)


@pytest.mark.parametrize("revive", [False, True], ids=["one-way", "revive"])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_no_optimiser_moves_a_frozen_element(optimiser, revive):
    schedule = {"target": 3, "end_step": 6, "interval": 2, "revive": revive}
    loop = trained("nnx", NnxDriver().optimiser(optimiser, 0.05), schedule)
    held = moved = 0
    for number in range(9):
        mask, before = masks(loop.state), factors(loop.model)
        loop.step(inputs(number))
        for path, after in factors(loop.model).items():
            f = before[path]._replace(active=jnp.asarray(mask[path]))
            for trained_elements, old, new in zip(
                core.trained_elements(f), (f.B, f.C), (after.B, after.C), strict=True
            ):
                frozen = np.broadcast_to(~np.asarray(trained_elements), old.shape)
                np.testing.assert_array_equal(np.asarray(old)[frozen], np.asarray(new)[frozen])
                held += frozen.sum()
                moved += (np.asarray(old) != np.asarray(new)).sum()
    assert held > 200
    assert moved > 200


@pytest.mark.parametrize("revive", [False, True], ids=["one-way", "revive"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_frozen_subspaces_count_in_no_norm_unless_they_may_return(kind, revive):
    model = attached(kind, {"target": 1, "end_step": 2, "revive": revive})
    mask = {path: jnp.arange(K) == 1 for path in factors(model)}
    model = backend_for(model).set_active(model, mask)
    params = adamss.trainable_parameters(model)
    gradients = random_like(params, np.random.default_rng(3))
    tx = adamss_jax.budgeted(optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(1.0)), model)
    updates, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
    elements = backend_for(model).trained_elements(model)
    seen = gradients if revive else jax.tree.map(lambda m, g: jnp.where(m, g, 0), elements, gradients)
    norm = np.sqrt(sum(float(jnp.sum(jnp.square(leaf))) for leaf in jax.tree.leaves(seen)))
    for mask, update, slope in zip(*map(jax.tree.leaves, (elements, updates, gradients)), strict=True):
        expected = jnp.where(mask, -slope * (0.5 / norm), 0)
        np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-7)
        assert np.all(np.asarray(update)[~np.broadcast_to(mask, update.shape)] == 0)


def test_saved_modules_train_as_without_a_budget():
    model = attached("nnx", modules_to_save=["head"])
    params = adamss.trainable_parameters(model)
    gradients = random_like(params, np.random.default_rng(0))
    tx = adamss_jax.budgeted(optax.sgd(0.5), model, BudgetConfig(target=1, end_step=2))
    updates, _ = tx.update(gradients, tx.init(params), params)
    head = updates["head"]["kernel"]
    np.testing.assert_array_equal(head.get_value(), -0.5 * gradients["head"]["kernel"].get_value())


def test_further_arguments_reach_the_transformation():
    seen = []

    def update(updates, state, params=None, *, value, **extra):
        seen.append(value)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    model = attached("equinox")
    params = adamss.trainable_parameters(model)
    budget = adamss_jax.budgeted(tx, model, BudgetConfig(target=1, end_step=2))
    budget.update(params, budget.init(params), params, value=7)
    assert seen == [7]


def test_accumulated_gradients_are_one_step():
    model = attached("equinox")
    params = adamss.trainable_parameters(model)
    tx = optax.MultiSteps(adamss_jax.budgeted(optax.sgd(0.1), model, BudgetConfig(target=1, end_step=9)), 3)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for seed in range(6):
        updates, state = update(random_like(params, np.random.default_rng(seed)), state, params)
        params = optax.apply_updates(params, updates)
    assert int(adamss_jax.allocation(state).step) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_compiled_anew_over_the_whole_schedule(kind):
    loop = trained(kind, optax.adamw(0.02), {"target": 2, "end_step": 8, "interval": 2})
    counts = []
    for number in range(10):
        loop.step(inputs(number))
        loop.synchronise()
        counts.append(count(loop.state))
    assert counts[0] > counts[1] > counts[-1] == 2
    assert loop.traces == 1


def test_scan_over_steps_is_the_loop():
    schedule = {"target": 3, "end_step": 6, "interval": 2}
    with jax.enable_x64(True):
        loop = trained("equinox", optax.adamw(0.02), schedule)
        model = attached("equinox", schedule)
        tx = adamss_jax.budgeted(optax.adamw(0.02), model)
        params, frozen = eqx.partition(model, trainable_filter(model))

        def step(carry, x):
            params, state = carry
            gradients = jax.grad(lambda p: loss(eqx.combine(p, frozen), x))(params)
            updates, state = tx.update(gradients, state, params)
            return (eqx.apply_updates(params, updates), state), adamss_jax.allocation(state)

        xs = jnp.stack([inputs(number) for number in range(8)])
        (params, state), log = jax.jit(lambda carry: jax.lax.scan(step, carry, xs))((params, tx.init(params)))
        totals = [count(loop.step(x).state) for x in xs]
        assert log.total.tolist() == totals
        assert log.step.tolist() == list(range(1, 9))
        for path, f in factors(eqx.combine(params, frozen)).items():
            np.testing.assert_array_equal(masks(state)[path], masks(loop.state)[path])
            np.testing.assert_allclose(f.C, factors(loop.model)[path].C, rtol=1e-9, atol=1e-12)


def test_buffers_may_be_donated():
    model = attached("equinox", {"target": 2, "end_step": 4})
    tx = adamss_jax.budgeted(optax.adamw(0.02), model)
    params, frozen = eqx.partition(model, trainable_filter(model))
    state = tx.init(params)

    def step(params, state, x):
        gradients = jax.grad(lambda p: loss(eqx.combine(p, frozen), x))(params)
        updates, state = tx.update(gradients, state, params)
        return eqx.apply_updates(params, updates), state

    run = jax.jit(step, donate_argnums=(0, 1))
    for number in range(6):
        params, state = run(params, state, inputs(number))
        model = adamss_jax.synchronise(eqx.combine(params, frozen), state)
    assert adamss.summary(model).total.active == 2


@pytest.mark.parametrize("kind", KINDS)
def test_synchronise_writes_the_masks(kind, tmp_path):
    loop = trained(kind, optax.sgd(0.1), {"target": 2, "end_step": 4}, steps=5)
    model = loop.model
    found = loop.synchronise()
    assert (found is model) == (kind != "equinox")
    for path, f in factors(found).items():
        np.testing.assert_array_equal(f.active, masks(loop.state)[path])
    adamss.save(found, tmp_path / "a.safetensors")
    assert adamss.summary(adamss.load(MODELS[kind](), tmp_path / "a.safetensors")).total.active == 2


@pytest.mark.parametrize("kind", KINDS)
def test_with_revive_frozen_subspaces_get_gradients_after_synchronise_too(kind, tmp_path):
    found = {}
    for revive in (False, True):
        loop = trained(kind, optax.sgd(0.1), {"target": 1, "end_step": 2, "revive": revive}, steps=3)
        adamss.save(loop.synchronise(), tmp_path / "a.safetensors", training=True)
        loaded = adamss.load(MODELS[kind](), tmp_path / "a.safetensors")
        for name, model in (("in place", loop.model), ("loaded", loaded)):
            assert adamss.summary(model).total.active == 1
            trained_elements = backend_for(model).trained_elements(model)
            gradients = gradient(loss, model, inputs())
            of_frozen = jax.tree.map(
                lambda m, g: jnp.abs(jnp.where(m, 0, g)).max(), trained_elements, gradients
            )
            found[revive, name] = max(map(float, jax.tree.leaves(of_frozen)))
    assert found[False, "in place"] == found[False, "loaded"] == 0
    assert min(found[True, "in place"], found[True, "loaded"]) > 1e-4


def test_revive_without_its_budget_in_the_model_is_refused_or_warned_of():
    revive = BudgetConfig(target=1, end_step=2, revive=True)
    model = attached("nnx")
    loop = steps_of(loop_of(model, adamss_jax.budgeted(optax.sgd(0.1), model, revive), loss), range(3))
    with pytest.warns(AdamssWarning, match=r"attached without a budget that revives.*AdamssConfig\(budget="):
        loop.synchronise()
    with pytest.raises(
        ConfigError, match=r"revive = True, but the model has frozen subspaces.*attach it with"
    ):
        adamss_jax.budgeted(optax.sgd(0.1), model, revive)
    model = attached("nnx")
    backend_for(model).set_active(model, {"block.query": jnp.arange(K) != 1})
    consolidated = adamss.consolidate(model)
    with pytest.raises(StateError, match=r"revive = True, but adamss\.consolidate has folded"):
        adamss_jax.budgeted(optax.sgd(0.1), consolidated, revive)
    # The opposite mismatch is harmless, because `budgeted` masks the gradients itself.
    model = attached("nnx", {"target": 1, "end_step": 2, "revive": True})
    one_way = adamss_jax.budgeted(optax.sgd(0.1), model, BudgetConfig(target=1, end_step=2))
    assert not one_way.init(adamss.trainable_parameters(model)).revive


LONG = {"target": 2, "end_step": 9, "interval": 3, "power": 1}


def kept_for_backward(model, x):
    """Return the shapes of the arrays with a row for each token that the backward pass of the parameters keeps."""
    params = adamss.trainable_parameters(model)
    if isinstance(model, nnx.Module):
        graph, trained_variables, rest = nnx.split(model, nnx.LoRAParam, ...)
        run = lambda p: nnx.merge(graph, p, rest)(x)  # noqa: E731
        params = trained_variables
    else:
        params, rest = eqx.partition(model, trainable_filter(model))
        run = lambda p: eqx.combine(p, rest)(x)  # noqa: E731
    _, vjp = jax.vjp(run, params)
    return [leaf.shape for leaf in jax.tree.leaves(vjp) if jnp.ndim(leaf) > 1 and leaf.shape[0] == x.shape[0]]


def test_only_what_is_trained_is_kept_for_the_backward():
    """One of 8 subspaces is left, so one layer keeps z of one direction, and the other neither z nor x."""
    loop = trained("nnx", optax.sgd(0.1), {"target": 1, "end_step": 3}, steps=5, subspace_rank=1)
    x, model = inputs(rows=37), loop.synchronise()
    before = kept_for_backward(model, x)
    assert before.count((37, K)) == 2
    after = kept_for_backward(adamss.consolidate(model), x)
    assert after.count((37, K)) == 0
    assert after.count((37, 1)) == 1
    assert after.count((37, WIDTH)) < before.count((37, WIDTH))


def ordered(model, order):
    """Return the model with this order of the products in its adapted layers."""
    if isinstance(model, nnx.Module):
        for layer in (model.block.query, model.block.value):
            layer.adamss.default.order = order
        return model
    replaced = lambda adapter: dataclasses.replace(adapter, order=order)  # noqa: E731
    return eqx.tree_at(
        lambda model: [layer.adapter for layer in model.block.values()], model, replace_fn=replaced
    )


def orders(model):
    """Return the order of the products in each adapted layer."""
    if isinstance(model, nnx.Module):
        return [layer.adamss.default.order for layer in (model.block.query, model.block.value)]
    return [layer.adapter.order for layer in model.block.values()]


@pytest.mark.parametrize("kind", ["stack", "equinox"])
def test_the_order_of_the_products_outlives_consolidating(kind, tmp_path):
    """Files do not contain the order, and both orders train the same up to rounding."""
    model = attached(kind, {"target": 3, "end_step": 1})
    adamss.save(model, tmp_path / "as attached.safetensors")
    outputs = []
    for order in ORDERS:
        model = ordered(attached(kind, {"target": 3, "end_step": 1}), order)
        adamss.save(model, tmp_path / f"{order}.safetensors")
        assert same_file(tmp_path / f"{order}.safetensors", tmp_path / "as attached.safetensors")
        loop = steps_of(loop_of(model, adamss_jax.budgeted(optax.sgd(0.1), model), loss), range(3))
        loop.model = adamss.consolidate(loop.synchronise())
        steps_of(loop, range(3, 6))
        assert loop.traces == 2
        assert orders(loop.model) == [order, order]
        outputs.append(loop.model(inputs()))
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-6)


def test_projected_nothing_of_the_inputs_is_kept_but_their_coordinates():
    rank, x = 5, inputs(rows=37)
    model = ordered(attached("nnx", LONG, subspace_rank=1), "factors_first")
    before = kept_for_backward(model, x)
    after = kept_for_backward(ordered(model, "input_first"), x)
    assert after.count((37, rank)) - before.count((37, rank)) == 2
    assert before.count((37, WIDTH)) - after.count((37, WIDTH)) == 1  # x, which both layers share
    model = backend_for(model).set_active(
        model, {path: jnp.arange(K) < 2 for path in ("block.query", "block.value")}
    )
    model = adamss.consolidate(model)
    assert kept_for_backward(model, x).count((37, rank)) == 2
    assert kept_for_backward(model, x).count((37, 2)) == 2


def flops(model, x):
    """Return the number of floating-point operations of a forward pass, as counted by XLA."""
    run, arrays = program(model)
    return jax.jit(run).lower(arrays, x).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_after_consolidating(kind, keep_base, tmp_path):
    with jax.enable_x64(True):
        loop, plain = (trained(kind, optax.adamw(0.05), LONG, steps=6, include_bias=True) for _ in range(2))
        x, base, backend = inputs(rows=64), MODELS[kind](), backend_for(loop.model)

        def consolidated():
            """Consolidate, and check that the outputs stay the same and take fewer operations."""
            model = loop.synchronise()
            before, y = flops(model, x), model(x)
            loop.model = adamss.consolidate(model, keep_base=keep_base)
            assert flops(loop.model, x) < before
            same_outputs(loop.model, y)
            return y

        def same_outputs(model, y):
            np.testing.assert_allclose(model(x), y, rtol=1e-11, atol=1e-12)

        layers = factors(loop.synchronise())
        adamss.save(loop.model, tmp_path / "before.safetensors", training=True)
        y = consolidated()
        bank = backend.bank(loop.model)
        assert bank.ledger.keeps_base == keep_base
        for path, f in layers.items():
            np.testing.assert_array_equal(bank.only().held[path], ~f.active)
            for a, b in zip(f, bank.only().layers[path], strict=True):
                np.testing.assert_array_equal(a, b)
        for path, site in sites_of(backend, loop.model, bank.paths).items():
            own = base_weight(backend, backend.site(backend.modules(base)[path], path))
            for a, b in zip(base_weight(backend, site, bank), own, strict=True):
                if b is not None:
                    np.testing.assert_allclose(a, b, atol=1e-14)
        if keep_base:
            adamss.save(loop.model, tmp_path / "after.safetensors", training=True)
            assert same_file(tmp_path / "before.safetensors", tmp_path / "after.safetensors")
            with adamss.disabled(loop.model) as off:
                np.testing.assert_array_equal(off(x), base(x))
            same_outputs(loop.model, y)
        steps_of(loop, range(6, 12))
        steps_of(plain, range(6, 12))
        assert count(loop.state) == 2
        for path, f in factors(plain.model).items():
            np.testing.assert_array_equal(masks(loop.state)[path], masks(plain.state)[path])
            np.testing.assert_allclose(factors(loop.model)[path].C, f.C, rtol=1e-8, atol=1e-10)
            np.testing.assert_allclose(factors(loop.model)[path].B, f.B, rtol=1e-8, atol=1e-10)
        y = consolidated()
        with pytest.raises(StateError, match=r"thaws subspace \d, whose update the weight holds"):
            backend.set_active(loop.model, {path: jnp.ones(K, bool) for path in layers})
        if not keep_base:
            for verb in (adamss.detach, adamss.merge):
                with pytest.raises(StateError, match="keep_base=False"):
                    verb(loop.model)
            return
        model = adamss.merge(loop.model)
        same_outputs(model, y)
        model = adamss.unmerge(model)
        same_outputs(model, y)
        np.testing.assert_array_equal(adamss.detach(model)(x), base(x))


@pytest.mark.parametrize("kind", KINDS)
def test_consolidate_where_frozen_subspaces_may_return(kind):
    model = attached(kind, {"target": 1, "end_step": 2, "revive": True})
    model = backend_for(model).set_active(model, {path: jnp.arange(K) != 1 for path in factors(model)})
    with pytest.raises(StateError, match="under which frozen subspaces may return"):
        adamss.consolidate(model)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_disabled_models_cost_what_the_base_costs(kind):
    def products(model):
        run, arrays = program(model)
        return str(jax.make_jaxpr(run)(arrays, inputs())).count("dot_general")

    model = attached(kind)
    assert products(MODELS[kind]()) == 3
    assert products(model) == 3 + 2 * 3  # A B, x M and z E in each layer
    with adamss.disabled(model) as base:
        assert products(base) == 3
    model = adamss.merge(model)
    assert products(model) == 3
    assert products(adamss.unmerge(model)) == 9


def test_a_layer_of_which_everything_is_folded_computes_its_base_alone():
    model = attached("nnx")
    model = backend_for(model).set_active(model, {path: jnp.zeros(K, bool) for path in factors(model)})
    base = flops(MODELS["nnx"](), inputs(rows=64))
    assert flops(model, inputs(rows=64)) > base
    assert flops(adamss.consolidate(model), inputs(rows=64)) == base


def test_budgeted_refuses():
    sgd, budget = optax.sgd(0.1), BudgetConfig(target=2, end_step=4)
    with pytest.raises(StateError, match="budgeted: the model has no adapters"):
        adamss_jax.budgeted(sgd, NnxNet(), budget)
    model = attached("nnx")
    with pytest.raises(ConfigError, match=r"there is no schedule.*AdamssConfig\(budget=\.\.\.\)"):
        adamss_jax.budgeted(sgd, model)
    with pytest.raises(ConfigTypeError, match=r"must be an adamss\.BudgetConfig, found dict"):
        adamss_jax.budgeted(sgd, model, {"target": 2})
    with pytest.raises(ConfigError, match="target = 9 is more than the 8 subspaces"):
        adamss_jax.budgeted(sgd, model, BudgetConfig(target=9, end_step=4))
    with pytest.raises(StateError, match="the updates are merged"):
        adamss_jax.budgeted(sgd, adamss.merge(attached("nnx")), budget)
    params, tx = adamss.trainable_parameters(model), adamss_jax.budgeted(sgd, model, budget)
    with pytest.raises(
        ConfigError, match=r"needs the parameters, as in tx\.update\(gradients, state, params\)"
    ):
        tx.update(params, tx.init(params))
    with pytest.raises(StateError, match="another budgeted inside"):
        adamss_jax.budgeted(optax.chain(tx), model, budget).init(params)
    with pytest.raises(StateError, match=r"B of block\.query should have shape .*no such leaf"):
        tx.init(nnx.state(adamss.attach(NnxNet(), config(targets=["value"])), nnx.LoRAParam))
    with pytest.raises(StateError, match=r"shape \(5, 8\), found \(4, 8\)"):
        tx.init(nnx.state(attached("nnx", rank=4), nnx.LoRAParam))
    with pytest.raises(StateError, match="in the gradients: B of"):
        tx.update(jax.tree.map(lambda leaf: None, params), tx.init(params), params)


def test_synchronise_and_allocation_refuse():
    loop = trained("nnx", optax.sgd(0.1), {"target": 2, "end_step": 4})
    other = nnx.Optimizer(loop.model, optax.sgd(0.1), wrt=nnx.LoRAParam)
    with pytest.raises(StateError, match=r"found no states of adamss_jax\.budgeted in Optimizer"):
        adamss_jax.synchronise(loop.model, other)
    with pytest.raises(StateError, match="found 2 states"):
        adamss_jax.allocation((loop.state, loop.state))
    with pytest.raises(StateError, match=r"another model.*differ in block\.query"):
        adamss_jax.synchronise(attached("stack"), loop.optimizer)
    with pytest.raises(StateError, match="another model, or one attached with other settings"):
        adamss_jax.synchronise(attached("nnx", subspaces=3), loop.optimizer)
    same_shapes = attached("nnx", segmentation="random", seed=1)
    with pytest.raises(StateError, match=r"another model: .* has other subspaces there"):
        adamss_jax.synchronise(same_shapes, loop.optimizer)
    with pytest.raises(StateError, match="synchronise: the model has no adapters"):
        adamss_jax.synchronise(NnxNet(), loop.optimizer)
    with pytest.raises(adamss.errors.ArrayTypeError, match="tracer"):
        jax.jit(lambda state: adamss_jax.synchronise(loop.model, state) and None)(loop.state)


def test_the_state_is_found_where_it_is():
    model = attached("equinox")
    params = adamss.trainable_parameters(model)
    budget = adamss_jax.budgeted(optax.sgd(0.1), model, BudgetConfig(target=2, end_step=4))
    tx = optax.chain(
        optax.identity(), optax.inject_hyperparams(lambda rate: optax.chain(budget, optax.scale(rate)))(1.0)
    )
    state = tx.init(params)
    assert int(adamss_jax.allocation(state).total) == 8
    assert isinstance(budget.init(params), adamss_jax.budget.BudgetedState)
    assert adamss.summary(adamss_jax.synchronise(model, state)).total.active == 8


STEPS, DONE = 5, 3
"""Allocations are due after steps 1, 3 and 5; the first one waits until step 2."""
RESUMED = {"target": 2, "end_step": STEPS, "start_step": 1, "interval": 2, "window": "running"}


def resumed(folder):
    """Return a loop that resumes a training using only the files in a folder."""
    model = adamss.load(NnxNet(), folder / "a.safetensors")
    loop = loop_of(model, adamss_jax.budgeted(optax.adamw(0.02, weight_decay=0.1), model), loss)
    with orbax.StandardCheckpointer() as checkpointer:
        loop.restore(checkpointer.restore((folder / "state").absolute(), loop.saved()))
    return steps_of(loop, range(DONE, STEPS))


def everything(loop):
    """Return all trained values and the whole optimiser state of a loop, as a list of arrays."""
    layers = factors(loop.model)
    trained_arrays = [
        np.asarray(array) for path in sorted(layers) for array in (layers[path].B, layers[path].C)
    ]
    return [*trained_arrays, *(np.asarray(leaf) for leaf in jax.tree.leaves(loop.state))]


def uninterrupted(folder):
    loop = trained("nnx", optax.adamw(0.02, weight_decay=0.1), RESUMED, steps=DONE)
    with orbax.StandardCheckpointer() as checkpointer:
        adamss.save(loop.synchronise(), folder / "a.safetensors", training=True)
        checkpointer.save((folder / "state").absolute(), loop.saved())
    return steps_of(loop, range(DONE, STEPS))


def test_resumed_in_another_process(tmp_path):
    """Both parts run in new processes, because this one may have compiled the step with other options before."""
    script = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        import numpy as np
        import test_budget
        folder = Path({str(tmp_path)!r})
        np.savez(folder / (sys.argv[1] + ".npz"), *test_budget.everything(getattr(test_budget, sys.argv[1])(folder)))
    """
    for half in ("uninterrupted", "resumed"):
        run_python("-c", textwrap.dedent(script), half)
    with np.load(tmp_path / "uninterrupted.npz") as whole, np.load(tmp_path / "resumed.npz") as resumed:
        for expected, actual in zip(whole.values(), resumed.values(), strict=True):
            np.testing.assert_array_equal(actual, expected)


@pytest.fixture(scope="module")
def on_a_mesh():
    """Return the report of `on_a_mesh.py`, which needs its own process for four devices."""
    return json.loads(run_python(str(Path(__file__).with_name("on_a_mesh.py")), "budget"))


@pytest.mark.parametrize("case", ["data parallel", "fully sharded", "fully sharded, state replicated"])
def test_the_decisions_on_a_mesh_are_those_on_one_device(case, on_a_mesh):
    found = on_a_mesh[case]
    assert found["counts"] == found["expected counts"] == sorted(found["counts"], reverse=True)
    assert found["counts"][0] == 6 > found["counts"][-1] == 2
    assert found["same masks"]
    assert found["sharded as before"]
    for name in ("parameters", "consolidated", "a step later"):
        assert found[name] <= RELATIVE_TOLERANCE["float32"], name
