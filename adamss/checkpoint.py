"""The adapter file: one safetensors file that any framework reads, on any device, in any dtype.

Per layer, under its module path: ``C``, ``labels``, ``ranks``, ``active`` and either ``M`` (portable) or ``A``
and ``B`` (training form, to resume from). Whole tensors of ``modules_to_save``. Metadata: format and
version, config, writer, a fingerprint of each base weight, and a checksum over all tensors. Segmentation
and mask come from the file and are never computed anew. This module knows bytes and NumPy arrays only.

A file may come from anyone. `read` takes it apart without trusting a word of it: every length, type and number is
checked before memory is spent on it, so that a file that lies is refused, and no file takes more than twice its size
beside what the layers of the model take themselves.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors

from adamss.config import AdamssConfig, shown
from adamss.core import Factors, check_factors
from adamss.core._array import Array, as_working_precision, device, namespace
from adamss.errors import AdamssError, CheckpointError, CheckpointNotFoundError

try:
    import fcntl
except ImportError:  # Windows, where an open file can neither be renamed nor removed
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "Checkpoint",
    "Fingerprint",
    "StoredLayer",
    "StoredTensor",
    "fingerprint",
    "join_path",
    "read",
    "read_tensors",
    "short",
    "write",
    "write_tensors",
    "write_text",
]

FORMAT = "adamss"
FORMAT_VERSION = 1
READABLE_VERSIONS = (1,)

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

PROJECTIONS = 4
FINGERPRINT_TOLERANCE = 0.02
"""Of the Frobenius norm. Rounding to bfloat16 moves a projection by about 0.001 of it, other weights by about 1."""

# safetensors' names in the file, the names it wants when writing, and the bytes of one entry.
_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
_CODES = {name: code for code, (name, _) in _DTYPES.items()}

# Where all these bits are set, a number is infinite or NaN; and the integers to look at them with.
_EXPONENTS = {
    "float64": ("<u8", 0x7FF << 52),
    "float32": ("<u4", 0xFF << 23),
    "float16": ("<u2", 0x1F << 10),
    "bfloat16": ("<u2", 0xFF << 7),
}
_PIECE = 1 << 16


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as bytes: little-endian, row-major, of no framework.

    Attributes
    ----------
    dtype
        Name as NumPy and PyTorch spell it: ``"float32"``, ``"bfloat16"``, ``"bool"``, ...
    shape
        Lengths of the axes.
    data
        The bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, array: np.ndarray[Any, Any]) -> StoredTensor:
        """Return a NumPy array as bytes.

        Raises
        ------
        CheckpointError
            If the dtype cannot be stored.
        """
        if array.dtype.name not in _CODES:
            raise CheckpointError(f"a tensor of dtype {array.dtype} cannot be stored; convert it to float32")
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        return cls(array.dtype.name, tuple(array.shape), little.tobytes(order="C"))

    def numpy(self) -> np.ndarray[Any, Any]:
        """Return a NumPy array; bfloat16, which NumPy lacks, is widened to float32 without loss."""
        if self.dtype == "bfloat16":
            bits = np.frombuffer(self.data, dtype="<u2").astype(np.uint32) << np.uint32(16)
            return bits.view(np.float32).reshape(self.shape)
        return np.frombuffer(self.data, dtype=np.dtype(self.dtype).newbyteorder("<")).reshape(self.shape)

    def is_finite(self) -> bool:
        """Return whether no number is NaN or infinite; it is looked for piece by piece, in little memory."""
        if self.dtype not in _EXPONENTS:
            return True
        integer, exponent = _EXPONENTS[self.dtype]
        bits = np.frombuffer(self.data, dtype=integer)
        mask = bits.dtype.type(exponent)
        return not any(
            ((bits[start : start + _PIECE] & mask) == mask).any() for start in range(0, bits.size, _PIECE)
        )


@dataclass(frozen=True)
class Fingerprint:
    """What is remembered of a base weight, to recognise it in another dtype.

    Attributes
    ----------
    shape
        (d, n), paper orientation.
    norm
        Frobenius norm.
    projections
        ``s W t`` for a few fixed pairs of random sign vectors s, t.
    """

    shape: tuple[int, int]
    norm: float
    projections: tuple[float, ...]

    def difference(self, other: Fingerprint) -> float:
        """Return the largest difference of norm or projections, relative to the norm.

        Infinity for another shape, and where a number is not finite.
        """
        if self.shape != other.shape or len(self.projections) != len(other.projections):
            return math.inf
        ours, theirs = (self.norm, *self.projections), (other.norm, *other.projections)
        # NaN is neither more nor less than anything: `max` would pass it over.
        if not all(map(math.isfinite, (*ours, *theirs))):
            return math.inf
        largest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        return largest / abs(self.norm) if self.norm else largest


def fingerprint(W: Array) -> Fingerprint:
    """Return the fingerprint of a weight.

    Parameters
    ----------
    W
        (d, n) floating point, of any framework; half precision is widened to float32.

    Returns
    -------
    Fingerprint
        Equal, up to rounding, for the same weight in another dtype or framework.
    """
    xp = namespace(W)
    W = as_working_precision(W)
    d, n = W.shape
    generator = np.random.default_rng(0)
    signs = generator.integers(0, 2, size=(PROJECTIONS, d + n)).astype(np.float64) * 2 - 1
    on = xp.asarray(signs, dtype=W.dtype, device=device(W))
    projections = xp.sum((on[:, :d] @ W) * on[:, d:], axis=1)
    return Fingerprint((d, n), float(xp.linalg.vector_norm(W)), tuple(float(value) for value in projections))


@dataclass(frozen=True)
class StoredLayer:
    """One adapted layer of a file: M, or A and B, and the rest of its factors.

    Attributes
    ----------
    C, labels, ranks, active
        As in `adamss.core.Factors`; labels and ranks in the smallest unsigned integer that fits.
    M
        (d, q) or (d + 1, q), in a portable file; else None.
    A, B
        In a training file; else None.
    base
        Fingerprint of the base weight.
    """

    C: StoredTensor
    labels: StoredTensor
    ranks: StoredTensor
    active: StoredTensor
    base: Fingerprint
    M: StoredTensor | None = None
    A: StoredTensor | None = None
    B: StoredTensor | None = None

    TENSORS = ("C", "labels", "ranks", "active", "M", "A", "B")

    def tensors(self) -> dict[str, StoredTensor]:
        """Return the tensors that there are, by name."""
        named = {name: getattr(self, name) for name in self.TENSORS}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def directions(self) -> np.ndarray[Any, Any]:
        """Return M (d, q) as a NumPy array, also of a training file."""
        from adamss.core import contract

        return self.M.numpy() if self.M is not None else np.asarray(contract(self.factors()))

    def outline(self) -> Factors:
        """Return factors of the right shapes, labels, ranks and mask, whose A, B and C take no memory.

        A file that lies about its sizes must not make its reader allocate them.
        """
        if self.M is not None:
            shapes: tuple[tuple[int, ...], ...] = (1, *self.M.shape), 2 * self.M.shape[-1:]
        elif self.A is not None and self.B is not None:
            shapes = self.A.shape, self.B.shape
        else:
            raise CheckpointError("a layer has neither M nor A and B")
        nothing = np.zeros((), dtype=np.float32)
        A, B, C = (np.broadcast_to(nothing, shape) for shape in (*shapes, self.C.shape))
        return Factors(A, B, C, self.labels.numpy(), self.ranks.numpy(), self.active.numpy())

    def factors(self) -> Factors:
        """Return the factors as NumPy arrays; of a portable file with ``A = M`` and ``B = I``."""
        if self.M is not None:
            M = self.M.numpy()
            A, B = M[None, :, :], np.eye(M.shape[-1], dtype=M.dtype)
        elif self.A is not None and self.B is not None:
            A, B = self.A.numpy(), self.B.numpy()
        else:
            raise CheckpointError("a layer has neither M nor A and B")
        labels, ranks = self.labels.numpy().astype(np.int64), self.ranks.numpy().astype(np.int64)
        return Factors(A, B, self.C.numpy(), labels, ranks, self.active.numpy().astype(np.bool_))


@dataclass(frozen=True)
class Checkpoint:
    """All that a file holds.

    Attributes
    ----------
    config
        Settings that the model was attached with.
    layers
        Adapted layers by module path.
    saved
        Tensors of ``modules_to_save``: by module path, then by name within the module.
    writer
        Framework and library versions that wrote the file.
    shared
        By the name of a tensor in `saved`, path of the module included, the names that the same tensor has elsewhere
        in the model (tied embeddings): none, or unknown if the tensor is missing here.
    """

    config: AdamssConfig
    layers: Mapping[str, StoredLayer]
    saved: Mapping[str, Mapping[str, StoredTensor]] = field(default_factory=dict)
    writer: Mapping[str, str] = field(default_factory=dict)
    shared: Mapping[str, frozenset[str]] = field(default_factory=dict)


def join_path(path: str, name: str) -> str:
    """Join a module path and a name below it; the model itself has the empty path."""
    return f"{path}.{name}" if path else name


def write(path: str | os.PathLike[str], checkpoint: Checkpoint, *, modules: int = MODULES) -> None:
    """Write a file: to a temporary one in the same folder, then renamed, so that a crash leaves the old one.

    The temporary file of a process that was killed is left in the folder, as ``.NAME.PID-HEX.tmp`` with eight digits,
    and the next write of NAME removes it. Writers hold a lock on theirs, so that those of the living stay, whatever
    host they run on. Where the file system has no locks (and on Windows) none is removed. Of a symbolic link, what it
    leads to is replaced.

    Parameters
    ----------
    path
        Where to.
    checkpoint
        What to write.
    modules
        How many modules the model has, as in `read`.

    Raises
    ------
    CheckpointError
        If two tensors would have one name, if `read` would refuse the file for the length of its names, or if there
        is a device or a pipe at the path.
    OSError
        If the folder does not exist or cannot be written.
    """
    tensors: dict[str, StoredTensor] = {}

    def add(name: str, tensor: StoredTensor) -> None:
        if name in tensors:
            raise CheckpointError(f"two tensors would be called {name!r}; rename a module")
        tensors[name] = tensor

    for layer_path, layer in checkpoint.layers.items():
        for name, tensor in layer.tensors().items():
            add(join_path(layer_path, name), tensor)
    for module_path, module in checkpoint.saved.items():
        for name, tensor in module.items():
            add(join_path(module_path, name), tensor)

    bases = {
        layer_path: {
            "shape": list(layer.base.shape),
            "norm": layer.base.norm,
            "projections": list(layer.base.projections),
        }
        for layer_path, layer in checkpoint.layers.items()
    }
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "config": json.dumps(checkpoint.config.to_dict()),
        "layers": json.dumps(bases),
        "modules_to_save": json.dumps({path: sorted(module) for path, module in checkpoint.saved.items()}),
        "writer": json.dumps(dict(checkpoint.writer)),
    }
    if checkpoint.shared:
        metadata["shared"] = json.dumps({name: sorted(others) for name, others in checkpoint.shared.items()})
    content = _serialize(tensors, metadata | {"checksum": _checksum(tensors, metadata)})
    length = int.from_bytes(content[:8], "little")
    try:
        _check_json(content[8 : 8 + length], _room(len(content), modules))
    except CheckpointError as error:
        raise CheckpointError(
            f"{short(error)}, so that it could not be loaded: give the modules shorter names"
        ) from None
    _replace(Path(path), content)


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, StoredTensor], metadata: dict[str, str]
) -> None:
    """Write a safetensors file of any tensors, whole or not at all."""
    _replace(Path(path), _serialize(tensors, metadata))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, whole or not at all."""
    _replace(Path(path), text.encode())


