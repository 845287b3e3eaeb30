"""Several processes: tensors that FSDP2 has sharded, and values on which processes agree.

FSDP2 is `torch.distributed.fsdp.fully_shard`. All functions here leave tensors alone that it has not sharded.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adamss.errors import LayerError, StateError

if TYPE_CHECKING:
    from adamss_torch.adapter import Adapter

try:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Replicate, Shard
except ImportError:  # a build of PyTorch without torch.distributed
    DTensor = None  # type: ignore[assignment, misc]

__all__ = [
    "agree",
    "as_bytes",
    "check_not_flattened",
    "check_spread",
    "copy_into",
    "device_of",
    "exchanged_objects",
    "is_partitioned",
    "is_sharded",
    "local",
    "once",
    "part_like",
    "put_together",
    "rebuilt",
    "reshard",
    "same_everywhere",
    "shape_of",
    "shard_adapter",
    "shard_like",
    "sum_over_shards",
    "unshard",
]


# ---- tensors ---------------------------------------------------------------------------------------------


def is_sharded(tensor: Any) -> bool:
    """Return whether this process holds only its own part of the tensor."""
    return DTensor is not None and isinstance(tensor, DTensor)


def is_partitioned(tensor: Any) -> bool:
    """Return whether DeepSpeed ZeRO-3 manages a Parameter, and has partitioned it or will do so."""
    return hasattr(tensor, "ds_id")


def shape_of(tensor: Any) -> tuple[int, ...]:
    """Return the shape of the whole tensor, of which this process may hold nothing at the moment."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def put_together(parameter: Any) -> Tensor:
    """Return the whole of a Parameter that DeepSpeed ZeRO-3 has partitioned. All processes must call this."""
    # A Parameter can be partitioned only after deepspeed was imported.
    with sys.modules["deepspeed"].zero.GatheredParameters([parameter]):
        values: Tensor = parameter.detach().clone()
    return values


def local(tensor: Any) -> Tensor:
    """Return the part of a tensor that is on this process, sharing its memory."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return part


def unshard(tensor: Any) -> Tensor:
    """Return the whole tensor, gathered from all processes. All processes must call this."""
    if not is_sharded(tensor):
        whole: Tensor = tensor
        return whole
    if tensor.ndim == 2 and tensor.stride(0) < tensor.stride(1):
        # The tensor gets the memory layout that it had before it was sharded, so that products with it are equal to
        # the bit.
        return unshard(tensor.t()).t()
    # Parts that are offloaded to the CPU cannot be sent from there.
    part = local(tensor).to(tensor.device_mesh.device_type)
    full: Tensor = rebuilt(part, tensor).full_tensor()  # type: ignore[attr-defined]
    return full


def shard_like(full: Tensor, like: Any) -> Tensor:
    """Return this process's part of a tensor that every process has whole, sharded as `like` is, on its device."""
    if not is_sharded(like):
        return full
    mesh = like.device_mesh
    # Nothing is sent, since each process cuts its part from its own copy.
    everywhere = DTensor.from_local(
        full.to(mesh.device_type), mesh, [Replicate()] * mesh.ndim, run_check=False
    )
    part: Tensor = everywhere.redistribute(mesh, like.placements).to_local()
    return part.to(local(like).device)


def rebuilt(part: Tensor, like: Any) -> Tensor:
    """Return the parts of all processes as one tensor, sharded as `like` is. This undoes `local`."""
    if not is_sharded(like):
        return part
    spread: Tensor = DTensor.from_local(
        part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride(), run_check=False
    )
    return spread


def part_like(tensor: Any, like: Any) -> Tensor:
    """Return this process's part, sharded as `like` is, of a tensor that is whole or sharded in any way.

    All processes must call this.
    """
    alike = is_sharded(tensor) and is_sharded(like)
    if alike and (tensor.device_mesh, tensor.placements) == (like.device_mesh, like.placements):
        return local(tensor)
    return shard_like(unshard(tensor), like)


def copy_into(tensor: Any, value: Any) -> None:
    """Overwrite a tensor in place with a value that is sharded, or that every process has whole."""
    local(tensor).copy_(part_like(value, tensor))


# ---- models ----------------------------------------------------------------------------------------------


def reshard(model: nn.Module) -> None:
    """Put the shards back in the place of Parameters that a forward has left gathered. Nothing is sent.

    FSDP2 leaves the Parameters of its root gathered until the backward, and with ``reshard_after_forward=False``
    those of all modules. Code that reads or changes them in between would work on a copy that goes out of date.
    """
    for module in _fsdp_modules(model):
        module.reshard()


def _fsdp_modules(model: nn.Module) -> Iterator[Any]:
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if kind is not None:  # without this class fully_shard cannot have been called
        yield from (module for module in model.modules() if isinstance(module, kind))


