"""The device and the dtype of the computation."""

import torch

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
COMPUTE = torch.bfloat16 if CUDA else torch.float32
