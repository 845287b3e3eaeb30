"""Test that adapters behave the same on all quantised bases of `benchmarks/quantisers.py`."""

import copy
import importlib.util
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import adamss
from adamss import core, errors
from adamss_torch import BudgetController
from adamss_torch.backend import adapters_of, kinds
from adamss_torch.stores import stores

PATH = Path(__file__).parents[2] / "benchmarks" / "quantisers.py"
SPEC = importlib.util.spec_from_file_location("quantisers", PATH)
quantisers = importlib.util.module_from_spec(SPEC)
sys.modules["quantisers"] = quantisers
SPEC.loader.exec_module(quantisers)
QUANTISERS = quantisers.QUANTISERS

ALL = pytest.mark.parametrize("name", QUANTISERS)
TRAIN = pytest.mark.parametrize("name", [name for name, each in QUANTISERS.items() if each.trains])
SOME = pytest.mark.parametrize("name", ["bitsandbytes NF4", "torchao int8", "quanto int4", "HQQ 4 bits"])
CONFIG = adamss.AdamssConfig(targets=["0", "2"], rank=16, subspaces=4, subspace_rank=2)
LAYERS = ("0", "2")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Using naive"),
]


def made(name, *, seed=0, quantised=True):
    """Return a network of two quantised layers, and an input; the input of the second layer requires a gradient."""
    kept = QUANTISERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 64, bias=False))
        for layer in (model[0], model[2]):
            # The weight has a decaying spectrum as trained ones do, and outputs of size one.
            U, _, Vh = torch.linalg.svd(torch.randn_like(layer.weight), full_matrices=False)
            S = 1.0 / torch.arange(1, len(Vh) + 1)
            layer.weight.data = (U * S) @ Vh + torch.randn_like(layer.weight) * 0.05
        x = torch.randn(5, 3, 128)
    model, x = model.to(kept.dtype).requires_grad_(False), x.to(kept.dtype)
    if quantised:
        for path in LAYERS:
            try:
                model[int(path)] = kept.make(copy.deepcopy(model[int(path)]))
            except ImportError as error:
                pytest.skip(f"{name}: {error}")
    return model.train().requires_grad_(False), x


def weights(model):
    """Return the weight that each layer's store reads, by path."""
    found = {}
    for path in LAYERS:
        layer = model[int(path)]
        found[path] = stores.read(layer, kinds.of(layer, path).weight).clone()
    return found


def reference(name, model, *, update=True):
    """Return a float32 network with the dequantised weights, plus the update if `update`."""
    expected, _ = made(name, quantised=False)
    expected.float()
    adapters = adapters_of(model)
    for path, W in weights(model).items():
        layer = expected[int(path)]
        layer.weight.data = W.float()
        if update:
            layer.weight.data += core.delta(adapters[path].factors()).t()
    return expected


def trained(name, *, steps=4, **options):
    model, x = made(name, **options)
    adamss.attach(model, CONFIG)
    return fitted(model, x, steps), x


def fitted(model, x, steps=4):
    optimizer = torch.optim.AdamW(adamss.trainable_parameters(model), lr=0.03)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, x).backward()
        optimizer.step()
    return model


def loss(model, x):
    return (model(x).float() - 1).square().mean()


def moved(model):
    """Give adapters a random update without training, for layers whose kernel does not run on this machine."""
    generator = torch.Generator().manual_seed(3)
    for adapter in adapters_of(model).values():
        adapter.C.data = 0.05 * torch.randn(adapter.C.shape, generator=generator)
    return model


def adapted(name, **options):
    model, x = made(name, **options)
    return moved(adamss.attach(model, CONFIG)), x


def assert_close(actual, expected, tolerance):
    """Check that the difference is at most `tolerance` times the largest expected value."""
    actual, expected = actual.detach().float(), expected.detach().float()
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def distance(actual, expected):
    actual, expected = actual.detach().float(), expected.detach().float()
    return float((actual - expected).norm() / expected.norm())


@ALL
def test_reads_what_the_library_keeps(name):
    kept, (model, x), (whole, _) = QUANTISERS[name], made(name), made(name, quantised=False)
    for path, W in weights(model).items():
        layer = model[int(path)]
        store = stores.of(layer, kinds.of(layer, path).weight)
        noise = store.noise(layer, kinds.of(layer, path).weight)
        assert W.is_floating_point()
        # These weights have larger outliers than normally distributed ones, so the error may be larger.
        assert distance(W, whole[int(path)].weight) < 1.5 * kept.error
        assert kept.error / 1.5 < noise < 2 * kept.error
    if kept.runs:
        expected = reference(name, adamss.attach(model, CONFIG), update=False)
        assert_close(adamss.detach(model)(x), expected(x.float()), kept.exact)


