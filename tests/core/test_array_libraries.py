"""What the table of docs/guides/embedding.md says of other array libraries: each cell is tried."""

from __future__ import annotations

import importlib
import re
import warnings
from pathlib import Path

import numpy as np
import pytest

from adamss import BudgetConfig, core

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "embedding.md"


def table():
    """Return the cells of the table, by function and library."""
    lines = GUIDE.read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| `core.` |"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    libraries = [cell.split()[0] for cell in rows[0][1:]]
    return {
        (row[0], library): cell for row in rows[2:] for library, cell in zip(libraries, row[1:], strict=True)
    }


CELLS = table()


def converters(library):
    """Return functions from NumPy's arrays to those of a library, and back."""
    pytest.importorskip(library, reason=f"{library} is not installed")
    if library == "dask":
        return importlib.import_module("dask.array").from_array, np.asarray
    if library == "cubed":
        return importlib.import_module("cubed.array_api").asarray, np.asarray
    assert library == "ndonnx"
    return importlib.import_module("ndonnx").asarray, lambda array: array.unwrap_numpy()


@pytest.fixture(scope="module")
def layer():
    """Return a weight, inputs, and for rank 1 and 2 of the subspaces decomposition, labels and factors."""
    rng = np.random.default_rng(0)
    W, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((24, 18), (5, 24)))
    decomposition = core.decompose(W, 8)
    factors = core.initial_factors(decomposition, core.segment(decomposition, 4), 2)
    C = rng.standard_normal(factors.C.shape).astype(np.float32)
    return W, x, decomposition, factors._replace(C=C)


def budget(factors, gradients):
    plan = core.plan_budget({"layer": factors}, BudgetConfig(target=2, end_step=1))
    weights = plan.join_elements({"layer": (factors.B, factors.C)})
    state = core.initial_budget_state(plan, weights)
    return core.advance(plan, core.observe(plan, state, weights, gradients(weights))).active


CALLS = {
    "`decompose`": lambda W, x, d, f: core.decompose(W, 8),
    '`segment`, `"kmeans"`': lambda W, x, d, f: core.segment(d, 4),
    '`segment`, `"ncut"`': lambda W, x, d, f: core.segment(d, 4, "ncut"),
    '`segment`, `"contiguous"`': lambda W, x, d, f: core.segment(d, 4, "contiguous"),
    "`initial_factors`": lambda W, x, d, f: core.initial_factors(d, f.labels, 2),
    "`contract`": lambda W, x, d, f: core.contract(f),
    "`expand`": lambda W, x, d, f: core.expand(f),
    "`delta`": lambda W, x, d, f: core.delta(f),
    "`linear`": lambda W, x, d, f: core.linear(x, W, None, f),
    "`linear_vjp`": lambda W, x, d, f: core.linear_vjp(x @ W, x, W, f),
    "`merge`": lambda W, x, d, f: core.merge(W, None, f).W,
    "`allocate`": lambda W, x, d, f: core.allocate(f.C[0, :], 7),
    "`plan_budget`, `observe`, `advance`": lambda W, x, d, f: budget(f, lambda weights: weights * weights),
}


def test_the_table_has_a_row_for_every_function():
    assert {function for function, _ in CELLS} == {*CALLS}


@pytest.mark.parametrize(("function", "library"), CELLS)
def test_a_cell_says_what_happens(function, library, layer):
    cell, call = CELLS[function, library], CALLS[function]
    to_library, to_numpy = converters(library)
    W, x, decomposition, factors = layer
    converted = (
        to_library(W),
        to_library(x),
        core.Decomposition(*map(to_library, decomposition)),
        core.Factors(*map(to_library, factors)),
    )
    # Cubed and Dask warn of chunks, sizes and divisions that are none of ours.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if cell != "yes":
            missing = re.match(r"no: `(\S+)`", cell)[1]
            with pytest.raises(Exception, match=re.escape(missing)):
                call(*converted)
            return
        found, expected = call(*converted), call(W, x, decomposition, factors)
        pairs = [(found, expected)] if not isinstance(found, tuple) else zip(found, expected, strict=True)
        for one, other in pairs:
            np.testing.assert_allclose(to_numpy(one), other, rtol=1e-5, atol=1e-5)
