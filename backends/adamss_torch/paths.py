"""Paths of modules in the plain model, to which the wrappers around modules do not belong."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from adamss.backend.tensors import join_path

__all__ = ["CHILD", "named_parameters", "plain", "unwrapped", "walk"]

CHILD = "adamss"
"""Name, among the children of a module, of its bank or of the banks of its own Parameters."""

WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Names that wrappers give the module within: of `torch.compile`, of checkpointed activations, and of FSDP1."""


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module within all wrappers, which is `module` itself if nothing wraps it."""
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
    """Return a path, or the name of a tensor, without the components that wrappers add."""
    return ".".join(part for part in path.split(".") if part not in WRAPPED)


def walk(
    module: nn.Module, path: str = "", *, parametrizations: bool = False
) -> Iterator[tuple[str, nn.Module]]:
    """Yield modules with their paths, parents first. A module that appears twice is yielded twice.

    Wrappers and banks are left out.

    Parameters
    ----------
    module, path
        Module to begin with, and its path.
    parametrizations
        Whether to yield the modules of `torch.nn.utils.parametrize` too, which compute tensors.
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
    """Yield the Parameters with their names in the plain model, a shared one under each of its names."""
    for path, inner in walk(module, parametrizations=True):
        for name, parameter in inner._parameters.items():
            if parameter is not None:
                yield join_path(path, name), parameter
