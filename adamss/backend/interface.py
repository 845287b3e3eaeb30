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
from typing import Any, ClassVar, TypeAlias, TypeVar

import numpy as np

from adamss.backend.bank import Adaptation, Bank, Ledger
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
    def linear(self, x: Array, weight: Array, bias: Array | None, factors: Factors) -> Array:
        """Return ``x @ (weight + delta(factors)) + bias``, differentiable in x, B and C.

        ``linear(x, W, b, f) ~ core.linear(x, W, b, f)`` within the dtype's tolerance, gradients
        likewise ``~ core.linear_vjp``; with C = 0, ``linear(x, W, b, f) == x @ W + b``.

        Parameters
        ----------
        x
            Inputs (..., d).
        weight, bias
            (d, n) and (n,) or None.
        factors
            Factors of the layer.
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
    def adaptation(self, model: Model) -> Adaptation | None:
        """Return what is attached to the model, or None; arrays as they are, not copies."""

    def followed(self, model: Model) -> bool:
        """Return whether something in this process keeps the model to the schedule of its config; True if unknown."""
        return True

    def probed(self, model: Model) -> Mapping[str, tuple[Array, Array] | str]:
        """Return what adapted layers make of some input, with their updates and without; the same at each call.

        By path, of the layers whose forward is not known to be that of their kind, and gives the same twice. If no
        input can be made for one: why, as a clause.
        """
        return {}

    def lost(self, model: Model) -> Mapping[str, str]:
        """Return the adapted layers that somebody has replaced or resized since, and what happened, as a clause.

        They are not among those of `adaptation`.
        """
        return {}

    @abstractmethod
    def originals(self, model: Model) -> Mapping[str, Mapping[str, Array]]:
        """Return the base values of ``modules_to_save`` that `insert` was given, by module path and name."""

    @abstractmethod
    def insert(
        self,
        model: Model,
        adaptation: Adaptation,
        *,
        originals: Mapping[str, Mapping[str, Array]],
        values: Mapping[str, Mapping[str, Array]],
    ) -> Model:
        """Return the model with an adapter, and everything else but it and ``modules_to_save`` frozen.

        ``adaptation(insert(m, a, ...)).layers == a.layers``, and the model computes `Arrays.linear` in these layers.

        Parameters
        ----------
        model
            A model without adapters.
        adaptation
            Settings, factors by module path, paths of ``modules_to_save``, and, where `trains_rows`, trained rows,
            which are in the place of those of the weight for whoever reads it.
        originals
            Arrays of the modules to save as they are, kept for `originals`.
        values
            Other values that modules to save get, as from `arrays`; those that are not named stay as they are.
        """

    @abstractmethod
    def remove(self, model: Model) -> Model:
        """Return the model without adapters; weights and saved modules stay as they are.

        What required a gradient before `insert` does again, if the framework has such a mark.
        """

    @abstractmethod
    def parameters(self, model: Model) -> Any:
        """Return what an optimiser gets, in the framework's own form: B and C of each layer, and saved modules."""

    @abstractmethod
    def with_masks(self, model: Model, active: Mapping[str, Array]) -> Model:
        """Return the model with other masks: ``adaptation(with_masks(m, a)).layers[path].active == a[path]``.

        Nothing that is compiled may depend on the values of a mask.

        Parameters
        ----------
        model
            An adapted model.
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
        """Return the model with another ledger: ``adaptation(enter(m, l)).ledger == l``.

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


