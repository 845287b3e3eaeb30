"""Layers and ways of keeping weights that `adamss` does not know, registered from outside: nothing else is edited."""

import contextlib
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import adamss
from adamss import core, errors
from adamss.backend import Kind, Store, View
from adamss_torch.backend import adapters_of, kinds
from adamss_torch.stores import stores


class Turned(nn.Module):
    """A linear layer whose weight is (d, n), as in GPT-2."""

    def __init__(self, d, n):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(d, n) / d**0.5), nn.Parameter(torch.randn(n))

    def forward(self, x):
        return x @ self.weight + self.bias


class TurnedKind(Kind):
    classes = (Turned,)

    def view(self, layer, path):
        return View(rows=(0,), columns=(1,))


class WindowKind(Kind):
    """A convolution over one axis: every window of the input is a row of (channels x window) numbers."""

    classes = (nn.Conv1d,)

    def view(self, layer, path):
        if layer.groups != 1:
            raise errors.LayerError(
                f"{path} has groups, so that it is no one matrix; leave it out of targets"
            )
        return View(rows=(1, 2), columns=(0,))

    def project(self, layer, x, M):
        window = M.t().reshape(-1, layer.in_channels, *layer.kernel_size)
        return nn.functional.conv1d(x, window, None, layer.stride, layer.padding, layer.dilation)

    def spread(self, layer, z, E):
        return torch.einsum("bqt,qn->bnt", z, E)


class EightBits(nn.Module):
    """A linear layer whose weight is kept in eight bits, a scale for each output."""

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
    own, store = (TurnedKind(), WindowKind(), EightBitsKind()), EightBitsStore()
    with contextlib.ExitStack() as stack:
        for kind in own:
            kinds.register(kind)
            stack.callback(kinds.unregister, kind)
        stores.register(store)
        stack.callback(stores.unregister, store)
        yield


def turned():
    return nn.Sequential(Turned(12, 10), nn.Tanh()), torch.randn(3, 4, 12)


def convolved():
    return nn.Sequential(nn.Conv1d(6, 10, 3, padding=1, dilation=1), nn.Tanh()), torch.randn(3, 6, 9)


def in_eight_bits():
    return nn.Sequential(EightBits(12, 10), nn.Tanh()), torch.randn(3, 4, 12)


MODELS = pytest.mark.parametrize("make", [turned, convolved, in_eight_bits])
CONFIG = adamss.AdamssConfig(targets=["0"], rank=6, subspaces=4, subspace_rank=2)


