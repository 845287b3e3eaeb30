"""Test the budget in PyTorch training loops: it is exact for every optimiser, gradient scaler and kind of loop."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch_support import assert_same_state, controlled, loss_of, state, step, train

import adamss
from adamss import BudgetConfig, core, errors
from adamss_torch import BudgetController, TorchBackend, hold_frozen
from adamss_torch.backend import adapters_of

LAYERS, K, STEPS = 8, 5, 14
OPTIMISERS = {
    "sgd": lambda p, **k: torch.optim.SGD(p, **{"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1} | k),
    "adamw": lambda p, **k: torch.optim.AdamW(p, **{"lr": 0.02, "weight_decay": 0.1} | k),
    "adamw fused": lambda p, **k: torch.optim.AdamW(p, **{"lr": 0.02, "fused": True} | k),
    "nadam": lambda p, **k: torch.optim.NAdam(p, **{"lr": 0.02, "weight_decay": 0.1} | k),
    "adagrad": lambda p, **k: torch.optim.Adagrad(p, **{"lr": 0.02, "weight_decay": 0.1} | k),
}
SCHEDULES = {
    "interval divides": {"target": 10, "end_step": 10, "interval": 5},
    "interval does not divide": {"target": 10, "end_step": 10, "interval": 3},
    "interval over the window": {"target": 10, "start_step": 2, "end_step": 7, "interval": 50},
    "running": {"target": 10, "start_step": 2, "end_step": 9, "window": "running"},
    "revive": {"target": 10, "end_step": 12, "interval": 1, "revive": True},
    "a minimum for each layer": {"target": 10, "end_step": 10, "minimum_per_layer": 1},
    "parameters": {"target": 200, "end_step": 10, "interval": 3, "unit": "parameters"},
    "linear": {"target": 10, "end_step": 9, "power": 1},
}


def build(*, dtype=torch.float64, base=0, **changes) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(base)
        layers = [nn.Sequential(nn.Linear(16, 16, dtype=dtype), nn.Tanh()) for _ in range(LAYERS)]
        model = nn.Sequential(*layers, nn.Linear(16, 4, dtype=dtype))
    settings = {"targets": [f"{i}.0" for i in range(LAYERS)], "rank": 6, "subspaces": K}
    settings |= {"modules_to_save": ["8"]}
    return adamss.attach(model, adamss.AdamssConfig(**(settings | changes)))


def batches(steps: int = STEPS, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(steps, 12, 16, generator=generator, dtype=torch.float64).to(dtype)


def adamss_layers(model):
    return TorchBackend().bank(model).only().layers


def active(model) -> dict[str, np.ndarray]:
    return {p: f.active.numpy().copy() for p, f in adamss_layers(model).items()}


def trainable(model):
    return adamss.trainable_parameters(model)


def with_optimiser(optimiser="adamw", **changes):
    model = build(**changes)
    return model, OPTIMISERS[optimiser](trainable(model))


def trained_with(config, *, steps, optimiser="adamw", **changes):
    """Return a model, its optimiser and its controller, after some steps and the controller's removal."""
    model, optimizer = with_optimiser(optimiser, **changes)
    with controlled(model, optimizer, config) as budget:
        train(model, optimizer, batches(steps, next(model.parameters()).dtype))
    return model, optimizer, budget


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("basis", ["shared", "per_subspace"])
def test_active_equals_the_budget_and_decisions_are_those_of_the_core(schedule, basis):
    """This holds at every allocation and after the end of the schedule. The core gets the same gradients."""
    config = BudgetConfig(**SCHEDULES[schedule])
    model, seen = build(basis=basis, subspace_rank=2), []
    # This optimiser adds the momentum to the gradients in place, which must not affect the importance.
    optimizer = OPTIMISERS["sgd"](trainable(model), nesterov=True, foreach=True, weight_decay=0.0)

    def host():
        return {p: core.Factors(*(a.numpy().copy() for a in f)) for p, f in adamss_layers(model).items()}

    def elements():
        return plan.join_elements({path: (f.B, f.C) for path, f in host().items()})

    plan = core.plan_budget(host(), config)
    expected = core.initial_budget_state(plan, elements())
    with controlled(model, optimizer, config, on_allocation=seen.append) as budget:
        for x in batches():
            weights = elements()
            optimizer.zero_grad()
            loss_of(model, x).backward()
            slopes = {p: (a.B.grad.t().numpy(), a.C.grad.numpy()) for p, a in adapters_of(model).items()}
            observed = core.observe(plan, expected, weights, plan.join_elements(slopes))
            optimizer.step()
            expected = core.advance(plan, observed)
            masks = plan.split(expected.active)
            assert sum(mask.sum() for mask in masks.values()) == budget.active_count
            for path, mask in active(model).items():
                assert np.array_equal(mask, masks[path]), (budget.step, path)
                assert np.array_equal(mask, budget.masks[path])
            if budget.step >= config.end_step:
                assert budget.reached
        assert budget.step == STEPS
    due = [t for t in range(1, STEPS + 1) if budget.plan.allocates_at(t)]
    # C starts at zero, so the first step is not informative, and an allocation due then waits for the second.
    assert [a.step for a in seen] == sorted({max(t, 2) for t in due})
    for each in seen:
        assert each.budget == core.budget_at(each.step, config, budget.plan.total)
        if config.unit == "subspaces":
            assert each.active == each.budget
        else:
            assert each.budget - max(budget.plan.costs) < each.parameters <= each.budget
        per_layer = [int(mask.sum()) for mask in each.masks.values()]
        assert sum(per_layer) == each.active
        assert min(per_layer) >= config.minimum_per_layer
    counted = sum(core.count_factors(f, active_only=True) for f in adamss_layers(model).values())
    assert counted == seen[-1].parameters
    history = [torch.cat(list(each.masks.values())) for each in seen]
    assert any((~a & b).any() for a, b in itertools.pairwise(history)) == config.revive


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_frozen_values_survive_every_optimiser_to_the_bit(optimiser):
    """Law 8 also covers Adafactor and Muon."""
    model, optimizer = with_optimiser(optimiser, subspace_rank=2, modules_to_save=())
    with controlled(model, optimizer, BudgetConfig(target=10, end_step=8, interval=3)) as budget:
        for x in batches():
            before = {p: core.Factors(*(a.clone() for a in f)) for p, f in adamss_layers(model).items()}
            step(model, optimizer, x)
            for path, f in before.items():
                now, (trained_B, trained_C) = adamss_layers(model)[path], core.trained_elements(f)
                for old, new, trained in ((f.B, now.B, trained_B), (f.C, now.C, trained_C)):
                    assert torch.equal(old[:, ~trained[0]], new[:, ~trained[0]])
                    assert not trained.any() or not torch.equal(old[:, trained[0]], new[:, trained[0]])
        assert budget.active_count == 10


