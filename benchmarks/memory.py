"""Measure what a fine-tuned layer keeps from the forward to the backward pass, and the time of the same step.

Bytes are counted by hooks on the tensors that autograd saves. Each storage counts once, and those of the model's own
parameters and buffers do not count. For one layer the script also prints how many numbers are kept for each token.
By the formulas these are d + q with the factors first (x and z), R + q with the input first (x A and z), and d + r
for LoRA. On a CUDA device the peak memory of the whole step is printed as well. ::

    python benchmarks/memory.py --json memory.json
    python benchmarks/memory.py --quick
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from methods import (
    BASE,
    FULL,
    HEAD_ONLY,
    Encoder,
    OneLayer,
    duplicate,
    kept_bytes,
    layer_step,
    methods,
    minilm,
    training_step,
)
from paired import environment, paired_times, ratio
from tabulate import tabulate
from torch import Tensor, nn

from adamss.core.cost import ORDERS
from adamss_torch import Adapter

LORA_RANKS = (8, 32)


def with_schedule(model: nn.Module, order: str) -> nn.Module:
    """Fix the order of the products in every adapter of the model, and return the model."""
    for module in model.modules():
        if isinstance(module, Adapter):
            module.order = order
    return model


def adapted(
    base: nn.Module, targets: Sequence[str], subspaces: Sequence[int], saved: Sequence[str] = ()
) -> dict[str, nn.Module]:
    """Return the adapted models by name; AdaMSS appears once for each order of its products."""
    models = {}
    for name, make in methods(targets, subspaces, LORA_RANKS, saved).items():
        if name.startswith("AdaMSS"):
            for order in ORDERS:
                models[f"{name}, {order}"] = with_schedule(make(base), order)
        else:
            models[name] = make(base)
    return models


def peak_bytes(step: Any, device: torch.device) -> int | None:
    """Return the peak of the bytes that a step allocates, without those allocated before it; None without CUDA."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def layer_records(
    width: int, tokens: int, subspaces: Sequence[int], repeats: int, device: torch.device
) -> list[dict[str, Any]]:
    """Measure one linear layer (width, width) on (tokens, width) inputs."""
    torch.manual_seed(0)
    base = OneLayer(width).requires_grad_(False).to(device)
    x, gradient = torch.randn(tokens, width, device=device), torch.randn(tokens, width, device=device)
    models = {BASE: base, **adapted(base, ["query"], subspaces)}
    steps = {name: layer_step(model, x, gradient) for name, model in models.items()}
    return records(
        f"linear layer, d = n = {width}, {tokens} tokens",
        models,
        steps,
        {name: _numbers_by_token(model, x) for name, model in models.items()},
        repeats,
        device,
    )


def _numbers_by_token(model: nn.Module, x: Tensor) -> dict[str, Any]:
    kept = kept_bytes(model, x.clone().requires_grad_())
    return {"kept_bytes": kept, "kept_by_token": kept / x.element_size() / len(x)}


def model_records(
    batch: int, subspaces: Sequence[int], repeats: int, device: torch.device
) -> list[dict[str, Any]]:
    """Measure the training step of MiniLM with query and value adapted."""
    torch.manual_seed(0)
    base = Encoder(minilm()).requires_grad_(False).to(device)
    tokens = torch.randint(1000, base.encoder.config.vocab_size, (batch, 64), device=device)
    labels = torch.randint(0, base.classifier.out_features, (batch,), device=device)
    head_only = duplicate(base)
    head_only.classifier = nn.Linear(base.classifier.in_features, base.classifier.out_features, device=device)
    models = {HEAD_ONLY: head_only, **adapted(base, ["query", "value"], subspaces, ["classifier"])}
    steps = {name: training_step(model, tokens, labels) for name, model in models.items()}
    kept = {name: {"kept_bytes": kept_bytes(model, tokens)} for name, model in models.items()}
    return records(f"MiniLM, {batch} x 64 tokens", models, steps, kept, repeats, device)


def records(
    what: str,
    models: dict[str, nn.Module],
    steps: dict[str, Any],
    kept: dict[str, dict[str, Any]],
    repeats: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Time the steps, print one line for each method, and return the records."""
    synchronised = {
        name: (step if device.type == "cpu" else lambda step=step: (step(), torch.cuda.synchronize()))
        for name, step in steps.items()
    }
    seconds = paired_times(synchronised, repeats=repeats, label=what)
    baseline = next(iter(models))
    found = [
        {
            "what": what,
            "method": name,
            **kept[name],
            "peak_bytes": peak_bytes(steps[name], device),
            "over_baseline": ratio(seconds[name], seconds[baseline]),
        }
        for name in models
    ]
    rows = [
        [
            r["method"],
            f"{r['kept_bytes']:,}",
            f"{r['kept_by_token']:,.1f}" if "kept_by_token" in r else "",
            "" if r["peak_bytes"] is None else f"{r['peak_bytes']:,}",
            str(r["over_baseline"]),
        ]
        for r in found
    ]
    headers = [what, "kept (bytes)", "numbers a token", "peak (bytes)", f"step over {baseline}"]
    columns = ("left", *["right"] * 4)
    print("", tabulate(rows, headers=headers, colalign=columns, disable_numparse=True), sep="\n", flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table for each part, and write the JSON if asked."""
    parser = argparse.ArgumentParser(description="What fine-tuning keeps for the backward.")
    parser.add_argument("--repeats", type=int, default=100, help="alternations (default: %(default)s)")
    parser.add_argument("--widths", type=int, nargs="+", default=[384, 768])
    parser.add_argument("--tokens", type=int, default=2048, help="rows N of the input (default: %(default)s)")
    parser.add_argument("--subspaces", type=int, nargs="+", default=[10, 32])
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="10 alternations and short inputs: a dry run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE as well")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.repeats, arguments.tokens = 10, 256
    device = torch.device(arguments.device)
    about = environment(["torch", "peft", "transformers", "numpy"])
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    found = []
    for width in arguments.widths:
        found += layer_records(width, arguments.tokens, arguments.subspaces, arguments.repeats, device)
    found += model_records(
        max(1, arguments.tokens // 128), arguments.subspaces, max(5, arguments.repeats // 2), device
    )
    print(f"\n{FULL} keeps the inputs of every layer; its step includes the gradients of all weights")
    if arguments.json:
        report = {"environment": about, "results": found}
        arguments.json.write_text(json.dumps(report, indent=2, default=dataclasses.asdict) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
