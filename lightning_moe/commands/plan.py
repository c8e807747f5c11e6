"""`lightning-moe plan`: the memory of a training step, before training."""

import argparse
import json
from typing import Any, get_args

from rich.console import Console

from lightning_moe.commands import positive
from lightning_moe.integrations.model_config import read_config
from lightning_moe.planning.cards import read_card
from lightning_moe.planning.options import Checkpointing, Optimizer, Router, Strategy
from lightning_moe.planning.recipe import read_recipe
from lightning_moe.planning.report import make_report, show
from lightning_moe.planning.step import Planner, stored_format
from lightning_moe.quantization import FORMATS

# Where neither an option nor a recipe says anything.
UNSAID: dict[str, Any] = {"checkpointing": "auto", "offload": None, "experts_on": "auto"}


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


BOOLEAN = {"type": _boolean, "metavar": "{true,false}"}
# Each option's help, and what argparse asks of it.
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "--tokens": ("of a sequence (4,096)", {"type": positive}),
    "--batch": ("sequences in a step, of each GPU (1)", {"type": positive}),
    "--experts": ("adapters on the experts too (false)", BOOLEAN),
    "--rank": ("LoRA's (16)", {"type": positive}),
    "--router": ("what becomes of the router (frozen)", {"choices": get_args(Router)}),
    "--quantize": (
        "the format of the experts' weights (the checkpoint's own; none: 16 bits)",
        {"choices": ["none", *FORMATS]},
    ),
    "--experts-on": (
        "where the experts' weights wait (auto: on the host where the card does not hold them)",
        {"choices": ["device", "host", "auto"]},
    ),
    "--checkpointing": (
        "what is computed again in backward: all but attention, all, or nothing (auto: what fits)",
        {"choices": [*get_args(Checkpointing), "auto"]},
    ),
    "--offload": ("what layers keep waits in host memory (where --checkpointing auto finds no room)", BOOLEAN),
    "--optimizer": ("AdamW with moments in float32 or in 8 bits (adamw)", {"choices": get_args(Optimizer)}),
    "--gpus": ("that train together (1)", {"type": positive}),
    "--strategy": ("how several GPUs share the work (ddp)", {"choices": get_args(Strategy)}),
}


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "plan", help="the memory of a training step, before training and without a GPU",
        description="Says what memory a training step takes, by what holds it, from a model's configuration alone: "
        "the peak, host memory, disk, which cards it fits and with what options, and seconds by a roofline.",
    )  # fmt: skip
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a hub name, a folder, or a config.json")
    parser.add_argument(
        "--recipe", metavar="FILE[,FILE]", help="a recipe's configuration, and those on top of it; options override it"
    )
    for name, (said, asked) in OPTIONS.items():
        parser.add_argument(name, help=said, **asked)
    parser.add_argument(
        "--gpu", metavar="CARD", help="H100, RTX 4090, ...; its GB, such as 24; or the GiB there are, such as 23.1"
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Plans and prints. Raises ValueError on input that is wrong, in one line."""
    card = None if options.gpu is None else read_card(options.gpu)
    if options.model is None and options.recipe is None:
        raise ValueError("which model? Give a hub name, a folder, a config.json, or --recipe FILE")
    config, given = (None, {}) if options.recipe is None else read_recipe(options.recipe)
    if options.model is not None:
        config = read_config(options.model)
    assert config is not None
    names = [option[2:].replace("-", "_") for option in OPTIONS]
    said = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if said.get("quantize") == "none":
        said["quantize"] = None
    planner = Planner(config)
    try:
        # A checkpoint whose experts are quantized trains as it is.
        report = make_report(planner, UNSAID | {"quantize": stored_format(config)} | given | said, card)
    except TypeError as error:
        raise ValueError(f"the recipe's options are wrong: {error}") from error
    if options.json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        show(report, planner, Console(), options.model or options.recipe)
    return 0
