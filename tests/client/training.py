"""A project of somebody else's that uses the installed package, with NumPy alone.

`nox -s package` checks it with ``mypy --strict`` and runs it: the public names must keep their types, and the wheel
must have all that they need.
"""

import tempfile
from pathlib import Path
from typing import Any, Literal, assert_type

import numpy as np

import adamss
from adamss import core
from adamss.backend import NumpyLinear, NumpyModel


def settings(rank: int) -> adamss.AdamssConfig:
    """Return settings with a budget; each has its own type."""
    schedule = adamss.BudgetConfig(target=2, end_step=10, interval=5)
    config = adamss.AdamssConfig(targets=["query"], rank=rank, subspaces=3, budget=schedule)
    assert_type(config.rank, int)
    assert_type(config.subspaces, int | Literal["estimate"] | adamss.SubspaceEstimate)
    assert_type(config.budget, adamss.BudgetConfig | None)
    return config


def update(W: np.ndarray[Any, Any], x: np.ndarray[Any, Any]) -> core.Gradients:
    """Return the gradients of one layer, from the functions of the core."""
    decomposition = core.decompose(W, rank=4)
    assert_type(decomposition, core.Decomposition)
    labels = core.segment(decomposition, 3)
    factors = core.initial_factors(decomposition, labels, 1)
    assert_type(factors, core.Factors)
    assert_type(core.count_factors(factors), int)
    return core.linear_vjp(np.ones((len(x), W.shape[1])), x, W, factors)


def there_and_back(model: NumpyModel, base: NumpyModel, path: Path) -> adamss.Summary:
    """Attach, save and load; files are named by a string or a path."""
    adamss.save(model, path)
    adamss.save(model, str(path), training=True)
    loaded = adamss.load(base, path, trainable=False)
    for name, info in adamss.adapters(loaded).items():
        assert_type(name, str)
        assert_type(info, adamss.AdapterInfo)
    summary = adamss.summary(loaded)
    assert_type(summary, adamss.Summary)
    assert_type(summary.total, adamss.SummaryRow)
    assert_type(summary.total.trained, int)
    return summary


def wrong_types() -> None:
    """Hold calls that mypy must refuse; it says so where a comment to ignore an error is not needed."""
    adamss.AdamssConfig(rank="many")  # type: ignore[arg-type]
    adamss.AdamssConfig(ranks=3)  # type: ignore[call-arg]
    adamss.load(None, 3)  # type: ignore[arg-type]
    core.decompose(np.eye(2), "one")  # type: ignore[arg-type]


def main() -> None:
    """Run what is typed above."""
    rng = np.random.default_rng(0)
    W = rng.standard_normal((8, 6))
    base = NumpyModel({"query": NumpyLinear(W, np.zeros(6))})
    try:
        model = adamss.attach(base, settings(rank=4))
        with adamss.disabled(model) as plain:
            assert_type(plain, Any)
        with tempfile.TemporaryDirectory() as folder:
            summary = there_and_back(model, base, Path(folder) / "adapter.safetensors")
    except adamss.AdamssError as error:
        raise SystemExit(str(error)) from error
    gradients = update(W, rng.standard_normal((5, 8)))
    assert gradients.C.shape == (1, 6)
    print(summary)


if __name__ == "__main__":
    main()
