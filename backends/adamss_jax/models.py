"""The part of a backend that all model libraries of JAX share.

A backend for another library subclasses `JaxModels` in a module of its own, as `flax` and `equinox` do.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adamss.backend import Adaptation, Backend, Bank, Ledger, Site, StackedLayer, backend_for
from adamss.backend.bank import Route, State, Values
from adamss.backend.interface import Model, Module
from adamss.backend.sites import Index, by_owner, owner_of, split_path
from adamss.backend.stores import exchange_all
from adamss.backend.tensors import join_path
from adamss.config import AdamssConfig
from adamss.core import Factors
from adamss.core.factors import outline
from adamss.errors import BackendError, LayerError, LayerTypeError, StateError
from adamss_jax.arrays import HostCopies, JaxArrays, beside, check_values, restored
from adamss_jax.kinds import example_input
from adamss_jax.leaves import Leaves, Pair
from adamss_jax.parts import Part, part_of
from adamss_jax.stacks import factors_at, stacked_factors, with_layer

__all__ = ["Attached", "JaxModels", "Own", "Record", "models_of", "owner_prefix"]


@dataclass(frozen=True)
class Own:
    """The entry of one adapter in a `Record`.

    Attributes
    ----------
    config
        Settings that the adapter was attached with.
    shapes
        Path of each adapted layer, relative to the module that was adapted, and (d, n) of its weight.
    saved
        Module paths of its ``modules_to_save``.
    weight, trainable, trained
        See `Adaptation`.
    """

    config: AdamssConfig
    shapes: tuple[tuple[str, tuple[int, int]], ...]
    saved: tuple[str, ...]
    weight: float | None = None
    trainable: bool = True
    trained: bool = False

    @property
    def owners(self) -> tuple[str, ...]:
        """Paths of the modules that hold the adapter's factors; a stack of layers is one module."""
        return tuple(dict.fromkeys(owner_of(path) for path, _ in self.shapes))

    @property
    def revives(self) -> bool:
        """Whether frozen subspaces may return, and must therefore keep getting gradients."""
        return self.config.budget is not None and self.config.budget.revive


