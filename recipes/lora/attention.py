"""Variable-length attention: the recipe's attention function, which Transformers reaches by the name `varlen`.

A batch is one row of documents end to end. One document runs through PyTorch's scaled_dot_product_attention, see
`attention_turns`. Several, and those of layers with a sliding window or sinks, run through `varlen_attn`, without the
(tokens x tokens) mask that Transformers' `sdpa` would build.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lora.attention_turns import causal_attention
from lora.kept_results import ATTENTION, keeping
from lora.sink_attention import attend_documents, masked_attention

NAME = "varlen"
# What models hand over that changes the scores, and no kernel here knows; `sdpa` of Transformers 5.17 passes over it.
UNKNOWN = {"softcap": "cap on the scores", "position_bias": "bias by position"}

# Families whose layers look into the mask; read in Transformers 5.24.
READ_MASKS = frozenset(("axk2", "deepseek_v32", "doge", "dots3_note_text", "glm_moe_dsa", "hy_v4"))

# The kernel that ran the first attention of training, for a report.
kernels_run: set[str] = set()


class _NoteKernel(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ATTENTION:
            kernels_run.add(func.name().rpartition(":")[2].lstrip("_"))
        return func(*args, **(kwargs or {}))


def check_config(config: Any) -> None:
    """Raises ValueError where a model's attention is not what this does."""
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError(
            f"model.attention {NAME!r} sees whole documents or windows of them, and layers of the model see chunks: "
            "set --model.attention sdpa"
        )
    if config.model_type in READ_MASKS:
        raise ValueError(
            f"model.attention {NAME!r} makes no mask, and layers of {config.model_type} read it: "
            "set --model.attention eager"
        )


def register() -> None:
    """Makes the name known to Transformers; `attn_implementation=NAME` then means this attention."""
    AttentionInterface.register(NAME, varlen_attention)
    AttentionMaskInterface.register(NAME, _mask)


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each document to itself, in the signature of Transformers' attention functions.

    Args:
        module: the attention layer.
        query: (1, heads, tokens, head_dim).
        key: (1, key-value heads, tokens, head_dim).
        value: (1, key-value heads, tokens, head_dim).
        attention_mask: as `sdpa` takes it; None in training.
        cu_seq_lens_q: (documents + 1,) int32, where each document begins and the last one ends; None for one document.
        max_length_q: tokens of the longest document.
        options: what `sdpa` takes beside these.

    Returns:
        (1, tokens, heads, head_dim) and None.
    """
    for name, what in UNKNOWN.items():
        if options.get(name) is not None:
            raise ValueError(f"model.attention {NAME!r} has no {what} ({name}), as the model has: set another one")
    config = getattr(module, "config", None)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if attention_mask is None and "sliding_window" not in options and window is not None and window < key.shape[2]:
        raise ValueError(
            f"model.attention {NAME!r} sees whole documents, for the model's layers do not hand over their window of "
            f"{window} tokens: set --model.attention sdpa"
        )
    return _attend(module, query, key, value, attention_mask, cu_seq_lens_q, max_length_q, options), None


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    max_length_q: int | None,
    options: dict[str, Any],
) -> Tensor:
    window, sinks = options.get("sliding_window"), options.get("s_aux")
    is_windowed = sinks is not None or (window is not None and window < key.shape[2])
    num_documents = 1 if cu_seq_lens_q is None or attention_mask is not None else cu_seq_lens_q.numel() - 1
    alone = masked_attention if is_windowed else sdpa_attention_forward
    is_whole = attention_mask is None and query.shape[0] == 1 and key.shape[2] == query.shape[2]
    is_for_kernel = is_whole and _has_kernel(query) and not options.get("dropout")
    if is_for_kernel and (num_documents > 1 or is_windowed):
        queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        tokens = len(queries)
        if cu_seq_lens_q is None:
            cu_seq_lens_q = torch.arange(0, tokens + 1, tokens, dtype=torch.int32, device=query.device)
        return _kept(
            attend_documents, queries, keys, values, cu_seq_lens_q, max_length_q or tokens,
            options.get("scaling"), window if is_windowed else None, sinks,
        )[None]  # fmt: skip
    if num_documents > 1:
        assert cu_seq_lens_q is not None
        lengths = [length for length in cu_seq_lens_q.diff().tolist() if length]  # `fill_up` adds empty documents
        documents = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
        return torch.cat([_kept(alone, module, q, k, v, None, **options)[0] for q, k, v in documents], dim=1)
    if attention_mask is None and not is_windowed and _is_plain(module, query, key, value, options):
        return _kept(causal_attention, query, key, value, options.get("scaling")).transpose(1, 2)
    return _kept(alone, module, query, key, value, attention_mask, **options)[0]


def _mask(*, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    # Without padding the documents' boundaries replace the mask.
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **options)


def _has_kernel(query: Tensor) -> bool:
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)


def _is_plain(module: Any, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> bool:
    """Whether Transformers' function would do no more than call the kernel, of a whole row."""
    takes_groups = key.shape == value.shape and key.shape[3] <= 256
    fits = key.shape[2] == query.shape[2] and (takes_groups or key.shape[1] == query.shape[1])
    changed = (options.get(name) is not None for name in ("softcap", "position_bias", "is_causal"))
    return fits and not options.get("dropout") and getattr(module, "is_causal", True) and not any(changed)


def _kept(attend: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Attention whose results a checkpointed layer may keep."""
    notes = torch.is_grad_enabled() and not kernels_run
    with keeping(), _NoteKernel() if notes else nullcontext():
        return attend(*args, **options)
