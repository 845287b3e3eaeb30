"""The driver for PyTorch models, on the CPU and, if present, on CUDA."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import adamss
from adamss import BudgetConfig
from adamss.core import Factors, Gradients
from adamss_conformance.capabilities import TABLE
from adamss_conformance.driver import Budget, Inputs, LoopDriver, Training
from adamss_torch import BudgetController, hold_frozen

__all__ = ["TorchDriver", "TorchTraining"]


class TorchDriver(LoopDriver):
    """A driver whose models are `torch.nn.Linear` layers in nested modules."""

    name = "torch"
    backend_name = "torch"
    capabilities = TABLE["torch"]

    @classmethod
    def has_device(cls, device: str) -> bool:
        return device == "cpu" or torch.cuda.is_available()

    def array(self, values: np.ndarray, dtype: str | None = None) -> Tensor:
        array: Tensor = super().array(values, dtype)
        return array.to(self.device)

    def device_of(self, array: Tensor) -> str:
        return array.device.type

    def base_linear(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return nn.functional.linear(x, W.t(), b)

    def model(self, layers: Mapping[str, tuple[np.ndarray, np.ndarray | None]], dtype: str) -> nn.Module:
        root = nn.Module()
        for path, (W, b) in layers.items():
            d, n = W.shape
            layer = nn.Linear(d, n, bias=b is not None, dtype=getattr(torch, dtype), device=self.device)
            with torch.no_grad():
                layer.weight.copy_(self.array(W.T))
                if b is not None:
                    layer.bias.copy_(self.array(b))
            parent, *names = root, *path.split(".")
            for name in names[:-1]:
                if not hasattr(parent, name):
                    parent.add_module(name, nn.Module())
                parent = parent.get_submodule(name)
            parent.add_module(names[-1], layer)
        return root

    def call(self, model: nn.Module, path: str, x: Tensor) -> Tensor:
        output: Tensor = model.get_submodule(path)(x)
        return output

    def gradients(
        self,
        linear: Callable[..., Tensor],
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        factors: Factors,
        dy: Tensor,
    ) -> Gradients:
        leaves = [array.clone().requires_grad_() for array in (x, factors.B, factors.C)]
        y = linear(leaves[0], W, b, factors._replace(B=leaves[1], C=leaves[2]))
        return Gradients(*torch.autograd.grad(y, leaves, dy))

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        torch.compiler.reset()  # the limit of recompilations counts per line of source, over all tests
        # This backend captures and differentiates as the default one does, without minutes of code generation.
        inner = torch._dynamo.lookup_backend("aot_eager")
        count = 0

        def backend(graph: Any, inputs: Any) -> Any:
            nonlocal count
            count += 1
            return inner(graph, inputs)

        compiled = torch.compile(function, fullgraph=True, backend=backend)

        def call(*args: Any) -> Any:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler warns about its own internals
                return compiled(*args)

        call.compilations = lambda: count  # type: ignore[attr-defined]
        return call

    def compilations(self, compiled: Callable[..., Any]) -> int:
        return int(compiled.compilations())  # type: ignore[attr-defined]

    def loop(
        self, model: nn.Module, inputs: Inputs, optimiser: str, rate: float, budget: Budget, compiled: bool
    ) -> TorchTraining:
        optimizer = _optimizer(model, optimiser, rate)
        return TorchTraining(model, self._forward(model, inputs, compiled), optimizer, budget)

    def _forward(self, model: nn.Module, inputs: Inputs, compiled: bool) -> Callable[[], Tensor]:
        x = {path: self.array(values) for path, values in inputs.items()}

        def loss() -> Tensor:
            total = torch.zeros((), device=self.device)
            for path, values in x.items():
                weight = model.get_parameter(f"{path}.weight")
                total = total + self.call(model, path, values.to(weight.dtype)).square().mean()
            return total

        return self.compile(loss) if compiled else loss

    def random_state(self) -> Any:
        state = [torch.get_rng_state()]
        if self.device == "cuda":
            state.append(torch.cuda.get_rng_state())
        return [tensor.tolist() for tensor in state]


class TorchTraining(Training):
    """A training loop with an optimiser and, if there is a budget, a `BudgetController`."""

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[], Tensor],
        optimizer: torch.optim.Optimizer,
        budget: BudgetConfig | None,
    ) -> None:
        self._model, self._forward, self._optimizer = model, forward, optimizer
        if budget is None:
            hold_frozen(model, optimizer)
        else:
            self._budget = BudgetController(model, optimizer, budget)

    @property
    def model(self) -> nn.Module:
        return self._model

    def step(self) -> None:
        self._optimizer.zero_grad()
        loss = self._forward()
        torch.autograd.backward(loss)
        self._optimizer.step()

    def save(self, folder: Path) -> None:
        torch.save(self._state(), folder / "state")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "state", weights_only=True)
        self._optimizer.load_state_dict(state["optimizer"])
        self._budget.load_state_dict(state["budget"])

    def memory(self) -> list[np.ndarray]:
        leaves = (leaf for leaf in tree_leaves(self._state()) if isinstance(leaf, Tensor | int | float))
        return [torch.as_tensor(leaf).numpy(force=True) for leaf in leaves]

    def _state(self) -> dict[str, Any]:
        return {"optimizer": self._optimizer.state_dict(), "budget": self._budget.state_dict()}

    def compilations(self) -> int:
        return int(self._forward.compilations())  # type: ignore[attr-defined]


def _optimizer(model: nn.Module, name: str, rate: float) -> torch.optim.Optimizer:
    kinds: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
        "sgd": lambda p: torch.optim.SGD(p, lr=rate, momentum=0.9, weight_decay=0.1),
        "adamw": lambda p: torch.optim.AdamW(p, lr=rate, weight_decay=0.1),
        "adafactor": lambda p: torch.optim.Adafactor(p, lr=rate, weight_decay=0.1),
        "muon": lambda p: torch.optim.Muon(p, lr=rate, weight_decay=0.1),
    }
    # Muon accepts only matrices.
    parameters = adamss.trainable_parameters(model)
    return kinds[name]([p for p in parameters if name != "muon" or p.ndim == 2])
