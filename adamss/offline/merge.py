"""Merging of an adapter into the files of its base model, with one tensor in memory at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adamss import core
from adamss.backend.tensors import StoredTensor
from adamss.core._array import as_working_precision
from adamss.errors import ArrayValueError, CheckpointError, LayerError
from adamss.io.checkpoint import LINEAR, Checkpoint, StoredLayer
from adamss.io.folder import CARD_FILE
from adamss.io.reader import DTYPES
from adamss.io.weights import INDEX_ENDING, PICKLED, WeightEntry, WeightFiles, match_names
from adamss.io.writer import write_tensors, write_text
from adamss.offline.compare import verify
from adamss.offline.convert import new_folder
from adamss.offline.inspect import read_config
from adamss.verbs.card import model_card

__all__ = ["MergedFiles", "merge"]

PIECE = 1 << 24
"""Number of bytes that are copied at a time."""

OTHER_FORMATS = (*PICKLED, ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data")

EMBEDDINGS = ("embed", "wte", "shared")
"""Parts of the names of input embeddings, the weight of which an output head may share."""


class MergedFiles(NamedTuple):
    """Description of a merged model in files.

    Attributes
    ----------
    files
        Names of the weight files, in order.
    lost
        Share of the update that is lost by rounding to the dtype of the weight, by path of the layer.
    added
        Names of the tensors of ``modules_to_save`` that the base model does not have.
    """

    files: tuple[str, ...]
    lost: dict[str, float]
    added: tuple[str, ...]


def merge(
    stored: Checkpoint,
    files: WeightFiles,
    out: str,
    *,
    check_base: bool = True,
    count: Callable[[], object] = lambda: None,
) -> MergedFiles:
    """Write a model whose weights are ``round(W0 + delta)``. It loads in the same way as its base model.

    The folder gets the weights under the names of the base model, and all other files of the base model's folder
    (configuration, tokenizer). A module that the base model lacks, such as a new head, is added under the name that
    it had in training. `from_pretrained` of transformers finds both, also if the class that was trained has a prefix
    before the names of the base model.

    Parameters
    ----------
    stored
        The adapter.
    files
        Weights of its base model.
    out
        Path of the folder to write, which must not exist yet.
    check_base
        Whether to compare the fingerprints of the weights first.
    count
        Function that is called after each layer.

    Returns
    -------
    MergedFiles
        Description of the merged model.

    Raises
    ------
    CheckpointError
        If the base model is not the one that the adapter was trained on, lacks a layer, or stores one in a quantised
        dtype.
    LayerError
        If an embedding may share its weight with the output head, which would change too.
    ArrayValueError
        If a merged weight is not finite.
    ConfigError
        If the folder exists already.
    """
    if check_base and (wrong := [check for check in verify(stored, files) if not check.fits]):
        raise CheckpointError(
            f"{wrong[0].path}: the base weight is not the one that the adapter was trained on"
            + (f" (nor are {len(wrong) - 1} more)" if len(wrong) > 1 else "")
            + "; name the right base model, or pass check_base=False (--no-check)"
        )
    spelling = match_names(stored.layers, files)
    layers = {spelling.weight(path): (path, layer) for path, layer in stored.layers.items()}
    _check_tied(layers, files)
    saved = {f"{path}.{name}": tensor for path, own in stored.saved.items() for name, tensor in own.items()}
    # A tensor that was trained under several names (tied embeddings) changes under each of them.
    every = {other: tensor for name, tensor in saved.items() for other in stored.shared.get(name, ())} | saved
    places = {name: spelling.tensor(name) for name in every}
    whole = {place: every[name] for name, place in places.items() if place is not None}
    added = {name: saved[name] for name in saved if places[name] is None}
    ids: Any = stored.config.trained_tokens
    rows = {}
    for path, values in stored.tokens.items():
        name = f"{path}.weight"
        if spelling.tensor(name) is None:
            raise CheckpointError(f"the base model has no embedding {name} for the adapter's trained rows")
        for other in (name, *stored.shared.get(name, ())):
            if (place := spelling.tensor(other)) is not None:
                rows[place] = (ids[path], values)
    biases = _moved_biases(layers, files)
    lost: dict[str, float] = {}

    def changed(name: str) -> StoredTensor | None:
        """Return the new value of a tensor, or None if it does not change."""
        if name in layers:
            path, layer = layers[name]
            tensor, lost[path] = _merged(path, layer, files, name)
            count()
            return tensor
        if name in biases:
            return biases[name]
        if name in whole:
            return _like(whole[name], files[name], name)
        if name in rows:
            return _with_rows(files, name, *rows[name])
        return None

    with new_folder(out) as folder:
        names: dict[str, str] = {}
        written = _names_of(files.files, more=bool(added))
        for file, name_of_file in zip(files.files, written, strict=False):
            entries = {name: entry for name, entry in files.items() if entry.file == file}
            names |= dict.fromkeys(entries, name_of_file)
            _write(Path(folder) / name_of_file, file, entries, changed)
        if added:
            write_tensors(Path(folder) / written[-1], added, {"format": "pt"})
            names |= dict.fromkeys(added, written[-1])
        if len(written) > 1:
            size = sum(entry.size for entry in files.values()) + sum(len(t.data) for t in added.values())
            index = {"metadata": {"total_size": size}, "weight_map": names}
            write_text(
                Path(folder) / f"{_stem(files.files)}{INDEX_ENDING}", json.dumps(index, indent=2) + "\n"
            )
        _copy_rest(files, Path(folder))
        write_text(Path(folder) / CARD_FILE, model_card(stored, str(files.path), form="merged"))
    return MergedFiles(tuple(written), lost, tuple(added))


def _merged(path: str, layer: StoredLayer, files: WeightFiles, name: str) -> tuple[StoredTensor, float]:
    """Return the merged weight of a layer, and the share of its update that is lost by rounding."""
    entry, view = files[name], layer.view or LINEAR
    array = files.read(name).numpy()
    if layer.blocks > 1:
        parts = [(view.block, array[i], part) for i, part in enumerate(layer.split(layer.blocks))]
    else:
        parts = [(view, array, layer)]
    found, lost = [], 0.0
    for own_view, own, part in parts:
        W = as_working_precision(own_view.matrix(own))
        exact = W + np.asarray(core.delta(part.factors()))[: W.shape[0]]
        with np.errstate(over="ignore"):
            rounded = StoredTensor.of(own_view.array(exact, own.shape), entry.dtype)
        if not rounded.is_finite():
            raise ArrayValueError(
                f"{path}: the update overflows the weight's dtype {entry.dtype}: not merged"
            )
        size, error = (
            float(np.linalg.norm(difference))
            for difference in (exact - W, own_view.matrix(rounded.numpy()) - exact)
        )
        lost = max(lost, error / size if size else 0.0)
        found.append(rounded.data)
    return StoredTensor(entry.dtype, entry.shape, b"".join(found)), lost


def _moved_biases(
    layers: Mapping[str, tuple[str, StoredLayer]], files: WeightFiles
) -> dict[str, StoredTensor]:
    """Return the new biases of the layers whose update includes the bias, by name. They are small."""
    found = {}
    for name, (path, layer) in layers.items():
        d = layer.base.shape[0]
        if layer.directions().shape[0] <= d:
            continue
        bias = name.removesuffix("weight") + "bias"
        if bias not in files:
            raise CheckpointError(f"the adapter moves the bias of {path}, and the base model has no {bias}")
        delta = np.asarray(core.delta(layer.factors()))[d]
        b = files.read(bias).numpy()
        found[bias] = StoredTensor.of(
            (b + delta).astype(np.promote_types(b.dtype, np.float32)), files[bias].dtype
        )
    return found


def _like(tensor: StoredTensor, entry: WeightEntry, name: str) -> StoredTensor:
    """Return a tensor of a module to save in the dtype of the base model's tensor."""
    if tensor.shape != entry.shape:
        raise CheckpointError(
            f"{name} of modules_to_save has shape {tensor.shape}, and the base model's {entry.shape}"
        )
    return tensor if tensor.dtype == entry.dtype else StoredTensor.of(tensor.numpy(), entry.dtype)


