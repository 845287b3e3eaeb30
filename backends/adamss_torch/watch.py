"""Finding out which modules read the weights of an adapted model, in its first forwards of either mode."""

from __future__ import annotations

import ast
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from functools import cache
from inspect import getsource
from textwrap import dedent
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

__all__ = ["Seen", "Watch", "seems_to_read"]

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
"""Functions of a tensor that read none of its numbers."""

FORM_ATTRIBUTES = ("dtype", "device", "shape", "ndim", "layout", "requires_grad", "is_meta", "itemsize")
CHECKS = ("isinstance", "hasattr", "type")
NO_FORWARD = (
    "__init__",
    "_init",
    "init_",
    "reset_",
    "_reset",
    "post_init",
    "tie_",
    "extra_repr",
    "load",
    "resize",
)


FORWARDS = 100
"""Number of forwards to watch at most: a layer in a block that is dropped at random may not run for a long time."""


@dataclass
class Seen:
    """Findings in the forwards of a model so far, in training (True) and in evaluation (False).

    Attributes
    ----------
    paths
        Paths of the adapted layers whose weights were read, by mode.
    forwards
        Number of watched forwards that read any of these weights, by mode.
    told
        Paths of layers about which a warning was given.
    heads
        Paths of embeddings whose weight another module uses as a head, through a function.
    """

    paths: dict[bool, set[str]] = field(default_factory=lambda: {True: set(), False: set()})
    forwards: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})
    told: set[str] = field(default_factory=set)
    heads: set[str] = field(default_factory=set)

    @property
    def every(self) -> set[str]:
        """The layers whose weights were read in either mode."""
        return self.paths[True] | self.paths[False]

    def done(self, training: bool, paths: Set[str]) -> bool:
        """Return whether all of these layers were seen in a mode, or enough forwards were watched."""
        return self.forwards[training] >= FORWARDS or (
            self.forwards[training] > 0 and paths <= self.paths[training]
        )


class Watch(TorchFunctionMode):
    """Find out, in a forward of a model, which modules read the weights of adapted layers.

    If a module other than the layer itself reads the weight, or a Parameter is read outside of the forward of its
    module, then W + delta replaces the weight there too: at once, and whenever that reader runs from then on.
    Otherwise the adapter would silently have no effect. A module that has the Parameter itself, such as a head that
    is tied to an embedding, does not count as such a reader.

    Parameters
    ----------
    layers
        Adapted layers and Parameters, with their banks, by path.
    seen
        Findings to which this watch adds.
    training
        Whether the model is in training mode.
    began
        Module whose forward is watched.
    """

    active = 0
    """Number of watches in force, which code that counts `torch.overrides` modes must leave out."""

    def __init__(
        self,
        layers: Mapping[str, tuple[nn.Module | Part, Any]],
        seen: Seen,
        training: bool,
        began: nn.Module,
    ) -> None:
        super().__init__()
        self.thread = get_ident()  # a mode is in force in one thread only
        self.began, self.training, self.seen = began, training, seen
        self.compiled = False
        self.found_readers = False
        self._eager: Any = None
        self._weights: dict[int, tuple[str, nn.Module | Part, Any]] = {}
        self._paths = {id(bank): path for path, (_, bank) in layers.items()}
        for path, (layer, bank) in layers.items():
            weight: Any = layer.module._parameters.get(layer.name) if isinstance(layer, Part) else None
            # accelerate reads and moves offloaded weights during the forward of any module, so these are not watched.
            if not isinstance(layer, Part) and execution_device(layer) is None:
                weight = layer._parameters.get(bank.kind.weight)
            if id(weight) in STANDING:  # a forward that is running has replaced the weight already
                weight = STANDING[id(weight)].original
            if weight is not None and bank.computed:
                self._weights[id(weight)] = path, layer, bank
        self._read: set[str] = set()
        self._others: dict[str, str] = {}

    def __enter__(self) -> Any:
        Watch.active += 1
        if "torch._dynamo" in sys.modules:
            # A mode sees nothing of compiled code, and a graph that is compiled under the mode would have to be
            # compiled again without it.
            self._eager = torch.compiler.set_stance("force_eager")
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        Watch.active -= 1
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        if self._eager is not None:
            self._eager.__exit__(None, None, None)

    def end(self) -> None:
        """Record what was seen, and warn of layers that were not called while others with the same weight were."""
        if not (self._read or self._others):
            return  # other tensors stood in the places of the weights, as in `torch.func.functional_call`
        self.seen.paths[self.training] |= self._read
        # A forward in which readers were found does not count, so that another one checks that they read W + delta.
        self.seen.forwards[self.training] += FORWARDS if self.compiled else not self.found_readers
        every = self.seen.every | self.seen.told
        for path, name in self._others.items():
            if path not in every:
                self.seen.told.add(path)
                warnings.warn(
                    f"{path}: the forward has called another {name} of the same weight instead of this one, whose "
                    "adapter had no effect; name the other one in targets",
                    AdamssWarning,
                    stacklevel=3,
                )

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # the model compiles a function itself, such as flexible attention
            return func(*args, **kwargs)
        given = {id(tensor): tensor for tensor in _tensors((*args, *kwargs.values()))}
        for key in given.keys() & STANDING.keys():
            place = STANDING[key]
            self._check_checkpoint(place)
            self._read |= {self._paths[id(bank)] for bank, _, _ in place.banks if id(bank) in self._paths}
        found = {key: weight for key, weight in given.items() if key in self._weights}
        if not found or _asks_for_form(func, args, found):
            return func(*args, **kwargs)
        new = {}
        for key, weight in found.items():
            path, layer, bank = self._weights[key]
            reader = _reader(weight)
            owner = layer.module if isinstance(layer, Part) else layer
            # None means that our own code reads the weight, to form W + delta. A graph that a compiler has made
            # contains the layer's own product.
            own = (reader is layer and bank.hooked) or any(reader is module for module, _ in bank.sharing)
            if reader is None or own or isinstance(reader, Adapter | TrainedRows | GraphModule):
                self._read.add(path)
            elif reader is not owner and _has(reader, weight):
                if isinstance(reader, type(owner)):
                    self._others.setdefault(path, type(reader).__name__)
            elif path in self._read and isinstance(bank.kind, Embedding) and not bank.sharing:
                self._tell_of_head(path, reader)
            elif any(place.original is weight for place in bank.places):
                self.found_readers = True  # so that later forwards are watched, and raise, as well
                raise LayerError(
                    f"{path}: {type(reader).__name__} keeps its weight in a place of its own, where W + delta cannot "
                    "be put; leave it out of targets"
                )
            else:
                new[key] = self._updated(key, weight, reader)
                self._read.add(path)
        if not new:
            return func(*args, **kwargs)
        values = _exchanged(tuple(kwargs.values()), new)
        return func(*_exchanged(args, new), **dict(zip(kwargs, values, strict=True)))

    def _updated(self, key: int, weight: Tensor, reader: nn.Module) -> Tensor:
        """Return W + delta for a module that reads W, and let it replace W in that module's forwards from now on."""
        path, layer, bank = self._weights[key]
        self.found_readers = True
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

    def _tell_of_head(self, path: str, reader: nn.Module) -> None:
        """Warn once of a head that uses the weight of an embedding, because only the embedding is adapted."""
        if path not in self.seen.heads:
            self.seen.heads.add(path)
            warnings.warn(
                f"{path}: {type(reader).__name__} uses the weight of this embedding as a head too, and the head "
                "keeps the base weight; merging would change both, so leave the adapter unmerged",
                AdamssWarning,
                stacklevel=2,
            )

    @staticmethod
    def _check_checkpoint(place: Place) -> None:
        """Check that W + delta is not read within an activation checkpoint that is recomputed after W is back."""
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


