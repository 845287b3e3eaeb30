"""Several processes: tensors that FSDP2 has spread over them, what they agree on, and work that they divide.

FSDP2 is `torch.distributed.fsdp.fully_shard`. What it has not spread is left alone by all functions here.
"""

from __future__ import annotations

import hashlib
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adamss import errors
from adamss.backend.interface import BaseWeight, Compute, Division
from adamss.core import Factors
from adamss.core.fingerprint import fingerprint
from adamss.errors import AdamssWarning, LayerError, StateError
from adamss_torch.workers import computed

if TYPE_CHECKING:
    from adamss_torch.adapter import Adapter

try:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Replicate, Shard
except ImportError:  # a build of PyTorch without torch.distributed
    DTensor = None  # type: ignore[assignment, misc]

__all__ = [
    "ProcessDivision",
    "agree",
    "check_not_flattened",
    "check_spread",
    "copy_into",
    "divided",
    "is_sharded",
    "local",
    "once",
    "part_like",
    "rebuilt",
    "reshard",
    "same_everywhere",
    "shard_adapter",
    "shard_like",
    "sum_over_shards",
    "unshard",
]


# ---- tensors ---------------------------------------------------------------------------------------------


def is_sharded(tensor: Any) -> bool:
    """Return whether this process holds only its own part of the tensor."""
    return DTensor is not None and isinstance(tensor, DTensor)


def local(tensor: Any) -> Tensor:
    """Return the part of a tensor that is on this process, sharing its memory."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return part


def unshard(tensor: Any) -> Tensor:
    """Return the whole of a tensor, gathered from all processes, which all must call this."""
    if not is_sharded(tensor):
        whole: Tensor = tensor
        return whole
    if tensor.ndim == 2 and tensor.stride(0) < tensor.stride(1):
        # Laid out in memory as it was before it was spread, so that products with it are the same to the bit.
        return unshard(tensor.t()).t()
    # Parts that are kept on the CPU cannot be sent from there.
    part = local(tensor).to(tensor.device_mesh.device_type)
    full: Tensor = rebuilt(part, tensor).full_tensor()  # type: ignore[attr-defined]
    return full


def shard_like(full: Tensor, like: Any) -> Tensor:
    """Return this process's part of a tensor that every process has whole, cut as `like` is cut, on its device."""
    if not is_sharded(like):
        return full
    mesh = like.device_mesh
    # Nothing is sent: each process cuts its part from its own.
    everywhere = DTensor.from_local(
        full.to(mesh.device_type), mesh, [Replicate()] * mesh.ndim, run_check=False
    )
    part: Tensor = everywhere.redistribute(mesh, like.placements).to_local()
    return part.to(local(like).device)


def rebuilt(part: Tensor, like: Any) -> Tensor:
    """Return the parts of all processes as one tensor, spread as `like` is; undoes `local`."""
    if not is_sharded(like):
        return part
    spread: Tensor = DTensor.from_local(
        part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride(), run_check=False
    )
    return spread


def part_like(tensor: Any, like: Any) -> Tensor:
    """Return this process's part of a tensor, whole or spread in whatever way, cut as `like` is cut.

    All processes call this.
    """
    alike = is_sharded(tensor) and is_sharded(like)
    if alike and (tensor.device_mesh, tensor.placements) == (like.device_mesh, like.placements):
        return local(tensor)
    return shard_like(unshard(tensor), like)


def copy_into(tensor: Any, value: Any) -> None:
    """Overwrite a tensor in place with one that is spread as it is, or that every process has whole."""
    local(tensor).copy_(part_like(value, tensor))


# ---- models ----------------------------------------------------------------------------------------------


def reshard(model: nn.Module) -> None:
    """Put the parts back in the place of Parameters that a forward has left gathered; nothing is sent.

    FSDP2 leaves those of its root, and all with ``reshard_after_forward=False``, until the backward. Whoever reads
    or changes them in between would have a copy that goes out of date.
    """
    for module in _fsdp_modules(model):
        module.reshard()


def _fsdp_modules(model: nn.Module) -> Iterator[Any]:
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if kind is not None:  # else nobody can have called fully_shard
        yield from (module for module in model.modules() if isinstance(module, kind))


def check_not_flattened(model: nn.Module) -> None:
    """Check that no part of the model is wrapped by FSDP1.

    Raises
    ------
    StateError
        If one is.
    """
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    if kind is not None and any(isinstance(module, kind) for module in model.modules()):
        raise StateError(
            "FullyShardedDataParallel (FSDP1) flattens Parameters, so that one cannot be told from the next; use "
            "torch.distributed.fsdp.fully_shard (FSDP2)"
        )


def check_spread(model: nn.Module, layer: nn.Linear, path: str) -> None:
    """Check that an adapter on this layer could be spread as the layer is.

    Raises
    ------
    LayerError
        If something other than FSDP2 has spread the weight, or keeps its parts on another device.
    """
    weight: Any = layer.weight
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
    """Spread B and C over the processes over which a weight is spread already."""
    from torch.distributed.fsdp import fully_shard

    # What stays gathered after a forward is out of date after a step, if no backward comes between.
    fully_shard(adapter, mesh=like.device_mesh, reshard_after_forward=True)


