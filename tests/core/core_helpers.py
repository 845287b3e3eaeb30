"""Weights that several tests of the core use."""

import numpy as np
from hypothesis import strategies as st


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@st.composite
def awkward_weights(draw, d, n):
    """Draw weights up to this size, including one row or column, low rank, duplicate columns, and zero."""
    d, n = draw(st.integers(1, d)), draw(st.integers(1, n))
    seed = draw(st.integers(0, 1000))
    W, rng = gaussian(d, n, seed=seed), np.random.default_rng(seed + 1)
    return draw(
        st.sampled_from(
            [
                W,
                gaussian(d, 2, seed=seed) @ gaussian(2, n, seed=seed + 1),
                gaussian(d, 1, seed=seed) @ gaussian(1, n, seed=seed + 1),
                np.repeat(W[:, :1], n, axis=1),
                gaussian(d, 2, seed=seed)[:, rng.permutation(n) % 2],
                W * (np.arange(d) < 2)[:, None].astype(np.float32),
                W * (np.arange(n) % 3 > 0).astype(np.float32),
                np.zeros_like(W),
            ]
        )
    )


def planted(seed, *, d, subspaces, dimension, noise=0.0):
    """Return a matrix whose columns lie in independent subspaces, in random order, and the labels of the columns."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(5 * dimension, 8 * dimension + 1, subspaces)
    blocks = [rng.standard_normal((d, dimension)) @ rng.standard_normal((dimension, size)) for size in sizes]
    order = rng.permutation(np.sum(sizes))
    W = np.concatenate(blocks, axis=1)[:, order]
    disturbance = rng.standard_normal(W.shape)
    W = W + noise * np.linalg.norm(W) / np.linalg.norm(disturbance) * disturbance
    return W.astype(np.float32), np.repeat(np.arange(subspaces), sizes)[order]
