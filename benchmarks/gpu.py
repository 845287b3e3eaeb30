"""Measure everything that needs a GPU in one run of less than eight minutes, on real shapes with random weights.

The models are Llama-3.2-3B (4 x 768 tokens), RoBERTa-large and ViT-L in bfloat16, with query and value adapted. For
each the script measures the whole training step with AdamW, its peak memory, and the time to attach. The methods are
AdaMSS with both orders of its products, LoRA, PEFT's AdaMSS, and the frozen model with one small trained parameter.
One linear layer with one to eight tokens follows, as in generation. ``--json`` writes the results to a file that
names the device and the date. ::

    python benchmarks/gpu.py --json results/gpu.json
    python benchmarks/gpu.py --device cpu --quick

The timed steps alternate, and each ratio is the median of the ratios within the rounds. ``--quick`` shrinks the
models to what a CPU can run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from memory import peak_bytes, with_schedule
from methods import (
    BASE,
    OneLayer,
    duplicate,
    lora_name,
    with_adamss,
    with_hand_written_lora,
    with_lora,
    with_peft_adamss,
)
from paired import environment, paired_times, ratio
from tabulate import tabulate
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from adamss.core.cost import ORDERS

SUBSPACES = 32
LORA_RANK = 32
LORA = lora_name(LORA_RANK)


@dataclass(frozen=True)
class Problem:
    """A model and a batch for it.

    Attributes
    ----------
    name : str
    build : callable
        ``quick -> model``; the model is tiny if `quick` is true.
    targets : list of str
        Names of the query and value projections. Empty: see `query_and_value`.
    batch : callable
        ``(model, quick, device) -> dict``: keyword arguments of a forward pass that returns a loss.
    """

    name: str
    build: Callable[[bool], nn.Module]
    targets: list[str]
    batch: Callable[[nn.Module, bool, torch.device], dict[str, Tensor]]


def llama(quick: bool) -> nn.Module:
    """Return a model of Llama-3.2-3B's shape."""
    small = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 500}
    large = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "vocab_size": 128256}
    heads, groups = (4, 2) if quick else (24, 8)
    config = LlamaConfig(
        **(small if quick else large),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def roberta(quick: bool) -> nn.Module:
    """Return a model of RoBERTa-large's shape."""
    small = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 500}
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "vocab_size": 50265}
    return RobertaForSequenceClassification(
        RobertaConfig(
            **(small if quick else large),
            num_attention_heads=4 if quick else 16,
            max_position_embeddings=514,
            num_labels=2,
        )
    )


def vit(quick: bool) -> nn.Module:
    """Return a model of ViT-L/16's shape."""
    small = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    large = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    }
    return ViTForImageClassification(ViTConfig(**(small if quick else large), num_labels=10))


def tokens(model: nn.Module, size: tuple[int, int], device: torch.device) -> Tensor:
    """Return random token ids."""
    return torch.randint(5, model.config.vocab_size, size, device=device)


def language(model: nn.Module, quick: bool, device: torch.device) -> dict[str, Tensor]:
    """Return 4 sequences of 768 random tokens, which also serve as their labels."""
    ids = tokens(model, (2, 32) if quick else (4, 768), device)
    return {"input_ids": ids, "labels": ids}


def sentences(model: nn.Module, quick: bool, device: torch.device) -> dict[str, Tensor]:
    """Return 32 sentences of 128 tokens with labels."""
    ids = tokens(model, (2, 32) if quick else (32, 128), device)
    return {"input_ids": ids, "labels": torch.zeros(len(ids), dtype=torch.long, device=device)}


def images(model: nn.Module, quick: bool, device: torch.device) -> dict[str, Tensor]:
    """Return 32 images with labels."""
    number = 2 if quick else 32
    dtype = next(model.parameters()).dtype
    pixels = torch.randn(number, 3, 224, 224, device=device, dtype=dtype)
    return {"pixel_values": pixels, "labels": torch.zeros(number, dtype=torch.long, device=device)}


PROBLEMS = [
    Problem("Llama-3.2-3B's shape", llama, ["q_proj", "v_proj"], language),
    Problem("RoBERTa-large's shape", roberta, ["query", "value"], sentences),
    Problem("ViT-L's shape", vit, [], images),
]


