"""What a framework must supply so that `adamss` works on its arrays and its models.

A backend is a handful of primitives, by role: `Arrays` (numbers and bytes), `Processes` (several of them; the
defaults are for one), and `Models`. Everything that is not tied to one framework (matching of targets, decomposition,
segmentation, initial values, merging, the file format, the checks) is written once, in `adamss.core`,
`adamss.backend.ledger` and `adamss.verbs`, on top of them.

Models are handled in the style that fits both frameworks whose models are changed in place and those whose models are
values: whatever changes a model returns it. Either every change of a call is made or none.

The laws that bind the primitives are given with each as an equation; ``==`` is meant to the bit. Below, ``f`` are
factors, ``m`` is a model, ``W, b`` a layer's weight and bias in paper orientation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar, TypeAlias, TypeVar

import numpy as np

from adamss.backend.bank import DEFAULT, Adaptation, Bank, Ledger, Route, Rows, State, Values
from adamss.backend.sites import BaseWeight, Kinds, LoraForm, Site, StackedLayer
from adamss.backend.stores import Stores
from adamss.backend.tensors import StoredTensor
from adamss.core import Factors
from adamss.core._array import Array, device
from adamss.errors import ArrayValueError, LayerError, LayerTypeError, StateError

__all__ = [
    "Array",
    "Arrays",
    "Backend",
    "Division",
    "Model",
    "Models",
    "Module",
    "Processes",
    "ValueModels",
    "Weights",
    "batches",
]

Model: TypeAlias = Any
"""A model of the framework."""

Module: TypeAlias = Any
"""One module (layer, node) of a model."""

T = TypeVar("T")

COLUMNS = 8192
"""Columns of weights that are segmented together, which takes some hundred numbers for each."""


# ---- work that is divided --------------------------------------------------------------------------


class Division:
    """How the layers of a model are divided among threads and processes; this one is for one of each.

    ::

        for batch in batches(division.share(weights, settings)):
            with division.carrying() as go:
                if go:
                    layers |= ...
        layers = division.gather(layers)
    """

    def share(self, weights: Weights, settings: str) -> Iterator[tuple[str, BaseWeight]]:
        """Yield the layers that this process is to compute, with all entries of their weights, in `by_shape` order.

        Parameters
        ----------
        weights
            Of all layers.
        settings
            All that the results depend on beside the weights.
        """
        for path in by_shape(weights):
            yield path, weights[path]

    def gather(self, layers: Mapping[str, Factors]) -> dict[str, Factors]:
        """Return the factors of all layers from what each process has computed; raise on all what failed on one."""
        return dict(layers)

    @contextmanager
    def carrying(self) -> Iterator[bool]:
        """Carry an error to `gather`, where other processes wait; yield whether none has come so far."""
        yield True

    def each(self, function: Callable[[str], T], batch: Mapping[str, BaseWeight]) -> list[T]:
        """Return a function's results for the paths of a batch, in order; maybe computed in several threads."""
        return list(map(function, batch))


class Weights(Mapping[str, BaseWeight]):
    """Base weights by path, each read when it is looked up: a store may have to compute it, or to fetch it.

    Parameters
    ----------
    paths
        In the order of the model.
    read
        Reads one.
    """

    def __init__(self, paths: Iterable[str], read: Callable[[str], BaseWeight]) -> None:
        self._read = read
        self._forms: dict[str, Any] = dict.fromkeys(paths)

    def __getitem__(self, path: str) -> BaseWeight:
        base = self._read(path)
        self._forms[path] = _form(base)
        return base

    def __iter__(self) -> Iterator[str]:
        return iter(self._forms)

    def __len__(self) -> int:
        return len(self._forms)

    def form(self, path: str) -> Any:
        """Return what weights must have in common to be computed together; it reads each weight once at most."""
        return self._forms[path] or _form(self[path])

    def shape(self, path: str) -> tuple[int, int]:
        """Return (d, n)."""
        d, n = self.form(path)[0]
        return d, n


def by_shape(weights: Weights) -> list[str]:
    """Return paths in the order of the model, but those of one shape, dtype and device next to each other."""
    alike: dict[Any, list[str]] = {}
    for path in weights:
        alike.setdefault(weights.form(path), []).append(path)
    return [path for paths in alike.values() for path in paths]


