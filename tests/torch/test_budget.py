"""The budget in a PyTorch training loop: exact, whatever the optimiser, the scaler and the loop around it."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import subprocess
import sys
import textwrap
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

import adamss
from adamss import BudgetConfig, core, errors
from adamss.io import checkpoint as files
from adamss_torch import BudgetController
from adamss_torch.backend import adapters_of

LAYERS, K, STEPS = 8, 5, 14
OPTIMISERS = {
    "sgd": lambda p, **k: torch.optim.SGD(p, **{"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1} | k),
    "adamw": lambda p, **k: torch.optim.AdamW(p, **{"lr": 0.02, "weight_decay": 0.1} | k),
    "adamw fused": lambda p, **k: torch.optim.AdamW(p, **{"lr": 0.02, "fused": True} | k),
    "nadam": lambda p, **k: torch.optim.NAdam(p, **{"lr": 0.02, "weight_decay": 0.1} | k),
    "adagrad": lambda p, **k: torch.optim.Adagrad(p, **{"lr": 0.02, "weight_decay": 0.1} | k),
    "adafactor": lambda p, **k: torch.optim.Adafactor(p, **{"lr": 0.02, "weight_decay": 0.1} | k),
    "muon": lambda p, **k: torch.optim.Muon(p, **{"lr": 0.02, "weight_decay": 0.1} | k),
}
ELEMENTWISE = ("sgd", "adamw", "adamw fused", "nadam", "adagrad")
SCHEDULES = {
    "interval divides": {"target": 10, "end_step": 10, "interval": 5},
    "interval does not divide": {"target": 10, "end_step": 10, "interval": 3},
    "interval over the window": {"target": 10, "start_step": 2, "end_step": 7, "interval": 50},
    "running": {"target": 10, "start_step": 2, "end_step": 9, "window": "running"},
    "revive": {"target": 10, "end_step": 10, "interval": 2, "revive": True},
    "a minimum for each layer": {"target": 10, "end_step": 10, "minimum_per_layer": 1},
    "parameters": {"target": 200, "end_step": 10, "interval": 3, "unit": "parameters"},
    "linear": {"target": 10, "end_step": 9, "power": 1},
}
each_optimiser = pytest.mark.parametrize("optimiser", OPTIMISERS)


def build(*, dtype=torch.float64, base=0, **changes) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(base)
        layers = [nn.Sequential(nn.Linear(16, 16, dtype=dtype), nn.Tanh()) for _ in range(LAYERS)]
        model = nn.Sequential(*layers, nn.Linear(16, 4, dtype=dtype))
    settings = {
        "targets": [f"{i}.0" for i in range(LAYERS)],
        "rank": 6,
        "subspaces": K,
        "modules_to_save": ["8"],
    }
    return adamss.attach(model, adamss.AdamssConfig(**(settings | changes)))


def batches(steps: int = STEPS, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(steps, 12, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        dtype
    )


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).float().square().mean() if x.dtype != torch.float64 else model(x).square().mean()


def step(model, optimizer, x) -> float:
    optimizer.zero_grad()
    loss = loss_of(model, x)
    loss.backward()
    optimizer.step()
    return loss.item()


@contextmanager
def controlled(model, optimizer, config, **options):
    """A controller that is taken off again, so that it does not outlive its test; an unreached target is fine."""
    controller = BudgetController(model, optimizer, config, **options)
    try:
        yield controller
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", adamss.AdamssWarning)
            controller.remove()


def active(model) -> dict[str, np.ndarray]:
    return {p: f.active.numpy().copy() for p, f in adamss_layers(model).items()}


def adamss_layers(model):
    from adamss_torch import TorchBackend

    return TorchBackend().adaptation(model).layers


def trainable(model):
    return adamss.trainable_parameters(model)


# ---- the schedule ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_active_equals_the_budget_at_every_allocation_and_from_the_end_on(schedule):
    config = BudgetConfig(**SCHEDULES[schedule])
    model, seen = build(), []
    optimizer = OPTIMISERS["adamw"](trainable(model))
    with controlled(model, optimizer, config, on_allocation=seen.append) as budget:
        for x in batches():
            step(model, optimizer, x)
            masks = active(model)
            assert sum(m.sum() for m in masks.values()) == budget.active_count
            assert all(np.array_equal(budget.masks[path], mask) for path, mask in masks.items())
            if budget.step >= config.end_step:
                assert budget.reached
        assert budget.step == STEPS
    due = [t for t in range(1, STEPS + 1) if budget.plan.allocates_at(t)]
    # C starts at zero: the first step says nothing, and what is due then waits for the second.
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


def test_eight_layers_of_five_with_target_ten_keep_ten():
    model = build()
    optimizer = OPTIMISERS["adamw"](trainable(model))
    with controlled(model, optimizer, BudgetConfig(target=10, end_step=5)) as budget:
        for x in batches(6):
            step(model, optimizer, x)
        assert budget.active_count == adamss.summary(model).total.active == 10


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("basis", ["shared", "per_subspace"])
def test_decides_as_the_core_does_on_the_same_gradients(schedule, basis):
    config = BudgetConfig(**SCHEDULES[schedule])
    model = build(basis=basis, subspace_rank=2)
    optimizer = OPTIMISERS["sgd"](trainable(model))

    def host():
        return {p: core.Factors(*(a.numpy().copy() for a in f)) for p, f in adamss_layers(model).items()}

    with controlled(model, optimizer, config) as budget:
        plan = core.plan_budget(host(), config)

        def elements():
            return plan.join_elements({path: (f.B, f.C) for path, f in host().items()})

        state = core.initial_budget_state(plan, elements())
        for x in batches():
            weights = elements()
            optimizer.zero_grad()
            loss_of(model, x).backward()
            slopes = {p: (a.B.grad.t().numpy(), a.C.grad.numpy()) for p, a in adapters_of(model).items()}
            gradients = plan.join_elements(slopes)
            optimizer.step()
            state = core.advance(plan, core.observe(plan, state, weights, gradients))
            masks = plan.split(state.active)
            for path, mask in active(model).items():
                assert np.array_equal(mask, masks[path]), (budget.step, path)


def test_uses_the_schedule_of_the_attached_config():
    model = build(budget=BudgetConfig(target=3, end_step=4))
    optimizer = OPTIMISERS["adamw"](trainable(model))
    with controlled(model, optimizer, None) as budget:
        for x in batches(4):
            step(model, optimizer, x)
        assert budget.active_count == 3


# ---- frozen means frozen -------------------------------------------------------------------------------


@each_optimiser
def test_frozen_values_survive_every_optimiser_to_the_bit(optimiser):
    model = build(subspace_rank=2, modules_to_save=())
    optimizer = OPTIMISERS[optimiser](trainable(model))
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


def test_several_groups_and_a_trained_head():
    model = build()
    adapters = [p for n, p in model.named_parameters() if p.requires_grad and ".adamss." in n]
    head = [p for n, p in model.named_parameters() if p.requires_grad and ".adamss." not in n]
    B, C = ([p for p in adapters if p.shape[0] != 1], [p for p in adapters if p.shape[0] == 1])
    optimizer = torch.optim.AdamW([{"params": B, "lr": 0.01}, {"params": head}, {"params": C, "lr": 0.1}])
    before = [p.clone() for p in head]
    with controlled(model, optimizer, BudgetConfig(target=10, end_step=5)) as budget:
        for x in batches(6):
            step(model, optimizer, x)
        assert budget.active_count == 10
    assert not any(torch.equal(a, b) for a, b in zip(before, head, strict=True))


def test_frozen_gradients_do_not_count_in_the_clip_norm_and_nothing_is_toggled():
    model = build(modules_to_save=())
    optimizer = OPTIMISERS["sgd"](trainable(model))
    with controlled(model, optimizer, BudgetConfig(target=10, end_step=5)):
        for x in batches(7):
            step(model, optimizer, x)
    optimizer.zero_grad()
    loss_of(model, batches()[8]).backward()
    norm = torch.nn.utils.clip_grad_norm_(trainable(model), float("inf"))
    squares = torch.zeros((), dtype=torch.float64)
    for path, f in adamss_layers(model).items():
        adapter = model.get_submodule(path).adamss.default
        assert adapter.B.requires_grad and adapter.C.requires_grad
        for gradient, trained in zip(
            (adapter.B.grad.t(), adapter.C.grad), core.trained_elements(f), strict=True
        ):
            assert not gradient[:, ~trained[0]].any()
            squares += gradient[:, trained[0]].square().sum()
    assert norm.item() == pytest.approx(squares.sqrt().item(), rel=1e-12)


def test_with_revive_a_frozen_subspace_returns_and_its_values_were_kept():
    config = BudgetConfig(target=10, end_step=12, interval=2, revive=True)
    model, history = build(), []
    optimizer = OPTIMISERS["adamw"](trainable(model))
    with controlled(model, optimizer, config) as budget:
        for x in batches(12):
            step(model, optimizer, x)
            history.append(np.concatenate([budget.masks[p].numpy() for p in budget.plan.paths]))
    returned = [(~a & b).any() for a, b in itertools.pairwise(history)]
    assert any(returned), "no subspace returned: the case tests nothing"


# ---- loops ------------------------------------------------------------------------------------------------


def decisions(run, **options):
    """Train by `run(model, optimizer, batches)` and return the masks after every allocation."""
    model, seen = build(modules_to_save=()), []
    optimizer = options.pop("optimizer", OPTIMISERS["sgd"])(trainable(model))
    config = BudgetConfig(target=10, end_step=9, interval=3)
    with controlled(model, optimizer, config, on_allocation=seen.append) as budget:
        run(model, optimizer, batches(10))
        assert budget.active_count == 10
        return [(a.step, *(m.tolist() for m in a.masks.values())) for a in seen]


def plainly(model, optimizer, data):
    for x in data:
        step(model, optimizer, x)


def test_gradient_accumulation_is_one_step():
    def accumulated(model, optimizer, data):
        for x in data:
            optimizer.zero_grad()
            for half in x.chunk(2):
                (loss_of(model, half) / 2).backward()
            optimizer.step()

    assert decisions(accumulated) == decisions(plainly)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("foreach", [True, False])
def test_a_closure(foreach, nesterov):
    """With nesterov and foreach, SGD works in the place of the gradient."""

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
        return OPTIMISERS["sgd"](p, foreach=foreach, nesterov=nesterov)

    assert decisions(keyword, optimizer=sgd) == decisions(plainly, optimizer=sgd)
    assert decisions(closed, optimizer=sgd) == decisions(plainly, optimizer=sgd)


@pytest.mark.parametrize("optimiser", ["adamw", "adamw fused"])
@pytest.mark.parametrize("unscale", [True, False])
def test_a_step_that_the_scaler_skips_is_no_step_and_no_score(optimiser, unscale):
    def scaled(model, optimizer, data):
        # Powers of two: scaling changes no bit of a gradient.
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
        assert decisions(scaled, optimizer=make) == decisions(plainly, optimizer=make)


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

    assert decisions(accelerated) == decisions(plainly)


def test_the_optimiser_within_a_wrapper():
    accelerate = pytest.importorskip("accelerate", reason="comes with the demo extra")
    model = build()
    inner = OPTIMISERS["adamw"](trainable(model))
    model, optimizer = accelerate.Accelerator(cpu=True).prepare(model, inner)
    with controlled(model, optimizer, BudgetConfig(target=10, end_step=4)) as budget:
        for x in batches(5):
            step(model, optimizer, x)
        assert budget.active_count == 10


@pytest.mark.parametrize("factor_dtype", ["bfloat16", "float16"])
def test_half_precision_factors(factor_dtype):
    dtype = getattr(torch, factor_dtype)
    model = build(dtype=dtype, factor_dtype=factor_dtype)
    optimizer = OPTIMISERS["sgd"](trainable(model))
    with controlled(model, optimizer, BudgetConfig(target=10, end_step=4)) as budget:
        for x in batches(5, dtype):
            step(model, optimizer, x)
        assert budget.active_count == 10
        state = budget.state_dict()["layers"]["0.0"]
        assert state["B"]["sensitivity"].dtype == torch.float32


def test_an_allocation_does_not_compile_anew_and_consolidate_does_once():
    counts = []

    def counting(graph, inputs):
        counts.append(1)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch.compiler.reset()
    model = build(dtype=torch.float32)
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    optimizer = OPTIMISERS["adamw"](trainable(model))
    with (
        controlled(compiled, optimizer, BudgetConfig(target=10, end_step=6)) as budget,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # those of the compiler about itself
        for x in batches(8, torch.float32):
            step(compiled, optimizer, x)
        assert budget.active_count == 10
        assert len(counts) == 1
        adamss.consolidate(compiled)
        for x in batches(3, torch.float32):
            step(compiled, optimizer, x)
        assert len(counts) == 2
    torch.compiler.reset()


# ---- gradients that say nothing -------------------------------------------------------------------------


def test_a_step_with_nan_is_left_out_with_one_warning():
    def poisoned(model, optimizer, data):
        for number, x in enumerate(data):
            optimizer.zero_grad()
            loss_of(model, x).backward()
            if number in (3, 4):
                # Of a frozen or trained element alike; the optimiser is kept from taking it.
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
    model = build()
    optimizer = OPTIMISERS["sgd"](trainable(model))
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
    model = build()
    optimizer = OPTIMISERS["sgd"](trainable(model))
    budget = BudgetController(model, optimizer, BudgetConfig(target=10, end_step=100))
    for x in batches(7):
        step(model, optimizer, x)
    left = budget.active_count
    match = rf"not reached: training ended after 7 .* the schedule ends at 100; {left} of 40"
    with pytest.warns(adamss.AdamssWarning, match=match):
        budget.remove()
    budget.remove()  # a second time changes nothing, and says nothing


def test_at_the_exit_of_the_process_the_end_is_told():
    code = """
        import torch, adamss, adamss_torch
        model = adamss.attach(torch.nn.Sequential(torch.nn.Linear(8, 8)), adamss.AdamssConfig(targets=["0"], rank=4))
        optimizer = torch.optim.SGD(adamss.trainable_parameters(model), lr=0.1)
        budget = adamss_torch.BudgetController(model, optimizer, adamss.BudgetConfig(target=1, end_step=9))
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert "training ended after 1 optimiser steps, the schedule ends at 9" in done.stderr


