"""The grouping that the AdaMSS of Hugging Face PEFT derives from a base weight and does not write to its files.

PEFT derives it by library calls, so the same calls with the same seeds give the same grouping: a randomised SVD
without oversampling (`torch.svd_lowrank`, two power iterations), and scikit-learn's k-means on the raw left singular
vectors, from one random start (PEFT 0.21, ``peft/tuners/adamss/utils.py``).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

__all__ = ["find_grouping"]

POWER_ITERATIONS = 2
KMEANS_SEED = 123456789
KMEANS_ITERATIONS = 10

Array = np.ndarray[Any, Any]


def find_grouping(
    rows: Array, rank: int, subspaces: int, seed: int, *, device: str = "cpu"
) -> tuple[Array, Array]:
    """Return the subspace of each column of a weight, and the basis, as PEFT finds them.

    Parameters
    ----------
    rows
        Weight (n, d) float32 as `torch.nn.Linear` has it, with the bias as one more input.
    rank, subspaces, seed
        PEFT's ``r``, ``num_subspaces`` and ``random_seed``.
    device
        Device of the weight when PEFT adapted it, because random numbers differ between devices.

    Returns
    -------
    tuple of ndarray
        Labels (n,) and orthonormal rows (R, d), R = min(rank, n, d).
    """
    weight = torch.from_numpy(rows).to(device)
    with _seeded(seed, weight.device):
        U, _, V = torch.svd_lowrank(weight, q=min(rank, *rows.shape), niter=POWER_ITERATIONS)
    means = KMeans(
        n_clusters=min(subspaces, rows.shape[0]),
        init="random",
        n_init=1,
        max_iter=KMEANS_ITERATIONS,
        random_state=KMEANS_SEED,
    )
    with warnings.catch_warnings():
        # scikit-learn warns if fewer columns differ than subspaces are asked for. The warning is not needed, since
        # the caller compares the result with the file.
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels = means.fit_predict(U.cpu().numpy())
    return np.asarray(labels), V.T.contiguous().cpu().numpy()


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generator of one device, and restore its state afterwards."""
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield
    else:
        with torch.random.fork_rng(devices=[device], device_type=device.type):
            torch.get_device_module(device).manual_seed(seed)
            yield
