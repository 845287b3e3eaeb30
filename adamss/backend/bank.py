"""The bank of a model: its adapters by name, and the ledger of the updates that its weights hold.

These classes are plain values, the same for every framework. A backend reads them from its models (`Models.bank`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from adamss.config import AdamssConfig
from adamss.core import Factors, only
from adamss.core._array import Array, device, namespace
from adamss.errors import LayerError, StateError

__all__ = ["DEFAULT", "Adaptation", "Bank", "Ledger", "Route", "Rows", "State", "Values", "rows_of", "scaled"]

DEFAULT = "default"
"""Name of an adapter if the user gives none."""

Mask = np.ndarray[Any, np.dtype[np.bool_]]
Values: TypeAlias = Mapping[str, Mapping[str, Array]]
"""Arrays by module path, and then by name within the module."""


class Rows(NamedTuple):
    """Some rows of the weight (V, E) of an embedding, one for each of k tokens.

    Attributes
    ----------
    ids
        Numbers of the k rows, which are the ids of the tokens, ascending.
    values
        Values of the rows, (k, E).
    """

    ids: tuple[int, ...]
    values: Array


class State(NamedTuple):
    """The state of an adapter in its model; the fields have the meaning that they have in `Adaptation`."""

    weight: float | None
    trainable: bool
    trained: bool
    kept: Values


class Route(NamedTuple):
    """Assignment of an adapter to each row of a batch.

    Attributes
    ----------
    names
        Names of the adapters that are used.
    rows
        For each row of the batch, the position of its adapter in `names`, or -1 for no adapter.
    axis
        Axis of the layers' inputs along which the rows of the batch lie.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...]
    axis: int = 0


@dataclass(frozen=True)
class Ledger:
    """Record of the updates that the weights of a model hold in addition to W0, and of the W0 to return to.

    Attributes
    ----------
    held
        Subspaces whose updates the weights hold, as (K,) booleans on the host, by name of the adapter and path of
        the layer. Each update is multiplied by the weight with which its adapter is active. Layers that are not
        listed hold no update.
    base
        W0 and the base bias, by path of the module that holds the arrays and then by name of the array, in the form
        that the module has them. None means that they were dropped. Modules that hold no update are not
        listed. For an embedding with trained rows, the array is the `Rows` that the weight had, which the trained
        rows overwrite when the adapter is merged.
    layers
        Quantised layers that were replaced by float layers and still contain W0, by path of the module.

    Examples
    --------
    >>> import numpy as np, adamss
    >>> from adamss.backend import NumpyLinear, NumpyModel
    >>> model = NumpyModel({"query": NumpyLinear(np.eye(4))})
    >>> model = adamss.attach(model, adamss.AdamssConfig(targets=["query"], rank=4, subspaces=2))
    >>> ledger = adamss.merge(model).bank.ledger
    >>> ledger.held["default"]["query"].tolist(), ledger.base["query"]["weight"].shape
    ([True, True], (4, 4))
    """

    held: Mapping[str, Mapping[str, Mask]] = field(default_factory=dict)
    base: Mapping[str, Mapping[str, Array] | None] = field(default_factory=dict)
    layers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def keeps_base(self) -> bool:
        """Whether every W0 can be restored."""
        return all(arrays is not None for arrays in self.base.values())


@dataclass(frozen=True)
class Adaptation:
    """One adapter of a model, and its state in the model.

    Attributes
    ----------
    config
        Settings with which the adapter was attached.
    layers
        Factors of each adapted layer by module path, in the order of the model.
    shapes
        Shape (d, n) of the weight of each adapted layer in paper orientation, by module path.
    saved
        Module paths of ``modules_to_save``.
    name
        Name of the adapter.
    tokens
        Trained rows of embeddings, by module path of the embedding.
    weight
        Number by which the update is multiplied. None means that the adapter is not active.
    trainable
        Whether the adapter is trained by default when it becomes active.
    trained
        Whether the adapter is trained now.
    revives
        Whether the budget in use lets frozen subspaces return.
    held
        Subspaces whose updates the weights hold, (K,) booleans on the host by module path. Layers that are not listed
        hold no update.
    kept
        Values of ``modules_to_save`` that belong to this adapter, while it is not active and the modules have other
        values.

    Examples
    --------
    >>> import numpy as np, adamss
    >>> from adamss.backend import NumpyLinear, NumpyModel
    >>> model = NumpyModel({"query": NumpyLinear(np.eye(4))})
    >>> model = adamss.attach(model, adamss.AdamssConfig(targets=["query"], rank=4, subspaces=2))
    >>> adaptation = model.bank.adapters["default"]
    >>> adaptation.shapes, adaptation.layers["query"].C.shape, adaptation.trained, adaptation.merged
    ({'query': (4, 4)}, (1, 4), True, False)
    """

    config: AdamssConfig
    layers: Mapping[str, Factors]
    shapes: Mapping[str, tuple[int, int]]
    saved: tuple[str, ...] = ()
    name: str = DEFAULT
    tokens: Mapping[str, Rows] = field(default_factory=dict)
    weight: float | None = None
    trainable: bool = True
    trained: bool = False
    revives: bool = False
    held: Mapping[str, Mask] = field(default_factory=dict)
    kept: Values = field(default_factory=dict)

    @property
    def active(self) -> bool:
        """Whether the adapter is active."""
        return self.weight is not None

    @property
    def state(self) -> State:
        """The state of the adapter, for `Models.activated`."""
        return State(self.weight, self.trainable, self.trained, self.kept)

    @property
    def merged(self) -> bool:
        """Whether the weights hold the update of every subspace."""
        return all(path in self.held and bool(self.held[path].all()) for path in self.layers)

    @property
    def way_out(self) -> str:
        """The calls that take the update out of the weights, for messages."""
        unmerge = f"adamss.unmerge(model, name={self.name!r})"
        return unmerge if self.merged else f"adamss.merge(model, name={self.name!r}) and then {unmerge}"


