"""GPUs: what memory they have, how fast they are, and which options have a step fit."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from lightning_moe.planning.options import MOST_TOKENS, PlanOptions
from lightning_moe.planning.step import GIB, MemoryPlan, Planner

# Of cards by their GB, the GiB that a process may have: the driver keeps some.
SIZES = {12: 11.2, 16: 15.4, 24: 23.4, 32: 31.0, 40: 39.0, 48: 47.0, 80: 78.5, 141: 139.0, 192: 178.0}


LARGEST = 512.0


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: as NVIDIA has it.
        gib: that a process may have.
        tflops: of dense matrix products in bfloat16, as the data sheet has them; None where it is not known.
        memory_gb_s: of its memory.
        link_gb_s: of copies from page-locked host memory, in one direction.
    """

    name: str
    gib: float
    tflops: float | None = None
    memory_gb_s: float = 0.0
    link_gb_s: float = 0.0


CARDS = {
    card.name.lower(): card
    for card in (
        Card("RTX 3060", SIZES[12], 51, 360, 22),
        Card("RTX 3090", SIZES[24], 71, 936, 22),
        Card("RTX 4080", SIZES[16], 97, 717, 22),
        Card("RTX 4090", SIZES[24], 165, 1008, 22),
        Card("RTX 5080", SIZES[16], 113, 960, 45),
        Card("RTX 5090", SIZES[32], 210, 1792, 45),
        Card("L4", 22.0, 121, 300, 22),
        Card("A10", 22.0, 125, 600, 22),
        Card("L40S", 44.0, 362, 864, 22),
        Card("A6000", SIZES[48], 155, 768, 22),
        Card("A100 40GB", SIZES[40], 312, 1555, 22),
        Card("A100", SIZES[80], 312, 2039, 22),
        Card("H100", SIZES[80], 989, 3350, 50),
        Card("H200", SIZES[141], 989, 4800, 50),
        Card("B200", SIZES[192], 2250, 8000, 50),
    )
}


def read_card(text: str) -> Card:
    """A card by its name, its GB where cards of that size are sold, or the GiB that a process may have.

    Raises:
        ValueError: on another name, with those that there are.
    """
    wanted = text.strip().lower()
    # As nvidia-smi has them, too: NVIDIA H100 80GB HBM3.
    words = [word for word in re.split(r"[\s_-]+", wanted) if word not in ("nvidia", "geforce")]
    short = [word for word in words if not re.fullmatch(r"pcie|sxm\d?|nvl|hbm\d?e?|\d+gb", word)]
    by_name = {known.replace(" ", ""): card for known, card in CARDS.items()}
    if card := by_name.get("".join(words)) or by_name.get("".join(short)):
        return card
    names = ", ".join(card.name for card in CARDS.values())
    try:
        size = float(wanted.removesuffix("gib").removesuffix("gb"))
    except ValueError:
        raise ValueError(f"no card {text!r}: a number of GiB, or one of {names}") from None
    if not 0 < size <= LARGEST:
        raise ValueError(f"a card of {text} GiB cannot be: give a number of GiB, or one of {names}")
    if not wanted.endswith("gib") and size in SIZES:
        return Card(f"a card of {int(size)} GB", SIZES[int(size)])
    return Card(f"a card of {size:g} GiB", size)


def fits(plan: MemoryPlan, card: Card) -> bool:
    """Whether a step fits a card."""
    return plan.peak <= card.gib * GIB


def settle(planner: Planner, given: dict[str, Any], card: Card | None) -> PlanOptions:
    """Options with those decided that the recipe decides by the memory that there is.

    Args:
        planner: of the model.
        given: fields of `PlanOptions`; `checkpointing` and `experts_on` may be `auto`, `offload` None.
        card: None for one that holds everything.
    """
    auto_mode, auto_experts = given.get("checkpointing") == "auto", given.get("experts_on") == "auto"
    offload = given.get("offload")
    fixed = {"offload": bool(offload)}
    if auto_mode:
        fixed["checkpointing"] = "selective"  # type: ignore[assignment]
    if auto_experts:
        fixed["experts_on"] = "device"  # type: ignore[assignment]
    options = PlanOptions(**given | fixed)
    if card is None:
        return options
    options = replace(options, gpu_gib=card.gib)
    may_wait = auto_experts and options.gpus == 1 and options.checkpointing != "none"
    if may_wait and planner.weights(options).base.total() > (card.gib - 1) * GIB:
        options = replace(options, experts_on="host")
    if auto_mode:
        options = _choose_checkpointing(planner, options, offload, card)
    return options


