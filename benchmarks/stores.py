"""Measure adapters on quantised bases: their error compared with the float model, their size, and their step time.

An adapter is trained on a float layer and saved. It is then loaded onto the same layer, quantised by each entry of
`quantisers.py` whose library is installed. Errors are relative to the outputs of the float layer. Times are those of
a training step of the layer (forward and backward, with the gradient of the input) over that of the frozen float
layer. ::

    python benchmarks/stores.py --json stores.json
    python benchmarks/stores.py --quick
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from paired import environment, paired_times, ratio
from quantisers import QUANTISERS, Quantiser, quiet
from tabulate import tabulate
from torch import Tensor, nn

import adamss

FLOAT = Quantiser(make=lambda layer: layer, error=0.0)


def float_layer(width: int, dtype: torch.dtype) -> nn.Linear:
    """Return a frozen layer with a decaying spectrum, as trained layers have."""
    torch.manual_seed(0)
    layer = nn.Linear(width, width, bias=False)
    U, _, Vh = torch.linalg.svd(torch.randn(width, width))
    layer.weight.data = (U / torch.arange(1, width + 1).sqrt()) @ Vh
    return layer.to(dtype).requires_grad_(False)


def trained(width: int, x: Tensor, path: Path) -> None:
    """Train an adapter on the float layer for ten steps, and save it to `path`."""
    model = nn.Sequential(float_layer(width, torch.float32))
    adamss.attach(model, adamss.AdamssConfig(targets=["0"], rank=100, subspaces=10))
    optimizer = torch.optim.Adam(adamss.trainable_parameters(model), lr=0.02)
    for _ in range(10):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    adamss.save(model, path)


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Return a function that runs forward and backward once, and clears the gradients."""
    x = x.clone().requires_grad_()

    def run() -> None:
        model(x).sum().backward()
        model.zero_grad()
        x.grad = None

    return run


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the plain tensors that a value consists of, also for a tensor subclass; nothing if it is no tensor."""
    if hasattr(value, "__tensor_flatten__") and type(value) not in (Tensor, nn.Parameter):
        for name in value.__tensor_flatten__()[0]:
            yield from tensors(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value


def relative(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of `expected`, in float32."""
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def measure(name: str, kept: Quantiser, width: int, x: Tensor, file: Path, repeats: int) -> dict[str, Any]:
    """Return the figures of one quantiser."""
    x = x.to(kept.dtype)

    def made(each: Quantiser) -> nn.Module:
        return nn.Sequential(each.make(float_layer(width, kept.dtype))).requires_grad_(False)

    base, whole = made(kept), made(FLOAT)
    # The size is taken from a separate layer, because `state_dict` of bitsandbytes 0.50 corrupts packed weights whose
    # scales are not compressed.
    size = sum(tensor.nbytes for each in made(kept).state_dict().values() for tensor in tensors(each))
    dtype = str(kept.dtype).removeprefix("torch.")
    found = {"store": name, "dtype": dtype, "bytes": size, "of_float32": size / (4 * width**2)}
    if not kept.runs:
        return found
    adapted, expected = adamss.load(made(kept), file), adamss.load(made(FLOAT), file)
    with torch.no_grad():
        outputs, wanted = (adapted(x), base(x)), (expected(x), whole(x))
    found["adapted_error"], found["base_error"] = map(relative, outputs, wanted)
    found["update_error"] = relative(outputs[0] - outputs[1], wanted[0] - wanted[1])
    if kept.trains:
        models = {"float": whole, "float, adapted": expected, "base": base, "adapted": adapted}
        calls = {label: step(model, x) for label, model in models.items()}
        seconds = paired_times(calls, repeats=repeats, label=name)
        found |= {
            f"{label} over float": ratio(seconds[label], seconds["float"]) for label in list(models)[1:]
        }
    return found


COLUMNS = {
    "store": "store",
    "dtype": "dtype of the model",
    "adapted_error": "error, adapted",
    "base_error": "error, base",
    "update_error": "error, update",
    "of_float32": "bytes over float32",
    "base over float": "step, base",
    "adapted over float": "step, adapted",
    "float, adapted over float": "step, adapted float",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write the JSON if asked."""
    parser = argparse.ArgumentParser(description="Adapters on quantised bases.")
    parser.add_argument("--repeats", type=int, default=30, help="alternations (default: %(default)s)")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--stores", nargs="+", choices=QUANTISERS, metavar="NAME", help="default: all")
    parser.add_argument("--quick", action="store_true", help="6 alternations of a narrow layer: a dry run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE as well")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.repeats, arguments.width, arguments.tokens = 6, 128, 32
    about = environment(["torch", "numpy"])
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    torch.manual_seed(0)
    x, found = torch.randn(arguments.tokens, arguments.width), []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other libraries warn about casts and kernels that are not installed
        file = Path(folder) / "adapter.safetensors"
        trained(arguments.width, x, file)
        for name in arguments.stores or QUANTISERS:
            try:
                with quiet():
                    QUANTISERS[name].make(float_layer(128, QUANTISERS[name].dtype))
            except ImportError as error:
                print(f"{name}: {error}", file=sys.stderr)
                continue
            kept = QUANTISERS[name]
            found.append(measure(name, kept, arguments.width, x, file, arguments.repeats))
    rows = [[_shown(record.get(key)) for key in COLUMNS] for record in found]
    print("", tabulate(rows, headers=list(COLUMNS.values()), disable_numparse=True), sep="\n", flush=True)
    if arguments.json:
        report = {"environment": about, "results": found}
        text = json.dumps(report, indent=2, default=dataclasses.asdict)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    return 0


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    raise SystemExit(main())
