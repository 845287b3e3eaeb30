"""Flax NNX: layers change in place, and stay the objects that they were.

An adapted layer keeps its variables and their paths. Its class becomes a subclass that adds the update to the
output, and its child `adamss`, an `Adapter`, holds the factors: B and C are `AdamssParam`, a kind of
`nnx.LoRAParam`, so that ``nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)`` and libraries built on that filter train
them; basis, labels, ranks and mask are plain `nnx.Variable`.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

from adamss.errors import MissingBackendError

try:
    from flax import nnx
except ImportError as error:
    raise MissingBackendError("adamss_jax.flax needs Flax: pip install 'adamss[flax]'") from error

import jax
import jax.numpy as jnp
from jax import Array

from adamss.backend import Adaptation, BaseWeight
from adamss.backend.interface import without_folded
from adamss.backend.tensors import join_path
from adamss.config import AdamssConfig
from adamss.core import Factors, Merged
from adamss.errors import LayerError, LayerTypeError, StateError, TargetError
from adamss_jax.matrix import MatrixView
from adamss_jax.parts import Part, added, part_of
from adamss_jax.shell import (
    HostCopies,
    Record,
    Shell,
    beside,
    check_values,
    owner_prefix,
    placed_as,
)
from adamss_jax.stacks import (
    StackedLayer,
    by_owner,
    factors_at,
    split_path,
    stack_paths,
    stacked,
    stacked_factors,
)

__all__ = ["AdamssParam", "Adapter", "NnxShell"]

CHILD = "adamss"
"""Name of the adapter among the children of its layer."""

LAYERS = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum)

NOT_STORED = (nnx.RngState, nnx.Cache, nnx.Intermediate)
"""Variables that are no weights: ``modules_to_save`` does not store them."""


class AdamssParam(nnx.LoRAParam[Any]):
    """A trained variable of an adapted model: B and C of its layers, and the parameters of ``modules_to_save``."""


class Adapter(nnx.Module):
    """``y = base(x) + (x M) E`` with ``M = [A_k B_k]`` and E the expansion of C.

    Parameters
    ----------
    factors
        Factors of the layer.
    view
        How the kernel of the layer is a matrix.
    record
        What the adapters of a model share.

    Attributes
    ----------
    B, C
        Trained, `AdamssParam`, (P, q) and (r, n).
    A, labels, ranks, active
        `nnx.Variable`, as in `adamss.core.Factors`.
    enabled
        Whether the layer adds the update.
    order
        In which order its products are taken, one of `adamss.core.ORDERS`; None for the one that costs less: see
        `adamss_jax.update`. A constant of compiled functions: a change compiles them once more. It is in no file.
    merged
        Whether its kernel holds the update already.
    base
        While merged or consolidated: copies of kernel and bias as they were, or None if they were dropped.
    folded
        `nnx.Variable` (K,) booleans, the subspaces whose update the kernel holds; None unless consolidated.
    in_weight
        While merged, the mark of it in the state of the model.
    part
        While consolidated, variables by the fields of `Part`.
    """

    folded: nnx.Variable[Any] | None = None
    in_weight: nnx.Dict[Any] | None = None
    part: nnx.Dict[Any] | None = None

    def __init__(self, factors: Factors, view: MatrixView, record: Record) -> None:
        self.B, self.C = AdamssParam(factors.B), AdamssParam(factors.C)
        for name in ("A", "labels", "ranks", "active"):
            setattr(self, name, nnx.Variable(getattr(factors, name)))
        self.view = view
        self.record = record
        self.enabled = True
        self.order: str | None = None
        self.merged = False
        self.base: HostCopies | None = None

    def __call__(
        self, y: Array, x: Array, kernel_shape: tuple[int, ...], equation: str | None = None
    ) -> Array:
        """Return the output of the layer: its frozen product y, and the update of its input x.

        An `nnx.Einsum` may be called with an equation of its own, as long as its kernel is the same matrix.
        """
        part = Part(**{name: variable.get_value() for name, variable in (self.part or {}).items()})
        if self.merged or not self.enabled or part.empty:
            return y
        view = self.view
        if equation is not None:
            view = MatrixView.of_einsum(equation, "an adapted nnx.Einsum")
            if (view.rows, view.columns) != (self.view.rows, self.view.columns):
                raise LayerError(
                    f"an adapted nnx.Einsum was called with {equation!r}, in which its kernel is another matrix than "
                    "in the equation that it was attached with; merge, or leave it out of targets"
                )
        factors = self.record.computed(self.factors())
        u = added(view.flat_inputs(jnp.asarray(x, y.dtype)), factors, part, self.order)
        return y + view.outputs(u, kernel_shape)

    def factors(self) -> Factors:
        """Return the factors, canonical."""
        return Factors(*(getattr(self, name).get_value() for name in Factors._fields))

    def set_folded(
        self, folded: Array | None, layers: Mapping[Any, Factors], leading: tuple[int, ...]
    ) -> None:
        """Set which subspaces the kernel holds, and so which the product computes: see `part_of`."""
        part = Part() if folded is None else part_of(layers, folded, leading)
        found = {name: array for name, array in part._asdict().items() if array is not None}
        like = self.C.get_value()
        variables = {name: nnx.Variable(beside(array, like)) for name, array in found.items()}
        _set_optional(self, "folded", None if folded is None else nnx.Variable(folded))
        _set_optional(self, "part", nnx.Dict(variables) if variables else None)


def _set_optional(node: Any, name: str, value: Any) -> None:
    """Set an attribute that holds variables or, by the default of its class, None."""
    if name in vars(node):
        delattr(node, name)  # NNX would not let it go from variables to none, or back
    if value is not None:
        setattr(node, name, value)


_CLASSES: dict[Any, Any] = {}


def adapted_class(kind: Any) -> Any:
    """Return the subclass of a layer's class whose call adds the update; the same for every layer of the class."""
    if kind in _CLASSES:
        return _CLASSES[kind]

    # The input goes by the name that the layer's class gives it.
    first = next(islice(inspect.signature(kind.__call__).parameters, 1, None), "")

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        y = kind.__call__(self, *args, **kwargs)
        x = args[0] if args else kwargs[first]
        equation = None
        if isinstance(self, nnx.Einsum):
            equation = kwargs.get("einsum_str", args[1] if len(args) > 1 else None)
        return getattr(self, CHILD)(y, x, self.kernel.shape, equation)

    def reduce(self: Any) -> Any:
        # By name there is no such class: a copy or a pickle is made of the class it is derived from.
        return _rebuilt, (kind,), vars(self)

    name = f"Adamss{kind.__name__}"
    members = {"__call__": call, "__reduce__": reduce, "__module__": __name__, "__doc__": kind.__doc__}
    return _CLASSES.setdefault(kind, type(kind)(name, (kind,), members))


