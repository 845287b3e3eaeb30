"""The adapter of one `torch.nn.Linear`: a small child module on the user's own layer.

The layer keeps its class, its weight and its state-dict keys; a forward hook adds the update to its
output. PyTorch's fused inference paths look for hooks and step aside, where a wrapper module with a
``weight`` of its own would be bypassed without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adamss.core import Factors
from adamss_torch.functional import Layout, make_layout, update

__all__ = ["CHILD", "Adapter"]

CHILD = "adamss"
"""Name of the adapter among the children of its layer."""


class Adapter(nn.Module):
    """``y = base(x) + (x M^T) E``, with ``M = B A^T`` and E the expansion of C.

    Parameters
    ----------
    factors
        Factors of the layer, canonical, on its device.
    d
        Inputs of the layer: A has one row more where the bias is adapted too.

    Attributes
    ----------
    B, C
        Trained Parameters, (q, P) and (r, n).
    A, labels, ranks, active
        Buffers, as in `adamss.core.Factors`.
    enabled
        Whether the hook adds the update.
    merged
        Whether the weights of the layer hold the update already.
    base
        While merged: the tensors that the layer had before, by name; None if they were dropped.
    """

    A: Tensor
    labels: Tensor
    ranks: Tensor
    active: Tensor
    rows: Tensor
    groups: Tensor
    slots: Tensor

    def __init__(self, factors: Factors, d: int) -> None:
        super().__init__()
        self.d = d
        self.enabled = True
        self.merged = False
        self.base: dict[str, Tensor] | None = None
        self.B = nn.Parameter(factors.B.detach().t().clone(memory_format=torch.contiguous_format))
        self.C = nn.Parameter(factors.C.detach().clone(memory_format=torch.contiguous_format))
        for name in ("A", "labels", "ranks", "active"):
            self.register_buffer(name, getattr(factors, name).detach())
        # A function of labels and ranks: not stored, made anew whenever they are loaded.
        for name, value in make_layout(self.labels, self.ranks, *self._sizes())._asdict().items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, base: Tensor, x: Tensor) -> Tensor:
        """Return the output of the layer: the frozen product `base` (..., n) and the update of x (..., d)."""
        layout = Layout(self.rows, self.groups, self.slots)
        return update(base, x, self.A, self.B, self.C, self.active, layout)

    def hook(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        """Forward hook of the layer."""
        if self.merged or not self.enabled:
            return None
        result: Tensor = self(output, args[0] if args else kwargs["input"])
        return result

    def factors(self) -> Factors:
        """Return the factors, canonical: views of the tensors held here."""
        return Factors(self.A, self.B.detach().t(), self.C.detach(), self.labels, self.ranks, self.active)

    def install(self, layer: nn.Module) -> None:
        """Become a child of the layer, and hook its forward."""
        layer.register_module(CHILD, self)
        layer.register_forward_hook(self.hook, with_kwargs=True)

    def uninstall(self, layer: nn.Module) -> None:
        """Leave the layer as it was before `install`."""
        for key, hook in list(layer._forward_hooks.items()):
            if getattr(hook, "__self__", None) is self:
                # A copied or unpickled layer has hooks but no handles: the tables are the only way.
                del layer._forward_hooks[key]
                layer._forward_hooks_with_kwargs.pop(key, None)
        delattr(layer, CHILD)

    def _sizes(self) -> tuple[int, int]:
        return self.C.shape[0], self.B.shape[0]

    def extra_repr(self) -> str:
        """Return the sizes, for ``print(model)``."""
        G, d, P = self.A.shape
        return f"d={d}, n={self.C.shape[1]}, R={P}, K={self.ranks.numel()}, q={self.B.shape[0]}, bases={G}"

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, *args, **kwargs)
        for name, value in make_layout(self.labels, self.ranks, *self._sizes())._asdict().items():
            setattr(self, name, value)
