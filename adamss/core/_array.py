"""Helpers that the core functions share, for arrays of any framework."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeAlias, TypeVar

import array_api_compat
import numpy as np

from adamss.errors import ArrayTypeError, ArrayValueError

__all__ = [
    "Array",
    "Namespace",
    "as_constant",
    "as_numpy",
    "as_widest_precision",
    "as_working_precision",
    "check_concrete",
    "check_linear_algebra",
    "check_matrix",
    "choose",
    "compiled_as_one",
    "device",
    "eigh",
    "is_faster_in_float32",
    "is_traced",
    "namespace",
    "one_hot",
    "repeat_while",
]

Array: TypeAlias = Any
"""An array of any framework that follows the array API standard."""

Namespace: TypeAlias = Any
"""The array API namespace (``numpy``, ``torch``, ``jax.numpy``, ...) of an array."""

device = array_api_compat.device

F = TypeVar("F", bound=Callable[..., Any])


def namespace(*arrays: Array) -> Namespace:
    """Return the array API namespace of the arrays, ignoring ``None``.

    Raises
    ------
    ArrayTypeError
        If none of the arguments is an array, or the arrays come from different frameworks.
    """
    try:
        return array_api_compat.array_namespace(*(array for array in arrays if array is not None))
    except TypeError as error:
        kinds = ", ".join(sorted({type(array).__name__ for array in arrays}))
        raise ArrayTypeError(
            f"expected arrays of one framework that follows the array API, found {kinds}; "
            "convert them with that framework's asarray first"
        ) from error


def as_constant(array: Array, /) -> Array:
    """Detach a PyTorch tensor from the autograd graph: decompositions are constants. Return other arrays as is."""
    return array.detach() if getattr(array, "requires_grad", False) else array


def as_numpy(array: Array, /) -> np.ndarray[Any, Any]:
    """Return the values of an array on any device as a NumPy array."""
    if array_api_compat.is_torch_array(array):
        values: np.ndarray[Any, Any] = array.numpy(force=True)
        return values
    # Lazy arrays, as those of Dask, have no DLPack; NumPy's asarray computes them.
    lazy = not hasattr(array, "__dlpack__")
    if lazy or array_api_compat.is_numpy_array(array) or array_api_compat.is_jax_array(array):
        return np.asarray(array)
    host = namespace(array).__array_namespace_info__().default_device()
    return np.from_dlpack(array_api_compat.to_device(array, host))


def as_working_precision(array: Array, /) -> Array:
    """Widen half precision to float32, since 16 bits are too few for decompositions and sums."""
    xp = namespace(array)
    return xp.astype(array, xp.float32) if xp.finfo(array.dtype).bits < 32 else array


def as_widest_precision(array: Array, /) -> Array:
    """Widen to float64 where possible, else return the array unchanged.

    JAX has float64 only with ``jax_enable_x64``, and PyTorch lacks it on Apple's GPUs.
    """
    xp = namespace(array)
    if array_api_compat.is_jax_namespace(xp) and not sys.modules["jax"].config.jax_enable_x64:
        return array
    if array_api_compat.is_torch_namespace(xp) and array.device.type == "mps":
        return array
    return xp.astype(array, xp.float64)


def is_faster_in_float32(array: Array, /) -> bool:
    """Return whether eigenvectors take clearly less time in float32. They do not in NumPy."""
    return not array_api_compat.is_numpy_namespace(namespace(array))


def is_traced(*arrays: Any) -> bool:
    """Return whether one of the arrays is a JAX tracer, which has a shape and a dtype but no values."""
    jax = sys.modules.get("jax")
    return jax is not None and any(isinstance(array, jax.core.Tracer) for array in arrays)


def choose(
    condition: Array, then: Callable[..., Any], otherwise: Callable[..., Any], /, *operands: Any
) -> Any:
    """Return ``then(*operands)`` if the condition holds, else ``otherwise(*operands)``.

    If the condition is traced, the call becomes a ``jax.lax.cond`` of the compiled function.

    Parameters
    ----------
    condition
        0-d boolean.
    then, otherwise
        Pure functions whose results have the same structure, shapes and dtypes.
    operands
        Arrays, or tuples, lists and dictionaries of arrays.
    """
    if is_traced(condition):
        return sys.modules["jax"].lax.cond(condition, then, otherwise, *operands)
    return then(*operands) if bool(condition) else otherwise(*operands)


def repeat_while(condition: Callable[[Any], Array], body: Callable[[Any], Any], state: Any, /) -> Any:
    """Apply `body` to the state as long as the condition holds, and return the final state.

    If the state is traced, the call becomes a ``jax.lax.while_loop`` of the compiled function.

    Parameters
    ----------
    condition
        Pure function that maps the state to a 0-d boolean.
    body
        Pure function that maps the state to a state of the same structure, shapes and dtypes.
    state
        Tuple of arrays.
    """
    if is_traced(*state):
        return sys.modules["jax"].lax.while_loop(condition, body, state)
    while bool(condition(state)):
        state = body(state)
    return state


def compiled_as_one(function: F) -> F:
    """Let JAX compile a function as a whole, where it would compile each of the operations for every new shape.

    Use it for functions that only count, compare and select: these give the same bits however they are compiled.
    Other frameworks, and functions that JAX is already tracing, call the function itself.

    Parameters
    ----------
    function
        Pure function of arrays, which are given by position, and of integers, which are given by name.
    """

    @cache
    def compiled(*names: str) -> Any:
        return sys.modules["jax"].jit(function, static_argnames=names)

    @wraps(function)
    def call(*arrays: Array, **sizes: int) -> Any:
        for array in arrays:
            if not array_api_compat.is_jax_array(array):
                return function(*arrays, **sizes)
        if is_traced(*arrays):
            return function(*arrays, **sizes)
        return compiled(*sizes)(*arrays, **sizes)

    return call  # type: ignore[return-value]


def check_concrete(*arrays: Any, name: str) -> None:
    """Check that the arrays have values, that is, that none of them is a JAX tracer.

    Raises
    ------
    ArrayTypeError
        If one of them is a tracer. The message says where to make the call instead.
    """
    if is_traced(*arrays):
        raise ArrayTypeError(
            f"{name}: values are needed here, but found a JAX tracer, which has none; call this outside of "
            "jax.jit, jax.grad, jax.vmap and jax.lax.scan, and pass the result in"
        )


def check_linear_algebra(array: Array, /) -> None:
    """Check that the framework of an array has what a decomposition needs: the standard makes it optional.

    Raises
    ------
    ArrayTypeError
        If not; the message names what is missing, and where to decompose instead.
    """
    xp = namespace(array)
    have = getattr(xp, "linalg", None)
    missing = [f"linalg.{name}" for name in ("eigh", "qr", "svd", "vector_norm") if not hasattr(have, name)]
    if missing:
        library = xp.__name__.removeprefix("array_api_compat.")
        raise ArrayTypeError(
            f"{library} has no {', '.join(missing)}, which decompositions need; decompose in NumPy, and convert the "
            "arrays of the factors"
        )


def check_matrix(array: Array, /, *, name: str) -> None:
    """Check that an array is a finite, non-empty, real floating-point matrix.

    Raises
    ------
    ArrayTypeError
        If it is not an array, its dtype is complex, integer or boolean, or its dtype has fewer than 16 bits.
    ArrayValueError
        If it is not 2-d, has an empty axis, or holds NaN or infinity.
    """
    xp = namespace(array)
    if not xp.isdtype(array.dtype, "real floating"):
        raise ArrayTypeError(
            f"{name} must be real floating point, found dtype {array.dtype}; convert (or dequantise) it first"
        )
    if xp.finfo(array.dtype).bits < 16:
        raise ArrayTypeError(
            f"{name} has dtype {array.dtype}, which frameworks only store; dequantise it first"
        )
    if array.ndim != 2:
        raise ArrayValueError(
            f"{name} must be a matrix (d, n), found shape {tuple(array.shape)}; flatten or batch its axes first"
        )
    if 0 in array.shape:
        raise ArrayValueError(f"{name} must not be empty, found shape {tuple(array.shape)}")
    check_concrete(array, name=name)
    # A sum is much cheaper than checking each entry, and NaN and infinity propagate into it. Large finite entries may
    # overflow it, so the entries are checked only if the sum is not finite.
    with np.errstate(over="ignore", invalid="ignore"):
        total = xp.sum(array)
    if not bool(xp.isfinite(total)) and not bool(xp.all(xp.isfinite(array))):
        raise ArrayValueError(f"{name} holds NaN or infinity; repair the weight before adapting it")


def one_hot(indices: Array, size: int, /, *, dtype: Any) -> Array:
    """Return ``H`` with ``H[..., i, k] = 1`` where ``indices[..., i] == k`` and 0 elsewhere.

    A matrix product with H replaces a scatter, which the array API lacks, and a boolean index, whose result has
    a shape that depends on the data.

    Parameters
    ----------
    indices
        Integers, of shape (..., m). An entry outside ``0 .. size - 1`` gives a row of zeros.
    size
        Number of columns K.
    dtype
        Dtype of the result.

    Returns
    -------
    Array
        H, of shape (..., m, K).
    """
    xp = namespace(indices)
    classes = xp.arange(size, dtype=indices.dtype, device=device(indices))
    classes = xp.reshape(classes, (1,) * indices.ndim + (-1,))
    return xp.astype(indices[..., None] == classes, dtype)


def eigh(matrices: Array, /) -> tuple[Array, Array]:
    """Return eigenvalues and eigenvectors of symmetric matrices (..., m, m), ascending.

    Entries below eps^2 times the largest entry are set to zero. They are far below the rounding error, but where
    their squares underflow, LAPACK's divide-and-conquer solver returns NaN or does not converge.
    """
    check_linear_algebra(matrices)
    xp = namespace(matrices)
    sizes = xp.abs(matrices)
    least = float(xp.finfo(matrices.dtype).eps) ** 2 * xp.max(sizes, axis=(-2, -1), keepdims=True)
    values, vectors = xp.linalg.eigh(xp.where(sizes < least, xp.zeros_like(matrices), matrices))
    return values, vectors
