"""Operations that move updates into the weights of a model and out of them, and switch adapters on and off.

They are written once for all frameworks. The ledger records which subspaces of which adapters have their updates in
each weight. Merging an adapter puts the updates of all its subspaces into the weights, and consolidating puts those
of its frozen subspaces there. Unmerging and detaching take all of them out. Each of these is one call of `hold` or
`release`. `switch` sets which adapters are active, and gives ``modules_to_save`` the values of these adapters.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import combinations
from typing import Any

import numpy as np
from array_api_compat import to_device

from adamss import core
from adamss.backend.bank import DEFAULT, Adaptation, Bank, Ledger, Rows, State, scaled
from adamss.backend.interface import Backend, Model
from adamss.backend.sites import BaseWeight, Site, arrays_of, owner_of
from adamss.backend.tensors import join_path
from adamss.config import AdamssConfig
from adamss.core import Factors
from adamss.core._array import check_concrete, device, namespace
from adamss.errors import AdamssWarning, ArrayValueError, LayerError, StateError, TargetError

__all__ = [
    "base_weight",
    "check_together",
    "hold",
    "put",
    "reading",
    "release",
    "replaced",
    "require_kept_base",
    "require_unchanged",
    "sites_of",
    "switch",
    "switched_off",
    "values_of_saved",
    "whole",
    "withdraw",
]


def require_kept_base(bank: Bank, verb: str) -> None:
    """Check that the base weights can be restored.

    Raises
    ------
    StateError
        If they were dropped.
    """
    if not bank.ledger.keeps_base:
        raise StateError(
            f"{verb}: the base weights were dropped (keep_base=False); load the base model afresh"
        )


def require_unchanged(backend: Backend, model: Model, verb: str) -> None:
    """Check that no adapted layer was replaced or resized.

    Raises
    ------
    StateError
        If one was, unless `verb` is ``"save"``.

    Warns
    -----
    AdamssWarning
        If one was and `verb` is ``"save"``, which saves the other layers so that their training is not lost.
    """
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


def sites_of(backend: Backend, model: Model, paths: Iterable[str]) -> dict[str, Site]:
    """Return the sites of adapted layers, by path."""
    modules = backend.modules(model)
    return {path: backend.site(modules[path], path) for path in paths}


def whole(backend: Backend, arrays: Any) -> Any:
    """Return a base weight, or factors, with `Processes.whole` applied to each array."""
    return type(arrays)(*(None if array is None else backend.whole(array) for array in arrays))


@contextmanager
def reading(path: str, weight: Any) -> Iterator[None]:
    """Turn the error of an array type that lacks an operation into a `LayerError` that names the layer."""
    try:
        yield
    except NotImplementedError as error:
        raise LayerError(
            f"{path}: its weight is a {type(weight).__name__}, which no store can read ({str(error)[:80]}...); "
            "dequantise it first, or register an adamss.backend.Store that reads it"
        ) from error


def base_weight(backend: Backend, site: Site, bank: Bank | None = None, *, values: bool = True) -> BaseWeight:
    """Return W0 and the base bias at a site, whatever updates the weight holds at the moment.

    If W0 was dropped when subspaces were consolidated, it is recovered by subtracting their updates from the weight,
    which is exact up to rounding.

    Parameters
    ----------
    backend
        Backend of the model.
    site
        Site of the layer.
    bank
        Bank of the model, or None if the model has no adapters.
    values
        Whether the values are needed, and not only the shape and the dtype.

    Returns
    -------
    BaseWeight
        W0 and the base bias.

    Raises
    ------
    LayerError
        If values are needed and the weight has none because it is on the meta device, or the weight cannot be read.
    StateError
        If W0 was dropped by ``merge(keep_base=False)``.
    """
    bank = bank or Bank()
    if owner_of(site.path) in bank.layers:
        return base_weight(backend, backend.site(bank.layers[owner_of(site.path)], site.path))
    kept, arrays = bank.base.get(owner_of(site.path)), backend.own_arrays(site)
    # A kept W0 is in host memory and must be moved to the device of the layer.
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
    whole_path = site.path if site.path in bank.paths else owner_of(site.path)
    holding = [each for each in bank.adapters.values() if whole_path in each.held]
    if not holding or kept is not None:
        return base
    if any(each.merged for each in holding):
        raise StateError(f"{site.path}: the base weight was dropped by merge(keep_base=False)")
    xp, (d, _), (W, b) = namespace(base.W), base.W.shape, base
    for each in holding:
        factors = _held_factors(each, whole_path, each.layers[whole_path], each.held)
        if whole_path != site.path:
            factors = core.split(factors, site.kind.blocks(site.layer))[site.index[0]]
        update = core.delta(factors)
        W = W - xp.astype(update[:d, :], W.dtype)
        if b is not None and update.shape[0] > d:
            b = b - xp.astype(update[d, :], b.dtype)
    return BaseWeight(W, b)


def put(
    backend: Backend,
    model: Model,
    layers: Mapping[str, Factors],
    shapes: Mapping[str, tuple[int, int]],
    *,
    config: AdamssConfig,
    saved: Mapping[str, Mapping[str, Any] | None],
    name: str = DEFAULT,
    trained: bool = True,
    tokens: Mapping[str, Rows] | None = None,
) -> Model:
    """Add an adapter to the model and make it the only active one.

    Parameters
    ----------
    backend, model
        Backend and model. No adapter of the model may have the name of the new one.
    layers, shapes
        Factors, and shapes (d, n) of the weights, by module path.
    config
        Settings of the adapter.
    saved
        Values that ``modules_to_save`` get, by module path, as `Models.arrays` returns them. None leaves the values
        of a module as they are.
    name
        Name of the adapter.
    trained
        Whether the adapter and its ``modules_to_save`` are trained from now on.
    tokens
        Rows to train, by path of the embedding.

    Returns
    -------
    Model
        Model with the adapter.

    Raises
    ------
    TargetError
        If a layer of one adapter lies within a module that another adapter saves.
    """
    _check_apart(backend.bank(model), [*layers, *(tokens or ())], list(saved))
    kept = {path: values for path, values in saved.items() if values is not None}
    adaptation = Adaptation(
        config, layers, shapes, tuple(saved), name, tokens or {}, trainable=trained, kept=kept
    )
    with ExitStack() as undo:
        # Deactivate all adapters first, so that modules to save have their base values when `insert` is called.
        if backend.bank(model):
            model = switch(backend, model, {}, trained=(), undo=undo)
        modules = backend.modules(model)
        before = model
        model = backend.insert(model, adaptation, {path: backend.arrays(modules[path]) for path in saved})
        if model is before:
            undo.callback(backend.remove, model, [name])
        model = switch(backend, model, {name: 1.0}, trained=[name] if trained else ())
        undo.pop_all()
    return model


def replaced(backend: Backend, model: Model, new: Adaptation) -> Model:
    """Replace the values of an adapter by those of an adapter of the same name, modules, tokens and shapes.

    Raises
    ------
    StateError
        If modules, tokens or shapes differ, or a weight holds the update of the adapter. The model is unchanged.
    """
    old = backend.bank(model).adapters[new.name]
    if old.held:
        raise StateError(f"the weights hold the update of {new.name!r}; call {old.way_out} first")
    for what, there, here in (
        ("adapted layers", sorted(new.layers), sorted(old.layers)),
        ("modules_to_save", sorted(new.saved), sorted(old.saved)),
        (
            "trained_tokens",
            {p: r.ids for p, r in new.tokens.items()},
            {p: r.ids for p, r in old.tokens.items()},
        ),
    ):
        if there != here:
            raise StateError(
                f"{new.name!r} has other {what} than the file: {here} and {there}; load it under another name"
            )
    for path, factors in new.layers.items():
        for name, there, here in zip(Factors._fields, factors, old.layers[path], strict=True):
            if tuple(there.shape) != tuple(here.shape):
                raise StateError(
                    f"{path}: {name} of {new.name!r} has shape {tuple(here.shape)}, that of the file "
                    f"{tuple(there.shape)}; load it under another name"
                )
    with ExitStack() as undo:
        if old.active and new.kept:
            model, _ = _exchanged(undo, backend.exchange_saved, model, new.kept)
        model = backend.with_factors(model, new.name, new.layers)
        if new.tokens:
            model = backend.with_rows(model, new.name, new.tokens)
        undo.pop_all()
    if new.kept and not old.active:
        states = {name: each.state for name, each in backend.bank(model).adapters.items()}
        states[new.name] = states[new.name]._replace(kept=new.kept)
        model = backend.activated(model, states)
    return model


def switch(
    backend: Backend,
    model: Model,
    weights: Mapping[str, float],
    *,
    trained: Iterable[str],
    undo: ExitStack | None = None,
) -> Model:
    """Make exactly these adapters active, each with its weight.

    Each module to save gets the values of the active adapter that saves it, or its base values if there is none.

    Parameters
    ----------
    backend, model
        Backend and adapted model.
    weights
        Weight of each adapter to activate, by name. It multiplies the update of the adapter.
    trained
        Names of the active adapters that are trained. Their flag `trainable` is set permanently.
    undo
        Stack that gets a callback to undo the switch if a later step of the caller fails.

    Returns
    -------
    Model
        Model with these adapters active.

    Raises
    ------
    StateError
        If two of the adapters have values for one module to save or for rows of one embedding, or if the weights hold
        the update of an adapter that would become inactive or get another weight.
    """
    bank, trained = backend.bank(model), {*trained}
    check_together(bank, weights)
    for name, each in bank.adapters.items():
        if each.held and weights.get(name) != each.weight:
            raise StateError(
                f"the weights hold the update of {name!r}, which must be taken out of them before the adapter can be "
                f"switched off or get another weight; call {each.way_out} first"
            )
    kept = {name: dict(each.kept) for name, each in bank.adapters.items()}
    leaving = {
        path: name
        for name, each in bank.adapters.items()
        if each.active and name not in weights
        for path in each.saved
    }
    coming = {
        path: name
        for name in weights
        if not bank.adapters[name].active
        for path in bank.adapters[name].saved
        if path in kept[name]
    }
    with ExitStack() as own:
        off = {path: bank.originals[path] for path in leaving}
        _check_saved(backend, model, {path: bank.originals[path] for path in {**leaving, **coming}})
        backend.check_writable(model, (), {**leaving, **coming})
        if off:
            model, before = _exchanged(own, backend.exchange_saved, model, off)
            for path, name in leaving.items():
                kept[name][path] = before[path]
        if coming:
            on = {path: kept[name].pop(path) for path, name in coming.items()}
            model, _ = _exchanged(own, backend.exchange_saved, model, on)
        former = {name: each.state for name, each in bank.adapters.items()}
        states = {
            name: State(weights.get(name), state.trainable or name in trained, name in trained, kept[name])
            for name, state in former.items()
        }
        changed = backend.activated(model, states)
        if changed is model:
            own.callback(backend.activated, model, former)
        _hand_over(own, undo)
    return changed


def hold(
    backend: Backend,
    model: Model,
    bank: Bank,
    held: Mapping[str, Mapping[str, np.ndarray[Any, Any]]],
    *,
    keep_base: bool,
    put_away: Mapping[str, Any] | None = None,
    undo: ExitStack | None = None,
) -> tuple[Model, dict[str, float]]:
    """Make the weights hold the updates of exactly these subspaces, ``round(W0 + sum over k of A_k B_k C_k)``.

    If these are all subspaces of an adapter, the embeddings hold its trained rows too.

    Parameters
    ----------
    backend, model, bank
        Backend, adapted model, and its bank.
    held
        Subspaces to hold, (K,) booleans on the host, by name of an active adapter and path of every layer that it
        adapts.
    keep_base
        Whether W0 is kept. A W0 that was dropped earlier is not recovered.
    put_away
        Quantised layers that float layers of the model have just replaced and that contain W0, by path of the module.
        None means that `Ledger.layers` of the bank stays as it is.
    undo
        Stack that gets a callback to undo the change if a later step of the caller fails.

    Returns
    -------
    model, lost
        The model, and by path the share of the update that is lost by rounding to the dtype of the weight.

    Raises
    ------
    LayerError
        If a weight cannot be written, or a layer's output changes because its forward pass does not use the weight
        alone.
    ArrayValueError
        If a weight would not be finite. The message names the layer. No layer is changed.
    """
    adapters = {name: bank.adapters[name] for name in held}
    sites = sites_of(backend, model, dict.fromkeys(path for each in held.values() for path in each))
    owners = dict.fromkeys(map(owner_of, sites))
    whole_ones = [each for name, each in adapters.items() if all(mask.all() for mask in held[name].values())]
    tokens = {path: rows for each in whole_ones for path, rows in each.tokens.items()}
    # Weights that no longer hold any update get W0 back.
    former = {owner: arrays for owner, arrays in bank.base.items() if owner not in owners | tokens and arrays}
    backend.check_writable(model, owners | dict.fromkeys(tokens) | former)
    rows, lost = _rounded_rows(backend, model, bank, tokens)
    weights: dict[str, BaseWeight] = {}
    parts: dict[str, Site] = {}
    for path, site in sites.items():
        split = site.split()
        blocks = []
        for name, each in adapters.items():
            if path in held[name]:
                check_concrete(*each.layers[path], name=path)
                factors = _held_factors(each, path, whole(backend, each.layers[path]), held[name])
                blocks.append(core.split(factors, site.blocks))
        for (part_path, part), own in zip(split.items(), zip(*blocks, strict=True), strict=True):
            base = base_weight(backend, part, bank)
            check_concrete(*base, name=path)
            try:
                W, b = whole(backend, base)
                merged = core.merge(W, b, *own)
            except ArrayValueError as error:
                raise ArrayValueError(f"{part_path}: {error}") from error
            # `spread` is called in the loop, so that only one layer at a time is whole in memory. A bias is written
            # only if an update changes it, or if the layer's bias holds an earlier update.
            moved = merged.b is not None and any(each.A.shape[1] > base.W.shape[0] for each in own)
            moved = moved or part.kind.bias in (bank.base.get(owner_of(part_path)) or {})
            b = backend.spread(merged.b, like=base.b) if moved else None
            weights[part_path] = BaseWeight(backend.spread(merged.W, like=base.W), b)
            parts[part_path], lost[path] = part, max(lost.get(path, 0.0), float(merged.lost))
    arrays = arrays_of(weights, parts, backend.own_arrays) | rows | former
    outputs = _probed(backend, model)
    with ExitStack() as stack:
        model, before = _exchanged(stack, backend.exchange, model, arrays)
        layers = (bank.layers if put_away is None else put_away) if keep_base else {}
        kept: dict[str, Any] = {}
        for owner in owners | dict.fromkeys(tokens):
            known = bank.base.get(owner, {})  # None if it was dropped
            # Arrays that were kept before take precedence, since the ones just replaced held updates. The other
            # arrays held no update, so their former values are the base values.
            kept[owner] = {**before[owner], **known} if keep_base and known is not None else None
        kept |= {owner: {} for owner in layers}
        model = _entered(stack, backend, model, bank.ledger, Ledger(held, kept, layers))
        again = backend.probed(model) if outputs else {}
        for path in outputs.keys() & again.keys() & weights.keys():
            _check_output(path, *outputs[path], again[path][0], weights[path].W)
        _hand_over(stack, undo)
    return model, lost


def _rounded_rows(
    backend: Backend, model: Model, bank: Bank, tokens: Mapping[str, Rows]
) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Return the trained rows in the form of `Models.exchange`, and the share of their change lost by rounding."""
    modules = backend.modules(model)
    found: dict[str, dict[str, Any]] = {}
    lost: dict[str, float] = {}
    for path, (ids, values) in tokens.items():
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
    """Return `Models.probed` for the layers that could be tried, and warn about the others."""
    outputs = {}
    for path, output in backend.probed(model).items():
        if not isinstance(output, str):
            outputs[path] = output
            continue
        warnings.warn(
            f"{path}: its forward {output}, so it was not checked whether its output stays the same with the update "
            "in its weight; compare the output before and after",
            AdamssWarning,
            stacklevel=5,
        )
    return outputs


