"""The Flax NNX backend: layers are changed in place and stay the same objects.

An adapted layer keeps its variables and their paths. Its class becomes a subclass that adds the update to the
output, and its child `adamss`, a `LayerBank`, holds its `Adapter` objects by name: ``layer.adamss.default``. B and C
of trained adapters are `AdamssParam`, a kind of `nnx.LoRAParam`, so that ``nnx.Optimizer(model, tx,
wrt=nnx.LoRAParam)`` and libraries built on that filter train them. All other variables of an adapter are plain
`nnx.Variable`.
"""

from __future__ import annotations

import inspect
import math
import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from functools import lru_cache
from itertools import islice
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

from adamss.errors import MissingBackendError

try:
    from flax import nnx
except ImportError as error:
    raise MissingBackendError("adamss_jax.flax needs Flax: pip install 'adamss[flax]'") from error

import jax
import jax.numpy as jnp
import numpy as np
from flax.nnx.nn import dtypes
from jax import Array

from adamss.backend import Kind, Kinds, Site, StackedLayer, Stores, View
from adamss.backend.bank import scaled
from adamss.backend.sites import stack_paths
from adamss.backend.tensors import join_path
from adamss.core import Factors, contract, expand, only
from adamss.errors import AdamssWarning, LayerError, TargetError
from adamss_jax.arrays import HostCopies, LeafStore, placed_as, restored
from adamss_jax.functional import with_constants
from adamss_jax.kinds import ExampleKind, MatrixKind, Rest, must_be_tried, with_updates
from adamss_jax.models import Attached, JaxModels, Record, owner_prefix
from adamss_jax.parts import Part

__all__ = ["AdamssParam", "Adapter", "LayerBank", "NnxBackend", "kinds", "stores"]

CHILD = "adamss"
"""Name of the layer's attribute that holds its `LayerBank`."""

FUNCTIONS = (None, jax.lax.dot_general, jax.lax.conv_general_dilated, dtypes.promote_dtype)
"""Functions that Flax's layers compute with by default."""

NOT_STORED = (nnx.RngState, nnx.Cache, nnx.Intermediate)
"""Variables that are not weights, so that ``modules_to_save`` does not store them."""


# ---- kinds of layers, and stores for their weights --------------------------------------------------


class DeclaredKind(Kind):
    """A kind whose layers declare the shape of their weight; further axes in front belong to a stack of layers."""

    classes: ClassVar[tuple[type, ...]]
    weight: ClassVar[str] = "kernel"

    @abstractmethod
    def declared(self, layer: Any) -> tuple[int, ...]:
        """Return the shape that a layer declares for the weight of a single layer."""

    @abstractmethod
    def axes(self, layer: Any, path: str) -> View:
        """Return `view` for a single layer."""

    def view(self, layer: Any, path: str) -> View:
        kept = getattr(layer, self.weight)
        if not isinstance(kept, nnx.Variable):
            raise LayerError(
                f"{path}: its {self.weight} is a {type(kept).__module__.partition('.')[0]}.{type(kept).__name__}, "
                "which no store here can read; adapt the model before it is quantised"
            )
        view, declared = self.axes(layer, path), self.declared(layer)
        stack, shape = self.leading(layer), self._shape(layer)
        if stack and shape != stack + declared:
            raise LayerError(
                f"{path}: its {self.weight} has shape {shape}, where the layer says {declared}; the axes of a stack "
                "of layers must come first"
            )
        return view

    def leading(self, layer: Any) -> tuple[int, ...]:
        shape = self._shape(layer)
        return shape[: max(len(shape) - len(self.declared(layer)), 0)]

    def _shape(self, layer: Any) -> tuple[int, ...]:
        kept = getattr(layer, self.weight)
        return tuple(getattr(kept.get_value(), "shape", ())) if isinstance(kept, nnx.Variable) else ()


class Linear(DeclaredKind, MatrixKind):
    """`nnx.Linear`."""

    classes: ClassVar[tuple[type, ...]] = (nnx.Linear,)

    def declared(self, layer: Any) -> tuple[int, ...]:
        return layer.in_features, layer.out_features

    def axes(self, layer: Any, path: str) -> View:
        return View(rows=(0,), columns=(1,))


