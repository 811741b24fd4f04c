"""A page estimator of your own: tried by the evaluation, then used by a model that generates.

    python examples/page_estimator.py
    python examples/page_estimator.py --lengths 16384 --budgets 64 256 1024 --tries 20 --device cuda

Quest bounds q.k over a page by the box of its keys. This estimator takes their ball, of mean m and largest distance r
from it: q.k <= q.m + |q| r. The same function serves both hooks:

- ``Ball`` is a policy, which ``quest-eval run --policy page_estimator:Ball`` compares with others;
- ``select_by_ball`` is a ``QuestConfig.selector``, which takes the place of Quest's scores in a model.

Both compute the balls from all keys in each step, which is slow and simple. An estimator that pays keeps them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from quest_eval import bundled_model, command_line
from quest_eval.policies import KVShape, LayerKV, PagePolicy, PageReader
from quest_eval.tasks.facts import KEY_DIGITS, hide_facts
from quest_eval.tasks.text import standard_library_text
from quest_ops import LayerPages, QuestConfig
from quest_ops.transformers import enable_quest
from torch import Tensor


def ball_scores(q: Tensor, keys: Tensor, real: Tensor) -> Tensor:
    """The bound of q.k by the ball around the keys of each page.

    Args:
        q: [B, T, Hq, D].
        keys: [B, Hkv, P, S, D]; slots that hold no token may have any value.
        real: bool [B, P, S], the slots that hold a token.

    Returns:
        float32 [B, T, Hq, P]. Pages without tokens score 0; what calls this ignores them.
    """
    here = real[:, None, :, :, None]  # [B, 1, P, S, 1]
    keys = keys.float().where(here, 0)
    mean = keys.sum(3) / here.sum(3).clamp(min=1)  # [B, Hkv, P, D]
    radius = (keys - mean[:, :, :, None]).norm(dim=-1).where(here[..., 0], 0).amax(-1)  # [B, Hkv, P]
    grouped = q.float().unflatten(2, (keys.shape[1], -1))  # [B, T, Hkv, G, D]
    centre = torch.einsum("bthgd,bhpd->bthgp", grouped, mean)
    return (centre + grouped.norm(dim=-1)[..., None] * radius[:, None, :, None]).flatten(2, 3)


def select_by_ball(_layer: int, q: Tensor, pages: LayerPages, _config: QuestConfig) -> Tensor:
    """The selector: scores of all pages. ``topk_pages`` keeps those of the budget, and the newest in any case."""
    keys = pages.k_cache[pages.page_table.clamp(min=0)].transpose(1, 2)  # [B, Hkv, P, S, D]
    slots = torch.arange(keys.shape[2] * keys.shape[3], device=q.device).view(keys.shape[2], keys.shape[3])
    return ball_scores(q, keys, slots < pages.seq_lens[:, None, None])


class BallReader(PageReader):
    """One layer of the policy."""

    def scores(self, q: Tensor) -> Tensor:
        keys = self.kv.k.unflatten(2, (-1, self.policy.page_size))
        slots = torch.arange(keys.shape[2] * keys.shape[3], device=q.device).view(keys.shape[2], keys.shape[3])
        real = (slots < self.kv.length.tokens).expand(len(q), -1, -1)
        return ball_scores(q[:, None], keys, real)[:, 0]


class Ball(PagePolicy):
    def label(self) -> str:
        return "ball"

    def start(self, kv: LayerKV) -> BallReader:
        return BallReader(kv, self)

    def page_bytes(self, shape: KVShape) -> int:
        return shape.token_bytes // 2 + 4  # a mean key and a float32 radius for each page and KV head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", default=["4096"], help="tokens (4096)")
    parser.add_argument("--budgets", nargs="+", default=["64", "256"], help="tokens a head attends to (64 256)")
    parser.add_argument("--tries", default="4", help="texts (4)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="results/ball", help="folder of tables and plots (results/ball)")
    args = parser.parse_args()

    # 1. Does it find what dense attention finds? page-oracle is the best that any page estimator can do.
    own = f"{Path(__file__).stem}:Ball"
    arguments = [
        "run",
        "needles",
        "--policies",
        "dense",
        "quest",
        "page-oracle",
        "--policy",
        own,
        "--tries",
        args.tries,
    ]
    arguments += ["--lengths", *args.lengths, "--budgets", *args.budgets, "--device", args.device, "--out", args.out]
    if status := command_line.main(arguments):
        raise SystemExit(status)

    # 2. The same estimator in a model: no change but the selector.
    model = bundled_model.load(args.device, torch.float32)
    haystack = hide_facts(standard_library_text(4096), 4096, 8, seed=0)
    fact = haystack.facts[3]
    ids = torch.tensor([list(haystack.text + fact.question)], device=args.device)
    cache = enable_quest(model, QuestConfig(budget=256, selector=select_by_ball))
    cache.start_report()
    out = model.generate(ids, max_new_tokens=KEY_DIGITS, do_sample=False, pad_token_id=0)
    answer = bytes(out[0, -KEY_DIGITS:].tolist()).decode()
    print(f"The pass key of {fact.name} is {fact.key}, and the model says {answer}.")
    print(cache.report())


if __name__ == "__main__":
    main()
