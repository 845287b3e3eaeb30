"""How PyTorch's layers keep their tensors: as Parameters, computed, offloaded by accelerate, or sharded.

Quantised weights are read by `adamss_torch.quantised`.

`accelerate` (``device_map``, `dispatch_model`, `cpu_offload`) keeps weights in a map outside of the module, and puts
them in their places only during a forward. In between, the module has tensors on the meta device. Writes to these
would be lost silently, so they are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adamss.backend import PlainStore, Stores
from adamss_torch import quantised
from adamss_torch.kinds import Part
from adamss_torch.sharding import copy_into, is_partitioned, is_sharded, put_together

__all__ = ["ParameterStore", "exchanged", "execution_device", "present", "stores", "writing_refused"]


class ParameterStore(PlainStore):
    """Parameters of a layer, and tensors that are its buffers or plain attributes."""

    def read(self, layer: nn.Module, name: str) -> Tensor:
        """Return the values of the Parameter."""
        tensor: Tensor = getattr(layer, name)
        return tensor.detach()

    def refusal(self, layer: nn.Module, name: str) -> str | None:
        """Return a refusal if the tensor is on the meta device."""
        return writing_refused(getattr(layer, name))

    def write(self, layer: nn.Module, name: str, value: Tensor) -> None:
        """Give the Parameter other values. It stays the same object."""
        exchanged(getattr(layer, name), value)

    def exchange(self, layer: nn.Module, name: str, value: Tensor) -> Tensor:
        """Give the Parameter other values, and return the former ones on their device."""
        return exchanged(getattr(layer, name), value)


class PartitionedStore(ParameterStore):
    """Parameters that DeepSpeed ZeRO-3 has partitioned. All processes must read one together."""

    def holds(self, layer: Any, name: str) -> bool:
        """Return whether the tensor is such a Parameter."""
        return is_partitioned(getattr(layer, name, None))

    def read(self, layer: Any, name: str) -> Tensor:
        """Return the whole Parameter, gathered from all processes."""
        return put_together(getattr(layer, name))

    def refusal(self, layer: Any, name: str) -> str | None:
        """Return a refusal, because this process cannot write the parts of other processes."""
        return (
            "is taken apart by DeepSpeed ZeRO-3; adamss.save the adapter, load it into a model outside of DeepSpeed, "
            "and merge that"
        )


class RowsStore(ParameterStore):
    """Rows of a larger Parameter, such as the one in which `torch.nn.MultiheadAttention` packs three projections."""

    def holds(self, layer: Any, name: str) -> bool:
        """Return whether the tensor consists of some rows of a Parameter."""
        return isinstance(layer, Part) and layer.rows is not None and name == "weight"

    def write(self, layer: Any, name: str, value: Tensor) -> None:
        """Give these rows of the Parameter other values."""
        self.exchange(layer, name, value)

    def exchange(self, layer: Any, name: str, value: Tensor) -> Tensor:
        """Give these rows of the Parameter other values, and return the former ones."""
        whole: Tensor = getattr(layer.module, layer.name)
        new = whole.detach().clone()
        new[layer.rows] = value.to(device=whole.device, dtype=whole.dtype)
        return exchanged(whole, new)[layer.rows]


class ComputedStore(ParameterStore):
    """Weights that `torch.nn.utils.parametrize` computes at every access."""

    def holds(self, layer: nn.Module, name: str) -> bool:
        """Return whether a class that `torch.nn.utils.parametrize` made computes the tensor."""
        return isinstance(layer, nn.Module) and isinstance(getattr(type(layer), name, None), property)

    def refusal(self, layer: nn.Module, name: str) -> str | None:
        """Return a refusal, because the next access would compute the weight again."""
        return (
            "is computed by a parametrization and cannot be replaced; remove the parametrization, or leave the "
            "adapter unmerged"
        )


class OffloadedStore(ParameterStore):
    """Weights that `accelerate` keeps in a map outside of the module."""

    def holds(self, layer: nn.Module, name: str) -> bool:
        """Return whether the tensor is on the meta device and accelerate has its values."""
        return super().holds(layer, name) and getattr(layer, name).is_meta and _offloading(layer) is not None

    def read(self, layer: nn.Module, name: str) -> Tensor:
        """Return the values from the map."""
        tensor: Tensor = present(layer, name)
        return tensor.detach()


stores = Stores(
    ParameterStore(), *quantised.STORES, ComputedStore(), OffloadedStore(), RowsStore(), PartitionedStore()
)
"""Ways of keeping weights that adapters can sit on; `Stores.register` adds one."""


def present(module: nn.Module, name: str) -> Any:
    """Return a tensor of a module with its values, or None if the module has None in its place.

    Values that accelerate has offloaded come from its map, and a Parameter that DeepSpeed has partitioned is
    gathered. A tensor without any values is returned on the meta device.
    """
    tensor = getattr(module, name)
    if is_partitioned(tensor):
        return put_together(tensor)
    hook = _offloading(module) if tensor is not None and tensor.is_meta else None
    return tensor if hook is None else hook.weights_map[name]


def execution_device(layer: nn.Module) -> torch.device | int | str | None:
    """Return the device on which accelerate runs a layer that it offloads; None for any other layer."""
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
    """Give a tensor other values, and return the former ones.

    The tensor gets other memory, because a tensor that an earlier forward has saved for its backward must not change.
    Only a sharded tensor is overwritten in place, since FSDP2 gathers from the memory of the shards whatever ``data``
    is.
    """
    if is_sharded(tensor):
        before = tensor.detach().clone()
        copy_into(tensor.detach(), value)
        return before
    before = tensor.data
    value = value.detach().to(device=before.device, dtype=before.dtype)
    if value.stride() != before.stride():  # keep the memory format, which may be channels last
        value = torch.empty_like(before).copy_(value)
    tensor.data = value
    return before


def _offloading(module: nn.Module) -> Any:
    hook = getattr(module, "_hf_hook", None)
    hooks: Any = getattr(hook, "hooks", (hook,))  # a single hook, or a sequence of hooks
    for each in hooks:
        if getattr(each, "offload", False) and each.weights_map is not None:
            return each
    return None
