"""Measure the step time of AdaMSS, of LoRA and of PEFT's AdaMSS, alternately in one process.

The first tables are about one linear layer in the middle of a network: the forward pass, and the backward pass with
the gradients of the input and of the trained parameters, relative to the same layer frozen. They include a minimal
implementation of AdaMSS, the "sketch", as the practical limit. The other tables are about the whole training step
with AdamW, for MiniLM-L6 (real weights) and for RoBERTa-base's shape (random weights), query and value adapted. ::

    python benchmarks/step_time.py --json step_time.json
    python benchmarks/step_time.py --quick
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from methods import (
    BASE,
    FULL,
    HEAD_ONLY,
    RANK,
    Encoder,
    OneLayer,
    duplicate,
    layer_step,
    lora_name,
    methods,
    minilm,
    training_step,
    with_adamss,
)
from paired import environment, paired_times, ratio
from tabulate import tabulate
from torch import Tensor, nn


class _SketchStep(torch.autograd.Function):
    """``y = x W^T + b + (M x^T)^T E``, ``M = B A^T``, ``E = C * mask``; one autograd function for all products."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, B: Tensor, C: Tensor, W: Tensor, b: Tensor, A: Tensor, mask: Tensor
    ) -> Tensor:
        M, E = B @ A.t(), C * mask
        z = M @ x.t()
        ctx.save_for_backward(x, z, M, E, W, A, mask)
        return torch.addmm(b, x, W.t()).addmm_(z.t(), E)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, z, M, E, W, A, mask = ctx.saved_tensors
        dz = E @ dy.t()
        dx = (dy @ W).addmm_(dz.t(), M)
        return dx, (dz @ x) @ A, ((z @ dy) * mask).sum(0, keepdim=True), None, None, None, None


class Sketch(nn.Module):
    """A minimal AdaMSS layer, which shows the practical limit of the step time.

    It supports neither frozen subspaces nor other dtypes, shapes or states of the layer.
    """

    def __init__(self, base: OneLayer, subspaces: int) -> None:
        super().__init__()
        layer = with_adamss(base, ["query"], subspaces).query
        f = layer.adamss.default.factors()
        self.B, self.C = nn.Parameter(f.B.t().clone()), nn.Parameter(f.C.clone())
        mask = (f.labels == torch.arange(subspaces)[:, None]).to(f.C.dtype)
        self.frozen = layer.weight, layer.bias, f.A[0], mask

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the layer with its update."""
        return _SketchStep.apply(x, self.B, self.C, *self.frozen)


LORA = lora_name(8)
LORA_RANKS = (8, 1, 32)
LENGTH = 64


def time_layer(width: int, tokens: int, subspaces: Sequence[int], repeats: int) -> dict[str, np.ndarray]:
    """Time the step of one linear layer (width, width) on (tokens, width) inputs."""
    torch.manual_seed(0)
    base = OneLayer(width).requires_grad_(False)
    x, gradient = torch.randn(tokens, width), torch.randn(tokens, width)
    sketches = {f"sketch K={K}": partial(Sketch, subspaces=K) for K in subspaces}
    makers = {BASE: duplicate, **methods(["query"], subspaces, LORA_RANKS), **sketches}
    calls = {name: layer_step(make(base), x, gradient) for name, make in makers.items()}
    return paired_times(calls, repeats=repeats, label=f"d = {width}")


def roberta_base() -> nn.Module:
    """Return an encoder of RoBERTa-base's shape with random weights and a small vocabulary."""
    from transformers import RobertaConfig, RobertaModel

    return RobertaModel(RobertaConfig(vocab_size=1000, max_position_embeddings=514), add_pooling_layer=False)


