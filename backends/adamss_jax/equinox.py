"""The Equinox backend: models are immutable trees, and every verb returns a new one.

Each adapted layer is wrapped in an `AdaptedLayer`, which holds its `Adapter` objects by name:
``layer.adapters["default"]``. `trainable_filter` marks the trained leaves, for
``eqx.partition(model, trainable_filter(model))``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any, ClassVar

from adamss.errors import MissingBackendError

try:
    import equinox as eqx
except ImportError as error:
    raise MissingBackendError("adamss_jax.equinox needs Equinox: pip install 'adamss[equinox]'") from error

import jax
import jax.numpy as jnp
from jax import Array

from adamss.backend import Kinds, Site, StackedLayer, Stores, View
from adamss.backend.sites import stack_paths
from adamss.backend.tensors import join_path
from adamss.core import Factors
from adamss.errors import LayerError, StateError
from adamss_jax.arrays import HostCopies, LeafStore, placed_as, restored
from adamss_jax.kinds import ExampleKind, MatrixKind, must_be_tried, with_updates
from adamss_jax.leaves import spelled
from adamss_jax.models import Attached, JaxModels, Record, owner_prefix
from adamss_jax.parts import Part

__all__ = ["AdaptedLayer", "Adapter", "EquinoxBackend", "kinds", "route_axes", "stores", "trainable_filter"]


# ---- kinds of layers, and stores for their weights --------------------------------------------------


class Linear(MatrixKind):
    """`equinox.nn.Linear`."""

    classes = (eqx.nn.Linear,)

    def view(self, layer: Any, path: str) -> View:
        return View(rows=(1,), columns=(0,))

    def leading(self, layer: Any) -> tuple[int, ...]:
        return tuple(getattr(layer.weight, "shape", ())[:-2])

    def inputs(self, layer: Any, x: Array, /, *args: Any, **kwargs: Any) -> Array:
        return jnp.reshape(x, -1)

    def outputs(self, layer: Any, u: Array, /, *args: Any, **kwargs: Any) -> Array:
        return jnp.reshape(u, ()) if layer.out_features == "scalar" else u


class Conv(ExampleKind):
    """`equinox.nn.Conv` without groups, which multiplies each window of the input by one matrix.

    ``z = x M`` is computed by the layer's own convolution, with q filters.
    """

    classes = (eqx.nn.Conv,)

    def view(self, layer: Any, path: str) -> View:
        if layer.groups != 1:
            raise LayerError(
                f"{path}: its {layer.groups} groups multiply by one matrix each, so the layer has no single matrix. "
                "Leave it out of targets; convolutions without groups can be adapted"
            )
        return View(rows=tuple(range(1, layer.num_spatial_dims + 2)), columns=(0,))

    def leading(self, layer: Any) -> tuple[int, ...]:
        shape = getattr(layer.weight, "shape", ())
        return tuple(shape[: max(len(shape) - layer.num_spatial_dims - 2, 0)])

    def project(self, layer: Any, x: Array, M: Array) -> Array:
        weight = jnp.reshape(M.T, (M.shape[1], layer.in_channels, *layer.kernel_size))
        z: Array = eqx.nn.Conv.__call__(_changed(layer, weight=weight, bias=None, use_bias=False), x)
        return z

    def spread(self, layer: Any, z: Array, E: Array) -> Array:
        return jnp.tensordot(E.T, z, 1)

    def last(self, z: Array) -> Array:
        # The directions are the first axis, as channels are in Equinox.
        return jnp.swapaxes(z, 0, -1)

    def example(self, layer: Any) -> Array:
        # Make the input larger than the window in every dimension, so that no window consists of padding only.
        sizes = [8 * size for size in layer.kernel_size]
        return jax.random.normal(jax.random.key(0), (layer.in_channels, *sizes))


class Embedding(ExampleKind):
    """`equinox.nn.Embedding`, which looks up a row by its id: the product of a one-hot vector and one matrix."""

    classes = (eqx.nn.Embedding,)

    def view(self, layer: Any, path: str) -> View:
        return View(rows=(0,), columns=(1,))

    def leading(self, layer: Any) -> tuple[int, ...]:
        return tuple(getattr(layer.weight, "shape", ())[:-2])

    def project(self, layer: Any, x: Array, M: Array) -> Array:
        return M[x]

    def example(self, layer: Any) -> Array:
        return jnp.zeros((), int)


kinds = Kinds(Linear(), Conv(), Embedding())
"""Kinds of layers that can be adapted; `Kinds.register` adds one."""

CELL = (
    "whose weight_ih and weight_hh are multiplied within its gates, so that no update can be added to its output; "
    "a cell that is made of equinox.nn.Linear can be adapted"
)
REFUSED: dict[type, str] = {
    eqx.nn.ConvTranspose: "a transposed convolution, whose windows overlap in the output, so that its update is not "
    "one product with a matrix; equinox.nn.Conv and the layers before and after it can be adapted",
    eqx.nn.GRUCell: CELL,
    eqx.nn.LSTMCell: CELL,
}
"""Layers that have weights but cannot be adapted, and the reason."""


stores = Stores(LeafStore())
"""Stores of the weights that can be adapted; `Stores.register` adds one."""


# ---- what is attached to a layer --------------------------------------------------------------------


class Adapter(eqx.Module):
    """The factors of one adapter for one layer, or for one stack of layers.

    Attributes
    ----------
    part
        Which subspaces the weight holds, and which are computed. It is the first field, so that leaves stored one
        after the other do not fit a layer whose weight holds other subspaces.
    B, C
        Trained factors, (P, q) and (r, n).
    A, labels, ranks, active
        See `adamss.core.Factors`.
    order
        Order of the products, one of `adamss.core.cost.ORDERS`. None means ``"factors_first"``, which is cheaper for
        the many inputs of a ``vmap``; see `adamss_jax.update`. Files do not store the order. It is part of the tree
        structure: set it by `dataclasses.replace` of the adapter, before the optimiser's state is made.
    kept
        Values of the adapter's ``modules_to_save`` while it is inactive; only one of its layers has them.
    gate
        Which rows of a batch go through the adapter, (rows,) booleans, while the rows are routed. The caller maps the
        model over this axis together with its inputs; see `route_axes`.
    place
        Path of the layer while rows are routed, for messages.
    """

    part: Part
    A: Array
    B: Array
    C: Array
    labels: Array
    ranks: Array
    active: Array
    order: str | None = eqx.field(static=True, default=None)
    kept: dict[str, Array] = eqx.field(default_factory=dict)
    gate: Array | None = None
    place: str | None = eqx.field(static=True, default=None)

    def factors(self) -> Factors:
        """Return the factors in canonical form."""
        return restored(Factors(*(getattr(self, name) for name in Factors._fields)))


class AdaptedLayer(eqx.Module):
    """``y = base(x) + sum of weight * (x M) E`` with ``M = [A_k B_k]`` and E the expansion of C, over the adapters.

    Sizes and other static fields are read from the frozen layer. There is no ``weight`` attribute: code that
    multiplies by ``layer.weight`` itself would miss the adapters, so it must fail.

    Attributes
    ----------
    adapters
        Active and inactive adapters by name.
    base
        Frozen layer.
    record
        Record that the adapted layers of a model share.
    merged, consolidated
        Copies of the arrays of `base` from before its weight held an update. Both are None if it holds none, or if
        the copies were dropped. `merged` is used if the weights of the model hold every update that it computes, and
        is static. `consolidated` is used if some factors are still trained. It is a leaf that is not an array, which
        ``eqx.filter_jit`` and its relatives allow: a static field would change the tree structure, which would no
        longer match that of the optimiser's state.
    """

    adapters: dict[str, Adapter]
    base: Any
    record: Record = eqx.field(static=True)
    merged: HostCopies | None = eqx.field(static=True, default=None)
    consolidated: HostCopies | None = None

    @property
    def adapter(self) -> Adapter:
        """The adapter of a layer that has exactly one."""
        (adapter,) = self.adapters.values()
        return adapter

    def __getattr__(self, name: str) -> Any:
        # Python calls this only for attributes that are not found otherwise.
        base = None if name.startswith("_") else vars(self).get("base")
        field = getattr(base, "__dataclass_fields__", {}).get(name)
        if field is not None and field.metadata.get("static", False):
            return getattr(base, name)
        raise AttributeError(
            f"an adapted {type(base).__name__} has no {name!r} of its own, because results computed from that of the "
            "frozen layer (`base`) would miss the adapters; call the layer, or fold the adapters into the weights "
            "(adamss.merge_and_unload)",
            name=name,
            obj=self,
        )

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        """Return the output of the frozen layer plus the updates; the arguments are those of the frozen layer."""
        y: Array = self.base(x, *args, **kwargs)
        kind = kinds.of(self.base, "an adapted layer")
        return with_updates(kind, self.base, y, x, self.adapters, record=self.record, rest=(args, kwargs))


def trainable_filter(model: Any) -> Any:
    """Return a tree of the model's structure that is True at every trained leaf, and False elsewhere.

    The trained leaves are B, C and the floating-point arrays of ``modules_to_save`` of every adapter that is trained
    (see `adamss.activate`). An adapter loaded with ``trainable=False`` has none. Use the tree in
    ``eqx.partition(model, trainable_filter(model))``.

    Parameters
    ----------
    model
        Adapted Equinox model.

    Raises
    ------
    StateError
        If the model has no adapters.

    Examples
    --------
    >>> import adamss, equinox as eqx, jax
    >>> from adamss_jax.equinox import trainable_filter
    >>> model = {"query": eqx.nn.Linear(6, 8, key=jax.random.key(0))}
    >>> model = adamss.attach(model, adamss.AdamssConfig(targets=["query"], rank=4, subspaces=3))
    >>> trained, frozen = eqx.partition(model, trainable_filter(model))
    >>> [leaf.shape for leaf in jax.tree.leaves(trained)]
    [(4, 3), (1, 8)]
    """
    adapted = _adapted(model)
    if not adapted:
        raise StateError("trainable_filter: the model has no adapters; call adamss.attach first")
    return _filter(model, next(iter(adapted.values())).record.trained)


def _filter(model: Any, names: Iterable[str]) -> Any:
    """Return `trainable_filter` for only some of the trained adapters."""
    adapted, names = _adapted(model), list(names)
    prefix, record = _prefix(adapted), next((layer.record for layer in adapted.values()), Record())
    saved = tuple(join_path(f"{prefix}{path}".rstrip("."), "") for path in record.saved(names))
    factors = {path for name in names for path in EquinoxBackend().leaf_names(model, name)}
    banks = tuple(join_path(path, "adapters.") for path in adapted)

    def trained(path: str, leaf: Any) -> bool:
        if path.startswith(banks):
            return (
                path in factors
            )  # in an adapter, only B and C are trained, also if a saved module contains it
        return eqx.is_inexact_array(leaf) and f"{path}.".startswith(saved)

    leaves, structure = _flattened(model)
    return structure.unflatten([trained(path, leaf) for path, leaf in leaves])


def route_axes(model: Any) -> Any:
    """Return the axes of a routed model that must be mapped together with the rows of a batch.

    Equinox's layers take a single input, and a batch is mapped over by ``vmap``. Pass the axes to ``eqx.filter_vmap``
    as ``in_axes=(route_axes(model), 0)``. The rows are an axis of each adapter's `Adapter.gate`.

    Parameters
    ----------
    model
        Adapted Equinox model, within `adamss.routed`.

    Examples
    --------
    >>> import adamss, equinox as eqx, jax
    >>> from adamss_jax.equinox import route_axes
    >>> model = {"query": eqx.nn.Linear(6, 8, key=jax.random.key(0))}
    >>> model = adamss.attach(model, adamss.AdamssConfig(targets=["query"], rank=4, subspaces=3), name="a")
    >>> with adamss.routed(model, ["a", None]) as mixed:
    ...     run = eqx.filter_vmap(lambda model, x: model["query"](x), in_axes=(route_axes(mixed), 0))
    ...     run(mixed, jax.numpy.ones((2, 6))).shape
    (2, 8)
    """
    leaves, structure = _flattened(model)
    return structure.unflatten([leaf.ndim - 1 if path.endswith(".gate") else None for path, leaf in leaves])


class EquinoxBackend(JaxModels):
    """The backend for `equinox.Module`, and for lists, tuples and dictionaries of modules."""

    name = "equinox"
    kinds = kinds
    stores = stores
    composed: ClassVar = {eqx.nn.MultiheadAttention: ("query_proj", "key_proj", "value_proj", "output_proj")}
    refused: ClassVar = REFUSED
    normalising = (eqx.nn.WeightNorm, eqx.nn.SpectralNorm)

    def handles(self, model: Any) -> bool:
        if isinstance(model, eqx.Module):
            return True
        if not isinstance(model, list | tuple | dict):
            return False
        nodes = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, eqx.Module))
        return any(isinstance(node, eqx.Module) for node in nodes)

    def modules(self, model: Any) -> dict[str, Any]:
        found = dict(_walk(model))
        prefix = _prefix(found)
        seen: set[int] = set()
        modules: dict[str, Any] = {}
        for path, node in found.items():
            if not f"{path}.".startswith(prefix):
                continue
            own, layer = _within(path, prefix), node.base if isinstance(node, AdaptedLayer) else node
            kind = kinds.find(layer)
            leading = () if kind is None else kind.leading(layer)
            if leading:
                modules |= {place: StackedLayer(layer, at) for place, at in stack_paths(own, leading).items()}
                continue
            # A tree has values without identity: an object that occurs twice counts as two layers.
            modules[own] = copy.copy(layer) if id(layer) in seen else layer
            seen.add(id(layer))
        return modules

    def named_arrays(self, module: Any) -> dict[str, Array]:
        module = _plain(module)
        leaves, _ = _flattened(module)
        arrays = {path: jnp.asarray(leaf) for path, leaf in leaves if _is_stored(leaf)}
        # Equinox stores the bias of a convolution as (outputs, 1, ..., 1), PyTorch as (outputs,).
        convolutions = [
            path for path, node in _walk(module) if isinstance(node, eqx.nn.Conv | eqx.nn.ConvTranspose)
        ]
        biases = {join_path(path, "bias") for path in convolutions} & arrays.keys()
        return arrays | {path: jnp.reshape(arrays[path], -1) for path in biases}

    def attached(self, model: Any) -> dict[str, Attached]:
        return {
            path: Attached(
                layer.record, layer.adapters, layer.consolidated if layer.merged is None else layer.merged
            )
            for path, layer in _by_owner(model).items()
        }

    def added(self, model: Any, name: str, placed: Mapping[str, tuple[Site, Factors]], record: Record) -> Any:
        present, prefix = _by_owner(model), _prefix(_adapted(model))
        model, adapted = self.with_record(model, record), {}
        for path, (site, factors) in placed.items():
            adapters = {**present[path].adapters} if path in present else {}
            adapters[name] = Adapter(Part(), **factors._asdict())
            adapted[f"{prefix}{path}".rstrip(".")] = AdaptedLayer(adapters, site.layer, record)
        model = _replaced(model, adapted)
        _check_shared(model)
        return model

    def without(self, model: Any, names: Set[str], record: Record) -> Any:
        def left(_: str, layer: AdaptedLayer) -> Any:
            adapters = {name: adapter for name, adapter in layer.adapters.items() if name not in names}
            return _changed(layer, adapters=adapters, record=record) if adapters else layer.base

        return _mapped(model, left)

    def with_record(self, model: Any, record: Record) -> Any:
        return _mapped(model, lambda _, layer: _changed(layer, record=record))

    def rewritten(self, model: Any, name: str, values: Mapping[str, Mapping[str, Any]]) -> Any:
        def changed(path: str, layer: AdaptedLayer) -> Any:
            if path not in values:
                return layer
            return _changed(
                layer, adapters={**layer.adapters, name: _changed(layer.adapters[name], **values[path])}
            )

        return _mapped(model, changed)

    def with_base(self, model: Any, base: Mapping[str, HostCopies | None], *, constant: bool) -> Any:
        fields = ("merged", "consolidated") if constant else ("consolidated", "merged")
        return _mapped(
            model, lambda path, layer: _changed(layer, **dict(zip(fields, (base[path], None), strict=True)))
        )

    def parameters(self, model: Any, names: Iterable[str]) -> Any:
        """Return the tree of the trained leaves, with None elsewhere, for the ``init`` of an optimiser."""
        record = next(iter(_adapted(model).values())).record
        return eqx.filter(model, _filter(model, {*names} & {*record.trained}))

    def leaf_names(self, model: Any, name: str) -> dict[str, tuple[str, int]]:
        adapted = _adapted(model)
        prefix = _prefix(adapted)
        return {
            join_path(path, f"adapters.{name}.{letter}"): (_within(path, prefix), number)
            for path, layer in adapted.items()
            if name in layer.adapters
            for number, letter in enumerate("BC")
        }

    def adapted_layers(self, model: Any) -> dict[str, Any]:
        """Return copies of the frozen layers, by the keys of `attached`."""
        return {path: _changed(layer.base) for path, layer in _by_owner(model).items()}

    def called_layers(self, model: Any) -> dict[str, tuple[Any, Any, bool]]:
        def known(layer: Any) -> bool:
            return not must_be_tried(kinds.of(layer, "an adapted layer"), type(layer))

        return {path: (layer, layer.base, known(layer.base)) for path, layer in _by_owner(model).items()}

    def with_layers(self, model: Any, layers: Mapping[str, Any]) -> Any:
        return _mapped(model, lambda path, layer: _changed(layer, base=layers.get(path, layer.base)))

    def saved_exchanged(self, model: Any, arrays: Mapping[str, Mapping[str, Array]]) -> Any:
        prefix, found = _prefix(_adapted(model)), dict(_walk(model))
        places = {f"{prefix}{path}".rstrip("."): own for path, own in arrays.items()}
        return _replaced(model, {place: _written(found[place], own) for place, own in places.items()})

    def switched(self, model: Any, *, on: bool) -> Any:
        """Return the model itself if `on`, else the base model; trees are immutable, so the caller still has both."""
        return model if on else _plain(model)


def _check_shared(model: Any) -> None:
    """Check that `equinox.nn.Shared` ties no weight of an adapted layer, which it could no longer find."""
    for path, node in _walk(model):
        if isinstance(node, eqx.nn.Shared):
            try:
                node()
            except AttributeError as error:
                raise LayerError(
                    f"{path or 'the model itself'} is an equinox.nn.Shared that gives the weight of an adapted layer "
                    f"to another; leave the layer out of targets, or untie the two ({error})"
                ) from error


# ---- the tree of a model ---------------------------------------------------------------------------


def _children(node: Any) -> tuple[list[tuple[str, Any]], Any]:
    """Return the children of a node of a pytree with their names, and the structure that rebuilds the node."""
    return _flattened(node, is_leaf=lambda child: child is not node)


def _flattened(tree: Any, **options: Any) -> tuple[list[tuple[str, Any]], Any]:
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree, **options)
    return [(spelled(path), leaf) for path, leaf in pairs], structure


def _is_inner(node: Any) -> bool:
    return isinstance(node, eqx.Module | list | tuple | dict)


def _walk(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield modules and containers by path, parents first; the contents of adapted layers are not visited."""
    yield path, node
    if isinstance(node, AdaptedLayer):
        return
    for name, child in _children(node)[0]:
        if _is_inner(child):
            yield from _walk(child, join_path(path, name))


