"""Equinox: models are trees, and every verb returns a new one.

Each layer that is adapted is replaced by an `AdaptedLayer` around it, with an `Adapter` by its name:
``layer.adapters["default"]``. `trainable_filter` says which leaves are trained, for
``eqx.partition(model, trainable_filter(model))``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from adamss.errors import MissingBackendError

try:
    import equinox as eqx
except ImportError as error:
    raise MissingBackendError("adamss_jax.equinox needs Equinox: pip install 'adamss[equinox]'") from error

import jax
import jax.numpy as jnp
from jax import Array

from adamss.backend import Adaptation, Kinds, StackedLayer, Stores, View
from adamss.backend.sites import stack_paths
from adamss.backend.tensors import join_path
from adamss.core import Factors
from adamss.errors import StateError
from adamss_jax.arrays import HostCopies, LeafStore, placed_as, restored
from adamss_jax.kinds import MatrixKind, with_update
from adamss_jax.leaves import spelled
from adamss_jax.models import Attached, JaxModels, Record, owner_prefix
from adamss_jax.parts import Part

__all__ = ["AdaptedLayer", "Adapter", "EquinoxBackend", "kinds", "stores", "trainable_filter"]


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


kinds = Kinds(Linear())
"""Kinds of layers that can be adapted; `Kinds.register` adds one."""


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
    """

    part: Part
    A: Array
    B: Array
    C: Array
    labels: Array
    ranks: Array
    active: Array
    order: str | None = eqx.field(static=True, default=None)

    def factors(self) -> Factors:
        """Return the factors, canonical."""
        return restored(Factors(*(getattr(self, name) for name in Factors._fields)))


class AdaptedLayer(eqx.Module):
    """``y = base(x) + (x M) E`` with ``M = [A_k B_k]`` and E the expansion of C.

    It has no ``weight`` of its own: code that multiplies by ``layer.weight`` itself would not see the adapter, and
    fails instead.

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
        They are static where all updates of the model are held. Where some go on being trained, they are a leaf that
        is no array, as Equinox's models have more of (``eqx.filter_jit``): a static field would change the tree's
        structure, which would no longer match that of the optimiser's state.
    """

    adapters: dict[str, Adapter]
    base: Any
    record: Record = eqx.field(static=True)
    merged: HostCopies | None = eqx.field(static=True, default=None)
    consolidated: HostCopies | None = None

    @property
    def adapter(self) -> Adapter:
        """The adapter that is attached."""
        return self.adapters[self.record.name]

    @property
    def in_features(self) -> Any:
        """Inputs, as of the frozen layer."""
        return self.base.in_features

    @property
    def out_features(self) -> Any:
        """Outputs, as of the frozen layer."""
        return self.base.out_features

    @property
    def use_bias(self) -> bool:
        """Whether the frozen layer has a bias."""
        return bool(self.base.use_bias)

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        """Return the output for an input, as the frozen layer does."""
        y: Array = self.base(x, *args, **kwargs)
        kind = kinds.of(self.base, "an adapted layer")
        rest, revive = (args, kwargs), self.record.revives
        return with_update(kind, self.base, y, x, self.adapter, revive=revive, rest=rest)


