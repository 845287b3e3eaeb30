"""Check that the adaptive budget is kept exactly, and measure what it saves.

The script prints three tables:

1. step, budget and number of active subspaces under several schedules in both units, and the number that PEFT keeps;
2. how often PyTorch and JAX decide otherwise than NumPy, given the same gradients;
3. step time and optimiser memory before and after the end of the schedule, and after ``consolidate``.

``evidence/ablation.py`` tests whether the importance score chooses better than chance. ::

    python benchmarks/budget.py --json budget.json
    python benchmarks/budget.py --quick

The exit status is 1 if a budget is not kept, or if the frameworks decide differently.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from methods import Encoder, kept_bytes
from paired import environment, paired_times, ratio
from tabulate import tabulate
from torch import Tensor, nn

import adamss
from adamss import BudgetConfig, core
from adamss_torch import Allocation, BudgetController

LAYERS, SUBSPACES, WIDTH = 8, 5, 32
SCHEDULES = {
    "interval 5 divides 20": BudgetConfig(target=10, end_step=20, interval=5),
    "interval 6 does not divide 20": BudgetConfig(target=10, end_step=20, interval=6),
    "from 4 on, linear": BudgetConfig(target=10, start_step=4, end_step=16, interval=5, power=1),
    "running window": BudgetConfig(target=10, end_step=20, interval=6, window="running"),
    "revive": BudgetConfig(target=10, end_step=20, interval=6, revive=True),
    "one at least in every layer": BudgetConfig(target=10, end_step=20, interval=6, minimum_per_layer=1),
    "parameters": BudgetConfig(target=600, end_step=20, interval=6, unit="parameters"),
    "parameters, every step": BudgetConfig(target=601, end_step=7, unit="parameters"),
}
STEPS = 24
RATE = 0.1


class Stack(nn.Module):
    """A chain of linear layers at the paths ``layers.0``, ``layers.1``, ..."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the last layer."""
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def small_model(budget: BudgetConfig | None = None) -> Stack:
    """Return an adapted `Stack`; every call gives the same values."""
    torch.manual_seed(0)
    settings = adamss.AdamssConfig(
        targets=r"layers\.\d", rank=16, subspaces=SUBSPACES, subspace_rank=1, budget=budget
    )
    return adamss.attach(Stack(), settings)


# --- 1: exactly the budget --------------------------------------------------------------------------------


def follow(config: BudgetConfig) -> list[Allocation]:
    """Train the small model under a schedule, check that the budget is kept, and return the allocations."""
    model, seen = small_model(), []
    optimizer = torch.optim.AdamW(adamss.trainable_parameters(model), lr=1e-2)
    budget = BudgetController(model, optimizer, config, on_allocation=seen.append)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(torch.randn(64, WIDTH, generator=generator)).square().mean().backward()
        optimizer.step()
        if budget.step >= config.end_step:
            kept_to(config, seen[-1], adamss.summary(model).total.active)
    for each in seen:
        kept_to(config, each, each.active)
    budget.remove()
    return seen


def kept_to(config: BudgetConfig, allocation: Allocation, active: int) -> None:
    """Raise SystemExit if more or less is trained than the budget allows."""
    exact = allocation.active == active == allocation.budget
    if config.unit == "parameters":
        exact = allocation.active == active and allocation.parameters <= allocation.budget
    if not exact:
        raise SystemExit(f"the budget is not kept: {config}, {allocation}, {active} active")


def peft_count() -> int | str:
    """Return how many subspaces PEFT's AdaMSS keeps when its target is 10."""
    from peft import AdamssConfig as PeftAdamssConfig
    from peft import get_peft_model

    torch.manual_seed(0)
    settings = PeftAdamssConfig(
        r=16,
        num_subspaces=SUBSPACES,
        subspace_rank=1,
        target_modules=[f"layers.{i}" for i in range(LAYERS)],
        use_asa=True,
        asa_target_subspaces=10,
        init_warmup=1,
        final_warmup=20,
        mask_interval=5,
    )
    model = get_peft_model(Stack(), settings)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        model(torch.randn(64, WIDTH, generator=generator)).square().mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
    layers = [
        m for m in model.modules() if type(m).__module__.endswith("adamss.layer") and hasattr(m, "adamss_B")
    ]
    return sum(any(p.requires_grad for p in pair) for layer in layers for pair in _peft_pairs(layer))