def _rebuilt(kind: Any) -> Any:
    return object.__new__(adapted_class(kind))


def _set_class(target: object, kind: type) -> None:
    # NNX's own __setattr__ would take the class for an attribute of the model.
    object.__setattr__(target, "__class__", kind)


class NnxShell(Shell):
    """`flax.nnx.Module`: `nnx.Linear`, `nnx.LinearGeneral`, and `nnx.Einsum` where it is a matrix product."""

    library = "flax.nnx"

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
                # One object per layer, also where the stack appears twice.
                modules[place] = in_stacks.setdefault((id(node), index), StackedLayer(node, index))
        return modules

    def weight(self, module: Any, path: str) -> BaseWeight:
        module, index = (module.module, module.index) if isinstance(module, StackedLayer) else (module, ())
        view = _view(module, path)
        check_values(module.kernel.get_value(), path)
        kernel, bias = _values(module)
        adapter = getattr(module, CHILD, None)
        if adapter is not None and not isinstance(adapter, Adapter):
            raise LayerError(
                f"{path} has an attribute {CHILD!r} of its own, where the adapter goes; rename it"
            )
        if adapter is not None and adapter.base is not None:
            base = adapter.base.restored()
            kernel, bias = base["kernel"], base.get("bias", bias)
        elif adapter is not None and adapter.merged:
            raise StateError(f"{path}: the base weight was dropped by merge(keep_base=False)")
        if index:
            kernel, bias = kernel[index], None if bias is None else bias[index]
        weight = BaseWeight(view.matrix(kernel), None if bias is None else jnp.reshape(bias, -1))
        if adapter is None or adapter.folded is None or adapter.base is not None:
            return weight
        factors = factors_at(adapter.factors(), index)
        return without_folded(weight, factors, adapter.folded.get_value()[index])

    def arrays(self, module: Any) -> dict[str, Array]:
        if isinstance(module, StackedLayer):
            raise LayerError(
                "modules_to_save names a single layer of a stack; name the module that holds the stack"
            )
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

    def insert(
        self,
        model: nnx.Module,
        layers: Mapping[str, Factors],
        *,
        config: AdamssConfig,
        saved: Mapping[str, Mapping[str, Array] | None],
    ) -> nnx.Module:
        modules = self.modules(model)
        owners = {path: _module_of(modules, path, places) for path, places in by_owner(layers).items()}
        _check_disjoint(owners, {path: modules[path] for path in saved})
        before = {
            join_path(path, name): array
            for path in saved
            for name, array in self.arrays(modules[path]).items()
        }
        record = Record(config, tuple(layers), tuple(saved), HostCopies(before) if saved else None)
        adapters = {
            path: Adapter(
                stacked_factors(factors, _leading(owners[path]), path), _view(owners[path], path), record
            )
            for path, factors in by_owner(layers).items()
        }
        # From here on nothing can fail.
        for path, values in saved.items():
            _write(modules[path], values or {})
            for variable in _trained_whole(modules[path]):
                variable.set_metadata(adamss_kind=type(variable))
                _set_class(variable, AdamssParam)
        for path, adapter in adapters.items():
            setattr(owners[path], CHILD, adapter)
            _set_class(owners[path], adapted_class(type(owners[path])))
        return model

    def adaptation(self, model: nnx.Module) -> Adaptation | None:
        layers = _adapted(model)
        if not layers:
            return None
        adapters = {path: getattr(layer, CHILD) for path, layer in layers.items()}
        record = next(iter(adapters.values())).record
        places = {path: split_path(path) for path in record.paths}
        whole = {path: adapter.factors() for path, adapter in adapters.items()}
        return Adaptation(
            config=record.config,
            layers={path: factors_at(whole[owner], index) for path, (owner, index) in places.items()},
            shapes={path: _shape(layers[owner]) for path, (owner, _) in places.items()},
            saved=record.saved,
            merged=any(adapter.merged for adapter in adapters.values()),
            base_kept=all(
                adapter.base is not None or not (adapter.merged or adapter.folded is not None)
                for adapter in adapters.values()
            ),
            disabled=not all(adapter.enabled for adapter in adapters.values()),
            folded={
                path: adapters[owner].folded.get_value()[index]
                for path, (owner, index) in places.items()
                if adapters[owner].folded is not None
            },
        )

    def parameters(self, model: nnx.Module) -> nnx.State[Any, Any]:
        """Return the `nnx.State` of the trained variables, what ``wrt=nnx.LoRAParam`` selects."""
        return nnx.state(model, AdamssParam)

    def leaf_names(self, model: nnx.Module) -> dict[str, tuple[str, int]]:
        owners = {id(getattr(layer, CHILD)): path for path, layer in _adapted(model).items()}
        return {
            join_path(path, name): (owners[id(node)], number)
            for path, node in _walk(model)
            if id(node) in owners
            for number, name in enumerate("BC")
        }

    def set_active(self, model: nnx.Module, active: Mapping[str, Array]) -> nnx.Module:
        layers = _adapted(model)
        for path, masks in by_owner(active).items():
            variable = getattr(layers[path], CHILD).active
            value = variable.get_value()
            for index, mask in masks.items():
                value = value.at[index].set(mask) if index else jnp.asarray(mask, bool)
            variable.set_value(value)
        return model

    def remove(self, model: nnx.Module, *, restore: bool) -> nnx.Module:
        if restore:
            self.unfold(model)
        record, modules = _record(model), self.modules(model)
        for path, values in record.saved_originals().items():
            if restore:
                _write(modules[path], values)
            for _, variable in _variables(modules[path]):
                if variable.has_metadata("adamss_kind"):
                    _set_class(variable, variable.get_metadata("adamss_kind"))
                    variable.del_metadata("adamss_kind")
        for layer in _adapted(model).values():
            delattr(layer, CHILD)
            _set_class(layer, type(layer).__bases__[0])
        return model

    def fold(self, model: nnx.Module, merged: Mapping[str, Merged], *, keep_base: bool) -> nnx.Module:
        self._set_weights(model, merged, keep_base=keep_base)
        for layer in _adapted(model).values():
            adapter = getattr(layer, CHILD)
            adapter.merged = True
            # A state that holds the update in its kernels is to fit no model that would add it once more: Flax puts a
            # Variable in the place of None, but no Dict.
            in_weight = nnx.Dict(subspaces=nnx.Variable(jnp.ones_like(adapter.active.get_value())))
            _set_optional(adapter, "in_weight", in_weight)
        return model

    def consolidate(
        self, model: nnx.Module, merged: Mapping[str, Merged], folded: Mapping[str, Array], *, keep_base: bool
    ) -> nnx.Module:
        self._set_weights(model, merged, keep_base=keep_base)
        adaptation = self.adaptation(model)
        assert adaptation is not None
        layers, masks = by_owner(adaptation.layers), by_owner(folded)
        for owner, layer in _adapted(model).items():
            leading = _leading(layer)
            getattr(layer, CHILD).set_folded(stacked(masks[owner], leading), layers[owner], leading)
        return model

    def unfold(self, model: nnx.Module) -> nnx.Module:
        for layer in _adapted(model).values():
            adapter = getattr(layer, CHILD)
            if adapter.base is not None:
                _set_values(layer, adapter.base.restored())
            adapter.merged, adapter.base = False, None
            _set_optional(adapter, "in_weight", None)
            adapter.set_folded(None, {}, ())
        return model

    @staticmethod
    def _set_weights(model: nnx.Module, merged: Mapping[str, Merged], *, keep_base: bool) -> None:
        layers = _adapted(model)
        every = {id(module): module for _, module in _walk(model)}.values()
        shared = Counter(id(variable) for module in every for _, variable in _own(module))
        for path, layer in layers.items():
            if any(shared[id(variable)] > 1 for _, variable in _own(layer)):
                raise LayerError(
                    f"{path}: its kernel is shared with another layer, which merging would change too; "
                    "leave the adapter unmerged"
                )
        for path, layer in layers.items():
            adapter, (kernel, bias) = getattr(layer, CHILD), _values(layer)
            leading, new = _leading(layer), by_owner(merged)[path]
            shape = kernel.shape[len(leading) :]
            kernels = {
                index: adapter.view.kernel(layer_merged.W, shape) for index, layer_merged in new.items()
            }
            values = {"kernel": stacked(kernels, leading)}
            if bias is not None:
                biases = {index: layer_merged.b for index, layer_merged in new.items()}
                values["bias"] = jnp.reshape(stacked(biases, leading), bias.shape)
            if not keep_base:
                adapter.base = None
            elif adapter.base is None:
                adapter.base = HostCopies({name: getattr(layer, name).get_value() for name in values})
            _set_values(layer, values)

    @contextmanager
    def disabled(self, model: nnx.Module) -> Iterator[nnx.Module]:
        layers = list(_adapted(model).values())
        adapters = [getattr(layer, CHILD) for layer in layers]
        if not all(adapter.enabled for adapter in adapters):
            yield model
            return
        modules, originals = self.modules(model), _record(model).saved_originals()
        saved = {path: dict(self.arrays(modules[path])) for path in originals}
        merged = [
            {name: getattr(layer, name).get_value() for name in adapter.base.arrays} if adapter.base else {}
            for layer, adapter in zip(layers, adapters, strict=True)
        ]
        try:
            for path, values in originals.items():
                _write(modules[path], values)
            for layer, adapter in zip(layers, adapters, strict=True):
                adapter.enabled = False
                if adapter.base is not None:
                    _set_values(layer, adapter.base.restored())
            yield model
        finally:
            for path, values in saved.items():
                _write(modules[path], values)
            for layer, adapter, values in zip(layers, adapters, merged, strict=True):
                _set_values(layer, values)
                adapter.enabled = True


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
    """Yield modules and containers by path, parents first; one that appears twice is yielded twice.

    What an adapter holds is its own.
    """
    if isinstance(node, nnx.Variable) or id(node) in above:
        return
    if isinstance(node, nnx.Pytree | list | tuple | dict):
        yield path, node
        if isinstance(node, Adapter):
            return
        for name, child in _children(node):
            yield from _walk(child, join_path(path, name), (*above, id(node)))


