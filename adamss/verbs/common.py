"""Helpers that several verbs share, for the state of a model, its adapters, its layers and their arrays."""

from __future__ import annotations

import math
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from tqdm.auto import tqdm

from adamss.backend.bank import Adaptation, Bank
from adamss.backend.interface import Backend, Model
from adamss.backend.ledger import require_unchanged
from adamss.backend.registry import backend_for
from adamss.backend.sites import BaseWeight, Fragment, Site
from adamss.backend.targets import near_matches
from adamss.backend.tensors import StoredTensor, join_path
from adamss.config import AdamssConfig, shown
from adamss.core import Factors
from adamss.core._array import namespace
from adamss.errors import (
    AdamssWarning,
    CheckpointError,
    ConfigError,
    ConfigTypeError,
    LayerError,
    LayerTypeError,
    StateError,
    TargetError,
)

__all__ = [
    "Name",
    "adapted",
    "as_weights",
    "cast_factors",
    "checked_path",
    "chosen",
    "embedding_of",
    "factor_dtype",
    "name_of",
    "new_name",
    "one_of",
    "progress",
    "require_distinct",
    "require_modules",
    "require_one_path",
    "require_shared",
    "saved_arrays",
    "tied_weights",
    "with_bias_row",
]

COUNTERS = ("num_batches_tracked",)
"""Names of counters that PyTorch keeps in its layers and other frameworks do not keep.

A file that another framework wrote lacks them, and a model of another framework has no use for those in a file."""

READ_ONLY = ("summary", "trainable_parameters", "disabled", "adapters")
"""Verbs that do not change the model, and may therefore be used inside a block of `disabled` or `routed`."""

NAME = re.compile(r"[^\W_][\w-]*")
"""Pattern of adapter names. A name becomes a part of state-dict keys and module paths, so it contains no dot."""

Name: TypeAlias = str | Iterable[str] | Mapping[str, float] | None
"""Selection of the adapters that a verb applies to; see `chosen`."""


def adapted(model: Model, verb: str) -> tuple[Backend, Bank]:
    """Return the backend of an adapted model, and its bank.

    Parameters
    ----------
    model
        Model that must have adapters.
    verb
        Name of the calling verb, for messages.

    Raises
    ------
    StateError
        If the model has no adapters, an adapted layer was replaced or resized, or the verb may not be used inside an
        open block of `disabled` or `routed`.
    """
    backend = backend_for(model)
    bank = backend.bank(model)
    if not bank:
        raise StateError(f"{verb}: the model has no adapters; call adamss.attach or adamss.load first")
    require_unchanged(backend, model, verb)
    _require_unlocked(bank, verb)
    return backend, bank


def _require_unlocked(bank: Bank, verb: str) -> None:
    if bank.disabled and verb not in READ_ONLY:
        raise StateError(f"{verb}: the model is switched off by adamss.disabled; leave its with block first")
    if bank.route is not None and verb not in (*READ_ONLY, "save"):
        raise StateError(
            f"{verb}: the rows of the model are routed by adamss.routed; leave its with block first"
        )


def chosen(bank: Bank, name: Name, verb: str, *, empty: bool = False) -> dict[str, float]:
    """Return the adapters that a verb applies to, in the order of the bank, each with its weight.

    Parameters
    ----------
    bank
        Bank of the model.
    name
        One name or several, or weights by name. None means the only adapter, or the active ones. Where no weight is
        given, an adapter has the weight with which it is active, or 1 if it is not active.
    verb
        Name of the calling verb, for messages.
    empty
        Whether `name` may be empty.

    Raises
    ------
    StateError
        If there is no such adapter, or if none is named and none is active.
    """
    if name is None:
        weights = dict.fromkeys(bank.adapters, 1.0) | bank.active if len(bank.adapters) == 1 else bank.active
        if not weights:
            raise StateError(f"{verb}: no adapter is active; say by name= which is meant: {_names(bank)}")
        return weights
    weights = as_weights(name, verb)
    for one in weights:
        if one not in bank.adapters:
            raise StateError(f"{verb}: no adapter is called {one!r}; there are {_names(bank)}")
    if not weights and not empty:
        raise StateError(f"{verb}: name is empty; there are {_names(bank)}")
    if not isinstance(name, Mapping):
        weights |= {one: weight for one, weight in bank.active.items() if one in weights}
    return {one: weights[one] for one in bank.adapters if one in weights}


