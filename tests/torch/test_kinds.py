"""Test that kinds of layers and weight stores that `adamss` does not know can be registered from outside."""

import contextlib
import copy
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import adamss
from adamss import core, errors
from adamss.backend import Kind, Store, View, backend_for
from adamss.io import checkpoint as files
from adamss.verbs.table import summarise
from adamss_torch import BudgetController
from adamss_torch.backend import adapters_of
from adamss_torch.bank import LayerBank, without_weights
from adamss_torch.kinds import Convolution, OwnParameterKind, kinds
from adamss_torch.stores import stores


class Turned(nn.Module):
    """A linear layer whose weight has the shape (d, n), as in GPT-2."""

    def __init__(self, d, n):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(d, n) / d**0.5), nn.Parameter(torch.randn(n))

    def forward(self, x):
        return x @ self.weight + self.bias


class TurnedKind(Kind):
    classes = (Turned,)

    def view(self, layer, path):
        return View(rows=(0,), columns=(1,))


class EightBits(nn.Module):
    """A linear layer whose weight has eight bits and a scale for each output."""

    def __init__(self, d, n):
        super().__init__()
        weight = torch.randn(n, d) / d**0.5
        self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("weight", (weight / self.scale).round().to(torch.int8))
        self.bias = None

    def forward(self, x):
        return x @ (self.weight * self.scale).t()


class EightBitsKind(Kind):
    classes = (EightBits,)

    def view(self, layer, path):
        return View(rows=(1,), columns=(0,))


class EightBitsStore(Store):
    def holds(self, layer, name):
        return isinstance(layer, EightBits) and name == "weight"

    def read(self, layer, name):
        return layer.weight * layer.scale

    def refusal(self, layer, name):
        return (
            "is kept in eight bits, which would round the update away; export the adapter by adamss.to_lora"
        )

    def write(self, layer, name, value):
        raise AssertionError("nobody asked")


@pytest.fixture(autouse=True)
def registered():
    own, store = (TurnedKind(), EightBitsKind()), EightBitsStore()
    with contextlib.ExitStack() as stack:
        for kind in own:
            kinds.register(kind)
            stack.callback(kinds.unregister, kind)
        stores.register(store)
        stack.callback(stores.unregister, store)
        yield


# ---- layers, and parts of modules that are adapted as if they were layers -----------------------------


class SamePadded(nn.Conv2d):
    """A convolution with its own forward, as in timm."""

    def forward(self, x):
        return self._conv_forward(nn.functional.pad(x, (1, 0, 1, 0)), self.weight, self.bias)


class Standardised(nn.Conv2d):
    """A convolution that is not linear in its weight."""

    def forward(self, x):
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std(
            (1, 2, 3), keepdim=True
        )
        return self._conv_forward(x, weight, self.bias)


class Normalised(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, nn.functional.normalize(self.weight, dim=1), self.bias)


class Scaled(nn.Embedding):
    """An embedding with its own forward, as in Gemma."""

    def forward(self, ids):
        return super().forward(ids) * 8.0


class Router(nn.Module):
    """A module that reads a Parameter of two axes itself."""

    def __init__(self):
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(10, 12)), nn.Parameter(torch.ones(10))

    def forward(self, x):
        return nn.functional.linear(x, self.weight) * self.scale


class Experts(nn.Module):
    """A layer of experts whose weights are stacked in two Parameters; each token goes to one expert."""

    def __init__(self, experts=3, d=12, inner=10, transposed=False):
        super().__init__()
        if transposed:
            self.is_transposed = True
        shapes = (experts, d, inner), (experts, inner, d)
        up, down = (torch.randn(shape if transposed else (shape[0], *shape[:0:-1])) / 3 for shape in shapes)
        self.up_proj, self.down_proj = nn.Parameter(up), nn.Parameter(down)

    def forward(self, x):
        up, down = self.up_proj, self.down_proj
        if not hasattr(self, "is_transposed"):
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        outputs = []
        for number, tokens in enumerate(x.reshape(-1, x.shape[-1]).tensor_split(up.shape[0])):
            outputs.append(torch.relu(tokens @ up[number]) @ down[number])
        return torch.cat(outputs).view(x.shape)


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 3, batch_first=True, **options)
        self.other = options.get("kdim", 12)

    def forward(self, x):
        other = x.repeat(1, 1, 2)[..., : self.other]
        return self.attn(x, other, other, need_weights=False)[0]


class Mixer(nn.Module):
    """A module that reads the weight of a layer without calling it, like Mamba's mixer and Swin's attention."""

    def __init__(self):
        super().__init__()
        self.dt_proj, self.out = nn.Linear(12, 10), nn.Linear(10, 4)

    def forward(self, x):
        return self.out(x.to(self.out.weight.dtype) @ self.dt_proj.weight.t() + self.dt_proj.bias)


