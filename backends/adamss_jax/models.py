"""What the backends of all model libraries share: one for another library is a module beside `flax.py`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adamss.backend import Adaptation, Backend, Ledger, Site, StackedLayer, backend_for
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
from adamss_jax.stacks import factors_at, stacked_factors

__all__ = ["Attached", "JaxModels", "Record", "models_of", "owner_prefix"]


@dataclass(frozen=True)
class Record:
    """What every adapted layer of a model remembers of the whole; a constant of compiled functions.

    Attributes
    ----------
    config
        The settings.
    name
        Of the adapter.
    shapes
        Path of each adapted layer, from the module that was adapted, and (d, n) of its weight.
    originals
        Path of each of ``modules_to_save``, and its base values.
    trained
        Whether the adapter is trained, and not only computed.
    """

    config: AdamssConfig
    name: str
    shapes: tuple[tuple[str, tuple[int, int]], ...]
    originals: tuple[tuple[str, HostCopies], ...]
    trained: bool = True

    @property
    def owners(self) -> tuple[str, ...]:
        """Paths of the modules that hold the adapters: a stack of layers has one."""
        return tuple(dict.fromkeys(owner_of(path) for path, _ in self.shapes))

    @property
    def saved(self) -> tuple[str, ...]:
        """Paths of ``modules_to_save``."""
        return tuple(path for path, _ in self.originals)

    @property
    def revives(self) -> bool:
        """Whether a frozen subspace may return, so that it must go on getting gradients."""
        return self.config.budget is not None and self.config.budget.revive

    def __deepcopy__(self, memo: Any) -> Self:
        return self


FOLLOWED: set[Any] = set()
"""Schedules that some `adamss_jax.budgeted` of this process has kept a model to."""


class Attached(NamedTuple):
    """What is attached to one layer, or one stack of layers.

    Attributes
    ----------
    record
        Of the model.
    factors
        Of all its layers, stacked.
    part
        What the weight holds.
    base
        While it holds an update: its arrays as they were; None if they were dropped.
    off
        Whether nothing is added to the output for now.
    """

    record: Record
    factors: Factors
    part: Part
    base: HostCopies | None
    off: bool = False


class JaxModels(JaxArrays, Backend):
    """Flax NNX's modules are changed in place; of Equinox's trees every verb returns a new one."""

    # ---- what a library supplies --------------------------------------------------------------------

    composed: ClassVar[Mapping[type, tuple[str, ...]]]
    """Classes of modules that a target may name for layers within them, and the names of these."""

    refused: ClassVar[Mapping[type, str]]
    """Classes of layers that have weights and cannot be adapted, and why, as a clause."""

    normalising: ClassVar[tuple[type, ...]]
    """Classes of modules that compute the weight of a layer within them anew at every call."""

    @abstractmethod
    def attached(self, model: Model) -> dict[str, Attached]:
        """Return what is attached, by the path of the module that holds the arrays, as `insert` was given it."""

    @abstractmethod
    def named_arrays(self, module: Module) -> dict[str, Array]:
        """Return `arrays` of anything but a layer of a stack."""

    @abstractmethod
    def leaf_names(self, model: Model) -> dict[str, tuple[str, int]]:
        """Return which leaves of `parameters` are factors: path of their module, and 0 for B or 1 for C.

        By the `adamss_jax.leaves.spelled` path of the leaf; a module that appears twice may be listed twice.
        """

    @abstractmethod
    def adapted_layers(self, model: Model) -> dict[str, Module]:
        """Return the layers whose arrays are the frozen ones, by the keys of `attached`.

        Each may be written to: it is the layer itself, or a copy that `with_layers` puts in its place.
        """

    @abstractmethod
    def called_layers(self, model: Model) -> dict[str, tuple[Any, Any, bool]]:
        """Return, by the keys of `attached`, copies of a layer as it is called, with its update and without it.

        And whether what it computes is known to be that of its kind, or is none of a linear layer.
        """

    @abstractmethod
    def with_layers(self, model: Model, layers: Mapping[str, Module]) -> Model:
        """Return the model with layers of `adapted_layers` that have been written to."""

    @abstractmethod
    def with_active(self, model: Model, active: Mapping[str, Array]) -> Model:
        """Return the model with other masks, stacked, by the keys of `attached`."""

    @abstractmethod
    def with_parts(self, model: Model, parts: Mapping[str, tuple[Part, HostCopies | None]]) -> Model:
        """Return the model with other `Attached.part` and `Attached.base`, by the keys of `attached`."""

    @abstractmethod
    def saved_exchanged(self, model: Model, arrays: Mapping[str, Mapping[str, Array]]) -> Model:
        """Return the model with other arrays in modules to save."""

    # ---- what follows from it -----------------------------------------------------------------------

    def members(self, module: Module) -> tuple[str, ...]:
        return next((names for of, names in self.composed.items() if isinstance(module, of)), ())

    def site(self, module: Module, path: str) -> Site:
        if self.kinds.find(module) is None:  # nobody has registered one
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

    def adaptation(self, model: Model) -> Adaptation | None:
        found = self.attached(model)
        if not found:
            return None
        record = next(iter(found.values())).record
        places = {path: split_path(path) for path, _ in record.shapes}
        places = {path: place for path, place in places.items() if place[0] in found}
        held = {owner: _on_host(each.part) for owner, each in found.items() if each.part.held is not None}
        return Adaptation(
            config=record.config,
            layers={path: factors_at(found[owner].factors, index) for path, (owner, index) in places.items()},
            shapes={path: shape for path, shape in record.shapes if path in places},
            saved=record.saved,
            ledger=Ledger(
                {path: held[owner][index] for path, (owner, index) in places.items() if owner in held},
                {owner: found[owner].base for owner in held},
            ),
            disabled=any(each.off for each in found.values()),
            revives=record.revives,
            name=record.name,
            trained=record.trained,
        )

    def followed(self, model: Model) -> bool:
        adaptation = self.adaptation(model)
        return adaptation is None or adaptation.config.budget in FOLLOWED

    def probed(self, model: Model) -> Mapping[str, tuple[Array, Array] | str]:
        called = {path: own for path, own in self.called_layers(model).items() if not own[2]}
        layers = self.adapted_layers(model) if called else {}
        shapes = dict(next(iter(self.attached(model).values())).record.shapes) if called else {}
        found: dict[str, tuple[Array, Array] | str] = {}
        for path in called.keys() & shapes.keys():  # those of a stack have no path of their own
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
        for path, shape in record.shapes if record else ():
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

    def originals(self, model: Model) -> Mapping[str, Mapping[str, Array]]:
        return dict(next((each.record.originals for each in self.attached(model).values()), ()))

    def placed(
        self, model: Model, adaptation: Adaptation, originals: Mapping[str, Mapping[str, Array]]
    ) -> tuple[Record, dict[str, tuple[Site, Factors]]]:
        """Return what `insert` attaches: the record, and by owner its site and its factors, beside its weight."""
        modules, found = self.modules(model), {}
        self._check_not_normalised(modules, adaptation.layers)
        first = by_owner({path: path for path in adaptation.layers})
        for owner, layers in by_owner(adaptation.layers).items():
            path = next(iter(first[owner].values()))
            site = self.site(modules[path], path)
            weight = self.stores.read(site.layer, site.kind.weight)
            near = {
                index: Factors(*(beside(array, weight) for array in factors))
                for index, factors in layers.items()
            }
            leading = site.kind.leading(site.layer)
            found[owner] = site, stacked_factors(near, leading, owner)
        kept = tuple((path, HostCopies(arrays)) for path, arrays in originals.items())
        shapes = tuple(adaptation.shapes.items())
        return Record(adaptation.config, adaptation.name, shapes, kept, adaptation.trained), found

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

    def with_masks(self, model: Model, active: Mapping[str, Array]) -> Model:
        found, stacked = self.attached(model), {}
        for owner, masks in by_owner(active).items():
            mask = found[owner].factors.active
            for index, own in masks.items():
                mask = mask.at[index].set(own) if index else jnp.asarray(own, bool)
            stacked[owner] = mask
        return self.with_active(model, stacked)

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
        adaptation = self.adaptation(model)
        assert adaptation is not None
        found, parts = self.attached(model), {}
        held = by_owner(ledger.held)
        for owner, layers in by_owner(adaptation.layers).items():
            factors, part = found[owner].factors, Part()
            if owner in held:
                part = part_of(layers, held[owner], factors.ranks.shape[:-1])
                part = Part(*(None if array is None else beside(array, factors.C) for array in part))
            parts[owner] = part, HostCopies.of(ledger.base.get(owner))
        return self.with_parts(model, parts)

    # ---- for optimisers ------------------------------------------------------------------------------

    def leaves(self, model: Model) -> Leaves:
        """Return where in `parameters` the factors of each layer are."""
        adaptation = self.adaptation(model)
        assert adaptation is not None
        layers: dict[str, dict[str, tuple[Index, Factors]]] = {}
        for path, factors in adaptation.layers.items():
            owner, index = split_path(path)
            layers.setdefault(owner, {})[path] = index, outline(factors, name=path)
        # A stack is adapted as a whole: the last of its layers says how long its axes are.
        pairs = {
            owner: Pair(tuple(axis + 1 for axis in max(index for index, _ in own.values())), own)
            for owner, own in layers.items()
        }
        return Leaves(self.leaf_names(model), pairs)

    def trained_elements(self, model: Model) -> Any:
        """Return a tree of the structure of `parameters`, with booleans that broadcast: True where trained."""
        leaves = self.leaves(model)
        masks = leaves.masks({path: jnp.asarray(f.active) for path, f in leaves.outlines.items()})
        everything = jnp.ones((), bool)

        def trained(path: tuple[Any, ...], _: Any) -> Array:
            name = leaves.name(path)
            return everything if name is None else masks[name]

        return jax.tree_util.tree_map_with_path(trained, self.parameters(model))


def models_of(model: Model) -> JaxModels:
    """Return the backend of a model of one of JAX's libraries.

    Raises
    ------
    BackendError
        If it is of another framework.
    """
    backend = backend_for(model)
    if not isinstance(backend, JaxModels):
        raise BackendError(f"{type(model).__name__} is no model of one of JAX's libraries")
    return backend


def owner_prefix(found: Mapping[str, Record]) -> str:
    """Return where in a model the module lies that was adapted: ``""``, or a path that ends with a dot.

    Parameters
    ----------
    found
        Records by path of the adapted layer, all of one model, in its order.

    Raises
    ------
    StateError
        If several modules of the model were adapted one by one, or this is only a part of one.
    """
    if not found:
        return ""
    record = next(iter(found.values()))
    if any(other != record for other in found.values()) or len(found) > len(record.owners):
        raise StateError(
            "parts of the model were adapted one by one; call adamss on each of them, not on the whole"
        )
    # Not by position: attributes come in another order after a transformation, or in another model. And not by one
    # layer: somebody may have replaced it since.
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
    """Return the mask of what the weight holds."""
    if part.empty:
        return np.ones(part.held.shape, bool)
    # A traced mask has no values. That it does not hold all is known, and is what `adamss.disabled` asks for.
    traced = isinstance(part.held, jax.core.Tracer)
    return np.zeros(part.held.shape, bool) if traced else np.asarray(restored(part).held)
