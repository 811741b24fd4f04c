"""Quest sparse attention (Tang et al., ICML 2024) as PyTorch operators: the public names."""

from ._library import build_info
from .attention import attention_path, attention_report, quest_attention, select_pages
from .cache import PagedKVCache
from .cache_view import CacheView
from .config import LayerPages, QuestConfig, Selector
from .kept_pages import KeptPages
from .ops import (
    append_codes,
    append_kv,
    decode_step,
    estimate,
    rerank_pages,
    sparse_decode,
    topk_pages,
    update_bounds,
)
from .page_allocator import CacheFullError
from .views import PageView, empty_bounds, empty_scales, page_view_bhld, page_view_blhd

__version__: str = build_info["version"]

__all__ = [
    "CacheFullError",
    "CacheView",
    "KeptPages",
    "LayerPages",
    "PageView",
    "PagedKVCache",
    "QuestConfig",
    "Selector",
    "__version__",
    "append_codes",
    "append_kv",
    "attention_path",
    "attention_report",
    "decode_step",
    "empty_bounds",
    "empty_scales",
    "estimate",
    "page_view_bhld",
    "page_view_blhd",
    "quest_attention",
    "rerank_pages",
    "select_pages",
    "sparse_decode",
    "topk_pages",
    "update_bounds",
]
