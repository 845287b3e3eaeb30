"""The table of tolerances that all comparisons of floating-point results use."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["RELATIVE_TOLERANCE", "assert_agrees"]

RELATIVE_TOLERANCE = {"float64": 1e-11, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
"""Largest difference allowed, relative to the largest magnitude of the expected array, by dtype of the computation.

In half precision, the tolerance is about four times the machine epsilon, mostly for the rounding of the inputs. In
the wider dtypes the rounding errors that long sums accumulate dominate, so the tolerance is a larger multiple.
"""


def assert_agrees(actual: Any, expected: Any, *, dtype: str, what: str, scale: float | None = None) -> None:
    """Assert that two arrays agree within the tolerance of a dtype.

    Parameters
    ----------
    actual, expected
        Arrays that `numpy.asarray` accepts, of equal shape.
    dtype
        Dtype in which `actual` was computed, a key of `RELATIVE_TOLERANCE`.
    what
        Description of the compared quantity, for the message.
    scale
        Magnitude that differences are relative to. None means the largest magnitude in `expected`. For a sum that
        cancels, give the magnitude of its terms.

    Raises
    ------
    AssertionError
        If the arrays differ by more; the message gives `what`, the difference and the tolerance.
    """
    actual, expected = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    if expected.size == 0:
        return
    magnitude = float(np.max(np.abs(expected))) if scale is None else scale
    difference = float(np.max(np.abs(actual - expected)))
    allowed = RELATIVE_TOLERANCE[dtype] * magnitude
    # Written as `<=` so that NaN fails.
    assert difference <= allowed, f"{what}: differs by {difference:.3g}, {dtype} allows {allowed:.3g}"
