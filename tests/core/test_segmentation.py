import numpy as np
import pytest
from core_helpers import awkward_weights, gaussian, planted
from hypothesis import given
from hypothesis import strategies as st

from adamss.config import SEGMENTATIONS
from adamss.core import Decomposition, decompose, segment, subspace_sizes
from adamss.errors import ArrayValueError, ConfigError
from adamss_conformance.cases import THOROUGH, adjusted_rand_index


def settings_for(method, dimension=2):
    return {"method": method, "dimension": dimension if method == "ksubspaces" else None}


def renumbered(labels):
    """Number the groups by their lowest column."""
    order = list(dict.fromkeys(labels.tolist()))
    return np.asarray([order.index(label) for label in labels])


def assert_partition(labels, n, subspaces):
    assert labels.shape == (n,)
    assert np.issubdtype(labels.dtype, np.integer)
    assert sorted(set(labels.tolist())) == list(range(min(subspaces, n)))
    np.testing.assert_array_equal(labels, renumbered(labels))


@pytest.mark.parametrize("method", SEGMENTATIONS)
@given(
    W=awkward_weights(12, 16),
    rank=st.integers(1, 12),
    subspaces=st.integers(1, 20),
    dimension=st.integers(1, 5),
)
def test_every_column_has_a_label_and_no_group_is_empty(method, W, rank, subspaces, dimension):
    labels = segment(decompose(W, rank), subspaces, **settings_for(method, dimension))
    assert_partition(labels, W.shape[1], subspaces)


@pytest.mark.parametrize("method", SEGMENTATIONS)
def test_every_framework_gives_the_same_labels(xp, to_numpy, method):
    deficient = gaussian(60, 9) @ gaussian(9, 80, seed=1)
    for W in (*(gaussian(60, 80, seed=seed) for seed in range(3)), deficient):
        found = to_numpy(segment(decompose(xp.asarray(W), 15), 6, **settings_for(method)))
        assert_partition(found, 80, 6)
        reference = segment(decompose(W, 15), 6, **settings_for(method))
        assert adjusted_rand_index(found, reference) >= 0.99


PLANTED = [
    {"d": 30, "subspaces": 3, "dimension": 2},
    {"d": 40, "subspaces": 5, "dimension": 3},
    {"d": 40, "subspaces": 10, "dimension": 1},
    {"d": 64, "subspaces": 4, "dimension": 8},
    {"d": 90, "subspaces": 16, "dimension": 4},
    {"d": 128, "subspaces": 24, "dimension": 4},
]


@pytest.mark.parametrize("shape", PLANTED)
@pytest.mark.parametrize("surplus", [0, 3, 100])
def test_planted_subspaces_are_recovered_exactly(shape, surplus):
    rank = shape["subspaces"] * shape["dimension"] + surplus
    for seed in range(4):
        W, labels = planted(seed, **shape)
        decomposition = decompose(W, rank)
        for method in ("ncut", "spectral", "ksubspaces"):
            found = segment(decomposition, shape["subspaces"], **settings_for(method, shape["dimension"]))
            np.testing.assert_array_equal(found, renumbered(labels), err_msg=f"{method}, seed {seed}")


@pytest.mark.parametrize("shape", PLANTED)
def test_planted_subspaces_are_recovered_from_noise(shape):
    rank = shape["subspaces"] * shape["dimension"]
    for seed in range(4):
        W, labels = planted(seed, **shape, noise=0.05)
        # In one dimension a column may have a tiny coordinate, and then drowns in the noise.
        if shape["dimension"] > 1:
            for method in ("ncut", "spectral"):
                found = segment(decompose(W, rank), shape["subspaces"], method)
                assert adjusted_rand_index(found, labels) >= 0.9
        # This method knows the dimension, so directions of pure noise in the decomposition do not disturb it.
        for surplus in (0, 100):
            found = segment(
                decompose(W, rank + surplus), shape["subspaces"], "ksubspaces", shape["dimension"]
            )
            assert adjusted_rand_index(found, labels) >= 0.9


def test_ksubspaces_improves_on_the_fit_that_it_starts_from():
    W = gaussian(30, 120)
    decomposition = decompose(W, 12)

    def energy_kept(labels):
        W_hat = (decomposition.U * decomposition.S) @ decomposition.V.T
        groups = [np.linalg.svd(W_hat[:, labels == k], compute_uv=False)[:3] for k in range(4)]
        return sum(np.sum(values**2) for values in groups)

    spectral, refined = (segment(decomposition, 4, **settings_for(m, 3)) for m in ("spectral", "ksubspaces"))
    assert energy_kept(refined) > 1.03 * energy_kept(spectral)


def test_kmeans_finds_separate_clusters(xp, to_numpy):
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(80) % 6)
    V = np.eye(15)[labels] + 0.01 * rng.standard_normal((80, 15))
    decomposition = Decomposition(*(xp.asarray(array.astype(np.float32)) for array in (V, np.ones(15), V)))
    np.testing.assert_array_equal(to_numpy(segment(decomposition, 6)), renumbered(labels))


