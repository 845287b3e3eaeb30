"""Situations that users of adapters, averaging, wrapping and optimisers have reported as bugs elsewhere."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import adamss
from adamss import AdamssConfig, BudgetConfig
from adamss_torch import BudgetController, hold_frozen
from adamss_torch.adapter import STRUCTURE
from adamss_torch.backend import adapters_of

X = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))


def attached(base=net, **settings):
    return adamss.attach(base(), AdamssConfig(**{"targets": "[02]", "rank": 16, "subspaces": 20, **settings}))


def adamw(model):
    return torch.optim.AdamW(adamss.trainable_parameters(model), lr=0.05)


def train(model, optimizer, steps):
    for seed in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(seed))
        model(x).square().mean().backward()
        optimizer.step()


def saved(model, path):
    """What another process computes with the adapter that is saved of a model."""
    adamss.save(model, path)
    return adamss.load(net(), path)


def close(model, other, **tolerance):
    torch.testing.assert_close(model(X), other(X), **tolerance)


# ---- state that others average -----------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [None, 0.9, 0.95, 0.9999])
def test_an_average_of_models(decay, tmp_path):
    model = attached()
    optimizer = adamw(model)
    ema = None if decay is None else get_ema_multi_avg_fn(decay)
    average, expected = AveragedModel(model, multi_avg_fn=ema, use_buffers=True), None
    for number in range(20):
        train(model, optimizer, 1)
        average.update_parameters(model)
        C = model[0].adamss.default.C.detach()
        weight = (1 if number == 0 else 1 - decay) if decay else 1 / (number + 1)
        expected = C * weight + (0 if expected is None else expected * (1 - weight))
    adapter, ours = average.module[0].adamss.default, model[0].adamss.default
    torch.testing.assert_close(adapter.C.detach(), expected)
    assert all(torch.equal(getattr(adapter, name), getattr(ours, name)) for name in STRUCTURE)
    assert (average(X) - net()(X)).abs().max() > 0.01
    close(saved(average.module, tmp_path / "a"), average)


def test_an_average_that_is_written_into_a_state(tmp_path):
    model = attached()
    optimizer, average = adamw(model), copy.deepcopy(model)
    for _ in range(20):
        train(model, optimizer, 1)
        state = model.state_dict()
        for name, value in average.state_dict().items():
            value.copy_(value * 0.9 + state[name] * 0.1)
    assert all(
        torch.equal(getattr(average[2].adamss.default, n), getattr(model[2].adamss.default, n))
        for n in STRUCTURE
    )
    close(saved(average, tmp_path / "a"), average)


# ---- copies that share a hook ------------------------------------------------------------------------------


def test_the_replicas_of_data_parallel_use_their_own_factors():
    model = attached()
    replicas = [
        m._replicate_for_data_parallel() for m in (model[0], model[0].adamss, model[0].adamss.default)
    ]
    for outer, inner, name in zip(replicas, replicas[1:], ("adamss", "default"), strict=False):
        outer._modules[name] = inner
    layer, _, adapter = replicas
    layer.weight, layer.bias = model[0].weight, model[0].bias
    adapter._parameters |= {"B": model[0].adamss.default.B, "C": nn.Parameter(torch.ones(1, 32))}
    other = copy.deepcopy(model)
    other[0].adamss.default.C.data.fill_(1.0)
    torch.testing.assert_close(layer(X), other[0](X))
    assert not torch.allclose(layer(X), model[0](X))


# ---- optimisers that write outside of their step -----------------------------------------------------------


class ScheduleFree(torch.optim.SGD):
    """Trains at one point and evaluates at another, to which `eval` moves the parameters (Defazio et al. 2024)."""

    def step(self, closure=None):
        super().step(closure)
        for p in itertools.chain(*(group["params"] for group in self.param_groups)):
            state = self.state[p]
            state["mean"] = state.get("mean", torch.zeros_like(p)).lerp(p.detach(), 0.1)

    def _swap(self):
        for p, state in self.state.items():
            p.data, state["mean"] = state["mean"], p.data

    train = eval = _swap


@pytest.mark.parametrize("held_by", ["controller", "hold_frozen"])
def test_frozen_elements_stay_where_an_optimiser_evaluates(held_by, tmp_path):
    model = attached()
    adapters = adapters_of(model).values()
    optimizer = ScheduleFree(adamss.trainable_parameters(model), lr=0.05, momentum=0.9, weight_decay=0.1)
    if held_by == "controller":
        budget = BudgetController(model, optimizer, BudgetConfig(target=10, end_step=3))
        train(model, optimizer, 3)
    else:
        budget = hold_frozen(model, optimizer)
        train(model, optimizer, 3)
        for adapter in adapters:
            adapter.active[::2] = False

    def frozen():
        found = []
        for f in (adapter.factors() for adapter in adapters):
            found += [f.C[:, ~f.active[f.labels]].clone(), f.B[:, ~f.active].clone()]
        return found

    before = frozen()
    train(model, optimizer, 5)
    trained = model(X)
    optimizer.eval()
    assert all(map(torch.equal, frozen(), before))
    assert any(not adapter.trained_elements()[1].all() for adapter in adapters)
    evaluated = model(X)
    assert not torch.allclose(evaluated, trained)
    close(saved(model, tmp_path / "a"), model)
    twin = attached()
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin(X), evaluated)
    optimizer.train()
    torch.testing.assert_close(model(X), trained)
    train(model, optimizer, 2)
    assert all(map(torch.equal, frozen(), before))
    budget.remove()
    assert all(map(torch.equal, frozen(), before))