def trained(make, steps=3):
    torch.manual_seed(0)
    model, x = make()
    adamss.attach(model, CONFIG)
    adapters_of(model)["0"].active[1] = False
    optimizer = torch.optim.SGD(adamss.trainable_parameters(model), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    return model, x


@MODELS
def test_starts_equal_and_gives_the_base_back(make):
    torch.manual_seed(0)
    model, x = make()
    before, expected = {n: t.clone() for n, t in model.state_dict().items()}, model(x)
    adamss.attach(model, CONFIG)
    assert torch.equal(model(x), expected)
    adamss.detach(trained(make)[0])
    adamss.detach(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_an_input_whose_projection_overflows_still_starts_equal():
    """Law 1: infinity in ``x M`` times C = 0 is no NaN."""
    torch.manual_seed(0)
    model, x = convolved()
    model[0].weight.data *= 1e-3
    x = torch.full_like(x, 3e38)
    expected = model(x)
    adamss.attach(model, CONFIG)
    adapter = adapters_of(model)["0"]
    adapter.B.data *= 1e3
    assert not WindowKind().project(model[0], x, adapter.products()[0]).isfinite().all()
    assert torch.equal(model(x), expected)


@MODELS
def test_computes_what_the_layer_computes_with_the_updated_weight(make):
    model, x = trained(make)
    y, factors = model(x), adapters_of(model)["0"].factors()
    layer = adamss.detach(model)[0]
    view = kinds.of(layer, "0").view(layer, "0")
    weight = layer.weight * getattr(layer, "scale", 1.0)
    delta = view.array(core.delta(factors), weight.shape)
    assert delta.abs().max() > 0.01
    if isinstance(layer, EightBits):
        layer.weight, layer.scale = weight + delta, torch.ones(())
    else:
        layer.weight.data = weight + delta
    torch.testing.assert_close(model(x), y)


@MODELS
def test_gradients_are_those_of_finite_differences_and_none_for_frozen_subspaces(make):
    model, x = trained(make)
    model, x = model.double(), x.double()
    adapter = adapters_of(model)["0"]
    model.zero_grad()
    (model(x) ** 2).sum().backward()
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


@MODELS
def test_goes_into_a_file_and_back(make, tmp_path):
    model, x = trained(make)
    adamss.save(model, tmp_path / "a.safetensors")
    torch.manual_seed(0)
    other = adamss.load(make()[0], tmp_path / "a.safetensors")
    torch.testing.assert_close(other(x), model(x))


@pytest.mark.parametrize("make", [turned, convolved])
@pytest.mark.parametrize("keep_base", [True, False])
def test_merges_and_consolidates(make, keep_base):
    model, x = trained(make)
    y, weight = model(x), model[0].weight.clone()
    adamss.consolidate(model)
    torch.testing.assert_close(model(x), y)
    adamss.merge(model, keep_base=keep_base)
    assert model[0].adamss.computed == ()  # inference at the cost of the base model
    torch.testing.assert_close(model(x), y)
    if keep_base:
        adamss.unmerge(model)
        torch.testing.assert_close(model(x), y)
    else:
        weight = model[0].weight.clone()
        adamss.merge_and_unload(model)
    assert np.array_equal(model[0].weight.detach().numpy() == weight.detach().numpy(), np.ones(weight.shape))


def test_what_cannot_be_written_is_refused_with_the_reason_of_its_store(tmp_path):
    model, x = trained(in_eight_bits)
    y, before = model(x), model[0].weight.clone()
    for verb in (adamss.merge, adamss.consolidate, adamss.merge_and_unload):
        with pytest.raises(errors.LayerError, match=r"^0: its weight is kept in eight bits.*adamss\.to_lora"):
            verb(model)
    assert torch.equal(model(x), y)
    assert torch.equal(model[0].weight, before)
    assert adamss.to_lora(model, tmp_path).rank == int(adapters_of(model)["0"].ranks.sum())


def test_a_store_that_tells_its_noise_is_dequantised_if_asked():
    model, x = trained(in_eight_bits)
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


def test_a_kind_may_refuse_a_layer():
    model = nn.Sequential(nn.Conv1d(6, 6, 3, groups=2))
    with pytest.raises(errors.LayerError, match="0 has groups"):
        adamss.attach(model, CONFIG)


def test_what_is_none_is_refused():
    with pytest.raises(errors.BackendError, match="a kind of layer"):
        kinds.register(nn.Conv2d)
    with pytest.raises(errors.BackendError, match="a store must be"):
        stores.register(EightBits)


# ---- what a kind or a store of one's own may do ------------------------------------------------------------


IN_FILE = weakref.WeakKeyDictionary()


class InFile(nn.Module):
    """A linear layer of one's own, whose weight is none of its attributes."""

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
    """It writes into the memory that it reads from, as a file that is mapped does."""

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
    adamss.attach(model, CONFIG)
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
    assert not WindowKind.linear


@pytest.mark.parametrize("export", [adamss.to_lora, adamss.to_peft])
def test_what_is_no_linear_layer_is_no_lora(export, tmp_path):
    model, _ = trained(convolved)
    with pytest.raises(errors.LayerTypeError, match=r"0 is a Conv1d, whose update is none of a linear layer"):
        export(model, tmp_path / "lora")


def test_a_kind_that_is_taken_out_gives_way_to_the_one_before():
    class Mine(TurnedKind):
        classes = (nn.Linear,)

    before = kinds.find(nn.Linear(2, 2))
    mine = kinds.register(Mine())
    assert kinds.find(nn.Linear(2, 2)) is mine
    kinds.unregister(mine)
    assert kinds.find(nn.Linear(2, 2)) is before