def test_kmeans_leaves_no_more_inertia_than_scikit_learn():
    cluster = pytest.importorskip("sklearn.cluster", reason="the comparison needs scikit-learn")
    for seed, (n, rank, subspaces) in enumerate([(200, 10, 8), (384, 100, 10), (300, 30, 25)]):
        scales = np.arange(1, n + 1) ** -0.5
        decomposition = decompose(gaussian(n, n, seed=seed) * scales, rank)
        points = decomposition.V.astype(np.float64)
        labels = segment(decomposition, subspaces)
        centres = np.stack([points[labels == k].mean(axis=0) for k in range(subspaces)])
        inertia = np.sum((points - centres[labels]) ** 2)
        reference = cluster.KMeans(subspaces, n_init=5, random_state=0).fit(points).inertia_
        assert inertia <= 1.01 * reference


def test_controls():
    decomposition = decompose(gaussian(8, 14), 5)
    assert segment(decomposition, 4, "contiguous").tolist() == [0] * 4 + [1] * 3 + [2] * 4 + [3] * 3
    labels = segment(decomposition, 4, "random")
    assert sorted(np.bincount(labels).tolist()) == [3, 3, 4, 4]
    assert labels.tolist() == segment(decomposition, 4, "random").tolist()
    assert labels.tolist() != segment(decomposition, 4, "random", seed=1).tolist()


@pytest.mark.parametrize("method", SEGMENTATIONS)
def test_one_seed_one_result_and_no_global_randomness(method):
    decomposition = decompose(gaussian(30, 50), 10)
    before = np.random.get_state()[1].copy()  # noqa: NPY002 - the state that must not change
    first, again = (segment(decomposition, 6, **settings_for(method), seed=3) for _ in range(2))
    assert np.array_equal(first, again)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_subspace_sizes(xp, to_numpy):
    assert to_numpy(subspace_sizes(xp.asarray([0, 2, 2, 0, 2]), 4)).tolist() == [2, 0, 3, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"subspaces": 0}, "subspaces must be an integer of at least 1, found 0"),
        ({"subspaces": 2.0}, "subspaces must be an integer, found 2.0"),
        ({"subspaces": 2, "method": "k-means"}, "method must be one of .*found 'k-means'"),
        ({"subspaces": 2, "method": "ksubspaces"}, "dimension must be an integer, found None"),
        (
            {"subspaces": 2, "method": "ksubspaces", "dimension": 0},
            "dimension must be .* at least 1, found 0",
        ),
        ({"subspaces": 2, "dimension": 3}, "dimension is for method 'ksubspaces' only, found 3"),
        (
            {"subspaces": 2, "method": "ncut", "exponent": 0},
            "exponent must be positive and finite, found 0.0",
        ),
    ],
)
def test_settings_that_cannot_be_used(arguments, message):
    with pytest.raises(ConfigError, match=message):
        segment(decompose(gaussian(4, 6), 2), **arguments)


@pytest.mark.parametrize("method", SEGMENTATIONS)
@pytest.mark.parametrize("subspaces", [1, 4, 28, 30])
def test_weights_together_are_grouped_as_each_alone(xp, to_numpy, method, subspaces):
    if xp.__name__ == "jax.numpy" and subspaces != 4 and not THOROUGH:
        pytest.skip("JAX compiles all operations of a segmentation anew for each K: ADAMSS_THOROUGH=1 does")
    weights = [gaussian(12, 30, seed=seed) for seed in range(5)]
    weights[1][:] = 0.0
    weights[2] = planted(1, d=12, subspaces=3, dimension=2)[0][:, :30]
    weights[3][:, :20] = weights[3][:, :1]  # with so few different columns some groups start empty
    weights[4][:, :15] = weights[4][:, 15:]
    each = [decompose(xp.asarray(W), 8) for W in weights]
    stacked = Decomposition(*map(xp.stack, zip(*each, strict=True)))
    together = to_numpy(segment(stacked, subspaces, **settings_for(method)))
    alone = [to_numpy(segment(one, subspaces, **settings_for(method))) for one in each]
    np.testing.assert_array_equal(together, np.stack(alone))
    # Two leading axes are only reshaped to the stack that is tested above, and cost JAX one more compilation.
    if subspaces == 4 and (xp.__name__ != "jax.numpy" or THOROUGH):
        grid = Decomposition(*(xp.stack([array, array]) for array in stacked))
        assert tuple(segment(grid, subspaces, **settings_for(method)).shape) == (2, 5, 30)


def test_no_weights_and_stacks_that_do_not_fit(xp):
    U, S, V = (xp.stack([array, array]) for array in decompose(xp.asarray(gaussian(12, 30)), 8))
    assert tuple(segment(Decomposition(U[:0, ...], S[:0, ...], V[:0, ...]), 5).shape) == (0, 30)
    with pytest.raises(ArrayValueError, match=r"leading axes, found \(1, 12, 8\), \(2, 8\) and \(2, 30, 8\)"):
        segment(Decomposition(U[:1, ...], S, V), 5)


def test_columns_of_very_different_lengths_are_grouped_in_float32_as_in_float64():
    """Differences below the rounding error must not decide, so both dtypes use one tolerance.

    With a tolerance for each dtype, all six groupings would differ.
    """
    different = 0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        W = rng.standard_normal((384, 384)) * np.exp(3 * rng.standard_normal(384))
        single, double = (segment(decompose(W.astype(t), 100), 32) for t in (np.float32, np.float64))
        different += not np.array_equal(single, double)
    assert different <= 1
