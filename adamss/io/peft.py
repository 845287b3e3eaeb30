"""Adapters of Hugging Face PEFT's own AdaMSS.

PEFT writes the update of a layer as ``sum_k B_k A_k N`` in the orientation of `torch.nn.Linear`, where N (R, d) is
our basis A transposed, A_k (r_k, R) is our B_k transposed, and B_k (n_k, r_k) is our C_k transposed. A layer with a
bias has one more input, so that d becomes d + 1.

PEFT does not store which columns belong to subspace k. It computes the grouping again from the base weight at each
load, and does not check it. This module checks the grouping against everything that the file says about it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adamss.backend.registry import get_backend
from adamss.backend.tensors import StoredTensor
from adamss.config import AdamssConfig, shown
from adamss.core import Factors, subspace_sizes
from adamss.errors import AdamssError, CheckpointError, CheckpointNotFoundError, MissingBackendError
from adamss.io.peft_folder import CONFIG_FILE, PREFIX, base_config, read_settings, read_weights
from adamss.io.reader import MALFORMED, short

__all__ = [
    "Grouping",
    "PeftAdapter",
    "PeftFolder",
    "PeftLayer",
    "adamss_config",
    "adamss_tensors",
    "factors_of",
    "grouping_of",
    "is_the_same_basis",
    "layer_of",
    "read_folder",
    "rounded_otherwise",
    "rows_of",
    "why_not_the_same",
]

METHOD = "ADAMSS"

LONGEST_NAME, MOST_NAMES = 10_000, 256

HALF = ("bfloat16", "float16")
NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")

ROUNDING, ROUNDINGS = np.float32(1e-6), 3
"""Relative size and number of the random perturbations of a weight under which its grouping must stay the same."""

OUTSIDE = {"float32": 1e-4, "float16": 5e-4, "bfloat16": 3e-3}
"""Largest share of the stored basis that may lie outside the span of the recomputed one, by the stored precision.

The rounding errors of another library cause 1e-6, or 1e-4 for a spectrum i^-2. A base in float16 causes 2e-4 and one
in bfloat16 2e-3, and rounding the basis itself causes as much. Another base or seed causes 0.2 or more."""
ENERGY = {"float32": 5e-5, "float16": 1e-3, "bfloat16": 4e-3}
"""Largest relative difference between ``N W^T W N^T`` for the stored basis and for the recomputed one.

