"""The reference backend: NumPy arrays, and the smallest model that can be adapted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from adamss import core
from adamss.backend.interface import Adaptation, Backend, BaseWeight, without_folded
from adamss.backend.tensors import StoredTensor
from adamss.config import AdamssConfig
from adamss.core import Factors, Gradients, Merged
from adamss.core._array import namespace
from adamss.errors import ArrayTypeError, ConfigError, LayerTypeError, StateError

__all__ = ["NumpyBackend", "NumpyLinear", "NumpyModel"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class NumpyLinear:
    """A linear layer ``y = x @ W + b``, and its adapter if it has one.

    Attributes
    ----------
    W
        Weight (d, n).
    b
        Bias (n,) or None.
    factors
        The adapter, or None.
    base
        The base weight, while `W` and `b` are merged or consolidated ones and it was kept; else None.
    merged
        Whether `W` and `b` hold the update already.
    folded
        (K,) booleans, the subspaces whose update `W` and `b` hold already; None for none.
    """

    W: Array
    b: Array | None = None
    factors: Factors | None = None
    base: BaseWeight | None = None
    merged: bool = False
    folded: Array | None = None

    def __call__(self, x: Array) -> Array:
        """Return the output (..., n) for inputs (..., d)."""
        factors = self.computed()
        if factors is None:
            return x @ self.W if self.b is None else x @ self.W + self.b
        return np.asarray(core.linear(x, self.W, self.b, factors))

    def computed(self) -> Factors | None:
        """Return the factors whose update is added to the frozen product: without what `W` holds already."""
        if self.factors is None or self.merged or self.folded is None:
            return None if self.merged else self.factors
        return core.only(self.factors, ~self.folded)


@dataclass(frozen=True)
class NumpyModel:
    """Named linear layers: immutable, so that every verb returns a new model.

    Attributes
    ----------
    layers
        Layers by path, such as ``"encoder.0.query"``.

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
    config: AdamssConfig | None = None
    saved: tuple[str, ...] = ()
    originals: Mapping[str, NumpyLinear] | None = None

    def __getitem__(self, path: str) -> NumpyLinear:
        return self.layers[path]


class NumpyBackend(Backend):
    """NumPy: the float64 oracle that every other backend is compared with."""

    name = "numpy"
    array_type: type = np.ndarray
    """What a layer holds; a subclass for another namespace of the array API changes it."""

    def linear(self, x: Array, weight: Array, bias: Array | None, factors: Factors) -> Array:
        return np.asarray(core.linear(x, weight, bias, factors))

    def linear_vjp(self, dy: Array, x: Array, weight: Array, factors: Factors) -> Gradients:
        """Return the gradients of `linear`, written by hand: see `adamss.core.linear_vjp`."""
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

    def weight(self, module: Any, path: str) -> BaseWeight:
        if not isinstance(module, NumpyLinear):
            raise LayerTypeError(f"{path}: expected a NumpyLinear, found {type(module).__name__}")
        if not isinstance(module.W, self.array_type):
            raise ArrayTypeError(f"{path}: W must be a NumPy array, found {type(module.W).__name__}")
        if module.base is not None:
            return module.base
        if module.merged:
            raise StateError(f"{path}: the base weight was dropped by merge(keep_base=False)")
        if module.folded is not None and module.factors is not None:
            return without_folded(BaseWeight(module.W, module.b), module.factors, module.folded)
        return BaseWeight(module.W, module.b)

    def arrays(self, module: NumpyLinear) -> dict[str, Array]:
        weight = {"weight": module.W.T}
        return weight if module.b is None else weight | {"bias": module.b}

    def insert(
        self,
        model: NumpyModel,
        layers: Mapping[str, Factors],
        *,
        config: AdamssConfig,
        saved: Mapping[str, Mapping[str, Array] | None],
    ) -> NumpyModel:
        changed = dict(model.layers)
        for path, factors in layers.items():
            changed[path] = replace(changed[path], factors=Factors(*map(_in_rows, factors)))
        for path, values in saved.items():
            # Copies: a training loop writes into them, and `remove` gives the originals back.
            new = self.arrays(changed[path]) if values is None else values
            copies = {name: namespace(array).asarray(array, copy=True) for name, array in new.items()}
            changed[path] = replace(changed[path], W=copies["weight"].T, b=copies.get("bias"))
        return NumpyModel(changed, config, tuple(saved), model.layers)

    def adaptation(self, model: NumpyModel) -> Adaptation | None:
        if model.config is None:
            return None
        adapted = {path: layer for path, layer in model.layers.items() if layer.factors is not None}
        return Adaptation(
            config=model.config,
            layers={path: layer.factors for path, layer in adapted.items() if layer.factors is not None},
            shapes={path: (layer.W.shape[0], layer.W.shape[1]) for path, layer in adapted.items()},
            saved=model.saved,
            merged=any(layer.merged for layer in adapted.values()),
            base_kept=all(
                layer.base is not None or not (layer.merged or layer.folded is not None)
                for layer in adapted.values()
            ),
            folded={path: layer.folded for path, layer in adapted.items() if layer.folded is not None},
        )

    def parameters(self, model: NumpyModel) -> dict[str, dict[str, Array]]:
        adapted = {
            path: {"B": layer.factors.B, "C": layer.factors.C}
            for path, layer in model.layers.items()
            if layer.factors is not None
        }
        return adapted | {path: self.arrays(model.layers[path]) for path in model.saved}

    def set_active(self, model: NumpyModel, active: Mapping[str, Array]) -> NumpyModel:
        changed = dict(model.layers)
        for path, mask in active.items():
            factors = changed[path].factors
            assert factors is not None
            changed[path] = replace(changed[path], factors=factors._replace(active=mask))
        return replace(model, layers=changed)

    def remove(self, model: NumpyModel, *, restore: bool) -> NumpyModel:
        if restore:
            return NumpyModel(model.originals or {})
        return NumpyModel({path: NumpyLinear(layer.W, layer.b) for path, layer in model.layers.items()})

    def fold(self, model: NumpyModel, merged: Mapping[str, Merged], *, keep_base: bool) -> NumpyModel:
        return self._with_weights(model, merged, {path: {"merged": True} for path in merged}, keep_base)

    def consolidate(
        self, model: NumpyModel, merged: Mapping[str, Merged], folded: Mapping[str, Array], *, keep_base: bool
    ) -> NumpyModel:
        return self._with_weights(
            model, merged, {path: {"folded": folded[path]} for path in merged}, keep_base
        )

    def _with_weights(
        self, model: NumpyModel, merged: Mapping[str, Merged], state: Mapping[str, Any], keep_base: bool
    ) -> NumpyModel:
        changed = dict(model.layers)
        for path, value in merged.items():
            base = self.weight(changed[path], path) if keep_base else None
            changed[path] = replace(changed[path], W=value.W, b=value.b, base=base, **state[path])
        return replace(model, layers=changed, originals=model.originals if keep_base else None)

    def unfold(self, model: NumpyModel) -> NumpyModel:
        return replace(
            model,
            layers={
                path: replace(layer, W=layer.base.W, b=layer.base.b, base=None, merged=False, folded=None)
                if layer.base is not None
                else layer
                for path, layer in model.layers.items()
            },
        )

    @contextmanager
    def disabled(self, model: NumpyModel) -> Iterator[NumpyModel]:
        yield NumpyModel(model.originals or {})


def _in_rows(array: Any) -> Any:
    """In one layout whatever it comes from: products of another may round otherwise."""
    return np.ascontiguousarray(array) if isinstance(array, np.ndarray) else array
