"""The reference backend: NumPy arrays, and the smallest model that can be adapted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from adamss import core
from adamss.backend.bank import Bank
from adamss.backend.interface import Backend, ValueModels
from adamss.backend.sites import Kinds, LinearKind, Site
from adamss.backend.tensors import StoredTensor
from adamss.core import Factors, Gradients
from adamss.core._array import namespace
from adamss.errors import ArrayTypeError, ConfigError

__all__ = ["NumpyBackend", "NumpyLinear", "NumpyModel"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class NumpyLinear:
    """A linear layer ``y = x @ W + b`` with the updates of its adapters.

    Attributes
    ----------
    W
        Weight (d, n).
    b
        Bias (n,) or None.
    computed
        Factors whose updates are added to the frozen product, as `Bank.computed` returns them.
    route
        Function that maps the input to the argument `route` of `adamss.core.linear`. None adds all updates to all
        rows.
    """

    W: Array
    b: Array | None = None
    computed: tuple[Factors, ...] = ()
    route: Callable[[Array], Array | None] | None = None

    def __call__(self, x: Array) -> Array:
        """Return the output (..., n) for inputs (..., d)."""
        route = None if self.route is None else self.route(x)
        return np.asarray(core.linear(x, self.W, self.b, *self.computed, route=route))


@dataclass(frozen=True)
class NumpyModel:
    """Named linear layers. The model is immutable, so that every verb returns a new model.

    Attributes
    ----------
    layers
        Layers by path, such as ``"encoder.0.query"``.
    bank
        Adapters of the model.

    Examples
    --------
    >>> import numpy as np, adamss
    >>> from adamss.backend import NumpyLinear, NumpyModel
    >>> model = NumpyModel({"query": NumpyLinear(np.eye(4))})
    >>> adapted = adamss.attach(model, adamss.AdamssConfig(targets=["query"], rank=4, subspaces=2))
    >>> adamss.summary(adapted).total.trained
    12
    """

    layers: Mapping[str, NumpyLinear]
    bank: Bank = field(default_factory=Bank)

    def __getitem__(self, path: str) -> NumpyLinear:
        return self.layers[path]


class Linear(LinearKind):
    """The kind of `NumpyLinear`."""

    classes = (NumpyLinear,)


class NumpyBackend(ValueModels, Backend):
    """Backend for NumPy. In float64 it is the reference with which every other backend is compared."""

    name = "numpy"
    kinds = Kinds(Linear())
    array_type: type = np.ndarray
    """Type of the arrays in a layer. A subclass for another array API namespace overrides it."""

    def linear(self, x: Array, weight: Array, bias: Array | None, *factors: Factors) -> Array:
        return np.asarray(core.linear(x, weight, bias, *factors))

    def linear_vjp(self, dy: Array, x: Array, weight: Array, factors: Factors) -> Gradients:
        """Return the closed-form gradients of `linear`, see `adamss.core.linear_vjp`."""
        return core.linear_vjp(dy, x, weight, factors)

    def to_stored(self, array: Array) -> StoredTensor:
        return StoredTensor.of(np.asarray(array))

    def from_stored(
        self, stored: StoredTensor, *, like: Array | None = None, dtype: str | None = None
    ) -> Array:
        array = stored.numpy()
        return array.copy() if dtype is None else self.cast(array, dtype)

    def dtype_name(self, array: Array) -> str:
        return str(array.dtype.name)

    def cast(self, array: Array, dtype: str) -> Array:
        if dtype == "bfloat16":
            raise ConfigError("NumPy has no bfloat16; choose factor_dtype = 'float32'")
        return array.astype(dtype)

    def has_dtype(self, dtype: str) -> bool:
        return dtype != "bfloat16"

    def versions(self) -> Mapping[str, str]:
        return {"numpy": np.__version__}

    def handles(self, model: Any) -> bool:
        return isinstance(model, NumpyModel)

    def modules(self, model: NumpyModel) -> dict[str, NumpyLinear]:
        return dict(model.layers)

    def arrays(self, module: NumpyLinear) -> dict[str, Array]:
        weight = {"weight": module.W.T}
        return weight if module.b is None else weight | {"bias": module.b}

    def own_arrays(self, site: Site) -> dict[str, Array | None]:
        if not isinstance(site.layer.W, self.array_type):
            raise ArrayTypeError(f"{site.path}: W must be a NumPy array, found {type(site.layer.W).__name__}")
        return super().own_arrays(site)

    def bank(self, model: NumpyModel) -> Bank:
        return model.bank

    def with_bank(self, model: NumpyModel, bank: Bank) -> NumpyModel:
        for name, adaptation in bank.adapters.items():
            rows = {path: Factors(*map(_in_rows, factors)) for path, factors in adaptation.layers.items()}
            bank = bank.changed(name, layers=rows)
        layers = {
            path: replace(
                layer,
                computed=tuple(bank.computed(path)),
                route=None if bank.route is None else partial(bank.numbers, path),
            )
            for path, layer in model.layers.items()
        }
        return NumpyModel(layers, bank)

    def with_arrays(self, model: NumpyModel, values: Mapping[str, Mapping[str, Array]]) -> NumpyModel:
        changed = dict(model.layers)
        for path, arrays in values.items():
            # Copy the arrays: a training loop may write into those of the model, and the caller keeps the originals
            # to restore them later.
            own = self.arrays(changed[path]) | {
                name: namespace(array).asarray(array, copy=True) for name, array in arrays.items()
            }
            changed[path] = replace(changed[path], W=own["weight"].T, b=own.get("bias"))
        return replace(model, layers=changed)


def _in_rows(array: Any) -> Any:
    """Return the array in row-major layout, since products of arrays in another layout may round differently."""
    return np.ascontiguousarray(array) if isinstance(array, np.ndarray) else array
