"""What every controller of a budget checks, whatever the framework: the model, the schedule, and whose a state is."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from adamss.backend.bank import Adaptation
from adamss.backend.interface import Backend, Model
from adamss.backend.ledger import require_unchanged
from adamss.config import BudgetConfig
from adamss.core.fingerprint import FINGERPRINT_TOLERANCE, Fingerprint, fingerprint
from adamss.errors import ConfigError, ConfigTypeError, StateError

__all__ = ["adapter_in_training", "adapter_of", "identity", "same_subspaces", "schedule_of"]


def adapter_of(backend: Backend, model: Model, who: str, name: str | None = None) -> Adaptation:
    """Return the adapter that a training is about: by its name, the only one, or the one that is trained.

    Parameters
    ----------
    backend, model
        The model, and its backend.
    who
        What messages call the caller.
    name
        Of the adapter, or None.

    Raises
    ------
    StateError
        If there is no such adapter, or it is merged.
    """
    adapters = backend.bank(model).adapters
    if not adapters:
        raise StateError(f"{who}: the model has no adapters; call adamss.attach or adamss.load first")
    require_unchanged(backend, model, who)
    if not isinstance(name, str | None):
        raise ConfigTypeError(f"{who}: name must be that of one adapter, found {name!r}")
    meant = [name] if name else [one for one, each in adapters.items() if each.trained or len(adapters) == 1]
    if len(meant) != 1:
        raise StateError(
            f"{who}: {len(meant)} adapters are trained; say by name= which of {_names(adapters)} is meant"
        )
    if meant[0] not in adapters:
        raise StateError(f"{who}: no adapter is called {name!r}; there are {_names(adapters)}")
    found = adapters[meant[0]]
    if found.merged:
        raise StateError(f"{who}: the updates are merged; call adamss.unmerge(model) first")
    return found


def adapter_in_training(backend: Backend, model: Model, who: str, name: str | None = None) -> Adaptation:
    """Return `adapter_of`, if it is trained.

    Raises
    ------
    StateError
        If it is not, or there is none.
    """
    found = adapter_of(backend, model, who, name)
    if not found.trained:
        raise StateError(
            f"{who}: the adapter is not trained; load it without trainable=False, or call adamss.activate(model, "
            f"{found.name!r}, train={found.name!r})"
        )
    return found


def _names(adapters: Iterable[str]) -> str:
    return ", ".join(map(repr, adapters))


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


def identity(A: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> tuple[float, ...]:
    """Return a few numbers that tell the subspaces of one layer from those of another of the same shape.

    Parameters
    ----------
    A
        Basis (G, d, P), floating point.
    labels
        (n,) integers.

    Returns
    -------
    tuple of float
        A checksum of the labels, exact in float32, then the `adamss.core.fingerprint.Fingerprint` of the basis.
    """
    checksum = zlib.crc32(labels.astype("<i8").tobytes()) & 0xFFFFFF
    basis = fingerprint(A.reshape(-1, A.shape[-1]))
    return float(checksum), basis.norm, *basis.projections


def same_subspaces(one: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether two results of `identity` are of the same subspaces, in whatever dtype the basis is."""
    if len(one) != len(other) or one[0] != other[0]:
        return False
    first, second = (Fingerprint((0, 0), found[1], tuple(found[2:])) for found in (one, other))
    return first.difference(second) <= FINGERPRINT_TOLERANCE
