"""The one table of tolerances that every comparison of floating-point results uses."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["RELATIVE_TOLERANCE", "assert_agrees"]

RELATIVE_TOLERANCE = {"float64": 1e-11, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
"""Largest difference allowed, over the largest magnitude of the expected array, by dtype of the computation.

About 2^5 rounding units for half precision, whose inputs are rounded before they are multiplied, and more
for the wider ones, whose sums are longer than their rounding units show.
"""


def assert_agrees(actual: Any, expected: Any, *, dtype: str, what: str, scale: float | None = None) -> None:
    """Assert that two arrays agree within the tolerance of a dtype.

    Parameters
    ----------
    actual, expected
        Arrays that `numpy.asarray` understands, of equal shape.
    dtype
        Dtype in which `actual` was computed: a key of `RELATIVE_TOLERANCE`.
    what
        What is compared, for the message.
    scale
        Magnitude that differences are relative to; None for the largest of `expected`. Sums that cancel
        need the magnitude of their terms.

    Raises
    ------
    AssertionError
        Naming `what`, the difference and the tolerance.
    """
    actual, expected = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    if expected.size == 0:
        return
    magnitude = float(np.max(np.abs(expected))) if scale is None else scale
    difference = float(np.max(np.abs(actual - expected)))
    allowed = RELATIVE_TOLERANCE[dtype] * magnitude
    # Not `difference > allowed`: NaN must fail.
    assert difference <= allowed, f"{what}: differs by {difference:.3g}, {dtype} allows {allowed:.3g}"
