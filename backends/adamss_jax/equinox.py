"""Equinox: models are trees, and every verb returns a new one.

Each `equinox.nn.Linear` that is adapted is replaced by an `AdaptedLinear` around it. `trainable_filter` says which
leaves are trained, for ``eqx.partition(model, trainable_filter(model))``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from adamss.errors import MissingBackendError

try:
    import equinox as eqx
except ImportError as error:
    raise MissingBackendError("adamss_jax.equinox needs Equinox: pip install 'adamss[equinox]'") from error

import jax
import jax.numpy as jnp
from jax import Array

from adamss.backend import Adaptation, BaseWeight
from adamss.backend.interface import without_folded
from adamss.backend.tensors import join_path
from adamss.config import AdamssConfig
from adamss.core import Factors, Merged
from adamss.errors import LayerError, LayerTypeError, StateError
from adamss_jax.parts import Part, added, part_of
from adamss_jax.shell import (
    HostCopies,
    Record,
    Shell,
    beside,
    check_values,
    owner_prefix,
    placed_as,
    spelled,
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

__all__ = ["AdaptedLinear", "EquinoxShell", "trainable_filter"]

CONVOLUTIONS = (eqx.nn.Conv, eqx.nn.ConvTranspose)


class AdaptedLinear(eqx.Module):
    """``y = base(x) + (x M) E`` with ``M = [A_k B_k]`` and E the expansion of C.

    It has no ``weight`` of its own: code that multiplies by ``layer.weight`` itself would not see the adapter, and
    fails instead.

    Attributes
    ----------
    base
        The frozen layer.
    B, C
        Trained, (P, q) and (r, n).
    A, labels, ranks, active
        As in `adamss.core.Factors`.
    record
        What the adapters of a model share.
    merged
        Whether the weight of `base` holds the update already.
    kept
        While merged: copies of the weight and bias as they were, or None if they were dropped.
    folded
        (K,) booleans, the subspaces whose update the weight of `base` holds; None unless merged or consolidated. It
        comes first, so that leaves that were stored one after the other do not fit a layer without it.
    unfolded
        While consolidated, what `kept` is while merged. A leaf that is no array, as Equinox's models have more of
        (``eqx.filter_jit``): in the structure of the tree it would part it from that of the optimiser's state.
    part
        Which subspaces the product computes.
    order
        In which order its products are taken, one of `adamss.core.ORDERS`; None is ``"factors_first"``, the cheaper
        one for the many inputs of a ``vmap``: see `adamss_jax.update`. It is in no file, and is part of the structure
        of the tree: set it, by `dataclasses.replace` of the layer, before the optimiser's state is made.
    """

    folded: Array | None
    base: eqx.nn.Linear
    A: Array
    B: Array
    C: Array
    labels: Array
    ranks: Array
    active: Array
    record: Record = eqx.field(static=True)
    merged: bool = eqx.field(static=True, default=False)
    kept: HostCopies | None = eqx.field(static=True, default=None)
    unfolded: HostCopies | None = None
    part: Part = Part()
    order: str | None = eqx.field(static=True, default=None)

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
        return self.base.use_bias

    def __call__(self, x: Array, *, key: Any = None) -> Array:
        """Return the output (out_features,) of an input (in_features,), as `equinox.nn.Linear` does."""
        y = self.base(x, key=key)
        if self.merged or self.part.empty:
            return y
        factors = self.record.computed(self.factors())
        u = added(jnp.reshape(jnp.asarray(x, y.dtype), -1), factors, self.part, self.order)
        return y + jnp.reshape(u, y.shape)

    def factors(self) -> Factors:
        """Return the factors, canonical."""
        return Factors(*(getattr(self, name) for name in Factors._fields))


def trainable_filter(model: Any) -> Any:
    """Return a tree of the model's structure that is True at every trained leaf, and False elsewhere.

    Trained are B and C of every adapted layer and the floating-point arrays of ``modules_to_save``. For
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
    prefix, record = _prefix(adapted), next(iter(adapted.values())).record
    saved = [prefix + path for path in record.saved]

    def trained(path: str, leaf: Any) -> bool:
        owner, _, name = path.rpartition(".")
        if owner in adapted:
            return name in ("B", "C")
        within = any(f"{path}.".startswith(join_path(module, "")) for module in saved)
        return within and eqx.is_inexact_array(leaf)

    leaves, structure = _flattened(model)
    return structure.unflatten([trained(path, leaf) for path, leaf in leaves])