def _peft_pairs(layer: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Return the two trained matrices of each subspace of a layer of PEFT."""
    return list(zip(layer.adamss_A["default"], layer.adamss_B["default"], strict=True))


def exactness() -> list[dict[str, Any]]:
    """Print the first table and return its records."""
    rows, records = [], []
    for name, config in SCHEDULES.items():
        for each in follow(config):
            rows.append([name, config.unit, each.step, each.budget, each.active, each.parameters])
            records.append({"schedule": name, "unit": config.unit, **_plain(each)})
            name = ""
    headers = ["schedule", "unit", "step", "budget", "active", "parameters"]
    print(
        f"\n{LAYERS} layers of K={SUBSPACES}; the first step says nothing (C = 0), and what is due then waits for one"
    )
    print(tabulate(rows, headers=headers))
    return records


def _plain(allocation: Allocation) -> dict[str, int]:
    return {name: getattr(allocation, name) for name in ("step", "budget", "active", "parameters")}


# --- 2: the same decisions --------------------------------------------------------------------------------


def recorded_gradients(layers: dict[str, core.Factors]) -> list[dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Return random gradients of B and C for every layer and step, of a different size for each subspace."""
    rng = np.random.default_rng(2)
    sizes = {path: rng.lognormal(sigma=0.5, size=len(f.ranks)) for path, f in layers.items()}

    def gradient(path: str) -> tuple[np.ndarray, np.ndarray]:
        f = layers[path]
        owners = np.repeat(np.arange(len(f.ranks)), f.ranks)
        dB = rng.standard_normal(f.B.shape) * sizes[path][owners]
        dC = rng.standard_normal(f.C.shape) * sizes[path][f.labels]
        return dB.astype(np.float32), dC.astype(np.float32)

    return [{path: gradient(path) for path in layers} for _ in range(STEPS)]


def stepped(f: core.Factors, dB: np.ndarray, dC: np.ndarray) -> core.Factors:
    """Return the factors after a step of gradient descent."""
    return f._replace(B=f.B - np.float32(RATE) * dB, C=f.C - np.float32(RATE) * dC)


def with_numpy(config: BudgetConfig, layers: dict[str, core.Factors], gradients: list[Any]) -> list[bytes]:
    """Return the mask of active subspaces after every step, computed by the core on NumPy arrays."""
    plan = core.plan_budget(layers, config)

    def weights() -> np.ndarray:
        return plan.join_elements({path: (f.B, f.C) for path, f in layers.items()})

    state, masks = core.initial_budget_state(plan, weights()), []
    for each in gradients:
        active = plan.split(state.active)
        state = core.advance(plan, core.observe(plan, state, weights(), plan.join_elements(each)))
        for path, f in layers.items():
            before = f._replace(active=active[path])
            layers = layers | {path: core.hold_frozen(before, stepped(before, *each[path]))}
        masks.append(state.active.tobytes())
    return masks


def with_torch(config: BudgetConfig, gradients: list[Any]) -> list[bytes]:
    """Return the mask of active subspaces after every step, as `BudgetController` decides in PyTorch."""
    model = small_model()
    optimizer = torch.optim.SGD(adamss.trainable_parameters(model), lr=RATE)
    budget, masks = BudgetController(model, optimizer, config), []
    for each in gradients:
        for path, (dB, dC) in each.items():
            adapter = model.get_submodule(path).adamss.default
            adapter.B.grad, adapter.C.grad = torch.from_numpy(dB.T.copy()), torch.from_numpy(dC.copy())
        optimizer.step()
        masks.append(np.concatenate([budget.masks[path].numpy() for path in budget.plan.paths]).tobytes())
    budget.remove()
    return masks


def with_jax(config: BudgetConfig, gradients: list[Any], file: Path) -> list[bytes]:
    """Return the mask of active subspaces after every step, as `adamss_jax.budgeted` decides under jit."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    import adamss_jax

    base = small_model(config)
    adamss.save(base, file, training=True)
    weights = adamss.detach(base).state_dict()
    model = nnx.Module()
    model.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0)) for _ in range(LAYERS)])
    for number, layer in enumerate(model.layers):
        layer.kernel.set_value(jnp.asarray(weights[f"layers.{number}.weight"].numpy().T))
        layer.bias.set_value(jnp.asarray(weights[f"layers.{number}.bias"].numpy()))
    model = adamss.load(model, file)
    optimizer = nnx.Optimizer(model, adamss_jax.budgeted(optax.sgd(RATE), model, config), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer, dB: list[Any], dC: list[Any]) -> None:
        slope = nnx.state(model, nnx.LoRAParam)
        for number in range(LAYERS):
            adapter = slope["layers"][number]["adamss"]["default"]
            adapter["B"], adapter["C"] = (adapter[n].replace(g[number]) for n, g in (("B", dB), ("C", dC)))
        optimizer.update(model, slope)

    masks = []
    for each in gradients:
        step(
            model, optimizer, *([jnp.asarray(each[f"layers.{i}"][j]) for i in range(LAYERS)] for j in (0, 1))
        )
        model = adamss_jax.synchronise(model, optimizer)
        actives = {
            f"layers.{i}": np.asarray(layer.adamss.default.active.get_value())
            for i, layer in enumerate(model.layers)
        }
        masks.append(np.concatenate([actives[path] for path in sorted(actives)]).tobytes())
    jax.block_until_ready(nnx.state(model))
    return masks


def agreement(folder: Path) -> list[dict[str, Any]]:
    """Print the second table and return its records."""
    backend = adamss.backend.get_backend("torch")
    layers = {
        path: core.Factors(*(array.numpy() for array in f))
        for path, f in backend.bank(small_model()).only().layers.items()
    }
    gradients, rows, records = recorded_gradients(layers), [], []
    for name, config in SCHEDULES.items():
        reference = with_numpy(config, layers, gradients)
        differing = {
            "PyTorch": with_torch(config, gradients),
            "JAX": with_jax(config, gradients, folder / "budget.safetensors"),
        }
        counts = {
            what: sum(a != b for a, b in zip(masks, reference, strict=True))
            for what, masks in differing.items()
        }
        rows.append([name, len(set(reference)), counts["PyTorch"], counts["JAX"]])
        records.append({"schedule": name, "masks": len(set(reference)), "differing": counts})
        if any(counts.values()):
            raise SystemExit(f"decided otherwise: {name}, {counts}")
    print(
        f"\nmasks after each of {STEPS} steps, from the same gradients: how many differ from those of NumPy"
    )
    print(tabulate(rows, headers=["schedule", "different masks", "PyTorch", "JAX, jitted"]))
    return records


# --- 3: what it saves -------------------------------------------------------------------------------------


class Case:
    """A model in training, at one point of its budget schedule.

    Parameters
    ----------
    base : nn.Module
        The frozen model; it is copied.
    inputs : Tensor
        The batch of every step.
    targets : list of str
        Layers to adapt.
    subspaces : int
        Number of subspaces K of each layer.
    """

    def __init__(self, base: nn.Module, inputs: Tensor, targets: list[str], subspaces: int):
        self.inputs = inputs
        self.model = copy.deepcopy(base)
        settings = adamss.AdamssConfig(rank=100, subspaces=subspaces, targets=targets)
        adamss.attach(self.model, settings)
        parameters = adamss.trainable_parameters(self.model)
        with torch.no_grad():
            for number, parameter in enumerate(parameters):
                parameter.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(number))
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5)
        self.step()

    def end_the_schedule(self, *, consolidate: bool) -> Case:
        """Reduce the trained subspaces to a third, and fold the others into the weights if `consolidate`."""
        total = adamss.summary(self.model).total.K
        budget = BudgetController(self.model, self.optimizer, BudgetConfig(target=total // 3, end_step=2))
        self.step()
        self.step()
        if consolidate:
            adamss.consolidate(self.model)
        self.budget = budget
        return self

    def start_the_schedule(self) -> Case:
        """Follow a schedule that scores every step but starts too late to freeze anything."""
        total = adamss.summary(self.model).total.K
        schedule = BudgetConfig(target=total // 3, start_step=10**6, end_step=10**6 + 1)
        self.budget = BudgetController(self.model, self.optimizer, schedule)
        return self

    def step(self) -> None:
        """Take one whole training step."""
        self.optimizer.zero_grad()
        self.model(self.inputs).square().mean().backward()
        self.optimizer.step()

    def optimiser_bytes(self) -> int:
        """Return the bytes of the optimiser's state."""
        values = (
            v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)
        )
        return sum(v.numel() * v.element_size() for v in values)

    def kept_bytes(self, base: nn.Module) -> int:
        """Return the bytes that a forward pass keeps for the backward pass, minus those of the base model."""
        return kept_bytes(self.model, self.inputs) - kept_bytes(base, self.inputs)