def _with_rows(files: WeightFiles, name: str, ids: tuple[int, ...], rows: StoredTensor) -> StoredTensor:
    """Return the weight of an embedding with the trained rows written into it."""
    stored, entry = files.read(name), files[name]
    if len(entry.shape) != 2 or rows.shape[1] != entry.shape[1] or ids[-1] >= entry.shape[0]:
        raise CheckpointError(
            f"{name} has shape {entry.shape}, into which the rows of trained_tokens do not fit"
        )
    width = len(stored.data) // entry.shape[0]
    data, new = bytearray(stored.data), _like(rows, entry._replace(shape=rows.shape), name).data
    for i, row in enumerate(ids):
        data[row * width : (row + 1) * width] = new[i * width : (i + 1) * width]
    return StoredTensor(entry.dtype, entry.shape, bytes(data))


def _check_tied(layers: Mapping[str, Any], files: WeightFiles) -> None:
    """Refuse to merge into an embedding that the output head may share. An adapter changes only the embedding."""
    config = read_config(files.path)
    tied, classes = config.get("tie_word_embeddings"), config.get("architectures")
    headless = isinstance(classes, list) and all(str(name).endswith("Model") for name in classes)
    heads = any(name.endswith(("lm_head.weight", "decoder.weight")) for name in files)
    if tied is False or headless or (heads and tied is not True):
        return
    for name, (path, _) in layers.items():
        if any(part in name for part in EMBEDDINGS):
            raise LayerError(
                f"{path} may share its weight with the output head, which would change too: load the model, then "
                "adamss.load and adamss.merge_and_unload, which unties them"
            )