# ---- consolidate -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"subspace_rank": 2}, {"basis": "per_subspace"}], ids=str)
def test_consolidated_train_merge_detach_load(tmp_path, options):
    model = build(dtype=torch.float32, **options)
    with adamss.disabled(model) as base:
        x = batches(1, torch.float32)[0]
        expected = base(x).detach()
    optimizer = OPTIMISERS["adamw"](trainable(model))
    with controlled(model, optimizer, BudgetConfig(target=13, end_step=6)):
        for each in batches(7, torch.float32):
            step(model, optimizer, each)
        twin = copy.deepcopy(model)
        adamss.consolidate(model)
        assert torch.allclose(model(x), twin(x), atol=1e-5)
        for each in (model, twin):
            each.zero_grad()
            loss_of(each, x).backward()
        for ours, theirs in zip(adapters_of(model).values(), adapters_of(twin).values(), strict=True):
            for name, kept in zip("BC", ours.trained_elements(), strict=True):
                gradient, expected_one = (getattr(each, name).grad for each in (ours, theirs))
                assert torch.allclose(gradient, expected_one, atol=1e-6)
                assert torch.equal(gradient, torch.where(kept, gradient, 0))
        step(model, optimizer, x)
        assert not torch.allclose(model(x), twin(x), atol=1e-5)
    y = model(x).detach()
    adamss.save(model, tmp_path / "a")
    fresh = nn.Sequential(
        *(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(LAYERS)), nn.Linear(16, 4)
    )
    state = {k: v for k, v in adamss.detach(copy.deepcopy(model)).state_dict().items() if "adamss" not in k}
    fresh.load_state_dict(state)
    assert torch.allclose(adamss.load(fresh, tmp_path / "a")(x), y, atol=1e-5)
    assert torch.allclose(adamss.merge(copy.deepcopy(model))(x), y, atol=1e-5)
    adamss.detach(model)
    assert torch.equal(model(x), expected)


