"""Test situations that were reported as bugs in other libraries for adapters, averaging, wrapping and optimisers."""

import copy
import gc
import itertools
import json
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import adamss
from adamss import AdamssConfig, AdamssWarning, BudgetConfig
from adamss.errors import LayerError, StateError
from adamss_torch import BudgetController, hold_frozen
from adamss_torch.adapter import STRUCTURE
from adamss_torch.backend import adapters_of

X = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))


def attached(base=net, **settings):
    return adamss.attach(base(), AdamssConfig(**{"targets": "[02]", "rank": 16, "subspaces": 20, **settings}))


def adamw(model):
    return torch.optim.AdamW(adamss.trainable_parameters(model), lr=0.05)


def train(model, optimizer, steps):
    for seed in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(seed))
        model(x).square().mean().backward()
        optimizer.step()


def saved(model, path):
    """Save the adapter of a model, and return a fresh model with it, as another process would have."""
    adamss.save(model, path)
    return adamss.load(net(), path)


def close(model, other, **tolerance):
    torch.testing.assert_close(model(X), other(X), **tolerance)


# ---- state that others average -----------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [None, 0.9, 0.95, 0.9999])
def test_an_average_of_models(decay, tmp_path):
    model = attached()
    optimizer = adamw(model)
    ema = None if decay is None else get_ema_multi_avg_fn(decay)
    average, expected = AveragedModel(model, multi_avg_fn=ema, use_buffers=True), None
    for number in range(20):
        train(model, optimizer, 1)
        average.update_parameters(model)
        C = model[0].adamss.default.C.detach()
        weight = (1 if number == 0 else 1 - decay) if decay else 1 / (number + 1)
        expected = C * weight + (0 if expected is None else expected * (1 - weight))
    adapter, ours = average.module[0].adamss.default, model[0].adamss.default
    torch.testing.assert_close(adapter.C.detach(), expected)
    assert all(torch.equal(getattr(adapter, name), getattr(ours, name)) for name in STRUCTURE)
    assert (average(X) - net()(X)).abs().max() > 0.01
    close(saved(average.module, tmp_path / "a.safetensors"), average)


def test_an_average_that_is_written_into_a_state(tmp_path):
    model = attached()
    optimizer, average = adamw(model), copy.deepcopy(model)
    for _ in range(20):
        train(model, optimizer, 1)
        state = model.state_dict()
        for name, value in average.state_dict().items():
            value.copy_(value * 0.9 + state[name] * 0.1)
    assert all(
        torch.equal(getattr(average[2].adamss.default, n), getattr(model[2].adamss.default, n))
        for n in STRUCTURE
    )
    close(saved(average, tmp_path / "a.safetensors"), average)