def one_of(bank: Bank, name: str | None, verb: str) -> Adaptation:
    """Return the adapter that a verb applies to, for verbs that take only one."""
    found = chosen(bank, name, verb)
    if len(found) > 1:
        raise StateError(f"{verb} takes one adapter; say by name= which of {', '.join(map(repr, found))}")
    return bank.adapters[next(iter(found))]


def as_weights(name: str | Iterable[str] | Mapping[str, float], verb: str) -> dict[str, float]:
    """Return the weights by name of an argument that gives names or weights. A name without a weight gets 1."""
    if isinstance(name, str):
        return {name: 1.0}
    if isinstance(name, Mapping):
        for one, weight in name.items():
            number = isinstance(weight, float | int | np.floating | np.integer) and not isinstance(
                weight, bool
            )
            if not number or not math.isfinite(weight):
                raise ConfigTypeError(
                    f"{verb}: the weight of {one!r} must be a finite number, found {weight!r}"
                )
        names, weights = list(name), {one: float(weight) for one, weight in name.items()}
    else:
        names = list(name) if isinstance(name, Iterable) else [name]
        weights = dict.fromkeys(names, 1.0)
    if not all(isinstance(one, str) for one in names):
        raise ConfigTypeError(
            f"{verb}: choose adapters by a name, a list of names, or a dictionary of weights by name, found {name!r}"
        )
    if len(weights) < len(names):
        raise ConfigError(f"{verb}: {names!r} names an adapter twice")
    return weights


def new_name(backend: Backend, model: Model, name: str, verb: str, *, replace: bool = False) -> Bank:
    """Check that an adapter can be added under a name, and return the bank of the model.

    Parameters
    ----------
    backend, model
        Backend and model, with or without adapters.
    name
        Name of the new adapter.
    verb
        Name of the calling verb, for messages.
    replace
        Whether the name may be taken, since the new adapter replaces the one of this name.

    Raises
    ------
    ConfigError, ConfigTypeError
        If the name is not valid.
    StateError
        If the name is taken, or if the weights hold the update of another adapter, which therefore cannot be
        deactivated.
    """
    if not isinstance(name, str):
        raise ConfigTypeError(f"{verb}: name must be a string, found {name!r}")
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{verb}: a name has letters, digits, '-' and '_', and begins with a letter or digit, found {name!r}"
        )
    bank = backend.bank(model)
    _require_unlocked(bank, verb)
    if name in bank.adapters and not replace:
        ways = "choose another name=, or call adamss.detach(model, name=...) first"
        if verb == "load":
            ways = "choose another name=, or put the file in its place by replace=True"
        raise StateError(
            f"{verb}: an adapter called {name!r} is attached already; {ways}. There are {_names(bank)}"
        )
    if bank.ledger.held and not (replace and name in bank.adapters):
        raise StateError(
            f"{verb}: the weights hold the update of {', '.join(map(repr, bank.ledger.held))}, so that no other "
            f"adapter can be added; call {bank.adapters[next(iter(bank.ledger.held))].way_out} first"
        )
    return bank


def _names(bank: Bank) -> str:
    return ", ".join(map(repr, bank.adapters))


@contextmanager
def progress(layers: int) -> Iterator[Callable[[], None]]:
    """Yield a function that advances a progress bar by one layer. Threads may call it.

    The bar appears only on a terminal, and only after a second.
    """
    one_at_a_time = threading.Lock()
    with tqdm(total=layers, desc="adamss", unit="layer", delay=1.0, leave=False, disable=None) as bar:

        def count() -> None:
            with one_at_a_time:
                bar.update()

        yield count


def cast_factors(backend: Backend, factors: Factors, dtype: str) -> Factors:
    """Return the factors with A, B and C in the dtype of the given name."""
    return factors._replace(**{name: backend.cast(getattr(factors, name), dtype) for name in "ABC"})


def factor_dtype(backend: Backend, base: BaseWeight, config: AdamssConfig, *, loading: bool = False) -> str:
    """Return the name of the dtype for the factors of a layer.

    It is ``factor_dtype`` of the config, or by default float64 for float64 weights and float32 for all others. With
    `loading`, a ``factor_dtype`` that the framework lacks is ignored, so that any framework can load the file.
    """
    if config.factor_dtype is not None and (backend.has_dtype(config.factor_dtype) or not loading):
        return config.factor_dtype
    dtype = backend.dtype_name(base.W)
    return "float64" if dtype == "float64" else "float32"


