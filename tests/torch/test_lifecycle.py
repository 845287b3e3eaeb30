"""Test the lifecycle of an adapter from `attach` to `detach` and back, as in the table of docs/comparison.md.

Other modules test copies, autocast, shared weights, fused paths, and so on.
"""

import copy
import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch_support import assert_agree, assert_same_state, checkpointed, gradients, required, state

import adamss
from adamss import errors
from adamss_conformance.tolerances import assert_agrees
from adamss_torch.backend import adapters_of


@pytest.mark.filterwarnings("ignore:rounding to:adamss.AdamssWarning")
@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16", "float16"])
def test_the_whole_cycle(net, config, inputs, train, tmp_path, name):
    dtype = getattr(torch, name)
    model, x = net(dtype=dtype), inputs(6, 16, dtype=dtype)
    base, y_base, trainable = state(model), model(x), required(model)

    def assert_base():
        assert_same_state(model, base)
        assert torch.equal(model(x), y_base)
        assert required(model) == trainable
        assert not any(layer._forward_hooks for layer in model.modules())

    def assert_close(what):
        assert_agrees(model(x).detach().double(), y.detach().double(), dtype=name, what=what, scale=10)

    adamss.attach(model, config(modules_to_save=["classifier"]))
    assert torch.equal(model(x), y_base)
    train(model)
    y = model(x)
    assert not torch.equal(y, y_base)
    adamss.save(model, tmp_path / "portable.safetensors")
    adamss.save(model, tmp_path / "training.safetensors", training=True)
    adamss.detach(model)
    assert_base()

    adamss.load(model, tmp_path / "portable.safetensors", trainable=False)
    assert_close("outputs of the portable file")
    adamss.detach(model)
    assert_base()

    adamss.load(model, tmp_path / "training.safetensors")
    assert torch.equal(model(x), y)
    adamss.merge(model)
    assert_close("merged outputs")
    with adamss.disabled(model):
        assert torch.equal(model(x), y_base)
    adamss.unmerge(model)
    assert torch.equal(model(x), y)
    with adamss.disabled(model):
        assert torch.equal(model(x), y_base)
    assert torch.equal(model(x), y)
    adamss.detach(adamss.merge(model))
    assert_base()

    adamss.attach(model, config(targets=["dense"], basis="per_subspace", include_bias=True))
    assert [row.path for row in adamss.summary(model).rows] == ["layers.0.dense", "layers.1.dense"]
    assert torch.equal(model(x), y_base)
    adamss.detach(train(model))
    assert_base()


@pytest.mark.parametrize("before", ["adapted", "merged", "merged without base", "consolidated"])
def test_merge_and_unload(net, config, inputs, train, before):
    model, x = net(), inputs(4, 16)
    keys, trainable = model.state_dict().keys(), required(model)
    train(adamss.attach(model, config(modules_to_save=["classifier"])))
    if before == "consolidated":
        for adapter in adapters_of(model).values():
            adapter.active.copy_(torch.arange(3) % 2 == 0)
        adamss.consolidate(model)
    merged = adamss.merge(copy.deepcopy(model))(x)
    if before.startswith("merged"):
        adamss.merge(model, keep_base=before == "merged")
    assert adamss.merge_and_unload(model) is model
    assert torch.equal(model(x), merged)
    assert model.state_dict().keys() == keys
    assert required(model) == trainable
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(errors.StateError, match=r"merge_and_unload: .*no adapters"):
        adamss.merge_and_unload(model)


def test_merge_and_unload_of_a_layer_that_shares_its_weight(net, config, inputs, train):
    model, x = net(), inputs(4, 16)
    model.layers[1].query.weight = model.layers[0].query.weight
    train(adamss.attach(model, config(targets=["layers.1.query"])))
    y, shared = model(x), model.layers[0].query.weight.clone()
    with pytest.warns(adamss.AdamssWarning, match="one tensor with layers.0.query.weight in the base"):
        adamss.merge_and_unload(model)
    assert torch.equal(model.layers[0].query.weight, shared)
    assert model.layers[1].query.weight.requires_grad
    assert_agrees(model(x).detach(), y.detach(), dtype="float32", what="outputs", scale=10)


