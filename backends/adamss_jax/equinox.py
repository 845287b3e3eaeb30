"""Equinox: models are trees, and every verb returns a new one.

Each layer that is adapted is replaced by an `AdaptedLayer` around it, with an `Adapter` by its name:
``layer.adapters["default"]``. `trainable_filter` says which leaves are trained, for
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


# ---- kinds of layers, and how they keep their numbers -----------------------------------------------


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
    """`equinox.nn.Conv` without groups: the product of each window of the input with one matrix.

    ``z = x M`` is the layer's own convolution with q filters.
    """

    classes = (eqx.nn.Conv,)

    def view(self, layer: Any, path: str) -> View:
        if layer.groups != 1:
            raise LayerError(
                f"{path}: its {layer.groups} groups are as many matrices. Leave it out of targets; convolutions "
                "without groups can be adapted"
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
        # The directions come first, as the channels do.
        return jnp.swapaxes(z, 0, -1)

    def example(self, layer: Any) -> Array:
        # Larger than the window in every dimension, so that no padding fills one alone.
        sizes = [8 * size for size in layer.kernel_size]
        return jax.random.normal(jax.random.key(0), (layer.in_channels, *sizes))


class Embedding(ExampleKind):
    """`equinox.nn.Embedding`: a row by its id, the product of a one-hot vector with one matrix."""

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
"""Layers with weights that cannot be adapted, and why."""


stores = Stores(LeafStore())
"""Ways of keeping weights that adapters can sit on; `Stores.register` adds one."""


# ---- what is attached to a layer --------------------------------------------------------------------


class Adapter(eqx.Module):
    """The factors of one adapter of one layer, or one stack of layers.

    Attributes
    ----------
    part
        Which subspaces the weight holds, and which are computed. It comes first, so that leaves that were stored one
        after the other do not fit a layer in another form.
    B, C
        Trained, (P, q) and (r, n).
    A, labels, ranks, active
        As in `adamss.core.Factors`.
    order
        In which order its products are taken, one of `adamss.core.cost.ORDERS`; None is ``"factors_first"``, the
        cheaper one for the many inputs of a ``vmap``: see `adamss_jax.update`. It is in no file, and is part of the
        structure of the tree: set it, by `dataclasses.replace` of the adapter, before the optimiser's state is made.
    kept
        While the adapter is not active, in one of its layers, its values of ``modules_to_save``.
    gate
        While the rows of a batch are routed, which of them go through the adapter: (rows,) booleans, over which the
        caller maps the model together with its inputs, by `route_axes`.
    place
        The path of the layer meanwhile, for messages.
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
        """Return the factors, canonical."""
        return restored(Factors(*(getattr(self, name) for name in Factors._fields)))


class AdaptedLayer(eqx.Module):
    """``y = base(x) + sum of weight * (x M) E`` with ``M = [A_k B_k]`` and E the expansion of C, over the adapters.

    Sizes and other static fields are those of the frozen layer. It has no ``weight`` of its own: code that multiplies
    by ``layer.weight`` itself would not see the adapters, and fails instead.

    Attributes
    ----------
    adapters
        By name.
    base
        The frozen layer.
    record
        What the adapted layers of a model share.
    merged, consolidated
        While the weight of `base` holds an update: copies of its arrays as they were, or None if they were dropped.
        They are static where the weights of the model hold all that is computed. Where something goes on being
        trained, they are a leaf that is no array, as Equinox's models have more of (``eqx.filter_jit``): a static
        field would change the tree's structure, which would no longer match that of the optimiser's state.
    """

    adapters: dict[str, Adapter]
    base: Any
    record: Record = eqx.field(static=True)
    merged: HostCopies | None = eqx.field(static=True, default=None)
    consolidated: HostCopies | None = None

    @property
    def adapter(self) -> Adapter:
        """The adapter of the layer, if it has one alone."""
        (adapter,) = self.adapters.values()
        return adapter

    def __getattr__(self, name: str) -> Any:
        # It is asked only for what this class does not have.
        base = None if name.startswith("_") else vars(self).get("base")
        field = getattr(base, "__dataclass_fields__", {}).get(name)
        if field is not None and field.metadata.get("static", False):
            return getattr(base, name)
        raise AttributeError(
            f"an adapted {type(base).__name__} has no {name!r} of its own, and what is computed from that of the "
            "frozen layer (`base`) would be without the adapter; call the layer, or take the adapters off "
            "(adamss.merge_and_unload)",
            name=name,
            obj=self,
        )

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        """Return the output for an input, as the frozen layer does."""
        y: Array = self.base(x, *args, **kwargs)
        kind = kinds.of(self.base, "an adapted layer")
        return with_updates(kind, self.base, y, x, self.adapters, record=self.record, rest=(args, kwargs))


