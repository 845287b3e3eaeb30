"""Draw docs/pictures/method.png: what AdaMSS adds to a weight.

::

    python docs/draw_method.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

COLOURS = ("#0072B2", "#E69F00", "#009E73")
SIZES = (5, 4, 4)
FROZEN = "#D9D9D9"
D, R = 10.0, 4.0


def matrix(ax: Axes, x: float, y: float, width: float, height: float, colour: str, below: str) -> float:
    """Draw a matrix with its name and shape below; return where the next begins."""
    edge = "#808080" if colour == FROZEN else "none"
    ax.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor=edge))
    ax.text(x + width / 2, y - 0.3, below, ha="center", va="top", fontsize=9, linespacing=1.3)
    return x + width


def main() -> None:
    """Draw it."""
    figure, ax = plt.subplots(figsize=(9.2, 3.0), layout="constrained")
    ax.set_aspect("equal")
    ax.axis("off")
    x = 0.0
    # The weight, its columns in the order of their subspaces.
    for size, colour in zip(SIZES, COLOURS, strict=True):
        ax.add_patch(Rectangle((x, 0), size, D, facecolor=FROZEN, edgecolor="#808080"))
        ax.add_patch(Rectangle((x, D + 0.2), size, 0.5, facecolor=colour))
        x += size
    n = sum(SIZES)
    ax.text(n / 2, -0.3, "$W_0$\nd x n, frozen", ha="center", va="top", fontsize=9, linespacing=1.3)
    ax.text(0, D + 1.0, "columns in K subspaces", ha="left", va="bottom", fontsize=9)
    x += 1.2
    for k, (size, colour) in enumerate(zip(SIZES, COLOURS, strict=True), 1):
        ax.text(x, D / 2, "+", ha="center", va="center", fontsize=16)
        x = matrix(ax, x + 0.9, 0, R, D, FROZEN, "$A$\nd x R, frozen")
        x = matrix(ax, x + 0.5, D - R, 0.9, R, colour, f"$B_{k}$")
        x = matrix(ax, x + 0.5, D - 0.9, size, 0.9, colour, f"$C_{k}$\n$n_{k}$ columns")
        x += 1.2
    ax.text(
        n + 2.1,
        D + 1.0,
        "one update for the columns of each subspace: B and C are trained",
        va="bottom",
        fontsize=9,
    )
    ax.set(xlim=(-0.5, x), ylim=(-2.4, D + 2.2))
    figure.savefig(Path(__file__).parent / "pictures" / "method.png", dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
