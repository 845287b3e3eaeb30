"""Fixtures for the array namespaces that the core must run on."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

NAMESPACES = ("numpy", "array_api_strict", "torch", "jax.numpy")
INSTALLED = [name for name in NAMESPACES if importlib.util.find_spec(name.partition(".")[0]) is not None]


@pytest.fixture(scope="session", params=INSTALLED)
def xp(request: pytest.FixtureRequest) -> Any:
    return importlib.import_module(request.param)


@pytest.fixture(scope="session")
def to_numpy() -> Callable[[Any], np.ndarray]:
    """Return a function that converts an array of any framework to NumPy."""
    return np.from_dlpack
