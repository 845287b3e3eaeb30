"""Comparison of an adapter with a base model, and of two adapters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from adamss.backend.views import View
from adamss.core import expand
from adamss.core.fingerprint import Fingerprint, fingerprint, unlikely
from adamss.errors import CheckpointError
from adamss.io.checkpoint import LINEAR, Checkpoint, StoredLayer
from adamss.io.weights import WeightFiles, match_names

__all__ = ["Difference", "LayerCheck", "LayerDifference", "diff", "verify"]


ROUNDING = 1e-5
"""Distance of two updates that are the same up to rounding: a portable file has A B rounded once, others A and B."""


@dataclass(frozen=True)
class LayerCheck:
    """Comparison of the base weight of one layer with the one that the adapter was trained on.

    Attributes
    ----------
    path
        Module path in the adapter.
    tensor
        Name of the weight in the files.
    difference
        Difference of the fingerprints, relative to the norm of the weight. It is infinite if the shapes differ.
    tolerance
        Largest difference that rounding to another dtype, or quantisation, can explain.
    fits
        Whether the weight counts as the one that the adapter was trained on.
    """

    path: str
    tensor: str
    difference: float
    tolerance: float
    fits: bool


def verify(
    stored: Checkpoint, files: WeightFiles, *, count: Callable[[], object] = lambda: None
) -> list[LayerCheck]:
    """Compare the weights of a model with the fingerprints in an adapter, one layer at a time.

    Parameters
    ----------
    stored
        The adapter.
    files
        Weights of the model.
    count
        Function that is called after each layer.

    Returns
    -------
    list of LayerCheck
        One entry for each adapted layer. If the adapter was trained on a quantised model, the layers are also judged
        together, since a single layer of two or three bits proves little. If they fail together, no layer fits.

    Raises
    ------
    CheckpointError
        If the model lacks a layer, or stores it in a dtype that NumPy cannot read.
    """
    spelling = match_names(stored.layers, files)
    found, marks = [], []
    for path, layer in stored.layers.items():
        name = spelling.weight(path)
        mark = fingerprint_in(files, name, layer)
        difference, tolerance = layer.base.difference(mark), layer.base.tolerance(mark)
        found.append(LayerCheck(path, name, difference, tolerance, difference <= tolerance))
        if mark.shape == layer.base.shape:
            marks.append((layer.base, mark))
        count()
    if unlikely(marks):
        found = [dataclasses.replace(check, fits=False) for check in found]
    return found


def fingerprint_in(files: WeightFiles, name: str, layer: StoredLayer) -> Fingerprint:
    """Return the fingerprint of a weight in files, viewed as the matrix that a layer of an adapter changes.

    If the weight has another number of axes than the view, the fingerprint fits no other.
    """
    view = layer.view or LINEAR
    if len(view.axes) != len(files[name].shape):
        return Fingerprint((0, 0), math.nan, ())
    return fingerprint(matrix_of(files, name, view))


def matrix_of(files: WeightFiles, name: str, view: View = LINEAR) -> Any:
    """Return a weight in files as the matrix W: (d, n)."""
    array = files.read(name).numpy()
    if array.dtype.kind != "f":
        raise CheckpointError(
            f"{name} has dtype {array.dtype.name}, a quantised format that files do not describe: load the model "
            "in its framework, where adamss takes quantised layers"
        )
    return view.matrix(array)


@dataclass(frozen=True)
class LayerDifference:
    """Difference between the updates dA and dB of two adapters in one layer.

    Attributes
    ----------
    path
        Module path.
    distance
        Relative distance ``||dA - dB||_F / max(||dA||_F, ||dB||_F)``, which is 0 for equal updates.
    cosine
        Cosine ``<dA, dB> / (||dA||_F ||dB||_F)``, or NaN if one of the updates is zero.
    norms
        Norms ``||dA||_F`` and ``||dB||_F``.
    regrouped
        Share of the columns that do not stay together when each subspace of one adapter is paired with one of the
        other.
    active
        Numbers of trained subspaces of both adapters.
    """

    path: str
    distance: float
    cosine: float
    norms: tuple[float, float]
    regrouped: float
    active: tuple[int, int]


@dataclass(frozen=True)
class Difference:
    """Differences between two adapters.

    Attributes
    ----------
    settings
        Values of both adapters by name of the setting, for settings that differ.
    only
        Paths of the layers that only the first adapter has, and of those that only the second has. Layers whose
        shapes differ are in both.
    layers
        Differences in the layers that both adapters have.
    saved
        Largest absolute difference, by name of the tensor, for tensors of ``modules_to_save`` and rows of
        ``trained_tokens`` that both adapters have.
    saved_only
        Names of such tensors that only the first adapter has, and of those that only the second has.
    """

    settings: dict[str, tuple[Any, Any]]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    layers: tuple[LayerDifference, ...]
    saved: dict[str, float]
    saved_only: tuple[tuple[str, ...], tuple[str, ...]]

    @property
    def same(self) -> bool:
        """Whether both adapters change a model in the same way. Their settings may still differ."""
        return (
            not any(self.only)
            and not any(self.saved_only)
            and all(layer.distance <= ROUNDING for layer in self.layers)
            and not any(self.saved.values())
        )


def diff(a: Checkpoint, b: Checkpoint) -> Difference:
    """Return the differences between two adapters.

    Parameters
    ----------
    a, b
        The adapters. They may have different layers and settings.
    """
    ours, theirs = a.config.to_dict(), b.config.to_dict()
    settings = {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}
    both = [
        path
        for path in a.layers
        if path in b.layers and a.layers[path].base.shape == b.layers[path].base.shape
    ]
    layers = tuple(_layer_difference(path, a.layers[path], b.layers[path]) for path in both)
    whole = [_whole_tensors(each) for each in (a, b)]
    common = [name for name in whole[0] if name in whole[1] and whole[0][name].shape == whole[1][name].shape]
    return Difference(
        settings,
        (tuple(p for p in a.layers if p not in both), tuple(p for p in b.layers if p not in both)),
        layers,
        {name: _largest(whole[0][name].numpy(), whole[1][name].numpy()) for name in common},
        (tuple(n for n in whole[0] if n not in common), tuple(n for n in whole[1] if n not in common)),
    )


def _whole_tensors(stored: Checkpoint) -> dict[str, Any]:
    saved = {f"{path}.{name}": tensor for path, own in stored.saved.items() for name, tensor in own.items()}
    return saved | {f"{path} (trained_tokens)": rows for path, rows in stored.tokens.items()}


def _largest(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    if a.size == 0 or np.array_equal(a, b, equal_nan=a.dtype.kind == "f"):
        return 0.0
    return float(np.max(np.abs(a.astype(np.float64) - b.astype(np.float64))))


def _layer_difference(path: str, a: StoredLayer, b: StoredLayer) -> LayerDifference:
    pairs = [_products(layer) for layer in (a, b)]
    norms = tuple(_norm(*pair) for pair in pairs)
    rows = max(M.shape[0] for M, _ in pairs)  # d + 1 if one of them adapts the bias too
    M = [np.pad(M, ((0, rows - M.shape[0]), (0, 0))) for M, _ in pairs]
    inner = float(np.sum((M[0].T @ M[1]) * (pairs[0][1] @ pairs[1][1].T)))
    same = all(np.array_equal(x, y) for x, y in zip(*pairs, strict=True))
    # The difference is computed as one product. Subtracting squared norms instead would suffer from cancellation.
    apart = 0.0 if same else _norm(np.hstack((M[0], -M[1])), np.vstack((pairs[0][1], pairs[1][1])))
    labels = [layer.labels.numpy() for layer in (a, b)]
    return LayerDifference(
        path=path,
        distance=apart / max(norms) if max(norms) else 0.0,
        cosine=inner / math.prod(norms) if all(norms) else math.nan,
        norms=(norms[0], norms[1]),
        regrouped=_regrouped(*labels),
        active=(int(a.active.numpy().sum()), int(b.active.numpy().sum())),
    )


def _products(layer: StoredLayer) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return M: (d, q) and E: (q, n) in float64, the product of which is the update."""
    blocks = layer.split(layer.blocks)
    M = [each.directions().astype(np.float64) for each in blocks]
    E = [np.asarray(expand(each.factors())).astype(np.float64) for each in blocks]
    if len(blocks) == 1:
        return M[0], E[0]
    columns = [each.shape[1] for each in E]
    q, n = sum(each.shape[0] for each in E), sum(columns)
    whole, row, column = np.zeros((q, n)), 0, 0
    for each in E:
        whole[row : row + each.shape[0], column : column + each.shape[1]] = each
        row, column = row + each.shape[0], column + each.shape[1]
    return np.hstack(M), whole


def _norm(M: np.ndarray[Any, Any], E: np.ndarray[Any, Any]) -> float:
    """Return ``||M E||_F``. It follows from the triangular factors of M and E, so the product is never formed."""
    left, right = (np.asarray(np.linalg.qr(each, mode="r")) for each in (M, E.T))
    return float(np.linalg.norm(left @ right.T))


def _regrouped(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """Return the share of columns that are in no common part, if each subspace of a is paired with one of b.

    Pairs are chosen greedily by the size of their common part. This is the best pairing if the two groupings are
    nearly the same.
    """
    table = np.zeros((int(a.max()) + 1, int(b.max()) + 1), dtype=np.int64)
    np.add.at(table, (a.astype(np.int64), b.astype(np.int64)), 1)
    kept_columns = 0
    while table.max() > 0:
        row, column = np.unravel_index(int(table.argmax()), table.shape)
        kept_columns += int(table[row, column])
        table[row, :] = 0
        table[:, column] = 0
    return 1.0 - kept_columns / a.size
