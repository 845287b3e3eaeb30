"""Adapters in files, folders and on the hub, without a model."""

from __future__ import annotations

import os

from adamss.io import checkpoint, folder
from adamss.io.checkpoint import Checkpoint
from adamss.verbs.common import checked_path

__all__ = ["read_adapter"]


def read_adapter(path: str | os.PathLike[str]) -> Checkpoint:
    """Read an adapter and check everything that can be checked without its model.

    Parameters
    ----------
    path
        A file or folder that `adamss.save` wrote, or a repository of the Hugging Face Hub, as for `adamss.load`.

    Returns
    -------
    Checkpoint
        The settings, layers, modules to save and trained rows of the adapter, as NumPy arrays and bytes.

    Raises
    ------
    CheckpointNotFoundError
        If there is no such file, folder or repository.
    CheckpointError
        If the file is damaged, foreign, or of an unknown version.
    MissingBackendError
        If the path may be a repository, and ``huggingface_hub`` is not installed.

    Examples
    --------
    >>> import tempfile, numpy as np, adamss
    >>> from adamss.backend import NumpyLinear, NumpyModel
    >>> from adamss.offline import read_adapter
    >>> model = NumpyModel({"query": NumpyLinear(np.eye(6))})
    >>> model = adamss.attach(model, adamss.AdamssConfig(targets=["query"], rank=4, subspaces=2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     adamss.save(model, folder)
    ...     stored = read_adapter(folder)
    >>> list(stored.layers), stored.config.rank
    (['query'], 4)
    """
    return checkpoint.read(folder.adapter_file(checked_path(path)))