def _stem(files: Iterable[Path]) -> str:
    return "diffusion_pytorch_model" if next(iter(files)).name.startswith("diffusion") else "model"


def _names_of(files: tuple[Path, ...], *, more: bool) -> list[str]:
    """Return the names of the new weight files: the names of the base model, or numbered names if one is added."""
    if not more:
        return [file.name for file in files]
    count = len(files) + 1
    return [f"{_stem(files)}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _write(
    path: Path,
    source: Path,
    entries: Mapping[str, WeightEntry],
    changed: Callable[[str], StoredTensor | None],
) -> None:
    """Write a copy of a safetensors file in which some tensors have other values.

    Parameters
    ----------
    path, source
        Paths of the new file and of the file to copy.
    entries
        Tensors of the file to copy, by name.
    changed
        Function that returns the new value of a tensor, or None if it does not change.
    """
    words = {dtype: word for word, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place, ordered = 0, sorted(entries, key=lambda name: entries[name].start)
    for name in ordered:
        entry = entries[name]
        header[name] = {
            "dtype": words.get(entry.dtype, entry.dtype),
            "shape": list(entry.shape),
            "data_offsets": [place, place + entry.size],
        }
        place += entry.size
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    with open(source, "rb") as old, open(path, "wb") as new:
        new.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            tensor = changed(name)
            for piece in [tensor.data] if tensor is not None else _pieces(old, entries[name]):
                new.write(piece)


def _pieces(file: Any, entry: WeightEntry) -> Iterator[bytes]:
    file.seek(entry.start)
    left = entry.size
    while left:
        piece = file.read(min(left, PIECE))
        if not piece:
            raise CheckpointError(f"{str(entry.file)!r} was cut short while it was read")
        left -= len(piece)
        yield piece


def _copy_rest(files: WeightFiles, folder: Path) -> None:
    """Copy the other files of the base model's folder (configuration, tokenizer, parts of a pipeline).

    Weights in other formats are left out, because they are those of the base model. Safetensors files in folders
    below belong to other modules and are copied.
    """
    if not files.path.is_dir():
        return
    for directory, below, names in os.walk(files.path):
        below[:] = [name for name in below if not name.startswith(".")]
        place = folder / os.path.relpath(directory, files.path)
        others = (
            OTHER_FORMATS if place != folder else (*OTHER_FORMATS, ".safetensors", INDEX_ENDING, CARD_FILE)
        )
        for name in names:
            if not name.endswith(others) and not name.startswith("."):
                place.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(directory) / name, place / name)
