"""How the numbers of a weight are kept: read as floating point, written back or refused with a reason.

A backend lists the ways of its framework in a `Stores` table; whoever keeps weights in another one (quantised, in a
file, on another machine) registers a `Store` there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from adamss.core._array import Array, namespace
from adamss.errors import BackendError

__all__ = ["PlainStore", "Store", "Stores", "exchange_all"]


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

    def noise(self, layer: Any, name: str) -> float:
        """Return the error of an array that is kept in few bits, root mean square, relative to the array.

        It is 0 for what keeps the numbers that it is given. Any other layer is quantised: an adapter of its float
        base fits it within this error, and ``adamss.merge(model, dequantise=True)`` turns it into a float layer.
        """
        return 0.0

    def exchange(self, layer: Any, name: str, value: Array) -> Array:
        """Give the layer another array, and return the one that it had, which nobody writes over."""
        before = self.read(layer, name)
        before = namespace(before).asarray(
            before, copy=True
        )  # `write` may write into the memory that `read` returns
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
        self._stores = [other for other in self._stores if other is not store]

    def of(self, layer: Any, name: str) -> Store | None:
        """Return the store that holds an array of a layer; None where the layer has no such array."""
        return next((store for store in reversed(self._stores) if store.holds(layer, name)), None)

    def read(self, layer: Any, name: str) -> Array | None:
        """Return an array of a layer as floating point; None where the layer has no such array."""
        store = self.of(layer, name)
        return None if store is None else store.read(layer, name)

    def refusal(self, layer: Any, name: str) -> str | None:
        """Return why an array of a layer cannot be written, as a clause; None if it can, or there is none."""
        store = self.of(layer, name)
        return None if store is None else store.refusal(layer, name)

    def noise(self, layer: Any, name: str) -> float:
        """Return the rounding error of an array of a layer, see `Store.noise`; 0 if there is no such array."""
        store = self.of(layer, name)
        return 0.0 if store is None else store.noise(layer, name)

    def exchange(self, layer: Any, name: str, value: Array) -> Array:
        """See `Store.exchange`."""
        store = self.of(layer, name)
        if store is None:
            raise BackendError(f"no store holds {name!r} of a {type(layer).__name__}")
        return store.exchange(layer, name, value)


class PlainStore(Store):
    """Attributes that are arrays, on layers that are changed in place."""

    def holds(self, layer: Any, name: str) -> bool:
        """Return whether the layer has such an attribute."""
        return getattr(layer, name, None) is not None

    def read(self, layer: Any, name: str) -> Array:
        """Return the attribute."""
        return getattr(layer, name)

    def refusal(self, layer: Any, name: str) -> str | None:
        """Return None."""
        return None

    def write(self, layer: Any, name: str, value: Array) -> None:
        """Set the attribute."""
        setattr(layer, name, value)


def exchange_all(
    arrays: Mapping[str, Mapping[str, Array]], exchange: Callable[[str, str, Array], Array]
) -> dict[str, dict[str, Array]]:
    """Exchange arrays one after the other, or none of them: if one fails, those before it are given back.

    Parameters
    ----------
    arrays
        By path of the module and name.
    exchange
        Puts an array in its place, and returns the one that was there.

    Returns
    -------
    dict
        What was there, in the form of `arrays`.
    """
    before: dict[str, dict[str, Array]] = {path: {} for path in arrays}
    try:
        for path, own in arrays.items():
            for name, value in own.items():
                before[path][name] = exchange(path, name, value)
    except BaseException:
        for path, own in before.items():
            for name, value in own.items():
                exchange(path, name, value)
        raise
    return before
