"""`JaxBackend`: JAX's primitives for `adamss`; models are left to the shell of their library."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array

from adamss.backend import Adaptation, Backend, BaseWeight
from adamss.backend.tensors import StoredTensor
from adamss.config import AdamssConfig
from adamss.core import Factors, Merged
from adamss.errors import BackendError, StateError
from adamss_jax.functional import linear
from adamss_jax.leaves import Leaves, Pair
from adamss_jax.parts import outline
from adamss_jax.shell import Model, Module, Shell, beside, factors_beside
from adamss_jax.stacks import StackedLayer, by_owner

__all__ = ["JaxBackend"]

SHELLS = {"flax.nnx": "adamss_jax.flax:NnxShell", "equinox": "adamss_jax.equinox:EquinoxShell"}
"""Shell of each library, by the module without which no model of it can exist."""


class JaxBackend(Backend):
    """JAX: Flax NNX modules, changed in place, and Equinox modules, of which every verb returns a new tree."""

    name = "jax"

    def __init__(self) -> None:
        self._shells: dict[str, Shell] = {}

    # ---- arrays -------------------------------------------------------------------------------------

    def linear(self, x: Array, weight: Array, bias: Array | None, factors: Factors) -> Array:
        return linear(x, weight, bias, Factors(*map(jnp.asarray, factors)))

    def to_stored(self, array: Array) -> StoredTensor:
        host = np.asarray(array)
        return StoredTensor(self.dtype_name(array), host.shape, host.tobytes(order="C"))

    def from_stored(
        self, stored: StoredTensor, *, like: Array | None = None, dtype: str | None = None
    ) -> Array:
        kind = np.dtype(getattr(ml_dtypes, stored.dtype, stored.dtype))
        host = np.frombuffer(stored.data, dtype=kind).reshape(stored.shape)
        # Without x64, JAX has no 64-bit types and warns of each that is asked for.
        wanted = jax.dtypes.canonicalize_dtype(kind if dtype is None else jnp.dtype(dtype))
        return beside(host.astype(wanted), like)

    def dtype_name(self, array: Array) -> str:
        return str(array.dtype.name)

    def cast(self, array: Array, dtype: str) -> Array:
        return jnp.asarray(array, jnp.dtype(dtype))

    def has_dtype(self, dtype: str) -> bool:
        return jax.dtypes.canonicalize_dtype(jnp.dtype(dtype)).name == dtype

    def decomposition_input(self, W: Array) -> Any:
        # On the CPU, NumPy has the same routines and compiles nothing: 0.1 s where JAX's first call takes 5.
        on_cpu = all(device.platform == "cpu" for device in W.devices())
        return np.asarray(W.astype(jnp.promote_types(W.dtype, jnp.float32))) if on_cpu else W

    def versions(self) -> Mapping[str, str]:
        loaded = [name for name in ("flax", "equinox") if name in sys.modules]
        return {"jax": jax.__version__, **{name: version(name) for name in loaded}}

    def exact(self) -> AbstractContextManager[object]:
        context: AbstractContextManager[object] = jax.default_matmul_precision("highest")
        return context

    # ---- models -------------------------------------------------------------------------------------

    def _shell(self, model: Model) -> Shell:
        if isinstance(model, StackedLayer):
            model = model.module
        for library, target in SHELLS.items():
            if library not in sys.modules:
                continue
            if library not in self._shells:
                module, _, name = target.partition(":")
                self._shells[library] = getattr(import_module(module), name)()
            if self._shells[library].handles(model):
                return self._shells[library]
        raise BackendError(f"{type(model).__name__} is no module of Flax NNX or Equinox")

    def handles(self, model: Model) -> bool:
        try:
            self._shell(model)
        except BackendError:
            return False
        return True

    def modules(self, model: Model) -> dict[str, Module]:
        return self._shell(model).modules(model)

    def weight(self, module: Module, path: str) -> BaseWeight:
        return self._shell(module).weight(module, path)

    def arrays(self, module: Module) -> dict[str, Array]:
        return self._shell(module).arrays(module)

    def shared(self, model: Model, saved: Iterable[str]) -> Mapping[str, frozenset[str]]:
        return self._shell(model).shared(model, saved)

    def insert(
        self,
        model: Model,
        layers: Mapping[str, Factors],
        *,
        config: AdamssConfig,
        saved: Mapping[str, Mapping[str, Array] | None],
    ) -> Model:
        shell = self._shell(model)
        modules = shell.modules(model)
        placed = {
            path: factors_beside(factors, shell.weight(modules[path], path).W)
            for path, factors in layers.items()
        }
        return shell.insert(model, placed, config=config, saved=saved)

    def adaptation(self, model: Model) -> Adaptation | None:
        return self._shell(model).adaptation(model)

    def parameters(self, model: Model) -> Any:
        return self._shell(model).parameters(model)

    def trained_elements(self, model: Model) -> Any:
        """Return a tree of the structure of `parameters`, with booleans that broadcast: True where trained."""
        leaves = self.leaves(model)
        active = {path: jnp.asarray(factors.active) for path, factors in leaves.outlines.items()}
        masks = leaves.masks(active)
        everything = jnp.ones((), bool)

        def trained(path: tuple[Any, ...], _: Any) -> Array:
            name = leaves.name(path)
            return everything if name is None else masks[name]

        return jax.tree_util.tree_map_with_path(trained, self.parameters(model))

    def leaves(self, model: Model) -> Leaves:
        """Return where in `parameters` the factors of each layer are."""
        shell = self._shell(model)
        adaptation = shell.adaptation(model)
        assert adaptation is not None
        paths = by_owner({path: path for path in adaptation.layers})
        outlines = by_owner({path: outline(factors) for path, factors in adaptation.layers.items()})
        # A stack is adapted as a whole: the last of its layers says how long its axes are.
        pairs = {
            owner: Pair(tuple(axis + 1 for axis in max(own)), own, outlines[owner])
            for owner, own in paths.items()
        }
        return Leaves(shell.leaf_names(model), pairs)

    def set_active(self, model: Model, active: Mapping[str, Array]) -> Model:
        shell = self._shell(model)
        adaptation = shell.adaptation(model)
        assert adaptation is not None
        for path, folded in adaptation.folded.items():
            thawed = np.asarray(active.get(path, False)) & np.asarray(folded)
            if thawed.any():
                raise StateError(
                    f"{path}: the mask thaws subspace {int(np.argmax(thawed))}, which adamss.consolidate has folded "
                    "into the weight; keep it frozen, or load the adapter into the base model afresh"
                )
        return shell.set_active(model, active)

    def remove(self, model: Model, *, restore: bool) -> Model:
        return self._shell(model).remove(model, restore=restore)

    def fold(self, model: Model, merged: Mapping[str, Merged], *, keep_base: bool) -> Model:
        return self._shell(model).fold(model, merged, keep_base=keep_base)

    def unfold(self, model: Model) -> Model:
        return self._shell(model).unfold(model)

    def consolidate(
        self, model: Model, merged: Mapping[str, Merged], folded: Mapping[str, Array], *, keep_base: bool
    ) -> Model:
        return self._shell(model).consolidate(model, merged, folded, keep_base=keep_base)

    def disabled(self, model: Model) -> AbstractContextManager[Model]:
        return self._shell(model).disabled(model)
