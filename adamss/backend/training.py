"""Checks that the budget controllers of all frameworks share: of the model, the schedule and a saved state."""

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
    """Return the adapter that a controller works on.

    Parameters
    ----------
    backend, model
        The model and its backend.
    who
        Name of the caller in messages.
    name
        Name of the adapter. None means the only adapter, or the only one that is trained.

    Returns
    -------
    Adaptation
        The adapter, which may be untrained.

    Raises
    ------
    ConfigTypeError
        If `name` is not a string.
    StateError
        If there is no such adapter, several are meant, the adapter is merged, or an adapted layer of the model was
        replaced.
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
    """Return the adapter that `adapter_of` finds, after a check that it is trained.

    Raises
    ------
    ConfigTypeError, StateError
        As for `adapter_of`, and StateError if the adapter is not trained.
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
    """Return the schedule passed to a controller, or else the one with which the adapter was attached.

    Raises
    ------
    ConfigError
        If there is no schedule.
    ConfigTypeError
        If `config` is not a `BudgetConfig`.
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
    """Return a few numbers that identify the subspaces of a layer among layers of the same shape.

    Parameters
    ----------
    A
        Bases (G, d, P), floating point.
    labels
        Subspace of each column, (n,) integers.

    Returns
    -------
    tuple of float
        Checksum of the labels, small enough to be exact in float32, followed by the norm and the projections of the
        `adamss.core.fingerprint.Fingerprint` of the bases.
    """
    checksum = zlib.crc32(labels.astype("<i8").tobytes()) & 0xFFFFFF
    basis = fingerprint(A.reshape(-1, A.shape[-1]))
    return float(checksum), basis.norm, *basis.projections


def same_subspaces(one: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether two results of `identity` belong to the same subspaces, even if the bases differ in dtype."""
    if len(one) != len(other) or one[0] != other[0]:
        return False
    first, second = (Fingerprint((0, 0), found[1], tuple(found[2:])) for found in (one, other))
    return first.difference(second) <= FINGERPRINT_TOLERANCE
