"""The adapter of one `torch.nn.Linear`: a small child module on the user's own layer.

The layer keeps its class, its weight and its state-dict keys; a forward hook adds the update to its
output. PyTorch's fused inference paths look for hooks and step aside, where a wrapper module with a
``weight`` of its own would be bypassed without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from adamss.core import Factors, contract, expand, restrict
from adamss_torch.absent import present
from adamss_torch.compaction import expect_misfits, resize
from adamss_torch.functional import MULTIPLE, Constants, Layout, Plan, make_layout, update

__all__ = ["BUFFERS", "CHILD", "Adapter", "without_weights"]

CHILD = "adamss"
"""Name of the adapter among the children of its layer."""

HOOK = -1
"""Key of the adapter's hook among the forward hooks of its layer."""

HELD = "in_weight"
"""Key in a state of the mask of the subspaces whose update the weight holds, where it holds any.

Of length 0 in a state without the weights.
"""

PERSISTENT = ("A", "B", "C", "labels", "ranks", "active", "owned", "rest_B", "rest_C")
"""What a state has of an adapter, where there is one of the name."""

DERIVED = (
    "rows",
    "groups",
    "slots",
    "mask",
    "columns",
    "owners_B",
    "owners_C",
    "used_B",
    "used_C",
    "more_M",
    "more_E",
)
"""Buffers that follow from the others: not stored, made anew whenever those change."""

BUFFERS = ("A", "labels", "ranks", "active", "owned", "rest_B", "rest_C", "folded", *DERIVED)
"""All that an adapter may have; some are None most of the time."""


