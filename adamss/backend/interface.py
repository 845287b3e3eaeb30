"""Interface that a backend implements so that `adamss` works on the arrays and models of a framework.

A backend consists of a few primitives in three roles: `Arrays` (numbers and bytes), `Processes` (communication
between processes, with defaults for a single one), and `Models`. Everything that does not depend on the framework
(matching of targets, decomposition, segmentation, initial values, merging, the file format, the checks) is built on
these primitives, and written once in `adamss.core`, `adamss.backend.ledger` and `adamss.verbs`.

Every method that changes a model returns the model. This suits frameworks whose models are changed in place as well
as frameworks whose models are values. A call makes all of its changes or none.

The docstring of a primitive states the laws that it must satisfy as equations. There, ``==`` means equality bit for
bit, ``f`` are factors, ``m`` is a model, and ``W, b`` are a layer's weight and bias in paper orientation.
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
"""Largest total number of columns of weights that are segmented together.

The limit bounds the memory, since segmentation needs a few hundred numbers per column."""


# ---- work that is divided --------------------------------------------------------------------------


class Division:
    """Division of the layers of a model among threads and processes. This class is for one thread and one process.

    It is used as follows::

        for batch in batches(division.share(weights, settings)):
            with division.carrying() as go:
                if go:
                    layers |= ...
        layers = division.gather(layers)

    Examples
    --------
    A division among the threads of one process:

    >>> from concurrent.futures import ThreadPoolExecutor
    >>> from adamss.backend import Division
    >>> class Threads(Division):
    ...     def each(self, function, batch):
    ...         with ThreadPoolExecutor(2) as pool:
    ...             return list(pool.map(function, batch))
    >>> Threads().each(str.upper, {"query": None, "value": None})
    ['QUERY', 'VALUE']
    """

    def share(self, weights: Weights, settings: str) -> Iterator[tuple[str, BaseWeight]]:
        """Yield the layers that this process must compute, with their whole weights.

        Layers of one form (see `Weights.form`) follow each other, so that `batches` can group them.

        Parameters
        ----------
        weights
            Weights of all layers.
        settings
            Text that identifies everything else on which the results depend.
        """
        for path in by_shape(weights):
            yield path, weights[path]

    def gather(self, layers: Mapping[str, Factors]) -> dict[str, Factors]:
        """Return the factors of all layers, collected from all processes. An error on one is raised on all."""
        return dict(layers)

    @contextmanager
    def carrying(self) -> Iterator[bool]:
        """Return a context that defers an error until `gather`, where other processes wait.

        It yields whether there has been no error so far.
        """
        yield True

    def each(self, function: Callable[[str], T], batch: Mapping[str, BaseWeight]) -> list[T]:
        """Return the results of `function` for the paths of a batch, in order. Several threads may compute them."""
        return list(map(function, batch))


class Weights(Mapping[str, BaseWeight]):
    """Base weights by path, read only when they are looked up.

    Reading may be expensive, since a store may have to compute the weight or fetch it.

    Parameters
    ----------
    paths
        Paths of the layers, in the order of the model.
    read
        Function that reads the weight of a path.
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
        """Return the form of a weight (shape, dtype, device, bias or none). Weights of one form can be batched.

        The form is remembered, so that asking for it reads each weight at most once.
        """
        return self._forms[path] or _form(self[path])

    def shape(self, path: str) -> tuple[int, int]:
        """Return the shape (d, n) of the weight of a path."""
        d, n = self.form(path)[0]
        return d, n


def by_shape(weights: Weights) -> list[str]:
    """Return the paths grouped by the form of their weights, and otherwise in the order of the model."""
    alike: dict[Any, list[str]] = {}
    for path in weights:
        alike.setdefault(weights.form(path), []).append(path)
    return [path for paths in alike.values() for path in paths]


