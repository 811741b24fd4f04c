"""The corpus: source code and documentation found on this machine."""

from __future__ import annotations

import hashlib
import os
import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch


def corpus_roots() -> list[Path]:
    """The folders that are searched for text: Python's libraries, headers, documentation, and torch's."""
    patterns = ["lib/python3*", "local/lib/python3*", "share/doc", "share/perl*", "include"]
    installed = [Path(os.__file__).parents[1], Path(torch.__file__).parents[1]]
    return [root for pattern in patterns for root in sorted(Path("/usr").glob(pattern))] + installed


def read_if_text(path: str) -> bytes | None:
    """The file's bytes if it looks like text or code by people: neither tiny, huge, binary nor of one long line."""
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