def _check_output(path: str, before: Any, base: Any, after: Any, W: Any) -> None:
    """Check that a layer with its own forward pass gives the same output once the update is in its weight.

    Parameters
    ----------
    path
        Path of the layer.
    before, base, after
        Outputs with the adapter, without it, and with the update in the weight.
    W
        Weight with the update, whose dtype determines the tolerance.

    Raises
    ------
    LayerError
        If the output differs by more than rounding explains.
    """
    xp = namespace(before)
    size, update, difference = (float(xp.max(xp.abs(a))) for a in (before, before - base, after - before))
    # Rounding may change the output by a multiple of eps, and may destroy up to 5 % of the update.
    rounding = (4 if xp.finfo(W.dtype).bits < 32 else 64) * float(xp.finfo(W.dtype).eps) * size
    if not difference <= 0.05 * update + rounding:
        raise LayerError(
            f"{path}: its forward is not that of its weight alone: with the update in the weight, the output for a "
            f"random input differs by {difference:.3g}, where the update is {update:.3g}; leave the adapter unmerged"
        )


def release(
    backend: Backend,
    model: Model,
    bank: Bank,
    names: Iterable[str] | None = None,
    undo: ExitStack | None = None,
) -> Model:
    """Take the updates of these adapters out of the weights.

    A weight that then holds no update equals W0 bit for bit.

    Parameters
    ----------
    backend, model, bank
        Backend, adapted model, and its bank.
    names
        Names of the adapters. None means all of them.
    undo
        Stack that gets a callback to undo the change if a later step of the caller fails.

    Raises
    ------
    LayerError
        If a weight cannot be written.
    """
    names = {*bank.adapters} if names is None else {*names}
    if not any(bank.adapters[name].held for name in names):
        return model
    left = {name: held for name, held in bank.ledger.held.items() if name not in names}
    if left:
        return hold(backend, model, bank, left, keep_base=True, undo=undo)[0]
    base = _kept(bank)
    backend.check_writable(model, base)
    with ExitStack() as own:
        model, _ = _exchanged(own, backend.exchange, model, base)
        model, _ = _exchanged(own, backend.exchange_layers, model, bank.layers)
        model = _entered(own, backend, model, bank.ledger, Ledger())
        _hand_over(own, undo)
    return model


