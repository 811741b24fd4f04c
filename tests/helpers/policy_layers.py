"""A layer of random keys and values behind a context, for policies of the evaluation."""

import torch
from quest_eval.policies import LayerKV, Length

B, HQ, HKV, D, CONTEXT, S = 2, 6, 2, 64, 150, 16
SCALE = D**-0.5


def make_layer(device, seed=0, dtype=torch.float32):
    """A layer with random keys, of which some dimensions are off centre, as in real models."""
    random = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(B, HKV, 256, D, generator=random).to(device, dtype) for _ in range(2))
    k += 2 * torch.randn(1, HKV, 1, D, generator=random).to(device, dtype)
    last = torch.randn(B, HQ, 64, D, generator=random).to(device, dtype)
    sums = torch.rand(B, HKV, CONTEXT, generator=random).to(device)
    length = Length(B, CONTEXT, torch.device(device))
    return LayerKV(k, v, length, CONTEXT, SCALE, last, sums, lambda keys, _: keys)


def query(device, seed=1):
    return torch.randn(B, HQ, D, generator=torch.Generator().manual_seed(seed)).to(device)
