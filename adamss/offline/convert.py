"""Adapters from one format into another, on a base model whose weights stay in their files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree

from adamss.backend.registry import using
from adamss.errors import CheckpointError, ConfigError, LayerTypeError
from adamss.io import checkpoint, folder, peft, peft_folder
from adamss.io.checkpoint import Checkpoint
from adamss.io.file_model import FileBackend, FileModel, file_model
from adamss.io.weights import WeightFiles
from adamss.io.writer import write_text
from adamss.verbs import from_peft, load, save, to_lora, to_peft
from adamss.verbs.card import model_card

__all__ = ["FORMATS", "convert", "new_folder"]

FORMATS = ("lora", "peft", "adamss")


def convert(source: str, to: str, files: WeightFiles, out: str) -> str:
    """Write an adapter in another format, and a model card beside it.

    Parameters
    ----------
    source
        An adapter of adamss (file, folder or name on the hub), or a folder of PEFT's AdaMSS.
    to
        ``"lora"``: PEFT's LoRA of the same update, exact. ``"peft"``: PEFT's AdaMSS, of adapters that have a form
        there. ``"adamss"``: a folder of `adamss.save`.
    files
        Weights of the base model.
    out
        Folder to write, which must be new or empty.

    Returns
    -------
    str
        What was written, as a sentence.

    Raises
    ------
    ConfigError
        If the format is unknown, or the folder is not empty.
    AdamssError
        What `adamss.load`, `adamss.from_peft`, `adamss.to_lora` and `adamss.to_peft` raise.
    """
    if to not in FORMATS:
        raise ConfigError(f"to must be one of {', '.join(FORMATS)}; found {to!r}")
    with new_folder(out) as new, using(FileBackend()):
        if os.path.isfile(os.path.join(source, peft_folder.CONFIG_FILE)):
            model = from_peft(file_model(files, peft.read_folder(source).layers), source)
            stored = _as_stored(model)
        else:
            file = folder.adapter_file(source)
            stored = checkpoint.read(file)
            _check_forms(stored, to)
            views = {path: layer.view for path, layer in stored.layers.items() if layer.view is not None}
            model = file_model(files, stored.layers, views=views, saved=stored.saved)
            # PEFT's AdaMSS has the whole basis in its files; a LoRA has only the directions of the update.
            model = load(model, file, trainable=to == "peft")
        if to == "lora":
            text = str(to_lora(model, new)).replace(str(new), out)
        elif to == "peft":
            text = str(to_peft(model, new)).replace(str(new), out)
        else:
            save(model, new)
            return f"AdaMSS on {len(stored.layers)} layers in {out!r}"
        write_text(Path(new) / folder.CARD_FILE, model_card(stored, str(files.path), form=to, where=out))
    return text


@contextmanager
def new_folder(path: str) -> Iterator[str]:
    """Give a folder to write into that takes the given name when all went well, and is removed if not.

    Raises
    ------
    ConfigError
        If something is there already, and it is not an empty folder.
    """
    target = Path(os.path.abspath(path))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{path!r} is there already; name a folder that is new or empty")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = tempfile.mkdtemp(prefix=f".{target.name[:100]}.", dir=target.parent)
    try:
        # Only the user may look into a folder of mkdtemp; this one becomes a folder like any other.
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
    """Check that files alone tell what the layers of an adapter are."""
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