class ValueModels(Models):
    """Models that are values and have a field for a `Bank`: what is attached is one more value, and no code.

    For frameworks whose models are trees that nobody trains by `parameters` (NumPy), and for a first backend.
    """

    @abstractmethod
    def bank(self, model: Model) -> Bank | None:
        """Return the bank of a model, or None."""

    @abstractmethod
    def with_arrays(self, model: Model, values: Mapping[str, Mapping[str, Array]]) -> Model:
        """Return the model with other arrays in some modules.

        ``arrays(modules(with_arrays(m, v))[path]) == v[path]``, for the names that it has. They are copied, if
        anybody may change the arrays of a model in place.
        """

    @abstractmethod
    def with_bank(self, model: Model, bank: Bank | None) -> Model:
        """Return the model with another bank, or none; its layers compute the factors that `computed` returns."""

    def own_arrays(self, site: Site) -> dict[str, Array | None]:
        """Return `arrays` of the layer, so that one form of them is enough."""
        return dict(self.arrays(site.layer))

    def noise(self, site: Site) -> float:
        """Return 0: a value keeps the numbers that it is given."""
        return 0.0

    def check_writable(self, model: Model, layers: Iterable[str], saved: Iterable[str] = ()) -> None:
        """Return: a value can have any arrays."""

    def adaptation(self, model: Model) -> Adaptation | None:
        """See `Models.adaptation`."""
        bank = self.bank(model)
        return None if bank is None else bank.only()

    def originals(self, model: Model) -> Mapping[str, Mapping[str, Array]]:
        """See `Models.originals`."""
        bank = self.bank(model)
        return {} if bank is None else bank.originals

    def insert(
        self,
        model: Model,
        adaptation: Adaptation,
        *,
        originals: Mapping[str, Mapping[str, Array]],
        values: Mapping[str, Mapping[str, Array]],
    ) -> Model:
        """See `Models.insert`."""
        bank = Bank({adaptation.name: adaptation}, originals)
        return self.with_arrays(self.with_bank(model, bank), {**originals, **values})

    def remove(self, model: Model) -> Model:
        """See `Models.remove`."""
        return self.with_bank(model, None)

    def parameters(self, model: Model) -> Any:
        """Return the arrays by path and name."""
        bank, modules = self.bank(model) or Bank(), self.modules(model)
        adapters = [each for each in bank.adapters.values() if each.trained]
        factors = {path: f for each in adapters for path, f in each.layers.items()}
        trained = {path: {"B": f.B, "C": f.C} for path, f in factors.items()}
        return trained | {path: self.arrays(modules[path]) for each in adapters for path in each.saved}

    def with_factors(self, model: Model, factors: Mapping[str, Factors]) -> Model:
        """Return the model with other factors in some layers, as a step of an optimiser makes them."""
        bank = self.bank(model) or Bank()
        return self.with_bank(model, bank.changed(layers={**bank.only().layers, **factors}))

    def with_masks(self, model: Model, active: Mapping[str, Array]) -> Model:
        """See `Models.with_masks`."""
        layers = (self.bank(model) or Bank()).only().layers
        return self.with_factors(model, {p: layers[p]._replace(active=mask) for p, mask in active.items()})

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
        return self.with_bank(model, (self.bank(model) or Bank()).changed(ledger=ledger))

    def switched(self, model: Model, *, on: bool) -> Model:
        """See `Models.switched`."""
        return self.with_bank(model, (self.bank(model) or Bank()).changed(disabled=not on))


class Backend(Arrays, Processes, Models):
    """One framework."""

    name: ClassVar[str]
    """Name under which the backend is registered, such as ``"torch"``."""

    def set_active(self, model: Model, active: Mapping[str, Array]) -> Model:
        """Return `with_masks`, after a check that none of them thaws a subspace whose update a weight holds.

        Raises
        ------
        StateError
            If one does, or a layer is none that is adapted.
        ArrayValueError
            If a mask is of another shape. Messages name the layer.
        """
        adaptation = self.adaptation(model)
        assert adaptation is not None
        for path, mask in active.items():
            if path not in adaptation.layers:
                raise StateError(f"{path!r} is no adapted layer of the model")
            ranks = adaptation.layers[path].ranks
            if tuple(mask.shape) != tuple(ranks.shape):
                raise ArrayValueError(
                    f"{path}: the mask has shape {tuple(mask.shape)}, not {tuple(ranks.shape)}"
                )
            held = adaptation.ledger.held.get(path)
            thawed = None if held is None else held & np.asarray(self.to_stored(mask).numpy())
            if thawed is not None and thawed.any():
                remedy = "adamss.unmerge(model)" if adaptation.merged else "adamss.merge and adamss.unmerge"
                raise StateError(
                    f"{path}: the mask thaws subspace {int(thawed.argmax())}, whose update the weight holds; keep it "
                    f"frozen, or call {remedy} first"
                )
        return self.with_masks(model, active)
