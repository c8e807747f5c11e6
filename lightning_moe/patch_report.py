"""What patching reports of a model: every MoE layer, what became of it and why. Prints as a table."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any, Literal, overload

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_moe.integrations.unsupported import Unsupported


@dataclass(frozen=True)
class LayerReport:
    """One MoE layer and what became of it.

    Attributes:
        name: its path in the model.
        class_name: the experts module's class.
        status: `active` if it runs the operation, `fallback` if it runs the default implementation.
        reason: why the default implementation runs; None for an active layer.
        baseline_bytes: estimated bytes per token that the default grouped_mm saves for backward; None where unknown.
        saved_bytes: the same with the operation.
        merged_bytes: estimated bytes, whatever the tokens, that merged adapters would save and unmerged ones do not.
        has_adapters: whether PEFT has adapters on the experts.
        adapter_reasons: why PEFT merges some of them; empty where all stay unmerged.
    """

    name: str
    class_name: str
    status: Literal["active", "fallback"]
    reason: Unsupported | None = None
    baseline_bytes: int | None = None
    saved_bytes: int | None = None
    merged_bytes: int = 0
    has_adapters: bool = False
    adapter_reasons: tuple[Unsupported, ...] = ()

    @property
    def adapters(self) -> str:
        """What becomes of PEFT's adapters on the experts; empty where there are none."""
        if self.adapter_reasons:
            return "PEFT merges them: " + "; ".join(map(str, self.adapter_reasons))
        saving = f"; merged, they would save {self.merged_bytes / 2**20:.1f} MiB more" * bool(self.merged_bytes)
        return f"unmerged{saving}" if self.has_adapters else ""


class PatchReport(Sequence[LayerReport]):
    """Every MoE layer that patching saw. Prints as a table in which layers that differ only by number share a row.

    Args:
        layers: in the model's order.
    """

    def __init__(self, layers: Sequence[LayerReport]) -> None:
        self._layers = tuple(layers)

    @overload
    def __getitem__(self, index: int) -> LayerReport: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[LayerReport]: ...

    def __getitem__(self, index: int | slice) -> LayerReport | Sequence[LayerReport]:
        """One layer, or some."""
        return self._layers[index]

    def __len__(self) -> int:
        """The number of MoE layers."""
        return len(self._layers)

    @property
    def active(self) -> tuple[LayerReport, ...]:
        """The layers that run the operation."""
        return tuple(layer for layer in self if layer.status == "active")

    @property
    def fallback(self) -> tuple[LayerReport, ...]:
        """The layers that run the default implementation."""
        return tuple(layer for layer in self if layer.status == "fallback")

    @property
    def merging(self) -> tuple[LayerReport, ...]:
        """The layers in which PEFT merges adapters into a weight."""
        return tuple(layer for layer in self if layer.adapter_reasons)

    def __str__(self) -> str:
        """The report as a plain-text table, wide enough that nothing is cut."""
        console = Console(file=StringIO(), width=160, color_system=None)
        console.print(self)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]

    def __rich__(self) -> Table:
        """The report as a table for rich."""
        title = f"MoE layers: {len(self.active)} active, {len(self.fallback)} fallback; saved for backward per token"
        table = Table(title=title, title_justify="left", title_style="bold")
        for header in ("layer", "class", "status"):
            table.add_column(header, overflow="fold")
        for header in ("baseline", "now"):
            table.add_column(f"{header},\nKiB/token", justify="right")
        has_adapters = any(layer.adapters for layer in self)
        if has_adapters:
            table.add_column("adapters", overflow="fold")
        if self.fallback:
            table.add_column("reason", overflow="fold")
        rows: dict[tuple[str, ...], list[str]] = {}
        for layer in self:
            shown = layer.name.replace(".base_layer", "")
            cells = [layer.class_name, layer.status, _kib(layer.baseline_bytes), _kib(layer.saved_bytes)]
            cells += [layer.adapters] * has_adapters + [str(layer.reason or "")] * bool(self.fallback)
            rows.setdefault((re.sub(r"\d+", "*", shown), *cells), []).append(shown)
        for (pattern, *shared), names in rows.items():
            name = names[0] if len(names) == 1 else f"{pattern} ({len(names)} layers)"
            table.add_row(*map(Text, (name, *shared)))  # brackets in a reason are no markup
        return table


def _kib(num_bytes: Any) -> str:
    return "" if num_bytes is None else f"{num_bytes / 1024:.1f}"
