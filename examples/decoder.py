"""A whole decoder with Quest attention in plain PyTorch: eager, compiled, and in a CUDA graph.

    python examples/decoder.py
    python examples/decoder.py --device cuda --dtype bfloat16 --graph --prompt 32768 --tokens 256 --budget 2048

The architecture is Llama's (RMSNorm, rotary embeddings, grouped-query attention, SwiGLU), with random weights. Quest
needs three things: a ``PagedKVCache`` for the keys and values, ``quest_attention`` in each layer, and ``cache.advance``
at the start of a step. :func:`generate` uses only ``model(tokens, cache)`` and a step, so it works for other models.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from quest_ops import PagedKVCache, QuestConfig, quest_attention
from torch import Tensor, nn
from torch.nn.functional import silu

#: The tokens of a step [B] and the cache -> the next tokens [B].
Step = Callable[[Tensor, PagedKVCache], Tensor]


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a model. Query heads are a multiple of KV heads."""

    vocab: int = 256
    width: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    hidden: int = 768
    rope_theta: float = 500_000.0
    quest: QuestConfig = field(default_factory=lambda: QuestConfig(budget=256))


class Attention(nn.Module):
    """Grouped-query attention over the cache, sparse where the configuration allows it."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        heads, kv_heads = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.width, heads, bias=False)
        self.k_proj = nn.Linear(config.width, kv_heads, bias=False)
        self.v_proj = nn.Linear(config.width, kv_heads, bias=False)
        self.o_proj = nn.Linear(heads, config.width, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: PagedKVCache) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.config.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        return self.o_proj(quest_attention(q, k, v, cache, self.layer, self.config.quest).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.up_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.down_proj = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and feed-forward, each after a norm and added to the residual stream."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: PagedKVCache) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, cache)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Decoder(nn.Module):
    """The model. The cache keeps the lengths, so the same step runs eager, compiled and captured."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.output = nn.Linear(config.width, config.vocab, bias=False)

    def forward(self, tokens: Tensor, cache: PagedKVCache) -> Tensor:
        """Logits [B, vocab] after ``tokens`` [B, T], for which ``cache.advance(T)`` was called."""
        positions = cache.start_lens[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens)
        rotation = rotations(positions, self.config.head_dim, self.config.rope_theta)
        for layer in self.layers:
            x = layer(x, rotation, cache)
        return self.output(self.norm(x[:, -1]))

    def step(self, tokens: Tensor, cache: PagedKVCache) -> Tensor:
        """One greedy decode step, [B] -> [B]: the code that is compiled, captured or exported."""
        cache.advance(1)
        return self(tokens[:, None], cache).argmax(-1)

    def new_cache(self, batch_size: int, max_tokens: int) -> PagedKVCache:
        """An empty cache of this model's dtype, on its device."""
        config, weight = self.config, self.output.weight
        return PagedKVCache(
            config.layers,
            config.kv_heads,
            config.head_dim,
            max_tokens=max_tokens,
            batch_size=batch_size,
            page_size=config.quest.page_size,
            dtype=weight.dtype,
            bounds=config.quest.bounds,
            std_factor=config.quest.std_factor,
            device=weight.device,
        )


def rotations(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine [B, T, 1, D / 2] of each position's angles, in float32, since angles grow with the context."""
    frequency = theta ** -(torch.arange(0, head_dim, 2, device=positions.device) / head_dim)
    angle = (positions[..., None] * frequency)[:, :, None]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, T, H, D]; a pair has one number in each half of D."""
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


@torch.no_grad()
def prefill(model: nn.Module, prompt: Tensor, cache: PagedKVCache, chunk: int = 1024) -> Tensor:
    """The first greedy token [B] after ``prompt`` [B, T], read densely in chunks of about ``chunk`` tokens."""
    # The chunks have equal sizes: a last one of at most 8 tokens would be a decode step and read only the budget.
    for part in prompt.tensor_split(-(-prompt.shape[1] // chunk), dim=1):
        cache.advance(part.shape[1])
        logits = model(part, cache)
    return logits.argmax(-1)


@torch.no_grad()
def decode(step: Step, token: Tensor, cache: PagedKVCache, new_tokens: int) -> Tensor:
    """The ``new_tokens`` tokens [B, new_tokens] that follow ``token`` [B].

    ``step`` may be compiled or captured. Such code cannot reserve pages on the host, so the pages of all steps are
    reserved before them, and the lengths are read back after them.
    """
    tokens = []
    cache.reserve(new_tokens)
    for _ in range(new_tokens):
        token = step(token, cache).clone()  # a replayed graph overwrites its last output
        tokens.append(token)
    cache.sync_lengths()
    return torch.stack(tokens, 1)


def generate(model: nn.Module, prompt: Tensor, cache: PagedKVCache, new_tokens: int, step: Step) -> Tensor:
    """Greedy tokens [B, new_tokens] after ``prompt`` [B, T]."""
    first = prefill(model, prompt, cache)
    return torch.cat((first[:, None], decode(step, first, cache, new_tokens - 1)), 1)


@torch.no_grad()
def capture(step: Step, cache: PagedKVCache) -> Step:
    """``step`` as a CUDA graph over this cache. Run the step once before, so that all kernels are loaded.

    Nothing runs during a capture, so the cache may be in any state and keeps it.
    """
    static_input = torch.zeros(cache.batch_size, dtype=torch.int64, device=cache.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static_output = step(static_input, cache)
    cache.sync_lengths()  # the captured advance has marked the lengths as unknown

    def replay(tokens: Tensor, _: PagedKVCache) -> Tensor:
        static_input.copy_(tokens)
        graph.replay()
        return static_output

    return replay


def timed(name: str, model: Decoder, prompt: Tensor, cache: PagedKVCache, new_tokens: int, step: Step) -> Tensor:
    """Runs :func:`generate` twice, since the first run may compile, and prints the second one's decoding speed."""
    for _ in range(2):
        cache.reset()
        first = prefill(model, prompt, cache)
        start = now(prompt.device)
        tokens = decode(step, first, cache, new_tokens)
        seconds = now(prompt.device) - start
    print(f"{name:9}{tokens.numel() / seconds:10.1f} tokens/s")
    return tokens


def now(device: torch.device) -> float:
    """Seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="also compiled")
    parser.add_argument("--graph", action="store_true", help="also as a CUDA graph")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=500, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate")
    parser.add_argument("--budget", type=int, default=256, help="tokens that a head reads")
    args = parser.parse_args()
    if args.graph and not args.device.startswith("cuda"):
        parser.error("--graph needs --device cuda")

    torch.manual_seed(0)
    config = DecoderConfig(quest=QuestConfig(budget=args.budget))
    model = Decoder(config).to(args.device, getattr(torch, args.dtype))
    prompt = torch.randint(config.vocab, (args.batch, args.prompt), device=args.device)
    cache = model.new_cache(args.batch, args.prompt + args.tokens)

    eager = timed("eager", model, prompt, cache, args.tokens, model.step)
    steps: dict[str, Step] = {}
    if args.compile:
        steps["compiled"] = torch.compile(model.step, fullgraph=True)
    if args.graph:
        steps["graph"] = capture(model.step, cache)
    for name, step in steps.items():
        tokens = timed(name, model, prompt, cache, args.tokens, step)
        same = int((tokens == eager).cumprod(1).sum())
        print(f"{name} == eager: {same == eager.numel()} ({same} of {eager.numel()} tokens)")


if __name__ == "__main__":
    main()
