"""The model: Qwen3's arithmetic on packed documents."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .attention import attention
from .batches import Batch
from .device import COMPUTE, DEVICE
from .documents import ANSWER, TEXT

VOCABULARY, WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MLP_WIDTH = 256, 320, 6, 8, 2, 64, 896
EPSILON, ROPE_THETA, MAX_POSITIONS = 1e-6, 1e6, 32768 + 1024


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)
    return weight.to(x.dtype) * wide.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def rotary(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    angles = positions[:, None].float() * frequencies
    angles = torch.cat((angles, angles), -1)
    return angles.cos()[:, None], angles.sin()[:, None]


def before_attention(x, norm, wq, wk, wv, q_norm, k_norm, cos, sin):
    h = rms_norm(x, norm)
    q, k, v = (F.linear(h, w.to(x.dtype)).view(len(x), -1, HEAD_DIM) for w in (wq, wk, wv))
    return rotate(rms_norm(q, q_norm), cos, sin), rotate(rms_norm(k, k_norm), cos, sin), v


def after_attention(x, attended, wo, norm, w_gate, w_up, w_down):
    x = x + F.linear(attended.reshape(len(x), -1), wo.to(x.dtype))
    h = rms_norm(x, norm)
    gated = F.silu(F.linear(h, w_gate.to(x.dtype))) * F.linear(h, w_up.to(x.dtype))
    return x + F.linear(gated, w_down.to(x.dtype))


def logits_of(x: Tensor, norm: Tensor, head: Tensor) -> Tensor:
    return F.linear(rms_norm(x, norm), head.to(x.dtype)).float()


def losses_of(x: Tensor, norm: Tensor, head: Tensor, targets: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the text, and of the answers."""
    loss = F.cross_entropy(logits_of(x, norm, head), targets, reduction="none")
    is_text, is_answer = (kinds == TEXT).float(), (kinds == ANSWER).float()
    return tuple((loss * mask).sum() / mask.sum().clamp(min=1) for mask in (is_text, is_answer))


class Model(nn.Module):
    """Parameters of all layers are stacked, [layers, out, in], as Muon takes them."""

    #: Names in transformers' layers, and here.
    LAYER_NAMES: ClassVar = {
        "input_layernorm": "attention_norm",
        "self_attn.q_proj": "wq",
        "self_attn.k_proj": "wk",
        "self_attn.v_proj": "wv",
        "self_attn.q_norm": "q_norm",
        "self_attn.k_norm": "k_norm",
        "self_attn.o_proj": "wo",
        "post_attention_layernorm": "mlp_norm",
        "mlp.gate_proj": "w_gate",
        "mlp.up_proj": "w_up",
        "mlp.down_proj": "w_down",
    }
    MATRICES = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")

    def __init__(self, compiled: bool = False) -> None:
        super().__init__()

        def normal(*shape: int, std: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape) * std)

        def constant(*shape: int, value: float) -> nn.Parameter:
            return nn.Parameter(torch.full(shape, value))

        std = 0.7 * WIDTH**-0.5
        self.embedding = normal(VOCABULARY, WIDTH, std=0.5)
        # Matrices that write to the residual stream start at 0, so that each layer starts as the identity.
        self.head = constant(VOCABULARY, WIDTH, value=0.0)
        self.wq = normal(LAYERS, HEADS * HEAD_DIM, WIDTH, std=std)
        self.wk = normal(LAYERS, KV_HEADS * HEAD_DIM, WIDTH, std=std)
        self.wv = normal(LAYERS, KV_HEADS * HEAD_DIM, WIDTH, std=std)
        self.wo = constant(LAYERS, WIDTH, HEADS * HEAD_DIM, value=0.0)
        self.w_gate = normal(LAYERS, MLP_WIDTH, WIDTH, std=std)
        self.w_up = normal(LAYERS, MLP_WIDTH, WIDTH, std=std)
        self.w_down = constant(LAYERS, WIDTH, MLP_WIDTH, value=0.0)
        self.attention_norm = constant(LAYERS, WIDTH, value=1.0)
        self.mlp_norm = constant(LAYERS, WIDTH, value=1.0)
        self.final_norm = constant(WIDTH, value=1.0)
        # Above 1: attention that is sharper from the start finds matching tokens sooner.
        self.q_norm = constant(LAYERS, HEAD_DIM, value=1.5)
        self.k_norm = constant(LAYERS, HEAD_DIM, value=1.5)
        frequencies = 1.0 / ROPE_THETA ** (torch.arange(0, HEAD_DIM, 2, dtype=torch.float) / HEAD_DIM)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.set_compiled(compiled)

    def set_compiled(self, compiled: bool) -> None:
        functions = (rotary, before_attention, after_attention, losses_of)
        if compiled:
            functions = tuple(torch.compile(function, dynamic=False) for function in functions)
        self._rotary, self._before_attention, self._after_attention, self._losses_of = functions

    def hidden(self, inputs: Tensor, positions: Tensor, starts: Tensor, longest: int) -> Tensor:
        """States [N, width] behind the last layer."""
        cos, sin = (t.to(COMPUTE) for t in self._rotary(positions, self.frequencies))
        x = F.embedding(inputs, self.embedding).to(COMPUTE)
        stacked = (getattr(self, name).unbind(0) for name in self.LAYER_NAMES.values())
        for norm, wq, wk, wv, q_norm, k_norm, wo, mlp_norm, w_gate, w_up, w_down in zip(*stacked, strict=True):
            q, k, v = self._before_attention(x, norm, wq, wk, wv, q_norm, k_norm, cos, sin)
            attended = attention(q, k, v, starts, longest)
            x = self._after_attention(x, attended, wo, mlp_norm, w_gate, w_up, w_down)
        return x

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        x = self.hidden(batch.inputs, batch.positions, batch.starts, batch.longest)
        return self._losses_of(x, self.final_norm, self.head, batch.targets, batch.kinds)

    @torch.no_grad()
    def logits(self, documents: Tensor, last: int) -> Tensor:
        """Logits [documents, last, 256] of the last positions of documents [documents, length]."""
        count, length = documents.shape
        starts = torch.arange(count + 1, dtype=torch.int32, device=DEVICE) * length
        positions = torch.arange(length, dtype=torch.int32, device=DEVICE).repeat(count)
        x = self.hidden(documents.reshape(-1).long(), positions, starts, length)
        return logits_of(x.view(count, length, -1)[:, -last:], self.final_norm, self.head)

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors in bfloat16, as transformers reads them."""
        from safetensors.torch import save_file
        from transformers import Qwen3Config

        config = Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=MLP_WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            rms_norm_eps=EPSILON,
            max_position_embeddings=MAX_POSITIONS,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            tie_word_embeddings=False,
            attention_bias=False,
            use_sliding_window=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            dtype="bfloat16",
        )
        config.architectures = ["Qwen3ForCausalLM"]
        state = {
            "model.embed_tokens.weight": self.embedding,
            "lm_head.weight": self.head,
            "model.norm.weight": self.final_norm,
        }
        for theirs, ours in self.LAYER_NAMES.items():
            for layer, weight in enumerate(getattr(self, ours)):
                state[f"model.layers.{layer}.{theirs}.weight"] = weight
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder)
        # Clones: slices of one stacked tensor would count as shared memory.
        state = {name: weight.detach().to("cpu", torch.bfloat16, copy=True) for name, weight in state.items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
