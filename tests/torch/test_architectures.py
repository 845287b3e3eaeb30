"""Test the lifecycle of an adapter on many architectures of transformers.

Every model is tiny and random, and made from its own config. The adapter covers all linear layers, and in turn one
matrix of each other kind: embeddings, convolutions, and Parameters that a module reads itself.
"""

import copy
import re

import pytest
import torch
from torch import nn

import adamss
from adamss_torch.backend import TorchBackend, adapters_of
from adamss_torch.kinds import OwnParameter

transformers = pytest.importorskip("transformers")

SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"), 2),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads",), 4),
    **dict.fromkeys(
        ("intermediate_size", "d_ff", "ffn_dim", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 48
    ),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_dim"), 16),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "n_group", "topk_group"), 2),
    **dict.fromkeys(
        ("head_dim", "d_kv", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "kv_lora_rank"), 8
    ),
    **dict.fromkeys(("q_lora_rank", "state_size", "mamba_d_state", "time_step_rank", "mamba_dt_rank"), 8),
    **dict.fromkeys(("vocab_size",), 64),
    **dict.fromkeys(("image_size",), 32),
    **dict.fromkeys(("patch_size",), 8),
    **dict.fromkeys(("first_k_dense_replace", "n_shared_experts"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("pad_token_id", "bos_token_id"), 0),
    **dict.fromkeys(("eos_token_id", "decoder_start_token_id"), 1),
}
CASES: dict[str, dict[str, object]] = {
    "AlbertForMaskedLM": {},
    "BartForConditionalGeneration": {},
    "BertForMaskedLM": {},
    "BloomForCausalLM": {},
    "ConvNextV2ForImageClassification": {"hidden_sizes": [16, 24], "depths": [1, 1], "num_stages": 2},
    "DebertaV2ForMaskedLM": {},
    "DeepseekV3ForCausalLM": {"num_key_value_heads": 4},
    "Dinov2ForImageClassification": {},
    "DistilBertForMaskedLM": {},
    "ElectraForMaskedLM": {},
    "FalconForCausalLM": {},
    "GPT2LMHeadModel": {},
    "GPTNeoXForCausalLM": {},
    "Gemma2ForCausalLM": {},
    "GptOssForCausalLM": {},
    "JambaForCausalLM": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "use_mamba_kernels": False,
    },
    "LayoutLMv3ForSequenceClassification": {
        "visual_embed": False,
        "coordinate_size": 6,
        "shape_size": 4,
        "max_2d_position_embeddings": 256,
    },
    "Llama4ForCausalLM": {"interleave_moe_layer_step": 1},
    "LlamaForCausalLM": {},
    "MambaForCausalLM": {"use_mambapy": False},
    "MixtralForCausalLM": {},
    "OPTForCausalLM": {},
    "PhiForCausalLM": {},
    "Qwen2ForCausalLM": {},
    "Qwen3MoeForCausalLM": {},
    "ResNetForImageClassification": {"hidden_sizes": [16, 24], "depths": [1, 1], "embedding_size": 16},
    "RobertaForSequenceClassification": {},
    "SwinForImageClassification": {
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 4],
        "window_size": 2,
        "patch_size": 4,
    },
    "T5ForConditionalGeneration": {},
    "ViTForImageClassification": {},
    "WavLMForCTC": {
        "conv_dim": (16, 16),
        "conv_stride": (5, 2),
        "conv_kernel": (10, 3),
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
    },
}
UNUSED = re.compile(
    r"router|gate|bias_table|position|visual|score|norm|conv_layers|token_type|patch_embed|_bias$|shared$"
)
"""Matrices that the inputs do not reach, or that affect the output too little to learn anything in one step."""


def built(name):
    """Return a tiny model, a function that calls it, and its output."""
    kind = getattr(transformers, name)
    settings = {}
    whole = kind.config_class()
    for config in (whole, getattr(whole, "text_config", None)):
        if config is not None:
            own = {key for key in SMALL if not isinstance(getattr(type(config), key, None), property)}
            settings |= {key: SMALL[key] for key in own if isinstance(getattr(config, key, None), int)}
    torch.manual_seed(0)
    model = kind(kind.config_class(**settings | CASES[name])).eval()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)  # some start at zero, and would block gradients
    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    elif model.main_input_name == "input_values":
        inputs = {"input_values": torch.randn(2, 400)}
    else:
        inputs = {"input_ids": torch.randint(2, 60, (2, 7))}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.randint(2, 60, (2, 5))
        if "LayoutLM" in name:
            inputs["bbox"] = torch.randint(0, 30, (2, 7, 4)).cumsum(-1)
    return model, lambda m: m(**inputs).logits


def other_matrices(model):
    """Return one path for each kind of matrix that is not a linear layer."""
    backend, found = TorchBackend(), {}
    for path, module in backend.modules(model).items():
        kind = backend.kinds.find(module)
        if kind is None or kind.all_linear or UNUSED.search(path):
            continue
        try:
            backend.site(module, path)
        except adamss.errors.AdamssError:
            continue  # a grouped convolution, which cannot be adapted
        label = path.rpartition(".")[2] if isinstance(module, OwnParameter) else type(module).__name__
        found.setdefault(label, path)
    return list(found.values())


@pytest.mark.filterwarnings("ignore:attach. .* is one tensor with", "ignore:merge. .* is one tensor with")
@pytest.mark.parametrize("name", CASES)
def test_through_the_life_of_an_adapter(name, tmp_path):
    base, call = built(name)
    base.requires_grad_(False)
    state = copy.deepcopy(base.state_dict())
    for targets in ("all-linear", *([path] for path in other_matrices(base))):
        model = copy.deepcopy(base)
        settings = {"rank": 8, "subspaces": 3}
        y0 = call(model).detach()
        adamss.attach(model, adamss.AdamssConfig(targets=targets, **settings))
        with torch.no_grad():
            assert torch.equal(call(model), y0), targets
        optimizer = torch.optim.SGD(adamss.trainable_parameters(model), lr=1.0)
        (call(model) - 1).square().mean().backward()
        adapters = adapters_of(model)
        learnt = [
            path for path, adapter in adapters.items() if adapter.C.grad is not None and adapter.C.grad.any()
        ]
        assert learnt, targets
        optimizer.step()
        for adapter in adapters.values():
            adapter.C.data.normal_(std=0.05)
        with torch.no_grad():
            y = call(model)
            assert not torch.allclose(y, y0), targets
            adamss.save(model, tmp_path / "a.safetensors")
            torch.testing.assert_close(
                call(adamss.load(copy.deepcopy(base), tmp_path / "a.safetensors")), y, atol=1e-4, rtol=1e-4
            )
            torch.testing.assert_close(call(adamss.merge(model)), y, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(call(adamss.unmerge(model)), y, atol=0, rtol=0)
            adamss.detach(model)
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