def images(layer, *size):
    return lambda: (nn.Sequential(layer(), nn.Tanh()), torch.randn(2, *size))


def tokens(layer):
    return lambda: (nn.Sequential(layer(), nn.Tanh()), torch.randn(3, 4, 12))


def words(layer):
    return lambda: (nn.Sequential(layer(), nn.Tanh()), torch.tensor([[0, 4, 3], [2, 3, 1]]))


EVERY_PARAMETER = ".*proj|.*weight"
LAYERS = {
    "turned": (tokens(lambda: Turned(12, 10)), ["0"]),
    "eight bits": (tokens(lambda: EightBits(12, 10)), ["0"]),
    "conv1d": (images(lambda: nn.Conv1d(6, 10, 3, padding=1), 6, 9), ["0"]),
    "conv1d unbatched": (lambda: (nn.Sequential(nn.Conv1d(6, 10, 3)), torch.randn(6, 9)), ["0"]),
    "conv1d circular": (images(lambda: nn.Conv1d(6, 10, 3, padding=2, padding_mode="circular"), 6, 9), ["0"]),
    "conv2d": (
        images(lambda: nn.Conv2d(5, 10, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), 5, 9, 8),
        ["0"],
    ),
    "conv2d reflect": (
        images(lambda: nn.Conv2d(5, 10, 3, padding=2, padding_mode="reflect"), 5, 9, 8),
        ["0"],
    ),
    "conv2d same": (images(lambda: nn.Conv2d(5, 10, 3, padding="same", bias=False), 5, 9, 8), ["0"]),
    "conv3d": (images(lambda: nn.Conv3d(3, 10, 2, stride=2), 3, 5, 6, 4), ["0"]),
    "conv2d of its own": (images(lambda: SamePadded(5, 10, 2), 5, 6, 6), ["0"]),
    "conv2d standardised": (images(lambda: Standardised(5, 10, 2), 5, 6, 6), ["0"]),
    "embedding": (words(lambda: nn.Embedding(9, 10)), ["0"]),
    "embedding of few rows": (words(lambda: nn.Embedding(5, 10)), ["0"]),
    "embedding padded": (words(lambda: nn.Embedding(9, 10, padding_idx=3)), ["0"]),
    "embedding of its own": (words(lambda: Scaled(9, 10, padding_idx=3)), ["0"]),
    "linear of its own": (tokens(lambda: Normalised(12, 10)), ["0"]),
    "parameter": (tokens(Router), ["weight"]),
    "experts": (tokens(Experts), ["up_proj", "down_proj"]),
    "experts transposed": (tokens(lambda: Experts(transposed=True)), EVERY_PARAMETER),
    "attention packed": (lambda: (Attention(), torch.randn(3, 4, 12)), ["attn"]),
    "attention, two of four": (
        lambda: (Attention(bias=False), torch.randn(3, 4, 12)),
        ["v_proj", "out_proj"],
    ),
    "attention separate": (lambda: (Attention(kdim=15, vdim=15), torch.randn(3, 4, 12)), ["attn"]),
    "weight read by others": (lambda: (Mixer(), torch.randn(3, 4, 12)), ["dt_proj", "out"]),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
writable_layers = pytest.mark.parametrize("name", [name for name in LAYERS if name != "eight bits"])


def made(name, **options):
    torch.manual_seed(0)
    make, targets = LAYERS[name]
    model, x = make()
    settings = {"rank": 6, "subspaces": 4, "subspace_rank": 2} | options
    return model, x, adamss.AdamssConfig(targets=targets, **settings)


def trained(name, steps=3, **options):
    """Return a model after some training steps, with one frozen subspace in each layer."""
    model, x, config = made(name, **options)
    adamss.attach(model, config)
    for adapter in adapters_of(model).values():
        adapter.active[1] = False
        adapter.C.data[:, adapter.labels == 1] = 0.3
    optimizer = torch.optim.SGD(adamss.trainable_parameters(model), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    return model, x


def put_updates_in(model):
    """Detach the adapters, and write W + delta to the weights."""
    backend, adaptation = backend_for(model), backend_for(model).bank(model).only()
    adamss.detach(model)
    modules = backend.modules(model)
    for path, factors in adaptation.layers.items():
        site = backend.site(modules[path], path)
        (weight,) = (backend.own_arrays(site)["weight"],)
        moved = site.view.array(core.delta(factors), weight.shape)
        assert moved.abs().max() > 0.01
        if isinstance(site.layer, EightBits):
            site.layer.weight, site.layer.scale = weight + moved, torch.ones(())
        else:
            site.layer.weight.data += moved
    return model


@every_layer
@torch.no_grad()  # with gradients attention uses other kernels, whose last bits differ
def test_starts_equal_and_gives_the_base_back(name):
    model, x, config = made(name)
    model.requires_grad_(False)
    before, expected = {n: t.clone() for n, t in model.state_dict().items()}, model(x)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    adamss.attach(model, config)
    assert torch.equal(model(x), expected)
    assert before.keys() < model.state_dict().keys()
    for parameter in adamss.trainable_parameters(model):
        parameter.add_(1)
    assert not torch.equal(model(x), expected)
    with adamss.disabled(model):
        assert torch.equal(model(x), expected)
    adamss.detach(model)
    assert torch.equal(model(x), expected)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


@pytest.mark.parametrize("name", ["conv1d", "conv2d reflect"])
def test_an_input_whose_projection_overflows_still_starts_equal(name):
    """Law 1: infinity in ``x M`` times C = 0 must not give NaN."""
    model, x, config = made(name)
    model[0].weight.data *= 1e-3
    x = torch.full_like(x, 3e38)
    expected = model(x)
    adamss.attach(model, config)
    adapter = adapters_of(model)["0"]
    adapter.B.data *= 1e3
    assert not kinds.of(model[0], "0").project(model[0], x, adapter.products()[0]).isfinite().all()
    assert torch.equal(model(x), expected)


@every_layer
@pytest.mark.parametrize("basis", ["shared", "per_subspace"])
def test_computes_what_the_layer_computes_with_the_updated_weight(name, basis):
    model, x = trained(name, basis=basis)
    model, x = model.double(), x.double() if x.is_floating_point() else x
    y, again = model(x), model(x)
    assert torch.equal(y, again)
    torch.testing.assert_close(put_updates_in(model)(x), y)


@every_layer
def test_gradients_are_those_of_finite_differences_and_none_for_frozen_subspaces(name):
    model, x = trained(name)
    model, x = model.double(), x.double() if x.is_floating_point() else x
    model.zero_grad()
    (model(x) ** 2).sum().backward()
    for adapter in adapters_of(model).values():
        for parameter, kept in zip((adapter.B, adapter.C), adapter.trained_elements(), strict=True):
            assert torch.equal(parameter.grad, torch.where(kept, parameter.grad, 0))
            direction = torch.where(kept, torch.randn_like(parameter), 0)
            ends = []
            for sign in (1, -1):
                parameter.data += sign * 1e-5 * direction
                ends.append((model(x) ** 2).sum())
                parameter.data -= sign * 1e-5 * direction
            slope = (ends[0] - ends[1]) / 2e-5
            torch.testing.assert_close((parameter.grad * direction).sum(), slope, rtol=1e-5, atol=1e-7)


@every_layer
@pytest.mark.parametrize("training", [False, True])
def test_goes_into_a_file_and_back(name, training, tmp_path):
    model, x = trained(name)
    adamss.save(model, tmp_path / "a.safetensors", training=training)
    other, _, _ = made(name)
    adamss.load(other, tmp_path / "a.safetensors")
    torch.testing.assert_close(other(x), model(x))
    ours, theirs = adapters_of(model), adapters_of(other)
    for path, adapter in ours.items():
        assert torch.equal(adapter.labels, theirs[path].labels)
        assert not training or torch.equal(adapter.B, theirs[path].B)
    stored = files.read(tmp_path / "a.safetensors").layers
    shown = [summarise(path, layer.base.shape, layer.outline()) for path, layer in stored.items()]
    assert tuple(shown) == adamss.summary(model if training else inference(name, tmp_path)).rows


def inference(name, folder):
    return adamss.load(made(name)[0], folder / "a.safetensors", trainable=False)


@every_layer
def test_state_dicts_copies_and_pickles(name):
    model, x = trained(name)
    y, other = model(x), made(name)
    adamss.attach(other[0], other[2])
    other[0].load_state_dict(model.state_dict())
    assert torch.equal(other[0](x), y)
    assert torch.equal(copy.deepcopy(model)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), y)


@every_layer
def test_a_budget_is_kept_to_the_subspace(name):
    model, x, config = made(name)
    adamss.attach(model, config)
    target = max(3, len(adapters_of(model)))
    budget = adamss.BudgetConfig(target=target, end_step=4, minimum_per_layer=1)
    optimizer = torch.optim.AdamW(adamss.trainable_parameters(model), lr=0.05)
    controller = BudgetController(model, optimizer, budget)
    for _ in range(6):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    assert controller.step == 6
    assert adamss.summary(model).total.active == target
    kept = {path: adapter.C.detach().clone() for path, adapter in adapters_of(model).items()}
    (model(x) - 1).square().mean().backward()
    optimizer.step()
    for path, adapter in adapters_of(model).items():
        frozen = ~adapter.active[adapter.labels]
        assert torch.equal(adapter.factors().C[:, frozen], kept[path][:, frozen])
    controller.remove()


@pytest.mark.parametrize("name", ["linear of its own", "experts", "attention packed"])
def test_a_state_without_the_weights_says_so(name):
    model, _ = trained(name)
    state = without_weights({n: t for n, t in model.state_dict().items() if ".adamss." in f".{n}"})
    assert sum(n.endswith(".in_weight") for n in state) == len(adapters_of(model))


@writable_layers
@pytest.mark.parametrize("keep_base", [True, False])
def test_merges_and_consolidates(name, keep_base):
    model, x = trained(name)
    y, before = model(x), {n: t.clone() for n, t in model.state_dict().items() if ".adamss." not in f".{n}"}
    adamss.consolidate(model)
    torch.testing.assert_close(model(x), y, atol=1e-5, rtol=1e-5)
    adamss.merge(model, keep_base=keep_base)
    assert all(not bank.computed for bank in model.modules() if isinstance(bank, LayerBank))
    torch.testing.assert_close(model(x), y, atol=1e-5, rtol=1e-5)
    if keep_base:
        adamss.unmerge(model)
        assert torch.equal(model(x), y)
        assert all(torch.equal(t, model.state_dict()[n]) for n, t in before.items())
    else:
        torch.testing.assert_close(adamss.merge_and_unload(model)(x), y, atol=1e-5, rtol=1e-5)
        assert model.state_dict().keys() == before.keys()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", ["conv2d", "embedding padded", "experts", "attention packed", "parameter"])
def test_compiles(name):
    model, x = trained(name)
    model.zero_grad()
    y = model(x)
    y.sum().backward()
    expected = [parameter.grad.clone() for parameter in adamss.trainable_parameters(model)]
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), y)
    compiled(x).sum().backward()
    for parameter, gradient in zip(adamss.trainable_parameters(model), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["experts", "attention packed", "parameter", "conv2d", "embedding"])
