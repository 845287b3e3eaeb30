"""Measure the step time of AdaMSS and of LoRA in JAX, alternately in one process.

The step is that of one linear layer in the middle of a network: the output, and the gradients of the input and of the
trained parameters, compiled as one function. Its time is relative to that of the same layer frozen. ::

    python benchmarks/step_time_jax.py --json step_time_jax.json
    python benchmarks/step_time_jax.py --quick

All trained values are random and none is zero. Two implementations of LoRA are measured: ``x W + b + s (x A) B``
written by hand, and that of Qwix on Flax NNX if Qwix is installed. Each number of subspaces K is compared with one
rank of LoRA, and the ratio of their times should not exceed a bar.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from paired import Ratio, environment, paired_times, ratio
from tabulate import tabulate

import adamss_jax
from adamss import core

try:
    import qwix
except ImportError:  # Qwix is optional
    qwix = None

RANK = 100
LORA_SCALE = 2.0
BASE = "frozen base"

# Number of subspaces K, rank of the LoRA to compare with, and the largest acceptable ratio of their times.
BARS = [(10, 8, 1.03), (32, 32, 1.00)]


def random(generator: np.random.Generator, *shape: int, scale: float = 0.02) -> jax.Array:
    """Return normal random numbers in float32."""
    return jnp.asarray(scale * generator.standard_normal(shape, dtype=np.float32))


def adamss_values(W: jax.Array, subspaces: int, generator: np.random.Generator) -> tuple[Any, Any]:
    """Return the trained arrays of AdaMSS (B and C, random) and the factors that they belong to."""
    decomposition = core.decompose(np.asarray(W), RANK)
    labels = core.segment(decomposition, subspaces)
    factors = core.initial_factors(decomposition, labels, 1)
    trained = {name: random(generator, *getattr(factors, name).shape) for name in ("B", "C")}
    return trained, core.Factors(*map(jnp.asarray, factors))


def lora_values(W: jax.Array, rank: int, generator: np.random.Generator) -> tuple[Any, Any]:
    """Return the trained arrays of LoRA, and None, since LoRA has no constants."""
    d, n = W.shape
    return {"A": random(generator, d, rank), "B": random(generator, rank, n)}, None


def base_layer(x: jax.Array, W: jax.Array, b: jax.Array, trained: Any, constant: Any) -> jax.Array:
    """Return ``x W + b``."""
    return x @ W + b


def adamss_layer(x: jax.Array, W: jax.Array, b: jax.Array, trained: Any, constant: Any) -> jax.Array:
    """Return ``x (W + sum_k A_k B_k C_k) + b``."""
    return adamss_jax.linear(x, W, b, constant._replace(**trained))


def lora_layer(x: jax.Array, W: jax.Array, b: jax.Array, trained: Any, constant: Any) -> jax.Array:
    """Return ``x W + b + s (x A) B``."""
    return x @ W + b + (x @ trained["A"]) @ trained["B"] * LORA_SCALE


class OneLayer(nnx.Module):
    """A module with one linear layer, since Qwix adapts the layers of a module.

    Parameters
    ----------
    W, b : jax.Array
        Kernel (d, n) and bias (n,).
    """

    def __init__(self, W: jax.Array, b: jax.Array):
        self.layer = nnx.Linear(*W.shape, rngs=nnx.Rngs(0))
        self.layer.kernel[...], self.layer.bias[...] = W, b

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return ``x W + b``."""
        return self.layer(x)


def qwix_values(
    x: jax.Array, W: jax.Array, b: jax.Array, rank: int, generator: np.random.Generator
) -> tuple[Any, Any]:
    """Return the trained arrays of Qwix's LoRA, and the rest of its module as a tree."""
    provider = qwix.LoraProvider(module_path=".*layer", rank=rank, alpha=LORA_SCALE * rank)
    model = qwix.apply_lora_to_model(OneLayer(W, b), provider, x[:1], rngs=nnx.Rngs(0))
    outline, trained, rest = nnx.split(model, nnx.LoRAParam, ...)
    return jax.tree.map(lambda start: random(generator, *start.shape), trained), (outline, rest)


def qwix_layer(x: jax.Array, W: jax.Array, b: jax.Array, trained: Any, constant: Any) -> jax.Array:
    """Return the output of the module, which holds its own W and b."""
    outline, rest = constant
    return nnx.merge(outline, trained, rest)(x)


