"""Verbs that list the adapters of a model and choose which of them it computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from adamss.backend.bank import Route
from adamss.backend.interface import Model
from adamss.backend.ledger import switch
from adamss.backend.registry import backend_for
from adamss.config import AdamssConfig
from adamss.errors import ConfigError, StateError
from adamss.verbs.common import adapted, as_weights, chosen

__all__ = ["AdapterInfo", "activate", "adapters", "routed"]


@dataclass(frozen=True)
class AdapterInfo:
    """Description of one adapter of a model, as `adapters` returns it.

    Attributes
    ----------
    config
        Settings with which the adapter was attached.
    layers
        Paths of the adapted layers.
    saved
        Paths of ``modules_to_save``.
    weight
        Number by which the update is multiplied. None means that the adapter is not active.
    trained
        Whether the adapter is trained now.
    merged
        Whether the weights hold the update.

    Examples
    --------
    >>> import numpy as np, adamss
    >>> from adamss.backend import NumpyLinear, NumpyModel
    >>> model = NumpyModel({"query": NumpyLinear(np.eye(4))})
    >>> model = adamss.attach(model, adamss.AdamssConfig(targets=["query"], rank=4, subspaces=2))
    >>> adapter = adamss.adapters(model)["default"]
    >>> adapter.layers, adapter.weight, adapter.trained, adapter.merged
    (('query',), 1.0, True, False)
    """

    config: AdamssConfig
    layers: tuple[str, ...]
    saved: tuple[str, ...]
    weight: float | None
    trained: bool
    merged: bool

    @property
    def active(self) -> bool:
        """Whether the adapter is active, so that the model computes its update."""
        return self.weight is not None


def adapters(model: Model) -> dict[str, AdapterInfo]:
    """Return the adapters of a model by name, in the order in which they were added.

    Parameters
    ----------
    model
        Model with or without adapters.

    Returns
    -------
    dict of str to AdapterInfo
        Empty if the model has no adapters.
    """
    return {
        name: AdapterInfo(each.config, tuple(each.layers), each.saved, each.weight, each.trained, each.merged)
        for name, each in backend_for(model).bank(model).adapters.items()
    }


@contextmanager
def routed(model: Model, names: Iterable[str | None], *, axis: int = 0) -> Iterator[Model]:
    """Compute each row of a batch with its own adapter, within a ``with`` block.

    One pair of matrix products computes all adapters of a layer. Inside the block, it does not matter which adapters
    are active and with which weights.

    Parameters
    ----------
    model
        An adapted model.
    names
        Name of the adapter for each row of the input. None means the base model. If the input of a layer has a
        multiple of this number of rows (flattened tokens, windows, beams), the rows that belong to one entry must be
        contiguous.
    axis
        Axis along which the rows lie, in the input of the model and in the inputs of its layers.

    Yields
    ------
    Model
        The same object if the framework's models are mutable, else a new model that is routed.

    Raises
    ------
    ConfigError
        If `names` is empty, or `axis` is not a non-negative integer.
    StateError
        If the model has no such adapter; if the weights hold the update of an adapter; if a named or active adapter
        has ``modules_to_save`` or ``trained_tokens``, which cannot differ between rows; or inside another block of
        `routed` or a block of `disabled`.
    LayerError
        If the weight of a layer is read by a module that applies it to all rows at once (experts, attention). When
        the model runs, if the input of a layer has a number of rows that does not fit. The message names the layer.

    Examples
    --------
    >>> import numpy as np, adamss
    >>> from adamss.backend import NumpyLinear, NumpyModel
    >>> model = NumpyModel({"query": NumpyLinear(np.eye(4))})
    >>> settings = adamss.AdamssConfig(targets=["query"], rank=4, subspaces=2)
    >>> model = adamss.attach(adamss.attach(model, settings, name="a"), settings, name="b")
    >>> with adamss.routed(model, ["a", None, "b"]) as mixed:
    ...     mixed["query"](np.ones((3, 4))).shape
    (3, 4)
    """
    backend, bank = adapted(model, "routed")
    rows = [names] if isinstance(names, str) else list(names)
    if not rows:
        raise ConfigError("routed: names is empty; it has one entry for each row of the batch")
    if not isinstance(axis, int) or axis < 0:
        raise ConfigError(f"routed: axis counts from the first axis of the input, 0; found {axis!r}")
    used = chosen(bank, dict.fromkeys((name for name in rows if name is not None), 1.0), "routed", empty=True)
    for name in {*used, *bank.active}:
        each = bank.adapters[name]
        if what := "modules_to_save" if each.saved else "trained_tokens" if each.tokens else "":
            remedy = "route others" if name in used else "activate another first"
            raise StateError(f"routed: {name!r} has {what}, which cannot differ between rows; {remedy}")
    if bank.ledger.held:
        held = bank.adapters[next(iter(bank.ledger.held))]
        raise StateError(
            f"routed: the weights hold the update of {held.name!r} for all rows; call {held.way_out} first"
        )
    order = [name for name, each in bank.adapters.items() if not each.saved and not each.tokens]
    route = Route(tuple(order), tuple(-1 if name is None else order.index(name) for name in rows), axis)
    mixed = backend.routed(model, route)
    try:
        yield mixed
    finally:
        if mixed is model:
            backend.routed(model, None)


def activate(
    model: Model,
    what: str | Iterable[str] | Mapping[str, float] | None,
    *,
    train: str | Iterable[str] | None = None,
) -> Model:
    """Choose the adapters that a model computes.

    The updates of several adapters add up, ``W0 + sum of weight * delta``. Each module of ``modules_to_save`` gets
    the values of the active adapter that saves it, or its base values if there is none. The values of an adapter that
    is no longer active are kept until it is activated again.

    Parameters
    ----------
    model
        An adapted model.
    what
        Name or names of the adapters to activate, or weights by name. None, or an empty list, means the base model.
    train
        Name or names of those adapters that are trained from now on. None means those that `attach`, `load` or an
        earlier `train` set to be trained. Adapters that are not active get no gradient.

    Returns
    -------
    Model
        The model with these adapters active. It is the same object if the framework's models are mutable.

    Raises
    ------
    StateError
        If the model has no such adapter; if `train` names an adapter that is not activated; if two of the adapters
        have values for one module of ``modules_to_save`` or for rows of one embedding; if the weights hold the update
        of an adapter that would become inactive or get another weight; or inside a block of `disabled` or `routed`.
        The model is unchanged.
    ConfigTypeError
        If a weight is not a finite number.

    Examples
    --------
    >>> import numpy as np, adamss
    >>> from adamss.backend import NumpyLinear, NumpyModel
    >>> model = NumpyModel({"query": NumpyLinear(np.eye(4))})
    >>> settings = adamss.AdamssConfig(targets=["query"], rank=4, subspaces=2)
    >>> model = adamss.attach(adamss.attach(model, settings, name="a"), settings, name="b")
    >>> model = adamss.activate(model, {"a": 0.7, "b": -0.3}, train="a")
    >>> {name: (each.weight, each.trained) for name, each in adamss.adapters(model).items()}
    {'a': (0.7, True), 'b': (-0.3, False)}
    """
    backend, bank = adapted(model, "activate")
    names = as_weights(() if what is None else what, "activate")
    weights = chosen(bank, names, "activate", empty=True)
    trained = as_weights(train, "activate") if train is not None else {}
    if wrong := next((name for name in trained if name not in weights), None):
        raise StateError(f"activate: train names {wrong!r}, which is not among those to activate")
    if train is None:
        trained = {name: 1.0 for name in weights if bank.adapters[name].trainable}
    with backend.exact():
        return switch(backend, model, weights, trained=trained)
