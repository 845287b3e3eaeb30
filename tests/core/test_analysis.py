"""Test Z* and the measures of labels that use it, the captured energy, and Theorem 1 term by term."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adamss import core
from adamss.core import decompose
from adamss.core.analysis import (
    block_diagonality,
    cell_means,
    generalisation_bound,
    inside_over_between,
    lowest_rank_representation,
    ordering,
    spectral_norms,
    subspace_energy,
)
from adamss.errors import ConfigError


def independent_subspaces(rng, dimension=3, sizes=(15, 20, 17), d=30):
    blocks = [rng.standard_normal((d, dimension)) @ rng.standard_normal((dimension, n)) for n in sizes]
    return np.concatenate(blocks, axis=1), np.repeat(np.arange(len(sizes)), sizes)


@given(seed=st.integers(0, 500), rank=st.integers(1, 5), surplus=st.integers(0, 6))
def test_representation_reproduces_the_weight(seed, rank, surplus):
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((11, rank)) @ rng.standard_normal((rank, 14))
    Z = lowest_rank_representation(decompose(W, rank + surplus))
    np.testing.assert_allclose(W @ Z, W, atol=1e-8)
    np.testing.assert_allclose(Z @ Z, Z, atol=1e-8)
    np.testing.assert_allclose(Z, Z.T, atol=1e-12)
    # Each direction of a zero singular value would add one to the trace.
    assert np.trace(Z) == pytest.approx(rank)


def test_representation_of_independent_subspaces_is_block_diagonal(xp, to_numpy):
    W, labels = independent_subspaces(np.random.default_rng(0))
    W = W.astype(np.float32)
    Z = lowest_rank_representation(decompose(xp.asarray(W), 25))
    inside = labels[:, None] == labels[None, :]
    assert np.max(np.abs(to_numpy(Z)[~inside])) <= 1e-4
    assert float(block_diagonality(Z, xp.asarray(labels))) == pytest.approx(1.0, abs=1e-6)
    shuffled = np.random.default_rng(1).permutation(labels)
    assert float(block_diagonality(Z, xp.asarray(shuffled))) < 0.6


def test_representation_of_a_zero_matrix_is_zero(xp, to_numpy):
    Z = lowest_rank_representation(decompose(xp.zeros((3, 5), dtype=xp.float32), 2))
    assert np.array_equal(to_numpy(Z), np.zeros((5, 5)))
    assert float(block_diagonality(Z, xp.asarray([0, 0, 1, 1, 1]))) == 1.0


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_block_diagonality_is_the_share_of_squares(xp, magnitude):
    Z = xp.asarray(np.asarray([[3, 1, 0], [1, 2, 2], [0, 2, 1]], dtype=np.float32) * np.float32(magnitude))
    assert float(block_diagonality(Z, xp.asarray([0, 0, 1]))) == pytest.approx(16 / 24)
    assert float(block_diagonality(Z, xp.asarray([0, 1, 0]))) == pytest.approx(14 / 24)
    assert float(block_diagonality(Z, xp.asarray([0, 0, 0]))) == 1.0


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_inside_over_between_is_a_ratio_of_means_without_the_diagonal(xp, magnitude):
    rng = np.random.default_rng(0)
    Z, labels = rng.standard_normal((12, 12)), rng.integers(0, 3, 12)
    pairs = [(i, j) for i in range(12) for j in range(12) if i != j]
    inside = np.mean([abs(Z[i, j]) for i, j in pairs if labels[i] == labels[j]])
    between = np.mean([abs(Z[i, j]) for i, j in pairs if labels[i] != labels[j]])
    found = inside_over_between(xp.asarray((Z * magnitude).astype(np.float32)), xp.asarray(labels))
    assert float(found) == pytest.approx(inside / between, rel=1e-5)


@pytest.mark.parametrize(
    ("Z", "labels", "expected"),
    [
        (np.kron(np.eye(2), np.ones((2, 2))), [0, 0, 1, 1], math.inf),
        (np.eye(4), [0, 0, 1, 1], math.nan),
        (np.ones((4, 4)), [0, 0, 0, 0], math.nan),
        (np.ones((4, 4)), [0, 1, 2, 3], math.nan),
    ],
    ids=["block diagonal", "diagonal", "one subspace", "one column each"],
)
def test_inside_over_between_where_a_mean_is_zero_or_missing(xp, Z, labels, expected):
    found = inside_over_between(xp.asarray(Z.astype(np.float32)), xp.asarray(labels))
    assert float(found) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(("n", "cells"), [(12, 4), (13, 5), (5, 5), (3, 8)])
def test_cells_are_means_that_lose_no_column(xp, to_numpy, n, cells):
    Z = np.random.default_rng(0).standard_normal((n, n)).astype(np.float32)
    ends = [-(-n * cell // min(n, cells)) for cell in range(min(n, cells) + 1)]
    blocks = [slice(*pair) for pair in pairwise(ends)]
    expected = [[Z[rows, columns].mean() for columns in blocks] for rows in blocks]
    np.testing.assert_allclose(to_numpy(cell_means(xp.asarray(Z), cells)), expected, atol=1e-6)


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_energy_is_that_of_the_columns(xp, to_numpy, magnitude):
    W = np.random.default_rng(0).standard_normal((6, 9)).astype(np.float32)
    labels = np.asarray([0, 1, 2, 0, 1, 2, 3, 3, 3])
    found = subspace_energy(decompose(xp.asarray(W * np.float32(magnitude)), 6), xp.asarray(labels), 5)
    columns = np.sum(W.astype(np.float64) ** 2, axis=0)
    expected = np.bincount(labels, weights=columns, minlength=5) / np.sum(columns)
    np.testing.assert_allclose(to_numpy(found), expected, atol=1e-5)


def test_energy_of_a_zero_matrix_is_zero(xp, to_numpy):
    decomposition = decompose(xp.zeros((3, 4), dtype=xp.float32), 2)
    assert to_numpy(subspace_energy(decomposition, xp.asarray([0, 0, 1, 1]), 2)).tolist() == [0.0, 0.0]


def test_ordering_sorts_and_is_stable(xp, to_numpy):
    labels = np.random.default_rng(0).integers(0, 4, 50)
    np.testing.assert_array_equal(to_numpy(ordering(xp.asarray(labels))), np.argsort(labels, kind="stable"))


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


def test_terms_of_the_bound():
    capacity = math.sqrt(4 * math.pi) * 0.5 * 5 * (2 * math.sqrt(9 / 100) + 3 * math.sqrt(64 / 100))
    deviation = math.sqrt(9 * math.log(2 / 0.1) / 200)
    assert generalisation_bound(0.25, **SETTINGS) == pytest.approx(0.25 + capacity + deviation)


def test_the_bound_vanishes_with_samples_and_grows_with_confidence():
    def gap(**changes):
        return generalisation_bound(0.0, **(SETTINGS | changes))

    assert gap(samples=100 * 10**6) == pytest.approx(gap() / 1000)
    assert gap(confidence=0.99) > gap(confidence=0.9) > gap(confidence=0.5)


def test_spectral_norms_are_those_of_each_product(xp, to_numpy):
    W = np.random.default_rng(0).standard_normal((6, 9)).astype(np.float32)
    decomposition = core.decompose(W, 4)
    f = core.initial_factors(decomposition, core.segment(decomposition, 3), 2)
    C = np.random.default_rng(1).standard_normal(f.C.shape).astype(np.float32)
    f = f._replace(C=np.where(np.arange(2)[:, None] < f.ranks[f.labels], C, 0).astype(np.float32))
    norms = spectral_norms(core.Factors(*(xp.asarray(array) for array in f)))
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
def test_a_bound_of_bad_numbers_is_refused(changes, match):
    with pytest.raises(ConfigError, match=match):
        generalisation_bound(0.0, **(SETTINGS | changes))
