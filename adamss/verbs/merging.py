"""Updates folded into the weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack

import numpy as np

from adamss.backend.interface import Backend, Model
from adamss.backend.ledger import base_weight, hold, release, require_kept_base, sites_of, switch
from adamss.backend.sites import owner_of
from adamss.errors import AdamssWarning, ArrayTypeError, StateError
from adamss.verbs.common import Name, adapted, chosen, one_of, tied_weights

__all__ = ["consolidate", "merge", "merge_and_unload", "unmerge"]

LOSS_WORTH_A_WARNING = 0.05


def merge(model: Model, *, name: Name = None, keep_base: bool = True, dequantise: bool = False) -> Model:
    """Fold updates into the weights, so that inference costs what the base model costs.

    Each weight becomes ``round(W0 + delta)``, the sum formed in float32 or wider. What `consolidate` has folded is
    merged anew with the rest: `unmerge` gives back the model as it was before both. The rows of ``trained_tokens``
    are written into their embeddings, and a head that shares the weight goes on sharing it.

    Parameters
    ----------
    model
        An adapted model.
    name
        Of the adapter; several, or weights by name; None for the only one, or what is active. Those that are not
        active yet become so. What the weights hold of other adapters stays there.
    keep_base
        Keep a copy of W0 on the CPU, so that `unmerge` and `detach` are exact. Without it they raise.
    dequantise
        Turn each adapted layer that is quantised into a float one of the same numbers (PyTorch: `torch.nn.Linear`),
        in the dtype that the layer computes in, and merge into that. With ``keep_base`` the quantised layer itself is
        kept where it is, and `unmerge` and `detach` give it back. What else the model says of its quantisation
        (``model.config.quantization_config``) stays as it is.

    Returns
    -------
    Model
        The merged model; the same object where the framework's models are mutable.

    Raises
    ------
    StateError
        If the model has no such adapter or it is merged already, or was consolidated with ``keep_base=False``.
    LayerError
        If a weight cannot be written: one that is quantised, without ``dequantise=True``.
    ArrayValueError
        If a merged weight is not finite; the message names the layer, and no layer is merged.

    Warns
    -----
    AdamssWarning
        If the rounding to the dtype of a weight lost more than 5 % of its update. If a weight was tied to another
        (embeddings and ``lm_head``): it is one of its own from then on.
    """
    backend, bank = adapted(model, "merge")
    weights = chosen(bank, name, "merge")
    if all(bank.adapters[one].merged for one in weights):
        require_kept_base(bank, "merge")
        raise StateError("merge: the updates are merged already; call adamss.unmerge(model) first")
    return _merged(backend, model, weights, "merge", keep_base=keep_base, dequantise=dequantise)


def merge_and_unload(model: Model, *, name: Name = None, dequantise: bool = False) -> Model:
    """Fold updates into the weights for good, and take all adapters off: a plain model that has learnt.

    Weights are ``round(W0 + delta)`` as of `merge`, ``modules_to_save`` keep what they were trained to, and what
    required a gradient before `attach` does again. Nothing of the adapters is left, in memory or in what the
    framework's own saving writes; neither is W0, so save the adapter first.

    Parameters
    ----------
    model
        An adapted model, merged or not.
    name
        Whose updates, as in `merge`. Adapters that are not named are taken off without a trace.
    dequantise
        Turn each adapted layer that is quantised into a float one, as `merge` does.

    Returns
    -------
    Model
        The model without adapters; the same object where the framework's models are mutable.

    Raises
    ------
    StateError
        If the model has no such adapter, or was consolidated with ``keep_base=False``; if the weights hold the update
        of one that is not named.
    LayerError
        If a weight cannot be written: one that is quantised, without ``dequantise=True``.
    ArrayValueError
        If a merged weight is not finite; the message names the layer, and nothing is changed.

    Warns
    -----
    AdamssWarning
        If the rounding to the dtype of a weight lost more than 5 % of its update. If a weight was tied to another
        (embeddings and ``lm_head``): it is one of its own from then on.
    """
    verb = "merge_and_unload"
    backend, bank = adapted(model, verb)
    weights = chosen(bank, name, verb)
    if other := next((one for one in bank.ledger.held if one not in weights), None):
        raise StateError(
            f"{verb}: the weights hold the update of {other!r} too; name it, or unmerge it first"
        )
    with backend.exact(), ExitStack() as undo:
        if bank.active != weights:
            trained = [one for one in weights if bank.adapters[one].trained]
            model = switch(backend, model, weights, trained=trained, undo=undo)
        if not all(bank.adapters[one].merged for one in weights):
            model = _merged(backend, model, weights, verb, keep_base=False, dequantise=dequantise)
        undo.pop_all()
        return backend.remove(model, bank.adapters)


def unmerge(model: Model, *, name: str | Iterable[str] | None = None) -> Model:
    """Take updates out of the weights again: W0 to the bit, the adapters as before `merge`.

    If the weights go on holding the update of another adapter, they become what merging that alone makes of W0.

    Where `merge` has turned quantised layers into float ones, the quantised ones come back, the same objects.

    Parameters
    ----------
    model
        A merged model.
    name
        Of the adapter, or of several; None for all that are merged.

    Returns
    -------
    Model
        The adapted model; the same object where the framework's models are mutable.

    Raises
    ------
    StateError
        If the adapter is not merged, or was merged with ``keep_base=False``.
    """
    backend, bank = adapted(model, "unmerge")
    merged = [one for one, each in bank.adapters.items() if each.merged]
    names = merged if name is None else list(chosen(bank, name, "unmerge"))
    if not names or not {*names} <= {*merged}:
        raise StateError(
            "unmerge: the updates are not merged"
            if name is None
            else f"unmerge: {next(one for one in names if one not in merged)!r} is not merged"
        )
    require_kept_base(bank, "unmerge")
    with backend.exact():
        return release(backend, model, bank, names)


def consolidate(model: Model, *, name: str | None = None, keep_base: bool = True) -> Model:
    """Fold the frozen subspaces into the weights, so that the forward computes only what is still trained.

    Each weight becomes ``W0 + sum of A_k B_k C_k over the frozen k``. Outputs and gradients of the trained subspaces
    are the same, up to rounding; `save` goes on writing every subspace, `detach` gives W0 back. Training goes on as
    before, and what is frozen later is folded by the next call, which else changes nothing. With no subspace left to
    train it is what `merge` does.

    Parameters
    ----------
    model
        An adapted model with frozen subspaces, not merged.
    name
        Of the adapter, which is active; None for the only one, or the one that is active.
    keep_base
        Keep a copy of W0 on the CPU, so that `detach`, `merge` and `disabled` are exact. Without it they raise, and
        nothing more can be thawed.

    Returns
    -------
    Model
        The model; the same object where the framework's models are mutable.

    Raises
    ------
    StateError
        If the model has no adapters, is merged, or has no frozen subspaces; or nothing but frozen ones, while rows of
        ``trained_tokens`` are trained.
    ArrayTypeError
        If a weight is in half precision, which would lose the update: merge at the end instead.
    ArrayValueError
        If a weight would not be finite; the message names the layer, and nothing is changed.
    """
    backend, bank = adapted(model, "consolidate")
    adaptation = one_of(bank, name, "consolidate")
    if adaptation.merged:
        raise StateError("consolidate: the updates are merged; call adamss.unmerge(model) first")
    if not adaptation.active:
        raise StateError(f"consolidate: {adaptation.name!r} is not active; call adamss.activate first")
    if adaptation.revives:
        raise StateError(
            "consolidate: the model has a budget with revive=True, under which frozen subspaces may return; merge at "
            "the end instead (in PyTorch, remove() of its controller makes them stay frozen)"
        )
    masks = {path: backend.to_stored(factors.active).numpy() for path, factors in adaptation.layers.items()}
    frozen = {path: ~mask for path, mask in masks.items()}
    if adaptation.tokens and all(mask.all() for mask in frozen.values()):
        raise StateError(
            "consolidate: no subspace is trained any more, but the rows of trained_tokens are, which it leaves "
            "alone; merge at the end instead"
        )
    held = adaptation.held
    if not any((mask & ~held.get(path, np.zeros_like(mask))).any() for path, mask in frozen.items()):
        if held:
            return model
        raise StateError("consolidate: there is no frozen subspace to fold; all of them are trained")
    with backend.exact():
        backend.check_writable(model, dict.fromkeys(map(owner_of, adaptation.layers)))
        for path, site in sites_of(backend, model, adaptation.layers).items():
            dtype = backend.dtype_name(base_weight(backend, site, bank).W)
            if dtype not in ("float32", "float64"):
                raise ArrayTypeError(
                    f"{path}: consolidating into {dtype} would round the update away; leave the model as it is, and "
                    "merge at the end"
                )
        all_held = {**bank.ledger.held, adaptation.name: frozen}
        keep_base = keep_base and bank.ledger.keeps_base
        model, _ = hold(backend, model, bank, all_held, keep_base=keep_base)
    return model


def _merged(
    backend: Backend,
    model: Model,
    weights: Mapping[str, float],
    verb: str,
    *,
    keep_base: bool,
    dequantise: bool,
) -> Model:
    """Return the model, in which some of these adapters are not merged, with all their updates in its weights."""
    bank = backend.bank(model)
    if bank.ledger.held:
        require_kept_base(bank, verb)
    adapters = {one: bank.adapters[one] for one in weights}
    tied = tied_weights(
        backend, model, dict.fromkeys(path for each in adapters.values() for path in each.layers)
    )
    everything = {
        one: {path: np.ones(factors.ranks.shape, np.bool_) for path, factors in each.layers.items()}
        for one, each in adapters.items()
    }
    active = {**bank.active, **weights}
    trained = [one for one in active if bank.adapters[one].trained]
    with backend.exact(), ExitStack() as undo:
        if active != bank.active:
            model = switch(backend, model, active, trained=trained, undo=undo)
        put_away = None
        if dequantise:
            model, put_away = backend.exchange_layers(model, backend.dequantised(model))
            undo.callback(backend.exchange_layers, model, put_away)
            put_away = {**bank.layers, **put_away}
        bank = backend.bank(model)
        held = {**bank.ledger.held, **everything}
        model, lost = hold(backend, model, bank, held, keep_base=keep_base, put_away=put_away)
        undo.pop_all()
    worst = max(lost, key=lambda path: lost[path])
    if lost[worst] > LOSS_WORTH_A_WARNING:
        modules = backend.modules(model)
        W = backend.own_arrays(backend.site(modules[worst], worst)).values()
        warnings.warn(
            f"rounding to {backend.dtype_name(next(iter(W)))} lost {lost[worst]:.0%} of the update of {worst} "
            f"(more than 5 % in {sum(loss > LOSS_WORTH_A_WARNING for loss in lost.values())} of {len(lost)} "
            "layers); merge into a float32 model, or leave the adapter unmerged",
            AdamssWarning,
            stacklevel=3,
        )
    if tied:
        warnings.warn(
            f"{verb}: {tied} in the base; it has a merged weight of its own now: save the model as an untied one "
            "(tie_word_embeddings=False), for tying it again, or loading it into a tied one, loses the update",
            AdamssWarning,
            stacklevel=3,
        )
    return model
