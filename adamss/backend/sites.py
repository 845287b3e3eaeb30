"""Sites: where the weight matrices of a model are, and which kinds of layers have them.

A site is a layer, an index if the layer is one of a stack, and a view of its array as a matrix. A backend lists the
kinds of layers of its framework in a `Kinds` table. Support for another kind of layer is added by registering a
`Kind` in this table; every verb then accepts such layers.
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
"""Index of a layer in its stack, or ``()`` if the layer is not in a stack."""


class BaseWeight(NamedTuple):
    """Weight and bias of one layer in paper orientation.

    Attributes
    ----------
    W
        Weight (d, n), for d inputs and n outputs.
    b
        Bias (n,), or None.

    Examples
    --------
    >>> import numpy as np
    >>> from adamss.backend import NumpyLinear, get_backend
    >>> site = get_backend("numpy").site(NumpyLinear(np.ones((2, 3)), np.zeros(3)), "query")
    >>> base = site.weight({"weight": np.ones((3, 2)), "bias": np.zeros(3)})  # in the layer's own orientation
    >>> base.W.shape, base.b.shape
    ((2, 3), (3,))
    """

    W: Array
    b: Array | None


class Kind(ABC):
    """A kind of layer, which defines the array that is the weight, and how it is a matrix.

    A kind must satisfy this law, for any M: (d, q) and E: (q, n): the layer's own forward pass with ``W + M E`` in
    place of its weight equals ``forward(x) + spread(layer, project(layer, x, M), E)``.

    Examples
    --------
    A kind of layer that stores W itself, and not its transpose:

    >>> import numpy as np
    >>> from adamss.backend import Kind, Kinds, View
    >>> class Dense:
    ...     W, b = np.ones((2, 3)), None
    >>> class DenseKind(Kind):
    ...     classes, weight, bias = (Dense,), "W", "b"
    ...     def view(self, layer, path):
    ...         return View(rows=(0,), columns=(1,))
    >>> kind = Kinds(DenseKind()).of(Dense(), "query")
    >>> kind.linear, kind.view(Dense(), "query").matrix(Dense.W).shape
    (True, (2, 3))
    """

    classes: ClassVar[tuple[type | str, ...]]
    """Classes of layers that are of this kind, together with their subclasses.

    A class of a library that may not be installed is given by its name, such as
    ``"transformers.pytorch_utils.Conv1D"``.
    """

    weight: ClassVar[str] = "weight"
    """Name of the layer's attribute that is the weight."""

    bias: ClassVar[str] = "bias"
    """Name of the layer's attribute that is the bias. The attribute may be None."""

    linear: ClassVar[bool] = True
    """Whether the layer computes a product with W, so that a backend's kernel for linear layers can be used.

    It is set automatically: a kind is linear unless it is `in_place` or overrides `project` or `spread`."""

    in_place: ClassVar[bool] = False
    """Whether W + delta replaces W during the forward pass, because it is not known how this pass uses W.

    `project` and `spread` are then not used."""

    all_linear: ClassVar[bool] = True
    """Whether ``targets="all-linear"`` includes such layers. A kind that is not linear must set it to True itself."""

    lora: ClassVar[LoraForm | None] = "linear"
    """Form in which PEFT's LoRA stores an update of such a layer, or None if it has none.

    A kind that is not linear must set it; otherwise it is None."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.linear = not cls.in_place and cls.project is Kind.project and cls.spread is Kind.spread
        if not cls.linear:
            cls.all_linear = bool(vars(cls).get("all_linear", False))
            cls.lora = None if cls.lora == "linear" else cls.lora

    def lora_refusal(self, layer: Any) -> str | None:
        """Return the feature of a layer that PEFT's LoRA would ignore, as a noun; None if there is none."""
        return None

    @abstractmethod
    def view(self, layer: Any, path: str) -> View:
        """Return the view of the layer's weight as a matrix.

        Parameters
        ----------
        layer
            Layer of one of `classes`.
        path
            Name of the layer in messages.

        Raises
        ------
        LayerError
            If this layer cannot be adapted. The message names `path` and says why.
        """

    def defines(self, layer: type, name: str) -> bool:
        """Return whether the class `layer` inherits its method `name` from one of `classes` without overriding it."""
        classes = [one for one in layer.__mro__ if one in self.classes or _full_name(one) in self.classes]
        return getattr(layer, name) in [getattr(one, name) for one in classes]

    def leading(self, layer: Any) -> Index:
        """Return the lengths of the leading axes of a stack of layers that share one array; ``()`` for one layer."""
        return ()

    def blocks(self, layer: Any) -> int:
        """Return the number of blocks of columns of W that are separate matrices, such as those of experts.

        The blocks are the entries along the first axis of the weight. Each block is decomposed and segmented by
        itself. Most kinds of layers have one block.
        """
        return 1

    def project(self, layer: Any, x: Array, M: Array) -> Array:
        """Return ``z = x M``, the coordinates of the layer's input in the q directions of M."""
        return x @ M

    def spread(self, layer: Any, z: Array, E: Array) -> Array:
        """Return the update ``z E`` in the shape of the layer's output."""
        return z @ E


class LinearKind(Kind):
    """A layer ``y = x weight^T + bias`` with a weight (n, d)."""

    def view(self, layer: Any, path: str) -> View:
        """Return the view that transposes the weight."""
        return View(rows=(1,), columns=(0,))


