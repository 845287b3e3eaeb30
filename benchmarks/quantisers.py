"""Quantisers of linear layers, for `stores.py` and the tests.

Each maker takes a `torch.nn.Linear` and returns a quantised layer with the same weights in its place. It raises
ImportError if its library is not installed.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Quantiser:
    """One way to quantise a weight.

    Attributes
    ----------
    make : callable
        ``layer -> layer``: quantises a float layer.
    error : float
        Upper bound of the rounding error of normally distributed weights, as a root mean square relative to the
        weight.
    dtype : torch.dtype
        Dtype of the model that the layer is used in.
    runs : bool
        Whether the kernel runs on the CPU.
    trains : bool
        Whether the kernel passes a gradient to its input on the CPU.
    exact : float
        Largest error of the kernel compared with the product with the dequantised weight, relative to the output.
        It is larger for kernels that round the input too.
    """

    make: Callable[[nn.Linear], nn.Module]
    error: float
    dtype: torch.dtype = torch.float32
    runs: bool = True
    trains: bool = True
    exact: float = 1e-5


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what libraries print, warn and log while they are imported."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.disable(disabled)


def _four_bits(kind: str, nested: bool = True) -> Callable[[nn.Linear], nn.Module]:
    """Return a maker of bitsandbytes' four-bit layers; `nested` quantises the scales too."""

    def make(layer: nn.Linear) -> nn.Module:
        from bitsandbytes.nn import Linear4bit, Params4bit

        sizes, dtype = (layer.in_features, layer.out_features, layer.bias is not None), layer.weight.dtype
        new = Linear4bit(*sizes, compute_dtype=dtype, quant_type=kind, compress_statistics=nested)
        options = {"quant_type": kind, "compress_statistics": nested, "module": new}
        new.weight, new.bias = Params4bit(layer.weight.data, requires_grad=False, **options), layer.bias
        return new.to("cpu")

    return make