def time_model(
    build: Callable[[], nn.Module], batch: int, subspaces: Sequence[int], repeats: int, label: str
) -> dict[str, np.ndarray]:
    """Time the training step of a model on (batch, 64) tokens, with query and value adapted and the head trained."""
    torch.manual_seed(0)
    base = Encoder(build()).requires_grad_(False)
    tokens = torch.randint(5, base.encoder.config.vocab_size, (batch, LENGTH))
    labels = torch.randint(0, base.classifier.out_features, (batch,))
    head_only = duplicate(base)
    head_only.classifier = nn.Linear(base.classifier.in_features, base.classifier.out_features)
    models = {HEAD_ONLY: head_only}
    for name, make in methods(["query", "value"], subspaces, LORA_RANKS, ["classifier"]).items():
        models[name] = make(base)
    calls = {name: training_step(model, tokens, labels) for name, model in models.items()}
    return paired_times(calls, repeats=repeats, label=label)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Methods that are timed together, on one layer or model.

    Attributes
    ----------
    name : str
        Description of what is timed, for the table.
    baseline : str
        Name of the method that the times of all methods are divided by; a second ratio is to LoRA.
    measure : callable
        ``() -> dict``: the seconds of every method, with the same round at the same index.
    """

    name: str
    baseline: str
    measure: Callable[[], dict[str, np.ndarray]]

    def records(self) -> list[dict[str, object]]:
        """Measure, and return one record for each method with its ratios."""
        seconds = self.measure()
        records: list[dict[str, object]] = []
        for name, times in seconds.items():
            record = {
                "what": self.name,
                "method": name,
                "median_ms": 1e3 * float(np.median(times)),
                "baseline": self.baseline,
                "over_baseline": ratio(times, seconds[self.baseline]),
                "over_lora": ratio(times, seconds[LORA]),
            }
            if f"PEFT {name}" in seconds:
                record["over_peft"] = ratio(times, seconds[f"PEFT {name}"])
            records.append(record)
        return records


def plan(arguments: argparse.Namespace) -> list[Part]:
    """Return the parts that the command line asks for."""
    common = {"subspaces": arguments.subspaces, "repeats": arguments.repeats}
    parts = [
        Part(
            name=f"linear layer, d = n = {width}, {arguments.tokens} tokens",
            baseline=BASE,
            measure=partial(time_layer, width, arguments.tokens, **common),
        )
        for width in arguments.widths
    ]
    builders = {"MiniLM": minilm, "RoBERTa-base's shape": roberta_base}
    batch = max(1, arguments.tokens // (2 * LENGTH))
    models = [
        Part(
            name=f"training step of {name}, {batch} x {LENGTH} tokens",
            baseline=HEAD_ONLY,
            measure=partial(time_model, build, batch, **common, label=name),
        )
        for name, build in builders.items()
    ]
    return parts if arguments.no_model else parts + models


def table(records: list[dict[str, object]]) -> str:
    """Format the records of one part."""
    rows = [
        [r["method"], f"{r['median_ms']:.2f}", r["over_baseline"], r["over_lora"], r.get("over_peft", "")]
        for r in records
    ]
    headers = [
        records[0]["what"],
        "median (ms)",
        f"over {records[0]['baseline']}",
        f"over {LORA}",
        "over PEFT's own",
    ]
    return tabulate(
        rows, headers=headers, colalign=("left", "right", "right", "right", "right"), disable_numparse=True
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Step time of AdaMSS, LoRA, PEFT's AdaMSS.")
    parser.add_argument("--repeats", type=int, default=100, help="alternations (default: %(default)s)")
    parser.add_argument("--widths", type=int, nargs="+", default=[384, 768, 1024])
    parser.add_argument("--tokens", type=int, default=2048, help="rows N of the input (default: %(default)s)")
    parser.add_argument("--subspaces", type=int, nargs="+", default=[10, 32])
    parser.add_argument("--quick", action="store_true", help="10 alternations and short inputs: a dry run")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--no-model", action="store_true", help="leave out the models")
    only.add_argument("--no-layer", action="store_true", help="leave out the single layers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE as well")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table for each part, and write the JSON if asked."""
    arguments = parse(argv)
    if arguments.quick:
        arguments.repeats, arguments.tokens = 10, 256
    if arguments.no_layer:
        arguments.widths = []
    settings = {"repeats": arguments.repeats, "rank": RANK, "subspace_rank": 1, "dtype": "float32"}
    about = environment(["torch", "peft", "transformers", "numpy"])
    for facts in (about, settings):
        print(", ".join(f"{name} {value}" for name, value in facts.items()))

    found: list[dict[str, object]] = []
    for part in plan(arguments):
        records = part.records()
        print("", table(records), sep="\n", flush=True)
        found += records
    print(f"\nratios within a round: median [95 % interval]; {FULL} has the gradients of all weights")
    if arguments.json:
        report = {"environment": about, "settings": settings, "results": found}
        arguments.json.write_text(json.dumps(report, indent=2, default=dataclasses.asdict) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
