"""Movements of updates into the weights of a model and out again, written once for all frameworks.

The ledger says, for every weight, the update of which subspaces it holds. Merging lets it hold all of them,
consolidating those that are frozen, unmerging and detaching none; each is one call of `hold` or `release`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from array_api_compat import to_device

from adamss import core
from adamss.backend.bank import Adaptation, Ledger, Rows
from adamss.backend.interface import Backend, Model
from adamss.backend.sites import BaseWeight, Site, arrays_of, owner_of
from adamss.config import AdamssConfig
from adamss.core import Factors
from adamss.core._array import check_concrete, device, namespace
from adamss.errors import AdamssWarning, ArrayValueError, LayerError, StateError

__all__ = [
    "base_weight",
    "hold",
    "put",
    "reading",
    "release",
    "require_kept_base",
    "require_unchanged",
    "sites_of",
    "switched_off",
    "whole",
]


def require_kept_base(adaptation: Adaptation, verb: str) -> None:
    """Check that the base weights can be given back.

    Raises
    ------
    StateError
        If they were dropped.
    """
    if not adaptation.ledger.keeps_base:
        raise StateError(
            f"{verb}: the base weights were dropped (keep_base=False); load the base model afresh"
        )


def require_unchanged(backend: Backend, model: Model, verb: str) -> None:
    """Check that no adapted layer was replaced or resized; `save` is told of it, so that no work is lost."""
    lost = backend.lost(model)
    if not lost:
        return
    path, why = next(iter(lost.items()))
    more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
    if verb == "save":
        warnings.warn(f"save: {path} {why}{more}: the file is without it", AdamssWarning, stacklevel=4)
        return
    raise StateError(
        f"{verb}: {path} {why}{more}; put the layer back, or save what is left by adamss.save and load it into a "
        "model of the new form (adamss.load)"
    )


def sites_of(backend: Backend, model: Model, adaptation: Adaptation) -> dict[str, Site]:
    """Return the site of each adapted layer, by path."""
    modules = backend.modules(model)
    return {path: backend.site(modules[path], path) for path in adaptation.layers}


def whole(backend: Backend, arrays: Any) -> Any:
    """Return a base weight, or factors, with all the entries of each array."""
    return type(arrays)(*(None if array is None else backend.whole(array) for array in arrays))


@contextmanager
def reading(path: str, weight: Any) -> Iterator[None]:
    """Turn the error of an array that knows some operators only into one that names the layer."""
    try:
        yield
    except NotImplementedError as error:
        raise LayerError(
            f"{path}: its weight is a {type(weight).__name__}, which nobody here can read ({str(error)[:80]}...); "
            "dequantise it first, or register an adamss.backend.Store that reads it"
        ) from error


def base_weight(
    backend: Backend, site: Site, adaptation: Adaptation | None = None, *, values: bool = True
) -> BaseWeight:
    """Return W0 and its bias at a site, whatever the weight holds at the moment.

    What is left of a dropped W0 is the weight without the updates that it holds, up to rounding.

    Parameters
    ----------
    backend
        Of the model.
    site
        Where.
    adaptation
        What is attached to the model.
    values
        Whether they are needed, and not only shape and dtype.

    Raises
    ------
    LayerError
        If there are none, on the meta device.
    StateError
        If W0 was dropped by ``merge(keep_base=False)``.
    """
    ledger = Ledger() if adaptation is None else adaptation.ledger
    if owner_of(site.path) in ledger.layers:
        return base_weight(backend, backend.site(ledger.layers[owner_of(site.path)], site.path))
    kept, arrays = ledger.base.get(owner_of(site.path)), backend.own_arrays(site)
    # Kept in the host's memory, and wanted where the layer is.
    on = {name: None if array is None else device(array) for name, array in arrays.items()}
    arrays |= kept or {}
    with reading(site.path, arrays[site.kind.weight]):
        base = site.weight(arrays)
    if kept:
        base = BaseWeight(
            *(a if a is None else to_device(a, on[name]) for name, a in zip(site.names, base, strict=True))
        )
    if values and not backend.has_values(base.W):
        raise LayerError(
            f"{site.path} is on the meta device: its weight has no values; load the weights first"
        )
    whole_path = site.path if adaptation is None or site.path in adaptation.layers else owner_of(site.path)
    held = ledger.held.get(whole_path)
    if adaptation is None or held is None or kept is not None:
        return base
    if adaptation.merged:
        raise StateError(f"{site.path}: the base weight was dropped by merge(keep_base=False)")
    xp, factors = namespace(base.W), _only(adaptation.layers[whole_path], held)
    if whole_path != site.path:
        factors = core.split(factors, site.kind.blocks(site.layer))[site.index[0]]
    update, d = core.delta(factors), base.W.shape[0]
    b = base.b
    if b is not None and update.shape[0] > d:
        b = b - xp.astype(update[d, :], b.dtype)
    return BaseWeight(base.W - xp.astype(update[:d, :], base.W.dtype), b)


def put(
    backend: Backend,
    model: Model,
    layers: Mapping[str, Factors],
    shapes: Mapping[str, tuple[int, int]],
    *,
    config: AdamssConfig,
    saved: Mapping[str, Mapping[str, Any] | None],
    trained: bool = True,
    tokens: Mapping[str, Rows] | None = None,
) -> Model:
    """Return the model with an adapter on it.

    Parameters
    ----------
    backend, model
        A model without adapters.
    layers, shapes
        Factors, and (d, n) of the weight, by module path.
    config
        The settings.
    saved
        Paths of ``modules_to_save``, and the values that they get, as from `Models.arrays` (None: as they are).
    trained
        Whether the adapter and ``modules_to_save`` are trained from now on.
    tokens
        Rows to train, by path of the embedding.
    """
    modules = backend.modules(model)
    return backend.insert(
        model,
        Adaptation(config, layers, shapes, tuple(saved), trained=trained, tokens=tokens or {}),
        originals={path: backend.arrays(modules[path]) for path in saved},
        values={path: values for path, values in saved.items() if values is not None},
    )


def hold(
    backend: Backend,
    model: Model,
    adaptation: Adaptation,
    subspaces: Mapping[str, np.ndarray[Any, Any]],
    *,
    keep_base: bool,
    put_away: Mapping[str, Any] | None = None,
) -> tuple[Model, dict[str, float]]:
    """Let each weight hold the update of just these subspaces: ``round(W0 + sum over k of A_k B_k C_k)``.

    Where these are all subspaces, the embeddings hold the trained rows of tokens too.

    Parameters
    ----------
    backend, model, adaptation
        An adapted model.
    subspaces
        (K,) booleans on the host, by path of every adapted layer.
    keep_base
        Whether W0 is kept. One that was dropped before stays so.
    put_away
        By path of the module, quantised layers whose place those of the model have taken, and which have W0.

    Returns
    -------
    model, lost
        The model, and by path the share of the update that the rounding to the dtype of the weight destroyed.

    Raises
    ------
    LayerError
        If a weight cannot be written.
    ArrayValueError
        If one would not be finite. The message names the layer, and no layer is changed.
    """
    sites = sites_of(backend, model, adaptation)
    owners = dict.fromkeys(map(owner_of, sites))
    everything = all(mask.all() for mask in subspaces.values())
    owners |= dict.fromkeys(adaptation.tokens if everything else ())
    backend.check_writable(model, owners)
    rows, lost = _rounded_rows(backend, model, adaptation) if everything else ({}, {})
    weights: dict[str, BaseWeight] = {}
    parts: dict[str, Site] = {}
    for path, site in sites.items():
        check_concrete(*adaptation.layers[path], name=path)
        factors = _only(whole(backend, adaptation.layers[path]), subspaces[path])
        for (part_path, part), own in zip(
            site.split().items(), core.split(factors, site.blocks), strict=True
        ):
            base = base_weight(backend, part, adaptation)
            check_concrete(*base, name=path)
            try:
                W, b = whole(backend, base)
                merged = core.merge(W, b, own)
            except ArrayValueError as error:
                raise ArrayValueError(f"{part_path}: {error}") from error
            # Only those of one layer are whole at a time. A bias that the update does not move is left alone.
            moved = merged.b is not None and own.A.shape[1] > base.W.shape[0]
            b = backend.spread(merged.b, like=base.b) if moved else None
            weights[part_path] = BaseWeight(backend.spread(merged.W, like=base.W), b)
            parts[part_path], lost[path] = part, max(lost.get(path, 0.0), float(merged.lost))
    arrays, kept = arrays_of(weights, parts, backend.own_arrays) | rows, adaptation.ledger.base
    outputs = _probed(backend, model)
    with ExitStack() as undo:
        model, before = _exchanged(undo, backend.exchange, model, arrays)
        layers = {} if put_away is None or not keep_base else put_away
        former = {owner: kept.get(owner, before[owner]) if keep_base else None for owner in owners}
        former |= {owner: {} for owner in layers}
        ledger = Ledger(dict(subspaces), former, layers)
        model = _entered(undo, backend, model, adaptation.ledger, ledger)
        again = backend.probed(model) if outputs else {}
        for path in outputs.keys() & again.keys():
            _check_output(path, *outputs[path], again[path][0], weights[path].W)
        undo.pop_all()
    return model, lost


def _rounded_rows(
    backend: Backend, model: Model, adaptation: Adaptation
) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Return the trained rows as `Models.exchange` takes them, and what share of their change is rounded away."""
    modules = backend.modules(model)
    found: dict[str, dict[str, Any]] = {}
    lost: dict[str, float] = {}
    for path, (ids, values) in adaptation.tokens.items():
        site = backend.site(modules[path], path)
        W, values = base_weight(backend, site).W, backend.whole(values)
        check_concrete(values, name=path)
        xp = namespace(values)
        rounded = backend.cast(values, backend.dtype_name(W))
        if not bool(xp.all(xp.isfinite(rounded))):
            raise ArrayValueError(f"{path}: rows of trained_tokens are not finite as {backend.dtype_name(W)}")
        former = W[xp.asarray(ids), :]
        differences = (xp.astype(array, values.dtype) - values for array in (rounded, former))
        error, change = (float(xp.linalg.vector_norm(difference)) for difference in differences)
        found[path], lost[path] = {site.kind.weight: Rows(ids, rounded)}, error / change if change else 0.0
    return found, lost


