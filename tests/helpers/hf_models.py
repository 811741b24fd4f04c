"""Small random Hugging Face models, prompts for them, and their attention by the reference."""

import functools

import torch
from quest_ops import reference
from quest_ops.transformers.generation import CACHE_NAME
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    CompileConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from helpers.cache_model import bounds_of_keys, codes_of_keys

COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    # Large weights make attention far from uniform, and the best token clear.
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
WINDOW = 32
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MODELS = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "mistral sliding": (MistralConfig, {"sliding_window": WINDOW}),
    "gemma2": (Gemma2Config, {**MIXED, "query_pre_attn_scalar": 64, "attn_logit_softcapping": 5.0}),
    "gemma3": (Gemma3TextConfig, {**MIXED, "query_pre_attn_scalar": 64}),
    "gpt-oss": (GptOssConfig, {**MIXED, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": ROPE}),
}
# In transformers only eager attention has the features of these models.
DENSE = {"gemma2": "eager", "gpt-oss": "eager"}


@functools.cache
def _model(name, device, changes):
    torch.manual_seed(0)
    config_class, extra = MODELS[name]
    config = config_class(**{**COMMON, **extra, **dict(changes)})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device).eval()
    for layer in model.model.layers:
        if hasattr(layer.self_attn, "sinks"):
            torch.nn.init.normal_(layer.self_attn.sinks)
    # Tests that need compiling request it.
    model.generation_config.disable_compile = True
    return model


def make_model(name="qwen3", device="cpu", **changes):
    """A model of the kind ``name`` with dense attention, the same object each time."""
    model = _model(name, device, tuple(changes.items()))
    model.set_attn_implementation(DENSE.get(name, "sdpa"))
    return model


def new_model(name="qwen3", device="cpu"):
    """A model that no other test has changed."""
    return _model.__wrapped__(name, device, ())


def prompt(tokens, device="cpu", seed=1, padding=(0,)):
    """Token numbers and their mask, [len(padding), tokens] each, the rows padded on the left."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, COMMON["vocab_size"], (len(padding), tokens), generator=random)
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        ids[row, :count] = mask[row, :count] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def passing(cache):
    """The argument that takes a cache."""
    return {CACHE_NAME: cache}


def generate(model, inputs, cache=None, new=8, **options):
    """New tokens [B, new] and their logits [B, new, vocabulary]."""
    options = {"max_new_tokens": new, "do_sample": False, "output_logits": True, **options}
    out = model.generate(**inputs, **passing(cache), return_dict_in_generate=True, **options)
    logits = None if out.logits is None else torch.stack(out.logits, 1)
    return out.sequences[:, inputs["input_ids"].shape[1] :], logits


def step(model, ids, cache, **options):
    with torch.no_grad():
        return model(ids, **passing(cache), **options).logits


def use_reference(model, config):
    """Give the model the attention of ``quest_ops.reference``, for any cache of transformers."""

    def attention(module, query, key, value, mask, scaling=None, sliding_window=None, s_aux=None, **kwargs):
        if query.shape[2] > 8 or sliding_window is not None:
            if s_aux is None:
                return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
            if mask is None:
                mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
            return eager_attention_forward(module, query, key, value, mask, scaling)
        rows = [None] * len(query) if mask is None else mask[:, 0]
        outs = [
            _row(module, config, query[b : b + 1], key[b], value[b], rows[b], scaling, s_aux) for b in range(len(query))
        ]
        return torch.cat(outs).to(query), None

    AttentionInterface.register("quest_reference", attention)
    AttentionMaskInterface.register("quest_reference", sdpa_mask)
    model.set_attn_implementation("quest_reference")


def _row(module, config, query, key, value, mask, scaling, sinks):
    visible = slice(None) if mask is None else mask[-1].cpu()
    key, value = key.cpu()[:, visible], value.cpu()[:, visible]
    length, size = key.shape[1], config.page_size
    count = reference.num_pages(length, size)
    padding = (0, 0, 0, count * size - length)
    k, v = (torch.nn.functional.pad(t, padding).unflatten(1, (count, size)).transpose(0, 1) for t in (key, value))
    table, lens = torch.arange(count, dtype=torch.int32)[None], torch.tensor([length], dtype=torch.int32)
    q, pages = query.cpu().transpose(1, 2), None
    if not config.is_dense(module.layer_idx):
        config = config.at(module.layer_idx)
        bounds = bounds_of_keys(k, table, lens, config.bounds, config.std_factor)
        scores = reference.estimate(q, bounds, table, lens, size)
        forced = (config.group_reduce, config.sink_pages, config.recent_pages)
        if config.candidates:
            candidates = reference.topk_pages(scores, lens, size, config.candidate_pages, k.shape[1], *forced, scaling)
            scores = reference.rerank_pages(q, *codes_of_keys(k, table, lens), table, lens, candidates)
        pages = reference.topk_pages(scores, lens, size, config.num_pages, k.shape[1], *forced, scaling)
    out, lse = reference.sparse_decode(q, k, v, table, lens, pages, scaling)
    return out if sinks is None else out * torch.sigmoid(lse - sinks.cpu().double())[..., None]


def compiled(backend, device):
    """Arguments of generate that compile decoding with a backend on any device."""
    mode = {"inductor": "reduce-overhead" if device == "cuda" else "default"}.get(backend)
    config = CompileConfig(fullgraph=True, backend=backend, mode=mode)
    config._compile_all_devices = True
    return {"compile_config": config, "disable_compile": False}
