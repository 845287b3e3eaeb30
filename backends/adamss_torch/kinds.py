"""The kinds of PyTorch's layers, and of the parts of modules that are adapted as if they were layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

from adamss.backend import Kind, Kinds, LinearKind, View
from adamss.backend.sites import Fragment
from adamss.errors import LayerError
from adamss_torch import quantised

__all__ = [
    "PROJECTIONS",
    "Embedding",
    "InPlaceKind",
    "OwnParameter",
    "Part",
    "Projection",
    "fragments",
    "kinds",
    "parameter_refusal",
    "refusal",
]

REFUSED: dict[type, str] = {
    nn.modules.conv._ConvTransposeNd: "a transposed convolution, whose inputs are not the rows of one matrix",
    nn.RNNBase: "a recurrent network, which keeps its weights in a list of its own",
}
"""Classes of modules that are never adapted, nor are their own Parameters, and the reason as a clause."""


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Names of the four projections of `torch.nn.MultiheadAttention`."""

CONTAINERS = (nn.ParameterList, nn.ParameterDict)
"""Modules without a forward, whose Parameters other modules read."""


class Linear(LinearKind):
    """`torch.nn.Linear`, however its weight is kept."""

    classes = (nn.Linear,)


class Conv1D(LinearKind):
    """``Conv1D`` of transformers: a linear layer whose weight is (d, n), the transpose of a `torch.nn.Linear`'s."""

    classes = ("transformers.pytorch_utils.Conv1D",)

    def view(self, layer: nn.Module, path: str) -> View:
        """Return the view of a weight (d, n)."""
        return View(rows=(0,), columns=(1,))


class Convolution(Kind):
    """``y = patches(x) W + bias``: W has a row for each input channel and position in the window."""

    classes = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    lora = "convolution"

    def view(self, layer: _ConvNd, path: str) -> View:
        """Return the view of a weight (n, channels, *window), whose rows are channels and window places."""
        if layer.groups != 1:
            kind = "depthwise" if layer.groups == layer.in_channels else f"of {layer.groups} groups"
            raise LayerError(
                f"{path} is a {type(layer).__name__} that is {kind}: its weight is a small matrix for each group, "
                "and none for all inputs; leave it out of targets"
            )
        return View(rows=tuple(range(1, layer.weight.ndim)), columns=(0,))

    def lora_refusal(self, layer: _ConvNd) -> str | None:
        """Return the padding mode or the dilation of the layer if PEFT's LoRA ignores it; else None."""
        if layer.padding_mode != "zeros":
            return f"padding_mode = {layer.padding_mode!r}"
        return f"dilation = {layer.dilation}" if set(layer.dilation) != {1} else None

    def project(self, layer: _ConvNd, x: Tensor, M: Tensor) -> Tensor:
        """Return the layer's convolution, including its padding, with the columns of M as filters."""
        return layer._conv_forward(x, M.t().reshape(-1, *layer.weight.shape[1:]), None)

    def spread(self, layer: _ConvNd, z: Tensor, E: Tensor) -> Tensor:
        """Return ``z E`` at every position, as a convolution with a window of one."""
        window = (1,) * len(layer.kernel_size)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(window) - 1]
        return convolve(z, E.t().reshape(E.shape[1], E.shape[0], *window))


class Embedding(Kind):
    """``y = W[ids]``: W has a row for each id."""

    classes = (nn.Embedding,)
    lora = "embedding"

    def view(self, layer: nn.Embedding, path: str) -> View:
        """Return the view of a weight (d, n), with d ids."""
        if layer.max_norm is not None:
            raise LayerError(
                f"{path} is an Embedding with max_norm = {layer.max_norm}, which rescales rows of the weight "
                "whenever they are read; leave it out of targets"
            )
        if layer.scale_grad_by_freq:
            raise LayerError(
                f"{path} is an Embedding with scale_grad_by_freq, which divides the gradient of each row of the "
                "weight, and factors have no such rows; leave it out of targets"
            )
        return View(rows=(0,), columns=(1,))

    def project(self, layer: nn.Embedding, x: Tensor, M: Tensor) -> Tensor:
        """Return the rows of M for the ids x."""
        return F.embedding(x, M)

    def looked_up(self, layer: Any, x: Tensor, u: Tensor) -> Tensor:
        """Return the updates u of the ids x. That of ``padding_idx`` passes no gradient, as in the layer."""
        return (
            u
            if layer.padding_idx is None
            else torch.where((x == layer.padding_idx)[..., None], u.detach(), u)
        )


class InPlaceKind(Kind):
    """A weight that an unknown forward reads: W + delta is put in its place while that forward runs."""

    in_place = True