def batches(layers: Iterable[tuple[str, BaseWeight]]) -> Iterator[dict[str, BaseWeight]]:
    """Divide layers into groups of neighbours of one shape, as many together as have `COLUMNS` columns."""
    batch: dict[str, BaseWeight] = {}
    for path, base in layers:
        if batch:
            first = next(iter(batch.values()))
            if _form(first) != _form(base) or (len(batch) + 1) * base.W.shape[1] > COLUMNS:
                yield batch
                batch = {}
        batch[path] = base
    if batch:
        yield batch


def _form(base: BaseWeight) -> tuple[Any, ...]:
    return tuple(map(int, base.W.shape)), base.W.dtype, str(device(base.W)), base.b is None


# ---- roles -----------------------------------------------------------------------------------------


class Arrays(ABC):
    """Numbers of the framework, and their bytes."""

    @abstractmethod
    def linear(self, x: Array, weight: Array, bias: Array | None, *factors: Factors) -> Array:
        """Return ``x @ (weight + sum of delta) + bias``, differentiable in x, B and C.

        ``linear(x, W, b, *f) ~ core.linear(x, W, b, *f)`` within the dtype's tolerance, gradients
        likewise ``~ core.linear_vjp``; with C = 0, ``linear(x, W, b, f) == x @ W + b``.

        Parameters
        ----------
        x
            Inputs (..., d).
        weight, bias
            (d, n) and (n,) or None.
        factors
            Factors of the layer, of each adapter.
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

    def has_values(self, array: Array) -> bool:
        """Return whether the array of a weight has values, and not only a shape and a dtype until it is loaded.

        `load` can do without, if told so; for all else the layer is refused.
        """
        return True


class Processes:
    """Several processes that hold one model, or parts of it; the defaults are for one."""

    def whole(self, array: Array) -> Array:
        """Return an array with all its entries, where a process holds only a part; all of them call this.

        Only `Models` returns such arrays; their ``shape`` is that of the whole.
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


