"""The capabilities of each driver: the only table that decides which cases of the suite apply to it.

The table gives a reason for everything that a driver lacks, and `Capabilities` cannot be made without one. No case
can therefore be skipped silently: the suite reports its law and the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["DTYPES", "OPTIMISERS", "TABLE", "Capabilities"]

DTYPES = ("float64", "float32", "bfloat16", "float16")
OPTIMISERS = ("sgd", "adamw", "adafactor", "muon")
WHETHER = ("models", "arrays", "gradients", "compiles", "budget", "consolidates", "routes")


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a driver can do, and why it cannot do the rest.

    Parameters
    ----------
    models
        Description of the models that the driver makes; empty if it has arrays only.
    dtypes
        Dtypes that the framework supports, from `DTYPES`.
    devices
        Devices that arrays can be on, the CPU first. The suite runs on those that are present and reports the others.
    optimisers
        Optimisers that the driver can train with, from `OPTIMISERS`: SGD with momentum and weight decay, AdamW with
        weight decay, Adafactor, Muon.
    arrays
        Whether the driver tests `Backend.linear` on arrays. False if another driver of the same backend does so.
    gradients
        Whether the driver has gradients of `Backend.linear`.
    compiles
        Whether the framework compiles functions.
    budget
        Whether the framework has a controller of the budget in training.
    consolidates
        Whether the backend supports `adamss.consolidate`.
    routes
        Whether the backend supports `adamss.routed`.
    missing
        Reason for everything above that is missing, by dtype, by optimiser, or by ``"models"``, ``"arrays"``,
        ``"gradients"``, ``"compiles"``, ``"budget"``, ``"consolidates"`` or ``"routes"``.

    Raises
    ------
    ValueError
        If a capability is missing without a reason, or a reason is given for one that is present.

    Examples
    --------
    >>> Capabilities(models="", dtypes=("float64", "float32", "float16"), missing={"bfloat16": "no such dtype"})
    Traceback (most recent call last):
        ...
    ValueError: lacking without a reason: adafactor, adamw, arrays, budget, compiles, consolidates, gradients, ...
    """

    models: str
    dtypes: tuple[str, ...]
    devices: tuple[str, ...] = ("cpu",)
    optimisers: tuple[str, ...] = ()
    arrays: bool = False
    gradients: bool = False
    compiles: bool = False
    budget: bool = False
    consolidates: bool = False
    routes: bool = False
    missing: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lacking = {name for name in (*DTYPES, *OPTIMISERS) if name not in (*self.dtypes, *self.optimisers)}
        lacking |= {name for name in WHETHER if not getattr(self, name)}
        if unexplained := sorted(lacking - self.missing.keys()):
            raise ValueError(f"lacking without a reason: {', '.join(unexplained)}")
        if surplus := sorted(self.missing.keys() - lacking):
            raise ValueError(f"a reason for what is not lacking: {', '.join(surplus)}")


_NO_OPTIMISERS = dict.fromkeys(("adafactor", "muon"), "the reference has SGD and AdamW, written out")

TABLE: dict[str, Capabilities] = {
    "numpy": Capabilities(
        models="adamss.backend.NumpyModel",
        dtypes=("float64", "float32", "float16"),
        optimisers=("sgd", "adamw"),
        arrays=True,
        gradients=True,
        budget=True,
        consolidates=True,
        routes=True,
        missing={"bfloat16": "NumPy has no bfloat16", "compiles": "NumPy compiles nothing", **_NO_OPTIMISERS},
    ),
    "strict": Capabilities(
        models="NumpyModel on arrays of array-api-strict",
        dtypes=("float64", "float32"),
        devices=("cpu", "device1"),
        optimisers=("sgd", "adamw"),
        arrays=True,
        gradients=True,
        budget=True,
        consolidates=True,
        routes=True,
        missing={
            **dict.fromkeys(("bfloat16", "float16"), "the array API standard has no half precision"),
            "compiles": "array-api-strict compiles nothing",
            **_NO_OPTIMISERS,
        },
    ),
    "torch": Capabilities(
        models="torch.nn.Module",
        dtypes=DTYPES,
        devices=("cpu", "cuda"),
        optimisers=OPTIMISERS,
        arrays=True,
        gradients=True,
        compiles=True,
        budget=True,
        consolidates=True,
        routes=True,
    ),
    "jax-nnx": Capabilities(
        models="flax.nnx.Module",
        dtypes=DTYPES,
        devices=("cpu", "gpu", "tpu"),
        optimisers=OPTIMISERS,
        arrays=True,
        gradients=True,
        compiles=True,
        budget=True,
        consolidates=True,
        routes=True,
    ),
    "jax-equinox": Capabilities(
        models="equinox.Module",
        dtypes=DTYPES,
        devices=("cpu", "gpu", "tpu"),
        optimisers=OPTIMISERS,
        gradients=True,
        compiles=True,
        budget=True,
        consolidates=True,
        routes=True,
        missing={"arrays": "the functions on arrays are those that jax-nnx tries"},
    ),
}
"""Capabilities of the drivers of `adamss`. A third-party driver gives its own in `Driver.capabilities`."""
