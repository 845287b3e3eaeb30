"""Compute the terms of Theorem 1 along a training, and compare AdaMSS and LoRA at equal accuracy.

The theorem bounds the expected loss by ``empirical loss + sqrt(L_g pi) L_phi Rx sum_k beta_k sqrt(r_k n_k / m) +
sqrt(9 log(2 / delta) / (2 m))`` (Zheng et al. 2025; `adamss.core.analysis.generalisation_bound`). Here m is the
number of training examples, beta_k is the spectral norm of the update of subspace k, Rx is the largest norm of a
layer's input over the training examples in the pretrained model, L_g = L_phi = 1, and delta = 0.05. LoRA is the case
of one subspace, with r_1 = r, n_1 = n and beta_1 the spectral norm of its whole update. The theorem holds for one
weight. The script adds up the terms of all adapted layers, which allows a comparison of methods but proves no bound
of the whole model. ::

    python benchmarks/evidence/bound.py --plot bound.png

Each method is trained at the learning rates that `accuracy.py` has chosen for it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # the packages demo and evidence

import numpy as np
import torch
from arguments import picture, positive
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import adamss
from adamss.core import analysis
from evidence import study, tasks
from evidence.methods import METHODS, Rates, Session
from evidence.tasks import Task
from evidence.training import Journal, evaluate, one_thread, run

RESULTS = Path(__file__).parent / "results"
COMPARED = ("AdaMSS K=10 r=1", "AdaMSS K=10 r=3", "LoRA r=1", "LoRA r=8")
CONFIDENCE = 0.95
POINTS = 25
"""Approximate number of measurements along a training."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """Measurements of a model at one step of its training.

    Attributes
    ----------
    step : int
    accuracy, validation_loss : float
        Accuracy and mean loss on the validation part.
    train_loss : float
        Mean loss on the training part.
    capacity : float
        Second term of the theorem, summed over the layers.
    """

    step: int
    accuracy: float
    validation_loss: float
    train_loss: float
    capacity: float


def input_norms(task: Task) -> dict[str, float]:
    """Return, for each target layer of the pretrained model, the largest norm of its inputs on the training part."""
    model, found = task.model(0).eval(), {}

    def watch(path: str, layer: nn.Module) -> None:
        def note(_: nn.Module, arguments: tuple[Tensor]) -> None:
            found[path] = max(found.get(path, 0.0), float(arguments[0].norm(dim=-1).max()))

        layer.register_forward_pre_hook(note)

    for path, layer in model.named_modules():
        if path.rpartition(".")[2] in task.targets:
            watch(path, layer)
    with torch.no_grad():
        for batch in task.train.batches(100):
            model(batch.hidden, batch.mask)
    return found


def second_terms(model: nn.Module, norms: dict[str, float], samples: int) -> dict[str, float]:
    """Return the theorem's second term for each layer that AdaMSS or LoRA adapts."""
    terms = {}
    bank = adamss.backend.get_backend("torch").bank(model)
    layers = bank.only().layers if bank is not None and bank.adapters else {}
    for path, f in layers.items():
        beta = analysis.spectral_norms(f._replace(B=f.B.detach(), C=f.C.detach())).tolist()
        sizes = adamss.core.subspace_sizes(f.labels, len(f.ranks)).tolist()
        terms[path] = (beta, f.ranks.tolist(), sizes)
    for path, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            update = layer.get_delta_weight("default").detach()
            beta = [float(torch.linalg.matrix_norm(update, ord=2))]
            terms[path.removeprefix("base_model.model.")] = (beta, [layer.r["default"]], [update.shape[0]])
    return {
        path: analysis.generalisation_bound(
            0.0,
            spectral_norms=beta,
            ranks=r,
            sizes=n,
            input_norm=norms[path],
            samples=samples,
            confidence=CONFIDENCE,
        )
        - third_term(samples)
        for path, (beta, r, n) in terms.items()
    }


def third_term(samples: int) -> float:
    """Return the theorem's third term, which depends only on confidence and samples: the bound without an update."""
    return analysis.generalisation_bound(
        0.0, spectral_norms=[], ranks=[], sizes=[], input_norm=0.0, samples=samples, confidence=CONFIDENCE
    )


def rates_of(journal: Journal, task: str, name: str, *, quick: bool) -> Rates:
    """Return the rates that `accuracy.py` has chosen for a method; for a dry run, fixed rates of its grids."""
    method = METHODS[name]
    if quick:
        return Rates(adapter=method.rates[2], head=method.head_rates[0])
    choice, missing = study.search(journal, study.Settings(), task, method)
    if choice is None:
        raise SystemExit(
            f"{journal.path} lacks {len(missing)} runs that choose the rate of {name}: run "
            f"accuracy.py --tasks {task} --methods {name!r} --journal {journal.path} first"
        )
    return Rates(adapter=choice.rate, head=choice.head_rate)