def withdraw(backend: Backend, model: Model, names: Iterable[str]) -> Model:
    """Take the updates of these adapters out of the weights, and deactivate the adapters."""
    bank, names = backend.bank(model), {*names}
    saved = {path for name in names if bank.adapters[name].active for path in bank.adapters[name].saved}
    _check_saved(backend, model, {path: bank.originals[path] for path in saved})
    backend.check_writable(model, (), saved)
    left = {name: weight for name, weight in bank.active.items() if name not in names}
    trained = [name for name in left if bank.adapters[name].trained]
    with ExitStack() as undo:
        model = release(backend, model, bank, names, undo)
        model = switch(backend, model, left, trained=trained)
        undo.pop_all()
    return model


def values_of_saved(
    backend: Backend, model: Model, bank: Bank, adaptation: Adaptation
) -> dict[str, Mapping[str, Any]]:
    """Return an adapter's values for its modules to save, for those that are still in the model."""
    modules = backend.modules(model)
    if adaptation.active:
        return {path: backend.arrays(modules[path]) for path in adaptation.saved if path in modules}
    return {
        path: adaptation.kept.get(path, bank.originals[path]) for path in adaptation.saved if path in modules
    }


@contextmanager
def switched_off(backend: Backend, model: Model, bank: Bank) -> Iterator[Model]:
    """Return a context that yields a model with the outputs of the base model, and restores the adapters on exit.

    Modules to save have their base values inside the context.
    """
    base = _kept(bank)
    saved = {path for each in bank.adapters.values() if each.active for path in each.saved}
    originals = {path: bank.originals[path] for path in saved}
    _check_saved(backend, model, originals)
    backend.check_writable(model, base, originals)
    with ExitStack() as undo:
        off, _ = _exchanged(undo, backend.exchange, model, base)
        off, _ = _exchanged(undo, backend.exchange_layers, off, bank.layers)
        off, _ = _exchanged(undo, backend.exchange_saved, off, originals)
        if off is model:
            undo.callback(backend.switched, model, on=True)
        yield backend.switched(off, on=False)