def test_under_autocast_a_weight_keeps_its_dtype(name):
    model, x = trained(name)
    seen = set()
    for module in model.modules():
        if "_adamss_reads" in vars(module):
            module.register_forward_pre_hook(
                lambda module, args: seen.update(
                    p.dtype for p in module._parameters.values() if p is not None
                )
            )
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            model(x).float(), put_updates_in(copy.deepcopy(model))(x).float(), atol=0.03, rtol=0.03
        )
    assert seen <= {torch.float32}


class Outside(nn.Module):
    """A module that reads the Parameter of a module without calling it, and calls another method than forward."""

    def __init__(self):
        super().__init__()
        self.own, self.attn = Router(), nn.MultiheadAttention(12, 3)

    def forward(self, x):
        h = x @ self.own.weight.t() @ self.own.weight
        return self.attn.out_proj(nn.functional.linear(h, self.attn.in_proj_weight)[..., 12:24])


class LaterPath(nn.Module):
    """A module that reads the weight of a layer without calling the layer, but only in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 12, bias=False)

    def forward(self, x):
        return self.fc(x) if self.training else x @ self.fc.weight.t()


class Given(nn.Module):
    """A module that passes the weight of a layer to another module."""

    def __init__(self):
        super().__init__()
        self.fc, self.product = nn.Linear(12, 12, bias=False), Product()

    def forward(self, x):
        return self.product(x, self.fc.weight)


class Product(nn.Module):
    def forward(self, x, weight):
        return x @ weight.t()


class Dropped(nn.Module):
    """A module whose second block does not run in the first forward pass."""

    def __init__(self):
        super().__init__()
        self.blocks, self.forwards = nn.ModuleList([Given(), Given()]), 0

    def forward(self, x):
        self.forwards += 1
        return self.run(x) if self.forwards > 1 else self.blocks[0](x)

    def run(self, x):
        return self.blocks[1](self.blocks[0](x))


@pytest.mark.parametrize("make", [Outside, LaterPath, Given, Dropped, Router])
def test_parameters_that_are_read_outside_of_a_forward(make):
    torch.manual_seed(0)
    # `Router` is not wrapped, to cover a model that reads its own Parameter.
    model, x = make() if make is Router else nn.Sequential(make()), torch.randn(3, 12)
    targets = {Outside: ["own.weight", "k_proj", "attn.out_proj"], Router: ["weight"]}.get(make, ["fc"])
    adamss.attach(model, adamss.AdamssConfig(targets=targets, rank=6, subspaces=3))
    for adapter in adapters_of(model).values():
        adapter.C.data.normal_()
    if make is Dropped:
        model(x)
    outputs = [model.train(mode)(x) for mode in (True, True, False, False)]
    merged = adamss.merge(model)(x)
    for output in outputs:
        torch.testing.assert_close(output, merged, atol=1e-4, rtol=1e-4)


def test_parts_of_a_model_that_has_not_run_as_a_whole():
    torch.manual_seed(0)
    model, x = Dropped(), torch.randn(3, 12)
    adamss.attach(model, adamss.AdamssConfig(targets=["fc"], rank=6, subspaces=3))
    for adapter in adapters_of(model).values():
        adapter.C.data.normal_()
    outputs = [model.run(x) for _ in range(3)]
    for output in outputs:
        torch.testing.assert_close(output, adamss.merge(copy.deepcopy(model)).run(x), atol=1e-4, rtol=1e-4)


def test_a_weight_that_is_kept_elsewhere_is_refused():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(12, 12)
            self.kept = [self.fc.weight]

        def forward(self, x):
            return x @ self.kept[0]

    model, x = nn.Sequential(Keeps()), torch.randn(3, 12)
    adamss.attach(model, adamss.AdamssConfig(targets=["fc"], rank=6, subspaces=3))
    model(x)
    for _ in range(2):
        with pytest.raises(errors.LayerError, match=r"^0\.fc: Keeps keeps its weight in a place of its own"):
            model(x)


def test_a_parameter_that_another_module_has_too():
    class Turn(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

        def forward(self, x):
            return torch.tanh(x @ self.weight)

    weight, x = nn.Parameter(torch.randn(12, 12)), torch.randn(3, 12)
    model = nn.Sequential(Turn(weight), Turn(weight))
    with pytest.warns(errors.AdamssWarning, match=r"attach: 0\.weight is one tensor with 1\.weight"):
        adamss.attach(model, adamss.AdamssConfig(targets=["0.weight"], rank=6, subspaces=3))
    for adapter in adapters_of(model).values():
        adapter.C.data.normal_()
    assert torch.equal(model(x), model(x))
    with pytest.warns(errors.AdamssWarning, match="a merged weight of its own"):
        torch.testing.assert_close(model(x), adamss.merge(model)(x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padded_tokens_of_an_encoder_in_evaluation_with_gradients():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    adamss.attach(model, adamss.AdamssConfig(targets=["linear1", "self_attn"], rank=4, subspaces=2))
    for adapter in adapters_of(model).values():
        adapter.C.data.normal_(std=0.1)
    x, mask = torch.randn(2, 5, 8), torch.tensor([[False] * 3 + [True] * 2, [False] * 4 + [True]])
    outputs = [model(x, src_key_padding_mask=mask)[~mask] for _ in range(3)]
    with torch.no_grad():
        outputs += [model(x, src_key_padding_mask=mask)[~mask] for _ in range(3)]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], atol=1e-5, rtol=1e-5)
    assert adamss.detach(model).use_nested_tensor is True


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_transformations_of_a_model_that_has_not_run():
    model, x, config = made("parameter")
    model = adamss.attach(model, config)
    torch.func.grad(lambda x: model(x).sum())(x)
    pickle.dumps(model)
    model = adamss.attach(made("parameter")[0], config)
    assert torch.equal(torch.jit.trace(model, x, check_trace=True)(x), model(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_within_a_reader_is_refused(reentrant):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(12, 12))

        def mix(self, x):
            return torch.tanh(x @ self.weight)

        def forward(self, x):
            return checkpoint(self.mix, x, use_reentrant=reentrant)

    model, x = nn.Sequential(Reader()), torch.randn(3, 12, requires_grad=True)
    adamss.attach(model, adamss.AdamssConfig(targets=["weight"], rank=4, subspaces=2))
    with pytest.raises(errors.StateError, match=r"^Reader checkpoints activations within its forward"):
        model(x)


class Nested(nn.Module):
    """A module that reads the weight of a layer which reads it too, and that calls itself."""

    def __init__(self):
        super().__init__()
        self.inner, self.w = Normalised(12, 12), nn.Parameter(torch.randn(12, 12))

    def forward(self, x, depth=1):
        return (self(x, depth - 1) if depth else self.inner(x) + x @ self.inner.weight.t()) @ self.w


def test_readers_that_run_within_each_other():
    torch.manual_seed(0)
    x = torch.randn(3, 4, 12)
    model = adamss.attach(
        nn.Sequential(Nested()), adamss.AdamssConfig(targets=["inner", "w"], rank=6, subspaces=3)
    )
    for adapter in adapters_of(model).values():
        adapter.C.data.normal_()
    first, again = model(x), model(x)
    torch.testing.assert_close(again, first)
    torch.testing.assert_close(adamss.merge(model)(x), first)


def test_threads_do_not_take_each_others_sum_for_the_parameter():
    model, x = trained("experts")
    weight = model[0].up_proj
    with torch.no_grad():
        y = model(x)
        with ThreadPoolExecutor(4) as pool:
            outputs = list(pool.map(lambda _: torch.no_grad()(model)(x), range(200)))
    assert all(torch.equal(output, y) for output in outputs)
    assert model[0].up_proj is weight


def test_a_forward_that_was_interrupted_leaves_nothing_behind():
    model, x, config = made("experts")
    weight, inner = model[0].up_proj, model[0].forward
    adamss.attach(model, config)

    def interrupted(x):
        inner(x)
        raise KeyboardInterrupt

    model[0].forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        model(x)
    del model[0].forward
    assert torch.equal(model.state_dict()["0.up_proj"], weight)
    assert model[0].up_proj is weight
    adamss.detach(model)
    assert torch._C._len_torch_function_stack() == 0
    adamss.attach(model, config)
    assert torch.equal(model(x), inner(x).tanh())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_embedding_of_no_words_and_a_nested_tensor():
    model = adamss.attach(nn.Sequential(nn.Embedding(9, 6)), adamss.AdamssConfig(targets=["0"], rank=3))
    assert model(torch.zeros(0, 3, dtype=torch.long)).shape == (0, 3, 6)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).eval()
    adamss.attach(
        model, adamss.AdamssConfig(targets=["linear1", "linear2"], rank=4, subspaces=2, include_bias=True)
    )
    for adapter in adapters_of(model).values():
        adapter.C.data.normal_(std=0.1)
    x, mask = torch.randn(2, 5, 8), torch.tensor([[False] * 3 + [True] * 2, [False] * 4 + [True]])
    with torch.no_grad():
        outputs = [model(x, src_key_padding_mask=mask)[~mask] for _ in range(3)]
    expected = model(x.requires_grad_(), src_key_padding_mask=mask)[~mask]
    for output in outputs:
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_replicas_of_data_parallel_are_refused_where_a_weight_is_put_in_place():
    model, x = trained("experts")
    replica = model[0]._replicate_for_data_parallel()
    with pytest.raises(
        errors.StateError, match=r"DataParallel runs copies of a Experts.*DistributedDataParallel"
    ):
        replica(x)
    model(x)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("what", ["blocks", "a function"])
def test_parts_of_a_model_are_compiled_once(what):
    """They run uncompiled while the first forward pass is watched, so that no graph has to be compiled again."""
    compiled, graphs = CompileCounterWithBackend("aot_eager"), []

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 12)
            self.act = torch.compile(torch.tanh, backend=compiled) if what == "a function" else torch.tanh

        def forward(self, x):
            return x + F.linear(self.act(self.up(x)), self.down.weight)

    model = adamss.attach(
        nn.Sequential(Block(), Block()), adamss.AdamssConfig(targets=["up", "down"], rank=4, subspaces=2)
    )
    if what == "blocks":
        for block in model:
            block.compile(backend=compiled, fullgraph=True)
    for _ in range(5):
        model(torch.randn(3, 12)).sum().backward()
        graphs.append(compiled.frame_count)
    assert graphs[0] == 0 < graphs[2] == graphs[-1]
    assert all(adapter.C.grad.any() for adapter in adapters_of(model).values())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    "name", ["experts", "attention separate", "conv2d of its own", "weight read by others"]
)
def test_under_activation_checkpointing(name, reentrant):
    model, x = trained(name)
    x.requires_grad_()
    model.zero_grad()
    model(x).sum().backward()
    expected = [parameter.grad.clone() for parameter in adamss.trainable_parameters(model)]
    model.zero_grad()
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    for parameter, gradient in zip(adamss.trainable_parameters(model), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


NO_LORA = {
    "conv1d circular": r"^inner\.0 is a Conv1d with padding_mode = 'circular', which PEFT's LoRA leaves out",
    "conv2d": r"^inner\.0 is a Conv2d with dilation = \(1, 2\), which PEFT's LoRA leaves out",
    "conv2d reflect": r"^inner\.0 is a Conv2d with padding_mode = 'reflect', which PEFT's LoRA leaves out",
    "conv2d standardised": r"^inner\.0: its weight is read by Standardised, where PEFT's LoRA would have no effect",
    "conv2d of its own": r"^inner\.0: its weight is read by SamePadded, where PEFT's LoRA would have no effect",
    "attention packed": r"^inner\.attn\.q_proj is a Projection, whose update to_lora has no form for",
    "attention separate": r"^inner\.attn\.q_proj is a Projection, whose update to_lora has no form for",
    "attention, two of four": r"^inner\.attn\.v_proj is a Projection, whose update to_lora has no form for",
    "weight read by others": r"^inner\.dt_proj: its weight is read by Mixer, where PEFT's LoRA would have no effect",
}


class Outer(nn.Module):
    """A wrapper, because PEFT does not adapt Parameters of the outermost module."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("turned", "eight bits")])
