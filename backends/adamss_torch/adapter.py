"""One adapter of one layer: its factors, as Parameters and buffers, and what they add to the layer's output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adamss.core import Factors
from adamss.errors import StateError
from adamss_torch.kernel import (
    Layout,
    Plan,
    block_places,
    block_products,
    is_transformed,
    make_layout,
    trained_elements,
    update,
)
from adamss_torch.stores import present

__all__ = ["HELD", "STRUCTURE", "Adapter"]

HELD = "in_weight"
"""Key in a state of the mask of the subspaces whose update the weight holds, where it holds any.

Of length 0 in a state without the weights.
"""

PERSISTENT = ("A", "B", "C", "labels", "ranks", "active")
"""What a state has of an adapter, where there is one of the name."""

STRUCTURE = ("labels", "ranks", "active")


class Adapter(nn.Module):
    """``y = base(x) + (x M^T) E``, with ``M = B A^T`` and E the expansion of C.

    Each subspace is trained, frozen, or held by the weight of the layer, and then left out of the sum.

    Parameters
    ----------
    factors
        Factors of the layer, canonical, on its device.
    d
        Inputs of the layer: A has one row more where the bias is adapted too.
    blocks
        How many matrices lie one after the other in the columns of the weight, as those of experts.

    Attributes
    ----------
    B, C
        Trained Parameters, (q, P) and (r, n).
    A
        Buffer, as in `adamss.core.Factors`.
    labels, ranks, active
        As in `adamss.core.Factors`, on the device of A. They are part of a state but no buffers, and neither are
        `held`, `kept` and `layout`: other libraries average and broadcast buffers as if all of them were numbers.
    held
        (K,) booleans on the CPU: whose update the weight of the layer holds; None for none.
    kept
        What frozen elements of B and C are, whatever an optimiser has written to these, in the shapes of both; None
        where nobody holds them (`adamss_torch.frozen`).
    keeper
        Who does.
    layout
        Where B and C stand, as it follows from labels, ranks and `held`.
    revive
        Whether frozen subspaces get gradients all the same, because they may return.
    loads
        How often a state was loaded into it.
    followed
        Whether a controller keeps, or kept, it to a schedule.
    controlled
        Whether one does now.
    scale
        The weight that it is active with.
    order
        In which order its products are taken, one of `adamss.core.cost.ORDERS`; None for the one that costs less.
        With bases of their own the factors come first all the same.
    """

    A: Tensor
    labels: Tensor
    ranks: Tensor
    active: Tensor
    layout: Layout

    def __init__(self, factors: Factors, d: int, blocks: int = 1) -> None:
        super().__init__()
        self.d, self.blocks = d, blocks
        self.order: str | None = None
        self.scale = 1.0
        self.revive = False
        self.loads = 0
        self.followed = self.controlled = False
        self.held: Tensor | None = None
        self.kept: tuple[Tensor, Tensor] | None = None
        self.keeper: object = None
        self._places: Tensor | None = None
        self._seen: tuple[Tensor | None, int, tuple[Tensor, Tensor] | None] = (None, 0, None)
        self.B = nn.Parameter(factors.B.detach().t().clone(memory_format=torch.contiguous_format))
        self.C = nn.Parameter(factors.C.detach().clone(memory_format=torch.contiguous_format))
        # In one layout whatever it comes from: products of another may round otherwise, and a resumed training is to
        # give the same bits.
        self.register_buffer("A", _alone(factors.A.detach().contiguous()))
        for name in STRUCTURE:
            setattr(self, name, _alone(getattr(factors, name).detach().contiguous()))
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
        parameters = self._parameters
        A: Tensor = self._buffers["A"]  # type: ignore[assignment]
        B: Tensor = parameters["B"]  # type: ignore[assignment]
        C: Tensor = parameters["C"]  # type: ignore[assignment]
        if B.dtype != A.dtype:
            # FSDP2's mixed precision hands them out in half precision; their product is to be rounded once, whole.
            B, C = B.to(A.dtype), C.to(A.dtype)
        layout = self.layout
        if layout.rows.device != A.device:
            # accelerate and FSDP2 move buffers, and know of no attributes.
            layout = self._derive()
        if not self.revive:
            B, C = self._frozen_in(B, C)
        if self.scale != 1:
            C = C * self.scale
        return update(base, x, B, C, Plan(A, layout, self.order, weight, overwrite, input_kept))

    def products(self, rows: Tensor | None = None, *, scaled: bool = True) -> tuple[Tensor, Tensor]:
        """Return M: (d, q') and E: (q', n) of a weight that is one matrix; see `block_products`.

        With `rows`, (...) int64, M is (..., q'), of these rows alone.
        """
        M, E = self.block_products(None if rows is None else rows.reshape(-1), scaled=scaled)
        return (M[0] if rows is None else M[0].reshape(*rows.shape, M.shape[-1])), E[0]

    def block_products(self, rows: Tensor | None = None, *, scaled: bool = True) -> tuple[Tensor, Tensor]:
        """Return M: (L, d, q') and E: (L, q', n / L), of each of the L blocks; of M these rows, (N,), alone.

        E has the weight that the adapter is active with, if it is scaled. Gradients reach the active subspaces
        through them, and no others.
        """
        B, C = (self.B, self.C) if self.revive else self._frozen_in(self.B, self.C)
        if self.layout.rows.device != self.A.device:
            self._derive()
        places = self._places
        if places is None:
            with torch.inference_mode(False):  # or no backward could keep it
                places = block_places(self.labels, C.shape[0], self.ranks.numel(), self.blocks)
            if not is_transformed():  # what is made within a transformation is of no use outside
                self._places = places
        C = C * self.scale if scaled and self.scale != 1 else C
        A = self.A if rows is None else self.A[:, rows]
        return block_products(A, B, C, self.layout, places, self.ranks.numel())

    def factors(self) -> Factors:
        """Return the factors, canonical, of all subspaces; views where they can be."""
        B, C = present(self, "B").detach(), present(self, "C").detach()
        if self.kept is not None:
            B, C = self._frozen_in(B, C)
        if self.layout.rows.device != self.A.device and not self.A.is_meta:
            self._derive()
        return Factors(self.A, B.t(), C, self.labels, self.ranks, self.active)

    def trained_elements(self) -> tuple[Tensor, Tensor]:
        """Return which rows of B, (q, 1), and which columns of C, (1, n), belong to active subspaces; booleans."""
        return trained_elements(self.active, self.labels, self._groups)

    def _frozen_in(self, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        """Return B and C with the values that frozen elements have, which get no gradients."""
        trained = self._trained_if_not_all()
        if trained is None:
            return B, C
        kept = (B.detach(), C.detach()) if self.kept is None else self.kept
        return torch.where(trained[0], B, kept[0]), torch.where(trained[1], C, kept[1])

    def look(self) -> tuple[Tensor, Tensor] | None:
        """Take over the mask; what it freezes is kept as it is now. Return `trained_elements`, None if all are."""
        active, (seen, version, trained) = self.active, self._seen
        if seen is not active or version != active._version:
            if self.kept is not None:
                now = self.B.detach(), self.C.detach()
                for kept, own, mask in zip(self.kept, now, trained or (None, None), strict=True):
                    kept.copy_(own if mask is None else torch.where(mask, own, kept))
            trained = None if bool(active.all()) else self.trained_elements()
            self._seen = active, active._version, trained
        return trained

    def _trained_if_not_all(self) -> tuple[Tensor, Tensor] | None:
        """Return `trained_elements`, or None if all elements are.

        A compiled graph must look anew at every call, since masks change under it, and so must what an accelerator
        captures; what is made within a transformation is of no use outside.
        """
        if is_transformed() or self.active.is_inference():
            return self.trained_elements()
        trained = self.look()
        return trained if trained is not None or self.active.device.type == "cpu" else self.trained_elements()

    def hold(self, held: Tensor | None) -> None:
        """Leave these subspaces, (K,) booleans on the CPU, out of the update, or none."""
        self.held = held
        self._derive()

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no controller that would hold its frozen elements, or let a subspace return.
        drifted = {name: nn.Parameter(tensor) for name, tensor in self._drifted().items()}
        alone = {
            "revive": False,
            "kept": None,
            "keeper": None,
            "controlled": False,
            "_parameters": {**self._parameters, **drifted},
        }
        return {**self.__dict__, **alone}

    def _drifted(self) -> dict[str, Tensor]:
        """Return what B and C are, by name, where an optimiser has moved frozen elements of the Parameters."""
        if self.kept is None:
            return {}
        now = self.B.detach(), self.C.detach()
        held = zip("BC", now, self._frozen_in(*now), strict=True)
        return {name: true for name, mine, true in held if true is not mine and not torch.equal(true, mine)}

    def _derive(self) -> Layout:
        """Make the layout anew, which follows from labels, ranks, and what the weight holds; all of it beside A."""
        if not self.A.is_meta:
            for name in STRUCTURE:
                setattr(self, name, getattr(self, name).to(self.A.device))
            self.kept = None if self.kept is None else tuple(each.to(self.A.device) for each in self.kept)  # type: ignore[assignment]
        held = None if self.held is None else self.held.to(self.labels.device)
        (q, _), (r, _) = self.B.shape, self.C.shape
        self._groups = torch.repeat_interleave(self.ranks.to(torch.int64), output_size=q)
        with torch.inference_mode(False):  # or no backward could keep it
            self.layout = make_layout(
                self.labels, self.ranks, r, q, held, dtype=self.C.dtype, masked=self.blocks == 1
            )
        self._places = None
        return self.layout

    def _apply(self, fn: Any, recurse: bool = True) -> Adapter:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.kept = None if self.kept is None else tuple(map(fn, self.kept))
        # labels, ranks and mask keep their values whatever happens to A (`to_empty`, the meta device).
        self._derive()
        return self

    def extra_repr(self) -> str:
        """Return the sizes, for ``print(model)``."""
        G, d, P = self.A.shape
        n, K = self.labels.numel(), self.ranks.numel()
        return f"d={d}, n={n}, R={P}, K={K}, q={int(self.ranks.sum())}, bases={G}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in STRUCTURE:
            # A copy: those who average a state write into its tensors.
            destination[f"{prefix}{name}"] = getattr(self, name).clone()
        if self.kept is not None and not keep_vars:
            destination |= {f"{prefix}{name}": tensor for name, tensor in self._drifted().items()}
        if self.held is not None:
            # Who loads it must know, or counts the update twice.
            destination[f"{prefix}{HELD}"] = self.held.to(self.labels.device)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self.check_fits_weight(state_dict, prefix)
        for name in STRUCTURE:
            given = state_dict.get(f"{prefix}{name}")
            if given is not None and given.is_floating_point():
                # An average of equal integers, taken as if they were weights, is that integer, up to rounding.
                state_dict[f"{prefix}{name}"] = given.round().to(getattr(self, name).dtype)
        misfits = self._misfits(state_dict, prefix)
        if misfits:
            # Not loaded either: B and C of one grouping and labels of another would compute something else.
            error_msgs.extend(misfits)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for name in (*STRUCTURE, HELD):
            if f"{prefix}{name}" in unexpected_keys:
                unexpected_keys.remove(f"{prefix}{name}")
        for name in STRUCTURE:
            if f"{prefix}{name}" in state_dict:
                own = getattr(self, name)
                setattr(
                    self, name, state_dict[f"{prefix}{name}"].detach().to(own.device, own.dtype, copy=True)
                )
            elif strict:
                missing_keys.append(f"{prefix}{name}")
        if self.kept is not None:
            for kept, parameter in zip(self.kept, (self.B, self.C), strict=True):
                kept.copy_(parameter.detach())
        self.loads += 1
        self._derive()

    def check_fits_weight(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Check that the factors in a state, if it has any, go with the weight that the layer has once it is loaded.

        Raises
        ------
        StateError
            If not: to go on would be to count the update twice, or not at all.
        """
        if f"{prefix}B" in state_dict and not self._fits_weight(state_dict, prefix):
            raise StateError(
                f"{prefix.removesuffix('.')}: the weight of the layer holds other subspaces in the state than in "
                "this model (one of them was merged or consolidated). Bring the model into the same form first, or "
                "take adamss.save and adamss.load, which take any."
            )

    def _fits_weight(self, state_dict: Mapping[str, Any], prefix: str) -> bool:
        """Whether the factors in a state go with the weight that the layer has when it is loaded."""
        held, ours = state_dict.get(f"{prefix}{HELD}"), self.held
        if held is None or held.numel():
            return _equal(held, ours)
        if ours is None:
            return True
        # Factors alone: the weight goes on holding what it does, which must be what they say.
        here, there = self.factors(), self._factors_in(state_dict, prefix)
        if there is None or not all(map(_equal, (there.labels, there.ranks), (here.labels, here.ranks))):
            return False
        ours = ours.to(self.labels.device)
        rows = ours[self._groups]
        columns = ours[self.labels.to(torch.int64)]
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


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(a.to(b), b)


def _alone(tensor: Tensor) -> Tensor:
    """Return a tensor with memory of its own: a part of others keeps them all, and safetensors refuses to save it."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
