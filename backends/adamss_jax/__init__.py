"""Place of the JAX backend of `adamss`, which this version does not have yet.

What works on JAX today is `adamss.core`: its functions take and return JAX arrays, under ``jit`` too where
they return arrays alone. Asking for the backend raises an error that says so.
"""

from typing import NoReturn

from adamss.errors import MissingBackendError

__all__: list[str] = []

_PLANNED = ("JaxBackend", "budgeted", "synchronise")


def __getattr__(name: str) -> NoReturn:
    if name not in _PLANNED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    raise MissingBackendError(
        f"adamss_jax.{name}: this version of adamss has no JAX backend; adamss.core works on JAX arrays"
    )
