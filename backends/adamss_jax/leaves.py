"""Where in a tree of parameters the B and C of the adapted layers are, whatever library the model is of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adamss.backend.sites import Index
from adamss.core import Factors, trained_elements
from adamss.errors import StateError

__all__ = ["Leaves", "Pair", "spelled"]


@dataclass(frozen=True)
class Pair:
    """The leaves B and C of one layer, or of all layers of a stack.

    Attributes
    ----------
    leading
        Axes of the stack.
    layers
        Place in the stack of each of its layers, by path, and an `adamss.core.factors.outline` of its factors.
    """

    leading: Index
    layers: Mapping[str, tuple[Index, Factors]]

    def split(self, B: Array, C: Array) -> dict[str, tuple[Array, Array]]:
        """Return B and C of each layer without padding, by its path, from the leaves or from gradients of them."""
        return {
            path: (B[index][: f.B.shape[0], : f.B.shape[1]], C[index][: f.C.shape[0]])
            for path, (index, f) in self.layers.items()
        }

    def masks(self, active: Mapping[str, Array]) -> tuple[Array, Array]:
        """Return booleans that broadcast against the leaves: True where an element is trained.

        Parameters
        ----------
        active
            (K,) booleans by path.
        """
        found: tuple[list[Array], list[Array]] = ([], [])
        for path, (_, f) in self.layers.items():
            of_layer = _trained_elements((f.B.shape, f.C.shape), f.labels, f.ranks, active[path])
            for masks, mask, shape in zip(found, of_layer, self.shapes, strict=True):
                masks.append(jnp.pad(mask, ((0, 0), (0, shape[-1] - mask.shape[-1]))))
        B, C = (jnp.reshape(jnp.stack(m), (*self.leading, 1, m[0].shape[-1])) for m in found)
        return B, C

    @property
    def shapes(self) -> tuple[Index, Index]:
        """Shapes of the leaves."""
        B, C = (
            np.max([getattr(f, name).shape for _, f in self.layers.values()], axis=0).tolist()
            for name in "BC"
        )
        return (*self.leading, *B), (*self.leading, *C)


@partial(jax.jit, static_argnums=0)
def _trained_elements(
    shapes: tuple[Index, Index], labels: Any, ranks: Any, active: Array
) -> tuple[Array, Array]:
    # Compiled, so that labels and ranks are traced: as constants they would be tied to one device.
    B, C = map(jnp.empty, shapes)  # of which the shape alone is read
    masks: tuple[Array, Array] = trained_elements(Factors(None, B, C, labels, ranks, active))
    return masks


@dataclass(frozen=True)
class Leaves:
    """Those of all adapted layers of a model.

    Attributes
    ----------
    names
        Path of the module, and 0 for B or 1 for C, by the spelled path in the tree.
    pairs
        By path of the module.
    """

    names: Mapping[str, tuple[str, int]]
    pairs: Mapping[str, Pair]

    @property
    def outlines(self) -> dict[str, Factors]:
        """Outline of each layer by its path."""
        return {path: f for pair in self.pairs.values() for path, (_, f) in pair.layers.items()}

    def masks(self, active: Mapping[str, Array]) -> dict[tuple[str, int], Array]:
        """Return `Pair.masks` of all modules, by what `name` says."""
        return {
            (owner, number): mask
            for owner, pair in self.pairs.items()
            for number, mask in enumerate(pair.masks(active))
        }

    def name(self, path: tuple[Any, ...]) -> tuple[str, int] | None:
        """Return which leaf it is that a tree, one of the parameters or one that holds such, has at a path."""
        keys = [spelled((key,)) for key in path]
        # A variable of Flax is a node of its own above its value.
        for end in (len(keys), len(keys) - 1):
            for start in range(end):
                found = self.names.get(".".join(keys[start:end]))
                if found is not None:
                    return found
        return None

    def positions(self, params: Any, what: str) -> dict[str, tuple[int, int]]:
        """Return which of the flattened leaves of a tree of parameters are B and C, by path of the module.

        Raises
        ------
        StateError
            If they are not those of the model; the message says `what` they are.
        """
        found: dict[tuple[str, int], tuple[int, Any]] = {}
        for position, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
            name = self.name(path)
            if name is not None:
                found.setdefault(name, (position, leaf))
        for owner, pair in self.pairs.items():
            for number, shape in enumerate(pair.shapes):
                position, leaf = found.get((owner, number), (0, None))
                if leaf is None or tuple(leaf.shape) != shape:
                    raise StateError(
                        f"{what}: {'BC'[number]} of {owner or 'the model itself'} should have shape {shape}, found "
                        f"{'no such leaf' if leaf is None else tuple(leaf.shape)}; the parameters are those of "
                        "another model, or not all that are trained"
                    )
        return {owner: (found[owner, 0][0], found[owner, 1][0]) for owner in self.pairs}


def spelled(path: tuple[Any, ...]) -> str:
    """Return a path in a pytree as ``targets`` spell it: names and numbers with dots between."""
    return jax.tree_util.keystr(path, simple=True, separator=".")
