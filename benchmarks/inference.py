"""Measure the time of an adapted layer in inference, unmerged and merged, and compare with LoRA.

The times are those of one linear layer under ``inference_mode``, relative to the same layer without an adapter, for
one to eight tokens as in generation and for a batch of 512. A merged layer computes only its base product. ::

    python benchmarks/inference.py --json inference.json
    python benchmarks/inference.py --quick
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from memory import with_schedule
from methods import (
    BASE,
    OneLayer,
    duplicate,
    kept_bytes,
    lora_name,
    with_adamss,
    with_hand_written_lora,
    with_lora,
)
from paired import environment, paired_times, ratio
from tabulate import tabulate
from torch import Tensor, nn

import adamss
from adamss.core.cost import ORDERS


def forward(model: nn.Module, x: Tensor, inner: int) -> Callable[[], None]:
    """Return a function that runs `inner` forward passes; a single one of a small layer is too short to time."""

    def run() -> None:
        with torch.inference_mode():
            for _ in range(inner):
                model(x)

    return run


def measure(width: int, tokens: int, subspaces: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Time one layer (width, width) on (tokens, width) inputs."""
    torch.manual_seed(0)
    base = OneLayer(width).requires_grad_(False)
    x = torch.randn(tokens, width)
    models = {BASE: base}
    for K in subspaces:
        # Contiguous groups: clustering 3072 columns takes long, and the grouping does not affect the time.
        model = with_adamss(base, ["query"], K, segmentation="contiguous")
        models[f"AdaMSS K={K}"] = model
        for order in ORDERS:
            models[f"AdaMSS K={K}, {order}"] = with_schedule(duplicate(model), order)
        models[f"AdaMSS K={K}, merged"] = adamss.merge(duplicate(model))
    models[lora_name(8)] = with_lora(base, ["query"], 8).eval()
    models["LoRA r=8, by hand"] = with_hand_written_lora(base, ["query"], 8)
    for name, model in models.items():
        with torch.no_grad():
            assert kept_bytes(model, x) == 0, name
    inner = max(1, 64 // tokens)
    calls = {name: forward(model, x, inner) for name, model in models.items()}
    seconds = paired_times(calls, repeats=repeats, label=f"{tokens} tokens")
    return [
        {
            "width": width,
            "tokens": tokens,
            "method": name,
            "median_us": 1e6 * float(sorted(times)[len(times) // 2]) / inner,
            "over_base": ratio(times, seconds[BASE]),
        }
        for name, times in seconds.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table for each width, and write the JSON if asked."""
    parser = argparse.ArgumentParser(description="Time of the forward in inference.")
    parser.add_argument("--repeats", type=int, default=100, help="alternations (default: %(default)s)")
    parser.add_argument("--widths", type=int, nargs="+", default=[768, 3072])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 512])
    parser.add_argument("--subspaces", type=int, nargs="+", default=[10, 32])
    parser.add_argument("--quick", action="store_true", help="10 alternations of the narrow layer: a dry run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE as well")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.repeats, arguments.widths = 10, arguments.widths[:1]
    about = environment(["torch", "peft", "numpy"])
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    found = []
    for width in arguments.widths:
        by_tokens = {N: measure(width, N, arguments.subspaces, arguments.repeats) for N in arguments.tokens}
        names = [record["method"] for record in next(iter(by_tokens.values()))]
        rows = [
            [name, *(str(by_tokens[N][row]["over_base"]) for N in by_tokens)]
            for row, name in enumerate(names)
        ]
        headers = [f"over {BASE}, d = n = {width}", *(f"N = {N}" for N in by_tokens)]
        print("", tabulate(rows, headers=headers, disable_numparse=True), sep="\n", flush=True)
        found += [record for records in by_tokens.values() for record in records]
    if arguments.json:
        report = {"environment": about, "results": found}
        arguments.json.write_text(json.dumps(report, indent=2, default=dataclasses.asdict) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
