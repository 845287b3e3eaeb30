"""The adapter of one `torch.nn.Linear`: a small child module on the user's own layer.

The layer keeps its class, its weight and its state-dict keys; a forward hook adds the update to its
output. PyTorch's fused inference paths look for hooks and step aside, where a wrapper module with a
``weight`` of its own would be bypassed without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from adamss.core import Factors
from adamss.errors import StateError
from adamss_torch.absent import present
from adamss_torch.kernel import Layout, Plan, make_layout, update

__all__ = ["BUFFERS", "CHILD", "Adapter", "OnLoan", "refuse_compacted", "without_weights"]

CHILD = "adamss"
"""Name of the adapter among the children of its layer."""

HOOK = -1
"""Key of the adapter's hook among the forward hooks of its layer."""

HELD = "in_weight"
"""Key in a state of the mask of the subspaces whose update the weight holds, where it holds any.

Of length 0 in a state without the weights.
"""

PERSISTENT = ("A", "B", "C", "labels", "ranks", "active")
"""What a state has of an adapter, where there is one of the name."""

BUFFERS = ("A", "labels", "ranks", "active", "folded")
"""All that an adapter may have."""


class Adapter(nn.Module):
    """``y = base(x) + (x M^T) E``, with ``M = B A^T`` and E the expansion of C.

    Its subspaces are trained, frozen, or folded into the weight of the layer, which `fold` leaves out of the sum.

    Parameters
    ----------
    factors
        Factors of the layer, canonical, on its device.
    d
        Inputs of the layer: A has one row more where the bias is adapted too.

    Attributes
    ----------
    B, C
        Trained Parameters, (q, P) and (r, n).
    A, labels, ranks, active
        Buffers, as in `adamss.core.Factors`.
    folded
        (K,) booleans: whose update the weight of the layer holds; None for none.
    layout
        Where B and C stand, as it follows from labels, ranks and `folded`; no buffer, since other libraries store,
        send and average these.
    revive
        Whether frozen subspaces get gradients all the same, because they may return.
    loads
        How often a state was loaded into it.
    enabled
        Whether the hook adds the update.
    order
        In which order its products are taken, one of `adamss.core.ORDERS`; None for the one that costs less.
        With bases of their own the factors come first all the same.
    merged
        Whether the weights of the layer hold the whole update already.
    base
        While merged or folded: the tensors that the layer had before, by name; None if they were dropped.
    """

    A: Tensor
    labels: Tensor
    ranks: Tensor
    active: Tensor
    folded: Tensor | None
    layout: Layout

    def __init__(self, factors: Factors, d: int) -> None:
        super().__init__()
        self.d = d
        self.enabled = True
        self.order: str | None = None
        self.merged = False
        self.revive = False
        self.loads = 0
        self.base: dict[str, Tensor] | None = None
        self.B = nn.Parameter(factors.B.detach().t().clone(memory_format=torch.contiguous_format))
        self.C = nn.Parameter(factors.C.detach().clone(memory_format=torch.contiguous_format))
        for name in ("A", "labels", "ranks", "active"):
            # In one layout whatever they come from: products of another may round otherwise, and a resumed training
            # is to give the same bits.
            self.register_buffer(name, _alone(getattr(factors, name).detach().contiguous()))
        self.register_buffer("folded", None, persistent=False)
        self._derive()

    def forward(
        self,
        base: Tensor,
        x: Tensor,
        *,
        weight: Tensor | None = None,
        overwrite: bool = False,
        input_kept: bool = False,
    ) -> Tensor:
        """Return the output of the layer: the frozen product `base` (..., n) and the update of x (..., d).

        The other arguments are as for `adamss_torch.kernel.Plan`.
        """
        # Buffers and Parameters are looked up once each: `Module.__getattr__` takes as long as a small product.
        buffers, parameters = self._buffers, self._parameters
        A: Tensor = buffers["A"]  # type: ignore[assignment]
        B: Tensor = parameters["B"]  # type: ignore[assignment]
        C: Tensor = parameters["C"]  # type: ignore[assignment]
        if B.dtype != A.dtype:
            # FSDP2's mixed precision hands them out in half precision; their product is to be rounded once, whole.
            B, C = B.to(A.dtype), C.to(A.dtype)
        layout = self.layout
        if layout.rows.device != A.device:
            # accelerate and FSDP2 move buffers, and know of no attributes.
            layout = self._derive()
        active = None if self.revive else buffers["active"]
        return update(base, x, B, C, Plan(A, active, layout, self.order, weight, overwrite, input_kept))

    def hook(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        """Forward hook of the layer."""
        # It stays on a merged layer rather than come and go: others hook in before and behind it.
        if self.merged or not self.enabled:
            return None
        x = args[0] if args else kwargs["input"]
        overwrite = _is_ours_alone(layer, output)
        weight, trained = None, False
        if torch.is_grad_enabled():
            # A computed one (`torch.nn.utils.parametrize`) would be computed once more, and may be another then.
            weight = layer._parameters.get("weight")
            trained = weight is not None and weight.requires_grad
            weight = weight if overwrite and _is_linear_alone(layer, x, output) else None
        result: Tensor = self(output, x, weight=weight, overwrite=overwrite, input_kept=trained)
        return result

    def factors(self) -> Factors:
        """Return the factors, canonical, of all subspaces; views where they can be."""
        B, C = present(self, "B").detach(), present(self, "C").detach()
        return Factors(self.A, B.t(), C, self.labels, self.ranks, self.active)

    def trained_elements(self) -> tuple[Tensor, Tensor]:
        """Return which rows of B, (q, 1), and which columns of C, (1, n), belong to active subspaces; booleans."""
        return self.active[self._groups()][:, None], self.active[self.labels.to(torch.int64)][None, :]

    def _groups(self) -> Tensor:
        """Return the subspace of each row of B, (q,) int64."""
        return torch.repeat_interleave(self.ranks.to(torch.int64))

    def fold(self, folded: Tensor | None) -> None:
        """Leave these subspaces, (K,) booleans, out of the update, or none."""
        self.folded = folded
        self._derive()

    def _derive(self) -> Layout:
        """Make the layout anew, which follows from labels, ranks, and what is folded."""
        (q, _), (r, _) = self.B.shape, self.C.shape
        with torch.inference_mode(False):  # or no backward could keep it
            self.layout = make_layout(self.labels, self.ranks, r, q, self.folded, dtype=self.C.dtype)
        return self.layout

    def _apply(self, fn: Any, recurse: bool = True) -> Adapter:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Not made anew: the labels may have no values now (`to_empty`, the meta device).
        parts = {name: fn(part) for name, part in self.layout._asdict().items() if isinstance(part, Tensor)}
        self.layout = self.layout._replace(**parts)
        return self

    # ---- the layer ------------------------------------------------------------------------------------

    def install(self, layer: nn.Module) -> None:
        """Become a child of the layer, and hook its forward."""
        _let_compilers_see_hooks()
        layer.register_module(CHILD, self)
        # As `register_forward_hook` does, but for the key: PyTorch counts its own from zero in each process, and the
        # hook of an unpickled model is not to be displaced by the first that is registered there.
        layer._forward_hooks[HOOK] = self.hook
        layer._forward_hooks_with_kwargs[HOOK] = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _let_compilers_see_hooks()  # an unpickled model was not attached to in this process

    def uninstall(self, layer: nn.Module) -> None:
        """Leave the layer as it was before `install`."""
        # A copied or unpickled layer has hooks but no handles: the tables are the only way.
        layer._forward_hooks.pop(HOOK, None)
        layer._forward_hooks_with_kwargs.pop(HOOK, None)
        delattr(layer, CHILD)

    def extra_repr(self) -> str:
        """Return the sizes, for ``print(model)``."""
        G, d, P = self.A.shape
        n, K = self.labels.numel(), self.ranks.numel()
        return f"d={d}, n={n}, R={P}, K={K}, q={int(self.ranks.sum())}, bases={G}"

    def in_weight(self) -> Tensor | None:
        """Return of which subspaces, (K,) booleans, the weight of the layer holds the update; None if of none."""
        return torch.ones_like(self.active) if self.merged else self.folded

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        held = self.in_weight()
        if held is not None:
            # Who loads it must know, or counts the update twice.
            destination[f"{prefix}{HELD}"] = held

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = f"{prefix}B" in state_dict
        if given and not self._fits_weight(state_dict, prefix):
            # Not loaded: who goes on in spite of the error would count the update twice.
            error_msgs.append(
                f"{prefix}: the weight of the layer holds other subspaces in the state than in this model (one of "
                "them was merged or consolidated). Bring the model into the same form first, or take adamss.save and "
                "adamss.load, which take any."
            )
            return
        misfits = self._misfits(state_dict, prefix)
        if misfits:
            # Not loaded either: B and C of one grouping and labels of another would compute something else.
            error_msgs.extend(misfits)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if f"{prefix}{HELD}" in unexpected_keys:
            unexpected_keys.remove(f"{prefix}{HELD}")
        self.loads += 1
        self._derive()

    def _fits_weight(self, state_dict: Mapping[str, Any], prefix: str) -> bool:
        """Whether the factors in a state go with the weight that the layer has when it is loaded."""
        held, ours = state_dict.get(f"{prefix}{HELD}"), self.in_weight()
        if held is None or held.numel():
            return _equal(held, ours)
        if ours is None:
            return True
        # Factors alone: the weight goes on holding what it does, which must be what they say.
        here, there = self.factors(), self._factors_in(state_dict, prefix)
        if there is None or not all(map(_equal, (there.labels, there.ranks), (here.labels, here.ranks))):
            return False
        rows, columns = ours[self._groups()], ours[self.labels.to(torch.int64)]
        return (
            _equal(there.A, here.A)
            and _equal(there.B[:, rows], here.B[:, rows])
            and _equal(there.C[:, columns], here.C[:, columns])
        )

    def _misfits(self, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
        """Return a message for each tensor of a state that does not fit; nothing of it is to be loaded then."""
        given: dict[str, Tensor] = {
            name: state_dict[f"{prefix}{name}"] for name in PERSISTENT if f"{prefix}{name}" in state_dict
        }
        labels, ranks = (given.get(name, getattr(self, name)) for name in ("labels", "ranks"))
        if any(tensor.is_meta for tensor in (self.labels, labels, ranks)):
            return []
        misfits = [
            f"size mismatch for {prefix}{name}: the state has shape {tuple(tensor.shape)}, this model "
            f"{tuple(getattr(self, name).shape)}."
            for name, tensor in given.items()
            if tensor.shape != getattr(self, name).shape
        ]
        inside = int(labels.min()) >= 0 and int(labels.max()) < len(ranks) and int(ranks.min()) >= 0
        if misfits or (inside and int(ranks.sum()) == self.B.shape[0]):
            return misfits
        return [f"{prefix}labels, {prefix}ranks: they are none of subspaces of this layer."]

    def _factors_in(self, state_dict: Mapping[str, Any], prefix: str) -> Factors | None:
        """Return the factors in a state; None if they are not all there, or for a layer of another shape."""
        given = {
            name: state_dict[f"{prefix}{name}"] for name in PERSISTENT if f"{prefix}{name}" in state_dict
        }
        if len(given) < len(PERSISTENT) or any(t.shape != getattr(self, n).shape for n, t in given.items()):
            return None
        A, B, C, *rest = (tensor.to(self.A.device) for tensor in given.values())
        return Factors(A, B.t(), C, *rest)


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


def refuse_compacted(module: nn.Module, state_dict: Mapping[str, Any], *_: Any) -> None:
    """Refuse a state in the compacted form of version 0.1, before any of it is loaded.

    Raises
    ------
    StateError
        If it is one; the message names a layer.
    """
    mark = f".{CHILD}.owned"
    found = [name.removesuffix(mark) for name in state_dict if f".{name}".endswith(mark)]
    if found:
        raise StateError(
            f"{found[0]}: the state is of an adapter that compact() had shrunk, a form that is gone; write it with "
            "adamss.save in the version that it comes from, and adamss.load that file"
        )


def without_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state of adapters that says that the weights of their layers are no part of it."""
    marks = {name.removesuffix("labels") + HELD for name in state_dict if name.endswith(f"{CHILD}.labels")}
    return {**state_dict, **{name: torch.zeros(0, dtype=torch.bool) for name in marks}}


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(a.to(b), b)


def _let_compilers_see_hooks() -> None:
    """Have `torch.compile` look at the hooks of a module before it reuses what it has compiled.

    It does not by default, and takes the graph of a frozen layer without hooks for a layer that is adapted: of the
    same model compiled before, or of another one of the same structure. Graphs made so far are thrown away, once.
    """
    from torch._dynamo import config

    if config.skip_nnmodule_hook_guards:
        config.skip_nnmodule_hook_guards = False
        torch.compiler.reset()


def _alone(tensor: Tensor) -> Tensor:
    """Return a tensor with memory of its own: a part of others keeps them all, and safetensors refuses to save it."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


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
        and torch._C._len_torch_function_stack() == 0
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