It tells bases apart that span the whole space. The rounding errors of another library cause 4e-6, a base in float16
causes 1e-4 and one in bfloat16 1e-3, rounding the basis to bfloat16 causes 3e-3, and another base 0.1 or more."""

Array = np.ndarray[Any, Any]


class PeftFolder(NamedTuple):
    """Description of an exported folder, which prints as a sentence.

    Attributes
    ----------
    path
        Path of the folder.
    layers
        Number of layers.
    saved
        Module paths of ``modules_to_save``, which the folder includes.
    """

    path: Path
    layers: int
    saved: tuple[str, ...]

    def __str__(self) -> str:
        text = f"AdaMSS of PEFT on {self.layers} layers in {str(self.path)!r}"
        return f"{text}, with {', '.join(self.saved)}" if self.saved else text


class PeftLayer(NamedTuple):
    """One layer of PEFT's AdaMSS.

    Attributes
    ----------
    basis
        Basis N of shape (R, d), or (R, d + 1) with a bias: ``adamss_newB``.
    A
        A_k of shape (r_k, R) for each subspace.
    B
        B_k of shape (n_k, r_k) for each subspace.
    """

    basis: Array
    A: tuple[Array, ...]
    B: tuple[Array, ...]


class Grouping(NamedTuple):
    """Grouping of columns and basis that PEFT computes from a base weight.

    Attributes
    ----------
    labels
        Subspace of each column, (n,) integers, in PEFT's numbering.
    basis
        Orthonormal rows, (R, d) or (R, d + 1).
    rows
        Weight that was decomposed, (n, d), or (n, d + 1) with the bias.
    """

    labels: Array
    basis: Array
    rows: Array


@dataclass(frozen=True)
class PeftAdapter:
    """Content of a folder of PEFT's AdaMSS.

    Attributes
    ----------
    rank, subspaces, subspace_rank, seed
        PEFT's settings ``r``, ``num_subspaces``, ``subspace_rank`` and ``random_seed``.
    layers
        Adapted layers by module path.
    saved
        Tensors of ``modules_to_save`` by module path, then by name within the module.
    base
        Tensors of the base model by module path and name. PEFT includes the weights of ``lm_head`` or the embeddings
        if one of them is adapted.
    """

    rank: int
    subspaces: int
    subspace_rank: int
    seed: int
    layers: Mapping[str, PeftLayer]
    saved: Mapping[str, Mapping[str, StoredTensor]] = field(default_factory=dict)
    base: Mapping[str, Mapping[str, StoredTensor]] = field(default_factory=dict)


def read_folder(folder: str | Path) -> PeftAdapter:
    """Read a folder of PEFT's AdaMSS and check everything that can be checked without the model.

    Raises
    ------
    CheckpointNotFoundError
        If there is no such folder, or one of its two files is missing.
    CheckpointError
        If the folder holds an adapter of another method or pickled weights, or is not a valid AdaMSS adapter.
    """
    if not str(folder):
        raise CheckpointNotFoundError("the folder has an empty name; name the one that PEFT has saved into")
    path = Path(folder)
    try:
        settings = read_settings(path, METHOD)
        tensors = read_weights(path)
        return _assemble(settings, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{str(path)!r}: {short(error)}") from error
    except CheckpointNotFoundError:
        raise
    except (AdamssError, *MALFORMED) as error:
        raise CheckpointError(
            f"{str(path)!r} is not a valid folder of PEFT's AdaMSS: {short(error)}"
        ) from error


def _assemble(settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> PeftAdapter:
    named = {name: _count(settings, name) for name in ("r", "num_subspaces", "subspace_rank")}
    parts: dict[str, dict[str, dict[int, StoredTensor]]] = {}
    rest: dict[str, StoredTensor] = {}
    for key, tensor in tensors.items():
        if len(key) > LONGEST_NAME:
            raise CheckpointError(f"its tensor {shown(key)} has a name longer than that of any module")
        if not key.startswith(PREFIX):
            raise CheckpointError(f"its tensor {shown(key)} is not named as PEFT does ({PREFIX}...)")
        name = key.removeprefix(PREFIX)
        module, _, last = name.rpartition(".")
        if last == "adamss_newB":
            parts.setdefault(module, {}).setdefault("adamss_newB", {})[0] = tensor
            continue
        layer, _, kind = module.rpartition(".")
        if kind in ("adamss_A", "adamss_B") and NUMBER.fullmatch(last):
            parts.setdefault(layer, {}).setdefault(kind, {})[int(last)] = tensor
        elif "adamss_" in name:
            raise CheckpointError(f"its tensor {shown(key)} is none that PEFT's AdaMSS is known to have")
        else:
            rest[name] = tensor
    if not parts:
        raise CheckpointError("it adapts no layer")
    layers = {path: _layer(path, parts[path]) for path in sorted(parts)}
    saved, base = _saved(rest, settings.get("modules_to_save"))
    return PeftAdapter(
        rank=named["r"],
        subspaces=named["num_subspaces"],
        subspace_rank=named["subspace_rank"],
        seed=_count(settings, "random_seed", minimum=0, default=0),
        layers=layers,
        saved=saved,
        base=base,
    )


def _count(settings: Mapping[str, Any], name: str, *, minimum: int = 1, default: int | None = None) -> int:
    value = settings.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value < 2**31:
        raise CheckpointError(f"its {CONFIG_FILE} has {name} = {shown(value)}, and an integer is expected")
    return value


def _layer(path: str, found: Mapping[str, Mapping[int, StoredTensor]]) -> PeftLayer:
    missing = {"adamss_newB", "adamss_A", "adamss_B"} - found.keys()
    if missing:
        raise CheckpointError(f"layer {shown(path)} lacks {', '.join(sorted(missing))}")
    basis, A, B = found["adamss_newB"][0], found["adamss_A"], found["adamss_B"]
    if A.keys() != B.keys() or sorted(A) != list(range(len(A))):
        raise CheckpointError(
            f"layer {shown(path)} has other subspaces in adamss_A than in adamss_B, or lacks some"
        )
    for name, tensor in (
        ("adamss_newB", basis),
        *((f"adamss_A.{k}", A[k]) for k in A),
        *((f"adamss_B.{k}", B[k]) for k in B),
    ):
        if tensor.dtype not in ("float64", "float32", "float16", "bfloat16"):
            raise CheckpointError(f"layer {shown(path)}: {name} has dtype {tensor.dtype}")
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            raise CheckpointError(
                f"layer {shown(path)}: {name} has shape {tensor.shape}, and a matrix is expected"
            )
        if not np.isfinite(tensor.numpy()).all():
            raise CheckpointError(f"layer {shown(path)}: {name} holds NaN or infinity")
    for k in range(len(A)):
        if A[k].shape[1] != basis.shape[0] or A[k].shape[0] != B[k].shape[1]:
            raise CheckpointError(
                f"layer {shown(path)}: adamss_A.{k} {A[k].shape} does not fit adamss_newB {basis.shape} and "
                f"adamss_B.{k} {B[k].shape}"
            )
    arrays = [tuple(tensors[k].numpy() for k in range(len(A))) for tensors in (A, B)]
    return PeftLayer(basis.numpy(), *arrays)


def _saved(
    rest: Mapping[str, StoredTensor], names: Any
) -> tuple[dict[str, dict[str, StoredTensor]], dict[str, dict[str, StoredTensor]]]:
    """Divide the tensors that are not factors into those of modules that ``modules_to_save`` names, and the others.

    Both are returned by module path and then by name within the module.
    """
    if names is None:
        names = []
    if not isinstance(names, list) or not all(
        isinstance(name, str) and name for name in names[: MOST_NAMES + 1]
    ):
        raise CheckpointError(
            f"its {CONFIG_FILE} has modules_to_save = {shown(names)}, and a list of names is expected"
        )
    if len(names) > MOST_NAMES:
        raise CheckpointError(
            f"its {CONFIG_FILE} has {len(names)} modules_to_save, and {MOST_NAMES} are read"
        )
    found: dict[str, dict[str, StoredTensor]] = {}
    base: dict[str, dict[str, StoredTensor]] = {}
    for key, tensor in rest.items():
        # PEFT saves the outermost module whose path ends with one of the names.
        ends = (
            place + len(name)
            for name in names
            for place in _places(f"{name}.", f"{key}.")
            if place + len(name) < len(key)
        )
        end = min(ends, default=None)
        if end is None:
            module, _, own = key.rpartition(".")
            module = f".{module}".removesuffix(".base_layer").removeprefix(".")
            base.setdefault(module, {})[own] = tensor
        else:
            found.setdefault(key[:end], {})[key[end + 1 :]] = tensor
    return found, base


def _places(part: str, whole: str) -> Iterator[int]:
    """Yield the positions at which a string occurs in another, including overlapping ones."""
    place = whole.find(part)
    while place >= 0:
        yield place
        place = whole.find(part, place + 1)


# ---- the grouping that PEFT computes from a weight ---------------------------------------------------


def rows_of(W: Array, b: Array | None) -> Array:
    """Return the matrix that PEFT decomposes: (n, d) float32, or (n, d + 1) with the bias as one more input.

    Parameters
    ----------
    W
        Weight (d, n).
    b
        Bias (n,), or None if the layer has none.
    """
    rows = W.T if b is None else np.concatenate([W.T, b[:, None]], axis=1)
    return np.ascontiguousarray(rows, dtype=np.float32)


def grouping_of(rows: Array, rank: int, subspaces: int, seed: int, *, device: str = "cpu") -> Grouping:
    """Return the grouping and the basis that PEFT computes from a base weight, with the PyTorch backend.

    Parameters
    ----------
    rows
        Weight from `rows_of`.
    rank, subspaces, seed
        PEFT's settings ``r``, ``num_subspaces`` and ``random_seed``.
    device
        Name of the PyTorch device on which PEFT would compute, since devices round differently.

    Raises
    ------
    MissingBackendError
        If PyTorch or scikit-learn, which PEFT's procedure uses, is not installed.
    """
    try:
        torch: Any = get_backend("torch")
        labels, basis = torch.peft_grouping(rows, rank, subspaces, seed, device=device)
    except (ImportError, MissingBackendError) as error:
        raise MissingBackendError(
            "PEFT does not store which columns make a subspace; to find them again as it does takes PyTorch and "
            'scikit-learn: pip install "adamss[peft]"'
        ) from error
    return Grouping(labels, basis, rows)


def why_not_the_same(layer: PeftLayer, found: Grouping) -> str | None:
    """Return how a layer of a file differs from the grouping of the base weight, as a clause; None if it fits.

    Parameters
    ----------
    layer
        Layer of the file.
    found
        Grouping that PEFT computes from the base weight.
    """
    if layer.basis.shape != found.basis.shape:
        return f"it has a basis of shape {layer.basis.shape}, and this weight one of {found.basis.shape}"
    sizes = subspace_sizes(found.labels, int(found.labels.max()) + 1).tolist()
    stored = [B.shape[0] for B in layer.B]
    if sizes != stored:
        return f"it has subspaces of {shown(stored)} columns, and in this weight are found {shown(sizes)}"
    if len(stored) == 1 or is_the_same_basis(layer, found):
        return None  # the columns of a single subspace are all columns, whatever the basis
    half = _half_precision(layer.basis)
    if half is not None and _half_precision(found.rows, half) is None:
        return f"its basis is in {half}, as of a base in {half}, and this weight is none"
    basis, other = layer.basis.astype(np.float64), found.basis.astype(np.float64)
    outside = _relative(basis - basis @ other.T @ other, basis)
    if not outside <= OUTSIDE[half or "float32"]:
        return f"its basis lies outside of that of this weight by {outside:.1e} of its size"
    # The signs of singular vectors are arbitrary, so absolute values are compared.
    energy, expected = (
        abs(projected.T @ projected) for projected in (found.rows @ basis.T, found.rows @ other.T)
    )
    apart = _relative(energy - expected, expected)
    if not apart <= ENERGY[half or "float32"]:
        return f"its basis has not the singular vectors of this weight (by {apart:.1e})"
    return None


def is_the_same_basis(layer: PeftLayer, found: Grouping) -> bool:
    """Return whether the stored basis equals the recomputed one bit for bit.

    If it does, PEFT decomposed the same weight with the same rounding, and so found the same grouping.
    """
    half = _half_precision(layer.basis)
    other = found.basis if half is None else _rounded(found.basis, half)
    return np.array_equal(layer.basis.astype(np.float32), other)


def rounded_otherwise(rows: Array) -> Iterator[Array]:
    """Yield `ROUNDINGS` versions of a weight that differ as much as the rounding of libraries and devices does."""
    generator = np.random.default_rng(0)
    for _ in range(ROUNDINGS):
        yield rows * (1 + ROUNDING * generator.standard_normal(rows.shape, dtype=np.float32))


def _half_precision(array: Array, *dtypes: str) -> str | None:
    """Return the half precision dtype in which all values of an array can be represented, or None if there is none.

    PEFT widens a base in half precision to float32, so that its former dtype shows only in the values. `dtypes` are
    the candidates, by default both.
    """
    single = np.ascontiguousarray(array, dtype=np.float32)
    return next((d for d in dtypes or HALF if np.array_equal(_rounded(single, d), single)), None)


def _rounded(array: Array, dtype: str) -> Array:
    """Return a float32 array, rounded to a half precision dtype and widened again."""
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return array.astype(np.float16).astype(np.float32)
    # NumPy has no bfloat16, so the bits are rounded here, to nearest with ties to even.
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def _relative(difference: Array, whole: Array) -> float:
    return float(np.linalg.norm(difference) / max(np.linalg.norm(whole), np.finfo(np.float64).tiny))


def adamss_config(
    config: AdamssConfig,
    subspaces: int,
    subspace_rank: int,
    targets: list[str] | str,
    saved: tuple[str, ...],
    base: str | None = None,
) -> dict[str, Any]:
    """Return the config of PEFT's AdaMSS for `base_config` and these values of its settings."""
    return base_config(METHOD, targets, saved, base=base) | {
        "r": config.rank,
        "num_subspaces": subspaces,
        "subspace_rank": subspace_rank,
        "random_seed": config.seed,
        "init_weights": "orthogonal",
        "use_dynamic_rank": False,
        "use_asa": False,
    }