def test_several_groups_a_trained_head_and_the_schedule_of_the_config():
    model = build(budget=BudgetConfig(target=10, end_step=5))
    adapters = [p for n, p in model.named_parameters() if p.requires_grad and ".adamss." in n]
    head = [p for n, p in model.named_parameters() if p.requires_grad and ".adamss." not in n]
    B, C = ([p for p in adapters if p.shape[0] != 1], [p for p in adapters if p.shape[0] == 1])
    optimizer = torch.optim.AdamW([{"params": B, "lr": 0.01}, {"params": head}, {"params": C, "lr": 0.1}])
    before = [p.clone() for p in head]
    with controlled(model, optimizer, None) as budget:
        train(model, optimizer, batches(6))
        assert budget.active_count == 10
    assert not any(torch.equal(a, b) for a, b in zip(before, head, strict=True))


def decisions(run, **options):
    """Train by `run(model, optimizer, batches)` and return the masks after every allocation."""
    model, seen = build(modules_to_save=()), []
    optimizer = options.pop("optimizer", OPTIMISERS["sgd"])(trainable(model))
    config = BudgetConfig(target=10, end_step=9, interval=3)
    with controlled(model, optimizer, config, on_allocation=seen.append) as budget:
        run(model, optimizer, batches(10))
        assert budget.active_count == 10
        return [(a.step, *(m.tolist() for m in a.masks.values())) for a in seen]


