"""Place of the JAX backend of `adamss`, which this version does not have yet.

What works on JAX today is `adamss.core`: its functions take and return JAX arrays, under ``jit`` too where
they return arrays alone. Asking for the backend raises an error that says so.
"""

from typing import NoReturn

from adamss.errors import MissingBackendError

__all__: list[str] = []


def __getattr__(name: str) -> NoReturn:
    if name.startswith("__"):
        raise AttributeError(name)
    raise MissingBackendError(
        f"adamss_jax.{name}: this version of adamss has no JAX backend; adamss.core works on JAX arrays"
    )
