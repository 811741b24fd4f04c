"""The limits of the operators, as csrc/params.h has them."""

import torch

#: Supported sizes of a head.
HEAD_DIMS = (64, 80, 96, 128, 192, 256)
#: Supported tokens a page.
PAGE_SIZES = (4, 8, 16, 32, 64, 128)
#: Supported dtypes of queries, keys and values.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: The most new tokens a sequence that the decode operators take; more is a prefill.
MAX_NEW_TOKENS = 8
#: Counts are int32: physical pages, the tokens of a sequence, and those of a page list.
MAX_COUNT = 2**31 - 1
#: The counters of a decode step: some, and more for each sequence and KV head.
SHARED_COUNTERS, HEAD_COUNTERS = 32, 4
