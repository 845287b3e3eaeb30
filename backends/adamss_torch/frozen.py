"""Frozen means frozen: what an optimiser does to the elements of a frozen subspace is undone after its step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adamss_torch.adapter import Adapter
from adamss_torch.sharding import local, reshard, shard_like

__all__ = ["FrozenElements", "hold_frozen"]


class FrozenElements:
    """The elements of frozen subspaces, remembered before a step of an optimiser and given back after it.

    Parameters
    ----------
    adapters
        Whose B and C the optimiser trains.
    """

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self._adapters = adapters
        # FSDP2 may have others in their places at times, which no optimiser knows.
        self._parameters = [p for adapter in adapters for p in (adapter.B, adapter.C)]
        self._before: list[Tensor] = []
        self._trained: list[Tensor] = []
        self.look()

    def look(self) -> None:
        """Take the masks of the adapters over, after an allocation."""
        trained = [mask for adapter in self._adapters for mask in adapter.trained_elements()]
        self._trained = [
            shard_like(mask.expand(p.shape), p) for mask, p in zip(trained, self._parameters, strict=True)
        ]

    @torch.no_grad()
    def remember(self) -> None:
        """Keep the values from before a step."""
        self._before = [tensor.clone() for tensor in self._tensors()]

    @torch.no_grad()
    def restore(self) -> None:
        """Give frozen elements their values from before the step, to the bit."""
        now = self._tensors()
        kept = [torch.where(*three) for three in zip(self._trained, now, self._before, strict=True)]
        torch._foreach_copy_(now, kept)
        self._before = []

    def _tensors(self) -> list[Tensor]:
        return [local(p.detach()) for p in self._parameters]


def hold_frozen(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[RemovableHandle, RemovableHandle]:
    """Keep the frozen elements of an adapted model where they are, whatever the optimiser does.

    Weight decay, and momentum from before an element was frozen, move it although its gradient is zero. Hooks on
    the optimiser's step remember every B and C and give the frozen elements back, to the bit. This is for masks
    that are set by hand; `adamss_torch.BudgetController` does it by itself.

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
    reshard(model)
    elements = FrozenElements([module for module in model.modules() if isinstance(module, Adapter)])

    def before(*_: Any) -> None:
        elements.look()  # whoever sets masks by hand does not tell
        elements.remember()

    def after(*_: Any) -> None:
        elements.restore()

    return optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)
