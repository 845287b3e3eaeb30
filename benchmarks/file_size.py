"""Compare the sizes of adapter files, and the bytes that each method trains.

The files are those of AdaMSS (portable, for resuming, and exported as LoRA), of PEFT's AdaMSS, and of PEFT's LoRA.
For MiniLM with query and value adapted, whole files are written and measured. Llama-3.2-3B has 28 layers with query
projections of 3072 x 3072 and value projections of 3072 x 1024. For it, the script writes the adapter of one layer
with random weights, and multiplies the bytes of its tensors by 28. ::

    python benchmarks/file_size.py --json file_size.json
    python benchmarks/file_size.py --quick
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from methods import RANK, duplicate, minilm, with_adamss, with_lora, with_peft_adamss
from paired import environment
from safetensors import safe_open
from tabulate import tabulate
from torch import nn

import adamss

LLAMA = {"query": (3072, 3072), "value": (3072, 1024)}
LLAMA_LAYERS = 28


class Projections(nn.Module):
    """One layer of each shape, with random weights.

    Parameters
    ----------
    shapes : dict of str to (int, int)
        Inputs and outputs by name.
    """

    def __init__(self, shapes: dict[str, tuple[int, int]]):
        super().__init__()
        for name, (inputs, outputs) in shapes.items():
            self.add_module(name, nn.Linear(inputs, outputs, bias=False))


def tensor_bytes(path: Path) -> int:
    """Return the bytes of the tensors in a safetensors file, without the header."""
    total = 0
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            tensor = file.get_tensor(name)
            total += tensor.numel() * tensor.element_size()
    return total


def trained_bytes(model: nn.Module) -> int:
    """Return the bytes of the trained parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def files(base: nn.Module, subspaces: int, lora_rank: int, folder: Path) -> dict[str, tuple[Path, int]]:
    """Write the files of all methods. Return, by method, the path and the bytes that the method trains."""
    targets = ["query", "value"]
    found = {}
    ours = with_adamss(base, targets, subspaces)
    for name, training in (("portable", False), ("to resume from", True)):
        path = folder / f"{training}.safetensors"
        adamss.save(ours, path, training=training)
        found[f"AdaMSS K={subspaces}, {name}"] = path, trained_bytes(ours)
    adamss.to_lora(ours, folder / "lora")
    found[f"AdaMSS K={subspaces}, as LoRA"] = (
        folder / "lora" / "adapter_model.safetensors",
        trained_bytes(ours),
    )
    for name, model in {
        f"PEFT AdaMSS K={subspaces}": with_peft_adamss(base, targets, subspaces),
        f"PEFT LoRA r={lora_rank}": with_lora(base, targets, lora_rank),
    }.items():
        model.save_pretrained(folder / name)
        found[name] = folder / name / "adapter_model.safetensors", trained_bytes(model)
    return found


def measure(
    name: str, base: nn.Module, subspaces: int, lora_rank: int, times: int | None
) -> list[dict[str, Any]]:
    """Return a record for each method.

    Parameters
    ----------
    times : int or None
        None for the size of the file; a number for that many times the bytes of its tensors, for a model with that
        many equal layers.
    """
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for method, (path, trained) in files(base, subspaces, lora_rank, Path(folder)).items():
            size = path.stat().st_size if times is None else times * tensor_bytes(path)
            trained *= times or 1
            records.append({"model": name, "method": method, "bytes": size, "trained_bytes": trained})
    return records


def main(argv: Sequence[str] | None = None) -> int:
    """Write the adapter files, print a table for each model, and write the JSON if asked."""
    parser = argparse.ArgumentParser(description="Sizes of adapter files.")
    parser.add_argument("--quick", action="store_true", help="leave out Llama's shapes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE as well")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    about = environment(["torch", "peft", "safetensors", "adamss"])
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    encoder = minilm().requires_grad_(False)
    plan = [
        ("MiniLM-L6, query and value, bytes of the file", encoder, 10, 8, None),
        ("MiniLM-L6, query and value, bytes of the file", encoder, 32, 32, None),
    ]
    if not arguments.quick:
        layers = Projections(LLAMA).requires_grad_(False)
        plan.append(("Llama-3.2-3B's shapes, bytes of the tensors", layers, 32, 32, LLAMA_LAYERS))
    found = []
    for name, base, subspaces, lora_rank, times in plan:
        records = measure(name, duplicate(base), subspaces, lora_rank, times)
        smallest = records[0]["bytes"]
        rows = [
            [r["method"], f"{r['bytes']:,}", f"{r['bytes'] / smallest:.2f}", f"{r['trained_bytes']:,}"]
            for r in records
        ]
        headers = [f"{name}, R={RANK}", "bytes", "over portable", "trained (bytes)"]
        columns = ("left", "right", "right", "right")
        print("", tabulate(rows, headers=headers, colalign=columns, disable_numparse=True), sep="\n")
        found += records
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": about, "results": found}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
