"""Verbs that merge updates into the weights, and take them out again."""

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
"""Share of an update that may be lost by rounding without a warning."""


def merge(model: Model, *, name: Name = None, keep_base: bool = True, dequantise: bool = False) -> Model:
    """Merge updates into the weights, so that inference costs as much as with the base model.

    Each weight becomes ``round(W0 + delta)``, where the sum is computed in float32 or wider. If `consolidate` has
    merged some subspaces before, they are merged again together with the rest, so that `unmerge` returns to the model
    before both calls. The rows of ``trained_tokens`` are written into their embeddings. If a head shares the weight
    of such an embedding, it still shares it afterwards.

    Parameters
    ----------
    model
        An adapted model.
    name
        Name or names of the adapters, or weights by name. None means the only adapter, or the active ones. Adapters
        that are not active become active. The weights still hold the updates of other adapters that they held before.
    keep_base
        Whether to keep a copy of W0 on the CPU, so that `unmerge` and `detach` are exact. Without it, they raise an
        error.
    dequantise
        Whether to replace each quantised layer that is adapted by a floating-point layer with the same values (in
        PyTorch a `torch.nn.Linear`), in the dtype in which the layer computes, and to merge into that. With
        ``keep_base``, the quantised layer is kept on its device, and `unmerge` and `detach` put it back. Other
        records of the quantisation, such as ``model.config.quantization_config``, are not changed.

    Returns
    -------
    Model
        The merged model. It is the same object if the framework's models are mutable.

    Raises
    ------
    StateError
        If the model has no such adapter, if the adapters are merged already, or if one was consolidated with
        ``keep_base=False``.
    LayerError
        If a weight cannot be written, for example because it is quantised and ``dequantise`` is False.
    ArrayValueError
        If a merged weight is not finite. The message names the layer, and no layer is merged.

    Warns
    -----
    AdamssWarning
        If rounding to the dtype of a weight lost more than 5 % of its update. If a weight was tied to another one
        (an embedding to ``lm_head``), because it is a separate tensor from then on.
    """
    backend, bank = adapted(model, "merge")
    weights = chosen(bank, name, "merge")
    if all(bank.adapters[one].merged for one in weights):
        require_kept_base(bank, "merge")
        raise StateError("merge: the updates are merged already; call adamss.unmerge(model) first")
    return _merged(backend, model, weights, "merge", keep_base=keep_base, dequantise=dequantise)


def merge_and_unload(model: Model, *, name: Name = None, dequantise: bool = False) -> Model:
    """Merge updates into the weights permanently, and remove all adapters.

    The result is a plain model of the framework. Its weights are ``round(W0 + delta)`` as with `merge`, the
    ``modules_to_save`` keep their trained values, and the parameters that required a gradient before `attach` require
    one again. Neither the adapters nor W0 are left, in memory or in what the framework itself saves, so save the
    adapter first.

    Parameters
    ----------
    model
        An adapted model, merged or not.
    name
        Adapters whose updates are merged, as in `merge`. The updates of all other adapters are discarded.
    dequantise
        Whether to replace each quantised layer that is adapted by a floating-point layer, as in `merge`.

    Returns
    -------
    Model
        The model without adapters. It is the same object if the framework's models are mutable.

    Raises
    ------
    StateError
        If the model has no such adapter, or it was consolidated with ``keep_base=False``; or if the weights hold the
        update of an adapter that is not named.
    LayerError
        If a weight cannot be written, for example because it is quantised and ``dequantise`` is False.
    ArrayValueError
        If a merged weight is not finite. The message names the layer, and nothing is changed.

    Warns
    -----
    AdamssWarning
        If rounding to the dtype of a weight lost more than 5 % of its update. If a weight was tied to another one
        (an embedding to ``lm_head``), because it is a separate tensor from then on.
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
    """Take merged updates out of the weights.

    Afterwards, the weights equal W0 bit for bit, and the adapters are as they were before `merge`. If the weights
    still hold the update of another adapter, they equal W0 with only that update merged. If `merge` replaced
    quantised layers by floating-point layers, the original quantised layers are put back.

    Parameters
    ----------
    model
        A merged model.
    name
        Name or names of the adapters. None means all that are merged.

    Returns
    -------
    Model
        The adapted model. It is the same object if the framework's models are mutable.

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
    """Merge the frozen subspaces into the weights, so that the forward pass computes only the trained ones.

    Each weight becomes ``W0 + sum of A_k B_k C_k over the frozen k``. The outputs, and the gradients of the trained
    subspaces, stay the same up to rounding. `save` still writes all subspaces, and `detach` restores W0. Training
    continues as before. Subspaces that are frozen later are merged by the next call; a call changes nothing if none
    were frozen since the last. If no subspace is trained any more, the result is that of `merge`.

    Parameters
    ----------
    model
        An adapted model with frozen subspaces, not merged.
    name
        Name of the adapter, which must be active. None means the only one, or the active one.
    keep_base
        Whether to keep a copy of W0 on the CPU, so that `detach`, `merge` and `disabled` are exact. Without it, they
        raise an error, and no merged subspace can be trained again.

    Returns
    -------
    Model
        The consolidated model. It is the same object if the framework's models are mutable.

    Raises
    ------
    StateError
        If the model has no such adapter, or the adapter is merged or not active; if it has no frozen subspaces; if a
        budget with ``revive=True`` may let frozen subspaces return; or if all subspaces are frozen and rows of
        ``trained_tokens`` are trained, which `consolidate` does not merge.
    ArrayTypeError
        If a weight is in half precision, where rounding would lose the update. Merge at the end instead.
    ArrayValueError
        If a weight would not be finite. The message names the layer, and nothing is changed.

    Examples
    --------
    A budget freezes subspaces during training. Here, without training, C is set and one of two subspaces is frozen:

    >>> import numpy as np, adamss
    >>> from adamss.backend import NumpyLinear, NumpyModel, get_backend
    >>> model = NumpyModel({"query": NumpyLinear(np.eye(4))})
    >>> model = adamss.attach(model, adamss.AdamssConfig(targets=["query"], rank=4, subspaces=2))
    >>> model.bank.only().layers["query"].C[...] = 0.5
    >>> model = get_backend("numpy").set_active(model, {"query": np.asarray([True, False])})
    >>> consolidated, x = adamss.consolidate(model), np.ones(4)
    >>> bool(np.any(consolidated["query"].W != np.eye(4)))  # the weight holds the frozen update
    True
    >>> bool(np.allclose(consolidated["query"](x), model["query"](x)))
    True
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
            "consolidate: no subspace is trained any more, but the rows of trained_tokens are, which consolidate "
            "does not merge; merge at the end instead"
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
    """Return the model with the updates of these adapters, some of which may be merged already, in its weights."""
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
            "(tie_word_embeddings=False), because the update is lost if the weights are tied again or the file is "
            "loaded into a tied model",
            AdamssWarning,
            stacklevel=3,
        )
    return model
