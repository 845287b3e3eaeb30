"""What a framework must supply so that `adamss` works on its arrays and its models.

A backend is a handful of primitives. Everything that is not tied to one framework (matching of targets,
decomposition, segmentation, initial values, the file format, the checks) is written once, in
`adamss.core` and `adamss.verbs`, on top of them.

Models are handled in the style that fits both frameworks whose models are mutated in place and those whose
models are trees: whatever changes a model returns it. Either every change of a call is made or none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

from adamss.core import Factors, Merged, delta, only
from adamss.core._array import Array, device, namespace
from adamss.errors import StateError

if TYPE_CHECKING:
    from adamss.backend.tensors import StoredTensor
    from adamss.config import AdamssConfig

__all__ = [
    "Adaptation",
    "Array",
    "Backend",
    "BaseWeight",
    "Compute",
    "Division",
    "Each",
    "Model",
    "Module",
    "batches",
    "without_folded",
]

Model: TypeAlias = Any
"""A model of the framework."""

Module: TypeAlias = Any
"""One module (layer, node) of a model."""


class BaseWeight(NamedTuple):
    """Weight of one layer in paper orientation, without its adapter.

    Attributes
    ----------
    W
        (d, n): d inputs, n outputs.
    b
        Bias (n,), or None.
    """

    W: Array
    b: Array | None


def without_folded(base: BaseWeight, factors: Factors, folded: Array) -> BaseWeight:
    """Return what is left of a consolidated weight when the update of its folded subspaces is subtracted again.

    Parameters
    ----------
    base
        Consolidated weight and bias.
    factors
        Factors of the layer.
    folded
        (K,) booleans.

    Returns
    -------
    BaseWeight
        W0 and its bias, up to rounding.
    """
    xp = namespace(base.W)
    update, d = delta(only(factors, folded)), base.W.shape[0]
    b = base.b
    if b is not None and update.shape[0] > d:
        b = b - xp.astype(update[d, :], b.dtype)
    return BaseWeight(base.W - xp.astype(update[:d, :], base.W.dtype), b)


@dataclass(frozen=True)
class Adaptation:
    """What is attached to a model.

    Attributes
    ----------
    config
        The settings it was attached with.
    layers
        Factors of each adapted layer, by module path, in the order of the model.
    shapes
        (d, n) of the weight of each, in paper orientation.
    saved
        Module paths of ``modules_to_save``.
    merged
        Whether the updates are folded into the weights.
    base_kept
        Whether the base weights can be given back: False after ``merge(keep_base=False)``.
    disabled
        Whether the model is switched off at the moment, by `Backend.disabled`.
    folded
        (K,) booleans by module path: the frozen subspaces that `Backend.consolidate` has folded into the weights.
        Empty if there are none.
    """

    config: AdamssConfig
    layers: Mapping[str, Factors]
    shapes: Mapping[str, tuple[int, int]]
    saved: tuple[str, ...] = ()
    merged: bool = False
    base_kept: bool = True
    disabled: bool = False
    folded: Mapping[str, Array] = field(default_factory=dict)


Each = Callable[[Callable[[str], Any], Iterable[str]], Iterable[Any]]
"""What `map` does for one function and one argument; maybe in several threads."""

Compute = Callable[[Mapping[str, BaseWeight], Each], Mapping[str, Factors]]
"""Return the factors of layers of one shape, what there is to do for each of them alone by the second argument."""

COLUMNS = 8192
"""Columns of weights that are segmented together, which takes some hundred numbers for each."""


class Division:
    """How the layers of a model are divided, among threads and processes; this one is for one of each."""

    def factors(
        self, weights: Mapping[str, BaseWeight], compute: Compute, *, settings: Callable[[], str]
    ) -> dict[str, Factors]:
        """Return the factors of all layers, in the order of the weights.

        One layer is decomposed after the other, so that no more memory is needed than for one. A backend may take
        a few small ones at a time.

        Parameters
        ----------
        weights
            Base weight of each layer by module path.
        compute
            Return the factors of layers alike, such as those of one of the `batches`: of each layer the same ones,
            to the bit where the framework can, whatever layers are with it, on every process.
        settings
            Return what names all that `compute` depends on besides.
        """
        found: dict[str, Factors] = {}
        for batch in batches(weights):
            found |= compute(batch, map)
        return {path: found[path] for path in weights}


def batches(weights: Mapping[str, BaseWeight]) -> Iterator[dict[str, BaseWeight]]:
    """Divide layers into groups of one shape, of which as many are segmented together as have `COLUMNS` columns."""
    alike: dict[Any, dict[str, BaseWeight]] = {}
    for path, base in weights.items():
        kind = (tuple(base.W.shape), base.W.dtype, str(device(base.W)), base.b is None)
        alike.setdefault(kind, {})[path] = base
    for group in alike.values():
        layers = iter(group.items())
        size = max(1, COLUMNS // max(1, next(iter(group.values())).W.shape[1]))
        while batch := dict(islice(layers, size)):
            yield batch


class Backend(ABC):
    """The primitives of one framework.

    The laws that bind them are given with each as an equation; ``==`` is meant to the bit. Below,
    ``f`` are factors, ``m`` is a model, ``W, b`` a layer's weight and bias in paper orientation.
    """

    name: ClassVar[str]
    """Name under which the backend is registered, such as ``"torch"``."""

    # ---- arrays -------------------------------------------------------------------------------------

    @abstractmethod
    def linear(self, x: Array, weight: Array, bias: Array | None, factors: Factors) -> Array:
        """Return ``x @ (weight + delta(factors)) + bias``, differentiable in x, B and C.

        ``linear(x, W, b, f) ~ core.linear(x, W, b, f)`` within the dtype's tolerance, gradients
        likewise ``~ core.linear_vjp``; with C = 0, ``linear(x, W, b, f) == x @ W + b``.

        Parameters
        ----------
        x
            Inputs (..., d).
        weight, bias
            (d, n) and (n,) or None.
        factors
            Factors of the layer.
        """

    @abstractmethod
    def to_stored(self, array: Array) -> StoredTensor:
        """Return the bytes of an array: ``from_stored(to_stored(a), like=a) == a``."""

    @abstractmethod
    def from_stored(
        self, stored: StoredTensor, *, like: Array | None = None, dtype: str | None = None
    ) -> Array:
        """Return stored bytes as an array on the device of `like`.

        Parameters
        ----------
        stored
            Bytes, dtype and shape.
        like
            An array on the wanted device; None for the framework's default device.
        dtype
            Name of the wanted dtype, such as ``"float32"``; None for the stored one.
        """

    @abstractmethod
    def dtype_name(self, array: Array) -> str:
        """Return the name of the dtype of an array: ``"float32"``, ``"bfloat16"``, ``"int64"``, ..."""

    @abstractmethod
    def cast(self, array: Array, dtype: str) -> Array:
        """Return the array in the dtype of that name: ``dtype_name(cast(a, t)) == t``."""

    def has_dtype(self, dtype: str) -> bool:
        """Return whether the framework has a dtype of that name."""
        return True

    def decomposition_input(self, W: Array) -> Array:
        """Return the array on which a weight is decomposed and segmented, of the same values.

        W itself, unless the framework would compile every operation for every new shape. What is computed
        from it goes through `cast` into `insert`, and both take arrays of its kind too.

        Parameters
        ----------
        W
            (d, n), or (d + 1, n) with the bias as one more row.
        """
        return W

    @abstractmethod
    def versions(self) -> Mapping[str, str]:
        """Return the version of the framework and of what lies between it and us, for the file."""

    def exact(self) -> AbstractContextManager[object]:
        """Return a context in which matrix products have full precision and record no gradient.

        In it, ``a @ b`` of float32 arrays is not rounded to TF32 or bfloat16, whatever the user has set.
        """
        return nullcontext()

    # ---- several processes ----------------------------------------------------------------------------

    def whole(self, array: Array) -> Array:
        """Return an array with all its entries, where a process holds only a part; all of them call this.

        Only `weight`, `arrays` and `adaptation` return such arrays; their ``shape`` is that of the whole.
        """
        return array

    def spread(self, array: Array, like: Array) -> Array:
        """Return a whole array in the form that `like` has: ``whole(spread(a, like=b)) == a``.

        Parameters
        ----------
        array
            Equal on all processes.
        like
            Of the same shape.
        """
        return array

    def once(self, model: Model, action: Callable[[], None]) -> None:
        """Call `action`, on one process only where several hold parts of the model; all of them call this.

        An error of it is raised on all.
        """
        action()

    def divided(self, model: Model, *, enabled: bool) -> AbstractContextManager[Division]:
        """Return a context in which the processes of a program divide the layers of a model among them.

        An error within it is raised on all of them. A backend need not have this: each process does all then.

        Parameters
        ----------
        model
            The model that each of them holds, or holds a part of.
        enabled
            False: this process is alone.
        """
        return nullcontext(Division())

    # ---- models -------------------------------------------------------------------------------------

    @abstractmethod
    def handles(self, model: Model) -> bool:
        """Return whether this is a model of the framework."""

    @abstractmethod
    def modules(self, model: Model) -> dict[str, Module]:
        """Return the modules by their paths, as ``targets`` spell them, in the order of the model.

        A module that appears in several places has several paths. Adapters are not among them.
        """

    @abstractmethod
    def weight(self, module: Module, path: str) -> BaseWeight:
        """Return the base weight of a layer, also while the update is merged into it.

        ``weight(modules(attach(m))[path]) == weight(modules(m)[path])``.

        Raises
        ------
        LayerTypeError, LayerError
            If the module has no weight that can be adapted, or its forward is never called; the message
            names `path`.
        StateError
            If the base weight was dropped by ``merge(keep_base=False)``. After ``consolidate(keep_base=False)`` it is
            what is left when the folded update is subtracted again, up to rounding.
        """

    def has_values(self, array: Array) -> bool:
        """Return whether an array of `weight` has values, and not only a shape and a dtype until it is loaded.

        `load` can do without, if told so; for all else the layer is refused.
        """
        return True

    @abstractmethod
    def arrays(self, module: Module) -> dict[str, Array]:
        """Return all the named arrays of a module, as ``modules_to_save`` stores them.

        Names and orientation are PyTorch's, so that a head travels between frameworks: ``weight`` (n, d) and
        ``bias`` (n,) of a linear layer, dots between the names of nested modules.
        """

    def shared(self, model: Model, saved: Iterable[str]) -> Mapping[str, frozenset[str]]:
        """Return by what other names the tensors of these modules are known in the model (tied embeddings).

        Names are as in a file: path of the module and name within it. An empty set: there is no other, in a model of
        any framework. A tensor that is missing has no other name here, where models may tie by what they compute.
        The default is for frameworks in which two modules never hold one tensor.

        Parameters
        ----------
        model
            Adapted or not.
        saved
            Module paths of ``modules_to_save``.
        """
        return {}

    @abstractmethod
    def insert(
        self,
        model: Model,
        layers: Mapping[str, Factors],
        *,
        config: AdamssConfig,
        saved: Mapping[str, Mapping[str, Array] | None],
    ) -> Model:
        """Return the model with adapters on `layers` and everything else but them and `saved` frozen.

        ``adaptation(insert(m, layers, config=c, saved=s)).layers == layers``, and the model computes
        `linear` in these layers.

        Parameters
        ----------
        model
            A model without adapters.
        layers
            Factors by module path.
        config
            Stored with the model.
        saved
            Paths of ``modules_to_save``, and the values that they get, as from `arrays` (None: as they are).
        """

    @abstractmethod
    def adaptation(self, model: Model) -> Adaptation | None:
        """Return what is attached to the model, or None."""

    @abstractmethod
    def parameters(self, model: Model) -> Any:
        """Return what an optimiser gets, in the framework's own form: B and C of each layer, and saved modules."""

    @abstractmethod
    def set_active(self, model: Model, active: Mapping[str, Array]) -> Model:
        """Return the model with other masks: ``adaptation(set_active(m, a)).layers[path].active == a[path]``.

        Nothing that is compiled may depend on the values of a mask.

        Parameters
        ----------
        model
            An adapted model.
        active
            (K,) booleans by module path; a layer that is not named keeps its mask. None of `Adaptation.folded` is
            among them.
        """

    @abstractmethod
    def remove(self, model: Model, *, restore: bool) -> Model:
        """Return the model without adapters.

        Parameters
        ----------
        model
            An adapted model.
        restore
            Give the base values back: ``remove(insert(m, ...), restore=True) == m``, saved modules included; only
            while the base weights are kept. False, only while merged: weights and saved modules stay as they are.
        """

    @abstractmethod
    def fold(self, model: Model, merged: Mapping[str, Merged], *, keep_base: bool) -> Model:
        """Return the model with these weights in the place of the base weights, and no update added."""

    @abstractmethod
    def unfold(self, model: Model) -> Model:
        """Return the model as before `fold` and `consolidate`: ``unfold(fold(m, ...)) == m``."""

    def consolidate(
        self, model: Model, merged: Mapping[str, Merged], folded: Mapping[str, Array], *, keep_base: bool
    ) -> Model:
        """Return the model with these weights, and without these subspaces in what its adapters compute.

        The output is that of `model` up to rounding, and so are the gradients of the subspaces that are left;
        ``adaptation(consolidate(m, ...)).layers == adaptation(m).layers``. `unfold` undoes it. A backend need not
        have it.

        Parameters
        ----------
        model
            An adapted model that is not merged.
        merged
            By module path, the base weight with the update of the folded subspaces.
        folded
            By module path, (K,) booleans; all are frozen.
        keep_base
            Whether the base weight is kept.
        """
        raise StateError(f"consolidate: the backend {self.name!r} does not have it; leave the model as it is")

    @abstractmethod
    def disabled(self, model: Model) -> AbstractContextManager[Model]:
        """Return a context whose value computes what the base model computes; it may be entered again inside."""