def test_gradient_accumulation_is_one_step():
    def accumulated(model, optimizer, data):
        for x in data:
            optimizer.zero_grad()
            for half in x.chunk(2):
                (loss_of(model, half) / 2).backward()
            optimizer.step()

    assert decisions(accumulated) == decisions(train)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("foreach", [True, False])
def test_a_closure(foreach, nesterov):
    """With nesterov and foreach, and without weight decay, SGD changes the gradients in place."""

    def closed(model, optimizer, data):
        for x in data:

            def closure(x=x):
                optimizer.zero_grad()
                loss = loss_of(model, x)
                loss.backward()
                return loss

            optimizer.step(closure)

    def keyword(model, optimizer, data):
        step = optimizer.step
        optimizer.step = lambda closure: step(closure=closure)
        closed(model, optimizer, data)

    def sgd(p):
        return OPTIMISERS["sgd"](p, foreach=foreach, nesterov=nesterov, weight_decay=0.0)

    assert decisions(keyword, optimizer=sgd) == decisions(train, optimizer=sgd)
    assert decisions(closed, optimizer=sgd) == decisions(train, optimizer=sgd)


@pytest.mark.parametrize("optimiser", ["adamw", "adamw fused"])
@pytest.mark.parametrize("unscale", [True, False])
def test_a_step_that_the_scaler_skips_is_no_step_and_no_score(optimiser, unscale):
    def scaled(model, optimizer, data):
        # The scales are powers of two, so that scaling is exact.
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        for number, x in enumerate(data):
            for overflow in (True, False) if number in (0, 4, 9) else (False,):
                optimizer.zero_grad()
                scaler.scale(loss_of(model, x)).backward()
                if overflow:
                    next(iter(trainable(model))).grad.fill_(float("inf"))
                if unscale:
                    scaler.unscale_(optimizer)
                    torch.nn.utils.clip_grad_norm_(trainable(model), 1e9)
                scaler.step(optimizer)
                scaler.update()

    make = OPTIMISERS[optimiser]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decisions(scaled, optimizer=make) == decisions(train, optimizer=make)


def test_accelerate_on_one_process():
    accelerate = pytest.importorskip("accelerate", reason="comes with the demo extra")

    def accelerated(model, optimizer, data):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model, wrapped = accelerator.prepare(model, optimizer)
        for x in data:
            for half in x.chunk(2):
                with accelerator.accumulate(model):
                    accelerator.backward(loss_of(model, half))
                    wrapped.step()
                    wrapped.zero_grad()

    assert decisions(accelerated) == decisions(train)


@pytest.mark.parametrize("factor_dtype", ["bfloat16", "float16"])
def test_half_precision_factors(factor_dtype):
    dtype = getattr(torch, factor_dtype)
    options = {"dtype": dtype, "factor_dtype": factor_dtype}
    *_, budget = trained_with(BudgetConfig(target=10, end_step=4), steps=5, optimiser="sgd", **options)
    assert budget.active_count == 10
    assert budget.state_dict()["layers"]["0.0"]["B"]["sensitivity"].dtype == torch.float32


