"""What the weights of a checkpoint look like, read one matrix at a time."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adamss import core
from adamss.backend.targets import DEFAULT_TARGETS, match
from adamss.backend.views import View
from adamss.core.decomposition import effective_coordinates
from adamss.errors import ArrayValueError, TargetError
from adamss.io.checkpoint import LINEAR
from adamss.io.weights import WeightFiles
from adamss.offline.compare import matrix_of

__all__ = ["ALL_LINEAR", "MatrixReport", "inspect", "linear_layers", "model_config", "targeted"]

ALL_LINEAR = "all-linear"
NOT_LINEAR = (
    "embed",
    "wte",
    "wpe",
    "norm",
    "lm_head",
    "pooler",
    "classifier",
    "score",
    "rotary",
    "relative_attention",
)
"""Parts of names of matrices that ``"all-linear"`` leaves out: embeddings, tables, and output heads."""

CONV1D = {
    "gpt2": ("c_attn", "c_proj", "c_fc", "q_attn"),
    "openai-gpt": ("c_attn", "c_proj", "c_fc"),
    "imagegpt": ("c_attn", "c_proj", "c_fc", "q_attn"),
    "decision_transformer": ("c_attn", "c_proj", "c_fc", "q_attn"),
}
"""Layers of transformers that store W and not its transpose, by ``model_type``."""

LONGEST_CONFIG = 1 << 24


@dataclass(frozen=True)
class MatrixReport:
    """What one weight looks like.

    Attributes
    ----------
    path
        Module path.
    shape
        (d, n).
    dtype
        As stored.
    norm
        Frobenius norm.
    energy
        Share of ``||W||_F^2`` in the R leading singular directions.
    sizes
        Columns n_k of each subspace, as `adamss.core.segment` finds them.
    estimated
        K by the paper's Algorithm 2, without a lower bound.
    inside
        Share of ``||Z*||_F^2`` inside the subspaces: `adamss.core.analysis.block_diagonality`.
    inside_by_chance
        The same for columns dealt at random into groups of these sizes, on average.
    gain
        ``inside / inside_by_chance``: 1 where the subspaces say nothing about the columns.
    gain_of_random
        The same for a matrix with random singular vectors, whose columns are grouped in the same way.
    """

    path: str
    shape: tuple[int, int]
    dtype: str
    norm: float
    energy: float
    sizes: tuple[int, ...]
    estimated: int
    inside: float
    inside_by_chance: float
    gain: float
    gain_of_random: float


def inspect(
    files: WeightFiles,
    paths: Iterable[str],
    *,
    rank: int = 100,
    subspaces: int = 10,
    segmentation: str = "kmeans",
    seed: int = 0,
) -> Iterator[MatrixReport]:
    """Yield a report of each weight, with no more than one of them in memory.

    Parameters
    ----------
    files
        Weights of a model.
    paths
        Module paths, as from `targeted`.
    rank, subspaces, segmentation, seed
        As of `adamss.AdamssConfig`. They are clamped to what a matrix allows.

    Raises
    ------
    CheckpointError
        If a weight is kept in a dtype that NumPy cannot read.
    ArrayValueError
        If it holds NaN or infinity. Messages name the layer.
    """
    views = _views(files)
    for path in paths:
        name = f"{path}.weight" if path else "weight"
        W = matrix_of(files, name, views(path))
        try:
            yield _report(path, W, files[name].dtype, rank, subspaces, segmentation, seed)
        except ArrayValueError as error:
            raise ArrayValueError(f"{path}: {error}") from error


def _report(
    path: str, W: np.ndarray[Any, Any], dtype: str, rank: int, subspaces: int, segmentation: str, seed: int
) -> MatrixReport:
    d, n = W.shape
    decomposition = core.decompose(W, min(rank, d, n), seed=seed)
    norm = float(np.linalg.norm(W.astype(np.float32, copy=False).ravel()))
    energy = float(np.sum(np.square(decomposition.S.astype(np.float64)))) / norm**2 if norm else 1.0
    K = min(subspaces, n)
    labels = np.asarray(core.segment(decomposition, K, segmentation, seed=seed))
    inside, chance = _inside(decomposition, labels)
    draws = np.random.default_rng(seed).standard_normal(decomposition.V.shape).astype(decomposition.V.dtype)
    random = decomposition._replace(V=np.linalg.qr(draws)[0])
    of_random = _inside(random, np.asarray(core.segment(random, K, segmentation, seed=seed)))
    return MatrixReport(
        path=path,
        shape=(d, n),
        dtype=dtype,
        norm=norm,
        energy=min(energy, 1.0),
        sizes=tuple(int(size) for size in core.subspace_sizes(labels, int(labels.max()) + 1)),
        estimated=core.estimate_subspaces(decomposition, minimum=1),
        inside=inside,
        inside_by_chance=chance,
        gain=inside / chance,
        gain_of_random=of_random[0] / of_random[1],
    )


def _inside(decomposition: core.Decomposition, labels: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Return `block_diagonality` of Z* and what it is on average for labels in random order, without forming Z*.

    With the coordinates v_i of the columns, ``Z*_ij = <v_i, v_j>``, so that the sum of squares within a group is that
    of the Gram matrix of its coordinates, which is (R, R) where Z* is (n, n).
    """
    V = np.asarray(effective_coordinates(decomposition), dtype=np.float64)
    whole = float(np.sum(np.square(V.T @ V)))
    if not whole:
        return 1.0, 1.0
    groups = [V[labels == k] for k in range(int(labels.max()) + 1)]
    inside = sum(float(np.sum(np.square(group.T @ group))) for group in groups)
    diagonal = float(np.sum(np.square(np.sum(np.square(V), axis=1))))
    n, sizes = len(labels), np.array([len(group) for group in groups])
    pairs = float(np.sum(sizes * (sizes - 1))) / (n * (n - 1)) if n > 1 else 1.0
    return inside / whole, (diagonal + pairs * (whole - diagonal)) / whole


