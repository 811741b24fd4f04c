"""A policy of one's own: a page is scored by the mean of its keys, where Quest takes their bounds.

cd eval/examples
quest-eval run needles --lengths 4096 --budgets 64 256 --policies dense quest --policy mean_key:MeanKey
"""

from quest_eval.policies import KVShape, LayerKV, PagePolicy, PageReader
from torch import Tensor


class MeanKeyReader(PageReader):
    """The mean keys of one layer [B, Hkv, P, D]."""

    def __init__(self, kv: LayerKV, policy: PagePolicy) -> None:
        super().__init__(kv, policy)
        self.keys = kv.k.unflatten(2, (-1, policy.page_size))  # [B, Hkv, P, S, D]
        self.means = self.keys.mean(3)

    def scores(self, q: Tensor) -> Tensor:
        # The last page is always read. The one before it may have been the last when its mean was taken.
        last = (self.kv.length.tokens - 1) // self.policy.page_size
        self.means[:, :, last - 1] = self.keys[:, :, last - 1].mean(2)
        grouped = q.unflatten(1, (self.means.shape[1], -1))  # [B, Hkv, G, D]
        return (grouped @ self.means.transpose(-1, -2)).flatten(1, 2)


class MeanKey(PagePolicy):
    def label(self) -> str:
        return "mean key"

    def start(self, kv: LayerKV) -> MeanKeyReader:
        return MeanKeyReader(kv, self)

    def page_bytes(self, shape: KVShape) -> int:
        return shape.token_bytes // 2  # one key a page and KV head