class Models(ABC):
    """Models of the framework, their layers, and what is attached to them."""

    kinds: Kinds
    """Kinds of layers that can be adapted."""

    stores: Stores
    """Ways in which weights are kept."""

    trains_rows: ClassVar[bool] = False
    """Whether `insert` takes `Adaptation.tokens`, and `exchange` takes `Rows` for an array."""

    @abstractmethod
    def handles(self, model: Model) -> bool:
        """Return whether this is a model of the framework."""

    @abstractmethod
    def modules(self, model: Model) -> dict[str, Module]:
        """Return the modules by their paths, as ``targets`` spell them, in the order of the model.

        A module that appears in several places has several paths. Adapters are not among them. The layers of a stack
        are `adamss.backend.sites.StackedLayer`, each by its own path.
        """

    def members(self, module: Module) -> tuple[str, ...]:
        """Return the names of the layers that a target means by this module: the projections of an attention.

        Empty for a module that a target means itself.
        """
        return ()

    def unadaptable(self, model: Model) -> Mapping[str, str]:
        """Return what a target may name that is no module and cannot be adapted, by path, and why, as a noun."""
        return {}

    def heads(self, model: Model) -> list[str]:
        """Return the paths of output heads, which ``targets="all-linear"`` leaves out."""
        return []

    def input_embedding(self, model: Model) -> Module | None:
        """Return the module that embeds the tokens of the input; None if nobody knows."""
        return None

    def rows_refusal(self, model: Model, path: str) -> str | None:
        """Return why PEFT would compute something else with the trained rows of an embedding; None if not."""
        return None

    def site(self, module: Module, path: str) -> Site:
        """Return where the matrix of a layer is.

        Raises
        ------
        LayerTypeError, LayerError
            If the module has no weight that can be adapted; the message names `path`.
        """
        stacked = isinstance(module, StackedLayer)
        layer, index = (module.module, module.index) if stacked else (module, ())
        kind = self.kinds.of(layer, path)
        return Site(path, layer, kind, kind.view(layer, path or "the model itself"), index)

    def own_arrays(self, site: Site) -> dict[str, Array | None]:
        """Return weight and bias of the layer at a site as it has them now, by their names; of a stack, the whole."""
        return {name: self.stores.read(site.layer, name) for name in site.names}

    def lora_form(self, model: Model, site: Site) -> LoraForm:
        """Return how PEFT's LoRA writes the update of a layer.

        Raises
        ------
        LayerTypeError
            If it has no way; the message names the layer.
        """
        if site.kind.lora is None:
            raise LayerTypeError(
                f"{site.path} is a {type(site.layer).__name__}, whose update to_lora has no form for; adamss.save "
                "takes it, or merge the model and save that"
            )
        if (what := site.kind.lora_refusal(site.layer)) is not None:
            raise LayerTypeError(
                f"{site.path} is a {type(site.layer).__name__} with {what}, which PEFT's LoRA leaves out, so that it "
                "would compute something else; adamss.save takes it, or merge the model and save that"
            )
        return site.kind.lora

    def noise(self, site: Site) -> float:
        """Return the rounding error of the weight at a site: see `Store.noise`."""
        return self.stores.noise(site.layer, site.kind.weight)

    @abstractmethod
    def arrays(self, module: Module) -> dict[str, Array]:
        """Return all the named arrays of a module, as ``modules_to_save`` stores them.

        Names and orientation are PyTorch's, so that a head travels between frameworks: ``weight`` (n, d) and
        ``bias`` (n,) of a linear layer, dots between the names of nested modules.
        """

    def shared(self, model: Model, saved: Iterable[str]) -> Mapping[str, frozenset[str]]:
        """Return by what other names the tensors of these modules are known in the model (tied embeddings).

        Names are as in a file: path of the module and name within it. Empty: known to be untied. Missing: unknown,
        since the model may tie weights by computation. The default is for frameworks in which two modules never hold
        one tensor.

        Parameters
        ----------
        model
            Adapted or not.
        saved
            Module paths of ``modules_to_save``.
        """
        return {}

    @abstractmethod
    def bank(self, model: Model) -> Bank:
        """Return what is attached to the model, an empty bank if nothing is; arrays as they are, not copies."""

    def followed(self, model: Model, name: str) -> bool:
        """Return whether something in this process keeps an adapter to its schedule; True if unknown."""
        return True

    def controlled(self, model: Model, name: str) -> bool:
        """Return whether a controller that has not been removed holds the optimiser of an adapter."""
        return False

    def probed(self, model: Model) -> Mapping[str, tuple[Array, Array] | str]:
        """Return what adapted layers make of some input, with their updates and without; the same at each call.

        By path, of the layers whose forward is not known to be that of their kind, and gives the same twice. If no
        input can be made for one: why, as a clause.
        """
        return {}

    def lost(self, model: Model) -> Mapping[str, str]:
        """Return the adapted layers that somebody has replaced or resized since, and what happened, as a clause.

        They are not among those of `bank`.
        """
        return {}

    @abstractmethod
    def insert(self, model: Model, adaptation: Adaptation, originals: Values) -> Model:
        """Return the model with one more adapter, which is not active, and everything but adapters frozen.

        ``bank(insert(m, a, o)).adapters[a.name].layers == a.layers``. With the first adapter, what requires a
        gradient is remembered for `remove`, if the framework has such a mark.

        Parameters
        ----------
        model
            A model in which no adapter has that name.
        adaptation
            Settings, factors by module path, paths of ``modules_to_save``, their values (`Adaptation.kept`), and,
            where `trains_rows`, trained rows, which are in the place of those of the weight for whoever reads it.
        originals
            Base values of its modules to save, kept for `Bank.originals`.
        """

    @abstractmethod
    def remove(self, model: Model, names: Iterable[str]) -> Model:
        """Return the model without these adapters; weights and saved modules stay as they are.

        With the last one, what required a gradient before `insert` does again.
        """

    @abstractmethod
    def activated(self, model: Model, states: Mapping[str, State]) -> Model:
        """Return the model in which other adapters are active, and trained.

        A model computes `Arrays.linear` in adapted layers, with the updates of all active adapters, each times its
        weight. What is not trained gets no gradient; modules to save are trained with the active adapter that saves
        them.

        Parameters
        ----------
        model
            An adapted model. Its modules to save have the values of the adapters that will be active.
        states
            Of every adapter, by name.
        """

    @abstractmethod
    def parameters(self, model: Model, names: Iterable[str]) -> Any:
        """Return what an optimiser gets, in the framework's own form: of those of these adapters that are trained.

        B and C of each layer, trained rows, and saved modules.
        """

    @abstractmethod
    def with_factors(self, model: Model, name: str, layers: Mapping[str, Factors]) -> Model:
        """Return the model with other factors in some layers of an adapter, of the shapes that they have.

        ``bank(with_factors(m, n, f)).adapters[n].layers[path] == f[path]``. Nothing that is compiled may depend on
        their values, and variables stay the objects that an optimiser knows.
        """

    def with_rows(self, model: Model, name: str, tokens: Mapping[str, Rows]) -> Model:
        """Return the model with other values of the trained rows of an adapter; called where `trains_rows` alone."""
        raise StateError(f"the backend {type(self).__name__} trains no rows of embeddings")

    @abstractmethod
    def with_masks(self, model: Model, name: str, active: Mapping[str, Array]) -> Model:
        """Return the model with other masks: `with_factors`, of masks alone.

        Parameters
        ----------
        model, name
            An adapted model, and one of its adapters.
        active
            (K,) booleans by module path; a layer that is not named keeps its mask.
        """

    def check_writable(self, model: Model, layers: Iterable[str], saved: Iterable[str] = ()) -> None:
        """Check that arrays can be replaced: of adapted layers, and of modules to save, by the path of the module.

        Raises
        ------
        LayerError
            Naming the layer, the reason and the way out.
        """
        modules = self.modules(model)
        for path in layers:
            site = self.site(modules[path], path)
            for name in site.names:
                if (why := self.stores.refusal(site.layer, name)) is not None:
                    raise LayerError(f"{path}: its {name} {why}")

    @abstractmethod
    def exchange(
        self, model: Model, arrays: Mapping[str, Mapping[str, Array]]
    ) -> tuple[Model, dict[str, dict[str, Array]]]:
        """Return the model with other arrays in adapted layers, and those that were there, in the same form.

        ``exchange(*exchange(m, a)) == m, a``: what comes back is not written over, and is taken as it is.

        Parameters
        ----------
        model
            An adapted model.
        arrays
            By path of the module and name, as `own_arrays` has them; or `Rows`, of which only these are replaced, for
            all modules that share the weight.
        """

    def dequantised(self, model: Model) -> dict[str, Module]:
        """Return, by path of the module, a float layer of the same numbers for each adapted layer that is quantised.

        None by default, for frameworks whose stores keep the numbers that they are given.

        Raises
        ------
        LayerError
            If a layer cannot be replaced; the message names it.
        """
        return {}

    def exchange_layers(self, model: Model, layers: Mapping[str, Module]) -> tuple[Model, dict[str, Module]]:
        """Return the model with other layers, adapters and all, and those that were there, by path of the module.

        ``exchange_layers(*exchange_layers(m, l)) == m, l``. Only layers of `dequantised`, and those that they have
        taken the place of.
        """
        return model, {}

    @abstractmethod
    def enter(self, model: Model, ledger: Ledger) -> Model:
        """Return the model with another ledger: ``bank(enter(m, l)).ledger == l``.

        Its adapters compute what the weights do not hold, and nothing else. W0 is kept in the host's memory.
        """

    @abstractmethod
    def exchange_saved(
        self, model: Model, arrays: Mapping[str, Mapping[str, Array]]
    ) -> tuple[Model, dict[str, dict[str, Array]]]:
        """Return the model with other arrays in modules to save, and those that were there, in the form of `arrays`.

        Otherwise as `exchange`. Arrays that are not named stay as they are.
        """

    @abstractmethod
    def switched(self, model: Model, *, on: bool) -> Model:
        """Return the model with its adapters in what it computes, or (while `adamss.disabled` lasts) without them."""

    def routed(self, model: Model, route: Route | None) -> Model:
        """Return the model in which each row of a batch goes through an adapter of its own, None for as before.

        What is compiled does not depend on the rows, if there are as many.

        Raises
        ------
        LayerError
            If a layer cannot be routed, because it has one weight for all rows; the message names it.
        StateError
            If the backend has no routing.
        """
        raise StateError(f"routed: the backend {type(self).__name__} cannot route the rows of a batch")