class LinearGeneral(Linear):
    """`nnx.LinearGeneral`, which contracts a kernel (*in, *out) with some axes of the input."""

    classes = (nnx.LinearGeneral,)

    def declared(self, layer: Any) -> tuple[int, ...]:
        return (*layer.in_features, *layer.out_features)

    def axes(self, layer: Any, path: str) -> View:
        if layer.batch_axis:
            raise LayerError(
                f"{path}: its batch_axis makes it many matrices, not one; leave it out of targets"
            )
        d, n = len(layer.in_features), len(layer.out_features)
        return View(rows=tuple(range(d)), columns=tuple(range(d, d + n)))

    def leading(self, layer: Any) -> tuple[int, ...]:
        return () if layer.batch_axis else super().leading(layer)

    def inputs(self, layer: Any, x: Array, /, *args: Any, **kwargs: Any) -> Array:
        # Flax pairs the contracted axes with the kernel's in the order in which the input has them.
        axes = sorted(axis % x.ndim for axis in layer.axis)
        return _flat(jnp.moveaxis(x, axes, range(-len(axes), 0)), len(axes))

    def outputs(self, layer: Any, u: Array, /, *args: Any, **kwargs: Any) -> Array:
        return jnp.reshape(u, (*u.shape[:-1], *layer.out_features))


class Einsum(Linear):
    """`nnx.Einsum`, if its equation is a product with one matrix."""

    classes = (nnx.Einsum,)

    def declared(self, layer: Any) -> tuple[int, ...]:
        return tuple(layer.kernel_shape)

    def axes(self, layer: Any, path: str) -> View:
        if layer.einsum_str is None:
            raise LayerError(
                f"{path}: its equation is given at every call, so the layer has no matrix of its own"
            )
        return _equation(layer.einsum_str, path).view

    def inputs(
        self, layer: Any, x: Array, /, einsum_str: str | None = None, *args: Any, **kwargs: Any
    ) -> Array:
        equation = self._called_with(layer, einsum_str)
        return _flat(jnp.einsum(equation.gather, x), len(equation.view.rows))

    def outputs(
        self, layer: Any, u: Array, /, einsum_str: str | None = None, *args: Any, **kwargs: Any
    ) -> Array:
        equation = self._called_with(layer, einsum_str)
        sizes = (layer.kernel_shape[axis] for axis in equation.view.columns)
        return jnp.einsum(equation.scatter, jnp.reshape(u, (*u.shape[:-1], *sizes)))

    @staticmethod
    def _called_with(layer: Any, einsum_str: str | None) -> _Equation:
        """Return the equation of a call; one given by the caller must read the kernel as the same matrix."""
        own = _equation(layer.einsum_str, "an adapted nnx.Einsum")
        if einsum_str is None:
            return own
        equation = _equation(einsum_str, "an adapted nnx.Einsum")
        if equation.view != own.view:
            raise LayerError(
                f"an adapted nnx.Einsum was called with {einsum_str!r}, in which its kernel is another matrix than "
                "in the equation that it was attached with; merge, or leave it out of targets"
            )
        return equation


def _flat(x: Array, axes: int) -> Array:
    """Merge the last axes of an array into one."""
    return jnp.reshape(x, (*x.shape[:-axes], math.prod(x.shape[-axes:])))


class _Equation(NamedTuple):
    """An einsum equation that multiplies its first operand by one matrix, the second operand.

    Attributes
    ----------
    view
        View of the second operand as a matrix.
    gather
        Equation that moves the contracted axes of the first operand to the end, in the order of the matrix rows.
    scatter
        Equation that moves the axes of the matrix columns from the end to their places in the result.
    """

    view: View
    gather: str
    scatter: str


@lru_cache
def _equation(equation: str, path: str) -> _Equation:
    """Parse an einsum equation as a product with one matrix.

    Raises
    ------
    LayerError
        If the equation is no such product, because an axis of the kernel occurs twice, is kept as a batch axis, or is
        summed without the input. The message names `path`.
    """
    operands, result = equation.replace(" ", "").split("->")
    x, kernel = operands.split(",")
    contracted = [letter for letter in kernel if letter in x and letter not in result]
    outputs = [letter for letter in result if letter in kernel and letter not in x]
    if (
        "." in kernel
        or len(set(kernel)) != len(kernel)
        or len(contracted) + len(outputs) != len(kernel)
        or not contracted
        or not outputs
    ):
        raise LayerError(
            f"{path}: the equation {equation!r} is not a product of the input with one matrix (each axis of the "
            "kernel must be summed with the input, or kept in the output); leave it out of targets"
        )
    kept = [letter for letter in x.replace("...", ".") if letter == "." or letter in result]
    batch = "".join(kept).replace(".", "...")
    return _Equation(
        View(*(tuple(kernel.index(letter) for letter in letters) for letters in (contracted, outputs))),
        f"{x}->{batch}{''.join(contracted)}",
        f"{batch}{''.join(outputs)}->{result}",
    )


