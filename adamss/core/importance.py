"""How much each subspace matters: smoothed sensitivity times uncertainty (PLATON)."""

from __future__ import annotations

from typing import NamedTuple

from adamss.core._array import Array, device, namespace, one_hot
from adamss.core.factors import Factors, basis_ranks

__all__ = ["Importance", "initial_importance", "scores", "update_importance"]


class Importance(NamedTuple):
    """Running averages of one trained array.

    Attributes
    ----------
    sensitivity
        Ibar, the average of ``|w g|``, of the shape of the array.
    uncertainty
        Ubar, the average of ``|I - Ibar|``, of the same shape.
    """

    sensitivity: Array
    uncertainty: Array


def initial_importance(weight: Array) -> Importance:
    """Return averages of zero for an array.

    Parameters
    ----------
    weight
        Trained array, of any shape.

    Returns
    -------
    Importance
        Zeros of the shape, dtype and device of the array.
    """
    xp = namespace(weight)
    return Importance(xp.zeros_like(weight), xp.zeros_like(weight))


def update_importance(
    importance: Importance,
    weight: Array,
    gradient: Array,
    *,
    sensitivity_decay: float = 0.85,
    uncertainty_decay: float = 0.85,
) -> Importance:
    """Return the averages after one more step.

    With ``I = |w g|``, b1 and b2 the two decays::

        Ibar' = b1 Ibar + (1 - b1) I
        Ubar' = b2 Ubar + (1 - b2) |I - Ibar'|

    Parameters
    ----------
    importance
        Averages so far.
    weight
        Trained array before the optimiser's step, of any shape.
    gradient
        Its gradient before the optimiser's step, unscaled. If it holds NaN or infinity (or a square of w g would),
        the step is left out: the averages are returned as they were.
    sensitivity_decay, uncertainty_decay
        b1 and b2, in [0, 1).

    Returns
    -------
    Importance
        New averages.

    References
    ----------
    .. [1] Zhang et al., "PLATON: Pruning Large Transformer Models with Upper Confidence Bound of Weight
       Importance", ICML 2022.

    Examples
    --------
    >>> import numpy as np
    >>> from adamss.core import initial_importance, update_importance
    >>> w, g = np.asarray([2.0, -1.0]), np.asarray([0.5, 4.0])
    >>> update_importance(initial_importance(w), w, g, sensitivity_decay=0.5, uncertainty_decay=0.5)
    Importance(sensitivity=array([0.5, 2. ]), uncertainty=array([0.25, 1.  ]))
    """
    now, usable = sensitivity_of(weight, gradient)
    decays = sensitivity_decay, uncertainty_decay
    return averaged(importance, now, usable, decays)


def sensitivity_of(weight: Array, gradient: Array) -> tuple[Array, Array]:
    """Return ``|w g|`` and whether all of it can be used: 0-d boolean.

    It cannot where a gradient is NaN or infinite, nor where the square of a product would be, which a score is about.

    Parameters
    ----------
    weight, gradient
        Arrays of one shape.
    """
    xp = namespace(weight)
    finite = xp.isfinite(gradient)
    product = xp.abs(weight * xp.where(finite, gradient, xp.zeros_like(gradient)))
    return product, xp.all(finite & (product <= xp.finfo(product.dtype).max ** 0.5))


def averaged(importance: Importance, now: Array, usable: Array, decays: tuple[float, float]) -> Importance:
    """Return the averages after one more step.

    Parameters
    ----------
    importance
        Averages so far.
    now
        ``|w g|`` of the step.
    usable
        0-d boolean; the averages stay as they were where it is False.
    decays
        b1 and b2.
    """
    xp = namespace(now)
    b1, b2 = decays
    sensitivity = b1 * importance.sensitivity + (1 - b1) * now
    uncertainty = b2 * importance.uncertainty + (1 - b2) * xp.abs(now - sensitivity)
    return Importance(
        xp.where(usable, sensitivity, importance.sensitivity),
        xp.where(usable, uncertainty, importance.uncertainty),
    )


def scores(importance_B: Importance, importance_C: Importance, factors: Factors) -> Array:
    """Return the score of each subspace: ``mean(Ibar Ubar over B_k) + mean(Ibar Ubar over C_k)``.

    Padding is left out of the means.

    Parameters
    ----------
    importance_B
        Averages of B, arrays (P, q).
    importance_C
        Averages of C, arrays (r, n).
    factors
        Factors of the layer, for their ranks and labels.

    Returns
    -------
    Array
        (K,) floating point; 0 for a subspace of rank 0.
    """
    xp = namespace(factors.labels)
    dtype = importance_B.sensitivity.dtype
    K = factors.ranks.shape[0]
    members = one_hot(factors.labels, K, dtype=dtype)
    ends = xp.cumulative_sum(factors.ranks, dtype=factors.ranks.dtype)
    columns = xp.arange(factors.B.shape[1], dtype=ends.dtype, device=device(members))
    owners = (columns[:, None] >= (ends - factors.ranks)[None, :]) & (columns[:, None] < ends[None, :])

    score_B = importance_B.sensitivity * importance_B.uncertainty
    score_C = importance_C.sensitivity * importance_C.uncertainty
    places = xp.arange(factors.C.shape[0], dtype=factors.ranks.dtype, device=device(members))
    within = places[:, None] < xp.take(factors.ranks, factors.labels)[None, :]
    score_C = xp.where(within, score_C, xp.zeros_like(score_C))

    ranks = xp.astype(factors.ranks, dtype)
    total_B = xp.sum(score_B, axis=0) @ xp.astype(owners, dtype)
    total_C = xp.sum(score_C, axis=0) @ members
    count_B = ranks * xp.astype(basis_ranks(factors), dtype)
    count_C = ranks * xp.sum(members, axis=0)
    one = xp.ones_like(ranks)
    return total_B / xp.maximum(count_B, one) + total_C / xp.maximum(count_C, one)
