"""`TorchBackend.linear`: what is PyTorch's own; laws 3 and 4 are tried by `adamss_conformance`."""

import numpy as np
import pytest
import torch

from adamss import core
from adamss.core import Factors
from adamss_conformance.tolerances import assert_agrees
from adamss_torch import TorchBackend

backend = TorchBackend()


def as_torch(factors: Factors, dtype: torch.dtype) -> Factors:
    floats = (torch.tensor(array, dtype=dtype) for array in factors[:3])
    return Factors(*floats, *(torch.tensor(array) for array in factors[3:]))


def test_second_derivatives_raise_rather_than_being_wrong():
    f = core.initial_factors(core.decompose(torch.eye(4), 4), torch.tensor([0, 0, 1, 1]), 1)
    x = torch.ones(3, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        backend.linear(x, torch.eye(4), None, f).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_nothing_goes_stale_when_values_are_written_in_place():
    """Fused optimisers and `.data` bump no version counter: no value may be kept from call to call."""
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