class Part(Fragment):
    """A Parameter of a module, or some of its rows, treated as a layer with a weight and no bias.

    Parameters
    ----------
    module, name
        Module that has the Parameter, and the module's name for it.
    part
        Name of the part, as targets spell it.
    rows
        Rows of the Parameter that make up the part. None means all.
    """

    bias: ClassVar[None] = None

    def __init__(self, module: nn.Module, name: str, part: str, rows: slice | None = None) -> None:
        self.module, self.name, self.part, self.rows = module, name, part, rows

    @property
    def weight(self) -> Any:
        """The Parameter, or its rows."""
        whole = getattr(self.module, self.name)
        return whole if self.rows is None else whole[self.rows]

    @weight.setter
    def weight(self, value: nn.Parameter) -> None:
        assert self.rows is None
        setattr(self.module, self.name, value)


class OwnParameter(Part):
    """A Parameter that a module reads itself, such as the weights of all experts of a layer in one array."""


class OwnParameterKind(InPlaceKind):
    """A Parameter (n, d), as `torch.nn.functional.linear` takes it, or (experts, n, d), one such matrix each.

    In modules of transformers whose ``is_transposed`` is true, a Parameter with three axes is (experts, d, n).
    """

    classes = (OwnParameter,)
    lora = "parameter"

    def view(self, layer: OwnParameter, path: str) -> View:
        """Return the view in which the columns of the experts lie next to each other."""
        transposed = bool(getattr(layer.module, "is_transposed", False))
        if layer.weight.ndim == 2:
            return View(rows=(1,), columns=(0,))
        return View(rows=(1,), columns=(0, 2)) if transposed else View(rows=(2,), columns=(0, 1))

    def blocks(self, layer: OwnParameter) -> int:
        """Return the number of experts."""
        return int(layer.weight.shape[0]) if layer.weight.ndim == 3 else 1


class Projection(Part):
    """One of the query, key and value projections of `torch.nn.MultiheadAttention`, packed or not."""


class ProjectionKind(InPlaceKind):
    """A projection of `torch.nn.MultiheadAttention`, whose forward reads the Parameters of all four projections."""

    classes = (Projection,)
    all_linear = True

    def view(self, layer: Projection, path: str) -> View:
        """Return the view of a weight (n, d)."""
        return View(rows=(1,), columns=(0,))


kinds = Kinds(
    Linear(), Conv1D(), Convolution(), Embedding(), OwnParameterKind(), ProjectionKind(), *quantised.KINDS
)
"""Kinds of layers that can be adapted; `Kinds.register` adds one."""


def refusal(module: object) -> str | None:
    """Return, as a clause, why a module is never adapted; None if it may be."""
    return next((why for kind, why in REFUSED.items() if isinstance(module, kind)), None)


def parameter_refusal(module: nn.Module, parameter: Tensor) -> str:
    """Return, as a noun phrase, what a Parameter is that `fragments` does not yield."""
    name = type(module).__name__
    if why := refusal(module):
        return f"a Parameter of a {name}, {why}"
    if isinstance(module, nn.MultiheadAttention):
        return f"a Parameter of a {name}, for which targets name the projections, {', '.join(PROJECTIONS)}"
    if isinstance(module, ParametrizationList):
        return "a Parameter within a parametrization, which computes the weight from it"
    if isinstance(module, CONTAINERS):
        return f"an entry of a {name}, which some unknown module reads"
    if parameter.ndim > 3:
        return f"a Parameter of {parameter.ndim} axes, which is neither a matrix nor a stack of matrices"
    return f"a Parameter of shape {tuple(parameter.shape)} of a {name}, which is not a matrix that can be adapted"


def fragments(module: object) -> Iterator[tuple[str, Part]]:
    """Yield, by name, the parts of a module that can be adapted although it is not a layer of a known kind.

    The parts of `torch.nn.MultiheadAttention` are its projections except ``out_proj``, which is a module itself. The
    parts of other modules are the Parameters that can be matrices: those with two or three axes, each longer than
    one.
    """
    if isinstance(module, nn.MultiheadAttention):
        packed, width = module.in_proj_weight is not None, module.embed_dim
        for number, which in enumerate("qkv"):
            name = "in_proj_weight" if packed else f"{which}_proj_weight"
            rows = slice(number * width, (number + 1) * width) if packed else None
            yield f"{which}_proj", Projection(module, name, f"{which}_proj", rows)
    elif (
        isinstance(module, nn.Module)
        and kinds.find(module) is None
        and not isinstance(module, (*REFUSED, *CONTAINERS))
    ):
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.ndim in (2, 3) and min(parameter.shape) > 1:
                yield name, OwnParameter(module, name, name)