def test_merge_and_unload_refuses_what_it_cannot_fold(net, config, train):
    model = train(adamss.attach(net(), config()))
    with torch.no_grad():
        model.layers[1].query.adamss.default.B[0, 0] = math.inf
    before = state(model)
    with pytest.raises(errors.ArrayValueError, match=r"layers\.1\.query"):
        adamss.merge_and_unload(model)
    assert_same_state(model, before)


def test_one_adapter_after_the_other_on_one_base(net, config, inputs, train, tmp_path):
    model, x = net(), inputs(4, 16)
    y_base, outputs = model(x), {}
    other = {"targets": ["dense"], "rank": 4, "modules_to_save": ["classifier"]}
    for path, changes in (("a", {}), ("b", other)):
        train(adamss.attach(model, config(**changes)))
        outputs[path] = model(x)
        adamss.save(model, tmp_path / path, training=True)
        adamss.detach(model)
    assert not torch.equal(outputs["a"], outputs["b"])
    for path in ("a", "b", "a"):
        adamss.load(model, tmp_path / path)
        assert torch.equal(model(x), outputs[path])
        adamss.detach(model)
        assert torch.equal(model(x), y_base)


def test_modes_change_neither_the_update_nor_what_is_trained(net, config, inputs, train):
    model, x = train(adamss.attach(net(), config())), inputs(4, 16)
    y = model(x)
    assert torch.equal(model.eval()(x), y)
    assert not any(module.training for module in model.modules())
    trained = {id(parameter) for parameter in adamss.trainable_parameters(model)}
    assert torch.equal(model.train()(x), y)
    assert {id(parameter) for parameter in model.parameters() if parameter.requires_grad} == trained


def test_weight_decay_over_all_parameters_changes_only_what_is_trained(config, inputs):
    """Users often pass all parameters of the model to the optimiser."""
    torch.manual_seed(0)
    layers = [nn.Linear(16, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 5), nn.Linear(5, 2)]
    model = nn.Sequential(*layers)
    adamss.attach(model, config(targets=["0", "3"], modules_to_save=["4"]))
    before = state(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.5)
    for seed in range(3):
        optimizer.zero_grad()
        model(inputs(8, 16, seed=seed)).square().sum().backward()
        trained = [parameter.grad for parameter in adamss.trainable_parameters(model)]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        torch.testing.assert_close(norm, torch.cat([g.flatten() for g in trained]).norm())
        optimizer.step()
    after = model.state_dict()
    factors = {f"{layer}.adamss.default.{name}" for layer in "03" for name in "BC"}
    buffers = {f"1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == factors | buffers | {"4.weight", "4.bias"}


def test_reentrant_checkpointing_needs_an_input_that_requires_gradients(net, config, inputs, train):
    """This rule of PyTorch affects every frozen base with reentrant checkpointing."""
    model, x = train(adamss.attach(net(), config())), inputs(4, 16)
    expected = gradients(model, model(x).square().sum())

    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        y = checkpointed(model, x, reentrant=True)
    assert not y.requires_grad, "and with it the gradients of all that is trained are lost"
    for reentrant, remedied in ((False, x), (True, x.clone().requires_grad_())):
        actual = gradients(model, checkpointed(model, remedied, reentrant=reentrant).square().sum())
        assert_agree(actual, expected, "float32", "gradient", scale=1)


IN_A_NEW_PROCESS = """
import sys, torch
for form in ("adapted", "merged", "consolidated"):
    model, x, y, base = torch.load(f"{sys.argv[1]}/{form}.pt", weights_only=False)
    assert torch.equal(model(x), y), form
    import adamss
    assert torch.equal(adamss.detach(model)(x), base), form
    print(form)
"""


def test_pickled_models_in_a_process_that_has_not_imported_adamss(config, inputs, train, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 5))
    x = inputs(4, 16)
    base = model(x).detach()
    adamss.attach(model, config(targets=["0"], modules_to_save=["2"]))
    model[0].adamss.default.active[1] = False
    train(model, steps=1)
    model[0].adamss.default.C.data.add_(0.1)
    adapted, merged = copy.deepcopy(model), adamss.merge(copy.deepcopy(model))
    consolidated = adamss.consolidate(model)
    for form, each in (("adapted", adapted), ("merged", merged), ("consolidated", consolidated)):
        y = each(x).detach()
        assert not torch.equal(y, base)
        torch.save((each, x, y, base), tmp_path / f"{form}.pt")
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["adapted", "merged", "consolidated"]