@dataclass(frozen=True)
class Bank:
    """The adapters of a model and the state of its weights, as one value.

    Attributes
    ----------
    adapters
        Adapters by name, in the order in which they were added.
    originals
        Base values of the ``modules_to_save`` of all adapters, by module path and then by name, as `Models.arrays`
        returns them.
    base, layers
        Fields of `Ledger`.
    disabled
        Whether the adapters are switched off at the moment (see `adamss.disabled`).
    route
        Adapters of the rows of a batch, which replace the active adapters inside `adamss.routed`; None outside.
    """

    adapters: Mapping[str, Adaptation] = field(default_factory=dict)
    originals: Values = field(default_factory=dict)
    base: Mapping[str, Mapping[str, Array] | None] = field(default_factory=dict)
    layers: Mapping[str, Any] = field(default_factory=dict)
    disabled: bool = False
    route: Route | None = None

    def __bool__(self) -> bool:
        return bool(self.adapters)

    def only(self) -> Adaptation:
        """Return the only adapter.

        Raises
        ------
        StateError
            If the model has several adapters, or none.
        """
        if len(self.adapters) != 1:
            raise StateError(
                f"expected a model with one adapter, found {', '.join(sorted(self.adapters)) or 'none'}"
            )
        (adaptation,) = self.adapters.values()
        return adaptation

    @property
    def ledger(self) -> Ledger:
        """The ledger of the model's weights."""
        held = {name: each.held for name, each in self.adapters.items() if each.held}
        return Ledger(held, self.base, self.layers)

    @property
    def active(self) -> dict[str, float]:
        """Weight of each active adapter, by name."""
        return {name: each.weight for name, each in self.adapters.items() if each.weight is not None}

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the layers that at least one adapter adapts."""
        return tuple(dict.fromkeys(path for each in self.adapters.values() for path in each.layers))

    def computed(self, path: str) -> list[Factors]:
        """Return the factors whose updates a layer must add to its product, without those that its weight holds.

        With a `route`, these are the factors of all its adapters, and each row uses one of them.
        """
        if self.route is not None:
            own = [self.adapters[name].layers.get(path) for name in self.route.names]
            return [factors for factors in own if factors is not None]
        found = []
        for each in self.adapters.values():
            factors = each.layers.get(path)
            if factors is None or each.weight is None or self.disabled or each.merged:
                continue
            if (held := each.held.get(path)) is not None:
                xp = namespace(factors.C)
                factors = only(factors, xp.asarray(~held, device=device(factors.C)))
            found.append(scaled(factors, each.weight))
        return found

    def numbers(self, path: str, x: Array) -> Array | None:
        """Return the argument `route` of `adamss.core.linear` for an input x of a layer; None if there is no route.

        The argument holds, for each row of x, the position of its factors in `computed`, or -1 for none.

        Raises
        ------
        LayerError
            If the number of rows of x is not a multiple of the number of rows of the route.
        """
        if self.route is None:
            return None
        has = [path in self.adapters[name].layers for name in self.route.names]
        # Adapters that do not adapt this layer are not in `computed`, so the positions must be counted without them.
        numbers = [sum(has[:number]) if has[number] else -1 for number in range(len(has))]
        rows = np.asarray([-1 if row < 0 else numbers[row] for row in self.route.rows])
        share = rows_of(path, x.shape[:-1], len(rows), self.route.axis)
        shape = [1] * (len(x.shape) - 1)
        shape[self.route.axis] = -1
        return namespace(x).asarray(np.repeat(rows, share).reshape(shape), device=device(x))

    def changed(self, name: str, **values: Any) -> Bank:
        """Return a copy of the bank with other values for some fields of one adapter."""
        return replace(self, adapters={**self.adapters, name: replace(self.adapters[name], **values)})


def rows_of(path: str, leading: tuple[int, ...], rows: int, axis: int, *, exact: bool = False) -> int:
    """Return how many entries of a layer's input, along a leading axis, belong to each row of a batch.

    Parameters
    ----------
    path
        Path of the layer, for the message.
    leading
        Lengths of all axes of the input except the last.
    rows
        Number of rows of the batch.
    axis
        Axis along which the rows lie.
    exact
        Whether the axis must have exactly `rows` entries. This always holds for an axis other than the first.

    Raises
    ------
    LayerError
        If the length of the axis is not a multiple of the number of rows.
    """
    length = leading[axis] if axis < len(leading) else 0
    if length == 0 or length % rows or ((axis or exact) and length != rows):
        raise LayerError(
            f"{path}: axis {axis} of its input, whose leading axes are {tuple(leading)}, is not a multiple of the "
            f"{rows} rows of the route; leave the layer out of targets, or run the rows separately"
        )
    return length // rows


def scaled(factors: Factors, weight: float) -> Factors:
    """Return factors with the update multiplied by `weight`."""
    return factors if weight == 1 else factors._replace(C=factors.C * weight)
