"""Who reads the weights of an adapted model: seen in its first forward, in training and in evaluation."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from adamss.errors import AdamssWarning, LayerError, StateError
from adamss_torch.adapter import Adapter
from adamss_torch.in_place import STANDING, Place, put, readable
from adamss_torch.kinds import Embedding, Part
from adamss_torch.stores import execution_device
from adamss_torch.tokens import TrainedRows

__all__ = ["Watch"]

CHECKPOINT = checkpoint.__file__

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


class Watch(TorchFunctionMode):
    """Sees, in the forward of a model, who reads the weights of adapted layers.

    If another module reads a weight than the layer itself, or reads a Parameter outside of the forward of its module,
    its update is put in place there too: at once, and whenever that module runs from then on. Otherwise the adapter
    would have no effect, without a word. A module that has the Parameter too, as a head that is tied to an
    embedding, is no such reader.

    Parameters
    ----------
    layers
        Adapted layers and Parameters by path, with their banks.
    """

    active = 0
    """How many of them are in force: whoever counts `torch.overrides` modes leaves these out."""

    def __init__(self, layers: Mapping[str, tuple[nn.Module | Part, Any]]) -> None:
        super().__init__()
        self.thread = get_ident()  # a mode is in force in one thread
        self._eager: Any = None
        self._weights: dict[int, tuple[str, nn.Module | Part, Any]] = {}
        for path, (layer, bank) in layers.items():
            weight: Any = layer.module._parameters.get(layer.name) if isinstance(layer, Part) else None
            # accelerate reads and moves the weights that it offloads, in the name of whoever runs.
            if not isinstance(layer, Part) and execution_device(layer) is None:
                weight = layer._parameters.get(bank.kind.weight)
            if weight is not None and bank.computed:
                self._weights[id(weight)] = path, layer, bank
        self._read: set[int] = set()
        self._others: dict[int, str] = {}

    def __enter__(self) -> Any:
        Watch.active += 1
        if "torch._dynamo" in sys.modules:
            # A compiled part shows nothing, and a graph made under a mode would have to be made anew without it.
            self._eager = torch.compiler.set_stance("force_eager")
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        Watch.active -= 1
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        if self._eager is not None:
            self._eager.__exit__(None, None, None)

    @property
    def finished(self) -> bool:
        """Whether the forward has read any of them: one with other tensors in their places shows nothing."""
        return bool(self._read or self._others)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # a function within the model, as flexible attention is
            return func(*args, **kwargs)
        given = {id(tensor): tensor for tensor in _tensors((*args, *kwargs.values()))}
        for key in given.keys() & STANDING.keys():
            self._check_checkpoint(STANDING[key])
        found = {key: weight for key, weight in given.items() if key in self._weights}
        if not found or _asks_for_form(func, args, found):
            return func(*args, **kwargs)
        reader, new = _reader(), {}
        for key, weight in found.items():
            _, layer, bank = self._weights[key]
            # None: we, who put W + delta in its place. What a compiler has made has the layer's own product in it.
            own = (reader is layer and bank.hooked) or any(reader is module for module, _ in bank.sharing)
            if reader is None or own or isinstance(reader, Adapter | TrainedRows | GraphModule):
                self._read.add(key)
            elif not isinstance(layer, Part) and reader is not layer and _has(reader, weight):
                if isinstance(reader, type(layer)):
                    self._others.setdefault(key, type(reader).__name__)
            elif key in self._read and isinstance(bank.kind, Embedding) and not bank.sharing:
                self._tell_of_head(key, reader)
            else:
                new[key] = self._updated(key, weight, reader)
        if not new:
            return func(*args, **kwargs)
        self._read |= new.keys()
        values = _exchanged(tuple(kwargs.values()), new)
        return func(*_exchanged(args, new), **dict(zip(kwargs, values, strict=True)))

    def tell(self) -> None:
        """Tell of layers that were not called, but others like them which have the same weight."""
        for key in self._others.keys() - self._read:
            warnings.warn(
                f"{self._weights[key][0]}: the forward has called another {self._others[key]} of the same weight, "
                "and not this one, whose adapter had no effect; name the other in targets",
                AdamssWarning,
                stacklevel=3,
            )

    def _updated(self, key: int, weight: Tensor, reader: nn.Module) -> Tensor:
        """Return W + delta for whoever reads W, and put it in place there from now on."""
        path, layer, bank = self._weights[key]
        if not readable(weight):
            raise LayerError(
                f"{path}: {type(reader).__name__} reads its weight, a {type(weight).__name__}, past the layer, where "
                "the adapter would have no effect; leave it out of targets"
            )
        view = bank.kind.view(layer, path)
        if isinstance(layer, Part):
            return put(reader, layer.module, layer.name, bank, layer.rows, view).updated(weight)
        for module, name in bank.sharing or [(layer, bank.kind.weight)]:
            place = put(reader, module, name, bank, None, view)
        return place.updated(weight)

    def _tell_of_head(self, key: int, reader: nn.Module) -> None:
        """Tell, once, of a head that takes the weight of an embedding which is called too: that alone is adapted."""
        if self._others.setdefault(key, "") != "head":
            self._others[key] = "head"
            warnings.warn(
                f"{self._weights[key][0]}: {type(reader).__name__} takes the weight of this embedding for a head "
                "too, which goes on with the base weight; once merged, both have the update: leave it unmerged",
                AdamssWarning,
                stacklevel=2,
            )

    @staticmethod
    def _check_checkpoint(place: Place) -> None:
        """Check that W + delta is not read within a checkpoint that computes it anew after W is back."""
        frame: Any = sys._getframe(2)
        while frame is not None:
            if frame.f_code.co_name == "_call_impl" and any(
                frame.f_locals.get("self") is reader for reader in place.readers
            ):
                return
            if frame.f_code.co_filename == CHECKPOINT:
                reader = type(place.readers[0]).__name__
                raise StateError(
                    f"{reader} checkpoints activations within its forward, which would be computed anew without the "
                    f"update of its {place.name!r}; checkpoint around the whole of {reader}, or leave that out of "
                    "targets"
                )
            frame = frame.f_back


def _has(module: nn.Module, weight: Tensor) -> bool:
    """Whether a tensor is one of the Parameters of a module."""
    return any(own is weight for own in module._parameters.values())


def _asks_for_form(func: Any, args: tuple[Any, ...], found: Mapping[int, Tensor]) -> bool:
    """Whether a function of a tensor asks for its dtype, shape or the like, and not for its numbers."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(func.__self__, "__name__", "") not in ("data", "T", "mT", "H", "mH")
    if name in ("to", "type_as"):
        return id(args[0]) not in found
    return name in FORM or name.endswith("_like") or name.startswith("new_")


def _reader() -> nn.Module | None:
    """Return the innermost module whose forward is running, or one that a compiler made; None for ourselves."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        module = frame.f_locals.get("self")
        if frame.f_code is Place.updated.__code__:
            return None
        if isinstance(module, GraphModule) or (
            frame.f_code.co_name == "_call_impl" and isinstance(module, nn.Module)
        ):
            return module
        frame = frame.f_back
    return None


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Return tensors among arguments, and in lists of them."""
    flat = [inner for value in values for inner in (value if isinstance(value, tuple | list) else (value,))]
    return [value for value in flat if isinstance(value, Tensor)]


def _exchanged(values: tuple[Any, ...], new: Mapping[int, Tensor]) -> tuple[Any, ...]:
    def one(value: Any) -> Any:
        if type(value) in (tuple, list):
            return type(value)(map(one, value))
        return new.get(id(value), value)

    return tuple(map(one, values))
