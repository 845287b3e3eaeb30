"""Adapters of the AdaMSS of Hugging Face PEFT.

PEFT writes the update of a layer as ``sum_k B_k A_k N``, in the orientation of `torch.nn.Linear`: N (R, d) is our
basis A transposed, A_k (r_k, R) our B_k transposed, B_k (n_k, r_k) our C_k transposed. A layer with a bias has one
more input, d + 1. Which columns belong to subspace k is not written: PEFT finds them again at each load, from the
base weight, and takes what it finds. Here what is found is compared with what the file tells of it.
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
"""By how much entries of a weight are moved to see whether its grouping withstands it, and how often."""

OUTSIDE = {"float32": 1e-4, "float16": 5e-4, "bfloat16": 3e-3}
"""How far the stored basis may lie outside of the one that is found again, relative to it, by its precision.

Rounding of another library moves it by 1e-6, on a spectrum i^-2 by 1e-4; a base rounded to float16 by 2e-4, to
bfloat16 by 2e-3; another base, or another seed, by 0.2 and more. The basis itself, rounded, is 2e-4 and 2e-3 off."""
ENERGY = {"float32": 5e-5, "float16": 1e-3, "bfloat16": 4e-3}
"""How far ``N W^T W N^T`` of the stored basis may be from that of the other: what tells where both span everything.

Rounding of another library moves it by 4e-6, a base rounded to float16 by 1e-4, to bfloat16 by 1e-3, the rounding of
the basis to bfloat16 by 3e-3, another base by 0.1 and more."""

Array = np.ndarray[Any, Any]


class PeftFolder(NamedTuple):
    """What was exported.

    Attributes
    ----------
    path
        The folder.
    layers
        Number of layers.
    saved
        Module paths of ``modules_to_save``, which are part of it.
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
        (R, d), or (d + 1) with a bias: ``adamss_newB``.
    A
        (r_k, R) of each subspace.
    B
        (n_k, r_k) of each subspace.
    """

    basis: Array
    A: tuple[Array, ...]
    B: tuple[Array, ...]


class Grouping(NamedTuple):
    """What PEFT finds in a base weight.

    Attributes
    ----------
    labels
        Subspace of each column, (n,) integers, as PEFT numbers them.
    basis
        (R, d) or (R, d + 1), orthonormal rows.
    rows
        In what: (n, d) or (n, d + 1).
    """

    labels: Array
    basis: Array
    rows: Array


@dataclass(frozen=True)
class PeftAdapter:
    """What a folder holds.

    Attributes
    ----------
    rank, subspaces, subspace_rank, seed
        As PEFT's ``r``, ``num_subspaces``, ``subspace_rank``, ``random_seed``.
    layers
        By module path.
    saved
        Tensors of ``modules_to_save`` by module path, then by name within the module.
    base
        Other tensors by module path and name, which are those of the base: PEFT writes the whole of ``lm_head`` or
        the embeddings where one of them is adapted.
    """

    rank: int
    subspaces: int
    subspace_rank: int
    seed: int
    layers: Mapping[str, PeftLayer]
    saved: Mapping[str, Mapping[str, StoredTensor]] = field(default_factory=dict)
    base: Mapping[str, Mapping[str, StoredTensor]] = field(default_factory=dict)


def read_folder(folder: str | Path) -> PeftAdapter:
    """Read a folder of PEFT's AdaMSS and check all that can be checked without the model.

    Raises
    ------
    CheckpointNotFoundError
        If there is no such folder, or one of its two files is not there.
    CheckpointError
        If it holds an adapter of another method, pickles, or what no AdaMSS adapter has.
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
    """Return the tensors that are no factors: by the module that ``modules_to_save`` names; and the others."""
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
        # As PEFT: the outermost module whose path ends with one of the names.
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
    """Return where a string stands in another."""
    place = whole.find(part)
    while place >= 0:
        yield place
        place = whole.find(part, place + 1)


# ---- what PEFT finds in a weight ---------------------------------------------------------------------


def rows_of(W: Array, b: Array | None) -> Array:
    """Return what PEFT decomposes: (n, d) float32, or (n, d + 1) with the bias as one more input.

    Parameters
    ----------
    W
        (d, n).
    b
        (n,) or None.
    """
    rows = W.T if b is None else np.concatenate([W.T, b[:, None]], axis=1)
    return np.ascontiguousarray(rows, dtype=np.float32)