def layer_step(
    layer: Callable[..., jax.Array],
    values: tuple[Any, Any],
    x: jax.Array,
    base: tuple[jax.Array, jax.Array],
    gradient: jax.Array,
) -> Callable[[], None]:
    """Return a function that runs forward and backward, and computes the gradient of the input too."""

    # All arrays are arguments, because the compiler would evaluate products of constants once, at compile time. The
    # output is returned, because the compiler would otherwise drop it.
    @jax.jit
    def compiled(
        x: jax.Array, base: tuple[jax.Array, jax.Array], trained: Any, constant: Any, gradient: jax.Array
    ) -> Any:
        y, backward = jax.vjp(lambda x, trained: layer(x, *base, trained, constant), x, trained)
        return y, backward(gradient)

    trained, constant = values

    def step() -> None:
        jax.block_until_ready(compiled(x, base, trained, constant, gradient))

    return step


def time_layer(width: int, tokens: int, repeats: int) -> dict[str, np.ndarray]:
    """Time the step of one linear layer (width, width) on (tokens, width) inputs, for every method."""
    generator = np.random.default_rng(0)
    x, gradient = (random(generator, tokens, width, scale=1.0) for _ in range(2))
    W, b = random(generator, width, width), random(generator, width)
    calls = {BASE: layer_step(base_layer, ({}, None), x, (W, b), gradient)}
    for subspaces, rank, _ in BARS:
        methods = [
            (f"AdaMSS K={subspaces}", adamss_layer, adamss_values(W, subspaces, generator)),
            (f"LoRA r={rank}", lora_layer, lora_values(W, rank, generator)),
        ]
        if qwix is not None:
            methods.append((f"Qwix LoRA r={rank}", qwix_layer, qwix_values(x, W, b, rank, generator)))
        for name, layer, values in methods:
            calls[name] = layer_step(layer, values, x, (W, b), gradient)
    return paired_times(calls, repeats=repeats, label=f"d = {width}")


def records(width: int, tokens: int, seconds: dict[str, np.ndarray]) -> list[dict[str, object]]:
    """Return one record for each method, with its ratios to the frozen base and to the LoRA it is compared with."""
    compared = {f"AdaMSS K={subspaces}": (f"LoRA r={rank}", bar) for subspaces, rank, bar in BARS}
    found = []
    for name, times in seconds.items():
        lora, bar = compared.get(name, (None, None))
        found.append(
            {
                "what": f"d = n = {width}, {tokens} tokens",
                "method": name,
                "median_ms": 1e3 * float(np.median(times)),
                "over_base": ratio(times, seconds[BASE]),
                "lora": lora,
                "over_lora": ratio(times, seconds[lora]) if lora else None,
                "over_qwix": ratio(times, seconds[f"Qwix {lora}"]) if f"Qwix {lora}" in seconds else None,
                "bar": bar,
            }
        )
    return found


def against_bar(over_lora: Ratio | None, lora: str | None, bar: float | None) -> str:
    """Format a ratio to LoRA and whether it meets its bar; empty if the method has no bar."""
    if over_lora is None:
        return ""
    return f"{over_lora} of {lora}; bar {bar:.2f} {'met' if over_lora.median <= bar else 'missed'}"


def table(found: list[dict[str, Any]]) -> str:
    """Format the records of one width."""
    rows = [
        [
            record["method"],
            f"{record['median_ms']:.2f}",
            record["over_base"],
            against_bar(record["over_lora"], record["lora"], record["bar"]),
            record["over_qwix"] or "",
        ]
        for record in found
    ]
    headers = [found[0]["what"], "median (ms)", f"over {BASE}", "over LoRA", "over Qwix's"]
    return tabulate(
        rows, headers=headers, colalign=("left", "right", "right", "left", "right"), floatfmt=".2f"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Step time of AdaMSS and of LoRA in JAX.")
    parser.add_argument("--repeats", type=int, default=100, help="alternations (default: %(default)s)")
    parser.add_argument("--widths", type=int, nargs="+", default=[384, 768])
    parser.add_argument("--tokens", type=int, default=2048, help="rows N of the input (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="10 alternations and short inputs: a dry run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE as well")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table for each width, and write the JSON if asked."""
    arguments = parse(argv)
    if arguments.quick:
        arguments.repeats, arguments.tokens = 10, 256
    settings = {"repeats": arguments.repeats, "rank": RANK, "subspace_rank": 1, "dtype": "float32"}
    about = {
        **environment(["jax", "jaxlib", "flax", "numpy", *(["qwix"] if qwix else [])]),
        "device": jax.devices()[0].device_kind,
    }
    for facts in (about, settings):
        print(", ".join(f"{name} {value}" for name, value in facts.items()))

    found: list[dict[str, object]] = []
    for width in arguments.widths:
        seconds = time_layer(width, arguments.tokens, arguments.repeats)
        found += (part := records(width, arguments.tokens, seconds))
        print("", table(part), sep="\n", flush=True)
    print("\nratios within a round: median [95 % interval]")
    if arguments.json:
        report = {"environment": about, "settings": settings, "results": found}
        arguments.json.write_text(json.dumps(report, indent=2, default=dataclasses.asdict) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
