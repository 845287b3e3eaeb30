"""Frozen means frozen: what an optimiser does to the elements of a frozen subspace is undone after its step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adamss.core import hold_frozen as held
from adamss_torch.adapter import Adapter

__all__ = ["hold_frozen"]


def hold_frozen(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[RemovableHandle, RemovableHandle]:
    """Keep the frozen elements of an adapted model where they are, whatever the optimiser does.

    Weight decay, and momentum from before an element was frozen, move it although its gradient is zero. Hooks on
    the optimiser's step remember every B and C and give the frozen elements back, to the bit.

    Parameters
    ----------
    model
        An adapted model.
    optimizer
        The optimiser that trains it.

    Returns
    -------
    tuple of RemovableHandle
        Their ``remove`` takes the hooks off.
    """
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    before: list[tuple[Tensor, Tensor]] = []

    def remember(*_: Any) -> None:
        before[:] = [(adapter.B.detach().clone(), adapter.C.detach().clone()) for adapter in adapters]

    @torch.no_grad()
    def restore(*_: Any) -> None:
        for adapter, (B, C) in zip(adapters, before, strict=True):
            factors = adapter.factors()
            kept = held(factors._replace(B=B.t(), C=C), factors)
            adapter.B.copy_(kept.B.t())
            adapter.C.copy_(kept.C)

    return optimizer.register_step_pre_hook(remember), optimizer.register_step_post_hook(restore)
