"""A decoder layer's forward and backward on the meta device, and what they would allocate on a GPU."""

import copy
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from lightning_moe.discovery import find_moe_layers
from lightning_moe.integrations.allocations import AllocationCounter
from lightning_moe.integrations.transformers_experts import read_spec
from lightning_moe.ops.grouped import FUSED_ACTIVATIONS
from lightning_moe.planning.blocks import recompute
from lightning_moe.planning.experts import ExpertsShape, experts
from lightning_moe.planning.options import PlanOptions
from lightning_moe.planning.parts import ATTENTION_KEPT, LAYER_IN_FLIGHT, LAYER_INPUTS, LOSS
from lightning_moe.planning.stand_ins import (
    SMALLEST_OFFLOADED_BYTES,
    TWO_BLOCKS,
    LayerRun,
    adapted_linear,
    attention,
    liger_norm,
    ligers_rotary_embedding,
    next_token_loss,
    until_loss,
)

ATTENTION = "lightning_moe_plan"


@dataclass(frozen=True)
class Counted:
    """What a part of the step allocates.

    Attributes:
        peak: bytes, by what they are for, when most are held: what the layer keeps among them.
        moment: when that is.
        kept: the bytes of each tensor that is held from its forward to its backward, by what they are.
        traffic: bytes that were allocated in all.
        num_blocks: of a layer, each of which is computed again by itself.
    """

    peak: Counter[str]
    moment: str
    kept: tuple[tuple[str, int], ...]
    traffic: int
    num_blocks: int = 1

    @property
    def num_kept(self) -> int:
        """Bytes that are held from forward to backward."""
        return sum(size for _, size in self.kept)


