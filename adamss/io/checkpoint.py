"""The adapter file: one safetensors file that any framework reads, on any device, in any dtype.

Per layer, under its module path: ``C``, ``labels``, ``ranks``, ``active`` and either ``M`` (portable) or ``A``
and ``B`` (training form, to resume from). Whole tensors of ``modules_to_save``. Of ``trained_tokens`` the ``rows`` of
each embedding, of the ids that the config has for its path. Metadata: format and
version, config, writer, a fingerprint of each base weight, and a checksum over all tensors. Segmentation
and mask come from the file and are never computed anew. This module knows bytes and NumPy arrays only.
A file may come from anyone: see `adamss.io.reader`.
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

__all__ = ["FORMAT", "FORMAT_VERSION", "READABLE_VERSIONS", "Checkpoint", "StoredLayer", "read", "write"]

FORMAT = "adamss"
FORMAT_VERSION = 1
READABLE_VERSIONS = (1,)

LINEAR = View(rows=(1,), columns=(0,))
"""How the weight of a linear layer is a matrix; a file that says nothing means this."""

ROWS = "rows"
"""Name, below the path of an embedding, of the rows that are trained."""

LARGEST_VIEW = 16
"""Axes of a weight."""


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
    rank
        R that the layer was attached with, where that is not the config's.
    blocks
        Matrices of which the weight consists, as of experts.
    view
        How the weight is a matrix, where it is not that of a linear layer; for readers without the model.
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
        """Return the tensors that there are, by name."""
        named = {name: getattr(self, name) for name in self.TENSORS}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def directions(self) -> np.ndarray[Any, Any]:
        """Return M (d, q) as a NumPy array, also of a training file."""
        return self.M.numpy() if self.M is not None else np.asarray(contract(self.factors()))

    def split(self, count: int) -> list[StoredLayer]:
        """Return the layers of `count` matrices of equally many columns that are one beside the other in this one."""
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
        """Return factors of the right shapes, labels, ranks and mask, whose A, B and C take no memory.

        A file that lies about its sizes must not make its reader allocate them.
        """
        A, B, ranks = self.A, self.B, self.ranks.numpy()
        K, n = ranks.size, self.labels.shape[0] if self.labels.shape else 0
        if K % self.blocks or n % self.blocks:
            raise CheckpointError(
                f"a layer of {self.blocks} matrices has {K} subspaces and {n} columns in all"
            )
        if self.M is not None:
            P = self.M.shape[-1] if self.M.shape else 0
            if self.blocks > 1:  # each has the directions of its own subspaces for a basis
                P = int(ranks.reshape(self.blocks, -1).sum(axis=1, dtype=np.int64).max(initial=0))
            P = min(P, *self.M.shape[:1])  # which span d dimensions at most
            shapes = (self.blocks, *self.M.shape[:-1], P), (P, *self.M.shape[-1:])
            A, B = (replace(self.M, shape=shape) for shape in shapes)
        if A is None or B is None:
            raise CheckpointError("a layer has neither M nor A and B")
        return outline(Factors(A, B, self.C, self.labels.numpy(), ranks, self.active.numpy()))

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
        in the model (tied embeddings): none, or unknown if the tensor is missing here. Likewise of the weights of
        embeddings in `tokens`.
    tokens
        Trained rows (k, E) by path of the embedding; ``config.trained_tokens`` has their ids by the same paths.
    """

    config: AdamssConfig
    layers: Mapping[str, StoredLayer]
    saved: Mapping[str, Mapping[str, StoredTensor]] = field(default_factory=dict)
    writer: Mapping[str, str] = field(default_factory=dict)
    shared: Mapping[str, frozenset[str]] = field(default_factory=dict)
    tokens: Mapping[str, StoredTensor] = field(default_factory=dict)


def write(path: str | os.PathLike[str], checkpoint: Checkpoint, *, modules: int = MODULES) -> None:
    """Write a file, whole or not at all: see `adamss.io.writer.replace`.

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
        header, content = reader.contents(
            path, modules, check=lambda header: _check_version(_metadata(header))
        )
        room = reader.room_for(len(content), modules)
        metadata = _metadata(header)
        entries = reader.deserialize(content)
        # From here on there are only the tensors, once.
        del content
        tensors = dict(reader.stored_tensors(entries))
        if _checksum(tensors, metadata) != metadata.get("checksum"):
            raise CheckpointError("its checksum does not fit its content: it is damaged; take a fresh copy")
        return _assemble(metadata, tensors, room)
    except CheckpointError as error:
        raise CheckpointError(f"{str(path)!r}: {short(error)}") from error
    except (AdamssError, *MALFORMED) as error:
        raise CheckpointError(f"{str(path)!r} is not a valid adapter file: {short(error)}") from error


def _metadata(header: dict[str, Any]) -> dict[str, str]:
    """Metadata in a header of adamss."""
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
    """Take the rows of ``trained_tokens`` out of the tensors of a file; the ids are checked by the config."""
    asked: Any = config.trained_tokens or {}
    if not isinstance(asked, Mapping):
        raise CheckpointError("its trained_tokens do not name their embeddings")
    found = {}
    for path, ids in asked.items():
        found[path] = rows = left.pop(join_path(path, ROWS))
        if path in layers:
            raise CheckpointError(f"{shown(path)} is a layer that it adapts, and has trained_tokens besides")
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
    """Fingerprint from JSON, in which ``true`` is an integer and NaN a number."""
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
    """Return what a file says of a layer that is no plain linear one, or has a rank of its own."""
    form: dict[str, Any] = {} if layer.rank is None else {"rank": layer.rank}
    if layer.blocks > 1:
        form["blocks"] = layer.blocks
    if layer.view is not None and layer.view != LINEAR:
        form["view"] = [list(layer.view.rows), list(layer.view.columns)]
    return form


def _form(base: Any, path: str) -> dict[str, Any]:
    """Undo `_form_of`."""

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
        if not (tensor.dtype.startswith(kind) if kind else tensor.dtype in EXPONENTS):
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
