"""Models, loops and comparisons that the tests in this folder and the scripts that they start share."""

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
    """Two parallel layers as in attention, with sizes that two processes cannot halve, and a nonlinearity."""

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
    """Check that two models or states have the same names in the same order, and bit for bit the same values."""
    actual, expected = (
        dict(each.state_dict() if isinstance(each, nn.Module) else each) for each in (actual, expected)
    )
    assert list(actual) == list(expected)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def required(model):
    """Return which Parameters require gradients, by name."""
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def gradients(model, loss):
    """Return the gradients of all trained Parameters."""
    model.zero_grad()
    loss.backward()
    found = [parameter.grad.clone() for parameter in adamss.trainable_parameters(model)]
    model.zero_grad()
    return found


def checkpointed(model, x, *, reentrant):
    """Run a network with activation checkpointing, which recomputes each layer in the backward pass."""
    for layer in model.layers:
        x = x + checkpoint(layer, x, use_reentrant=reentrant)
    return model.classifier(x)


def assert_agree(actual, expected, dtype, what, scale=None):
    """Compare pairs of arrays. The tolerance is relative to `scale` times the largest expected value, if given."""
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
    """Attach a budget controller within the block, and remove it without a warning about a target not reached."""
    controller = BudgetController(model, optimizer, config, **options)
    del model  # a wrapper may be deleted within the block
    try:
        yield controller
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", adamss.AdamssWarning)
            controller.remove()
