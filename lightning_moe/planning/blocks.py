"""The recipe's activation checkpointing on the meta device: of a layer, or of each of its blocks, in tiles."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_moe.planning.options import PlanOptions
from lightning_moe.planning.stand_ins import LayerRun


def recompute(layer: Any, options: PlanOptions, run: LayerRun, has_two_blocks: bool) -> Callable[..., Any]:
    """The forward of a layer that computes again what the options say."""
    recomputed = partial(_recomputed, run)
    if has_two_blocks:
        _move_norm(layer.input_layernorm, layer.self_attn)
        _move_norm(layer.post_attention_layernorm, layer.mlp)
        layer.self_attn.forward = recomputed(layer.self_attn.forward, fetches=True)
        tile_tokens = options.tile_tokens or options.row_tokens
        layer.mlp.forward = partial(_in_tiles, recomputed(_noted(layer.mlp.forward, run)), tile_tokens)
        return layer.forward  # type: ignore[no-any-return]
    if 0 < options.tile_tokens < options.row_tokens and hasattr(layer, "mlp"):
        tile = partial(checkpoint, layer.mlp.forward, use_reentrant=False, preserve_rng_state=False)
        layer.mlp.forward = partial(_in_tiles, tile, options.tile_tokens)
    return layer.forward if options.checkpointing == "none" else recomputed(layer.forward, fetches=True)


class _Recomputing:
    """Around a layer's recomputation, or a block's."""

    def __init__(self, run: LayerRun, fetches: bool) -> None:
        self._run, self._fetches = run, fetches

    def __enter__(self) -> None:
        self._run.is_recomputing = True
        if self._fetches:
            self._run.fetch()

    def __exit__(self, *_: object) -> None:
        self._run.is_recomputing = False


def _recomputed(run: LayerRun, forward: Callable[..., Any], fetches: bool = False) -> Callable[..., Any]:
    """A layer or a block, computed again in backward; with the fetch of what the block before it kept."""

    def checkpointed(hidden_states: Tensor, **arguments: Any) -> Any:
        return checkpoint(
            forward, hidden_states, use_reentrant=False, preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), _Recomputing(run, fetches)), **arguments,
        )  # fmt: skip

    return checkpointed


def _noted(forward: Callable[[Tensor], Any], run: LayerRun) -> Callable[[Tensor], Any]:
    """The second block, of whose forward the input is noted."""

    def noting(hidden_states: Tensor) -> Any:
        if not run.is_recomputing:
            run.inputs.append(hidden_states.numel() * hidden_states.element_size())
        return forward(hidden_states)

    return noting


def _move_norm(norm: Any, block: Any) -> None:
    """Makes a block's norm a part of it."""
    normalize, forward = norm.forward, block.forward
    block.forward = lambda hidden_states, **arguments: forward(normalize(hidden_states), **arguments)
    norm.forward = lambda hidden_states: hidden_states


def _in_tiles(tile: Callable[[Tensor], Any], tile_tokens: int, hidden_states: Tensor) -> Any:
    outputs: list[Any] = [tile(part) for part in hidden_states.split(tile_tokens, dim=1)]
    if len(outputs) == 1:
        return outputs[0]
    if isinstance(outputs[0], tuple):
        return tuple(torch.cat(parts, dim=0 if parts[0].ndim == 2 else 1) for parts in zip(*outputs, strict=True))
    return torch.cat(outputs, dim=1)