@pytest.mark.parametrize("decay", [0.9, 0.95])
def test_an_average_that_is_kept_as_a_state(decay, tmp_path):
    model = attached()
    optimizer, average = adamw(model), {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(20):
        train(model, optimizer, 1)
        state = model.state_dict()
        average = {name: average[name] * decay + state[name] * (1 - decay) for name in average}
    mean = attached()
    mean.load_state_dict(average)
    for adapter, ours in zip(adapters_of(mean).values(), adapters_of(model).values(), strict=True):
        assert all(torch.equal(getattr(adapter, name), getattr(ours, name)) for name in STRUCTURE)
    close(saved(mean, tmp_path / "a.safetensors"), mean)


# ---- copies that share a hook ------------------------------------------------------------------------------


def test_the_replicas_of_data_parallel_use_their_own_factors():
    model = attached()
    replicas = [
        m._replicate_for_data_parallel() for m in (model[0], model[0].adamss, model[0].adamss.default)
    ]
    for outer, inner, name in zip(replicas, replicas[1:], ("adamss", "default"), strict=False):
        outer._modules[name] = inner
    layer, _, adapter = replicas
    layer.weight, layer.bias = model[0].weight, model[0].bias
    adapter._parameters |= {"B": model[0].adamss.default.B, "C": nn.Parameter(torch.ones(1, 32))}
    other = copy.deepcopy(model)
    other[0].adamss.default.C.data.fill_(1.0)
    torch.testing.assert_close(layer(X), other[0](X))
    assert not torch.allclose(layer(X), model[0](X))


# ---- optimisers that write outside of their step -----------------------------------------------------------


class ScheduleFree(torch.optim.SGD):
    """SGD that trains at one point and evaluates at another; `eval` moves the parameters (Defazio et al. 2024)."""

    def step(self, closure=None):
        super().step(closure)
        for p in itertools.chain(*(group["params"] for group in self.param_groups)):
            state = self.state[p]
            state["mean"] = state.get("mean", torch.zeros_like(p)).lerp(p.detach(), 0.1)

    def _swap(self):
        for p, state in self.state.items():
            p.data, state["mean"] = state["mean"], p.data

    train = eval = _swap


@pytest.mark.parametrize("held_by", ["controller", "hold_frozen"])
def test_frozen_elements_stay_where_an_optimiser_evaluates(held_by, tmp_path):
    model = attached()
    adapters = adapters_of(model).values()
    optimizer = ScheduleFree(adamss.trainable_parameters(model), lr=0.05, momentum=0.9, weight_decay=0.1)
    if held_by == "controller":
        budget = BudgetController(model, optimizer, BudgetConfig(target=10, end_step=3))
        train(model, optimizer, 3)
    else:
        budget = hold_frozen(model, optimizer)
        train(model, optimizer, 3)
        for adapter in adapters:
            adapter.active[::2] = False

    def frozen():
        found = []
        for f in (adapter.factors() for adapter in adapters):
            found += [f.C[:, ~f.active[f.labels]].clone(), f.B[:, ~f.active].clone()]
        return found

    before = frozen()
    train(model, optimizer, 5)
    trained = model(X)
    optimizer.eval()
    assert all(map(torch.equal, frozen(), before))
    assert any(not adapter.trained_elements()[1].all() for adapter in adapters)
    evaluated = model(X)
    assert not torch.allclose(evaluated, trained)
    close(saved(model, tmp_path / "a.safetensors"), model)
    twin = attached()
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin(X), evaluated)
    optimizer.train()
    torch.testing.assert_close(model(X), trained)
    train(model, optimizer, 2)
    assert all(map(torch.equal, frozen(), before))
    budget.remove()
    assert all(map(torch.equal, frozen(), before))


def held(target=10):
    """Return a model, its optimiser and its controller, which has frozen some of the subspaces."""
    model = attached()
    optimizer = adamw(model)
    budget = BudgetController(model, optimizer, BudgetConfig(target=target, end_step=3))
    train(model, optimizer, 4)
    return model, optimizer, budget


def test_an_average_of_the_state_of_a_model_under_a_controller():
    model, optimizer, _ = held()
    average = copy.deepcopy(model)
    for _ in range(3):
        train(model, optimizer, 2)
        for mean, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
            mean.copy_(mean * 0.5 + value * 0.5)
    for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0.5)
    C = [m[0].adamss.default.C.detach() for m in (average, model)]
    assert not torch.equal(*C)
    factors = average[0].adamss.default.factors()
    assert torch.equal(factors.C, C[0])


@pytest.mark.parametrize("target", [10, 40])
def test_a_model_that_is_moved_under_a_controller(target):
    model, optimizer, budget = held(target)
    model.double().float()
    train(model, optimizer, 5)
    adapter = model[0].adamss.default
    adapter.active[:] = False
    y = model(X)
    for _ in range(2):
        assert torch.equal(adapter.factors().C, adapter.C)
        assert torch.equal(adapter.factors().B.t(), adapter.B)
        budget.remove()
    assert adapter.kept is None
    assert torch.equal(model(X), y)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_under_a_controller_is_free(copied):
    model, _, _ = held()
    twin = copied(model)
    close(twin, model)
    train(twin, adamw(twin), 5)
    y = twin(X)
    twin[0].adamss.default.active[:] = False
    assert torch.equal(twin(X), y)
    with torch.no_grad():
        twin[0].adamss.default.C.zero_()
    assert not torch.equal(twin(X), y)


