"""Choice of settings that meet a budget of trained parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adamss.backend.registry import get_backend
from adamss.core import count_lora
from adamss.errors import ConfigError, MissingBackendError
from adamss.io.weights import WeightFiles
from adamss.offline.inspect import linear_layers, model_type

__all__ = ["Plan", "layers_of", "plan", "suggested"]

SUBSPACES = (1, 2, 3, 5, 10, 16, 32, 64, 128)
SUBSPACE_RANKS = (1, 2, 4, 8)
LEAST_SUBSPACES, MOST_SUBSPACES = 10, 32
"""Between which K is suggested."""

RANK = 100
"""R of the paper, which is the largest R that is offered unless the caller gives one."""


@dataclass(frozen=True)
class Plan:
    """Settings that meet a budget, and their costs.

    Attributes
    ----------
    rank, subspaces, subspace_rank
        Settings R, K and r_k of `adamss.AdamssConfig`.
    trained
        Number of trained parameters in all layers, ``sum_k r_k (n_k + R)`` with a shared basis. It is exact if every
        subspace has at least r_k columns, and an upper bound otherwise.
    directions
        Largest q of any layer, which is the rank of a LoRA with the same update.
    lora_rank
        Largest rank of a LoRA on the same layers that trains at most as many parameters, or 0 if every LoRA trains
        more.

    Examples
    --------
    >>> from adamss.offline import plan
    >>> (found,) = plan({"query": (768, 768), "value": (768, 768)}, 3_536, subspaces=10, subspace_rank=1)
    >>> found.rank, found.trained, found.directions, found.lora_rank
    (100, 3536, 10, 1)
    """

    rank: int
    subspaces: int
    subspace_rank: int
    trained: int
    directions: int
    lora_rank: int


def plan(
    layers: Mapping[str, tuple[int, int]],
    params: int | None = None,
    *,
    rank: int | None = None,
    subspaces: int | None = None,
    subspace_rank: int | None = None,
) -> list[Plan]:
    """Return the settings that train at most `params` parameters, each with the largest R that meets this budget.

    Parameters
    ----------
    layers
        Shape (d, n) of each adapted layer, by module path.
    params
        Largest number of trained parameters in all layers together. None means any number.
    rank, subspaces, subspace_rank
        Fixed values of R, K and r_k. None tries several values: R up to 100, K from 1 to 128, and r_k from 1 to 8.

    Returns
    -------
    list of Plan
        Plans ordered by K and r_k.

    Raises
    ------
    ConfigError
        If no settings meet the budget. The message states the smallest possible number of parameters.

    Examples
    --------
    Query and value of RoBERTa-base:

    >>> layers = {f"{i}.{name}": (768, 768) for i in range(12) for name in ("query", "value")}
    >>> [p.trained for p in plan(layers, 42_432, subspaces=10, subspace_rank=1)]
    [42432]
    """
    numbers = {"params": params, "rank": rank, "subspaces": subspaces, "subspace_rank": subspace_rank}
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ConfigError(f"{name} must be at least 1, found {number}")
    if not layers:
        raise ConfigError("plan needs at least one layer")
    widest = max(min(shape) for shape in layers.values())
    least_rank, most_rank = (1, min(RANK, widest)) if rank is None else (min(rank, widest),) * 2
    ranks = range(least_rank, most_rank + 1)
    found = []
    least = None
    for K in (subspaces,) if subspaces else SUBSPACES:
        for r in (subspace_rank,) if subspace_rank else SUBSPACE_RANKS:
            possible = [R for R in ranks if min(r, widest) <= R] or [
                ranks[-1]
            ]  # r_k directions need as many of A
            least = min([count(layers, possible[0], K, r), *([] if least is None else [least])])
            fitting = [R for R in possible if params is None or count(layers, R, K, r) <= params]
            if fitting:
                R = fitting[-1]
                trained = count(layers, R, K, r)
                directions = max(_directions(shape, R, K, r) for shape in layers.values())
                lora = trained // sum(count_lora(d, n, 1) for d, n in layers.values())
                found.append(Plan(R, K, r, trained, directions, lora))
    if not found:
        raise ConfigError(
            f"no settings train {params:,} parameters or fewer in {len(layers)} layers: the smallest number is "
            f"{least:,}; adapt fewer layers (targets), or allow more parameters"
        )
    return found


def suggested(plans: Sequence[Plan]) -> Plan:
    """Return the plan to begin with, by what docs/concepts/choosing.md concludes from the evidence.

    More subspaces gained accuracy up to K = 32, a larger r_k did not, and K below 10 lost some. So the plan has the
    smallest r_k, and the largest K up to 32 that leaves R as large as possible; or K = 10 with a smaller R.
    """
    least = min(each.subspace_rank for each in plans)
    simple = [each for each in plans if each.subspace_rank == least]
    usual = [each for each in simple if each.subspaces <= MOST_SUBSPACES] or simple
    R = max(each.rank for each in usual)
    best = max((each for each in usual if each.rank == R), key=lambda each: each.subspaces)
    enough = [each for each in usual if each.subspaces >= LEAST_SUBSPACES]
    return best if best.subspaces >= LEAST_SUBSPACES or not enough else enough[0]


def count(layers: Mapping[str, tuple[int, int]], R: int, K: int, r: int) -> int:
    """Return the number of trained parameters for settings that are clamped to what each layer allows."""
    total = 0
    for d, n in layers.values():
        own_R, own_K = min(R, d, n), min(K, n)
        total += min(r, own_R) * (n + own_K * own_R)
    return total


def _directions(shape: tuple[int, int], R: int, K: int, r: int) -> int:
    own_R, own_K = min(R, *shape), min(K, shape[1])
    return min(own_K * min(r, own_R), shape[1])


def layers_of(model: str) -> tuple[dict[str, tuple[int, int]], str | None]:
    """Return the shapes (d, n) of the linear layers of a model by module path, and the type of the model.

    The shapes come from the headers of the weight files. If there is only a ``config.json``, transformers builds the
    model without values (on the meta device).

    Parameters
    ----------
    model
        Path of a safetensors file, of a folder with weights or a ``config.json``, or of a ``config.json``.

    Raises
    ------
    CheckpointNotFoundError
        If there is no such file or folder, or the folder has neither weights nor a ``config.json``.
    MissingBackendError
        If transformers is needed but not installed.
    CheckpointError
        If transformers cannot build the model.
    """
    path = Path(model)
    if path.name == "config.json":
        path = path.parent  # where the weights may be
    config = path if path.suffix == ".json" else path / "config.json"
    if config.is_file() and not any(path.glob("*.safetensors*")):
        return _without_values(config), model_type(config)
    return linear_layers(WeightFiles(path)), model_type(path)


def _without_values(file: Path) -> dict[str, tuple[int, int]]:
    """Return the shapes of the linear layers of the model that a ``config.json`` describes, by module path."""
    try:
        torch: Any = get_backend("torch")
        return dict(torch.shapes_in_config(file))
    except MissingBackendError as error:
        raise MissingBackendError(
            f"there are no weights beside {str(file)!r}; to build the model from its config takes transformers: "
            "pip install 'adamss[transformers]'"
        ) from error
