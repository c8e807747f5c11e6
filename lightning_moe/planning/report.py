"""What `plan` says: a plan, whether it fits which cards, with what options, how long, how fast; as tables and JSON."""

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_moe.planning.cards import SIZES, Card, cheaper, fits, longest_tokens, settle
from lightning_moe.planning.options import MOST_TOKENS, PlanOptions
from lightning_moe.planning.speed import Roofline, roofline
from lightning_moe.planning.step import GIB, MemoryPlan, Planner, stored_format


@dataclass(frozen=True)
class Verdict:
    """On one card.

    Attributes:
        card: the card.
        fits: whether the step fits, with what is `auto` chosen for this card.
        changes: the options with which it does: what was chosen, or what has to change; None where none do.
        peak: bytes, with these.
        host: bytes of page-locked memory, with these.
    """

    card: Card
    fits: bool
    changes: list[str] | None
    peak: int
    host: int


@dataclass(frozen=True)
class Report:
    """All that is said of a plan.

    Attributes:
        plan: the plan.
        verdicts: on cards of the usual sizes.
        chosen: on the card that was named, if one was.
        longest: the longest sequence that fits it.
        speed: of a step there.
    """

    plan: MemoryPlan
    verdicts: list[Verdict]
    chosen: Verdict | None
    longest: int | None
    speed: Roofline | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `fits`, `longest_tokens` and `seconds_per_step` are null where no card was named."""
        verdicts = {f"{size}": _verdict(verdict) for size, verdict in zip(SIZES, self.verdicts, strict=True)}
        chosen = None if self.chosen is None else {"card": self.chosen.card.name, **_verdict(self.chosen)}
        return self.plan.as_dict() | {
            "fits": None if self.chosen is None else self.chosen.fits,
            "gpu": chosen,
            "longest_tokens": self.longest,
            "seconds_per_step": None if self.speed is None else round(self.speed.seconds, 3),
            "cards_gb": verdicts,
        }


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "card_gib": verdict.card.gib, "fits": verdict.fits, "fits_with": verdict.changes,
        "peak_gib": round(verdict.peak / GIB, 3), "host_gib": round(verdict.host / GIB, 3),
    }  # fmt: skip


def make_report(planner: Planner, given: dict[str, Any], card: Card | None) -> Report:
    """Plans a step, and looks at each card.

    Args:
        planner: of the model.
        given: see `settle`.
        card: that was named.
    """
    options = settle(planner, given, card)
    plan = planner.plan(options)
    longest = None
    if card is not None:
        is_left = given.get("checkpointing") == "auto" and given.get("offload") is None
        offloaded = given | ({"offload": True} if is_left else {})
        longest = longest_tokens(
            planner, lambda tokens: settle(planner, offloaded | {"tokens": tokens}, card), card,
            MOST_TOKENS // options.batch,
        )  # fmt: skip
    return Report(
        plan=plan,
        verdicts=[_judge(planner, given, Card(f"{size} GB", gib)) for size, gib in SIZES.items()],
        chosen=None if card is None else _judge(planner, given, card),
        longest=longest,
        speed=None if card is None else roofline(planner, options, plan, card),
    )


def _judge(planner: Planner, given: dict[str, Any], card: Card) -> Verdict:
    options = settle(planner, given, card)
    plan = planner.plan(options)
    chosen = {"--experts-on host": options.experts_on == "host" and given.get("experts_on") == "auto",
              "--checkpointing full": options.checkpointing == "full" and given.get("checkpointing") == "auto",
              "--offload true": options.offload and given.get("offload") is None}  # fmt: skip
    by_itself = [name for name, is_chosen in chosen.items() if is_chosen]
    if fits(plan, card):
        return Verdict(card, True, by_itself, plan.peak, sum(plan.host.values()))
    found = cheaper(planner, options, card)
    if found is None:
        return Verdict(card, False, None, plan.peak, sum(plan.host.values()))
    changes, changed = found
    return Verdict(card, False, by_itself + changes, changed.peak, sum(changed.host.values()))


def show(report: Report, planner: Planner, console: Console, model: str) -> None:
    """Prints the tables."""
    plan = report.plan
    options = plan.options
    gpus = f", each of {options.gpus} GPUs ({options.strategy})" if options.gpus > 1 else ""
    console.print(f"{model}: {options.batch} x {options.tokens:,} tokens{gpus}. Planned, not measured.", soft_wrap=True)
    console.print(_describe(options), soft_wrap=True)
    table = _table("what holds the card's memory at its peak", "GiB")
    for name, size in plan.parts.items():
        table.add_row(name, f"{size / GIB:.2f}")
    table.add_section()
    table.add_row(f"peak, in {plan.moment}", f"{plan.peak / GIB:.2f}")
    table.add_row("of it above what is held between steps", f"{plan.above / GIB:.2f}")
    console.print(table)
    table = _table("beside the card", "GiB")
    for name, size in plan.host.items():
        table.add_row(f"page-locked host memory: {name}", f"{size / GIB:.2f}")
    format = stored_format(planner.config) or "16 bits"
    table.add_row(f"disk: the base's checkpoint in {format}", f"{plan.checkpoint / GIB:.2f}")
    console.print(table)
    table = _table("card", "GiB for it", "fits", "peak GiB", "host GiB")
    chosen = [] if report.chosen is None else [report.chosen]
    for verdict in [*report.verdicts, *chosen]:
        said = "yes" * verdict.fits + ", " * bool(verdict.fits and verdict.changes)
        said += "no" if verdict.changes is None else f"with {' '.join(verdict.changes)}" * bool(verdict.changes)
        sizes = (f"{size / GIB:.2f}" for size in (verdict.peak, verdict.host))
        table.add_row(verdict.card.name, f"{verdict.card.gib:g}", said, *sizes)
    console.print(table)
    if report.chosen is not None:
        longest = f"{report.longest:,} tokens" if report.longest else "none"
        console.print(
            f"The longest sequence that fits {report.chosen.card.name}, offloaded where that is left to the recipe: "
            f"{longest}.",
            soft_wrap=True,
        )
    if report.speed is not None and report.chosen is not None:
        speed = report.speed
        console.print(
            f"A step takes some {speed.seconds:.2g} s there, an estimate by roofline: products {speed.products:.2g}, "
            f"attention {speed.attention:.2g} (windows not counted), memory {speed.memory:.2g}; beside them copies "
            f"{speed.link:.2g}, the host's calls {speed.host:.2g}.",
            soft_wrap=True,
        )


def _describe(options: PlanOptions) -> str:
    adapted = "attention and experts" if options.experts else "attention"
    offloaded = ", what it keeps in host memory" * options.offload
    place = "in host memory" if options.experts_on == "host" else "on the card"
    return (
        f"LoRA r={options.rank} on {adapted}, router {options.router}; experts in {options.quantize or options.dtype} "
        f"{place}; checkpointing {options.checkpointing}{offloaded}; {options.optimizer}."
    )


def _table(first: str, *numbers: str) -> Table:
    table = Table()
    table.add_column(first, overflow="fold")
    for number in numbers:
        table.add_column(number, justify="left" if number == "fits" else "right", overflow="fold")
    return table