def _nodes(model: Any) -> dict[str, Any]:
    """Return modules and containers by their paths in the model that was adapted; no adapter."""
    found = dict(_walk(model))
    adapters = {path: node for path, node in found.items() if isinstance(node, Adapter)}
    prefix = _prefix(adapters)
    return {
        f"{path}.".removeprefix(prefix).rstrip("."): node
        for path, node in found.items()
        if path not in adapters and f"{path}.".startswith(prefix)
    }


def _own(module: Any) -> Iterator[tuple[str, nnx.Variable[Any]]]:
    for name, value in _children(module):
        if isinstance(value, nnx.Variable):
            yield name, value


def _variables(module: Any) -> Iterator[tuple[str, nnx.Variable[Any]]]:
    """Yield the variables within a module by path, each once; the adapters' are passed over."""
    seen: set[int] = set()
    for path, node in _walk(module):
        if isinstance(node, Adapter):
            continue
        for name, variable in _own(node):
            if id(variable) not in seen:
                seen.add(id(variable))
                yield join_path(path, name), variable


def _trained_whole(module: Any) -> Iterator[nnx.Variable[Any]]:
    for _, variable in _variables(module):
        if isinstance(variable, nnx.Param) and jnp.issubdtype(variable.get_value().dtype, jnp.inexact):
            yield variable


