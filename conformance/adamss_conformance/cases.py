"""The cases of the suite: random problems of any shape and rank, a small model, and variants of the settings."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import adamss
from adamss import BudgetConfig
from adamss.core import Factors

__all__ = [
    "CONFIG",
    "EPSILON",
    "INPUTS",
    "LAYERS",
    "SCHEDULES",
    "TARGETS",
    "VARIANTS",
    "Problem",
    "adjusted_rand_index",
    "config",
    "every",
    "magnitudes",
    "planted",
    "problems",
    "random_C",
    "reference_mask",
]

Array = np.ndarray[Any, Any]

EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}
"""Distance from 1 to the next larger number of each dtype."""

_RNG = np.random.default_rng(0)

LAYERS: dict[str, tuple[Array, Array | None]] = {
    # Some frameworks return transformed trees in alphabetical order, so this order differs from it on purpose.
    "encoder.0.value": (_RNG.standard_normal((16, 19)), None),
    "encoder.0.query": (_RNG.standard_normal((16, 19)), _RNG.standard_normal(19)),
    "head": (_RNG.standard_normal((16, 5)), _RNG.standard_normal(5)),
}
"""The small model: weight W, (d, n), and bias b of each layer by module path."""

TARGETS = ("encoder.0.value", "encoder.0.query")
INPUTS = {path: _RNG.standard_normal((7, W.shape[0])) for path, (W, _) in LAYERS.items()}

CONFIG: dict[str, Any] = {
    "targets": ["query", "value"],
    "rank": 6,
    "subspaces": 3,
    "subspace_rank": 2,
    "modules_to_save": ["head"],
}

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "per subspace": {"basis": "per_subspace"},
    "weighted": {"initial_B": "weighted"},
    "weighted per subspace": {"initial_B": "weighted", "basis": "per_subspace"},
    "bias": {"include_bias": True},
    "bias per subspace": {"include_bias": True, "basis": "per_subspace"},
    "the paper's": {
        "subspaces": adamss.SubspaceEstimate(minimum=3),
        "segmentation": "ncut",
        "basis": "per_subspace",
        "initial_B": "qr",
    },
    "ksubspaces": {"segmentation": "ksubspaces", "segmentation_dimension": 2},
    "clamped": {"rank": 1000, "subspaces": 1000, "subspace_rank": 1000},
    "one subspace": {"subspaces": 1, "subspace_rank": 4},
}
"""Changes of the settings that give factors of different forms. Other segmentations change only the labels."""

SCHEDULES = {
    "one way": BudgetConfig(target=2, end_step=6, interval=4),
    "revive": BudgetConfig(target=2, end_step=6, interval=2, revive=True, window="running"),
    "parameters": BudgetConfig(target=60, start_step=1, end_step=5, unit="parameters"),
    "a minimum for each layer": BudgetConfig(target=2, end_step=5, interval=2, minimum_per_layer=1),
}
"""Budgets for the six subspaces of the small model. In the first, the interval does not divide the steps evenly."""


def config(**changes: Any) -> adamss.AdamssConfig:
    """Return the settings of the small model, with changes."""
    return adamss.AdamssConfig(**(CONFIG | changes))


THOROUGH = bool(os.environ.get("ADAMSS_THOROUGH"))
"""Whether every law tries its full number of examples; by default it tries a third of them, and at least three."""


def every(examples: int, **strategies: Any) -> Callable[[Any], Any]:
    """Return a decorator that runs a test on examples of the strategies, the same ones in every run.

    There are `examples` of them in a thorough run, and a third otherwise.
    """
    chosen = settings(
        max_examples=examples if THOROUGH else max(3, examples // 3),
        derandomize=True,
        deadline=None,
        database=None,
        # Several classes inherit the same tests, drivers keep no state between examples, and compilers are slow.
        suppress_health_check=[
            HealthCheck.differing_executors,
            HealthCheck.function_scoped_fixture,
            HealthCheck.too_slow,
        ],
    )
    return lambda test: chosen(given(**strategies)(test))


class Problem(NamedTuple):
    """A linear layer with trained factors, in float64.

    Attributes
    ----------
    x
        Inputs (..., d).
    W, b
        Weight (d, n), and bias (n,) or None.
    factors
        Factors with no zero among the trained numbers and some subspaces frozen.
    dy
        Gradient of the output, (..., n).
    """

    x: Array
    W: Array
    b: Array | None
    factors: Factors
    dy: Array


@st.composite
def problems(draw: st.DrawFn, *, empty: bool = True) -> Problem:
    """Draw a problem: any sizes, K up to n, unequal ranks, either basis, with or without bias, any leading axes."""
    d, n = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    K, R = draw(st.integers(1, n)), draw(st.integers(1, d))
    most, shared, bias_row = draw(st.integers(1, 3)), draw(st.booleans()), draw(st.booleans())
    leadings = [(1,), (4,), (2, 3), ()] + ([(0,), (2, 0, 3)] if empty else [])
    leading = draw(st.sampled_from(leadings))
    with_bias = draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    labels = rng.permutation(np.concatenate([np.arange(K), rng.integers(0, K, n - K)]))
    sizes = np.bincount(labels, minlength=K)
    bases = np.full(K, R) if shared else np.minimum(R, sizes)
    ranks = np.minimum(np.minimum(rng.integers(1, most + 1, K), sizes), bases)
    P = int(bases.max())
    A = rng.standard_normal((1 if shared else K, d + bias_row, P))
    B = rng.standard_normal((P, int(ranks.sum())))
    if not shared:
        A = np.where(np.arange(P) < bases[:, None, None], A, 0.0)
        B = np.where(np.arange(P)[:, None] < np.repeat(bases, ranks), B, 0.0)
    factors = Factors(A, B, np.zeros((int(ranks.max()), n)), labels, ranks, rng.random(K) < 0.7)
    return Problem(
        x=rng.standard_normal((*leading, d)),
        W=rng.standard_normal((d, n)),
        b=rng.standard_normal(n) if with_bias else None,
        factors=factors._replace(C=random_C(factors, rng)),
        dy=rng.standard_normal((*leading, n)),
    )


def random_C(factors: Factors, rng: np.random.Generator) -> Array:
    """Return a random C, (r, n), for NumPy factors; its padding is zero."""
    r, n = factors.C.shape
    within = np.arange(r)[:, None] < factors.ranks[factors.labels]
    return np.where(within, rng.standard_normal((r, n)), 0.0)


def magnitudes(factors: Factors) -> Factors:
    """Return the factors with absolute values; sums over these do not cancel, so they bound the original terms."""
    return factors._replace(A=np.abs(factors.A), B=np.abs(factors.B), C=np.abs(factors.C))


def planted(d: int, n: int, groups: int, seed: int = 0) -> Array:
    """Return a weight whose columns lie near a few subspaces, so that rounding does not change the segmentation."""
    rng = np.random.default_rng(seed)
    W = np.empty((d, n))
    for group in range(groups):
        own = np.arange(n) % groups == group
        direction = rng.standard_normal((d, 1))
        W[:, own] = direction * (1 + 0.1 * rng.standard_normal((1, int(own.sum()))))
    return W + 1e-3 * rng.standard_normal((d, n))


def adjusted_rand_index(first: Array, second: Array) -> float:
    """Return the agreement of two groupings beyond chance, 1 for equal ones (Hubert and Arabie, 1985)."""
    table = np.zeros((int(first.max()) + 1, int(second.max()) + 1))
    np.add.at(table, (first, second), 1)

    def pairs(counts: Any) -> float:
        counts = np.asarray(counts, dtype=np.float64)
        return float(np.sum(counts * (counts - 1) / 2))

    together, rows, columns = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected, most = rows * columns / pairs(len(first)), (rows + columns) / 2
    return 1.0 if most == expected else (together - expected) / (most - expected)


def reference_mask(scores: Array, budget: int, costs: Array | None) -> Array:
    """Return the allocation by its definition: in order of value, take each subspace whose cost the budget allows."""
    value = scores if costs is None else scores / costs
    mask, left = np.zeros(len(scores), dtype=bool), budget
    for index in sorted(range(len(scores)), key=lambda index: (-value[index], index)):
        cost = 1 if costs is None else int(costs[index])
        if cost <= left:
            mask[index], left = True, left - cost
    return mask


def layers_without_bias() -> Mapping[str, tuple[Array, Array | None]]:
    """Return the small model without biases, whose layers map the identity to their weights."""
    return {path: (W, None) for path, (W, _) in LAYERS.items()}