class EquinoxShell(Shell):
    """`equinox.Module`, and lists, tuples and dictionaries of modules; layers are `equinox.nn.Linear`."""

    library = "equinox"

    def handles(self, model: Any) -> bool:
        if isinstance(model, eqx.Module):
            return True
        if not isinstance(model, list | tuple | dict):
            return False
        nodes = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, eqx.Module))
        return any(isinstance(node, eqx.Module) for node in nodes)

    def modules(self, model: Any) -> dict[str, Any]:
        found = dict(_walk(model))
        prefix = _prefix({path: node for path, node in found.items() if isinstance(node, AdaptedLinear)})
        seen: set[int] = set()
        modules: dict[str, Any] = {}
        for path, node in found.items():
            if not f"{path}.".startswith(prefix):
                continue
            own = _within(path, prefix)
            leading = _leading(node)
            if leading:
                modules |= {place: StackedLayer(node, at) for place, at in stack_paths(own, leading).items()}
                continue
            # A tree has values and no identities: what stands in two places is two layers.
            modules[own] = copy.copy(node) if id(node) in seen else node
            seen.add(id(node))
        return modules

    def weight(self, module: Any, path: str) -> BaseWeight:
        path = path or "the model itself"
        module, index = (module.module, module.index) if isinstance(module, StackedLayer) else (module, ())
        adapted = None
        if isinstance(module, AdaptedLinear):
            if module.merged and module.kept is None:
                raise StateError(f"{path}: the base weight was dropped by merge(keep_base=False)")
            adapted, module = module, _unmerged(module)
        if not isinstance(module, eqx.nn.Linear):
            raise LayerTypeError(
                f"{path} is a {type(module).__name__}, which has no weight to adapt; targets must name "
                "equinox.nn.Linear layers"
            )
        check_values(module.weight, path)
        if not eqx.is_array_like(module.weight):
            raise LayerTypeError(f"{path}: its weight is a {type(module.weight).__name__}, no array")
        weight = jnp.asarray(module.weight)
        bias = None if module.bias is None else jnp.asarray(module.bias)
        if index:
            weight, bias = weight[index], None if bias is None else bias[index]
        if adapted is None or adapted.merged or adapted.folded is None or adapted.unfolded is not None:
            return BaseWeight(weight.T, bias)
        return without_folded(
            BaseWeight(weight.T, bias), factors_at(adapted.factors(), index), adapted.folded[index]
        )

    def arrays(self, module: Any) -> dict[str, Array]:
        if isinstance(module, StackedLayer):
            raise LayerError(
                "modules_to_save names a single layer of a stack; name the module that holds the stack"
            )
        leaves, _ = _flattened(module)
        arrays = {path: jnp.asarray(leaf) for path, leaf in leaves if _is_stored(leaf)}
        # Equinox keeps the bias of a convolution as (outputs, 1, 1), PyTorch as (outputs,).
        convolutions = [path for path, node in _walk(module) if isinstance(node, CONVOLUTIONS)]
        biases = {join_path(path, "bias") for path in convolutions} & arrays.keys()
        return arrays | {path: jnp.reshape(arrays[path], -1) for path in biases}

    def insert(
        self,
        model: Any,
        layers: Mapping[str, Factors],
        *,
        config: AdamssConfig,
        saved: Mapping[str, Mapping[str, Array] | None],
    ) -> Any:
        nodes = dict(_walk(model))
        modules = self.modules(model)
        before = {
            join_path(path, name): array
            for path in saved
            for name, array in self.arrays(modules[path]).items()
        }
        record = Record(config, tuple(layers), tuple(saved), HostCopies(before) if saved else None)
        adapted = {
            path: AdaptedLinear(
                folded=None,
                base=nodes[path],
                **stacked_factors(factors, _leading(nodes[path]), path)._asdict(),
                record=record,
            )
            for path, factors in by_owner(layers).items()
        }
        changed = {path: _with_arrays(modules[path], values or {}) for path, values in saved.items()}
        return _replaced(model, adapted | changed)

    def adaptation(self, model: Any) -> Adaptation | None:
        adapted = _adapted(model)
        if not adapted:
            return None
        prefix, record = _prefix(adapted), next(iter(adapted.values())).record
        places = {path: split_path(path) for path in record.paths}
        layers = {owner: adapted[prefix + owner] for owner in record.owners}
        return Adaptation(
            config=record.config,
            layers={
                path: factors_at(layers[owner].factors(), index) for path, (owner, index) in places.items()
            },
            shapes={path: _shape(layers[owner]) for path, (owner, _) in places.items()},
            saved=record.saved,
            merged=any(layer.merged for layer in layers.values()),
            base_kept=all(
                layer.kept is not None if layer.merged else layer.unfolded is not None or layer.folded is None
                for layer in layers.values()
            ),
            folded={
                path: layers[owner].folded[index]  # type: ignore[index]
                for path, (owner, index) in places.items()
                if layers[owner].folded is not None and not layers[owner].merged
            },
        )

    def parameters(self, model: Any) -> Any:
        """Return the tree of the trained leaves, None elsewhere: what an optimiser's ``init`` gets."""
        return eqx.filter(model, trainable_filter(model))

    def leaf_names(self, model: Any) -> dict[str, tuple[str, int]]:
        adapted = _adapted(model)
        prefix = _prefix(adapted)
        return {
            join_path(path, name): (_within(path, prefix), number)
            for path in adapted
            for number, name in enumerate("BC")
        }

    def set_active(self, model: Any, active: Mapping[str, Array]) -> Any:
        owners = by_owner(active)

        def masked(path: str, layer: AdaptedLinear) -> Any:
            value = layer.active
            for index, mask in owners.get(path, {}).items():
                value = value.at[index].set(mask) if index else jnp.asarray(mask, bool)
            return _changed(layer, active=value)

        return _mapped(model, masked)

    def remove(self, model: Any, *, restore: bool) -> Any:
        if not restore:
            return _mapped(model, lambda _, layer: layer.base)
        adapted = _adapted(model)
        prefix, record = _prefix(adapted), next(iter(adapted.values())).record
        base = _mapped(model, lambda _, layer: _unmerged(layer))
        modules = dict(_walk(base))
        saved = {
            prefix + path: _with_arrays(modules[(prefix + path).rstrip(".")], arrays)
            for path, arrays in record.saved_originals().items()
        }
        return _replaced(base, saved)

    def fold(self, model: Any, merged: Mapping[str, Merged], *, keep_base: bool) -> Any:
        new = by_owner(merged)

        def fold(path: str, layer: AdaptedLinear) -> Any:
            kept = HostCopies(_arrays_of(layer.base)) if keep_base else None
            # Leaves that hold the update in their weights are to fit no model that would add it once more.
            folded = jnp.ones_like(layer.active)
            base = _with_weights(layer, new[path])
            return _changed(layer, base=base, merged=True, kept=kept, folded=folded)

        return _mapped(model, fold)

    def consolidate(
        self, model: Any, merged: Mapping[str, Merged], folded: Mapping[str, Array], *, keep_base: bool
    ) -> Any:
        adaptation = self.adaptation(model)
        assert adaptation is not None
        new, masks, layers = by_owner(merged), by_owner(folded), by_owner(adaptation.layers)

        def consolidate(path: str, layer: AdaptedLinear) -> Any:
            leading = _leading(layer)
            held = stacked(masks[path], leading)
            part = part_of(layers[path], held, leading)
            unfolded = layer.unfolded or HostCopies(_arrays_of(layer.base))
            return _changed(
                layer,
                base=_with_weights(layer, new[path]),
                folded=held,
                unfolded=unfolded if keep_base else None,
                part=Part(*(None if array is None else beside(array, layer.C) for array in part)),
            )

        return _mapped(model, consolidate)

    def unfold(self, model: Any) -> Any:
        attached = {"merged": False, "kept": None, "folded": None, "unfolded": None, "part": Part()}
        return _mapped(model, lambda _, layer: _changed(layer, base=_unmerged(layer), **attached))

    @contextmanager
    def disabled(self, model: Any) -> Iterator[Any]:
        yield self.remove(model, restore=True)


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
    """Yield modules and containers by path, parents first; what lies within an adapted layer is its own."""
    yield path, node
    if isinstance(node, AdaptedLinear):
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


