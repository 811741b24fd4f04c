"""A decoder of Llama's architecture with random weights, whose step leaves the attention to its caller.

The step is cut at the attentions. The pieces between them are compiled once, since their shapes do not depend on the
context: a piece goes from one attention's output to the next one's queries, keys and values. The Python loop over the
layers disappears in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

CHUNK = 4096  # tokens that `contents` makes at a time
GROUP = 128  # input channels that share a scale of 4-bit weights
INNER_TILES = 8  # of the layout of torch's 4-bit weights


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: layers, width, query and KV heads, head_dim, the hidden width of SwiGLU, vocabulary."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    vocab: int
    head_dim: int = 128
    rope_theta: float = 10_000.0
    query_norms: bool = False  # RMSNorm of each head's queries and keys, as in Qwen3

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype.itemsize

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of a layer's matrices; q, k and v are one, and so are gate and up."""
        return {
            "qkv": ((self.heads + 2 * self.kv_heads) * self.head_dim, self.width),
            "out": (self.width, self.heads * self.head_dim),
            "gate_up": (2 * self.hidden, self.width),
            "down": (self.width, self.hidden),
        }

    def weight_bytes(self, weights: str, dtype: torch.dtype) -> int:
        """All weights. Those of the layers may have 4 bits; embedding and output never have."""
        numbers = self.layers * sum(n * k for n, k in self.matrices.values())
        bits = 4 + 32 / GROUP if weights == "int4" else 8 * dtype.itemsize
        return int(numbers * bits / 8) + 2 * self.vocab * self.width * dtype.itemsize


LLAMA2_7B = Shape("Llama-2-7B", 32, 4096, 32, 32, 11008, 32000)
LLAMA31_8B = Shape("Llama-3.1-8B", 32, 4096, 32, 8, 14336, 128256, rope_theta=500_000.0)
QWEN3_8B = Shape("Qwen3-8B", 36, 4096, 32, 8, 12288, 151936, rope_theta=1_000_000.0, query_norms=True)
TINY = Shape("tiny", 4, 256, 8, 8, 512, 512)


class Int4(NamedTuple):
    """4-bit numbers in the layout of torch's product, and their scales and zeros [inputs / 128, outputs, 2]."""

    packed: Tensor
    scales_and_zeros: Tensor


Matrix = Tensor | Int4


