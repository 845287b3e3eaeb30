"""What every controller of a budget checks first, whatever the framework."""

from __future__ import annotations

from adamss.backend.interface import Adaptation, Backend, Model
from adamss.config import BudgetConfig
from adamss.errors import ConfigError, ConfigTypeError, StateError

__all__ = ["adaptation_in_training", "schedule_of"]


def adaptation_in_training(backend: Backend, model: Model, who: str) -> Adaptation:
    """Return what is attached to a model that is to be trained.

    Parameters
    ----------
    backend, model
        The model, and its backend.
    who
        What messages call the caller.

    Raises
    ------
    StateError
        If there are no adapters, or they are merged.
    """
    adaptation = backend.adaptation(model)
    if adaptation is None:
        raise StateError(f"{who}: the model has no adapters; call adamss.attach first")
    if adaptation.merged:
        raise StateError(f"{who}: the updates are merged; call adamss.unmerge(model) first")
    return adaptation


def schedule_of(adaptation: Adaptation, config: BudgetConfig | None, who: str) -> BudgetConfig:
    """Return the schedule that a controller was given, or else the one that the model was attached with.

    Raises
    ------
    ConfigError, ConfigTypeError
        If there is none, or it is something else.
    """
    config = adaptation.config.budget if config is None else config
    if config is None:
        raise ConfigError(
            f"{who}: there is no schedule; pass an adamss.BudgetConfig, or attach with AdamssConfig(budget=...)"
        )
    if not isinstance(config, BudgetConfig):
        raise ConfigTypeError(f"{who}: config must be an adamss.BudgetConfig, found {type(config).__name__}")
    return config