class Kinds:
    """Table of the kinds of layers that a backend can adapt.

    Parameters
    ----------
    kinds
        Kinds of the framework itself.
    """

    def __init__(self, *kinds: Kind) -> None:
        self._kinds: list[Kind] = []
        for kind in kinds:
            self.register(kind)

    def register(self, kind: Kind) -> Kind:
        """Add a kind for this process. For its classes it replaces any kind registered earlier.

        Raises
        ------
        BackendError
            If the argument is not a `Kind` with classes.
        """
        if not isinstance(kind, Kind) or not getattr(kind, "classes", ()):
            raise BackendError(f"a kind of layer must be an adamss.backend.Kind with classes, found {kind!r}")
        self._kinds.append(kind)
        return kind

    def unregister(self, kind: Kind) -> None:
        """Remove a registered kind. Its classes then have the kind again that they had before."""
        self._kinds = [other for other in self._kinds if other is not kind]

    def find(self, layer: Any) -> Kind | None:
        """Return the kind of a layer, that of the nearest class among its bases; None if no class has a kind."""
        last = {one: kind for kind in self._kinds for one in kind.classes}
        names = (name for one in type(layer).__mro__ for name in (one, _full_name(one)))
        return next((last[name] for name in names if name in last), None)

    def of(self, layer: Any, path: str) -> Kind:
        """Return the kind of a layer.

        Raises
        ------
        LayerTypeError
            If the layer is of no known kind. The message names `path` and the classes that can be adapted.
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
    """A part of a module that is adapted like a layer, but is not a module itself."""


@dataclass(frozen=True)
class StackedLayer(Fragment):
    """One layer of a stack, which is a module that holds the arrays of several layers (or experts).

    ``vmap`` and ``scan`` over layers need such modules.

    Attributes
    ----------
    module
        Module whose arrays have leading axes for the layers of the stack.
    index
        Index of this layer along the leading axes.

    Examples
    --------
    The fourth of five layers whose weights are one array:

    >>> import numpy as np
    >>> from types import SimpleNamespace
    >>> from adamss.backend import LinearKind, Site, StackedLayer, View
    >>> stack = SimpleNamespace(weight=np.zeros((5, 3, 2)), bias=None)
    >>> layer = StackedLayer(stack, index=(3,))
    >>> site = Site("layers[3]", layer.module, LinearKind(), View(rows=(1,), columns=(0,)), layer.index)
    >>> site.weight(vars(stack)).W.shape
    (2, 3)
    """

    module: Any
    index: Index


@dataclass(frozen=True)
class Site:
    """The place of one weight matrix in a model.

    Attributes
    ----------
    path
        Module path. For a layer of a stack it ends with the index: ``"layers.query[3]"``.
    layer
        Object that holds the arrays.
    kind
        Kind of the layer.
    view
        View of the weight, without the axes of the stack, as a matrix.
    index
        Index in the stack, or ``()`` if the layer is not in a stack.

    Examples
    --------
    >>> import numpy as np
    >>> from adamss.backend import NumpyLinear, get_backend
    >>> site = get_backend("numpy").site(NumpyLinear(np.ones((2, 3))), "query")
    >>> site.path, site.names, site.view
    ('query', ('weight', 'bias'), View(rows=(1,), columns=(0,)))
    """

    path: str
    layer: Any
    kind: Kind
    view: View
    index: Index = ()

    @property
    def blocks(self) -> int:
        """Number of blocks (see `Kind.blocks`). The site of a single block or of a layer in a stack has one."""
        return self.kind.blocks(self.layer) if not self.index else 1

    def split(self) -> dict[str, Site]:
        """Return the site of each block by its path ``path[i]``. A site with one block is returned as it is."""
        if self.blocks == 1:
            return {self.path: self}
        view, places = self.view.block, stack_paths(self.path, (self.blocks,))
        return {path: replace(self, path=path, view=view, index=index) for path, index in places.items()}

    @property
    def names(self) -> tuple[str, str]:
        """Names of the weight and the bias among the arrays of the layer."""
        return self.kind.weight, self.kind.bias

    def weight(self, arrays: Mapping[str, Array | None]) -> BaseWeight:
        """Return the weight and bias in paper orientation, from the layer's own arrays by name.

        The bias is None unless the layer is linear.

        Raises
        ------
        LayerError
            If the weight has the wrong number of axes.
        """
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
    """Undo `Site.weight`: return the layers' own arrays for weights in paper orientation.

    Parameters
    ----------
    weights
        Weights and biases by path. For a stack, all of its layers must be given. If a bias is None, the result has no
        array for it.
    sites
        Sites by the same paths.
    present
        Function that maps a site to its present arrays by name. Only their shapes are used.

    Returns
    -------
    dict
        Arrays by path of the module, and then by name.
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
    """Return the path of each layer of a stack, such as ``path[i]`` or ``path[i,j]``, with the index of the layer."""
    places: Iterator[Index] = product(*map(range, leading))
    return {f"{path}[{','.join(map(str, index))}]": index for index in places}


def split_path(path: str) -> tuple[str, Index]:
    """Undo `stack_paths`: return the path of the module and the index of the layer, or ``()`` if it has none."""
    found = re.fullmatch(r"(.*)\[([\d,]+)\]", path, flags=re.DOTALL)
    return (path, ()) if found is None else (found[1], tuple(int(part) for part in found[2].split(",")))


def owner_of(path: str) -> str:
    """Return the path of the module that holds the arrays of a layer."""
    return split_path(path)[0]


def by_owner(layers: Mapping[str, T]) -> dict[str, dict[Index, T]]:
    """Group values by the path of the module that holds the layer, and then by the index in the stack."""
    grouped: dict[str, dict[Index, T]] = {}
    for path, value in layers.items():
        owner, index = split_path(path)
        grouped.setdefault(owner, {})[index] = value
    return grouped
