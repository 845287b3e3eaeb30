"""Test several adapters on one PyTorch model, beyond laws 14 and 15."""

import copy
import io
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch_support import assert_same_state, required, state

import adamss
from adamss import errors
from adamss_torch import BudgetController
from adamss_torch.backend import adapters_of

SETTINGS = {
    "a": {"targets": ["query", "value"], "modules_to_save": ["classifier"]},
    "b": {"targets": ["query", "dense"], "seed": 3},
    "c": {"targets": ["dense"], "subspaces": 2, "include_bias": True},
}


def settings(name, **changes):
    return adamss.AdamssConfig(**{"rank": 6, "subspaces": 3, "subspace_rank": 2} | SETTINGS[name] | changes)


def trained(model, *names, **changes):
    """Attach these adapters with random updates, and return the model."""
    for name in names:
        adamss.attach(model, settings(name, **changes), name=name)
        torch.manual_seed(ord(name))
        for parameter in adamss.trainable_parameters(model):
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def x():
    return torch.randn(4, 7, 16, generator=torch.Generator().manual_seed(1))


def test_keys_of_a_state_stay_when_an_adapter_is_added(net):
    model = adamss.attach(net(), settings("a"))
    before = list(model.state_dict())
    adamss.attach(model, settings("b"), name="b")
    added = set(model.state_dict()) - set(before)
    assert set(before) <= set(model.state_dict())
    kept = {f"adamss_kept.default.classifier.{name}" for name in ("weight", "bias")}
    assert kept < added
    assert all(".adamss.b." in name for name in added - kept)


def test_a_state_goes_into_a_model_in_which_the_same_is_active(net, x):
    model, other = trained(net(), "a", "b"), trained(net(), "a", "b", seed=9)
    with pytest.raises(errors.StateError, match="when 'a' was not active, and it is active here"):
        adamss.activate(copy.deepcopy(model), "a").load_state_dict(other.state_dict())
    model.load_state_dict(other.state_dict())
    for name in ("a", "b", []):
        adamss.activate(model, name)
        adamss.activate(other, name)
        assert_same_state(model, other)
        assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("how", ["copied", "pickled", "saved"])
def test_copies(net, x, how):
    model = adamss.activate(trained(net(), "a", "b", "c"), {"b": 0.5, "c": 2.0}, train="c")
    if how == "copied":
        again = copy.deepcopy(model)
    elif how == "pickled":
        again = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        again = torch.load(buffer, weights_only=False)
    assert adamss.adapters(again) == adamss.adapters(model)
    assert required(again) == required(model)
    for what in ({"b": 0.5, "c": 2.0}, "a", []):
        assert torch.equal(adamss.activate(again, what)(x), adamss.activate(model, what)(x))


def test_only_what_is_trained_gets_gradients(net, x):
    model = trained(net(), "a", "b", "c")
    for what, train, expected in (
        ("a", None, {"a"}),
        (["b", "c"], None, {"b", "c"}),
        (["b", "c"], "b", {"b"}),
        (["b", "c"], [], set()),
    ):
        adamss.activate(model, what, train=train)
        model.zero_grad()
        if expected:
            model(x).sum().backward()
        for name in SETTINGS:
            gradients = [p.grad is not None for a in adapters_of(model, name).values() for p in (a.B, a.C)]
            assert gradients == [name in expected] * len(gradients)
        assert (model.classifier.weight.grad is not None) == ("a" in expected)
        assert {name for name, each in adamss.adapters(model).items() if each.trained} == expected
        assert len(adamss.trainable_parameters(model)) == sum(map(bool, required(model).values()))
    loaded = adamss.load(model, _file(model, "c"), name="d", trainable=False)
    assert not any(required(loaded).values())
    adamss.activate(model, ["b", "d"])
    assert adamss.adapters(model)["b"].trained
    assert not adamss.adapters(model)["d"].trained


def _file(model, name, training=False):
    path = _file.folder / name
    adamss.save(model, path, name=name, training=training)
    return path


