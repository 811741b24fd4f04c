"""Train the retrieval model of the demo from scratch: about six minutes on one H100, a few steps on a CPU.

    python examples/train_retrieval_model.py --out model

Needs ``pip install 'quest_ops[demo]'`` and nothing from the network: the text is the source code and documentation
found on this machine. The result is a stock transformers ``Qwen3ForCausalLM``; one token is one byte.

A small model learns to look facts up if three things come together: documents that are mostly lookup (facts and
questions, hardly any text), so that the mechanism forms within 300 steps; then needles in real text at growing lengths,
so that it is kept and reaches far; and a loss of its own for the answers' digits, which are few among many bytes.

Runs of one seed on one corpus see the same documents in the same order, whatever PYTHONHASHSEED is.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import math
import os
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
COMPUTE = torch.bfloat16 if CUDA else torch.float32

# ---------------------------------------------------------------------------------------------------------------------
# The corpus


def corpus_roots() -> list[Path]:
    """Where text is looked for: Python's libraries, headers, documentation, and where torch is installed."""
    patterns = ["lib/python3*", "local/lib/python3*", "share/doc", "share/perl*", "include"]
    installed = [Path(os.__file__).parents[1], Path(torch.__file__).parents[1]]
    return [root for pattern in patterns for root in sorted(Path("/usr").glob(pattern))] + installed


def read_if_text(path: str) -> bytes | None:
    """The file's bytes if it looks like text or code that people wrote: not tiny, huge, binary or one long line."""
    try:
        size = Path(path).stat().st_size
        if not 800 <= size <= 400_000:
            return None
        content = Path(path).read_bytes()
    except OSError:
        return None
    if b"\0" in content or content.count(b"\n") < size / 200 or content.count(b" ") < size / 30:
        return None
    return content


