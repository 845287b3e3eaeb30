"""JAX for `adamss`: pure functions on pytrees, and the backends for Flax NNX and Equinox.

A model made of plain arrays needs only `linear`, which takes `Factors`, a pytree. For Flax NNX and Equinox models,
`adamss.attach` and the other verbs find the backend by themselves. `budgeted` adds the adaptive budget to any optax
transformation; `synchronise` writes its masks into the model, and `allocation` reports them. These three and the
modules `adamss_jax.flax`, `adamss_jax.equinox` and `adamss_jax.optax` are imported on first access, so that each
works without the libraries that the others need.
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
