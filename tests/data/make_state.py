"""Write the PyTorch states of version 0.1, which `tests/torch/test_former_states.py` loads.

The script needs a wheel of version 0.1, because it also writes the compacted form, which was removed later. ::

    python tests/data/make_state.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import adamss
import adamss_torch

PATH = Path(__file__).parent / "v1-states.pt"
CONFIG = adamss.AdamssConfig(
    targets=["0", "2"],
    modules_to_save=["3"],
    rank=4,
    subspaces=4,
    subspace_rank=2,
    budget=adamss.BudgetConfig(target=5, end_step=6, interval=2),
)


def base_model() -> nn.Module:
    """Return the base model, whose values follow from a formula."""
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 10), nn.Linear(10, 3))
    with torch.no_grad():
        for step, parameter in enumerate(model.parameters(), start=3):
            index = torch.arange(parameter.numel(), dtype=torch.float32)
            parameter.copy_((torch.sin(index * step) / 2).reshape(parameter.shape))
    return model


def inputs() -> torch.Tensor:
    """Return the inputs of the training."""
    return torch.cos(torch.arange(40.0)).reshape(5, 8)


def trained(steps: int) -> tuple[nn.Module, torch.optim.Optimizer, adamss_torch.BudgetController]:
    """Return a model after some steps under its budget, with optimiser and controller."""
    model = adamss.attach(base_model(), CONFIG)
    optimizer = torch.optim.AdamW(adamss.trainable_parameters(model), lr=0.05)
    controller = adamss_torch.BudgetController(model, optimizer)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer, controller


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Take a training step."""
    optimizer.zero_grad()
    model(inputs()).square().mean().backward()
    optimizer.step()


def main() -> int:
    """Write the states."""
    found: dict[str, dict[str, Any]] = {}
    changes: dict[str, Callable[..., object]] = {
        "plain": lambda model, controller: None,
        "consolidated": lambda model, controller: adamss.consolidate(model),
        "merged": lambda model, controller: adamss.merge(model),
        "compacted": lambda model, controller: controller.compact(),
    }
    for name, change in changes.items():
        model, optimizer, controller = trained(4)
        change(model, controller)
        # The values are copied, because the training steps below change the tensors in place.
        state = {
            "model": {key: value.clone() for key, value in model.state_dict().items()},
            "outputs": model(inputs()).detach().clone(),
        }
        if name == "plain":
            torch.save({"optimizer": optimizer.state_dict(), "controller": controller.state_dict()}, PATH)
            state |= torch.load(PATH, weights_only=True)
            step(model, optimizer)
            step(model, optimizer)
            state["outputs at the end"] = model(inputs()).detach().clone()
            state["masks at the end"] = controller.masks
        controller.remove()
        found[name] = state
    torch.save(found, PATH)
    print(f"{PATH.name}: {PATH.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
