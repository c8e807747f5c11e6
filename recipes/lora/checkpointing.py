"""Activation checkpointing: what a decoder layer keeps for backward and what it computes again, the experts in tiles.

    selective   a layer keeps its input, attention's results, what it gives to its experts, and the router's choice; the
                rest is computed again, the experts' part and attention's each when backward comes to it
    full        a layer keeps its input and the router's choice
    none        nothing is computed again

Each is put on the `forward` of the layers or of their blocks; outside training they run as they are.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any, Literal

import psutil
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

from lora.kept_results import keep_and_reuse, keeping_choice
from lora.offload import ActivationOffload

Recomputing = Literal["selective", "full"]
Mode = Recomputing | Literal["none"]

# Families whose layers are r = x + self_attn(input_layernorm(x)) and r + mlp(post_attention_layernorm(r)); read in
# Transformers 5.17 and 5.24, where attention ends with o_proj. Other families' layers are computed again whole.
TWO_BLOCKS = frozenset((
    "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe", "glm4_moe", "glm4_moe_lite", "gpt_oss",
    "hunyuan_v1_moe", "hy_v3", "minimax_m2", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "solar_open",
))  # fmt: skip


def kept_bytes(config: PretrainedConfig, mode: Recomputing, dtype: torch.dtype) -> int:
    """Bytes that all layers keep of each token: their inputs and, if `selective`, their blocks' and attention's."""
    width = config.hidden_size
    log_sum_exp = 0
    if mode == "selective":
        heads = config.num_attention_heads
        width += heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        width += config.hidden_size * (config.model_type in TWO_BLOCKS)
        log_sum_exp = 4 * heads
    return config.num_hidden_layers * (width * dtype.itemsize + log_sum_exp)


def choose_checkpointing(
    config: PretrainedConfig,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    modes: Sequence[Recomputing] = ("selective", "full"),
    offload: bool | None = None,
) -> tuple[Recomputing, bool]:
    """The first mode for whose kept tensors half of the free memory is enough, on the device or else on the host.

    Args:
        config: the model's, which is on its device.
        tokens: of a batch.
        dtype: of the activations.
        device: where the model is.
        modes: those to choose from.
        offload: which of both places; None for either.

    Returns:
        The mode, and whether to offload. Where no half is enough, the last mode and place.
    """
    places = [(bool(offload), psutil.virtual_memory().available)]
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        both = [(False, torch.cuda.mem_get_info(device)[0] + unused), (True, psutil.virtual_memory().available)]
        places = [place for place in both if offload in (None, place[0])]
    for mode, (is_offloaded, free) in product(modes, places):
        if tokens * kept_bytes(config, mode, dtype) <= free // 2:
            return mode, is_offloaded
    return modes[-1], places[-1][0]


def draws_random_numbers(model: PreTrainedModel) -> bool:
    """Whether a layer computed again has to draw its random numbers again, which takes the host time to see to."""
    fields = model.config.to_dict().items()
    return any(bool(value) for name, value in fields if "dropout" in name or "jitter" in name) or any(
        isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()
    )


def enable_checkpointing(
    layers: nn.ModuleList,
    mode: Mode,
    *,
    has_two_blocks: bool = False,
    offload: bool = False,
    tile_tokens: int = 0,
    router: str = "mlp.gate",
    is_random: bool = True,
) -> None:
    """Has decoder layers recompute what `mode` says.

    Args:
        layers: decoder layers, whose feed-forward or MoE block is `mlp`.
        mode: what is kept and what is computed again in backward. `selective` keeps the results of an attention
            function that runs within `keeping()`, as the recipe's own does.
        has_two_blocks: whether the layers are of one of the families `TWO_BLOCKS`.
        offload: have what is kept wait in pinned host memory; not with `mode="none"`.
        tile_tokens: where a sequence is longer, the `mlp` runs this many tokens at a time and once more in backward,
            so that one tile's activations exist at a time. 0 for never.
        router: a layer's module, if it has it, that chooses the experts.
        is_random: whether the layers draw random numbers.

    Raises:
        ValueError: where `offload` has nothing to work on.
    """
    if offload and mode == "none":
        raise ValueError("model.offload brings to the host what checkpointing keeps: set checkpointing, not 'none'")
    offloading = ActivationOffload() if offload else None
    recomputed = partial(_recomputed, partial(checkpoint, use_reentrant=False, preserve_rng_state=is_random))
    layer: Any
    for layer in layers:
        _keep_choice(layer, router)
        if mode == "selective" and has_two_blocks:
            _move_norm(layer.input_layernorm, layer.self_attn)
            _move_norm(layer.post_attention_layernorm, layer.mlp)
            layer.self_attn.forward = partial(
                recomputed, layer.self_attn.forward, offloading,
                keeps_attention=True, ends_with=getattr(layer.self_attn, "o_proj", None),
            )  # fmt: skip
            experts = partial(recomputed, layer.mlp.forward, offloading)
            layer.mlp.forward = partial(_in_tiles, experts, experts, tile_tokens)
            continue
        tile = partial(recomputed, layer.mlp.forward, None)
        layer.mlp.forward = partial(_in_tiles, layer.mlp.forward, tile, tile_tokens)
        if mode != "none":
            layer.forward = partial(recomputed, layer.forward, offloading, keeps_attention=mode == "selective")


def _move_norm(norm: Any, block: Any) -> None:
    """Makes a block's norm a part of it, so that what is kept of the block is what the norm takes."""
    block.forward = partial(_normed, norm.forward, block.forward)
    norm.forward = _unchanged