def adamss_tensors(layers: Mapping[str, PeftLayer]) -> dict[str, StoredTensor]:
    """Return the tensors of all layers under PEFT's names."""
    tensors = {}
    for path, layer in layers.items():
        tensors[f"{PREFIX}{path}.adamss_newB"] = StoredTensor.of(layer.basis)
        for k, (A, B) in enumerate(zip(layer.A, layer.B, strict=True)):
            tensors[f"{PREFIX}{path}.adamss_A.{k}"] = StoredTensor.of(A)
            tensors[f"{PREFIX}{path}.adamss_B.{k}"] = StoredTensor.of(B)
    return tensors


# ---- factors -----------------------------------------------------------------------------------------


def factors_of(layer: PeftLayer, labels: Array) -> Factors:
    """Return our factors of a layer of PEFT. The subspaces are renumbered by their lowest column.

    Parameters
    ----------
    layer
        Layer of PEFT.
    labels
        Subspace of each column, (n,) integers, in PEFT's numbering.
    """
    _, first = np.unique(labels, return_index=True)
    order = np.argsort(first)
    number = np.empty_like(order)
    number[order] = np.arange(len(order))
    ranks = np.asarray([layer.A[k].shape[0] for k in order])
    C = np.zeros((ranks.max(), len(labels)), dtype=layer.B[0].dtype)
    for k in order:
        C[: layer.B[k].shape[1], labels == k] = layer.B[k].T
    return Factors(
        np.ascontiguousarray(layer.basis.T)[None],
        np.concatenate([layer.A[k].T for k in order], axis=1),
        C,
        number[labels],
        ranks,
        np.ones(len(order), dtype=np.bool_),
    )