@TRAIN
def test_starts_equal_and_gives_the_layers_back(name):
    model, x = made(name)
    layers, output, before = list(model), model(x), weights(model)
    required = {n: p.requires_grad for n, p in model.named_parameters()}
    adamss.attach(model, CONFIG)
    if "used" in name and "NF4" in name:  # packed in evaluation mode, with another kernel
        assert_close(model(x), output, 2e-2)
    else:
        assert torch.equal(model(x), output)
    fitted(model, x)
    model.eval()
    with torch.no_grad():
        model(x)
    model.train()
    fitted(model, x)
    assert not torch.allclose(model(x), output, atol=1e-3)
    with adamss.disabled(model):
        base = model(x)
    adamss.detach(model)
    assert list(model) == layers
    assert torch.equal(model(x), base)
    assert all(torch.equal(W, before[path]) for path, W in weights(model).items())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == required
    assert not [n for n, _ in model.named_modules() if "adamss" in n]


@TRAIN
def test_trains_the_adapter_alone_through_the_kernel_of_the_layer(name):
    model, x = made(name)
    before = weights(model)
    adamss.attach(model, CONFIG)
    first = loss(model, x)
    fitted(model, x, steps=12)
    assert loss(model, x) < 0.8 * first
    assert all(torch.equal(W, before[path]) for path, W in weights(model).items())
    assert all(p.grad is None for n, p in model.named_parameters() if ".adamss." not in n)

    # Output and gradients are those of the dequantised weights plus the update, also after evaluation mode.
    model.eval()
    with torch.no_grad():
        model(x)
    model.train().zero_grad()
    expected, kept = reference(name, model), QUANTISERS[name]
    here, there = x.clone().requires_grad_(), x.float().requires_grad_()
    loss(model, here).backward()
    loss(expected, there).backward()
    assert_close(model(x), expected(x.float()), kept.exact)
    assert_close(here.grad, there.grad, 5 * kept.exact)
    assert all(parameter.grad.abs().max() > 0 for parameter in adamss.trainable_parameters(model))


@ALL
@pytest.mark.parametrize("training", [False, True])
def test_goes_into_a_file_and_back(name, training, tmp_path):
    model, x = adapted(name)
    adamss.save(model, tmp_path / "a.safetensors", training=training)
    again = adamss.load(made(name)[0], tmp_path / "a.safetensors")
    for path, adapter in adapters_of(again).items():
        ours, theirs = (core.delta(each.factors()) for each in (adapter, adapters_of(model)[path]))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    if QUANTISERS[name].trains and training:
        assert torch.equal(again(x), model(x))
        ours, theirs = (fitted(each, x) for each in (again, model))
        for a, b in zip(*map(adamss.trainable_parameters, (ours, theirs)), strict=True):
            assert torch.equal(a, b)


@ALL
@pytest.mark.parametrize("there", [False, True])
def test_law_16_travels_between_the_float_and_the_quantised_base(name, there, tmp_path):
    """The outputs on the two bases differ no more than those of the bases themselves; another base is refused."""
    kept = QUANTISERS[name]
    (model, x), path = trained(name, quantised=False), tmp_path / "a.safetensors"
    if there:  # train on the quantised base and load into the float one
        model, _ = adapted(name)
    adamss.save(model, path)
    other = adamss.load(made(name, quantised=not there)[0], path)
    if kept.runs:
        quantised = (other, model)[there]
        bases = []
        for each in (quantised, (model, other)[there]):
            with adamss.disabled(each):
                bases.append(each(x))
        own = distance(*bases)
        assert distance(quantised(x), (model, other)[there](x)) < 1.5 * own + kept.exact
    if kept.error < 0.3:  # two layers of two bits do not identify a base; another test has many layers
        for seed in range(1, 4):
            with pytest.raises(errors.CheckpointError, match=r"trained on .*check_base=False"):
                adamss.load(made(name, seed=seed, quantised=not there)[0], path)