def _adapted(model: Any) -> dict[str, AdaptedLinear]:
    return {path: node for path, node in _walk(model) if isinstance(node, AdaptedLinear)}


def _within(path: str, prefix: str) -> str:
    """Return a path from the module that was attached, whose own path is the prefix without its last dot."""
    return f"{path}.".removeprefix(prefix).rstrip(".")


def _prefix(adapted: Mapping[str, AdaptedLinear]) -> str:
    return owner_prefix({path: layer.record for path, layer in adapted.items()}) if adapted else ""


# ---- layers ----------------------------------------------------------------------------------------


def _changed(module: Any, **values: Any) -> Any:
    """Return a module with other values of some fields; its __init__ does not run again."""
    new = object.__new__(type(module))
    for name in module.__dataclass_fields__:
        if name in values or hasattr(module, name):
            object.__setattr__(new, name, values.get(name, getattr(module, name, None)))
    return new


def _leading(node: Any) -> tuple[int, ...]:
    """Return the leading axes of a stack of layers, ``()`` for anything else."""
    layer = node.base if isinstance(node, AdaptedLinear) else node
    return tuple(getattr(layer.weight, "shape", ())[:-2]) if isinstance(layer, eqx.nn.Linear) else ()


def _shape(layer: AdaptedLinear) -> tuple[int, int]:
    n, d = layer.base.weight.shape[-2:]
    return d, n


