"""Compare AdaMSS with PEFT's LoRA (``target_parameters``) on fused experts, in blocks shaped like those of 3 models.

The blocks have random weights. For each of them the script measures the time of `adamss.attach`, the bytes of the
bases A, the bytes that a forward pass keeps for the backward pass (without Parameters), and the time of a step
(forward and backward) over that of the frozen block. Both methods train 8 directions for each expert: AdaMSS with
K = 8 and r_k = 1, LoRA with r = 8. ::

    python benchmarks/experts.py                # at a quarter of the width
    python benchmarks/experts.py --scale 1      # at full width: takes 30 GB
    python benchmarks/experts.py --quick
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from paired import environment, paired_times, ratio
from tabulate import tabulate
from torch import Tensor, nn

import adamss

RANK, DIRECTIONS = 100, 8
TARGETS = ["gate_up_proj", "down_proj"]


class Block(nn.Module):
    """A model with one block. PEFT does not adapt Parameters of the outermost module, so the block is wrapped."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the block; the router's scores, if it returns them, are dropped."""
        y = self.mlp(x)
        return y[0] if isinstance(y, tuple) else y


def _dispatched(config: Any) -> Any:
    """Choose the implementation of the experts that a whole model uses by default."""
    config._experts_implementation = "grouped_mm"
    return config


def mixtral(scale: float) -> nn.Module:
    """Return a block of 8 experts of 4,096 x 14,336; each token goes to 2 of them."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=int(4096 * scale), intermediate_size=int(14336 * scale))
    return MixtralSparseMoeBlock(_dispatched(config))


def qwen3_moe(scale: float) -> nn.Module:
    """Return a block of 128 experts of 2,048 x 768; each token goes to 8 of them (Qwen3-30B-A3B)."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    sizes = {"hidden_size": int(2048 * scale), "moe_intermediate_size": int(768 * scale)}
    config = Qwen3MoeConfig(num_experts=128, num_experts_per_tok=8, **sizes)
    return Qwen3MoeSparseMoeBlock(_dispatched(config))


def gpt_oss(scale: float) -> nn.Module:
    """Return a block of 32 experts of 2,880 x 2,880; each token goes to 4 of them (gpt-oss-20b)."""
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    sizes = {"hidden_size": int(2880 * scale), "intermediate_size": int(2880 * scale)}
    return GptOssMLP(_dispatched(GptOssConfig(num_local_experts=32, num_experts_per_tok=4, **sizes)))


BLOCKS = {"Mixtral-8x7B": mixtral, "Qwen3-30B-A3B": qwen3_moe, "gpt-oss-20b": gpt_oss}


def made(name: str, scale: float) -> Block:
    """Return a frozen block with random weights."""
    torch.manual_seed(0)
    block = Block(BLOCKS[name](scale))
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return block.requires_grad_(False)


def step(block: nn.Module, x: Tensor) -> None:
    """Run a block forward and backward, from cleared gradients."""
    for parameter in block.parameters():
        parameter.grad = None
    x.grad = None
    block(x).square().mean().backward()


def kept(block: nn.Module, x: Tensor) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, without those of Parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*block.parameters(), *block.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = block(x)
    del y
    return sum(sizes.values())


def measured(name: str, *, scale: float, tokens: int, repeats: int) -> dict[str, Any]:
    """Return the figures of one block."""
    base = made(name, scale)
    weights = sum(p.numel() * p.element_size() for p in base.parameters() if p.ndim == 3)
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    start = time.perf_counter()
    adamss.attach(ours, adamss.AdamssConfig(targets=TARGETS, rank=RANK, subspaces=DIRECTIONS))
    attach = time.perf_counter() - start
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = [f"mlp.experts.{target}" for target in TARGETS]
        lora = peft.get_peft_model(
            theirs, peft.LoraConfig(r=DIRECTIONS, target_modules=[], target_parameters=names)
        )
    width = next(p.shape[-1] for n, p in base.named_parameters() if "experts" not in n and p.ndim == 2)
    x = torch.randn(2, tokens // 2, width, requires_grad=True)
    models = {"base": base, "adamss": ours, "lora": lora}
    memory = {key: kept(model, x) for key, model in models.items()}
    calls = {key: (lambda model=model: step(model, x)) for key, model in models.items()}
    seconds = paired_times(calls, repeats=repeats, warmup=1, label=name)
    bases = sum(t.numel() * t.element_size() for n, t in ours.state_dict().items() if n.endswith(".A"))
    return {
        "block": name,
        "experts": len(base.mlp.experts.down_proj),
        "weights": weights,
        "attach seconds": attach,
        "bases": bases,
        "trained": sum(p.numel() for p in adamss.trainable_parameters(ours)),
        "trained, LoRA": sum(p.numel() for p in lora.parameters() if p.requires_grad),
        "kept": memory,
        "adamss / base": str(ratio(seconds["adamss"], seconds["base"])),
        "lora / base": str(ratio(seconds["lora"], seconds["base"])),
        "adamss / lora": str(ratio(seconds["adamss"], seconds["lora"])),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, and write the figures to a file if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--scale", type=float, default=0.25, help="factor on all widths (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="tiny blocks and 2 alternations: a dry run")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.quick:
        options.scale, options.tokens, options.repeats = 1 / 16, 16, 2
    torch.set_num_threads(1)
    sizes = {"scale": options.scale, "tokens": options.tokens, "repeats": options.repeats}
    rows = [measured(name, **sizes) for name in BLOCKS]

    def mb(size: int) -> str:
        return f"{size / 1e6:.1f}"

    table = [
        [
            row["block"],
            row["experts"],
            mb(row["weights"]),
            f"{row['attach seconds']:.1f}",
            mb(row["bases"]),
            f"{row['trained'] / row['trained, LoRA']:.2f}",
            *(mb(row["kept"][key]) for key in ("base", "adamss", "lora")),
            *(row[key] for key in ("adamss / base", "lora / base", "adamss / lora")),
        ]
        for row in rows
    ]
    head = [
        "block",
        "experts",
        "MB",
        "attach, s",
        "A, MB",
        "trained / LoRA's",
        "kept, MB: base",
        "AdaMSS",
        "LoRA",
    ]
    print(tabulate(table, [*head, "step: AdaMSS / base", "LoRA / base", "AdaMSS / LoRA"]))
    if options.json:
        options.json.write_text(
            json.dumps(
                {"environment": environment(["adamss", "torch", "transformers"]), **sizes, "rows": rows},
                indent=1,
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