@ALL
def test_merging_is_refused_and_says_what_to_do(name, tmp_path):
    model, _ = adapted(name)
    before, layers = weights(model), list(model)
    for verb in (adamss.merge, adamss.merge_and_unload):
        with pytest.raises(errors.LayerError, match=r"^0: its \w+ is quantised .*dequantise=True.*to_lora"):
            verb(model)
    adapters_of(model)["0"].active[1] = False
    with pytest.raises(errors.LayerError, match=r"^0: its \w+ is quantised"):
        adamss.consolidate(model)
    assert list(model) == layers
    assert all(torch.equal(W, before[path]) for path, W in weights(model).items())
    assert adamss.to_lora(model, tmp_path).rank == int(adapters_of(model)["0"].ranks.sum())


@ALL
@pytest.mark.parametrize("verb", [adamss.unmerge, adamss.detach])
def test_merges_into_float_layers_and_gives_the_quantised_ones_back(name, verb):
    kept, (model, x) = QUANTISERS[name], adapted(name)
    layers, before, expected = [model[0], model[2]], weights(model), reference(name, model)
    output = model(x) if kept.runs else expected(x.float())
    adamss.merge(model, dequantise=True)
    assert model[0].adamss.computed == ()
    for path in LAYERS:
        layer = model[int(path)]
        assert isinstance(layer, nn.Linear)
        assert type(layer.weight) is nn.Parameter
        assert layer.weight.dtype == before[path].dtype
        wanted = expected[int(path)].weight.to(layer.weight.dtype)
        torch.testing.assert_close(layer.weight.data, wanted.data, rtol=1e-2, atol=1e-6)
    assert_close(model(x), output, 3 * kept.exact)
    if kept.runs:
        with adamss.disabled(model):
            assert [model[0], model[2]] == layers
            base = model(x)
        assert [model[0], model[2]] != layers
    verb(model)
    assert [model[0], model[2]] == layers
    assert all(torch.equal(W, before[path]) for path, W in weights(model).items())
    if kept.runs:
        assert torch.equal(model(x), output if verb is adamss.unmerge else base)


@ALL
def test_unloads_into_float_layers(name):
    kept, (model, x) = QUANTISERS[name], adapted(name)
    expected = reference(name, model)(x.float())
    adamss.merge_and_unload(model, dequantise=True)
    assert_close(model(x), expected, 3 * kept.exact)
    assert all(isinstance(model[int(path)], nn.Linear) for path in LAYERS)
    assert sorted(model.state_dict()) == ["0.bias", "0.weight", "2.weight"]
    assert not any(parameter.requires_grad for parameter in model.parameters())


@ALL
def test_a_merge_that_fails_puts_the_quantised_layers_back(name):
    model, _ = adapted(name)
    layers = list(model)
    adapters_of(model)["2"].C.data[0, 0] = torch.inf
    for verb in (adamss.merge, adamss.merge_and_unload):
        with pytest.raises(errors.ArrayValueError, match=r"^2: "):
            verb(model, dequantise=True)
        assert list(model) == layers
        assert model[0].adamss.computed == ("default",)
    assert adamss.summary(model).total.active == 8


@SOME
def test_what_is_merged_into_float_layers_is_saved_as_of_the_quantised_base(name, tmp_path):
    model, _ = adapted(name)
    adamss.save(model, tmp_path / "before.safetensors")
    adamss.merge(model, dequantise=True)
    adamss.save(model, tmp_path / "after.safetensors")
    assert (tmp_path / "before.safetensors").read_bytes() == (tmp_path / "after.safetensors").read_bytes()


@SOME
def test_the_quantised_layers_are_gone_where_nobody_keeps_them(name):
    model, _ = adapted(name)
    adamss.merge(model, dequantise=True, keep_base=False)
    assert model[0].adamss.put_away == ()
    with pytest.raises(errors.StateError, match="keep_base=False"):
        adamss.unmerge(model)


@SOME
def test_hooks_go_along_and_a_layer_that_stands_twice_is_replaced_twice(name):
    model, x = adapted(name)
    twice, seen = nn.ModuleList([model, nn.ModuleDict({"again": model[2]})]), []
    model[2].register_forward_hook(lambda *_: seen.append(1))
    adamss.merge(twice, dequantise=True)
    assert twice[1]["again"] is model[2]
    assert isinstance(model[2], nn.Linear) and type(model[2].weight) is nn.Parameter
    seen.clear()
    model(x)
    assert seen == [1]
    adamss.unmerge(twice)
    assert twice[1]["again"] is model[2]
    seen.clear()
    model(x)
    assert seen == [1]


