"""Has Triton interpret its kernels where there is no GPU; it must know before it is first imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
