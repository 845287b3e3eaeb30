"""Adapter folders and repositories of the Hugging Face Hub, and the meaning of a path that may be either."""

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
"""Pattern of ``"user/name"``, without the revision that may follow it as in ``"user/name@v1"``."""


def is_folder(path: str) -> bool:
    """Return whether a path to write to means a folder.

    It does if a folder is there, or if nothing is there and the path ends in a separator or has no suffix.
    """
    if os.path.exists(path):
        return os.path.isdir(path)
    return path.endswith(("/", os.sep)) or not Path(path).suffix


def is_repository(name: str) -> bool:
    """Return whether a string may name a repository of the Hugging Face Hub and does not look like a file name."""
    repository = name.partition("@")[0]
    return (
        REPOSITORY.fullmatch(repository) is not None
        and not repository.startswith(".")
        and not repository.endswith(".safetensors")
    )


def write_folder(folder: str, config: dict[str, Any], card: str, write: Callable[[str], None]) -> None:
    """Write ``adapter.safetensors``, ``adamss_config.json`` and a model card.

    An existing card is kept, since the user may have edited it. If a file cannot be written, a folder that was
    created for it is removed.

    Parameters
    ----------
    folder
        Path of the folder, which is created if it does not exist.
    config
        Content of ``adamss_config.json``. It is for people and scripts; `adamss.load` reads the settings in the
        adapter file.
    card
        Text of ``README.md``.
    write
        Function that writes the adapter to a given path.
    """
    path, new = Path(folder), not os.path.isdir(folder)
    path.mkdir(parents=True, exist_ok=True)
    try:
        # The adapter is written first. If a later file fails, a new adapter with old settings still loads correctly.
        write(str(path / ADAPTER_FILE))
        write_text(path / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
        if not (path / CARD_FILE).exists():
            write_text(path / CARD_FILE, card)
    except BaseException:
        if new:
            shutil.rmtree(path, ignore_errors=True)
        raise


def adapter_file(path: str) -> str:
    """Return the path of the adapter file that a path means. A file in a repository is downloaded.

    Parameters
    ----------
    path
        File, or folder that `adamss.save` wrote. If there is no local file or folder of this name, it is a repository
        of the Hugging Face Hub, ``"user/name"`` or ``"user/name@revision"``.

    Returns
    -------
    str
        Path of the file. It may not exist if `path` cannot be the name of a repository.

    Raises
    ------
    CheckpointNotFoundError
        If the folder has no adapter, or the hub has no such repository or no adapter in it.
    MissingBackendError
        If `path` may be the name of a repository, and ``huggingface_hub`` is not installed.
    """
    if not path:
        raise CheckpointNotFoundError("the path of the adapter file is empty")
    if os.path.isdir(path):
        file = os.path.join(path, ADAPTER_FILE)
        if os.path.isfile(file):
            return file
        if os.path.isfile(os.path.join(path, peft_folder.CONFIG_FILE)):
            what = "it is a folder of PEFT, which adamss.from_peft loads if the method is PEFT's own AdaMSS"
        else:
            what = f"it has no {ADAPTER_FILE}"
        raise CheckpointNotFoundError(f"the folder {path!r} has no adapter of adamss: {what}")
    if os.path.exists(path) or not is_repository(path):
        return path
    return _from_hub(path)


def _from_hub(name: str) -> str:
    """Download the adapter file of a repository, and return the path of the local copy."""
    repository, _, revision = name.partition("@")
    hub = _hub(f"there is no file or folder {name!r}; to load it from the Hugging Face Hub")
    try:
        return str(hub.hf_hub_download(repository, ADAPTER_FILE, revision=revision or None))
    # The library raises errors of its own, errors of its HTTP client, and OSError.
    except Exception as error:
        reason = short(error).strip().splitlines()[:1] or [type(error).__name__]
        raise CheckpointNotFoundError(
            f"there is no file or folder {name!r}, and the Hugging Face Hub gives no {ADAPTER_FILE} of a repository "
            f"of that name: {reason[0]}"
        ) from error


def push(folder: str, repository: str, **options: Any) -> str:
    """Upload a folder to a repository of the Hugging Face Hub, and return the URL of the commit.

    Parameters
    ----------
    folder
        Path of a folder with an adapter.
    repository
        Name of the repository, ``"user/name"``. It is created if it does not exist.
    options
        Arguments ``private`` and ``token`` of ``huggingface_hub.create_repo``, and all arguments of
        ``huggingface_hub.upload_folder``.

    Raises
    ------
    CheckpointError
        If the hub refuses the upload.
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
