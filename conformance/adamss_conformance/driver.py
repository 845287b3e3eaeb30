"""How the suite drives a framework: a `Driver` makes its arrays and models, runs and trains them.

A backend says what the framework does for `adamss`; a driver says what a user of the framework would write. Writing
one takes some thirty lines. It is found by the name of its backend: in `BUILT_IN`, or through the entry-point group
``adamss.conformance``, or it is named outright as ``module:Class``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import array_api_compat
import numpy as np
import pytest

from adamss import BudgetConfig, core
from adamss.backend import Backend, get_backend
from adamss.backend.tensors import StoredTensor
from adamss.core import Factors, Gradients
from adamss_conformance.capabilities import Capabilities

__all__ = [
    "FROM_TABLE",
    "NOT_APPLICABLE",
    "Driver",
    "LoopDriver",
    "Training",
    "find_drivers",
    "reasons",
    "require",
]

Array = Any
Model = Any
Inputs = Mapping[str, np.ndarray]
Budget = BudgetConfig | None

ENTRY_POINT_GROUP = "adamss.conformance"
"""Name: that of the backend; value: ``module:Class`` of its driver."""

BUILT_IN = {
    "numpy": ("adamss_conformance.drivers.numpy:NumpyDriver",),
    "strict": (
        "adamss_conformance.drivers.strict:StrictDriver",
        "adamss_conformance.drivers.strict:StaticDriver",
    ),
    "torch": ("adamss_conformance.drivers.torch:TorchDriver",),
    "flax": ("adamss_conformance.drivers.nnx:NnxDriver",),
    "equinox": ("adamss_conformance.drivers.equinox:EquinoxDriver",),
    "jax": ("adamss_conformance.drivers.nnx:NnxDriver", "adamss_conformance.drivers.equinox:EquinoxDriver"),
}


class Training(ABC):
    """A model in training under a budget, one step of the optimiser at a time."""

    @abstractmethod
    def step(self) -> None:
        """Take a step, and let the framework's controller decide what it decides."""

    @property
    @abstractmethod
    def model(self) -> Model:
        """Return the model as it stands, its masks those of the last allocation."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what a resumed training needs beside the model: the state of optimiser and controller."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote."""

    @abstractmethod
    def memory(self) -> list[Array]:
        """Return every number that optimiser and controller remember, as NumPy arrays in an order of their own."""

    def compilations(self) -> int:
        """Return how often the step has been compiled so far; 0 where it is not."""
        return 0


