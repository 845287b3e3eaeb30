"""Export to LoRA, the adapter format that servers read.

The update ``M E`` of a layer, where M has q columns and E is the block-structured expansion of C, is exactly a LoRA
of rank q. Nothing is approximated.

References
----------
Hu et al., "LoRA: low-rank adaptation of large language models", ICLR 2022.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adamss import core
from adamss.backend.bank import Adaptation, scaled
from adamss.backend.interface import Backend
from adamss.backend.sites import Fragment, Site
from adamss.backend.tensors import StoredTensor
from adamss.backend.views import View
from adamss.core import Factors
from adamss.errors import ArrayValueError, StateError
from adamss.io.peft_folder import BESIDE_FILE, PREFIX, base_config, check_layer_name, write_folder

__all__ = ["LARGEST_RANK", "LoraFolder", "LoraLayer", "lora_layers", "write_lora"]

LARGEST_RANK = 512
"""Largest rank that servers accept (vLLM's ``max_lora_rank``)."""


class LoraFolder(NamedTuple):
    """Description of an exported LoRA, which prints as a sentence.

    Attributes
    ----------
    path
        Path of the folder.
    rank
        Rank of every layer, which is the largest q.
    layers
        Number of layers.
    saved
        Path of the file with ``modules_to_save``, or None if there are none.
    """

    path: Path
    rank: int
    layers: int
    saved: Path | None

    @classmethod
    def of(cls, folder: str, layers: Mapping[str, LoraLayer], saved: Mapping[str, Any]) -> LoraFolder:
        """Return the description of the folder that `write_lora` writes from these layers and saved tensors."""
        path = Path(folder)
        return cls(path, _rank(layers), len(layers), path / BESIDE_FILE if saved else None)

    def __str__(self) -> str:
        text = f"LoRA of rank {self.rank} on {self.layers} layers in {str(self.path)!r}"
        return (
            text if self.saved is None else f"{text}; modules_to_save, no part of it, in {str(self.saved)!r}"
        )


class LoraLayer(NamedTuple):
    """The update of one weight as a LoRA.

    Attributes
    ----------
    M, E
        Factors (L, d, q) and (L, q, n) of the updates, in float32, for the L matrices of the weight. L is 1 unless
        the weight is a stack, such as one matrix for each expert.
    form
        Form in which PEFT writes the update, one of `adamss.backend.Kind.lora`.
    view
        View of the weight as a matrix.
    shape
        Shape of the weight.
    parameter
        Name of the weight in the model, which the form ``"parameter"`` needs.
    """

    M: np.ndarray[Any, Any]
    E: np.ndarray[Any, Any]
    form: str
    view: View
    shape: tuple[int, ...]
    parameter: str

    def tensors(self, rank: int) -> dict[str, np.ndarray[Any, Any]]:
        """Return PEFT's two tensors by name, padded with zeros to the given rank."""
        missing = rank - self.M.shape[2]
        A = np.pad(np.swapaxes(self.M, 1, 2), ((0, 0), (0, missing), (0, 0)))
        B = np.pad(np.swapaxes(self.E, 1, 2), ((0, 0), (0, 0), (0, missing)))
        if self.form == "embedding":
            return {"lora_embedding_A": A[0], "lora_embedding_B": B[0]}
        if self.form == "convolution":
            A = A.reshape(rank, *self.shape[1:])
            B = B.reshape(*B.shape[1:], *(1 for _ in self.shape[2:]))
        elif self.form == "parameter" and len(self.shape) == 2 and self.view.rows == (0,):
            # PEFT treats every Parameter with two axes as (outputs, inputs). This one is (inputs, outputs), so the
            # roles of A and B are exchanged.
            A, B = np.swapaxes(B, 1, 2)[0], np.swapaxes(A, 1, 2)[0]
        else:
            # PEFT combines the axes of expert and rank. In A the rank is the faster index, in B the expert.
            A, B = A.reshape(-1, A.shape[2]), np.transpose(B, (1, 2, 0)).reshape(B.shape[1], -1)
        return {"lora_A.weight": A, "lora_B.weight": B}


def lora_layers(
    backend: Backend,
    adapters: Sequence[tuple[Adaptation, float]],
    sites: Mapping[str, Site],
    forms: Mapping[str, str],
) -> dict[str, LoraLayer]:
    """Return the weighted sum of the updates of several adapters as a LoRA, by path of the layer.

    Parameters
    ----------
    backend
        Backend of the model.
    adapters
        Adapters, each with the weight of its update.
    sites, forms
        Site of every adapted layer, and the form in which PEFT writes its update, by path.

    Raises
    ------
    StateError
        If a layer is one of a stack, which PEFT cannot name; if an update of its bias is not zero; or if its rank is
        larger than servers accept.
    ArrayValueError
        If factors are not finite in float32.
    """
    found = {}
    for path, site in sites.items():
        check_layer_name(path, "to_lora")
        shapes = [each.shapes[path] for each, _ in adapters if path in each.shapes]
        d, _ = shapes[0]
        # For each adapter, the factors of each matrix of the layer, with the adapter's weight multiplied into C.
        sets = [
            core.split(scaled(Factors(*map(backend.whole, each.layers[path])), weight), site.blocks)
            for each, weight in adapters
            if path in each.layers
        ]
        blocks = list(zip(*sets, strict=True))
        _check_rank(path, max(blocks, key=lambda block: sum(own.B.shape[1] for own in block)))
        pairs = [[(core.contract(own), core.expand(own)) for own in block] for block in blocks]
        with np.errstate(over="ignore"):
            arrays = [_side_by_side(backend, block) for block in pairs]
        q = max(M.shape[1] for M, _ in arrays)
        M = np.stack([np.pad(a, ((0, 0), (0, q - a.shape[1]))) for a, _ in arrays])
        E = np.stack([np.pad(b, ((0, q - b.shape[0]), (0, 0))) for _, b in arrays])
        if not (np.isfinite(M).all() and np.isfinite(E).all()):
            raise ArrayValueError(
                f"to_lora: {path} has factors that are not finite in float32; nothing is written"
            )
        if M.shape[1] > d and np.any(M[:, d:] @ E):
            raise StateError(
                f"to_lora: {path} adapts its bias, which a LoRA does not; adamss.merge the model and save that, or "
                "train with include_bias=False"
            )
        shape = tuple(backend.own_arrays(site)[site.kind.weight].shape)  # type: ignore[union-attr]
        parameter = path if isinstance(site.layer, Fragment) else f"{path}.{site.kind.weight}"
        if forms[path] == "parameter":
            check_layer_name(parameter.rpartition(".")[0], "to_lora")
        found[path] = LoraLayer(M[:, :d], E, forms[path], site.view, shape, parameter)
    return found


def write_lora(
    folder: str,
    layers: Mapping[str, LoraLayer],
    *,
    targets: list[str] | str,
    saved: Mapping[str, StoredTensor],
    base: str | None = None,
    tokens: Mapping[str, tuple[tuple[int, ...], StoredTensor]] | None = None,
) -> None:
    """Write a LoRA folder that PEFT, and software that reads PEFT's LoRA, can load.

    Parameters
    ----------
    folder
        Path of the folder, which is created if it does not exist.
    layers
        Layers from `lora_layers`. All of them are padded with zeros to the largest rank.
    targets
        Setting ``target_modules`` for the layers that PEFT adapts as modules.
    saved
        Tensors of ``modules_to_save``, by their names in the model.
    base
        Name of the base model.
    tokens
        Ids and rows of ``trained_tokens``, by path of the embedding.
    """
    rank = _rank(layers)
    parameters = {path: layer.parameter for path, layer in layers.items() if layer.form == "parameter"}
    tensors = {}
    left = Counter(name.rpartition(".")[0] for name in parameters.values())
    wrapped = dict(left)

    def within(path: str) -> str:
        """Return a path with the ``base_layer`` components that PEFT inserts when it wraps modules with Parameters.

        PEFT wraps a module once for each of its adapted Parameters.
        """
        names = path.split(".")
        for depth in range(len(names) - 1, 0, -1):
            names[depth:depth] = ["base_layer"] * wrapped.get(".".join(names[:depth]), 0)
        return ".".join(names)

    for path, layer in layers.items():
        owner = within(path)
        if path in parameters:
            # PEFT wraps a module once more for each of its Parameters. The innermost wrapper has the first Parameter.
            module = parameters[path].rpartition(".")[0]
            left[module] -= 1
            owner = within(module) + ".base_layer" * left[module]
        for name, array in layer.tensors(rank).items():
            tensors[f"{PREFIX}{owner}.{name}"] = StoredTensor.of(np.ascontiguousarray(array))
    config = base_config("LORA", targets, base=base) | {
        "r": rank,
        "lora_alpha": rank,  # the scale is lora_alpha / r = 1
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    if tokens:
        config["trainable_token_indices"] = {path: list(ids) for path, (ids, _) in tokens.items()}
        names = {path: f"{PREFIX}{path}.token_adapter.trainable_tokens_delta" for path in tokens}
        tensors |= {names[path]: rows for path, (_, rows) in tokens.items()}
    if parameters:
        config["target_parameters"] = sorted(parameters.values())
    write_folder(folder, config, tensors, beside=saved)


def _rank(layers: Mapping[str, LoraLayer]) -> int:
    return max(int(layer.M.shape[2]) for layer in layers.values())


def _side_by_side(
    backend: Backend, pairs: Sequence[tuple[Any, Any]]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return M: (d, q) and E: (q, n) in float32 whose product is the sum of the products of all pairs."""
    host = [[backend.to_stored(array).numpy().astype(np.float32) for array in pair] for pair in pairs]
    d = max(M.shape[0] for M, _ in host)  # d + 1 if an adapter adapts the bias too
    M = np.concatenate([np.pad(M, ((0, d - M.shape[0]), (0, 0))) for M, _ in host], axis=1)
    return M, np.concatenate([E for _, E in host])


def _check_rank(path: str, adapters: Sequence[Factors]) -> None:
    q = sum(each.B.shape[1] for each in adapters)
    if q <= LARGEST_RANK:
        return
    if len(adapters) > 1:
        raise StateError(
            f"to_lora: {path} has q = {q} directions of {len(adapters)} adapters together, and servers take LoRA up "
            f"to rank {LARGEST_RANK}; write fewer of them, or merge the model"
        )
    factors = adapters[0]
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
