"""Reader for safetensors files that may be hostile.

Every length, type and number is checked before memory is allocated for it. A file with false sizes is therefore
refused, and no file takes more than twice its size in memory, in addition to what the layers of the model take.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors

from adamss.backend.tensors import StoredTensor
from adamss.config import shown
from adamss.errors import CheckpointError

__all__ = [
    "DTYPES",
    "MALFORMED",
    "MODULES",
    "check_json",
    "contents",
    "deserialize",
    "parse",
    "read_header",
    "read_tensors",
    "room_for",
    "short",
    "stored_tensors",
]

# Errors that metadata of a wrong structure, or numbers out of range, can raise when they are converted to our types.
# MemoryError is not among them, because a file that causes it has passed a check that should have refused it.
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)

LONGEST_MESSAGE = 500
"""Largest number of characters of an error that is quoted in a message."""

LARGEST_COUNTED = 1 << 32
"""Size in bytes from which a file gets no more room for its header: that of a model names its tensors only."""

LEAST_ROOM = 1 << 18
ROOM_PER_MODULE = 1 << 14
MODULES = 4096
"""Bytes that the Python objects of a header may take, in total and for each module, and the number of modules that is
assumed if there is no model. A file has at most as many layers as the model has modules, and the names and shapes of
the tensors of one layer take about 10,000 bytes."""

BYTES_OF_VALUE = 96
"""Upper bound on the bytes of a JSON value in Python, for each of the characters ``[{,:``. ``[],`` takes 65."""

# Our names of dtypes, by the names that safetensors files use.
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


def read_tensors(path: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """Return the tensors of any safetensors file by name.

    Raises
    ------
    CheckpointError
        If the file is truncated, damaged or not a safetensors file.
    """
    _, content = contents(Path(path), MODULES)
    return dict(stored_tensors(deserialize(content)))


def short(error: Exception) -> str:
    """Return the message of an error, shortened, since text that it quotes may be as long as the file."""
    text = str(error)
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}..."


def room_for(size: int, modules: int) -> int:
    """Return the number of bytes that the Python objects of a header may take, for a file of `size` bytes."""
    return min(size, LARGEST_COUNTED) // 8 + LEAST_ROOM + ROOM_PER_MODULE * modules


def contents(
    path: Path, modules: int, *, check: Callable[[dict[str, Any]], None] = lambda header: None
) -> tuple[Any, bytes]:
    """Return the parsed header and all bytes of a safetensors file.

    Such a file consists of an 8-byte length, JSON of that length, and tensors. The tensors are read only if the
    header accounts for every byte of them, because a sparse file of any length costs nothing to create. Header and
    tensors are read through one open file, since another process may replace the file at its path meanwhile.

    Parameters
    ----------
    path
        Path of the file.
    modules
        Number of modules of the model, which bounds the size of the header.
    check
        Function that is called with the header before the tensors are read, and raises an error to refuse the file.
    """
    with open(path, "rb") as file:
        header, begin, size = read_header(file, modules)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        if size != begin + max(ends, default=0):
            raise CheckpointError("its length is not what its header says: it is truncated or damaged")
        check(header)
        file.seek(0)
        try:
            return header, file.read(size)
        except MemoryError:
            raise CheckpointError(f"there is no memory for its {size:,} bytes") from None


def read_header(file: BinaryIO, modules: int = MODULES) -> tuple[dict[str, Any], int, int]:
    """Return the header of an open safetensors file, the offset at which its tensors begin, and the size of the file.

    Raises
    ------
    CheckpointError
        If the header is truncated, damaged, or so long that its Python objects would take too much memory.
    """
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
        raise CheckpointError("it is truncated or no safetensors file")
    room = room_for(size, modules)
    _check_room(length, room)
    try:
        header = parse(file.read(length), room)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError("it is damaged or no safetensors file") from error
    if not isinstance(header, dict):
        raise CheckpointError("it is damaged or no safetensors file")
    return header, 8 + length, size


def parse(text: bytes, room: int) -> Any:
    """Parse JSON in UTF-8. Raise an error first if its Python objects could take more than `room` bytes."""
    check_json(text, room)
    return json.loads(text.decode())


def check_json(text: bytes, room: int) -> None:
    """Check that the Python objects of JSON in UTF-8 take at most `room` bytes.

    ``[],`` is 3 bytes of JSON and 56 in memory, so the text, the decoded strings (in which one wide character makes
    all of them four bytes wide) and the values are bounded together.
    """
    width = 1 if text.isascii() else 4
    values = BYTES_OF_VALUE * sum(map(text.count, (b"[", b"{", b",", b":")))
    _check_room(len(text), room - values, width)


def _check_room(length: int, room: int, width: int = 1) -> None:
    if (1 + 2 * width) * length > room:
        raise CheckpointError("its header is longer than that of any file of this size")


def deserialize(content: bytes) -> list[tuple[str, dict[str, Any]]]:
    """Return the names and buffers of the tensors of a safetensors file, as the safetensors library parses it."""
    try:
        entries: list[tuple[str, dict[str, Any]]] = safetensors.deserialize(content)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"it is truncated or damaged ({short(error)}); take a fresh copy") from error
    return entries


def stored_tensors(entries: list[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the tensors by name, and remove each one from `entries`.

    Each buffer of the library is released as soon as it is converted, so that not all tensors are in memory twice.
    """
    while entries:
        name, entry = entries.pop()
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(
                f"tensor {shown(name)} has dtype {entry['dtype']}, which no adapter file has"
            )
        dtype = DTYPES[entry["dtype"]]
        tensor = StoredTensor(dtype, tuple(entry["shape"]), bytes(entry.pop("data")))
        if dtype == "bool" and np.any(np.frombuffer(tensor.data, dtype=np.uint8) > 1):
            raise CheckpointError(f"tensor {shown(name)} holds booleans that are neither 0 nor 1")
        yield name, tensor
