"""What is attached to a model: adapters by name, and the ledger of what its weights hold.

Plain values, the same for every framework. A backend says how they lie in its models (`Models.bank`).
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
"""Name of an adapter that was given none."""

Mask = np.ndarray[Any, np.dtype[np.bool_]]
Values: TypeAlias = Mapping[str, Mapping[str, Array]]
"""Arrays by path of a module and their names within it."""


class Rows(NamedTuple):
    """Some rows of the weight (V, E) of an embedding, those of single tokens.

    Attributes
    ----------
    ids
        Which they are, k of them, ascending.
    values
        (k, E).
    """

    ids: tuple[int, ...]
    values: Array


class State(NamedTuple):
    """How a model stands with one of its adapters: fields of `Adaptation`."""

    weight: float | None
    trainable: bool
    trained: bool
    kept: Values


class Route(NamedTuple):
    """Which adapter each row of a batch goes through.

    Attributes
    ----------
    names
        Of the adapters that rows may go through.
    rows
        For each row the number of its adapter among the names, -1 for none.
    axis
        Of the inputs of layers, along which the rows lie.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...]
    axis: int = 0


@dataclass(frozen=True)
class Ledger:
    """Which updates the weights of a model hold beside W0, and the W0 to go back to.

    Attributes
    ----------
    held
        By name of the adapter and path of the layer, (K,) booleans on the host: the subspaces whose update its weight
        holds, times the weight that the adapter is active with. What is not named holds none.
    base
        By path of the module that holds the arrays, W0 and the bias as its own arrays by name; None where they were
        dropped. Modules whose arrays hold no update are not named. Of an embedding with trained rows, the `Rows` that
        its weight had: the trained ones are written over them when all subspaces are merged.
    layers
        By path of the module, the quantised layers that have W0, and whose place float ones have taken.
    """

    held: Mapping[str, Mapping[str, Mask]] = field(default_factory=dict)
    base: Mapping[str, Mapping[str, Array] | None] = field(default_factory=dict)
    layers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def keeps_base(self) -> bool:
        """Whether every W0 can be given back."""
        return all(arrays is not None for arrays in self.base.values())


@dataclass(frozen=True)
class Adaptation:
    """One adapter of a model, and how the model stands with it.

    Attributes
    ----------
    config
        The settings it was attached with.
    layers
        Factors of each adapted layer, by module path, in the order of the model.
    shapes
        (d, n) of the weight of each, in paper orientation.
    saved
        Module paths of ``modules_to_save``.
    name
        Of the adapter.
    tokens
        Trained rows by path of the embedding.
    weight
        What its update is multiplied with; None while it is not active.
    trainable
        Whether it is trained when it is active and nobody says otherwise.
    trained
        Whether it is trained now.
    revives
        Whether a budget that runs may let frozen subspaces return.
    held
        (K,) booleans on the host by module path: the subspaces whose update the weights hold. A layer that is not
        named holds none.
    kept
        Its values of ``modules_to_save`` while the modules have others, because it is not active.
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
        """Whether the model computes with it."""
        return self.weight is not None

    @property
    def state(self) -> State:
        """How the model stands with it."""
        return State(self.weight, self.trainable, self.trained, self.kept)

    @property
    def merged(self) -> bool:
        """Whether the weights hold the update of every subspace."""
        return all(path in self.held and bool(self.held[path].all()) for path in self.layers)

    @property
    def way_out(self) -> str:
        """Return what takes its update out of the weights, for messages."""
        unmerge = f"adamss.unmerge(model, name={self.name!r})"
        return unmerge if self.merged else f"adamss.merge(model, name={self.name!r}) and then {unmerge}"


@dataclass(frozen=True)
class Bank:
    """What is attached to a model, as one value.

    Attributes
    ----------
    adapters
        By name, in the order in which they came.
    originals
        Base values of the ``modules_to_save`` of all of them, by module path and then by name, as `Models.arrays`
        returns them.
    base, layers
        As of `Ledger`.
    disabled
        Whether the model is switched off at the moment.
    route
        The adapters of the rows of a batch, in the place of those that are active, as long as `adamss.routed` lasts.
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
        """Return the one adapter.

        Raises
        ------
        StateError
            If there are others, or none.
        """
        if len(self.adapters) != 1:
            raise StateError(
                f"the model has the adapters {', '.join(sorted(self.adapters)) or 'of no name'}; name one"
            )
        (adaptation,) = self.adapters.values()
        return adaptation

    @property
    def ledger(self) -> Ledger:
        """What the weights hold."""
        held = {name: each.held for name, each in self.adapters.items() if each.held}
        return Ledger(held, self.base, self.layers)

    @property
    def active(self) -> dict[str, float]:
        """The weights of the active adapters, by name."""
        return {name: each.weight for name, each in self.adapters.items() if each.weight is not None}

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the layers that any of them adapts."""
        return tuple(dict.fromkeys(path for each in self.adapters.values() for path in each.layers))

    def computed(self, path: str) -> list[Factors]:
        """Return the factors whose updates are added to the product of a layer: without what its weight holds.

        In a `route`, those of all its adapters, of which each row gets one.
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
        """Return which of `computed` each row of an input goes through, as `adamss.core.linear` takes it; or None.

        Raises
        ------
        LayerError
            If the input has another number of rows, and no whole multiple of it.
        """
        if self.route is None:
            return None
        has = [path in self.adapters[name].layers for name in self.route.names]
        # Numbers among those that adapt this layer.
        numbers = [sum(has[:number]) if has[number] else -1 for number in range(len(has))]
        rows = np.asarray([-1 if row < 0 else numbers[row] for row in self.route.rows])
        share = rows_of(path, x.shape[:-1], len(rows), self.route.axis)
        shape = [1] * (len(x.shape) - 1)
        shape[self.route.axis] = -1
        return namespace(x).asarray(np.repeat(rows, share).reshape(shape), device=device(x))

    def changed(self, name: str, **values: Any) -> Bank:
        """Return the bank with other values of some fields of one adapter."""
        return replace(self, adapters={**self.adapters, name: replace(self.adapters[name], **values)})


def rows_of(path: str, leading: tuple[int, ...], rows: int, axis: int, *, exact: bool = False) -> int:
    """Return how many entries of the input of a layer, along one of its leading axes, belong to each row of a batch.

    Raises
    ------
    LayerError
        If its axis is no multiple of the rows.
    """
    length = leading[axis] if axis < len(leading) else 0
    if length == 0 or length % rows or ((axis or exact) and length != rows):
        raise LayerError(
            f"{path}: axis {axis} of its input, of {tuple(leading)} entries, is no multiple of the {rows} rows of "
            "the route; leave the layer out of targets, or run the rows apart"
        )
    return length // rows


def scaled(factors: Factors, weight: float) -> Factors:
    """Return the factors of an update that is multiplied with a number."""
    return factors if weight == 1 else factors._replace(C=factors.C * weight)