class Adapter(nn.Module):
    """``y = base(x) + (x M^T) E``, with ``M = B A^T`` and E the expansion of C.

    Its subspaces lie in three places. Those in the Parameters B and C are all of them, until `compact` moves the
    frozen ones to buffers, as constants; `fold` leaves out of the sum those that the weight of the layer holds.

    Parameters
    ----------
    factors
        Factors of the layer, canonical, on its device.
    d
        Inputs of the layer: A has one row more where the bias is adapted too.

    Attributes
    ----------
    B, C
        Trained Parameters, (q', P) and (r, n'): the rows of B and columns of C of the subspaces `owned`.
    A, labels, ranks, active
        Buffers, as in `adamss.core.Factors`.
    owned
        Buffer, (K,) booleans: whose B and C are in the Parameters; None for all.
    rest_B, rest_C
        Buffers, B and C of the other subspaces; None where there are none.
    folded
        (K,) booleans: whose update the weight of the layer holds; None for none.
    revive
        Whether frozen subspaces get gradients all the same, because they may return.
    loads, forms
        How often a state was loaded into it, and how often that changed which subspaces are in the Parameters.
    enabled
        Whether the hook adds the update.
    order
        In which order its products are taken, one of `adamss.core.ORDERS`; None for the one that costs less.
        With bases of their own, or after `compact`, they are contracted all the same.
    merged
        Whether the weights of the layer hold the whole update already.
    base
        While merged or folded: the tensors that the layer had before, by name; None if they were dropped.
    """

    A: Tensor
    labels: Tensor
    ranks: Tensor
    active: Tensor
    owned: Tensor | None
    rest_B: Tensor | None
    rest_C: Tensor | None
    folded: Tensor | None
    rows: Tensor
    groups: Tensor
    slots: Tensor
    mask: Tensor | None
    columns: Tensor | None
    owners_B: Tensor
    owners_C: Tensor
    used_B: Tensor | None
    used_C: Tensor | None
    more_M: Tensor | None
    more_E: Tensor | None

    def __init__(self, factors: Factors, d: int) -> None:
        super().__init__()
        self.d = d
        self.enabled = True
        self.order: str | None = None
        self.merged = False
        self.revive = False
        self.loads = self.forms = 0
        self.base: dict[str, Tensor] | None = None
        self.B = nn.Parameter(factors.B.detach().t().clone(memory_format=torch.contiguous_format))
        self.C = nn.Parameter(factors.C.detach().clone(memory_format=torch.contiguous_format))
        for name in ("A", "labels", "ranks", "active"):
            # In one layout whatever they come from: products of another may round otherwise, and a resumed training
            # is to give the same bits.
            self.register_buffer(name, _alone(getattr(factors, name).detach().contiguous()))
        for name in ("owned", "rest_B", "rest_C"):
            self.register_buffer(name, None)
        for name in ("folded", *DERIVED):
            self.register_buffer(name, None, persistent=False)
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

        The other arguments are as for `adamss_torch.functional.Plan`.
        """
        # Buffers and Parameters are looked up once each: `Module.__getattr__` takes as long as a small product.
        buffers, parameters = self._buffers, self._parameters
        A: Tensor = buffers["A"]  # type: ignore[assignment]
        B: Tensor = parameters["B"]  # type: ignore[assignment]
        C: Tensor = parameters["C"]  # type: ignore[assignment]
        if B.dtype != A.dtype:
            # FSDP2's mixed precision hands them out in half precision; their product is to be rounded once, whole.
            B, C = B.to(A.dtype), C.to(A.dtype)
        constants = None
        if self.altered:
            B = B if self.used_B is None else B.index_select(0, self.used_B)
            C = C if self.used_C is None else C.index_select(1, self.used_C)
            if self.more_M is not None and self.more_E is not None:
                constants = Constants(self.more_M, self.more_E)
            elif B.shape[0] == 0:
                return base
        # Not in a loop over the names, which takes longer than the rest of this method.
        rows, groups, slots, mask = buffers["rows"], buffers["groups"], buffers["slots"], buffers["mask"]
        layout = Layout(rows, groups, slots, mask, buffers["columns"], self.padded)  # type: ignore[arg-type]
        active = None if self.revive else buffers["active"]
        plan = Plan(A, active, layout, constants, self.order, weight, overwrite, input_kept)
        return update(base, x, B, C, plan)

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
        """Return the factors, canonical, of all subspaces wherever they lie; views where they can be."""
        B, C = present(self, "B").detach(), present(self, "C").detach()
        if self.owned is not None and self.rest_B is not None and self.rest_C is not None:
            rows, columns = zip(self._places(self.owned), self._places(~self.owned), strict=True)
            B = _put_together((B, self.rest_B), rows, 0)
            C = _put_together((C, self.rest_C), columns, 1)
        return Factors(self.A, B.t(), C, self.labels, self.ranks, self.active)

    def trained_elements(self) -> tuple[Tensor, Tensor]:
        """Return which rows of B, (q', 1), and which columns of C, (1, n'), belong to active subspaces; booleans."""
        return self.active[self.owners_B][:, None], self.active[self.owners_C][None, :]

    # ---- changes of form ------------------------------------------------------------------------------

    @torch.no_grad()
    def compact(self, owned: Tensor) -> tuple[Tensor, Tensor]:
        """Keep in B and C these subspaces, (K,) booleans, and make constants of the rest.

        The Parameters stay the objects that they are, with less in them and in their gradients.

        Returns
        -------
        tuple of Tensor
            Which rows of B, and which columns of C, are left; indices.
        """
        factors, (rows, columns) = self.factors(), self._places(~owned)
        rest_B, rest_C = factors.B.t().index_select(0, rows), factors.C.index_select(1, columns)
        kept_B, kept_C = owned[self.owners_B].nonzero()[:, 0], owned[self.owners_C].nonzero()[:, 0]
        resize(self.B, 0, kept_B)
        resize(self.C, 1, kept_C)
        self.owned = owned.clone()
        self.rest_B, self.rest_C = rest_B, rest_C
        self._derive()
        return kept_B, kept_C

    @torch.no_grad()
    def _take_form(self, owned: Tensor | None) -> None:
        """Become compact as a state is that is about to be loaded, or whole; its values are those of before."""
        if _equal(owned, self.owned):
            return
        self.forms += 1
        # Whatever optimiser there is has not been told, as `BudgetController.compact` tells its own.
        expect_misfits(self.B, self.C)
        if self.owned is not None:
            whole = self.factors()
            for parameter in (self.B, self.C):
                if not parameter.numel():
                    parameter.requires_grad_(True)  # `resize` took it, as there was nothing to train
            self.B.data, self.C.data = whole.B.t().contiguous(), whole.C.contiguous()
            self.B.grad = self.C.grad = None
            self.owned = self.rest_B = self.rest_C = None
            self._derive()
        if owned is not None:
            self.compact(owned.to(self.active))

    def fold(self, folded: Tensor | None) -> None:
        """Leave these subspaces, (K,) booleans, out of the update, or none."""
        self.folded = folded
        self._derive()

    def _derive(self) -> None:
        """Set the derived buffers from the labels, the ranks, and where the subspaces lie."""
        r, q = self.C.shape[0], int(self.ranks.sum())
        layout = make_layout(self.labels, self.ranks, r, q, dtype=self.C.dtype)
        groups, labels = layout.groups, self.labels.to(torch.int64)
        self.used_B = self.used_C = self.more_M = self.more_E = None
        owned = torch.ones_like(self.active) if self.owned is None else self.owned
        summed = torch.ones_like(self.active) if self.folded is None else ~self.folded
        self.altered = self.owned is not None or self.folded is not None
        if not self.altered:
            self.owners_B, self.owners_C = groups, labels
        else:
            layout = make_layout(self.labels, self.ranks, r, q, owned & summed, dtype=self.C.dtype)
            self.owners_B, self.owners_C = groups[owned[groups]], labels[owned[labels]]
            if bool((owned & ~summed).any()):
                self.used_B = summed[self.owners_B].nonzero()[:, 0]
                self.used_C = summed[self.owners_C].nonzero()[:, 0]
            if bool((~owned & summed).any()):
                part = restrict(self.factors(), ~owned & summed)
                E = expand(part.factors)
                E = E.new_zeros(E.shape[0], labels.numel()).index_copy(1, part.columns, E)
                # Rows of zeros, up to a width of which products take no longer.
                missing = -(layout.groups.numel() + E.shape[0]) % MULTIPLE
                self.more_M = F.pad(contract(part.factors).t().contiguous(), (0, 0, 0, missing))
                self.more_E = F.pad(E, (0, 0, 0, missing))
        self.rows, self.groups, self.slots, self.mask, self.columns, self.padded = layout

    def places(self, name: str) -> tuple[Tensor, torch.Size]:
        """Return where in the whole B (q, P), or C (r, n), each entry of the Parameter stands, and that shape."""
        rows, columns = self._places(torch.ones_like(self.active) if self.owned is None else self.owned)
        shape = self.shapes()[name]
        whole = torch.arange(shape.numel(), device=rows.device).view(shape)
        return (whole[rows] if name == "B" else whole[:, columns]), shape

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shapes of the whole B (q, P) and C (r, n), by name."""
        q, n = sum(self.ranks.tolist()), self.labels.numel()
        return {"B": torch.Size((q, self.A.shape[2])), "C": torch.Size((self.C.shape[0], n))}

    def _places(self, subspaces: Tensor) -> tuple[Tensor, Tensor]:
        """Return which rows of the whole B, and which columns of the whole C, belong to some subspaces; indices."""
        groups = make_layout(self.labels, self.ranks, 1, int(self.ranks.sum()), dtype=self.C.dtype).groups
        return subspaces[groups].nonzero()[:, 0], subspaces[self.labels.to(torch.int64)].nonzero()[:, 0]

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
        if given and f"{prefix}labels" in state_dict:
            # Trained numbers alone, as an average of them is, say nothing of the form.
            self._take_form(state_dict.get(f"{prefix}owned"))
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
        rows, columns = self._places(ours)
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
        owned = given.get("owned") if "labels" in given else self.owned
        labels, ranks = (given.get(name, getattr(self, name)) for name in ("labels", "ranks"))
        if any(tensor is not None and tensor.is_meta for tensor in (self.labels, labels, ranks, owned)):
            return []
        expected = {name: tuple(getattr(self, name).shape) for name in ("A", "labels", "ranks", "active")}
        expected["owned"] = expected["active"]
        if owned is None or tuple(owned.shape) == expected["owned"]:
            # In the form of the state.
            everything = torch.ones_like(self.active)
            rows, columns = map(len, self._places(everything if owned is None else owned.to(everything)))
            (q, P), (r, n) = self.shapes().values()
            expected |= {
                "B": (rows, P),
                "C": (r, columns),
                "rest_B": (q - rows, P),
                "rest_C": (r, n - columns),
            }
        misfits = [
            f"size mismatch for {prefix}{name}: the state has shape {tuple(tensor.shape)}, this model "
            f"{expected[name]}."
            for name, tensor in given.items()
            if name in expected and tuple(tensor.shape) != expected[name]
        ]
        inside = int(labels.min()) >= 0 and int(labels.max()) < len(ranks) and int(ranks.min()) >= 0
        if misfits or (inside and int(ranks.sum()) == int(self.ranks.sum())):
            return misfits
        return [f"{prefix}labels, {prefix}ranks: they are none of subspaces of this layer."]

    def _factors_in(self, state_dict: Mapping[str, Any], prefix: str) -> Factors | None:
        """Return the factors in a state, whole; None if they are not there or for a layer of another shape."""
        present = [name for name in PERSISTENT if f"{prefix}{name}" in state_dict]
        given: dict[str, Tensor] = {n: state_dict[f"{prefix}{n}"].to(self.A.device) for n in present}
        try:
            B, C = given["B"], given["C"]
            if "owned" in given:
                rows, columns = zip(self._places(given["owned"]), self._places(~given["owned"]), strict=True)
                B = _put_together((B, given["rest_B"]), rows, 0)
                C = _put_together((C, given["rest_C"]), columns, 1)
            found = Factors(given["A"], B.t(), C, given["labels"], given["ranks"], given["active"])
        except (KeyError, IndexError, RuntimeError):
            return None
        return found if {"B": B.shape, "C": C.shape} == self.shapes() else None


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


def _put_together(parts: tuple[Tensor, Tensor], places: tuple[Tensor, Tensor], axis: int) -> Tensor:
    """Return two parts in one tensor, each entry at its place."""
    order = torch.cat(places).argsort()
    return torch.cat(parts, dim=axis).index_select(axis, order)


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
