"""Write adapter files of this format version, and their content as JSON. This happens once, at its release.

`tests/test_compatibility.py` reads the files of all versions with the present code. A new format version gets new
files, and those of older versions are never written again. ::

    python tests/data/make.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

import adamss
from adamss.backend import NumpyLinear, NumpyModel
from adamss.io import checkpoint

FOLDER = Path(__file__).parent
SHAPES = {"encoder.0.query": (7, 6), "encoder.0.value": (7, 6), "encoder.1.query": (5, 8), "head": (6, 3)}


def numbers(shape: tuple[int, ...], step: int) -> np.ndarray[Any, Any]:
    """Return exact binary fractions from a formula, because the stream of a random generator may change one day."""
    index = np.arange(np.prod(shape), dtype=np.int64)
    return ((index * index * 7 + index * step + step) % 31 - 15).reshape(shape) / 16


def base_model(dtype: str) -> NumpyModel:
    """Return the base model of the files."""
    return NumpyModel(
        {
            path: NumpyLinear(numbers(shape, step).astype(dtype), numbers(shape[1:], step).astype(dtype))
            for step, (path, shape) in enumerate(SHAPES.items(), start=3)
        }
    )


def adapted(dtype: str, **settings: Any) -> NumpyModel:
    """Return an adapted model with other values in C and in the head, and with a frozen subspace."""
    config = adamss.AdamssConfig(
        targets=["query", "value"], modules_to_save=["head"], segmentation="contiguous", **settings
    )
    model = adamss.attach(base_model(dtype), config)
    for step, path in enumerate(model.layers, start=2):
        if path in model.bank.only().layers:
            _, _, C, labels, ranks, active = model.bank.only().layers[path]
            C[...] = np.where(np.arange(len(C))[:, None] < ranks[labels], numbers(C.shape, step), 0)
            active[step % len(active)] = False
    model["head"].W[...] = numbers(SHAPES["head"], 17)
    model["head"].b[...] = numbers(SHAPES["head"][1:], 17)
    return model


def update_of(factors: Any) -> np.ndarray[Any, Any]:
    """Return the update ``A_k B_k C_k`` in the columns of each subspace, by its definition in float64."""
    A, B, C = (np.asarray(array, dtype=np.float64) for array in factors[:3])
    ends = np.cumsum(factors.ranks)
    columns = []
    for j, k in enumerate(factors.labels):
        r, end = factors.ranks[k], ends[k]
        columns.append(A[k if len(A) > 1 else 0] @ (B[:, end - r : end] @ C[:r, j]))
    return np.stack(columns, axis=1)


def held(model: NumpyModel) -> dict[str, Any]:
    """Return the content that a file of the model must have, as plain numbers."""
    layers = {
        path: {
            "update": update_of(factors).tolist(),
            **{name: getattr(factors, name).tolist() for name in ("labels", "ranks", "active")},
        }
        for path, factors in model.bank.only().layers.items()
    }
    head = {"weight": model["head"].W.T.tolist(), "bias": model["head"].b.tolist()}
    return {
        "dtype": str(model["head"].W.dtype),
        "config": model.bank.only().config.to_dict(),
        "layers": layers,
        "modules_to_save": {"head": head},
    }


def main() -> int:
    """Write the files that do not exist yet."""
    budget = adamss.BudgetConfig(target=4, start_step=10, end_step=100, interval=10)
    plan = {
        "portable": (adapted("float32", rank=4, subspaces=4, subspace_rank=2, budget=budget), False),
        "training": (
            adapted(
                "float64",
                rank=3,
                subspaces=4,
                subspace_rank=2,
                basis="per_subspace",
                include_bias=True,
                seed=5,
            ),
            True,
        ),
    }
    for name, (model, training) in plan.items():
        path = FOLDER / f"v{checkpoint.FORMAT_VERSION}-{name}.safetensors"
        if path.exists():
            print(f"{path.name} is there already, and stays")
            continue
        adamss.save(model, path, training=training)
        path.with_suffix(".json").write_text(json.dumps(held(model), indent=1) + "\n")
        print(f"{path.name}: {path.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
