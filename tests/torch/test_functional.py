"""`TorchBackend.linear`: laws 3 and 4 against the float64 NumPy reference, over shapes, ranks and dtypes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adamss import core
from adamss.core import Factors
from adamss_conformance.tolerances import assert_agrees
from adamss_torch import TorchBackend

backend = TorchBackend()


@st.composite
def problems(draw):
    """Weight, inputs and factors of any admissible shape, in float64 NumPy arrays."""
    d, n = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    K = draw(st.integers(1, n))
    r = draw(st.integers(1, 3))
    R = draw(st.integers(1, d))
    shared = draw(st.booleans())
    bias_row = draw(st.booleans())
    leading = draw(st.sampled_from([(), (1,), (4,), (2, 3), (0,), (2, 0, 3)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    labels = np.concatenate([np.arange(K), rng.integers(0, K, n - K)])
    rng.shuffle(labels)
    ranks = np.minimum(rng.integers(1, r + 1, K), np.bincount(labels, minlength=K))
    ranks = np.minimum(ranks, R)
    r = int(ranks.max())
    G = 1 if shared else K
    within = np.arange(r)[:, None] < ranks[labels]
    factors = Factors(
        A=rng.standard_normal((G, d + bias_row, R)),
        B=rng.standard_normal((R, ranks.sum())),
        C=np.where(within, rng.standard_normal((r, n)), 0.0),
        labels=labels,
        ranks=ranks,
        active=rng.random(K) < 0.7,
    )
    W, b = rng.standard_normal((d, n)), rng.standard_normal(n)
    return rng.standard_normal((*leading, d)), W, b if draw(st.booleans()) else None, factors


def as_torch(factors: Factors, dtype: torch.dtype) -> Factors:
    floats = (torch.tensor(array, dtype=dtype) for array in factors[:3])
    return Factors(*floats, *(torch.tensor(array) for array in factors[3:]))


def rounded(factors: Factors, dtype: torch.dtype) -> Factors:
    """The reference gets what the backend gets: values that the dtype can hold."""
    floats = (torch.tensor(array, dtype=dtype).double().numpy() for array in factors[:3])
    return Factors(*floats, *factors[3:])


@given(problems())
def test_agrees_with_the_reference_in_float64(problem):
    x, W, b, factors = problem
    bias = None if b is None else torch.tensor(b)
    y = backend.linear(torch.tensor(x), torch.tensor(W), bias, as_torch(factors, torch.float64))
    assert y.shape == (*x.shape[:-1], W.shape[1])
    expected = core.linear(x, W, b, factors)
    assert_agrees(
        y.numpy(), expected, dtype="float64", what="y", scale=max(1.0, np.abs(expected).max(initial=0))
    )


@given(problems())
def test_gradients_equal_the_closed_form(problem):
    x, W, b, factors = problem
    dy = np.cos(np.arange(x[..., 0].size * W.shape[1], dtype=np.float64)).reshape(*x.shape[:-1], W.shape[1])
    inputs, f = torch.tensor(x, requires_grad=True), as_torch(factors, torch.float64)
    f.B.requires_grad_(), f.C.requires_grad_()
    y = backend.linear(inputs, torch.tensor(W), None if b is None else torch.tensor(b), f)
    y.backward(torch.tensor(dy))
    expected = core.linear_vjp(dy, x, W, factors)
    for name, actual in (("x", inputs.grad), ("B", f.B.grad), ("C", f.C.grad)):
        reference = getattr(expected, name)
        scale = max(1.0, np.abs(reference).max(initial=0))
        assert_agrees(actual.numpy(), reference, dtype="float64", what=f"gradient of {name}", scale=scale)


@given(problems(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_agrees_with_the_reference_in_every_dtype(problem, dtype):
    x, W, b, factors = problem
    name = str(dtype).removeprefix("torch.")
    low = [None if a is None else torch.tensor(a, dtype=dtype) for a in (x, W, b)]
    f = rounded(factors, torch.float32)
    y = backend.linear(*low, as_torch(f, torch.float32))
    assert y.dtype == dtype
    exact = [None if a is None else a.double().numpy() for a in low]
    expected = core.linear(*exact, f)
    # Terms cancel: the error is relative to what is summed.
    with_bias = np.concatenate([np.abs(exact[0]), np.ones((*x.shape[:-1], 1))], axis=-1)
    absolute_M = np.abs(f.A).max(axis=0)[:, :] @ np.abs(f.B)
    terms = np.abs(exact[0]) @ np.abs(exact[1]) if x.size else np.zeros(1)
    if x.size:
        z = with_bias[..., : absolute_M.shape[0]] @ absolute_M
        terms = terms + z @ np.abs(core.expand(f)) + (0 if b is None else np.abs(exact[2]))
    assert_agrees(y.double().numpy(), expected, dtype=name, what="y", scale=float(terms.max()) + 1e-6)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("bias_row", [0, 1])
def test_gradients_equal_finite_differences(shared, bias_row):
    rng = np.random.default_rng(0)
    labels, ranks = np.asarray([0, 1, 0, 2, 1, 1]), np.asarray([2, 1, 1])
    C = np.where(np.arange(2)[:, None] < ranks[labels], rng.standard_normal((2, 6)), 0)
    A = rng.standard_normal((1 if shared else 3, 5 + bias_row, 3))
    f = as_torch(Factors(A, rng.standard_normal((3, 4)), C, labels, ranks, np.ones(3, bool)), torch.float64)
    W, x = torch.tensor(rng.standard_normal((5, 6))), torch.tensor(rng.standard_normal((2, 4, 5)))

    def run(x, B, C):
        return backend.linear(x, W, None, f._replace(B=B, C=C))

    leaves = [tensor.clone().requires_grad_() for tensor in (x, f.B, f.C)]
    # Padding is no parameter of the function: perturbing it changes nothing, and its gradient is zero.
    assert torch.autograd.gradcheck(run, leaves)


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