def test_consolidate_compiles_once_more():
    """Law 11 tests that an allocation does not compile again."""
    torch.compiler.reset()
    compilations = CompileCounterWithBackend("aot_eager")
    schedule = BudgetConfig(target=10, end_step=6)
    model, optimizer, _ = trained_with(schedule, steps=8, dtype=torch.float32)
    compiled = torch.compile(model, backend=compilations, fullgraph=True)
    hold_frozen(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler warns about itself
        for count in (1, 2):
            train(compiled, optimizer, batches(3, torch.float32))
            assert compilations.frame_count == count
            adamss.consolidate(compiled)
    torch.compiler.reset()


def test_a_step_with_nan_is_left_out_with_one_warning():
    def poisoned(model, optimizer, data):
        for number, x in enumerate(data):
            optimizer.zero_grad()
            loss_of(model, x).backward()
            if number in (3, 4):
                # A NaN counts in frozen and in trained elements. The values are restored after the step.
                values = [p.detach().clone() for p in trainable(model)]
                trainable(model)[0].grad[0, 0] = float("nan")
                optimizer.step()
                for p, value in zip(trainable(model), values, strict=True):
                    p.data.copy_(value)
            else:
                optimizer.step()

    def sgd(p):
        return OPTIMISERS["sgd"](p, momentum=0.0)

    with pytest.warns(adamss.AdamssWarning, match="NaN or infinity at step 4") as caught:
        assert len(decisions(poisoned, optimizer=sgd)) == 3
    assert len(caught) == 1


def test_without_information_nothing_is_reduced_and_the_end_is_told():
    model, optimizer = with_optimiser("sgd")
    budget = BudgetController(model, optimizer, BudgetConfig(target=10, end_step=3))
    for _ in range(5):
        optimizer.zero_grad()
        (model(batches()[0]).sum() * 0).backward()
        optimizer.step()
    assert budget.active_count == 40
    assert not budget.reached
    with pytest.warns(adamss.AdamssWarning, match=r"10 subspaces was not reached: no step.*40 of 40"):
        budget.remove()


def test_a_training_shorter_than_the_schedule_is_told():
    model, optimizer = with_optimiser("sgd")
    budget = BudgetController(model, optimizer, BudgetConfig(target=10, end_step=100))
    train(model, optimizer, batches(7))
    left = budget.active_count
    match = rf"not reached: training ended after 7 .* the schedule ends at 100; {left} of 40"
    with pytest.warns(adamss.AdamssWarning, match=match):
        budget.remove()
    budget.remove()  # a second call changes nothing and does not warn


def test_at_the_exit_of_the_process_the_end_is_told():
    code = """
        import torch, adamss, adamss_torch
        model = adamss.attach(torch.nn.Sequential(torch.nn.Linear(8, 8)), adamss.AdamssConfig(targets=["0"], rank=4))
        optimizer = torch.optim.SGD(adamss.trainable_parameters(model), lr=0.1)
        budget = adamss_torch.BudgetController(model, optimizer, adamss.BudgetConfig(target=1, end_step=9))
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "training ended after 1 optimiser steps, the schedule ends at 9" in done.stderr


@pytest.mark.parametrize("options", [{}, {"subspace_rank": 2}, {"basis": "per_subspace"}], ids=str)
def test_consolidated_trains_on_and_gives_the_base_back(options):
    x = batches(1, torch.float32)[0]
    expected = adamss.detach(build(dtype=torch.float32))(x)
    schedule = BudgetConfig(target=13, end_step=6)
    model, optimizer, _ = trained_with(schedule, steps=7, dtype=torch.float32, **options)
    twin = copy.deepcopy(model)
    adamss.consolidate(model)
    for each in (model, twin):
        each.zero_grad()
        loss_of(each, x).backward()
    for ours, theirs in zip(adapters_of(model).values(), adapters_of(twin).values(), strict=True):
        for name, kept in zip("BC", ours.trained_elements(), strict=True):
            gradient, expected_one = (getattr(each, name).grad for each in (ours, theirs))
            assert torch.allclose(gradient, expected_one, atol=1e-6)
            assert torch.equal(gradient, torch.where(kept, gradient, 0))
    hold_frozen(model, optimizer)
    step(model, optimizer, x)
    assert not torch.allclose(model(x), twin(x), atol=1e-5)
    adamss.merge(model)
    adamss.detach(model)
    assert torch.equal(model(x), expected)


def test_a_merge_that_fails_leaves_a_consolidated_model_as_it_was():
    model, *_ = trained_with(BudgetConfig(target=3, end_step=4), steps=5)
    adamss.consolidate(model)
    model[0][0].adamss.default.C.data.fill_(float("inf"))
    before = state(model)
    with pytest.raises(errors.ArrayValueError, match=r"0\.0"):
        adamss.merge(model)
    assert_same_state(model, before)
    assert model[0][0].adamss.default.held is not None


def test_what_cannot_return_is_not_promised_to():
    config = BudgetConfig(target=10, end_step=4)
    revive = BudgetConfig(target=10, end_step=4, revive=True)
    model, optimizer = with_optimiser()
    with controlled(model, optimizer, config) as budget:
        early = budget.state_dict()
        train(model, optimizer, batches(5))
        adamss.consolidate(model)
        with pytest.raises(errors.StateError, match="consolidated into its weight"):
            budget.load_state_dict(early)
    with pytest.raises(errors.StateError, match="cannot return"):
        BudgetController(model, optimizer, revive)
    model, optimizer = with_optimiser()
    with controlled(model, optimizer, revive):
        train(model, optimizer, batches(5))
        with pytest.raises(errors.StateError, match="may return"):
            adamss.consolidate(model)


def test_masks_that_are_loaded_into_the_model_are_taken_over_and_told():
    model, optimizer = with_optimiser()
    with controlled(model, optimizer, BudgetConfig(target=10, end_step=4)) as budget:
        step(model, optimizer, batches()[0])
        early = copy.deepcopy(model.state_dict())
        train(model, optimizer, batches(5))
        assert budget.active_count == 10
        late = copy.deepcopy(model.state_dict())
        model.load_state_dict(early)
        with pytest.warns(adamss.AdamssWarning, match=r"other masks \(40 subspaces are trained, 10 before\)"):
            step(model, optimizer, batches()[1])
        assert budget.active_count == adamss.summary(model).total.active == 40
        others = {name: t.flip(0) if name.endswith("active") else t for name, t in late.items()}
        for state, told in (
            (late, "10 subspaces are trained, 40 before"),
            (others, "10 subspaces are trained, 10"),
        ):
            model.load_state_dict(state)
            with pytest.warns(adamss.AdamssWarning, match=told):
                step(model, optimizer, batches()[1])


@pytest.mark.parametrize("end", ["copied", "collected"])
def test_frozen_subspaces_of_a_model_without_a_controller_do_not_return(end):
    model, revive = build(), BudgetConfig(target=10, end_step=4, revive=True)
    optimizer = OPTIMISERS["adamw"](trainable(model))
    budget = BudgetController(model, optimizer, revive)
    for x in batches(5):
        step(model, optimizer, x)
    twin = copy.deepcopy(model)
    if end == "collected":
        del budget, optimizer
        gc.collect()
        twin = model
    twin.zero_grad()
    twin(batches()[0]).square().mean().backward()
    for adapter in adapters_of(twin).values():
        for parameter, trained in zip((adapter.B, adapter.C), adapter.trained_elements(), strict=True):
            assert not parameter.grad[~trained.expand_as(parameter)].any()
    adamss.consolidate(twin)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_would_be_on_no_hooks(duplicate):
    refused = pytest.raises(errors.StateError, match="make a new controller")
    with controlled(*with_optimiser(), BudgetConfig(target=10, end_step=4)) as budget, refused:
        duplicate(budget)


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
@pytest.mark.parametrize("budget_first", [True, False])
def test_resumed_whichever_state_is_loaded_first(optimiser, budget_first, tmp_path):
    """Law 10 covers the rest: every schedule and step, files, and another process."""
    config = BudgetConfig(target=10, start_step=1, end_step=7, interval=3)
    whole, *_ = trained_with(config, steps=10, optimiser=optimiser)
    half, *states = trained_with(config, steps=5, optimiser=optimiser)
    adamss.save(half, tmp_path / "half.safetensors", training=True)
    model = adamss.load(adamss.detach(build()), tmp_path / "half.safetensors")
    optimizer = OPTIMISERS[optimiser](trainable(model))
    with controlled(model, optimizer, config) as budget:
        pairs = list(zip((optimizer, budget), states, strict=True))
        for target, source in reversed(pairs) if budget_first else pairs:
            target.load_state_dict(source.state_dict())
        train(model, optimizer, batches(10)[5:])
    assert_same_state(model, whole)


def test_bad_schedules_and_models():
    model, optimizer = with_optimiser()
    for changes, match in (
        ({"target": 41}, "target = 41 is more than the 40 subspaces"),
        ({"target": 10**6, "unit": "parameters"}, r"target = 1000000 is more than the \d+ parameters"),
        ({"target": 15, "minimum_per_layer": 2}, "minimum_per_layer = 2 in 8 layers may need 16"),
        ({"target": 2, "unit": "parameters"}, "one subspace may need"),
    ):
        with pytest.raises(errors.ConfigError, match=match):
            BudgetController(model, optimizer, BudgetConfig(end_step=5, **changes))
    with pytest.raises(errors.ConfigError, match="no schedule"):
        BudgetController(model, optimizer)
    with pytest.raises(errors.ConfigTypeError, match="found dict"):
        BudgetController(model, optimizer, {"target": 3})
    with pytest.raises(errors.StateError, match="no adapters"):
        BudgetController(nn.Linear(3, 3), optimizer, BudgetConfig(target=1, end_step=2))
    with pytest.raises(errors.StateError, match="merged"):
        BudgetController(adamss.merge(build()), optimizer, BudgetConfig(target=1, end_step=2))


def test_bad_optimisers():
    model, config = build(), BudgetConfig(target=10, end_step=5)
    without_one = [p for p in trainable(model) if p is not model[7][0].adamss.default.C]
    for optimizer, kind, match in (
        (torch.optim.SGD(build().parameters(), lr=0.1), errors.ConfigError, "the optimiser holds none"),
        (torch.optim.SGD(without_one), errors.ConfigError, r"holds not 7\.0\.C; make"),
        (torch.optim.LBFGS(trainable(model)), errors.ConfigTypeError, "LBFGS"),
        ("adamw", errors.ConfigTypeError, "found str"),
    ):
        with pytest.raises(kind, match=match):
            BudgetController(model, optimizer, config)


def test_two_controllers():
    model, config = build(), BudgetConfig(target=10, end_step=5)
    optimizer = OPTIMISERS["adamw"](trainable(model))
    with controlled(model, optimizer, config):
        with pytest.raises(errors.StateError, match="the optimiser has a controller already"):
            BudgetController(model, optimizer, config)
        with pytest.raises(errors.StateError, match="the model has a controller already"):
            BudgetController(model, OPTIMISERS["sgd"](trainable(model)), config)
    with controlled(model, optimizer, config) as budget:
        train(model, optimizer, batches(6))
        assert budget.active_count == 10


def test_states_that_do_not_fit():
    config = BudgetConfig(target=2, end_step=3)
    model, optimizer = with_optimiser()
    with controlled(model, optimizer, config) as budget:
        train(model, optimizer, batches(3))
        saved = budget.state_dict()
        for other, match in (
            (build(subspaces=4), "0.0 has other subspaces there"),
            (build(rank=5), "0.0 has other subspaces there"),
            (build(segmentation="contiguous"), "0.0 has other subspaces there"),
            (build(base=7), "0.0 has other subspaces there"),
            (build(targets=["0.0", "1.0"], modules_to_save=()), r"differs in 2\.0, 3\.0, 4\.0 and 3 more"),
        ):
            before = active(other)
            with controlled(other, OPTIMISERS["adamw"](trainable(other)), config) as second:
                with pytest.raises(errors.StateError, match=match):
                    second.load_state_dict(saved)
                assert second.step == 0
            assert all(np.array_equal(mask, before[path]) for path, mask in active(other).items())
        empty = saved | {"layers": {p: {} for p in saved["layers"]}}
        for wrong in ({}, {"layers": 3}, empty, optimizer.state_dict()):
            with pytest.raises(errors.StateError, match="no state of a controller"):
                budget.load_state_dict(wrong)
        other = build()
        longer = BudgetConfig(target=1, end_step=9)
        warned = pytest.warns(adamss.AdamssWarning, match="goes on with its own target = 1, end_step = 9")
        with controlled(other, OPTIMISERS["adamw"](trainable(other)), longer) as second, warned:
            second.load_state_dict(saved)
