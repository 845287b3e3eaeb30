"""The array namespaces that the core must run on."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

NAMESPACES = ("numpy", "array_api_strict", "torch", "jax.numpy")
INSTALLED = [name for name in NAMESPACES if importlib.util.find_spec(name.partition(".")[0]) is not None]


@pytest.fixture(scope="session", params=INSTALLED)
def xp(request: pytest.FixtureRequest) -> Any:
    return importlib.import_module(request.param)


@pytest.fixture(scope="session")
def to_numpy() -> Callable[[Any], np.ndarray]:
    """Return a function that turns any framework's array into NumPy's."""
    return np.from_dlpack