@pytest.mark.parametrize("name", ["quanto int2", "HQQ 2 bits"])
def test_two_bits_tell_another_base_by_many_layers(name, tmp_path):
    def network(*, seed, quantised):
        model = nn.ModuleList([made(name, seed=10 * seed + i, quantised=quantised)[0] for i in range(8)])
        return model, adamss.AdamssConfig(targets=r"\d\.[02]", rank=4, subspaces=2)

    model, config = network(seed=0, quantised=False)
    adamss.save(adamss.attach(model, config), tmp_path / "a.safetensors")
    assert adamss.load(network(seed=0, quantised=True)[0], tmp_path / "a.safetensors")
    with pytest.raises(errors.CheckpointError, match=r"trained on .*check_base=False"):
        adamss.load(network(seed=1, quantised=True)[0], tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["bitsandbytes NF4, used", "bitsandbytes NF4, single scales, used"])
def test_packed_weights_of_bitsandbytes_are_unpacked_without_a_change(name):
    """The inference kernel of bitsandbytes on the CPU passes no gradient to the input, so weights are unpacked."""
    model, x = made(name)
    if not model[0].weight.quant_state.__dict__.get("packing_format_for_cpu"):
        pytest.skip("this processor has no AVX512-BF16, for which bitsandbytes packs weights")
    before = weights(model)
    adamss.attach(model, CONFIG)
    assert all(torch.equal(W, before[path]) for path, W in weights(model).items())
    model.eval()
    with torch.no_grad():
        model(x)
    assert not getattr(model[0].weight.quant_state, "packing_format_for_cpu", False)
    adamss.detach(model)
    with torch.no_grad():
        model(x)
    assert model[0].weight.quant_state.packing_format_for_cpu


@pytest.mark.parametrize("quantised", [False, True])
def test_loaded_without_training_nothing_requires_a_gradient(quantised, tmp_path):
    model, x = made("bitsandbytes NF4", quantised=quantised)
    config = adamss.AdamssConfig(targets=["0"], rank=8, subspaces=4, modules_to_save=["3"])
    head = nn.Linear(64, 3)
    adamss.attach(model.append(copy.deepcopy(head)), config)
    adamss.save(fitted(model, x), tmp_path / "a.safetensors", training=True)
    other = made("bitsandbytes NF4", quantised=quantised)[0].append(head)
    required = {n: p.requires_grad for n, p in other.named_parameters()}
    adamss.load(other, tmp_path / "a.safetensors", trainable=False)
    assert torch.equal(other(x), model(x))
    assert not any(parameter.requires_grad for parameter in other.parameters())
    assert adamss.trainable_parameters(other) == []
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(errors.StateError, match="trainable=False"):
        BudgetController(other, optimizer, adamss.BudgetConfig(target=2, end_step=3))
    assert {n: p.requires_grad for n, p in adamss.detach(other).named_parameters()} == required


# ---- with transformers and PEFT ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [name for name, each in QUANTISERS.items() if each.trains and "used" not in name]
)
def test_peft_loads_its_lora_on_the_same_base(name, tmp_path):
    peft = pytest.importorskip("peft")
    model, x = adapted(name)
    adamss.to_lora(model, tmp_path)
    base, _ = made(name)
    base.register_parameter("spare", nn.Parameter(torch.zeros(1)))  # PEFT reads the device from it
    base.is_loaded_in_4bit, base.is_loaded_in_8bit = (
        f"bitsandbytes {kind}" in name for kind in ("NF4", "int8")
    )
    base.is_loaded_in_4bit |= "FP4" in name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = peft.PeftModel.from_pretrained(base, tmp_path)
    assert distance(other.train()(x), model(x)) < max(QUANTISERS[name].exact, 1e-5)


def four_bit_llama(folder):
    """Return a small Llama in NF4, loaded by `from_pretrained`."""
    transformers, _ = pytest.importorskip("transformers"), pytest.importorskip("bitsandbytes")
    # bitsandbytes can pack weights of these sizes.
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=200, **sizes, tie_word_embeddings=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    four_bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    options = {"quantization_config": four_bits, "dtype": torch.bfloat16, "device_map": "cpu"}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def prepared_llama(folder):
    """Return the small Llama in NF4 after PEFT's preparation for QLoRA."""
    peft = pytest.importorskip("peft")
    return peft.prepare_model_for_kbit_training(four_bit_llama(folder))


