"""Compare the estimated number of subspaces and the spectral embedding with the paper's formulas written out."""

import numpy as np
import pytest
from core_helpers import awkward_weights, gaussian, planted
from hypothesis import given
from hypothesis import strategies as st

from adamss.core import Decomposition, analysis, decompose, estimate_subspaces, segment, spectral
from adamss.errors import ArrayValueError, ConfigError

EXPONENTS = [1.0, 2.0, 3.5]


WAYS = {"exact": 10**6, "searched": 0}
"""Limits of the number of columns that select all eigenvectors, or only those that a search finds."""

PLANTED = [
    {"d": 30, "subspaces": 3, "dimension": 2},
    {"d": 40, "subspaces": 10, "dimension": 1},
    {"d": 90, "subspaces": 24, "dimension": 3},
    {"d": 128, "subspaces": 64, "dimension": 2},
    {"d": 300, "subspaces": 150, "dimension": 2},
]


def assert_found_exactly(shape, surplus, xp=np, to_numpy=np.asarray):
    W, labels = planted(1, **shape)
    decomposition = decompose(xp.asarray(W), shape["subspaces"] * shape["dimension"] + surplus)
    assert estimate_subspaces(decomposition, minimum=1, maximum=200) == shape["subspaces"]
    found = to_numpy(segment(decomposition, shape["subspaces"], "ncut"))
    assert np.array_equal(found[:, None] == found, labels[:, None] == labels)


# The last three have more subspaces than a search looks for at first. Each subspace adds one more equal eigenvalue.
@pytest.mark.parametrize(
    ("way", "shape"),
    [*(("exact", shape) for shape in PLANTED[:2]), *(("searched", shape) for shape in PLANTED)],
)
@pytest.mark.parametrize("surplus", [0, 100])
def test_independent_subspaces_are_counted_and_told_apart_exactly(way, shape, surplus, monkeypatch):
    monkeypatch.setattr(spectral, "EXACT_COLUMNS", WAYS[way])
    assert_found_exactly(shape, surplus)


@pytest.mark.parametrize("way", WAYS)
def test_every_framework_finds_them(way, xp, to_numpy, monkeypatch):
    monkeypatch.setattr(spectral, "EXACT_COLUMNS", WAYS[way])
    assert_found_exactly({"d": 20, "subspaces": 4, "dimension": 2}, 0, xp, to_numpy)


@given(
    W=awkward_weights(12, 16), rank=st.integers(1, 12), tau=st.floats(1e-3, 1.0), exponent=st.floats(0.5, 6.0)
)
def test_the_number_follows_the_formula_of_the_paper(W, rank, tau, exponent):
    decomposition = decompose(W.astype(np.float64), rank)
    s = np.abs(analysis.laplacian_spectrum(decomposition, exponent=exponent))
    counted = s.size - np.sum(np.where(s >= tau, 1.0, np.log2(1 + (s / tau) ** 2)))
    found = estimate_subspaces(decomposition, tau=tau, minimum=1, maximum=16, exponent=exponent)
    assert abs(found - np.clip(counted, 1, s.size)) <= 0.5 + 1e-6


@pytest.mark.parametrize("tau", [0.01, 0.3, 0.8, 1.0])
def test_a_search_counts_what_all_eigenvalues_say(tau, monkeypatch):
    for seed in range(4):
        noise = [0.0, 0.05, 0.2, 1.0][seed]
        decomposition = decompose(planted(seed, d=64, subspaces=20, dimension=3, noise=noise)[0], 60)
        for maximum in (25, 60):
            exact = estimate_subspaces(decomposition, tau=tau, minimum=1, maximum=maximum)
            with monkeypatch.context() as patch:
                patch.setattr(spectral, "EXACT_COLUMNS", 0)
                assert estimate_subspaces(decomposition, tau=tau, minimum=1, maximum=maximum) == exact


def test_a_graph_has_as_many_zero_eigenvalues_as_parts_and_none_above_two():
    decomposition = decompose(np.kron(np.eye(4), np.ones((2, 5))), 8)
    for exponent in EXPONENTS:
        spectrum = analysis.laplacian_spectrum(decomposition, exponent=exponent)
        assert np.sum(spectrum < 1e-9) == 4
        assert spectrum[-1] <= 2 + 1e-9
        assert np.all(np.diff(spectrum) >= 0)


@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("formed", [10**8, 100, 0])
def test_products_with_the_affinity_do_not_depend_on_how_it_is_formed(
    exponent, formed, xp, to_numpy, monkeypatch
):
    monkeypatch.setattr(spectral, "LARGEST_FORMED", formed)
    points = gaussian(50, 5, seed=3)
    x = gaussian(50, 4, seed=4)
    product = to_numpy(spectral._times_affinity(xp.asarray(points), exponent)(xp.asarray(x)))
    np.testing.assert_allclose(product, np.abs(points @ points.T) ** exponent @ x, rtol=2e-4, atol=2e-3)


def test_bounds_and_columns_that_say_nothing():
    decomposition = decompose(planted(0, d=30, subspaces=6, dimension=2)[0], 12)
    n = decomposition.V.shape[0]
    assert estimate_subspaces(decomposition) == 10  # the paper's K0
    assert estimate_subspaces(decomposition, minimum=2, maximum=4) == 4
    assert estimate_subspaces(decomposition, minimum=10**6) == n
    # With orthogonal columns each direction is a subspace. The estimate exceeds the number of directions only if
    # `minimum` does.
    orthogonal = decompose(np.eye(30, dtype=np.float32), 20)
    assert estimate_subspaces(orthogonal, minimum=1) == 20
    assert estimate_subspaces(decompose(np.zeros((5, 7)), 3), minimum=1) == 1
    W = planted(0, d=30, subspaces=6, dimension=2)[0]
    W[:, ::3] = 0
    assert estimate_subspaces(decompose(W, 12), minimum=1) == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau": 0}, "tau must be positive and finite, found 0.0"),
        ({"tau": 1.5}, "tau must be at most 1, found 1.5"),
        ({"minimum": 0}, "minimum must be at least 1, found 0"),
        ({"minimum": 5, "maximum": 4}, "maximum = 4 is less than minimum = 5; raise it, or lower minimum"),
        ({"exponent": float("nan")}, "exponent must be positive and finite, found nan"),
        ({"exponent": 1e3}, "exponent must be at most 100, found 1000.0"),
    ],
)
def test_settings_that_cannot_be_used(settings, message):
    with pytest.raises(ConfigError, match=message):
        estimate_subspaces(decompose(gaussian(4, 6), 2), **settings)


@pytest.mark.parametrize("function", [estimate_subspaces, analysis.laplacian_spectrum])
def test_several_weights_at_once_are_refused(function):
    U, S, V = decompose(gaussian(4, 6), 2)
    with pytest.raises(
        ArrayValueError, match=r"of one weight, found V of shape \(1, 6, 2\); call it for each"
    ):
        function(Decomposition(U[None], S[None], V[None]))
