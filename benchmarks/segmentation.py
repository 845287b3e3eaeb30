"""Test whether the paper's Algorithm 2 recovers planted subspaces, and measure how long it takes.

The script prints two tables:

1. the recovery of planted subspaces. The columns of the weight lie in subspaces that are either independent (their
   dimensions add up) or only disjoint (any two intersect in zero, but their sum has fewer dimensions than the
   dimensions add up to). The table has the estimated number of subspaces for several tau and noise levels, and the
   adjusted Rand index of normalised cuts that are given the true number;
2. the time of the estimate and of normalised cuts, relative to that of `decompose` on the same matrix. ::

    python benchmarks/segmentation.py
    python benchmarks/segmentation.py --only time --widths 384 4096 14336
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from arguments import positive
from paired import environment, paired_times, ratio
from tabulate import tabulate

from adamss import core
from adamss_conformance.cases import adjusted_rand_index

SUBSPACES, DIMENSION, PER_SUBSPACE = 12, 4, 30
NOISE = (0.0, 0.01, 0.02, 0.05, 0.1)
TAUS = (0.003, 0.01, 0.03, 0.1, 0.3, 0.6)
AMBIENT = {"independent": SUBSPACES * DIMENSION + 16, "dependent": SUBSPACES * DIMENSION // 2}
"""Inputs d of each kind. If d is below the sum of the dimensions, the subspaces cannot be independent."""
RANK, WIDTHS = 100, (384, 768, 1536, 4096, 8192, 14336)
LARGEST_HEIGHT = SQUARE = 4096


def planted(kind: str, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a weight (d, n) whose columns lie in planted subspaces, and the subspace of each column.

    Parameters
    ----------
    kind : str
        Key of `AMBIENT`.
    noise : float
        Frobenius norm of the noise over that of the weight.
    seed : int
        Seed of bases, coefficients, order of the columns and noise.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(SUBSPACES), PER_SUBSPACE))
    bases = rng.standard_normal((SUBSPACES, AMBIENT[kind], DIMENSION))
    W = np.einsum("ndr,nr->dn", bases[labels], rng.standard_normal((len(labels), DIMENSION)))
    disturbance = rng.standard_normal(W.shape)
    return W + noise * np.linalg.norm(W) / np.linalg.norm(disturbance) * disturbance, labels


def recovery(seeds: int) -> None:
    """Print the table of the recovery, over this many draws."""
    rows = []
    for kind, d in AMBIENT.items():
        for noise in NOISE:
            numbers: dict[float, list[int]] = {tau: [] for tau in TAUS}
            found = []
            for seed in range(seeds):
                W, labels = planted(kind, noise, seed)
                decomposition = core.decompose(W, min(d, SUBSPACES * DIMENSION))
                for tau in TAUS:
                    numbers[tau].append(core.estimate_subspaces(decomposition, tau=tau, minimum=1))
                cut = core.segment(decomposition, SUBSPACES, "ncut")
                found.append(adjusted_rand_index(cut, labels))
            shown = [
                f"{np.median(each):.0f}" if min(each) == max(each) else f"{min(each)} to {max(each)}"
                for each in numbers.values()
            ]
            rows.append([kind, f"{100 * noise:.0f} %", *shown, f"{np.mean(found):.2f}"])
    print(
        f"{SUBSPACES} planted subspaces of dimension {DIMENSION}, {PER_SUBSPACE} columns each, {seeds} draws:\n"
        "the number estimated (without a lower bound) by tau, and the adjusted Rand index of normalised cuts"
    )
    print(
        tabulate(
            rows,
            headers=["subspaces", "noise", *(f"tau {tau:g}" for tau in TAUS), "cuts"],
            disable_numparse=True,
        )
    )


def gaussian(d: int, n: int, seed: int = 0) -> torch.Tensor:
    """Return a Gaussian weight (d, n), whose flat spectrum takes `decompose` the longest."""
    return torch.randn(d, n, generator=torch.Generator().manual_seed(seed))


def decaying(d: int, n: int) -> torch.Tensor:
    """Return a weight (d, n) with singular values 1 / i, which decay faster than those of trained weights."""
    side = min(d, n)
    (U, _), (V, _) = torch.linalg.qr(gaussian(d, side)), torch.linalg.qr(gaussian(n, side, seed=1))
    return (U / torch.arange(1, side + 1)) @ V.T


def in_planes(d: int, n: int) -> torch.Tensor:
    """Return a weight (d, n) with columns in 50 planes, plus 2 % noise; its Laplacian has many small eigenvalues."""
    columns = torch.arange(n).chunk(50)
    W = torch.cat(
        [gaussian(d, 2, seed=k) @ gaussian(2, len(own), seed=k) for k, own in enumerate(columns)], 1
    )
    noise = gaussian(d, n)
    return W + 0.02 * W.norm() / noise.norm() * noise


WEIGHTS: dict[str, Callable[[int, int], torch.Tensor]] = {
    "Gaussian": gaussian,
    "decaying": decaying,
    "50 planes": in_planes,
}


def times(widths: Sequence[int], repeats: int) -> None:
    """Print the table of the times."""
    rows = []
    for n in widths:
        for kind, weight in WEIGHTS.items():
            for d in sorted({min(n, LARGEST_HEIGHT), n // 4}) if n == SQUARE else [min(n, LARGEST_HEIGHT)]:
                W = weight(d, n)
                decomposition = core.decompose(W, RANK)
                K = core.estimate_subspaces(decomposition)
                seconds = paired_times(
                    {
                        "decompose": lambda W=W: core.decompose(W, RANK),
                        "estimate": lambda D=decomposition: core.estimate_subspaces(D),
                        "ncut": lambda D=decomposition, K=K: core.segment(D, K, "ncut"),
                        "kmeans": lambda D=decomposition, K=K: core.segment(D, K, "kmeans"),
                    },
                    repeats=repeats,
                    warmup=1,
                    label=f"{kind}, {d} x {n}",
                )
                whole = seconds["estimate"] + seconds["ncut"]
                medians = [f"{np.median(each):.3f}" for each in seconds.values()]
                rows.append([f"{d} x {n}", kind, K, *medians, str(ratio(whole, seconds["decompose"]))])
    print(f"\nPyTorch, float32, R = {RANK}, medians of {repeats} alternations, seconds")
    header = [
        "d x n",
        "weight",
        "K",
        "decompose",
        "estimate",
        "ncut",
        "kmeans",
        "estimate + ncut over decompose",
    ]
    print(tabulate(rows, headers=header, disable_numparse=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="What the paper's Algorithm 2 finds, and how long it takes.")
    parser.add_argument("--only", choices=["recovery", "time"], help="one table alone")
    parser.add_argument("--widths", type=positive, nargs="+", help="columns n")
    parser.add_argument("--quick", action="store_true", help="fewer draws, alternations and widths")
    arguments = parser.parse_args(argv)
    if arguments.only != "time":
        recovery(3 if arguments.quick else 10)
    if arguments.only != "recovery":
        widths = arguments.widths or (WIDTHS[:3] if arguments.quick else WIDTHS)
        times(widths, 3 if arguments.quick else 7)
        print(environment(["torch", "numpy", "adamss"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
