"""Many adapters on one model: a mixed batch beside PEFT's, and a hundred adapters on MiniLM.

The time of a forward whose rows go through adapters of their own, over the frozen base, and beside PEFT's LoRA with
``adapter_names``, which runs the rows of each adapter apart. Then the bytes of each of a hundred adapters, and the
time of a switch. ::

    python benchmarks/adapters.py
    python benchmarks/adapters.py --quick
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from methods import BASE, RANK, OneLayer, duplicate, minilm
from paired import environment, paired_times, ratio
from peft import LoraConfig, get_peft_model
from tabulate import tabulate
from torch import Tensor, nn

import adamss
from adamss_torch.backend import adapters_of

ROWS = 32
"""Rows of a batch, or as many as there are tokens."""


def several(base: nn.Module, targets: Sequence[str], count: int) -> nn.Module:
    """Return a copy with so many adapters, K = 10, r_k = 1, as they are loaded for inference."""
    model = duplicate(base)
    config = adamss.AdamssConfig(rank=RANK, targets=list(targets), segmentation="contiguous")
    for number in range(count):
        model = adamss.attach(model, config, name=f"a{number}")
        for adapter in adapters_of(model, f"a{number}").values():
            adapter.C.data.normal_(std=0.05)
    return adamss.activate(model, []).requires_grad_(False)


def several_lora(base: nn.Module, targets: Sequence[str], count: int) -> nn.Module:
    """Return a copy with so many of PEFT's LoRA, r = 8."""
    config = LoraConfig(r=8, target_modules=list(targets), init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(duplicate(base), config, adapter_name="a0")
        for number in range(1, count):
            model.add_adapter(f"a{number}", config)
    return model.eval().requires_grad_(False)


def mixed(width: int, count: int, tokens: int, repeats: int) -> list[object]:
    """Time a layer (width, width) on `tokens` tokens of `ROWS` rows, each of another adapter as far as they go."""
    base = OneLayer(width).requires_grad_(False)
    rows = min(ROWS, tokens)
    x, names = torch.randn(rows, tokens // rows, width), [f"a{row % count}" for row in range(rows)]
    ours, theirs = several(base, ["query"], count), several_lora(base, ["query"], count)
    inner = max(1, 256 // tokens)

    def times(call: Callable[[Tensor], object]) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode():
                for _ in range(inner):
                    call(x)

        return run

    with adamss.routed(ours, names):
        calls = {
            BASE: times(base),
            "AdaMSS": times(ours),
            "LoRA": times(lambda x: theirs(x, adapter_names=names)),
        }
        seconds = paired_times(calls, repeats=repeats, label=f"{count} adapters, {tokens} tokens")
    return [
        width,
        count,
        tokens,
        *(str(ratio(seconds[name], seconds[BASE])) for name in ("AdaMSS", "LoRA")),
        str(ratio(seconds["AdaMSS"], seconds["LoRA"])),
    ]


def hundred(count: int) -> list[list[str]]:
    """Return bytes and times of many adapters on MiniLM."""
    model = minilm().requires_grad_(False)
    before = sum(p.nbytes for p in model.parameters())
    start = time.perf_counter()
    many = several(model, ["query", "value"], count)
    attached = time.perf_counter() - start
    one = adapters_of(many, "a0").values()
    trained = sum(p.nbytes for adapter in one for p in (adapter.B, adapter.C))
    bases = sum(adapter.A.nbytes for adapter in one)
    switches = []
    for number in range(count):
        start = time.perf_counter()
        adamss.activate(many, f"a{number}")
        switches.append(time.perf_counter() - start)
    start = time.perf_counter()
    with adamss.routed(many, [f"a{number % count}" for number in range(ROWS)]):
        routed = time.perf_counter() - start
    return [
        ["base, MB", f"{before / 1e6:.1f}"],
        ["B and C of one adapter, KB", f"{trained / 1e3:.1f}"],
        ["bases A of one adapter, KB", f"{bases / 1e3:.1f}"],
        [f"attach, ms for each of {count}", f"{1e3 * attached / count:.1f}"],
        [f"activate one of {count}, ms, median", f"{1e3 * sorted(switches)[count // 2]:.2f}"],
        [f"enter routed with {count}, ms", f"{1e3 * routed:.1f}"],
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print two tables."""
    parser = argparse.ArgumentParser(description="Many adapters on one model.")
    parser.add_argument("--repeats", type=int, default=60, help="alternations (default: %(default)s)")
    parser.add_argument("--widths", type=int, nargs="+", default=[384, 768])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 32, 128, 512, 2048])
    parser.add_argument("--adapters", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--many", type=int, default=100, help="adapters on MiniLM (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a dry run")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.repeats, arguments.widths, arguments.tokens, arguments.many = 10, [64], [8, 64], 3
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(", ".join(f"{name} {value}" for name, value in environment(["torch", "peft"]).items()))
    rows = [
        mixed(width, count, tokens, arguments.repeats)
        for width in arguments.widths
        for count in arguments.adapters
        for tokens in arguments.tokens
    ]
    headers = ["d = n", "adapters", "tokens", "AdaMSS / base", "LoRA r=8 / base", "AdaMSS / LoRA"]
    print(tabulate(rows, headers=headers, disable_numparse=True))
    print("", tabulate(hundred(arguments.many), disable_numparse=True), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
