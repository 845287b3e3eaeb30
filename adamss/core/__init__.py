"""The mathematics of AdaMSS, on the arrays of any framework.

All functions are pure: they take arrays and return arrays of the same framework on the same device. Nothing here
imports a deep-learning framework, keeps state, or uses a global random generator. Weights are in paper orientation,
``W: (d, n)`` with d inputs and n outputs, ``y = x @ W + b``.

The functions are used in the order `decompose`, `segment`, `initial_factors`, `linear`. Training with a budget starts
with `plan_budget` and calls `observe` and `advance` in every step. `adamss.core.analysis` measures the quantities
that the paper analyses, such as Z* and the bound of Theorem 1.

Examples
--------
This example carries out Algorithms 1 and 2 of the paper step by step. The columns of W0 lie in three planes, and
R = 6, K0 = 2, r_k = 1.

>>> import numpy as np
>>> rng = np.random.default_rng(0)
>>> planes = [rng.standard_normal((12, 2)) @ rng.standard_normal((2, 6)) for _ in range(3)]
>>> W0, R, K0, r, tau = np.concatenate(planes, axis=1)[:, rng.permutation(18)], 6, 2, 1, 0.01
>>> U0, S0, V0 = np.linalg.svd(W0)
>>> U0, S0, V0 = U0[:, :R], S0[:R], V0[:R, :].T
>>> W_hat, Z = (U0 * S0) @ V0.T, V0 @ V0.T

Algorithm 2 computes the affinity, the normalised Laplacian, the number of subspaces and the normalised cuts.

>>> rows = V0 / np.linalg.norm(V0, axis=1, keepdims=True)
>>> F = (rows @ rows.T) ** 2
>>> D = np.sum(F, axis=1)
>>> L = np.eye(18) - F / np.sqrt(D[:, None] * D)
>>> s = np.linalg.svd(L, compute_uv=False)
>>> K = max(K0, 18 - round(np.sum(np.where(s >= tau, 1.0, np.log2(1 + s**2 / tau**2)))))
>>> cuts = np.linalg.eigh(L)[1][:, :K] / np.sqrt(D)[:, None]
>>> cuts = cuts / np.linalg.norm(cuts, axis=1, keepdims=True)  # the same for all columns of one subspace
>>> same = cuts @ cuts.T > 0.5

Algorithm 1 computes a basis for each subspace, and B from a QR decomposition; C starts at 0. The list below
collects the directions A(k) B(k).

>>> directions = []
>>> for k in dict.fromkeys(int(np.argmax(row)) for row in same):
...     I = same[k]
...     U, S, V = np.linalg.svd(W_hat[:, I], full_matrices=False)
...     Q, _ = np.linalg.qr(S[:, None] * V @ Z[np.ix_(I, I)])
...     directions.append(U @ Q[:, :r])

This package gives the same result. The directions are compared up to sign, since singular vectors are
determined only up to their sign.

>>> decomposition = decompose(W0, R)
>>> found = estimate_subspaces(decomposition, tau=tau, minimum=K0)
>>> labels = segment(decomposition, found, "ncut")
>>> factors = initial_factors(decomposition, labels, r, basis="per_subspace", initial_B="qr")
>>> found == K and np.array_equal(labels[:, None] == labels, same)
True
>>> cosines = np.sum(np.concatenate(directions, axis=1) * contract(factors), axis=0)
>>> bool(np.allclose(np.abs(cosines), 1.0))
True
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
from adamss.core.spectral import estimate_subspaces

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
    "estimate_subspaces",
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
