"""Replacing weights: W + delta stands in the place of W while the forward of the module that reads it runs.

This is how everything is adapted that is not a layer with a known forward: the Parameters of fused experts, of
routers and of `torch.nn.MultiheadAttention`; layers whose forward a subclass has changed; and layers whose weight
another module reads past their forward (`adamss_torch.watch`). State-dict keys stay as they are.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from threading import RLock, get_ident
from typing import Any

import torch
from torch import Tensor, nn

from adamss.backend.views import View
from adamss.errors import StateError
from adamss_torch.kernel import without_autocast
from adamss_torch.paths import walk
from adamss_torch.sharding import is_partitioned, is_sharded
from adamss_torch.tokens import TrainedRows

__all__ = ["STANDING", "Place", "put", "readable", "readers", "restore", "take_back"]

READS = "_adamss_reads"
"""Attribute of a module whose forward reads replaced weights: a list of `Place`."""

KEY = -2
"""Key of our hooks among those of the reader."""

LOCK = RLock()
"""Lock held while a weight is replaced or put back."""

STANDING: dict[int, Place] = {}
"""The `Place` of each tensor that stands in the place of a Parameter now, by the tensor's ``id``."""


@dataclass
class Place:
    """A Parameter that is adapted, in whole or in slices, and that W + delta replaces while a reader runs.

    Attributes
    ----------
    module, name
        Module that has the Parameter, and the module's name for it.
    banks
        Entries (bank, rows, view): the slice of rows that the bank adapts, None for all, and the view of these rows
        as a matrix, None for a bias.
    original
        The Parameter, while W + delta stands in its place.
    readers
        Modules during whose forwards W + delta stands in its place.
    running
        Number of these forwards that are running within each other, by thread.
    """

    module: nn.Module
    name: str
    banks: list[tuple[Any, slice | None, View | None]]
    original: nn.Parameter | None = None
    readers: list[nn.Module] = field(default_factory=list)
    running: dict[int, int] = field(default_factory=dict)

    def enter(self) -> None:
        """Put W + delta in the place of the Parameter, unless it is there already."""
        if torch.compiler.is_compiling():
            self._exchange()
            return
        thread = get_ident()
        with LOCK:  # without it, one thread could take the W + delta of another for the Parameter
            depth = self.running.get(thread, 0)
            if depth and not self._goes_on():
                # A former forward of this thread was interrupted before it could leave.
                depth = self.running.pop(thread) * 0
            if not self.running:
                self.restore()
                self._exchange()
            self.running[thread] = depth + 1

    def leave(self) -> None:
        """Put the Parameter back, unless another forward still reads W + delta."""
        if torch.compiler.is_compiling():
            self.restore()
            return
        with LOCK:
            thread = get_ident()
            depth = self.running.pop(thread, 1) - 1
            if depth:
                self.running[thread] = depth
            if not self.running:
                self.restore()

    def restore(self) -> None:
        """Put the Parameter back."""
        self.running.clear()
        if self.original is not None:
            if not torch.compiler.is_compiling():
                STANDING.pop(id(self.module._parameters[self.name]), None)
            self.module._parameters[self.name] = self.original
            self.original = None
        for bank, _, _ in self.banks:
            bank.placed = False

    def _exchange(self) -> None:
        if not any(bank.computed for bank, _, _ in self.banks):
            return
        original = self.module._parameters[self.name]
        assert original is not None
        standing = self.updated(original)
        self.module._parameters[self.name] = standing  # type: ignore[assignment]
        self.original = original
        if not torch.compiler.is_compiling():
            STANDING[id(standing)] = self
        for bank, _, _ in self.banks:
            bank.placed = True

    def _goes_on(self) -> bool:
        """Return whether the forward of a reader is running further out on the call stack of this thread.

        One call of a reader is the present one, so at least two must be on the stack.
        """
        frame: Any = sys._getframe(1)
        calls = 0
        while frame is not None:
            if frame.f_code.co_name == "_call_impl":
                calls += any(frame.f_locals.get("self") is reader for reader in self.readers)
            frame = frame.f_back
        return calls > 1

    def updated(self, weight: Tensor) -> Tensor:
        """Return W + delta in the dtype of W. Gradients reach B and C through it."""
        pieces, end = [], 0
        with without_autocast(weight):  # autocast would round the factors before their product is rounded
            for bank, rows, view in sorted(self.banks, key=lambda entry: entry[1].start if entry[1] else 0):
                if rows is None:
                    return _updated(bank, view, weight)
                pieces += [weight[end : rows.start], _updated(bank, view, weight[rows])]
                end = rows.stop
            return torch.cat([*pieces, weight[end:]])


