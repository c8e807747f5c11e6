"""Masks that keep packed documents apart in gpt-oss: Transformers' model makes its own without looking at positions.

Read in Transformers 5.17 to 5.24: `GptOssModel.forward`, which takes masks by the layers' types as they are.
"""

from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

MODEL_TYPE = "gpt_oss"
CACHES = ("cache", "past_key_values")  # the later versions' name, and the earlier ones'


def separate_documents(decoder: nn.Module) -> None:
    """Has a decoder make its masks by `position_ids`, where it is called with those and neither a mask nor a cache."""
    decoder.register_forward_pre_hook(_with_masks, with_kwargs=True)


def _with_masks(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    positions = kwargs.get("position_ids")
    if positions is None or any(kwargs.get(name) is not None for name in ("attention_mask", *CACHES)):
        return args, kwargs
    embeds = torch.empty(*positions.shape, 0, dtype=decoder.dtype, device=positions.device)  # for its shape and dtype
    masks = {
        "full_attention": create_causal_mask(decoder.config, embeds, None, None, positions),
        "sliding_attention": create_sliding_window_causal_mask(decoder.config, embeds, None, None, positions),
    }
    return args, kwargs | {"attention_mask": masks}