def build_corpus(cap: int = 400_000_000, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Training text of at most ``cap`` bytes and held-out text, split by file: one in 32 is held out."""
    suffixes = (".py", ".rst", ".md", ".txt", ".h", ".hpp", ".cuh", ".pyi")
    paths = set()
    for root in corpus_roots():
        for folder, _, files in os.walk(root):
            paths.update(os.path.realpath(f"{folder}/{name}") for name in files if name.endswith(suffixes))
    seen: set[bytes] = set()
    train, held_out = [], []
    with ThreadPoolExecutor(16) as pool:
        for content in pool.map(read_if_text, sorted(paths), chunksize=64):
            if content is None:
                continue
            digest = hashlib.sha1(content).digest()
            if digest in seen:
                continue
            seen.add(digest)
            (held_out if digest[0] % 32 == 0 else train).append(content)
    rng = random.Random(seed)
    rng.shuffle(train)
    rng.shuffle(held_out)
    print(f"corpus: {len(train)} files to train on, {len(held_out)} held out", flush=True)
    return tuple(np.frombuffer(b"\n\n".join(files)[:cap], np.uint8) for files in (train, held_out))


def words_of(text: np.ndarray) -> list[str]:
    """Real words, to be names in a third of the cases."""
    return sorted({word.decode() for word in re.findall(rb"\b[a-z]{3,12}\b", text[:8_000_000].tobytes())})


# ---------------------------------------------------------------------------------------------------------------------
# Documents. Each is a pair of arrays: bytes, and the kind of each byte, which decides its loss.

IGNORED, TEXT, ANSWER = 0, 1, 2
CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", "aeiou"
Document = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Style:
    """How a fact is put."""

    before: str = "\nThe pass key of "
    between: str = " is "
    after: str = ".\n"

    def line(self, name: str, digits: str, digits_kind: int) -> Document:
        start = (self.before + name + self.between).encode()
        line = start + digits.encode() + self.after.encode()
        kinds = np.full(len(line), TEXT, np.uint8)
        kinds[len(start) : len(start) + len(digits)] = digits_kind
        return np.frombuffer(line, np.uint8), kinds


PASS_KEY = Style()


def make_digits(rng: random.Random) -> str:
    return f"{rng.randrange(100000):05d}"


def make_name(rng: random.Random, words: list[str], least: int = 1, most: int = 4) -> str:
    """A word of the corpus, or ``least`` to ``most`` made-up syllables."""
    if words and rng.random() < 0.33:
        word = rng.choice(words)
        return word.capitalize() if rng.random() < 0.5 else word
    syllables = [
        rng.choice(CONSONANTS) + rng.choice(VOWELS) + (rng.choice(CONSONANTS) if rng.random() < 0.3 else "")
        for _ in range(rng.randint(least, most))
    ]
    name = "".join(syllables)
    return name.capitalize() if rng.random() < 0.7 else name


def make_names(rng: random.Random, count: int, words: list[str], least: int = 1, most: int = 4) -> list[str]:
    """Different names. A dict, not a set: the order must not depend on string hashes."""
    names: dict[str, None] = {}
    while len(names) < count:
        names[make_name(rng, words, least if count < 40 else 2, most)] = None
    shuffled = list(names)
    rng.shuffle(shuffled)
    return shuffled


@dataclass(frozen=True)
class Source:
    """What documents are made of."""

    text: np.ndarray
    words: list[str]

    def excerpt(self, rng: random.Random, length: int) -> np.ndarray:
        start = rng.randrange(len(self.text) - length)
        return self.text[start : start + length]

    def text_document(self, rng: random.Random, length: int) -> Document:
        return self.excerpt(rng, length), np.full(length, TEXT, np.uint8)

    def needle_document(self, rng: random.Random, length: int, count: int, at_end: float) -> Document:
        """Text with facts at random depths, each asked for once: at the end, or at a random later place."""
        events, taken = [], 0
        for name in make_names(rng, count, self.words):
            digits = make_digits(rng)
            fact, question = PASS_KEY.line(name, digits, IGNORED), PASS_KEY.line(name, digits, ANSWER)
            if taken + 2 * len(fact[0]) > length - 8:
                break
            taken += len(fact[0]) + len(question[0])
            depth = rng.random()
            asked = 1.0 if rng.random() < at_end else depth + (1 - depth) * rng.random()
            events += [(depth, 0, rng.random(), fact), (asked, 1, rng.random(), question)]
        events.sort(key=lambda event: event[:3])
        filler = self.excerpt(rng, length - taken)
        parts, done = [], 0
        for depth, _, _, line in events:
            place = int(depth * len(filler))
            parts += [(filler[done:place], np.full(place - done, TEXT, np.uint8)), line]
            done = place
        parts.append((filler[done:], np.full(len(filler) - done, TEXT, np.uint8)))
        return join(parts)

    def dense_document(self, rng: random.Random, length: int) -> Document:
        """Many facts, many questions, hardly any text."""
        kind = rng.random()
        if kind < 0.6:
            style = PASS_KEY
        elif kind < 0.8:
            style = Style("", rng.choice([" is ", ": ", " = "]), rng.choice(["\n", ". ", "; "]))
        else:
            before = rng.choice(["key ", "\nThe code of ", "\n    "])
            style = Style(before, rng.choice([" is ", "="]), rng.choice([".\n", "\n", " "]))
        most_syllables = rng.choice([1, 2, 3, 4])
        most_facts = max(2, length // (2 * 24))
        known: dict[str, str] = {}
        unasked: list[str] = []
        parts, taken = [], 0
        while taken < length:
            if unasked and (rng.random() < 0.5 or len(known) >= most_facts):
                name = unasked.pop(rng.randrange(len(unasked)))
                part = style.line(name, known[name], ANSWER)
            else:
                name = make_name(rng, self.words, 1, most_syllables)
                if name in known:
                    part = style.line(name, known[name], ANSWER)
                else:
                    known[name] = make_digits(rng)
                    if len(known) <= most_facts:
                        unasked.append(name)
                    part = style.line(name, known[name], IGNORED)
                    if rng.random() < 0.15:
                        part = join([part, self.text_document(rng, rng.randrange(1, 60))])
            parts.append(part)
            taken += len(part[0])
        content, kinds = join(parts)
        return content[:length], kinds[:length]


def join(parts: list[Document]) -> Document:
    return np.concatenate([content for content, _ in parts]), np.concatenate([kinds for _, kinds in parts])


def repeat_document(rng: random.Random, length: int) -> Document:
    """A random string, repeated: plain induction. The first round cannot be known, so it is not learnt."""
    period = rng.randint(12, max(13, length // 3))
    alphabet = b"abcdefghijklmnopqrstuvwxyz0123456789 "
    segment = np.frombuffer(bytes(rng.choice(alphabet) for _ in range(period)), np.uint8)
    rounds = -(-length // period)
    kinds = np.full(rounds * period, ANSWER, np.uint8)
    kinds[: period + 2] = IGNORED
    return np.tile(segment, rounds)[:length], kinds[:length]


# ---------------------------------------------------------------------------------------------------------------------
# Batches: documents packed one behind the other

#: Kind of document, its share of the tokens, and its length, log-uniform between two bounds.
PHASES = {
    "A": [
        ("dense", 0.45, 192, 512),
        ("repeat", 0.05, 128, 256),
        ("needle", 0.25, 256, 1024),
        ("text", 0.25, 1024, 1024),
    ],
    "B": [("dense", 0.25, 256, 1024), ("needle", 0.55, 512, 4096), ("text", 0.20, 2048, 4096)],
    "C": [
        ("dense", 0.15, 256, 1024),
        ("needle", 0.25, 1024, 4096),
        ("needle", 0.45, 8192, 8192),
        ("text", 0.15, 8192, 8192),
    ],
    "D": [
        ("dense", 0.08, 256, 1024),
        ("needle", 0.17, 1024, 8192),
        ("needle", 0.25, 16384, 16384),
        ("needle", 0.50, 32768, 32768),
    ],
}


@dataclass
class Batch:
    """Packed documents: inputs, targets, kinds of the targets and positions [N], and where each document starts."""

    inputs: Tensor
    targets: Tensor
    kinds: Tensor
    positions: Tensor
    starts: Tensor  # [documents + 1] int32
    longest: int

    def to_device(self) -> Batch:
        inputs, targets, kinds, positions, starts = (
            tensor.to(DEVICE, non_blocking=True)
            for tensor in (self.inputs, self.targets, self.kinds, self.positions, self.starts)
        )
        return Batch(inputs.long(), targets.long(), kinds, positions, starts, self.longest)

    def pin_memory(self) -> Batch:
        tensors = (self.inputs, self.targets, self.kinds, self.positions, self.starts)
        return Batch(*(tensor.pin_memory() for tensor in tensors), self.longest)


def log_uniform(rng: random.Random, low: float, high: float) -> int:
    return int(math.exp(rng.uniform(math.log(low), math.log(high))))


def plan_documents(rng: random.Random, phase: str, tokens: int) -> list[tuple[str, int]]:
    """Kinds and lengths that fill ``tokens`` with the phase's shares, randomised at the margin."""
    jobs = []
    for kind, share, low, high in PHASES[phase]:
        wanted = share * tokens
        while wanted > 0:
            length = log_uniform(rng, low, high) if high > low else low
            if wanted < length and rng.random() > wanted / length:
                break
            jobs.append((kind, length))
            wanted -= length
    rng.shuffle(jobs)
    # Long ones first, so that it is not they that are cut at the end of the batch.
    jobs.sort(key=lambda job: -job[1] if job[1] >= 8192 else 0)
    return jobs


def make_document(rng: random.Random, source: Source, kind: str, length: int) -> Document:
    if kind == "dense":
        return source.dense_document(rng, length)
    if kind == "repeat":
        return repeat_document(rng, length)
    if kind == "needle":
        count = max(1, int(math.exp(rng.uniform(0, math.log(max(2, min(96, length // 110)))))))
        return source.needle_document(rng, length, count, at_end=rng.choice([0.0, 0.5, 1.0, 1.0]))
    return source.text_document(rng, length)


def make_batch(seed: int, source: Source, phase: str, tokens: int) -> Batch:
    rng = random.Random(seed)
    jobs = plan_documents(rng, phase, tokens)
    inputs, targets, kinds, positions, starts, left = [], [], [], [], [0], tokens
    while left > 0:
        kind, length = jobs.pop(0) if jobs else (PHASES[phase][0][0], rng.randint(256, 512))
        length = min(length, left)
        if left - length < 64:
            length = left
        # One byte more than the model reads: the last is a target only.
        content, kind_of = make_document(rng, source, kind if length >= 96 else "text", length + 1)
        inputs.append(content[:-1])
        targets.append(content[1:])
        kinds.append(kind_of[1:])
        positions.append(np.arange(length, dtype=np.int32))
        starts.append(starts[-1] + length)
        left -= length
    packed = (torch.from_numpy(np.concatenate(arrays)) for arrays in (inputs, targets, kinds, positions))
    return Batch(*packed, torch.tensor(starts, dtype=torch.int32), int(np.diff(starts).max()))


class Batches(torch.utils.data.IterableDataset):
    """A batch for each step of the plan, made by worker processes; each depends on the seed and its number alone."""

    def __init__(self, source: Source, plan: list[str], tokens: int, seed: int) -> None:
        self.source, self.plan, self.tokens, self.seed = source, plan, tokens, seed

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        if worker:
            torch.set_num_threads(1)
        for step in range(first, len(self.plan), stride):
            yield make_batch(self.seed * 1_000_003 + step, self.source, self.plan[step], self.tokens)


# ---------------------------------------------------------------------------------------------------------------------
# The model: Qwen3's arithmetic on packed documents

VOCABULARY, WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MLP_WIDTH = 256, 320, 6, 8, 2, 64, 896
EPSILON, ROPE_THETA, MAX_POSITIONS = 1e-6, 1e6, 32768 + 1024


class PackedFlashAttention(torch.autograd.Function):
    """Causal attention within each packed document, by the flash kernels that torch brings along."""

    @staticmethod
    def forward(ctx, q, k, v, starts, longest):
        out, lse, seed, offset, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, starts, starts, longest, longest, 0.0, True, False
        )
        ctx.save_for_backward(q, k, v, out, lse, seed, offset, starts)
        ctx.longest = longest
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse, seed, offset, starts = ctx.saved_tensors
        grads = torch.ops.aten._flash_attention_backward(
            grad.contiguous(), q, k, v, out, lse, starts, starts, ctx.longest, ctx.longest, 0.0, True, seed, offset
        )
        return (*grads, None, None)


def attention_by_document(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
    """The same, document by document: for CPUs, and to check the kernels."""
    bounds = starts.tolist()
    outs = []
    for first, last in itertools.pairwise(bounds):
        one = [tensor[first:last].transpose(0, 1)[None] for tensor in (q, k, v)]
        outs.append(F.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(outs)


def attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> Tensor:
    """Attend: q [N, Hq, D], k and v [N, Hkv, D] -> [N, Hq, D]."""
    if q.is_cuda:
        return PackedFlashAttention.apply(q, k, v, starts, longest)
    return attention_by_document(q, k, v, starts)


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
    """Parameters of all layers are stacked, [layers, out, in], which is what Muon wants."""

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
        # What writes to the residual stream starts at 0, so that each layer starts as the identity.
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


# ---------------------------------------------------------------------------------------------------------------------
# Muon (Jordan et al., 2024): momentum whose matrices are made nearly orthogonal


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton and Schulz's iteration, towards U V^T of each matrix's singular value decomposition U S V^T."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.to(COMPUTE)
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


class Muon:
    """For stacks of matrices [layers, out, in]."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.momenta = [torch.zeros_like(parameter) for parameter in parameters]

    @torch.no_grad()
    def step(self, rate: float, momentum: float, decay: float) -> None:
        for parameter, average in zip(self.parameters, self.momenta, strict=True):
            average.lerp_(parameter.grad, 1 - momentum)
            update = orthogonalise(parameter.grad.lerp(average, momentum)).to(parameter.dtype)
            scale = max(1, parameter.shape[-2] / parameter.shape[-1]) ** 0.5
            parameter.mul_(1 - rate * decay).add_(update, alpha=-rate * scale)
            parameter.grad = None


# ---------------------------------------------------------------------------------------------------------------------
# Judging


def question_documents(text: np.ndarray, length: int, facts: int, count: int, seed: int = 7) -> Tensor:
    """``count`` documents of held-out text with facts at random depths, one asked for and answered at the very end.

    The depths of the facts that are asked for are spread evenly. Names are made up, never words.
    """
    rng = random.Random(seed * 7919 + length * 31 + facts)
    documents = []
    for i in range(count):
        names = make_names(rng, facts, [], 2, 4)
        asked = rng.randrange(facts)
        lines = [PASS_KEY.line(name, make_digits(rng), IGNORED)[0] for name in names]
        question = lines[asked][: -len(PASS_KEY.after)]
        room = length - len(question) - sum(map(len, lines))
        start = rng.randrange(len(text) - room)
        filler = text[start : start + room]
        depths = [int(room * rng.random()) for _ in names]
        depths[asked] = int(room * (i + 0.5) / count)
        parts, done = [], 0
        for depth, j in sorted(zip(depths, range(facts), strict=True)):
            parts += [filler[done:depth], lines[j]]
            done = depth
        documents.append(np.concatenate([*parts, filler[done:], question]))
    return torch.from_numpy(np.stack(documents))


def recall(model: Model, text: np.ndarray, length: int, facts: int, count: int) -> float:
    """Share of questions whose five digits are all right.

    The digits are fed back as they should be: all five are then the best ones exactly where greedy decoding is right.
    """
    documents, right = question_documents(text, length, facts, count), []
    for part in documents.split(max(1, 131072 // length)):
        part = part.to(DEVICE)
        best = model.logits(part, 6)[:, :-1].argmax(-1)
        right.append((best == part[:, -5:].long()).all(1))
    return torch.cat(right).float().mean().item()


def bits_per_byte(model: Model, source: Source, length: int, count: int, seed: int = 3) -> float:
    rng, total = random.Random(seed), 0.0
    for _ in range(count):
        text = torch.from_numpy(source.excerpt(rng, length + 1).copy()).to(DEVICE).long()
        total += F.cross_entropy(model.logits(text[None, :-1], length)[0], text[1:]).item()
    return total / count / math.log(2)


def check_attention() -> None:
    """The flash kernels are called below PyTorch's public interface: make sure that they do what is meant."""
    q, k, v = (torch.randn(512, n, 64, device=DEVICE, dtype=COMPUTE, requires_grad=True) for n in (8, 2, 2))
    starts, grad = torch.tensor([0, 200, 512], dtype=torch.int32, device=DEVICE), torch.randn_like(q)
    out = PackedFlashAttention.apply(q, k, v, starts, 512)
    expected = attention_by_document(q.float(), k.float(), v.float(), starts)
    pairs = [(out, expected)]
    pairs += zip(
        torch.autograd.grad(out, (q, k, v), grad),
        torch.autograd.grad(expected, (q, k, v), grad.float()),
        strict=True,
    )
    errors = [((ours - theirs).float().norm() / theirs.float().norm()).item() for ours, theirs in pairs]
    if max(errors) > 0.02:
        raise RuntimeError(f"packed attention is wrong: relative errors of out, dq, dk, dv {errors}")


def check_against_transformers(model: Model, folder: Path, source: Source, length: int) -> float:
    """Relative difference of the logits to those of what was saved, loaded by transformers in float32."""
    from transformers import Qwen3ForCausalLM

    theirs = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE).eval()
    content, _ = source.needle_document(random.Random(5), length, 4, at_end=0.5)
    document = torch.from_numpy(content.copy()).to(DEVICE).long()[None]
    with torch.no_grad():
        expected = theirs(document).logits[0]
    return ((model.logits(document, length)[0] - expected).norm() / expected.norm()).item()


# ---------------------------------------------------------------------------------------------------------------------
# Training


def parse_plan(text: str) -> list[str]:
    """Phases with their steps, as A:600,B:800 -> the phase of each step."""
    plan = []
    for item in text.split(","):
        phase, steps = item.split(":")
        plan += [phase] * int(steps)
    return plan


def train(model: Model, batches: torch.utils.data.DataLoader, plan: list[str], options: argparse.Namespace) -> None:
    matrices = [getattr(model, name) for name in Model.MATRICES]
    rest = [parameter for name, parameter in model.named_parameters() if name not in Model.MATRICES]
    muon = Muon(matrices)
    adam = torch.optim.Adam(rest, lr=options.adam_rate, betas=(0.9, 0.95), eps=1e-10, fused=CUDA)
    total, started, sums, counted = len(plan), time.time(), torch.zeros(2, device=DEVICE), 0
    for step, batch in enumerate(batches):
        text_loss, answer_loss = model.losses(batch.to_device())
        (text_loss + answer_loss).backward()
        # A short warm-up, a plateau, and a straight way down over the last 40 % of the steps.
        rate = min(1.0, (step + 1) / 100) * min(1.0, max(0.02, (total - step) / (0.4 * total)))
        muon.step(options.muon_rate * rate, momentum=0.85 + 0.1 * min(1.0, step / 300), decay=0.01)
        for group in adam.param_groups:
            group["lr"] = options.adam_rate * rate
        adam.step()
        adam.zero_grad(set_to_none=True)
        sums += torch.stack([text_loss, answer_loss]).detach()
        counted += 1
        if (step + 1) % options.report_every == 0 or step + 1 == total:
            text_mean, answer_mean = (sums / counted).tolist()
            print(
                f"step {step + 1}/{total}, phase {plan[step]}, {time.time() - started:.0f} s: "
                f"text {text_mean / math.log(2):.3f} bits per byte, answers {answer_mean:.4f} nats",
                flush=True,
            )
            sums.zero_()
            counted = 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("model"), help="folder of the result (model)")
    parser.add_argument("--plan", default="A:600,B:800,C:2500,D:1500", help="phases and their steps")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens a step (65536)")
    parser.add_argument("--muon-rate", type=float, default=0.02, help="learning rate of the matrices (0.02)")
    parser.add_argument("--adam-rate", type=float, default=4e-3, help="learning rate of the rest (4e-3)")
    parser.add_argument("--corpus-bytes", type=int, default=400_000_000, help="most text to train on (400e6)")
    parser.add_argument("--workers", type=int, default=12, help="processes that make documents (12)")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and documents (0)")
    parser.add_argument("--report-every", type=int, default=200, help="steps between two lines of progress (200)")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 4096, 8192, 16384, 32768], help="to judge at")
    parser.add_argument("--questions", type=int, default=100, help="of each length and number of facts (100)")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    started = time.time()
    torch.manual_seed(options.seed)
    text, held_out_text = build_corpus(options.corpus_bytes)
    source, held_out = Source(text, words_of(text)), Source(held_out_text, [])
    sizes = f"{len(text) / 1e6:.0f} MB to train on, {len(held_out_text) / 1e6:.0f} MB held out"
    print(f"{sizes}, read in {time.time() - started:.0f} s", flush=True)
    plan = parse_plan(options.plan)
    batches = torch.utils.data.DataLoader(
        Batches(source, plan, options.tokens, options.seed + 1),
        batch_size=None,
        num_workers=options.workers,
        pin_memory=CUDA,
        prefetch_factor=8 if options.workers else None,
    )
    if CUDA:
        torch.set_float32_matmul_precision("high")
        check_attention()
    model = Model(compiled=CUDA).to(DEVICE)
    print(f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f}M parameters", flush=True)
    train(model, batches, plan, options)

    model.set_compiled(False)
    model.save(options.out)
    with torch.no_grad():
        # What is judged is what was saved.
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    difference = check_against_transformers(model, options.out, held_out, 2048 if CUDA else 256)
    print(f"saved to {options.out}; logits differ from transformers' in float32 by {difference:.1e}", flush=True)
    for length in options.lengths:
        rates = [recall(model, held_out_text, length, facts, options.questions) for facts in (1, 8)]
        bits = bits_per_byte(model, held_out, length, max(1, min(64, 2**19 // length)))
        print(
            f"{length} tokens: {rates[0]:.2f} of 1 fact, {rates[1]:.2f} of 8 facts found; {bits:.3f} bits per byte",
            flush=True,
        )
    print(f"done in {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
