"""Models, loops and comparisons of the tests in this folder, and of the scripts that they start."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import adamss
from adamss_conformance.tolerances import assert_agrees
from adamss_torch import BudgetController


class Block(nn.Module):
    """Two layers side by side, as in attention, of sizes that two processes cannot halve, and a nonlinearity."""

    def __init__(self, width: int, *, bias: bool) -> None:
        super().__init__()
        self.query = nn.Linear(width, width + 3, bias=bias)
        self.value = nn.Linear(width, width + 3, bias=bias)
        self.dense = nn.Linear(width + 3, width)

    def forward(self, x):
        return self.dense(torch.tanh(self.query(x)) * self.value(x))


class Net(nn.Module):
    def __init__(self, width: int = 16, *, bias: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(width, bias=bias) for _ in range(2)])
        self.classifier = nn.Linear(width, 5)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.classifier(x)


def state(model):
    """Return copies of all Parameters and buffers."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(actual, expected):
    """Compare models or states, their names in order and their numbers to the bit."""
    actual, expected = (
        dict(each.state_dict() if isinstance(each, nn.Module) else each) for each in (actual, expected)
    )
    assert list(actual) == list(expected)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def required(model):
    """Return which Parameters require gradients, by name."""
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def gradients(model, loss):
    """Return the gradients of all that is trained."""
    model.zero_grad()
    loss.backward()
    found = [parameter.grad.clone() for parameter in adamss.trainable_parameters(model)]
    model.zero_grad()
    return found


def checkpointed(model, x, *, reentrant):
    """Run a network, each layer recomputed in the backward."""
    for layer in model.layers:
        x = x + checkpoint(layer, x, use_reentrant=reentrant)
    return model.classifier(x)


def assert_agree(actual, expected, dtype, what, scale=None):
    """Compare each pair; `scale` is a multiple of the largest expected number."""
    for ours, wanted in zip(actual, expected, strict=True):
        wanted = torch.as_tensor(wanted)
        size = {} if scale is None else {"scale": scale * float(wanted.abs().max())}
        assert_agrees(
            ours.to(wanted.dtype), wanted, dtype=str(dtype).removeprefix("torch."), what=what, **size
        )


def loss_of(model, x):
    y = model(x)
    return (y if y.dtype == torch.float64 else y.float()).square().mean()


def step(model, optimizer, x):
    optimizer.zero_grad()
    loss_of(model, x).backward()
    optimizer.step()


def train(model, optimizer, batches):
    for x in batches:
        step(model, optimizer, x)


@contextmanager
def controlled(model, optimizer, config, **options) -> Iterator[BudgetController]:
    """Enter with a controller, which comes off again; a target that is not reached is fine."""
    controller = BudgetController(model, optimizer, config, **options)
    del model  # a wrapper may be deleted within the block
    try:
        yield controller
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", adamss.AdamssWarning)
            controller.remove()