def _probed(backend: Backend, model: Model) -> dict[str, tuple[Any, Any]]:
    """Return `Models.probed` of the layers that could be tried, and tell of the others."""
    outputs = {}
    for path, output in backend.probed(model).items():
        if not isinstance(output, str):
            outputs[path] = output
            continue
        warnings.warn(
            f"{path}: its forward {output}, so that nobody has seen whether its output stays what it is with the "
            "update in its weight: compare it before and after",
            AdamssWarning,
            stacklevel=5,
        )
    return outputs


def _check_output(path: str, before: Any, base: Any, after: Any, W: Any) -> None:
    """Check that a layer of another forward than its kind has computes with the update in its weight what it did."""
    xp = namespace(before)
    size, update, difference = (float(xp.max(xp.abs(a))) for a in (before, before - base, after - before))
    # What the rounding of weights and sums may do to the output, and what share of the update it may take.
    rounding = (4 if xp.finfo(W.dtype).bits < 32 else 64) * float(xp.finfo(W.dtype).eps) * size
    if not difference <= 0.05 * update + rounding:
        raise LayerError(
            f"{path}: its forward is not that of its weight alone: with the update in the weight, the output for a "
            f"random input differs by {difference:.3g}, where the update is {update:.3g}; leave the adapter unmerged"
        )


