"""Test `TorchBackend.linear` for what is specific to PyTorch; `adamss_conformance` tests laws 3 and 4."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import adamss
from adamss import AdamssConfig, core
from adamss.core import Factors
from adamss.core.cost import ORDERS
from adamss_conformance.tolerances import assert_agrees
from adamss_torch import TorchBackend

backend = TorchBackend()


def as_torch(factors: Factors, dtype: torch.dtype) -> Factors:
    floats = (torch.tensor(array, dtype=dtype) for array in factors[:3])
    return Factors(*floats, *(torch.tensor(array) for array in factors[3:]))


class Both:
    """An adapted layer, and the same function of (x, B, C) written as plain products."""

    def __init__(self, order, basis, frozen, rows=5):
        torch.manual_seed(0)
        layer = nn.Linear(6, 8).double()
        settings = {"rank": 5, "subspaces": 3, "subspace_rank": 2, "basis": basis, "include_bias": True}
        self.model = adamss.attach(nn.Sequential(layer, nn.Tanh()), AdamssConfig(targets=["0"], **settings))
        self.adapter = layer.adamss.default
        self.adapter.order = order
        self.adapter.active[1] = not frozen
        self.adapter.C.data.normal_()
        self.W, self.b = layer.weight.detach(), layer.bias.detach()
        self.values = torch.randn(rows, 6).double(), self.adapter.B.detach(), self.adapter.C.detach()

    def adapted(self, x, B, C):
        values = {"0.adamss.default.B": B, "0.adamss.default.C": C}
        return torch.func.functional_call(self.model, values, (x,)).square().sum()

    def plain(self, x, B, C):
        rows, columns = self.adapter.trained_elements()
        B, C = torch.where(rows, B, B.detach()), torch.where(columns, C, C.detach())
        f = self.adapter.factors()
        delta = core.delta(f._replace(B=B.t(), C=C))
        y = x @ (self.W.t() + delta[:-1]) + self.b + delta[-1]
        return torch.tanh(y).square().sum()

    def products_with_hessian(self, function, vector):
        """Return products with the Hessian by autograd, which differentiates the gradient once more."""
        values = [value.clone().requires_grad_() for value in self.values]
        gradients = torch.autograd.grad(function(*values), values, create_graph=True)
        along = sum((g * v).sum() for g, v in zip(gradients, vector, strict=True))
        return torch.autograd.grad(along, values)


BOTH = pytest.mark.parametrize("frozen", [False, True])


@BOTH
@pytest.mark.parametrize("order", [None, *ORDERS])
@pytest.mark.parametrize("basis", ["shared", "per_subspace"])
def test_second_derivatives(order, basis, frozen):
    both = Both(order, basis, frozen)
    vector = [torch.randn_like(value) for value in both.values]
    expected = both.products_with_hessian(both.plain, vector)
    assert all(h.abs().max() > 0.1 for h in expected)
    for h, e in zip(both.products_with_hessian(both.adapted, vector), expected, strict=True):
        torch.testing.assert_close(h, e, rtol=1e-9, atol=1e-9)


# PyTorch's forward mode uses torch.jit.script, which is deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@BOTH
@pytest.mark.parametrize(
    "transform", ["hessian", "jvp", "vmap of grad", "autograd.functional", "forward mode"]
)
def test_transformations(transform, frozen):
    both = Both(None, "shared", frozen)
    vector = tuple(torch.randn_like(value) for value in both.values)

    def of(function):
        match transform:
            case "hessian":
                return torch.func.hessian(function, (0, 1, 2))(*both.values)
            case "jvp":
                return torch.func.jvp(function, both.values, vector)
            case "vmap of grad":
                gradients = torch.func.grad(lambda x, B, C: function(x[None], B, C), (0, 1, 2))
                return torch.func.vmap(gradients, (0, None, None))(*both.values)
            case "autograd.functional":
                return torch.autograd.functional.hessian(function, both.values)
            case "forward mode":
                with forward_ad.dual_level():
                    duals = map(forward_ad.make_dual, both.values, vector)
                    return forward_ad.unpack_dual(function(*duals)).tangent

    torch.testing.assert_close(of(both.adapted), of(both.plain), rtol=1e-9, atol=1e-9)


def test_second_derivatives_raise_where_the_input_was_not_kept():
    both = Both("input_first", "shared", False, rows=500)
    vector = [torch.randn_like(value) for value in both.values]
    with pytest.raises(RuntimeError, match="was not kept for second derivatives"):
        both.products_with_hessian(both.adapted, vector)


def test_nothing_goes_stale_when_values_are_written_in_place():
    """Fused optimisers and `.data` do not change version counters, so nothing may be cached between calls."""
    rng = np.random.default_rng(0)
    labels, ranks = np.asarray([0, 1, 0]), np.asarray([1, 1])
    first = Factors(
        *(rng.standard_normal(s) for s in ((1, 4, 2), (2, 2), (1, 3))), labels, ranks, np.ones(2, bool)
    )
    f = as_torch(first, torch.float64)
    x, W = torch.ones(1, 4, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64)
    before = backend.linear(x, W, None, f)
    f.B.data.mul_(2.0)
    f.C.data.mul_(3.0)
    assert_agrees(backend.linear(x, W, None, f), 6 * before, dtype="float64", what="y")
