"""The interface that every framework's backend keeps to, the registry, and the NumPy reference."""

from adamss.backend.interface import Adaptation, Backend, BaseWeight
from adamss.backend.numpy import NumpyBackend, NumpyLinear, NumpyModel
from adamss.backend.registry import available_backends, backend_for, get_backend, register_backend

__all__ = [
    "Adaptation",
    "Backend",
    "BaseWeight",
    "NumpyBackend",
    "NumpyLinear",
    "NumpyModel",
    "available_backends",
    "backend_for",
    "get_backend",
    "register_backend",
]
