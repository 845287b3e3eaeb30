"""Registry of backends, and the choice of the backend for a model. A backend is imported only when it is needed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points

from adamss.backend.interface import Backend, Model
from adamss.errors import BackendError, MissingBackendError

__all__ = ["available_backends", "backend_for", "get_backend", "register_backend", "using"]

ENTRY_POINT_GROUP = "adamss.backends"


@dataclass(frozen=True)
class _BuiltIn:
    target: str
    framework: str
    """Module without which no model of this backend can exist, so the backend is asked only if it is imported."""


# These backends are listed here, so that they are found even in a copy of the source tree without installed metadata.
_BUILT_IN = {
    "numpy": _BuiltIn("adamss.backend:NumpyBackend", "numpy"),
    "torch": _BuiltIn("adamss_torch:TorchBackend", "torch"),
    "flax": _BuiltIn("adamss_jax.flax:NnxBackend", "flax.nnx"),
    "equinox": _BuiltIn("adamss_jax.equinox:EquinoxBackend", "equinox"),
}
_registered: dict[str, type[Backend]] = {}
_instances: dict[str, Backend] = {}


def register_backend(backend: type[Backend]) -> type[Backend]:
    """Register a backend class under its name for this process. Can be used as a decorator.

    A package registers its backend permanently through the entry-point group ``adamss.backends``.

    Parameters
    ----------
    backend
        A concrete subclass of `Backend`.

    Returns
    -------
    type
        The same class.

    Raises
    ------
    BackendError
        If the class is not a concrete subclass of `Backend`, or has no name.

    Examples
    --------
    >>> from adamss.backend import NumpyBackend, get_backend, register_backend
    >>> @register_backend
    ... class MyBackend(NumpyBackend):
    ...     name = "mine"
    ...     def handles(self, model):
    ...         return type(model).__module__ == "my_framework"
    >>> type(get_backend("mine")).__name__
    'MyBackend'
    """
    missing = sorted(getattr(backend, "__abstractmethods__", ()))
    if not (isinstance(backend, type) and issubclass(backend, Backend)) or missing:
        lacks = f"; it lacks {', '.join(missing)}" if missing else ""
        raise BackendError(f"a backend must be a concrete subclass of adamss.backend.Backend{lacks}")
    if not isinstance(getattr(backend, "name", None), str):
        raise BackendError(f"{backend.__name__} needs a class attribute `name`, such as 'torch'")
    _registered[backend.name] = backend
    _instances.pop(backend.name, None)
    return backend


@contextmanager
def using(backend: Backend) -> Iterator[None]:
    """Use a given backend instance within a ``with`` block.

    The instance is returned for its name, and it is asked before all other backends.

    Parameters
    ----------
    backend
        Instance of a backend, whose class need not be registered.
    """
    registered, instances = dict(_registered), dict(_instances)
    _registered.clear()
    _registered.update({backend.name: type(backend)} | registered | {backend.name: type(backend)})
    _instances[backend.name] = backend
    try:
        yield
    finally:
        for table, before in ((_registered, registered), (_instances, instances)):
            table.clear()
            table.update(before)  # type: ignore[arg-type]


def available_backends() -> tuple[str, ...]:
    """Return the names of all known backends in alphabetical order, whether or not their frameworks are installed."""
    return tuple(sorted({*_BUILT_IN, *_registered, *_entry_points()}))


def get_backend(name: str) -> Backend:
    """Return the backend with the given name.

    Parameters
    ----------
    name
        Name of the backend, such as ``"numpy"`` or ``"torch"``.

    Returns
    -------
    Backend
        The only instance of the backend in this process.

    Raises
    ------
    BackendError
        If no backend has this name.
    MissingBackendError
        If the backend cannot be imported, as when its framework is not installed. The message says what to install.
    """
    if name not in _instances:
        _instances[name] = _load(name)()
    return _instances[name]


def backend_for(model: Model) -> Backend:
    """Return the backend that handles a model.

    Parameters
    ----------
    model
        Model of any framework.

    Returns
    -------
    Backend
        The first backend that handles the model. Registered backends are asked first, then those of `adamss`, then
        those of entry points.

    Raises
    ------
    BackendError
        If no backend handles the model.
    """
    tried = []
    for name in _names():
        if name not in _registered and name in _BUILT_IN and _BUILT_IN[name].framework not in sys.modules:
            continue
        try:
            backend = get_backend(name)
        except MissingBackendError:
            continue
        if backend.handles(model):
            return backend
        tried.append(name)
    raise BackendError(
        f"no backend knows models of type {type(model).__module__}.{type(model).__qualname__} "
        f"(asked: {', '.join(tried)}); see adamss.backend for writing one"
    )


def _names() -> Iterator[str]:
    """Yield the names of all backends, entry points last, since reading the installed metadata takes a while."""
    known = dict.fromkeys((*_registered, *_BUILT_IN))
    yield from known
    yield from (name for name in _entry_points() if name not in known)


def _entry_points() -> dict[str, str]:
    return {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}


def _load(name: str) -> type[Backend]:
    if name in _registered:
        return _registered[name]
    target = _BUILT_IN[name].target if name in _BUILT_IN else _entry_points().get(name)
    if target is None:
        raise BackendError(f"no backend is called {name!r}; there are {', '.join(available_backends())}")
    module, _, attribute = target.partition(":")
    try:
        backend = getattr(import_module(module), attribute)
    except MissingBackendError:
        raise
    except ImportError as error:
        remedy = f"pip install 'adamss[{name}]'" if name in _BUILT_IN else f"install what {module} needs"
        raise MissingBackendError(f"the backend {name!r} cannot be imported ({error}); {remedy}") from error
    return register_backend(backend)
