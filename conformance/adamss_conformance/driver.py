"""Drivers, through which the suite uses a framework: a `Driver` makes arrays and models, runs and trains them.

A backend implements what `adamss` needs of the framework. A driver does what a user of the framework would do, and
takes about thirty lines. The suite finds it by the name of its backend, in `BUILT_IN` or in the entry-point group
``adamss.conformance``, or gets it directly as ``module:Class``.
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
"""Entry-point group of drivers. The name of an entry is the backend's, its value ``module:Class`` of the driver."""

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
    """A model in training under a budget, one step of the optimiser at a time.

    Examples
    --------
    The training of the driver for NumPy, which reduces four subspaces to one in two steps:

    >>> import numpy as np, adamss
    >>> from adamss_conformance.drivers.numpy import NumpyDriver
    >>> driver = NumpyDriver()
    >>> model = driver.model({"query": (np.diag([4.0, 3.0, 2.0, 1.0]), None)}, "float64")
    >>> budget = adamss.BudgetConfig(target=1, end_step=2)
    >>> config = adamss.AdamssConfig(targets=["query"], rank=4, subspaces=4, budget=budget)
    >>> model, inputs = adamss.attach(model, config), {"query": np.ones((2, 4))}
    >>> training = driver.training(model, inputs, optimiser="sgd", rate=0.1, budget=budget)
    >>> for _ in range(2):
    ...     training.step()
    >>> adamss.summary(training.model).total.active
    1
    """

    @abstractmethod
    def step(self) -> None:
        """Take a step of the optimiser, and of the budget's controller."""

    @property
    @abstractmethod
    def model(self) -> Model:
        """Return the model in its current state, with the masks of the last allocation."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the states of optimiser and controller, which a resumed training needs in addition to the model."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Restore the states that `save` wrote."""

    @abstractmethod
    def memory(self) -> list[Array]:
        """Return all numbers in the states of optimiser and controller, as NumPy arrays in any fixed order."""

    def compilations(self) -> int:
        """Return how often the step has been compiled so far; 0 if it is not compiled."""
        return 0


class Driver(ABC):
    """What the suite needs of a framework in addition to its `Backend`.

    Parameters
    ----------
    backend
        Backend under test. None means the registered backend called `backend_name`.
    device
        Device to run on, one of `devices()`. None means the first of them.
    """

    name: ClassVar[str]
    """Name of the driver in reports."""

    backend_name: ClassVar[str]
    """Name of the backend that the driver uses."""

    capabilities: ClassVar[Capabilities]
    """What the driver can do, and the reasons for what it cannot."""

    def __init__(self, backend: Backend | None = None, device: str | None = None) -> None:
        self.backend = get_backend(self.backend_name) if backend is None else backend
        self.device = self.devices()[0] if device is None else device

    @classmethod
    def has_device(cls, device: str) -> bool:
        """Return whether a device of `capabilities` is present; override this if one may be absent."""
        return True

    @classmethod
    def devices(cls) -> tuple[str, ...]:
        """Return the devices of `capabilities` that are present; the suite runs on each."""
        return tuple(device for device in cls.capabilities.devices if cls.has_device(device))

    # ---- what every driver must define ------------------------------------------------------------------

    @abstractmethod
    def model(self, layers: Mapping[str, tuple[np.ndarray, np.ndarray | None]], dtype: str) -> Model:
        """Return a model with linear layers at these module paths, of these weights W, (d, n), and biases."""

    @abstractmethod
    def call(self, model: Model, path: str, x: Array) -> Array:
        """Return the output (..., n) of the layer at a path for an input (..., d)."""

    # ---- what the default does for most frameworks ------------------------------------------------------

    def array(self, values: np.ndarray, dtype: str | None = None) -> Array:
        """Return values as an array of the framework, on the driver's device."""
        return self.backend.from_stored(StoredTensor.of(np.asarray(values)), dtype=dtype)

    def numpy(self, array: Array) -> np.ndarray:
        """Return an array of the framework as a NumPy array; bfloat16 becomes float32."""
        return self.backend.to_stored(array).numpy()

    def device_of(self, array: Array) -> str:
        """Return the name of the device that an array is on, as `devices` writes it."""
        return self.device if len(self.devices()) == 1 else str(array_api_compat.device(array))

    def base_linear(self, x: Array, W: Array, b: Array | None) -> Array:
        """Return the output of a frozen layer."""
        return x @ W if b is None else x @ W + b

    def allocate(self, scores: Array, budget: int, costs: Array | None = None) -> Array:
        """Return the mask (T,) that the framework's controller of the budget would choose."""
        return core.allocate(scores, budget, costs)

    def count(self, parameters: Any) -> int:
        """Return the total size of the arrays that `adamss.trainable_parameters` returned."""
        if hasattr(parameters, "shape"):
            return int(np.prod(parameters.shape))
        inner = parameters.values() if isinstance(parameters, Mapping) else parameters
        return sum(self.count(entry) for entry in inner)

    def settings(self, dtype: str | None = None) -> AbstractContextManager[object]:
        """Return a context that sets the framework up for cases of a dtype."""
        return nullcontext()

    def random_state(self) -> Any:
        """Return the state of the framework's global random generator, to be compared by ``==``; None without one."""
        return None

    # ---- what the capabilities require ------------------------------------------------------------------

    def gradients(
        self, linear: Callable[..., Array], x: Array, W: Array, b: Array | None, factors: Factors, dy: Array
    ) -> Gradients:
        """Return the gradients of ``sum(dy * linear(x, W, b, factors))`` for x, B and C. Capability ``gradients``."""
        self._broke_its_promise("gradients", "gradients")

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a function as a whole, without falling back to the interpreter. Capability ``compiles``."""
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
        """Train an adapted model and return it, with a compiled step if asked. Capability ``optimisers``.

        The loss is the sum of ``mean(call(model, path, x)^2)`` over the paths of `inputs`. The optimiser is one of
        `adamss_conformance.capabilities.OPTIMISERS`, with a new state in every call. Frozen elements must not move.
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
        """Return the training of an adapted model that `train` does, but under a budget. Capability ``budget``."""
        self._broke_its_promise("budget", "training")

    def _broke_its_promise(self, capability: str, method: str) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__}: its capabilities promise {capability!r}, but it does not override `{method}`; "
            "write the method, or give the reason why not in Capabilities(missing=...)"
        )

    def __str__(self) -> str:
        return self.name if self.device == "cpu" else f"{self.name}-{self.device}"


class LoopDriver(Driver):
    """A driver that uses one training loop with and without a budget."""

    @abstractmethod
    def loop(
        self, model: Model, inputs: Inputs, optimiser: str, rate: float, budget: Budget, compiled: bool
    ) -> Training:
        """Return a training as `Driver.training` does; if `budget` is None, it trains as `Driver.train` does."""

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
"""Prefix of the reason with which the table excludes a case."""

FROM_TABLE = "from_capability_table"
"""Attribute that marks the pytest outcome of such a case."""


def reasons(driver: Driver) -> set[str]:
    """Return the reasons for which a case may be skipped."""
    return {f"{NOT_APPLICABLE}{what}: {why}" for what, why in driver.capabilities.missing.items()}


def require(driver: Driver, capability: str) -> None:
    """Skip the case, with the reason from the table, if the driver lacks a capability."""
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
        If there is no driver for the name, or the class is neither a backend nor a driver.
    ImportError
        If the module of the class or driver cannot be imported.
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
