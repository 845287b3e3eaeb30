"""Script that `test_distributed.py` runs with ``accelerate launch``: a budget with gradient accumulation."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator
from on_two_processes import adamw, adapted, assert_same_training, batch, same_on_all, schedule
from torch_support import controlled, loss_of

from adamss import AdamssWarning

MICRO_BATCHES = 13
"""Number of micro-batches. Two of them make a step, and the last one makes none."""


def train_together(accelerator: Accelerator, config) -> tuple[torch.nn.Module, list]:
    model = adapted()
    model, optimizer = accelerator.prepare(model, adamw(model))
    masks = []

    def decided(allocation):
        same_on_all(*allocation.masks.values())
        masks.append(allocation.masks)

    with controlled(model, optimizer, config, on_allocation=decided) as budget:
        for number in range(MICRO_BATCHES):
            with accelerator.accumulate(model):
                x = batch(number)[accelerator.process_index :: accelerator.num_processes]
                accelerator.backward(loss_of(model, x))
                optimizer.step()
                optimizer.zero_grad()
        assert budget.step == MICRO_BATCHES // 2, f"{budget.step} steps were counted"
    return accelerator.unwrap_model(model), masks


def train_alone(config) -> tuple[torch.nn.Module, list]:
    model, seen = adapted(), []
    optimizer = adamw(model)
    with controlled(model, optimizer, config, on_allocation=seen.append):
        for number in range(0, MICRO_BATCHES - 1, 2):
            optimizer.zero_grad()
            ((loss_of(model, batch(number)) + loss_of(model, batch(number + 1))) / 2).backward()
            optimizer.step()
    return model, [allocation.masks for allocation in seen]


def main(folder: Path) -> None:
    warnings.filterwarnings("error", category=AdamssWarning)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    assert accelerator.num_processes == 2
    config = schedule(interval=2)
    model, masks = train_together(accelerator, config)
    alone, expected = train_alone(config)
    assert len(masks) == 3
    assert_same_training(model, masks, alone, expected)
    (folder / f"accelerate-{accelerator.process_index}").touch()
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
