"""Small random multimodal models whose images see themselves, and prompts for them."""

import functools

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)

from helpers.hf_models import COMMON, prompt

IMAGE_TOKEN, IMAGE_TOKENS, WINDOW = 95, 4, 32
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def _gemma3():
    text = Gemma3TextConfig(
        **COMMON,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        query_pre_attn_scalar=64,
    )
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text,
            vision_config=SiglipVisionConfig(**VISION),
            image_token_index=IMAGE_TOKEN,
            mm_tokens_per_image=IMAGE_TOKENS,
            boi_token_index=93,
            eoi_token_index=94,
        )
    )


def _paligemma():
    text = GemmaConfig(**COMMON)
    vision = SiglipVisionConfig(**VISION, projection_dim=COMMON["hidden_size"])
    return PaliGemmaForConditionalGeneration(
        PaliGemmaConfig(
            text_config=text.to_dict(),
            vision_config=vision.to_dict(),
            image_token_index=IMAGE_TOKEN,
            projection_dim=COMMON["hidden_size"],
            hidden_size=COMMON["hidden_size"],
        )
    )


@functools.cache
def _model(name, device):
    torch.manual_seed(0)
    model = {"gemma3": _gemma3, "paligemma": _paligemma}[name]().float().to(device).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.disable_compile = True
    model.generation_config.eos_token_id = model.generation_config.bos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def make_model(name, device="cpu"):
    """The same object each time, with dense attention."""
    model = _model(name, device)
    model.set_attn_implementation("sdpa")
    return model


def image_prompt(name, tokens, device="cpu", at=10, padding=(0,), suffix=20, image=True):
    """A prompt with an image of four tokens; PaliGemma sees all before its suffix at once."""
    inputs = prompt(tokens, device, padding=padding)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    ids[ids >= 93] = 5
    types = torch.zeros_like(ids)
    if image:
        random = torch.Generator().manual_seed(4)
        for row, count in enumerate(padding):
            ids[row, count + at : count + at + IMAGE_TOKENS] = IMAGE_TOKEN
        inputs["pixel_values"] = torch.randn(len(padding), 3, 28, 28, generator=random).to(device)
    if name == "gemma3":
        types[ids == IMAGE_TOKEN] = 1
    else:
        types[:, tokens - suffix :] = 1
        types[mask == 0] = 1
    return {**inputs, "token_type_ids": types}
