"""Weights that other libraries keep in few bits, and how they are read.

A quantised weight is read by dequantising it, layer by layer, and is never written, since most of an update would be
rounded away. Outputs and gradients go through the layer's own kernel. Classes are recognised by their names, so a
library is imported only after one of its layers was found.

Each store states the rounding error of its weights, as a root mean square relative to the weight:

- ``2^(1-b)`` for b bits. The numbers of a group reach to about three times their root mean square, and a rounding
  error is spread evenly over one step.
- At least 1/64, because formats of eight bits often have one scale for a whole row, whose largest number is farther
  from the root mean square.
- A quarter of the distance from 1 to the next number, for floating-point formats.
"""

from __future__ import annotations

import copy
import re
from importlib import import_module
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adamss.backend import LinearKind, PlainStore, View
from adamss.errors import LayerError
from adamss_torch.sharding import is_sharded

__all__ = [
    "KINDS",
    "STORES",
    "AnyInput",
    "QuantisedStore",
    "float_layer",
    "packing_layers",
    "unpack",
]


# ---- kinds: the layers that are no torch.nn.Linear -------------------------------------------------


class HQQ(LinearKind):
    """``HQQLinear`` layers of hqq."""

    classes = ("hqq.core.quantize.HQQLinear",)
    weight = "W_q"


class GPTQ(LinearKind):
    """GPTQ layers of gptqmodel that compute with PyTorch's own operations."""

    classes = (
        "gptqmodel.nn_modules.qlinear.torch.TorchLinear",
        "gptqmodel.nn_modules.qlinear.torch.TorchQuantLinear",
    )
    weight = "qweight"

    def view(self, layer: nn.Module, path: str) -> View:
        """Return the view of a weight (n, d)."""
        if getattr(layer, "rotation", None) is not None:
            raise LayerError(
                f"{path} rotates its input, so its weight is not the matrix that it applies; leave it out of targets"
            )
        return super().view(layer, path)


class AWQ(LinearKind):
    """AWQ layers of gptqmodel and of autoawq."""

    classes = (
        "gptqmodel.nn_modules.qlinear.torch_awq.AwqTorchLinear",
        "awq.modules.linear.gemm.WQLinear_GEMM",
    )
    weight = "qweight"


KINDS = (HQQ(), GPTQ(), AWQ())


# ---- stores ----------------------------------------------------------------------------------------


class QuantisedStore(PlainStore):
    """Weights of few bits, in layers of certain classes."""

    classes: ClassVar[tuple[str, ...]]
    """Full names of the layers' classes."""

    array: ClassVar[str] = "weight"
    """Name of the weight among the attributes of the layer."""

    casts: ClassVar[bool] = False
    """Whether the layers take inputs of any dtype, and return outputs of the input's dtype."""

    def holds(self, layer: nn.Module, name: str) -> bool:
        """Return whether `name` is the weight of a layer of one of `classes`."""
        return name == self.array and _is_one_of(layer, self.classes)

    def refusal(self, layer: nn.Module, name: str) -> str | None:
        """Return a refusal, because quantisation would round an update away."""
        return (
            f"is quantised ({self.described(layer)}), which would round the update away: pass dequantise=True to "
            "adamss.merge, which turns the layer into a float one; or leave the adapter unmerged, or export it by "
            "adamss.to_lora"
        )

    def described(self, layer: nn.Module) -> str:
        """Return how the weight is kept, for messages."""
        return type(layer).__name__


class TensorStore(QuantisedStore):
    """Tensors that can be dequantised: those of torchao, and of optimum-quanto once it is frozen."""

    def holds(self, layer: nn.Module, name: str) -> bool:
        """Return whether the array is a tensor of a class with a ``dequantize`` of its own."""
        tensor: Any = getattr(layer, "_parameters", {}).get(name)
        own = tensor is not None and type(tensor) not in (Tensor, nn.Parameter) and not is_sharded(tensor)
        return own and getattr(type(tensor), "dequantize", None) is not Tensor.dequantize

    def read(self, layer: nn.Module, name: str) -> Tensor:
        """Return the dequantised values."""
        tensor: Any = getattr(layer, name).detach()
        # The `dequantize` of torchao's NF4Tensor takes other arguments and does not return the weight.
        values: Tensor = getattr(tensor, "get_original_weight", tensor.dequantize)()
        return values

    def noise(self, layer: nn.Module, name: str) -> float:
        """Return the rounding error of the dtype within the tensor, or of four bits if the tensor names no dtype."""
        tensor: Any = getattr(layer, name)
        kept = getattr(tensor, "target_dtype", None) or getattr(tensor, "qdata", tensor).dtype
        if (qtype := getattr(tensor, "qtype", None)) is not None:
            kept = qtype.dtype if qtype.is_floating_point else qtype.bits
        return _noise(kept)

    def described(self, layer: nn.Module) -> str:
        """Return the class of the tensor."""
        return type(layer.weight).__name__


