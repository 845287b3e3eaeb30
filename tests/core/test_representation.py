import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adamss.core import (
    block_diagonality,
    decompose,
    lowest_rank_representation,
    ordering,
    subspace_energy,
)


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
    # Null directions would add one each.
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
