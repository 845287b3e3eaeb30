"""Stores: how the numbers of a weight are stored, how they are read, and whether they can be written.

A backend lists the stores of its framework in a `Stores` table. Support for weights that are kept in another way
(quantised, in a file, on another machine) is added by registering a `Store` in this table.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from adamss.core._array import Array, namespace
from adamss.errors import BackendError

__all__ = ["PlainStore", "Store", "Stores", "exchange_all"]


class Store(ABC):
    """One way of storing the arrays of a layer.

    A store must satisfy this law: if `refusal` returns None, then ``read(layer, name) == a`` after
    ``write(layer, name, a)``.

    Examples
    --------
    A store for weights in eight bits, which can be read but not written:

    >>> import numpy as np
    >>> from types import SimpleNamespace
    >>> from adamss.backend import PlainStore, Store, Stores
    >>> class EightBits(Store):
    ...     def holds(self, layer, name):
    ...         return hasattr(layer, f"{name}_scale")
    ...     def read(self, layer, name):
    ...         return getattr(layer, name) * getattr(layer, f"{name}_scale")
    ...     def refusal(self, layer, name):
    ...         return "is kept in eight bits; export the adapter by adamss.to_lora"
    ...     def write(self, layer, name, value):
    ...         pass  # never called, because `refusal` gives a reason
    >>> layer = SimpleNamespace(weight=np.asarray([[2, -4]], np.int8), weight_scale=np.float32(0.5))
    >>> Stores(PlainStore(), EightBits()).read(layer, "weight").tolist()
    [[1.0, -2.0]]
    """

    @abstractmethod
    def holds(self, layer: Any, name: str) -> bool:
        """Return whether the layer's array `name` is stored in this way."""

    @abstractmethod
    def read(self, layer: Any, name: str) -> Array:
        """Return the array in floating point, in the dtype in which the layer computes.

        The array may have no values yet (see `Arrays.has_values`), or be only the part of this process (see
        `Processes.whole`).
        """

    @abstractmethod
    def refusal(self, layer: Any, name: str) -> str | None:
        """Return why the array cannot be written and what to do instead, as a clause; None if it can be written."""

    @abstractmethod
    def write(self, layer: Any, name: str, value: Array) -> None:
        """Replace the layer's array `name`."""

    def noise(self, layer: Any, name: str) -> float:
        """Return the relative quantisation error of the layer's array `name`, as a ratio of root mean squares.

        A store that keeps numbers exactly returns 0. Otherwise the layer counts as quantised. An adapter file that
        was saved with the float weight is then accepted within this error, and
        ``adamss.merge(model, dequantise=True)`` turns the layer into a float layer.
        """
        return 0.0

    def exchange(self, layer: Any, name: str, value: Array) -> Array:
        """Replace the layer's array `name`, and return a copy of the former array."""
        before = self.read(layer, name)
        # Copy the array, because `write` may write into the memory that `read` returns.
        before = namespace(before).asarray(before, copy=True)
        self.write(layer, name, value)
        return before


class Stores:
    """The stores of a backend. The store registered last is asked first.

    Parameters
    ----------
    stores
        Stores of the framework itself, starting with the most general one.

    Examples
    --------
    >>> import numpy as np
    >>> from types import SimpleNamespace
    >>> from adamss.backend import PlainStore, Stores
    >>> stores, layer = Stores(PlainStore()), SimpleNamespace(weight=np.zeros(2), bias=None)
    >>> type(stores.of(layer, "weight")).__name__, stores.of(layer, "bias")
    ('PlainStore', None)
    >>> stores.exchange(layer, "weight", np.ones(2)).tolist(), layer.weight.tolist()
    ([0.0, 0.0], [1.0, 1.0])
    """

    def __init__(self, *stores: Store) -> None:
        self._stores = list(stores)

    def register(self, store: Store) -> Store:
        """Add a store for this process.

        Raises
        ------
        BackendError
            If the argument is not a `Store`.
        """
        if not isinstance(store, Store):
            raise BackendError(f"a store must be an adamss.backend.Store, found {store!r}")
        self._stores.append(store)
        return store

    def unregister(self, store: Store) -> None:
        """Remove a registered store."""
        self._stores = [other for other in self._stores if other is not store]

    def of(self, layer: Any, name: str) -> Store | None:
        """Return the store that holds the layer's array `name`; None if the layer has no such array."""
        return next((store for store in reversed(self._stores) if store.holds(layer, name)), None)

    def read(self, layer: Any, name: str) -> Array | None:
        """Return the layer's array `name` in floating point; None if the layer has no such array."""
        store = self.of(layer, name)
        return None if store is None else store.read(layer, name)

    def refusal(self, layer: Any, name: str) -> str | None:
        """Return why the layer's array `name` cannot be written, as a clause; None if it can, or does not exist."""
        store = self.of(layer, name)
        return None if store is None else store.refusal(layer, name)

    def noise(self, layer: Any, name: str) -> float:
        """Return the quantisation error of the layer's array `name` (see `Store.noise`); 0 if it does not exist."""
        store = self.of(layer, name)
        return 0.0 if store is None else store.noise(layer, name)

    def exchange(self, layer: Any, name: str, value: Array) -> Array:
        """Replace the layer's array `name`, see `Store.exchange`.

        Raises
        ------
        BackendError
            If no store holds the array.
        """
        store = self.of(layer, name)
        if store is None:
            raise BackendError(f"no store holds {name!r} of a {type(layer).__name__}")
        return store.exchange(layer, name, value)


class PlainStore(Store):
    """Store for arrays that are plain attributes of layers that are changed in place.

    Examples
    --------
    >>> import numpy as np
    >>> from types import SimpleNamespace
    >>> from adamss.backend import PlainStore
    >>> store, layer = PlainStore(), SimpleNamespace(weight=np.zeros(2), bias=None)
    >>> store.holds(layer, "weight"), store.holds(layer, "bias"), store.noise(layer, "weight")
    (True, False, 0.0)
    """

    def holds(self, layer: Any, name: str) -> bool:
        """Return whether the layer has an attribute `name` that is not None."""
        return getattr(layer, name, None) is not None

    def read(self, layer: Any, name: str) -> Array:
        """Return the attribute."""
        return getattr(layer, name)

    def refusal(self, layer: Any, name: str) -> str | None:
        """Return None, since any attribute can be written."""
        return None

    def write(self, layer: Any, name: str, value: Array) -> None:
        """Set the attribute."""
        setattr(layer, name, value)


def exchange_all(
    arrays: Mapping[str, Mapping[str, Array]], exchange: Callable[[str, str, Array], Array]
) -> dict[str, dict[str, Array]]:
    """Exchange several arrays. If one exchange fails, those before it are undone and the error is raised.

    Parameters
    ----------
    arrays
        New arrays, by module path and then by name.
    exchange
        Function of a path, a name and an array that stores the array and returns the former one.

    Returns
    -------
    dict
        Former arrays, in the form of `arrays`.
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