class Conv(DeclaredKind, ExampleKind):
    """`nnx.Conv` without groups, which multiplies each window of the input by one matrix.

    ``z = x M`` is computed by the layer's own convolution, with q filters. The rows of the matrix have the order of
    PyTorch's convolutions, (inputs, *window), so that a file fits both.
    """

    classes = (nnx.Conv,)

    def declared(self, layer: Any) -> tuple[int, ...]:
        return tuple(layer.kernel_shape)

    def axes(self, layer: Any, path: str) -> View:
        if layer.feature_group_count != 1:
            raise LayerError(
                f"{path}: its {layer.feature_group_count} groups (feature_group_count) multiply by one matrix each, "
                "so the layer has no single matrix. Leave it out of targets; convolutions without groups can be "
                "adapted"
            )
        # The mask must keep or drop each row as a whole, or the masked update is not a product M E. It is compared in
        # NumPy, which works on concrete values even while JAX traces.
        mask = None if isinstance(layer.mask, jax.core.Tracer | None) else np.asarray(layer.mask)
        if mask is not None and (mask != mask[..., :1]).any():
            raise LayerError(
                f"{path}: its mask hides inputs from some outputs and not from others, so its update is not a "
                "product of two factors. Leave it out of targets; layers whose mask is the same for all outputs can "
                "be adapted"
            )
        window = len(layer.kernel_size)
        return View(rows=(window, *range(window)), columns=(window + 1,))

    def project(self, layer: Any, x: Array, M: Array) -> Array:
        kernel = jnp.reshape(M, (layer.in_features, *layer.kernel_size, M.shape[1]))
        kernel = jnp.moveaxis(kernel, 0, -2)
        if layer.mask is not None:
            kernel = kernel * jnp.asarray(layer.mask[..., :1], kernel.dtype)
        return _computed_with(nnx.Conv, layer, x, kernel=kernel, bias=None, use_bias=False, mask=None)

    def rows(self, layer: Any, x: Array) -> tuple[int, ...]:
        return x.shape[: -len(layer.kernel_size) - 1]

    def example(self, layer: Any) -> Array:
        # Make the input larger than the window in every dimension, so that no window consists of padding only.
        sizes = [8 * size for size in layer.kernel_size]
        return jax.random.normal(jax.random.key(0), (1, *sizes, layer.in_features))


class Embed(DeclaredKind, ExampleKind):
    """`nnx.Embed`, which looks up rows by their ids: the product of one-hot vectors and one matrix."""

    classes = (nnx.Embed,)
    weight = "embedding"

    def declared(self, layer: Any) -> tuple[int, ...]:
        return layer.num_embeddings, layer.features

    def axes(self, layer: Any, path: str) -> View:
        return View(rows=(0,), columns=(1,))

    def project(self, layer: Any, x: Array, M: Array) -> Array:
        return _computed_with(nnx.Embed, layer, x, embedding=M, features=M.shape[1])

    def rows(self, layer: Any, x: Array) -> tuple[int, ...]:
        return x.shape

    def example(self, layer: Any) -> Array:
        return jnp.arange(layer.num_embeddings)


def _computed_with(of: Any, layer: Any, x: Array, **attributes: Any) -> Array:
    """Call the forward of a class on an input, with the settings of a layer but other arrays."""
    z: Array = of.__call__(SimpleNamespace(**vars(layer) | attributes), x)
    return z


kinds = Kinds(Linear(), LinearGeneral(), Einsum(), Conv(), Embed())
"""Kinds of layers that can be adapted; `Kinds.register` adds one."""

REFUSED: dict[type, str] = {
    nnx.ConvTranspose: "a transposed convolution, whose windows overlap in the output, so that its update is not one "
    "product with a matrix; nnx.Conv and the layers before and after it can be adapted",
    nnx.LoRA: "which is an adapter itself; adapt its base_module, or fold it into that one first",
}
"""Layers that have weights but cannot be adapted, and the reason."""


class VariableStore(LeafStore):
    """A store for weights that are variables of the layer; a write keeps the variable and changes its value."""

    def read(self, layer: Any, name: str) -> Array:
        array: Array = getattr(layer, name).get_value()
        return array

    def write(self, layer: Any, name: str, value: Array) -> None:
        variable = getattr(layer, name)
        variable.set_value(placed_as(value, variable.get_value()))


stores = Stores(VariableStore())
"""Stores of the weights that can be adapted; `Stores.register` adds one."""


# ---- what is attached to a layer --------------------------------------------------------------------


class AdamssParam(nnx.LoRAParam[Any]):
    """A trained variable of an adapted model: a factor B or C, or a parameter of ``modules_to_save``."""