def test_peft_loads_it_as_a_lora(name, tmp_path):
    peft = pytest.importorskip("peft")
    base, x, config = made(name)
    model = adamss.attach(Outer(copy.deepcopy(base)), config)
    for adapter in adapters_of(model).values():
        adapter.C.data.normal_(std=0.1)
    y = model(x)
    if name in NO_LORA:
        with pytest.raises(errors.LayerTypeError, match=NO_LORA[name]):
            adamss.to_lora(model, tmp_path)
        return
    adamss.to_lora(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(Outer(base), tmp_path)
    torch.testing.assert_close(loaded(x), y)


def test_what_cannot_be_written_is_refused_with_the_reason_of_its_store(tmp_path):
    model, x = trained("eight bits")
    y, before = model(x), model[0].weight.clone()
    for verb in (adamss.merge, adamss.consolidate, adamss.merge_and_unload):
        with pytest.raises(errors.LayerError, match=r"^0: its weight is kept in eight bits.*adamss\.to_lora"):
            verb(model)
    assert torch.equal(model(x), y)
    assert torch.equal(model[0].weight, before)
    assert adamss.to_lora(model, tmp_path).rank == int(adapters_of(model)["0"].ranks.sum())


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (lambda: nn.Conv1d(6, 6, 3, groups=2), r"^0 is a Conv1d that is of 2 groups"),
        (lambda: nn.Conv2d(6, 12, 3, groups=6), r"^0 is a Conv2d that is depthwise"),
        (lambda: nn.ConvTranspose2d(6, 6, 3), r"^0 is a ConvTranspose2d, a transposed convolution"),
        (lambda: nn.LSTM(6, 6), r"^0 is a LSTM, a recurrent network"),
        (lambda: nn.Embedding(6, 6, max_norm=1.0), r"^0 is an Embedding with max_norm"),
        (lambda: nn.Embedding(6, 6, scale_grad_by_freq=True), r"^0 is an Embedding with scale_grad_by_freq"),
        (Router, r"^0 is a Router, which reads its own Parameters; name these as targets: 0\.weight"),
        (lambda: nn.LayerNorm(6), r"^0 is a LayerNorm, which has no weight to adapt"),
    ],
)
def test_what_is_no_one_matrix_is_refused(layer, why):
    model = nn.Sequential(layer())
    before = [*model.state_dict()]
    with pytest.raises(errors.AdamssError, match=why):
        adamss.attach(model, adamss.AdamssConfig(targets=["0"]))
    assert [*model.state_dict()] == before


