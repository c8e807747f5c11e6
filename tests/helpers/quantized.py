"""Quantized weights for tests: of nf4, each value's nearest level, block by block, without bitsandbytes."""

import importlib.util
from functools import partial

import pytest
import torch

from lightning_moe.ops.fp8 import FP8
from lightning_moe.ops.mxfp4 import MXFP4
from lightning_moe.ops.nf4 import NF4, NF4_LEVELS, tables
from lightning_moe.ops.quantized import QuantizedWeight

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes, which makes nf4, is not installed"
)


def quantized(weight, nested=True):
    """A weight in nf4, with nested absmax or without."""
    experts = weight.shape[0]
    blocks = weight.detach().float().reshape(experts, -1, NF4.block)
    absmax = blocks.abs().amax(-1)
    codes = (blocks / absmax[..., None].clamp_min(1e-30))[..., None].sub(torch.tensor(NF4_LEVELS)).abs().argmin(-1)
    pairs = codes.reshape(experts, -1, 2)
    parts = {"packed": (pairs[..., 0] * 16 + pairs[..., 1]).to(torch.uint8), "absmax": absmax}
    if nested:
        missing = -absmax.shape[1] % NF4.nested_block
        padded = torch.nn.functional.pad(absmax, (0, missing)).view(experts, -1, NF4.nested_block)
        offset = absmax.mean(1, keepdim=True).expand(padded.shape[:2]).contiguous()
        differences = padded - offset[..., None]
        scale = differences.abs().amax(-1)
        table = tables(weight.device)[1]
        nearest = (differences / scale[..., None])[..., None].sub(table).abs().argmin(-1).to(torch.uint8)
        parts |= {
            "absmax": nearest.flatten(1)[:, : absmax.shape[1]].contiguous(),
            "absmax_scale": scale,
            "absmax_offset": offset,
        }
    return QuantizedWeight(NF4(), parts, tuple(weight.shape), weight.dtype)


def encoded(format, weight):
    """A weight in a format that encodes by itself."""
    return QuantizedWeight(format, format.encode(weight), tuple(weight.shape), weight.dtype)


# What makes a weight of each format, by name.
MAKERS = {
    "nf4": quantized,
    "nf4_plain": partial(quantized, nested=False),
    "fp8": partial(encoded, FP8()),
    "mxfp4": partial(encoded, MXFP4()),
    "mxfp4_transposed": partial(encoded, MXFP4(is_transposed=True)),
}
