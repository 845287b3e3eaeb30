"""Views of an array with any number of axes as a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from adamss.core._array import Array, namespace

__all__ = ["View"]


@dataclass(frozen=True)
class View:
    """A rule by which an array is the matrix ``W: (d, n)`` of ``y = x @ W``.

    Attributes
    ----------
    rows
        Axes of the array that are contracted with the input. In this order they form the d rows.
    columns
        Axes of the array that appear in the output. In this order they form the n columns.

    Examples
    --------
    >>> import numpy as np
    >>> weight = np.arange(6).reshape(3, 2)  # the weight of a torch.nn.Linear is (n, d)
    >>> view = View(rows=(1,), columns=(0,))
    >>> view.matrix(weight).shape, bool((view.array(view.matrix(weight), weight.shape) == weight).all())
    ((2, 3), True)
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def block(self) -> View:
        """The view of one entry along the first axis of the array, if this axis is the first of the columns."""
        if self.columns[:1] != (0,):
            raise ValueError(f"the columns {self.columns} do not begin with the first axis")
        return View(tuple(axis - 1 for axis in self.rows), tuple(axis - 1 for axis in self.columns[1:]))

    @property
    def axes(self) -> tuple[int, ...]:
        """All axes of the array, in the order in which the matrix has them."""
        return (*self.rows, *self.columns)

    def shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return the shape (d, n) of the matrix for an array of this shape."""
        return prod(shape[axis] for axis in self.rows), prod(shape[axis] for axis in self.columns)

    def matrix(self, array: Array) -> Array:
        """Return the matrix W: (d, n) for an array."""
        xp = namespace(array)
        matrix = array if self.axes == tuple(range(array.ndim)) else xp.permute_dims(array, self.axes)
        # Reshape only if necessary: it may copy, and a tensor that is distributed over processes may not support it.
        return matrix if array.ndim == 2 else xp.reshape(matrix, self.shape(array.shape))

    def array(self, W: Array, shape: Sequence[int]) -> Array:
        """Undo `matrix`: return the array of this shape for W: (d, n), so that ``array(matrix(a), a.shape) == a``."""
        xp, axes = namespace(W), self.axes
        split = W if len(axes) == 2 else xp.reshape(W, tuple(shape[axis] for axis in axes))
        back = tuple(axes.index(axis) for axis in range(len(axes)))
        return split if back == tuple(range(len(axes))) else xp.permute_dims(split, back)