def _updated(bank: Any, view: View | None, weight: Tensor) -> Tensor:
    """Return a weight, or a bias if `view` is None, with the updates of a bank.

    The factors are multiplied in the order in which the weight has its axes, so that the update is never transposed.
    """
    for name in bank.computed:
        adapter: Any = bank._modules[name]
        if isinstance(adapter, TrainedRows):
            weight = weight.index_copy(0, adapter.ids.to(weight.device), adapter.rows.to(weight))
            continue
        M, E = (factor.to(weight.dtype) for factor in adapter.block_products())
        if view is None:
            weight = weight + (M[0, -1:, :] @ E[0])[0]
            continue
        M = M[:, : adapter.d, :]
        blocks, axes, whole = M.shape[0], view.columns[: int(M.shape[0] > 1)], tuple(range(weight.ndim))
        rest = view.columns[len(axes) :]
        if (*axes, *rest, *view.rows) == whole:
            left, right = E.transpose(1, 2), M.transpose(1, 2)
        else:
            assert (*axes, *view.rows, *rest) == whole, "rows and columns of a weight lie among each other"
            left, right = M, E
        # One product and one sum for all blocks.
        flat = weight.reshape(blocks, left.shape[1], right.shape[2])
        weight = torch.baddbmm(flat, left, right).view(weight.shape)
    return weight


def readable(weight: Any) -> bool:
    """Return whether W + delta can replace a weight: it must be floating point, and whole on this process."""
    return (
        type(weight) in (Tensor, nn.Parameter)
        and weight.is_floating_point()
        and not weight.is_meta
        and not is_sharded(weight)
        and not is_partitioned(weight)
    )


def put(
    reader: nn.Module, module: nn.Module, name: str, bank: Any, rows: slice | None, view: View | None
) -> Place:
    """Let W + delta, with the update of a bank, replace a Parameter whenever the forward of `reader` runs."""
    if view is not None and any(adapter.A.shape[1] > adapter.d for adapter in bank.adapters.values()):
        put(reader, module, bank.kind.bias, bank, None, None)
    places: list[Place] = vars(reader).setdefault(READS, [])
    # All readers of a Parameter share one `Place`, since their forwards may run within each other.
    known = {(id(place.module), place.name): place for place in (*places, *bank.places)}
    place = known.get((id(module), name))
    if place is None:
        place = Place(module, name, [])
    if all(each is not place for each in places):
        places.append(place)
        place.readers.append(reader)
    if all(entry[0] is not bank for entry in place.banks):
        place.banks.append((bank, rows, view))
        bank.places = (*bank.places, place)
    reader._forward_pre_hooks[KEY] = _enter
    reader._forward_hooks[KEY] = _leave
    reader._forward_hooks_always_called[KEY] = True  # also where the forward raises
    return place


def readers(model: nn.Module) -> dict[int, nn.Module]:
    """Return the modules during whose forwards Parameters are replaced, by ``id`` of the module that has them."""
    return {id(place.module): reader for reader in model.modules() for place in vars(reader).get(READS, ())}


def take_back(bank: Any) -> None:
    """Undo every `put` of a bank."""
    for place in bank.places:
        place.restore()
        place.banks = [entry for entry in place.banks if entry[0] is not bank]
        for reader in place.readers if not place.banks else ():
            left = [other for other in vars(reader).get(READS, ()) if other is not place]
            if left:
                vars(reader)[READS] = left
            elif vars(reader).pop(READS, None) is not None:
                for table in (
                    reader._forward_pre_hooks,
                    reader._forward_hooks,
                    reader._forward_hooks_always_called,
                ):
                    table.pop(KEY, None)
    bank.places = ()


def restore(model: nn.Module, *_: Any) -> None:
    """Put back the Parameters that an interrupted forward has left replaced: `KeyboardInterrupt` runs no hooks.

    Parameters that forwards of other threads are reading stay replaced.
    """
    thread = get_ident()
    for module in dict(walk(model)).values():
        for place in vars(module).get(READS, ()):
            if place.running.keys() <= {thread}:
                place.restore()


def _enter(reader: nn.Module, args: Any) -> None:
    if getattr(reader, "_is_replica", False):
        raise StateError(
            f"torch.nn.DataParallel runs copies of a {type(reader).__name__}, in which W + delta cannot be put in "
            "the place of the weight; use torch.nn.parallel.DistributedDataParallel"
        )
    for place in vars(reader)[READS]:
        place.enter()


def _leave(reader: nn.Module, args: Any, output: Any) -> None:
    for place in vars(reader)[READS]:
        place.leave()