def query_and_value(model: nn.Module, targets: list[str]) -> list[str]:
    """Return `targets`, or if empty the names that the model gives to its query and value layers.

    The names in ViT depend on the version of transformers.
    """
    if targets:
        return targets
    found = {path.rpartition(".")[2] for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    return sorted(found & {"query", "value", "q_proj", "v_proj"})


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished its work; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def step_of(model: nn.Module, batch: dict[str, Tensor], device: torch.device) -> Callable[[], None]:
    """Return a function that takes one training step and waits until the device has finished it."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device.type == "cuda")

    def step() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        synchronise(device)

    return step


def last_layer_norm(base: nn.Module) -> nn.Module:
    """Return the model with only its last parameter trained, as the baseline of a step without any adapter."""
    model = duplicate(base)
    last = list(model.named_parameters())[-1][0]
    path, _, name = last.rpartition(".")
    module = model.get_submodule(path)
    setattr(module, name, nn.Parameter(getattr(module, name).detach().clone()))
    return model


def run(problem: Problem, *, quick: bool, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Measure one model with every method, print the table, and return the records."""
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            base = problem.build(quick)
    finally:
        torch.set_default_dtype(previous)
    base.requires_grad_(False)
    targets = query_and_value(base, problem.targets)
    batch = problem.batch(base, quick, device)
    makers: dict[str, Callable[[], nn.Module]] = {
        BASE: lambda: last_layer_norm(base),
        f"AdaMSS K={SUBSPACES}": lambda: with_adamss(base, targets, SUBSPACES),
        f"PEFT AdaMSS K={SUBSPACES}": lambda: with_peft_adamss(base, targets, SUBSPACES),
        LORA: lambda: with_lora(base, targets, LORA_RANK),
        f"LoRA r={LORA_RANK}, by hand": lambda: with_hand_written_lora(base, targets, LORA_RANK),
    }
    models, attached = {}, {}
    for name, make in makers.items():
        synchronise(device)
        start = time.perf_counter()
        models[name] = make()
        synchronise(device)
        attached[name] = time.perf_counter() - start
        if name == f"AdaMSS K={SUBSPACES}":
            for order in ORDERS:
                # `duplicate` shares the frozen weights and copies only the adapters.
                models[f"{name}, {order}"] = with_schedule(duplicate(models[name]), order)
    steps = {name: step_of(model, batch, device) for name, model in models.items()}
    seconds = paired_times(steps, repeats=repeats, warmup=3, label=problem.name)
    found = [
        {
            "model": problem.name,
            "method": name,
            "attach_s": attached.get(name),
            "median_ms": 1e3 * float(sorted(times)[len(times) // 2]),
            "over_base": ratio(times, seconds[BASE]),
            "over_lora": ratio(times, seconds[LORA]),
            "peak_bytes": peak_bytes(steps[name], device),
            "trained": sum(p.numel() for p in models[name].parameters() if p.requires_grad),
        }
        for name, times in seconds.items()
    ]
    rows = [
        [
            r["method"],
            "" if r["attach_s"] is None else f"{r['attach_s']:.2f}",
            f"{r['trained']:,}",
            f"{r['median_ms']:.2f}",
            str(r["over_base"]),
            str(r["over_lora"]),
            "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**20:,.0f}",
        ]
        for r in found
    ]
    headers = [
        problem.name,
        "attach (s)",
        "trained",
        "step (ms)",
        f"over {BASE}",
        f"over {LORA}",
        "peak (MiB)",
    ]
    print("", tabulate(rows, headers=headers, disable_numparse=True), sep="\n", flush=True)
    return found


def generation(*, quick: bool, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Time one linear layer with a few tokens under ``inference_mode``, print the table, and return the records."""
    width = 128 if quick else 3072
    base = OneLayer(width).to(device, torch.bfloat16).requires_grad_(False)
    models = {
        BASE: base,
        f"AdaMSS K={SUBSPACES}": with_adamss(base, ["query"], SUBSPACES),
        LORA: with_lora(base, ["query"], LORA_RANK).eval(),
    }
    found = []
    for number in (1, 2, 4, 8):
        x = torch.randn(number, width, device=device, dtype=torch.bfloat16)

        def forward(model: nn.Module, x: Tensor = x) -> None:
            with torch.inference_mode():
                for _ in range(50):
                    model(x)
            synchronise(device)

        calls = {name: (lambda model=model: forward(model)) for name, model in models.items()}
        seconds = paired_times(calls, repeats=repeats, warmup=3)
        found += [
            {"tokens": number, "method": name, "over_base": ratio(times, seconds[BASE])}
            for name, times in seconds.items()
        ]
    rows = [[r["tokens"], r["method"], str(r["over_base"])] for r in found]
    headers = [f"tokens, d = n = {width}", "method", f"forward over {BASE}"]
    print("", tabulate(rows, headers=headers, disable_numparse=True), sep="\n", flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every model, print the tables, and write the JSON if asked."""
    parser = argparse.ArgumentParser(description="Step time, memory and attaching on a GPU.")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=30, help="alternations (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny models and 6 alternations: a dry run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE as well")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("PyTorch sees no CUDA device; --device cpu --quick is a dry run", file=sys.stderr)
        return 2
    about = environment(["torch", "transformers", "peft", "adamss"])
    about["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    options = {
        "quick": arguments.quick,
        "repeats": 6 if arguments.quick else arguments.repeats,
        "device": device,
    }
    started = time.perf_counter()
    found = []
    for problem in PROBLEMS:
        found += run(problem, **options)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    few = generation(**options)
    print(f"\n{time.perf_counter() - started:.0f} s; ratios within a round: median [95 % interval]")
    if arguments.json:
        report = {"environment": about, "steps": found, "generation": few}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2, default=dataclasses.asdict) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