def path_of(
    task: Task, name: str, rates: Rates, seed: int, steps: int, norms: dict[str, float]
) -> list[Point]:
    """Train once and return the measurements along the training; an empty list if the run diverged."""
    points: list[Point] = []
    every = max(1, steps // POINTS)

    def watch(step: int, session: Session) -> None:
        if step % every == 0 or step == steps:
            accuracy, loss = evaluate(session.model, task.validation)
            _, train_loss = evaluate(session.model, task.train)
            terms = second_terms(session.model, norms, len(task.train))
            points.append(
                Point(
                    step=step,
                    accuracy=accuracy,
                    validation_loss=loss,
                    train_loss=train_loss,
                    capacity=sum(terms.values()),
                )
            )

    record = run(task, METHODS[name], rates.adapter, seed, steps, head_rate=rates.head, watch=watch)
    return [] if record["diverged"] else points


def first_at(points: Sequence[Point], level: float) -> Point:
    """Return the first point whose accuracy reaches a level."""
    return next(point for point in points if point.accuracy >= level)


def level_rows(found: dict[str, list[list[Point]]], levels: Sequence[float]) -> list[list[str]]:
    """Return, for each method, the second term at the first point of each accuracy: mean and range over seeds."""
    rows = []
    for name, paths in found.items():
        row = [name]
        for level in levels:
            terms = [first_at(points, level).capacity for points in paths]
            row.append(f"{np.mean(terms):.1f} ({min(terms):.1f} to {max(terms):.1f})")
        rows.append(row)
    return rows


def last_rows(found: dict[str, list[list[Point]]], samples: int) -> list[list[str]]:
    """Return, for each method, the bound and its terms after training, and the validation loss to compare with."""
    rows = []
    for name, paths in found.items():
        last = [points[-1] for points in paths]
        mean = {key: np.mean([getattr(point, key) for point in last]) for key in vars(last[0])}
        bound = mean["train_loss"] + mean["capacity"] + third_term(samples)
        figures = [mean["train_loss"], mean["capacity"], third_term(samples), bound, mean["validation_loss"]]
        rows.append([name, *(f"{figure:.2f}" for figure in figures), f"{100 * mean['accuracy']:.1f}"])
    return rows


def draw(found: dict[str, list[list[Point]]], title: str, path: Path) -> None:
    """Draw the second term against accuracy along the trainings, with one line for each seed."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "adamss"
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    for number, (name, paths) in enumerate(found.items()):
        for seed, points in enumerate(paths):
            axis.plot(
                [100 * point.accuracy for point in points],
                [point.capacity for point in points],
                color=f"C{number}",
                marker=".",
                linewidth=1,
                label=name if not seed else None,
            )
    axis.set(
        title=title,
        xlabel="validation accuracy (%)",
        ylabel="second term of Theorem 1, sum over layers",
        yscale="log",
    )
    axis.legend()
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Train the compared methods, print the tables, and draw the picture if asked."""
    parser = argparse.ArgumentParser(description="Theorem 1 along a training.")
    parser.add_argument(
        "--task", choices=list(tasks.PLANS), default="docstrings", help="default: %(default)s"
    )
    parser.add_argument(
        "--seeds", type=positive, default=3, help="trainings of each method (default: %(default)s)"
    )
    parser.add_argument(
        "--journal", type=Path, default=RESULTS / "accuracy.jsonl", help="where the rates come from"
    )
    parser.add_argument("--cache", type=Path, help="folder for hidden states (default: the user's cache)")
    parser.add_argument("--plot", type=picture, help="file for the picture, .png, .svg or .pdf")
    parser.add_argument("--quick", action="store_true", help="one seed, a fifth of the steps")
    arguments = parser.parse_args(argv)
    one_thread()
    task, journal = tasks.load_task(arguments.task, arguments.cache), Journal(arguments.journal)
    steps = tasks.PLANS[arguments.task].steps // (5 if arguments.quick else 1)
    seeds, norms = 1 if arguments.quick else arguments.seeds, input_norms(task)
    rates = {name: rates_of(journal, arguments.task, name, quick=arguments.quick) for name in COMPARED}
    trained = {
        name: [
            path_of(task, name, rates[name], seed, steps, norms)
            for seed in tqdm(range(seeds), desc=name, leave=False, disable=None)
        ]
        for name in COMPARED
    }
    found = {name: alive for name, paths in trained.items() if (alive := [path for path in paths if path])}
    print(f"{arguments.task}: m = {len(task.train)}, {seeds} seeds, {steps} steps")
    print(
        "rates of adapter and head: "
        + ", ".join(f"{name} {r.adapter:g} and {r.head:g}" for name, r in rates.items())
    )
    print("Rx: " + ", ".join(f"{path} {norm:.1f}" for path, norm in norms.items()))
    for name, paths in trained.items():
        if not all(paths):
            print(f"diverged, in no figure: {paths.count([])} of {seeds} seeds of {name}")
    if not found:
        return 0
    # The levels go up to the highest accuracy that every training reaches.
    common = min(max(point.accuracy for point in points) for paths in found.values() for points in paths)
    levels = sorted({math.floor(100 * share * common) / 100 for share in (0.5, 0.7, 0.85, 0.95, 1.0)})
    print(
        "\nSecond term, sum over the layers, where validation accuracy first reaches a level: mean and range"
    )
    headers = ["method", *(f"{level:.0%}" for level in levels)]
    print(tabulate(level_rows(found, levels), headers=headers, disable_numparse=True))
    print("\nThe whole bound after training, beside the loss on examples that were not trained on")
    header = ["method", "training loss", "second term", "third", "bound", "validation loss", "accuracy"]
    print(tabulate(last_rows(found, len(task.train)), headers=header, disable_numparse=True))
    if arguments.plot:
        draw(found, f"{arguments.task}, {seeds} seeds", arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
