"""Trained rows of an embedding, those of single tokens, which replace rows of its weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adamss.backend.bank import Rows
from adamss_torch.kinds import Embedding, Linear, kinds

__all__ = ["TrainedRows", "is_known"]


class TrainedRows(nn.Module):
    """``y = W'[x]`` of an embedding, and ``y = x W'^T`` of a head, where W' is W with other rows for some ids.

    Replacing rows is idempotent, so it does no harm where W' stands in the place of W already.

    Parameters
    ----------
    rows
        Initial rows, on the device of W.

    Attributes
    ----------
    rows
        Trained Parameter, (k, E).
    ids
        Ids of the rows, (k,) int64, ascending, on the device of `rows`. They are part of the state dict but not a
        buffer, because other libraries may average buffers.
    """

    ids: Tensor

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows.values.detach().clone(memory_format=torch.contiguous_format))
        self.ids = torch.tensor(rows.ids, device=self.rows.device if not self.rows.is_meta else None)

    def value(self) -> Rows:
        """Return the rows as they are now."""
        return Rows(tuple(self.ids.tolist()), self.rows.detach())

    def forward(self, layer: Any, x: Tensor, output: Tensor, *, overwrite: bool = False) -> Tensor:
        """Return the output that a layer has for its input x with W', given its `output` with W.

        With `overwrite`, the result may be written into `output`.
        """
        ids, rows = self.ids.to(output.device), self.rows.to(output.device)
        if not isinstance(layer, nn.Embedding):
            # The product with the change of the rows is added. Products with the rows themselves would round
            # differently, and the output would not start equal to the base's to the bit.
            change = F.linear(x, (rows - layer.weight[ids].to(rows.dtype)).to(x.dtype)).to(output.dtype)
            return (output.index_add_ if overwrite else output.index_add)(-1, ids, change)
        x = x.to(torch.int64).contiguous()
        places = torch.searchsorted(ids, x).clamp(max=ids.numel() - 1)
        trained = F.embedding(places, rows.to(output.dtype))
        if layer.padding_idx is not None:  # the layer gives no gradient to this row
            trained = torch.where((x == layer.padding_idx)[..., None], trained.detach(), trained)
        return torch.where((ids[places] == x)[..., None], trained, output)

    def _apply(self, fn: Any, recurse: bool = True) -> TrainedRows:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not self.rows.is_meta:
            self.ids = self.ids.to(self.rows.device)
        return self

    def extra_repr(self) -> str:
        """Return the sizes, for ``print(model)``."""
        return f"tokens={self.ids.numel()}, E={self.rows.shape[-1]}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}ids"] = self.ids.clone()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = f"{prefix}ids"
        given = state_dict.get(name, self.ids)
        # Libraries that average states make these integers floating point. The average of equal integers is that
        # integer up to rounding.
        if given.shape != self.ids.shape or not torch.equal(given.round().to(self.ids), self.ids):
            error_msgs.append(f"{name}: the rows in the state are those of other tokens than in this model.")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if name in unexpected_keys:
            unexpected_keys.remove(name)
        elif strict and name not in state_dict:
            missing_keys.append(name)


def is_known(module: nn.Module) -> bool:
    """Return whether a module's forward is that of `torch.nn.Embedding` or `torch.nn.Linear`.

    A forward that accelerate has wrapped counts too.
    """
    kind = kinds.find(module)
    return (
        isinstance(kind, Embedding | Linear)
        and kind.defines(type(module), "forward")
        and ("forward" not in vars(module) or hasattr(module, "_hf_hook"))
    )
