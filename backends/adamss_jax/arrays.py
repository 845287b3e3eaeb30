"""Arrays of JAX: their devices, their bytes, and copies of them that are kept outside a model's tree."""

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
    """The primitives on arrays, which need JAX but no model library."""

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
        # Without x64, JAX has no 64-bit types, and warns about each request for one.
        wanted = jax.dtypes.canonicalize_dtype(kind if dtype is None else jnp.dtype(dtype))
        return beside(host.astype(wanted), like)

    def dtype_name(self, array: Array) -> str:
        return str(array.dtype.name)

    def cast(self, array: Array, dtype: str) -> Array:
        return jnp.asarray(array, jnp.dtype(dtype))

    def has_dtype(self, dtype: str) -> bool:
        return jax.dtypes.canonicalize_dtype(jnp.dtype(dtype)).name == dtype

    def decomposition_input(self, W: Array) -> Any:
        # On the CPU, NumPy runs the same routines without compiling them: 0.1 s where JAX's first call takes 5 s.
        on_cpu = all(device.platform == "cpu" for device in W.devices())
        return np.asarray(W.astype(jnp.promote_types(W.dtype, jnp.float32))) if on_cpu else W

    def versions(self) -> Mapping[str, str]:
        return {"jax": jax.__version__}

    def exact(self) -> AbstractContextManager[object]:
        context: AbstractContextManager[object] = jax.default_matmul_precision("highest")
        return context


class HostCopies(Mapping[str, Array]):
    """Arrays by name, copied to host memory; a lookup puts the array back on the devices that it came from.

    Copies are compared by value and so act as static constants of compiled functions: they are not transferred with
    every call, they survive buffer donation, and equal models have trees of equal structure.

    Parameters
    ----------
    arrays
        Arrays by name.
    """

    __slots__ = ("_arrays", "_shardings")

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        # Copy explicitly, because np.asarray of an array on the CPU may be a view of its buffer.
        self._arrays = {name: np.array(array, copy=True) for name, array in arrays.items()}
        self._shardings: Mapping[str, Any] = {
            name: a.sharding if jnp.asarray(a).committed else None for name, a in arrays.items()
        }

    @classmethod
    def of(cls, arrays: Mapping[str, Array] | None) -> HostCopies | None:
        """Return host copies of arrays; None and existing `HostCopies` are returned as they are."""
        return arrays if arrays is None or isinstance(arrays, HostCopies) else cls(arrays)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the arrays by name."""
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
        # Shardings name devices of this process, which do not exist where the pickle is loaded.
        return None, {"_arrays": self._arrays, "_shardings": {}}


class LeafStore(PlainStore):
    """A store for weights that are fields of the layer.

    Equinox's layers are frozen dataclasses, so `write` bypasses their ``__setattr__``. This is safe because it gets a
    copy of the layer in the model (see `JaxModels.adapted_layers`).
    """

    def write(self, layer: Any, name: str, value: Array) -> None:
        object.__setattr__(layer, name, placed_as(value, jnp.asarray(self.read(layer, name))))

    def exchange(self, layer: Any, name: str, value: Array) -> Array:
        """Write an array and return the former one, without a copy, since arrays of JAX are immutable."""
        before: Array = self.read(layer, name)
        self.write(layer, name, value)
        return before


KINDS = {"labels": int, "ranks": int, "subspaces": int, "directions": int, "active": bool, "held": bool}
"""Python types of the arrays, by name, that do not hold floating-point numbers."""


def restored(arrays: N) -> N:
    """Return a named tuple of arrays whose integers and booleans are converted back from floating point.

    Some training code averages all arrays of a model over steps or processes, as if they were weights. The average of
    equal integers is that integer up to rounding, so rounding restores it.
    """
    averaged = {
        name: jnp.round(array).astype(KINDS[name])
        for name, array in arrays._asdict().items()
        if name in KINDS and array is not None and jnp.issubdtype(array.dtype, jnp.inexact)
    }
    result: N = arrays._replace(**averaged)
    return result


def check_values(array: Any, path: str, name: str) -> None:
    """Check that an array has values and that this process can access all of them.

    Parameters
    ----------
    array
        Object that a store has read.
    path, name
        Path of the layer and name of the array within it, for the message.

    Raises
    ------
    ArrayTypeError
        If the array is a tracer or a shape without values, or is sharded over several processes.
    LayerTypeError
        If the object is not an array.
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
            f"{path}: its {name} is a {type(array).__name__}, not an array; dequantise it first, or register an "
            "adamss.backend.Store that reads it"
        )


def placed_as(array: Any, like: Array) -> Array:
    """Return an array on the devices and with the sharding of another array of the same shape."""
    if isinstance(like, jax.core.Tracer) or not like.committed:
        return jnp.asarray(array)
    placed: Array = jax.device_put(array, like.sharding)
    return placed


def beside(array: Any, like: Array | None) -> Array:
    """Return an array on the device of another one, or replicated over the mesh of that one."""
    placed: Array = jnp.asarray(array)
    if like is None or isinstance(like, jax.core.Tracer) or not like.committed:
        # Leave the array uncommitted: results of an array committed to a device are committed too, and the next step
        # would be compiled again for them.
        return placed
    place: Any = next(iter(like.devices()))
    if isinstance(like.sharding, NamedSharding):
        everywhere = PartitionSpec()  # type: ignore[no-untyped-call]
        place = NamedSharding(like.sharding.mesh, everywhere)
    result: jax.Array = jax.device_put(placed, place)
    return result