def trainable_filter(model: Any) -> Any:
    """Return a tree of the model's structure that is True at every trained leaf, and False elsewhere.

    Trained are B and C of every adapted layer and the floating-point arrays of ``modules_to_save``; nothing of an
    adapter that was loaded with ``trainable=False``. For ``eqx.partition(model, trainable_filter(model))``.

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
    prefix, record = _prefix(adapted), next(iter(adapted.values())).record
    saved, factors = [prefix + path for path in record.saved], EquinoxBackend().leaf_names(model)

    def trained(path: str, leaf: Any) -> bool:
        if path in factors or not record.trained:
            return record.trained
        return eqx.is_inexact_array(leaf) and any(
            f"{path}.".startswith(join_path(module, "")) for module in saved
        )

    leaves, structure = _flattened(model)
    return structure.unflatten([trained(path, leaf) for path, leaf in leaves])


class EquinoxBackend(JaxModels):
    """`equinox.Module`, and lists, tuples and dictionaries of modules."""

    name = "equinox"
    kinds = kinds
    stores = stores

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
        leaves, _ = _flattened(module)
        arrays = {path: jnp.asarray(leaf) for path, leaf in leaves if _is_stored(leaf)}
        # Equinox keeps the bias of a convolution as (outputs, 1, 1), PyTorch as (outputs,).
        convolutions = [
            path for path, node in _walk(module) if isinstance(node, eqx.nn.Conv | eqx.nn.ConvTranspose)
        ]
        biases = {join_path(path, "bias") for path in convolutions} & arrays.keys()
        return arrays | {path: jnp.reshape(arrays[path], -1) for path in biases}

    def attached(self, model: Any) -> dict[str, Attached]:
        found = {}
        for path, layer in _by_owner(model).items():
            base = layer.consolidated if layer.merged is None else layer.merged
            found[path] = Attached(layer.record, layer.adapter.factors(), layer.adapter.part, base)
        return found

    def insert(
        self,
        model: Any,
        adaptation: Adaptation,
        *,
        originals: Mapping[str, Mapping[str, Array]],
        values: Mapping[str, Mapping[str, Array]],
    ) -> Any:
        record, placed = self.placed(model, adaptation, originals)
        adapted = {
            path: AdaptedLayer({record.name: Adapter(Part(), **factors._asdict())}, site.layer, record)
            for path, (site, factors) in placed.items()
        }
        modules = self.modules(model)
        changed = {path: _with_arrays(modules[path], own) for path, own in values.items()}
        return _replaced(model, adapted | changed)

    def remove(self, model: Any) -> Any:
        return _mapped(model, lambda _, layer: layer.base)

    def parameters(self, model: Any) -> Any:
        """Return the tree of the trained leaves, None elsewhere: what an optimiser's ``init`` gets."""
        return eqx.filter(model, trainable_filter(model))

    def leaf_names(self, model: Any) -> dict[str, tuple[str, int]]:
        adapted = _adapted(model)
        prefix = _prefix(adapted)
        return {
            join_path(path, f"adapters.{layer.record.name}.{name}"): (_within(path, prefix), number)
            for path, layer in adapted.items()
            for number, name in enumerate("BC")
        }

    def adapted_layers(self, model: Any) -> dict[str, Any]:
        """Return copies of the frozen layers, by the keys of `attached`."""
        return {path: _changed(layer.base) for path, layer in _by_owner(model).items()}

    def called_layers(self, model: Any) -> dict[str, tuple[Any, Any, bool]]:
        def known(layer: Any) -> bool:
            kind = kinds.of(layer, "an adapted layer")
            return not kind.linear or kind.defines(type(layer), "__call__")

        return {path: (layer, layer.base, known(layer.base)) for path, layer in _by_owner(model).items()}

    def with_layers(self, model: Any, layers: Mapping[str, Any]) -> Any:
        return _mapped(model, lambda path, layer: _changed(layer, base=layers.get(path, layer.base)))

    def with_active(self, model: Any, active: Mapping[str, Array]) -> Any:
        return _mapped(
            model,
            lambda path, layer: _with_adapter(layer, active=active.get(path, layer.adapter.active)),
        )

    def with_parts(self, model: Any, parts: Mapping[str, tuple[Part, HostCopies | None]]) -> Any:
        field = "merged" if all(part.empty for part, _ in parts.values()) else "consolidated"

        def changed(path: str, layer: AdaptedLayer) -> Any:
            part, base = parts[path]
            new = {"merged": None, "consolidated": None, field: base}
            return _changed(_with_adapter(layer, part=part), **new)

        return _mapped(model, changed)

    def saved_exchanged(self, model: Any, arrays: Mapping[str, Mapping[str, Array]]) -> Any:
        modules, prefix = self.modules(model), _prefix(_adapted(model))
        return _replaced(
            model,
            {f"{prefix}{path}".rstrip("."): _with_arrays(modules[path], own) for path, own in arrays.items()},
        )

    def switched(self, model: Any, *, on: bool) -> Any:
        """Return the model; off, it is the base model, and the other is still there to be switched on."""
        return model if on else self.remove(model)


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


def _with_adapter(layer: AdaptedLayer, **values: Any) -> Any:
    """Return a layer with other values of some fields of its adapter."""
    return _changed(layer, adapters={layer.record.name: _changed(layer.adapter, **values)})


def _is_stored(leaf: Any) -> bool:
    return eqx.is_array(leaf) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _with_arrays(module: Any, values: Mapping[str, Array]) -> Any:
    def new(path: str, leaf: Any) -> Any:
        if not _is_stored(leaf) or path not in values:
            return leaf
        return placed_as(jnp.reshape(values[path], leaf.shape), jnp.asarray(leaf))

    leaves, structure = _flattened(module)
    return structure.unflatten([new(path, leaf) for path, leaf in leaves])
