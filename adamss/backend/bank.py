"""What is attached to a model: adapters by name, and the ledger of what its weights hold.

Plain values, the same for every framework. A backend says how they lie in its models (`Models.bank`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from adamss.config import AdamssConfig
from adamss.core import Factors, only
from adamss.core._array import Array, device, namespace
from adamss.errors import StateError

__all__ = ["DEFAULT", "Adaptation", "Bank", "Ledger", "Rows"]

DEFAULT = "default"
"""Name of an adapter that was given none."""

Mask = np.ndarray[Any, np.dtype[np.bool_]]


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


@dataclass(frozen=True)
class Ledger:
    """Which updates the weights of a model hold beside W0, and the W0 to go back to.

    Attributes
    ----------
    held
        By path of the layer, (K,) booleans on the host: the subspaces whose update its weight holds. A layer that is
        not named holds none.
    base
        By path of the module that holds the arrays, W0 and the bias as its own arrays by name; None where they were
        dropped. Modules whose arrays hold no update are not named. Of an embedding with trained rows, the `Rows` that
        its weight had: the trained ones are written over them when all subspaces are merged.
    layers
        By path of the module, the quantised layers that have W0, and whose place float ones have taken.
    """

    held: Mapping[str, Mask] = field(default_factory=dict)
    base: Mapping[str, Mapping[str, Array] | None] = field(default_factory=dict)
    layers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def keeps_base(self) -> bool:
        """Whether every W0 can be given back."""
        return all(arrays is not None for arrays in self.base.values())

    def holds_all(self, paths: Iterable[str]) -> bool:
        """Whether the weights of these layers hold the update of every subspace."""
        return all(path in self.held and bool(self.held[path].all()) for path in paths)


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
    ledger
        What the weights hold of it.
    disabled
        Whether the model is switched off at the moment.
    revives
        Whether a budget that runs may let frozen subspaces return.
    name
        Of the adapter.
    trained
        Whether it is trained, and not only computed.
    tokens
        Trained rows by path of the embedding.
    """

    config: AdamssConfig
    layers: Mapping[str, Factors]
    shapes: Mapping[str, tuple[int, int]]
    saved: tuple[str, ...] = ()
    ledger: Ledger = field(default_factory=Ledger)
    disabled: bool = False
    revives: bool = False
    name: str = DEFAULT
    trained: bool = True
    tokens: Mapping[str, Rows] = field(default_factory=dict)

    @property
    def merged(self) -> bool:
        """Whether the weights hold the update of every subspace."""
        return self.ledger.holds_all(self.layers)


@dataclass(frozen=True)
class Bank:
    """The adapters of a model as one value, for frameworks whose models are values: see `ValueModels`.

    Attributes
    ----------
    adapters
        By name.
    originals
        Base values of ``modules_to_save``, by module path and then by name, as `Models.arrays` returns them.
    """

    adapters: Mapping[str, Adaptation] = field(default_factory=dict)
    originals: Mapping[str, Mapping[str, Array]] = field(default_factory=dict)

    def only(self) -> Adaptation:
        """Return the one adapter.

        Raises
        ------
        StateError
            If there are others.
        """
        if len(self.adapters) != 1:
            raise StateError(f"the model has the adapters {', '.join(sorted(self.adapters))}; name one")
        (adaptation,) = self.adapters.values()
        return adaptation

    def computed(self, path: str) -> Factors | None:
        """Return the factors whose update is added to the product of a layer: without what its weight holds.

        None where nothing is added: in other layers, and while all is merged or switched off.
        """
        adaptation = self.only()
        factors, held = adaptation.layers.get(path), adaptation.ledger.held.get(path)
        if factors is None or adaptation.disabled or adaptation.merged:
            return None
        if held is None:
            return factors
        return only(factors, namespace(factors.C).asarray(~held, device=device(factors.C)))

    def changed(self, **values: Any) -> Bank:
        """Return the bank with other values of some fields of its one adapter."""
        adaptation = replace(self.only(), **values)
        return replace(self, adapters={adaptation.name: adaptation})