def embedding_of(backend: Backend, modules: Mapping[str, Any], path: str, ids: tuple[int, ...]) -> Site:
    """Return the site of an embedding. Check that its rows of these ids, which are ascending, can be trained.

    Raises
    ------
    ConfigError
        If the backend cannot train rows.
    LayerTypeError
        If the module is not an embedding.
    TargetError
        If the embedding has no row of one of the ids.
    """
    if not backend.trains_rows:
        raise ConfigError(
            f"trained_tokens: the backend {backend.name} cannot train rows of an embedding; train them in PyTorch, "
            "or the whole embedding by modules_to_save"
        )
    site = backend.site(modules[path], path)
    if site.kind.lora != "embedding":
        raise LayerTypeError(f"trained_tokens: {path} is a {type(site.layer).__name__}, and no embedding")
    size = site.view.shape(backend.own_arrays(site)[site.kind.weight].shape)[0]  # type: ignore[union-attr]
    if ids[-1] >= size:
        raise TargetError(
            f"trained_tokens: {path} has {size} rows, and none of the id {ids[-1]}; make room for new tokens first "
            "(resize_token_embeddings)"
        )
    return site


def name_of(modules: Mapping[str, Any]) -> str | None:
    """Return the name of the base model, or None if it is unknown.

    Models of transformers and diffusers store it. All modules are asked, because such a model may be wrapped.
    """
    names = (getattr(module, "name_or_path", None) for module in modules.values())
    return next((name for name in names if isinstance(name, str) and name), None)


def with_bias_row(base: BaseWeight) -> Any:
    """Return the weight with the bias as one more input row, (d + 1, n)."""
    xp = namespace(base.W, base.b)
    return xp.concat([base.W, xp.astype(xp.reshape(base.b, (1, -1)), base.W.dtype)], axis=0)


def checked_path(path: str | os.PathLike[str], name: str = "path", *, to_write: bool = False) -> str:
    """Return a path as a string. With `to_write`, check that it can name a file or folder."""
    try:
        decoded = os.fsdecode(path)
    except TypeError as error:
        raise ConfigTypeError(f"{name} must be a string or a pathlib.Path, found {path!r}") from error
    if to_write and (not decoded or "\0" in decoded):
        raise ConfigError(f"{name} must name a file or folder, found {decoded!r}")
    return decoded


def require_modules(paths: list[str], modules: Mapping[str, Any]) -> None:
    """Check that a model has the modules that a file names."""
    missing = [path for path in paths if path not in modules]
    if missing:
        raise CheckpointError(
            f"the model has no layer {', '.join(shown(path) for path in missing[:3])}"
            f"{f' (and {len(missing) - 3} more)' if len(missing) > 3 else ''}, which the file adapts; "
            f"{near_matches(missing[:1], modules)}"
        )


def require_distinct(paths: list[str], modules: Mapping[str, Any]) -> None:
    """Check that no two paths of a file name the same module."""
    seen: dict[int, str] = {}
    for path in paths:
        other = seen.setdefault(id(modules[path]), path)
        if other != path:
            raise CheckpointError(
                f"{other!r} and {path!r} are one module in this model, but two in the file: the adapter was trained "
                "on another model"
            )


def require_one_path(paths: Iterable[str], modules: Mapping[str, Any], verb: str) -> None:
    """Check that no layer appears in the model twice, since PEFT would adapt only its first appearance."""
    every: dict[int, list[str]] = {}
    for path, module in modules.items():
        every.setdefault(id(module), []).append(path)
    for path in paths:
        if len(names := every[id(modules[path])]) > 1:
            raise LayerError(
                f"{verb}: {' and '.join(map(repr, names))} are one layer, and PEFT would adapt it under one of these "
                "paths only; use adamss.save and adamss.load, or merge the model and save that"
            )


def require_shared(
    backend: Backend,
    model: Model,
    saved: Mapping[str, Mapping[str, StoredTensor]],
    shared: Mapping[str, frozenset[str]],
    modules: Mapping[str, Any],
    *,
    setting: str = "modules_to_save",
) -> None:
    """Check that stored tensors are tied to other tensors in this model as they were where they were trained.

    If two tensors are tied only in this model, loading one overwrites the other. If they were tied only where they
    were trained, loading one leaves the other unchanged. If a tensor is missing from `shared`, the file does not say
    whether it was tied, and only its values are compared.

    Parameters
    ----------
    backend, model
        Backend and model.
    saved
        Stored tensors, by path of the module and name within it.
    shared
        Other names of each stored tensor in the model where it was trained, by its own name, which includes the path.
    modules
        Modules of the model by path.
    setting
        Name of the setting that selects the modules, for messages.
    """
    here = backend.shared(model, saved)
    stored = {join_path(path, name): tensor for path, own in saved.items() for name, tensor in own.items()}

    @cache
    def names(path: str) -> Set[str]:
        return frozenset(backend.arrays(modules[path])) if path in modules else frozenset()

    def has(name: str) -> bool:
        path, _, own = name.rpartition(".")
        return own in names(path)

    for name in sorted(stored):
        ours = here.get(name, frozenset())
        if name not in shared:
            _require_agreement(name, ours, stored)
            continue
        there = {other for other in shared[name] if has(other)}
        for other in sorted(ours ^ there):
            tied, other_way = ("one tensor", "two") if other in ours else ("two tensors", "one")
            raise CheckpointError(
                f"{setting}: {shown(name)} and {shown(other)} are {tied} in this model, and were {other_way} "
                "where the adapter was trained; tie or untie them in the base model (tie_word_embeddings)"
            )