def test_state_as_a_safetensors_model(net, config, inputs, train, tmp_path):
    from safetensors.torch import load_model, save_model

    model, x = train(adamss.attach(net(), config(modules_to_save=["classifier"]))), inputs(4, 16)
    save_model(model, str(tmp_path / "model.safetensors"))
    other = adamss.attach(net(), config(modules_to_save=["classifier"]))
    assert load_model(other, tmp_path / "model.safetensors") == (set(), [])
    assert_same_state(other, state(model))
    assert torch.equal(other(x), model(x))


@pytest.fixture
def files(net, config, train, tmp_path):
    """Return the portable and the training file of a trained model, by whether it is for training."""
    model = train(adamss.attach(net(), config()))
    for training in (False, True):
        adamss.save(model, tmp_path / f"{training}.safetensors", training=training)
    return {training: tmp_path / f"{training}.safetensors" for training in (False, True)}


def on_meta(net):
    with torch.device("meta"):
        return type(net())()


@pytest.mark.parametrize(("training", "trainable"), [(False, False), (True, True)])
def test_load_before_the_base_has_values(net, inputs, train, files, training, trainable):
    """The weights are assigned later without a copy, and the adapter is the same as after an ordinary `load`."""
    model, x = on_meta(net), inputs(4, 16)
    adamss.load(model, files[training], check_base=False, trainable=trainable)
    assert {adapter.C.device.type for adapter in adapters_of(model).values()} == {"cpu"}
    assert {p.device.type for p in adamss.trainable_parameters(model)} == ({"cpu"} if trainable else set())
    assert model.layers[0].query.weight.is_meta
    assert adamss.summary(model).total.active == 12
    values = net().state_dict()
    missing = model.load_state_dict(values, strict=False, assign=True).missing_keys
    assert all(".adamss." in name for name in missing)
    assert model.layers[0].query.weight.data_ptr() == values["layers.0.query.weight"].data_ptr()
    assert not model.layers[0].query.weight.requires_grad
    expected = adamss.load(net(), files[training], trainable=trainable)
    assert torch.equal(model(x), expected(x))
    if trainable:
        assert_same_state(train(model), state(train(expected)))
    assert_same_state(adamss.detach(model), state(net()))


def test_what_needs_values_says_so_on_the_meta_device(net, files, tmp_path):
    model = on_meta(net)
    remedy = r"layers\.0\.query is on the meta device.*check_base=False, trainable=False"
    for choices in ({}, {"check_base": False}, {"trainable": False}):
        with pytest.raises(errors.LayerError, match=remedy):
            adamss.load(model, files[False], **choices)
    with pytest.raises(errors.LayerError, match=remedy):
        adamss.load(model, files[True])
    assert "adamss" not in str(model)
    adamss.load(model, files[False], check_base=False, trainable=False)
    with pytest.raises(errors.LayerError, match=r"layers\.0\.query.* is on the meta device"):
        adamss.merge(model)
    with pytest.warns(adamss.AdamssWarning, match="cannot be read.* is on the meta device"):
        adamss.save(model, tmp_path / "a.safetensors")
    assert "adamss" not in str(adamss.detach(model))


