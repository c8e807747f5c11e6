"""`lightning-moe inspect`: the patch report of a model, from its configuration alone."""

import argparse
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from lightning_moe.commands import positive
from lightning_moe.discovery import find_moe_layers
from lightning_moe.integrations.model_config import build_on_meta, read_config
from lightning_moe.patching import patch_moe

PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "inspect", help="say what becomes of each MoE layer of a model, without its weights",
        description="Prints the patch report of a model: each MoE layer, its class, whether it runs the operation "
        "(active) or the default implementation (fallback) and why, what it saves for backward per token before and "
        "now, and what becomes of adapters on experts. Reads the configuration only. Exits with 0 where some layer is "
        "active; 1 where none is; 2 where there is no such model, or none with experts.",
    )  # fmt: skip
    parser.add_argument("model", help="a folder, a config.json, or a hub name, the only one that needs a network")
    parser.add_argument(
        "--experts", choices=["frozen", "lora", "full"], default="frozen",
        help="how the experts train: not at all (default, as with LoRA on the attention), by LoRA on their "
        "projections, or with all their weights",
    )  # fmt: skip
    parser.add_argument("--rank", type=positive, default=16, help="of --experts lora (default: %(default)s)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Inspects; 1 where no layer can be patched."""
    config = read_config(options.model)
    model = build_on_meta(config)
    size = f"{type(model).__name__}, {model.num_parameters() / 1e9:.2f} billion parameters in {model.dtype}"
    if not find_moe_layers(model):
        raise ValueError(f"{options.model!r} has no MoE layers: {size}")
    report = patch_moe(_as_trained(model, options.experts, options.rank))
    print(f"{size}; experts: {options.experts}{f', rank {options.rank}' * (options.experts == 'lora')}")
    if quantization := getattr(config, "quantization_config", None):
        print(
            f"The checkpoint is quantized ({quantization.get('quant_method')}). The report is of 16-bit weights, or of "
            "experts that QuantizedExpertsConfig loads; as Transformers loads them, they run the default implementation"
        )
    print(report)
    return 0 if report.active else 1


def _as_trained(model: PreTrainedModel, experts: str, rank: int) -> nn.Module:
    model.requires_grad_(experts == "full")
    if experts != "lora":
        return model
    names = [
        f"{layer.name}.{name}"
        for layer in find_moe_layers(model)
        for name, parameter in layer.module.named_parameters()
        if name in PROJECTIONS and parameter.ndim == 3
    ]
    if not names:
        raise ValueError("--experts lora: the experts have no gate_up_proj and down_proj, one for all, to adapt")
    with torch.device("meta"):
        return get_peft_model(model, LoraConfig(r=rank, target_modules=[], target_parameters=names))