class LayerCounter:
    """Counts for one model and any options and lengths.

    Args:
        model: on the meta device; it is changed, and of no use afterwards.

    Raises:
        ValueError: where no layer of it has experts that the operation runs.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        found = find_moe_layers(model)
        if not found:
            raise ValueError(
                f"{model.config.model_type} has no experts: {type(model).__name__} is no Mixture of Experts"
            )
        runs = [layer for layer in found if layer.reason is None and layer.is_dispatched]
        if not runs:
            raise ValueError(f"{model.config.model_type}'s experts run the default implementation: {found[0].reason}")
        self.model: Any = model
        self._decoder: Any = model.get_decoder()
        names = {id(module): name for name, module in model.named_modules()}
        layers = {names[id(layer)]: layer for layer in self._decoder.layers}
        self.num_layers = len(layers)
        self.layer_name = next(name for name in layers if runs[-1].name.startswith(f"{name}."))
        self._layer, self._experts_name = layers[self.layer_name], runs[-1].name[len(self.layer_name) + 1 :]
        experts = model.get_submodule(runs[-1].name)
        self.has_fused_activation = read_spec(experts).activation in FUSED_ACTIVATIONS
        # In a process that trains with Liger, Transformers builds models with its norms, which run on a GPU alone.
        self._has_ligers = any(type(module).__module__.startswith("liger_kernel") for module in model.modules())
        AttentionInterface.register(ATTENTION, _attend)
        AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)
        model.set_attn_implementation(ATTENTION)

    def count_layer(self, options: PlanOptions) -> Counted:
        """Forward and backward of a layer, what it keeps in between as the options have it."""
        tokens = options.row_tokens
        counter = AllocationCounter(LAYER_IN_FLIGHT)
        run = LayerRun(counter, options.checkpointing == "selective", options.offload)
        has_two_blocks = options.checkpointing == "selective" and self.model.config.model_type in TWO_BLOCKS
        layer = self._prepared(options, run, has_two_blocks)
        arguments = self._arguments(tokens)
        with counter, ligers_rotary_embedding() if options.liger or self._has_ligers else nullcontext():
            with counter.tagged(LAYER_INPUTS):
                x = self._hidden(tokens).requires_grad_()
            output = layer(x, **arguments)
            with counter.tagged(LOSS):
                loss = until_loss(output[0] if isinstance(output, tuple) else output)
            del output
            kept = _kept(run, x)
            if options.checkpointing == "none":
                kept = tuple((tag, size) for tag, size in counter.live.items() if tag != LOSS)
            if options.offload:
                of_block = [(LAYER_INPUTS, size) for size in run.inputs[-1:]] if has_two_blocks else kept
                run.fetched = tuple((tag, size) for tag, size in of_block if size >= SMALLEST_OFFLOADED_BYTES)
            with counter.during("a layer's backward"):
                del x
                loss.backward()  # type: ignore[no-untyped-call]
        return Counted(counter.at_peak, counter.moment, kept, counter.traffic, 1 + has_two_blocks)

    def count_loss(self, options: PlanOptions) -> Counted:
        """The last norm, the head and the loss, forward and backward."""
        counter = AllocationCounter(LAYER_IN_FLIGHT)
        norm = copy.deepcopy(self._decoder.norm)
        _freeze(norm)
        self._replace_norms(norm, options)
        head = self.model.get_output_embeddings().weight.detach()
        trained = head.numel() * ("lm_head" in options.modules_to_save)
        with counter:
            x = self._hidden(options.row_tokens).requires_grad_()
            hidden = norm(x)
            loss = next_token_loss(hidden, head, counter, trained)
            with counter.during("the loss's backward"):
                del hidden
                loss.backward()  # type: ignore[no-untyped-call]
        return Counted(counter.at_peak, counter.moment, (), counter.traffic)

    def batch_bytes(self, options: PlanOptions) -> int:
        """What is held for the whole step beside: token ids, labels, positions, the rotary embedding's tables."""
        tables = self._arguments(options.row_tokens).get("position_embeddings")
        of_kinds = tables.values() if isinstance(tables, dict) else [tables]  # of layers with windows and without
        flat = [table for of_kind in of_kinds for table in (of_kind if isinstance(of_kind, tuple) else (of_kind,))]
        return 3 * 8 * options.row_tokens + sum(table.nbytes for table in flat if isinstance(table, Tensor))

    def _hidden(self, tokens: int) -> Tensor:
        return torch.empty(1, tokens, self.model.config.hidden_size, dtype=self.model.dtype, device="meta")

    def _arguments(self, tokens: int) -> dict[str, Any]:
        """What the decoder calls its layers with."""
        taken: dict[str, Any] = {}

        def take(hidden_states: Tensor, *_: Any, **arguments: Any) -> Tensor:
            taken.update(arguments)
            return hidden_states

        layers, self._decoder.layers = self._decoder.layers, nn.ModuleList([self._layer])
        norm, self._decoder.norm = self._decoder.norm, nn.Identity()
        self._layer.forward = take
        ids = torch.empty(1, tokens, dtype=torch.long, device="meta")
        positions = ids.clone()
        # A mask that is there already has none made.
        mask = torch.empty(1, 1, 1, 1, device="meta")
        try:
            self._decoder(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        finally:
            self._decoder.layers, self._decoder.norm = layers, norm
            del self._layer.forward
        return taken

    def _prepared(self, options: PlanOptions, run: LayerRun, has_two_blocks: bool) -> Callable[..., Any]:
        """A copy of the layer, frozen but for adapters, with stand-ins, which computes again what the options say."""
        layer = copy.deepcopy(self._layer)
        _freeze(layer)
        self._replace_norms(layer, options)
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in options.target_modules:
                module.forward = _adapted(module, options.rank, run)  # type: ignore[method-assign]
            if name.endswith(router_module(self.model, options)) and options.router != "frozen":
                module.requires_grad_(True)
            if hasattr(module, "config"):
                module.lightning_moe_plan = run  # type: ignore[assignment]
        module = layer.get_submodule(self._experts_name)
        module.forward = _experts(module, options, run)  # type: ignore[method-assign]
        return recompute(layer, options, run, has_two_blocks)

    def _replace_norms(self, module: nn.Module, options: PlanOptions) -> None:
        for each in module.modules():
            if (options.liger or self._has_ligers) and type(each).__name__.endswith("RMSNorm"):
                each.forward = liger_norm  # type: ignore[method-assign]


def _kept(run: LayerRun, x: Tensor) -> tuple[tuple[str, int], ...]:
    """What is held after a layer's forward: its input first."""
    outputs = [tensor for results in run.kept for tensor in results]
    tags = [LAYER_INPUTS] * (1 + len(run.inputs)) + [ATTENTION_KEPT] * len(outputs) + [LAYER_INPUTS] * len(run.choice)
    sizes = [x.nbytes, *run.inputs, *(tensor.nbytes for tensor in (*outputs, *run.choice))]
    return tuple(zip(tags, sizes, strict=True))


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> tuple[Tensor, None]:
    return attention(query, key, value, module.lightning_moe_plan, options.get("s_aux") is not None), None


def _freeze(module: nn.Module) -> None:
    module.requires_grad_(False)
    module.train()


def _adapted(linear: nn.Linear, rank: int, run: LayerRun) -> Any:
    a = torch.empty(rank, linear.in_features, device="meta", requires_grad=True)
    b = torch.empty(linear.out_features, rank, device="meta", requires_grad=True)

    def forward(x: Tensor) -> Tensor:
        return adapted_linear(x, linear.weight, a, b, run)

    return forward


def _experts(module: Any, options: PlanOptions, run: LayerRun) -> Callable[..., Tensor]:
    spec = read_spec(module)
    weights = spec.weights(module)
    up, down = (w if spec.is_transposed else w.mT for w in (weights.gate_up_proj, weights.down_proj))
    shape = ExpertsShape(
        up.detach(), down.detach(), spec.activation, spec.has_bias,
        options.workspace_bytes, options.output_buffer_mib,
    )  # fmt: skip
    num, rank = up.shape[0], options.rank
    leaves = [
        torch.empty(*size, device="meta", requires_grad=True)
        for weight in (up, down)
        for size in ((rank * num, weight.shape[1]), (weight.shape[2], rank * num))
    ] * options.experts  # fmt: skip

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        factors = [
            leaf.reshape(num, rank, -1) if at % 2 == 0 else leaf.reshape(-1, rank, num).permute(2, 0, 1)
            for at, leaf in enumerate(leaves)
        ]
        return experts(shape, run, hidden_states, top_k_index, top_k_weights, tuple(factors))

    return forward


def router_module(model: PreTrainedModel, options: PlanOptions) -> str:
    """The router's name in a layer: what the options say, or what the family calls it."""
    if options.router_module:
        return options.router_module
    names = [name for name, _ in model.named_modules() if name.endswith(("mlp.gate", "mlp.router"))]
    return ".".join(names[0].split(".")[-2:]) if names else "mlp.gate"
