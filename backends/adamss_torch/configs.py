"""Models of which there is only a ``config.json``: transformers builds them without values."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from adamss.errors import CheckpointError, MissingBackendError
from adamss.io.reader import short

try:
    import transformers
except ImportError as error:
    raise MissingBackendError(
        "adamss_torch.configs needs transformers: pip install 'adamss[transformers]'"
    ) from error

__all__ = ["model_without_values"]

MOST_LAYERS = 10_000
"""Largest number of layers of a model that is built. No model has as many, and building them would take hours."""


def model_without_values(file: Path) -> torch.nn.Module:
    """Return the model that a ``config.json`` describes, on the meta device.

    Raises
    ------
    CheckpointError
        If transformers cannot build the model, or would have to run code that the config names.
    """
    try:
        # A config may name code, in a file or on the hub, that would be run. It is refused.
        config = transformers.AutoConfig.from_pretrained(
            os.path.abspath(file), local_files_only=True, trust_remote_code=False
        )
        if getattr(config, "num_hidden_layers", 0) > MOST_LAYERS:
            raise ValueError(f"it has {config.num_hidden_layers:,} layers, more than any model")
        with torch.device("meta"):
            model: torch.nn.Module = transformers.AutoModel.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=False
            )
    # An unsuitable config can make the constructors of models raise any error.
    except Exception as error:
        raise CheckpointError(
            f"transformers cannot build the model of {str(file)!r}: {short(error)}"
        ) from error
    return model
