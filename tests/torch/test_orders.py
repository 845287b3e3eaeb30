"""Test both orders of the products of the update: results, memory for the backward pass, and in-place writes."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch_support import assert_agree

import adamss
from adamss import core
from adamss.core.cost import ORDERS
from adamss_conformance.tolerances import assert_agrees
from adamss_torch.kernel import _cheapest_of

D, N_OUT, TOKENS = 24, 20, 40
OPTIONS = {
    "plain": {},
    "several ranks": {"subspace_rank": 3},
    "unequal ranks": {"subspace_rank": 4, "subspaces": 7},
    "bias": {"include_bias": True},
    "a basis each": {"basis": "per_subspace"},
}


def adapted_layer(order=None, *, layer=None, dtype=torch.float32, base_dtype=None, **options):
    """Return an adapted layer with random factors and one frozen subspace."""
    torch.manual_seed(0)
    model = nn.Sequential(layer or nn.Linear(D, N_OUT)).to(base_dtype or dtype)
    settings = {"targets": ["0"], "rank": 8, "subspaces": 3, "factor_dtype": str(dtype).split(".")[1]}
    adamss.attach(model, adamss.AdamssConfig(**(settings | options)))
    layer = model[0]
    generator = torch.Generator().manual_seed(1)
    factors = layer.adamss.default.factors()
    numbers = torch.randn(factors.C.shape, generator=generator).to(dtype)
    inside = torch.arange(factors.C.shape[0])[:, None] < factors.ranks[factors.labels.long()]
    layer.adamss.default.C.data.copy_(torch.where(inside, numbers, 0))
    layer.adamss.default.active[1] = False
    layer.adamss.default.order = order
    return model


def data(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(*shape, size, generator=generator).to(dtype) for size in (D, N_OUT)]


def step(model, x, dy, forward=None):
    """Run forward and backward; return the output and the gradients of the input, B and C."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = (forward or model)(x)
    y.backward(dy.to(y.dtype))
    return y.detach(), x.grad, model[0].adamss.default.B.grad, model[0].adamss.default.C.grad


def reference(model, x, dy):
    """Return the results of `step` by the closed form in float64 NumPy."""
    layer = model[0]
    f = layer.adamss.default.factors()
    f = core.Factors(*(np.asarray(t.double()) for t in f[:3]), *(t.numpy() for t in f[3:]))
    x, dy, W, b = (t.detach().double().numpy() for t in (x, dy, layer.weight.T, layer.bias))
    gradients = core.linear_vjp(dy, x, W, f)
    return core.linear(x, W, b, f), gradients.x, gradients.B.T, gradients.C


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("tokens", [(), (TOKENS,), (3, 200), (0,)], ids=str)
@pytest.mark.parametrize("order", [*ORDERS, None])
def test_outputs_and_gradients_are_the_reference(order, tokens, options):
    model = adapted_layer(order, dtype=torch.float64, **options)
    x, dy = data(*tokens, dtype=torch.float64)
    assert_agree(step(model, x, dy), reference(model, x, dy), "float64", f"{order} {tokens}")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [(), (1,), (2, 4), (16,), (17,)], ids=str)
@pytest.mark.parametrize("order", [*ORDERS, None])
def test_generation_is_the_reference(order, tokens, dtype, options):
    working = dtype if dtype == torch.float64 else torch.float32
    model = adapted_layer(order, dtype=working, base_dtype=dtype, **options)
    x, dy = data(*tokens, dtype=dtype)
    expected = reference(model, x, dy)[0]
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            y = model(x)
        assert y.shape == expected.shape
        assert_agree([y], [expected], dtype, f"{order} {tokens}", scale=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ORDERS)
def test_in_other_dtypes(order, dtype):
    model = adapted_layer(order, base_dtype=dtype)
    x, dy = data(TOKENS, dtype=dtype)
    assert_agree(step(model, x, dy), reference(model, x, dy), dtype, order, scale=4)