def _check_apart(bank: Bank, layers: Iterable[str], saved: Iterable[str]) -> None:
    """Check that no adapter adapts a layer inside a module that another adapter saves.

    The base weight of the layer would otherwise depend on which of the two adapters is active.
    """
    for name, each in bank.adapters.items():
        pairs = [(path, outer) for path in layers for outer in each.saved]
        pairs += [(path, outer) for path in (*each.layers, *each.tokens) for outer in saved]
        for path, outer in pairs:
            if f"{path}.".startswith(join_path(outer, "")):
                raise TargetError(
                    f"{path} would be adapted by one adapter and trained whole by another as one of modules_to_save "
                    f"({outer or 'the model itself'}), and {name!r} is one of the two; leave it out of one of them"
                )


def check_together(bank: Bank, names: Iterable[str]) -> None:
    """Check that no two of these adapters have values for the same module to save, or rows of the same embedding.

    Raises
    ------
    StateError
        If two of them do, since such values cannot be added up as updates can.
    """
    for one, other in combinations(names, 2):
        first, second = bank.adapters[one], bank.adapters[other]
        for path in first.saved:
            if any(_overlap(path, its) for its in second.saved):
                raise StateError(
                    f"{one!r} and {other!r} both have values of {path}, one of modules_to_save, which cannot be "
                    "added up; name one of them"
                )
        if common := first.tokens.keys() & second.tokens.keys():
            raise StateError(
                f"{one!r} and {other!r} both have rows of trained_tokens for {min(common)}, which cannot be added "
                "up; name one of them"
            )


