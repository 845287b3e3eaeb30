"""Parameters that shrink in the middle of training: what holds on to their shape, and what an optimiser remembers."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from adamss.errors import AdamssWarning, StateError
from adamss_torch.sharding import is_sharded

if TYPE_CHECKING:
    from adamss_torch.adapter import Adapter

__all__ = [
    "Carried",
    "carry_over",
    "check_resizable",
    "expect_misfits",
    "kept_places",
    "resize",
    "wrappers_of",
]


def kept_places(adapter: Adapter, owned: Tensor) -> tuple[Tensor, Tensor]:
    """Return which rows of the Parameter B, and which columns of C, belong to these subspaces; indices."""
    return owned[adapter.owners_B].nonzero()[:, 0], owned[adapter.owners_C].nonzero()[:, 0]


def wrappers_of(parameters: Iterable[nn.Parameter]) -> list[tuple[nn.Parameter, Any]]:
    """Return each of these Parameters that is within a DistributedDataParallel, and that wrapper."""
    wanted = {id(parameter): parameter for parameter in parameters}
    if not wanted or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return []
    kinds = _with_subclasses(nn.parallel.DistributedDataParallel)
    # Nothing leads from a Parameter to the wrapper. By type(), for isinstance() asks objects that may be lazy.
    every = [thing for thing in gc.get_objects() if type(thing) in kinds]
    return [(wanted[id(p)], each) for each in every for p in each.parameters() if id(p) in wanted]


def _with_subclasses(kind: type[Any]) -> set[type[Any]]:
    return {kind}.union(*map(_with_subclasses, kind.__subclasses__()))


def check_resizable(
    adapters: Mapping[str, Adapter], paths: Iterable[str], optimizer: torch.optim.Optimizer
) -> None:
    """Check that nothing outside counts on the present shape of the Parameters of some adapters.

    Raises
    ------
    StateError
        If they are sharded, or within a DistributedDataParallel, whose buckets are cut for them, or their state is.
    """
    parameters = {
        id(parameter): f"{path}.{name}"
        for path in paths
        for name, parameter in (("B", adapters[path].B), ("C", adapters[path].C))
    }
    for path in paths:
        if is_sharded(adapters[path].B):
            raise StateError(
                f"compact: {path}.B is sharded over processes, and its shards keep their sizes; save, and go on "
                "with a model that is not sharded, or leave it as it is"
            )
    if parameters and type(optimizer).__name__ == "ZeroRedundancyOptimizer":
        raise StateError(
            "compact: ZeroRedundancyOptimizer keeps the state of each Parameter on one process, where it cannot be "
            "cut; leave the model as it is"
        )
    held = [getattr(adapters[path], name) for path in paths for name in "BC"]
    if wrappers_of(held):
        gc.collect()  # it may be one that was deleted
    for parameter, _ in wrappers_of(held):
        raise StateError(
            f"compact: {parameters[id(parameter)]} is within a DistributedDataParallel, whose buckets are cut for "
            "its present shape; delete the wrapper (del model), compact, and wrap the model anew"
        )


@torch.no_grad()
def resize(parameter: nn.Parameter, axis: int, kept: Tensor) -> None:
    """Leave some rows or columns of a Parameter and of its gradient; it stays the object it was."""
    values = parameter.detach().index_select(axis, kept)
    gradient = None if parameter.grad is None else parameter.grad.index_select(axis, kept)
    parameter.grad = None
    # A loss that is still alive keeps the accumulator of gradients alive, which expects the former shape. PyTorch
    # makes a new one when the dtype changes, and only then.
    other = torch.float64 if parameter.dtype != torch.float64 else torch.float32
    parameter.data = values.new_empty(0, dtype=other)
    parameter.data = values
    parameter.grad = gradient
    if not values.numel():
        # Nothing left to train: no gradient, which would have to come from somewhere.
        parameter.requires_grad_(False)


@dataclass
class _Reshaped:
    """Former shapes of a Parameter that was given another one, and the optimisers that have looked at it since."""

    former: set[torch.Size] = field(default_factory=set)
    seen: WeakSet[torch.optim.Optimizer] = field(default_factory=WeakSet)


_reshaped: MutableMapping[nn.Parameter, _Reshaped] = WeakIdKeyDictionary()


def expect_misfits(*parameters: nn.Parameter) -> None:
    """Have an optimiser begin anew with Parameters that are about to change shape, unless it gets a state that fits.

    What it remembers has the former shape, and a fused one would write beyond the end. Nothing leads from a
    Parameter to its optimisers: each is looked at before its next step, when it has got its state.
    """
    _look_at_optimizers()
    for parameter in parameters:
        reshaped = _reshaped.setdefault(parameter, _Reshaped())
        reshaped.former.add(parameter.shape)
        reshaped.seen.clear()


@cache
def _look_at_optimizers() -> None:
    register_optimizer_step_pre_hook(_forget_misfits)


def _forget_misfits(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    forgotten = 0
    for group in optimizer.param_groups:
        for parameter in filter(_reshaped.__contains__, group["params"]):
            reshaped = _reshaped[parameter]
            if optimizer in reshaped.seen:
                continue
            reshaped.seen.add(optimizer)
            former = reshaped.former - {parameter.shape}
            state = optimizer.state.get(parameter, {})
            values = [value for value in state.values() if isinstance(value, Tensor) and value.numel() != 1]
            if any(value.shape in former or not _fits(value, parameter.shape) for value in values):
                del optimizer.state[parameter]
                if isinstance(optimizer, torch.optim.SGD) and group.get("fused") and parameter.numel():
                    # Its kernel wants momentum of all of a group or of none; of zeros comes what comes of none.
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
                forgotten += 1
    if forgotten:
        warnings.warn(
            f"{type(optimizer).__name__} had averages for {forgotten} factors of another form than they have since a "
            "state was loaded into the model, as one of the two was compacted: they begin anew; load the optimiser's "
            "state too to go on where it was",
            AdamssWarning,
            stacklevel=2,
        )


def _fits(value: Tensor, shape: Sequence[int]) -> bool:
    return any(_place(value, shape, axis) is not None for axis in range(len(shape)))


@dataclass(frozen=True)
class Carried:
    """New state of one Parameter, not in force yet."""

    state: dict[Any, Any]
    new: dict[Any, Tensor]

    def put(self) -> None:
        """Put it into force."""
        self.state.update(self.new)


def carry_over(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, axis: int, kept: Tensor, name: str
) -> Carried:
    """Return the state of a Parameter (2-d) of which some rows (axis 0) or columns (axis 1) are kept.

    Moments have the shape of the Parameter. Factored ones (Adafactor) have 1 in the place of an axis, or lack it.
    What has the length of the axis that is left already was loaded from a run that had been compacted.

    Raises
    ------
    StateError
        If a tensor of the state has another shape; the message names it.
    """
    state: dict[Any, Any] = optimizer.state.get(parameter, {})
    new = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.numel() == 1:
            continue
        after = list(parameter.shape)
        after[axis] = kept.numel()
        if tuple(value.shape) == tuple(after):
            continue
        place = _place(value, parameter.shape, axis)
        if place is None and _place(value, after, axis) is not None:
            continue
        if place is None:
            raise StateError(
                f"compact: {type(optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for {name} of "
                f"shape {tuple(parameter.shape)}, which cannot be cut to the trained part; leave the model as it is"
            )
        if place >= 0:
            new[key] = value.index_select(place, kept.to(value.device))
    return Carried(state, new)


def _place(value: Tensor, whole: Sequence[int], axis: int) -> int | None:
    """Return the axis of a state that is the Parameter's; -1 if it lacks that one, None if it is neither."""
    shape = tuple(value.shape)
    if len(shape) == len(whole) and all(a in (1, b) for a, b in zip(shape, whole, strict=True)):
        return axis if shape[axis] == whole[axis] else -1
    if len(shape) == 1 and whole[0] != whole[1]:
        if shape[0] == whole[axis]:
            return 0
        if shape[0] == whole[1 - axis]:
            return -1
    return None
