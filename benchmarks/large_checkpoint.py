"""Memory and time of the command line on a large checkpoint.

::

    python benchmarks/large_checkpoint.py                # 12 GB, in shards of one layer each
    python benchmarks/large_checkpoint.py --quick        # 0.7 GB

The checkpoint has the shapes of Llama-2-7B in bfloat16. All layers have the same random numbers, which are quicker to
write and take as long to read as others. The peak of the memory is that of Linux (VmHWM).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from arguments import positive
from tabulate import tabulate

import adamss
from adamss.backend import NumpyLinear, NumpyModel
from adamss.backend.tensors import StoredTensor
from adamss.io.writer import write_tensors

SHAPES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (4096, 4096)),
    **dict.fromkeys(("gate_proj", "up_proj"), (11008, 4096)),
    "down_proj": (4096, 11008),
}
"""Of the weights of one layer as they are stored, outputs first."""

MEASURE = """
import re, sys
from adamss.cli import main
status = main(sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1], file=sys.stderr)
sys.exit(status)
"""


def write_checkpoint(folder: Path, layers: int) -> None:
    """Write one shard for each layer, and their index."""
    rng = np.random.default_rng(0)
    numbers = {
        name: StoredTensor.of(rng.standard_normal(shape, dtype=np.float32) / 64, "bfloat16")
        for name, shape in SHAPES.items()
    }
    index = {}
    for layer in range(layers):
        tensors = {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in numbers.items()}
        file = f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"
        write_tensors(folder / file, tensors, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def write_adapter(path: Path, layers: int) -> None:
    """Write an adapter of q_proj of every layer, whose update is not zero."""
    rng = np.random.default_rng(0)
    # The first numbers that the checkpoint has drawn are those of q_proj.
    weight = StoredTensor.of(rng.standard_normal(SHAPES["q_proj"], dtype=np.float32) / 64, "bfloat16").numpy()
    model = NumpyModel({f"model.layers.{i}.q_proj": NumpyLinear(weight.T) for i in range(layers)})
    config = adamss.AdamssConfig(targets=["q_proj"], rank=16, subspaces=4, segmentation="contiguous")
    model = adamss.attach(model, config)
    for factors in model.bank.only().layers.values():
        factors.C[...] = 0.01 * rng.standard_normal(factors.C.shape)
    adamss.save(model, path)


def measured(arguments: Sequence[str]) -> tuple[float, float]:
    """Run a command; return seconds, and the peak of its memory in GB."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments],
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"adamss {' '.join(arguments)}: {done.stderr}")
    return time.perf_counter() - start, int(done.stderr.split()[-1]) * 1024 / 1e9


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description="The command line on a large checkpoint.")
    parser.add_argument("--layers", type=positive, default=30, help="of 0.4 GB each (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two layers")
    options = parser.parse_args(argv)
    layers = 2 if options.quick else options.layers
    with tempfile.TemporaryDirectory() as temporary:
        folder, adapter = Path(temporary, "model"), Path(temporary, "adapter.safetensors")
        folder.mkdir()
        write_checkpoint(folder, layers)
        write_adapter(adapter, min(layers, 4))
        size = sum(os.path.getsize(file) for file in folder.iterdir()) / 1e9
        commands = {
            "inspect (q_proj, v_proj)": ["inspect", str(folder)],
            "inspect (one gate_proj, one down_proj)": [
                *("inspect", str(folder), "--targets", r"model\.layers\.0\.(gate|down)_proj")
            ],
            "plan": ["plan", str(folder), "--params", "5M"],
            "verify": ["verify", str(adapter), "--base", str(folder)],
            "merge": ["merge", str(adapter), "--base", str(folder), "--out", f"{temporary}/merged"],
        }
        rows = [(name, *measured(command)) for name, command in commands.items()]
    print(f"A checkpoint of {size:.1f} GB in {layers} shards, bfloat16")
    print(tabulate(rows, headers=["command", "seconds", "peak memory (GB)"], floatfmt=(None, ".0f", ".2f")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