def check_not_flattened(model: nn.Module) -> None:
    """Check that FSDP1 wraps no part of the model, unless its Parameters are summoned in full at the moment.

    Raises
    ------
    StateError
        If FSDP1 wraps a part whose Parameters are not summoned.
    """
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    wrapped = [module for module in model.modules() if kind is not None and isinstance(module, kind)]
    if any(module.training_state.name != "SUMMON_FULL_PARAMS" for module in wrapped):
        raise StateError(
            "FullyShardedDataParallel (FSDP1) flattens Parameters, so that one cannot be told from the next. With "
            "use_orig_params=True, adamss.save and adamss.summary work within FullyShardedDataParallel."
            "summon_full_params(model, writeback=False), on all processes; for all else use "
            "torch.distributed.fsdp.fully_shard (FSDP2)"
        )


def check_spread(model: nn.Module, layer: nn.Module, weight: Any, path: str) -> None:
    """Check that an adapter on this layer could be sharded as the layer is.

    Raises
    ------
    LayerError
        If something other than FSDP2 has sharded the weight, or if its shards are offloaded to the CPU.
    """
    if not is_sharded(weight):
        return
    *outer, last = weight.placements
    managed = any(any(inner is layer for inner in module.modules()) for module in _fsdp_modules(model))
    if not managed or not isinstance(last, Shard) or any(not isinstance(each, Replicate) for each in outer):
        raise LayerError(
            f"{path}: its weight is spread over processes, and not by fully_shard alone (placements "
            f"{tuple(weight.placements)}), so that an adapter could not follow; attach before the weight is "
            "spread, or give adamss the module that fully_shard was given"
        )
    if local(weight).device.type != weight.device_mesh.device_type:
        raise LayerError(
            f"{path}: fully_shard keeps the parts of its weight on the CPU, away from where the model computes; "
            "attach before fully_shard"
        )


def shard_adapter(adapter: Adapter, like: Any) -> None:
    """Shard B and C over the processes over which a weight is sharded already."""
    from torch.distributed.fsdp import fully_shard

    # B and C are resharded after the forward: if they stayed gathered and no backward came in between, they would be
    # out of date after a step.
    fully_shard(adapter, mesh=like.device_mesh, reshard_after_forward=True)


# ---- what processes agree on -----------------------------------------------------------------------------


def sum_over_shards(values: Tensor, like: Any) -> Tensor:
    """Return the sum of values over the processes that hold different parts of `like`."""
    if is_sharded(like):
        for dimension, placement in enumerate(like.placements):
            if isinstance(placement, Shard):
                group = like.device_mesh.get_group(dimension)
                there = values.to(device_of(group, values))
                dist.all_reduce(there, group=group)
                values = there.to(values.device)
    return values


def agree(values: Tensor, like: Any, group: dist.ProcessGroup | None) -> Tensor:
    """Return the first process's values on all processes of the mesh over which `like` is sharded, or of `group`."""
    if is_sharded(like):
        mesh = like.device_mesh
        groups = [mesh.get_group(dimension) for dimension in range(mesh.ndim)]
    else:
        groups = [] if group is None else [group]
    for each in groups:
        values = values.to(device_of(each, like))
        dist.broadcast(values, src=dist.get_global_rank(each, 0), group=each)
    return values


def same_everywhere(tensors: list[Tensor], group: dist.ProcessGroup) -> bool:
    """Return whether all processes of a group hold the same tensors, equal to the bit."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(as_bytes(tensor.cpu()).numpy().tobytes())
    found = exchanged_objects(digest.hexdigest(), group, tensors[0].device)
    return all(each == found[0] for each in found)


def once(model: nn.Module, action: Callable[[], None]) -> None:
    """Call `action` on the first of the processes that hold parts of the model, and wait for it on the others.

    A process that holds the whole model calls `action` itself. An error on the first process is raised on all.
    """
    spread: Any = next((p for p in model.parameters() if is_sharded(p)), None)
    world = dist.group.WORLD if any(map(is_partitioned, model.parameters())) else None
    if spread is None and world is None:
        action()
        return
    failure: BaseException | None = None
    first = not any(spread.device_mesh.get_coordinate()) if world is None else dist.get_rank(world) == 0
    if first:
        try:
            action()
        except Exception as error:
            failure = error
    here = next(model.parameters()) if spread is None else spread
    failed = agree(torch.tensor([failure is not None], dtype=torch.uint8), here, world)
    if failure is not None:
        raise failure
    if bool(failed):
        raise StateError("the first of the processes that hold the model has failed; see its error")


def device_of(group: dist.ProcessGroup, like: Tensor) -> torch.device:
    """Return a device on which the group can send: that of `like` if it is among them."""
    kinds = {device.type for device in group._device_types}
    if like.device.type in kinds:
        return like.device
    return torch.device("cpu") if "cpu" in kinds else torch.device(next(iter(kinds)))


def exchanged_objects(thing: Any, group: dist.ProcessGroup, device: torch.device) -> list[Any]:
    """Return the objects that the processes of a group pass to this function, by rank."""
    found: list[Any] = [None] * dist.get_world_size(group)
    # Objects are sent through the current CUDA device, which may never have been set.
    on: AbstractContextManager[Any] = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with on:
        dist.all_gather_object(found, thing, group=group)
    return found


def as_bytes(array: Tensor) -> Tensor:
    """Return the entries of an array as a one-dimensional tensor of bytes."""
    return array.detach().contiguous().view(-1).view(torch.uint8)
