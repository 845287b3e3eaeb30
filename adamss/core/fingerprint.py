"""What is remembered of a weight, to recognise it in another dtype or framework."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adamss.core._array import Array, as_working_precision, device, namespace

__all__ = ["FINGERPRINT_TOLERANCE", "Fingerprint", "fingerprint", "unknown", "unlikely"]

PROJECTIONS = 4
FINGERPRINT_TOLERANCE = 0.02
"""Of the Frobenius norm. Rounding to bfloat16 moves a projection by about 0.001 of it, other weights by about 1."""

DEVIATIONS = 5
"""How many standard deviations a difference may be from what is expected: one of a million is larger by chance."""


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
    noise
        Root mean square of the error that W has from being kept in few bits, relative to that of W.
    """

    shape: tuple[int, int]
    norm: float
    projections: tuple[float, ...]
    noise: float = 0.0

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

    def tolerance(self, other: Fingerprint) -> float:
        """Return the largest difference of two fingerprints of one weight, either of which may be quantised.

        Rounding errors are independent of the signs s and t: they move ``s W t`` by as much as `noise`, relative to
        the norm, and by a random amount.
        """
        return FINGERPRINT_TOLERANCE + DEVIATIONS * math.hypot(self.noise, other.noise)


def unlikely(pairs: Sequence[tuple[Fingerprint, Fingerprint]]) -> bool:
    """Return whether the weights of many layers are others altogether, where one of each pair is quantised.

    In two or three bits a single layer does not tell: its rounding error is as large as the weight. The mean square
    of the differences of projections, relative to the norm, is about ``noise**2`` of the same weights, and 2 of
    others; the limit is their geometric mean, or more where there are too few numbers to average over.
    """
    noises = [math.hypot(a.noise, b.noise) for a, b in pairs]
    pairs = [pair for pair, noise in zip(pairs, noises, strict=True) if noise and pair[0].norm]
    if not pairs:
        return False
    expected = float(np.mean(np.square([noise for noise in noises if noise])))
    found = np.mean([np.square(np.subtract(a.projections, b.projections) / a.norm) for a, b in pairs])
    chance = 1 + DEVIATIONS * math.sqrt(2 / (PROJECTIONS * len(pairs)))
    return float(found) > max(math.sqrt(2 * expected), expected * chance)


def fingerprint(W: Array, noise: float = 0.0) -> Fingerprint:
    """Return the fingerprint of a weight.

    Parameters
    ----------
    W
        (d, n) floating point, of any framework; half precision is widened to float32.
    noise
        As in `Fingerprint`.

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
    return Fingerprint(
        (d, n), float(xp.linalg.vector_norm(W)), tuple(float(value) for value in projections), noise
    )


def unknown(shape: tuple[int, int]) -> Fingerprint:
    """Return the fingerprint of a weight of this shape that nobody could read; it is that of no weight but zero."""
    return Fingerprint(shape, 0.0, (0.0,) * PROJECTIONS)
