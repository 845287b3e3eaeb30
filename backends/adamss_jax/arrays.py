"""JAX's arrays: where they are, their bytes, and what of them is kept outside of a model's tree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from adamss.backend import PlainStore
from adamss.backend.interface import Arrays
from adamss.backend.tensors import StoredTensor
from adamss.core import Factors
from adamss.errors import ArrayTypeError, LayerTypeError
from adamss_jax.functional import linear

__all__ = ["HostCopies", "JaxArrays", "LeafStore", "beside", "check_values", "placed_as", "restored"]


N = TypeVar("N", bound=Any)


class JaxArrays(Arrays):
    """What needs JAX and no library of models."""

    def linear(self, x: Array, weight: Array, bias: Array | None, *factors: Factors) -> Array:
        return linear(x, weight, bias, *(Factors(*map(jnp.asarray, each)) for each in factors))

    def to_stored(self, array: Array) -> StoredTensor:
        host = np.asarray(array)
        return StoredTensor(self.dtype_name(array), host.shape, host.tobytes(order="C"))

    def from_stored(
        self, stored: StoredTensor, *, like: Array | None = None, dtype: str | None = None
    ) -> Array:
        kind = np.dtype(getattr(ml_dtypes, stored.dtype, stored.dtype))
        host = np.frombuffer(stored.data, dtype=kind).reshape(stored.shape)
        # Without x64, JAX has no 64-bit types and warns of each that is asked for.
        wanted = jax.dtypes.canonicalize_dtype(kind if dtype is None else jnp.dtype(dtype))
        return beside(host.astype(wanted), like)

    def dtype_name(self, array: Array) -> str:
        return str(array.dtype.name)

    def cast(self, array: Array, dtype: str) -> Array:
        return jnp.asarray(array, jnp.dtype(dtype))

    def has_dtype(self, dtype: str) -> bool:
        return jax.dtypes.canonicalize_dtype(jnp.dtype(dtype)).name == dtype

    def decomposition_input(self, W: Array) -> Any:
        # On the CPU, NumPy has the same routines and compiles nothing: 0.1 s where JAX's first call takes 5.
        on_cpu = all(device.platform == "cpu" for device in W.devices())
        return np.asarray(W.astype(jnp.promote_types(W.dtype, jnp.float32))) if on_cpu else W

    def versions(self) -> Mapping[str, str]:
        return {"jax": jax.__version__}

    def exact(self) -> AbstractContextManager[object]:
        context: AbstractContextManager[object] = jax.default_matmul_precision("highest")
        return context


class HostCopies(Mapping[str, Array]):
    """Arrays by name, kept as copies in the host's memory; each is put back on its devices when it is looked up.

    They are compared by value, and so act as static constants of compiled functions: they are not transferred with
    every call, they survive the donation of buffers, and models that are equal have trees of equal structure.

    Parameters
    ----------
    arrays
        By name.
    """

    __slots__ = ("_arrays", "_shardings")

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        # np.asarray of an array on the CPU may be a view of its buffer.
        self._arrays = {name: np.array(array, copy=True) for name, array in arrays.items()}
        self._shardings: Mapping[str, Any] = {
            name: a.sharding if jnp.asarray(a).committed else None for name, a in arrays.items()
        }

    @classmethod
    def of(cls, arrays: Mapping[str, Array] | None) -> HostCopies | None:
        """Return copies of arrays; None, and what is a copy already, as it is."""
        return arrays if arrays is None or isinstance(arrays, HostCopies) else cls(arrays)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each."""
        return {name: array.shape for name, array in self._arrays.items()}

    def __getitem__(self, name: str) -> Array:
        array: Array = jax.device_put(self._arrays[name], self._shardings.get(name))
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    def __hash__(self) -> int:
        return hash(tuple((name, array.shape, array.dtype.name) for name, array in self._arrays.items()))

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, HostCopies) or hash(self) != hash(other):
            return False
        pairs = zip(self._arrays.values(), other._arrays.values(), strict=True)
        return all(a.tobytes() == b.tobytes() for a, b in pairs)

    def __getstate__(self) -> Any:
        return None, {"_arrays": self._arrays, "_shardings": {}}  # devices are those of the process


class LeafStore(PlainStore):
    """Fields of the layer. A frozen layer that is written to is a copy, made for that, of the one in the model."""

    def write(self, layer: Any, name: str, value: Array) -> None:
        object.__setattr__(layer, name, placed_as(value, jnp.asarray(self.read(layer, name))))

    def exchange(self, layer: Any, name: str, value: Array) -> Array:
        """Do the same, and return the former array, which nobody can write over."""
        before: Array = self.read(layer, name)
        self.write(layer, name, value)
        return before


KINDS = {"labels": int, "ranks": int, "subspaces": int, "directions": int, "active": bool, "held": bool}
"""Of the arrays, by name, that are no floating-point numbers."""


def restored(arrays: N) -> N:
    """Return a named tuple of arrays in which integers and booleans are such again.

    Some average all arrays of a model, over steps or processes, as if they were weights. An average of equal integers
    is that integer, up to rounding.
    """
    averaged = {
        name: jnp.round(array).astype(KINDS[name])
        for name, array in arrays._asdict().items()
        if name in KINDS and array is not None and jnp.issubdtype(array.dtype, jnp.inexact)
    }
    result: N = arrays._replace(**averaged)
    return result


def check_values(array: Any, path: str, name: str) -> None:
    """Check that this is an array with values, all within reach of this process.

    Parameters
    ----------
    array
        What a store has read.
    path, name
        Of the layer, and of the array within it, for the message.

    Raises
    ------
    ArrayTypeError
        If it is a tracer or a shape without values, or spread over other processes.
    LayerTypeError
        If it is no array.
    """
    if isinstance(array, jax.core.Tracer):
        raise ArrayTypeError(
            f"{path}: its {name} is a tracer, which has no values; call this verb outside of jax.jit, jax.grad, "
            "jax.vmap and nnx.jit, and pass the model that it returns in"
        )
    if isinstance(array, jax.ShapeDtypeStruct):
        raise ArrayTypeError(
            f"{path}: its {name} is a shape without values; load the weights first, by nnx.update(model, state) or "
            "eqx.tree_deserialise_leaves(file, model)"
        )
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        raise ArrayTypeError(
            f"{path}: its {name} is spread over several processes; gather it, or attach before sharding"
        )
    if not isinstance(array, jax.Array) and not hasattr(array, "__array__"):
        raise LayerTypeError(
            f"{path}: its {name} is a {type(array).__name__}, no array; dequantise it first, or register an "
            "adamss.backend.Store that reads it"
        )


def placed_as(array: Any, like: Array) -> Array:
    """Return an array where another one of its shape is, spread over devices as that is."""
    if isinstance(like, jax.core.Tracer) or not like.committed:
        return jnp.asarray(array)
    placed: Array = jax.device_put(array, like.sharding)
    return placed


def beside(array: Any, like: Array | None) -> Array:
    """Return an array where another one is: on its device, or on every device of its mesh."""
    placed: Array = jnp.asarray(array)
    if like is None or isinstance(like, jax.core.Tracer) or not like.committed:
        # An array that is tied to a device ties every result to it, and the next step is compiled anew.
        return placed
    place: Any = next(iter(like.devices()))
    if isinstance(like.sharding, NamedSharding):
        everywhere = PartitionSpec()  # type: ignore[no-untyped-call]
        place = NamedSharding(like.sharding.mesh, everywhere)
    result: jax.Array = jax.device_put(placed, place)
    return result
