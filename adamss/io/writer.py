"""Files that are written whole or not at all, and safetensors among them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import safetensors

from adamss.backend.tensors import StoredTensor
from adamss.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows, where an open file can neither be renamed nor removed
    fcntl = None  # type: ignore[assignment]

__all__ = ["replace", "serialize", "write_tensors", "write_text"]

LONGEST_NAME = 200
"""Bytes of a name to which process and random digits can be added: file systems allow 255."""


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, StoredTensor], metadata: dict[str, str]
) -> None:
    """Write a safetensors file of any tensors, whole or not at all."""
    replace(Path(path), serialize(tensors, metadata))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, whole or not at all."""
    replace(Path(path), text.encode())


def serialize(tensors: Mapping[str, StoredTensor], metadata: dict[str, str]) -> bytes:
    """Return the bytes of a safetensors file; the same tensors and metadata make the same bytes."""
    # The library takes addresses; these arrays keep the buffers alive until it has read them.
    buffers = {name: np.frombuffer(tensor.data, dtype=np.uint8) for name, tensor in tensors.items()}
    specs = {
        name: safetensors.TensorSpec(
            dtype=tensor.dtype,
            shape=list(tensor.shape),
            data_ptr=buffers[name].ctypes.data,
            data_len=len(tensor.data),
        )
        for name, tensor in tensors.items()
    }
    return _in_order(safetensors.serialize(specs, metadata))


def _in_order(content: bytes) -> bytes:
    """Return a safetensors file with its metadata sorted: the library writes them in any order."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    # Tensors begin at a multiple of eight, behind spaces.
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(content)[8 + length :]))


def replace(path: Path, content: bytes) -> None:
    """Write a file: to a temporary one in the same folder, then renamed, so that a crash leaves the old one.

    The temporary file of a process that was killed is left in the folder, as ``.NAME.PID-HEX.tmp`` with eight digits
    (a long name by its digest), and the next write of NAME removes it. Writers hold a lock on theirs, so that those
    of the living stay, whatever host they run on. Where the file system has no locks (and on Windows) none is
    removed. Of a symbolic link, what it leads to is replaced.

    Raises
    ------
    CheckpointError
        If there is a device or a pipe at the path.
    OSError
        If the folder does not exist or cannot be written.
    """
    # What a link leads to is meant, and the link is to stay.
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise CheckpointError(
            f"{str(path)!r} is a device, pipe or socket, which a file would replace; take another name"
        )
    _remove_stale(path)
    with _temporary(path) as (temporary, file):
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        if fcntl is None:
            file.close()
        os.replace(temporary, path)


@contextmanager
def _temporary(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Make a new file beside the path, locked as long as it is open, and remove it if writing fails."""
    while True:
        temporary = path.with_name(f"{_prefix(path)}{os.getpid()}-{secrets.token_hex(4)}.tmp")
        try:
            with open(temporary, "xb") as file:
                # Between opening and locking, another writer may have taken it for one of the dead.
                if _lock(file.fileno()) is False or not _is_at(temporary, file.fileno()):
                    continue
                yield temporary, file
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return


def _prefix(path: Path) -> str:
    """Return how the names of a path's temporary files begin: they must not be longer than the system allows."""
    name = path.name
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f".{name}."


def _remove_stale(path: Path) -> None:
    """Remove temporary files of this path whose writers are dead: nobody holds the lock any more."""
    if fcntl is None:
        return
    ours = re.compile(re.escape(_prefix(path)) + r"\d+-[0-9a-f]{8}\.tmp")
    # A clean folder is not worth a failed save.
    with suppress(OSError), os.scandir(path.parent) as entries:
        for name in [entry.name for entry in entries if ours.fullmatch(entry.name)]:
            with suppress(OSError):
                descriptor = os.open(path.with_name(name), os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    if _lock(descriptor):
                        path.with_name(name).unlink()
                finally:
                    os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Take the lock of an open file: True if it was free, False if it was not, None if there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Return whether an open file is the one that has this name."""
    try:
        return fcntl is None or os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