def trainable_filter(model: Any) -> Any:
    """Return a tree of the model's structure that is True at every trained leaf, and False elsewhere.

    Of each adapter that is trained (`adamss.activate`), these are B and C and the floating-point arrays of
    ``modules_to_save``; of one that was loaded with ``trainable=False``, nothing. For
    ``eqx.partition(model, trainable_filter(model))``.

    Parameters
    ----------
    model
        An adapted Equinox model.

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
    """Return `trainable_filter` of some adapters that are trained."""
    adapted, names = _adapted(model), list(names)
    prefix, record = _prefix(adapted), next((layer.record for layer in adapted.values()), Record())
    saved = tuple(join_path(f"{prefix}{path}".rstrip("."), "") for path in record.saved(names))
    factors = {path for name in names for path in EquinoxBackend().leaf_names(model, name)}
    banks = tuple(join_path(path, "adapters.") for path in adapted)

    def trained(path: str, leaf: Any) -> bool:
        if path.startswith(banks):
            return path in factors
        return eqx.is_inexact_array(leaf) and f"{path}.".startswith(saved)

    leaves, structure = _flattened(model)
    return structure.unflatten([trained(path, leaf) for path, leaf in leaves])


def route_axes(model: Any) -> Any:
    """Return over which axes of a model `adamss.routed` has it mapped, with the rows of a batch.

    Equinox's layers take one input, and a batch by ``vmap``. For ``in_axes=(route_axes(model), 0)`` of
    ``eqx.filter_vmap``.

    Parameters
    ----------
    model
        An adapted Equinox model, within `adamss.routed`.

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
    """`equinox.Module`, and lists, tuples and dictionaries of modules."""

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
            # A tree has values and no identities: what stands in two places is two layers.
            modules[own] = copy.copy(layer) if id(layer) in seen else layer
            seen.add(id(layer))
        return modules

    def named_arrays(self, module: Any) -> dict[str, Array]:
        module = _plain(module)
        leaves, _ = _flattened(module)
        arrays = {path: jnp.asarray(leaf) for path, leaf in leaves if _is_stored(leaf)}
        # Equinox keeps the bias of a convolution as (outputs, 1, 1), PyTorch as (outputs,).
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
        """Return the tree of the trained leaves, None elsewhere: what an optimiser's ``init`` gets."""
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
        """Return the model; off, it is the base model, and the other is still there to be switched on."""
        return model if on else _plain(model)


def _check_shared(model: Any) -> None:
    """Check that weights that are tied by `equinox.nn.Shared` are none of an adapted layer."""
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
    """Return what lies directly below a node of a pytree, with names, and the way to put it together again."""
    return _flattened(node, is_leaf=lambda child: child is not node)


def _flattened(tree: Any, **options: Any) -> tuple[list[tuple[str, Any]], Any]:
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree, **options)
    return [(spelled(path), leaf) for path, leaf in pairs], structure


def _is_inner(node: Any) -> bool:
    return isinstance(node, eqx.Module | list | tuple | dict)


def _walk(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield modules and containers by path, parents first; what lies within an adapted layer is passed over."""
    yield path, node
    if isinstance(node, AdaptedLayer):
        return
    for name, child in _children(node)[0]:
        if _is_inner(child):
            yield from _walk(child, join_path(path, name))


def _replaced(model: Any, new: Mapping[str, Any], path: str = "") -> Any:
    """Return the tree with other nodes at some paths."""
    if path in new:
        return new[path]
    if not _is_inner(model):
        return model
    pairs, structure = _children(model)
    return structure.unflatten([_replaced(child, new, join_path(path, name)) for name, child in pairs])


def _mapped(model: Any, change: Any) -> Any:
    """Return the tree with every adapted layer changed by a function of its path (as attached) and itself."""
    adapted = _adapted(model)
    prefix = _prefix(adapted)
    changed = {path: change(_within(path, prefix), layer) for path, layer in adapted.items()}
    return _replaced(model, changed)


def _adapted(model: Any) -> dict[str, AdaptedLayer]:
    return {path: node for path, node in _walk(model) if isinstance(node, AdaptedLayer)}


def _within(path: str, prefix: str) -> str:
    """Return a path from the module that was attached, whose own path is the prefix without its last dot."""
    return f"{path}.".removeprefix(prefix).rstrip(".")


def _prefix(found: Mapping[str, Any]) -> str:
    """Return `owner_prefix` from what `_walk` yields."""
    return owner_prefix({path: node.record for path, node in found.items() if isinstance(node, AdaptedLayer)})


def _by_owner(model: Any) -> dict[str, AdaptedLayer]:
    """Return the adapted layers by the paths under which they were attached."""
    adapted = _adapted(model)
    prefix = _prefix(adapted)
    return {_within(path, prefix): layer for path, layer in adapted.items()}


# ---- layers ----------------------------------------------------------------------------------------


def _changed(module: Any, **values: Any) -> Any:
    """Return a module with other values of some fields; its __init__ does not run again."""
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
    """Return a module without the adapters of layers within it."""
    return _replaced(module, {path: layer.base for path, layer in _adapted(module).items()})


def _written(module: Any, values: Mapping[str, Array]) -> Any:
    """Return a module with other arrays, by the names of `EquinoxBackend.named_arrays`; adapters within it stay."""
    new = _with_arrays(_plain(module), values)
    within = dict(_walk(new))
    return _replaced(
        new, {path: _changed(layer, base=within[path]) for path, layer in _adapted(module).items()}
    )