@dataclass(frozen=True)
class Record:
    """What every adapted layer knows about the whole model; a static constant of compiled functions.

    The record contains no numbers that training changes. Otherwise, each time the model switches to another adapter
    and back, it would no longer fit the state of its optimiser and would be compiled again.

    Attributes
    ----------
    adapters
        Entries of the adapters by name, in the order in which these were attached.
    originals
        Module path and base values of each module in the ``modules_to_save`` of any adapter.
    route
        Names of the adapters that rows may go through and the axis of the rows, while a batch is routed; else None.
        Which rows go through an adapter is an array of that adapter (`gate`), so that another route compiles nothing.
    """

    adapters: tuple[tuple[str, Own], ...] = ()
    originals: tuple[tuple[str, HostCopies], ...] = ()
    route: tuple[tuple[str, ...], int] | None = None

    @property
    def owners(self) -> tuple[str, ...]:
        """Paths of the modules that hold factors of any adapter."""
        return tuple(dict.fromkeys(owner for _, own in self.adapters for owner in own.owners))

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(d, n) of the weight of each layer that any adapter adapts, by path."""
        return {path: shape for _, own in self.adapters for path, shape in own.shapes}

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the adapters that are trained."""
        return tuple(name for name, own in self.adapters if own.trained)

    def saved(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the module paths of the ``modules_to_save`` of these adapters."""
        own = dict(self.adapters)
        return tuple(path for name in names for path in own[name].saved)

    def __deepcopy__(self, memo: Any) -> Self:
        return self


FOLLOWED: set[Any] = set()
"""Budgets in the settings of the adapters that `adamss_jax.budgeted` was called for in this process."""


class Attached(NamedTuple):
    """What is attached to one layer, or to one stack of layers.

    Attributes
    ----------
    record
        Record of the model.
    adapters
        Adapters of the layer by name. Each has `factors()`, stacked over the layers of a stack, and their `part`,
        which says what the weight holds. In one of its layers, an inactive adapter also has the values of its
        ``modules_to_save`` (`kept`).
    base
        Arrays of the layer from before the weight held an update. None if they were dropped, or if it holds none.
    off
        Whether the updates are switched off at the moment.
    """

    record: Record
    adapters: Mapping[str, Any]
    base: HostCopies | None
    off: bool = False


class JaxModels(JaxArrays, Backend):
    """A backend for models of a JAX library.

    Modules of Flax NNX are changed in place. Trees of Equinox are immutable, so every verb returns a new one.
    """

    # ---- what a library supplies --------------------------------------------------------------------

    composed: ClassVar[Mapping[type, tuple[str, ...]]]
    """Classes of modules that a target may name in place of the layers within them, and the names of those layers."""

    refused: ClassVar[Mapping[type, str]]
    """Classes of layers that have weights but cannot be adapted, and the reason as a clause."""

    normalising: ClassVar[tuple[type, ...]]
    """Classes of modules that recompute the weight of the layer within them at every call."""

    @abstractmethod
    def attached(self, model: Model) -> dict[str, Attached]:
        """Return what is attached, by the path that the module holding the arrays had in `insert`."""

    @abstractmethod
    def named_arrays(self, module: Module) -> dict[str, Array]:
        """Return `arrays` of a module that is not a single layer of a stack."""

    @abstractmethod
    def leaf_names(self, model: Model, name: str) -> dict[str, tuple[str, int]]:
        """Return which leaves of `parameters` are factors of an adapter.

        Keys are paths of leaves as `adamss_jax.leaves.spelled` writes them. Values are the path of the module, and 0
        for B or 1 for C. A module that appears twice in the model may be listed twice.
        """

    @abstractmethod
    def adapted_layers(self, model: Model) -> dict[str, Module]:
        """Return the layers that hold the frozen arrays, by the keys of `attached`.

        They may be written to: each is the layer itself, or a copy that `with_layers` puts in its place.
        """

    @abstractmethod
    def called_layers(self, model: Model) -> dict[str, tuple[Any, Any, bool]]:
        """Return the layers as a user calls them, by the keys of `attached`: with the update, and without it.

        The boolean is True for a layer that need not be tried: its forward is known to be that of its kind, or no
        example input exists for it. Calling the returned layers does not change the model.
        """

    @abstractmethod
    def with_layers(self, model: Model, layers: Mapping[str, Module]) -> Model:
        """Return the model with layers from `adapted_layers`, which have been written to, in their places."""

    @abstractmethod
    def added(
        self, model: Model, name: str, placed: Mapping[str, tuple[Site, Factors]], record: Record
    ) -> Model:
        """Return the model with one more adapter and the given record.

        `placed` gives the site and the factors of the adapter by the path of the module.
        """

    @abstractmethod
    def without(self, model: Model, names: Set[str], record: Record) -> Model:
        """Return the model without some adapters and with the given record.

        A layer that loses its last adapter is the plain layer again.
        """

    @abstractmethod
    def with_record(self, model: Model, record: Record) -> Model:
        """Return the model with another record of the same adapters; its variables are trained as the record says."""

    @abstractmethod
    def rewritten(self, model: Model, name: str, values: Mapping[str, Mapping[str, Any]]) -> Model:
        """Return the model with other values in an adapter.

        The values are given by the keys of `attached` and then by name: a field of `Factors`, ``part``, ``kept``,
        ``gate`` or ``place``.
        """

    @abstractmethod
    def with_base(self, model: Model, base: Mapping[str, HostCopies | None], *, constant: bool) -> Model:
        """Return the model with other values of `Attached.base`.

        Parameters
        ----------
        model
            Adapted model.
        base
            New values, by the keys of `attached`.
        constant
            Whether the weights hold every update that the model computes, so that no factors are trained.
        """

    @abstractmethod
    def saved_exchanged(self, model: Model, arrays: Mapping[str, Mapping[str, Array]]) -> Model:
        """Return the model with other arrays in its ``modules_to_save``."""

    # ---- what follows from these --------------------------------------------------------------------

    def members(self, module: Module) -> tuple[str, ...]:
        return next((names for of, names in self.composed.items() if isinstance(module, of)), ())

    def site(self, module: Module, path: str) -> Site:
        if self.kinds.find(module) is None:  # a kind that a user registered takes precedence over a refusal
            for of, why in self.refused.items():
                if isinstance(module, of):
                    raise LayerTypeError(f"{path or 'the model itself'} is a {type(module).__name__}, {why}")
        return super().site(module, path)

    def versions(self) -> Mapping[str, str]:
        return {**super().versions(), self.name: version(self.name)}

    def own_arrays(self, site: Site) -> dict[str, Array | None]:
        arrays = super().own_arrays(site)
        for name, array in arrays.items():
            if array is not None:
                check_values(array, site.path or "the model itself", name)
        return {name: None if array is None else jnp.asarray(array) for name, array in arrays.items()}

    def arrays(self, module: Module) -> dict[str, Array]:
        if isinstance(module, StackedLayer):
            raise LayerError(
                "modules_to_save names a single layer of a stack; name the module that holds the stack"
            )
        return self.named_arrays(module)

    def bank(self, model: Model) -> Bank:
        found, adapters = self.attached(model), {}
        if not found:
            return Bank()
        record, holding = next(iter(found.values())).record, set[str]()
        originals = dict(record.originals)
        for name, own in record.adapters:
            mine = {
                owner: found[owner].adapters[name]
                for owner in own.owners
                if owner in found and name in found[owner].adapters
            }
            factors = {owner: adapter.factors() for owner, adapter in mine.items()}
            places = {path: split_path(path) for path, _ in own.shapes if owner_of(path) in mine}
            held = {owner: _on_host(each.part) for owner, each in mine.items() if each.part.held is not None}
            holding |= held.keys()
            kept: Mapping[str, Array] = next((adapter.kept for adapter in mine.values() if adapter.kept), {})
            adapters[name] = Adaptation(
                config=own.config,
                layers={path: factors_at(factors[owner], index) for path, (owner, index) in places.items()},
                shapes={path: shape for path, shape in own.shapes if path in places},
                saved=own.saved,
                name=name,
                weight=own.weight,
                trainable=own.trainable,
                trained=own.trained,
                revives=own.revives,
                held={path: held[owner][index] for path, (owner, index) in places.items() if owner in held},
                kept=_unpacked(kept, {path: originals[path] for path in own.saved}),
            )
        base = {owner: each.base for owner, each in found.items() if owner in holding}
        off = any(each.off for each in found.values())
        names, axis = record.route or ((), 0)
        # The rows are left out, because the gates that encode them may be traced.
        route = None if record.route is None else Route(names, (), axis)
        return Bank(adapters, originals, base, disabled=off, route=route)

    def followed(self, model: Model, name: str) -> bool:
        return self.bank(model).adapters[name].config.budget in FOLLOWED

    def probed(self, model: Model) -> Mapping[str, tuple[Array, Array] | str]:
        called = {path: own for path, own in self.called_layers(model).items() if not own[2]}
        layers = self.adapted_layers(model) if called else {}
        shapes = next(iter(self.attached(model).values())).record.shapes if called else {}
        found: dict[str, tuple[Array, Array] | str] = {}
        for path in (
            called.keys() & shapes.keys()
        ):  # skip stacks: `shapes` has the paths of their single layers
            layer, base, _ = called[path]
            d, _ = shapes[path]
            x = example_input(self.kinds.of(layers[path], path), layers[path], d)
            try:
                y, again, without = layer(x), layer(x), base(x)
            except Exception as error:
                found[path] = f"could not be tried on an input of shape {x.shape} ({error})"
                continue
            if bool(jnp.array_equal(y, again)):
                found[path] = y, without
        return found

    def lost(self, model: Model) -> Mapping[str, str]:
        found = self.attached(model)
        record = next(iter(found.values())).record if found else None
        lost, layers = {}, self.adapted_layers(model) if found else {}
        for path, shape in record.shapes.items() if record else ():
            owner, index = split_path(path)
            if owner not in found:
                lost[owner] = "has been replaced by another module, without its adapter"
            elif not index:
                kind, weight = self.kinds.of(layers[owner], path), None
                weight = self.stores.read(layers[owner], kind.weight)
                now = tuple(getattr(weight, "shape", ()))
                view = kind.view(layers[owner], path)
                if len(now) == len(view.axes) and view.shape(now) != shape:
                    lost[owner] = f"has a weight of shape {now} now, which its adapter does not fit"
        return lost

    def insert(self, model: Model, adaptation: Adaptation, originals: Values) -> Model:
        modules, placed, name = self.modules(model), {}, adaptation.name
        self._check_not_normalised(modules, adaptation.layers)
        for owner, layers in by_owner(adaptation.layers).items():
            path = next(path for path in adaptation.layers if owner_of(path) == owner)
            site = self.site(modules[path], path)
            weight = self.stores.read(site.layer, site.kind.weight)
            near = {
                index: Factors(*(beside(array, weight) for array in factors))
                for index, factors in layers.items()
            }
            placed[owner] = site, stacked_factors(near, site.kind.leading(site.layer), owner)
        before = next((each.record for each in self.attached(model).values()), Record())
        own = Own(
            adaptation.config,
            tuple(adaptation.shapes.items()),
            adaptation.saved,
            trainable=adaptation.trainable,
        )
        copies = {path: HostCopies(arrays) for path, arrays in originals.items()} | dict(before.originals)
        record = Record((*before.adapters, (name, own)), tuple(copies.items()))
        return self._keeping(self.added(model, name, placed, record), name, adaptation.kept)

    def remove(self, model: Model, names: Iterable[str]) -> Model:
        before, gone = self._record(model), {*names}
        left = Record(tuple((name, own) for name, own in before.adapters if name not in gone))
        saved = left.saved(name for name, _ in left.adapters)
        originals = tuple((path, arrays) for path, arrays in before.originals if path in saved)
        return self.without(model, gone, replace(left, originals=originals))

    def activated(self, model: Model, states: Mapping[str, State]) -> Model:
        record = self._record(model)
        adapters = []
        for name, own in record.adapters:
            weight, trainable, trained, kept = states[name]
            adapters.append((name, replace(own, weight=weight, trainable=trainable, trained=trained)))
            model = self._keeping(model, name, kept)
        return self.with_record(model, replace(record, adapters=tuple(adapters)))

    def routed(self, model: Model, route: Route | None) -> Model:
        record, found = self._record(model), self.attached(model)
        for name, own in record.adapters:
            gates = {}
            for owner in own.owners:
                gate = None
                if route is not None and name in route.names:
                    rows = np.asarray(route.rows) == route.names.index(name)
                    leading = found[owner].adapters[name].factors().ranks.shape[:-1]
                    gate = jnp.broadcast_to(jnp.asarray(rows), (*leading, len(rows)))
                gates[owner] = {"gate": gate, "place": None if gate is None else owner}
            model = self.rewritten(model, name, gates)
        names = None if route is None else (route.names, route.axis)
        return self.with_record(model, replace(record, route=names))

    def _record(self, model: Model) -> Record:
        return next(iter(self.attached(model).values())).record

    def _keeping(self, model: Model, name: str, kept: Values) -> Model:
        """Return the model with other `Adaptation.kept` values of an adapter.

        The values become arrays of one of its layers, so that they are saved, copied and moved with the model. A
        layer outside any stack is preferred, since arrays in a stack need its leading axes.
        """
        mine = {
            owner: each.adapters[name]
            for owner, each in self.attached(model).items()
            if name in each.adapters
        }
        if not kept and not any(adapter.kept for adapter in mine.values()):
            return model
        found = {owner: adapter.factors().ranks.shape[:-1] for owner, adapter in mine.items()}
        owner = min(found, key=lambda owner: len(found[owner]))
        return self.rewritten(model, name, {owner: {"kept": _packed(kept, found[owner])}})

    def _check_not_normalised(self, modules: Mapping[str, Any], paths: Iterable[str]) -> None:
        wrappers = {path: module for path, module in modules.items() if isinstance(module, self.normalising)}
        for path in paths:
            for outer, module in wrappers.items():
                if path.startswith(join_path(outer, "")):
                    raise LayerError(
                        f"{path} lies in a {type(module).__name__}, which computes its weight anew at every call, so "
                        "that an update in it would not last; leave it out of targets, or put the layer itself in "
                        "the place of the wrapper"
                    )

    def with_factors(self, model: Model, name: str, layers: Mapping[str, Factors]) -> Model:
        return self._with_arrays(model, name, {path: each._asdict() for path, each in layers.items()})

    def with_masks(self, model: Model, name: str, active: Mapping[str, Array]) -> Model:
        return self._with_arrays(model, name, {path: {"active": mask} for path, mask in active.items()})

    def _with_arrays(self, model: Model, name: str, layers: Mapping[str, Mapping[str, Array]]) -> Model:
        """Return the model with other arrays in an adapter, by path of the layer and field of `Factors`."""
        found, values = self.attached(model), dict[str, dict[str, Array]]()
        for owner, own in by_owner(layers).items():
            whole = found[owner].adapters[name].factors()._asdict()
            values[owner] = {}
            for index, arrays in own.items():
                for field, array in arrays.items():
                    whole[field] = values[owner][field] = with_layer(whole[field], index, array)
        return self.rewritten(model, name, values)

    def check_writable(self, model: Model, layers: Iterable[str], saved: Iterable[str] = ()) -> None:
        adapted = self.adapted_layers(model)
        for path in layers:
            layer = adapted[path]
            kind = self.kinds.of(layer, path)
            for name in (kind.weight, kind.bias):
                if (why := self.stores.refusal(layer, name)) is not None:
                    raise LayerError(f"{path}: its {name} {why}")

    def exchange(
        self, model: Model, arrays: Mapping[str, Mapping[str, Array]]
    ) -> tuple[Model, dict[str, dict[str, Array]]]:
        layers = self.adapted_layers(model)
        before = exchange_all(
            arrays, lambda path, name, value: self.stores.exchange(layers[path], name, value)
        )
        return self.with_layers(model, {path: layers[path] for path in arrays}), before

    def exchange_saved(
        self, model: Model, arrays: Mapping[str, Mapping[str, Array]]
    ) -> tuple[Model, dict[str, dict[str, Array]]]:
        modules = self.modules(model)
        present = {path: self.arrays(modules[path]) for path in arrays}
        before = {path: {name: present[path][name] for name in own} for path, own in arrays.items()}
        return self.saved_exchanged(model, arrays), before

    def enter(self, model: Model, ledger: Ledger) -> Model:
        found, constant = self.attached(model), True
        for name, each in self.bank(model).adapters.items():
            held, parts = by_owner(ledger.held.get(name, {})), dict[str, dict[str, Any]]()
            for owner, layers in by_owner(each.layers).items():
                factors, part = found[owner].adapters[name].factors(), Part()
                if owner in held:
                    part = part_of(layers, held[owner], factors.ranks.shape[:-1])
                    part = Part(*(None if array is None else beside(array, factors.C) for array in part))
                parts[owner] = {"part": part}
                constant = constant and (part.empty or not each.active)
            model = self.rewritten(model, name, parts)
        base = {owner: HostCopies.of(ledger.base.get(owner)) for owner in found}
        return self.with_base(model, base, constant=constant)

    # ---- for optimisers ------------------------------------------------------------------------------

    def leaves(self, model: Model, name: str) -> Leaves:
        """Return the places in `parameters` of an adapter's factors."""
        layers: dict[str, dict[str, tuple[Index, Factors]]] = {}
        for path, factors in self.bank(model).adapters[name].layers.items():
            owner, index = split_path(path)
            layers.setdefault(owner, {})[path] = index, outline(factors, name=path)
        # A stack is always adapted as a whole, so the index of its last layer gives the sizes of its axes.
        pairs = {
            owner: Pair(tuple(axis + 1 for axis in max(index for index, _ in own.values())), own)
            for owner, own in layers.items()
        }
        return Leaves(self.leaf_names(model, name), pairs)

    def trained_elements(self, model: Model) -> Any:
        """Return masks in the tree structure of `parameters`: True where an element is trained.

        The masks broadcast against the parameters. The tree has the parameters of all adapters that are trained.
        """
        names = self._record(model).trained
        everything, known = jnp.ones((), bool), []
        for leaves in (self.leaves(model, name) for name in names):
            masks = leaves.masks({path: jnp.asarray(f.active) for path, f in leaves.outlines.items()})
            known.append((leaves, masks))

        def trained(path: tuple[Any, ...], _: Any) -> Array:
            found = ((leaves.name(path), masks) for leaves, masks in known)
            return next((masks[leaf] for leaf, masks in found if leaf is not None), everything)

        return jax.tree_util.tree_map_with_path(trained, self.parameters(model, names))


def models_of(model: Model) -> JaxModels:
    """Return the backend of a model that belongs to a JAX library.

    Raises
    ------
    BackendError
        If the model belongs to another framework.
    """
    backend = backend_for(model)
    if not isinstance(backend, JaxModels):
        raise BackendError(f"{type(model).__name__} is not a model of one of JAX's libraries")
    return backend


def owner_prefix(found: Mapping[str, Record]) -> str:
    """Return the path within a model of the module that was adapted: ``""``, or a path that ends with a dot.

    Parameters
    ----------
    found
        Records of all adapted layers of the model by their paths, in the order of the model.

    Raises
    ------
    StateError
        If several modules of the model were adapted one by one, or if the model is only a part of the adapted one.
    """
    if not found:
        return ""
    record = next(iter(found.values()))
    if any(other != record for other in found.values()) or len(found) > len(record.owners):
        raise StateError(
            "parts of the model were adapted one by one; call adamss on each of them, not on the whole"
        )
    # Compare paths and not positions, since attributes may have another order after a transformation or in another
    # model. Try every owner for the first layer found, since earlier ones may have been replaced after the attach.
    first = next(iter(found))
    for owner in record.owners:
        prefix = first.removesuffix(owner)
        if f".{first}".endswith(f".{owner}") and set(found) <= {prefix + path for path in record.owners}:
            return prefix
    raise StateError(
        "this is a part of a model that was adapted as a whole: adapters are attached already; "
        "call adamss on the whole"
    )


def _on_host(part: Part) -> np.ndarray[Any, Any]:
    """Return the mask of the subspaces whose update the weight holds, as a NumPy array."""
    if part.empty:
        return np.ones(part.held.shape, bool)
    # A traced mask has no values, but it is known not to be all True, since `part` is not empty. `adamss.disabled`
    # asks for no more than that.
    traced = isinstance(part.held, jax.core.Tracer)
    return np.zeros(part.held.shape, bool) if traced else np.asarray(restored(part).held)


def _packed(values: Values, leading: Index) -> dict[str, Array]:
    """Return the arrays of ``modules_to_save`` by name, with the leading axes of the layer that keeps them.

    A ``scan`` or ``vmap`` over a stack of layers splits all its arrays along these axes, so the kept ones need them.
    """
    found = {join_path(path, name): array for path, own in values.items() for name, array in own.items()}
    if leading:
        size = math.prod(leading)
        for name, array in found.items():
            flat = jnp.pad(jnp.reshape(array, -1), (0, -array.size % size))
            found[name] = jnp.reshape(flat, (*leading, -1))
    return found


def _unpacked(packed: Mapping[str, Array], originals: Mapping[str, HostCopies]) -> Values:
    """Undo `_packed`; the shapes are those of the base values."""
    found: dict[str, dict[str, Array]] = {}
    for path, base in originals.items():
        for name, shape in base.shapes.items():
            if (array := packed.get(join_path(path, name))) is not None:
                if array.shape != shape:
                    array = jnp.reshape(jnp.reshape(array, -1)[: math.prod(shape)], shape)
                found.setdefault(path, {})[name] = array
    return found