@pytest.mark.parametrize("held_by", ["controller", "hold_frozen"])
def test_a_mask_set_by_hand_freezes_what_is_there(held_by):
    model = attached()
    optimizer = adamw(model)
    if held_by == "controller":
        BudgetController(model, optimizer, BudgetConfig(target=30, end_step=2))
    else:
        hold_frozen(model, optimizer)
    train(model, optimizer, 5)
    with torch.no_grad():
        model[0].adamss.default.C.mul_(2)  # between two steps
    y = model(X)
    for adapter in adapters_of(model).values():
        adapter.active[:] = False
    assert torch.equal(model(X), y)
    train(model, optimizer, 3)
    assert torch.equal(model(X), y)


# ---- wrappers within a path --------------------------------------------------------------------------------


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Sequential(nn.Linear(32, 32), nn.Tanh())
        self.head = nn.Linear(32, 32)

    def forward(self, x):
        return self.head(self.block(x))


def compiled(module):
    return torch.compile(module, backend="eager")


def in_parallel(module):
    return nn.DataParallel(module)


WRAPPERS = pytest.mark.parametrize(
    "wraps", [(checkpoint_wrapper,), (compiled,), (in_parallel,), (checkpoint_wrapper, compiled)]
)
VERBS = {
    "save": lambda model, folder: adamss.save(model, folder / "a.safetensors"),
    "merge": lambda model, folder: adamss.unmerge(adamss.merge(model)),
    "consolidate": lambda model, folder: adamss.consolidate(model),
    "to_lora": lambda model, folder: adamss.to_lora(model, folder / "lora"),
    "merge_and_unload": lambda model, folder: adamss.merge_and_unload(model),
    "detach": lambda model, folder: adamss.detach(model),
}


def wrapped(model, wraps):
    for wrap in wraps:
        model.block = wrap(model.block)
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from PyTorch's own compiler
@pytest.mark.filterwarnings("ignore:to_lora")
@WRAPPERS
@pytest.mark.parametrize("first", ["wrapped", "attached"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_block_that_is_wrapped(verb, first, wraps, tmp_path):
    config = AdamssConfig(targets=[r"block.0"], rank=16, subspaces=8, modules_to_save=["head"])

    def made(*, wrapped_first=False):
        model = wrapped(Blocks(), wraps) if wrapped_first else Blocks()
        model = adamss.attach(model, config)
        adapter = adapters_of(model)["block.0"]
        torch.manual_seed(1)
        adapter.C.data.normal_()
        adapter.active[0] = False
        return model

    model, plain = made(wrapped_first=first == "wrapped"), made()
    if first == "attached":
        wrapped(model, wraps)
    y = plain(X)
    torch.testing.assert_close(model(X), y)
    assert [row.path for row in adamss.summary(model).rows] == ["block.0"]
    VERBS[verb](model, tmp_path)
    VERBS[verb](plain, tmp_path)
    torch.testing.assert_close(model(X), plain(X))
    if verb == "save":
        torch.testing.assert_close(adamss.load(Blocks(), tmp_path / "a.safetensors")(X), y)
        torch.testing.assert_close(adamss.load(wrapped(Blocks(), wraps), tmp_path / "a.safetensors")(X), y)
    if verb in ("detach", "merge_and_unload"):
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert not any("adamss" in name for name in model.state_dict())


# ---- models that are changed under their adapters ----------------------------------------------------------


def replaced(model):
    model[2] = nn.Linear(32, 32)


def resized(model):
    model[2].weight = nn.Parameter(torch.randn(40, 32))


def without_bias(model):
    model[2].bias = None


def gone(model):
    del model[2]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (replaced, "2 has been replaced by another module"),
        (resized, r"2 has a weight of shape \(40, 32\) now"),
        (gone, "2 is not in the model any more"),
        (without_bias, "2 has no bias any more"),
    ],
)
def test_a_layer_that_is_lost_is_named(change, what, tmp_path):
    model = attached(include_bias=True)
    train(model, adamw(model), 2)
    first = copy.deepcopy(model)
    change(model)
    for verb in (
        *VERBS.values(),
        lambda m, _: adamss.summary(m),
        lambda m, _: adamss.trainable_parameters(m),
    ):
        if verb is not VERBS["save"]:
            with pytest.raises(StateError, match=what):
                verb(model, tmp_path)
    with pytest.raises(StateError, match=what):
        BudgetController(model, adamw(first), BudgetConfig(target=5, end_step=4))
    with pytest.warns(AdamssWarning, match=f"save: {what}.*the file is without it"):
        adamss.save(model, tmp_path / "a.safetensors")
    left = adamss.load(net(), tmp_path / "a.safetensors")
    assert [row.path for row in adamss.summary(left).rows] == ["0"]
    torch.testing.assert_close(left[0](X), first[0](X))


