"""Routing of the rows of a batch through different adapters, by one pair of products over the factors of all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adamss.backend.bank import rows_of
from adamss_torch.adapter import Adapter
from adamss_torch.kinds import Convolution, Embedding

__all__ = ["LayerRoute"]

GATHER_COST = 14
"""Cost of gathering the factors of one row, in units of the product of one token with these factors."""


class LayerRoute:
    """Route of the rows of a batch through the A adapters of one layer.

    M: (A + 1, d, q) and E: (A + 1, q, n) stack the factors of the adapters, padded with zeros to the largest. The
    last entries are zero and serve rows without an adapter. Row i gets the update ``(x_i M[a]) E[a]``, where a is the
    number of its adapter. If a row has many tokens, the factors of each row are gathered. If it has few, all tokens
    are multiplied by all of M, and a mask keeps the directions of each token's own adapter.

    Parameters
    ----------
    path
        Path of the layer, for messages.
    adapters
        Adapters of the layer that rows may go through.
    rows
        Number, among `adapters`, of the adapter of each row; A for a row without one.
    axis
        Axis of the input along which the rows lie.
    dtype
        Dtype in which the layer mostly computes.
    """

    def __init__(
        self, path: str, adapters: list[Adapter], rows: list[int], axis: int, dtype: torch.dtype
    ) -> None:
        self.path, self.adapters, self.axis = path, adapters, axis
        self.rows = torch.tensor(rows, device=adapters[0].A.device)
        self._key: tuple[Any, ...] = ()
        self._stack: tuple[Tensor, Tensor] | None = None
        self.stacked(dtype)

    def stacked(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return M and E of all adapters in a dtype.

        They are made at every call if an adapter is trained. Otherwise they are kept until an adapter changes;
        compiled code does not notice a change and uses what was kept.
        """
        if any(adapter.B.requires_grad for adapter in self.adapters):
            return _stacked(self.adapters, dtype)
        if torch.compiler.is_compiling() and self._stack is not None:
            M, E = self._stack
            return M.to(dtype), E.to(dtype)
        key = (dtype, *(t._version for adapter in self.adapters for t in (adapter.B, adapter.C)))
        if self._stack is None or key != self._key:
            with torch.inference_mode(False), torch.no_grad():
                self._stack = _stacked(self.adapters, dtype)
            self._key = key
        return self._stack

    def __call__(self, layer: Any, kind: Any, x: Tensor, output: Tensor) -> Tensor:
        """Return the output of the layer plus the update of each row."""
        M, E = self.stacked(output.dtype)
        if kind.linear:
            return self._linear(x.to(output.dtype), M, E, output)
        count, _, q = M.shape
        leading = x.shape if isinstance(kind, Embedding) else x.shape[: x.ndim > len(layer.weight.shape) - 1]
        # Ids with a single axis are either one id for each row, or positions that all rows share. In the second case
        # there is no row to route by, so their number must be exactly that of the rows.
        exact = isinstance(kind, Embedding) and len(leading) == 1
        share = rows_of(self.path, tuple(leading), len(self.rows), self.axis, exact=exact)
        z = kind.project(layer, x, torch.cat([*M[:-1]], dim=1))
        own = (self.rows[:, None] == torch.arange(count - 1, device=z.device)).repeat_interleave(q, dim=1)
        own = own.repeat_interleave(share, dim=0)
        shape = [1] * z.ndim
        shape[self.axis], shape[1 if isinstance(kind, Convolution) else -1] = own.shape
        z = torch.where(own.view(shape) & z.isfinite(), z, torch.zeros_like(z))
        u = kind.spread(layer, z, torch.cat([*E[:-1]]))
        return output + (kind.looked_up(layer, x, u) if isinstance(kind, Embedding) else u)

    def _linear(self, x: Tensor, M: Tensor, E: Tensor, output: Tensor) -> Tensor:
        (count, d, q), n = M.shape, E.shape[2]
        rows_of(self.path, tuple(x.shape[:-1]), len(self.rows), self.axis)
        first = x.movedim(self.axis, 0)
        tokens = first.reshape(len(self.rows), -1, x.shape[-1])
        y = output.movedim(self.axis, 0).reshape(len(self.rows), -1, n)
        T = tokens.shape[1]
        if (count - 1) * T > GATHER_COST + 2 * T:
            z = torch.bmm(tokens, M[self.rows, : x.shape[-1]])
            if d > x.shape[-1]:
                z = z + M[self.rows, -1:]
            y = torch.baddbmm(y, _finite(z), E[self.rows])
        else:
            z = tokens.flatten(0, 1) @ M[:-1, : x.shape[-1]].transpose(0, 1).flatten(1)
            z = z.view(len(self.rows), T, count - 1, q)
            if d > x.shape[-1]:
                z = z + M[:-1, -1]
            own = self.rows[:, None] == torch.arange(count - 1, device=z.device)
            z = torch.where(own[:, None, :, None] & z.isfinite(), z, torch.zeros_like(z))
            y = torch.addmm(y.flatten(0, 1), z.view(-1, (count - 1) * q), E[:-1].flatten(0, 1))
        return y.view(*first.shape[:-1], n).movedim(0, self.axis)


def _finite(z: Tensor) -> Tensor:
    """Return z with zeros where it is not finite: with C = 0 the output must be the base's, and not NaN."""
    return torch.where(z.isfinite(), z, torch.zeros_like(z))


def _stacked(adapters: list[Adapter], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # A route ignores the weights with which adapters are active.
    pairs = [adapter.products(scaled=False) for adapter in adapters]
    d, q = (max(M.shape[axis] for M, _ in pairs) for axis in (0, 1))
    pad = nn.functional.pad
    Ms = [pad(M.to(dtype), (0, q - M.shape[1], 0, d - M.shape[0])) for M, _ in pairs]
    Es = [pad(E.to(dtype), (0, 0, 0, q - E.shape[0])) for _, E in pairs]
    return torch.stack([*Ms, torch.zeros_like(Ms[0])]), torch.stack([*Es, torch.zeros_like(Es[0])])
