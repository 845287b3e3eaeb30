"""Export to LoRA, the one adapter format that servers read.

The update ``M E`` of a layer, with the q columns of M and the block-structured expansion E of C, *is* a LoRA of rank
q (Hu et al., "LoRA: low-rank adaptation of large language models", ICLR 2022): nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adamss import core
from adamss.backend.bank import Adaptation
from adamss.backend.interface import Backend
from adamss.backend.tensors import StoredTensor
from adamss.core import Factors
from adamss.errors import ArrayValueError, StateError
from adamss.io.peft_folder import BESIDE_FILE, PREFIX, base_config, check_layer_name, write_folder

__all__ = ["LARGEST_RANK", "LoraFolder", "lora_layers", "write_lora"]

LARGEST_RANK = 512
"""What servers take at most (vLLM's ``max_lora_rank``)."""


class LoraFolder(NamedTuple):
    """What was exported.

    Attributes
    ----------
    path
        The folder.
    rank
        Rank of every layer, the largest q.
    layers
        Number of layers.
    saved
        File of ``modules_to_save``, or None.
    """

    path: Path
    rank: int
    layers: int
    saved: Path | None

    @classmethod
    def of(
        cls, folder: str, layers: Mapping[str, tuple[np.ndarray[Any, Any], ...]], saved: Mapping[str, Any]
    ) -> LoraFolder:
        """Describe what `write_lora` writes."""
        path = Path(folder)
        rank = max(A.shape[0] for A, _ in layers.values())
        return cls(path, rank, len(layers), path / BESIDE_FILE if saved else None)

    def __str__(self) -> str:
        text = f"LoRA of rank {self.rank} on {self.layers} layers in {str(self.path)!r}"
        return (
            text if self.saved is None else f"{text}; modules_to_save, no part of it, in {str(self.saved)!r}"
        )


def lora_layers(
    backend: Backend, adaptation: Adaptation
) -> dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Return ``lora_A: (q, d)`` and ``lora_B: (n, q)`` of every layer, in float32.

    Raises
    ------
    StateError
        If a layer has no name of its own (one of a stack), an update of its bias, or more directions than servers
        take.
    ArrayValueError
        If factors are not finite.
    """
    found = {}
    for path, factors in adaptation.layers.items():
        check_layer_name(path, "to_lora")
        d, _ = adaptation.shapes[path]
        whole = Factors(*(backend.whole(array) for array in factors))
        _check_rank(path, whole)
        M = backend.to_stored(core.contract(whole)).numpy()
        E = backend.to_stored(core.expand(whole)).numpy()
        with np.errstate(over="ignore"):
            M, E = M.astype(np.float32), E.astype(np.float32)
        if not (np.isfinite(M).all() and np.isfinite(E).all()):
            raise ArrayValueError(
                f"to_lora: {path} has factors that are not finite in float32; nothing is written"
            )
        if M.shape[0] > d and np.any(M[d] @ E):
            raise StateError(
                f"to_lora: {path} adapts its bias, which a LoRA does not; adamss.merge the model and save that, or "
                "train with include_bias=False"
            )
        found[path] = np.ascontiguousarray(M[:d].T), np.ascontiguousarray(E.T)
    return found


def write_lora(
    folder: str,
    layers: Mapping[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]],
    *,
    targets: list[str] | str,
    saved: Mapping[str, StoredTensor],
    base: str | None = None,
) -> None:
    """Write a folder that PEFT, and whoever reads its LoRA, loads.

    Parameters
    ----------
    folder
        Is made if it does not exist.
    layers
        As from `lora_layers`. All get one rank, the largest, with directions of zeros.
    targets
        What the config calls the layers.
    saved
        Tensors of ``modules_to_save``, by their names in the model.
    base
        Name of the base model.
    """
    rank = max(A.shape[0] for A, _ in layers.values())
    tensors = {}
    for name, (A, B) in layers.items():
        missing = rank - A.shape[0]
        tensors[f"{PREFIX}{name}.lora_A.weight"] = StoredTensor.of(np.pad(A, ((0, missing), (0, 0))))
        tensors[f"{PREFIX}{name}.lora_B.weight"] = StoredTensor.of(np.pad(B, ((0, 0), (0, missing))))
    config = base_config("LORA", targets, base=base) | {
        "r": rank,
        # The scale is their quotient.
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    write_folder(folder, config, tensors, beside=saved)


def _check_rank(path: str, factors: Factors) -> None:
    _, q = factors.B.shape
    if q <= LARGEST_RANK:
        return
    K, r = factors.ranks.shape[0], factors.C.shape[0]
    ways = []
    if K <= LARGEST_RANK:
        ways.append(f"subspace_rank={LARGEST_RANK // K} with the {K} subspaces")
    if r <= LARGEST_RANK:
        ways.append(f"subspaces={LARGEST_RANK // r} of rank {r}")
    raise StateError(
        f"to_lora: {path} has q = {q} directions, and servers take LoRA up to rank {LARGEST_RANK}; what fits is "
        f"{' or '.join(ways)}; or merge the model"
    )
