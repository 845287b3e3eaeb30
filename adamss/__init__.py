"""AdaMSS: adaptive multi-subspace fine-tuning, for NumPy, PyTorch and JAX.

AdaMSS adapts a frozen weight W0 as ``W = W0 + sum_k A_k B_k C_k``, a sum over K small subspaces of the weight.
A_k is frozen; B_k and C_k are trained (Zheng et al., NeurIPS 2025). `adamss.core` implements the mathematics
on the arrays of any framework. The functions of this package work on whole models. Importing the package
imports no deep-learning framework.
"""

from importlib import import_module
from typing import Any

from adamss import core, errors
from adamss._version import __version__ as __version__
from adamss.config import AdamssConfig, BudgetConfig, SubspaceEstimate
from adamss.errors import AdamssError, AdamssWarning
from adamss.verbs import (
    activate,
    adapters,
    attach,
    consolidate,
    detach,
    disabled,
    from_peft,
    load,
    merge,
    merge_and_unload,
    push_to_hub,
    routed,
    save,
    summary,
    to_lora,
    to_peft,
    trainable_parameters,
    unmerge,
)
from adamss.verbs.activating import AdapterInfo
from adamss.verbs.table import Summary, SummaryRow

__all__ = [
    "AdamssConfig",
    "AdamssError",
    "AdamssWarning",
    "AdapterInfo",
    "BudgetConfig",
    "SubspaceEstimate",
    "Summary",
    "SummaryRow",
    "activate",
    "adapters",
    "attach",
    "consolidate",
    "core",
    "detach",
    "disabled",
    "errors",
    "from_peft",
    "load",
    "merge",
    "merge_and_unload",
    "push_to_hub",
    "routed",
    "save",
    "summary",
    "to_lora",
    "to_peft",
    "trainable_parameters",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    """Import the submodules that few programs need, when they are first used."""
    if name in ("offline", "plots"):
        return import_module(f"adamss.{name}")
    raise AttributeError(f"module 'adamss' has no attribute {name!r}")