def grouping_of(rows: Array, rank: int, subspaces: int, seed: int, *, device: str = "cpu") -> Grouping:
    """Return what PEFT finds in a base weight, as PyTorch's backend finds it.

    Raises
    ------
    MissingBackendError
        If PyTorch or scikit-learn, of which its procedure consists, is not installed.
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
    """Return in what the file differs from what was found in the base weight; None if it fits.

    Parameters
    ----------
    layer
        From the file.
    found
        From the base weight.
    """
    if layer.basis.shape != found.basis.shape:
        return f"it has a basis of shape {layer.basis.shape}, and this weight one of {found.basis.shape}"
    sizes = subspace_sizes(found.labels, int(found.labels.max()) + 1).tolist()
    stored = [B.shape[0] for B in layer.B]
    if sizes != stored:
        return f"it has subspaces of {shown(stored)} columns, and in this weight are found {shown(sizes)}"
    if is_the_same_basis(layer, found):
        return None
    half = _half_precision(layer.basis)
    if half is not None and _half_precision(found.rows, half) is None:
        return f"its basis is in {half}, as of a base in {half}, and this weight is none"
    basis, other = layer.basis.astype(np.float64), found.basis.astype(np.float64)
    outside = _relative(basis - basis @ other.T @ other, basis)
    if not outside <= OUTSIDE[half or "float32"]:
        return f"its basis lies outside of that of this weight by {outside:.1e} of its size"
    # Singular vectors may have either sign.
    energy, expected = (
        abs(projected.T @ projected) for projected in (found.rows @ basis.T, found.rows @ other.T)
    )
    apart = _relative(energy - expected, expected)
    if not apart <= ENERGY[half or "float32"]:
        return f"its basis has not the singular vectors of this weight (by {apart:.1e})"
    return None


def is_the_same_basis(layer: PeftLayer, found: Grouping) -> bool:
    """Whether the stored basis is the one that was found, to the bit: the grouping is that of PEFT then."""
    half = _half_precision(layer.basis)
    other = found.basis if half is None else _rounded(found.basis, half)
    return np.array_equal(layer.basis.astype(np.float32), other)


def rounded_otherwise(rows: Array) -> Iterator[Array]:
    """Return a weight with other roundings in its last bits, as of other libraries and devices, a few times."""
    generator = np.random.default_rng(0)
    for _ in range(ROUNDINGS):
        yield rows * (1 + ROUNDING * generator.standard_normal(rows.shape, dtype=np.float32))


def _half_precision(array: Array, *dtypes: str) -> str | None:
    """Return in which half precision an array was once, of these or of both: PEFT widens it to float32 afterwards."""
    single = np.ascontiguousarray(array, dtype=np.float32)
    return next((d for d in dtypes or HALF if np.array_equal(_rounded(single, d), single)), None)


def _rounded(array: Array, dtype: str) -> Array:
    """Return a float32 array rounded to a dtype of half precision, in float32."""
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return array.astype(np.float16).astype(np.float32)
    # To nearest, ties to even; NumPy has no bfloat16.
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
    """Return the settings of PEFT's AdaMSS."""
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
    """Return the tensors of layers under PEFT's names."""
    tensors = {}
    for path, layer in layers.items():
        tensors[f"{PREFIX}{path}.adamss_newB"] = StoredTensor.of(layer.basis)
        for k, (A, B) in enumerate(zip(layer.A, layer.B, strict=True)):
            tensors[f"{PREFIX}{path}.adamss_A.{k}"] = StoredTensor.of(A)
            tensors[f"{PREFIX}{path}.adamss_B.{k}"] = StoredTensor.of(B)
    return tensors


# ---- factors -----------------------------------------------------------------------------------------


def factors_of(layer: PeftLayer, labels: Array) -> Factors:
    """Return the factors of a layer whose columns are grouped so, groups renumbered by their lowest column."""
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
    """Return a layer for PEFT, which groups the columns so; or why there is none.

    Parameters
    ----------
    factors
        NumPy arrays.
    labels
        Subspace of each column, as PEFT numbers them.
    shape
        (R, d) of the basis that PEFT makes, or (R, d + 1).
    """
    groups, d, P = factors.A.shape
    R, _ = shape
    if groups != 1:
        return "it has a basis for each subspace"
    if P > R:
        return f"its basis has {P} columns, and PEFT's would have {R}"
    # One of our subspaces for each of PEFT's, and no column in another.
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