class Tied(nn.Module):
    """An embedding and a head that share one weight; the head is a layer, or a product with the weight."""

    def __init__(self, layer):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 12), nn.Linear(12, 9, bias=False) if layer else None
        if layer:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        h = self.embed(ids)
        return self.head(h) if self.head is not None else nn.functional.linear(h, self.embed.weight)


@pytest.mark.parametrize("layer", [True, False])
def test_an_embedding_that_is_tied_to_a_head_is_adapted_alone(layer):
    torch.manual_seed(0)
    model, ids = Tied(layer), torch.tensor([[1, 4, 3]])
    W = model.embed.weight.detach().clone()
    config = adamss.AdamssConfig(targets=["embed"], rank=4, subspaces=3)
    told = pytest.warns(
        errors.AdamssWarning, match=r"embed\.weight is one tensor with head\.weight; the adapter changes"
    )
    with told if layer else contextlib.nullcontext():
        adamss.attach(model, config)
    adapter = adapters_of(model)["embed"]
    adapter.C.data.normal_()
    head = pytest.warns(
        errors.AdamssWarning, match=r"^embed: Tied uses the weight of this embedding as a head too"
    )
    with contextlib.nullcontext() if layer else head:
        y = model(ids)
    expected = (W + core.delta(adapter.factors()).detach())[ids] @ W.t()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(model(ids), expected)
    if layer:
        with pytest.warns(errors.AdamssWarning, match="it has a merged weight of its own now"):
            adamss.merge(model)
        torch.testing.assert_close(model(ids), expected)
        return
    for each in model, adamss.attach(Tied(layer), config):  # found in the forward pass, and in the source
        with pytest.raises(
            errors.LayerError, match=r"^embed: another module uses the weight of this embedding"
        ):
            adamss.merge(each)