def _unmerged(layer: AdaptedLinear) -> Any:
    kept = layer.kept if layer.merged else layer.unfolded
    return layer.base if kept is None else _changed(layer.base, **kept.restored())


def _arrays_of(base: eqx.nn.Linear) -> dict[str, Array]:
    return {"weight": base.weight} if base.bias is None else {"weight": base.weight, "bias": base.bias}


def _with_weights(layer: AdaptedLinear, merged: Mapping[Any, Merged]) -> Any:
    """Return the base of a layer, or stack of layers, with other weights."""
    leading, bias = _leading(layer), layer.base.bias
    return _changed(
        layer.base,
        weight=stacked({index: new.W.T for index, new in merged.items()}, leading),
        bias=None if bias is None else stacked({index: new.b for index, new in merged.items()}, leading),
    )


def _is_stored(leaf: Any) -> bool:
    return eqx.is_array(leaf) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _with_arrays(module: Any, values: Mapping[str, Array]) -> Any:
    def new(path: str, leaf: Any) -> Any:
        if not _is_stored(leaf) or path not in values:
            return leaf
        return placed_as(jnp.reshape(values[path], leaf.shape), jnp.asarray(leaf))

    leaves, structure = _flattened(module)
    return structure.unflatten([new(path, leaf) for path, leaf in leaves])