def _replaced(model: Any, new: Mapping[str, Any], path: str = "") -> Any:
    """Return the tree with the nodes at some paths replaced."""
    if path in new:
        return new[path]
    if not _is_inner(model):
        return model
    pairs, structure = _children(model)
    return structure.unflatten([_replaced(child, new, join_path(path, name)) for name, child in pairs])


def _mapped(model: Any, change: Any) -> Any:
    """Return the tree with a function applied to every adapted layer, and to the path at which it was attached."""
    adapted = _adapted(model)
    prefix = _prefix(adapted)
    changed = {path: change(_within(path, prefix), layer) for path, layer in adapted.items()}
    return _replaced(model, changed)


def _adapted(model: Any) -> dict[str, AdaptedLayer]:
    return {path: node for path, node in _walk(model) if isinstance(node, AdaptedLayer)}


def _within(path: str, prefix: str) -> str:
    """Return a path relative to the module that was adapted, whose own path is `prefix` without the last dot."""
    return f"{path}.".removeprefix(prefix).rstrip(".")


def _prefix(found: Mapping[str, Any]) -> str:
    """Return `owner_prefix` for the nodes that `_walk` yields."""
    return owner_prefix({path: node.record for path, node in found.items() if isinstance(node, AdaptedLayer)})


def _by_owner(model: Any) -> dict[str, AdaptedLayer]:
    """Return the adapted layers by the paths at which they were attached."""
    adapted = _adapted(model)
    prefix = _prefix(adapted)
    return {_within(path, prefix): layer for path, layer in adapted.items()}


