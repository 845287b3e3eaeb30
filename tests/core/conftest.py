"""The array namespaces that the core must run on."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

NAMESPACES = ("numpy", "array_api_strict", "torch", "jax.numpy")
INSTALLED = [name for name in NAMESPACES if importlib.util.find_spec(name.partition(".")[0]) is not None]


@pytest.fixture(scope="session", params=INSTALLED)
def xp(request: pytest.FixtureRequest) -> Any:
    return importlib.import_module(request.param)


@pytest.fixture(scope="session")
def allocate_by_loop() -> Callable[..., list[bool]]:
    """Return the law of allocation (DESIGN 2.7) as a loop over the subspaces, best first."""

    def allocate(
        scores: np.ndarray,
        budget: int,
        costs: Sequence[int] | None = None,
        candidates: Sequence[bool] | None = None,
        layers: Sequence[int] | None = None,
        minimum: int = 0,
    ) -> list[bool]:
        T = len(scores)
        price = [1] * T if costs is None else [int(cost) for cost in costs]
        values = [score / scores.dtype.type(cost) for score, cost in zip(scores, price, strict=True)]
        values = [-np.inf if np.isnan(value) else value for value in values]
        best_first = sorted(
            (i for i in range(T) if candidates is None or candidates[i]), key=lambda i: (-values[i], i)
        )
        safe = []
        if minimum:
            for layer in dict.fromkeys(layers):
                safe += [i for i in best_first if layers[i] == layer][:minimum]
        kept, left = [False] * T, budget
        for i in [i for i in best_first if i in safe] + [i for i in best_first if i not in safe]:
            if price[i] <= left:
                kept[i], left = True, left - price[i]
        return kept

    return allocate


@pytest.fixture(scope="session")
def to_numpy() -> Callable[[Any], np.ndarray]:
    """Return a function that turns any framework's array into NumPy's."""
    return np.from_dlpack
