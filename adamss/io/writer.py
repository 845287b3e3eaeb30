"""Atomic writing of files, among them safetensors files: a file is replaced as a whole or not at all."""

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
"""Largest length of a file name in bytes to which a process id and random digits can be appended. The limit of file
systems is 255."""


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, StoredTensor], metadata: dict[str, str]
) -> None:
    """Write a safetensors file atomically."""
    replace(Path(path), serialize(tensors, metadata))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    replace(Path(path), text.encode())


def serialize(tensors: Mapping[str, StoredTensor], metadata: dict[str, str]) -> bytes:
    """Return the bytes of a safetensors file. They depend only on the tensors and metadata."""
    # The library takes addresses. These arrays keep the buffers alive until it has read them.
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
    """Return a safetensors file with sorted metadata, since the library writes them in arbitrary order."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    # The format pads the header with spaces, so that tensors begin at a multiple of eight bytes.
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(content)[8 + length :]))


def replace(path: Path, content: bytes) -> None:
    """Write a file atomically.

    The content is written to a temporary file in the same folder, which is then renamed, so that a crash leaves the
    old file intact. If the path is a symbolic link, the file that it points to is replaced.

    A process that is killed leaves its temporary file in the folder, named ``.NAME.PID-HEX.tmp`` with eight
    hexadecimal digits (a long NAME is replaced by its digest). The next write of NAME removes it. Each writer holds a
    lock on its temporary file, so that files of running processes are not removed, whatever host they run on. If the
    file system has no locks, and on Windows, no temporary files are removed.

    Raises
    ------
    CheckpointError
        If the path is a device, a pipe or a socket.
    OSError
        If the folder does not exist or cannot be written.
    """
    # Renaming onto a symbolic link would replace the link instead of the file that it points to.
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
    """Create a temporary file in the folder of the path and yield its path and the open file.

    The file is locked while it is open, and removed if an error is raised.
    """
    while True:
        temporary = path.with_name(f"{_prefix(path)}{os.getpid()}-{secrets.token_hex(4)}.tmp")
        try:
            with open(temporary, "xb") as file:
                # Before it was locked, another writer may have removed the file as a stale one.
                if _lock(file.fileno()) is False or not _is_at(temporary, file.fileno()):
                    continue
                yield temporary, file
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return


def _prefix(path: Path) -> str:
    """Return the beginning of the names of a path's temporary files. A name that is too long becomes a digest."""
    name = path.name
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f".{name}."


def _remove_stale(path: Path) -> None:
    """Remove temporary files of this path whose writers no longer run, so that no process holds their locks."""
    if fcntl is None:
        return
    ours = re.compile(re.escape(_prefix(path)) + r"\d+-[0-9a-f]{8}\.tmp")
    # Errors are ignored, because a file that cannot be removed must not make the save fail.
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
    """Try to lock an open file. Return True if it was free, False if not, and None if locks are not supported."""
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
    """Return whether an open file is still the file at this path."""
    try:
        return fcntl is None or os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
