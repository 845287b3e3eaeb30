"""Which of several adapters a model computes."""

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
    """One adapter of a model, as `adapters` lists it.

    Attributes
    ----------
    config
        The settings it was attached with.
    layers
        Paths of the layers that it adapts.
    saved
        Paths of its ``modules_to_save``.
    weight
        What its update is multiplied with; None if it is not active.
    trained
        Whether it is trained now.
    merged
        Whether the weights hold its update.
    """

    config: AdamssConfig
    layers: tuple[str, ...]
    saved: tuple[str, ...]
    weight: float | None
    trained: bool
    merged: bool

    @property
    def active(self) -> bool:
        """Whether the model computes with it."""
        return self.weight is not None


def adapters(model: Model) -> dict[str, AdapterInfo]:
    """Return the adapters of a model by their names, in the order in which they came; none of a base model.

    Parameters
    ----------
    model
        Any model.
    """
    return {
        name: AdapterInfo(each.config, tuple(each.layers), each.saved, each.weight, each.trained, each.merged)
        for name, each in backend_for(model).bank(model).adapters.items()
    }


@contextmanager
def routed(model: Model, names: Iterable[str | None], *, axis: int = 0) -> Iterator[Model]:
    """Run each row of a batch through an adapter of its own, within a ``with`` block.

    All adapters of a layer are computed in one pair of products. Which are active, and with what weights, does not
    matter meanwhile.

    Parameters
    ----------
    model
        An adapted model.
    names
        For each row of the input the name of its adapter, or None for the base model. Where a layer gets a multiple
        of that many rows (flattened tokens, windows, beams), each row's share must be contiguous.
    axis
        Along which the rows lie, in the input of the model and of its layers.

    Yields
    ------
    Model
        The same object where the framework's models are mutable; else a model that is routed.

    Raises
    ------
    ConfigError
        If there are no rows, or the axis is none.
    StateError
        If the model has no such adapter; if the weights hold the update of one, or one has ``modules_to_save`` or
        ``trained_tokens``, which are one for all rows; within `disabled` or another block of this.
    LayerError
        If a layer has one weight for all rows (experts, attentions); when the model runs, if a layer gets another
        number of rows. The message names it.

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
            raise StateError(f"routed: {name!r} has {what}, which are one for all rows of a batch; {remedy}")
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
    """Have a model compute with other adapters.

    The updates of several add up: ``W0 + sum of weight * delta``. The ``modules_to_save`` get the values of the
    active adapter that has them, or else those of the base; what is trained of them is kept with its adapter.

    Parameters
    ----------
    model
        An adapted model.
    what
        A name, several, weights by name, or None or nothing for the base model.
    train
        Those of them that are trained from now on. None: those of them that `attach`, `load` or an earlier `train`
        have trained. What is not active gets no gradient.

    Returns
    -------
    Model
        The model; the same object where the framework's models are mutable.

    Raises
    ------
    StateError
        If the model has no such adapter; if two of them have values of one of ``modules_to_save``, or of rows of one
        embedding; if the weights hold the update of one that would be active no longer, or with another weight;
        within `disabled`. The model is unchanged.
    ConfigTypeError
        If a weight is no finite number.

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
        raise StateError(f"activate: train names {wrong!r}, which is none of those to activate")
    if train is None:
        trained = {name: 1.0 for name in weights if bank.adapters[name].trainable}
    with backend.exact():
        return switch(backend, model, weights, trained=trained)
