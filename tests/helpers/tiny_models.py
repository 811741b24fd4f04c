"""A tiny random model of each type of causal language model that transformers has."""

import inspect

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .hf_models import ROPE

CAUSAL_LM_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

#: Parameters of the largest model to build.
LARGEST = 45_000_000

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
    # The same by other names
    "d_model": 128,
    "n_embd": 128,
    "embedding_size": 128,
    "word_embed_proj_dim": 128,
    "n_head": 2,
    "n_heads": 2,
    "attention_heads": 2,
    "n_layer": 4,
    "n_layers": 4,
    "num_layers": 4,
    "n_positions": 1024,
    "d_ff": 96,
    "ffn_dim": 96,
    "rotary_dim": 16,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 96,
    # Encoders and decoders
    "decoder_layers": 4,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 96,
    "encoder_layers": 4,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 96,
    "num_decoder_layers": 4,
    "num_decoder_attention_heads": 2,
    "num_encoder_layers": 4,
    "num_encoder_attention_heads": 2,
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
    # Latent attention and its indexer
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "index_n_heads": 2,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
    "indexer_kv_heads": 1,
    "indexer_n_heads": 2,
    "indexer_head_dim": 64,
    # States
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_d_head": 64,
    "mamba_head_dim": 64,
    "mamba_d_state": 16,
    "mamba_d_ssm": 256,
    "mamba_n_groups": 1,
    "mamba_ngroups": 1,
    "mamba_chunk_size": 16,
    "n_mamba_heads": 1,
    "n_groups": 1,
    "ssm_state_size": 16,
    "state_size": 16,
    "chunk_size": 16,
}

ALTERNATING = ["sliding_attention", "full_attention"] * 2

#: Further settings of some types. Most let a small number of layers hold one of each kind.
SETTINGS = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "diffllama": {"num_key_value_heads": 2},
    "dots1": {"n_shared_experts": 1},
    "gemma3": {"text_config": {"layer_types": ALTERNATING}},
    "gemma3_text": {"layer_types": ALTERNATING},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ALTERNATING},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    # Scores without the usual scale of 1/8 would amplify rounding.
    "granite_swa": {"attention_multiplier": 0.125},
    "granitemoe_swa": {"attention_multiplier": 0.125},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    # Its 32 layers in a loop amplify rounding: with larger weights two kinds of dense attention differ by a third.
    "hrm_text": {"initializer_range": 0.02},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "kolibri1": {"layer_types": ALTERNATING},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"n_routed_experts": 4, "zero_expert_num": 2, "expert_ffn_hidden_size": 32},
    "mamba2": {"num_heads": 4},
    "reformer": {"axial_pos_embds_dim": (64, 64), "axial_pos_shape": (32, 32), "num_hash_functions": 1},
    "xlm": {"emb_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid_sliding", "hybrid"] * 2, "sliding_window": 32},
}


def tiny_config(model_type):
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**_settings(config_class, SETTINGS.get(model_type, {})))


def tiny_model(model_type):
    """A model in float32 with dense attention, which generates without compiling and without an end.

    Raises:
        Exception: transformers cannot build it from these settings; a ValueError where it would be large.
    """
    config = tiny_config(model_type)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} M parameters with the settings that make other types small")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    options = model.generation_config
    options.disable_compile = True
    options.bos_token_id = options.eos_token_id = None
    options.pad_token_id = 0
    return model


def _settings(config_class, extra):
    """Small settings of a configuration and of the configurations in it; ``extra`` wins."""
    parameters = inspect.signature(config_class.__init__).parameters
    settings = {name: value for name, value in SIZES.items() if name in parameters}
    window = parameters.get("sliding_window")
    if window is not None and isinstance(window.default, int):
        settings["sliding_window"] = 32
    if "kv_lora_rank" in parameters:  # every head has its own keys
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    parts = getattr(config_class, "sub_configs", {})
    defaults = config_class() if AutoConfig in parts.values() else None
    for name, part in parts.items():
        part = type(getattr(defaults, name, None)) if part is AutoConfig else part
        if issubclass(part, PreTrainedConfig) and not isinstance(extra.get(name), PreTrainedConfig):
            settings[name] = {"model_type": part.model_type, **_settings(part, extra.get(name, {}))}
    return {**settings, **{name: value for name, value in extra.items() if name not in parts}}
