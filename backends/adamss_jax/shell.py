"""What the shells of all model libraries share: their interface, and what an adapted model remembers.

A shell is the model half of `adamss.backend.Backend` for one library. It rests on nothing but JAX: adding one for
another library means writing one module beside `flax.py` and `equinox.py`, and naming it in `backend.SHELLS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from adamss.backend import Adaptation, BaseWeight
from adamss.backend.tensors import join_path
from adamss.config import AdamssConfig
from adamss.core import Factors, Merged
from adamss.errors import ArrayTypeError, StateError
from adamss_jax.stacks import split_path

__all__ = [
    "HostCopies",
    "Model",
    "Module",
    "Record",
    "Shell",
    "beside",
    "check_values",
    "factors_beside",
    "owner_prefix",
    "placed_as",
    "spelled",
]

Model = Any
Module = Any


def _values_of(copies: HostCopies) -> Any:
    return copies.arrays.values()


class HostCopies:
    """Arrays kept outside of the model's pytree, as copies in the host's memory.

    They do not travel to the device with every call of a compiled function, and a donated buffer cannot take
    them along. Compared by their values, they are a constant of the compiled function, and models that are equal
    have trees of equal structure.

    Parameters
    ----------
    arrays
        By name.
    """

    __slots__ = ("arrays", "shardings")

    def __init__(self, arrays: Mapping[str, jax.Array]) -> None:
        # np.asarray of an array on the CPU may be a view of its buffer.
        self.arrays = {name: np.array(array, copy=True) for name, array in arrays.items()}
        self.shardings: Mapping[str, Any] = {
            name: a.sharding if jnp.asarray(a).committed else None for name, a in arrays.items()
        }

    def restored(self) -> dict[str, jax.Array]:
        """Return the arrays as they were, on the devices where they were."""
        return {name: jax.device_put(a, self.shardings.get(name)) for name, a in self.arrays.items()}

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    def __hash__(self) -> int:
        return hash(tuple((name, array.shape, array.dtype.name) for name, array in self.arrays.items()))

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, HostCopies) or hash(self) != hash(other):
            return False
        return all(a.tobytes() == b.tobytes() for a, b in zip(*map(_values_of, (self, other)), strict=True))

    def __getstate__(self) -> Any:
        return None, {"arrays": self.arrays, "shardings": {}}  # devices are those of the process


@dataclass(frozen=True)
class Record:
    """What every adapter of a model remembers of the whole; a constant of compiled functions.

    Attributes
    ----------
    config
        The settings.
    paths
        Paths of the adapted layers, from the module that was adapted.
    saved
        Paths of ``modules_to_save``.
    originals
        Their base values, by `adamss.backend.tensors.join_path` of path and name.
    """

    config: AdamssConfig
    paths: tuple[str, ...]
    saved: tuple[str, ...] = ()
    originals: HostCopies | None = None

    def saved_originals(self) -> dict[str, dict[str, jax.Array]]:
        """Return the base values of each of ``modules_to_save``, by its path and then by name."""
        arrays = {} if self.originals is None else self.originals.restored()
        below = {path: join_path(path, "") for path in self.saved}
        return {
            path: {name.removeprefix(start): a for name, a in arrays.items() if name.startswith(start)}
            for path, start in below.items()
        }

    @property
    def owners(self) -> tuple[str, ...]:
        """Paths of the modules that hold the adapters: a stack of layers has one."""
        return tuple(dict.fromkeys(split_path(path)[0] for path in self.paths))

    @property
    def revives(self) -> bool:
        """Whether a frozen subspace may return, so that it must go on getting gradients."""
        return self.config.budget is not None and self.config.budget.revive

    def computed(self, factors: Factors) -> Factors:
        """Return the factors as the product is to see them: with all gradients where a frozen one may return."""
        return factors._replace(active=jnp.ones_like(factors.active)) if self.revives else factors

    def __deepcopy__(self, memo: Any) -> Self:
        return self


class Shell(ABC):
    """The model half of `adamss.backend.Backend`, for the models of one library; the laws are stated there."""

    library: ClassVar[str]
    """Module without which no model of this library can exist."""

    @abstractmethod
    def handles(self, model: Model) -> bool:
        """Return whether this is a model, or a module, of the library."""

    @abstractmethod
    def modules(self, model: Model) -> dict[str, Module]:
        """See `Backend.modules`."""

    @abstractmethod
    def weight(self, module: Module, path: str) -> BaseWeight:
        """See `Backend.weight`."""

    @abstractmethod
    def arrays(self, module: Module) -> dict[str, jax.Array]:
        """See `Backend.arrays`."""

    def shared(self, model: Model, saved: Iterable[str]) -> Mapping[str, frozenset[str]]:
        """See `Backend.shared`."""
        return {}

    @abstractmethod
    def insert(
        self,
        model: Model,
        layers: Mapping[str, Factors],
        *,
        config: AdamssConfig,
        saved: Mapping[str, Mapping[str, jax.Array] | None],
    ) -> Model:
        """See `Backend.insert`."""

    @abstractmethod
    def adaptation(self, model: Model) -> Adaptation | None:
        """See `Backend.adaptation`."""

    @abstractmethod
    def parameters(self, model: Model) -> Any:
        """See `Backend.parameters`."""

    @abstractmethod
    def leaf_names(self, model: Model) -> dict[str, tuple[str, int]]:
        """Return which leaves of `parameters` are factors: path of their module, and 0 for B or 1 for C.

        By the `spelled` path of the leaf; a module that appears twice may be listed twice.
        """

    @abstractmethod
    def set_active(self, model: Model, active: Mapping[str, jax.Array]) -> Model:
        """See `Backend.set_active`."""

    @abstractmethod
    def remove(self, model: Model, *, restore: bool) -> Model:
        """See `Backend.remove`."""

    @abstractmethod
    def fold(self, model: Model, merged: Mapping[str, Merged], *, keep_base: bool) -> Model:
        """See `Backend.fold`."""

    @abstractmethod
    def unfold(self, model: Model) -> Model:
        """See `Backend.unfold`."""

    @abstractmethod
    def consolidate(
        self, model: Model, merged: Mapping[str, Merged], folded: Mapping[str, jax.Array], *, keep_base: bool
    ) -> Model:
        """See `Backend.consolidate`."""

    @abstractmethod
    def disabled(self, model: Model) -> AbstractContextManager[Model]:
        """See `Backend.disabled`."""


def check_values(array: jax.Array, path: str) -> None:
    """Check that an array has values, all within reach of this process.

    Raises
    ------
    ArrayTypeError
        If it is a tracer or a shape without values, or spread over other processes.
    """
    if isinstance(array, jax.core.Tracer):
        raise ArrayTypeError(
            f"{path}: the weight is a tracer, which has no values; call this verb outside of jax.jit, jax.grad, "
            "jax.vmap and nnx.jit, and pass the model that it returns in"
        )
    if isinstance(array, jax.ShapeDtypeStruct):
        raise ArrayTypeError(
            f"{path}: the weight is a shape without values; load the weights first, by nnx.update(model, state) or "
            "eqx.tree_deserialise_leaves(file, model)"
        )
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        raise ArrayTypeError(
            f"{path}: the weight is spread over several processes; gather it, or attach before sharding"
        )


def placed_as(array: Any, like: jax.Array) -> jax.Array:
    """Return an array where another one of its shape is, spread over devices as that is."""
    if isinstance(like, jax.core.Tracer) or not like.committed:
        return jnp.asarray(array)
    placed: jax.Array = jax.device_put(array, like.sharding)
    return placed


def beside(array: Any, like: jax.Array | None, dtype: Any = None) -> jax.Array:
    """Return an array where another one is: on its device, or on every device of its mesh."""
    placed: jax.Array = jnp.asarray(array, dtype)
    if like is None or isinstance(like, jax.core.Tracer) or not like.committed:
        # An array that is tied to a device ties every result to it, and the next step is compiled anew.
        return placed
    sharding = like.sharding
    if isinstance(sharding, NamedSharding):
        everywhere = PartitionSpec()  # type: ignore[no-untyped-call]
        placed = jax.device_put(placed, NamedSharding(sharding.mesh, everywhere))
    else:
        placed = jax.device_put(placed, next(iter(like.devices())))
    return placed


def spelled(path: tuple[Any, ...]) -> str:
    """Return a path in a pytree as ``targets`` spell it: names and numbers with dots between."""
    names = []
    for key in path:
        match key:
            case GetAttrKey():
                names.append(key.name)
            case SequenceKey():
                names.append(str(key.idx))
            case DictKey() | FlattenedIndexKey():
                names.append(str(key.key))
            case _:
                names.append(str(key))
    return ".".join(names)


def factors_beside(factors: Factors, like: jax.Array) -> Factors:
    """Return factors as JAX arrays where the weight is; labels and ranks in JAX's default integer."""
    return Factors(*(beside(array, like) for array in factors))


def owner_prefix(found: Mapping[str, Record]) -> str:
    """Return where in a model the module lies that was adapted: ``""``, or a path that ends with a dot.

    Parameters
    ----------
    found
        Records by path of the adapted layer, all of one model, in its order.

    Raises
    ------
    StateError
        If several modules of the model were adapted one by one, or this is only a part of one.
    """
    record = next(iter(found.values()))
    first = record.owners[0]
    # Not by position: attributes come in another order after a transformation, or in another model.
    prefixes = [path.removesuffix(first) for path in found if f".{path}".endswith(f".{first}")]
    whole = [prefix for prefix in prefixes if {prefix + path for path in record.owners} <= set(found)]
    if any(other != record for other in found.values()) or (whole and len(record.owners) < len(found)):
        raise StateError(
            "parts of the model were adapted one by one; call adamss on each of them, not on the whole"
        )
    if not whole:
        raise StateError(
            "this is a part of a model that was adapted as a whole: adapters are attached already; "
            "call adamss on the whole"
        )
    return whole[0]