@pytest.mark.filterwarnings("ignore")
def test_a_model_with_merged_layers_is_saved_whole(tmp_path):
    model = four_bit_llama(tmp_path / "base")
    adamss.attach(model, adamss.AdamssConfig(targets=["q_proj", "v_proj"], rank=16, subspaces=4))
    merged = list(adapters_of(moved(model)))
    adamss.merge_and_unload(model, dequantise=True)
    model.config.quantization_config.llm_int8_skip_modules = ["lm_head", *merged]
    model.save_pretrained(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged", dtype=torch.bfloat16, device_map="cpu")
    kinds_of = [type(again.get_submodule(path)).__name__ for path in merged]
    assert kinds_of == ["Linear"] * 4
    assert type(again.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    tokens = torch.arange(16)[None]
    assert torch.equal(again.train()(tokens).logits, model.train()(tokens).logits)


@pytest.mark.filterwarnings("ignore")
def test_qlora_with_the_trainer_of_transformers(tmp_path):
    """The model has NF4 weights, float32 norms, gradient checkpointing and gradients at the input.

    The Trainer evaluates between the steps.
    """
    import transformers

    from adamss_torch.transformers import ADAPTER_FILE, AdamssCallback

    model = prepared_llama(tmp_path / "base")
    projections = [path for path, module in model.named_modules() if type(module).__name__ == "Linear4bit"]
    before = {path: stores.read(model.get_submodule(path), "weight") for path in projections}
    assert len(projections) == 14 and model.model.norm.weight.dtype == torch.float32
    adamss.attach(model, adamss.AdamssConfig(targets=projections, rank=16, subspaces=4))

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 200, (8, 16), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"),
        max_steps=12,
        per_device_train_batch_size=8,
        learning_rate=3e-2,
        gradient_checkpointing=True,
        eval_strategy="steps",
        eval_steps=3,
        save_steps=12,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model, arguments, train_dataset=data, eval_dataset=data, callbacks=[AdamssCallback()]
    )
    # The backward pass below the last layer goes through the kernels of the base.
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.2
    assert all(torch.equal(stores.read(model.get_submodule(p), "weight"), W) for p, W in before.items())
    assert all(adapter.C.abs().max() > 1e-3 for adapter in adapters_of(model).values())

    model.eval()
    with torch.no_grad():
        logits = model(tokens[:2]).logits
        again = prepared_llama(tmp_path / "base")
        adamss.load(again, tmp_path / "out" / "checkpoint-12" / ADAPTER_FILE, trainable=False)
        assert distance(again.eval()(tokens[:2]).logits, logits) < 0.05
        adamss.merge(model, dequantise=True)
        assert distance(model(tokens[:2]).logits, logits) < 0.05
        adamss.merge_and_unload(model)
    assert model.is_quantized is True


@SOME
def test_layers_that_accelerate_has_dispatched(name):
    hooks = pytest.importorskip("accelerate.hooks")
    model, x = adapted(name)
    for path in LAYERS:
        hooks.add_hook_to_module(model[int(path)], hooks.AlignDevicesHook(execution_device="cpu"))
    output = model(x)
    adamss.merge(model, dequantise=True)
    assert isinstance(model[0]._hf_hook, hooks.AlignDevicesHook)
    assert_close(model(x), output, 1e-5)
    adamss.unmerge(model)
    assert torch.equal(model(x), output)
    model[2].forward = model[2].forward.__wrapped__
    del model[2]._hf_hook
    with pytest.raises(errors.LayerError, match="2: another forward was assigned to the layer"):
        adamss.merge(model, dequantise=True)
    assert torch.equal(model(x), output)


@pytest.mark.parametrize("name", ["bitsandbytes NF4", "torchao int8", "HQQ 4 bits"])
def test_copies_of_adapted_models_are_models_of_their_own(name):
    model, x = adapted(name)
    other = copy.deepcopy(model)
    assert torch.equal(other(x), model(x))
    adamss.merge(other, dequantise=True)
    again = copy.deepcopy(other)
    adamss.unmerge(again)
    assert torch.equal(again(x), model(x))
    assert again[0] is not model[0]
    assert type(again[0]) is type(model[0])


def test_the_documentation_names_all_stores_and_tests_that_there_are():
    text = (PATH.parents[1] / "docs" / "guides" / "quantised.md").read_text(encoding="utf-8")
    table = text.split("| store | layers |")[1].split("\n\n")[0]
    stores_told = {line.split("|")[1].strip() for line in table.splitlines()[2:]}
    assert stores_told == {name for name in QUANTISERS if "used" not in name}
    assert set(re.findall(r"`(test_\w+)`", text)) <= globals().keys()
