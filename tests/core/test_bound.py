"""Theorem 1, term by term."""

import math

import numpy as np
import pytest

from adamss import core
from adamss.errors import ConfigError

SETTINGS = {
    "spectral_norms": [2.0, 3.0],
    "ranks": [1, 4],
    "sizes": [9, 16],
    "input_norm": 5.0,
    "samples": 100,
    "confidence": 0.9,
    "L_g": 4.0,
    "L_phi": 0.5,
}


def test_terms():
    capacity = math.sqrt(4 * math.pi) * 0.5 * 5 * (2 * math.sqrt(9 / 100) + 3 * math.sqrt(64 / 100))
    deviation = math.sqrt(9 * math.log(2 / 0.1) / 200)
    assert core.generalisation_bound(0.25, **SETTINGS) == pytest.approx(0.25 + capacity + deviation)


def test_vanishes_with_samples_and_grows_with_confidence():
    def gap(**changes):
        return core.generalisation_bound(0.0, **(SETTINGS | changes))

    assert gap(samples=100 * 10**6) == pytest.approx(gap() / 1000)
    assert gap(confidence=0.99) > gap(confidence=0.9) > gap(confidence=0.5)


def test_spectral_norms_are_those_of_each_product(xp, to_numpy):
    W = np.random.default_rng(0).standard_normal((6, 9)).astype(np.float32)
    decomposition = core.decompose(W, 4)
    f = core.initial_factors(decomposition, core.segment(decomposition, 3), 2)
    C = np.random.default_rng(1).standard_normal(f.C.shape).astype(np.float32)
    f = f._replace(C=np.where(np.arange(2)[:, None] < f.ranks[f.labels], C, 0).astype(np.float32))
    norms = core.spectral_norms(core.Factors(*(xp.asarray(array) for array in f)))
    start = 0
    for k, rank in enumerate(f.ranks):
        product = f.B[:, start : start + rank] @ f.C[:rank, f.labels == k]
        assert float(to_numpy(norms)[k]) == pytest.approx(np.linalg.norm(product, 2), rel=1e-5)
        start += rank


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"ranks": [1]}, "one entry per subspace, found 2, 1 and 2"),
        ({"confidence": 1.0}, "confidence must lie between 0 and 1, found 1.0"),
        ({"samples": 0}, "samples must be at least 1, found 0"),
        ({"spectral_norms": [1.0, -1.0]}, "spectral_norms must not be negative"),
        ({"input_norm": float("nan")}, "input_norm, L_g and L_phi must not be negative or NaN"),
    ],
)
def test_bad_input(changes, match):
    with pytest.raises(ConfigError, match=match):
        core.generalisation_bound(0.0, **(SETTINGS | changes))