def test_a_merge_that_fails_leaves_a_consolidated_model_as_it_was():
    model = build()
    optimizer = OPTIMISERS["adamw"](trainable(model))
    with controlled(model, optimizer, BudgetConfig(target=3, end_step=4)):
        for x in batches(5):
            step(model, optimizer, x)
    adamss.consolidate(model)
    model[0][0].adamss.default.C.data.fill_(float("inf"))
    weights = [layer.weight.clone() for layer in model.modules() if isinstance(layer, nn.Linear)]
    with pytest.raises(errors.ArrayValueError, match=r"0\.0"):
        adamss.merge(model)
    for layer, weight in zip((m for m in model.modules() if isinstance(m, nn.Linear)), weights, strict=True):
        assert torch.equal(layer.weight, weight)
    assert model[0][0].adamss.default.held is not None


def test_what_cannot_return_is_not_promised_to():
    config = BudgetConfig(target=10, end_step=4)
    revive = BudgetConfig(target=10, end_step=4, revive=True)
    model = build()
    optimizer = OPTIMISERS["adamw"](trainable(model))
    with controlled(model, optimizer, config) as budget:
        early = budget.state_dict()
        for x in batches(5):
            step(model, optimizer, x)
        adamss.consolidate(model)
        with pytest.raises(errors.StateError, match="consolidated into its weight"):
            budget.load_state_dict(early)
    with pytest.raises(errors.StateError, match="cannot return"):
        BudgetController(model, optimizer, revive)
    model = build()
    optimizer = OPTIMISERS["adamw"](trainable(model))
    with controlled(model, optimizer, revive):
        for x in batches(5):
            step(model, optimizer, x)
        with pytest.raises(errors.StateError, match="may return"):
            adamss.consolidate(model)


