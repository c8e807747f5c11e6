"""What patching says of a model: every MoE layer, what became of it and why; prints as a table."""

import re
from dataclasses import dataclass
from io import StringIO
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

APART = "apart"


@dataclass(frozen=True)
class LayerReport:
    """One MoE layer and what became of it.

    Attributes:
        name: its path in the model.
        class_name: the experts module's class.
        status: `active` if its gate gradient comes from the identity, `fallback` if stock code runs.
        reason: why stock code runs; empty for an active layer.
        bytes_before: estimated bytes per token that stock grouped_mm keeps for backward; None where unknown.
        bytes_after: the same with the operation.
        adapters: what becomes of PEFT's adapters on the experts: `apart`, or why PEFT merges them into the weight;
            empty where there are none.
        bytes_merged: estimated bytes, whatever the tokens, that the merged weights would keep and `apart` does not.
    """

    name: str
    class_name: str
    status: Literal["active", "fallback"]
    reason: str = ""
    bytes_before: int | None = None
    bytes_after: int | None = None
    adapters: str = ""
    bytes_merged: int = 0


@dataclass(frozen=True)
class PatchReport:
    """Every MoE layer that patching saw. Prints as a table in which layers that differ only by number share a line."""

    layers: tuple[LayerReport, ...]

    @property
    def active(self) -> tuple[LayerReport, ...]:
        """The layers whose gate gradient comes from the identity."""
        return tuple(layer for layer in self.layers if layer.status == "active")

    @property
    def fallback(self) -> tuple[LayerReport, ...]:
        """The layers that run stock code."""
        return tuple(layer for layer in self.layers if layer.status == "fallback")

    @property
    def merging(self) -> tuple[LayerReport, ...]:
        """The layers in which PEFT merges adapters into a weight."""
        return tuple(layer for layer in self.layers if layer.adapters not in ("", APART))

    def __str__(self) -> str:
        """The report as a plain-text table, wide enough that nothing is cut."""
        console = Console(file=StringIO(), width=160, color_system=None)
        console.print(self)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]

    def __rich__(self) -> Table:
        """The report as a table for rich."""
        title = (
            f"MoE layers: {len(self.active)} active, {len(self.fallback)} fallback; bytes kept for backward per token"
        )
        table = Table(title=title, title_justify="left", title_style="bold")
        for header in ("layer", "class", "status"):
            table.add_column(header, overflow="fold")
        for header in ("stock", "now"):
            table.add_column(f"{header},\nKiB/token", justify="right")
        has_adapters = any(layer.adapters for layer in self.layers)
        if has_adapters:
            table.add_column("adapters", overflow="fold")
        if self.fallback:
            table.add_column("reason", overflow="fold")
        groups: dict[tuple[Any, ...], list[str]] = {}
        for layer in self.layers:
            shown = layer.name.replace(".base_layer", "")
            alike = (re.sub(r"\d+", "*", shown), layer.class_name, layer.status, layer.bytes_before,
                     layer.bytes_after, layer.adapters, layer.bytes_merged, layer.reason)  # fmt: skip
            groups.setdefault(alike, []).append(shown)
        for (pattern, class_name, status, before, after, adapters, merged, reason), names in groups.items():
            name = names[0] if len(names) == 1 else f"{pattern} ({len(names)} layers)"
            if merged:
                adapters += f"; merged, they would keep {merged / 2**20:.1f} MiB more"
            optional = [adapters] * has_adapters + [reason] * bool(self.fallback)
            cells = (name, class_name, status, _kib(before), _kib(after), *optional)
            table.add_row(*map(Text, cells))  # brackets in a reason are no markup
        return table


def _kib(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 1024:.1f}"