class Adapter(nnx.Module):
    """The factors of one adapter for one layer, or for one stack of layers.

    Parameters
    ----------
    factors
        Factors of the layer.

    Attributes
    ----------
    B, C
        Trained factors, (P, q) and (r, n): `AdamssParam` while they are trained, else `nnx.Variable`.
    A, labels, ranks, active
        Variables (`nnx.Variable`) with the other fields of `adamss.core.Factors`.
    order
        Order of the products, one of `adamss.core.cost.ORDERS`. None means the cheaper one; see `adamss_jax.update`.
        The order is a static constant of compiled functions, so a change compiles them again. Files do not store it.
    in_weight
        Variables by the fields of `Part` while the kernel holds an update, else None. They are in an `nnx.Dict`,
        because Flax loads a Variable in the place of None, but not a Dict. A state whose kernel holds the update thus
        cannot be loaded into a model that would add the update a second time.
    elsewhere
        Variables with the adapter's values of ``modules_to_save`` while it is inactive; only one of its layers has
        them, the others None.
    through
        Variable that says which rows of a batch go through the adapter, (rows,) booleans, while the rows are routed.
    place
        Path of the layer while rows are routed, for messages. Otherwise it is None, so that equal layers are compiled
        once.
    """

    in_weight: nnx.Dict[Any] | None = None
    elsewhere: nnx.Dict[Any] | None = None
    through: nnx.Variable[Any] | None = None
    place: str | None = None

    def __init__(self, factors: Factors) -> None:
        for name, array in factors._asdict().items():
            setattr(self, name, nnx.Variable(array))
        self.order: str | None = None

    def factors(self) -> Factors:
        """Return the factors in canonical form."""
        return restored(Factors(*(getattr(self, name).get_value() for name in Factors._fields)))

    @property
    def part(self) -> Part:
        """Return which subspaces the kernel holds, and which are computed."""
        return restored(Part(**_values(self.in_weight)))

    @property
    def kept(self) -> dict[str, Array]:
        """Return the values of ``modules_to_save`` that this layer keeps for the adapter."""
        return _values(self.elsewhere)

    @property
    def gate(self) -> Array:
        """Return which rows of a batch go through the adapter."""
        assert self.through is not None
        gate: Array = self.through.get_value()
        return gate

    def write(self, name: str, value: Any) -> None:
        """Set a field of `Factors`, or `part`, `kept`, `gate` or `place`."""
        if name in ("gate", "place"):
            attribute = "through" if name == "gate" else name
            if attribute in vars(self):
                delattr(self, attribute)
            if value is not None:
                setattr(self, attribute, nnx.Variable(value) if name == "gate" else value)
            return
        if name in Factors._fields:
            getattr(self, name).set_value(value)
            return
        name, arrays = ("in_weight", value._asdict()) if name == "part" else ("elsewhere", value)
        if name in vars(self):
            # NNX refuses to assign None to an attribute that holds variables, and the reverse.
            delattr(self, name)
        variables = {key: nnx.Variable(array) for key, array in arrays.items() if array is not None}
        if variables:
            setattr(self, name, nnx.Dict(variables))


def _values(variables: nnx.Dict[Any] | None) -> dict[str, Array]:
    return {name: variable.get_value() for name, variable in (variables or {}).items()}


class LayerBank(nnx.Module):
    """``y = base(x) + sum of weight * (x M) E`` with ``M = [A_k B_k]`` and E the expansion of C, over the adapters.

    The children are the adapters of one layer, by name. The bank's own attributes begin with an underscore, which
    names of adapters may not.

    Parameters
    ----------
    record
        Record that the banks of a model share.

    Attributes
    ----------
    _base
        Copies of kernel and bias from before the kernel held an update. None if they were dropped, or if it holds
        none.
    _off
        Whether the updates are switched off at the moment.
    """

    def __init__(self, record: Record) -> None:
        self._record = record
        self._base: HostCopies | None = None
        self._off = False

    def __call__(self, layer: Any, y: Array, x: Array, rest: Rest) -> Array:
        """Return the output of the layer: its frozen product y plus the updates for its input x."""
        if self._off:
            return y
        kind = kinds.of(layer, "an adapted layer")
        return with_updates(kind, layer, y, x, adapters_of(self), record=self._record, rest=rest)


def adapters_of(bank: LayerBank) -> dict[str, Adapter]:
    """Return the adapters of one layer by name."""
    # This is not a method of the bank, because an adapter may have the name of any method.
    return {name: vars(bank)[name] for name, _ in bank._record.adapters if name in vars(bank)}


