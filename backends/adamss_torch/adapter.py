"""One adapter of one layer: its factors as Parameters and buffers, and the update that they add to the output."""

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
"""State-dict key of the mask of the subspaces whose update the weight holds.

The key is absent where the weight holds none. The mask has length 0 in a state that was written without the weights.
"""

PERSISTENT = ("A", "B", "C", "labels", "ranks", "active")
"""Names of the tensors of one adapter in a state dict."""

STRUCTURE = ("labels", "ranks", "active")


class Adapter(nn.Module):
    """The update of one layer: ``y = base(x) + (x M^T) E``, with ``M = B A^T`` and E the expansion of C.

    Each subspace is trained, frozen, or folded into the weight of the layer. A folded subspace is left out of M and
    E.

    Parameters
    ----------
    factors
        Initial factors of the layer, in canonical form and on the layer's device.
    d
        Number of inputs of the layer. A has d + 1 rows where the bias is adapted too.
    blocks
        Number of matrices that lie next to each other in the columns of the weight, such as those of experts.

    Attributes
    ----------
    B, C
        Trained Parameters, (q, P) and (r, n).
    A
        Buffer, as in `adamss.core.Factors`.
    labels, ranks, active
        As in `adamss.core.Factors`, on the device of A. They are part of the state dict but are not buffers, because
        other libraries average and broadcast buffers as if all of them were numbers. For the same reason `held`,
        `kept` and `layout` are not buffers either.
    held
        (K,) booleans on the CPU: the subspaces whose update the weight of the layer holds. None if it holds none.
    kept
        Values of B and C, whose frozen elements are in force whatever an optimiser has written to the Parameters.
        None where nothing holds frozen elements (`adamss_torch.frozen`).
    keeper
        The `FrozenElements` that set `kept`.
    layout
        Positions of B and C in M and E, derived from labels, ranks and `held`.
    revive
        Whether frozen subspaces get gradients too, because a budget may let them return.
    loads
        Number of states that were loaded into this adapter.
    followed
        Whether a controller keeps this adapter to a schedule, or did so for at least one step before it was removed.
    controlled
        Whether a controller keeps this adapter to a schedule now.
    scale
        Weight with which the adapter is active.
    order
        Order in which the products are taken, one of `adamss.core.cost.ORDERS`. None chooses the one that costs less.
        An adapter with a basis for each subspace always uses ``"factors_first"``.

    Examples
    --------
    >>> import adamss, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    >>> model = adamss.attach(model, adamss.AdamssConfig(targets=["0"], rank=4, subspaces=3))
    >>> model[0].adamss.default
    Adapter(d=8, n=6, R=4, K=3, q=3, bases=1)
    >>> model[0].adamss.default.B.shape, model[0].adamss.default.C.shape
    (torch.Size([3, 4]), torch.Size([1, 6]))
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
        # A, B and C are stored contiguously wherever they come from: products of operands with other strides may
        # round differently, and a resumed training must give the same bits.
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
        """Return the output of the layer, which is the frozen product `base` (..., n) plus the update for x (..., d).

        The other arguments are those of `adamss_torch.kernel.Plan`.
        """
        # Buffers and Parameters are looked up once each: `Module.__getattr__` takes as long as a small product.
        parameters = self._parameters
        A: Tensor = self._buffers["A"]  # type: ignore[assignment]
        B: Tensor = parameters["B"]  # type: ignore[assignment]
        C: Tensor = parameters["C"]  # type: ignore[assignment]
        if B.dtype != A.dtype:
            # FSDP2's mixed precision gathers B and C in half precision. They are cast back, so that their product is
            # computed in full precision and rounded once.
            B, C = B.to(A.dtype), C.to(A.dtype)
        layout = self.layout
        if layout.rows.device != A.device:
            # accelerate and FSDP2 move buffers but not plain attributes, so the layout may be on the former device.
            layout = self._derive()
        if not self.revive:
            B, C = self._frozen_in(B, C)
        if self.scale != 1:
            C = C * self.scale
        return update(base, x, B, C, Plan(A, layout, self.order, weight, overwrite, input_kept))

    def products(self, rows: Tensor | None = None, *, scaled: bool = True) -> tuple[Tensor, Tensor]:
        """Return M: (d, q') and E: (q', n) of a weight that is one matrix; see `block_products`.

        With `rows`, int64 indices of shape (...), M holds only these rows and has the shape (..., q').
        """
        M, E = self.block_products(None if rows is None else rows.reshape(-1), scaled=scaled)
        return (M[0] if rows is None else M[0].reshape(*rows.shape, M.shape[-1])), E[0]

    def block_products(self, rows: Tensor | None = None, *, scaled: bool = True) -> tuple[Tensor, Tensor]:
        """Return M: (L, d, q') and E: (L, q', n / L) of the L blocks.

        `rows`, int64 indices of shape (N,), selects rows of M. E includes the weight with which the adapter is
        active, unless `scaled` is False. Gradients reach only active subspaces, or all of them with `revive`.
        """
        B, C = (self.B, self.C) if self.revive else self._frozen_in(self.B, self.C)
        if self.layout.rows.device != self.A.device:
            self._derive()
        places = self._places
        if places is None:
            with torch.inference_mode(False):  # autograd cannot save inference tensors for a backward
                places = block_places(self.labels, C.shape[0], self.ranks.numel(), self.blocks)
            if not is_transformed():  # a tensor made within a transformation cannot be used outside of it
                self._places = places
        C = C * self.scale if scaled and self.scale != 1 else C
        A = self.A if rows is None else self.A[:, rows]
        return block_products(A, B, C, self.layout, places, self.ranks.numel())

    def factors(self) -> Factors:
        """Return the factors of all subspaces in canonical form, as views where possible."""
        B, C = present(self, "B").detach(), present(self, "C").detach()
        if self.kept is not None:
            B, C = self._frozen_in(B, C)
        if self.layout.rows.device != self.A.device and not self.A.is_meta:
            self._derive()
        return Factors(self.A, B.t(), C, self.labels, self.ranks, self.active)

    def trained_elements(self) -> tuple[Tensor, Tensor]:
        """Return boolean masks of the rows of B, (q, 1), and the columns of C, (1, n), of active subspaces."""
        return trained_elements(self.active, self.labels, self._groups)

    def _frozen_in(self, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        """Return B and C in which frozen elements have their kept values and get no gradients."""
        trained = self._trained_if_not_all()
        if trained is None:
            return B, C
        kept = (B.detach(), C.detach()) if self.kept is None else self.kept
        return torch.where(trained[0], B, kept[0]), torch.where(trained[1], C, kept[1])

    def look(self) -> tuple[Tensor, Tensor] | None:
        """Adopt the mask if it has changed, and return `trained_elements`, or None if all elements are trained.

        Elements that were trained under the former mask are copied into `kept`, so that a subspace that the new mask
        freezes keeps its present values.
        """
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
        """Return `trained_elements`, or None if all elements are trained and the masks can be left out.

        A compiled graph must apply the masks at every call, because an allocation changes them without a
        recompilation. The same holds for a graph that an accelerator captures, so None is returned on the CPU only.
        Within a transformation nothing is cached, since the tensors made there cannot be used outside of it.
        """
        if is_transformed() or self.active.is_inference():
            return self.trained_elements()
        trained = self.look()
        return trained if trained is not None or self.active.device.type == "cpu" else self.trained_elements()

    def hold(self, held: Tensor | None) -> None:
        """Leave the subspaces `held`, (K,) booleans on the CPU, out of the update. None leaves out none."""
        self.held = held
        self._derive()

    def __getstate__(self) -> dict[str, Any]:
        # No controller holds the frozen elements of a copy or revives its subspaces, so the copied Parameters get the
        # kept values.
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
        """Return the values in force of B and C, by name, where an optimiser has moved frozen elements."""
        if self.kept is None:
            return {}
        now = self.B.detach(), self.C.detach()
        held = zip("BC", now, self._frozen_in(*now), strict=True)
        return {name: true for name, mine, true in held if true is not mine and not torch.equal(true, mine)}

    def _derive(self) -> Layout:
        """Derive the layout from labels, ranks and `held`, and move all plain tensors to the device of A."""
        if not self.A.is_meta:
            for name in STRUCTURE:
                setattr(self, name, getattr(self, name).to(self.A.device))
            self.kept = None if self.kept is None else tuple(each.to(self.A.device) for each in self.kept)  # type: ignore[assignment]
        held = None if self.held is None else self.held.to(self.labels.device)
        (q, _), (r, _) = self.B.shape, self.C.shape
        self._groups = torch.repeat_interleave(self.ranks.to(torch.int64), output_size=q)
        with torch.inference_mode(False):  # autograd cannot save inference tensors for a backward
            self.layout = make_layout(
                self.labels, self.ranks, r, q, held, dtype=self.C.dtype, masked=self.blocks == 1
            )
        self._places = None
        return self.layout

    def _apply(self, fn: Any, recurse: bool = True) -> Adapter:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.kept = None if self.kept is None else tuple(map(fn, self.kept))
        # `fn` is not applied to labels, ranks and mask: these keep their values even where A loses its own
        # (`to_empty`, the meta device).
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
            # A copy, because code that averages states writes into their tensors.
            destination[f"{prefix}{name}"] = getattr(self, name).clone()
        if self.kept is not None and not keep_vars:
            destination |= {f"{prefix}{name}": tensor for name, tensor in self._drifted().items()}
        if self.held is not None:
            # Without this mask, a model that loads the state would count the update twice.
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
                # Libraries that average states make these integers floating point. The average of equal integers is
                # that integer up to rounding.
                state_dict[f"{prefix}{name}"] = given.round().to(getattr(self, name).dtype)
        misfits = self._misfits(state_dict, prefix)
        if misfits:
            # Load nothing at all: B and C of one grouping with the labels of another would compute a wrong update.
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
        """Check that the factors in a state, if it has any, match what the weight will hold after loading.

        Raises
        ------
        StateError
            If they do not match: the update would be counted twice, or not at all.
        """
        if f"{prefix}B" in state_dict and not self._fits_weight(state_dict, prefix):
            raise StateError(
                f"{prefix.removesuffix('.')}: the weight of the layer holds other subspaces in the state than in "
                "this model (one of the two was merged or consolidated). Merge, consolidate or unmerge the model "
                "likewise first, or use adamss.save and adamss.load, which accept both forms."
            )

    def _fits_weight(self, state_dict: Mapping[str, Any], prefix: str) -> bool:
        """Return whether the factors in a state match what the weight of the layer will hold after loading."""
        held, ours = state_dict.get(f"{prefix}{HELD}"), self.held
        if held is None or held.numel():
            return _equal(held, ours)
        if ours is None:
            return True
        # The state was written without the weights, so the layer's weight stays as it is. The factors in the state
        # must then equal those of the subspaces that the weight holds.
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
        """Return a message for each tensor of a state that does not fit. If any does not, nothing may be loaded."""
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
        return [f"{prefix}labels, {prefix}ranks: the values do not describe subspaces of this layer."]

    def _factors_in(self, state_dict: Mapping[str, Any], prefix: str) -> Factors | None:
        """Return the factors in a state, or None if some are missing or have other shapes than this layer's."""
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
    """Return a tensor that owns its memory.

    A view would keep the memory of the whole tensor alive, and safetensors refuses to save it.
    """
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
