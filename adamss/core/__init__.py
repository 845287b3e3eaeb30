"""The mathematics of AdaMSS, on the arrays of any framework.

Pure functions: arrays in, arrays of the same framework on the same device out. Nothing here imports a
framework, keeps state, or touches a global random generator. Weights are in paper orientation, ``W: (d, n)``
with d inputs and n outputs, ``y = x @ W + b``.

The order of use is that of the modules: `decompose` -> `segment` -> `initial_factors` -> `linear` ->
`plan_budget`, `observe` and `advance`.
"""

from adamss.core.bound import generalisation_bound, spectral_norms
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
    outline,
    restrict,
    trained_elements,
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
    "Merged",
    "Processes",
    "Restriction",
    "UpdateCost",
    "advance",
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
    "linear",
    "linear_vjp",
    "lowest_rank_representation",
    "merge",
    "observe",
    "only",
    "ordering",
    "outline",
    "plan_budget",
    "restrict",
    "segment",
    "spectral_norms",
    "subspace_costs",
    "subspace_energy",
    "trained_elements",
    "update_cost",
]
