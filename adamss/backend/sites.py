"""Where a matrix sits in a model: the layer, the place in a stack, and how the layer's array is a matrix.

A backend lists the kinds of layers of its framework in a `Kinds` table; whoever has a layer of another kind registers
a `Kind` there, and every verb takes it from then on.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

from adamss.backend.views import View
from adamss.core._array import Array, namespace
from adamss.errors import BackendError, LayerError, LayerTypeError

__all__ = [
    "BaseWeight",
    "Fragment",
    "Index",
    "Kind",
    "Kinds",
    "LinearKind",
    "Site",
    "StackedLayer",
    "arrays_of",
    "by_owner",
    "owner_of",
    "split_path",
    "stack_paths",
]

T = TypeVar("T")
LoraForm = Literal["linear", "convolution", "embedding", "parameter"]
Index = tuple[int, ...]
"""Where in a stack a layer lies; ``()`` if there is no stack."""


class BaseWeight(NamedTuple):
    """Weight of one layer in paper orientation.

    Attributes
    ----------
    W
        (d, n): d inputs, n outputs.
    b
        Bias (n,), or None.
    """

    W: Array
    b: Array | None


class Kind(ABC):
    """One kind of layer: which array of it is the weight, and how that is a matrix.

    The law that binds it, with M: (d, q) and E: (q, n), is that the layer's own forward with ``W + M E`` in the place
    of its weight equals ``forward(x) + spread(layer, project(layer, x, M), E)``.
    """

    classes: ClassVar[tuple[type | str, ...]]
    """Classes of the layers; a subclass of one of them is of this kind too.

    A class of a library that may not be installed is given by its name, ``"transformers.pytorch_utils.Conv1D"``.
    """

    weight: ClassVar[str] = "weight"
    """Name of the weight among the attributes of the layer."""

    bias: ClassVar[str] = "bias"
    """Name of the bias, which may be None."""

    linear: ClassVar[bool] = True
    """Whether the layer is a product with W: `project` and `spread` are those of this class, and a kernel's."""

    in_place: ClassVar[bool] = False
    """Whether W + delta stands in the place of W while a forward runs that nobody knows, and nothing is projected."""

    all_linear: ClassVar[bool] = True
    """Whether ``targets="all-linear"`` takes such layers; of kinds that are not linear, only those that say so."""

    lora: ClassVar[LoraForm | None] = "linear"
    """How PEFT's LoRA writes an update of such a layer; None if it has no way. Of a kind not linear, say so."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.linear = not cls.in_place and cls.project is Kind.project and cls.spread is Kind.spread
        if not cls.linear:
            cls.all_linear = bool(vars(cls).get("all_linear", False))
            cls.lora = None if cls.lora == "linear" else cls.lora

    def lora_refusal(self, layer: Any) -> str | None:
        """Return what a layer of the form `lora` has that PEFT's LoRA leaves out, as a noun; None for nothing."""
        return None

    @abstractmethod
    def view(self, layer: Any, path: str) -> View:
        """Return how the weight of a layer is a matrix.

        Parameters
        ----------
        layer
            Of one of `classes`.
        path
            What messages call it.

        Raises
        ------
        LayerError
            If this layer cannot be adapted; the message names `path` and says why.
        """

    def defines(self, layer: type, name: str) -> bool:
        """Return whether one of `classes` defines the method `name` of a class of layers, and no subclass."""
        classes = [one for one in layer.__mro__ if one in self.classes or _full_name(one) in self.classes]
        return getattr(layer, name) in [getattr(one, name) for one in classes]

    def leading(self, layer: Any) -> Index:
        """Return the leading axes of a stack of layers that share one array; ``()`` for a single layer."""
        return ()

    def blocks(self, layer: Any) -> int:
        """Return how many matrices lie one after the other in the columns of W, such as those of experts; mostly 1.

        They are the entries along the first axis of the weight. Each is decomposed and segmented by itself.
        """
        return 1

    def project(self, layer: Any, x: Array, M: Array) -> Array:
        """Return ``z = x M``: what the input of the layer is in the q directions of M."""
        return x @ M

    def spread(self, layer: Any, z: Array, E: Array) -> Array:
        """Return ``z E`` in the form of the layer's output."""
        return z @ E


class LinearKind(Kind):
    """A layer ``y = x weight^T + bias`` with a weight (n, d)."""

    def view(self, layer: Any, path: str) -> View:
        """Return the transpose."""
        return View(rows=(1,), columns=(0,))


class Kinds:
    """The kinds of layers that a backend adapts, by class.

    Parameters
    ----------
    kinds
        Of the framework itself.
    """

    def __init__(self, *kinds: Kind) -> None:
        self._kinds: list[Kind] = []
        for kind in kinds:
            self.register(kind)

    def register(self, kind: Kind) -> Kind:
        """Add a kind, or replace the one that its classes have; for this process.

        Raises
        ------
        BackendError
            If it is no `Kind` with classes.
        """
        if not isinstance(kind, Kind) or not getattr(kind, "classes", ()):
            raise BackendError(f"a kind of layer must be an adamss.backend.Kind with classes, found {kind!r}")
        self._kinds.append(kind)
        return kind

    def unregister(self, kind: Kind) -> None:
        """Take a kind out again; its classes are then of the kind that they were of before."""
        self._kinds = [other for other in self._kinds if other is not kind]

    def find(self, layer: Any) -> Kind | None:
        """Return the kind of the nearest class of a layer; None if there is none."""
        last = {one: kind for kind in self._kinds for one in kind.classes}
        names = (name for one in type(layer).__mro__ for name in (one, _full_name(one)))
        return next((last[name] for name in names if name in last), None)

    def of(self, layer: Any, path: str) -> Kind:
        """Return the kind of a layer.

        Raises
        ------
        LayerTypeError
            If it is of none; the message names `path` and the classes that can be adapted.
        """
        kind = self.find(layer)
        if kind is None:
            classes = (one for kind in self._kinds for one in kind.classes if not _is_fragment(one))
            names = ", ".join(dict.fromkeys(map(self._named, classes)))
            raise LayerTypeError(
                f"{path or 'the model itself'} is a {type(layer).__name__}, which has no weight to adapt; targets "
                f"must name layers of {names}"
            )
        return kind

    @staticmethod
    def _named(kind: type | str) -> str:
        module, _, name = (kind if isinstance(kind, str) else _full_name(kind)).rpartition(".")
        return f"{module.partition('.')[0]}.{name}"


