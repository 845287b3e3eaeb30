"""The adapters of one layer: a child module of the user's own layer, and the hook that adds their updates.

The layer keeps its class, its weight and its state-dict keys; a forward hook adds the updates to its output.
PyTorch's fused inference paths look for hooks and step aside, where a wrapper module with a ``weight`` of its own
would be bypassed without a word.
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
"""Attributes of a module that say what sees its inputs, outputs and gradients."""

ROWS = "_adamss_rows"
"""Attribute of a module that `_use_rows` hooks: the `TokenBank`, which is a child of the embedding alone."""


class PartBanks(nn.Module):
    """The banks of what is adapted of a module beside layers, its own Parameters; children by their names."""

    holds_adapters = True


class LayerBank(nn.Module):
    """The adapters of one layer, children by their names.

    Parameters
    ----------
    kind
        Of the layer.

    Attributes
    ----------
    base
        While the weight holds an update: the tensors that the layer had before, by name; None if they were dropped.
    holds
        Whether the weight holds an update.
    put_away
        The quantised layer whose place this one has taken, or nothing; a tuple, so that it is no part of the model.
    off
        Whether nothing is added to the output for now.
    route
        How the rows of a batch go through its adapters, as long as `adamss.routed` lasts.
    routing
        Whether it does.
    active
        Names of the adapters that are active.
    merged
        Names of those of which the weights of the model hold every update. Where this weight does and others do not,
        zero is added all the same: B and C are trained parameters, and those who train expect a gradient of each.
    computed
        Names of the adapters whose update is added to the output.
    places
        Where W + delta is put in the place of the weight.
    hooked
        Whether the update is added to the output of the layer, unless W + delta stands in the place of its weight.
    sharing
        Of a `TokenBank` the modules that have the weight, and what each calls it; of others nothing.
    placed
        Whether W + delta stands in the place of the weight for now (`adamss_torch.in_place`): nothing is added then.
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
        # An adapter may have the name of an attribute, which PyTorch would take for an attempt to replace it.
        object.__setattr__(self, name, value)

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The adapters by name."""
        return {name: module for name, module in self._modules.items() if isinstance(module, Adapter)}

    def look(self) -> None:
        """See which adapters there is something to compute of."""
        on = frozenset[str]() if self.off or self.routing else self.active - self.merged
        self.computed = tuple(name for name in self._modules if name in on)

    def install(self, layer: Any, reader: nn.Module | None, view: View) -> None:
        """Become a child of the layer, and hook its forward, or that of the module that reads its weight."""
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
        # As `register_forward_hook` does, but for the key: PyTorch counts its own from zero in each process, and the
        # hook of an unpickled model is not to be displaced by the first that is registered there.
        layer._forward_hooks[HOOK] = _add_updates
        layer._forward_hooks_with_kwargs[HOOK] = True
        self.hooked = True

    def move(self, layer: nn.Module, other: nn.Module, kind: Kind) -> None:
        """Go from one layer to another, which takes its place, with all the hooks that see inputs and outputs."""
        for name in HOOKS:
            setattr(other, name, getattr(layer, name))
        other.training = layer.training
        self.kind = kind
        self.install(other, None, kind.view(other, ""))

    def uninstall(self, layer: Any) -> None:
        """Leave the layer as it was before `install`."""
        take_back(self)
        if isinstance(layer, Part):
            banks: Any = layer.module._modules[CHILD]
            del banks._modules[layer.part]
            if not banks._modules:
                del layer.module._modules[CHILD]
            return
        # A copied or unpickled layer has hooks but no handles: the tables are the only way.
        layer._forward_hooks.pop(HOOK, None)
        layer._forward_hooks_with_kwargs.pop(HOOK, None)
        delattr(layer, CHILD)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _let_compilers_see_hooks()  # an unpickled model was not attached to in this process

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # States of version 0.1 have no name of the adapter in their keys.
        for name in [name for name in state_dict if name.startswith(prefix)]:
            own = name.removeprefix(prefix)
            if "." not in own:
                state_dict[f"{prefix}{DEFAULT}.{own}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)


class TokenBank(LayerBank):
    """The trained rows of an embedding, which the embedding and all that share its weight compute with.

    Parameters
    ----------
    kind
        Of the embedding.
    sharing
        Modules that have the weight, the embedding among them, and what each calls it.
    """

    sharing: list[tuple[nn.Module, str]]

    def __init__(self, kind: Kind, sharing: list[tuple[nn.Module, str]]) -> None:
        super().__init__(kind)
        self.sharing = sharing

    @property
    def rows(self) -> dict[str, TrainedRows]:
        """The rows by the names of adapters."""
        return {name: module for name, module in self._modules.items() if isinstance(module, TrainedRows)}

    def install(self, layer: nn.Module, reader: nn.Module | None, view: View) -> None:
        """Become a child of the embedding, and hook the forwards of all that have its weight."""
        _let_compilers_see_hooks()
        layer.register_module(CHILD, self)
        self.hooked = is_known(layer)
        for module, name in self.sharing:
            if is_known(module):
                vars(module)[ROWS] = self
                module._forward_hooks[HOOK] = _use_rows
                # First, for the hooks of others are to change what comes of trained rows as they do the rest.
                module._forward_hooks.move_to_end(HOOK, last=False)  # type: ignore[attr-defined]
                module._forward_hooks_with_kwargs[HOOK] = True
            else:
                put(module, module, name, self, None, view)

    def uninstall(self, layer: nn.Module) -> None:
        """Leave all of them as they were before `install`."""
        take_back(self)
        for module, _ in self.sharing:
            if vars(module).pop(ROWS, None) is not None:
                module._forward_hooks.pop(HOOK, None)
                module._forward_hooks_with_kwargs.pop(HOOK, None)
        delattr(layer, CHILD)


def _use_rows(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    """Forward hook of a module that has the weight of an embedding: return its output with the trained rows."""
    bank: TokenBank = vars(layer)[ROWS]
    x = args[0] if args else kwargs["input"]
    for name in bank.computed:
        output = bank._modules[name](layer, x, output, overwrite=_is_ours_alone(layer, output))  # type: ignore[misc]
    return output


def _add_updates(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor | None:
    """Forward hook of a layer: return its output with the updates of its bank."""
    # That of the layer which is called: it may be a replica, with children of its own.
    bank: LayerBank = layer._modules[CHILD]  # type: ignore[assignment]
    # It stays on a merged layer rather than come and go: others hook in before and behind it.
    if bank.route is not None and not bank.off:
        return bank.route(layer, bank.kind, args[0] if args else kwargs[bank._input], output)
    if not bank.computed or bank.placed:
        return None
    x = args[0] if args else kwargs[bank._input]
    if not bank.kind.linear:
        for name in bank.computed:
            adapter: Any = bank._modules[name]
            if isinstance(bank.kind, Embedding) and x.numel() < adapter.d:
                z, E = adapter.products(x)  # of the rows that are asked for, and not of all of a vocabulary
                z = z.to(output.dtype)
            else:
                with without_autocast(output):  # it would round A B, which is rounded once, as M
                    M, E = adapter.products()
                z = bank.kind.project(layer, x, M.to(output.dtype))
            # Law 1: what overflows in z is finite, or infinity times C = 0 would be NaN.
            z = torch.where(z.isfinite(), z, torch.zeros_like(z))
            u = bank.kind.spread(layer, z, E.to(output.dtype))
            output = output + (bank.kind.looked_up(layer, x, u) if isinstance(bank.kind, Embedding) else u)
        return output
    if x.is_nested:  # the eval path of torch.nn.TransformerEncoder with a mask
        for name in bank.computed:
            nested: Any = bank._modules[name]
            M, E = (factor.to(output.dtype) for factor in nested.products())
            z = nn.functional.linear(x, M[: nested.d].t(), M[nested.d] if len(M) > nested.d else None)
            output = output + nn.functional.linear(z, E.t())
        return output
    overwrite = _is_ours_alone(layer, output)
    weight, trained = None, False
    if torch.is_grad_enabled():
        # A computed one (`torch.nn.utils.parametrize`) would be computed once more, and may be another then.
        weight = layer._parameters.get("weight")
        trained = weight is not None and weight.requires_grad
        weight = weight if overwrite and _is_linear_alone(layer, x, output) else None
    for name in bank.computed:
        adapter = bank._modules[name]
        output = adapter(output, x, weight=weight, overwrite=overwrite, input_kept=trained)
        weight = None
    return output


class OnLoan:
    """An attribute of a module for as long as there are adapters; `TorchBackend.remove` gives the former one back.

    Parameters
    ----------
    module, name
        Whose attribute it becomes.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        own = vars(module)
        # What the module itself has, not its class: one thing or nothing.
        former = own.get(name)
        self.former: tuple[Any, ...] = (former,) if name in own else ()
        if isinstance(former, OnLoan):
            self.former = former.former
        own[name] = self

    @staticmethod
    def give_back(module: nn.Module) -> None:
        """Take all of them off a module."""
        own = vars(module)
        for name, value in [*own.items()]:
            if isinstance(value, OnLoan):
                del own[name]
                if value.former:
                    (own[name],) = value.former


