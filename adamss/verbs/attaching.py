"""Putting adapters on a model, looking at them, taking them off."""

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
"""What `disabled` has yielded and not yet taken back: where models are values, nothing in them says so."""


def attach(model: Model, config: AdamssConfig, *, name: str = DEFAULT, divide: bool = True) -> Model:
    """Adapt the layers of a model that ``config.targets`` names, and freeze the rest.

    Only the factors B and C, the ``modules_to_save`` and the rows of ``trained_tokens`` are trained afterwards. C
    starts at zero: the outputs are those of the base model, to the bit.

    Layers are decomposed where their weights are, one after the other, so that beside weights and factors there is
    memory for one layer alone: tens of megabytes for a width up to 2048, less than five times the layer's float32
    weight beyond. PyTorch takes small layers on the CPU, of a side up to 512, as many at a time as it has threads. A
    bar shows how far it is, on a terminal and after a second.

    Parameters
    ----------
    model
        A model of any framework with a backend. PyTorch: changed in place.
    config
        What to adapt, and how.
    name
        Of the adapter: letters, digits, ``-`` and ``_``. On a model that has others, it becomes the one that is
        active and trained (`activate`).
    divide
        Where several processes run (`torch.distributed`): each layer is decomposed by one of them, which sends the
        factors to the others. All processes must call `attach` then, and an error on one is raised on all; those
        that have other layers or weights than the rest are left to themselves. False: each process decomposes
        all layers and waits for no other, as it must where only some of them attach.

    Returns
    -------
    Model
        The adapted model; the same object where the framework's models are mutable.

    Raises
    ------
    TargetError
        If nothing matches ``targets`` or ``modules_to_save``; the message lists near matches. If an embedding has no
        row of an id of ``trained_tokens``, or shares its weight with a layer that is adapted or saved.
    LayerTypeError, LayerError
        If a matched module has no weight that can be adapted.
    ArrayTypeError, ArrayValueError
        If a weight is complex or integer, or holds NaN or infinity; the message names the layer.
    ConfigError
        If the name is none.
    StateError
        If an adapter of that name is attached already, or the weights hold the update of another.

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
        # The matrices of a stack have factors of one shape: where an estimate of K differs, the highest is for all.
        for owner, highest in _highest_in_uneven_stacks(layers).items():
            own = config.for_layer(owner)
            assert isinstance(own.subspaces, SubspaceEstimate)
            own = own.unchecked(
                subspaces=dataclasses.replace(own.subspaces, minimum=highest, maximum=highest)
            )
            stack = Weights([path for path in layers if owner_of(path) == owner], weights.__getitem__)
            # Each process for itself: others may have found no such stack, and would not answer.
            layers |= _all_factors(backend, stack, own, Division())
        ordered = {path: core.join([layers[part] for part in site.split()]) for path, site in sites.items()}
        if config.budget is not None:
            core.plan_budget(ordered, config.budget)  # complains of what cannot be kept to
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
    """Take adapters off: with the last of them the base model is back, bit for bit, ``modules_to_save`` included.

    Parameters
    ----------
    model
        An adapted model, merged or not.
    name
        Of the adapter, or of several; None for the only one, or what is active.

    Returns
    -------
    Model
        The model without them; the same object where the framework's models are mutable.

    Raises
    ------
    StateError
        If the model has no such adapter, or W0 was dropped by ``keep_base=False``; if others are left, and a budget
        controller trains the adapter.

    See Also
    --------
    adamss.merge_and_unload : the adapters taken off, and what they have learnt kept.
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
    """Compute what the base model computes, ``modules_to_save`` included, within a ``with`` block.

    Parameters
    ----------
    model
        An adapted model.

    Yields
    ------
    Model
        The same object, switched off, where the framework's models are mutable; else a model without
        the updates.

    Raises
    ------
    StateError
        If the model has no adapters, or was merged with ``keep_base=False``.
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
            # Not by the token of `set`: a block that is left open may be closed in another context.
            _OFF.set(tuple(off for off in _OFF.get() if off is not base))


def summary(model: Model, *, name: str | None = None) -> Summary:
    """Return effective settings and counts of every layer of an adapter; prints as a table.

    Parameters
    ----------
    model
        An adapted model.
    name
        Of the adapter; None for the only one, or the one that is active.

    Returns
    -------
    Summary
        With `rows` and `total`.

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
    """Return what to hand to an optimiser, in the framework's own form.

    B and C of every adapted layer, the rows of ``trained_tokens``, then the parameters of ``modules_to_save``.
    PyTorch: a list of Parameters.

    Parameters
    ----------
    model
        An adapted model.
    name
        Of the adapter, or of several; None for all that are trained.

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
    """Return the rows of an embedding that are trained, as they are."""
    assert isinstance(config.trained_tokens, Mapping)
    base, ids = base_weight(backend, site, bank), config.trained_tokens[site.path]
    values = base.W[namespace(base.W).asarray(ids), :]
    check_matrix(values, name=f"{site.path}: the rows of trained_tokens")
    # Steps are lost to the rounding of half precision. Another dtype of factors would not start equal.
    dtype = factor_dtype(backend, base, config.unchecked(factor_dtype=None))
    return Rows(tuple(ids), backend.cast(values, dtype))


def _all_factors(
    backend: Backend, weights: Weights, config: AdamssConfig, division: Division
) -> dict[str, Factors]:
    """Return the factors of layers, to start a training from, computed batch by batch and by all processes."""
    layers: dict[str, Factors] = {}
    with progress(len(weights)) as count:
        for batch in batches(division.share(weights, json.dumps(config.to_dict()))):
            with division.carrying() as go:
                # Neighbours of one shape may have settings of their own.
                for own, alike in groupby(batch, lambda path: config.for_layer(owner_of(path))):
                    some = {path: batch[path] for path in alike}
                    layers |= _initial_factors(backend, some, own, division, count) if go else {}
        return division.gather(layers)


def _highest_in_uneven_stacks(layers: Mapping[str, Factors]) -> dict[str, int]:
    """Return the highest K in each stack of matrices whose K differ."""
    numbers = {owner: {f.ranks.shape[0] for f in parts.values()} for owner, parts in by_owner(layers).items()}
    return {owner: max(found) for owner, found in numbers.items() if len(found) > 1}


def _initial_factors(
    backend: Backend,
    batch: Mapping[str, BaseWeight],
    config: AdamssConfig,
    division: Division,
    count: Callable[[], None],
) -> dict[str, Factors]:
    """Return the factors of layers of one shape, to start a training from."""

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
    """Return the labels of layers of one shape, those with the same K segmented together."""
    estimate = config.subspaces
    assert not isinstance(estimate, str)  # the config has made settings of "estimate"
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
    """Return (d, n) of matrices of one d beside each other."""
    return parts[0][0], sum(n for _, n in parts)