def has_int4(device: str) -> str | None:
    """None where torch has a product with 4-bit weights for the device, else the reason."""
    try:
        multiply(
            torch.zeros(1, GROUP, dtype=torch.bfloat16, device=device), int4(torch.zeros(16, GROUP, device=device))
        )
    except (AttributeError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return None


def int4(weight: Tensor, dtype: torch.dtype = torch.bfloat16) -> Int4:
    """A matrix [outputs, inputs] rounded to 4 bits, with a scale and a zero for each 128 inputs of an output."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low).clamp(min=1e-6) / 15
    codes = ((groups - low) / scale).round().clamp(0, 15).to(torch.int32).flatten(1)
    # A code c stands for (c - 8) * scale + zero.
    scales_and_zeros = torch.cat((scale, low + 8 * scale), -1).transpose(0, 1).to(dtype).contiguous()
    if weight.is_cuda:
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
        return Int4(torch.ops.aten._convert_weight_to_int4pack(pairs, INNER_TILES), scales_and_zeros)
    return Int4(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, INNER_TILES), scales_and_zeros)


def multiply(x: Tensor, matrix: Matrix) -> Tensor:
    """The product [B, outputs] of x [B, inputs] and a transposed matrix [outputs, inputs]."""
    if isinstance(matrix, Tensor):
        return linear(x, matrix)
    product = torch.ops.aten._weight_int4pack_mm if x.is_cuda else torch.ops.aten._weight_int4pack_mm_for_cpu
    return product(x.contiguous(), matrix.packed, GROUP, matrix.scales_and_zeros)


class LayerWeights(NamedTuple):
    """Two norms [width], the norms of queries and keys [head_dim] or None, and four matrices."""

    attention_norm: Tensor
    mlp_norm: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    qkv: Matrix
    out: Matrix
    gate_up: Matrix
    down: Matrix


class Attention(Protocol):
    """The caller's part of a step."""

    def advance(self) -> Tensor:
        """Begin a step of one token; its position [B] int32. This is compiled with the first piece."""

    def attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """The output, like q [B, Hq, D], after the step's keys and values, kv [B, 2 * Hkv, D], are written."""


class Model:
    """The weights and the compiled pieces.

    Args:
        shape: sizes.
        weights: "int4" for matrices of 4 bits in the layers; any other name for ``dtype``.
        dtype: of activations, norms, embedding and output.
        device: of all tensors.
        compiled: whether Inductor compiles the pieces.
        tuned: whether Inductor tunes its kernels. It then has kernels of its own for products of one row.
    """

    def __init__(
        self,
        shape: Shape,
        weights: str,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cuda",
        compiled: bool = True,
        tuned: bool = False,
    ) -> None:
        self.shape, self.weights, self.dtype, self.device = shape, weights, dtype, device
        self.generator = torch.Generator(device).manual_seed(0)
        self.embedding, self.output = (self._random(shape.vocab, shape.width) for _ in range(2))
        self.norm = self._norm(shape.width)
        self.layers = [self._layer() for _ in range(shape.layers)]
        half = shape.head_dim // 2
        self.frequency = shape.rope_theta ** -(torch.arange(half, device=device) / half)
        torch.compiler.reset()  # the code of another model

        def made(piece: Callable[..., object]) -> Callable[..., object]:
            if not compiled:
                return piece
            options = {"coordinate_descent_tuning": True} if tuned else {}
            return torch.compile(piece, fullgraph=True, dynamic=False, options=options)

        self._first, self._between, self._last = made(self._begin), made(between), made(finish)

    def step(self, tokens: Tensor, attention: Attention) -> Tensor:
        """One greedy step: tokens [B] -> the next tokens [B]. Nothing in it waits for the device."""
        return self.logits(tokens, attention).argmax(-1)

    def logits(self, tokens: Tensor, attention: Attention) -> Tensor:
        """Logits [B, vocab] after the tokens [B]."""
        shape = self.shape
        heads = (shape.heads, shape.kv_heads, shape.head_dim)
        x, cos, sin, qkv = self._first(tokens, attention, self.layers[0])
        for index, layer in enumerate(self.layers):
            out = attention.attend(index, qkv[:, : shape.heads], qkv[:, shape.heads :]).flatten(1)
            if index + 1 < shape.layers:
                x, qkv = self._between(x, out, layer, self.layers[index + 1], heads, cos, sin)
        return self._last(x, out, layer, self.norm, self.output)

    def _begin(
        self, tokens: Tensor, attention: Attention, layer: LayerWeights
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shape = self.shape
        angle = attention.advance()[:, None, None] * self.frequency
        cos, sin = angle.cos(), angle.sin()
        x = self.embedding[tokens]
        return x, cos, sin, queries(x, layer, (shape.heads, shape.kv_heads, shape.head_dim), cos, sin)

    def _layer(self) -> LayerWeights:
        shape = self.shape
        query_norm, key_norm = (self._norm(shape.head_dim) if shape.query_norms else None for _ in range(2))
        matrices = {name: self._matrix(*size) for name, size in shape.matrices.items()}
        return LayerWeights(self._norm(shape.width), self._norm(shape.width), query_norm, key_norm, **matrices)

    def _matrix(self, outputs: int, inputs: int) -> Matrix:
        weight = self._random(outputs, inputs)
        return int4(weight, self.dtype) if self.weights == "int4" else weight

    def _random(self, *size: int) -> Tensor:
        # Of this deviation, the numbers after a product are as large as those before it.
        weight = torch.empty(size, dtype=self.dtype, device=self.device)
        return weight.normal_(std=size[-1] ** -0.5, generator=self.generator)

    def _norm(self, size: int) -> Tensor:
        return torch.ones(size, dtype=self.dtype, device=self.device)


def queries(x: Tensor, layer: LayerWeights, heads: tuple[int, int, int], cos: Tensor, sin: Tensor) -> Tensor:
    """Queries, keys and values [B, Hq + 2 * Hkv, D], rotated."""
    query_heads, kv_heads, head_dim = heads
    qkv = multiply(norm(x, layer.attention_norm), layer.qkv).unflatten(-1, (-1, head_dim))
    q, k, v = qkv.split((query_heads, kv_heads, kv_heads), 1)
    if layer.query_norm is not None:
        q, k = norm(q, layer.query_norm), norm(k, layer.key_norm)
    return torch.cat((rotate(q, cos, sin), rotate(k, cos, sin), v), 1)


def between(
    x: Tensor,
    out: Tensor,
    layer: LayerWeights,
    following: LayerWeights,
    heads: tuple[int, int, int],
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    """The residual stream [B, width] after a layer, and the next layer's queries, keys and values."""
    x = after_attention(x, out, layer)
    return x, queries(x, following, heads, cos, sin)


def finish(x: Tensor, out: Tensor, layer: LayerWeights, last_norm: Tensor, output: Tensor) -> Tensor:
    return linear(norm(after_attention(x, out, layer), last_norm), output)


def after_attention(x: Tensor, out: Tensor, layer: LayerWeights) -> Tensor:
    x = x + multiply(out, layer.out)
    gate, up = multiply(norm(x, layer.mlp_norm), layer.gate_up).chunk(2, -1)
    return x + multiply(silu(gate) * up, layer.down)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight.shape, weight, 1e-5)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, H, D] by cos and sin [B, 1, D / 2]; a pair has one number in each half of D."""
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def contents(shape: Shape, layer: int, tokens: int, dtype: torch.dtype, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values [n, Hkv, D] of a layer, CHUNK tokens at a time.

    Real keys have channels of different offset and scale, drift slowly along the text, and are then rotated by their
    position. Here an offset of deviation 1 and a scale of 0.25 to 1.5 belong to each head and channel. Drift and
    noise add with equal deviation: the drift is a sine for each channel, of 200 to 20,000 tokens a period. One key in
    256 is an outlier, three times as long. Values are normal.
    """
    generator = torch.Generator(device).manual_seed(layer)

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=generator, device=device)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    heads = (shape.kv_heads, shape.head_dim)
    offset, scale, phase = normal(*heads), uniform(0.25, 1.5, *heads), uniform(0, 2 * torch.pi, *heads)
    pace = 2 * torch.pi / (200 * 100 ** uniform(0, 1, *heads))
    half = shape.head_dim // 2
    frequency = shape.rope_theta ** -(torch.arange(half, device=device) / half)
    for start in range(0, tokens, CHUNK):
        position = torch.arange(start, min(start + CHUNK, tokens), device=device)[:, None, None]
        key = normal(len(position), *heads).add_((position * pace + phase).sin_().mul_(2**0.5))
        key = key.mul_(scale * 0.5**0.5).add_(offset)
        key *= 1 + 2 * (uniform(0, 1, len(position), shape.kv_heads, 1) < 1 / 256)
        angle = position * frequency
        yield rotate(key, angle.cos(), angle.sin()).to(dtype), normal(len(position), *heads).to(dtype)
