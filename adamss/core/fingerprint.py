"""Fingerprints of weights, which recognise a weight in another dtype or framework."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adamss.core._array import Array, as_working_precision, device, namespace

__all__ = ["FINGERPRINT_TOLERANCE", "Fingerprint", "fingerprint", "unknown", "unlikely"]

PROJECTIONS = 4
FINGERPRINT_TOLERANCE = 0.02
"""Accepted difference as a share of the Frobenius norm.

Rounding to bfloat16 changes a projection by about 0.001 of the norm. The projections of two unrelated weights differ
by about the norm itself."""

DEVIATIONS = 5
"""Number of standard deviations that a difference may reach. By chance, one in a million exceeds it."""


@dataclass(frozen=True)
class Fingerprint:
    """A few numbers of a base weight by which it is recognised in another dtype or framework.

    Attributes
    ----------
    shape
        Shape (d, n) of the weight in paper orientation.
    norm
        Frobenius norm of the weight.
    projections
        Products ``s W t`` for a few fixed pairs of random sign vectors s and t.
    noise
        Root mean square of the quantisation error of W, relative to the root mean square of W. It is 0 for a weight
        that is not quantised.
    """

    shape: tuple[int, int]
    norm: float
    projections: tuple[float, ...]
    noise: float = 0.0

    def difference(self, other: Fingerprint) -> float:
        """Return the largest difference in the norm or a projection, relative to the norm.

        If the shapes differ or a number is not finite, the difference is infinite.
        """
        if self.shape != other.shape or len(self.projections) != len(other.projections):
            return math.inf
        ours, theirs = (self.norm, *self.projections), (other.norm, *other.projections)
        # `max` would ignore NaN, since every comparison with NaN is False.
        if not all(map(math.isfinite, (*ours, *theirs))):
            return math.inf
        largest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        return largest / abs(self.norm) if self.norm else largest

    def tolerance(self, other: Fingerprint) -> float:
        """Return the difference up to which two fingerprints, possibly of quantised weights, count as of one weight.

        Quantisation errors are independent of the signs s and t. Relative to the norm, they therefore change
        ``s W t`` by a random amount whose standard deviation is `noise`.
        """
        return FINGERPRINT_TOLERANCE + DEVIATIONS * math.hypot(self.noise, other.noise)


def unlikely(pairs: Sequence[tuple[Fingerprint, Fingerprint]]) -> bool:
    """Return whether the weights of a quantised model are unlikely to be those of the other fingerprints.

    With two or three bits a single layer does not decide, since the quantisation error is about as large as the
    weight. This test averages over layers. The mean square of the differences between projections, relative to the
    norm, is about ``noise**2`` for the same weights and about 2 for unrelated ones. The limit is the geometric mean
    of the two, or more if there are too few layers to average over.

    Parameters
    ----------
    pairs
        The two fingerprints of each layer. Pairs without a quantised weight are ignored.
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
        Weight (d, n), floating point, of any framework. Half precision is widened to float32.
    noise
        Relative quantisation error of W, see `Fingerprint`.

    Returns
    -------
    Fingerprint
        Fingerprint that is equal, up to rounding, for the same weight in another dtype or framework.
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
    """Return a placeholder for the fingerprint of a weight that cannot be read. Only a zero weight matches it."""
    return Fingerprint(shape, 0.0, (0.0,) * PROJECTIONS)