def read_tensors(path: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """Read the tensors of any safetensors file.

    Raises
    ------
    CheckpointError
        If it is truncated, damaged or no safetensors file.
    """
    _, content = _contents(Path(path), MODULES)
    return dict(_stored_tensors(_deserialize(content)))


def read(path: str | os.PathLike[str], *, modules: int = MODULES) -> Checkpoint:
    """Read a file and check all that can be checked without the model.

    Parameters
    ----------
    path
        The file.
    modules
        How many modules the model has, and so how many layers there can be: room for that many is made at most.

    Returns
    -------
    Checkpoint
        Its content. Factors are finite: a file of a training that diverged is refused. ``modules_to_save`` may hold
        any number, as masks in the buffers of a module do.

    Raises
    ------
    CheckpointNotFoundError
        If there is no such file.
    CheckpointError
        If it is truncated, damaged, no file of `adamss`, of a version that this one cannot read, or if its factors
        hold NaN or infinity.
    """
    path = Path(path)
    if not path.is_file():
        where = (
            "it is a folder, and adamss.from_peft reads those of PEFT"
            if path.is_dir()
            else "no file is there"
        )
        raise CheckpointNotFoundError(f"there is no adapter file {str(path)!r}: {where}")
    try:
        header, content = _contents(path, modules, check=lambda header: _check_version(_metadata(header)))
        room = _room(len(content), modules)
        metadata = _metadata(header)
        entries = _deserialize(content)
        # From here on there are only the tensors, once.
        del content
        tensors = dict(_stored_tensors(entries))
        if _checksum(tensors, metadata) != metadata.get("checksum"):
            raise CheckpointError("its checksum does not fit its content: it is damaged; take a fresh copy")
        return _assemble(metadata, tensors, room)
    except CheckpointError as error:
        raise CheckpointError(f"{str(path)!r}: {short(error)}") from error
    except (AdamssError, *MALFORMED) as error:
        raise CheckpointError(f"{str(path)!r} is not a valid adapter file: {short(error)}") from error


def short(error: Exception) -> str:
    """Return the message of an error, shortened; what a file says in it may be as long as the file."""
    text = str(error)
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}..."


