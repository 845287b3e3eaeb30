"""Safetensors files from anyone: taken apart without trusting a word of them.

Every length, type and number is checked before memory is spent on it, so that a file that lies is refused, and no
file takes more than twice its size beside what the layers of the model take themselves.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
    "read_tensors",
    "room_for",
    "short",
    "stored_tensors",
]

# What metadata of the wrong structure, or numbers out of range, can raise on their way into our types. Not
# MemoryError: a file that brings it about has got past a check.
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)

LONGEST_MESSAGE = 500

LEAST_ROOM = 1 << 18
ROOM_PER_MODULE = 1 << 14
MODULES = 4096
"""Bytes that the Python objects of a header may take: a layer takes about 10,000, with its tensors' names and shapes,
and a file has no more layers than the model has modules. Where there is no model, this many are taken for granted."""

BYTES_OF_VALUE = 96
"""Upper estimate of what a value of JSON takes in Python, per one of the characters ``[{,:``. ``[],`` takes 65."""

# safetensors' names in the file, and ours.
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
    """Read the tensors of any safetensors file.

    Raises
    ------
    CheckpointError
        If it is truncated, damaged or no safetensors file.
    """
    _, content = contents(Path(path), MODULES)
    return dict(stored_tensors(deserialize(content)))


def short(error: Exception) -> str:
    """Return the message of an error, shortened; what a file says in it may be as long as the file."""
    text = str(error)
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}..."


def room_for(size: int, modules: int) -> int:
    """Return how many bytes the Python objects of a header may take."""
    return size // 8 + LEAST_ROOM + ROOM_PER_MODULE * modules


def contents(
    path: Path, modules: int, *, check: Callable[[dict[str, Any]], None] = lambda header: None
) -> tuple[Any, bytes]:
    """Return header and bytes of a safetensors file: an 8-byte length, JSON of that length, and tensors.

    The rest is read when the header says that it is tensors, to the last byte: a sparse file of any length costs
    nothing to make. All of it comes from one open file, which another may replace meanwhile. `check` sees the header
    before the rest is read.
    """
    with open(path, "rb") as file:
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
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        if size != 8 + length + max(ends, default=0):
            raise CheckpointError("its length is not what its header says: it is truncated or damaged")
        check(header)
        file.seek(0)
        try:
            return header, file.read(size)
        except MemoryError:
            raise CheckpointError(f"there is no memory for its {size:,} bytes") from None


def parse(text: bytes, room: int) -> Any:
    """Parse JSON in UTF-8 that takes no more than so many bytes as Python objects."""
    check_json(text, room)
    return json.loads(text.decode())


def check_json(text: bytes, room: int) -> None:
    """Check that JSON in UTF-8 takes no more than so many bytes as Python objects.

    ``[],`` is 3 bytes of JSON and 56 in memory, so the text, the decoded strings (in which one wide character makes
    all of them four bytes wide) and the values are bounded together.
    """
    width = 1 if text.isascii() else 4
    values = BYTES_OF_VALUE * sum(map(text.count, (b"[", b"{", b",", b":")))
    _check_room(len(text), room - values, width)


def _check_room(length: int, room: int, width: int = 1) -> None:
    if (1 + 2 * width) * length > room:
        raise CheckpointError("its header is longer than that of any adapter of this size")


def deserialize(content: bytes) -> list[tuple[str, dict[str, Any]]]:
    """Return the entries of a safetensors file, by the library's own parser."""
    try:
        entries: list[tuple[str, dict[str, Any]]] = safetensors.deserialize(content)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"it is truncated or damaged ({short(error)}); take a fresh copy") from error
    return entries


def stored_tensors(entries: list[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, StoredTensor]]:
    """Turn the library's buffers into bytes one by one, and let go of each: all of them twice would be too much."""
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
