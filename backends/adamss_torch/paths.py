"""Modules by the paths that they have in the plain model: what wraps a module is no part of its path."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from adamss.backend.tensors import join_path

__all__ = ["CHILD", "named_parameters", "plain", "unwrapped", "walk"]

CHILD = "adamss"
"""Name of the bank among the children of its layer, or of the banks of a module's own Parameters."""

WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""What a compiled module, one whose activations are checkpointed, and one of FSDP1 call the module within."""


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module within wrappers; itself if there are none."""
    while True:
        inner = next(
            (module._modules[name] for name in WRAPPED if module._modules.get(name) is not None), None
        )
        if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = module.module
        if inner is None:
            return module
        module = inner


def plain(path: str) -> str:
    """Return a path, or the name of a tensor, without the wrappers that have names of their own."""
    return ".".join(part for part in path.split(".") if part not in WRAPPED)


def walk(
    module: nn.Module, path: str = "", *, parametrizations: bool = False
) -> Iterator[tuple[str, nn.Module]]:
    """Yield modules by path, parents first; one that appears twice is yielded twice.

    Wrappers and banks are passed over.

    Parameters
    ----------
    module, path
        Where to begin.
    parametrizations
        Whether what computes the tensors of a module is yielded too.
    """
    module = unwrapped(module)
    yield path, module
    for name, child in module._modules.items():
        if child is None or (name == "parametrizations" and not parametrizations and is_parametrized(module)):
            continue
        if name == CHILD and getattr(child, "holds_adapters", False):
            continue
        yield from walk(child, join_path(path, name), parametrizations=parametrizations)


def named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the Parameters by all their names in the plain model."""
    for path, inner in walk(module, parametrizations=True):
        for name, parameter in inner._parameters.items():
            if parameter is not None:
                yield join_path(path, name), parameter
