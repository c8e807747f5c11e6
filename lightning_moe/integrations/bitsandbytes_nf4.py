"""What bitsandbytes makes of a weight in nf4, as the parts of an `ops.quantized.NF4`.

Read in bitsandbytes 0.50: the attributes of its `QuantState`.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor

from lightning_moe.ops.quantized import NF4


def check_installed() -> None:
    """Raises ModuleNotFoundError, with the remedy, where bitsandbytes is not there."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError(
            "nf4 weights are made by bitsandbytes, which is not installed: pip install bitsandbytes (the extra "
            "lightning_moe[quantized])",
            name="bitsandbytes",
        )


def encode(weight: Tensor) -> dict[str, Tensor]:
    """Quantizes (E, out, in) weights expert by expert, on their device, with nested absmax.

    Raises:
        ValueError: if a block would straddle experts.
    """
    from bitsandbytes.functional import quantize_4bit

    if weight[0].numel() % NF4.block:
        raise ValueError(
            f"nf4: an expert of {tuple(weight.shape[1:])} values is no whole number of blocks of {NF4.block}"
        )
    states = []
    for expert in weight.detach():
        packed, state = quantize_4bit(
            expert.contiguous(), blocksize=NF4.block, compress_statistics=True, quant_type=NF4.name
        )
        states.append((packed.flatten(), state))
    return parts_of(states)


def parts_of(states: list[tuple[Tensor, Any]]) -> dict[str, Tensor]:
    """The parts of a weight, from each expert's packed bytes and `QuantState`."""
    parts = {
        "packed": torch.stack([packed for packed, _ in states]),
        "absmax": torch.stack([state.absmax for _, state in states]),
    }
    if states[0][1].nested:
        parts["absmax_scale"] = torch.stack([state.state2.absmax for _, state in states])
        offsets = torch.stack([state.offset for _, state in states])
        parts["absmax_offset"] = offsets[:, None].expand_as(parts["absmax_scale"]).contiguous()
    return parts
