"""Weights of a model in one safetensors file or in the shards of a folder, read one tensor at a time.

Only the headers are read when the files are opened, so that a checkpoint may be far larger than the memory. A file
may be hostile, so that offsets, shapes and dtypes are checked before they are used to read anything.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from adamss.backend.tensors import StoredTensor, itemsize
from adamss.config import shown
from adamss.errors import CheckpointError, CheckpointNotFoundError
from adamss.io.folder import ADAPTER_FILE
from adamss.io.peft_folder import WEIGHTS_FILE
from adamss.io.reader import DTYPES, MALFORMED, read_header, short

__all__ = ["Spelling", "WeightEntry", "WeightFiles", "match_names", "weight_name"]

INDEX_ENDING = ".safetensors.index.json"
ENDING = ".safetensors"
USUAL = ("model", "diffusion_pytorch_model")
"""Stems of the weight files of transformers and diffusers. A folder may also hold copies under other names, which are
not read then."""

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
LONGEST_INDEX = 100_000_000
"""Largest size of an index of shards in bytes."""


class WeightEntry(NamedTuple):
    """Location of a tensor in a file.

    Attributes
    ----------
    dtype
        Name of the dtype as in `StoredTensor.dtype`, or the name in the file if `StoredTensor` has no such dtype
        (``"F8_E4M3"``).
    shape
        Lengths of the axes.
    file
        Path of the file.
    start
        Offset of the first byte of the tensor in the file.
    size
        Number of bytes of the tensor.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int


