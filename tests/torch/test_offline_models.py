"""Test the verbs on files against the models that load these files: transformers and PEFT."""

import json
import warnings

import pytest
import torch
from safetensors.torch import save_file
from test_peft import assert_close, loaded_by_peft, trained_by_peft

import adamss
from adamss import cli, offline, plots
from adamss.offline.plan import layers_of

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _other_libraries_may_warn():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"peft\.|transformers\.|torch\.")
        yield


def on_disk(model, folder):
    """Write the weights of a model that is none of transformers, and return the folder."""
    folder.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        folder / "model.safetensors",
    )
    return str(folder)


@pytest.fixture
def x(inputs):
    return inputs(6, 16)


def run(*words):
    assert cli.main([*map(str, words)]) == 0


@pytest.mark.parametrize("bias", [True, False])
def test_an_adapter_of_peft_and_back(net, x, tmp_path, bias):
    pytest.importorskip("sklearn")
    base = on_disk(net(bias=bias), tmp_path / "base")
    options = {"subspace_rank": 2, "modules_to_save": ["classifier"]}
    expected = trained_by_peft(net(bias=bias), tmp_path / "theirs", x, **options)(x)
    run("convert", tmp_path / "theirs", "--to", "adamss", "--base", base, "--out", tmp_path / "ours")
    assert_close(adamss.load(net(bias=bias), tmp_path / "ours")(x), expected)
    settings = json.loads((tmp_path / "ours" / "adamss_config.json").read_text())
    assert (settings["rank"], settings["subspaces"], settings["modules_to_save"]) == (24, 4, ["classifier"])
    run("convert", tmp_path / "ours", "--to", "peft", "--base", base, "--out", tmp_path / "again")
    assert_close(loaded_by_peft(net(bias=bias), tmp_path / "again")(x), expected)
    if not bias:
        run("convert", tmp_path / "theirs", "--to", "lora", "--base", base, "--out", tmp_path / "lora")
        lora = loaded_by_peft(net(bias=bias), tmp_path / "lora")
        lora.base_model.model.classifier = net(bias=bias).classifier
        alone = adamss.load(net(bias=bias), tmp_path / "ours")
        alone.classifier.load_state_dict(net(bias=bias).classifier.state_dict())
        assert_close(lora(x), alone(x))


def classifier(folder=None):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=100
    )
    return transformers.BertForSequenceClassification(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("shards", [None, "60KB"])
def test_merged_folders_load_with_from_pretrained(tmp_path, dtype, bare, shards):
    """The base may be the bare encoder, whose names lack the prefix, and which has no head."""
    model = classifier().to(dtype)
    (model.bert if bare else model).save_pretrained(
        tmp_path / "base", **({"max_shard_size": shards} if shards else {})
    )
    tokens = torch.randint(0, 100, (3, 9), generator=torch.Generator().manual_seed(1))
    adamss.attach(
        model,
        adamss.AdamssConfig(
            targets=["query", "dense"],
            modules_to_save=["classifier"],
            trained_tokens=[3, 7],
            rank=16,
            subspaces=4,
        ),
    )
    with torch.no_grad():
        for parameter in adamss.trainable_parameters(model):
            parameter += 0.1 * torch.randn(parameter.shape)
    adamss.save(model, tmp_path / "adapter")
    run("merge", tmp_path / "adapter", "--base", tmp_path / "base", "--out", tmp_path / "merged")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adamss.merge(model)
    merged = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path / "merged", dtype=dtype
    ).eval()
    with torch.no_grad():
        assert_close(
            merged(tokens).logits, model(tokens).logits, atol=1e-5 if dtype == torch.float32 else 0.05
        )
    state = merged.state_dict()
    for name, tensor in model.state_dict().items():
        if ".adamss." not in name:
            assert_close(state[name].float(), tensor.float(), atol=1e-6 if dtype == torch.float32 else 0.02)


def test_a_convolution_becomes_a_lora(tmp_path):
    pytest.importorskip("peft")

    def make():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1)
        )

    model = adamss.attach(make(), adamss.AdamssConfig(targets=["0", "2"], rank=4, subspaces=2))
    with torch.no_grad():
        for parameter in adamss.trainable_parameters(model):
            parameter += 0.1 * torch.randn(parameter.shape)
    adamss.save(model, tmp_path / "a.safetensors")
    base = on_disk(make(), tmp_path / "base")
    run("convert", tmp_path / "a.safetensors", "--to", "lora", "--base", base, "--out", tmp_path / "lora")
    x = torch.randn(2, 3, 6, 6)
    assert_close(loaded_by_peft(make(), tmp_path / "lora")(x), model(x))
    run("merge", tmp_path / "a.safetensors", "--base", base, "--out", tmp_path / "merged")
    run("verify", tmp_path / "a.safetensors", "--base", base)


def test_what_files_do_not_tell_is_refused(tmp_path, capsys):
    model = torch.nn.ModuleDict({"table": torch.nn.Embedding(12, 8), "head": torch.nn.Linear(8, 4)})
    base = on_disk(model, tmp_path / "base")
    adamss.attach(model, adamss.AdamssConfig(targets=["table"], rank=4, subspaces=2))
    adamss.save(model, tmp_path / "a.safetensors")
    command = [
        "convert",
        tmp_path / "a.safetensors",
        "--to",
        "lora",
        "--base",
        base,
        "--out",
        tmp_path / "out",
    ]
    assert cli.main([*map(str, command)]) == 1
    assert "table is not a linear layer or a convolution" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def llama(*, tied):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=40,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("settings", [{"modules_to_save": ["lm_head"]}, {"trained_tokens": [3, 7]}], ids=str)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("both", [True, False])