@pytest.fixture(autouse=True)
def _folder(tmp_path):
    _file.folder = tmp_path


def test_modules_to_save_follow_the_active_adapter(net, x):
    base, model = net(), trained(net(), "a", "b")
    head, other = state(base.classifier), settings("a", targets=["dense"])
    assert_same_state(model.classifier, head)
    adamss.activate(model, "a")
    mine = state(model.classifier)
    assert not torch.equal(mine["weight"], head["weight"])
    adamss.attach(model, other, name="d")
    assert_same_state(model.classifier, head)
    with pytest.raises(errors.StateError, match=r"'a' and 'd' both have values of classifier"):
        adamss.activate(model, ["a", "d"])
    adamss.activate(model, ["a", "b"])
    assert_same_state(model.classifier, mine)
    with adamss.disabled(model):
        assert_same_state(model.classifier, head)
    path = _file(adamss.activate(model, "d"), "a")
    loaded = adamss.load(net(), path, name="a")
    assert_same_state(loaded.classifier, mine)
    assert_same_state(adamss.detach(model, name=["a", "d", "b"]), base)


def test_a_budget_is_that_of_its_adapter(net, x):
    schedule = adamss.BudgetConfig(target=2, end_step=3)
    model = trained(net(), "a", "b")
    alone = trained(net(), "b")
    for each in model, alone:
        optimizer = torch.optim.AdamW(adamss.trainable_parameters(each), lr=0.01)
        controller = BudgetController(each, optimizer, schedule)
        for _ in range(4):
            optimizer.zero_grad()
            each(x).square().mean().backward()
            optimizer.step()
        assert controller.active_count == 2
    assert_same_state(adamss.detach(model, name="a"), alone)
    assert adamss.summary(model, name="b").total.active == 2


def test_steps_while_another_adapter_is_trained_are_none_of_a_schedule(net, x):
    model = trained(net(), "b", "c")
    optimizers = {}
    for name in ("b", "c"):
        adamss.activate(model, name, train=name)
        optimizers[name] = torch.optim.SGD(adamss.trainable_parameters(model), lr=0.01)
    adamss.activate(model, "b", train="b")
    controller = BudgetController(model, optimizers["b"], adamss.BudgetConfig(target=2, end_step=9), name="b")
    with pytest.raises(errors.StateError, match=r"'c' is not trained|is not trained"):
        BudgetController(model, optimizers["c"], adamss.BudgetConfig(target=2, end_step=9), name="c")
    for name in ("b", "c", "b"):
        adamss.activate(model, name, train=name)
        model(x).square().mean().backward()
        optimizers["b"].step()
    assert controller.step == 2
    with pytest.raises(errors.StateError, match=r"controller trains 'b'; call its remove"):
        adamss.detach(model, name="b")
    with pytest.warns(errors.AdamssWarning, match="not reached"):
        controller.remove()
    adamss.detach(model, name="b")
    assert adamss.adapters(model).keys() == {"c"}


def test_hot_swap_keeps_what_is_compiled_and_what_optimisers_know(net, x):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    model, other = trained(net(), "a", "b"), trained(net(), "a", "b", seed=3)
    for adapter in adapters_of(other, "b").values():
        adapter.C.data.normal_()
    path = _file(other, "b", training=True)
    parameters, counter = adamss.trainable_parameters(model), CompileCounterWithBackend("aot_eager")
    model(x)
    compiled = torch.compile(model, backend=counter)
    compiled(x)
    frames = counter.frame_count
    adamss.load(model, path, name="b", replace=True)
    torch.testing.assert_close(compiled(x), other(x))
    assert counter.frame_count == frames
    assert all(one is two for one, two in zip(adamss.trainable_parameters(model), parameters, strict=True))
    for misfit, match in ((settings("c"), "other adapted layers"), (settings("b", rank=4), "has shape")):
        model = adamss.attach(trained(net(), "a"), misfit, name="b")
        before = state(model)
        with pytest.raises(errors.StateError, match=match):
            adamss.load(model, path, name="b", replace=True)
        assert_same_state(model, before)


