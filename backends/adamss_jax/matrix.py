"""How a kernel of any number of axes is a matrix (d, n): its contracted axes are the rows, the others the columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from adamss.errors import LayerError

__all__ = ["MatrixView"]


@dataclass(frozen=True, kw_only=True)
class MatrixView:
    """A layer as ``y = x @ W + b`` with W: (d, n), whatever axes its arrays have.

    Attributes
    ----------
    rows, columns
        Axes of the kernel that are contracted with the input, and those that come out, in the order in which
        they make up the d rows and n columns.
    inputs
        Axes of the input that are contracted, the first of them with the first of `rows`, whatever the order in
        which they are named; None where `gather` says it.
    gather
        Einsum equation that brings these axes of the input to the end, in that order; None for `inputs`.
    scatter
        Einsum equation that takes the columns from the end to where the output has them; None if they stay.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    inputs: tuple[int, ...] | None = None
    gather: str | None = None
    scatter: str | None = None

    @classmethod
    def of_axes(cls, inputs: Sequence[int]) -> MatrixView:
        """Return the view of a kernel (*in, *out) that is contracted with these axes of the input."""
        return cls(rows=tuple(range(len(inputs))), columns=(), inputs=tuple(inputs))

    @classmethod
    def of_einsum(cls, equation: str, path: str) -> MatrixView:
        """Return the view of the second operand of an einsum equation.

        Raises
        ------
        LayerError
            If it is not a matrix product: an axis of the kernel occurs twice, is kept as a batch axis, or is
            summed on its own. The message names `path`.
        """
        operands, result = equation.replace(" ", "").split("->")
        x, kernel = operands.split(",")
        contracted = [letter for letter in kernel if letter in x and letter not in result]
        outputs = [letter for letter in result if letter in kernel and letter not in x]
        if (
            "." in kernel
            or len(set(kernel)) != len(kernel)
            or len(contracted) + len(outputs) != len(kernel)
            or not contracted
            or not outputs
        ):
            raise LayerError(
                f"{path}: the equation {equation!r} is no product of the input with one matrix (each axis of the "
                "kernel must be summed with the input, or come out); leave it out of targets"
            )
        batch = x.replace("...", ".")
        batch = "".join(letter for letter in batch if letter == "." or letter in result)
        batch = batch.replace(".", "...")
        return cls(
            rows=tuple(kernel.index(letter) for letter in contracted),
            columns=tuple(kernel.index(letter) for letter in outputs),
            gather=f"{x}->{batch}{''.join(contracted)}",
            scatter=f"{batch}{''.join(outputs)}->{result}",
        )

    def matrix(self, kernel: Array) -> Array:
        """Return the kernel as W: (d, n)."""
        columns = self._columns(kernel.ndim)
        d, n = (math.prod(kernel.shape[axis] for axis in axes) for axes in (self.rows, columns))
        return jnp.reshape(jnp.transpose(kernel, (*self.rows, *columns)), (d, n))

    def kernel(self, W: Array, shape: Sequence[int]) -> Array:
        """Return W: (d, n) as a kernel of this shape: ``kernel(matrix(k), k.shape) == k``."""
        order = (*self.rows, *self._columns(len(shape)))
        split = jnp.reshape(W, tuple(shape[axis] for axis in order))
        return jnp.transpose(split, tuple(order.index(axis) for axis in range(len(shape))))

    def flat_inputs(self, x: Array) -> Array:
        """Return the input of the layer as (..., d)."""
        if self.gather is not None:
            x = jnp.einsum(self.gather, x)
        elif self.inputs != (-1,):
            assert self.inputs is not None
            # In the order in which the input has them, as Flax pairs them with those of the kernel.
            axes = sorted(axis % x.ndim for axis in self.inputs)
            x = jnp.moveaxis(x, axes, range(-len(axes), 0))
        count = len(self.rows)
        return x if count == 1 else jnp.reshape(x, (*x.shape[:-count], -1))

    def outputs(self, u: Array, shape: Sequence[int]) -> Array:
        """Return (..., n) in the axes of the layer's output; `shape` is that of its kernel."""
        sizes = tuple(shape[axis] for axis in self._columns(len(shape)))
        if len(sizes) != 1:
            u = jnp.reshape(u, (*u.shape[:-1], *sizes))
        return u if self.scatter is None else jnp.einsum(self.scatter, u)

    def _columns(self, axes: int) -> tuple[int, ...]:
        return self.columns or tuple(range(len(self.rows), axes))
