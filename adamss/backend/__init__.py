"""The layer between `adamss.core` and a framework: sites, views, stores, the bank, its ledger, and the backends."""

from adamss.backend.bank import Adaptation, Bank, Ledger
from adamss.backend.interface import Backend, Division, ValueModels
from adamss.backend.numpy import NumpyBackend, NumpyLinear, NumpyModel
from adamss.backend.registry import available_backends, backend_for, get_backend, register_backend
from adamss.backend.sites import BaseWeight, Kind, Kinds, LinearKind, Site, StackedLayer
from adamss.backend.stores import PlainStore, Store, Stores
from adamss.backend.views import View

__all__ = [
    "Adaptation",
    "Backend",
    "Bank",
    "BaseWeight",
    "Division",
    "Kind",
    "Kinds",
    "Ledger",
    "LinearKind",
    "NumpyBackend",
    "NumpyLinear",
    "NumpyModel",
    "PlainStore",
    "Site",
    "StackedLayer",
    "Store",
    "Stores",
    "ValueModels",
    "View",
    "available_backends",
    "backend_for",
    "get_backend",
    "register_backend",
]