def model_config(path: Path) -> dict[str, Any]:
    """Return the ``config.json`` beside weights; empty if there is none that can be read."""
    file = path / "config.json" if path.is_dir() else path.with_name("config.json")
    try:
        if file.stat().st_size > LONGEST_CONFIG:
            return {}
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _views(files: WeightFiles) -> Any:
    """Return a function of a module path that says how its weight is a matrix."""
    names = CONV1D.get(str(model_config(files.path).get("model_type")), ())
    return lambda path: View(rows=(0,), columns=(1,)) if path.rpartition(".")[2] in names else LINEAR


def linear_layers(files: WeightFiles) -> dict[str, tuple[int, int]]:
    """Return (d, n) of each layer whose weight is a matrix, by module path; embeddings and heads among them."""
    view = _views(files)
    return {
        path: view(path).shape(entry.shape)
        for name, entry in files.items()
        if name.rpartition(".")[2] == "weight" and len(entry.shape) == 2 and min(entry.shape) > 1
        for path in [name.rpartition(".")[0]]
    }


def targeted(
    layers: Mapping[str, tuple[int, int]], targets: Iterable[str] | None, model_type: str | None
) -> dict[str, tuple[int, int]]:
    """Return the layers that targets mean.

    Parameters
    ----------
    layers
        (d, n) by module path.
    targets
        Names at the end of paths, one regular expression that matches whole paths, or ``"all-linear"``. None means
        what is usual for the type of the model, or all linear layers where that is not known.
    model_type
        As in ``config.json``.

    Raises
    ------
    TargetError
        If nothing matches; the message lists near matches.
    """
    wanted: Any = list(targets) if targets is not None else DEFAULT_TARGETS.get(model_type or "", ALL_LINEAR)
    if wanted in (ALL_LINEAR, [ALL_LINEAR]):
        found = [path for path in layers if not any(part in path.lower() for part in NOT_LINEAR)]
        if not found:
            raise TargetError("the model has no linear layers")
    elif targets is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # models of one type have one or the other of the names
            found = match(wanted, layers, name="targets")
    else:
        one = wanted[0] if len(wanted) == 1 and not _is_name(wanted[0], layers) else wanted
        found = match(one, layers, name="targets")
    return {path: layers[path] for path in found}


def _is_name(target: str, layers: Iterable[str]) -> bool:
    return any(path == target or path.endswith(f".{target}") for path in layers)