# ---- layers ----------------------------------------------------------------------------------------


def _changed(module: Any, **values: Any) -> Any:
    """Return a copy of a module with other values in some fields; its ``__init__`` does not run again."""
    new = object.__new__(type(module))
    for name in module.__dataclass_fields__:
        if name in values or hasattr(module, name):
            object.__setattr__(new, name, values.get(name, getattr(module, name, None)))
    return new


def _is_stored(leaf: Any) -> bool:
    return eqx.is_array(leaf) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _with_arrays(module: Any, values: Mapping[str, Array]) -> Any:
    def new(path: str, leaf: Any) -> Any:
        if not _is_stored(leaf) or path not in values:
            return leaf
        return placed_as(jnp.reshape(values[path], leaf.shape), jnp.asarray(leaf))

    leaves, structure = _flattened(module)
    return structure.unflatten([new(path, leaf) for path, leaf in leaves])


def _plain(module: Any) -> Any:
    """Return a module with the adapters of all layers within it removed."""
    return _replaced(module, {path: layer.base for path, layer in _adapted(module).items()})


def _written(module: Any, values: Mapping[str, Array]) -> Any:
    """Return a module with other arrays, named as in `EquinoxBackend.named_arrays`; adapters within it stay."""
    new = _with_arrays(_plain(module), values)
    within = dict(_walk(new))
    return _replaced(
        new, {path: _changed(layer, base=within[path]) for path, layer in _adapted(module).items()}
    )
