"""A tiny random model of any type of causal language model that transformers has."""

from __future__ import annotations

import inspect

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

#: Sizes by the names that configurations give them. A configuration gets those that it has.
SIZES = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    # Large weights make attention far from uniform, and the best token clear.
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "is_decoder": True,
    # Names of families
    "encoder_layers": 4,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 96,
    "num_encoder_layers": 4,
    "num_decoder_layers": 4,
    "num_encoder_attention_heads": 2,
    "num_decoder_attention_heads": 2,
    "d_model": 128,
    "n_embd": 128,
    "n_head": 2,
    "n_heads": 2,
    "attention_heads": 2,
    "n_layer": 4,
    "n_positions": 1024,
    "num_layers": 4,
    "decoder_layers": 4,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 96,
    "ffn_dim": 96,
    "d_ff": 96,
    "rotary_dim": 16,
    "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 16,
    "embedding_size": 128,
    "word_embed_proj_dim": 128,
    # Experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    # Latent attention
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "index_n_heads": 2,
    # States
    "n_groups": 1,
    "mamba_n_groups": 1,
    "mamba_ngroups": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_n_heads": 4,
    "mamba_d_head": 64,
    "mamba_d_state": 16,
    "mamba_d_ssm": 256,
    "mamba_num_heads": 4,
    "mamba_head_dim": 64,
    "ssm_state_size": 16,
    "state_size": 16,
    "n_mamba_heads": 1,
    "chunk_size": 16,
    "mamba_chunk_size": 16,
}

#: Further settings of some types.
SETTINGS: dict[str, dict[str, object]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"num_hidden_layers": 4},
    "dbrx": {"attn_config": {"kv_n_heads": 1, "rope_theta": 10000.0}, "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}},
    "diffllama": {"num_key_value_heads": 2},
    "dots1": {"n_shared_experts": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    # Its 32 layers in a loop amplify rounding: with larger weights two kinds of dense attention differ by a third.
    "hrm_text": {"initializer_range": 0.02},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 4},
    "reformer": {"axial_pos_embds_dim": (64, 64), "axial_pos_shape": (32, 32), "num_hash_functions": 1},
    "xlm": {"emb_dim": 128, "n_layers": 4, "n_heads": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}

#: Parameters of the largest model to build.
LARGEST = 20_000_000

CAUSAL_LM_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str):
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**_settings(config_class, SETTINGS.get(model_type, {})))


def _settings(config_class, extra):
    known = set(inspect.signature(config_class.__init__).parameters) | set(getattr(config_class, "__dataclass_fields__", ()))
    settings = {name: value for name, value in SIZES.items() if name in known}
    if "kv_lora_rank" in known:  # every head has its own keys
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    for name, sub_class in getattr(config_class, "sub_configs", {}).items():
        if "sub_configs" in dir(sub_class):
            settings[name] = _settings(sub_class, extra.get(name, {}))
    return {**settings, **extra}


def tiny_model(model_type: str, config=None):
    config = config or tiny_config(model_type)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"its configuration has no small setting here: {size / 1e6:.0f} M parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    options = model.generation_config
    options.disable_compile = True
    options.bos_token_id = options.eos_token_id = None
    options.pad_token_id = 0
    return model