def release(backend: Backend, model: Model, adaptation: Adaptation, *, saved: bool = False) -> Model:
    """Give every weight W0 back, to the bit: it holds no update then. If asked, saved modules get their values too.

    Raises
    ------
    LayerError
        If one cannot be written.
    """
    base, originals = _kept(adaptation), backend.originals(model) if saved else {}
    _check_saved(backend, model, originals)
    backend.check_writable(model, base, originals)
    with ExitStack() as undo:
        if adaptation.ledger.held:
            model, _ = _exchanged(undo, backend.exchange, model, base)
            model, _ = _exchanged(undo, backend.exchange_layers, model, adaptation.ledger.layers)
            model = _entered(undo, backend, model, adaptation.ledger, Ledger())
        if originals:
            model, _ = _exchanged(undo, backend.exchange_saved, model, originals)
        undo.pop_all()
    return model


@contextmanager
def switched_off(backend: Backend, model: Model, adaptation: Adaptation) -> Iterator[Model]:
    """Give a model that computes what the base model computes, saved modules included, and undo that afterwards."""
    base, originals = _kept(adaptation), backend.originals(model)
    _check_saved(backend, model, originals)
    backend.check_writable(model, base, originals)
    with ExitStack() as undo:
        off, _ = _exchanged(undo, backend.exchange, model, base)
        off, _ = _exchanged(undo, backend.exchange_layers, off, adaptation.ledger.layers)
        off, _ = _exchanged(undo, backend.exchange_saved, off, originals)
        if off is model:
            undo.callback(backend.switched, model, on=True)
        yield backend.switched(off, on=False)


def _check_saved(backend: Backend, model: Model, originals: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that modules to save have the arrays that they had."""
    modules = backend.modules(model)
    for path, own in originals.items():
        present = backend.arrays(modules[path]) if path in modules else {}
        shapes, now = ({name: tuple(a.shape) for name, a in arrays.items()} for arrays in (own, present))
        if shapes != now:
            raise StateError(
                f"{path} of modules_to_save has been replaced or resized since adamss.attach: it had the arrays "
                f"{shapes}, and has {now or 'none'}; put the module back, or keep what is trained by adamss.save or "
                "adamss.merge_and_unload"
            )


def _exchanged(undo: ExitStack, exchange: Any, model: Model, arrays: Any) -> tuple[Model, Any]:
    """Return what `exchange` does, and have it undone.

    A model that is a value needs no undoing: the one from before is still there.
    """
    changed, before = exchange(model, arrays)
    if changed is model:
        undo.callback(exchange, model, before)
    return changed, before


def _entered(undo: ExitStack, backend: Backend, model: Model, former: Ledger, ledger: Ledger) -> Model:
    """Return the model with another ledger, and have that undone if the model is changed in place."""
    undo.callback(backend.enter, model, former)
    return backend.enter(model, ledger)


def _kept(adaptation: Adaptation) -> dict[str, Mapping[str, Any]]:
    """Return the W0 that are kept, by the path of the module; not those of layers that are put away."""
    return {path: arrays for path, arrays in adaptation.ledger.base.items() if arrays}


def _only(factors: Factors, subspaces: np.ndarray[Any, Any]) -> Factors:
    """Return factors of which some subspaces alone have an update."""
    on = device(factors.labels)
    return (
        factors if subspaces.all() else core.only(factors, namespace(factors.C).asarray(subspaces, device=on))
    )
