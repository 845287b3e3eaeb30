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
"""Modules whose Parameters are not adapted either, and why."""


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""What the four matrices of `torch.nn.MultiheadAttention` are called."""

CONTAINERS = (nn.ParameterList, nn.ParameterDict)
"""Modules without a forward, whose Parameters others read."""


class Linear(LinearKind):
    """`torch.nn.Linear`, however its weight is kept."""

    classes = (nn.Linear,)


class Conv1D(LinearKind):
    """Transformers' ``Conv1D``: a linear layer with its weight the other way round, (d, n)."""

    classes = ("transformers.pytorch_utils.Conv1D",)

    def view(self, layer: nn.Module, path: str) -> View:
        """Return the weight as it is."""
        return View(rows=(0,), columns=(1,))


class Convolution(Kind):
    """``y = patches(x) W + bias``: a row of W for each input channel and place of the window."""

    classes = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    lora = "convolution"

    def view(self, layer: _ConvNd, path: str) -> View:
        """Return the window flattened, and transposed."""
        if layer.groups != 1:
            kind = "depthwise" if layer.groups == layer.in_channels else f"of {layer.groups} groups"
            raise LayerError(
                f"{path} is a {type(layer).__name__} that is {kind}: its weight is a small matrix for each group, "
                "and none for all inputs; leave it out of targets"
            )
        return View(rows=tuple(range(1, layer.weight.ndim)), columns=(0,))

    def lora_refusal(self, layer: _ConvNd) -> str | None:
        """Return a dilation, or a padding with something else than zeros."""
        if layer.padding_mode != "zeros":
            return f"padding_mode = {layer.padding_mode!r}"
        return f"dilation = {layer.dilation}" if set(layer.dilation) != {1} else None

    def project(self, layer: _ConvNd, x: Tensor, M: Tensor) -> Tensor:
        """Return the convolution of the layer, padding and all, with the columns of M as its filters."""
        return layer._conv_forward(x, M.t().reshape(-1, *layer.weight.shape[1:]), None)

    def spread(self, layer: _ConvNd, z: Tensor, E: Tensor) -> Tensor:
        """Return a convolution with a window of one."""
        window = (1,) * len(layer.kernel_size)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(window) - 1]
        return convolve(z, E.t().reshape(E.shape[1], E.shape[0], *window))


class Embedding(Kind):
    """``y = W[ids]``: a row of W for each id."""

    classes = (nn.Embedding,)
    lora = "embedding"

    def view(self, layer: nn.Embedding, path: str) -> View:
        """Return the weight as it is."""
        if layer.max_norm is not None:
            raise LayerError(
                f"{path} is an Embedding with max_norm = {layer.max_norm}, which rescales rows of the weight "
                "whenever they are read; leave it out of targets"
            )
        if layer.scale_grad_by_freq:
            raise LayerError(
                f"{path} is an Embedding with scale_grad_by_freq, which divides gradients of rows, and factors have "
                "none; leave it out of targets"
            )
        return View(rows=(0,), columns=(1,))

    def project(self, layer: nn.Embedding, x: Tensor, M: Tensor) -> Tensor:
        """Return the rows of M."""
        return F.embedding(x, M)

    def looked_up(self, layer: Any, x: Tensor, u: Tensor) -> Tensor:
        """Return the updates u of the rows x; that of ``padding_idx`` gives no gradient, as in the layer."""
        return (
            u
            if layer.padding_idx is None
            else torch.where((x == layer.padding_idx)[..., None], u.detach(), u)
        )


class InPlaceKind(Kind):
    """A weight that is read by a forward that nobody knows: W + delta is put in its place while that runs."""

    in_place = True


class Part(Fragment):
    """A Parameter of a module, or rows of one, as if it were a layer with a weight and no bias.

    Parameters
    ----------
    module, name
        Whose Parameter it is, and what it calls that.
    part
        What the part is called.
    rows
        Which rows of the Parameter it is; None for all.
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
    """A Parameter that a module reads itself, such as those of all experts of a layer."""


class OwnParameterKind(InPlaceKind):
    """A Parameter of two axes (n, d), as `torch.nn.functional.linear` takes it, or three: one such for each expert.

    Modules of transformers say by ``is_transposed`` that theirs are (experts, d, n).
    """

    classes = (OwnParameter,)
    lora = "parameter"

    def view(self, layer: OwnParameter, path: str) -> View:
        """Return it with its experts beside each other."""
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
    """A projection of `torch.nn.MultiheadAttention`, whose forward reads the Parameters of all four."""

    classes = (Projection,)
    all_linear = True

    def view(self, layer: Projection, path: str) -> View:
        """Return the transpose."""
        return View(rows=(1,), columns=(0,))


kinds = Kinds(
    Linear(), Conv1D(), Convolution(), Embedding(), OwnParameterKind(), ProjectionKind(), *quantised.KINDS
)
"""Kinds of layers that can be adapted; `Kinds.register` adds one."""


def refusal(module: object) -> str | None:
    """Return what a module is that is not adapted on purpose, as a clause; None for others."""
    return next((why for kind, why in REFUSED.items() if isinstance(module, kind)), None)


def parameter_refusal(module: nn.Module, parameter: Tensor) -> str:
    """Return what a Parameter is that is none of `fragments`, as a noun."""
    name = type(module).__name__
    if why := refusal(module):
        return f"a Parameter of a {name}, {why}"
    if isinstance(module, nn.MultiheadAttention):
        return f"a Parameter of a {name}, of which targets name the projections, {', '.join(PROJECTIONS)}"
    if isinstance(module, ParametrizationList):
        return "a Parameter within a parametrization, which computes the weight from it"
    if isinstance(module, CONTAINERS):
        return f"an entry of a {name}, of which nobody knows who reads it"
    if parameter.ndim > 3:
        return f"a Parameter of {parameter.ndim} axes, which are no matrix, nor matrices beside each other"
    return f"a Parameter of shape {tuple(parameter.shape)} of a {name}, which is no matrix that can be adapted alone"


def fragments(module: object) -> Iterator[tuple[str, Part]]:
    """Yield what is adapted of a module that is no layer of a known kind, by name.

    Of `torch.nn.MultiheadAttention` its projections, but for ``out_proj``, which is a module. Of others the
    Parameters that can be matrices: of two or three axes, each above one.
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
