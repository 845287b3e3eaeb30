"""Which of several adapters a model computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from adamss.backend.interface import Model
from adamss.backend.ledger import switch
from adamss.backend.registry import backend_for
from adamss.config import AdamssConfig
from adamss.errors import StateError
from adamss.verbs.common import adapted, as_weights, chosen

__all__ = ["AdapterInfo", "activate", "adapters"]


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
    weights = chosen(bank, names, "activate") if names else {}
    trained = as_weights(train, "activate") if train is not None else {}
    if wrong := next((name for name in trained if name not in weights), None):
        raise StateError(f"activate: train names {wrong!r}, which is none of those to activate")
    if train is None:
        trained = {name: 1.0 for name in weights if bank.adapters[name].trainable}
    with backend.exact():
        return switch(backend, model, weights, trained=trained)
