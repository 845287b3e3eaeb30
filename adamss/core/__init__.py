"""The mathematics of AdaMSS, on the arrays of any framework.

Pure functions: arrays in, arrays of the same framework on the same device out. Nothing here imports a
framework, keeps state, or touches a global random generator. Weights are in paper orientation, ``W: (d, n)``
with d inputs and n outputs, ``y = x @ W + b``.

The order of use is `decompose` -> `segment` -> `initial_factors` -> `linear`. A training with a budget starts with
`plan_budget` and calls `observe` and `advance` in every step. `adamss.core.analysis` measures what the
paper speaks about.
"""

from adamss.core import analysis
from adamss.core.budget import (
    BudgetPlan,
    BudgetState,
    Processes,
    advance,
    allocate,
    allocates_at,
    budget_at,
    initial_budget_state,
    observe,
    plan_budget,
)
from adamss.core.counting import count_factors, count_full, count_lora, count_trainable, subspace_costs
from adamss.core.decomposition import Decomposition, decompose
from adamss.core.factors import (
    Factors,
    basis_ranks,
    check_factors,
    factors_from_directions,
    hold_frozen,
    initial_factors,
    join,
    only,
    split,
    trained_elements,
)
from adamss.core.linear import Gradients, Merged, contract, delta, expand, linear, linear_vjp, merge
from adamss.core.segmentation import segment, subspace_sizes

__all__ = [
    "BudgetPlan",
    "BudgetState",
    "Decomposition",
    "Factors",
    "Gradients",
    "Merged",
    "Processes",
    "advance",
    "allocate",
    "allocates_at",
    "analysis",
    "basis_ranks",
    "budget_at",
    "check_factors",
    "contract",
    "count_factors",
    "count_full",
    "count_lora",
    "count_trainable",
    "decompose",
    "delta",
    "expand",
    "factors_from_directions",
    "hold_frozen",
    "initial_budget_state",
    "initial_factors",
    "join",
    "linear",
    "linear_vjp",
    "merge",
    "observe",
    "only",
    "plan_budget",
    "segment",
    "split",
    "subspace_costs",
    "subspace_sizes",
    "trained_elements",
]
