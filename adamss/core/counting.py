"""Numbers of trained parameters of AdaMSS, LoRA and full fine-tuning."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from adamss.core._array import check_concrete
from adamss.core.factors import Factors, basis_ranks, outline
from adamss.core.segmentation import subspace_sizes
from adamss.errors import ConfigError

__all__ = [
    "count_factors",
    "count_full",
    "count_lora",
    "count_trainable",
    "subspace_costs",
]


def subspace_costs(sizes: Iterable[int], ranks: Iterable[int], basis_ranks: Iterable[int]) -> list[int]:
    """Return the number of trained parameters of each subspace, ``r_k (n_k + R_k)``.

    Parameters
    ----------
    sizes
        Number of columns n_k of each subspace, an array (K,) or any iterable of integers.
    ranks
        Trained rank r_k of each subspace.
    basis_ranks
        Number of basis columns R_k of each subspace.

    Returns
    -------
    list of int
        Number of trained parameters of each subspace.

    Raises
    ------
    ConfigError
        If the arguments differ in length, or hold a negative number.
    """
    check_concrete(sizes, ranks, basis_ranks, name="sizes, ranks and basis_ranks")
    rows = [tuple(int(value) for value in column) for column in (sizes, ranks, basis_ranks)]
    if len({len(row) for row in rows}) != 1:
        raise ConfigError(
            "sizes, ranks and basis_ranks must have one entry per subspace each, "
            f"found {len(rows[0])}, {len(rows[1])} and {len(rows[2])}"
        )
    if any(value < 0 for row in rows for value in row):
        raise ConfigError("sizes, ranks and basis_ranks must not be negative")
    return [rank * (size + basis) for size, rank, basis in zip(*rows, strict=True)]


def count_trainable(sizes: Iterable[int], ranks: Iterable[int], basis_ranks: Iterable[int]) -> int:
    """Return the number of trained parameters of one AdaMSS layer, ``sum_k r_k (n_k + R_k)``.

    Parameters
    ----------
    sizes
        Number of columns n_k of each subspace, an array (K,) or any iterable of integers.
    ranks
        Trained rank r_k of each subspace.
    basis_ranks
        Number of basis columns R_k of each subspace.

    Returns
    -------
    int
        Number of trained parameters, without padding.

    Raises
    ------
    ConfigError
        If the arguments differ in length, or hold a negative number.

    Examples
    --------
    The query and value projections of the 12 layers of RoBERTa-base, with K = 10, r_k = 1 and R = 100:

    >>> 24 * count_trainable([768 - 9 * 76] + 9 * [76], 10 * [1], 10 * [100])
    42432
    """
    return sum(subspace_costs(sizes, ranks, basis_ranks))


def count_factors(factors: Factors, *, active_only: bool = False) -> int:
    """Return the number of trained parameters in the factors of one layer, without padding.

    Parameters
    ----------
    factors
        Factors of one layer.
    active_only
        Whether to count only the subspaces that are still trained.

    Returns
    -------
    int
        ``sum_k r_k (n_k + R_k)``.
    """
    layer = outline(factors)
    ranks = np.where(layer.active, layer.ranks, 0) if active_only else layer.ranks
    sizes = subspace_sizes(layer.labels, ranks.shape[0])
    return int(np.sum(ranks * (sizes + basis_ranks(layer))))


def count_lora(d: int, n: int, rank: int) -> int:
    """Return the number of trained parameters of LoRA on a weight (d, n), ``(d + n) rank``.

    Parameters
    ----------
    d, n
        Numbers of inputs and outputs of the layer.
    rank
        Rank of the update.

    Returns
    -------
    int
        Number of trained parameters.

    References
    ----------
    .. [1] Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
    """
    return (d + n) * rank


def count_full(d: int, n: int, *, bias: bool = False) -> int:
    """Return the number of trained parameters if a weight (d, n), and optionally its bias, is trained in full.

    Parameters
    ----------
    d, n
        Numbers of inputs and outputs of the layer.
    bias
        Whether a bias (n,) is trained too.

    Returns
    -------
    int
        Number of trained parameters.
    """
    return (d + int(bias)) * n
