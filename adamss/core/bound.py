"""Theorem 1 of the AdaMSS paper: a bound on the expected loss."""

from __future__ import annotations

import math
from collections.abc import Iterable

from adamss.core._array import Array, device, namespace
from adamss.core.factors import Factors, column_index, expand
from adamss.errors import ConfigError

__all__ = ["generalisation_bound", "spectral_norms"]


def generalisation_bound(
    empirical_loss: float,
    *,
    spectral_norms: Iterable[float],
    ranks: Iterable[int],
    sizes: Iterable[int],
    input_norm: float,
    samples: int,
    confidence: float = 0.95,
    L_g: float = 1.0,
    L_phi: float = 1.0,
) -> float:
    """Return what the expected loss stays below with the given probability.

    With probability ``1 - delta``::

        E[loss] <= empirical_loss + sqrt(L_g pi) L_phi sum_k Rx beta_k sqrt(r_k n_k / m)
                   + sqrt(9 log(2 / delta) / (2 m))

    Parameters
    ----------
    empirical_loss
        Mean loss over the m samples.
    spectral_norms
        beta_k, bounds on the spectral norms of B_k C_k, one per subspace; see `spectral_norms`.
    ranks
        r_k, one per subspace.
    sizes
        n_k, columns of each subspace.
    input_norm
        Rx, the largest Euclidean norm of an input.
    samples
        m.
    confidence
        ``1 - delta``, in (0, 1).
    L_g, L_phi
        The constants of the theorem's loss.

    Returns
    -------
    float
        The bound.

    Raises
    ------
    ConfigError
        If a number is out of range, or the three sequences differ in length.

    References
    ----------
    .. [1] Zheng et al., "Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning",
       NeurIPS 2025, Theorem 1.

    Examples
    --------
    >>> from adamss.core import generalisation_bound
    >>> round(generalisation_bound(0.1, spectral_norms=[1.0, 0.5], ranks=[1, 1], sizes=[50, 50],
    ...                            input_norm=1.0, samples=10_000), 4)
    0.3287
    """
    beta, r, n = [float(b) for b in spectral_norms], [int(k) for k in ranks], [int(k) for k in sizes]
    if not len(beta) == len(r) == len(n):
        raise ConfigError(
            "spectral_norms, ranks and sizes must have one entry per subspace, "
            f"found {len(beta)}, {len(r)} and {len(n)}"
        )
    if not 0.0 < confidence < 1.0:
        raise ConfigError(f"confidence must lie between 0 and 1, found {confidence}")
    if samples < 1:
        raise ConfigError(f"samples must be at least 1, found {samples}")
    for name, values in (
        ("spectral_norms", beta),
        ("ranks", r),
        ("sizes", n),
        ("input_norm, L_g and L_phi", [input_norm, L_g, L_phi]),
    ):
        if any(not value >= 0 for value in values):
            raise ConfigError(f"{name} must not be negative or NaN, found {values}")
    capacity = sum(b * math.sqrt(rank * size) for b, rank, size in zip(beta, r, n, strict=True))
    complexity = math.sqrt(L_g * math.pi) * L_phi * input_norm * capacity / math.sqrt(samples)
    deviation = math.sqrt(9.0 * math.log(2.0 / (1.0 - confidence)) / (2.0 * samples))
    return float(empirical_loss) + complexity + deviation


def spectral_norms(factors: Factors) -> Array:
    """Return ``|B_k C_k|_2``, the largest singular value of each subspace's trained product.

    Parameters
    ----------
    factors
        Factors of one layer.

    Returns
    -------
    Array
        (K,) floating point.
    """
    xp = namespace(factors.B)
    group, _ = column_index(factors)
    E = expand(factors)
    subspaces = xp.arange(factors.ranks.shape[0], dtype=group.dtype, device=device(factors.B))
    own = (group[None, :] == subspaces[:, None])[:, None, :]
    blocks = xp.where(own, factors.B[None, :, :], xp.zeros_like(factors.B[None, :, :]))
    return xp.linalg.matrix_norm(blocks @ E, ord=2)