def _room(size: int, modules: int) -> int:
    """Return how many bytes the Python objects of a header may take."""
    return size // 8 + LEAST_ROOM + ROOM_PER_MODULE * modules


def _contents(
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
        room = _room(size, modules)
        _check_room(length, room)
        try:
            header = _parse(file.read(length), room)
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


def _metadata(header: dict[str, Any]) -> dict[str, str]:
    """Metadata in a header of adamss."""
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise CheckpointError("it was not written by adamss.save (its metadata do not say format: adamss)")
    return metadata


def _parse(text: bytes, room: int) -> Any:
    """Parse JSON in UTF-8 that takes no more than so many bytes as Python objects."""
    _check_json(text, room)
    return json.loads(text.decode())


def _check_json(text: bytes, room: int) -> None:
    """Check that JSON in UTF-8 takes no more than so many bytes as Python objects.

    Three bytes of it can become a list of 56. So what it takes is estimated: the text, once as it is, once
    decoded and once again in strings, in which one character may make all of them four bytes wide; and the values.
    """
    width = 1 if text.isascii() else 4
    values = BYTES_OF_VALUE * sum(map(text.count, (b"[", b"{", b",", b":")))
    _check_room(len(text), room - values, width)


def _check_room(length: int, room: int, width: int = 1) -> None:
    if (1 + 2 * width) * length > room:
        raise CheckpointError("its header is longer than that of any adapter of this size")


def _check_version(metadata: Mapping[str, str]) -> None:
    version = metadata.get("format_version")
    if version not in [str(readable) for readable in READABLE_VERSIONS]:
        raise CheckpointError(
            f"it has format version {shown(version)}; this adamss reads {', '.join(map(str, READABLE_VERSIONS))}: "
            "install a newer adamss"
        )


def _assemble(metadata: Mapping[str, str], tensors: dict[str, StoredTensor], room: int) -> Checkpoint:
    def table(name: str) -> dict[str, Any]:
        found = _parse(metadata[name].encode(), room)
        if not isinstance(found, dict):
            raise CheckpointError(f"its {name} is no dictionary")
        return found

    config = AdamssConfig.from_file(table("config"))
    left = dict(tensors)
    layers = {}
    for path, base in table("layers").items():
        present = {
            name: left.pop(join_path(path, name))
            for name in StoredLayer.TENSORS
            if join_path(path, name) in left
        }
        missing = {"C", "labels", "ranks", "active"} - present.keys()
        if missing or ("M" in present) == ("A" in present) or ("A" in present) != ("B" in present):
            raise CheckpointError(
                f"layer {shown(path)} lacks tensors; it has {', '.join(sorted(present)) or 'none'}"
            )
        layer = StoredLayer(base=_mark(base, path), **present)
        _check_layer(layer, path)
        layers[path] = layer
    saved = {}
    for path, names in table("modules_to_save").items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"modules_to_save[{shown(path)}] is no list of names")
        saved[path] = {name: left.pop(join_path(path, name)) for name in names}
    _check_places(layers, saved)
    if left:
        raise CheckpointError(
            f"it holds tensors that belong to no layer: {', '.join(map(shown, sorted(left)[:3]))}"
        )
    if not layers:
        raise CheckpointError("it adapts no layer")
    writer = table("writer")
    if not all(isinstance(version, str) for version in writer.values()):
        raise CheckpointError("its writer holds something else than versions")
    shared = {}
    for name, others in (table("shared") if "shared" in metadata else {}).items():
        if name not in tensors or not isinstance(others, list) or not all(isinstance(o, str) for o in others):
            raise CheckpointError(f"shared[{shown(name)}] is no list of names of a tensor")
        shared[name] = frozenset(others)
    return Checkpoint(config, layers, saved, writer, shared)