class ValueModels(Models):
    """Models that are values and have a field for a `Bank`: what is attached is one more value, and no code.

    For frameworks whose models are trees that nobody trains by `parameters` (NumPy), and for a first backend.
    """

    @abstractmethod
    def with_arrays(self, model: Model, values: Mapping[str, Mapping[str, Array]]) -> Model:
        """Return the model with other arrays in some modules.

        ``arrays(modules(with_arrays(m, v))[path]) == v[path]``, for the names that it has. They are copied, if
        anybody may change the arrays of a model in place.
        """

    @abstractmethod
    def with_bank(self, model: Model, bank: Bank) -> Model:
        """Return the model with another bank; its layers compute the factors that `Bank.computed` returns."""

    def own_arrays(self, site: Site) -> dict[str, Array | None]:
        """Return `arrays` of the layer, so that one form of them is enough."""
        return dict(self.arrays(site.layer))

    def noise(self, site: Site) -> float:
        """Return 0: a value keeps the numbers that it is given."""
        return 0.0

    def check_writable(self, model: Model, layers: Iterable[str], saved: Iterable[str] = ()) -> None:
        """Return: a value can have any arrays."""

    def insert(self, model: Model, adaptation: Adaptation, originals: Values) -> Model:
        """See `Models.insert`."""
        bank = self.bank(model)
        adapters = {**bank.adapters, adaptation.name: adaptation}
        return self.with_bank(
            model, replace(bank, adapters=adapters, originals={**originals, **bank.originals})
        )

    def remove(self, model: Model, names: Iterable[str]) -> Model:
        """See `Models.remove`."""
        bank, gone = self.bank(model), {*names}
        left = {name: each for name, each in bank.adapters.items() if name not in gone}
        saved = {path for each in left.values() for path in each.saved}
        originals = {path: values for path, values in bank.originals.items() if path in saved}
        return self.with_bank(model, replace(bank, adapters=left, originals=originals) if left else Bank())

    def activated(self, model: Model, states: Mapping[str, State]) -> Model:
        """See `Models.activated`."""
        bank = self.bank(model)
        for name, state in states.items():
            bank = bank.changed(name, **state._asdict())
        return self.with_bank(model, bank)

    def parameters(self, model: Model, names: Iterable[str]) -> Any:
        """Return the arrays by path and name; those of several adapters by their names first."""
        bank, modules = self.bank(model), self.modules(model)
        found = {}
        for name in names:
            each = bank.adapters[name]
            if each.trained:
                trained = {path: {"B": f.B, "C": f.C} for path, f in each.layers.items()}
                found[name] = trained | {path: self.arrays(modules[path]) for path in each.saved}
        return next(iter(found.values()), {}) if len(found) < 2 else found

    def with_factors(self, model: Model, name: str, layers: Mapping[str, Factors]) -> Model:
        """See `Models.with_factors`; an optimiser's step is one too."""
        bank = self.bank(model)
        return self.with_bank(model, bank.changed(name, layers={**bank.adapters[name].layers, **layers}))

    def with_masks(self, model: Model, name: str, active: Mapping[str, Array]) -> Model:
        """See `Models.with_masks`."""
        layers = self.bank(model).adapters[name].layers
        new = {path: layers[path]._replace(active=mask) for path, mask in active.items()}
        return self.with_factors(model, name, new)

    def exchange(
        self, model: Model, arrays: Mapping[str, Mapping[str, Array]]
    ) -> tuple[Model, dict[str, dict[str, Array]]]:
        """See `Models.exchange`."""
        modules = self.modules(model)
        before = {path: self.arrays(modules[path]) for path in arrays}
        return self.with_arrays(model, arrays), before

    exchange_saved = exchange

    def enter(self, model: Model, ledger: Ledger) -> Model:
        """See `Models.enter`."""
        bank = replace(self.bank(model), base=ledger.base, layers=ledger.layers)
        for name in bank.adapters:
            bank = bank.changed(name, held=ledger.held.get(name, {}))
        return self.with_bank(model, bank)

    def switched(self, model: Model, *, on: bool) -> Model:
        """See `Models.switched`."""
        return self.with_bank(model, replace(self.bank(model), disabled=not on))

    def routed(self, model: Model, route: Route | None) -> Model:
        """See `Models.routed`; the layers pass `Bank.numbers` of their input to `adamss.core.linear`."""
        return self.with_bank(model, replace(self.bank(model), route=route))


