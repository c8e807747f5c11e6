"""Weights, adapters, gradients and the optimizer's states: their bytes, by what they belong to."""

import math
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from lightning_moe.ops.nf4 import NF4
from lightning_moe.ops.quantized import num_bytes
from lightning_moe.planning.options import PlanOptions
from lightning_moe.quantization import find_quantizable, format_of_parameter

# bitsandbytes: tensors of fewer values keep 32-bit moments; a scale for each so many values of the others.
SMALLEST_8BIT, BLOCK_8BIT = 4096, 256


@dataclass
class Weights:
    """Bytes of a model's weights and of what trains in it.

    Attributes:
        base: by part: `experts`, `attention`, `embeddings and head`, `rest`.
        experts: of each layer's experts, each weight's bytes, where they may wait on the host.
        largest_layer: all weights of the largest decoder layer.
        trained: the shape of each tensor that trains, in float32.
        trained_in_layer: values of them in the decoder layer that has most.
        adapters_on_experts: values of them on experts.
    """

    base: Counter[str] = field(default_factory=Counter)
    experts: list[list[int]] = field(default_factory=list)
    largest_layer: int = 0
    trained: list[tuple[int, ...]] = field(default_factory=list)
    trained_in_layer: int = 0
    adapters_on_experts: int = 0

    @property
    def num_trained(self) -> int:
        """Values that train."""
        return sum(map(math.prod, self.trained))

    @property
    def num_expert_bytes(self) -> int:
        """Of all layers' experts."""
        return sum(map(sum, self.experts))

    @property
    def largest_experts(self) -> int:
        """Of the experts of the layer that has most."""
        return max(map(sum, self.experts))

    def optimizer_bytes(self, optimizer: str) -> int:
        """Of the states that an optimizer holds from its first step on, on the device."""
        return sum(_moments(math.prod(shape), optimizer) for shape in self.trained)


def _moments(values: int, optimizer: str) -> int:
    if optimizer == "adamw":
        return 8 * values + 4  # and the fused one's count of steps
    if values < SMALLEST_8BIT:
        return 8 * values
    return 2 * (values + 4 * -(-values // BLOCK_8BIT))


def read_weights(model: PreTrainedModel, options: PlanOptions, layer: str, router: str) -> Weights:
    """The weights of a model on the meta device, with the options' adapters.

    Args:
        model: without adapters.
        options: what trains, and in what the weights are kept.
        layer: the name of a decoder layer with experts.
        router: the router's name within it.

    Raises:
        ValueError: where the experts cannot be quantized, or an adapter has no layer to go to.
    """
    quantized = set() if options.quantize is None else set(find_quantizable(model, options.quantize))
    layers, weights = layer.rpartition(".")[0] + ".", Weights()
    embeddings = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}  # type: ignore[union-attr]
    of_layers: Counter[str] = Counter()
    experts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        size = parameter.numel() * getattr(torch, options.dtype).itemsize
        if name in quantized:
            assert options.quantize is not None
            size = num_bytes(format_of_parameter(model, name, options.quantize), tuple(parameter.shape))
        elif options.quantize_linear and _is_plain_linear(module, name, router, embeddings):
            size = num_bytes(NF4(), (1, *parameter.shape))
        of = name[len(layers) :].partition(".")[0] if name.startswith(layers) else ""
        if of and parameter.ndim == 3:
            experts.setdefault(of, []).append(size)
        part = "rest"
        if id(parameter) in embeddings:
            part = "embeddings and head"
        elif parameter.ndim == 3 or ".experts." in name:
            part = "experts"
        elif "attn" in name or "attention." in name:
            part = "attention"
        weights.base[part] += size
        of_layers[of] += size
    weights.experts = list(experts.values())
    weights.largest_layer = max(size for of, size in of_layers.items() if of)
    _add_trained(model, options, layers, router, weights)
    return weights


def _is_plain_linear(module: nn.Module, name: str, router: str, embeddings: set[int]) -> bool:
    """Whether a parameter is the weight of a linear layer that is neither the head nor a router."""
    is_weight = isinstance(module, nn.Linear) and name.endswith(".weight") and id(module.weight) not in embeddings
    return is_weight and not name.endswith(f"{router}.weight")


def _add_trained(model: PreTrainedModel, options: PlanOptions, layers: str, router: str, weights: Weights) -> None:
    rank, in_layer = options.rank, Counter[str]()
    matched = set()
    for name, module in model.named_modules():
        of = name[len(layers) :].partition(".")[0] if name.startswith(layers) else ""
        shapes: list[tuple[int, ...]] = []
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Linear) and last in options.target_modules:
            matched.add(last)
            shapes += [(rank, module.in_features), (module.out_features, rank)]
        parameters = dict(module.named_parameters(recurse=False))
        if options.experts and name.endswith(".experts"):
            for stem in ("gate_up_proj", "up_proj", "down_proj"):
                if (weight := parameters.get(stem)) is not None and weight.ndim == 3:
                    num, out, width = weight.shape
                    shapes += [(rank * num, width), (out, rank * num)]
                    weights.adapters_on_experts += rank * num * (out + width)
        if name.endswith(router):
            matched.add(router)
            if options.router == "lora":
                out, width = parameters["weight"].shape
                shapes += [(rank, width), (out, rank)]
            elif options.router == "trained":
                shapes += [tuple(parameter.shape) for parameter in parameters.values()]
        if any(name.endswith(saved) for saved in options.modules_to_save):
            matched.update(saved for saved in options.modules_to_save if name.endswith(saved))
            shapes += [tuple(parameter.shape) for parameter in module.parameters()]
        weights.trained += shapes
        in_layer[of] += sum(map(math.prod, shapes)) if of else 0
    if options.target_modules and matched.isdisjoint(options.target_modules):
        raise ValueError(f"{model.config.model_type} has none of {', '.join(options.target_modules)} to adapt")
    wanted = {*options.modules_to_save, *([router] if options.router != "frozen" else [])}
    if missing := sorted(wanted - matched):
        raise ValueError(f"{model.config.model_type} has no module {', '.join(missing)} to train")
    if options.experts and not weights.adapters_on_experts:
        raise ValueError(f"{model.config.model_type} has no experts with gate_up_proj and down_proj to adapt")
    weights.trained_in_layer = max(in_layer.values(), default=0)