def test_a_saved_module_that_is_resized_leaves_nothing_half_done(tmp_path):
    model = attached(targets="0", modules_to_save=["2"])
    train(model, adamw(model), 2)
    model[2] = nn.Linear(32, 40)
    before, y = copy.deepcopy(model.state_dict()), model(X)
    for verb in (adamss.detach, lambda m: adamss.disabled(m).__enter__()):
        with pytest.raises(
            StateError, match=r"2 of modules_to_save has been replaced or resized.*\(40, 32\)"
        ):
            verb(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    adamss.save(model, tmp_path / "a.safetensors")
    base = net()
    base[2] = nn.Linear(32, 40)
    torch.testing.assert_close(adamss.load(base, tmp_path / "a.safetensors")(X), y)
    torch.testing.assert_close(adamss.merge_and_unload(model)(X), y)


# ---- layers and weights of other kinds ---------------------------------------------------------------------


def halved_by_its_object():
    layer = nn.Linear(32, 32)
    inner = layer.forward
    layer.forward = lambda x: inner(x) / 2
    return layer


def halved_by_a_hook():
    layer = nn.Linear(32, 32)
    layer.register_forward_hook(lambda layer, inputs, output: output / 2)
    return layer


@pytest.mark.parametrize("make", [halved_by_its_object, halved_by_a_hook])
@pytest.mark.parametrize("verb", [adamss.merge, adamss.consolidate, adamss.merge_and_unload])
def test_a_layer_that_is_not_linear_in_its_weight_is_not_merged(make, verb):
    model = attached(lambda: nn.Sequential(nn.Linear(32, 32), nn.Tanh(), make()))
    torch.manual_seed(0)
    for adapter in adapters_of(model).values():
        adapter.C.data.normal_()
        adapter.active[0] = False
    y, weights = model(X), [model[i].weight.clone() for i in (0, 2)]
    with pytest.raises(LayerError, match=r"2: its forward is not that of its weight alone: .* differs by \d"):
        verb(model)
    assert torch.equal(model(X), y)
    assert all(torch.equal(model[i].weight, W) for i, W in zip((0, 2), weights, strict=True))


def test_half_of_an_update_is_missed_where_the_output_hides_it():
    for dtype, bias in ((torch.bfloat16, 0.0), (torch.float32, 40.0)):
        model = attached(lambda: nn.Sequential(halved_by_a_hook(), nn.Tanh(), nn.Linear(32, 32)).to(dtype))  # noqa: B023
        model[0].bias.data.fill_(bias)
        model[0].adamss.default.C.data.normal_()
        with pytest.raises(LayerError, match="0: its forward is not that of its weight alone"):
            adamss.merge(model)


class Gated(nn.Linear):
    """A linear layer with a second input, which a merge cannot guess."""

    def forward(self, x, gate):
        return super().forward(x) * gate


class GatedNet(nn.Module):
    def __init__(self, hooked):
        super().__init__()
        self.gated = Gated(32, 32)
        if hooked:
            self.gated.forward = self.gated.forward  # its computation is unknown

    def forward(self, x):
        return self.gated(x, 0.5)


def test_a_layer_that_cannot_be_tried_is_told():
    model = attached(lambda: GatedNet(hooked=True), targets=["gated"])
    with pytest.warns(
        AdamssWarning, match="gated: its forward could not be tried .*compare the output before and after"
    ):
        adamss.merge(model)
    assert model.gated.training


def test_a_layer_whose_class_has_a_forward_of_its_own_is_merged():
    """W + delta replaces its weight, whatever the forward does with it."""
    model = attached(lambda: GatedNet(hooked=False), targets=["gated"])
    model.gated.adamss.default.C.data.normal_()
    y = model(X)
    torch.testing.assert_close(adamss.merge(model)(X), y)


class Plain(nn.Linear):
    """A subclass whose forward computes the same as its base class."""

    def forward(self, x):
        return super().forward(x)


def test_a_subclass_that_is_linear_is_merged():
    model = attached(lambda: nn.Sequential(Plain(32, 32), nn.Tanh(), nn.Linear(32, 32)))
    train(model, adamw(model), 2)
    y = model(X)
    torch.testing.assert_close(adamss.merge(model)(X), y)


class Codes(torch.Tensor):
    """A tensor subclass that supports only a few operators, like those of quantisers."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values):
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        if function is torch.ops.aten.detach.default:
            return cls(arguments[0].values)
        raise NotImplementedError(f"no implementation of {function}")

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), keywords=None):
        if function is nn.functional.linear:
            x, weight, bias = arguments
            return function(x, weight.values, bias)
        return super().__torch_function__(function, types, arguments, keywords or {})


class Dequantisable(Codes):
    def dequantize(self):
        return self.values


class Transposable(Codes):
    """A tensor with one more operator, so that it fails only in the decomposition."""

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        if function is torch.ops.aten.permute.default:
            return cls(arguments[0].values.permute(arguments[1]))
        return super().__torch_dispatch__(function, types, arguments, keywords)


def quantised(model, kind):
    for number in (0, 2):
        model[number].weight = nn.Parameter(kind(model[number].weight.detach()), requires_grad=False)
    return model


def test_a_weight_that_nobody_can_read(tmp_path):
    for kind in (Codes, Transposable):
        with pytest.raises(LayerError, match=f"0: its weight is a {kind.__name__}, which no store can read"):
            adamss.attach(quantised(net(), kind), AdamssConfig(targets="[02]", rank=8))
    model = attached()
    train(model, adamw(model), 2)
    y = model(X)
    quantised(model, Codes)
    torch.testing.assert_close(model(X), y)
    with pytest.raises(LayerError, match="0: its weight is a Codes"):
        adamss.merge(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        adamss.save(model, tmp_path / "a.safetensors")
    for number, warning in zip((0, 2), told, strict=True):
        assert f"base weight of {number} cannot be read" in str(warning.message)
        assert "load it with check_base=False" in str(warning.message)
    torch.testing.assert_close(adamss.load(net(), tmp_path / "a.safetensors", check_base=False)(X), y)


def test_a_weight_that_can_be_dequantised(tmp_path):
    model = attached(lambda: quantised(net(), Dequantisable))
    train(model, adamw(model), 2)
    assert (model(X) - net()(X)).abs().max() > 0.01
    close(saved(model, tmp_path / "a.safetensors"), model)
    with pytest.raises(
        LayerError, match=r"is quantised \(Dequantisable\), which would round the update away"
    ):
        adamss.merge(model)
    assert torch.equal(adamss.detach(model)(X), quantised(net(), Dequantisable)(X))


def test_a_weight_that_is_no_matrix():
    model = net()
    model[2].weight = nn.Parameter(torch.randn(32))
    with pytest.raises(LayerError, match=r"2: its weight has shape \(32,\), where 2 axes are expected"):
        adamss.attach(model, AdamssConfig(targets="[02]", rank=8))


def test_what_computes_a_weight_is_no_layer():
    model = net()
    torch.nn.utils.parametrizations.orthogonal(model[0])
    assert [row.path for row in adamss.summary(attached(lambda: model, targets=["0"])).rows] == ["0"]


# ---- export and tracing ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of sizes, which do not depend on the rows
@pytest.mark.parametrize("form", ["adapted", "merged", "consolidated"])
@pytest.mark.parametrize("way", ["export", "trace", "trace without gradients", "onnx"])
@pytest.mark.parametrize(
    "settings", [{}, {"subspace_rank": 2}, {"subspace_rank": 2, "basis": "per_subspace"}]
)
def test_exported_for_any_number_of_rows(settings, way, form, tmp_path):
    model = attached(**settings)
    train(model, adamw(model), 2)
    for adapter in adapters_of(model).values():
        adapter.active[0] = False
    if form != "adapted":
        {"merged": adamss.merge, "consolidated": adamss.consolidate}[form](model)
    match way:
        case "export":
            rows = torch.export.Dim("rows")
            exported = torch.export.export(model, (X,), dynamic_shapes=({0: rows},)).module()
        case "trace":
            exported = torch.jit.trace(model, X)
        case "trace without gradients":
            with torch.no_grad():
                exported = torch.jit.trace(model, X)
        case "onnx":
            onnxruntime = pytest.importorskip("onnxruntime")
            pytest.importorskip("onnx")
            axes = {"x": {0: "rows"}}
            file = str(tmp_path / "model.onnx")
            torch.onnx.export(model, (X,), file, dynamo=False, dynamic_axes=axes, input_names=["x"])
            session = onnxruntime.InferenceSession(file)

            def exported(x):
                return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

    for x in (X[:5], X[:1], X.repeat(20, 1)):
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


# ---- schedules that nobody follows, and small things -------------------------------------------------------


def test_a_schedule_without_a_controller_is_told_when_saving(tmp_path):
    schedule = BudgetConfig(target=5, end_step=3)
    model = attached(budget=schedule)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adamss.save(model, tmp_path / "fresh.safetensors")
    train(model, adamw(model), 2)
    with pytest.warns(
        AdamssWarning, match="a budget of 5 subspaces, but all 40 .*nothing in this process follows"
    ):
        adamss.save(model, tmp_path / "a.safetensors")
    model = attached(budget=schedule)
    optimizer = adamw(model)
    budget = BudgetController(model, optimizer)
    train(model, optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adamss.save(model, tmp_path / "half way")
    train(model, optimizer, 2)
    budget.remove()


@pytest.mark.parametrize("end", ["remove", "collected"])
def test_an_optimiser_that_never_steps_by_that_name(end):
    model = attached()
    optimizer = adamw(model)
    optimizer.first_step = lambda: [p.data.add_(0.1) for p in adamss.trainable_parameters(model)]
    budget = BudgetController(model, optimizer, BudgetConfig(target=5, end_step=3))
    optimizer.first_step()
    if end == "remove":
        finish = budget.remove
    else:
        del budget, optimizer
        finish = gc.collect
    with pytest.warns(AdamssWarning, match=r"B and C have changed, but never in the optimiser's step\(\)"):
        finish()


def test_a_controller_that_was_never_used_says_nothing():
    model = attached()
    budget = BudgetController(model, adamw(model), BudgetConfig(target=5, end_step=3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        budget.remove()


@pytest.mark.parametrize("name", ["a" * 240, "\u00e4" * 120 + "b"])
def test_a_long_name_of_a_file(name, tmp_path):
    model = attached()
    adamss.save(model, tmp_path / name)
    adamss.save(model, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    close(adamss.load(net(), tmp_path / name), model)


def test_an_exported_adapter_names_its_base(tmp_path):
    model = attached()
    adamss.to_lora(model, tmp_path / "unnamed")
    model.name_or_path = "someone/some-model"
    adamss.to_lora(model, tmp_path / "named")
    for folder, name in (("unnamed", None), ("named", "someone/some-model")):
        settings = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == name