def test_what_is_tied_stays_so(tmp_path, settings, tied, both):
    """A tensor that was trained under two names changes under both, also where the files have both."""
    model, tokens = llama(tied=tied), torch.arange(12)[None]
    model.save_pretrained(tmp_path / "base")
    if both:
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    adamss.attach(model, adamss.AdamssConfig(targets=["q_proj"], rank=8, subspaces=2, **settings))
    with torch.no_grad():
        for parameter in adamss.trainable_parameters(model):
            parameter += torch.randn(parameter.shape)
        expected = model(tokens).logits
    adamss.save(model, tmp_path / "a.safetensors")
    run("merge", tmp_path / "a.safetensors", "--base", tmp_path / "base", "--out", tmp_path / "merged")
    with torch.no_grad():
        merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert_close(merged(tokens).logits, expected, atol=1e-4)


def test_a_tied_embedding_is_not_adapted_in_files(tmp_path, capsys):
    model = llama(tied=True)
    model.save_pretrained(tmp_path / "base")
    with pytest.warns(adamss.AdamssWarning, match="is one tensor with lm_head"):
        adamss.attach(model, adamss.AdamssConfig(targets=["embed_tokens"], rank=4, subspaces=2))
    adamss.save(model, tmp_path / "a.safetensors")
    command = ["merge", tmp_path / "a.safetensors", "--base", tmp_path / "base", "--out", tmp_path / "out"]
    assert cli.main([*map(str, command)]) == 1
    assert "may share its weight with the output head" in capsys.readouterr().err


def test_a_lora_has_the_names_of_the_base(tmp_path):
    """The model that was trained wraps the base, whose files know no wrapper."""
    pytest.importorskip("peft")
    base = classifier().bert
    base.save_pretrained(tmp_path / "base")
    wrapped = torch.nn.ModuleDict({"encoder": base})
    adamss.attach(wrapped, adamss.AdamssConfig(targets=["query"], rank=8, subspaces=4))
    with torch.no_grad():
        for parameter in adamss.trainable_parameters(wrapped):
            parameter += 0.1 * torch.randn(parameter.shape)
    adamss.save(wrapped, tmp_path / "adapter")
    run(
        "convert",
        tmp_path / "adapter",
        "--to",
        "lora",
        "--base",
        tmp_path / "base",
        "--out",
        tmp_path / "lora",
    )
    lora = loaded_by_peft(transformers.BertModel.from_pretrained(tmp_path / "base"), tmp_path / "lora")
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert_close(lora(tokens).last_hidden_state, base(tokens).last_hidden_state)


def test_code_that_a_config_names_is_not_run(tmp_path, capsys, monkeypatch):
    marker = tmp_path / "run"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: pass\n")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": f"{tmp_path}--evil.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    assert cli.main(["plan", str(tmp_path / "config.json"), "--params", "50k"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "transformers cannot build the model" in captured.err
    assert not marker.exists()


def test_parts_of_a_pipeline_are_copied(tmp_path):
    classifier().bert.save_pretrained(tmp_path / "base")
    for name in ("1_Pooling/config.json", "2_Dense/model.safetensors", "onnx/model.onnx", ".cache/x"):
        (tmp_path / "base" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "base" / name).write_bytes(b"{}")
    model = adamss.attach(classifier().bert, adamss.AdamssConfig(targets=["query"], rank=4, subspaces=2))
    adamss.save(model, tmp_path / "a.safetensors")
    run("merge", tmp_path / "a.safetensors", "--base", tmp_path / "base", "--out", tmp_path / "merged")
    below = {f"{each.parent.name}/{each.name}" for each in (tmp_path / "merged").glob("*/*")}
    assert below == {"1_Pooling/config.json", "2_Dense/model.safetensors"}


def test_layers_that_store_w_itself(tmp_path):
    """GPT-2 keeps W where a linear layer keeps its transpose; files, config and pictures agree on that."""
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=12)
    torch.manual_seed(0)
    model = transformers.GPT2Model(config)
    model.save_pretrained(tmp_path / "base")
    weight = model.h[0].attn.c_attn.weight.detach().numpy()
    (report,) = offline.inspect(
        offline.WeightFiles(tmp_path / "base"), ["h.0.attn.c_attn"], rank=8, subspaces=3
    )
    assert report.shape == weight.shape == (16, 48)
    assert sum(report.sizes) == 48
    config.save_pretrained(tmp_path / "config")
    shapes, kind = layers_of(str(tmp_path / "config"))
    assert kind == "gpt2"
    in_files, _ = layers_of(str(tmp_path / "base"))
    assert {path: in_files[path] for path in shapes} == shapes
    close = pytest.importorskip("matplotlib.pyplot").close
    ax = plots.ordering(tmp_path / "base", "c_attn", rank=8, subspaces=3)
    assert ax.images[0].get_extent() == [0, 48, 48, 0]
    close(ax.figure)
