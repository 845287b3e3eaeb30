"""Tensors as bytes, the framework-independent form in which backends exchange tensors with files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from adamss.errors import CheckpointError

__all__ = ["EXPONENTS", "STORABLE", "StoredTensor", "itemsize", "join_path"]

STORABLE = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (64, 32, 16, 8)),
    "bool",
)
"""Dtypes that a stored tensor may have, as NumPy and PyTorch spell them."""

# By dtype, the integer dtype of the same size and the mask of the exponent bits. A number is infinite or NaN if all
# of its exponent bits are set.
EXPONENTS = {
    "float64": ("<u8", 0x7FF << 52),
    "float32": ("<u4", 0xFF << 23),
    "float16": ("<u2", 0x1F << 10),
    "bfloat16": ("<u2", 0xFF << 7),
}
_PIECE = 1 << 16


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as little-endian bytes in row-major order, independent of any framework.

    Attributes
    ----------
    dtype
        Name of the dtype as NumPy and PyTorch spell it: ``"float32"``, ``"bfloat16"``, ``"bool"``, ...
    shape
        Lengths of the axes.
    data
        The bytes of the tensor.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, array: np.ndarray[Any, Any], dtype: str | None = None) -> StoredTensor:
        """Create a stored tensor from a NumPy array.

        Parameters
        ----------
        array
            Of any dtype that can be stored.
        dtype
            Dtype to round to, ``"bfloat16"`` (from float32) among them. None keeps that of the array.

        Raises
        ------
        CheckpointError
            If the dtype cannot be stored.
        """
        if dtype == "bfloat16":
            return _as_bfloat16(array)
        array = array if dtype is None else array.astype(dtype)
        if array.dtype.name not in STORABLE:
            raise CheckpointError(f"a tensor of dtype {array.dtype} cannot be stored; convert it to float32")
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        return cls(array.dtype.name, tuple(array.shape), little.tobytes(order="C"))

    def numpy(self) -> np.ndarray[Any, Any]:
        """Return the tensor as a NumPy array. NumPy lacks bfloat16, so it is widened to float32 without loss."""
        if self.dtype == "bfloat16":
            bits = np.frombuffer(self.data, dtype="<u2").astype(np.uint32) << np.uint32(16)
            return bits.view(np.float32).reshape(self.shape)
        return np.frombuffer(self.data, dtype=np.dtype(self.dtype).newbyteorder("<")).reshape(self.shape)

    def is_finite(self) -> bool:
        """Return whether all numbers are finite. The bytes are checked piece by piece, to use little memory."""
        if self.dtype not in EXPONENTS:
            return True
        integer, exponent = EXPONENTS[self.dtype]
        bits = np.frombuffer(self.data, dtype=integer)
        mask = bits.dtype.type(exponent)
        return not any(
            ((bits[start : start + _PIECE] & mask) == mask).any() for start in range(0, bits.size, _PIECE)
        )


def itemsize(dtype: str) -> int:
    """Return the bytes of one number of a dtype of `STORABLE`."""
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def _as_bfloat16(array: np.ndarray[Any, Any]) -> StoredTensor:
    """Return float32 numbers rounded to the nearest bfloat16, ties to even: the upper half of their bits."""
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    # Half of the last bit that stays, less one if that bit is even. NaN could become infinity by the carry.
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    upper = np.where(np.isnan(bits.view(np.float32)), np.uint32(0x7FC0), rounded).astype("<u2")
    return StoredTensor("bfloat16", tuple(array.shape), upper.tobytes())


def join_path(path: str, name: str) -> str:
    """Join a module path and a name within the module. The path of the model itself is empty."""
    return f"{path}.{name}" if path else name