def _mark(base: Any, path: str) -> Fingerprint:
    """Fingerprint from JSON, in which ``true`` is an integer and NaN a number."""
    shape, norm, projections = base["shape"], base["norm"], base["projections"]
    numbers = [norm, *projections]
    if not all(type(length) is int and length > 0 for length in shape) or len(shape) != 2:
        raise CheckpointError(f"layer {shown(path)}: its fingerprint has no shape (d, n)")
    if not all(type(x) in (int, float) and math.isfinite(x) for x in numbers) or norm < 0:
        raise CheckpointError(f"layer {shown(path)}: its fingerprint holds {shown(numbers)}")
    return Fingerprint((shape[0], shape[1]), float(norm), tuple(float(x) for x in projections))


def _check_places(layers: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Check that no layer, and no module saved whole, is or lies within another one that is saved whole."""
    outer: str | None = None
    # What lies within a module follows it in this order; to list all that a path lies within would take the square
    # of its length.
    for path in sorted({*layers, *saved}, key=lambda path: path.replace(".", "\0")):
        if path in layers and path in saved:
            outer = path
        elif outer is None or not path.startswith(f"{outer}." if outer else ""):
            outer = path if path in saved else outer
            continue
        raise CheckpointError(
            f"{shown(path)} is or lies within {shown(outer)}, which it holds as a whole besides"
        )


def _check_layer(layer: StoredLayer, path: str) -> None:
    name = f"layer {shown(path)}"
    for key, tensor in layer.tensors().items():
        kind = {"labels": "uint", "ranks": "uint", "active": "bool"}.get(key, "")
        if not (tensor.dtype.startswith(kind) if kind else tensor.dtype in _EXPONENTS):
            raise CheckpointError(f"{name}: {key} has dtype {tensor.dtype}")
    factors = layer.outline()
    check_factors(factors, shape=layer.base.shape, name=name)
    # Which `attach` keeps to. Without it, a file of a few kilobytes asks for products of any size.
    K, n, q = factors.ranks.shape[0], factors.labels.shape[0], factors.B.shape[1]
    _, d, P = factors.A.shape
    r = factors.C.shape[0]
    if max(K, q, r) > n or (layer.A is not None and d < P):
        raise CheckpointError(f"{name}: K = {K}, q = {q}, r = {r} or P = {P} is more than ({d}, {n}) allows")
    for key, tensor in layer.tensors().items():
        if not tensor.is_finite():
            raise CheckpointError(
                f"{name}: {key} holds NaN or infinity: the training diverged; take a file from before"
            )


def _checksum(tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> str:
    """Checksum of all that a file holds, but itself."""
    digest = hashlib.sha256()
    described = {name: value for name, value in metadata.items() if name != "checksum"}
    digest.update(json.dumps(described, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, tensor.dtype, list(tensor.shape)]).encode())
        digest.update(tensor.data)
    return f"sha256:{digest.hexdigest()}"


def _serialize(tensors: Mapping[str, StoredTensor], metadata: dict[str, str]) -> bytes:
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


def _deserialize(content: bytes) -> list[tuple[str, dict[str, Any]]]:
    try:
        entries: list[tuple[str, dict[str, Any]]] = safetensors.deserialize(content)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"it is truncated or damaged ({short(error)}); take a fresh copy") from error
    return entries


def _stored_tensors(entries: list[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, StoredTensor]]:
    """Turn the library's buffers into bytes one by one, and let go of each: all of them twice would be too much."""
    while entries:
        name, entry = entries.pop()
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(
                f"tensor {shown(name)} has dtype {entry['dtype']}, which no adapter file has"
            )
        dtype, _ = _DTYPES[entry["dtype"]]
        tensor = StoredTensor(dtype, tuple(entry["shape"]), bytes(entry.pop("data")))
        if dtype == "bool" and np.any(np.frombuffer(tensor.data, dtype=np.uint8) > 1):
            raise CheckpointError(f"tensor {shown(name)} holds booleans that are neither 0 nor 1")
        yield name, tensor


# ---- writing ---------------------------------------------------------------------------------------


def _replace(path: Path, content: bytes) -> None:
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
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
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


def _remove_stale(path: Path) -> None:
    """Remove temporary files of this path whose writers are dead: nobody holds the lock any more."""
    if fcntl is None:
        return
    ours = re.compile(re.escape(f".{path.name}.") + r"\d+-[0-9a-f]{8}\.tmp")
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
