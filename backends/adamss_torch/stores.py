"""How PyTorch's layers keep their tensors: as Parameters, computed, offloaded by accelerate, or spread by FSDP2.

Quantised weights are read by `adamss_torch.quantised`.

`accelerate` (``device_map``, `dispatch_model`, `cpu_offload`) keeps weights in a map outside of the module, and puts
them in their places for the time of a forward only. What is written to a tensor on the meta device is lost without a
word, so that such writes are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adamss.backend import PlainStore, Stores
from adamss_torch import quantised
from adamss_torch.sharding import copy_into, is_sharded

__all__ = ["exchanged", "execution_device", "present", "stores", "writing_refused"]


class ParameterStore(PlainStore):
    """Parameters of the layer, and tensors that it has as buffers or plain attributes."""

    def read(self, layer: nn.Module, name: str) -> Tensor:
        """Return the values of the Parameter."""
        tensor: Tensor = getattr(layer, name)
        return tensor.detach()

    def refusal(self, layer: nn.Module, name: str) -> str | None:
        """Refuse on the meta device."""
        return writing_refused(getattr(layer, name))

    def write(self, layer: nn.Module, name: str, value: Tensor) -> None:
        """Give the Parameter other values; it stays the object that it is."""
        exchanged(getattr(layer, name), value)

    def exchange(self, layer: nn.Module, name: str, value: Tensor) -> Tensor:
        """Do the same, and return the former values, where they were."""
        return exchanged(getattr(layer, name), value)


class ComputedStore(ParameterStore):
    """Weights that `torch.nn.utils.parametrize` computes whenever they are looked at."""

    def holds(self, layer: nn.Module, name: str) -> bool:
        """Return whether a class that `torch.nn.utils.parametrize` made computes the tensor."""
        return isinstance(getattr(type(layer), name, None), property)

    def refusal(self, layer: nn.Module, name: str) -> str | None:
        """Refuse: the next look would compute it anew."""
        return (
            "is computed by a parametrization and cannot be replaced; remove the parametrization, or leave the "
            "adapter unmerged"
        )


class OffloadedStore(ParameterStore):
    """Weights in a map of `accelerate`."""

    def holds(self, layer: nn.Module, name: str) -> bool:
        """Return whether the tensor is on the meta device and accelerate has its values."""
        return super().holds(layer, name) and getattr(layer, name).is_meta and _offloading(layer) is not None

    def read(self, layer: nn.Module, name: str) -> Tensor:
        """Return the values from the map."""
        tensor: Tensor = present(layer, name)
        return tensor.detach()


stores = Stores(ParameterStore(), *quantised.STORES, ComputedStore(), OffloadedStore())
"""Ways of keeping weights that adapters can sit on; `Stores.register` adds one."""


def present(module: nn.Module, name: str) -> Any:
    """Return a tensor of a module, or None as the module has it; from accelerate's map where its values are there.

    It stays on the meta device where there are none at all.
    """
    tensor = getattr(module, name)
    hook = _offloading(module) if tensor is not None and tensor.is_meta else None
    return tensor if hook is None else hook.weights_map[name]


def execution_device(layer: nn.Module) -> torch.device | int | str | None:
    """Return where accelerate runs a layer whose weight is elsewhere in between; None for any other layer."""
    hook = _offloading(layer)
    return None if hook is None else hook.execution_device


def writing_refused(tensor: Tensor) -> str | None:
    """Return why nothing can be written to a tensor, as a clause; None if it can."""
    if not tensor.is_meta:
        return None
    return (
        "is on the meta device, where no value can be written; load the weights first, or take accelerate's "
        "offloading off with accelerate.hooks.remove_hook_from_submodules(model)"
    )


def exchanged(tensor: Tensor, value: Tensor) -> Tensor:
    """Give a tensor other values, and return those that it had.

    Not by a copy in place: what a forward before has saved for its backward must stay as it was. (FSDP2 gathers from
    the memory of its parts, whatever ``data`` is, so that there it is a copy.)
    """
    if is_sharded(tensor):
        before = tensor.detach().clone()
        copy_into(tensor.detach(), value)
        return before
    before = tensor.data
    tensor.data = value.detach().to(device=before.device, dtype=before.dtype).contiguous()
    return before


def _offloading(module: nn.Module) -> Any:
    hook = getattr(module, "_hf_hook", None)
    hooks: Any = getattr(hook, "hooks", (hook,))  # one, or several in a row
    for each in hooks:
        if getattr(each, "offload", False) and each.weights_map is not None:
            return each
    return None