class UnfrozenStore(QuantisedStore):
    """Layers of optimum-quanto before `freeze`, which quantise a float weight again in every forward."""

    classes = ("optimum.quanto.nn.qlinear.QLinear",)

    def holds(self, layer: nn.Module, name: str) -> bool:
        """Return whether the weight is still a float one."""
        return super().holds(layer, name) and layer.weight_qtype is not None and not layer.frozen

    def read(self, layer: Any, name: str) -> Tensor:
        """Return the quantised weight that the layer computes with, dequantised."""
        values: Tensor = layer.qweight.detach().dequantize()
        return values

    def noise(self, layer: Any, name: str) -> float:
        """Return the rounding error of the type to which the weight is quantised."""
        qtype = layer.weight_qtype
        return _noise(qtype.dtype if qtype.is_floating_point else qtype.bits)


class FourBitStore(QuantisedStore):
    """Weights of bitsandbytes in NF4 and FP4."""

    classes = ("bitsandbytes.nn.modules.Linear4bit",)
    casts = True

    def holds(self, layer: nn.Module, name: str) -> bool:
        """Return whether the weight is quantised, which happens when the layer is first moved to a device."""
        return super().holds(layer, name) and _quant_state(layer) is not None

    def read(self, layer: Any, name: str) -> Tensor:
        """Return the dequantised values, in the dtype of the weight before it was quantised."""
        from bitsandbytes import functional

        values: Tensor = functional.dequantize_4bit(*_unpacked(layer))
        return values

    def noise(self, layer: nn.Module, name: str) -> float:
        """Return the rounding error of four bits."""
        return _noise(4)

    def described(self, layer: Any) -> str:
        """Return the class of the layer, and NF4 or FP4."""
        return f"{type(layer).__name__}, {layer.weight.quant_type}"


class EightBitStore(QuantisedStore):
    """Weights of bitsandbytes for LLM.int8(), with a scale for each row that the first forward moves elsewhere."""

    classes = ("bitsandbytes.nn.modules.Linear8bitLt",)
    casts = True

    def holds(self, layer: nn.Module, name: str) -> bool:
        """Return whether the weight is quantised, which happens when the layer is first moved to a device."""
        return super().holds(layer, name) and layer.weight.dtype == torch.int8

    def read(self, layer: Any, name: str) -> Tensor:
        """Return the dequantised values in half precision, in which the kernel computes."""
        # SCB is the largest magnitude in each row, which is stored as 127.
        scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        data: Tensor = layer.weight.data
        values: Tensor = data.float() * (scale.to(data.device) / 127)[:, None]
        return values.half()

    def noise(self, layer: nn.Module, name: str) -> float:
        """Return the rounding error of eight bits."""
        return _noise(8)


class HQQStore(QuantisedStore):
    """Weights of hqq, in groups with any number of bits."""

    classes, array = HQQ.classes, HQQ.weight

    def read(self, layer: Any, name: str) -> Tensor:
        """Return the dequantised values."""
        values: Tensor = layer.dequantize().detach()
        return values

    def noise(self, layer: Any, name: str) -> float:
        """Return the rounding error of the layer's number of bits."""
        return _noise(layer.meta["nbits"])


class GPTQStore(QuantisedStore):
    """Weights of GPTQ: groups of columns, possibly in another order."""

    classes, array = GPTQ.classes, GPTQ.weight
    casts = True

    def read(self, layer: Any, name: str) -> Tensor:
        """Return the dequantised values."""
        # The method of the class is called, since the layer may have a compiled one as its own attribute.
        values: Tensor = type(layer).dequantize_weight(layer).detach().t()
        return values

    def noise(self, layer: Any, name: str) -> float:
        """Return the rounding error of the layer's number of bits."""
        return _noise(layer.bits)


class AWQStore(QuantisedStore):
    """Weights of AWQ: groups of columns."""

    classes, array = AWQ.classes, AWQ.weight
    casts = True

    def read(self, layer: Any, name: str) -> Tensor:
        """Return the dequantised values."""
        packing = "gptqmodel.quantization.awq.utils.packing_utils"
        if type(layer).__module__.startswith("awq."):
            packing = "awq.utils.packing_utils"
        dequantise = import_module(packing).dequantize_gemm
        kept = layer.qweight, layer.qzeros, layer.scales
        values: Tensor = dequantise(*kept, self._bits(layer), layer.group_size).detach().t()
        return values

    def noise(self, layer: Any, name: str) -> float:
        """Return the rounding error of the layer's number of bits."""
        return _noise(self._bits(layer))

    @staticmethod
    def _bits(layer: Any) -> int:
        return int(getattr(layer, "bits", 0) or layer.w_bit)