# ---- adapted models --------------------------------------------------------------------------------


def _prefix(adapters: Mapping[str, Adapter]) -> str:
    if not adapters:
        return ""
    records: dict[int, tuple[str, Record]] = {}
    for path, adapter in adapters.items():
        # A layer that appears twice was adapted at its first path.
        records.setdefault(id(adapter), (path.removesuffix(CHILD).removesuffix("."), adapter.record))
    return owner_prefix(dict(records.values()))


def _adapted(model: Any) -> dict[str, Any]:
    """Return the adapted modules by the paths under which they were attached; a stack of layers is one."""
    found = {path: node for path, node in _walk(model) if isinstance(getattr(node, CHILD, None), Adapter)}
    if not found:
        return {}
    prefix = _prefix({join_path(path, CHILD): getattr(layer, CHILD) for path, layer in found.items()})
    record = getattr(next(iter(found.values())), CHILD).record
    return {path: found[prefix + path] for path in record.owners}


def _record(model: Any) -> Record:
    record: Record = getattr(next(iter(_adapted(model).values())), CHILD).record
    return record


def _check_disjoint(adapted: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    frozen = {id(variable) for layer in adapted.values() for _, variable in _own(layer)}
    for path, module in saved.items():
        if any(id(variable) in frozen for _, variable in _variables(module)):
            raise TargetError(
                f"modules_to_save: {path} shares its weight with a layer that targets adapts, "
                "and would train it whole; leave one of them out"
            )


# ---- layers ----------------------------------------------------------------------------------------


def _view(layer: Any, path: str) -> MatrixView:
    path = path or "the model itself"
    if not isinstance(layer, LAYERS):
        raise LayerTypeError(
            f"{path} is a {type(layer).__name__}, which has no weight to adapt; targets must name nnx.Linear, "
            "nnx.LinearGeneral or nnx.Einsum layers"
        )
    kernel = layer.kernel.get_value()
    if not isinstance(kernel, jax.Array | jax.ShapeDtypeStruct) and not hasattr(kernel, "__array__"):
        raise LayerTypeError(
            f"{path}: its kernel is a {type(kernel).__name__}, no array; dequantise it first"
        )
    if isinstance(layer, nnx.Einsum):
        if layer.einsum_str is None:
            raise LayerError(
                f"{path}: its equation is given at every call, so the layer has no matrix of its own"
            )
        view = MatrixView.of_einsum(layer.einsum_str, path)
    elif isinstance(layer, nnx.LinearGeneral):
        if layer.batch_axis:
            raise LayerError(
                f"{path}: its batch_axis makes it many matrices, not one; leave it out of targets"
            )
        view = MatrixView.of_axes(layer.axis)
    else:
        view = MatrixView.of_axes((-1,))
    stack = _leading(layer)
    if stack and tuple(kernel.shape) != stack + _declared(layer):
        raise LayerError(
            f"{path}: its kernel has shape {tuple(kernel.shape)}, where the layer says {_declared(layer)}; the axes "
            "of a stack of layers must come first"
        )
    return view


def _declared(layer: Any) -> tuple[int, ...]:
    """Return the shape of the kernel of a single layer, as the layer says it."""
    if isinstance(layer, nnx.Einsum):
        return tuple(layer.kernel_shape)
    if isinstance(layer, nnx.LinearGeneral):
        return (*layer.in_features, *layer.out_features)
    return layer.in_features, layer.out_features


def _leading(layer: Any) -> tuple[int, ...]:
    """Return the leading axes of a stack of layers, ``()`` for anything else."""
    if not isinstance(layer, LAYERS) or (isinstance(layer, nnx.LinearGeneral) and layer.batch_axis):
        return ()
    shape = getattr(layer.kernel.get_value(), "shape", ())
    return tuple(shape[: max(len(shape) - len(_declared(layer)), 0)])


def _module_of(modules: Mapping[str, Any], path: str, places: Mapping[tuple[int, ...], Any]) -> Any:
    """Return the module at a path, or that of a stack of layers, from what `NnxShell.modules` lists."""
    index = next(iter(places))
    return modules[path] if not index else modules[f"{path}[{','.join(map(str, index))}]"].module


def _shape(layer: Any) -> tuple[int, int]:
    n = int(getattr(layer, CHILD).labels.shape[-1])
    return layer.kernel.size // n // math.prod(_leading(layer)), n


def _values(layer: Any) -> tuple[Array, Array | None]:
    kernel = jnp.asarray(layer.kernel.get_value())
    return kernel, None if layer.bias is None else layer.bias.get_value()


def _set_values(layer: Any, values: Mapping[str, Array]) -> None:
    for name, value in values.items():
        variable = getattr(layer, name)
        variable.set_value(placed_as(value, variable.get_value()))


def _stored(module: Any) -> Iterator[tuple[str, nnx.Variable[Any], Any, Any]]:
    """Yield each variable that is stored: PyTorch's name, itself, and the way to PyTorch's orientation and back."""
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
    if isinstance(node, LAYERS) and name == "kernel":
        try:
            view = _view(node, "")
        except LayerError:
            return name, same, same
        return "weight", lambda kernel: view.matrix(kernel).T, lambda weight: view.kernel(weight.T, shape)
    if isinstance(node, LAYERS) and name == "bias":
        return name, lambda bias: jnp.reshape(bias, -1), lambda bias: jnp.reshape(bias, shape)
    if isinstance(node, nnx.Conv) and name == "kernel":
        # (*window, inputs, outputs) here, (outputs, inputs, *window) there.
        return "weight", *transposed((len(shape) - 1, len(shape) - 2, *range(len(shape) - 2)))
    if isinstance(node, nnx.Embed) and name == "embedding":
        return "weight", same, same
    if isinstance(node, nnx.BatchNorm) and name in ("mean", "var"):
        return f"running_{name}", same, same
    if isinstance(node, nnx.LayerNorm | nnx.RMSNorm | nnx.GroupNorm | nnx.BatchNorm) and name == "scale":
        return "weight", same, same
    return name, same, same


def _write(module: Any, values: Mapping[str, Array]) -> None:
    """Give the variables of a module the stored values."""
    for name, variable, _, back in list(_stored(module)):
        if name in values:
            variable.set_value(placed_as(back(values[name]), variable.get_value()))