def _head(bank: LayerBank, y: Array, query: Array) -> Array:
    """Return the output of ``attend`` for the base weight of an `nnx.Embed`, given its output for the current weight.

    In every framework, a head that shares its weight with an embedding is not adapted with it, so that a file has one
    meaning. In Flax both are one object. The updates that its weight holds are therefore subtracted from the output.
    """
    if bank._off:
        return y
    own, adapters = dict(bank._record.adapters), adapters_of(bank)
    if any(own[name].weight is not None for name in adapters):
        warnings.warn(
            "attend of an adapted nnx.Embed still returns the head of the base weight: the adapter of an embedding "
            "does not change a head that shares its weight",
            AdamssWarning,
            stacklevel=4,
        )
    for name, adapter in adapters.items():
        if (held := adapter.part.held) is None:
            continue
        factors = scaled(with_constants(only(adapter.factors(), jnp.asarray(held))), own[name].weight)  # type: ignore[arg-type]
        M, E = contract(factors).astype(y.dtype), expand(factors).astype(y.dtype)
        y = y - (query.astype(y.dtype) @ E.T) @ M.T
    return y


_CLASSES: dict[Any, Any] = {}


def adapted_class(kind: Any) -> Any:
    """Return the subclass of a layer's class whose call adds the update; all layers of the class share it."""
    if kind in _CLASSES:
        return _CLASSES[kind]

    # The input may be passed by keyword, under the name that the layer's class gives it.
    first = next(islice(inspect.signature(kind.__call__).parameters, 1, None), "")

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        y = kind.__call__(self, *args, **kwargs)
        x = args[0] if args else kwargs.pop(first if first in kwargs else next(iter(kwargs)))
        return getattr(self, CHILD)(self, y, x, (args[1:], kwargs))

    def reduce(self: Any) -> Any:
        # The subclass cannot be imported by name, so copy and pickle must derive it again from the layer's class.
        return _rebuilt, (kind,), vars(self)

    name = f"Adamss{kind.__name__}"
    members = {"__call__": call, "__reduce__": reduce, "__module__": __name__, "__doc__": kind.__doc__}
    if issubclass(kind, nnx.Embed):
        members["attend"] = _attend_of(kind)
    return _CLASSES.setdefault(kind, type(kind)(name, (kind,), members))


def _attend_of(kind: Any) -> Any:
    def attend(self: Any, query: Array, *args: Any, **kwargs: Any) -> Any:
        return _head(getattr(self, CHILD), kind.attend(self, query, *args, **kwargs), query)

    return attend


def _rebuilt(kind: Any) -> Any:
    return object.__new__(adapted_class(kind))


def _set_class(target: object, kind: type) -> None:
    # NNX's own __setattr__ would treat the class as an attribute of the model.
    object.__setattr__(target, "__class__", kind)


