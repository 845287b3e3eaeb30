"""Weights that others read: W + delta is put in the place of W for as long as the forward of the reader runs.

It is the way of all that is no layer with a forward of its own: the Parameters of fused experts, of routers and of
`torch.nn.MultiheadAttention`; layers whose forward a subclass has changed; and layers whose weight another module
reads past their forward, which the first forward of a model shows (`Watch`). Keys of state dicts stay as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from adamss.backend.views import View
from adamss.errors import LayerError
from adamss_torch.adapter import Adapter
from adamss_torch.kinds import Embedding
from adamss_torch.sharding import is_partitioned, is_sharded
from adamss_torch.stores import execution_device
from adamss_torch.tokens import TrainedRows

__all__ = ["Place", "Watch", "leave", "put", "readable", "readers", "restore"]

READS = "_adamss_reads"
"""Attribute of a module whose forward reads weights that are put in place: a list of `Place`."""

KEY = -2
"""Key of our hooks among those of the reader."""

FORM = {
    *(
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "stride",
        "storage_offset",
        "element_size",
        "data_ptr",
    ),
    *("is_contiguous", "is_floating_point", "is_complex", "type", "get_device", "__len__", "requires_grad_"),
}
"""Functions of a tensor that read no number of it."""


@dataclass
class Place:
    """A Parameter that is adapted, in whole or in slices, and what stands in its place for now.

    Attributes
    ----------
    module, name
        Whose Parameter it is.
    banks
        With the slice of rows that each of them adapts, None for all, and how that is a matrix; None of a bias.
    original
        The Parameter, while W + delta stands in its place.
    running
        The threads in which a forward is going on that reads it.
    """

    module: nn.Module
    name: str
    banks: list[tuple[Any, slice | None, View | None]]
    original: nn.Parameter | None = None
    running: set[int] = field(default_factory=set)

    def enter(self) -> None:
        """Put W + delta in place, unless it is there."""
        thread = 0 if torch.compiler.is_compiling() else get_ident()
        # A thread that is there already was interrupted before it could leave.
        if self.running - {thread} or not any(bank.computed for bank, _, _ in self.banks):
            self.running.add(thread)
            return
        self.restore()
        self.original = self.module._parameters[self.name]
        assert self.original is not None
        self.module._parameters[self.name] = self.updated(self.original)  # type: ignore[assignment]
        for bank, _, _ in self.banks:
            bank.placed = True
        self.running.add(thread)

    def leave(self) -> None:
        """Put the Parameter back, if nobody else is reading."""
        self.running.discard(0 if torch.compiler.is_compiling() else get_ident())
        if not self.running:
            self.restore()

    def restore(self) -> None:
        """Put the Parameter back."""
        self.running.clear()
        if self.original is not None:
            self.module._parameters[self.name] = self.original
            self.original = None
        for bank, _, _ in self.banks:
            bank.placed = False

    def updated(self, weight: Tensor) -> Tensor:
        """Return W + delta, through which gradients reach B and C."""
        pieces, end = [], 0
        for bank, rows, view in sorted(self.banks, key=lambda entry: entry[1].start if entry[1] else 0):
            if rows is None:
                return _updated(bank, view, weight)
            pieces += [weight[end : rows.start], _updated(bank, view, weight[rows])]
            end = rows.stop
        return torch.cat([*pieces, weight[end:]])


def _updated(bank: Any, view: View | None, weight: Tensor) -> Tensor:
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
    """Whether something can be put in the place of a weight: a Parameter of numbers that are here, and whole."""
    return (
        type(weight) in (Tensor, nn.Parameter)
        and weight.is_floating_point()
        and not weight.is_meta
        and not is_sharded(weight)
        and not is_partitioned(weight)
    )


def put(
    reader: nn.Module, module: nn.Module, name: str, bank: Any, rows: slice | None, view: View | None
) -> None:
    """Have the update of a bank put in the place of a Parameter whenever the forward of a module runs."""
    if view is not None and any(adapter.A.shape[1] > adapter.d for adapter in bank.adapters.values()):
        put(reader, module, bank.kind.bias, bank, None, None)
    places: list[Place] = vars(reader).setdefault(READS, [])
    for place in places:
        if place.module is module and place.name == name:
            place.banks.append((bank, rows, view))
            return
    places.append(Place(module, name, [(bank, rows, view)]))
    reader._forward_pre_hooks[KEY] = _enter
    reader._forward_hooks[KEY] = _leave
    reader._forward_hooks_always_called[KEY] = True  # also where the forward raises


def readers(model: nn.Module) -> dict[int, nn.Module]:
    """Return the modules in whose forward something is put in place, by ``id`` of the module that it belongs to."""
    return {id(place.module): reader for reader in model.modules() for place in vars(reader).get(READS, ())}


def leave(model: nn.Module) -> None:
    """Undo `put` in all modules of a model."""
    restore(model)
    for module in model.modules():
        if vars(module).pop(READS, None) is not None:
            for table in (
                module._forward_pre_hooks,
                module._forward_hooks,
                module._forward_hooks_always_called,
            ):
                table.pop(KEY, None)


def restore(model: nn.Module, *_: Any) -> None:
    """Put back what a forward that was interrupted (`KeyboardInterrupt` runs no hook) has left in its place."""
    thread = get_ident()
    for module in model.modules():
        for place in vars(module).get(READS, ()):
            if place.running <= {thread}:
                place.restore()


def _enter(reader: nn.Module, args: Any) -> None:
    for place in vars(reader)[READS]:
        place.enter()


def _leave(reader: nn.Module, args: Any, output: Any) -> None:
    for place in vars(reader)[READS]:
        place.leave()


# ---- who reads a weight ----------------------------------------------------------------------------


@dataclass
class Watched:
    """A layer whose weight somebody may read."""

    path: str
    layer: nn.Module
    bank: Any


class Watch(TorchFunctionMode):
    """Sees, in the first forward of a model, who reads the weights of adapted layers.

    A weight that another module reads than the layer itself gets its update there too: at once, and from then on by
    `put`. Otherwise the adapter would have no effect, without a word. A module that has the Parameter too, as a head
    that is tied to an embedding, is no such reader.

    Parameters
    ----------
    layers
        Adapted layers by path, with their banks.
    """

    active = 0
    """How many of them are in force: whoever counts `torch.overrides` modes leaves these out."""

    def __init__(self, layers: Mapping[str, tuple[nn.Module, Any]]) -> None:
        super().__init__()
        self._weights: dict[int, Watched] = {}
        for path, (layer, bank) in layers.items():
            weight = layer._parameters.get(bank.kind.weight)
            # accelerate reads and moves the weights that it offloads, in the name of whoever runs.
            if weight is not None and bank.computed and execution_device(layer) is None:
                self._weights[id(weight)] = Watched(path, layer, bank)
        self._read: set[int] = set()

    def __enter__(self) -> Any:
        Watch.active += 1
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        Watch.active -= 1
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    @property
    def finished(self) -> bool:
        """Whether the forward has read any of them: one with other tensors in their places shows nothing."""
        return bool(self._read)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        found = {id(a): a for a in _tensors((*args, *kwargs.values())) if id(a) in self._weights}
        if not found or _asks_for_form(func, args, found) or _putting():
            return func(*args, **kwargs)
        reader, new = _reader(), {}
        for key, weight in found.items():
            watched = self._weights[key]
            if reader is watched.layer or isinstance(reader, Adapter | TrainedRows):
                self._read.add(key)
            elif reader is None or any(own is weight for own in reader._parameters.values()):
                continue
            elif (
                key not in self._read or watched.bank.sharing or not isinstance(watched.bank.kind, Embedding)
            ):
                # But not a head that takes the weight of an embedding which is called too: that alone is adapted,
                # unless single tokens are trained.
                new[key] = self._updated(watched, weight, reader)
        self._read |= new.keys()
        values = _exchanged(tuple(kwargs.values()), new)
        return func(*_exchanged(args, new), **dict(zip(kwargs, values, strict=True)))

    def _updated(self, watched: Watched, weight: Tensor, reader: Any) -> Tensor:
        layer, bank = watched.layer, watched.bank
        if not readable(weight):
            raise LayerError(
                f"{watched.path}: {type(reader).__name__} reads its weight, a {type(weight).__name__}, past the "
                "layer, where the adapter would have no effect; leave it out of targets"
            )
        view = bank.kind.view(layer, watched.path)
        for module, name in bank.sharing or [(layer, bank.kind.weight)]:
            put(reader, module, name, bank, None, view)
        return _updated(bank, view, weight)


def _putting() -> bool:
    """Whether it is us who read a weight, to put W + delta in its place."""
    frame: Any = sys._getframe(2)
    return bool(frame.f_code is _updated.__code__)


def _asks_for_form(func: Any, args: tuple[Any, ...], found: Mapping[int, Tensor]) -> bool:
    """Whether a function of a tensor asks for its dtype, shape or the like, and not for its numbers."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(func.__self__, "__name__", "") not in ("data", "T", "mT", "H", "mH")
    if name in ("to", "type_as"):
        return id(args[0]) not in found
    return name in FORM or name.endswith("_like") or name.startswith("new_")


def _reader() -> nn.Module | None:
    """Return the module whose code is running."""
    frame = sys._getframe(2)
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            return module
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Return tensors among arguments, and in lists of them."""
    flat = [inner for value in values for inner in (value if isinstance(value, tuple | list) else (value,))]
    return [value for value in flat if isinstance(value, Tensor)]


def _exchanged(values: tuple[Any, ...], new: Mapping[int, Tensor]) -> tuple[Any, ...]:
    def one(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(map(one, value))
        return new.get(id(value), value)

    return tuple(map(one, values))