class BlockScaledStore(QuantisedStore):
    """Float8 weights with a scale for each block, as checkpoints store them and transformers computes with them."""

    classes = ("transformers.integrations.finegrained_fp8.FP8Linear",)
    casts = True

    def holds(self, layer: nn.Module, name: str) -> bool:
        """Return whether the weight is float8, and was not dequantised when it was loaded."""
        return super().holds(layer, name) and layer.weight.dtype == torch.float8_e4m3fn

    def read(self, layer: Any, name: str) -> Tensor:
        """Return the dequantised values in bfloat16."""
        values: Tensor = layer.weight.detach().float()
        scale: Tensor = layer.weight_scale_inv.detach().float()
        if layer.block_size is not None:
            for axis, (block, length) in enumerate(zip(layer.block_size, values.shape, strict=True)):
                scale = scale.repeat_interleave(block, axis).narrow(axis, 0, length)
        return (values * scale).bfloat16()

    def noise(self, layer: nn.Module, name: str) -> float:
        """Return the rounding error of the weight's dtype."""
        return _noise(layer.weight.dtype)


STORES = (
    TensorStore(),
    UnfrozenStore(),
    FourBitStore(),
    EightBitStore(),
    HQQStore(),
    GPTQStore(),
    AWQStore(),
    BlockScaledStore(),
)


def _noise(kept: Any) -> float:
    """Return the rounding error of a number of bits or of a dtype, as the docstring of the module derives it."""
    if isinstance(kept, torch.dtype) and kept.is_floating_point and kept.itemsize == 1:
        return torch.finfo(kept).eps / 4
    bits = kept if isinstance(kept, int) else re.fullmatch(r"torch\.u?int([1-8])", str(kept))
    return max(2.0 ** (1 - (int(bits[1]) if isinstance(bits, re.Match) else bits or 4)), 1 / 64)


# ---- float layers in their places ------------------------------------------------------------------


class AnyInput(nn.Linear):
    """A float layer in the place of a quantised one; like that one, it takes inputs of any dtype."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``x W^T + b`` in the dtype of the input, computed in that of the weight."""
        weight, bias = self.weight, self.bias
        return F.linear(input.to(weight.dtype), weight, bias).to(input.dtype)


def float_layer(W: Tensor, b: Tensor | None, *, casts: bool) -> nn.Linear:
    """Return a frozen linear layer.

    Parameters
    ----------
    W
        Weight (d, n).
    b
        Bias (n,), or None.
    casts
        Whether the layer takes inputs of any dtype.
    """
    kind = AnyInput if casts else nn.Linear
    d, n = W.shape
    layer = kind(d, n, bias=b is not None, device="meta")
    layer.weight = nn.Parameter(W.t().contiguous(), requires_grad=False)
    if b is not None:
        layer.bias = nn.Parameter(b.to(W.dtype, copy=True), requires_grad=False)
    return layer


# ---- bitsandbytes on the CPU -----------------------------------------------------------------------


PACKING = "support_avx512bf16_for_cpu"
"""Attribute of a layer of bitsandbytes: whether it packs its weight in the first forward in evaluation mode.

The kernel of packed weights passes no gradient to its input, and the weight stays packed in later training.
"""


def packing_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model whose `PACKING` is set."""
    return [
        module
        for module in model.modules()
        if _is_one_of(module, FourBitStore.classes) and getattr(module, PACKING, False)
    ]


def unpack(layer: Any) -> None:
    """Give a packed weight of bitsandbytes its usual form, with the same numbers to the bit."""
    if _is_packed(layer):
        layer.weight.data, layer.weight.quant_state = _unpacked(layer)
        layer.quant_state = layer.weight.quant_state


def _unpacked(layer: Any) -> tuple[Tensor, Any]:
    """Return the data and the quantisation state of a four-bit layer in the usual form, which is not packed."""
    data, state = layer.weight.data, _quant_state(layer)
    if not _is_packed(layer):
        return data, state
    from bitsandbytes import functional

    state = copy.copy(state)
    # Otherwise the inverse would quantise nested scales again, which adds another error.
    state.original_nested = False
    data, state = functional._convert_weight_packed_for_cpu_inverse(data, state)
    state.absmax = state.absmax.t().reshape(-1).float()
    return data, state


def _is_packed(layer: Any) -> bool:
    return bool(getattr(_quant_state(layer), "packing_format_for_cpu", False))


def _quant_state(layer: Any) -> Any:
    # The weights that FSDP gathers have no quantisation state, but the layer has it.
    return getattr(layer.weight, "quant_state", None) or layer.quant_state


def _is_one_of(layer: nn.Module, classes: tuple[str, ...]) -> bool:
    """Return whether a layer is an instance of one of these classes, without importing their libraries."""
    return any(f"{one.__module__}.{one.__qualname__}" in classes for one in type(layer).__mro__)
