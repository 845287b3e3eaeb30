"""Place of the conformance suite of `adamss`, which this version does not have yet.

There is its table of tolerances, `adamss_conformance.tolerances`. The laws that it will hold every backend
to are stated in the docstrings of `adamss.backend.Backend`. Asking for the suite raises an error that says so.
"""

from typing import NoReturn

from adamss.errors import MissingBackendError

__all__: list[str] = []

_PLANNED = ("BackendSuite",)


def __getattr__(name: str) -> NoReturn:
    if name not in _PLANNED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    raise MissingBackendError(
        f"adamss_conformance.{name}: this version of adamss has no conformance suite; "
        "see the laws in the docstrings of adamss.backend.Backend"
    )
