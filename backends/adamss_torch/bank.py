"""The adapters of one layer: a child module of the user's own layer, and the hook that adds their updates.

The layer keeps its class, its weight and its state-dict keys; a forward hook adds the updates to its output.
PyTorch's fused inference paths look for hooks and step aside. They would silently bypass a wrapper module that has a
``weight`` of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from adamss.backend import Kind, View
from adamss.backend.bank import DEFAULT
from adamss.errors import StateError
from adamss_torch.adapter import HELD, Adapter
from adamss_torch.in_place import put, take_back
from adamss_torch.kernel import without_autocast
from adamss_torch.kinds import Embedding, Part
from adamss_torch.paths import CHILD, plain
from adamss_torch.routing import LayerRoute
from adamss_torch.tokens import TrainedRows, is_known
from adamss_torch.watch import Watch

__all__ = [
    "CHILD",
    "LayerBank",
    "Off",
    "OffWithGradients",
    "OnLoan",
    "PartBanks",
    "TokenBank",
    "check_state",
    "without_weights",
]

HOOK = -1
"""Key of our hook among the forward hooks of the layer."""


HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
"""Attributes of a module that hold the hooks on its inputs, outputs and gradients."""

ROWS = "_adamss_rows"
"""Attribute through which `_use_rows` finds the `TokenBank`, since the bank is a child of the embedding only."""


class PartBanks(nn.Module):
    """The banks of the adapted Parameters that a module reads itself, as children by the names of the parts."""

    holds_adapters = True


class LayerBank(nn.Module):
    """The adapters of one layer, as children by their names.

    Parameters
    ----------
    kind
        Kind of the layer.

    Attributes
    ----------
    base
        Tensors that the layer had before its weight took in an update, by name. None if they were dropped, or if the
        weight holds no update.
    holds
        Whether the weight holds an update.
    put_away
        The quantised layer that this float layer has replaced, in a tuple so that it is not part of the model. Empty
        if no layer was replaced.
    off
        Whether the updates are switched off for now.
    route
        Route of the rows of a batch through the adapters of this layer, while `adamss.routed` lasts.
    routing
        Whether an `adamss.routed` block is open.
    active
        Names of the active adapters.
    merged
        Names of the adapters whose update is held by the weights of all their layers. Where only some weights hold it
        completely, these layers still add an update of zero, because training code expects a gradient for every B and
        C.
    computed
        Names of the adapters whose update is added to the output.
    places
        The `adamss_torch.in_place.Place` objects at which W + delta replaces the weight or the bias.
    hooked
        Whether a hook adds the update to the output of the layer, unless W + delta replaces the weight.
    sharing
        For a `TokenBank`, the modules that have the weight, each with its name for the weight. Empty for other banks.
    placed
        Whether W + delta replaces the weight for now (`adamss_torch.in_place`). Nothing is added to the output then.
    """

    holds_adapters = True
    sharing: list[tuple[nn.Module, str]] | tuple[()] = ()

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind = kind
        self.base: dict[str, Any] | None = None
        self.holds = False
        self.put_away: tuple[nn.Module, ...] = ()
        self.off = self.placed = self.hooked = False
        self.active = self.merged = frozenset[str]()
        self.route: LayerRoute | None = None
        self.routing = False
        self.places: tuple[Any, ...] = ()
        self.computed: tuple[str, ...] = ()
        self._input = "input"

    def __setattr__(self, name: str, value: Any) -> None:
        # An adapter may have the name of one of these attributes. `nn.Module.__setattr__` would then take an
        # assignment to the attribute for an attempt to replace the adapter.
        object.__setattr__(self, name, value)

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The adapters by name."""
        return {name: module for name, module in self._modules.items() if isinstance(module, Adapter)}

    def look(self) -> None:
        """Determine `computed` from the active and merged adapters and the switches."""
        on = frozenset[str]() if self.off or self.routing else self.active - self.merged
        self.computed = tuple(name for name in self._modules if name in on)

    def install(self, layer: Any, reader: nn.Module | None, view: View) -> None:
        """Make this bank a child of the layer, and hook the forward of the layer or of the `reader` of its weight."""
        _let_compilers_see_hooks()
        if isinstance(layer, Part):
            if CHILD not in layer.module._modules:
                layer.module.register_module(CHILD, PartBanks())
            banks: Any = layer.module._modules[CHILD]
            banks.register_module(layer.part, self)
            put(layer.module, layer.module, layer.name, self, layer.rows, view)
            return
        layer.register_module(CHILD, self)
        if reader is not None:
            put(reader, layer, self.kind.weight, self, None, view)
            return
        self._input = next(iter(signature(layer.forward).parameters), self._input)
        # This does what `register_forward_hook` does, except for the key. PyTorch counts its keys from zero in each
        # process, so the first hook that is registered on an unpickled model could displace ours.
        layer._forward_hooks[HOOK] = _add_updates
        layer._forward_hooks_with_kwargs[HOOK] = True
        self.hooked = True

    def move(self, layer: nn.Module, other: nn.Module, kind: Kind) -> None:
        """Move from a layer to `other`, which takes its place, with all hooks on inputs, outputs and gradients."""
        for name in HOOKS:
            setattr(other, name, getattr(layer, name))
        other.training = layer.training
        self.kind = kind
        self.install(other, None, kind.view(other, ""))

    def uninstall(self, layer: Any) -> None:
        """Restore the layer to its state before `install`."""
        take_back(self)
        if isinstance(layer, Part):
            banks: Any = layer.module._modules[CHILD]
            del banks._modules[layer.part]
            if not banks._modules:
                del layer.module._modules[CHILD]
            return
        # A copied or unpickled layer has hooks but no handles, so the entries are taken out of the tables.
        layer._forward_hooks.pop(HOOK, None)
        layer._forward_hooks_with_kwargs.pop(HOOK, None)
        delattr(layer, CHILD)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _let_compilers_see_hooks()  # `install` was not called in a process that only unpickles the model

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Keys in states of version 0.1 do not contain the name of the adapter.
        for name in [name for name in state_dict if name.startswith(prefix)]:
            own = name.removeprefix(prefix)
            if "." not in own:
                state_dict[f"{prefix}{DEFAULT}.{own}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)


class TokenBank(LayerBank):
    """The trained rows of an embedding, used by the embedding and by all modules that share its weight.

    Parameters
    ----------
    kind
        Kind of the embedding.
    sharing
        Modules that have the weight, including the embedding, each with its name for the weight.
    """

    sharing: list[tuple[nn.Module, str]]

    def __init__(self, kind: Kind, sharing: list[tuple[nn.Module, str]]) -> None:
        super().__init__(kind)
        self.sharing = sharing

    @property
    def rows(self) -> dict[str, TrainedRows]:
        """The trained rows, by the name of their adapter."""
        return {name: module for name, module in self._modules.items() if isinstance(module, TrainedRows)}

    def install(self, layer: nn.Module, reader: nn.Module | None, view: View) -> None:
        """Make this bank a child of the embedding, and hook the forwards of all modules that have its weight."""
        _let_compilers_see_hooks()
        layer.register_module(CHILD, self)
        self.hooked = is_known(layer)
        for module, name in self.sharing:
            if is_known(module):
                vars(module)[ROWS] = self
                module._forward_hooks[HOOK] = _use_rows
                # Our hook comes first, so that other hooks see an output that has the trained rows already.
                module._forward_hooks.move_to_end(HOOK, last=False)  # type: ignore[attr-defined]
                module._forward_hooks_with_kwargs[HOOK] = True
            else:
                put(module, module, name, self, None, view)

    def uninstall(self, layer: nn.Module) -> None:
        """Restore the embedding and the modules that share its weight to their state before `install`."""
        take_back(self)
        for module, _ in self.sharing:
            if vars(module).pop(ROWS, None) is not None:
                module._forward_hooks.pop(HOOK, None)
                module._forward_hooks_with_kwargs.pop(HOOK, None)
        delattr(layer, CHILD)


def _use_rows(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    """Forward hook of a module that has the weight of an embedding: return the output with the trained rows."""
    bank: TokenBank = vars(layer)[ROWS]
    x = args[0] if args else kwargs["input"]
    for name in bank.computed:
        output = bank._modules[name](layer, x, output, overwrite=_is_ours_alone(layer, output))  # type: ignore[misc]
    return output


def _add_updates(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor | None:
    """Forward hook of a layer: return its output plus the updates of its bank."""
    # The bank is looked up at the layer that is called, which may be a replica with children of its own.
    bank: LayerBank = layer._modules[CHILD]  # type: ignore[assignment]
    # The hook stays on a merged layer, because removing it and adding it again would change its place among the hooks
    # of others.
    if bank.route is not None and not bank.off:
        return bank.route(layer, bank.kind, args[0] if args else kwargs[bank._input], output)
    if not bank.computed or bank.placed:
        return None
    x = args[0] if args else kwargs[bank._input]
    if not bank.kind.linear:
        for name in bank.computed:
            adapter: Any = bank._modules[name]
            if isinstance(bank.kind, Embedding) and x.numel() < adapter.d:
                z, E = adapter.products(x)  # only the rows of M for these ids, not for the whole vocabulary
                z = z.to(output.dtype)
            else:
                with without_autocast(output):  # autocast would round A and B; only M is rounded
                    M, E = adapter.products()
                z = bank.kind.project(layer, x, M.to(output.dtype))
            # With C = 0 the output must be the base's (law 1). What overflows in z is set to zero, since infinity
            # times zero would be NaN.
            z = torch.where(z.isfinite(), z, torch.zeros_like(z))
            u = bank.kind.spread(layer, z, E.to(output.dtype))
            output = output + (bank.kind.looked_up(layer, x, u) if isinstance(bank.kind, Embedding) else u)
        return output
    if x.is_nested:  # torch.nn.TransformerEncoder makes nested tensors in evaluation with a mask
        for name in bank.computed:
            nested: Any = bank._modules[name]
            M, E = (factor.to(output.dtype) for factor in nested.products())
            z = nn.functional.linear(x, M[: nested.d].t(), M[nested.d] if len(M) > nested.d else None)
            output = output + nn.functional.linear(z, E.t())
        return output
    overwrite = _is_ours_alone(layer, output)
    weight, trained = None, False
    if torch.is_grad_enabled():
        # Only a Parameter is taken: a weight of `torch.nn.utils.parametrize` would be computed again, and might
        # differ.
        weight = layer._parameters.get("weight")
        trained = weight is not None and weight.requires_grad
        weight = weight if overwrite and _is_linear_alone(layer, x, output) else None
    for name in bank.computed:
        adapter = bank._modules[name]
        output = adapter(output, x, weight=weight, overwrite=overwrite, input_kept=trained)
        weight = None
    return output


class OnLoan:
    """A substitute for an attribute of a module while the model has adapters; `TorchBackend.remove` takes it off.

    Parameters
    ----------
    module, name
        Module, and name of the attribute that is replaced.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        own = vars(module)
        # `former` holds the value in the module's own `__dict__`, not that of its class; it is empty if there is
        # none.
        former = own.get(name)
        self.former: tuple[Any, ...] = (former,) if name in own else ()
        if isinstance(former, OnLoan):
            self.former = former.former
        own[name] = self

    @staticmethod
    def give_back(module: nn.Module) -> None:
        """Give a module back all attributes that were replaced."""
        own = vars(module)
        for name, value in [*own.items()]:
            if isinstance(value, OnLoan):
                del own[name]
                if value.former:
                    (own[name],) = value.former


class Off(OnLoan):
    """An attribute that is false while the model has adapters."""

    def __bool__(self) -> bool:
        return False


class OffWithGradients(OnLoan):
    """An attribute that is false while gradients are recorded.

    With ``use_nested_tensor``, `torch.nn.TransformerEncoder` takes a path for layers that are not trained, on which
    inputs get no gradients. It decides by its own Parameters only, which are frozen, and does not see the adapters.
    """

    def __bool__(self) -> bool:
        return bool(self.former and self.former[0]) and not torch.is_grad_enabled()


def check_state(module: nn.Module, state_dict: Mapping[str, Any], prefix: str = "", *_: Any) -> None:
    """Check a state before any of it is loaded.

    Raises
    ------
    StateError
        If it is in the compacted form of version 0.1, or does not fit what the weights of the model hold; the message
        names a layer.
    """
    mark = f".{CHILD}.owned"
    found = [name.removesuffix(mark) for name in state_dict if f".{name}".endswith(mark)]
    if found:
        raise StateError(
            f"{found[0]}: the state is of an adapter that compact() had shrunk, a form that is gone; write it with "
            "adamss.save in the version that it comes from, and adamss.load that file"
        )
    for path, bank in module.named_modules(prefix=prefix.removesuffix(".")):
        if isinstance(bank, LayerBank):
            for name, adapter in bank.adapters.items():
                # The prefixes of a present state, of one from before a block was wrapped, and of version 0.1.
                for prefix in (f"{path}.{name}.", f"{plain(path)}.{name}.", f"{path}."):
                    adapter.check_fits_weight(state_dict, prefix)


def without_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state of adapters with marks which say that it does not contain the weights of their layers."""
    labels = re.compile(rf"(.*\.)?{CHILD}\.([^.]+\.)?[^.]+\.labels")  # of a layer, or of a part of a module
    marks = {name.removesuffix("labels") + HELD for name in state_dict if labels.fullmatch(name)}
    return {**state_dict, **{name: torch.zeros(0, dtype=torch.bool) for name in marks}}


def _let_compilers_see_hooks() -> None:
    """Make `torch.compile` check the hooks of a module before it reuses compiled code.

    By default it does not, and would run the graph of a frozen layer without hooks for an adapted layer, whether the
    graph comes from the same model or from another of the same structure. Graphs made so far are discarded once.
    """
    from torch._dynamo import config

    if config.skip_nnmodule_hook_guards:
        config.skip_nnmodule_hook_guards = False
        torch.compiler.reset()


def _is_ours_alone(layer: nn.Module, output: Tensor) -> bool:
    """Return whether only our hook has seen the output of the layer, so that the output may be overwritten.

    A forward of the user's own may keep its output, and so may an earlier hook or a dispatch mode: selective
    activation checkpointing returns a kept output a second time. A compiler reuses memory by itself.
    """
    return (
        not torch.compiler.is_compiling()
        and type(layer).forward is nn.Linear.forward
        and "forward" not in layer.__dict__
        and len(layer._forward_hooks) == 1
        and not _global_forward_hooks
        and type(output) is Tensor
        and output.is_contiguous()
        and not is_in_torch_dispatch_mode()
        and torch._C._len_torch_function_stack() == Watch.active
    )


def _is_linear_alone(layer: nn.Module, x: Tensor, output: Tensor) -> bool:
    """Return whether the layer's only gradient is that of x, ``dy weight``, because weight and bias are frozen."""
    weight = layer._parameters.get("weight")
    bias = layer._parameters.get("bias")
    return (
        weight is not None
        and type(weight) in (Tensor, nn.Parameter)
        and type(x) in (Tensor, nn.Parameter)
        and not weight.requires_grad
        and "bias" in layer._parameters
        and not (bias is not None and bias.requires_grad)
        and x.dtype == weight.dtype == output.dtype
    )