def layer_of(factors: Factors, labels: Array, shape: tuple[int, int]) -> PeftLayer | str:
    """Return the layer of PEFT that has the same update, or a clause that says why PEFT cannot represent it.

    Parameters
    ----------
    factors
        Factors of the layer as NumPy arrays.
    labels
        Subspace of each column, (n,) integers, as PEFT computes and numbers them.
    shape
        Shape of the basis that PEFT computes, (R, d) or (R, d + 1).
    """
    groups, d, P = factors.A.shape
    R, _ = shape
    if groups != 1:
        return "it has a basis for each subspace"
    if P > R:
        return f"its basis has {P} columns, and PEFT's would have {R}"
    # Our subspaces and PEFT's must be the same sets of columns, in any order.
    numbers, first = np.unique(labels, return_index=True)
    sizes = subspace_sizes(labels, len(numbers))
    own = factors.labels[first]
    if len(own) != len(factors.ranks) or not np.array_equal(own[labels], factors.labels):
        return "PEFT would group its columns in another way"
    if not np.array_equal(factors.ranks[own], np.minimum(sizes, factors.ranks.max())):
        return f"its subspaces have the ranks {factors.ranks.tolist()}, and PEFT's would have others"
    ends = np.cumsum(factors.ranks)
    basis = np.zeros(shape, dtype=factors.A.dtype)
    basis[:P, :d] = factors.A[0].T
    A, B = [], []
    for k, ours in enumerate(own):
        rank = int(factors.ranks[ours])
        padded = np.zeros((rank, R), dtype=factors.B.dtype)
        padded[:, :P] = factors.B[:, ends[ours] - rank : ends[ours]].T
        A.append(padded)
        B.append(np.ascontiguousarray(factors.C[:rank, labels == k].T))
    return PeftLayer(basis, tuple(A), tuple(B))