# ---- what processes agree on -----------------------------------------------------------------------------


def sum_over_shards(values: Tensor, like: Any) -> Tensor:
    """Return the sum of values over the processes that hold different parts of `like`."""
    if is_sharded(like):
        for dimension, placement in enumerate(like.placements):
            if isinstance(placement, Shard):
                group = like.device_mesh.get_group(dimension)
                there = values.to(_device_of(group, values))
                dist.all_reduce(there, group=group)
                values = there.to(values.device)
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


def same_everywhere(tensors: list[Tensor], group: dist.ProcessGroup) -> bool:
    """Return whether tensors are equal to the bit on all processes of a group."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor.cpu()).numpy().tobytes())
    found = _exchanged(digest.hexdigest(), group, tensors[0].device)
    return all(each == found[0] for each in found)


def once(model: nn.Module, action: Callable[[], None]) -> None:
    """Call `action` on the first process of those that hold parts of the model, and wait for it on the others.

    On each process, if it holds the whole.
    """
    spread: Any = next((p for p in model.parameters() if is_sharded(p)), None)
    if spread is None:
        action()
        return
    failure: BaseException | None = None
    if not any(spread.device_mesh.get_coordinate()):
        try:
            action()
        except Exception as error:
            failure = error
    failed = agree(torch.tensor([failure is not None], dtype=torch.uint8), spread, None)
    if failure is not None:
        raise failure
    if bool(failed):
        raise StateError("the first of the processes that hold the model has failed; see its error")


def _device_of(group: dist.ProcessGroup, like: Tensor) -> torch.device:
    """Return a device on which the group can send: that of `like` if it is among them."""
    kinds = {device.type for device in group._device_types}
    if like.device.type in kinds:
        return like.device
    return torch.device("cpu") if "cpu" in kinds else torch.device(next(iter(kinds)))


def _exchanged(thing: Any, group: dist.ProcessGroup, device: torch.device) -> list[Any]:
    """Return the things of all processes of a group, by rank."""
    found: list[Any] = [None] * dist.get_world_size(group)
    # Objects go through the present device, which nobody may have set.
    on: AbstractContextManager[Any] = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with on:
        dist.all_gather_object(found, thing, group=group)
    return found


# ---- work that is divided --------------------------------------------------------------------------------


@contextmanager
def divided(model: nn.Module, *, enabled: bool) -> Iterator[Division]:
    """Return a context in which all processes divide the layers of a model; see `adamss.backend.Backend.divided`."""
    division = ProcessDivision(*_everyone(model)) if enabled else ProcessDivision(None)
    try:
        yield division
    except Exception as error:
        division.tell(error)
        raise


def _everyone(model: nn.Module) -> tuple[dist.ProcessGroup | None, torch.device]:
    """Return the group of all processes, and a device on which they can send; None if there is but this one."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None, device
    group = dist.group.WORLD
    assert group is not None
    kinds = {each.type for each in group._device_types}
    if device.type not in kinds and "cpu" not in kinds:
        return None, device  # such as NCCL and a model on the CPU
    return group, _device_of(group, torch.empty(0, device=device))


