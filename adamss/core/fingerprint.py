"""What is remembered of a weight, to recognise it in another dtype or framework."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from adamss.core._array import Array, as_working_precision, device, namespace

__all__ = ["FINGERPRINT_TOLERANCE", "Fingerprint", "fingerprint", "unknown"]

PROJECTIONS = 4
FINGERPRINT_TOLERANCE = 0.02
"""Of the Frobenius norm. Rounding to bfloat16 moves a projection by about 0.001 of it, other weights by about 1."""


@dataclass(frozen=True)
class Fingerprint:
    """What is remembered of a base weight, to recognise it in another dtype.

    Attributes
    ----------
    shape
        (d, n), paper orientation.
    norm
        Frobenius norm.
    projections
        ``s W t`` for a few fixed pairs of random sign vectors s, t.
    """

    shape: tuple[int, int]
    norm: float
    projections: tuple[float, ...]

    def difference(self, other: Fingerprint) -> float:
        """Return the largest difference of norm or projections, relative to the norm.

        Infinity for another shape, and where a number is not finite.
        """
        if self.shape != other.shape or len(self.projections) != len(other.projections):
            return math.inf
        ours, theirs = (self.norm, *self.projections), (other.norm, *other.projections)
        # NaN is neither more nor less than anything: `max` would pass it over.
        if not all(map(math.isfinite, (*ours, *theirs))):
            return math.inf
        largest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        return largest / abs(self.norm) if self.norm else largest


def fingerprint(W: Array) -> Fingerprint:
    """Return the fingerprint of a weight.

    Parameters
    ----------
    W
        (d, n) floating point, of any framework; half precision is widened to float32.

    Returns
    -------
    Fingerprint
        Equal, up to rounding, for the same weight in another dtype or framework.
    """
    xp = namespace(W)
    W = as_working_precision(W)
    d, n = W.shape
    generator = np.random.default_rng(0)
    signs = generator.integers(0, 2, size=(PROJECTIONS, d + n)).astype(np.float64) * 2 - 1
    on = xp.asarray(signs, dtype=W.dtype, device=device(W))
    projections = xp.sum((on[:, :d] @ W) * on[:, d:], axis=1)
    return Fingerprint((d, n), float(xp.linalg.vector_norm(W)), tuple(float(value) for value in projections))


def unknown(shape: tuple[int, int]) -> Fingerprint:
    """Return the fingerprint of a weight of this shape that nobody could read; it is that of no weight but zero."""
    return Fingerprint(shape, 0.0, (0.0,) * PROJECTIONS)
