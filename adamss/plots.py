"""Pictures of weights and adapters, drawn with matplotlib (the extra ``plots``).

Each function draws one picture on ``ax``, or on a new pyplot figure, and returns the Axes. `active` divides its
Axes in two and returns the upper one. All layers share one Axes, so a picture of 72 layers has the same form as a
picture of two. ``ax.figure.savefig`` writes a new figure with the same bytes every time, also as SVG and PDF.

The ``source`` of a picture is an adapted model of any framework, an adapter file, or a folder with an adapter file
(such as a checkpoint of the Trainer). For `ordering` and `spectrum` it may also be a file or folder with the weights
of a model. An adapter file has no base weights, so ``base`` names them if a picture needs them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from adamss import core
from adamss.backend.ledger import base_weight, sites_of
from adamss.backend.sites import stack_paths
from adamss.backend.targets import match
from adamss.config import BudgetConfig, shown
from adamss.core import analysis
from adamss.core._array import check_matrix
from adamss.core.fingerprint import fingerprint
from adamss.errors import (
    AdamssError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    ConfigTypeError,
    MissingBackendError,
    StateError,
    TargetError,
)
from adamss.io import checkpoint
from adamss.io.checkpoint import LINEAR, StoredLayer
from adamss.io.folder import ADAPTER_FILE
from adamss.io.weights import WeightFiles, match_names
from adamss.offline.compare import matrix_of
from adamss.offline.inspect import linear_layers, weight_of
from adamss.verbs.common import adapted, progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["active", "ordering", "sizes", "spectrum"]

Array = np.ndarray[Any, Any]
Source: TypeAlias = Any
"""A model, or a path."""

TRAINER_STATE = "trainer_state.json"
ALLOCATION = "adamss/allocation"
"""Key of an allocation in an entry of the Trainer's log. The value has the step, the number of active subspaces of
each layer in which it changed and, in the first entry, the schedule."""

STEP = re.compile(r"[-_](\d+)$")
"""Pattern of the step at the end of the name of a checkpoint."""

CELLS = 128
"""Largest number of cells on a side of the picture of Z*."""

LARGEST_FORMED = 10_000
"""Largest number of columns for which the whole Z* is formed, which takes 400 MB in float32. For a larger weight only
every second column is drawn, or fewer."""

APART = 8
"""Largest number of layers whose spectra have their own line styles and legend entries."""

LONGEST_LOG = 1 << 28
"""Largest size of a log in bytes."""

POINTS = 500
"""Largest number of points of the line of a schedule."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colours of Okabe and Ito, which can be told apart with every kind of colour vision."""

DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 2)))
"""Line styles, which tell lines apart in black and white."""

ACTIVE, FROZEN, LINES = COLOURS[0], "#BFBFBF", "#606060"

STYLE: Any = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "legend.frameon": False,
    "figure.dpi": 120.0,
}


# --- Pictures ---------------------------------------------------------------------------------------------


