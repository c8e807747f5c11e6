"""Seconds of a step by a roofline: an estimate, of what bounds it on a named card."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_moe.integrations.transformers_experts import experts_per_token
from lightning_moe.planning.cards import Card
from lightning_moe.planning.options import PlanOptions
from lightning_moe.planning.step import MemoryPlan, Planner

# The share of the data sheet's products that kernels reach; on an H200 attention reached 0.57 and products 0.65.
REACHED = 0.6
# The host's time for the calls of a step, which is the least without a CUDA graph: 48 layers took 0.5 s.
HOST_SECONDS_PER_LAYER = 0.011


@dataclass(frozen=True)
class Roofline:
    """Seconds of a step's parts, as if each took its bound.

    Attributes:
        products: matrix products of the layers and the head.
        attention: its products of queries and keys.
        memory: what is written and read between them.
        link: copies between host and device, beside the rest.
        host: the calls themselves, beside the rest.
    """

    products: float
    attention: float
    memory: float
    link: float
    host: float

    @property
    def seconds(self) -> float:
        """Of a step: computation, or what goes on beside it where that takes longer."""
        return max(self.products + self.attention + self.memory, self.link, self.host)


def roofline(planner: Planner, options: PlanOptions, plan: MemoryPlan, card: Card) -> Roofline | None:
    """Of one document for each sequence; None for a card whose speed is not known."""
    if card.tflops is None:
        return None
    tokens, model = options.row_tokens, planner.counter(options.dtype).model
    config: Any = planner.config.get_text_config()
    rate, layers = card.tflops * 1e12 * REACHED, config.num_hidden_layers
    active = _active_parameters(model, planner)
    passes = 2 if options.checkpointing == "none" else 3
    head = model.get_output_embeddings().weight.numel()
    products = 2 * tokens * (passes * active + 2 * head)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    of_keys = getattr(config, "qk_nope_head_dim", 0) + getattr(config, "qk_rope_head_dim", 0) or width
    widths = of_keys + (getattr(config, "v_head_dim", None) or width)
    forward = layers * config.num_attention_heads * widths * options.batch * options.tokens**2  # windows not counted
    attention = forward * (3.5 + (options.checkpointing == "full"))
    return Roofline(
        products=products / rate,
        attention=attention / rate,
        memory=2 * plan.traffic / (card.memory_gb_s * 1e9),
        link=2 * plan.waiting / (card.link_gb_s * 1e9),
        host=HOST_SECONDS_PER_LAYER * layers,
    )


def _active_parameters(model: Any, planner: Planner) -> int:
    """Of the layers' products, that a token meets."""
    top_k = experts_per_token(planner.config.get_text_config()) or 1
    head = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    active = 0
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            if weight.ndim == 3:
                active += weight.numel() * top_k // weight.shape[0]
            elif weight.ndim == 2 and isinstance(module, nn.Linear) and id(module) not in head:
                active += weight.numel()
    return active
