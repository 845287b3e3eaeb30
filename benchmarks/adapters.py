"""Measure many adapters on one model, and compare with PEFT's LoRA.

The script prints three tables:

1. the time of a forward pass on a mixed batch, in which each row goes through its own adapter, relative to the frozen
   base. PEFT's LoRA with ``adapter_names``, which processes the rows of each adapter separately, is timed beside it;
2. for a hundred adapters on MiniLM: the bytes of one adapter, and the times to load, switch and route adapters;
3. the largest difference between the outputs of PEFT's LoRA and of our adapters with the same updates, after
   switching, weighting, mixing, merging, deleting and loading. ::

    python benchmarks/adapters.py
    python benchmarks/adapters.py --quick
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from methods import BASE, RANK, OneLayer, duplicate, minilm
from paired import environment, paired_times, ratio
from peft import LoraConfig, get_peft_model
from tabulate import tabulate
from torch import Tensor, nn

import adamss
from adamss_torch.backend import adapters_of

ROWS = 32
"""Most rows of a batch; a batch of fewer tokens has one row per token."""


def several(base: nn.Module, targets: Sequence[str], count: int) -> nn.Module:
    """Return a frozen copy of the model with `count` AdaMSS adapters (K = 10, r_k = 1), as loaded for inference."""
    model = duplicate(base)
    config = adamss.AdamssConfig(rank=RANK, targets=list(targets), segmentation="contiguous")
    for number in range(count):
        model = adamss.attach(model, config, name=f"a{number}")
        for adapter in adapters_of(model, f"a{number}").values():
            adapter.C.data.normal_(std=0.05)
    return adamss.activate(model, []).requires_grad_(False)


def several_lora(base: nn.Module, targets: Sequence[str], count: int) -> nn.Module:
    """Return a frozen copy of the model with `count` LoRA adapters of PEFT (r = 8)."""
    config = LoraConfig(r=8, target_modules=list(targets), init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(duplicate(base), config, adapter_name="a0")
        for number in range(1, count):
            model.add_adapter(f"a{number}", config)
    return model.eval().requires_grad_(False)


def mixed(width: int, count: int, tokens: int, repeats: int) -> list[object]:
    """Time a (width, width) layer on `tokens` tokens in at most `ROWS` rows, whose adapters alternate."""
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
    """Return bytes and times of `count` adapters on MiniLM, loaded for inference, and of as many LoRAs of PEFT."""
    model = minilm().requires_grad_(False)
    before = sum(p.nbytes for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        adamss.save(several(model, ["query", "value"], 1), f"{folder}/adapter.safetensors", name="a0")
        size = Path(folder, "adapter.safetensors").stat().st_size
        many, start = duplicate(model), time.perf_counter()
        for number in range(count):
            adamss.load(many, f"{folder}/adapter.safetensors", name=f"a{number}", trainable=False)
        loaded = time.perf_counter() - start
    one = [adapter.state_dict() for adapter in adapters_of(many, "a0").values()]
    theirs = several_lora(model, ["query", "value"], count)
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(count):
        for name, call in (
            ("ours", lambda name: adamss.activate(many, name)),
            ("theirs", lambda name: theirs.set_adapter(name)),
        ):
            start = time.perf_counter()
            call(f"a{number}")
            times[name].append(time.perf_counter() - start)
    start = time.perf_counter()
    with adamss.routed(many, [f"a{number % count}" for number in range(ROWS)]):
        routed = time.perf_counter() - start
    switch = {name: f"{1e3 * sorted(own)[count // 2]:.2f}" for name, own in times.items()}
    return [
        ["base, MB", f"{before / 1e6:.1f}"],
        ["file of one adapter, KB", f"{size / 1e3:.1f}"],
        ["one adapter in memory, KB", f"{sum(t.nbytes for own in one for t in own.values()) / 1e3:.1f}"],
        [f"load, ms for each of {count}", f"{1e3 * loaded / count:.1f}"],
        [f"activate one of {count}, ms", switch["ours"]],
        [f"PEFT's set_adapter, one of {count}, ms", switch["theirs"]],
        [f"enter routed with {count}, ms", f"{1e3 * routed:.1f}"],
    ]


def behaviours() -> list[list[str]]:
    """Compare our adapters with PEFT's LoRA of the same updates, for everything that PEFT does with two adapters.

    Returns
    -------
    list of list of str
        What was done, "ok" or "differs", and the largest difference of the outputs relative to the largest output.
    """
    base, tokens = minilm().eval(), torch.randint(1000, 20000, (4, 12))
    model = several(base, ["query", "value"], 2)
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        theirs = get_peft_model(duplicate(base), LoraConfig(r=1, target_modules=["query"]), "unused").eval()
        for name in ("a0", "a1"):
            adamss.to_lora(model, f"{folder}/{name}", name=name)
            theirs.load_adapter(f"{folder}/{name}", adapter_name=name)

        def compare(what: str, **options: object) -> None:
            one, other = (
                model(tokens).last_hidden_state,
                theirs(input_ids=tokens, **options).last_hidden_state,
            )
            difference = float((one - other).abs().max() / other.abs().max())
            rows.append([what, "ok" if difference < 1e-5 else "differs", f"{difference:.1e}"])

        for name in ("a0", "a1", "a0"):
            adamss.activate(model, name)
            theirs.set_adapter(name)
            compare(f"switch to {name}")
        with adamss.disabled(model), theirs.disable_adapter():
            compare("disabled within a0")
        theirs.base_model.add_weighted_adapter(["a0", "a1"], [0.7, 0.3], "both", combination_type="cat")
        theirs.set_adapter("both")
        adamss.activate(model, {"a0": 0.7, "a1": 0.3})
        compare("weighted")
        with adamss.routed(model, ["a0", None, "a1", "a0"]):
            compare("mixed batch", adapter_names=["a0", "__base__", "a1", "a0"])
        adamss.activate(model, ["a0", "a1"])
        for name in ("a0", "a1"):
            adamss.merge(model, name=name)
        theirs.base_model.merge_adapter(["a0", "a1"])
        compare("merge several")
        adamss.unmerge(model)
        theirs.base_model.unmerge_adapter()
        adamss.save(model, f"{folder}/file.safetensors", name="a1")
        theirs.save_pretrained(f"{folder}/saved", selected_adapters=["a1"])
        adamss.detach(model, name="a1")
        theirs.delete_adapter("a1")
        adamss.activate(model, "a0")
        theirs.set_adapter("a0")
        compare("delete a1")
        adamss.load(model, f"{folder}/file.safetensors", name="again", trainable=False)
        theirs.load_adapter(f"{folder}/saved/a1", adapter_name="again")
        theirs.set_adapter("again")
        compare("save a1 alone, and load it")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print three tables."""
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
    headers = ["behaviour", "AdaMSS beside PEFT's LoRA", "largest difference"]
    print("", tabulate(behaviours(), headers=headers, disable_numparse=True), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
