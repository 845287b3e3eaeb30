"""Test exports to LoRA by loading them with PEFT."""

import copy
import json
import warnings

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import adamss
from adamss import errors

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def with_lora(base, folder):
    with warnings.catch_warnings():  # PEFT 0.21 reads an attribute that transformers 5 has deprecated
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base, folder)


def trained(model, tokens, **options):
    """Return an adapted model after some training steps, with all but two subspaces frozen afterwards."""
    adamss.attach(model, adamss.AdamssConfig(**options))
    optimizer = torch.optim.AdamW(adamss.trainable_parameters(model), lr=2e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens).last_hidden_state.square().mean().backward()
        optimizer.step()
    for module in model.modules():
        if hasattr(module, "ranks"):
            module.active.copy_(torch.arange(len(module.ranks)) < 2)
    return model


def outputs(model, tokens):
    with torch.no_grad():
        return model(tokens).last_hidden_state


CASES = {
    "minilm": {"targets": ["query", "value"], "rank": 100, "subspaces": 10},
    "minilm, ranks": {"targets": ["query", "value"], "rank": 32, "subspaces": 5, "subspace_rank": 3},
    "minilm, some": {
        "targets": r"encoder\.layer\.[024]\..*query",
        "rank": 24,
        "subspaces": 4,
        "basis": "per_subspace",
    },
    "llama": {"targets": ["q_proj", "v_proj"], "rank": 16, "subspaces": 6, "subspace_rank": 2},
    "llama, q differs": {"targets": ["v_proj", "down_proj"], "rank": 96, "subspaces": 40, "subspace_rank": 2},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("state", ["trained", "merge", "consolidate"])
def test_peft_gives_the_same_outputs(minilm, causal_lm, tmp_path, name, state):
    build = (lambda: causal_lm().model) if "llama" in name else minilm
    tokens = torch.randint(5, 200, (3, 12), generator=torch.Generator().manual_seed(0))
    start = outputs(build(), tokens)
    model = trained(build(), tokens, **CASES[name])
    expected = outputs(model, tokens)
    assert float((expected - start).abs().max()) > 1e-2
    if state != "trained":
        getattr(adamss, state)(model)
    written = adamss.to_lora(model, tmp_path / "lora")
    assert written.rank == max(row.q for row in adamss.summary(model).rows)
    assert str(written.layers) in str(written)

    loaded = with_lora(build(), tmp_path / "lora")
    torch.testing.assert_close(outputs(loaded, tokens), expected, rtol=0, atol=1e-5)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(outputs(merged, tokens), expected, rtol=0, atol=1e-5)


def test_the_folder_is_plain_lora(minilm, tmp_path):
    tokens = torch.randint(5, 200, (2, 8))
    adamss.to_lora(trained(minilm(), tokens, **CASES["minilm"]), tmp_path)
    files = ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == 10
    assert sorted(config["target_modules"]) == ["query", "value"]
    assert config["bias"] == "none"
    assert config["modules_to_save"] is None
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 24
    A = tensors["base_model.model.encoder.layer.0.attention.self.query.lora_A.weight"]
    B = tensors["base_model.model.encoder.layer.0.attention.self.query.lora_B.weight"]
    assert (A.shape, B.shape, A.dtype) == ((10, 384), (384, 10), np.float32)
    assert np.count_nonzero(B, axis=1).max() == 1, "each output belongs to one subspace"


def test_only_the_adapted_layers_are_named_where_others_are_called_alike(minilm, tmp_path):
    tokens = torch.randint(5, 200, (2, 8))
    adamss.to_lora(trained(minilm(), tokens, **CASES["minilm, some"]), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == [f"encoder.layer.{i}.attention.self.query" for i in (0, 2, 4)]


def test_saved_modules_are_put_beside_it(net, config, train, tmp_path):
    model = train(adamss.attach(net(), config(modules_to_save=["classifier"])))
    with pytest.warns(adamss.AdamssWarning, match=r"modules_to_save\.safetensors"):
        written = adamss.to_lora(model, tmp_path)
    tensors = load_file(written.saved)
    np.testing.assert_array_equal(tensors["classifier.weight"], model.classifier.weight.detach().numpy())
    adamss.detach(model)
    adamss.to_lora(adamss.attach(model, config()), tmp_path)
    assert not written.saved.exists(), "the file of an earlier export was left"


def test_a_tied_weight_is_told_of(causal_lm, tmp_path):
    """PEFT would merge the update of the head into the embeddings as well."""
    base = causal_lm(tied=True)
    adamss.attach(base, adamss.AdamssConfig(targets=["lm_head"], rank=8, subspaces=4))
    with pytest.warns(adamss.AdamssWarning, match=r"lm_head\.weight is one tensor with model\.embed_tokens"):
        adamss.to_lora(base, tmp_path)


def test_an_update_of_a_bias_is_refused_and_a_zero_one_is_not(net, config, train, tmp_path):
    model = adamss.attach(net(), config(include_bias=True))
    adamss.to_lora(model, tmp_path / "zero")
    with pytest.raises(errors.StateError, match=r"bias.*merge"):
        adamss.to_lora(train(model), tmp_path / "not")
    assert not (tmp_path / "not").exists()


def test_more_directions_than_servers_take(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(600, 1200))
    adamss.attach(model, adamss.AdamssConfig(targets=["0"], rank=600, subspaces=300, subspace_rank=3))
    with pytest.raises(errors.StateError, match=r"q = \d+ .* 512.*subspace_rank=1.*subspaces=170") as caught:
        adamss.to_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    assert "merge" in str(caught.value)


def test_factors_that_are_not_finite(net, config, tmp_path):
    model = adamss.attach(net(), config())
    model.layers[0].query.adamss.default.C.data[0, 0] = torch.nan
    with pytest.raises(errors.ArrayValueError, match=r"layers\.0\.query"):
        adamss.to_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_dense_layers_that_peft_takes_for_experts(tmp_path):
    """When PEFT loads into a model with fused experts, it turns ``down_proj`` into ``target_parameters``."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 2,
        "n_shared_experts": 1,
    }
    config = transformers.DeepseekV3Config(
        **sizes, **experts, intermediate_size=48, moe_intermediate_size=16, vocab_size=64, first_k_dense_replace=1,
        q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    base, tokens = transformers.DeepseekV3Model(config).eval(), torch.randint(0, 64, (2, 9))
    model = copy.deepcopy(base)
    adamss.attach(
        model, adamss.AdamssConfig(targets=["down_proj", "gate_up_proj", "q_b_proj"], rank=8, subspaces=3)
    )
    for module in model.modules():
        if hasattr(module, "ranks"):
            module.C.data.normal_(std=0.1)
    with pytest.warns(
        errors.AdamssWarning, match=r"layers\.0\.mlp\.down_proj .*that PEFT takes for that of experts"
    ):
        adamss.to_lora(model, tmp_path)
    torch.testing.assert_close(
        outputs(with_lora(base, tmp_path), tokens), outputs(model, tokens), atol=1e-5, rtol=1e-5
    )


class Product(torch.nn.Module):
    """A module with a layer that also reads two Parameters of its own."""

    def __init__(self):
        super().__init__()
        self.left, self.right = (torch.nn.Parameter(torch.randn(16, 16) / 4) for _ in range(2))
        self.fc = torch.nn.Linear(16, 16)

    def forward(self, x):
        return self.fc(x) @ self.left @ self.right


def test_layers_whose_weights_the_fused_paths_of_pytorch_read(tmp_path):
    model = torch.nn.Sequential(torch.nn.TransformerEncoderLayer(8, 2, 16))
    adamss.attach(model, adamss.AdamssConfig(targets=["linear1"], rank=4, subspaces=2))
    assert adamss.to_lora(model, tmp_path).layers == 1


def test_layers_within_a_module_of_which_parameters_are_adapted(tmp_path):
    """PEFT wraps the module once for each Parameter, which changes the paths of the layers within it."""
    torch.manual_seed(0)
    base, x = torch.nn.Sequential(torch.nn.Sequential(Product()), torch.nn.Linear(16, 16)), torch.randn(3, 16)
    model = copy.deepcopy(base)
    adamss.attach(model, adamss.AdamssConfig(targets=["left", "right", "fc", "1"], rank=8, subspaces=3))
    for module in model.modules():
        if hasattr(module, "ranks"):
            module.C.data.normal_(std=0.3)
    adamss.to_lora(model, tmp_path)
    torch.testing.assert_close(with_lora(base, tmp_path)(x), model(x), atol=1e-5, rtol=1e-5)


def test_what_peft_refuses_of_mamba_is_told(tmp_path):
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64, state_size=8)
    model = transformers.MambaModel(config)
    adamss.attach(model, adamss.AdamssConfig(targets=["out_proj"], rank=8, subspaces=3))
    # On a GPU, the fused kernel of the mixer reads it.
    with pytest.raises(
        errors.LayerTypeError, match=r"out_proj: by its source, MambaMixer reads its weight itself"
    ):
        adamss.to_lora(model, tmp_path)
    model(torch.ones(1, 3, dtype=torch.long))
    with pytest.warns(
        errors.AdamssWarning, match=r"layers\.0\.mixer\.out_proj: PEFT loads no LoRA of such a layer"
    ):
        adamss.to_lora(model, tmp_path)