class NnxBackend(JaxModels):
    """The backend for `flax.nnx.Module`; models are changed in place."""

    name = "flax"
    kinds = kinds
    stores = stores
    composed: ClassVar = {nnx.MultiHeadAttention: ("query", "key", "value", "out")}
    refused: ClassVar = REFUSED
    normalising = (nnx.WeightNorm, nnx.SpectralNorm)

    def handles(self, model: Any) -> bool:
        return isinstance(model, nnx.Pytree)

    def modules(self, model: nnx.Module) -> dict[str, Any]:
        modules: dict[str, Any] = {}
        in_stacks: dict[tuple[int, tuple[int, ...]], StackedLayer] = {}
        for path, node in _nodes(model).items():
            leading = _leading(node)
            if not leading:
                modules[path] = node
                continue
            for place, index in stack_paths(path, leading).items():
                # Make one object for each layer, even if the stack occurs twice in the model.
                modules[place] = in_stacks.setdefault((id(node), index), StackedLayer(node, index))
        return modules

    def site(self, module: Any, path: str) -> Site:
        site = super().site(module, path)
        if not isinstance(getattr(site.layer, CHILD, None), LayerBank | None):
            raise LayerError(
                f"{path or 'the model itself'} has an attribute {CHILD!r} of its own, where the adapter goes; "
                "rename it"
            )
        return site

    def named_arrays(self, module: Any) -> dict[str, Array]:
        return {name: as_stored(variable.get_value()) for name, variable, as_stored, _ in _stored(module)}

    def shared(self, model: nnx.Module, saved: Iterable[str]) -> dict[str, frozenset[str]]:
        names: dict[int, list[str]] = {}
        for path, node in _nodes(model).items():
            for own, variable, *_ in _stored_own(node):
                names.setdefault(id(variable), []).append(join_path(path, own))
        inside = tuple(f"{path}." if path else "" for path in saved)
        return {
            name: frozenset(every) - {name}
            for every in names.values()
            if len(every) > 1
            for name in every
            if name.startswith(inside)
        }

    def attached(self, model: nnx.Module) -> dict[str, Attached]:
        return {
            path: Attached(bank._record, adapters_of(bank), bank._base, bank._off)
            for path, bank in _banks(model).items()
        }

    def added(
        self,
        model: nnx.Module,
        name: str,
        placed: Mapping[str, tuple[Site, Factors]],
        record: Record,
    ) -> nnx.Module:
        modules, own = self.modules(model), dict(record.adapters)[name]
        _check_disjoint(
            [site.layer for site, _ in placed.values()], {path: modules[path] for path in own.saved}
        )
        banks = [*_banks(model).values()]
        # All checks are done: nothing below can fail and leave the model half changed.
        for site, factors in placed.values():
            bank = getattr(site.layer, CHILD, None)
            if bank is None:
                bank = LayerBank(record)
                setattr(site.layer, CHILD, bank)
                _set_class(site.layer, adapted_class(type(site.layer)))
            setattr(bank, name, Adapter(factors))
            banks.append(bank)
        _set_record(banks, modules, record)
        return model

    def without(self, model: nnx.Module, names: Set[str], record: Record) -> nnx.Module:
        modules, layers = self.modules(model), self.adapted_layers(model)
        for path, layer in layers.items():
            own = adapters_of(getattr(layer, CHILD))
            if isinstance(layer, nnx.Embed) and any(
                own[name].part.held is not None for name in names & own.keys()
            ):
                warnings.warn(
                    f"{path or 'the model itself'} is an nnx.Embed whose weight keeps the update without an adapter: "
                    "if the model calls its attend, that head includes the update from now on",
                    AdamssWarning,
                    stacklevel=4,
                )
        banks = {path: getattr(layer, CHILD) for path, layer in layers.items()}
        _set_record(banks.values(), modules, record)
        for path, layer in layers.items():
            for name in names & vars(banks[path]).keys():
                delattr(banks[path], name)
            if not adapters_of(banks[path]):
                delattr(layer, CHILD)
                _set_class(layer, type(layer).__bases__[0])
        return model

    def with_record(self, model: nnx.Module, record: Record) -> nnx.Module:
        _set_record(_banks(model).values(), self.modules(model), record)
        return model

    def rewritten(self, model: nnx.Module, name: str, values: Mapping[str, Mapping[str, Any]]) -> nnx.Module:
        banks = _banks(model)
        for path, own in values.items():
            for field, value in own.items():
                adapters_of(banks[path])[name].write(field, value)
        return model

    def with_base(
        self, model: nnx.Module, base: Mapping[str, HostCopies | None], *, constant: bool
    ) -> nnx.Module:
        for path, bank in _banks(model).items():
            bank._base = base[path]
        return model

    def parameters(self, model: nnx.Module, names: Iterable[str]) -> nnx.State[Any, Any]:
        """Return the trained variables as an `nnx.State`; ``wrt=nnx.LoRAParam`` selects those of all adapters."""
        record = next((bank._record for bank in _banks(model).values()), Record())
        others = {*record.trained} - {*names}
        prefix = _prefix(dict(_walk(model)))
        saved = tuple(join_path(f"{prefix}{path}".rstrip("."), "") for path in record.saved(others))
        factors = {path: name for name in record.trained for path in self.leaf_names(model, name)}

        def meant(path: tuple[Any, ...], _: Any) -> bool:
            spelled = ".".join(map(str, path))
            # A module that one adapter saves may contain factors of another.
            return factors[spelled] not in others if spelled in factors else not spelled.startswith(saved)

        return nnx.state(model, nnx.All(AdamssParam, meant))

    def leaf_names(self, model: nnx.Module, name: str) -> dict[str, tuple[str, int]]:
        owners = {id(bank): path for path, bank in _banks(model).items()}
        return {
            join_path(path, f"{name}.{letter}"): (owners[id(node)], number)
            for path, node in _walk(model)
            if isinstance(node, LayerBank) and name in adapters_of(node)
            for number, letter in enumerate("BC")
        }

    def adapted_layers(self, model: nnx.Module) -> dict[str, Any]:
        """Return the adapted modules by the paths at which they were attached; a stack of layers is one module."""
        return _adapted(model)

    def called_layers(self, model: nnx.Module) -> dict[str, tuple[Any, Any, bool]]:
        return {path: _called(layer) for path, layer in _adapted(model).items()}

    def check_writable(self, model: nnx.Module, layers: Iterable[str], saved: Iterable[str] = ()) -> None:
        layers = list(layers)
        super().check_writable(model, layers, saved)
        adapted, every = _adapted(model), {id(module): module for _, module in _walk(model)}.values()
        shared = Counter(id(variable) for module in every for _, variable in _own(module))
        for path in layers:
            if any(shared[id(variable)] > 1 for _, variable in _own(adapted[path])):
                raise LayerError(
                    f"{path}: its {kinds.of(adapted[path], path).weight} is shared with another layer, which merging "
                    "would change too; leave the adapter unmerged"
                )

    def with_layers(self, model: nnx.Module, layers: Mapping[str, Any]) -> nnx.Module:
        return model

    def saved_exchanged(self, model: nnx.Module, arrays: Mapping[str, Mapping[str, Array]]) -> nnx.Module:
        modules = self.modules(model)
        for path, values in arrays.items():
            _write(modules[path], values)
        return model

    def switched(self, model: nnx.Module, *, on: bool) -> nnx.Module:
        for bank in _banks(model).values():
            bank._off = not on
        return model


