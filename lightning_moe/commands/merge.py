"""`lightning-moe merge`: a base model with an adapter added to its weights."""

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

import torch

from lightning_moe.adapters.merge import Rounding, merge_adapter


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "merge", help="add an adapter to a base model's weights",
        description="Writes a base model with an adapter added to its weights, shard by shard: W + scaling * B A in "
        "float32, rounded once. Files, names and config.json are the base's.",
    )  # fmt: skip
    parser.add_argument(
        "adapter", type=Path, metavar="ADAPTER_OR_CHECKPOINT", help="an adapter's folder, or a checkpoint"
    )
    parser.add_argument("base", type=Path, help="the 16-bit model, in a folder as from the hub")
    parser.add_argument("out", type=Path, help="made, with the name given when it is whole; must be new or empty")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the merged weights (default: the base's)"
    )
    parser.add_argument(
        "--rounding", choices=get_args(Rounding), default="nearest",
        help="nearest (default), or stochastic, by which small updates are right on average",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of stochastic rounding")
    parser.add_argument("--adapter", dest="adapter_name", metavar="NAME", help="which, where a checkpoint has several")
    parser.add_argument(
        "--onto-16-bit", action="store_true",
        help="merge an adapter that was trained over quantized experts: the result is near the trained model only",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Merges."""
    try:
        report = merge_adapter(
            options.adapter, options.base, options.out, dtype=options.dtype and getattr(torch, options.dtype),
            rounding=options.rounding, seed=options.seed, adapter_name=options.adapter_name,
            onto_16_bit=options.onto_16_bit,
        )  # fmt: skip
    except KeyboardInterrupt:
        print("lightning-moe merge: interrupted; nothing is left of it", file=sys.stderr)
        return 130
    print(report)
    return 0
