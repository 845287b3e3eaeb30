"""The mathematics of AdaMSS, on the arrays of any framework.

Pure functions: arrays in, arrays of the same framework on the same device out. Nothing here imports a
framework, keeps state, or touches a global random generator. Weights are in paper orientation, ``W: (d, n)``
with d inputs and n outputs, ``y = x @ W + b``.

The order of use is that of the modules: `decompose` -> `segment` -> `initial_factors` -> `linear` ->
`update_importance` and `scores` -> `budget_at` and `allocate`.
"""

from adamss.core.bound import generalisation_bound, spectral_norms
from adamss.core.budget import Schedule, allocate, allocates_at, budget_at
from adamss.core.cost import ORDERS, UpdateCost, cheapest_order, update_cost
from adamss.core.counting import (
    count_factors,
    count_full,
    count_lora,
    count_trainable,
    count_trainable_bound,
    subspace_costs,
)
from adamss.core.decomposition import Decomposition, decompose
from adamss.core.factors import (
    Factors,
    Gradients,
    Merged,
    Restriction,
    basis_ranks,
    check_factors,
    contract,
    delta,
    expand,
    factor_gradients,
    factors_from_directions,
    hold_frozen,
    initial_factors,
    linear,
    linear_vjp,
    merge,
    only,
    restrict,
    trained_elements,
)
from adamss.core.importance import Importance, initial_importance, scores, update_importance
from adamss.core.reduction import (
    BudgetPlan,
    BudgetState,
    Reduction,
    advance_budget,
    initial_budget_state,
    plan_budget,
)
from adamss.core.representation import (
    block_diagonality,
    lowest_rank_representation,
    ordering,
    subspace_energy,
)
from adamss.core.segmentation import group_sizes, segment

__all__ = [
    "ORDERS",
    "BudgetPlan",
    "BudgetState",
    "Decomposition",
    "Factors",
    "Gradients",
    "Importance",
    "Merged",
    "Reduction",
    "Restriction",
    "Schedule",
    "UpdateCost",
    "advance_budget",
    "allocate",
    "allocates_at",
    "basis_ranks",
    "block_diagonality",
    "budget_at",
    "cheapest_order",
    "check_factors",
    "contract",
    "count_factors",
    "count_full",
    "count_lora",
    "count_trainable",
    "count_trainable_bound",
    "decompose",
    "delta",
    "expand",
    "factor_gradients",
    "factors_from_directions",
    "generalisation_bound",
    "group_sizes",
    "hold_frozen",
    "initial_budget_state",
    "initial_factors",
    "initial_importance",
    "linear",
    "linear_vjp",
    "lowest_rank_representation",
    "merge",
    "only",
    "ordering",
    "plan_budget",
    "restrict",
    "scores",
    "segment",
    "spectral_norms",
    "subspace_costs",
    "subspace_energy",
    "trained_elements",
    "update_cost",
    "update_importance",
]