def test_a_store_that_tells_its_noise_is_dequantised_if_asked():
    model, x = trained("eight bits")
    y, layer = model(x), model[0]
    with pytest.raises(errors.LayerError, match=r"^0: its weight is kept in eight bits"):
        adamss.merge(model, dequantise=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EightBitsStore, "noise", lambda self, layer, name: 1 / 64)
        adamss.merge(model, dequantise=True)
        assert type(model[0]) is nn.Linear
        torch.testing.assert_close(model(x), y)
        assert adamss.unmerge(model)[0] is layer
    torch.testing.assert_close(model(x), y)


def test_an_embedding_that_another_one_stands_in_for_is_told():
    """No module calls T5's ``shared``, because ``encoder.embed_tokens`` has the same weight."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.tokens = nn.Embedding(9, 12), nn.Embedding(9, 12)
            self.tokens.weight = self.shared.weight

        def forward(self, ids):
            return self.tokens(ids)

    with pytest.warns(errors.AdamssWarning, match="shared.weight is one tensor with tokens.weight"):
        model = adamss.attach(Net(), adamss.AdamssConfig(targets=["shared"], rank=4, subspaces=2))
    with pytest.warns(
        errors.AdamssWarning, match=r"^shared: the forward has called another Embedding of the same"
    ):
        model(torch.tensor([1, 2]))
    with pytest.warns(errors.AdamssWarning, match="tokens.weight is one tensor with shared.weight"):
        model = adamss.attach(Net(), adamss.AdamssConfig(targets=["tokens"], rank=4, subspaces=2))
    model(torch.tensor([1, 2]))


def test_what_is_none_is_refused():
    with pytest.raises(errors.BackendError, match="a kind of layer"):
        kinds.register(nn.Conv2d)
    with pytest.raises(errors.BackendError, match="a store must be"):
        stores.register(EightBits)


# ---- what a kind or a store of one's own may do ------------------------------------------------------------


IN_FILE = weakref.WeakKeyDictionary()


class InFile(nn.Module):
    """A custom linear layer whose weight is not one of its attributes."""

    def __init__(self, d, n):
        super().__init__()
        IN_FILE[self] = torch.randn(n, d)

    def forward(self, features):
        return features @ IN_FILE[self].t()


class InFileKind(Kind):
    classes = (InFile,)

    def view(self, layer, path):
        return View(rows=(1,), columns=(0,))


class InFileStore(Store):
    """A store that writes to the memory it reads from, as with a memory-mapped file."""

    reading = 0

    def holds(self, layer, name):
        return isinstance(layer, InFile) and name == "weight"

    def read(self, layer, name):
        self.reading += 1
        return IN_FILE[layer]

    def refusal(self, layer, name):
        return None

    def write(self, layer, name, value):
        IN_FILE[layer].copy_(value)


@pytest.fixture
def in_file():
    kind, store = kinds.register(InFileKind()), stores.register(InFileStore())
    yield store
    kinds.unregister(kind)
    stores.unregister(store)


def test_a_store_of_what_is_no_attribute_that_writes_in_place(in_file):
    torch.manual_seed(0)
    model, x = nn.Sequential(InFile(12, 10)), torch.randn(3, 12)
    base, W0 = model(x), IN_FILE[model[0]].clone()
    adamss.attach(model, adamss.AdamssConfig(targets=["0"], rank=6, subspaces=4, subspace_rank=2))
    assert in_file.reading == 2, "once for its shape, once to be decomposed"
    adapter = adapters_of(model)["0"]
    adapter.C.data.normal_()
    adapter.active[1] = False
    adapted = model[0](features=x)
    assert not torch.allclose(adapted, base)
    for verb in (adamss.consolidate, adamss.merge):
        torch.testing.assert_close(verb(model)(x), adapted, atol=1e-5, rtol=1e-5)
    assert torch.equal(adamss.unmerge(model)(x), adapted)
    adamss.merge(model)
    assert torch.equal(adamss.detach(model)(x), base)
    assert torch.equal(IN_FILE[model[0]], W0)


def test_a_kind_is_linear_where_it_projects_and_spreads_as_all_do():
    assert TurnedKind.linear
    assert not Convolution.linear
    assert not OwnParameterKind.linear


def test_a_kind_that_is_taken_out_gives_way_to_the_one_before():
    class Mine(TurnedKind):
        classes = (nn.Linear,)

    before = kinds.find(nn.Linear(2, 2))
    mine = kinds.register(Mine())
    assert kinds.find(nn.Linear(2, 2)) is mine
    kinds.unregister(mine)
    assert kinds.find(nn.Linear(2, 2)) is before
