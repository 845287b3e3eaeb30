"""Importance averages of the Parameters of a model, kept so that a step costs a handful of operations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from adamss.config import BudgetConfig
from adamss_torch.sharding import is_sharded, local, part_like, rebuilt, sum_over_shards

__all__ = ["Averages"]


class Averages:
    """Importance averages of all Parameters in one vector each, so that a step costs a handful of operations.

    See `adamss.core.update_importance`, which they equal.
    """

    def __init__(self, parameters: list[nn.Parameter], config: BudgetConfig) -> None:
        self._config = config
        self._parameters = parameters
        self._shapes = [local(p.detach()).shape for p in parameters]
        self._sizes = [shape.numel() for shape in self._shapes]
        first = parameters[0]
        wide = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
        size = sum(self._sizes)
        self._sensitivity = torch.zeros(size, dtype=wide, device=local(first).device)
        self._uncertainty = torch.zeros_like(self._sensitivity)
        self._left_out = torch.zeros((), dtype=torch.int64, device=self._sensitivity.device)
        self._taken: tuple[Tensor, Tensor, Tensor] | None = None
        self._sharded_like = first if is_sharded(first) else None

    @property
    def on_cpu(self) -> bool:
        """Whether a look at a value costs nothing."""
        return self._sensitivity.device.type == "cpu"

    @torch.no_grad()
    def take(self, weights: list[Tensor], gradients: list[Tensor | None], scale: Tensor | None) -> None:
        """Compute the averages after a step, without putting them into force."""
        zeros = (torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True))
        w, g = self._joined(weights), self._joined(zeros)
        if scale is not None:
            g = g / scale.to(g.device)
        now = (w * g).abs_()
        # Of NaN this is false too; the limit is that of `adamss.core.update_importance`.
        usable = (now <= torch.finfo(now.dtype).max ** 0.5).all()
        if self._sharded_like is not None:
            # A part that is finite on one process is left out with those that are not on another.
            usable = sum_over_shards((~usable).to(torch.float32), self._sharded_like) == 0
        b1, b2 = self._config.sensitivity_decay, self._config.uncertainty_decay
        sensitivity = b1 * self._sensitivity + (1 - b1) * now
        uncertainty = b2 * self._uncertainty + (1 - b2) * (now - sensitivity).abs_()
        self._taken = (
            torch.where(usable, sensitivity, self._sensitivity),
            torch.where(usable, uncertainty, self._uncertainty),
            self._left_out + (~usable).to(torch.int64),
        )

    @property
    def taken(self) -> bool:
        """Whether there is something to put into force."""
        return self._taken is not None

    def keep(self) -> None:
        """Put into force what `take` has computed."""
        if self._taken is not None:
            self._sensitivity, self._uncertainty, self._left_out = self._taken
        self._taken = None

    def drop(self) -> None:
        """Forget what `take` has computed."""
        self._taken = None

    def reset(self) -> None:
        """Forget all averages."""
        self._sensitivity, self._uncertainty = (
            torch.zeros_like(a) for a in (self._sensitivity, self._uncertainty)
        )

    def left_out(self) -> int:
        """Return how many steps were left out."""
        return int(self._left_out)

    def products(self) -> list[Tensor]:
        """Return sensitivity times uncertainty, in the shape of each Parameter's part on this process."""
        return self._split(self._sensitivity * self._uncertainty)

    def pairs(self, parameters: list[nn.Parameter]) -> list[dict[str, Tensor]]:
        """Return the averages of each Parameter, in its shape."""
        both = zip(self._split(self._sensitivity), self._split(self._uncertainty), strict=True)
        return [
            {"sensitivity": rebuilt(s.clone(), p), "uncertainty": rebuilt(u.clone(), p)}
            for p, (s, u) in zip(parameters, both, strict=True)
        ]

    def load(self, pairs: list[Mapping[str, Tensor]], left_out: int) -> None:
        """Take averages over from `pairs`."""
        for name in ("sensitivity", "uncertainty"):
            whole = zip((pair[name] for pair in pairs), self._parameters, strict=True)
            setattr(self, f"_{name}", self._joined(part_like(value, p) for value, p in whole))
        self._left_out = torch.full_like(self._left_out, left_out)

    def _joined(self, parts: Iterable[Tensor]) -> Tensor:
        on = self._sensitivity
        return torch.cat([part.detach().reshape(-1).to(on) for part in parts])

    def _split(self, row: Tensor) -> list[Tensor]:
        return [
            part.view(shape) for part, shape in zip(torch.split(row, self._sizes), self._shapes, strict=True)
        ]
