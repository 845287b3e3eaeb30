"""Tensors whose values are not where the module has them: on the meta device, for now or between two forwards.

`accelerate` (``device_map``, `dispatch_model`, `cpu_offload`) keeps weights in a map outside of the module, and puts
them in their places for the time of a forward alone. What is written to a tensor on the meta device is lost without
a word, so that whoever writes asks first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adamss.errors import LayerError

__all__ = ["check_writable", "execution_device", "present"]


def present(module: nn.Module, name: str) -> Any:
    """Return a tensor of a module, or None as the module has it; from accelerate's map where its values are there.

    It stays on the meta device where there are none at all.
    """
    tensor = getattr(module, name)
    hook = _offloading(module) if tensor is not None and tensor.is_meta else None
    return tensor if hook is None else hook.weights_map[name]


def execution_device(layer: nn.Module) -> torch.device | int | str | None:
    """Return where accelerate runs a layer whose weight is elsewhere in between; None for any other layer."""
    hook = _offloading(layer)
    return None if hook is None else hook.execution_device


def check_writable(tensors: Mapping[str, Tensor], path: str) -> None:
    """Check that tensors keep what is written to them.

    Raises
    ------
    LayerError
        If one is on the meta device; the message names `path`, and the way out.
    """
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise LayerError(
                f"{path}: its {name} is on the meta device, where no value can be written; load the weights first, "
                "or take accelerate's offloading off with accelerate.hooks.remove_hook_from_submodules(model)"
            )


def _offloading(module: nn.Module) -> Any:
    hook = getattr(module, "_hf_hook", None)
    hooks: Any = getattr(hook, "hooks", (hook,))  # one, or several in a row
    for each in hooks:
        if getattr(each, "offload", False) and each.weights_map is not None:
            return each
    return None
