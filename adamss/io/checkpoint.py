"""The adapter file: one safetensors file that any framework can read, on any device and in any dtype.

A file holds these tensors:

- for each layer, under its module path, ``C``, ``labels``, ``ranks``, ``active`` and either ``M`` (portable form) or
  ``A`` and ``B`` (training form, from which training can resume);
- all tensors of ``modules_to_save``;
- for each embedding of ``trained_tokens``, under its path, its trained ``rows``. Their ids are in the config.

The metadata hold the format and its version, the config, the versions of the writer, a fingerprint of each base
weight, and a checksum. Segmentation and mask are read from the file and never computed again. This module works on
bytes and NumPy arrays only. A file may be hostile: see `adamss.io.reader`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from adamss import core
from adamss.backend.tensors import EXPONENTS, StoredTensor, join_path
from adamss.backend.views import View
from adamss.config import AdamssConfig, shown
from adamss.core import Factors, check_factors, contract
from adamss.core.factors import outline
from adamss.core.fingerprint import Fingerprint
from adamss.errors import AdamssError, CheckpointError, CheckpointNotFoundError
from adamss.io import reader, writer
from adamss.io.reader import MALFORMED, MODULES, short

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "READABLE_VERSIONS",
    "Checkpoint",
    "StoredLayer",
    "is_adapter",
    "read",
    "write",
]

FORMAT = "adamss"
FORMAT_VERSION = 1
READABLE_VERSIONS = (1,)

LINEAR = View(rows=(1,), columns=(0,))
"""View of the weight of a linear layer, which a file implies if it states none."""

ROWS = "rows"
"""Name of the tensor of trained rows, under the path of their embedding."""

LARGEST_VIEW = 16
"""Largest number of axes that a weight may have."""


@dataclass(frozen=True)
class StoredLayer:
    """One adapted layer of a file.

    Attributes
    ----------
    C, labels, ranks, active
        Arrays as in `adamss.core.Factors`. Labels and ranks have the smallest unsigned integer dtype that fits.
    base
        Fingerprint of the base weight.
    M
        Product ``M = [A_1 B_1 ... A_K B_K]`` of shape (d, q) or (d + 1, q) in a portable file, else None.
    A, B
        Factors A and B in a training file, else None.
    rank
        R with which the layer was attached, or None if it is that of the config.
    blocks
        Number of matrices that the weight consists of, such as one for each expert.
    view
        View of the weight as a matrix, or None if it is that of a linear layer. It serves readers that do not have
        the model.
    """

    C: StoredTensor
    labels: StoredTensor
    ranks: StoredTensor
    active: StoredTensor
    base: Fingerprint
    M: StoredTensor | None = None
    A: StoredTensor | None = None
    B: StoredTensor | None = None
    rank: int | None = None
    blocks: int = 1
    view: View | None = None

    TENSORS = ("C", "labels", "ranks", "active", "M", "A", "B")

    def tensors(self) -> dict[str, StoredTensor]:
        """Return the tensors that the layer has, by name."""
        named = {name: getattr(self, name) for name in self.TENSORS}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def directions(self) -> np.ndarray[Any, Any]:
        """Return M of shape (d, q) as a NumPy array. For a training file, it is computed."""
        return self.M.numpy() if self.M is not None else np.asarray(contract(self.factors()))

    def split(self, count: int) -> list[StoredLayer]:
        """Return one layer for each of the `count` matrices, of equal width, that lie side by side in the weight."""
        if count == 1:
            return [self]
        labels, ranks, active = (tensor.numpy() for tensor in (self.labels, self.ranks, self.active))
        if self.M is not None:
            M = self.M.numpy()
            A, B = np.broadcast_to(M, (count, *M.shape)), M
        else:
            assert self.A is not None and self.B is not None
            A, B = self.A.numpy(), self.B.numpy()
        found = []
        for part in core.split(Factors(A, B, self.C.numpy(), labels, ranks, active), count):
            arrays = {name: getattr(part, name) for name in ("C", "labels", "ranks", "active")}
            arrays |= {"M": part.B} if self.M is not None else {"A": part.A, "B": part.B}
            own: dict[str, Any] = {name: StoredTensor.of(array) for name, array in arrays.items()}
            found.append(StoredLayer(base=self.base, rank=self.rank, **own))
        return found

    def outline(self) -> Factors:
        """Return factors with the shapes, labels, ranks and mask of this layer, whose A, B and C take no memory.

        With their help, sizes can be checked before anything is allocated, since a hostile file may give false sizes.
        """
        A, B, ranks = self.A, self.B, self.ranks.numpy()
        K, n = ranks.size, self.labels.shape[0] if self.labels.shape else 0
        if K % self.blocks or n % self.blocks:
            raise CheckpointError(
                f"a layer of {self.blocks} matrices has {K} subspaces and {n} columns in all"
            )
        if self.M is not None:
            P = self.M.shape[-1] if self.M.shape else 0
            if self.blocks > 1:  # the basis of each matrix is made of the directions of its own subspaces
                P = int(ranks.reshape(self.blocks, -1).sum(axis=1, dtype=np.int64).max(initial=0))
            P = min(P, *self.M.shape[:1])  # they span at most d dimensions
            shapes = (self.blocks, *self.M.shape[:-1], P), (P, *self.M.shape[-1:])
            A, B = (replace(self.M, shape=shape) for shape in shapes)
        if A is None or B is None:
            raise CheckpointError("a layer has neither M nor A and B")
        return outline(Factors(A, B, self.C, self.labels.numpy(), ranks, self.active.numpy()))

    def factors(self) -> Factors:
        """Return the factors as NumPy arrays. For a portable file, they have ``A = M`` and ``B = I``."""
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
    """Content of an adapter file.

    Attributes
    ----------
    config
        Settings with which the adapter was attached.
    layers
        Adapted layers by module path.
    saved
        Tensors of ``modules_to_save``, by module path and then by name within the module.
    writer
        Versions of the libraries that wrote the file, by name.
    shared
        Other names under which a tensor appears in the model (tied embeddings), by the name of the tensor. It covers
        the tensors in `saved` and the weights of the embeddings in `tokens`, and names include the module path. An
        empty set means that the tensor is known to be untied. A missing tensor means that this is unknown.
    tokens
        Trained rows (k, E) by path of the embedding. Their ids are in ``config.trained_tokens`` under the same paths.
    """

    config: AdamssConfig
    layers: Mapping[str, StoredLayer]
    saved: Mapping[str, Mapping[str, StoredTensor]] = field(default_factory=dict)
    writer: Mapping[str, str] = field(default_factory=dict)
    shared: Mapping[str, frozenset[str]] = field(default_factory=dict)
    tokens: Mapping[str, StoredTensor] = field(default_factory=dict)


def write(path: str | os.PathLike[str], checkpoint: Checkpoint, *, modules: int = MODULES) -> None:
    """Write an adapter file atomically: see `adamss.io.writer.replace`.

    Parameters
    ----------
    path
        Path of the file.
    checkpoint
        Content of the file.
    modules
        Number of modules of the model, as in `read`.

    Raises
    ------
    CheckpointError
        If two tensors would have the same name, if `read` would refuse the file because its names are too long, or if
        the path is a device or a pipe.
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
    for path_of_rows, rows in checkpoint.tokens.items():
        add(join_path(path_of_rows, ROWS), rows)

    bases = {
        layer_path: {
            "shape": list(layer.base.shape),
            "norm": layer.base.norm,
            "projections": list(layer.base.projections),
            **({"noise": layer.base.noise} if layer.base.noise else {}),
        }
        | _form_of(layer)
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
    content = writer.serialize(tensors, metadata | {"checksum": _checksum(tensors, metadata)})
    length = int.from_bytes(content[:8], "little")
    try:
        reader.check_json(content[8 : 8 + length], reader.room_for(len(content), modules))
    except CheckpointError as error:
        raise CheckpointError(
            f"{short(error)}, so that it could not be loaded: give the modules shorter names"
        ) from None
    writer.replace(Path(path), content)


def read(path: str | os.PathLike[str], *, modules: int = MODULES) -> Checkpoint:
    """Read an adapter file and check everything that can be checked without the model.

    Parameters
    ----------
    path
        Path of the file.
    modules
        Number of modules of the model. It bounds the number of layers, and so the memory that the header may take.

    Returns
    -------
    Checkpoint
        Content of the file. The factors are finite, since a file of a diverged training is refused. Tensors of
        ``modules_to_save`` may hold NaN and infinity, as masks in the buffers of a module do.

    Raises
    ------
    CheckpointNotFoundError
        If there is no such file.
    CheckpointError
        If the file is truncated, damaged, not written by `adamss`, of a version that cannot be read, or if its
        factors hold NaN or infinity.
    """
    path = Path(path)
    if not path.is_file():
        where = "the path does not exist"
        if path.exists():
            where = "it is a folder" if path.is_dir() else "it is a device, pipe or socket"
        raise CheckpointNotFoundError(f"there is no adapter file {str(path)!r}: {where}")
    try:
        header, content = reader.contents(
            path, modules, check=lambda header: _check_version(_metadata(header))
        )
        room = reader.room_for(len(content), modules)
        metadata = _metadata(header)
        entries = reader.deserialize(content)
        # Free the bytes of the file, of which `entries` has its own copy.
        del content
        tensors = dict(reader.stored_tensors(entries))
        if _checksum(tensors, metadata) != metadata.get("checksum"):
            raise CheckpointError("its checksum does not fit its content: it is damaged; take a fresh copy")
        return _assemble(metadata, tensors, room)
    except CheckpointError as error:
        raise CheckpointError(f"{str(path)!r}: {short(error)}") from error
    except (AdamssError, *MALFORMED) as error:
        raise CheckpointError(f"{str(path)!r} is not a valid adapter file: {short(error)}") from error


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Return whether a file says that it is an adapter file. It may still be damaged."""
    if not os.path.isfile(path):
        return False  # reading from a pipe would wait for ever
    try:
        with open(path, "rb") as file:
            header, _, _ = reader.read_header(file)
        return bool(_metadata(header))
    except (OSError, CheckpointError):
        return False


def _metadata(header: dict[str, Any]) -> dict[str, str]:
    """Return the metadata of a header. Check that they are those of an adapter file."""
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise CheckpointError("it was not written by adamss.save (its metadata do not say format: adamss)")
    return metadata


def _check_version(metadata: Mapping[str, str]) -> None:
    version = metadata.get("format_version")
    if version not in [str(readable) for readable in READABLE_VERSIONS]:
        raise CheckpointError(
            f"it has format version {shown(version)}; this adamss reads {', '.join(map(str, READABLE_VERSIONS))}: "
            "install a newer adamss"
        )


def _assemble(metadata: Mapping[str, str], tensors: dict[str, StoredTensor], room: int) -> Checkpoint:
    def table(name: str) -> dict[str, Any]:
        found = reader.parse(metadata[name].encode(), room)
        if not isinstance(found, dict):
            raise CheckpointError(f"its {name} is no dictionary")
        return found

    config = AdamssConfig.from_file(table("config"))
    left = dict(tensors)
    layers = {}
    for path, base in table("layers").items():
        present: dict[str, Any] = {
            name: left.pop(join_path(path, name))
            for name in StoredLayer.TENSORS
            if join_path(path, name) in left
        }
        missing = {"C", "labels", "ranks", "active"} - present.keys()
        if missing or ("M" in present) == ("A" in present) or ("A" in present) != ("B" in present):
            raise CheckpointError(
                f"layer {shown(path)} lacks tensors; it has {', '.join(sorted(present)) or 'none'}"
            )
        layer = StoredLayer(base=_mark(base, path), **present, **_form(base, path))
        _check_layer(layer, path)
        layers[path] = layer
    saved = {}
    for path, names in table("modules_to_save").items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"modules_to_save[{shown(path)}] is no list of names")
        saved[path] = {name: left.pop(join_path(path, name)) for name in names}
    tokens = _rows_of(config, left, layers)
    _check_places({**layers, **tokens}, saved)
    if left:
        raise CheckpointError(
            f"it holds tensors that belong to no layer: {', '.join(map(shown, sorted(left)[:3]))}"
        )
    if not layers:
        raise CheckpointError("it adapts no layer")
    writer = table("writer")
    if not all(isinstance(version, str) for version in writer.values()):
        raise CheckpointError("its writer holds something else than versions")
    shared, named = {}, {*tensors, *(join_path(path, "weight") for path in tokens)}
    for name, others in (table("shared") if "shared" in metadata else {}).items():
        if name not in named or not isinstance(others, list) or not all(isinstance(o, str) for o in others):
            raise CheckpointError(f"shared[{shown(name)}] is no list of names of a tensor")
        shared[name] = frozenset(others)
    return Checkpoint(config, layers, saved, writer, shared, tokens)


def _rows_of(
    config: AdamssConfig, left: dict[str, StoredTensor], layers: Mapping[str, Any]
) -> dict[str, StoredTensor]:
    """Remove the rows of ``trained_tokens`` from the tensors `left`, check them, and return them by path.

    The config has checked the ids.
    """
    asked: Any = config.trained_tokens or {}
    if not isinstance(asked, Mapping):
        raise CheckpointError("its trained_tokens do not name their embeddings")
    found = {}
    for path, ids in asked.items():
        found[path] = rows = left.pop(join_path(path, ROWS))
        if path in layers:
            raise CheckpointError(f"{shown(path)} is an adapted layer, and has trained_tokens too")
        if rows.dtype not in EXPONENTS or len(rows.shape) != 2 or rows.shape[0] != len(ids):
            raise CheckpointError(
                f"the rows of {len(ids)} trained_tokens of {shown(path)} are {rows.dtype} {rows.shape}"
            )
        if not rows.is_finite():
            raise CheckpointError(
                f"the trained_tokens of {shown(path)} hold NaN or infinity: the training diverged; take a file from "
                "before"
            )
    return found


def _mark(base: Any, path: str) -> Fingerprint:
    """Return a fingerprint from parsed JSON.

    Types and values are checked, since Python parses NaN as a number and treats ``true`` as an integer.
    """
    shape, norm, projections, noise = base["shape"], base["norm"], base["projections"], base.get("noise", 0.0)
    numbers = [norm, *projections, noise]
    if not all(type(length) is int and length > 0 for length in shape) or len(shape) != 2:
        raise CheckpointError(f"layer {shown(path)}: its fingerprint has no shape (d, n)")
    if (
        not all(type(x) in (int, float) and math.isfinite(x) for x in numbers)
        or norm < 0
        or not 0 <= noise <= 1
    ):
        raise CheckpointError(f"layer {shown(path)}: its fingerprint holds {shown(numbers)}")
    return Fingerprint((shape[0], shape[1]), float(norm), tuple(float(x) for x in projections), float(noise))


def _form_of(layer: StoredLayer) -> dict[str, Any]:
    """Return the JSON entries of a layer for a rank, blocks and a view that differ from the defaults."""
    form: dict[str, Any] = {} if layer.rank is None else {"rank": layer.rank}
    if layer.blocks > 1:
        form["blocks"] = layer.blocks
    if layer.view is not None and layer.view != LINEAR:
        form["view"] = [list(layer.view.rows), list(layer.view.columns)]
    return form


def _form(base: Any, path: str) -> dict[str, Any]:
    """Return rank, blocks and view from the JSON entries of a layer, the inverse of `_form_of`."""

    def is_count(value: Any) -> bool:
        return type(value) is int and 0 < value < 1 << 31

    rank, blocks, view = base.get("rank"), base.get("blocks", 1), base.get("view", [[1], [0]])
    if not is_count(blocks) or not (rank is None or is_count(rank)):
        raise CheckpointError(
            f"layer {shown(path)}: rank = {shown(rank)} or blocks = {shown(blocks)} is no count"
        )
    axes = [axis for part in view for axis in part]
    if len(view) != 2 or len(axes) > LARGEST_VIEW or not all(type(axis) is int for axis in axes):
        raise CheckpointError(f"layer {shown(path)}: {shown(view)} is no view")
    if sorted(axes) != list(range(len(axes))):
        raise CheckpointError(f"layer {shown(path)}: {shown(view)} does not name every axis once")
    return {"rank": rank, "blocks": blocks, "view": View(*map(tuple, view))}


def _check_places(layers: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Check that no layer, and no module to save, is or lies within another module to save."""
    outer: str | None = None
    # In this order, a module is followed by everything within it, so that one pass suffices. Listing all ancestors of
    # each path would take time quadratic in its length, which a hostile file could exploit.
    for path in sorted({*layers, *saved}, key=lambda path: path.replace(".", "\0")):
        if path in layers and path in saved:
            outer = path
        elif outer is None or not path.startswith(f"{outer}." if outer else ""):
            outer = path if path in saved else outer
            continue
        raise CheckpointError(
            f"{shown(path)} is or lies within {shown(outer)}, which the file also stores as a module to save"
        )


def _check_layer(layer: StoredLayer, path: str) -> None:
    name = f"layer {shown(path)}"
    for key, tensor in layer.tensors().items():
        kind = {"labels": "uint", "ranks": "uint", "active": "bool"}.get(key, "")
        if not (tensor.dtype.startswith(kind) if kind else tensor.dtype in EXPONENTS):
            raise CheckpointError(f"{name}: {key} has dtype {tensor.dtype}")
    factors = layer.outline()
    check_factors(factors, shape=layer.base.shape, name=name)
    # Factors made by `attach` satisfy these bounds. Without the check, a file of a few kilobytes could demand matrix
    # products of any size.
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
    """Return the checksum of all tensors and metadata of a file, except the checksum itself."""
    digest = hashlib.sha256()
    described = {name: value for name, value in metadata.items() if name != "checksum"}
    digest.update(json.dumps(described, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, tensor.dtype, list(tensor.shape)]).encode())
        digest.update(tensor.data)
    return f"sha256:{digest.hexdigest()}"
