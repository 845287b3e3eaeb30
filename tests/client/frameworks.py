"""The packages of the frameworks, as a typed project sees them; checked by mypy where no framework is installed."""

from typing import assert_type

import adamss
import adamss_conformance
import adamss_jax
import adamss_torch


def watch(controller: adamss_torch.BudgetController) -> list[tuple[int, int]]:
    """Read a budget in PyTorch."""
    assert_type(controller.config, adamss.BudgetConfig)
    assert_type(controller.active_count, int)
    return [(controller.step, controller.active_count)]


def log(allocation: adamss_torch.Allocation) -> dict[str, int]:
    """Read one allocation in PyTorch."""
    return {"step": allocation.step, "budget": allocation.budget, "parameters": allocation.parameters}


def wrong_calls() -> None:
    """Hold calls that mypy must refuse; it says so where a comment to ignore an error is not needed."""
    adamss_torch.hold_frozen()  # type: ignore[call-arg]
    adamss_jax.linear(1)  # type: ignore[call-arg]
    adamss_jax.budgeted()  # type: ignore[call-arg]


def laws() -> dict[int, str]:
    """Return the laws by number."""
    return dict(adamss_conformance.LAWS)
