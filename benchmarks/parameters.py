"""How many numbers AdaMSS trains on RoBERTa-base and RoBERTa-large, counted on models that it is attached to.

The weights are random, as only the shapes matter, and the vocabulary is cut, as embeddings are not adapted;
nothing is downloaded. ::

    python benchmarks/parameters.py
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from tabulate import tabulate
from torch import nn
from transformers import RobertaConfig, RobertaModel

import adamss

TARGETS = ["query", "value"]


@dataclass(frozen=True, kw_only=True)
class Size:
    """Shape of a RoBERTa model.

    Attributes
    ----------
    name : str
    layers, width, heads, inner : int
    """

    name: str
    layers: int
    width: int
    heads: int
    inner: int

    def build(self, vocabulary: int = 50265) -> nn.Module:
        """Build the encoder with random weights."""
        config = RobertaConfig(
            vocab_size=vocabulary,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.inner,
            max_position_embeddings=514,
            type_vocab_size=1,
        )
        return RobertaModel(config, add_pooling_layer=False)


SIZES = [
    Size(name="RoBERTa-base", layers=12, width=768, heads=12, inner=3072),
    Size(name="RoBERTa-large", layers=24, width=1024, heads=16, inner=4096),
]


def trained(model: nn.Module) -> int:
    """Count the parameters that get a gradient."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def adamss_row(size: Size, rank: int, subspaces: int, subspace_rank: int) -> list[object]:
    """Attach AdaMSS and count; the formula needs only shapes, as the n_k of a layer sum to n."""
    config = adamss.AdamssConfig(rank=rank, subspaces=subspaces, subspace_rank=subspace_rank, targets=TARGETS)
    model = adamss.attach(size.build(vocabulary=16), config)
    count = sum(parameter.numel() for parameter in adamss.trainable_parameters(model))
    if count != adamss.summary(model).total.trained:
        raise AssertionError(f"{count} trained, {adamss.summary(model).total.trained} in the summary")
    formula = len(TARGETS) * size.layers * subspace_rank * (size.width + subspaces * rank)
    method = f"AdaMSS R={rank} K={subspaces} r={subspace_rank}"
    return [size.name, method, count, "layers * r (n + K R)", formula]


def lora_row(size: Size, rank: int) -> list[object]:
    """Attach PEFT's LoRA and count."""
    with warnings.catch_warnings():  # PEFT 0.21 reads an attribute that transformers 5 has deprecated
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(size.build(vocabulary=16), LoraConfig(r=rank, target_modules=TARGETS))
    formula = len(TARGETS) * size.layers * adamss.core.count_lora(size.width, size.width, rank)
    return [size.name, f"LoRA r={rank}", trained(model), "layers * r (d + n)", formula]


def full_row(size: Size) -> list[object]:
    """Count the whole encoder with its real vocabulary, without allocating it."""
    with torch.device("meta"):
        count = trained(size.build())
    return [size.name, "full fine-tuning (encoder)", count, "-", count]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; the exit status is 1 if a count and its formula differ."""
    parser = argparse.ArgumentParser(description="Trained parameters on RoBERTa-base and RoBERTa-large.")
    parser.add_argument("--rank", type=int, default=100, help="R (default: %(default)s)")
    parser.add_argument("--subspaces", type=int, default=10, help="K (default: %(default)s)")
    parser.add_argument("--subspace-rank", type=int, default=1, help="r_k (default: %(default)s)")
    parser.add_argument("--lora-rank", type=int, default=8, help="rank of LoRA (default: %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="as the other benchmarks have; counting is quick"
    )
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)

    rows = []
    for size in SIZES:
        rows += [
            adamss_row(size, arguments.rank, arguments.subspaces, arguments.subspace_rank),
            lora_row(size, arguments.lora_rank),
            full_row(size),
        ]
    headers = ["model", "method", "trained, counted", "formula", "by the formula"]
    print(tabulate(rows, headers=headers, intfmt=","))
    return 0 if all(row[2] == row[4] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
