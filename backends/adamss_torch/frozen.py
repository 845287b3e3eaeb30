"""Frozen means frozen: what an optimiser does to the elements of a frozen subspace is undone after its step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adamss_torch.adapter import Adapter
from adamss_torch.sharding import is_sharded, local, reshard, shard_like

__all__ = ["FrozenElements", "hold_frozen"]


class FrozenElements:
    """The values of frozen elements, which they have whatever an optimiser writes, in its step or outside of it.

    They are given back after a step. Some optimisers write at other times too (schedule-free ones between training
    and evaluation, lookahead when it synchronises): so the adapters compute and save these values rather than those
    of the Parameters. Adapters that FSDP2 has spread do not, and rely on the step alone.

    Parameters
    ----------
    adapters
        Whose B and C the optimiser trains.
    """

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.adapters = adapters
        # FSDP2 may have others in their places at times, which no optimiser knows.
        self._parameters = [p for adapter in adapters for p in (adapter.B, adapter.C)]
        self._spread: dict[int, tuple[Tensor, Tensor]] = {}
        for number, (B, C) in enumerate(zip(*[iter(self._tensors())] * 2, strict=True)):
            kept, adapter = (B.clone(), C.clone()), adapters[number]
            if is_sharded(adapter.B):
                self._spread[number] = kept
            else:
                adapter.look()
                adapter.kept, adapter.keeper = kept, self
        self._trained: list[Tensor] = []
        self.look(afresh=True)

    @property
    def _kept(self) -> list[Tensor]:
        """The values of B and C of each adapter, those of frozen elements among them."""
        every = enumerate(self.adapters)
        return [
            tensor for number, own in every for tensor in own.kept or self._spread.get(number, (own.B, own.C))
        ]

    @torch.no_grad()
    def look(self, *, afresh: bool = False) -> None:
        """Take over the masks of the adapters, and the values of the elements that were trained until now.

        Parameters
        ----------
        afresh
            Take over those of all elements, as after a state was loaded.
        """
        now = self._tensors()
        if not afresh:
            now = [torch.where(*three) for three in zip(self._trained, now, self._kept, strict=True)]
        torch._foreach_copy_(self._kept, now)
        for number, adapter in enumerate(self.adapters):
            if number not in self._spread:
                adapter.look()
        trained = [mask for adapter in self.adapters for mask in adapter.trained_elements()]
        self._trained = [
            shard_like(mask.expand(p.shape), p) for mask, p in zip(trained, self._parameters, strict=True)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Give frozen elements their values, to the bit."""
        now = self._tensors()
        torch._foreach_copy_(
            now, [torch.where(*three) for three in zip(self._trained, now, self._kept, strict=True)]
        )

    def moved(self) -> bool:
        """Return whether any element is another than when its value was last taken over."""
        return not all(map(torch.equal, self._tensors(), self._kept))

    def release(self) -> None:
        """Give frozen elements their values once more; from then on the adapters compute those of the Parameters."""
        self.restore()
        for adapter in self.adapters:
            if adapter.keeper is self:
                adapter.kept = adapter.keeper = None

    def _tensors(self) -> list[Tensor]:
        return [local(p.detach()) for p in self._parameters]


class Hold:
    """What `hold_frozen` returns.

    Parameters
    ----------
    elements
        What is held.
    handles
        Of the hooks.
    """

    def __init__(self, elements: FrozenElements, *handles: RemovableHandle) -> None:
        self._elements, self._handles = elements, handles

    def remove(self) -> None:
        """Take the hooks off: optimisers may move frozen elements again."""
        for handle in self._handles:
            handle.remove()
        self._elements.release()


def hold_frozen(model: nn.Module, optimizer: torch.optim.Optimizer) -> Hold:
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
    Hold
        Its ``remove`` takes the hooks off.
    """
    reshard(model)
    elements = FrozenElements([module for module in model.modules() if isinstance(module, Adapter)])

    def before(*_: Any) -> None:
        elements.look()  # whoever sets masks by hand does not tell

    def after(*_: Any) -> None:
        elements.restore()
        elements.look()

    return Hold(elements, optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after))
