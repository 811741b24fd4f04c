"""Quest inside Hugging Face models (transformers 5): dense prefill, sparse decoding, unmodified modelling code.

::

    cache = enable_quest(model, QuestConfig(budget=1024))
    model.generate(input_ids, max_new_tokens=100)
    cache.plan()

Importing this package registers the attention implementation ``"quest"`` with its mask function.
"""

from ..info import TRANSFORMERS

try:
    from transformers import AttentionInterface, AttentionMaskInterface
except ImportError as error:
    raise ImportError(
        f"quest_ops.transformers needs transformers 5.17 or newer ({error}): run `pip install '{TRANSFORMERS}'`."
    ) from error

from .attention import quest_attention_forward
from .cache import IMPLEMENTATION, QuestCache, disable_quest, enable_quest
from .continuous import paged_quest_forward
from .masks import quest_mask
from .paged import Observer

AttentionInterface.register(IMPLEMENTATION, quest_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, quest_mask)
AttentionInterface.register(f"paged|{IMPLEMENTATION}", paged_quest_forward)

__all__ = ["IMPLEMENTATION", "Observer", "QuestCache", "disable_quest", "enable_quest"]
