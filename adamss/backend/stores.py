"""How the numbers of a weight are kept: read as floating point, written back or refused with a reason.

A backend lists the ways of its framework in a `Stores` table; whoever keeps weights in another one (quantised, in a
file, on another machine) registers a `Store` there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from adamss.core._array import Array
from adamss.errors import BackendError

__all__ = ["PlainStore", "Store", "Stores"]


class Store(ABC):
    """One way of keeping arrays that belong to a layer.

    The law that binds it: where `refusal` returns None, ``read(layer, name) == a`` after ``write(layer, name, a)``.
    """

    @abstractmethod
    def holds(self, layer: Any, name: str) -> bool:
        """Return whether the array of that name is kept in this way."""

    @abstractmethod
    def read(self, layer: Any, name: str) -> Array:
        """Return the array as floating point, in the dtype that the layer computes in.

        It may have no values yet (`Backend.has_values`), or be this process's part of the whole (`Backend.whole`).
        """

    @abstractmethod
    def refusal(self, layer: Any, name: str) -> str | None:
        """Return why the array cannot be written, and the way out, as a clause; None if it can."""

    @abstractmethod
    def write(self, layer: Any, name: str, value: Array) -> None:
        """Give the layer another array."""

    def exchange(self, layer: Any, name: str, value: Array) -> Array:
        """Give the layer another array, and return the one that it had, which nobody writes over."""
        before = self.read(layer, name)
        self.write(layer, name, value)
        return before


class Stores:
    """The ways of keeping numbers that a backend knows; the one registered last is asked first.

    Parameters
    ----------
    stores
        Of the framework itself, the most general one first.
    """

    def __init__(self, *stores: Store) -> None:
        self._stores = list(stores)

    def register(self, store: Store) -> Store:
        """Add a store, for this process.

        Raises
        ------
        BackendError
            If it is no `Store`.
        """
        if not isinstance(store, Store):
            raise BackendError(f"a store must be an adamss.backend.Store, found {store!r}")
        self._stores.append(store)
        return store

    def unregister(self, store: Store) -> None:
        """Take a store out again."""
        self._stores.remove(store)

    def of(self, layer: Any, name: str) -> Store:
        """Return the store that holds an array of a layer."""
        return next(store for store in reversed(self._stores) if store.holds(layer, name))

    def read(self, layer: Any, name: str) -> Array | None:
        """Return an array of a layer as floating point, or None where the layer has None."""
        return None if getattr(layer, name, None) is None else self.of(layer, name).read(layer, name)


class PlainStore(Store):
    """Attributes that are arrays, on layers that are changed in place."""

    def holds(self, layer: Any, name: str) -> bool:
        """Return True."""
        return True

    def read(self, layer: Any, name: str) -> Array:
        """Return the attribute."""
        return getattr(layer, name)

    def refusal(self, layer: Any, name: str) -> str | None:
        """Return None."""
        return None

    def write(self, layer: Any, name: str, value: Array) -> None:
        """Set the attribute."""
        setattr(layer, name, value)