def savings(repeats: int) -> list[dict[str, Any]]:
    """Print the third table and return its records."""
    from demo.sentences import bundled_model
    from transformers import AutoModel

    torch.manual_seed(0)
    encoder = Encoder(AutoModel.from_pretrained(bundled_model(), dtype=torch.float32))
    layer = nn.Sequential(nn.Linear(768, 768), nn.Tanh(), nn.Linear(768, 768))
    problems: dict[str, tuple[nn.Module, Tensor, list[str]]] = {
        "MiniLM-L6, query and value, 16 x 64 tokens": (
            encoder,
            torch.randint(1000, 20000, (16, 64)),
            ["query", "value"],
        ),
        "2 layers, d=768, N=2048": (layer, torch.randn(2048, 768), ["0", "2"]),
    }
    records = []
    for name, (base, inputs, targets) in problems.items():
        base.requires_grad_(False)
        for subspaces in (10, 32):
            records += _savings_of(name, base, inputs, targets, subspaces, repeats)
    return records


def _savings_of(
    name: str, base: nn.Module, inputs: Tensor, targets: list[str], subspaces: int, repeats: int
) -> list[dict[str, Any]]:
    """Measure one model at one K in all states of the budget, print the table, and return its records."""

    def case() -> Case:
        return Case(base, inputs, targets, subspaces)

    cases = {
        "no budget": case(),
        "before the end, scored": case().start_the_schedule(),
        "ended, a third trained": case().end_the_schedule(consolidate=False),
        "consolidated": case().end_the_schedule(consolidate=True),
    }
    calls: dict[str, Callable[[], None]] = {what: each.step for what, each in cases.items()}
    seconds = paired_times(calls, repeats=repeats)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", adamss.AdamssWarning)  # it warns that the schedule has not ended
        cases["before the end, scored"].budget.remove()
    rows, records = [], []
    for what, each in cases.items():
        relative = ratio(seconds[what], seconds["before the end, scored"])
        sizes = each.optimiser_bytes(), each.kept_bytes(base)
        milliseconds = 1e3 * float(np.median(seconds[what]))
        rows.append([what, f"{milliseconds:.1f}", str(relative), f"{sizes[0]:,}", f"{sizes[1]:,}"])
        records.append(
            {
                "model": name,
                "K": subspaces,
                "state": what,
                "milliseconds": milliseconds,
                "ratio": vars(relative),
                "optimiser_bytes": sizes[0],
                "kept_bytes": sizes[1],
            }
        )
    print(f"\n{name}, K={subspaces}, AdamW, {repeats} alternations")
    headers = ["state", "step (ms)", "over scored", "optimiser (bytes)", "kept for backward (bytes)"]
    print(tabulate(rows, headers=headers, stralign="right", disable_numparse=True))
    return records


# --- The command ------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; return the exit status."""
    parser = argparse.ArgumentParser(
        description="Print what the adaptive budget keeps to, decides and saves."
    )
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--quick", action="store_true", help="fewer alternations")
    parser.add_argument("--only", choices=["exact", "agree", "savings"], help="one table alone")
    parser.add_argument("--folder", type=Path, default=Path("demo-output"), help="folder for adapter files")
    arguments = parser.parse_args(argv)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    quick = arguments.quick
    tables: dict[str, Callable[[], Any]] = {
        "exact": exactness,
        "agree": lambda: agreement(arguments.folder),
        "savings": lambda: savings(10 if quick else 100),
    }
    results: dict[str, Any] = {"environment": environment(["torch", "jax", "numpy", "peft", "adamss"])}
    for name, table in tables.items():
        if arguments.only in (None, name):
            results[name] = table()
    if arguments.only in (None, "exact"):
        results["peft"] = peft_count()
        print(f"\nPEFT's AdaMSS on the same layers, target 10: {results['peft']} subspaces trained")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
