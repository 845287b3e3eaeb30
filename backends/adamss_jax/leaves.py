"""The places of the factors B and C in a tree of parameters, for models of any library."""

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
        Sizes of the stack's axes; ``()`` for a single layer.
    layers
        Index in the stack and `adamss.core.factors.outline` of the factors, for each layer by its path.
    """

    leading: Index
    layers: Mapping[str, tuple[Index, Factors]]

    def split(self, B: Array, C: Array) -> dict[str, tuple[Array, Array]]:
        """Split the leaves, or gradients of them, into B and C of each layer without padding, by path."""
        return {
            path: (B[index][: f.B.shape[0], : f.B.shape[1]], C[index][: f.C.shape[0]])
            for path, (index, f) in self.layers.items()
        }

    def masks(self, active: Mapping[str, Array]) -> tuple[Array, Array]:
        """Return masks that broadcast against the two leaves: True where an element is trained.

        Parameters
        ----------
        active
            Active subspaces of each layer, (K,) booleans, by path.
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
        """Shapes of the leaves B and C."""
        B, C = (
            np.max([getattr(f, name).shape for _, f in self.layers.values()], axis=0).tolist()
            for name in "BC"
        )
        return (*self.leading, *B), (*self.leading, *C)


@partial(jax.jit, static_argnums=0)
def _trained_elements(
    shapes: tuple[Index, Index], labels: Any, ranks: Any, active: Array
) -> tuple[Array, Array]:
    # Compile this, so that labels and ranks are traced: as constants they would be tied to one device.
    B, C = map(jnp.empty, shapes)  # only the shapes are read
    masks: tuple[Array, Array] = trained_elements(Factors(None, B, C, labels, ranks, active))
    return masks


@dataclass(frozen=True)
class Leaves:
    """The leaves B and C of all layers of one adapter.

    Attributes
    ----------
    names
        For the path of each leaf in the tree, as `spelled` writes it: path of the module, and 0 for B or 1 for C.
    pairs
        Leaves of each module, by its path.
    """

    names: Mapping[str, tuple[str, int]]
    pairs: Mapping[str, Pair]

    @property
    def outlines(self) -> dict[str, Factors]:
        """Outlines of the factors of all layers, by path."""
        return {path: f for pair in self.pairs.values() for path, (_, f) in pair.layers.items()}

    def masks(self, active: Mapping[str, Array]) -> dict[tuple[str, int], Array]:
        """Return `Pair.masks` of all modules, by the keys that `name` returns."""
        return {
            (owner, number): mask
            for owner, pair in self.pairs.items()
            for number, mask in enumerate(pair.masks(active))
        }

    def name(self, path: tuple[Any, ...]) -> tuple[str, int] | None:
        """Return the module and number (0 for B, 1 for C) of the leaf at a path; None for any other leaf.

        The path may lead through a tree that contains a tree of parameters, such as an optimiser's state.
        """
        keys = [spelled((key,)) for key in path]
        # In Flax the last key may lead from a variable, which is a node of its own, to its value.
        for end in (len(keys), len(keys) - 1):
            for start in range(end):
                found = self.names.get(".".join(keys[start:end]))
                if found is not None:
                    return found
        return None

    def positions(self, params: Any, what: str) -> dict[str, tuple[int, int]]:
        """Return the positions of B and C among the flattened leaves of a tree of parameters, by path of the module.

        Raises
        ------
        StateError
            If a leaf is missing or has another shape than in the model; the message begins with `what`.
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
                        f"{'no such leaf' if leaf is None else tuple(leaf.shape)}; the parameters belong to another "
                        "model, or some that are trained are missing"
                    )
        return {owner: (found[owner, 0][0], found[owner, 1][0]) for owner in self.pairs}


def spelled(path: tuple[Any, ...]) -> str:
    """Return a path in a pytree as ``targets`` write it: names and numbers joined by dots."""
    return jax.tree_util.keystr(path, simple=True, separator=".")