BAD = {
    "": (errors.ConfigError, "a name has letters"),
    "x.y": (errors.ConfigError, "a name has letters"),
    "a": (errors.StateError, r"an adapter called 'a' is attached already.*There are 'a', 'b'"),
    3: (errors.ConfigTypeError, "name must be a string"),
}


@pytest.mark.parametrize("name", BAD, ids=repr)
def test_names_that_cannot_be(net, name):
    error, match = BAD[name]
    model = trained(net(), "a", "b")
    before, path = state(model), _file(model, "b")
    for verb in (
        lambda: adamss.attach(model, settings("c"), name=name),
        lambda: adamss.load(model, path, name=name),
    ):
        with pytest.raises(error, match=match):
            verb()
    assert_same_state(model, before)


def test_what_is_meant_must_be_said(net, x):
    model = trained(net(), "a", "b", "c")
    verbs = {
        "summary": lambda name: adamss.summary(model, name=name),
        "save": lambda name: adamss.save(model, _file.folder / "f.safetensors", name=name),
        "merge": lambda name: adamss.merge(model, name=name),
        "detach": lambda name: adamss.detach(model, name=name),
        "activate": lambda name: adamss.activate(model, name),
        "trainable_parameters": lambda name: adamss.trainable_parameters(model, name=name),
    }
    before = state(model)
    for verb, call in verbs.items():
        with pytest.raises(
            errors.StateError, match=rf"^{verb}: no adapter is called 'z'; there are 'a', 'b', 'c'"
        ):
            call("z")
    adamss.activate(model, ["b", "c"])
    for verb in ("summary", "save"):
        with pytest.raises(
            errors.StateError, match=rf"{verb} takes one adapter; say by name= which of 'b', 'c'"
        ):
            verbs[verb](None)
    adamss.activate(model, None)
    for verb in ("summary", "save", "merge", "detach"):
        with pytest.raises(errors.StateError, match=rf"^{verb}: no adapter is active; say by name="):
            verbs[verb](None)
    with adamss.disabled(model), pytest.raises(errors.StateError, match="switched off"):
        adamss.activate(model, "a")
    for wrong in ({"a": float("nan")}, {"a": True}, {"a": "b"}):
        with pytest.raises(errors.ConfigTypeError, match="weight of 'a' must be a finite number"):
            adamss.activate(model, wrong)
    with pytest.raises(errors.StateError, match="train names 'b', which is not among those to activate"):
        adamss.activate(model, "a", train="b")
    adamss.activate(model, "c")
    assert_same_state(model, before)


# ---- PEFT ----------------------------------------------------------------------------------------------------


