"""Verbs that attach adapters to a model, describe them, switch them off and detach them."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import groupby
from typing import Any

import numpy as np

from adamss import core
from adamss.backend.bank import DEFAULT, Bank, Rows
from adamss.backend.interface import Backend, Division, Model, Weights, batches
from adamss.backend.ledger import base_weight, put, reading, require_kept_base, switched_off, withdraw
from adamss.backend.registry import backend_for
from adamss.backend.sites import BaseWeight, Site, by_owner, owner_of
from adamss.config import AdamssConfig, SubspaceEstimate
from adamss.core import Factors
from adamss.core._array import check_matrix, namespace
from adamss.errors import (
    AdamssWarning,
    ConfigError,
    ConfigTypeError,
    StateError,
)
from adamss.verbs.choosing import choose
from adamss.verbs.common import (
    adapted,
    cast_factors,
    chosen,
    factor_dtype,
    new_name,
    one_of,
    progress,
    tied_weights,
    with_bias_row,
)
from adamss.verbs.table import Summary, summarise, total

__all__ = ["attach", "detach", "disabled", "summary", "trainable_parameters"]

_OFF: ContextVar[tuple[Model, ...]] = ContextVar("_OFF", default=())
"""Models that open blocks of `disabled` have yielded. A model that is a value does not record that it is disabled."""


def attach(model: Model, config: AdamssConfig, *, name: str = DEFAULT, divide: bool = True) -> Model:
    """Attach an adapter to the layers that ``config.targets`` names, and freeze the rest of the model.

    Afterwards, only the factors B and C, the ``modules_to_save`` and the rows of ``trained_tokens`` are trained. C
    starts at zero, so that the outputs are those of the base model bit for bit.

    Each layer is decomposed on the device of its weight. The layers are decomposed one after the other, so that the
    extra memory is that for one layer: tens of megabytes for a width up to 2048, and less than five times the
    layer's float32 weight beyond that. PyTorch decomposes small layers on the CPU (the shorter side at most 512) in
    as many threads as it is set to use. A progress bar appears on a terminal after a second.

    Parameters
    ----------
    model
        A model of any framework that has a backend. A PyTorch model is changed in place.
    config
        Settings that say which layers are adapted, and how.
    name
        Name of the adapter, of letters, digits, ``-`` and ``_``. If the model has other adapters, the new one becomes
        the only one that is active and trained (see `activate`).
    divide
        Whether several processes (`torch.distributed`) divide the decompositions among themselves. If True, each
        layer is decomposed by one process, which sends the factors to the others. All processes must then call
        `attach`, and an error on one is raised on all. A process whose layers or weights differ from those of the
        others computes its own. If False, each process decomposes all layers and waits for no other, which is
        necessary if only some processes attach the adapter.

    Returns
    -------
    Model
        The adapted model. It is the same object if the framework's models are mutable.

    Raises
    ------
    TargetError
        If nothing matches ``targets`` or ``modules_to_save``; the message lists near matches. If an embedding has no
        row for an id of ``trained_tokens``, or shares its weight with a layer that is adapted or saved.
    LayerTypeError, LayerError
        If a matched module has no weight that can be adapted.
    ArrayTypeError, ArrayValueError
        If a weight is complex or integer, or holds NaN or infinity; the message names the layer.
    ConfigError
        If the name is not valid.
    StateError
        If the name is taken, or the weights hold the update of another adapter.

    Warns
    -----
    AdamssWarning
        If an adapted embedding shares its weight with another module (a head), which the adapter does not change.
    """
    if not isinstance(config, AdamssConfig):
        raise ConfigTypeError(f"config must be an adamss.AdamssConfig, found {type(config).__name__}")
    backend = backend_for(model)
    with backend.exact(), backend.divided(model, enabled=divide) as division:
        bank = new_name(backend, model, name, "attach")
        config, sites, saved, embeddings = choose(backend, model, config)
        tokens = {path: _initial_rows(backend, site, config, bank) for path, site in embeddings.items()}
        parts = {path: part for site in sites.values() for path, part in site.split().items()}
        weights = Weights(parts, lambda path: base_weight(backend, parts[path], bank))
        layers = _all_factors(backend, weights, config, division)
        # The factors of a stack are stacked arrays, so all its matrices need the same K. If the estimates differ, the
        # largest is used for all of them.
        for owner, highest in _highest_in_uneven_stacks(layers).items():
            own = config.for_layer(owner)
            assert isinstance(own.subspaces, SubspaceEstimate)
            own = own.unchecked(
                subspaces=dataclasses.replace(own.subspaces, minimum=highest, maximum=highest)
            )
            stack = Weights([path for path in layers if owner_of(path) == owner], weights.__getitem__)
            # The work is not divided: a process that found no such stack would never join in.
            layers |= _all_factors(backend, stack, own, Division())
        ordered = {path: core.join([layers[part] for part in site.split()]) for path, site in sites.items()}
        if config.budget is not None:
            core.plan_budget(ordered, config.budget)  # raises an error if the budget cannot be met
        shapes = {
            path: _shape([weights.shape(part) for part in site.split()]) for path, site in sites.items()
        }
        tied = tied_weights(backend, model, [path for path, site in sites.items() if not site.kind.linear])
        heads = dict.fromkeys(saved)
        model = put(backend, model, ordered, shapes, config=config, saved=heads, name=name, tokens=tokens)
    if tied:
        warnings.warn(
            f"attach: {tied}; the adapter changes what the adapted layer computes, and the other goes on with the "
            "base weight",
            AdamssWarning,
            stacklevel=2,
        )
    return model


def detach(model: Model, *, name: str | Iterable[str] | None = None) -> Model:
    """Remove adapters without keeping their updates.

    When the last adapter is removed, the model is the base model again bit for bit, including ``modules_to_save``.

    Parameters
    ----------
    model
        An adapted model, merged or not.
    name
        Name or names of the adapters. None means the only adapter, or the active ones.

    Returns
    -------
    Model
        The model without these adapters. It is the same object if the framework's models are mutable.

    Raises
    ------
    StateError
        If the model has no such adapter; if the weights hold its update and W0 was dropped by ``keep_base=False``; or
        if a budget controller trains one of the adapters while other adapters would remain.

    See Also
    --------
    adamss.merge_and_unload : Remove the adapters and keep their updates in the weights.
    """
    backend, bank = adapted(model, "detach")
    names = list(chosen(bank, name, "detach"))
    if any(bank.adapters[one].held for one in names):
        require_kept_base(bank, "detach")
    for one in names if len(names) < len(bank.adapters) else ():
        if backend.controlled(model, one):
            raise StateError(f"detach: a budget controller trains {one!r}; call its remove() first")
    with backend.exact():
        return backend.remove(withdraw(backend, model, names), names)


@contextmanager
def disabled(model: Model) -> Iterator[Model]:
    """Compute the outputs of the base model, including ``modules_to_save``, within a ``with`` block.

    Parameters
    ----------
    model
        An adapted model.

    Yields
    ------
    Model
        The same object if the framework's models are mutable, else a new model without the updates.

    Raises
    ------
    StateError
        If the model has no adapters, was merged or consolidated with ``keep_base=False``, or inside a block of
        `routed`.
    """
    if any(model is off for off in _OFF.get()):
        yield model
        return
    backend, bank = adapted(model, "disabled")
    require_kept_base(bank, "disabled")
    if bank.disabled:
        yield model
        return
    with switched_off(backend, model, bank) as base:
        _OFF.set((*_OFF.get(), base))
        try:
            yield base
        finally:
            # The token of `set` is not used: a generator may be closed in another context, where it is not valid.
            _OFF.set(tuple(off for off in _OFF.get() if off is not base))


def summary(model: Model, *, name: str | None = None) -> Summary:
    """Return the effective settings and the parameter counts of every layer of an adapter.

    Parameters
    ----------
    model
        An adapted model.
    name
        Name of the adapter. None means the only one, or the active one.

    Returns
    -------
    Summary
        One row for each layer in `rows`, and the sums in `total`. It prints as a table.

    Raises
    ------
    StateError
        If the model has no such adapter, or several are active and none is named.
    """
    backend, bank = adapted(model, "summary")
    adaptation = one_of(bank, name, "summary")
    rows = [summarise(path, adaptation.shapes[path], factors) for path, factors in adaptation.layers.items()]
    modules = backend.modules(model)
    saved = (array for path in adaptation.saved for array in backend.arrays(modules[path]).values())
    size, targets = sum(int(np.prod(array.shape)) for array in saved), adaptation.config.targets
    return Summary(
        tuple(rows),
        total(rows),
        size,
        targets if isinstance(targets, str) else tuple(targets or ()),
        tokens=sum(int(np.prod(values.shape)) for _, values in adaptation.tokens.values()),
        name=adaptation.name,
    )


def trainable_parameters(model: Model, *, name: str | Iterable[str] | None = None) -> Any:
    """Return the trained parameters, in the form that the framework's optimisers take.

    They are B and C of every adapted layer, the rows of ``trained_tokens``, and the parameters of
    ``modules_to_save``, in this order.

    Parameters
    ----------
    model
        An adapted model.
    name
        Name or names of the adapters. None means all of them. Adapters that are not trained have no parameters here.

    Returns
    -------
    Any
        Parameters to optimise: in PyTorch a list of Parameters, in other frameworks a tree of arrays.

    Raises
    ------
    StateError
        If the model has no such adapter.
    """
    backend, bank = adapted(model, "trainable_parameters")
    return backend.parameters(
        model, bank.adapters if name is None else chosen(bank, name, "trainable_parameters")
    )


def _initial_rows(backend: Backend, site: Site, config: AdamssConfig, bank: Bank) -> Rows:
    """Return the rows of an embedding that will be trained, with their base values."""
    assert isinstance(config.trained_tokens, Mapping)
    base, ids = base_weight(backend, site, bank), config.trained_tokens[site.path]
    values = base.W[namespace(base.W).asarray(ids), :]
    check_matrix(values, name=f"{site.path}: the rows of trained_tokens")
    # In half precision, small steps would be lost to rounding, so the rows are float32 or wider. `factor_dtype` does
    # not apply to them: in a narrower dtype than the weight's, they would not start with its exact values.
    dtype = factor_dtype(backend, base, config.unchecked(factor_dtype=None))
    return Rows(tuple(ids), backend.cast(values, dtype))


def _all_factors(
    backend: Backend, weights: Weights, config: AdamssConfig, division: Division
) -> dict[str, Factors]:
    """Return the initial factors of all layers, computed batch by batch and divided among the processes."""
    layers: dict[str, Factors] = {}
    with progress(len(weights)) as count:
        for batch in batches(division.share(weights, json.dumps(config.to_dict()))):
            with division.carrying() as go:
                # Layers of one shape may still have different settings, through `overrides`.
                for own, alike in groupby(batch, lambda path: config.for_layer(owner_of(path))):
                    some = {path: batch[path] for path in alike}
                    layers |= _initial_factors(backend, some, own, division, count) if go else {}
        return division.gather(layers)


def _highest_in_uneven_stacks(layers: Mapping[str, Factors]) -> dict[str, int]:
    """Return the largest K of each stack whose matrices differ in K, by path of the stack."""
    numbers = {owner: {f.ranks.shape[0] for f in parts.values()} for owner, parts in by_owner(layers).items()}
    return {owner: max(found) for owner, found in numbers.items() if len(found) > 1}


def _initial_factors(
    backend: Backend,
    batch: Mapping[str, BaseWeight],
    config: AdamssConfig,
    division: Division,
    count: Callable[[], None],
) -> dict[str, Factors]:
    """Return the initial factors of layers that have one shape and the same settings."""

    def decomposed(path: str) -> core.Decomposition:
        with reading(path, batch[path].W):
            W = _decomposition_input(backend, path, batch[path], config)
            decomposition = core.decompose(W, config.rank, seed=config.seed)
        count()
        return decomposition

    decompositions = dict(zip(batch, division.each(decomposed, batch), strict=True))
    labels_of = _labels(decompositions, config)

    def initial(path: str) -> Factors:
        factors = core.initial_factors(
            decompositions[path],
            labels_of[path],
            config.subspace_rank,
            basis=config.basis,
            initial_B=config.initial_B,
        )
        return cast_factors(backend, factors, factor_dtype(backend, batch[path], config))

    return dict(zip(batch, division.each(initial, batch), strict=True))


def _labels(decompositions: Mapping[str, core.Decomposition], config: AdamssConfig) -> dict[str, Any]:
    """Return the labels of layers of one shape. Layers with the same K are segmented together."""
    estimate = config.subspaces
    assert not isinstance(estimate, str)  # the config has replaced "estimate" by a SubspaceEstimate
    labels: dict[str, Any] = {}
    by_number: dict[int, list[str]] = {}
    for path, decomposition in decompositions.items():
        if isinstance(estimate, SubspaceEstimate):
            number = core.estimate_subspaces(decomposition, **dataclasses.asdict(estimate))
        else:
            number = estimate
        by_number.setdefault(number, []).append(path)
    for number, paths in by_number.items():
        alike = [decompositions[path] for path in paths]
        xp = namespace(*alike[0])
        found = core.segment(
            core.Decomposition(*map(xp.stack, zip(*alike, strict=True))),
            number,
            config.segmentation,
            dimension=config.segmentation_dimension,
            seed=config.seed,
            exponent=2.0 if isinstance(estimate, int) else estimate.exponent,
        )
        labels |= dict(zip(paths, xp.unstack(found), strict=True))
    return labels


def _decomposition_input(backend: Backend, path: str, base: BaseWeight, config: AdamssConfig) -> Any:
    check_matrix(base.W, name=f"{path}: weight")
    dtype = factor_dtype(backend, base, config)
    if not backend.has_dtype(dtype):
        raise ConfigError(
            f"factor_dtype = {dtype!r}: {backend.name} has no such dtype as it is set up; choose 'float32'"
        )
    W = base.W
    if config.include_bias and base.b is not None:
        W = with_bias_row(base)
        check_matrix(W[-1:, :], name=f"{path}: bias")
    return backend.decomposition_input(W)


def _shape(parts: list[tuple[int, int]]) -> tuple[int, int]:
    """Return the shape (d, n) of matrices with the same d that are placed side by side."""
    return parts[0][0], sum(n for _, n in parts)