def test_masks_that_are_loaded_into_the_model_are_taken_over_and_told():
    model = build()
    optimizer = OPTIMISERS["adamw"](trainable(model))
    with controlled(model, optimizer, BudgetConfig(target=10, end_step=4)) as budget:
        step(model, optimizer, batches()[0])
        early = copy.deepcopy(model.state_dict())
        for x in batches(5):
            step(model, optimizer, x)
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
    model = build()
    with (
        controlled(model, OPTIMISERS["sgd"](trainable(model)), BudgetConfig(target=10, end_step=4)) as budget,
        pytest.raises(errors.StateError, match="make a new controller"),
    ):
        duplicate(budget)


# ---- resume -----------------------------------------------------------------------------------------------

RESUMED = """
    import sys, pathlib, torch, adamss
    sys.path.insert(0, {tests!r})
    from test_budget import *
    folder = pathlib.Path({folder!r})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in sorted(folder.glob("*.half")):
            optimiser, revive, at = path.stem.split("-")
            continued(folder, optimiser, revive == "True", int(at))
"""


def resume_schedule(revive: bool) -> BudgetConfig:
    return BudgetConfig(target=10, start_step=1, end_step=7, interval=3, revive=revive)


def write_half(folder, name, model, optimizer, budget):
    adamss.save(model, folder / f"{name}.safetensors", training=True)
    torch.save({"optimizer": optimizer.state_dict(), "budget": budget.state_dict()}, folder / f"{name}.half")


