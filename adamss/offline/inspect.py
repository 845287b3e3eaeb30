"""Measurements of the weights of a checkpoint, which is read one matrix at a time."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adamss import core
from adamss.backend.targets import DEFAULT_TARGETS, match, near_matches
from adamss.backend.views import View
from adamss.config import AdamssConfig
from adamss.core._array import as_working_precision
from adamss.core.decomposition import effective_coordinates
from adamss.errors import ArrayValueError, TargetError
from adamss.io.checkpoint import LINEAR
from adamss.io.weights import WeightFiles, weight_name
from adamss.offline.compare import matrix_of

__all__ = [
    "ALL_LINEAR",
    "MatrixReport",
    "inspect",
    "linear_layers",
    "model_type",
    "read_config",
    "targeted",
    "weight_of",
]

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
"""Parts of the names of layers that ``"all-linear"`` leaves out: embeddings, norms, tables, and output heads.

Files do not tell the class of a layer, so that names must decide."""

CONV1D = {
    "gpt2": ("c_attn", "c_proj", "c_fc", "q_attn"),
    "openai-gpt": ("c_attn", "c_proj", "c_fc"),
    "imagegpt": ("c_attn", "c_proj", "c_fc", "q_attn"),
    "decision_transformer": ("c_attn", "c_proj", "c_fc", "q_attn"),
}
"""Layers of transformers that store W instead of its transpose, by ``model_type``."""

LONGEST_CONFIG = 1 << 24
"""Largest size of a ``config.json`` in bytes."""


@dataclass(frozen=True)
class MatrixReport:
    """Measurements of one weight.

    Attributes
    ----------
    path
        Module path.
    shape
        Shape (d, n) of the weight.
    dtype
        Name of the dtype in the file.
    norm
        Frobenius norm of the weight.
    energy
        Share of ``||W||_F^2`` in the R leading singular directions.
    sizes
        Number of columns n_k of each subspace, as `adamss.core.segment` finds them.
    estimated
        Number of subspaces K that the paper's Algorithm 2 estimates, without a lower bound.
    inside
        Share of ``||Z*||_F^2`` inside the subspaces, see `adamss.core.analysis.block_diagonality`.
    inside_by_chance
        Average of `inside` over random divisions of the columns into groups of the same sizes.
    gain
        Ratio ``inside / inside_by_chance``. It is 1 if the subspaces tell nothing about the columns.
    gain_of_random
        Value of `gain` for a matrix with random singular vectors, whose columns are segmented in the same way.
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
    """Yield a report on each weight. Only one weight is in memory at a time.

    Parameters
    ----------
    files
        Weights of a model.
    paths
        Module paths, for example from `targeted`.
    rank, subspaces, segmentation, seed
        Settings as in `adamss.AdamssConfig`. R and K are clamped to what a matrix allows.

    Raises
    ------
    CheckpointError
        If a weight is stored in a dtype that NumPy cannot read. The message names the layer.
    ArrayValueError
        If a weight holds NaN or infinity. The message names the layer.
    """
    for path in paths:
        W = weight_of(files, path)
        try:
            yield _report(path, W, files[_weight_in(files, path)].dtype, rank, subspaces, segmentation, seed)
        except ArrayValueError as error:
            raise ArrayValueError(f"{path}: {error}") from error


def _report(
    path: str, W: np.ndarray[Any, Any], dtype: str, rank: int, subspaces: int, segmentation: str, seed: int
) -> MatrixReport:
    d, n = W.shape
    decomposition = core.decompose(W, min(rank, d, n), seed=seed)
    norm = float(np.linalg.norm(as_working_precision(W)))
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
    """Return the `block_diagonality` of Z*, and its mean over random permutations of the labels.

    Z* itself, which is (n, n), is never formed. With the coordinates v_i of the columns, ``Z*_ij = <v_i, v_j>``. If
    V_k stacks the coordinates of group k, the sum of squares of its block ``V_k V_k^T`` equals that of the (R, R)
    matrix ``V_k^T V_k``.
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


def read_config(path: Path) -> dict[str, Any]:
    """Return the content of the ``config.json`` in the folder of the weights, or {} if none can be read."""
    file = path / "config.json" if path.is_dir() else path
    file = file if file.suffix == ".json" else file.with_name("config.json")
    try:
        if file.stat().st_size > LONGEST_CONFIG:
            return {}
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def model_type(path: Path) -> str | None:
    """Return the ``model_type`` of the ``config.json`` beside weights; None if it is not known."""
    found = read_config(path).get("model_type")
    return found if isinstance(found, str) else None


def _views(files: WeightFiles) -> Any:
    """Return a function that returns the view of a weight as a matrix, given the module path."""
    names = CONV1D.get(model_type(files.path) or "", ())
    return lambda path: View(rows=(0,), columns=(1,)) if path.rpartition(".")[2] in names else LINEAR


def _weight_in(files: WeightFiles, path: str) -> str:
    name = weight_name(path, files)
    if name is None:
        raise TargetError(f"the model has no weight {path!r}; {near_matches([path], linear_layers(files))}")
    return name


def weight_of(files: WeightFiles, path: str) -> Any:
    """Return the weight of a layer as the matrix W: (d, n), given the module path.

    Raises
    ------
    TargetError
        If the files have no such layer. The message lists near matches.
    CheckpointError
        If the weight is stored in a dtype that NumPy cannot read.
    """
    return matrix_of(files, _weight_in(files, path), _views(files)(path))


def linear_layers(files: WeightFiles) -> dict[str, tuple[int, int]]:
    """Return the shape (d, n) of each layer whose weight is a matrix, by module path.

    Embeddings and output heads are included.
    """
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
    """Return the layers that the targets match.

    Parameters
    ----------
    layers
        Shape (d, n) of each layer by module path.
    targets
        Names at the end of module paths, one regular expression that matches whole paths, or ``"all-linear"``. None
        means the default targets for the type of the model, or all linear layers if the type is not known.
    model_type
        Value of ``model_type`` in ``config.json``.

    Raises
    ------
    TargetError
        If nothing matches. The message lists near matches.
    """
    wanted: Any = list(targets) if targets is not None else DEFAULT_TARGETS.get(model_type or "", ALL_LINEAR)
    if len(wanted) == 1 and not _is_name(wanted[0], layers):
        wanted = AdamssConfig(targets=wanted[0]).targets  # which complains of what is no expression
    if wanted == ALL_LINEAR:
        found = [path for path in layers if not any(part in path.lower() for part in NOT_LINEAR)]
        if not found:
            raise TargetError("the model has no linear layers")
    elif targets is None:
        with warnings.catch_warnings():
            # The defaults list alternative names, some of which match nothing in a given model.
            warnings.simplefilter("ignore")
            found = match(wanted, layers, name="targets")
    else:
        found = match(wanted, layers, name="targets")
    return {path: layers[path] for path in found}


def _is_name(target: str, layers: Iterable[str]) -> bool:
    return any(path == target or path.endswith(f".{target}") for path in layers)
