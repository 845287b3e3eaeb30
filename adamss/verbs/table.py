"""Tables of effective settings and parameter counts, as `adamss.summary` returns them."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import tabulate

from adamss.backend.bank import DEFAULT
from adamss.core import Factors, basis_ranks, count_factors
from adamss.core.factors import outline
from adamss.io.checkpoint import Checkpoint

__all__ = ["Summary", "SummaryRow", "summarise", "summary_of_file", "total"]


@dataclass(frozen=True)
class SummaryRow:
    """Effective settings and parameter counts of one adapted layer, or of all of them.

    Attributes
    ----------
    path
        Module path, or ``"total"`` for the sum over the layers.
    shape
        Shape (d, n) of the weight, or None for the sum.
    K
        Number of subspaces.
    R
        Number of columns of the basis (of the largest, if each subspace has its own), or None for the sum.
    q
        Sum of the trained ranks r_k, which bounds the rank of the update.
    trained
        Number of trained parameters, ``sum_k r_k (n_k + R_k)``. The sum over the layers does not include those of
        ``modules_to_save`` and ``trained_tokens``.
    active
        Number of subspaces that are still trained.

    Examples
    --------
    >>> import numpy as np, adamss
    >>> from adamss.backend import NumpyLinear, NumpyModel
    >>> model = NumpyModel({"query": NumpyLinear(np.eye(4))})
    >>> model = adamss.attach(model, adamss.AdamssConfig(targets=["query"], rank=4, subspaces=2))
    >>> row = adamss.summary(model).rows[0]
    >>> row.path, row.shape, row.K, row.q, row.trained
    ('query', (4, 4), 2, 2, 12)
    """

    path: str
    shape: tuple[int, int] | None
    K: int
    R: int | None
    q: int
    trained: int
    active: int


@dataclass(frozen=True)
class Summary:
    """Summary of an adapter, which prints as a table.

    Attributes
    ----------
    rows
        One row for each adapted layer, in the order of the model.
    total
        Sums over the layers.
    saved
        Number of parameters of ``modules_to_save``.
    targets
        Setting ``targets`` by which the layers were chosen, or None if unknown.
    tokens
        Number of parameters of ``trained_tokens``.
    name
        Name of the adapter.

    Examples
    --------
    >>> import numpy as np, adamss
    >>> from adamss.backend import NumpyLinear, NumpyModel
    >>> model = NumpyModel({"query": NumpyLinear(np.eye(4))})
    >>> model = adamss.attach(model, adamss.AdamssConfig(targets=["query"], rank=4, subspaces=2))
    >>> print(adamss.summary(model))
    layer    shape      K    R    q    trained    active
    -------  -------  ---  ---  ---  ---------  --------
    query    4 x 4      2    4    2         12       2/2
    total               2         2         12       2/2
    targets: query
    """

    rows: tuple[SummaryRow, ...]
    total: SummaryRow
    saved: int = 0
    targets: str | tuple[str, ...] | None = None
    tokens: int = 0
    name: str = DEFAULT

    def __str__(self) -> str:
        return "\n".join((self._table("simple"), *self._notes()))

    def _repr_html_(self) -> str:
        """Return the table for a notebook, what else is printed as its caption."""
        # Of the formats of tabulate, "html" escapes what is in the cells; paths may come from a file of anyone.
        table, notes = self._table("html"), "<br>\n".join(map(html.escape, self._notes()))
        return table.replace("<table>", f"<table>\n<caption>{notes}</caption>", 1) if notes else table

    def _table(self, form: str) -> str:
        columns = ["layer", "shape", "K", "R", "q", "trained", "active"]
        table = [
            (
                row.path,
                "" if row.shape is None else f"{row.shape[0]} x {row.shape[1]}",
                row.K,
                row.R,
                row.q,
                f"{row.trained:,}",
                f"{row.active}/{row.K}",
            )
            for row in (*self.rows, self.total)
        ]
        alignment = ("left", "left", *["right"] * 5)
        return str(tabulate.tabulate(table, columns, form, colalign=alignment, missingval=""))

    def _notes(self) -> list[str]:
        """Return what is said below the table, a line each."""
        lines = []
        if self.name != DEFAULT:
            lines.append(f"adapter: {self.name}")
        if self.targets is not None:
            names = self.targets if isinstance(self.targets, str) else ", ".join(self.targets)
            lines.append(f"targets: {names}")
        if self.tokens:
            lines.append(f"trained_tokens: {self.tokens:,} parameters")
        if self.saved:
            lines.append(f"modules_to_save: {self.saved:,} trained parameters")
        return lines


def summarise(path: str, shape: tuple[int, int], factors: Factors) -> SummaryRow:
    """Return the summary of one layer.

    Parameters
    ----------
    path
        Module path.
    shape
        Shape (d, n) of the weight.
    factors
        Factors of the layer, or their `adamss.core.factors.outline`.
    """
    layer = outline(factors, name=path)
    # Files store labels and ranks in the smallest dtype that holds them, in which sums and products would overflow.
    layer = layer._replace(labels=layer.labels.astype(np.int64), ranks=layer.ranks.astype(np.int64))
    return SummaryRow(
        path=path,
        shape=shape,
        K=layer.ranks.shape[0],
        R=int(basis_ranks(layer).max()),
        q=layer.B.shape[1],
        trained=count_factors(layer),
        active=int(layer.active.sum()),
    )


def total(rows: Sequence[SummaryRow]) -> SummaryRow:
    """Return the sum over the layers as one more row.

    Parameters
    ----------
    rows
        One row for each layer.
    """
    return SummaryRow(
        path="total",
        shape=None,
        K=sum(row.K for row in rows),
        R=None,
        q=sum(row.q for row in rows),
        trained=sum(row.trained for row in rows),
        active=sum(row.active for row in rows),
    )


def summary_of_file(stored: Checkpoint) -> Summary:
    """Return the summary of an adapter file, with R and the trained parameters as they were in training.

    A portable file stores M = A B instead of A, so R is taken from its settings and limited to what the layer allows.
    Names come from the file, which may be hostile, so escape them before you print them.

    Parameters
    ----------
    stored
        Content of the file.
    """
    rows = []
    for path, layer in stored.layers.items():
        row = summarise(path, layer.base.shape, layer.outline())
        if layer.M is not None:
            R = layer.rank or stored.config.rank
            ranks = layer.ranks.numpy().astype(np.int64)
            sizes = np.bincount(layer.labels.numpy().astype(np.int64), minlength=ranks.size)
            d, n = layer.M.shape[0], layer.base.shape[1] // layer.blocks
            own = np.minimum(min(R, d, n), sizes if stored.config.basis == "per_subspace" else n)
            row = replace(row, R=int(own.max()), trained=int((ranks * (sizes + own)).sum()))
        rows.append(row)
    saved = sum(math.prod(tensor.shape) for module in stored.saved.values() for tensor in module.values())
    tokens = sum(math.prod(tensor.shape) for tensor in stored.tokens.values())
    return Summary(tuple(rows), total(rows), saved, tokens=tokens)