# ---- the tree of a model ---------------------------------------------------------------------------


def _children(node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, nnx.Pytree):
        for name, value in vars(node).items():
            if not str(name).startswith(("_pytree__", "_object__")):
                yield str(name), value
    elif isinstance(node, list | tuple):
        yield from ((str(index), value) for index, value in enumerate(node))
    elif isinstance(node, dict):
        yield from ((str(key), value) for key, value in node.items())


def _walk(node: Any, path: str = "", above: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield modules and containers by path, parents first; one that occurs twice is yielded twice.

    The contents of banks are not visited.
    """
    if isinstance(node, nnx.Variable) or id(node) in above:
        return
    if isinstance(node, nnx.Pytree | list | tuple | dict):
        yield path, node
        if isinstance(node, LayerBank):
            return
        for name, child in _children(node):
            yield from _walk(child, join_path(path, name), (*above, id(node)))


def _nodes(model: Any) -> dict[str, Any]:
    """Return modules and containers, without banks, by their paths relative to the module that was adapted."""
    found = dict(_walk(model))
    prefix = _prefix(found)
    return {
        f"{path}.".removeprefix(prefix).rstrip("."): node
        for path, node in found.items()
        if not isinstance(node, LayerBank) and f"{path}.".startswith(prefix)
    }


def _own(module: Any) -> Iterator[tuple[str, nnx.Variable[Any]]]:
    for name, value in _children(module):
        if isinstance(value, nnx.Variable):
            yield name, value


def _variables(module: Any) -> Iterator[tuple[str, nnx.Variable[Any]]]:
    """Yield the variables within a module by path, each once, except those of banks."""
    seen: set[int] = set()
    for path, node in _walk(module):
        if isinstance(node, LayerBank):
            continue
        for name, variable in _own(node):
            if id(variable) not in seen:
                seen.add(id(variable))
                yield join_path(path, name), variable


def _trained_whole(module: Any) -> Iterator[nnx.Variable[Any]]:
    """Yield the variables of a module that are trained with the adapter that saves the module."""
    for _, variable in _variables(module):
        if isinstance(variable, nnx.Param) and jnp.issubdtype(variable.get_value().dtype, jnp.inexact):
            yield variable


# ---- adapted models --------------------------------------------------------------------------------


def _prefix(found: Mapping[str, Any]) -> str:
    """Return `owner_prefix` for the nodes that `_walk` yields."""
    records: dict[int, tuple[str, Record]] = {}
    for path, node in found.items():
        if isinstance(node, LayerBank):
            # A layer that occurs twice was adapted at its first path.
            records.setdefault(id(node), (path.removesuffix(CHILD).removesuffix("."), node._record))
    return owner_prefix(dict(records.values()))


def _adapted(model: Any) -> dict[str, Any]:
    """Return the adapted modules that are still in the model, by the paths at which they were attached."""
    found = dict(_walk(model))
    record = next((node._record for node in found.values() if isinstance(node, LayerBank)), None)
    if record is None:
        return {}
    prefix = _prefix(found)
    places = {path: f"{prefix}{path}".rstrip(".") for path in record.owners}
    return {
        path: found[place]
        for path, place in places.items()
        if isinstance(found.get(join_path(place, CHILD)), LayerBank)
    }


def _banks(model: Any) -> dict[str, LayerBank]:
    return {path: getattr(layer, CHILD) for path, layer in _adapted(model).items()}


def _set_record(banks: Iterable[LayerBank], modules: Mapping[str, Any], record: Record) -> None:
    """Set the record of banks, and the classes of variables, by which optimisers select those that are trained.

    A trained variable of a saved module becomes an `AdamssParam`. Its metadata keep its former class, which it gets
    back when the module is no longer trained.
    """
    saved = dict.fromkeys(path for path, _ in record.originals)
    for bank in banks:
        saved |= dict.fromkeys(path for path, _ in bank._record.originals)
        bank._record = record
        for name, own in record.adapters:
            adapter = vars(bank).get(name)
            for variable in () if adapter is None else (adapter.B, adapter.C):
                _set_class(variable, AdamssParam if own.trained else nnx.Variable)
    for path in saved:
        for _, variable in _variables(modules[path]) if path in modules else ():
            if variable.has_metadata("adamss_kind"):
                _set_class(variable, variable.get_metadata("adamss_kind"))
                variable.del_metadata("adamss_kind")
    for path in record.saved(record.trained):
        for variable in _trained_whole(modules[path]) if path in modules else ():
            variable.set_metadata(adamss_kind=type(variable))
            _set_class(variable, AdamssParam)


def _check_disjoint(adapted: Iterable[Any], saved: Mapping[str, Any]) -> None:
    """Check that no module to save shares a variable with an adapted layer."""
    frozen = {id(variable) for layer in adapted for _, variable in _own(layer)}
    for path, module in saved.items():
        if any(id(variable) in frozen for _, variable in _variables(module)):
            raise TargetError(
                f"modules_to_save: {path} shares its weight with a layer that targets adapts, "
                "and would train it whole; leave one of them out"
            )


# ---- layers ----------------------------------------------------------------------------------------


def _called(layer: Any) -> tuple[Any, Any, bool]:
    """Return `NnxBackend.called_layers` for one layer."""
    of, kind = type(layer).__bases__[0], kinds.of(layer, "an adapted layer")
    # A linear layer of Flax may have been given functions that compute something other than the product.
    own = [getattr(layer, name, None) for name in ("dot_general", "promote_dtype")] if kind.linear else []
    if not must_be_tried(kind, of) and all(function in FUNCTIONS for function in own):
        return layer, layer, True
    # Call copies, because a call may update statistics and counters.
    with_update, without = nnx.clone(layer), nnx.clone(layer)
    getattr(without, CHILD)._off = True
    return with_update, without, False


def _leading(node: Any) -> tuple[int, ...]:
    """Return the sizes of the leading axes of a stack of layers; ``()`` for anything else."""
    kind = kinds.find(node)
    return () if kind is None else kind.leading(node)


def _stored(module: Any) -> Iterator[tuple[str, nnx.Variable[Any], Any, Any]]:
    """Yield PyTorch's name of each stored variable, the variable, and functions to PyTorch's layout and back."""
    for path, node in _walk(module):
        for stored, variable, there, back in _stored_own(node):
            yield join_path(path, stored), variable, there, back


def _stored_own(node: Any) -> Iterator[tuple[str, nnx.Variable[Any], Any, Any]]:
    for name, variable in _own(node):
        if not isinstance(variable, NOT_STORED):
            stored, there, back = _as_in_torch(node, name, variable.get_value().shape)
            yield stored, variable, there, back


def _as_in_torch(node: Any, name: str, shape: tuple[int, ...]) -> tuple[str, Any, Any]:
    def transposed(order: tuple[int, ...]) -> tuple[Any, Any]:
        back = tuple(order.index(axis) for axis in range(len(order)))
        return lambda array: jnp.transpose(array, order), lambda array: jnp.transpose(array, back)

    def same(array: Array) -> Array:
        return array

    if _leading(node):  # PyTorch has no stacks of layers
        return name, same, same
    kind = kinds.find(node)
    if isinstance(kind, MatrixKind) and name == kind.weight:
        try:
            view = kind.view(node, "")
        except LayerError:
            return name, same, same
        return "weight", lambda kernel: view.matrix(kernel).T, lambda weight: view.array(weight.T, shape)
    if isinstance(kind, MatrixKind) and name == kind.bias:
        return name, lambda bias: jnp.reshape(bias, -1), lambda bias: jnp.reshape(bias, shape)
    if isinstance(node, nnx.Conv) and name == "kernel":
        # Flax has (*window, inputs, outputs), PyTorch (outputs, inputs, *window). A view would not do here, because
        # convolutions with groups have none.
        return "weight", *transposed((len(shape) - 1, len(shape) - 2, *range(len(shape) - 2)))
    if isinstance(node, nnx.Embed) and name == "embedding":
        return "weight", same, same
    if isinstance(node, nnx.BatchNorm) and name in ("mean", "var"):
        return f"running_{name}", same, same
    if isinstance(node, nnx.LayerNorm | nnx.RMSNorm | nnx.GroupNorm | nnx.BatchNorm) and name == "scale":
        return "weight", same, same
    return name, same, same


def _write(module: Any, values: Mapping[str, Array]) -> None:
    """Write stored values into the variables of a module."""
    for name, variable, _, back in list(_stored(module)):
        if name in values:
            variable.set_value(placed_as(back(values[name]), variable.get_value()))