class ProcessDivision(Division):
    """Layer by layer, each is decomposed by one process, which sends its factors to all.

    Parameters
    ----------
    group
        All processes; None for this one alone.
    device
        On which they send.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device | None = None) -> None:
        self._group = group
        self._device = torch.device("cpu") if device is None else device
        self._told = group is None

    def factors(
        self,
        weights: Mapping[str, BaseWeight],
        compute: Compute,
        *,
        settings: Callable[[], str],
    ) -> dict[str, Factors]:
        """Return the factors of each layer, the same on all processes and to the bit those of a single one."""
        if self._group is None:
            if any(is_sharded(base.W) for base in weights.values()):
                return {path: computed(compute, {path: _whole(base)})[path] for path, base in weights.items()}
            return computed(compute, weights)
        outlines, values = zip(*self._said(_plan(weights, settings(), self._group)), strict=True)
        if len({*outlines}) == len({*values}) == 1 and values[0] is not None:
            return self._together(weights, compute)
        layers = self._apart(weights, compute)
        if len({*outlines}) == 1 and None not in values:
            warnings.warn(
                "the processes put the same adapters on base weights that differ, each on its own; if they are to "
                "train one model, load the same weights on all of them before (DistributedDataParallel does not "
                "bring the frozen parts of adapters into line)",
                AdamssWarning,
                stacklevel=3,
            )
        return layers

    def tell(self, error: Exception) -> None:
        """Tell the other processes, if they wait to hear from this one for the first time, that it has failed."""
        if not self._told:
            self._say(_Failure.of(error))

    def _say(self, thing: Any) -> list[Any]:
        self._told = True
        assert self._group is not None
        return _exchanged(thing, self._group, self._device)

    def _said(self, thing: Any, failure: Exception | None = None) -> list[Any]:
        """Return what each process has to say, by rank; raise on all if one has failed."""
        said = self._say(thing if failure is None else _Failure.of(failure))
        if failure is not None:
            raise failure
        for rank, each in enumerate(said):
            if isinstance(each, _Failure):
                raise each.error(rank)
        return said

    def _apart(self, weights: Mapping[str, BaseWeight], compute: Compute) -> dict[str, Factors]:
        """Compute everything here, and hear whether another process has failed."""
        layers: dict[str, Factors] = {}
        failure = None
        for path, base in weights.items():
            whole = _whole(base)  # also after a failure: those that hold other parts wait for this one
            if failure is None:
                result, failure = _tried(compute, path, whole)
                if result is not None:
                    layers[path] = result
        self._said(None, failure)
        return layers

    def _together(self, weights: Mapping[str, BaseWeight], compute: Compute) -> dict[str, Factors]:
        """Compute in each round one layer on each process, and send the factors around."""
        size, rank = dist.get_world_size(self._group), dist.get_rank(self._group)
        # The large ones first, so that those of one round take about as long.
        order = sorted(weights, key=lambda path: -weights[path].W.numel())
        layers: dict[str, Factors] = {}
        for start in range(0, len(order), size):
            paths = order[start : start + size]
            mine = own = failure = None
            for owner, path in enumerate(paths):
                base = _whole(weights[path])  # all take part in the gathering, one keeps it
                mine = base if owner == rank else mine
                del base
            if mine is not None:
                own, failure = _tried(compute, paths[rank], mine)
            forms = self._said(None if own is None else [_Form.of(array) for array in own], failure)
            for owner, path in enumerate(paths):
                if owner == rank and own is not None:
                    self._send(torch.cat([_bytes(array) for array in own]), owner)
                    layers[path] = own
                else:
                    layers[path] = self._received(forms[owner], owner, local(weights[path].W).device)
        return {path: layers[path] for path in weights}

    def _received(self, forms: list[_Form], owner: int, device: torch.device) -> Factors:
        sizes = [form.bytes for form in forms]
        parcel = self._send(torch.empty(sum(sizes), dtype=torch.uint8), owner).to(device)
        parts = torch.split(parcel, sizes)
        return Factors(*(form.filled(part) for form, part in zip(forms, parts, strict=True)))

    def _send(self, parcel: Tensor, owner: int) -> Tensor:
        assert self._group is not None
        parcel = parcel.to(self._device)
        dist.broadcast(parcel, src=dist.get_global_rank(self._group, owner), group=self._group)
        return parcel


class _Failure(NamedTuple):
    """An error that travels: not every exception can be pickled."""

    kind: str
    text: str

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        known = isinstance(error, errors.AdamssError)
        return cls(type(error).__name__, str(error) if known else f"{type(error).__name__}: {error}")

    def error(self, rank: int) -> Exception:
        """Return it as the error of another process."""
        kind = getattr(errors, self.kind, StateError)
        error: Exception = kind(f"process {rank} has failed: {self.text}")
        return error


class _Form(NamedTuple):
    """How an array lies in memory; products with one that lies otherwise differ in the last bit."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, array: Tensor) -> _Form:
        array = array.contiguous() if 0 in array.stride() else array
        return cls(tuple(array.shape), tuple(array.stride()), array.dtype)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def filled(self, part: Tensor) -> Tensor:
        """Return the array of these bytes."""
        array = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=part.device)
        # A copy starts where any dtype may.
        return array.copy_(part.clone().view(self.dtype).view(self.shape))


def _bytes(array: Tensor) -> Tensor:
    return array.detach().contiguous().view(-1).view(torch.uint8)


def _whole(base: BaseWeight) -> BaseWeight:
    return BaseWeight(unshard(base.W), None if base.b is None else unshard(base.b))


def _tried(compute: Compute, path: str, base: BaseWeight) -> tuple[Factors | None, Exception | None]:
    try:
        return computed(compute, {path: base})[path], None
    except Exception as error:
        return None, error


def _plan(
    weights: Mapping[str, BaseWeight], settings: str, group: dist.ProcessGroup
) -> tuple[str, str | None]:
    """Return what tells whether two processes adapt the same layers, and from the same values.

    None in the second place if there is no saying.
    """
    outline = [(path, *(_described(tensor) for tensor in base)) for path, base in weights.items()]
    return repr((settings, outline)), _values(weights, dist.get_world_size(group))


def _described(tensor: Tensor | None) -> tuple[Any, ...] | None:
    return None if tensor is None else (tuple(tensor.shape), str(tensor.dtype), is_sharded(tensor))


def _values(weights: Mapping[str, BaseWeight], processes: int) -> str | None:
    found: list[Any] = []
    for base in weights.values():
        for tensor in base:
            if tensor is None:
                continue
            if is_sharded(tensor):
                if tensor.device_mesh.size() != processes:
                    return None
                continue  # of one tensor, each holds a part
            try:
                found.append(fingerprint(tensor if tensor.ndim == 2 else tensor[None, :]))
            except Exception:  # whatever is wrong with it, `compute` says so better
                return None
    return repr(found)
