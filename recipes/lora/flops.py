"""Model FLOPs of a Qwen3-MoE's training step, recomputation not counted; a packed batch's documents and tokens."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor
from transformers import PretrainedConfig, Qwen3MoeConfig


def num_documents(batch: dict[str, Any]) -> int:
    """Of a packed batch; `batch_size_fn` of Lightning's ThroughputMonitor."""
    return batch["cu_seq_lens_q"].numel() - 1


def num_tokens(batch: dict[str, Any]) -> int:
    """Of a packed batch; `length_fn` of Lightning's ThroughputMonitor."""
    return batch["input_ids"].numel()


def batch_flops(
    config: PretrainedConfig, boundaries: Tensor, trained: Mapping[str, int | Literal["full"]]
) -> int | None:
    """`model_flops` of a batch with (documents + 1,) boundaries; None for a family without a formula."""
    if not isinstance(config, Qwen3MoeConfig):
        return None
    lengths = boundaries.diff().long()
    return model_flops(config, int(lengths.sum()), int(lengths.square().sum()), trained)


def model_flops(
    config: Qwen3MoeConfig, num_tokens: int, sum_squared_lengths: int, trained: Mapping[str, int | Literal["full"]]
) -> int:
    """Floating-point operations of forward and backward; a multiplication and an addition are two.

    A token costs the `num_experts_per_tok` experts that it is routed to. Causal attention costs half the square of each
    document's length. Backward costs a frozen weight its input's gradient, as much as its forward, in the first layer
    too; a trained weight costs its own gradient beside that. Adapters count as low-rank products. Embeddings, norms and
    activations are left out. Linear in both counts: sums over steps give the FLOPs of all of them.

    Args:
        config: of the model, adapters apart.
        num_tokens: in all documents.
        sum_squared_lengths: of the documents, each one's tokens squared.
        trained: what trains, by name: `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate` (the router),
            `experts.gate_up_proj`, `experts.down_proj`, `lm_head`; in dense layers `gate_proj`, `up_proj`, `down_proj`.
            A number is the rank of an adapter on a frozen weight.

    Raises:
        ValueError: where `trained` names something else.
    """
    hidden, layers, top_k = config.hidden_size, config.num_hidden_layers, config.num_experts_per_tok
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    sparse = sum(_is_sparse(config, layer) for layer in range(layers))
    dense = layers - sparse
    executions_and_sizes = {
        "q_proj": (layers, hidden, queries),
        "k_proj": (layers, hidden, keys),
        "v_proj": (layers, hidden, keys),
        "o_proj": (layers, queries, hidden),
        "gate": (sparse, hidden, config.num_experts),
        "experts.gate_up_proj": (sparse * top_k, hidden, 2 * config.moe_intermediate_size),
        "experts.down_proj": (sparse * top_k, config.moe_intermediate_size, hidden),
        "gate_proj": (dense, hidden, config.intermediate_size),
        "up_proj": (dense, hidden, config.intermediate_size),
        "down_proj": (dense, config.intermediate_size, hidden),
        "lm_head": (1, hidden, config.vocab_size),
    }
    if unknown := trained.keys() - executions_and_sizes:
        raise ValueError(f"trained names {', '.join(sorted(unknown))}; known are {', '.join(executions_and_sizes)}")
    products = 0
    for name, (executions, fan_in, fan_out) in executions_and_sizes.items():
        rank = trained.get(name, 0)
        if rank == "full":
            products += executions * 3 * fan_in * fan_out
        else:
            products += executions * (2 * fan_in * fan_out + 3 * rank * (fan_in + fan_out))
    # Scores and weighted values are 2 products in forward and 4 in backward, 2 FLOPs each, over half the square.
    return 2 * num_tokens * products + 6 * layers * queries * sum_squared_lengths


def _is_sparse(config: Qwen3MoeConfig, layer: int) -> bool:
    return layer not in (config.mlp_only_layers or ()) and (layer + 1) % config.decoder_sparse_step == 0
