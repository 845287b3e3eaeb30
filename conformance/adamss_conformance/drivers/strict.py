"""Drivers that run the core on `array_api_strict`, which offers only what the array API standard requires."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import array_api_strict as xp
import numpy as np

from adamss.backend import NumpyBackend
from adamss.backend.tensors import StoredTensor
from adamss.core import Factors, linear
from adamss_conformance.capabilities import TABLE
from adamss_conformance.drivers.numpy import NumpyDriver

__all__ = ["StaticDriver", "StrictBackend", "StrictDriver"]

Array = Any

HOST = xp.Device("CPU_DEVICE")


class StrictBackend(NumpyBackend):
    """A backend for `NumpyModel` with arrays of `array_api_strict`, on one of the devices that it simulates."""

    name = "strict"
    array_type = type(xp.asarray(0.0))

    def __init__(self, device: Any = HOST) -> None:
        self.device = device

    def handles(self, model: Any) -> bool:
        return super().handles(model) and any(isinstance(m.W, self.array_type) for m in model.layers.values())

    def linear(self, x: Array, weight: Array, bias: Array | None, *factors: Factors) -> Array:
        return linear(x, weight, bias, *factors)

    def to_stored(self, array: Array) -> StoredTensor:
        return StoredTensor.of(np.from_dlpack(array.to_device(HOST)))

    def from_stored(
        self, stored: StoredTensor, *, like: Array | None = None, dtype: str | None = None
    ) -> Array:
        array = xp.asarray(stored.numpy().copy(), device=self.device if like is None else like.device)
        return array if dtype is None else self.cast(array, dtype)

    def dtype_name(self, array: Array) -> str:
        return str(array.dtype).rpartition(".")[2]

    def cast(self, array: Array, dtype: str) -> Array:
        return xp.astype(array, getattr(xp, dtype))

    def has_dtype(self, dtype: str) -> bool:
        return hasattr(xp, dtype)

    def versions(self) -> Mapping[str, str]:
        return {"array-api-strict": xp.__version__}


class StrictDriver(NumpyDriver):
    """A driver for the host and a simulated second device, where mixing arrays of both is an error."""

    name = "strict"
    backend_name = "strict"
    capabilities = TABLE["strict"]

    def __init__(self, backend: Any = None, device: str | None = None) -> None:
        device = self.devices()[0] if device is None else device
        on = HOST if device == "cpu" else xp.Device(device)
        backend = StrictBackend() if backend is None else backend
        backend.device = on
        super().__init__(backend, device)

    def device_of(self, array: Array) -> str:
        return "cpu" if array.device == HOST else str(array.device).split("'")[1]


class StaticDriver(StrictDriver):
    """The same without boolean indexing and data-dependent shapes, neither of which a compiler supports."""

    name = "strict-static"
    capabilities = replace(TABLE["strict"], devices=("cpu",))

    def settings(self, dtype: str | None = None) -> AbstractContextManager[object]:
        flags: AbstractContextManager[object] = xp.ArrayAPIStrictFlags(
            boolean_indexing=False, data_dependent_shapes=False
        )
        return flags
