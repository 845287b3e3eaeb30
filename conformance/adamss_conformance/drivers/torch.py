"""Driver of the PyTorch backend: models of nested `torch.nn.Module`, on the CPU and on CUDA where there is one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import adamss
from adamss.core import Factors, Gradients
from adamss_conformance.capabilities import TABLE
from adamss_conformance.driver import Driver
from adamss_torch import hold_frozen

__all__ = ["TorchDriver"]


class TorchDriver(Driver):
    """`torch.nn.Linear` layers."""

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
        torch.compiler.reset()  # its limit of compilations is one per source line, not one per test
        # Everything is captured and differentiated as for the default compiler, which only adds minutes.
        inner = torch._dynamo.lookup_backend("aot_eager")
        count = 0

        def backend(graph: Any, inputs: Any) -> Any:
            nonlocal count
            count += 1
            return inner(graph, inputs)

        compiled = torch.compile(function, fullgraph=True, backend=backend)

        def call(*args: Any) -> Any:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # those of the compiler about itself
                return compiled(*args)

        call.compilations = lambda: count  # type: ignore[attr-defined]
        return call

    def compilations(self, compiled: Callable[..., Any]) -> int:
        return int(compiled.compilations())  # type: ignore[attr-defined]

    def train(
        self,
        model: nn.Module,
        inputs: Mapping[str, np.ndarray],
        *,
        steps: int,
        optimiser: str,
        rate: float,
        compiled: bool = False,
    ) -> nn.Module:
        parameters = adamss.trainable_parameters(model)
        kinds: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
            "sgd": lambda p: torch.optim.SGD(p, lr=rate, momentum=0.9, weight_decay=0.1),
            "adamw": lambda p: torch.optim.AdamW(p, lr=rate, weight_decay=0.1),
            "adafactor": lambda p: torch.optim.Adafactor(p, lr=rate, weight_decay=0.1),
            "muon": lambda p: torch.optim.Muon(p, lr=rate, weight_decay=0.1),
        }
        # Muon is for matrices.
        optimizer = kinds[optimiser]([p for p in parameters if optimiser != "muon" or p.ndim == 2])
        hold_frozen(model, optimizer)
        x = {path: self.array(values) for path, values in inputs.items()}

        def loss() -> Tensor:
            total = torch.zeros((), device=self.device)
            for path, values in x.items():
                weight = model.get_parameter(f"{path}.weight")
                total = total + self.call(model, path, values.to(weight.dtype)).square().mean()
            return total

        forward = self.compile(loss) if compiled else loss
        for _ in range(steps):
            optimizer.zero_grad()
            forward().backward()
            optimizer.step()
        return model

    def random_state(self) -> Any:
        state = [torch.get_rng_state()]
        if self.device == "cuda":
            state.append(torch.cuda.get_rng_state())
        return [tensor.tolist() for tensor in state]
