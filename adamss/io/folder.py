"""Folders of adapters, as Hugging Face's libraries keep them, and where a path or the name of a repository leads."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adamss.errors import CheckpointError, CheckpointNotFoundError, MissingBackendError
from adamss.io import peft_folder
from adamss.io.reader import short
from adamss.io.writer import write_text

__all__ = [
    "ADAPTER_FILE",
    "CARD_FILE",
    "CONFIG_FILE",
    "adapter_file",
    "is_folder",
    "is_repository",
    "push",
    "write_folder",
]

ADAPTER_FILE = "adapter.safetensors"
CONFIG_FILE = "adamss_config.json"
CARD_FILE = "README.md"

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
"""``"user/name"``; a revision may follow: ``"user/name@v1"``."""


def is_folder(path: str) -> bool:
    """Return whether a path to write to means a folder: it is one, ends in a separator, or has no suffix."""
    return os.path.isdir(path) or path.endswith(("/", os.sep)) or not Path(path).suffix


def is_repository(name: str) -> bool:
    """Return whether a string may be the name of a repository of the Hugging Face Hub, and is not one of a file."""
    repository = name.partition("@")[0]
    return (
        REPOSITORY.fullmatch(repository) is not None
        and not repository.startswith(".")
        and not repository.endswith(".safetensors")
    )


def write_folder(folder: str, config: dict[str, Any], card: str, write: Callable[[str], None]) -> None:
    """Write ``adapter.safetensors``, ``adamss_config.json`` and a model card.

    A card that is there already stays: somebody may have written on it. If a file cannot be written, a folder that
    was made for it is removed.

    Parameters
    ----------
    folder
        Made if it does not exist.
    config
        Content of ``adamss_config.json``. It is there to be looked at: `adamss.load` takes the settings of the
        adapter file.
    card
        Text of ``README.md``.
    write
        Writes the adapter to the path that it is given.
    """
    path, new = Path(folder), not os.path.isdir(folder)
    path.mkdir(parents=True, exist_ok=True)
    try:
        # The adapter first: a folder without one is no adapter, and a new one beside old settings is loaded right.
        write(str(path / ADAPTER_FILE))
        write_text(path / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
        if not (path / CARD_FILE).exists():
            write_text(path / CARD_FILE, card)
    except BaseException:
        if new:
            shutil.rmtree(path, ignore_errors=True)
        raise


def adapter_file(path: str) -> str:
    """Return the adapter file that a path means: the file itself, that of a folder, or that of a repository.

    Parameters
    ----------
    path
        A file, a folder that `adamss.save` wrote, or, where nothing local has this name, a repository of the Hugging
        Face Hub, ``"user/name"`` or ``"user/name@revision"``.

    Raises
    ------
    CheckpointNotFoundError
        If there is no such file, folder or repository, or no adapter in it.
    MissingBackendError
        If it may be a repository and ``huggingface_hub`` is not installed.
    """
    if os.path.isdir(path):
        file = os.path.join(path, ADAPTER_FILE)
        if os.path.isfile(file):
            return file
        if os.path.isfile(os.path.join(path, peft_folder.CONFIG_FILE)):
            what = "PEFT wrote it: adamss.from_peft loads an AdaMSS of PEFT"
        else:
            what = f"it has no {ADAPTER_FILE}"
        raise CheckpointNotFoundError(f"the folder {path!r} has no adapter of adamss: {what}")
    if os.path.exists(path) or not is_repository(path):
        return path
    return _from_hub(path)


def _from_hub(name: str) -> str:
    """Return the local copy of the adapter file of a repository."""
    repository, _, revision = name.partition("@")
    hub = _hub(f"there is no file or folder {name!r}; to load it from the Hugging Face Hub")
    try:
        return str(hub.hf_hub_download(repository, ADAPTER_FILE, revision=revision or None))
    # The library raises its own errors, those of its HTTP client, and OSError.
    except Exception as error:
        reason = short(error).strip().splitlines()[:1] or [type(error).__name__]
        raise CheckpointNotFoundError(
            f"there is no file or folder {name!r}, and the Hugging Face Hub gives no {ADAPTER_FILE} of a repository "
            f"of that name: {reason[0]}"
        ) from error


def push(folder: str, repository: str, **options: Any) -> str:
    """Upload a folder to a repository of the Hugging Face Hub; return the address of the commit.

    Parameters
    ----------
    folder
        With an adapter.
    repository
        ``"user/name"``; made if it does not exist.
    options
        ``private`` and ``token`` as of ``huggingface_hub.create_repo``, and what
        ``huggingface_hub.upload_folder`` takes.

    Raises
    ------
    CheckpointError
        If the hub refuses.
    MissingBackendError
        If ``huggingface_hub`` is not installed.
    """
    hub = _hub("push_to_hub")
    private = options.pop("private", None)
    try:
        hub.create_repo(repository, exist_ok=True, private=private, token=options.get("token"))
        commit = hub.upload_folder(repo_id=repository, folder_path=folder, **options)
    except Exception as error:
        reason = short(error).strip().splitlines()[:1] or [type(error).__name__]
        raise CheckpointError(f"push_to_hub: {repository!r} was not uploaded: {reason[0]}") from error
    return str(getattr(commit, "commit_url", commit))


def _hub(what: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingBackendError(f"{what} needs huggingface_hub: pip install 'adamss[hub]'") from error
    return huggingface_hub
