"""Measure how the cost of the update grows: with K at a fixed sum of ranks, and with R, tokens N and width d.

The cost is the time of an adapted layer's step minus that of the same layer frozen, timed alternately. One quantity
changes at a time. The exponent is the Theil-Sen slope of log cost over log quantity, with its 95 % interval. The
prediction of the cost model (`adamss.core.cost.update_cost`) for the same shapes stands beside it. ::

    python benchmarks/scaling.py --json scaling.json
    python benchmarks/scaling.py --quick
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from methods import OneLayer, duplicate, layer_step, make_nonzero
from paired import environment, paired_times
from scipy import stats
from tabulate import tabulate

import adamss
from adamss.core.cost import update_cost


@dataclass(frozen=True)
class Shape:
    """One layer with K subspaces of rank r, basis rank R, tokens N and width d."""

    K: int = 10
    r: int = 1
    R: int = 100
    N: int = 2048
    d: int = 768


def sweeps(*, quick: bool) -> dict[str, tuple[str, list[Shape]]]:
    """Return, by title, the name of the quantity that changes and the shapes to measure."""
    base = Shape(N=256, d=384) if quick else Shape()
    small = replace(base, K=32)
    return {
        "K, at q = K r = 32": ("K", [replace(base, K=K, r=32 // K) for K in (2, 4, 8, 16, 32)]),
        "q = K, at r = 1": ("K", [replace(base, K=K) for K in (8, 16, 32, 64, 128)]),
        "R": ("R", [replace(small, R=R) for R in (25, 50, 100, 200)]),
        "N": ("N", [replace(small, N=base.N // 4 * k) for k in (1, 2, 4, 8)]),
        "d": ("d", [replace(small, d=d) for d in ((256, 384) if quick else (384, 768, 1536))]),
    }


def costs(shapes: Sequence[Shape], repeats: int, label: str) -> list[np.ndarray]:
    """Return for each shape, in every round, the seconds of the adapted layer minus those of the frozen layer."""
    calls = {}
    for number, shape in enumerate(shapes):
        torch.manual_seed(0)
        base = OneLayer(shape.d).requires_grad_(False)
        x, gradient = torch.randn(shape.N, shape.d), torch.randn(shape.N, shape.d)
        settings = adamss.AdamssConfig(
            targets=["query"],
            rank=shape.R,
            subspaces=shape.K,
            subspace_rank=shape.r,
            segmentation="contiguous",
        )
        model = make_nonzero(adamss.attach(duplicate(base), settings))
        calls[f"{number} base"] = layer_step(base, x, gradient)
        calls[f"{number} adamss"] = layer_step(model, x, gradient)
    seconds = paired_times(calls, repeats=repeats, label=label)
    return [seconds[f"{k} adamss"] - seconds[f"{k} base"] for k in range(len(shapes))]


def modelled(shape: Shape) -> float:
    """Return the cost that the cost model predicts, in multiply-adds."""
    cost = update_cost(
        "factors_first", tokens=shape.N, d=shape.d, n=shape.d, rank=shape.R, directions=shape.K * shape.r
    )
    return cost.multiply_adds + 12.0 * cost.moved


def sweep(title: str, quantity: str, shapes: Sequence[Shape], repeats: int) -> dict[str, Any]:
    """Measure one sweep, print its table and the fitted exponent, and return both."""
    measured = costs(shapes, repeats, title)
    values = [getattr(shape, quantity) for shape in shapes]
    medians = [float(np.median(times)) for times in measured]
    fit = stats.theilslopes(np.log(medians), np.log(values)) if min(medians) > 0 else None
    model = stats.theilslopes(np.log([modelled(shape) for shape in shapes]), np.log(values))
    rows = [
        [
            value,
            f"{1e3 * median:.3f}",
            f"{median / medians[0]:.2f}",
            f"{modelled(s) / modelled(shapes[0]):.2f}",
        ]
        for value, median, s in zip(values, medians, shapes, strict=True)
    ]
    headers = [title, "update (ms)", "over the first", "by the cost model"]
    print("", tabulate(rows, headers=headers, disable_numparse=True, stralign="right"), sep="\n")
    if fit is not None:
        print(
            f"exponent {fit[0]:.2f} [{fit[2]:.2f}, {fit[3]:.2f}]; by the cost model {model[0]:.2f}",
            flush=True,
        )
    return {
        "what": title,
        "values": values,
        "seconds": medians,
        "exponent": None if fit is None else list(map(float, (fit[0], fit[2], fit[3]))),
        "modelled_exponent": float(model[0]),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table for each quantity, and write the JSON if asked."""
    parser = argparse.ArgumentParser(description="How the cost of the update grows.")
    parser.add_argument("--repeats", type=int, default=100, help="alternations (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="10 alternations and small layers: a dry run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE as well")
    arguments = parser.parse_args(argv)
    repeats = 10 if arguments.quick else arguments.repeats
    about = environment(["torch", "numpy"])
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    found = [
        sweep(title, quantity, shapes, repeats)
        for title, (quantity, shapes) in sweeps(quick=arguments.quick).items()
    ]
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": about, "results": found}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