class WeightFiles(Mapping[str, WeightEntry]):
    """The tensors of a model by name. A tensor is read only when `read` is called for it.

    Parameters
    ----------
    path
        A safetensors file, or a folder with ``model.safetensors``, with shards and their index, or with any
        safetensors files whose tensors have distinct names.

    Raises
    ------
    CheckpointNotFoundError
        If there is no such file or folder, if the folder has no weights, or if a shard is missing.
    CheckpointError
        If a file is damaged or not a safetensors file, or if two files have a tensor of the same name.
    OSError
        If a file cannot be read.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from adamss.offline import WeightFiles
    >>> from safetensors.numpy import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"query.weight": np.ones((2, 3), np.float32)}, f"{folder}/model.safetensors")
    ...     files = WeightFiles(folder)
    ...     files["query.weight"].shape, files.read("query.weight").numpy().tolist()
    ((2, 3), [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.files = _files(self.path)
        self._entries: dict[str, WeightEntry] = {}
        for file in self.files:
            for name, entry in _header(file).items():
                if name in self._entries:
                    raise CheckpointError(
                        f"{str(file)!r} and {self._entries[name].file.name!r} both have the tensor {shown(name)}; "
                        "name the file of the model itself"
                    )
                self._entries[name] = entry

    def __getitem__(self, name: str) -> WeightEntry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, name: str) -> StoredTensor:
        """Read a tensor and return it.

        Raises
        ------
        CheckpointError
            If `StoredTensor` has no such dtype, or the file was cut short since it was opened.
        """
        entry = self[name]
        if entry.dtype not in DTYPES.values():
            raise CheckpointError(
                f"{shown(name)} has dtype {entry.dtype}, a quantised format that files do not describe: load "
                "the model in its framework, where adamss takes quantised layers"
            )
        with open(entry.file, "rb") as file:
            file.seek(entry.start)
            data = file.read(entry.size)
        if len(data) != entry.size:
            raise CheckpointError(f"{str(entry.file)!r} was cut short while it was read")
        return StoredTensor(entry.dtype, entry.shape, data)


class Spelling(NamedTuple):
    """How the names of a trained model are spelled in the files of its base model.

    A model with a head and the bare model differ in a prefix: ``bert.encoder.layer.0`` and ``encoder.layer.0``.

    Attributes
    ----------
    ours
        Prefix of the module paths of the trained model.
    theirs
        Prefix that replaces it in the files. At least one of the two is empty.
    names
        Mapping whose keys are the names of the tensors in the files.
    """

    ours: str
    theirs: str
    names: Mapping[str, Any]

    def in_files(self, name: str) -> str:
        """Return a name of the trained model with the prefix of the files."""
        return self.theirs + name.removeprefix(self.ours) if name.startswith(self.ours) else name

    def in_model(self, name: str) -> str:
        """Return a name in the files with the prefix of the trained model."""
        return self.ours + name.removeprefix(self.theirs)

    def tensor(self, name: str) -> str | None:
        """Return the name in the files of a tensor of the trained model, or None if the files lack it."""
        return next((spelled for spelled in (self.in_files(name), name) if spelled in self.names), None)

    def weight(self, path: str) -> str:
        """Return the name in the files of the weight of an adapted layer."""
        name = weight_name(self.in_files(path), self.names)
        assert name is not None  # `match_names` has found the weights of all layers
        return name


def weight_name(path: str, names: Mapping[str, Any]) -> str | None:
    """Return the name of the weight of a module, or the path itself if it is the name of a tensor, or else None."""
    return next((name for name in (f"{path}.weight" if path else "weight", path) if name in names), None)


def match_names(paths: Iterable[str], names: Mapping[str, Any]) -> Spelling:
    """Find the layers of an adapter in the files of its base model.

    Parameters
    ----------
    paths
        Module paths of the adapter.
    names
        Mapping whose keys are the names of the tensors in the files.

    Returns
    -------
    Spelling
        Prefixes by which the names differ.

    Raises
    ------
    CheckpointError
        If no prefix fits all paths, or several do.

    Examples
    --------
    >>> match_names(["bert.layer.0.query"], {"layer.0.query.weight": None}).in_files("bert.layer.1.query")
    'layer.1.query'
    """
    paths = list(paths)
    if all(weight_name(path, names) for path in paths):
        return Spelling("", "", names)
    found = []
    first = next(path for path in paths if not weight_name(path, names))
    parts = first.split(".")
    for cut in range(1, len(parts)):
        ours = ".".join(parts[:cut]) + "."
        if all(path.startswith(ours) and weight_name(path.removeprefix(ours), names) for path in paths):
            found.append((ours, ""))
    endings = (f".{first}.weight", f".{first}")
    for name in names:
        ending = next((ending for ending in endings if name.endswith(ending)), None)
        theirs = None if ending is None else name.removesuffix(ending) + "."
        if theirs is not None and all(weight_name(theirs + path, names) for path in paths):
            found.append(("", theirs))
    if len(found) == 1:
        return Spelling(*found[0], names)
    if found:
        places = " and ".join(sorted({theirs or ours for ours, theirs in found})[:2])
        raise CheckpointError(
            f"its layers fit several places of the base model ({places}): name the file of one"
        )
    missing = next((path for path in paths if not weight_name(path, names)), first)
    raise CheckpointError(
        f"the base model has no weight {shown(missing)} that the adapter changes: it was trained on another model, "
        "or its layers have other names in its files"
    )


def _files(path: Path) -> tuple[Path, ...]:
    """Return the weight files at a path.

    In a folder, a whole file with a usual name comes first, then the shards of an index, then all other files.
    """
    if not path.is_dir():
        if not path.exists():
            raise CheckpointNotFoundError(f"there is no file or folder {str(path)!r}")
        if not path.is_file():
            raise CheckpointError(f"{str(path)!r} is a device, pipe or socket")
        return (path,)
    indices = sorted(path.glob(f"*{INDEX_ENDING}"))
    usual = [index for index in indices if index.name.removesuffix(INDEX_ENDING) in USUAL]
    whole = [path / f"{name}{ENDING}" for name in USUAL if (path / f"{name}{ENDING}").is_file()]
    if not whole and len(usual or indices) == 1:
        return _shards((usual or indices)[0])
    if whole:
        return (whole[0],)
    files = [
        file for file in sorted(path.glob(f"*{ENDING}")) if file.name not in (ADAPTER_FILE, WEIGHTS_FILE)
    ]
    if not files:
        pickled = sorted(file.name for file in path.iterdir() if file.suffix in PICKLED)
        what = (
            f"its weights are pickled ({pickled[0]}), which may run anything when read; convert them with "
            "model.save_pretrained"
            if pickled
            else "it has no .safetensors file of a model"
        )
        raise CheckpointNotFoundError(f"the folder {str(path)!r} has no weights that can be read: {what}")
    return tuple(files)


def _shards(index: Path) -> tuple[Path, ...]:
    """Return the files that an index of shards names. Check that all of them are in its folder."""
    if index.stat().st_size > LONGEST_INDEX:
        raise CheckpointError(f"{str(index)!r} is longer than that of any model")
    try:
        names = sorted({*json.loads(index.read_bytes())["weight_map"].values()})
        files = tuple(index.with_name(name) for name in names)  # an error for a name outside of the folder
    except MALFORMED as error:
        raise CheckpointError(f"{str(index)!r} is damaged or no index of shards: {short(error)}") from error
    if not files:
        raise CheckpointError(f"{str(index)!r} names no files")
    for file in files:
        if not file.is_file():
            raise CheckpointNotFoundError(f"the shard {str(file)!r} is missing: copy the whole folder")
    return files


def _header(path: Path) -> dict[str, WeightEntry]:
    """Return the locations of the tensors of a safetensors file by name."""
    try:
        with open(path, "rb") as file:
            header, begin, size = read_header(file)
        return {
            name: _entry(name, entry, path, begin, size)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except CheckpointError as error:
        raise CheckpointError(f"{str(path)!r}: {short(error)}") from error
    except MALFORMED as error:
        raise CheckpointError(f"{str(path)!r} is damaged or no safetensors file") from error


def _entry(name: str, entry: Mapping[str, Any], file: Path, begin: int, size: int) -> WeightEntry:
    (first, last), shape, word = entry["data_offsets"], entry["shape"], entry["dtype"]
    numbers = (first, last, *shape)
    if not all(type(number) is int and number >= 0 for number in numbers) or not isinstance(word, str):
        raise CheckpointError(f"its header is damaged at {shown(name)}")
    if not first <= last <= size - begin:
        raise CheckpointError(f"it is truncated: {shown(name)} lies beyond its end")
    dtype = DTYPES.get(word, word)
    bytes_each = itemsize(dtype) if word in DTYPES else None
    if bytes_each is not None and last - first != bytes_each * math.prod(shape):
        raise CheckpointError(f"its header is damaged: the size of {shown(name)} does not fit its shape")
    return WeightEntry(dtype, tuple(shape), file, begin + first, last - first)
