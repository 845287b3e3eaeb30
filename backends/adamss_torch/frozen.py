"""Hold frozen elements: changes that an optimiser makes to a frozen subspace are undone after its step."""

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
    """Values of frozen elements, kept apart from the Parameters that an optimiser writes to.

    The values are restored after each step. Some optimisers write at other times too (schedule-free ones between
    training and evaluation, lookahead when it synchronises), so adapters compute with the kept values, and save them,
    instead of those of the Parameters. Adapters that FSDP2 has sharded do not: their frozen elements are only
    restored after a step.

    Parameters
    ----------
    adapters
        Adapters whose B and C the optimiser trains.
    """

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.adapters = adapters
        # Keep the Parameters that the optimiser knows: FSDP2 puts others in their places at times.
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
        """The kept values of B and C of each adapter."""
        every = enumerate(self.adapters)
        return [
            tensor for number, own in every for tensor in own.kept or self._spread.get(number, (own.B, own.C))
        ]

    @torch.no_grad()
    def look(self, *, afresh: bool = False) -> None:
        """Adopt the adapters' masks, and keep the present values of the elements that were trained until now.

        Parameters
        ----------
        afresh
            Whether to keep the present values of all elements, as after a state was loaded.
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
        """Restore the kept values of frozen elements, bit for bit."""
        now = self._tensors()
        torch._foreach_copy_(
            now, [torch.where(*three) for three in zip(self._trained, now, self._kept, strict=True)]
        )

    def moved(self) -> bool:
        """Return whether any element of B and C differs from its kept value."""
        return not all(map(torch.equal, self._tensors(), self._kept))

    def release(self) -> None:
        """Restore frozen elements once more, and let the adapters compute with their Parameters from now on."""
        self.restore()
        for adapter in self.adapters:
            if adapter.keeper is self:
                adapter.kept = adapter.keeper = None

    def _tensors(self) -> list[Tensor]:
        return [local(p.detach()) for p in self._parameters]


class Hold:
    """The hold on frozen elements that `hold_frozen` returns.

    Parameters
    ----------
    elements
        The frozen elements.
    handles
        Handles of the hooks on the optimiser.
    """

    def __init__(self, elements: FrozenElements, *handles: RemovableHandle) -> None:
        self._elements, self._handles = elements, handles

    def remove(self) -> None:
        """Remove the hooks. Optimisers may then move frozen elements again."""
        for handle in self._handles:
            handle.remove()
        self._elements.release()


def hold_frozen(model: nn.Module, optimizer: torch.optim.Optimizer) -> Hold:
    """Keep the frozen elements of an adapted model at their values, whatever the optimiser does.

    Weight decay moves a frozen element although its gradient is zero, and so does momentum from before it was frozen.
    Hooks on the optimiser's step remember every B and C and restore the frozen elements bit for bit. Call this for
    masks that you set by hand; `adamss_torch.BudgetController` holds frozen elements itself.

    Parameters
    ----------
    model
        An adapted model.
    optimizer
        The optimiser that trains it.

    Returns
    -------
    Hold
        The hold, whose ``remove`` takes the hooks off again.
    """
    reshard(model)
    elements = FrozenElements([module for module in model.modules() if isinstance(module, Adapter)])

    def before(*_: Any) -> None:
        elements.look()  # masks may have been set by hand since the last step

    def after(*_: Any) -> None:
        elements.restore()
        elements.look()

    return Hold(elements, optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after))
