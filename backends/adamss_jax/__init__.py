"""The JAX backend of `adamss`: pure functions on pytrees, and thin shells for Flax NNX and Equinox.

`linear` is all that a model made of plain arrays needs; `Factors` are a pytree. `adamss.attach` and its sister
verbs find the backend by themselves. The shells `adamss_jax.flax` and `adamss_jax.equinox`, and `adamss_jax.optax`,
are imported when they are first asked for: no library is needed for another, or for the functions.
"""

from importlib import import_module
from typing import Any

from adamss.errors import MissingBackendError

try:
    import jax as _jax  # noqa: F401
except ImportError as error:
    raise MissingBackendError("adamss_jax needs JAX: pip install 'adamss[jax]'") from error

from adamss_jax.backend import JaxBackend
from adamss_jax.functional import linear, update

__all__ = ["JaxBackend", "linear", "update"]

_SHELLS = ("equinox", "flax", "optax")
_PLANNED = ("budgeted", "synchronise")


def __getattr__(name: str) -> Any:
    if name in _SHELLS:
        return import_module(f"adamss_jax.{name}")
    if name in _PLANNED:
        raise AttributeError(
            f"adamss_jax.{name}: this version of adamss has no budget controller; its mathematics is in adamss.core"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