class Driver(ABC):
    """What the suite needs of a framework beside its `Backend`.

    Parameters
    ----------
    backend
        The backend under test; None for the registered one of the name `backend_name`.
    device
        One of `devices()`.
    """

    name: ClassVar[str]
    """What reports call it."""

    backend_name: ClassVar[str]
    """Name of the backend that it drives."""

    capabilities: ClassVar[Capabilities]
    """What it can do, and why not the rest."""

    def __init__(self, backend: Backend | None = None, device: str | None = None) -> None:
        self.backend = get_backend(self.backend_name) if backend is None else backend
        self.device = self.devices()[0] if device is None else device

    @classmethod
    def has_device(cls, device: str) -> bool:
        """Return whether a device of the table is present; override it if one may not be."""
        return True

    @classmethod
    def devices(cls) -> tuple[str, ...]:
        """Return the devices of the table that are present; the suite runs on each."""
        return tuple(device for device in cls.capabilities.devices if cls.has_device(device))

    # ---- what every framework needs ---------------------------------------------------------------------

    @abstractmethod
    def model(self, layers: Mapping[str, tuple[np.ndarray, np.ndarray | None]], dtype: str) -> Model:
        """Return a model with linear layers of these weights W: (d, n) and biases at these module paths."""

    @abstractmethod
    def call(self, model: Model, path: str, x: Array) -> Array:
        """Return the output (..., n) of the layer at a path for an input (..., d)."""

    # ---- what most frameworks share ---------------------------------------------------------------------

    def array(self, values: np.ndarray, dtype: str | None = None) -> Array:
        """Return values as an array of the framework on `device`."""
        return self.backend.from_stored(StoredTensor.of(np.asarray(values)), dtype=dtype)

    def numpy(self, array: Array) -> np.ndarray:
        """Return an array of the framework as NumPy's; bfloat16 as float32."""
        return self.backend.to_stored(array).numpy()

    def device_of(self, array: Array) -> str:
        """Return the name of the device that an array is on, as `devices` spells it."""
        return self.device if len(self.devices()) == 1 else str(array_api_compat.device(array))

    def base_linear(self, x: Array, W: Array, b: Array | None) -> Array:
        """Return what a frozen layer computes."""
        return x @ W if b is None else x @ W + b

    def allocate(self, scores: Array, budget: int, costs: Array | None = None) -> Array:
        """Return the mask (T,) that the framework's budget controller would decide on."""
        return core.allocate(scores, budget, costs)

    def count(self, parameters: Any) -> int:
        """Return how many numbers `adamss.trainable_parameters` hands out."""
        if hasattr(parameters, "shape"):
            return int(np.prod(parameters.shape))
        inner = parameters.values() if isinstance(parameters, Mapping) else parameters
        return sum(self.count(entry) for entry in inner)

    def settings(self, dtype: str | None = None) -> AbstractContextManager[object]:
        """Return a context with the settings of the framework in which cases of a dtype run."""
        return nullcontext()

    def random_state(self) -> Any:
        """Return the state of the framework's global random generator, comparable by ``==``; None if it has none."""
        return None

    # ---- what the capabilities promise ------------------------------------------------------------------

    def gradients(
        self, linear: Callable[..., Array], x: Array, W: Array, b: Array | None, factors: Factors, dy: Array
    ) -> Gradients:
        """Return the gradients of ``sum(dy * linear(x, W, b, factors))`` for x, B and C. Capability ``gradients``."""
        self._broke_its_promise("gradients", "gradients")

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function compiled as a whole, with nothing left to the interpreter. Capability ``compiles``."""
        self._broke_its_promise("compiles", "compile")

    def compilations(self, compiled: Callable[..., Any]) -> int:
        """Return how often a function from `compile` has been compiled so far. Capability ``compiles``."""
        self._broke_its_promise("compiles", "compilations")

    def train(
        self,
        model: Model,
        inputs: Inputs,
        *,
        steps: int,
        optimiser: str,
        rate: float,
        compiled: bool = False,
    ) -> Model:
        """Train an adapted model and return it, the step compiled if asked. Capability ``optimisers``.

        Minimises the sum over the paths of `inputs` of ``mean(call(model, path, x)^2)``, without frozen elements
        moving, by one of `adamss_conformance.capabilities.OPTIMISERS`, started anew with every call.
        """
        self._broke_its_promise("optimisers", "train")

    def training(
        self,
        model: Model,
        inputs: Inputs,
        *,
        optimiser: str,
        rate: float,
        budget: BudgetConfig,
        compiled: bool = False,
    ) -> Training:
        """Return a training of an adapted model as `train` does it, under a budget. Capability ``budget``."""
        self._broke_its_promise("budget", "training")

    def _broke_its_promise(self, capability: str, method: str) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__}: its capabilities promise {capability!r}, and it does not override `{method}`; "
            "write it, or give in Capabilities(missing=...) the reason why not"
        )

    def __str__(self) -> str:
        return self.name if self.device == "cpu" else f"{self.name}-{self.device}"


class LoopDriver(Driver):
    """A driver that trains with and without a budget by one loop."""

    @abstractmethod
    def loop(
        self, model: Model, inputs: Inputs, optimiser: str, rate: float, budget: Budget, compiled: bool
    ) -> Training:
        """Return a training as `Driver.training` does, or one as in `Driver.train` where `budget` is None."""

    def train(self, model: Model, inputs: Inputs, *, steps: int, compiled: bool = False, **how: Any) -> Model:
        """See `Driver.train`."""
        training = self.loop(model, inputs, budget=None, compiled=compiled, **how)
        for _ in range(steps):
            training.step()
        return training.model

    def training(self, model: Model, inputs: Inputs, *, compiled: bool = False, **how: Any) -> Training:
        """See `Driver.training`."""
        return self.loop(model, inputs, compiled=compiled, **how)


NOT_APPLICABLE = "not applicable: "
"""How the reason of every case begins that the table excludes."""

FROM_TABLE = "from_capability_table"
"""Attribute of the outcome of such a case."""


def reasons(driver: Driver) -> set[str]:
    """Return the reasons for which a case may be left out."""
    return {f"{NOT_APPLICABLE}{what}: {why}" for what, why in driver.capabilities.missing.items()}


def require(driver: Driver, capability: str) -> None:
    """Leave the case, with the reason of the table, if the driver lacks a capability."""
    if capability in driver.capabilities.missing:
        try:
            pytest.skip(f"{NOT_APPLICABLE}{capability}: {driver.capabilities.missing[capability]}")
        except pytest.skip.Exception as outcome:
            setattr(outcome, FROM_TABLE, True)
            raise


def find_drivers(target: str) -> list[Driver]:
    """Return the drivers for a name or class, one for each kind of model and each device that is present.

    Parameters
    ----------
    target
        Name of a backend, or ``module:Class`` of a backend or a driver.

    Raises
    ------
    LookupError
        If nothing of the kind can be found; the message says what there is.
    ImportError
        If it is there and cannot be imported.
    """
    backend: Backend | None = None
    module, colon, attribute = target.partition(":")
    if colon:
        found = getattr(import_module(module), attribute, None)
        if not isinstance(found, type) or not issubclass(found, Driver | Backend):
            raise LookupError(f"{target} is neither a Backend nor an adamss_conformance.Driver")
        if issubclass(found, Backend):
            backend = found()
            classes = list(_classes(backend.name))
        else:
            classes = [found]
    else:
        classes = list(_classes(target))
    return [kind(backend, device) for kind in classes for device in kind.devices()]


def _classes(name: str) -> Iterator[type[Driver]]:
    third_party = {point.name: (point.value,) for point in entry_points(group=ENTRY_POINT_GROUP)}
    targets = {**third_party, **BUILT_IN}.get(name)
    if targets is None:
        raise LookupError(
            f"no driver for a backend called {name!r} (there are {', '.join(sorted({*BUILT_IN, *third_party}))}); "
            f"write a Driver, and name it in the entry-point group {ENTRY_POINT_GROUP!r} or as module:Class"
        )
    for target in targets:
        module, _, attribute = target.partition(":")
        yield getattr(import_module(module), attribute)