def _normed(
    norm: Callable[[Tensor], Tensor], forward: Callable[..., Any], hidden_states: Tensor, *args: Any, **kwargs: Any
) -> Any:
    return forward(norm(hidden_states), *args, **kwargs)


def _unchanged(hidden_states: Tensor) -> Tensor:
    return hidden_states


def _recomputed(
    checkpointing: Callable[..., Any],
    forward: Callable[..., Any],
    offloading: ActivationOffload | None,
    hidden_states: Tensor,
    *args: Any,
    keeps_attention: bool = False,
    ends_with: nn.Module | None = None,
    **kwargs: Any,
) -> Any:
    """A layer, a block or a tile of one, computed again in backward."""
    if not torch.is_grad_enabled():
        return forward(hidden_states, *args, **kwargs)
    contexts = partial(keep_and_reuse, attention=keeps_attention, ends_with=ends_with)
    if offloading is None:
        return checkpointing(forward, hidden_states, *args, context_fn=contexts, **kwargs)
    block = offloading.next_block()
    contexts = partial(contexts, pack=block.pack, unpack=block.unpack, before_recomputation=block.fetch_before)
    with block.hooks():
        return checkpointing(forward, hidden_states, *args, context_fn=contexts, **kwargs)


def _keep_choice(layer: Any, router: str) -> None:
    """Has the choice of experts run within `keeping_choice()`; some families choose in a method of their block."""
    modules = dict(layer.named_modules())
    if router in modules:
        modules[router].forward = partial(_keeping_choice, modules[router].forward)
    if hasattr(layer.mlp, "route_tokens_to_experts"):
        layer.mlp.route_tokens_to_experts = partial(_keeping_choice, layer.mlp.route_tokens_to_experts)


def _keeping_choice(choose: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with keeping_choice():
        return choose(*args, **kwargs)


def _in_tiles(
    whole: Callable[[Tensor], Any], tile: Callable[[Tensor], Any], tile_tokens: int, hidden_states: Tensor
) -> Any:
    """The whole (1, tokens, H) where that is short, else the same tile by tile; some families return a pair."""
    if not 0 < tile_tokens < hidden_states.shape[1] or not torch.is_grad_enabled():
        return whole(hidden_states)
    outputs = [tile(part) for part in hidden_states.split(tile_tokens, dim=1)]
    if isinstance(outputs[0], Tensor):
        return torch.cat(outputs, dim=1)
    return tuple(torch.cat(parts, dim=parts[0].ndim - 2) for parts in zip(*outputs, strict=True))