class Backend(Arrays, Processes, Models):
    """One framework."""

    name: ClassVar[str]
    """Name under which the backend is registered, such as ``"torch"``."""

    def set_active(self, model: Model, active: Mapping[str, Array], name: str = DEFAULT) -> Model:
        """Return `with_masks`, after a check that none of them thaws a subspace whose update a weight holds.

        Raises
        ------
        StateError
            If one does, or a layer is none that is adapted.
        ArrayValueError
            If a mask is of another shape. Messages name the layer.
        """
        adaptation = self.bank(model).adapters[name]
        for path, mask in active.items():
            if path not in adaptation.layers:
                raise StateError(f"{path!r} is no adapted layer of the model")
            ranks = adaptation.layers[path].ranks
            if tuple(mask.shape) != tuple(ranks.shape):
                raise ArrayValueError(
                    f"{path}: the mask has shape {tuple(mask.shape)}, not {tuple(ranks.shape)}"
                )
            held = adaptation.held.get(path)
            thawed = None if held is None else held & np.asarray(self.to_stored(mask).numpy())
            if thawed is not None and thawed.any():
                raise StateError(
                    f"{path}: the mask thaws subspace {int(thawed.argmax())}, whose update the weight holds; keep it "
                    f"frozen, or call {adaptation.way_out} first"
                )
        return self.with_masks(model, name, active)