def batches(layers: Iterable[tuple[str, BaseWeight]]) -> Iterator[dict[str, BaseWeight]]:
    """Divide layers into batches of consecutive layers of one form, with at most `COLUMNS` columns in total.

    A layer with more columns forms a batch by itself.
    """
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
    """Operations on the arrays of the framework, and their conversion to and from bytes."""

    @abstractmethod
    def linear(self, x: Array, weight: Array, bias: Array | None, *factors: Factors) -> Array:
        """Return ``x @ (weight + sum of delta) + bias``, differentiable in x, B and C.

        Within the tolerance of the dtype, ``linear(x, W, b, *f) ~ core.linear(x, W, b, *f)``, and the gradients agree
        with `core.linear_vjp`. With C = 0, ``linear(x, W, b, f) == x @ W + b``.

        Parameters
        ----------
        x
            Inputs (..., d).
        weight
            Weight (d, n).
        bias
            Bias (n,) or None.
        factors
            Factors of the layer, one set per adapter.
        """

    @abstractmethod
    def to_stored(self, array: Array) -> StoredTensor:
        """Return the bytes of an array, such that ``from_stored(to_stored(a), like=a) == a``."""

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
            Array on the requested device. None means the framework's default device.
        dtype
            Name of the requested dtype, such as ``"float32"``. None means the stored dtype.
        """

    @abstractmethod
    def dtype_name(self, array: Array) -> str:
        """Return the name of the dtype of an array: ``"float32"``, ``"bfloat16"``, ``"int64"``, ..."""

    @abstractmethod
    def cast(self, array: Array, dtype: str) -> Array:
        """Return the array in the dtype of the given name, such that ``dtype_name(cast(a, t)) == t``."""

    def has_dtype(self, dtype: str) -> bool:
        """Return whether the framework has a dtype of the given name."""
        return True

    def decomposition_input(self, W: Array) -> Array:
        """Return an array with the values of W on which the weight is decomposed and segmented.

        The default is W itself. A framework that would compile every operation for each new shape returns an array of
        another framework instead. The results pass through `cast` to `insert`, so both must accept such arrays.

        Parameters
        ----------
        W
            Weight (d, n), or (d + 1, n) with the bias as one more row.
        """
        return W

    @abstractmethod
    def versions(self) -> Mapping[str, str]:
        """Return the versions of the framework and of libraries built on it, by name, for the adapter file."""

    def exact(self) -> AbstractContextManager[object]:
        """Return a context in which matrix products have full precision and record no gradients.

        Inside the context, ``a @ b`` of float32 arrays does not use TF32 or bfloat16, whatever the user has set.
        """
        return nullcontext()

    def has_values(self, array: Array) -> bool:
        """Return whether a weight has values. It has none on a meta device, until it is loaded.

        `adamss.load` can work without values if ``check_base=False``. All other functions refuse such a layer.
        """
        return True


class Processes:
    """Operations on a model that is held by several processes, or distributed over them. The defaults are for one."""

    def whole(self, array: Array) -> Array:
        """Return an array with all its entries if a process holds only a part of it. All processes must call this.

        Only the methods of `Models` return partial arrays. The ``shape`` of such an array is that of the whole.
        """
        return array

    def spread(self, array: Array, like: Array) -> Array:
        """Distribute a whole array over the processes as `like` is, such that ``whole(spread(a, like=b)) == a``.

        Parameters
        ----------
        array
            Whole array, the same on all processes.
        like
            Array of the same shape.
        """
        return array

    def once(self, model: Model, action: Callable[[], None]) -> None:
        """Call `action`, on only one process if several processes hold parts of the model.

        All processes must call this method. If `action` raises an error, it is raised on all of them.
        """
        action()

    def divided(self, model: Model, *, enabled: bool) -> AbstractContextManager[Division]:
        """Return a context in which the processes of a program divide the layers of a model among themselves.

        An error inside the context is raised on all processes. With the default, every process computes all layers.

        Parameters
        ----------
        model
            Model that each process holds, in whole or in part.
        enabled
            Whether to divide the layers. If False, this process computes all of them.
        """
        return nullcontext(Division())


class Models(ABC):
    """Operations on the models of the framework, their layers and their adapters."""

    kinds: Kinds
    """Kinds of layers that can be adapted."""

    stores: Stores
    """Stores, the ways in which weights are stored."""

    trains_rows: ClassVar[bool] = False
    """Whether the backend trains rows of embeddings.

    If so, `insert` accepts `Adaptation.tokens`, and `exchange` accepts `Rows` in place of an array."""

    @abstractmethod
    def handles(self, model: Model) -> bool:
        """Return whether the object is a model of the framework."""

    @abstractmethod
    def modules(self, model: Model) -> dict[str, Module]:
        """Return the modules by path, as ``targets`` names them, in the order of the model.

        A module that appears in several places has several paths. Adapters are not included. Each layer of a stack
        has its own path and is a `adamss.backend.sites.StackedLayer`.
        """

    def members(self, module: Module) -> tuple[str, ...]:
        """Return the names of the layers that are adapted if a target names this module.

        These are, for example, the projections of an attention module. The result is empty if the target means the
        module itself.
        """
        return ()

    def unadaptable(self, model: Model) -> Mapping[str, str]:
        """Return things that a target may name but that cannot be adapted, such as Parameters of known modules.

        The result gives, by path, what each of them is, as a noun phrase for messages. Modules are not included.
        """
        return {}

    def heads(self, model: Model) -> list[str]:
        """Return the paths of output heads, which ``targets="all-linear"`` leaves out."""
        return []

    def input_embedding(self, model: Model) -> Module | None:
        """Return the module that embeds the input tokens; None if it is not known."""
        return None

    def rows_refusal(self, model: Model, path: str) -> str | None:
        """Return why PEFT would use the trained rows of an embedding differently, as a clause; else None."""
        return None

    def site(self, module: Module, path: str) -> Site:
        """Return the site of a layer.

        Raises
        ------
        LayerTypeError, LayerError
            If the module has no weight that can be adapted. The message names `path`.
        """
        stacked = isinstance(module, StackedLayer)
        layer, index = (module.module, module.index) if stacked else (module, ())
        kind = self.kinds.of(layer, path)
        return Site(path, layer, kind, kind.view(layer, path or "the model itself"), index)

    def own_arrays(self, site: Site) -> dict[str, Array | None]:
        """Return the present weight and bias of the layer at a site, by name. A stack returns those of all layers."""
        return {name: self.stores.read(site.layer, name) for name in site.names}

    def lora_form(self, model: Model, site: Site) -> LoraForm:
        """Return the form in which PEFT's LoRA stores the update of a layer.

        Raises
        ------
        LayerTypeError
            If there is no such form. The message names the layer.
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
        """Return the relative quantisation error of the weight at a site, see `Store.noise`."""
        return self.stores.noise(site.layer, site.kind.weight)

    @abstractmethod
    def arrays(self, module: Module) -> dict[str, Array]:
        """Return all named arrays of a module, as ``modules_to_save`` stores them.

        Names and orientation are those of PyTorch, so that a saved head can be loaded in another framework. A linear
        layer has ``weight`` (n, d) and ``bias`` (n,); dots separate the names of nested modules.
        """

    def shared(self, model: Model, saved: Iterable[str]) -> Mapping[str, frozenset[str]]:
        """Return the other names under which the tensors of these modules appear in the model (tied weights).

        Names have the form that they have in a file: the path of the module and the name within it. An empty set
        means that the tensor is known to be untied. A missing tensor means that this is unknown, since the model may
        tie weights by computation. The default is for frameworks in which two modules never hold one tensor.

        Parameters
        ----------
        model
            Model, adapted or not.
        saved
            Module paths of ``modules_to_save``.
        """
        return {}

    @abstractmethod
    def bank(self, model: Model) -> Bank:
        """Return the bank of the model, which is empty if the model has no adapters. Arrays are not copied."""

    def followed(self, model: Model, name: str) -> bool:
        """Return whether a controller in this process carries out the adapter's schedule; True if unknown."""
        return True

    def controlled(self, model: Model, name: str) -> bool:
        """Return whether the optimiser of an adapter is in use by a controller that has not been removed."""
        return False

    def probed(self, model: Model) -> Mapping[str, tuple[Array, Array] | str]:
        """Return outputs of adapted layers with and without their updates, for a fixed input.

        The result contains, by path, only layers whose forward pass may differ from that of their kind and is
        deterministic. If a layer cannot be tried, its entry is the reason, as a clause.
        """
        return {}

    def lost(self, model: Model) -> Mapping[str, str]:
        """Return the adapted layers that have been replaced or resized since, each with what happened, as a clause.

        `bank` does not include these layers.
        """
        return {}

    @abstractmethod
    def insert(self, model: Model, adaptation: Adaptation, originals: Values) -> Model:
        """Add an adapter to the model, not active, and freeze everything except adapters.

        ``bank(insert(m, a, o)).adapters[a.name].layers == a.layers``. If the framework marks which arrays require a
        gradient, the marks are remembered with the first adapter, for `remove` to restore.

        Parameters
        ----------
        model
            Model in which no adapter has the name of the new one.
        adaptation
            The adapter: settings, factors by module path, paths of ``modules_to_save`` and their values
            (`Adaptation.kept`). If `trains_rows`, it may also have trained rows, which replace rows of the weight
            for everything that reads the weight.
        originals
            Base values of the adapter's modules to save, to be kept for `Bank.originals`.
        """

    @abstractmethod
    def remove(self, model: Model, names: Iterable[str]) -> Model:
        """Remove these adapters from the model. Weights and saved modules stay as they are.

        When the last adapter is removed, everything that required a gradient before `insert` requires one again.
        """

    @abstractmethod
    def activated(self, model: Model, states: Mapping[str, State]) -> Model:
        """Set which adapters of the model are active, and which are trained.

        In adapted layers the model computes `Arrays.linear` with the updates of all active adapters, each multiplied
        by the adapter's weight. Adapters that are not trained get no gradients. Modules to save are trained with the
        active adapter that saves them.

        Parameters
        ----------
        model
            Adapted model, whose modules to save already have the values of the adapters that will be active.
        states
            State of every adapter by name.
        """

    @abstractmethod
    def parameters(self, model: Model, names: Iterable[str]) -> Any:
        """Return the trained parameters of these adapters in the form that the framework's optimisers expect.

        For each of the adapters that is trained, they are B and C of each layer, trained rows, and saved modules.
        """

    @abstractmethod
    def with_factors(self, model: Model, name: str, layers: Mapping[str, Factors]) -> Model:
        """Replace the factors in some layers of an adapter by factors of the same shapes.

        ``bank(with_factors(m, n, f)).adapters[n].layers[path] == f[path]``. Compiled functions must not depend on the
        values of the factors, and variables must stay the objects that an optimiser holds.
        """

    def with_rows(self, model: Model, name: str, tokens: Mapping[str, Rows]) -> Model:
        """Replace the values of the trained rows of an adapter. This method is called only if `trains_rows`."""
        raise StateError(f"the backend {type(self).__name__} trains no rows of embeddings")

    @abstractmethod
    def with_masks(self, model: Model, name: str, active: Mapping[str, Array]) -> Model:
        """Replace the masks of an adapter, as `with_factors` does for all arrays.

        Parameters
        ----------
        model, name
            Adapted model, and the name of one of its adapters.
        active
            Which subspaces are trained, (K,) booleans by module path. Layers that are not listed keep their masks.
        """

    def check_writable(self, model: Model, layers: Iterable[str], saved: Iterable[str] = ()) -> None:
        """Check that the arrays of adapted layers and of modules to save can be replaced.

        Parameters
        ----------
        model
            Adapted model.
        layers, saved
            Paths of the modules that hold the arrays.

        Raises
        ------
        LayerError
            If an array cannot be replaced. The message names the layer, the reason and what to do instead.
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
        """Replace arrays in adapted layers, and return the model and the former arrays in the same form.

        ``exchange(*exchange(m, a)) == m, a``. Later changes to the model must not overwrite the returned arrays.

        Parameters
        ----------
        model
            Adapted model.
        arrays
            New arrays, by path of the module and then by name, as `own_arrays` returns them. An entry may also be
            `Rows`; then only these rows are replaced, for all modules that share the weight.
        """

    def dequantised(self, model: Model) -> dict[str, Module]:
        """Return a float layer with the same values for each adapted layer that is quantised, by path of the module.

        The default returns no layers, for frameworks whose stores keep numbers exactly.

        Raises
        ------
        LayerError
            If a layer cannot be replaced. The message names it.
        """
        return {}

    def exchange_layers(self, model: Model, layers: Mapping[str, Module]) -> tuple[Model, dict[str, Module]]:
        """Replace layers, and return the model and the former layers by path of the module. Adapters are kept.

        ``exchange_layers(*exchange_layers(m, l)) == m, l``. The layers are those that `dequantised` returns, or those
        that they have replaced.
        """
        return model, {}

    @abstractmethod
    def enter(self, model: Model, ledger: Ledger) -> Model:
        """Replace the ledger of the model, such that ``bank(enter(m, l)).ledger == l``.

        The adapters then compute exactly the updates that the weights do not hold. W0 is kept in host memory.
        """

    @abstractmethod
    def exchange_saved(
        self, model: Model, arrays: Mapping[str, Mapping[str, Array]]
    ) -> tuple[Model, dict[str, dict[str, Array]]]:
        """Replace arrays in modules to save, and return the model and the former arrays in the form of `arrays`.

        The law is that of `exchange`. Arrays that are not listed stay as they are.
        """

    @abstractmethod
    def switched(self, model: Model, *, on: bool) -> Model:
        """Switch the adapters of the model on, or off for as long as `adamss.disabled` lasts."""

    def routed(self, model: Model, route: Route | None) -> Model:
        """Make each row of a batch use its own adapter; None restores the active adapters.

        Compiled functions must not depend on the assignment of rows, as long as the number of rows is the same.

        Raises
        ------
        LayerError
            If a layer cannot be routed because it applies one weight to all rows. The message names the layer.
        StateError
            If the backend does not support routing.
        """
        raise StateError(f"routed: the backend {type(self).__name__} cannot route the rows of a batch")


class ValueModels(Models):
    """Models that are values with a field for a `Bank`, so that adapters are stored as data and need no hooks.

    This class suits frameworks whose models are trees and are not trained through `parameters` (NumPy). It is also
    the simplest way to start a new backend.
    """

    @abstractmethod
    def with_arrays(self, model: Model, values: Mapping[str, Mapping[str, Array]]) -> Model:
        """Return the model with other arrays in some modules.

        ``arrays(modules(with_arrays(m, v))[path]) == v[path]`` for the names in ``v[path]``. If the arrays of a model
        may be changed in place, the new arrays must be copied.
        """

    @abstractmethod
    def with_bank(self, model: Model, bank: Bank) -> Model:
        """Return the model with another bank. Its layers must use the factors that `Bank.computed` returns."""

    def own_arrays(self, site: Site) -> dict[str, Array | None]:
        """Return the `arrays` of the layer, so that a backend needs only one form of them."""
        return dict(self.arrays(site.layer))

    def noise(self, site: Site) -> float:
        """Return 0, since the arrays of a value are stored exactly."""
        return 0.0

    def check_writable(self, model: Model, layers: Iterable[str], saved: Iterable[str] = ()) -> None:
        """Do nothing, since the arrays of a value can always be replaced."""

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
        """Return the arrays by path and name, or by adapter, path and name if several adapters are trained."""
        bank, modules = self.bank(model), self.modules(model)
        found = {}
        for name in names:
            each = bank.adapters[name]
            if each.trained:
                trained = {path: {"B": f.B, "C": f.C} for path, f in each.layers.items()}
                found[name] = trained | {path: self.arrays(modules[path]) for path in each.saved}
        return next(iter(found.values()), {}) if len(found) < 2 else found

    def with_factors(self, model: Model, name: str, layers: Mapping[str, Factors]) -> Model:
        """See `Models.with_factors`. A training loop can use it to apply an optimiser's step."""
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
        """See `Models.routed`. The layers must pass `Bank.numbers` of their input to `adamss.core.linear`."""
        return self.with_bank(model, replace(self.bank(model), route=route))


class Backend(Arrays, Processes, Models):
    """Interface between `adamss` and one framework: its arrays, its processes and its models."""

    name: ClassVar[str]
    """Name under which the backend is registered, such as ``"torch"``."""

    def set_active(self, model: Model, active: Mapping[str, Array], name: str = DEFAULT) -> Model:
        """Replace masks by `with_masks`, after checking that no mask thaws a subspace whose update a weight holds.

        Raises
        ------
        StateError
            If a mask thaws such a subspace, or a layer is not adapted. The message names the layer.
        ArrayValueError
            If a mask has the wrong shape. The message names the layer.
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