@cache
def _lookups(kind: Any) -> frozenset[tuple[str, str]]:
    """Return (child, attribute) for each attribute ``self.child.attribute`` that a class looks up in its source.

    Look-ups that only ask for a tensor's form do not count, nor do methods that run before or after a training.
    """
    found = set()
    for each in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        if each.__module__.startswith("torch."):
            continue  # PyTorch's own fused paths look for hooks, and step aside
        try:
            tree = ast.parse(dedent(getsource(each)))
        except (OSError, TypeError, SyntaxError):
            continue
        for method in ast.walk(tree):
            if not isinstance(method, ast.FunctionDef) or method.name.startswith(NO_FORWARD):
                continue
            this = method.args.args[0].arg if method.args.args else ""
            above = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
            for node in ast.walk(method):
                if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Attribute):
                    continue
                outer, owner = above.get(node), node.value.value
                asks = isinstance(outer, ast.Attribute) and outer.attr in {*FORM, *FORM_ATTRIBUTES}
                asks = asks or (isinstance(outer, ast.Call) and getattr(outer.func, "id", "") in CHECKS)
                if isinstance(owner, ast.Name) and owner.id == this and not asks:
                    found.add((node.value.attr, node.attr))
    return frozenset(found)


def seems_to_read(module: nn.Module | None, child: str, name: str) -> bool:
    """Return whether a module, by its source, reads an array of one of its children itself."""
    kind: Any = type(module)
    return isinstance(module, nn.Module) and (child, name) in _lookups(kind)


def _has(module: nn.Module, weight: Tensor) -> bool:
    """Return whether a tensor is one of a module's own Parameters."""
    return any(own is weight for own in module._parameters.values())


def _asks_for_form(func: Any, args: tuple[Any, ...], found: Mapping[int, Tensor]) -> bool:
    """Return whether a function of a tensor asks for its dtype, shape or the like, and not for its numbers."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(func.__self__, "__name__", "") not in ("data", "T", "mT", "H", "mH")
    if name in ("to", "type_as"):
        return id(args[0]) not in found
    return name in FORM or name.endswith("_like") or name.startswith("new_")


def _reader(weight: Tensor) -> nn.Module | None:
    """Return the module that has looked up a weight, or the graph module of a compiler; None for our own code.

    The reader is the innermost module whose forward is running and that was not given the weight as an argument.
    """
    frame: Any = sys._getframe(2)
    found = None
    while frame is not None:
        module = frame.f_locals.get("self")
        if frame.f_code is Place.updated.__code__:
            return None
        if isinstance(module, GraphModule):
            return module
        if frame.f_code.co_name == "_call_impl" and isinstance(module, nn.Module):
            found = module
            given = (*frame.f_locals.get("args", ()), *frame.f_locals.get("kwargs", {}).values())
            if all(tensor is not weight for tensor in _tensors(given)):
                return module
        frame = frame.f_back
    return found


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among arguments, and those in arguments that are lists or tuples."""
    flat = [inner for value in values for inner in (value if isinstance(value, tuple | list) else (value,))]
    return [value for value in flat if isinstance(value, Tensor)]


def _exchanged(values: tuple[Any, ...], new: Mapping[int, Tensor]) -> tuple[Any, ...]:
    def one(value: Any) -> Any:
        if type(value) in (tuple, list):
            return type(value)(map(one, value))
        return new.get(id(value), value)

    return tuple(map(one, values))