def _overlap(path: str, other: str) -> bool:
    """Return whether two modules are the same, or one lies within the other."""
    return f"{path}.".startswith(join_path(other, "")) or f"{other}.".startswith(join_path(path, ""))


def _hand_over(own: ExitStack, undo: ExitStack | None) -> None:
    """Keep the changes recorded in `own`: hand their callbacks over to `undo`, or discard them if it is None.

    The caller of `undo` can then still undo the changes if a later step fails.
    """
    kept = own.pop_all()
    if undo is not None:
        undo.callback(kept.close)


def _check_saved(backend: Backend, model: Model, originals: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that modules to save still have arrays of the same names and shapes as when they were adapted."""
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
    """Call `exchange` and register a callback on `undo` that reverses it.

    A model that is a value needs no callback, because the former model still exists.
    """
    changed, before = exchange(model, arrays)
    if changed is model:
        undo.callback(exchange, model, before)
    return changed, before


def _entered(undo: ExitStack, backend: Backend, model: Model, former: Ledger, ledger: Ledger) -> Model:
    """Call `Models.enter` and register a callback on `undo` that restores the former ledger."""
    undo.callback(backend.enter, model, former)
    return backend.enter(model, ledger)


def _kept(bank: Bank) -> dict[str, Mapping[str, Any]]:
    """Return the kept base arrays by path of the module, without those in quantised layers that were replaced."""
    return {path: arrays for path, arrays in bank.base.items() if arrays}


def _held_factors(
    adaptation: Adaptation, path: str, factors: Factors, held: Mapping[str, np.ndarray[Any, Any]]
) -> Factors:
    """Return factors whose update is that of the held subspaces only, multiplied by the weight of the adapter."""
    assert adaptation.weight is not None
    if not held[path].all():
        subspaces = namespace(factors.C).asarray(held[path], device=device(factors.labels))
        factors = core.only(factors, subspaces)
    return scaled(factors, adaptation.weight)
