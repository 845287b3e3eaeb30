"""The adapter file: one safetensors file that any framework reads, on any device, in any dtype.

Per layer, under its module path: ``C``, ``labels``, ``ranks``, ``active`` and either ``M`` (portable) or ``A``
and ``B`` (training form, to resume from). Whole tensors of ``modules_to_save``. Metadata: format and
version, config, writer, a fingerprint of each base weight, and a checksum over all tensors. Segmentation
and mask come from the file and are never computed anew. This module knows bytes and NumPy arrays only.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from adamss.config import AdamssConfig
from adamss.core import Factors, check_factors
from adamss.core._array import Array, as_working_precision, device, namespace
from adamss.errors import AdamssError, CheckpointError, CheckpointNotFoundError

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
    "write",
    "write_tensors",
    "write_text",
]

FORMAT = "adamss"
FORMAT_VERSION = 1
READABLE_VERSIONS = (1,)

# What metadata of the wrong structure, or numbers out of range, can raise on their way into our types.
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError)

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
        """Return the largest difference of norm or projections, relative to the norm; infinity for another shape."""
        if self.shape != other.shape or len(self.projections) != len(other.projections):
            return float("inf")
        ours, theirs = (self.norm, *self.projections), (other.norm, *other.projections)
        largest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        return largest / self.norm if self.norm else largest


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
        """Return factors of the right shapes, labels, ranks and mask, whose B takes no memory.

        A file that lies about its sizes must not make its reader allocate them.
        """
        if self.M is None:
            return self.factors()
        q = self.M.shape[-1]
        B = np.broadcast_to(np.zeros((), dtype=np.float32), (q, q))
        labels, ranks = self.labels.numpy().astype(np.int64), self.ranks.numpy().astype(np.int64)
        return Factors(self.M.numpy()[None, ...], B, self.C.numpy(), labels, ranks, self.active.numpy())

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
    """

    config: AdamssConfig
    layers: Mapping[str, StoredLayer]
    saved: Mapping[str, Mapping[str, StoredTensor]] = field(default_factory=dict)
    writer: Mapping[str, str] = field(default_factory=dict)


def join_path(path: str, name: str) -> str:
    """Join a module path and a name below it; the model itself has the empty path."""
    return f"{path}.{name}" if path else name


def write(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write a file: to a temporary one in the same folder, then renamed, so that a crash leaves the old one.

    Parameters
    ----------
    path
        Where to.
    checkpoint
        What to write.

    Raises
    ------
    CheckpointError
        If two tensors would have one name.
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
        "checksum": _checksum(tensors),
    }
    write_tensors(path, tensors, metadata)


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
    return _deserialize(Path(path).read_bytes())


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a file and check all that can be checked without the model.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    Checkpoint
        Its content.

    Raises
    ------
    CheckpointNotFoundError
        If there is no such file.
    CheckpointError
        If it is truncated, damaged, no file of `adamss`, or of a version that this one cannot read.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointNotFoundError(f"there is no adapter file {str(path)!r}")
    content = path.read_bytes()
    try:
        metadata = _metadata(content)
        _check_version(metadata)
        tensors = _deserialize(content)
        if _checksum(tensors) != metadata.get("checksum"):
            raise CheckpointError("its checksum does not fit its tensors: it is damaged; take a fresh copy")
        return _assemble(metadata, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{str(path)!r}: {error}") from error
    except (AdamssError, *MALFORMED) as error:
        raise CheckpointError(f"{str(path)!r} is not a valid adapter file: {error}") from error


def _metadata(content: bytes) -> dict[str, str]:
    """Metadata of a safetensors file: an 8-byte length, then JSON of that length.

    The library reads metadata from a path only; the bytes already read must not be looked up twice.
    """
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8:
        raise CheckpointError("it is truncated or no safetensors file")
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise CheckpointError("it is damaged or no safetensors file") from error
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise CheckpointError("it was not written by adamss.save (its metadata do not say format: adamss)")
    return metadata


def _check_version(metadata: Mapping[str, str]) -> None:
    version = metadata.get("format_version")
    if version not in [str(readable) for readable in READABLE_VERSIONS]:
        raise CheckpointError(
            f"it has format version {version!r}; this adamss reads {', '.join(map(str, READABLE_VERSIONS))}: "
            "install a newer adamss"
        )


def _assemble(metadata: Mapping[str, str], tensors: dict[str, StoredTensor]) -> Checkpoint:
    config = AdamssConfig.from_dict(json.loads(metadata["config"]))
    bases: dict[str, Any] = json.loads(metadata["layers"])
    saved_names: dict[str, list[str]] = json.loads(metadata["modules_to_save"])
    left = dict(tensors)
    layers = {}
    for path, base in bases.items():
        d, n = base["shape"]
        mark = Fingerprint(
            (int(d), int(n)), float(base["norm"]), tuple(float(p) for p in base["projections"])
        )
        present = {
            name: left.pop(join_path(path, name))
            for name in StoredLayer.TENSORS
            if join_path(path, name) in left
        }
        missing = {"C", "labels", "ranks", "active"} - present.keys()
        if missing or ("M" in present) == ("A" in present) or ("A" in present) != ("B" in present):
            raise CheckpointError(
                f"layer {path!r} lacks tensors; it has {', '.join(sorted(present)) or 'none'}"
            )
        layer = StoredLayer(base=mark, **present)
        _check_layer(layer, path)
        layers[path] = layer
    saved = {
        path: {name: left.pop(join_path(path, name)) for name in names} for path, names in saved_names.items()
    }
    if left:
        raise CheckpointError(f"it holds tensors that belong to no layer: {', '.join(sorted(left)[:3])}")
    if not layers:
        raise CheckpointError("it adapts no layer")
    writer = {str(name): str(version) for name, version in json.loads(metadata["writer"]).items()}
    return Checkpoint(config, layers, saved, writer)


def _check_layer(layer: StoredLayer, path: str) -> None:
    for name, tensor in layer.tensors().items():
        kind = {"labels": "uint", "ranks": "uint", "active": "bool"}.get(name, "")
        fits = (
            tensor.dtype.startswith(kind)
            if kind
            else tensor.dtype in ("float64", "float32", "float16", "bfloat16")
        )
        if not fits:
            raise CheckpointError(f"layer {path!r}: {name} has dtype {tensor.dtype}")
    check_factors(layer.outline(), shape=layer.base.shape, name=f"layer {path!r}")


def _checksum(tensors: Mapping[str, StoredTensor]) -> str:
    digest = hashlib.sha256()
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
    return bytes(safetensors.serialize(specs, metadata))


def _deserialize(content: bytes) -> dict[str, StoredTensor]:
    try:
        entries = safetensors.deserialize(content)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"it is truncated or damaged ({error}); take a fresh copy") from error
    tensors = {}
    for name, entry in entries:
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(f"tensor {name!r} has dtype {entry['dtype']}, which no adapter file has")
        dtype, _ = _DTYPES[entry["dtype"]]
        tensors[name] = StoredTensor(dtype, tuple(entry["shape"]), bytes(entry["data"]))
    return tensors


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