class Off(OnLoan):
    """An attribute that is false for as long as there are adapters."""

    def __bool__(self) -> bool:
        return False


class OffWithGradients(OnLoan):
    """An attribute that is false as long as gradients are recorded.

    By ``use_nested_tensor`` `torch.nn.TransformerEncoder` takes a path for layers that are not trained, on which
    there are no gradients of inputs. It looks at Parameters of its own alone, which are frozen.
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
                # By its name here, in a state from before its block was wrapped, and in one of version 0.1.
                for prefix in (f"{path}.{name}.", f"{plain(path)}.{name}.", f"{path}."):
                    adapter.check_fits_weight(state_dict, prefix)


def without_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state of adapters that says that the weights of their layers are no part of it."""
    labels = re.compile(rf"(.*\.)?{CHILD}\.([^.]+\.)?[^.]+\.labels")  # of a layer, or of a part of a module
    marks = {name.removesuffix("labels") + HELD for name in state_dict if labels.fullmatch(name)}
    return {**state_dict, **{name: torch.zeros(0, dtype=torch.bool) for name in marks}}


def _let_compilers_see_hooks() -> None:
    """Have `torch.compile` look at the hooks of a module before it reuses what it has compiled.

    It does not by default, and takes the graph of a frozen layer without hooks for a layer that is adapted: of the
    same model compiled before, or of another one of the same structure. Graphs made so far are thrown away, once.
    """
    from torch._dynamo import config

    if config.skip_nnmodule_hook_guards:
        config.skip_nnmodule_hook_guards = False
        torch.compiler.reset()


def _is_ours_alone(layer: nn.Module, output: Tensor) -> bool:
    """Whether nobody but our hook has seen the output of the layer, so that it may be written over.

    A forward of the user's own may keep what it returns, an earlier hook may, and so may a mode: that of selective
    activation checkpointing hands it out once more. A compiler sees to it itself.
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
    """Whether the gradient of x through this layer of a frozen weight is ``dy weight``, and no other is wanted."""
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