def test_a_weighted_sum_as_one_lora(net, x):
    base = net()
    model = adamss.activate(trained(net(), "b", "c", include_bias=False), {"b": 0.7, "c": -0.3})
    written = adamss.to_lora(model, _file.folder / "lora", name={"b": 0.7, "c": -0.3})
    assert written.rank == 6 + 4
    lora = PeftModel.from_pretrained(copy.deepcopy(base), _file.folder / "lora").eval()
    torch.testing.assert_close(lora(x), model(x), atol=1e-5, rtol=1e-5)
    adamss.to_lora(model, _file.folder / "one", name="c")
    lora = PeftModel.from_pretrained(copy.deepcopy(base), _file.folder / "one").eval()
    torch.testing.assert_close(lora(x), adamss.activate(model, "c")(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(adamss.merge_and_unload(model)(x), lora(x), atol=1e-5, rtol=1e-5)


def test_the_lifecycle_is_that_of_pefts_lora(net, x):
    """The same updates, as our adapters and as PEFT's LoRA, go through all operations on several adapters."""
    names = ("b", "c")
    model, base = trained(net(), *names, include_bias=False), net()
    peft_model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["query"], r=2), "unused")
    for name in names:
        adamss.to_lora(model, _file.folder / name, name=name)
        peft_model.load_adapter(_file.folder / name, adapter_name=name)
    peft_model.eval()

    def same():
        torch.testing.assert_close(model(x), peft_model(x), atol=1e-5, rtol=1e-5)

    for name in names:  # switch
        adamss.activate(model, name)
        peft_model.set_adapter(name)
        same()
    with adamss.disabled(model), peft_model.disable_adapter():
        same()
    with adamss.routed(model, ["b", None, "c", "b"]), torch.no_grad():  # a mixed batch
        mixed = peft_model(x, adapter_names=["b", "__base__", "c", "b"])
        torch.testing.assert_close(model(x), mixed, atol=1e-5, rtol=1e-5)
    peft_model.base_model.add_weighted_adapter([*names], [0.7, 0.4], "both", combination_type="cat")
    adamss.activate(model, {"b": 0.7, "c": 0.4})  # weight
    peft_model.set_adapter("both")
    same()
    adamss.activate(model, names)
    adamss.merge(model)
    peft_model.base_model.merge_adapter([*names])  # merge several
    same()
    adamss.unmerge(model)
    peft_model.base_model.unmerge_adapter()
    adamss.detach(model, name="c")  # delete
    peft_model.delete_adapter("c")
    peft_model.set_adapter("b")
    same()


# ---- routing -------------------------------------------------------------------------------------------------


class Windows(nn.Module):
    """A module that runs a layer on windows of its tokens; their number is a multiple of the number of rows."""

    def __init__(self):
        super().__init__()
        self.query, self.value = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        windows = x.reshape(-1, 2, 16)
        return self.value(self.query(windows).reshape(-1, 16)).view(x.shape)


ROUTED = {
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3)),
        lambda: torch.randn(4, 3, 6, 6),
        (["0", "2"], ["0"]),
        0,
    ),
    "an embedding": (
        lambda: nn.Sequential(nn.Embedding(20, 16, padding_idx=0), nn.Linear(16, 6)),
        lambda: torch.randint(0, 20, (4, 7)),
        (["0", "1"], ["0"]),
        0,
    ),
    "windows": (Windows, lambda: torch.randn(4, 6, 16), (["query", "value"], ["value"]), 0),
    "as many steps as rows, the sequence first": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0), 2),
        lambda: torch.randn(4, 4, 16),
        (["linear1", "linear2"], ["linear2"]),
        1,
    ),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("name", ROUTED)
def test_rows_that_reach_a_layer_in_other_ways(name):
    torch.manual_seed(0)
    make, inputs, targets, axis = ROUTED[name]
    model, x, route = make(), inputs(), ["a", None, "b", "a"]
    for one, own in zip("ab", targets, strict=True):
        adamss.attach(model, adamss.AdamssConfig(targets=own, rank=6, subspaces=3), name=one)
        for adapter in adapters_of(model, one).values():
            adapter.C.data.normal_(std=0.3)
    with torch.no_grad():
        with adamss.routed(model, route):
            mixed = model(x)
        for row, one in enumerate(route):
            expected = adamss.activate(model, one)(x).select(axis, row)
            torch.testing.assert_close(mixed.select(axis, row), expected, atol=1e-5, rtol=1e-5)


def test_beams_of_a_route(causal_lm):
    model, route = causal_lm(), ["a", None, "b", "a"]
    for one, targets in (("a", ["q_proj", "v_proj", "down_proj"]), ("b", ["q_proj", "lm_head"])):
        adamss.attach(model, adamss.AdamssConfig(targets=targets, rank=8, subspaces=3), name=one)
        for adapter in adapters_of(model, one).values():
            adapter.C.data.normal_(std=0.3)
    tokens = torch.randint(1, 200, (4, 6), generator=torch.Generator().manual_seed(0))

    def generated():
        return model.generate(tokens, max_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=0)

    with adamss.routed(model, route):
        mixed = generated()
    for row, one in enumerate(route):
        adamss.activate(model, one)
        assert torch.equal(generated()[row], mixed[row])