def ordering(
    source: Source,
    layer: str | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    rank: int = 100,
    subspaces: int = 10,
    segmentation: str = "kmeans",
    ax: Axes | None = None,
) -> Axes:
    """Draw ``|Z*|`` with rows and columns ordered by subspace, which shows how well the subspaces fit the weight.

    Entry (i, j) of ``Z* = V V^T`` is the share of column i in the representation of column j. If the columns lay in
    independent subspaces, all dark cells would be in the squares along the diagonal. The title states
    `adamss.core.analysis.inside_over_between`, which is 1 for labels that are unrelated to the weight.

    Parameters
    ----------
    source
        Adapted model or adapter file, whose subspaces are drawn; or path of weights, which are segmented first.
    layer
        Module path of the layer, or the end of the path if it matches one layer only. None means the first layer.
    base
        File or folder with the base weights of an adapter file.
    rank, subspaces, segmentation
        R, K and segmentation for weights without an adapter. They are ignored for an adapter, which has its own.
    ax
        Axes to draw on. None makes a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        Axes with one image, which has the means of ``|Z*|`` in at most 128 x 128 cells.

    Raises
    ------
    TargetError
        If no layer or several layers match. The message lists near matches.
    CheckpointError, CheckpointNotFoundError
        If a file is missing or cannot be read, or the adapter was trained on other weights.
    ConfigError
        If `base` is missing, or is given although the source has its own weights.
    StateError
        If a model has no adapter, or several active ones.
    MissingBackendError
        If matplotlib is not installed.

    Examples
    --------
    >>> import numpy as np, adamss
    >>> from adamss import plots
    >>> from adamss.backend import NumpyLinear, NumpyModel
    >>> W = np.random.default_rng(0).standard_normal((16, 24))
    >>> model = NumpyModel({"query": NumpyLinear(W)})
    >>> model = adamss.attach(model, adamss.AdamssConfig(targets=["query"], rank=8, subspaces=3))
    >>> ax = plots.ordering(model)
    >>> ax.images[0].get_array().shape
    (24, 24)
    """
    _require_matplotlib("ordering")
    layers = _layers(source, base, "ordering")
    path = _one(layer, layers)
    own = layers[path]
    decomposition = core.decompose(_checked(own, path), own.rank or rank)
    labels = own.labels
    if labels is None:
        labels = core.segment(decomposition, subspaces, segmentation)
    n, K = len(labels), int(labels.max()) + 1
    step = -(-n // LARGEST_FORMED)
    order = analysis.ordering(labels)[::step]
    Z = np.abs(analysis.lowest_rank_representation(decomposition._replace(V=decomposition.V[order])))
    ratio = float(analysis.inside_over_between(Z, labels[order]))
    cells = analysis.cell_means(Z, CELLS)

    with _axes(ax, (5.6, 5.0)) as ax:
        image = ax.imshow(
            cells,
            cmap="Greys",
            vmin=float(np.quantile(cells, 0.01)),
            vmax=float(np.quantile(cells, 0.99)),
            extent=(0, n, n, 0),
            interpolation="nearest",
        )
        ends = np.cumsum(core.subspace_sizes(labels, K))
        starts = np.concatenate([[0], ends[:-1]])
        for lines in (ax.hlines, ax.vlines):
            lines(ends[:-1], 0, n, color=COLOURS[1], linewidth=0.4)
            for side in (starts, ends):  # of the squares
                lines(side, starts, ends, color=COLOURS[1], linewidth=1.4)
        ways = "" if own.labels is not None else f" by {segmentation}"
        ax.set_title(
            f"|Z*| of {_text(path)}, {_count(K, 'subspace')}{ways}\n"
            f"mean inside the squares / outside: {ratio:.2f} (arbitrary groups: 1)",
            loc="left",
        )
        ax.set(xlabel="columns of W, ordered by subspace", ylabel="columns of W, ordered by subspace")
        where = f", mean of {n / len(cells):.3g} x {n / len(cells):.3g} columns" if len(cells) < n else ""
        ax.figure.colorbar(image, ax=ax, label=f"$|Z^*_{{ij}}|${where}", extend="both", shrink=0.8)
    return ax


def spectrum(
    source: Source,
    layers: str | Iterable[str] | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    rank: int = 100,
    ax: Axes | None = None,
) -> Axes:
    """Draw the singular values of weights, divided by the largest, and the energy of each weight within rank R.

    The legend states the captured energy ``sum_{i <= R} s_i^2 / ||W||_F^2`` of each layer. If there are more than 8
    layers, those whose paths differ only in numbers share a colour, and the legend states their lowest and highest
    energy.

    Parameters
    ----------
    source, base
        As for `ordering`.
    layers
        List of names, or regular expression for whole paths, as for ``targets`` of `adamss.AdamssConfig`. None means
        all adapted layers. For weights without an adapter it means the matrices in numbered blocks, or all matrices
        if no block is numbered.
    rank
        R for weights without an adapter. It is ignored for an adapter, which has its own.
    ax
        Axes to draw on. None makes a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        Axes with one line for each layer, in order. Its points are ``(i, s_i / s_1)`` for i from 1, and R is marked.

    Raises
    ------
    TargetError, CheckpointError, CheckpointNotFoundError, ConfigError, StateError, MissingBackendError
        As for `ordering`.

    Examples
    --------
    >>> import numpy as np, adamss
    >>> from adamss import plots
    >>> from adamss.backend import NumpyLinear, NumpyModel
    >>> model = NumpyModel({"query": NumpyLinear(np.diag([4.0, 2.0, 2.0, 1.0]))})
    >>> model = adamss.attach(model, adamss.AdamssConfig(targets=["query"], rank=2, subspaces=2))
    >>> plots.spectrum(model).lines[0].get_ydata().tolist()
    [1.0, 0.5, 0.5, 0.25]
    """
    _require_matplotlib("spectrum")
    every = _layers(source, base, "spectrum")
    rows = []
    paths = _several(layers, every)
    with progress(len(paths)) as count:
        for path in paths:
            S = np.linalg.svd(_checked(every[path], path).astype(np.float64), compute_uv=False)
            R = min(every[path].rank or rank, len(S))
            energy = float(np.sum(S[:R] ** 2) / np.sum(S**2)) if S[0] else 0.0
            rows.append((path, S / (S[0] or 1.0), R, energy))
            count()

    groups: dict[str, list[float]] = {}
    for path, _, _, energy in rows:
        groups.setdefault(path if len(rows) <= APART else _pattern(path), []).append(energy)
    names = _short(groups)
    ranks = {R for *_, R, _ in rows}
    with _axes(ax, (6.4, 4.0)) as ax:
        for path, S, R, _ in rows:
            group = path if path in groups else _pattern(path)
            number = list(groups).index(group)
            energies = groups[group]
            low, high = min(energies), max(energies)
            label = f"{names[group]}: {low:.0%}" + (f" to {high:.0%}" if len(energies) > 1 else "")
            first = not any(line.get_label() == label for line in ax.lines)
            ax.plot(
                np.arange(1, len(S) + 1),
                S,
                color=COLOURS[number % len(COLOURS)],
                linestyle=DASHES[number % len(DASHES)],
                linewidth=1.4 if len(energies) == 1 else 0.8,
                marker="o",
                markersize=4,
                markevery=[R - 1],
                label=label if first else f"_{label}",
            )
        if len(ranks) == 1:
            ax.axvline(*ranks, color=LINES, linewidth=0.6)
            ax.annotate(
                f"R = {next(iter(ranks))}", (next(iter(ranks)), 1), (3, -2), "data", "offset points", va="top"
            )
        # Values far below those at R have almost no energy, and would compress the rest of the picture.
        floor = min(float(S[R - 1]) for _, S, R, _ in rows) / 10
        ax.set(yscale="log", ylim=(min(max(floor, 1e-6), 1e-2), 1.2), xlim=(0, None))
        ax.set(xlabel="index i", ylabel="singular value $s_i / s_1$")
        ax.set_title(f"Singular values of {_count(len(rows), 'weight')}, over the largest", loc="left")
        legend = {
            "frameon": True,
            "edgecolor": "none",
            "framealpha": 0.9,
            "alignment": "left",
            "handlelength": 3.5,
        }
        ax.legend(title="energy of the weight within R", fontsize="small", loc="lower left", **legend)
    return ax


def sizes(source: Source, layers: str | Iterable[str] | None = None, *, ax: Axes | None = None) -> Axes:
    """Draw the number of columns of each subspace, and which subspaces are frozen.

    Each layer is a row of pieces, one for each subspace, whose length is n_k. Trained subspaces come first, and
    larger ones before smaller ones.

    Parameters
    ----------
    source
        Adapted model or adapter file.
    layers
        Layers to draw, as for `spectrum`.
    ax
        Axes to draw on. None makes a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        Axes whose ``patches`` are the K bars of each layer, in order.

    Raises
    ------
    TargetError, CheckpointError, CheckpointNotFoundError, StateError, MissingBackendError
        As for `ordering`.

    Examples
    --------
    >>> import numpy as np, adamss
    >>> from adamss import plots
    >>> from adamss.backend import NumpyLinear, NumpyModel
    >>> model = NumpyModel({"query": NumpyLinear(np.eye(6))})
    >>> config = adamss.AdamssConfig(targets=["query"], rank=6, subspaces=2, segmentation="contiguous")
    >>> [int(bar.get_width()) for bar in plots.sizes(adamss.attach(model, config)).patches]
    [3, 3]
    """
    _require_matplotlib("sizes")
    every = _layers(source, None, "sizes", weights=False)
    paths = _several(layers, every)
    names = _short(paths)
    with _axes(ax, (6.8, _height(len(paths)))) as ax:
        widest, totals = 0, [0, 0]
        for row, path in enumerate(paths):
            labels, mask = every[path].labels, every[path].active
            assert labels is not None and mask is not None
            n_k = np.asarray(core.subspace_sizes(labels, len(mask)))
            order = np.lexsort((-n_k, ~mask))
            ax.barh(
                row,
                n_k[order],
                left=np.cumsum(n_k[order]) - n_k[order],
                color=[ACTIVE if mask[k] else FROZEN for k in order],
                edgecolor="white",
                linewidth=0.5,
            )
            widest = max(widest, len(labels))
            totals = [totals[0] + int(mask.sum()), totals[1] + int((~mask).sum())]
            ax.annotate(
                f"{mask.sum()} of {len(mask)}",
                (len(labels), row),
                (3, 0),
                "data",
                "offset points",
                va="center",
                fontsize="small",
            )
        _rows(ax, names, 0.0)
        ax.set(ylim=(len(paths) - 0.5, -0.5), xlim=(0, 1.12 * widest))
        ax.set(xlabel="columns of the weight; a piece for each subspace, of its $n_k$ columns")
        ax.spines["left"].set_visible(False)
        ax.tick_params(axis="y", length=0)
        trained, frozen = totals
        title = (
            f"Subspaces of {_count(len(paths), 'layer')}: {trained} trained (dark), {frozen} frozen (light)"
        )
        ax.set_title(title, loc="left")
    return ax


def active(source: Any, *, ax: Axes | None = None) -> Axes:
    """Draw the number of trained subspaces over the steps of a training, in total and for each layer.

    Parameters
    ----------
    source
        One of these:

        - a list of allocations, as `adamss_torch.BudgetController` hands them to ``on_allocation`` or
          `adamss_jax.allocation` returns them;
        - the log of a Trainer with `adamss_torch.transformers.AdamssCallback`: ``trainer.state.log_history``,
          ``trainer_state.json``, or a folder with that file;
        - checkpoints: a list of adapter files or of folders with one, or a folder that contains them. Their names end
          with the step, as ``checkpoint-500`` and ``adapter-500.safetensors``.
    ax
        Axes to draw on, whose place is divided between two Axes. None makes a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        The upper Axes. Its ``lines[0]`` is the total of active subspaces over the optimiser steps, which is drawn as
        points if the source consists of checkpoints. Its ``lines[1]`` is the budget, if the schedule is known and
        counts subspaces. The lower Axes has a row for each layer, and is hatched where nothing is known.

    Raises
    ------
    ConfigError, ConfigTypeError
        If the source is none of these, or the name of a checkpoint does not end with a step.
    CheckpointError, CheckpointNotFoundError
        If a file is missing or cannot be read, or there are no allocations in it.
    MissingBackendError
        If matplotlib is not installed.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> from adamss import plots
    >>> told = [SimpleNamespace(step=10 * t, budget=8 - t, active={"query": 4, "value": 4 - t}) for t in range(4)]
    >>> plots.active(told).lines[0].get_ydata().tolist()
    [8, 7, 6, 5, 5]
    """
    _require_matplotlib("active")
    history = _history(source)
    steps, counts = history.steps, history.counts
    paths = sorted({path: None for each in counts for path in each}, key=_natural)
    values = np.asarray([[each.get(path, np.nan) for each in counts] for path in paths])
    totals = [sum(each.values()) for each in counts]
    edges = history.edges

    with _axes(ax, (6.8, 2.2 + _height(len(paths)))) as ax:
        place = ax.get_subplotspec()
        if place is None:
            box = ax.get_position()
            place = ax.figure.add_gridspec(1, 1, left=box.x0, right=box.x1, bottom=box.y0, top=box.y1)[0]
        grid = place.subgridspec(2, 1, height_ratios=(2.2, _height(len(paths))))
        ax.set_subplotspec(grid[0])
        below = ax.figure.add_subplot(grid[1], sharex=ax)

        if history.sampled:
            ax.plot(steps, totals, "o", color=ACTIVE, label="active subspaces")
        else:
            ax.step(edges, [*totals, totals[-1]], where="post", color=ACTIVE, label="active subspaces")
        if len(history.schedule[0]):
            ax.plot(*history.schedule, color=COLOURS[1], linestyle="--", linewidth=1, label="budget")
            ax.legend(loc="upper right")
        ax.set(ylim=(0, 1.05 * max([*totals, *history.schedule[1][:1]])), ylabel="subspaces")
        ax.tick_params(labelbottom=False)
        title = f"Active subspaces: {totals[0]} at step {steps[0]:,}, {totals[-1]} at step {steps[-1]:,}"
        ax.set_title(title, loc="left")

        most = int(np.nanmax(values))
        mesh = below.pcolormesh(
            edges, np.arange(len(paths) + 1), values, cmap="Blues", vmin=0, vmax=most, rasterized=True
        )
        # Hatching marks unknown numbers, which must not look like zero.
        below.patch.set(hatch="////", edgecolor=FROZEN)
        _rows(below, _short(paths), 0.5)
        below.set(
            ylim=(len(paths), 0),
            xlabel="optimiser steps",
            xlim=(min([edges[0], *history.schedule[0][:1]]), max([edges[-1], *history.schedule[0][-1:]])),
        )
        below.tick_params(axis="y", length=0)
        ax.figure.colorbar(
            mesh, ax=below, location="bottom", pad=0.02, aspect=40, label="active subspaces of the layer"
        )
    return ax


# --- Where the layers come from ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """One matrix. Only layers of an adapter have labels (n,) and a mask (K,)."""

    weight: Callable[[], Array]
    rank: int | None = None
    labels: Array | None = None
    active: Array | None = None


def _layers(
    source: Source, base: str | os.PathLike[str] | None, verb: str, *, weights: bool = True
) -> dict[str, _Layer]:
    """Return the layers of a source by path. Weights without an adapter are accepted only if `weights` is true."""
    if not isinstance(source, str | os.PathLike):
        _refuse_base(base, verb, "a model")
        return _of_model(source, verb)
    path = _adapter_file(source)
    if weights and not checkpoint.is_adapter(path):
        found = _of_weights(path)  # first, because a file that cannot be read is the more important fault
        _refuse_base(base, verb, "a path of weights")
        return found
    return _of_file(path, base, verb)


def _refuse_base(base: Any, verb: str, what: str) -> None:
    if base is not None:
        raise ConfigError(
            f"plots.{verb}: {what} has its own weights; base is for adapter files, leave it out"
        )


def _adapter_file(path: str | os.PathLike[str]) -> Path:
    """Return the adapter file in a folder, or the path itself if there is none."""
    inside = Path(path) / ADAPTER_FILE
    return inside if inside.is_file() else Path(path)


def _of_model(model: Any, verb: str) -> dict[str, _Layer]:
    backend, bank = adapted(model, f"plots.{verb}")
    names = [*bank.adapters] if len(bank.adapters) == 1 else [*bank.active]
    if len(names) != 1:
        raise StateError(
            f"plots.{verb}: of the adapters {', '.join(map(repr, bank.adapters))} {len(names)} are active; "
            "activate the one to draw (adamss.activate)"
        )
    adaptation = bank.adapters[names[0]]

    def numpy(array: Any) -> Array:
        return backend.to_stored(backend.whole(array)).numpy()

    def weight(site: Any) -> Array:
        with backend.exact():
            return numpy(base_weight(backend, site, bank).W)

    found: dict[str, _Layer] = {}
    for path, site in sites_of(backend, model, adaptation.layers).items():
        factors, parts = adaptation.layers[path], site.split()
        rank = adaptation.config.for_layer(path).rank
        labels, mask = numpy(factors.labels), numpy(factors.active)
        found |= _parts([*parts], labels, mask, rank, [partial(weight, part) for part in parts.values()])
    return found


def _of_file(path: Path, base: str | os.PathLike[str] | None, verb: str) -> dict[str, _Layer]:
    stored = checkpoint.read(path)
    files = None if base is None else WeightFiles(base)
    spelling = None if files is None else match_names(stored.layers, files)

    def weight(place: str, layer: StoredLayer, block: int) -> Array:
        if files is None or spelling is None:
            raise ConfigError(
                f"plots.{verb}: {str(path)!r} has no base weights; name their file or folder by base (--base)"
            )
        W: Array = matrix_of(files, spelling.weight(place), layer.view or LINEAR)
        mark = fingerprint(W)
        if not layer.base.difference(mark) <= layer.base.tolerance(mark):
            raise CheckpointError(
                f"{shown(place)}: the weight in {str(base)!r} is not the one that the adapter was trained on; "
                "give the right base"
            )
        n = W.shape[1] // layer.blocks
        return W[:, block * n : (block + 1) * n]

    found: dict[str, _Layer] = {}
    for place, layer in stored.layers.items():
        parts = [place] if layer.blocks == 1 else [*stack_paths(place, (layer.blocks,))]
        rank = layer.rank or stored.config.rank
        labels, mask = layer.labels.numpy().astype(np.int64), layer.active.numpy()
        blocks = [partial(weight, place, layer, block) for block in range(layer.blocks)]
        found |= _parts(parts, labels, mask, rank, blocks)
    return found


def _of_weights(path: Path) -> dict[str, _Layer]:
    files = WeightFiles(path)
    return {
        name: _Layer(partial(weight_of, files, name)) for name in sorted(linear_layers(files), key=_natural)
    }


def _parts(
    paths: Sequence[str], labels: Array, mask: Array, rank: int, weights: Sequence[Callable[[], Array]]
) -> dict[str, _Layer]:
    """Split a layer into its matrices, such as experts, whose columns are concatenated."""
    count, K = len(paths), len(mask) // len(paths)
    rows = np.reshape(labels, (count, -1)) - K * np.arange(count)[:, None]
    masks = np.reshape(mask, (count, K))
    columns = zip(weights, rows, masks, strict=True)
    return {path: _Layer(W, rank, own, on) for path, (W, own, on) in zip(paths, columns, strict=True)}


def _several(layers: str | Iterable[str] | None, found: Mapping[str, _Layer]) -> list[str]:
    """Return the paths of the layers to draw."""
    if layers is not None:
        try:
            return match(layers, found, name="layers")
        except re.error as error:
            raise ConfigError(f"layers = {layers!r} is no regular expression: {error}") from error
    numbered = [path for path in found if re.search(r"(^|\.)\d+\.", path)]
    bare = all(layer.labels is None for layer in found.values())
    if not found:
        raise TargetError(
            "there is no matrix to draw: no two-dimensional tensor has a name that ends with .weight"
        )
    return numbered if bare and numbered else [*found]


def _one(layer: str | None, found: Mapping[str, _Layer]) -> str:
    """Return the path of the layer to draw."""
    if layer is None:
        return _several(None, found)[0]
    paths = [layer] if layer in found else match([layer], found, name="layer")
    if len(paths) > 1:
        raise TargetError(f"layer = {layer!r} matches {len(paths)} layers; name one, such as {paths[0]!r}")
    return paths[0]


def _checked(layer: _Layer, path: str) -> Array:
    """Return the weight of a layer after checking that it can be decomposed."""
    W = layer.weight()
    check_matrix(W, name=path)
    return W


# --- The course of a training -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _History:
    """Numbers of active subspaces of each layer over the steps of a training.

    Attributes
    ----------
    steps, counts
        Ascending steps, and the numbers by layer after each of them.
    schedule
        Steps and budgets, if the schedule is known and counts subspaces.
    last
        Step up to which the last numbers are known to hold.
    sampled
        Whether the numbers may have changed between the steps, as they do between two checkpoints.
    """

    steps: list[int]
    counts: list[dict[str, int]]
    schedule: tuple[Sequence[int], Sequence[int]] = ((), ())
    last: int = 0
    sampled: bool = False

    @property
    def edges(self) -> list[float]:
        """Steps that bound the cells: around each step if `sampled`, else from each step to the next."""
        steps = np.asarray(self.steps)
        if self.sampled:
            gaps = np.diff(steps) if len(steps) > 1 else np.asarray([2])
            between = (steps[1:] + steps[:-1]) / 2
            return [steps[0] - gaps[0] / 2, *between.tolist(), steps[-1] + gaps[-1] / 2]
        end = steps[-1] + max(1, (steps[-1] - steps[0]) // 20)
        return [*steps.tolist(), max(self.last, int(end))]


def _history(source: Any) -> _History:
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        state = path / TRAINER_STATE if path.is_dir() else path
        if state.suffix == ".json" and state.is_file():
            return _of_log(_log_of(state), str(state))
        source = _checkpoints_in(path)
    if not isinstance(source, Sequence):
        raise ConfigTypeError(
            "plots.active: the source must be a list of allocations, a Trainer's log, or paths of checkpoints, found "
            f"{type(source).__name__}"
        )
    if not source:
        raise ConfigError("plots.active: the list is empty; there are no allocations to draw")
    if all(isinstance(each, str | os.PathLike) for each in source):
        return _of_checkpoints([Path(each) for each in source])
    if all(isinstance(each, Mapping) for each in source):
        return _of_log(source, "the log")
    return _of_allocations(source)


def _of_allocations(allocations: Sequence[Any]) -> _History:
    """Return the history from allocations. Those of PyTorch have masks, and those of JAX have numbers by layer."""
    try:
        masks = [getattr(each, "masks", None) for each in allocations]
        counts = [
            {path: int(mask.sum()) for path, mask in own.items()}
            if own is not None
            else {path: int(number) for path, number in each.active.items()}
            for each, own in zip(allocations, masks, strict=True)
        ]
        points = [int(each.step) for each in allocations], [int(each.budget) for each in allocations]
    except AttributeError as error:
        raise ConfigTypeError(
            f"plots.active: {type(allocations[0]).__name__} is no allocation ({error}); collect those that "
            "on_allocation is called with, or that adamss_jax.allocation returns"
        ) from error
    known = [sum(len(mask) for mask in own.values()) for own in masks if own is not None]
    most = max(known or [sum(each.values()) for each in counts])
    # A budget that exceeds the number of subspaces counts parameters, and is not drawn.
    return _History(points[0], counts, points if max(points[1]) <= most else ((), ()))


def _log_of(path: Path) -> Any:
    if path.stat().st_size > LONGEST_LOG:
        raise CheckpointError(f"plots.active: {str(path)!r} is longer than the log of any training")
    try:
        return json.loads(path.read_bytes())["log_history"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"plots.active: {str(path)!r} is no state of a Trainer ({shown(error)})"
        ) from error


def _of_log(log: Any, where: str) -> _History:
    """Return the history from the log of a Trainer, whose entries name only the layers whose number has changed."""
    steps, counts, budget, last = [], [], None, 0
    now: dict[str, int] = {}
    try:
        for entry in log:
            last = max(last, int(entry.get("step", 0)))
            if (allocation := entry.get(ALLOCATION)) is not None:
                now = now | {str(path): int(number) for path, number in allocation["active"].items()}
                steps.append(int(allocation["step"]))
                counts.append(now)
                if "budget" in allocation:
                    budget = BudgetConfig.from_dict(allocation["budget"])
    except (AdamssError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"plots.active: an allocation in {where} cannot be read ({shown(error)})"
        ) from error
    if not steps:
        raise CheckpointError(
            f"plots.active: {where} has no allocations; train with adamss_torch.transformers.AdamssCallback and a "
            "budget"
        )
    return _History(steps, counts, _schedule(budget, sum(counts[0].values()), steps[-1]), last)


def _checkpoints_in(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    inside = [
        each for each in path.iterdir() if each.suffix == ".safetensors" or (each / ADAPTER_FILE).is_file()
    ]
    if not inside:
        raise CheckpointNotFoundError(
            f"plots.active: {str(path)!r} has neither {TRAINER_STATE} nor checkpoints with {ADAPTER_FILE}"
        )
    return inside


def _of_checkpoints(paths: Iterable[Path]) -> _History:
    """Return the history from the masks of adapter files."""
    read = []
    for path in paths:
        file = _adapter_file(path)
        if not file.is_file():
            what = "is no file or folder of a checkpoint" if file.exists() else "does not exist"
            raise CheckpointNotFoundError(f"plots.active: {str(path)!r} {what}")
        number = STEP.search(file.stem) or STEP.search(file.parent.name)
        if number is None:
            raise ConfigError(
                f"plots.active: the step of {str(path)!r} is unknown; its name must end with it, as checkpoint-500 "
                "or adapter-500.safetensors"
            )
        read.append((int(number[1]), checkpoint.read(file)))
    read.sort(key=lambda pair: pair[0])
    steps, stored = [step for step, _ in read], [each for _, each in read]
    counts = [{path: int(one.active.numpy().sum()) for path, one in each.layers.items()} for each in stored]
    total = sum(one.active.shape[0] for one in stored[-1].layers.values())
    return _History(steps, counts, _schedule(stored[-1].config.budget, total, steps[-1]), sampled=True)


def _schedule(budget: BudgetConfig | None, total: int, last: int) -> tuple[Sequence[int], Sequence[int]]:
    """Return steps and budgets of a schedule that counts subspaces, from step 0 to its end."""
    if budget is None or budget.unit != "subspaces" or (budget.initial or total) < budget.target:
        return (), ()
    end = max(last, budget.end_step)
    steps = np.unique(np.linspace(0, end, POINTS).astype(int)).tolist()
    return steps, [core.budget_at(step, budget, total) for step in steps]


# --- How it is drawn --------------------------------------------------------------------------------------


def _require_matplotlib(verb: str) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingBackendError(f"plots.{verb} needs matplotlib: pip install 'adamss[plots]'") from error


@contextmanager
def _axes(ax: Axes | None, size: tuple[float, float]) -> Iterator[Any]:
    """Yield the given Axes, or those of a new figure of a size in inches, in the style of this module."""
    if ax is not None:
        yield ax
        return
    from matplotlib import pyplot as plt

    with plt.rc_context(STYLE):
        yield plt.figure(FigureClass=_picture(), figsize=size, layout="constrained").add_subplot()


def _picture() -> type[Any]:
    """Return a class of figures whose files have the same bytes every time."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    class Picture(Figure):
        """A figure."""

        def savefig(self, fname: Any, **options: Any) -> None:
            """Write the figure without the date and without random identifiers."""
            form = options.get("format") or Path(str(fname)).suffix.removeprefix(".")
            undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(form.lower())
            with mpl.rc_context({"svg.hashsalt": "adamss"}):
                super().savefig(fname, **{"metadata": undated} | options)

    return Picture


def _height(rows: int) -> float:
    """Return the height in inches of a picture with this number of rows."""
    return min(1.2 + 0.16 * rows, 14.0)


def _rows(ax: Any, names: Mapping[str, str], offset: float) -> None:
    """Label the rows with the names of the layers, or every second row and so on if the figure is too low."""
    step = -(-len(names) // max(1, int(ax.figure.get_figheight() / 0.13)))
    ax.set_yticks(np.arange(len(names))[::step] + offset, [*names.values()][::step], fontsize=7)


def _natural(path: str) -> list[tuple[int, int, str]]:
    """Return a sort key for paths that compares the numbers in them as numbers."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in path.split(".")]


def _pattern(path: str) -> str:
    """Return a path in which each number is replaced by a star."""
    return ".".join("*" if part.isdecimal() else part for part in path.split("."))


def _short(paths: Iterable[str]) -> dict[str, str]:
    """Return short labels by path, without the leading components that all paths share."""
    rows = [path.split(".") for path in paths]
    shortest = min(map(len, rows)) - 1 if len(rows) > 1 else 0
    start = next((i for i in range(shortest) if len({row[i] for row in rows}) > 1), shortest)
    return {".".join(row): _text(".".join(row[start:])) for row in rows}


def _text(text: str, longest: int = 80) -> str:
    """Shorten a name and escape its dollar signs, which would begin a formula in matplotlib."""
    text = text if len(text) <= longest else f"{text[:longest]}..."
    return "".join(char if char.isprintable() else "?" for char in text).replace("$", r"\$")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