@pytest.mark.parametrize("options", [{}, {"subspace_rank": 3}, {"basis": "per_subspace"}], ids=str)
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ORDERS)
def test_factors_in_float16_neither_overflow_nor_vanish(order, base_dtype, options):
    """The range of float16 exponents has no headroom for large intermediate products, whatever dtype the base has."""
    model = adapted_layer(order, dtype=torch.float16, base_dtype=base_dtype, **options)
    model[0].adamss.default.C.data.mul_(50.0)
    x, dy = data(TOKENS, dtype=base_dtype)
    x, dy = x / 8, dy / 8
    dtype = torch.bfloat16 if base_dtype == torch.bfloat16 else torch.float16
    assert_agree(step(model, x, dy), reference(model, x, dy), dtype, order, scale=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ORDERS)
def test_under_autocast_as_without_it(order, dtype):
    model = adapted_layer(order)
    x, dy = data(TOKENS)
    expected = step(model, x, dy)

    def forward(x):
        with torch.autocast("cpu", dtype=dtype):
            return model(x)

    actual = step(model, x, dy, forward)
    assert [array.dtype for array in actual] == [dtype, *[torch.float32] * 3]
    assert_agree(actual, expected, dtype, order, scale=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ORDERS)
def test_start_equals_the_base_for_the_largest_inputs(order, dtype):
    model = adapted_layer(order, base_dtype=dtype)
    model[0].adamss.default.C.data.zero_()
    with torch.no_grad():
        model[0].weight.mul_(2.0**-8)  # keeps the base product from overflowing
    A = model[0].adamss.default.A[0].float()
    signs = torch.cat([A.sign().t(), torch.tensor([[1.0], [-1.0], [1e-3], [0.0]]).expand(4, D)])
    x = (torch.finfo(dtype).max * signs).to(dtype)
    with adamss.disabled(model):
        expected = model(x)
    assert expected.isfinite().all()
    assert torch.equal(model(x), expected)
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def kept_numbers(model, x):
    """Return the shapes of the tensors that a forward pass keeps, without the model's own Parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    shapes = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return shapes


@pytest.mark.parametrize("tokens", [TOKENS, 600])
@pytest.mark.parametrize("wants", [True, False])
def test_contracting_keeps_x_and_z_and_projecting_u_and_z(tokens, wants):
    x = data(tokens)[0].requires_grad_(wants)
    R, q = 8, 3

    def large(order):
        return sorted(s for s in kept_numbers(adapted_layer(order), x) if tokens in s)

    assert large("factors_first") == [(q, tokens), (tokens, D)]
    assert large("input_first") == [(q, tokens), (tokens, R)]
    model = adapted_layer("input_first")
    model[0].adamss.default.active.fill_(True)
    assert sum(map(math.prod, kept_numbers(model, x))) == tokens * (R + q)


@pytest.mark.parametrize("order", ORDERS)
def test_nothing_is_kept_where_nothing_is_wanted(order):
    model = adapted_layer(order)
    x = data(TOKENS)[0]
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert kept_numbers(model, x) == []
            assert model(x).grad_fn is None
    model.requires_grad_(False)
    assert kept_numbers(model, x) == []
    assert model(x).grad_fn is None
    # If only the input needs a gradient, no activation is kept.
    assert all(TOKENS not in shape for shape in kept_numbers(model, x.clone().requires_grad_()))


def test_equal_ranks_make_no_product_wider():
    """If padding of C got rows in E, the products would have more than the sixteen directions."""
    layout = {"segmentation": "contiguous", "subspaces": 4, "subspace_rank": 4}
    x = data(600)[0].requires_grad_()
    kept = kept_numbers(adapted_layer("factors_first", **layout), x)
    assert {(16, D), (16, N_OUT)} <= set(kept)


def test_the_choice_follows_the_cost_and_can_be_overridden(monkeypatch):
    model = adapted_layer()
    asked = []

    def chosen(*arguments):
        asked.append(arguments)
        return "input_first"

    monkeypatch.setattr("adamss_torch.kernel._cheapest_of", chosen)
    x = data(TOKENS)[0].requires_grad_()
    assert (TOKENS, 8) in kept_numbers(model, x)
    assert asked == [((TOKENS, D), N_OUT, 8, 3, True, False, 4, True)]
    model[0].adamss.default.order = "factors_first"
    assert (TOKENS, D) in kept_numbers(model, x)
    with torch.no_grad():
        model[0].adamss.default.order = None
        model(x)
    assert asked[-1] == ((TOKENS, D), N_OUT, 8, 3, False, False, 4, True)
    model[0].weight.requires_grad_(True)
    model(x.bfloat16().float())
    assert asked[-1] == ((TOKENS, D), N_OUT, 8, 3, True, True, 4, True)


def test_one_token_is_not_worth_contracting():
    assert _cheapest_of((1, 768), 768, 100, 10, False, False, 4, True) == "input_first"
    assert _cheapest_of((2, 1024, 768), 768, 100, 10, True, False, 4, True) == "factors_first"


def test_an_unknown_order_is_refused():
    model = adapted_layer("expand")
    with pytest.raises(
        adamss.errors.ConfigError, match="order must be one of 'factors_first', 'input_first'"
    ):
        model(data(2)[0])


def test_the_choice_goes_with_copies_and_not_into_files(tmp_path):
    model = adapted_layer("input_first")
    assert copy.deepcopy(model)[0].adamss.default.order == "input_first"
    adamss.save(model, tmp_path / "a.safetensors")
    torch.manual_seed(0)
    loaded = adamss.load(nn.Sequential(nn.Linear(D, N_OUT)), tmp_path / "a.safetensors")
    assert loaded[0].adamss.default.order is None


def test_the_update_is_written_into_the_base_product():
    model, seen = adapted_layer(), []
    inner = model[0].adamss.default.forward

    def forward(base, x, **options):
        seen.append((base.data_ptr(), options["overwrite"], options["weight"] is not None))
        return inner(base, x, **options)

    model[0].adamss.default.forward = forward
    y = model(data(TOKENS)[0].requires_grad_())
    assert seen == [(y.data_ptr(), True, True)]


class Named(nn.Linear):
    pass


def patched(*sizes):
    layer = nn.Linear(*sizes)
    inner = layer.forward
    layer.forward = lambda x: torch.sigmoid(inner(x))  # the backward of a sigmoid reads its output
    return layer


@pytest.mark.parametrize("kind", [Named, patched])
def test_a_forward_of_the_users_own_is_added_to_and_left_alone(kind):
    """Such a forward may still need its output, so the update must not be added to it in place."""
    layer, plain = kind(D, N_OUT), kind(D, N_OUT)
    plain.load_state_dict(layer.state_dict())
    model = adapted_layer(layer=layer)
    x, dy = data(TOKENS)
    x.requires_grad_()
    f = model[0].adamss.default.factors()
    M, E = core.contract(f), core.expand(f)
    both = model(x), plain(x) + (x @ M) @ E
    assert_agrees(both[0].detach(), both[1].detach(), dtype="float32", what="y")
    assert_agrees(*(torch.autograd.grad(out, x, dy)[0] for out in both), dtype="float32", what="dx")


def test_a_computed_weight_is_computed_once_and_differentiated_as_it_was():
    """Spectral normalisation takes a step of its power iteration each time the weight is read."""
    model, looked = adapted_layer("factors_first"), []
    layer = model[0]

    class Doubled(nn.Module):
        def forward(self, weight):
            looked.append(1)
            return weight * (1.0 + len(looked))

    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled(), unsafe=True)
    looked.clear()
    x, dy = data(TOKENS)
    x.requires_grad_()
    y = model(x)
    assert looked == [1]
    f = layer.adamss.default.factors()
    weight = 2.0 * layer.parametrizations.weight.original.detach() + (core.contract(f) @ core.expand(f)).t()
    assert_agrees(torch.autograd.grad(y, x, dy)[0], dy @ weight, dtype="float32", what="dx")


def test_hooks_before_ours_keep_what_they_saw():
    layer, seen = nn.Linear(D, N_OUT), []
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    model = adapted_layer(layer=layer)
    x = data(TOKENS)[0].requires_grad_()
    y = model(x)
    with adamss.disabled(model):
        assert torch.equal(seen[0], model(x))
    assert not torch.equal(seen[0], y)


def test_global_hooks_keep_what_they_saw():
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.append(output) if isinstance(module, nn.Linear) else None
    )
    try:
        y = adapted_layer()(data(TOKENS)[0])
    finally:
        handle.remove()
    assert not torch.equal(seen[0], y)


def test_function_modes_keep_what_they_saw():
    seen = []

    class Recorder(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.nn.functional.linear:
                seen.append((result, result.clone()))
            return result

    model = adapted_layer()
    with Recorder(), torch.no_grad():
        model(data(TOKENS)[0])
    assert seen
    assert all(torch.equal(kept, copied) for kept, copied in seen)


def test_selective_checkpointing_hands_out_what_it_kept():
    model = adapted_layer()
    x, dy = data(TOKENS)
    expected = step(model, x, dy)

    def policy(ctx, op, *args, **kwargs):
        products = (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
        return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts():
        return create_selective_checkpoint_contexts(policy)

    def checkpointed(x):
        return checkpoint(model, x, use_reentrant=False, context_fn=contexts)

    assert_agree(step(model, x, dy, checkpointed), expected, "float32", "selective checkpointing")


@pytest.mark.parametrize("order", ORDERS)
def test_the_gradient_of_a_base_that_is_trained_too(order):
    model = adapted_layer(order, dtype=torch.float64)
    x, dy = data(TOKENS, dtype=torch.float64)
    expected = step(model, x, dy)
    model[0].weight.requires_grad_(True)
    model[0].bias.requires_grad_(True)
    assert_agree(step(model, x, dy), expected, "float64", "with a trained base")
    assert_agrees(model[0].weight.grad, dy.T @ x, dtype="float64", what="weight")
    assert_agrees(model[0].bias.grad, dy.sum(0), dtype="float64", what="bias")


@pytest.mark.parametrize("order", ORDERS)
def test_backward_hooks_see_the_gradients_of_the_whole_layer(order):
    model, seen = adapted_layer(order), []
    x, dy = data(TOKENS)
    _, expected, *_ = step(model, x, dy)
    model[0].register_full_backward_hook(lambda module, inputs, outputs: seen.append((inputs, outputs)))
    step(model, x, dy)
    ((inputs,), (outputs,)) = seen[0]
    assert torch.equal(outputs, dy)
    assert_agrees(inputs, expected, dtype="float32", what="gradient of the input")


@pytest.mark.parametrize("tokens", [(TOKENS,), (2, TOKENS)], ids=str)
def test_the_result_may_be_changed_in_place(tokens):
    model = adapted_layer()
    x, dy = data(*tokens)
    for change in (torch.relu, lambda y: y.mul(2.0)):
        expected = step(model, x, dy, lambda x, change=change: change(model(x)))
        in_place = torch.relu_ if change is torch.relu else lambda y: y.mul_(2.0)
        actual = step(model, x, dy, lambda x, change=in_place: change(model(x)))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected, strict=True))


@pytest.mark.parametrize("order", ORDERS)
def test_a_layer_used_twice_in_one_forward(order):
    torch.manual_seed(0)
    model = adapted_layer(order, dtype=torch.float64)
    layer = model[0]
    pad = nn.ConstantPad1d((0, D - N_OUT), 0.0)
    x, dy = data(TOKENS, dtype=torch.float64)
    leaves = [x.requires_grad_(), *adamss.trainable_parameters(model)]
    f = layer.adamss.default.factors()._replace(B=layer.adamss.default.B.t(), C=layer.adamss.default.C)
    whole = layer.weight.T + core.contract(f) @ core.expand(f)
    expected = pad(x @ whole + layer.bias) @ whole + layer.bias
    y = layer(pad(layer(x)))
    assert_agrees(y.detach(), expected.detach(), dtype="float64", what="y")
    layer.adamss.default.active.fill_(True)
    actual, expected = (torch.autograd.grad(each, leaves, dy) for each in (layer(pad(layer(x))), expected))
    assert_agree(actual, expected, "float64", "gradient")


@pytest.mark.parametrize("order", ORDERS)
def test_compiled_without_a_graph_break(order):
    model = adapted_layer(order)
    x, dy = data(TOKENS)
    expected = step(model, x, dy)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own imports warn
        assert_agree(step(model, x, dy, compiled), expected, "float32", order)