def _choose_checkpointing(planner: Planner, options: PlanOptions, offload: bool | None, card: Card) -> PlanOptions:
    """As the recipe does: the first whose kept tensors take half of the free memory at most; the host has enough."""
    choices = [replace(options, checkpointing=mode) for mode in ("selective", "full")]
    for choice in choices:
        plan = planner.plan(choice)
        if not offload and plan.kept <= (card.gib * GIB - plan.held) / 2:
            return replace(choice, offload=False)
        if offload is None or offload:
            return replace(choice, offload=True)
    return choices[-1]


# In the order of what they cost; see `cheaper`.
def _steps(planner: Planner, options: PlanOptions) -> Iterator[tuple[str, dict[str, Any]]]:
    if options.checkpointing == "none":
        yield "--checkpointing selective", {"checkpointing": "selective"}
    if not options.offload:
        yield "--offload true", {"offload": True}
    if options.checkpointing != "full":
        yield "--checkpointing full", {"checkpointing": "full"}
    if options.is_sharded:
        return
    if options.optimizer != "adamw_8bit":
        yield "--optimizer adamw_8bit", {"optimizer": "adamw_8bit"}
    if options.quantize is None and (format := planner.smallest_format()):
        yield f"--quantize {format}", {"quantize": format}
    if options.experts_on == "device" and options.gpus == 1:
        yield "--experts-on host", {"experts_on": "host"}


def cheaper(planner: Planner, options: PlanOptions, card: Card) -> tuple[list[str], MemoryPlan] | None:
    """The first changes, in the order of what they cost, with which a step fits; None where none do.

    Of these those are left out, the costliest first, that it fits without. A shorter sequence comes last.
    """
    changes: dict[str, dict[str, Any]] = {}
    for name, change in _steps(planner, options):
        changes[name] = change
        if plan := _fitting(planner, options, changes, card):
            for each in reversed(list(changes)):
                fewer = {other: what for other, what in changes.items() if other != each}
                if shorter := _fitting(planner, options, fewer, card):
                    changes, plan = fewer, shorter
            return list(changes), plan
    changed = _changed(options, changes)
    longest = longest_tokens(planner, lambda tokens: replace(changed, tokens=tokens), card, options.tokens)
    if not longest:
        return None
    return [*changes, f"--tokens {longest}"], planner.plan(replace(changed, tokens=longest))


def _changed(options: PlanOptions, changes: dict[str, dict[str, Any]]) -> PlanOptions:
    return replace(options, **{field: value for change in changes.values() for field, value in change.items()})


def _fitting(
    planner: Planner, options: PlanOptions, changes: dict[str, dict[str, Any]], card: Card
) -> MemoryPlan | None:
    try:
        plan = planner.plan(_changed(options, changes))
    except ValueError:  # two that do not go together
        return None
    return plan if fits(plan, card) else None


# Lengths that are tried: a quarter of a power of two apart.
LENGTHS = [256 * (4 + quarter) * 2**power // 4 for power in range(12) for quarter in range(4)] + [2**20]


def longest_tokens(planner: Planner, options: Callable[[int], PlanOptions], card: Card, most: int = MOST_TOKENS) -> int:
    """The longest sequence of those tried with which a step fits a card; 0 where the shortest does not.

    Args:
        planner: of the model.
        options: of a step of so many tokens.
        card: that it is to fit.
        most: tokens that are tried.
    """
    lengths = [length for length in LENGTHS if length <= most]
    first, last = 0, len(lengths)
    while first < last:
        middle = (first + last) // 2
        if fits(planner.plan(options(lengths[middle])), card):
            first = middle + 1
        else:
            last = middle
    return lengths[first - 1] if first else 0