def test_gradients_of_a_route_are_those_of_separate_runs(net, x):
    model, route = trained(net(), "b", "c"), ["b", None, "c", "b"]
    adamss.activate(model, ["b", "c"], train=["b", "c"])
    parameters = adamss.trainable_parameters(model)
    with adamss.routed(model, route):
        model(x).square().sum().backward()
    mixed = [parameter.grad for parameter in parameters]
    model.zero_grad()
    expected = [torch.zeros_like(parameter) for parameter in parameters]
    for row, name in enumerate(route):
        if name is not None:
            adamss.activate(model, name)
            own = adamss.trainable_parameters(model)
            model(x[row : row + 1]).square().sum().backward()
            for parameter in own:
                place = next(i for i, each in enumerate(parameters) if each is parameter)
                expected[place] += parameter.grad
                parameter.grad = None
    torch.testing.assert_close(mixed, expected, atol=1e-4, rtol=1e-4)


def test_what_has_one_weight_for_all_rows_cannot_be_routed():
    model = nn.Sequential(nn.MultiheadAttention(16, 4))
    adamss.attach(model, adamss.AdamssConfig(targets=["q_proj"], rank=6, subspaces=3), name="a")
    with pytest.raises(errors.LayerError, match=r"^0\.q_proj: .*for all rows"), adamss.routed(model, ["a"]):
        pass
    with pytest.raises(errors.ConfigError, match="axis counts from"), adamss.routed(model, [None], axis=-1):
        pass
    assert adamss.adapters(model)["a"].active


@pytest.mark.parametrize("name", ["base", "train", "route", "active", "forward", "weight"])
def test_names_that_are_also_something_else(net, x, name):
    model = adamss.attach(net(), settings("b"), name=name)
    for parameter in adamss.trainable_parameters(model):
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    y = model(x)
    again = pickle.loads(pickle.dumps(model.train().eval()))
    assert torch.equal(again(x), y)
    fresh = adamss.attach(net(), settings("b"), name=name)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), y)
    assert_same_state(adamss.detach(model), net())


def test_what_one_adapts_another_does_not_save(net):
    model = adamss.attach(net(), settings("a"), name="a")
    before = state(model)
    with pytest.raises(
        errors.TargetError, match=r"classifier would be adapted by one adapter .*'a' is one of the two"
    ):
        adamss.attach(model, settings("c", targets=["classifier"]), name="c")
    assert_same_state(model, before)
    assert adamss.adapters(model)["a"].trained


# ---- what was once wrong -------------------------------------------------------------------------------------


def test_layers_that_share_a_weight_are_merged_one_after_the_other():
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)), torch.randn(5, 16)
    base[2].weight = base[0].weight
    for first in ("a", "b"):
        model = copy.deepcopy(base)
        for name, target in (("a", "0"), ("b", "2")):
            adamss.attach(model, adamss.AdamssConfig(targets=[target], rank=6, subspaces=2), name=name)
            adapters_of(model, name)[target].C.data.normal_(std=0.3)
        adamss.activate(model, ["a", "b"])
        y = model(x)
        with pytest.warns(errors.AdamssWarning, match="one tensor"):
            adamss.merge(adamss.merge(model, name=first), name="b" if first == "a" else "a")
        torch.testing.assert_close(model(x), y)
        for name in ("a", "b"):
            torch.testing.assert_close(adamss.unmerge(model, name=name)(x), y)
        adamss.detach(model)
        assert_same_state(model, base)
        assert model[0].weight is model[2].weight


def test_a_saved_module_that_was_replaced_while_its_adapter_was_off(net):
    for head in (nn.Linear(16, 7), nn.Linear(16, 5, bias=False), nn.Tanh()):
        model = trained(net(), "a", "b")
        model.classifier = head
        before = state(model)
        with pytest.raises(errors.StateError, match=r"classifier of modules_to_save has been replaced"):
            adamss.activate(model, "a")
        assert_same_state(model, before)


