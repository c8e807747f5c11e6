"""A tiny MoELoRA, its data and a Trainer, for tests of the recipe's parts."""

import json
import tempfile
from functools import cache
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lora.data import InstructionData
from lora.module import MoELoRA

ARCHITECTURE = {
    "model_type": "qwen3_moe", "vocab_size": 384, "hidden_size": 32, "intermediate_size": 32,
    "moe_intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def module(architecture=ARCHITECTURE, **options):
    torch.manual_seed(0)
    return MoELoRA(architecture, **{"rank": 4, "learning_rate": 1e-2, "warmup_steps": 0} | options)


def trainer(folder, steps, *callbacks, **options):
    defaults = {"accelerator": "cpu", "logger": False, "limit_val_batches": 0, "enable_checkpointing": False}
    return Trainer(
        max_steps=steps, default_root_dir=folder, callbacks=list(callbacks),
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **defaults | options,
    )  # fmt: skip


@cache
def pairs():
    """A file of sixty prompts and completions of many lengths."""
    path = Path(tempfile.mkdtemp(), "pairs.jsonl")
    records = [{"prompt": f"Count to {n}: ", "completion": " ".join(map(str, range(n % 17 + 1)))} for n in range(60)]
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


def data(**options):
    return InstructionData(**{"batch_size": 2, "max_length": 32, "source": pairs()} | options)


def trained(network):
    return {name: p.detach().clone() for name, p in network.named_parameters() if p.requires_grad}