def continued(folder, optimiser, revive, at):
    """Go on from step `at` to the end, and write the whole."""
    name = f"{optimiser}-{revive}-{at}"
    model = adamss.load(adamss.detach(build()), folder / f"{name}.safetensors")
    optimizer = OPTIMISERS[optimiser](trainable(model))
    state = torch.load(folder / f"{name}.half", weights_only=True)
    with controlled(model, optimizer, resume_schedule(revive)) as budget:
        if at % 2:  # in either order
            optimizer.load_state_dict(state["optimizer"])
            budget.load_state_dict(state["budget"])
        else:
            budget.load_state_dict(state["budget"])
            optimizer.load_state_dict(state["optimizer"])
        for x in batches(10)[at:]:
            step(model, optimizer, x)
        write_half(folder, f"{name}-whole", model, optimizer, budget)
        (folder / f"{name}-whole.half").rename(folder / f"{name}.whole")


def test_resumed_at_every_step_in_a_new_process_gives_the_same_bits(tmp_path):
    whole = {}
    for optimiser in ("adamw", "sgd"):
        for revive in (False, True):
            model = build()
            optimizer = OPTIMISERS[optimiser](trainable(model))
            with controlled(model, optimizer, resume_schedule(revive)) as budget:
                for at, x in enumerate(batches(10)):
                    write_half(tmp_path, f"{optimiser}-{revive}-{at}", model, optimizer, budget)
                    step(model, optimizer, x)
                name = f"{optimiser}-{revive}"
                write_half(tmp_path, name, model, optimizer, budget)
                (tmp_path / f"{name}.half").rename(tmp_path / f"{name}.end")
                whole[name] = torch.load(tmp_path / f"{name}.end", weights_only=True)
    code = textwrap.dedent(RESUMED.format(tests=str(__file__).rpartition("/")[0], folder=str(tmp_path)))
    subprocess.run([sys.executable, "-c", code], check=True)
    resumed = sorted(tmp_path.glob("*.whole"))
    assert len(resumed) == 40
    for path in resumed:
        name = path.stem.rpartition("-")[0]
        state = torch.load(path, weights_only=True)
        assert_same_bits(state, whole[name], path.stem)
        one, other = (files.read(tmp_path / f"{stem}.safetensors") for stem in (f"{path.stem}-whole", name))
        assert (one.layers, one.saved) == (other.layers, other.saved)


