"""Importance against PLATON's equations, by hand and by a loop over subspaces."""

import numpy as np
import pytest

from adamss import core
from adamss.core import Factors, Importance
from adamss_conformance.tolerances import assert_agrees


def test_equations_over_several_steps(xp, to_numpy):
    rng = np.random.default_rng(0)
    b1, b2 = 0.85, 0.6
    state = core.initial_importance(xp.zeros((3, 4)))
    Ibar = Ubar = np.zeros((3, 4))
    for _ in range(5):
        w, g = rng.standard_normal((2, 3, 4)).astype(np.float32)
        state = core.update_importance(
            state, xp.asarray(w), xp.asarray(g), sensitivity_decay=b1, uncertainty_decay=b2
        )
        sensitivity = np.abs(w * g)
        Ibar = b1 * Ibar + (1 - b1) * sensitivity
        Ubar = b2 * Ubar + (1 - b2) * np.abs(sensitivity - Ibar)  # with the new average
    dtype = "float64" if "64" in str(state.sensitivity.dtype) else "float32"
    assert_agrees(to_numpy(state.sensitivity), Ibar, dtype="float32", what=f"Ibar ({dtype})")
    assert_agrees(to_numpy(state.uncertainty), Ubar, dtype="float32", what=f"Ubar ({dtype})")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_is_left_out(xp, to_numpy, value):
    state = Importance(xp.asarray([1.0, 2.0]), xp.asarray([3.0, 4.0]))
    kept = core.update_importance(state, xp.asarray([0.0, 1.0]), xp.asarray([value, 1.0]))
    assert to_numpy(kept.sensitivity).tolist() == [1.0, 2.0]
    assert to_numpy(kept.uncertainty).tolist() == [3.0, 4.0]


@pytest.mark.parametrize("bases", [1, 3])
def test_score_is_the_mean_over_each_subspace_without_padding(xp, to_numpy, bases):
    rng = np.random.default_rng(1)
    labels, ranks = np.asarray([0, 0, 0, 1, 1, 2]), np.asarray([2, 1, 1])
    R_k = [3, 3, 3] if bases == 1 else [3, 2, 1]
    B, C = (Importance(*np.abs(rng.standard_normal((2, *shape)))) for shape in ((3, 4), (2, 6)))
    f = Factors(np.zeros((bases, 5, 3)), np.zeros((3, 4)), np.zeros((2, 6)), labels, ranks, np.ones(3, bool))
    for padding in (0.0, 1e6):  # what stands in the padding must not matter, but for B its zeros are promised
        sensitivity = np.where(np.arange(2)[:, None] < ranks[labels], C.sensitivity, padding)
        columns = np.repeat(R_k, ranks)
        B_sensitivity = np.where(np.arange(3)[:, None] < columns, B.sensitivity, 0.0)
        score = core.scores(
            Importance(xp.asarray(B_sensitivity), xp.asarray(B.uncertainty)),
            Importance(xp.asarray(sensitivity), xp.asarray(C.uncertainty)),
            Factors(*(xp.asarray(array) for array in f)),
        )
        expected, start = [], 0
        for k, (rank, R) in enumerate(zip(ranks, R_k, strict=True)):
            own_B = (B.sensitivity * B.uncertainty)[:R, start : start + rank]
            own_C = (C.sensitivity * C.uncertainty)[:rank, labels == k]
            expected.append(own_B.mean() + own_C.mean())
            start += rank
        assert_agrees(to_numpy(score), expected, dtype="float32", what="scores")