def test_modules_to_save_need_a_place_for_their_values(net, config, inputs, train, tmp_path):
    path, x = tmp_path / "a.safetensors", inputs(4, 16)
    model = train(adamss.attach(net(), config(modules_to_save=["classifier"])))
    adamss.save(model, path, training=True)
    other = on_meta(net)
    with pytest.raises(errors.LayerError, match="modules_to_save: classifier: its weight is on the meta"):
        adamss.load(other, path, check_base=False)
    assert "adamss" not in str(other)
    other.classifier = net().classifier
    adamss.load(other, path, check_base=False)
    values = {name: tensor for name, tensor in net().state_dict().items() if "classifier" not in name}
    other.load_state_dict(values, strict=False, assign=True)
    assert torch.equal(other(x), model(x))


class Allocations(TorchDispatchMode):
    """Records the bytes of every new tensor, also of temporary ones."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [
            [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)] for tree in (out, (args, kwargs))
        ]
        made, given = ([t.untyped_storage() for t in each] for each in tensors)
        known = {storage.data_ptr() for storage in given}
        self.sizes += [storage.nbytes() for storage in made if storage.data_ptr() not in known]
        return out


def test_load_leaves_a_memory_mapped_base_where_it_is(config, tmp_path):
    """`load` allocates only a few times the size of the adapter, however large the base is."""

    def make():
        return nn.Sequential(*[nn.Linear(640, 640, bias=False) for _ in range(3)])

    torch.manual_seed(0)
    model = make()
    adamss.attach(model, config(targets=[r"0", "1", "2"], segmentation="contiguous"))
    for parameter in adamss.trainable_parameters(model):
        parameter.data.add_(0.01)
    adamss.save(model, tmp_path / "adapter.safetensors")
    expected = model(torch.ones(1, 640))
    torch.save(adamss.detach(model).state_dict(), tmp_path / "base.pt")

    with torch.device("meta"):
        lazy = make()
    lazy.load_state_dict(torch.load(tmp_path / "base.pt", mmap=True), assign=True)
    weights = [parameter.data_ptr() for parameter in lazy.parameters()]
    layer = lazy[0].weight.nbytes
    with Allocations() as made:
        adamss.load(lazy, tmp_path / "adapter.safetensors", trainable=False)
    assert [lazy[i].weight.data_ptr() for i in range(3)] == weights
    factors = sum(tensor.nbytes for name, tensor in lazy.state_dict().items() if ".adamss." in name)
    assert sum(made.sizes) < 12 * factors < layer
    torch.testing.assert_close(lazy(torch.ones(1, 640)), expected, atol=1e-4, rtol=1e-4)
    adamss.attach(adamss.detach(lazy), config(targets=["0", "1", "2"]))
    assert [lazy[i].weight.data_ptr() for i in range(3)] == weights


WORDS = torch.arange(24).reshape(2, 12)
PROJECTIONS = {"targets": ["q_proj", "v_proj"], "rank": 8}


def moved(model):
    """Add random values to all trained parameters of an adapted model, and return the model."""
    for number, parameter in enumerate(adamss.trainable_parameters(model)):
        generator = torch.Generator().manual_seed(number)
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
@torch.no_grad()
def test_generate_and_embeddings(causal_lm, config, name):
    model = moved(adamss.attach(causal_lm(getattr(torch, name)), config(**PROJECTIONS)))
    logits = model(WORDS).logits
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(WORDS)).logits, logits)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    text = model.generate(WORDS, **settings)
    assert text.shape == (2, 20)
    if name == "float32":
        assert torch.equal(model.generate(input_ids=WORDS, use_cache=False, **settings), text)
    with adamss.disabled(model):
        base = model.generate(WORDS, **settings)
    assert torch.equal(base, causal_lm(getattr(torch, name)).generate(WORDS, **settings))
    assert not torch.equal(base, text)
    if name == "float32":
        assert torch.equal(adamss.merge(model).generate(WORDS, **settings), text)


@pytest.mark.parametrize("without", [False, True], ids=["as it is", "without the adapter's keys"])
@torch.no_grad()
def test_save_pretrained_of_a_merged_model(causal_lm, config, tmp_path, without):
    model = moved(adamss.attach(causal_lm(), config(**PROJECTIONS)))
    adapted = model(WORDS).logits
    merged = adamss.merge(model)(WORDS).logits
    plain = {name: tensor for name, tensor in model.state_dict().items() if ".adamss." not in name}
    model.save_pretrained(tmp_path, **({"state_dict": plain} if without else {}))
    again = type(model).from_pretrained(tmp_path).eval()
    assert "adamss" not in str(again)
    assert torch.equal(again(WORDS).logits, merged)
    assert_agrees(merged, adapted, dtype="float32", what="merged logits")
    plain = adamss.merge_and_unload(model).state_dict()
    model.save_pretrained(tmp_path / "plain")
    again = type(model).from_pretrained(tmp_path / "plain").eval()
    assert again.state_dict().keys() == plain.keys()
    assert torch.equal(again(WORDS).logits, merged)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_transformers(causal_lm, config, reentrant):
    model = moved(adamss.attach(causal_lm(), config(**PROJECTIONS))).train()
    expected = gradients(model, model(input_ids=WORDS, labels=WORDS).loss)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()  # only some versions of transformers do this themselves
    calls = []
    handle = model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    actual = gradients(model, model(input_ids=WORDS, labels=WORDS).loss)
    handle.remove()
    assert len(calls) == 2, "once in the forward, once more in the backward"
    assert_agree(actual, expected, "float32", "gradient", scale=1)


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("first", ["offload", "load"])
def test_weights_that_accelerate_keeps_elsewhere(causal_lm, config, tmp_path, first, place):
    pytest.importorskip("accelerate", reason="needs the demo extra")
    from accelerate import cpu_offload, disk_offload
    from accelerate.hooks import remove_hook_from_submodules

    adapted = moved(adamss.attach(causal_lm(), config(**PROJECTIONS)))
    adamss.save(adapted, tmp_path / "a.safetensors", training=True)
    model = causal_lm()
    base, y, y_base = state(model), adapted(WORDS).logits, model(WORDS).logits

    def load():
        adamss.load(model, tmp_path / "a.safetensors")  # compares the fingerprints of the base weights

    if first == "load":
        load()
    if place == "cpu":
        cpu_offload(model, execution_device="cpu")
    else:
        disk_offload(model, tmp_path / "weights", execution_device="cpu")
    if first == "offload":
        adamss.attach(model, config(**PROJECTIONS))
        assert torch.equal(model(WORDS).logits, y_base)
        adamss.detach(model)
        load()
    assert model.model.layers[0].self_attn.q_proj.weight.is_meta
    assert torch.equal(model(WORDS).logits, y)
    with adamss.disabled(model):
        assert torch.equal(model(WORDS).logits, y_base)
    adamss.save(model, tmp_path / "b.safetensors", training=True)
    assert torch.equal(adamss.load(causal_lm(), tmp_path / "b.safetensors")(WORDS).logits, y)
    remedy = r"q_proj: its weight is on the meta.*remove_hook_from_submodules"
    with pytest.raises(errors.LayerError, match=remedy):
        adamss.merge(model)
    assert torch.equal(model(WORDS).logits, y)
    remove_hook_from_submodules(model)
    adamss.merge(model)
    assert_agrees(model(WORDS).logits.detach(), y.detach(), dtype="float32", what="merged logits")
    assert_same_state(adamss.detach(model), base)


def test_a_merged_model_that_was_offloaded_afterwards(causal_lm, config):
    """Writing the base back to the meta device would silently lose it."""
    pytest.importorskip("accelerate", reason="needs the demo extra")
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    model = causal_lm()
    base = state(model)
    moved(adamss.attach(model, config(**PROJECTIONS)))
    merged = adamss.merge(model)(WORDS).logits
    cpu_offload(model, execution_device="cpu")
    for verb in (adamss.unmerge, adamss.detach, lambda model: adamss.disabled(model).__enter__()):
        with pytest.raises(errors.LayerError, match=r"q_proj: its weight is on the meta device"):
            verb(model)
        assert torch.equal(model(WORDS).logits, merged)
    remove_hook_from_submodules(model)
    assert torch.equal(model(WORDS).logits, merged)
    assert_same_state(adamss.detach(model), base)
