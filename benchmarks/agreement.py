"""Check law 13 on real weights: NumPy, PyTorch and JAX find the same subspaces and compute the same update.

Every weight matrix of MiniLM-L6 is decomposed and segmented in float32, as `adamss.attach` does for the arrays of
each framework. The results are compared with NumPy in float64:

- the labels by the adjusted Rand index;
- the basis by the energy that it captures;
- the layer's output, for the same factors, by the largest difference over the largest sum of magnitudes. ::

    python benchmarks/agreement.py
    python benchmarks/agreement.py --layers 2 --json agreement.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from demo.sentences import bundled_model
from paired import environment
from safetensors.numpy import load_file
from tabulate import tabulate
from tqdm import tqdm

from adamss import core
from adamss.backend import Backend, get_backend
from adamss.core import Factors
from adamss_conformance import RELATIVE_TOLERANCE
from adamss_conformance.cases import adjusted_rand_index, magnitudes, random_C

RANK = 100
SUBSPACES = (10, 32)
LEAST_RAND_INDEX, MOST_ENERGY_LOST = 0.99, 1e-5


@dataclass(frozen=True, kw_only=True)
class Worst:
    """The worst agreement of one backend over all matrices.

    Attributes
    ----------
    backend : str
    device : str
    K : int
    rand_index : float
        Lowest adjusted Rand index between the labels and those of the reference; 1 means the same grouping.
    different : int
        Number of matrices in which any column has another label than in the reference.
    energy : float
        Captured energy over that of the reference, minus one.
    update : float
        Largest difference of the adapted layer's output, over the largest sum of magnitudes.
    """

    backend: str
    device: str
    K: int
    rand_index: float
    different: int
    energy: float
    update: float

    @property
    def holds(self) -> bool:
        """Whether the backend agrees within the limits of law 13."""
        return (
            self.rand_index >= LEAST_RAND_INDEX
            and abs(self.energy) <= MOST_ENERGY_LOST
            and self.update <= RELATIVE_TOLERANCE["float32"]
        )


def matrices(folder: Path, layers: int | None) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and weight W (d, n) of each linear layer in a BERT folder, only from the first `layers` if given."""
    for name, array in sorted(load_file(folder / "model.safetensors").items()):
        number = name.split("layer.")[1].split(".")[0] if "layer." in name else None
        linear = array.ndim == 2 and number is not None
        if linear and (layers is None or int(number or 0) < layers):
            yield name, np.ascontiguousarray(array.T)


def devices() -> Iterator[tuple[str, str, Callable[[np.ndarray], Any]]]:
    """Yield backend, device, and a function that moves a NumPy array there, for all that are available."""
    yield "numpy", "cpu", np.asarray
    if importlib.util.find_spec("torch"):
        import torch

        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            yield "torch", device, lambda array, device=device: torch.asarray(array).to(device)
    if importlib.util.find_spec("jax"):
        import jax

        for device in {device.platform: device for device in jax.devices()}.values():
            yield "flax", device.platform, lambda array, device=device: jax.device_put(array, device)


def reference_of(W: np.ndarray, K: int) -> tuple[core.Decomposition, np.ndarray, Factors]:
    """Return decomposition, labels and factors in float64, with a random C so that the update is not zero."""
    decomposition = core.decompose(W.astype(np.float64), RANK)
    labels = core.segment(decomposition, K)
    factors = core.initial_factors(decomposition, labels, 1)
    return decomposition, labels, factors._replace(C=random_C(factors, np.random.default_rng(0)))


def on_host(array: Any) -> np.ndarray:
    """Convert an array of any framework to NumPy."""
    return np.asarray(array.cpu() if hasattr(array, "cpu") else array)


def compare(
    backend: Backend, place: Callable[[np.ndarray], Any], K: int, W: np.ndarray, reference: tuple[Any, ...]
) -> tuple[float, float, float]:
    """Return adjusted Rand index, captured energy over the reference's minus one, and the error of the output."""
    decomposition, labels, factors = reference
    # The same two calls as in `adamss.attach`.
    mine = core.decompose(backend.decomposition_input(place(W)), RANK)
    found, U = (
        np.asarray(array.cpu() if hasattr(array, "cpu") else array)
        for array in (core.segment(mine, K), mine.U)
    )
    U = U.astype(np.float64)
    captured, best = (float(np.sum((basis.T @ W.astype(np.float64)) ** 2)) for basis in (U, decomposition.U))
    floats = (place(getattr(factors, name).astype(np.float32)) for name in "ABC")
    same = Factors(*floats, place(factors.labels), place(factors.ranks), place(factors.active))
    x = np.random.default_rng(1).standard_normal((64, W.shape[0])).astype(np.float32)
    with backend.exact():
        y = backend.to_stored(backend.linear(place(x), place(W), None, same)).numpy()
    expected = core.linear(x.astype(np.float64), W.astype(np.float64), None, factors)
    terms = core.linear(np.abs(x).astype(np.float64), np.abs(W).astype(np.float64), None, magnitudes(factors))
    return (
        adjusted_rand_index(found, labels),
        captured / best - 1,
        float(np.abs(y - expected).max() / terms.max()),
    )


def worst(
    name: str,
    device: str,
    place: Callable[[np.ndarray], Any],
    K: int,
    weights: Sequence[np.ndarray],
    references: Sequence[tuple[Any, ...]],
) -> Worst:
    """Compare a backend with the references on all matrices, and return the worst figures."""
    backend = get_backend(name)
    pairs = list(zip(weights, references, strict=True))
    rows = [
        compare(backend, place, K, W, reference)
        for W, reference in tqdm(pairs, desc=f"{name}, K = {K}", leave=False, disable=None)
    ]
    rand, energy, update = (np.asarray(column) for column in zip(*rows, strict=True))
    return Worst(
        backend=name,
        device=device,
        K=K,
        rand_index=float(rand.min()),
        different=int((rand < 1).sum()),
        energy=float(energy[np.abs(energy).argmax()]),
        update=float(update.max()),
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Agreement of the backends on the weights of MiniLM-L6.")
    parser.add_argument("--layers", type=int, help="first layers only (default: all six)")
    parser.add_argument("--quick", action="store_true", help="the first layer only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE as well")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare the backends and print the table; return 1 if one of them does not agree, else 0."""
    arguments = parse(argv)
    weights = [W for _, W in matrices(bundled_model(), 1 if arguments.quick else arguments.layers)]
    found = []
    for K in SUBSPACES:
        references = [reference_of(W, K) for W in tqdm(weights, desc="float64", leave=False, disable=None)]
        found += [worst(*place, K, weights, references) for place in devices()]
    print(f"float32 against NumPy in float64, R = {RANK}; the worst of {len(weights)} matrices of MiniLM-L6")
    table = [
        (w.backend, w.device, w.K, f"{w.rand_index:.4f}", w.different, f"{w.energy:.1e}", f"{w.update:.1e}")
        for w in found
    ]
    headers = ["backend", "device", "K", "Rand index", "grouped otherwise", "energy - 1", "update"]
    print(tabulate(table, headers, disable_numparse=True))
    if arguments.json:
        report = {"environment": environment(["numpy"]), "results": [asdict(w) for w in found]}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(w.holds for w in found) else 1


if __name__ == "__main__":
    sys.exit(main())