def assert_same_bits(actual, expected, what):
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), what
        for key, value in expected.items():
            assert_same_bits(actual[key], value, f"{what}: {key}")
    elif isinstance(expected, list):
        assert len(actual) == len(expected), what
        for number, pair in enumerate(zip(actual, expected, strict=True)):
            assert_same_bits(*pair, f"{what}: {number}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected), what
    else:
        assert actual == expected, what


# ---- bad input --------------------------------------------------------------------------------------------


def test_bad_schedules_and_models():
    model = build()
    optimizer = OPTIMISERS["adamw"](trainable(model))
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
    with pytest.raises(errors.ConfigError, match="the optimiser holds none"):
        BudgetController(model, torch.optim.SGD(build().parameters(), lr=0.1), config)
    with pytest.raises(errors.ConfigError, match=r"holds not 7\.0\.C; make"):
        BudgetController(
            model,
            torch.optim.SGD([p for p in trainable(model) if p is not model[7][0].adamss.default.C]),
            config,
        )
    with pytest.raises(errors.ConfigTypeError, match="LBFGS"):
        BudgetController(model, torch.optim.LBFGS(trainable(model)), config)
    with pytest.raises(errors.ConfigTypeError, match="found str"):
        BudgetController(model, "adamw", config)


def test_two_controllers():
    model, config = build(), BudgetConfig(target=10, end_step=5)
    optimizer = OPTIMISERS["adamw"](trainable(model))
    with controlled(model, optimizer, config):
        with pytest.raises(errors.StateError, match="the optimiser has a controller already"):
            BudgetController(model, optimizer, config)
        with pytest.raises(errors.StateError, match="the model has a controller already"):
            BudgetController(model, OPTIMISERS["sgd"](trainable(model)), config)
    with controlled(model, optimizer, config) as budget:
        for x in batches(6):
            step(model, optimizer, x)
        assert budget.active_count == 10


def test_states_that_do_not_fit(tmp_path):
    config = BudgetConfig(target=2, end_step=3)
    model = build()
    optimizer = OPTIMISERS["adamw"](trainable(model))
    with controlled(model, optimizer, config) as budget:
        for x in batches(3):
            step(model, optimizer, x)
        state = budget.state_dict()
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
                    second.load_state_dict(state)
                assert second.step == 0
            assert all(np.array_equal(mask, before[path]) for path, mask in active(other).items())
        for wrong in (
            {},
            {"layers": 3},
            state | {"layers": {p: {} for p in state["layers"]}},
            optimizer.state_dict(),
        ):
            with pytest.raises(errors.StateError, match="no state of a controller"):
                budget.load_state_dict(wrong)
        other = build()
        longer = BudgetConfig(target=1, end_step=9)
        warned = pytest.warns(adamss.AdamssWarning, match="goes on with its own target = 1, end_step = 9")
        with controlled(other, OPTIMISERS["adamw"](trainable(other)), longer) as second, warned:
            second.load_state_dict(state)