def tied_weights(backend: Backend, model: Model, layers: Iterable[str]) -> str:
    """Return a clause for messages that names the layers whose weight other modules share, or an empty string."""
    modules = backend.modules(model)
    holders = [path.rpartition(".")[0] if isinstance(modules[path], Fragment) else path for path in layers]
    shared = backend.shared(model, holders)
    tied = {}
    for path in layers:
        own = path if isinstance(modules[path], Fragment) else join_path(path, "weight")
        # A module that appears under two paths is not tied to another.
        others = [
            other
            for other in shared.get(own, ())
            if modules.get(other.rpartition(".")[0]) is not modules[path]
            and modules.get(other) is not modules[path]
        ]
        if others:
            tied[own] = ", ".join(sorted(others))
    if not tied:
        return ""
    name, others_of_it = next(iter(tied.items()))
    return f"{name} is one tensor with {others_of_it}" + (
        f" (and {len(tied) - 1} more)" if len(tied) > 1 else ""
    )


def _require_agreement(name: str, others: Iterable[str], stored: Mapping[str, StoredTensor]) -> None:
    """Check a tensor that is tied in the model, for a file that does not say whether it was tied.

    If the file stores both tensors, they must be equal. If it stores only one, loading it changes the other too, so
    that a warning is issued.
    """
    for other in sorted(others):
        if other not in stored:
            warnings.warn(
                f"modules_to_save: {shown(name)} is one tensor with {shown(other)} in this model, so that loading "
                "changes both; the file does not say whether they were tied where the adapter was trained",
                AdamssWarning,
                stacklevel=4,
            )
        elif stored[name] != stored[other]:
            raise CheckpointError(
                f"modules_to_save: {shown(name)} and {shown(other)} are one tensor in this model, but have different "
                "values in the file; untie them in the base model (tie_word_embeddings)"
            )


def saved_arrays(
    backend: Backend, path: str, tensors: Mapping[str, StoredTensor], present: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the stored tensors of a module as arrays with the dtypes and devices of the module's present arrays."""
    optional = {name for name in {*tensors, *present} if name.rpartition(".")[2] in COUNTERS}
    tensors = {name: tensor for name, tensor in tensors.items() if name in present or name not in optional}
    if tensors.keys() | optional != present.keys() | optional:
        raise CheckpointError(
            f"{path}: the file holds {', '.join(sorted(tensors))[:200] or 'nothing'}, "
            f"the model has {', '.join(sorted(present)) or 'nothing'}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != tuple(present[name].shape):
            raise CheckpointError(
                f"{join_path(path, name)}: the file has shape {tensor.shape}, the model {tuple(present[name].shape)}"
            )
    return {
        name: _saved_array(backend, join_path(path, name), tensor, present[name])
        for name, tensor in tensors.items()
    }


def _saved_array(backend: Backend, name: str, tensor: StoredTensor, present: Any) -> Any:
    """Return a stored tensor in the dtype of the present array. Rounding is allowed, overflow is an error."""
    dtype = backend.dtype_name(present)
    if tensor.dtype == dtype:
        return backend.from_stored(tensor, like=present)
    real = "float" in tensor.dtype and "float" in dtype
    fits = real or tensor.dtype.rstrip("0123456789") == dtype.rstrip("0123456789")
    if fits:
        # Overflow is detected below for all frameworks, so NumPy's own warning is not needed.
        with np.errstate(over="ignore"):
            array = backend.from_stored(tensor, like=present, dtype=dtype)
        rounded = backend.to_stored(array)
        if real:
            fits = rounded.is_finite() or not tensor.is_finite()
        else:
            fits = np.array_equal(rounded.numpy(), tensor.numpy())
    if not fits:
        raise CheckpointError(
            f"{name}: the file has {tensor.dtype}, of which the model's {dtype} cannot hold all values"
        )
    return array
