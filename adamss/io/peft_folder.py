"""Adapter folders of Hugging Face PEFT, which hold a JSON config and a safetensors file for any method."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adamss.backend.tensors import StoredTensor
from adamss.config import shown
from adamss.errors import CheckpointError, CheckpointNotFoundError, StateError
from adamss.io.reader import read_tensors
from adamss.io.writer import write_tensors, write_text

__all__ = [
    "BESIDE_FILE",
    "CONFIG_FILE",
    "PREFIX",
    "WEIGHTS_FILE",
    "base_config",
    "check_layer_name",
    "read_settings",
    "read_weights",
    "write_folder",
]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
PREFIX = "base_model.model."

BESIDE_FILE = "modules_to_save.safetensors"
"""File for the ``modules_to_save`` of a LoRA, under their names in the model. PEFT does not read it."""

LONGEST_CONFIG = 1 << 20
"""Largest size of a config in bytes. Its Python objects may take twenty times as many."""


def write_folder(
    folder: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    *,
    beside: Mapping[str, StoredTensor] | None = None,
) -> None:
    """Write an adapter folder that PEFT loads.

    The config is written last, so that a new folder has none, and is no adapter to PEFT, if writing fails.

    Parameters
    ----------
    folder
        Path of the folder, which is created if it does not exist.
    config, tensors
        Contents of PEFT's two files.
    beside
        Tensors for a third file, `BESIDE_FILE`. If there are none, the file of an earlier export is removed.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    if beside:
        write_tensors(path / BESIDE_FILE, beside, {"format": "pt"})
    else:
        (path / BESIDE_FILE).unlink(missing_ok=True)
    write_tensors(path / WEIGHTS_FILE, tensors, {"format": "pt"})
    write_text(path / CONFIG_FILE, json.dumps(config, indent=2) + "\n")


def base_config(
    method: str, targets: list[str] | str, saved: tuple[str, ...] = (), *, base: str | None
) -> dict[str, Any]:
    """Return the settings that PEFT's configs of all methods share.

    Parameters
    ----------
    method
        Name of the method in PEFT, such as ``"LORA"``.
    targets
        Setting ``target_modules``.
    saved
        Setting ``modules_to_save``.
    base
        Name of the base model, or None if it is unknown.
    """
    return {
        "peft_type": method,
        "task_type": None,
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "target_modules": targets,
        "modules_to_save": list(saved) or None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def check_layer_name(path: str, verb: str) -> None:
    """Check that PEFT can name a layer.

    Raises
    ------
    StateError
        If the layer is one of a stack, or is the model itself.
    """
    if "[" in path:
        raise StateError(
            f"{verb}: {path} is one layer of a stack, which PEFT cannot name; save the adapter, load it into "
            "the PyTorch model, and export that"
        )
    if not path:
        raise StateError(
            f"{verb}: the model is a single layer, which has no name; put it into a module of its own"
        )


def read_settings(path: Path, method: str) -> dict[str, Any]:
    """Return the config of a folder, which must be for the given method.

    Raises
    ------
    CheckpointNotFoundError
        If there is no such folder, or no config in it.
    CheckpointError
        If the path is a file, or the config is damaged or for another method.
    """
    if path.is_file():
        raise CheckpointError(
            "it is a file, and from_peft reads folders of PEFT; adamss.load reads files of adamss"
        )
    if not path.is_dir():
        raise CheckpointNotFoundError(f"there is no folder {str(path)!r}")
    config = path / CONFIG_FILE
    if not config.is_file():
        below = sorted(found.parent.name for found in path.glob(f"*/{CONFIG_FILE}"))
        where = (
            f"; its folder {below[0]!r} has one, so name that"
            if below
            else "; PEFT's save_pretrained writes it"
        )
        raise CheckpointNotFoundError(
            f"{str(path)!r} holds no adapter of PEFT: there is no {CONFIG_FILE}{where}"
        )
    if config.stat().st_size > LONGEST_CONFIG:
        raise CheckpointError(f"its {CONFIG_FILE} is longer than that of any adapter")
    try:
        settings = json.loads(config.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its {CONFIG_FILE} is damaged or no JSON: {error}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("peft_type"), str):
        raise CheckpointError(f"its {CONFIG_FILE} does not name a method (peft_type): PEFT did not write it")
    found = settings["peft_type"]
    if found != method:
        raise CheckpointError(
            f"it holds an adapter of the method {shown(found)[1:-1]}, and from_peft reads {method}; load it with "
            "peft.PeftModel.from_pretrained"
        )
    return settings


def read_weights(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a folder by name.

    Raises
    ------
    CheckpointNotFoundError
        If the folder has no weights.
    CheckpointError
        If the weights are pickled or damaged.
    """
    weights = path / WEIGHTS_FILE
    if not weights.is_file():
        if (path / PICKLED_FILE).is_file():
            raise CheckpointError(
                f"its weights are pickled ({PICKLED_FILE}), which may run anything when read; load it with a PEFT "
                "that you trust, and save it with save_pretrained(folder, safe_serialization=True)"
            )
        raise CheckpointNotFoundError(
            f"{str(path)!r} has its {CONFIG_FILE} but no {WEIGHTS_FILE}: copy the whole folder"
        )
    return read_tensors(weights)
