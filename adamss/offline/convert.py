"""Conversion of adapters between formats, with a base model whose weights stay in their files."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shutil import rmtree

from adamss.backend.registry import using
from adamss.errors import CheckpointError, ConfigError, LayerTypeError
from adamss.io import checkpoint, folder, peft, peft_folder
from adamss.io.checkpoint import Checkpoint
from adamss.io.file_model import FileBackend, FileModel, file_model
from adamss.io.weights import WeightFiles, match_names
from adamss.io.writer import write_text
from adamss.verbs import from_peft, load, save, to_lora, to_peft
from adamss.verbs.card import model_card

__all__ = ["FORMATS", "convert", "new_folder"]

FORMATS = ("lora", "peft", "adamss")


def convert(source: str, to: str, files: WeightFiles, out: str) -> str:
    """Write an adapter in another format, together with a model card.

    Parameters
    ----------
    source
        Adapter of adamss (file, folder or name of a repository on the hub), or folder of PEFT's AdaMSS.
    to
        Format to write. ``"lora"`` is PEFT's LoRA with exactly the same update. ``"peft"`` is PEFT's AdaMSS, which
        can represent only some adapters (see `adamss.to_peft`). ``"adamss"`` is a folder of `adamss.save`.
    files
        Weights of the base model.
    out
        Path of the folder to write, which must not exist yet.

    Returns
    -------
    str
        Description of the new folder.

    Raises
    ------
    ConfigError
        If the format is unknown, or the folder exists already.
    CheckpointError, LayerTypeError
        If the adapter has the requested format already, or its layers cannot be told from files only.
    AdamssError
        If `adamss.load`, `adamss.from_peft`, `adamss.to_lora` or `adamss.to_peft` raise an error.
    """
    if to not in FORMATS:
        raise ConfigError(f"to must be one of {', '.join(FORMATS)}; found {to!r}")
    with new_folder(out) as new, _renamed(new, out), using(FileBackend()):
        if os.path.isfile(os.path.join(source, peft_folder.CONFIG_FILE)):
            model = from_peft(file_model(files, peft.read_folder(source).layers), source)
            if to == "adamss":
                save(model, new)
                return f"AdaMSS on {len(model.bank.only().layers)} layers in {out!r}"
            stored = _as_stored(model)
        else:
            stored = checkpoint.read(folder.adapter_file(source))
            _check_forms(stored, to)
        # What reads LoRA finds layers by the names of the base model.
        stored = _named_as_in(files, stored)
        with tempfile.TemporaryDirectory() as temporary:
            file = os.path.join(temporary, folder.ADAPTER_FILE)
            checkpoint.write(file, stored)
            views = {path: layer.view for path, layer in stored.layers.items() if layer.view is not None}
            model = file_model(files, stored.layers, views=views, saved=stored.saved)
            # PEFT's AdaMSS stores the whole basis, which takes a decomposition. A LoRA stores only the directions of
            # the update.
            model = load(model, file, trainable=to == "peft")
        if to == "lora":
            written = to_lora(model, new)
            text = f"LoRA of rank {written.rank} on {written.layers} layers in {out!r}"
        else:
            text = f"AdaMSS of PEFT on {to_peft(model, new).layers} layers in {out!r}"
        write_text(Path(new) / folder.CARD_FILE, model_card(stored, str(files.path), form=to))
    return text


def _named_as_in(files: WeightFiles, stored: Checkpoint) -> Checkpoint:
    """Return an adapter whose layers have the names of the base model's files."""
    spelling = match_names(stored.layers, files)
    layers = {spelling.in_files(path): layer for path, layer in stored.layers.items()}
    # A head that only the trained model has keeps its name.
    saved = {
        new if any(f"{new}.{name}" in files for name in own) else path: own
        for path, own in stored.saved.items()
        for new in [spelling.in_files(path)]
    }
    return replace(stored, layers=layers, saved=saved, shared={})


@contextmanager
def _renamed(temporary: str, name: str) -> Iterator[None]:
    """Give warnings with the name of the folder that a temporary one will have."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        yield
    for each in told:
        warnings.warn(str(each.message).replace(temporary, name), each.category, stacklevel=3)


@contextmanager
def new_folder(path: str) -> Iterator[str]:
    """Yield the path of a temporary folder, which is renamed to `path` on success, and removed if an error is raised.

    Raises
    ------
    ConfigError
        If something exists at `path`, or the path is empty.
    OSError
        If the folder cannot be made. The error names `path`.
    """
    if not path:
        raise ConfigError("the name of the folder is empty")
    target = Path(os.path.abspath(path))
    if os.path.lexists(target):
        raise ConfigError(f"{path!r} exists already; name a new folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(prefix=f".{target.name[:100]}.", dir=target.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error
    try:
        # `mkdtemp` makes folders that only the user can read. Give this one the usual permissions.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o777 & ~mask)
        yield temporary
        os.rename(temporary, target)
    except BaseException:
        rmtree(temporary, ignore_errors=True)
        raise


def _as_stored(model: FileModel) -> Checkpoint:
    with tempfile.TemporaryDirectory() as temporary:
        file = os.path.join(temporary, folder.ADAPTER_FILE)
        save(model, file)
        return checkpoint.read(file)


def _check_forms(stored: Checkpoint, to: str) -> None:
    """Check that the adapter can be converted from files only, without the classes of the model's layers."""
    if to == "adamss":
        raise CheckpointError("it is an adapter of adamss already; copy it, or name another format")
    way = "load the model in PyTorch, then adamss.load and adamss.to_lora"
    if stored.tokens:
        raise CheckpointError(f"it has trained_tokens, which need the model itself: {way}")
    for path, layer in stored.layers.items():
        view = layer.view
        convolution = view is not None and len(view.axes) > 2 and view.columns == (0,)
        if layer.blocks > 1 or not (view is None or view == checkpoint.LINEAR or convolution):
            raise LayerTypeError(
                f"{path} is not a linear layer or a convolution, and files do not say what it is: {way}"
            )
