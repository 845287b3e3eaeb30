"""JAX for `adamss`: pure functions on pytrees, and the backends of Flax NNX and Equinox.

`linear` is all that a model made of plain arrays needs; `Factors` are a pytree. `adamss.attach` and its sister
verbs find the backend by themselves. `budgeted` brings the adaptive budget to any optax transformation, and
`synchronise` and `allocation` belong to it. These, the backends `adamss_jax.flax` and `adamss_jax.equinox`,
and `adamss_jax.optax` are imported when they are first asked for: no library is needed for another, or for `linear`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from adamss.errors import MissingBackendError

try:
    import jax as _jax  # noqa: F401
except ImportError as error:
    raise MissingBackendError("adamss_jax needs JAX: pip install 'adamss[jax]'") from error

from adamss_jax.functional import linear, update

__all__ = ["linear", "update"]

if TYPE_CHECKING:
    from adamss_jax.budget import allocation as allocation
    from adamss_jax.budget import budgeted as budgeted
    from adamss_jax.budget import synchronise as synchronise

_MODULES = ("equinox", "flax", "optax")
_NEED_OPTAX = ("allocation", "budgeted", "synchronise")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"adamss_jax.{name}")
    if name in _NEED_OPTAX:
        return getattr(import_module("adamss_jax.budget"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