def _eight_bits(layer: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    sizes = layer.in_features, layer.out_features, layer.bias is not None
    new = Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
    new.weight, new.bias = Int8Params(layer.weight.data, requires_grad=False), layer.bias
    return new.to("cpu")


def _used(make: Callable[[nn.Linear], nn.Module]) -> Callable[[nn.Linear], nn.Module]:
    """Return a maker whose layers have run once, because some libraries pack or move the weight on the first call."""

    def used(layer: nn.Linear) -> nn.Module:
        new = make(layer).eval()
        with torch.no_grad():
            new(torch.ones(2, layer.in_features, dtype=layer.weight.dtype))
        return new.train()

    return used


def _torchao(config: Callable[[Any], Any]) -> Callable[[nn.Linear], nn.Module]:
    def make(layer: nn.Linear) -> nn.Module:
        with quiet():
            from torchao import quantization

        model = nn.Sequential(layer)
        quantization.quantize_(model, config(quantization))
        return model[0]

    return make


def _torchao_nf4(layer: nn.Linear) -> nn.Module:
    """Replace the weight by a tensor of torchao, so that the layer itself stays a `torch.nn.Linear`."""
    with quiet():
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4
    kept = to_nf4(layer.weight.data, block_size=64, scaler_block_size=layer.weight.numel() // 64)
    layer.weight = nn.Parameter(kept, requires_grad=False)
    return layer


def _quanto(kind: str, *, frozen: bool = True) -> Callable[[nn.Linear], nn.Module]:
    """Return a maker of quanto's layers; one that is not frozen still has its float weight."""

    def make(layer: nn.Linear) -> nn.Module:
        with quiet():
            from optimum import quanto

        model = nn.Sequential(layer)
        quanto.quantize(model, weights=getattr(quanto, kind))
        if frozen:
            quanto.freeze(model)
        return model[0]

    return make


def _hqq(bits: int) -> Callable[[nn.Linear], nn.Module]:
    def make(layer: nn.Linear) -> nn.Module:
        with quiet():
            from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
        config = BaseQuantizeConfig(nbits=bits, group_size=64)
        return HQQLinear(layer, config, compute_dtype=layer.weight.dtype, device="cpu")

    return make


GROUP = 32


def _groups(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of each group in a row, (n, d / GROUP): 16 levels from minimum to maximum."""
    groups = layer.weight.data.unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1), groups.amax(-1)
    scale = (high - low) / 15
    return scale, (-low / scale).round()


def _gptqmodel(module: str, name: str, *more: Callable[[nn.Linear], Tensor]) -> Callable[..., nn.Module]:
    """Return a maker of a class of gptqmodel; `more` compute further arguments of its packing from the layer."""

    def make(layer: nn.Linear) -> nn.Module:
        with quiet():
            kind = getattr(__import__(f"gptqmodel.nn_modules.qlinear.{module}", fromlist=[name]), name)
            sizes = {"in_features": layer.in_features, "out_features": layer.out_features}
            new = kind(
                **sizes,
                bits=4,
                group_size=GROUP,
                sym=False,
                desc_act=False,
                bias=layer.bias is not None,
                register_buffers=True,
            )
            # Else the layer would compile its dequantisation.
            new.optimized = True
            pack = getattr(new, "pack_original", new.pack)
            whole = copy.deepcopy(layer).float()
            pack(whole, *_groups(whole), *(each(whole) for each in more))
            new.post_init()
        return new

    return make


def _autoawq(layer: nn.Linear) -> nn.Module:
    with quiet():
        from awq.modules.linear.gemm import WQLinear_GEMM
    scale, zero = (each.t().contiguous() for each in _groups(layer))
    return WQLinear_GEMM.from_linear(layer, 4, GROUP, False, scale, zero)


def _block_scaled(layer: nn.Linear) -> nn.Module:
    """Quantise to float8 with one scale for each square block of the weight, for the FP8Linear of transformers."""
    from transformers.integrations.finegrained_fp8 import FP8Linear

    block = GROUP
    new = FP8Linear(layer.in_features, layer.out_features, (block, block), has_bias=layer.bias is not None)
    blocks = layer.weight.data.unflatten(1, (-1, block)).unflatten(0, (-1, block)).float()
    scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    kept = (blocks / scale[:, None, :, None]).flatten(2, 3).flatten(0, 1).to(torch.float8_e4m3fn)
    new.weight, new.bias = nn.Parameter(kept, requires_grad=False), layer.bias
    new.weight_scale_inv = nn.Parameter(scale, requires_grad=False)
    return new


HALF = {"dtype": torch.bfloat16, "exact": 2e-2}
# The kernel rounds the inputs to eight bits too.
INPUTS = {"exact": 2e-2}

QUANTISERS = {
    "bitsandbytes int8": Quantiser(make=_eight_bits, error=0.01, **INPUTS),
    "bitsandbytes int8, used": Quantiser(make=_used(_eight_bits), error=0.01, **INPUTS),
    "bitsandbytes NF4": Quantiser(make=_four_bits("nf4"), error=0.1),
    "bitsandbytes NF4, used": Quantiser(make=_used(_four_bits("nf4")), error=0.1),
    "bitsandbytes NF4, single scales, used": Quantiser(make=_used(_four_bits("nf4", False)), error=0.1),
    "bitsandbytes FP4": Quantiser(make=_four_bits("fp4"), error=0.13),
    "torchao int8": Quantiser(make=_torchao(lambda q: q.Int8WeightOnlyConfig()), error=0.01),
    "torchao int4": Quantiser(
        make=_torchao(
            lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(GROUP))
        ),
        error=0.11,
    ),
    "torchao float8": Quantiser(make=_torchao(lambda q: q.Float8WeightOnlyConfig()), error=0.03),
    "torchao NF4": Quantiser(make=_torchao_nf4, error=0.1),
    "quanto int8": Quantiser(make=_quanto("qint8"), error=0.01),
    "quanto int4": Quantiser(make=_quanto("qint4"), error=0.12),
    "quanto int2": Quantiser(make=_quanto("qint2"), error=0.55),
    "quanto float8": Quantiser(make=_quanto("qfloat8"), error=0.03),
    "quanto int4, not frozen": Quantiser(make=_quanto("qint4", frozen=False), error=0.12),
    "HQQ 8 bits": Quantiser(make=_hqq(8), error=0.01),
    "HQQ 4 bits": Quantiser(make=_hqq(4), error=0.11),
    "HQQ 2 bits": Quantiser(make=_hqq(2), error=0.5),
    "GPTQ 4 bits": Quantiser(
        make=_gptqmodel(
            "torch",
            "TorchLinear",
            lambda layer: torch.arange(layer.in_features, dtype=torch.int32) // GROUP,
        ),
        error=0.1,
        **HALF,
    ),
    # The first forward pass rounds the scales to the dtype of the input.
    "AWQ 4 bits": Quantiser(make=_used(_gptqmodel("torch_awq", "AwqTorchLinear")), error=0.1, **HALF),
    "AWQ 4 bits, autoawq": Quantiser(make=_autoawq, error=0.1, dtype=torch.float16, exact=2e-2, trains=False),
    "block-scaled float8": Quantiser(make=_block_scaled, error=0.04, runs=False, trains=False, **HALF),
}
"""All quantisers, by name."""