def test_a_merge_for_good_that_fails_changes_nothing(net):
    model = trained(net(), "b", "c")
    adapters_of(model, "b")["layers.0.query"].C.data[0, 0] = torch.nan
    before = state(model), adamss.adapters(model), required(model)
    with pytest.raises(errors.ArrayValueError):
        adamss.merge_and_unload(model, name="b")
    assert_same_state(model, before[0])
    assert (adamss.adapters(model), required(model)) == before[1:]


def test_gradients_of_a_saved_module_are_not_those_of_another_adapter(net, x):
    model = adamss.attach(trained(net(), "a"), settings("c", modules_to_save=["classifier"]), name="c")
    model(x).sum().backward()
    assert model.classifier.weight.grad is not None
    adamss.activate(model, "a")
    assert model.classifier.weight.grad is None


def test_a_route_follows_what_is_trained_and_loaded(net, x):
    model, other = trained(net(), "b"), trained(net(), "b", seed=7)
    with adamss.routed(model, ["b"] * 4), torch.no_grad():
        model(x)
        for parameter in adamss.trainable_parameters(model):
            parameter.data.mul_(1.5)
        y = model(x)
    torch.testing.assert_close(model(x), y)
    adamss.activate(model, [])
    with adamss.routed(model, ["b"] * 4), torch.no_grad():
        model(x)
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(model(x), other(x))


def test_a_part_of_a_state_is_loaded_whatever_is_active(net):
    model = adamss.attach(trained(net(), "a"), settings("c", modules_to_save=["classifier"]), name="c")
    model.load_state_dict(net().state_dict(), strict=False)
    trained_alone = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model.load_state_dict(trained_alone, strict=False)
    key = "adamss_kept.a.classifier.weight"
    with pytest.raises(RuntimeError, match=rf"size mismatch for {key}"):
        model.load_state_dict(model.state_dict() | {key: torch.zeros(1)})


def test_a_file_replaces_the_adapter_that_came_from_it(net, x):
    path = _file(trained(net(), "b"), "b")
    for trainable in (True, False):
        model = adamss.load(net(), path, name="b", trainable=trainable)
        y = model(x)
        torch.testing.assert_close(adamss.load(model, path, name="b", replace=True)(x), y)
        assert adamss.adapters(model)["b"].trained == trainable


def test_positions_are_no_rows():
    model = nn.Sequential(nn.Embedding(8, 6))
    adamss.attach(model, adamss.AdamssConfig(targets=["0"], rank=4, subspaces=2), name="a")
    with adamss.routed(model, ["a", None]), pytest.raises(errors.LayerError, match=r"^0: .*2 rows"):
        model(torch.arange(4))


def test_adapters_are_exported_alone_while_others_are_merged_or_weighted(net, x):
    model = adamss.activate(trained(net(), "b", "c", include_bias=False), {"b": 0.5})
    adamss.merge(model)
    for names in ("b", "c", ["b", "c"]):
        adamss.to_lora(model, _file.folder / "lora", name=names)
        lora = PeftModel.from_pretrained(net(), _file.folder / "lora").eval()
        expected = adamss.activate(trained(net(), "b", "c", include_bias=False), names)(x)
        torch.testing.assert_close(lora(x), expected, atol=1e-5, rtol=1e-5)


def test_a_way_out_of_what_the_weights_hold_is_named_and_works(net):
    model = trained(net(), "b", "c")
    for adapter in adapters_of(model, "c").values():
        adapter.active[0] = False
    adamss.consolidate(model)
    for verb in (lambda: adamss.activate(model, "b"), lambda: adamss.attach(model, settings("a"), name="a")):
        with pytest.raises(errors.StateError, match=r"merge\(model, name='c'\) and then adamss.unmerge"):
            verb()
    adamss.unmerge(adamss.merge(model, name="c"), name="c")
    adamss.activate(model, "b")
