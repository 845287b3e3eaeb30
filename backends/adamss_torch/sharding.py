"""Tensors that FSDP2 (`torch.distributed.fsdp.fully_shard`) has spread over processes; others are left alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

try:
    from torch.distributed.tensor import DTensor, distribute_tensor
    from torch.distributed.tensor.placement_types import Shard
except ImportError:  # a build of PyTorch without torch.distributed
    DTensor = None  # type: ignore[assignment, misc]

__all__ = ["agree", "is_sharded", "local", "rebuilt", "shard_like", "sum_over_shards", "unshard"]


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this process holds only its own part of the tensor."""
    return DTensor is not None and isinstance(tensor, DTensor)


def local(tensor: Any) -> Tensor:
    """Return the part of a tensor that is on this process, sharing its memory."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return part


def unshard(tensor: Any) -> Tensor:
    """Return the whole of a tensor, gathered from all processes, which all must call this."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return full


def shard_like(full: Tensor, like: Any) -> Tensor:
    """Return this process's part of a tensor that every process has whole, cut as `like` is cut."""
    if not is_sharded(like):
        return full
    # With no source rank nothing is sent: each process cuts its part from its own.
    spread = distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
    part: Tensor = spread.to_local()
    return part


def rebuilt(part: Tensor, like: Any) -> Tensor:
    """Return the parts of all processes as one tensor, spread as `like` is; undoes `local`."""
    if not is_sharded(like):
        return part
    spread: Tensor = DTensor.from_local(
        part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride(), run_check=False
    )
    return spread


def sum_over_shards(values: Tensor, like: Any) -> Tensor:
    """Return the sum of values over the processes that hold different parts of `like`."""
    if is_sharded(like):
        for dimension, placement in enumerate(like.placements):
            if isinstance(placement, Shard):
                dist.all_reduce(values, group=like.device_mesh.get_group(dimension))
    return values


def agree(values: Tensor, like: Any, group: dist.ProcessGroup | None) -> Tensor:
    """Return what the first process has, on all of the group, and of the mesh over which `like` is spread."""
    if is_sharded(like):
        mesh = like.device_mesh
        groups = [mesh.get_group(dimension) for dimension in range(mesh.ndim)]
    else:
        groups = [] if group is None else [group]
    for each in groups:
        values = values.to(_device_of(each, like))
        dist.broadcast(values, src=dist.get_global_rank(each, 0), group=each)
    return values


def _device_of(group: dist.ProcessGroup, like: Tensor) -> torch.device:
    """Return a device on which the group can send: that of `like` if it is among them."""
    kinds = {device.type for device in group._device_types}
    if like.device.type in kinds:
        return like.device
    return torch.device("cpu") if "cpu" in kinds else torch.device(next(iter(kinds)))