def _is_fragment(kind: type | str) -> bool:
    return isinstance(kind, type) and issubclass(kind, Fragment)


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


class Fragment:
    """A part of a module that is adapted as a layer is, and is no module of its own."""


@dataclass(frozen=True)
class StackedLayer(Fragment):
    """One of the layers whose arrays share a module, as ``vmap`` and ``scan`` over layers (or experts) want them.

    Attributes
    ----------
    module
        Its arrays have leading axes.
    index
        Where in them this layer lies.
    """

    module: Any
    index: Index


@dataclass(frozen=True)
class Site:
    """The place of one weight matrix in a model.

    Attributes
    ----------
    path
        Module path, with the index of the layer where it is one of a stack: ``"layers.query[3]"``.
    layer
        The object that holds the arrays.
    kind
        Of the layer.
    view
        How its weight, without the axes of the stack, is a matrix.
    index
        Place in the stack; ``()`` if there is none.
    """

    path: str
    layer: Any
    kind: Kind
    view: View
    index: Index = ()

    @property
    def blocks(self) -> int:
        """See `Kind.blocks`; one of them is a matrix of its own."""
        return self.kind.blocks(self.layer) if not self.index else 1

    def split(self) -> dict[str, Site]:
        """Return the site of each block by its path, ``path[i]``; of a single one, itself."""
        if self.blocks == 1:
            return {self.path: self}
        view, places = self.view.block, stack_paths(self.path, (self.blocks,))
        return {path: replace(self, path=path, view=view, index=index) for path, index in places.items()}

    @property
    def names(self) -> tuple[str, str]:
        """Names of weight and bias among the arrays of the layer."""
        return self.kind.weight, self.kind.bias

    def weight(self, arrays: Mapping[str, Array | None]) -> BaseWeight:
        """Return what the layer's own arrays, by name, are in paper orientation; the bias only of a linear layer."""
        W: Any = arrays.get(self.kind.weight)
        b = arrays.get(self.kind.bias)
        b = b if self.kind.linear else None
        if W.ndim != len(self.view.axes) + len(self.index):
            raise LayerError(
                f"{self.path}: its weight has shape {tuple(W.shape)}, where {len(self.view.axes)} axes are expected"
            )
        if self.index:
            W, b = W[self.index], None if b is None else b[self.index]
        return BaseWeight(
            self.view.matrix(W), b if b is None or b.ndim == 1 else namespace(b).reshape(b, (-1,))
        )


def arrays_of(
    weights: Mapping[str, BaseWeight], sites: Mapping[str, Site], present: Any
) -> dict[str, dict[str, Array]]:
    """Return the layers' own arrays for these weights, by path of the module and name: undoes `Site.weight`.

    Parameters
    ----------
    weights
        By path; of a stack, all of its layers. Without a bias, that of the layer is not among the results.
    sites
        By the same paths.
    present
        Function of a site to its present arrays, by name, for their shapes.
    """
    found: dict[str, dict[str, Array]] = {}
    for owner, own in by_owner(weights).items():
        site = sites[next(path for path in weights if owner_of(path) == owner)]
        shapes = {name: array.shape for name, array in present(site).items() if array is not None}
        axes = len(site.index)
        weight, bias = site.names
        rows = {weight: [site.view.array(base.W, shapes[weight][axes:]) for base in own.values()]}
        if all(base.b is not None for base in own.values()):
            rows[bias] = [base.b for base in own.values()]
        found[owner] = {
            name: _stacked(arrays, shapes[name])
            if site.index or arrays[0].shape != shapes[name]
            else arrays[0]
            for name, arrays in rows.items()
        }
    return found


def _stacked(arrays: list[Array], shape: tuple[int, ...]) -> Array:
    xp = namespace(arrays[0])
    return xp.reshape(xp.stack(arrays), tuple(shape))


# ---- paths of layers in stacks ---------------------------------------------------------------------


def stack_paths(path: str, leading: Index) -> dict[str, Index]:
    """Return the paths of the layers of a stack, ``path[i]`` or ``path[i,j]``, and where in it each lies."""
    places: Iterator[Index] = product(*map(range, leading))
    return {f"{path}[{','.join(map(str, index))}]": index for index in places}


def split_path(path: str) -> tuple[str, Index]:
    """Undo `stack_paths`: return the path of the module, and where in it a layer lies: ``()`` if not stacked."""
    found = re.fullmatch(r"(.*)\[([\d,]+)\]", path, flags=re.DOTALL)
    return (path, ()) if found is None else (found[1], tuple(int(part) for part in found[2].split(",")))


def owner_of(path: str) -> str:
    """Return the path of the module that holds the arrays of a layer."""
    return split_path(path)[0]


def by_owner(layers: Mapping[str, T]) -> dict[str, dict[Index, T]]:
    """Return what belongs to each layer by the path of its module, then by its place in the stack."""
    grouped: dict[str, dict[Index, T]] = {}
    for path, value in layers.items():
        owner, index = split_path(path)
        grouped.setdefault(owner, {})[index] = value
    return grouped
