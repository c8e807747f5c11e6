"""Patching: points a model's experts modules at the operation, and puts everything back.

The only writer of Transformers' private names. A decorated experts module looks up its forward in a registry under
`module.config._experts_implementation`, at every call. Patching registers one function there, `gategrad`, and gives
each module a copy of its config that names it; the model's own config, other models built from it and the state dict
stay untouched. What belongs to a layer's patch is one attribute on its module, which copies and pickles with it.
"""

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import StringIO
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lightning_moe.arguments import ChunkTokens, check_chunk_tokens, unsupported
from lightning_moe.discovery import (
    DOWN_BIAS,
    DownBias,
    TapeEstimate,
    content_refusal,
    estimate_tape,
    find_moe_layers,
    read_contract,
    refusal,
    stock_forward,
)
from lightning_moe.experts import moe_experts
from lightning_moe.health import LayerHealth

IMPLEMENTATION = "gategrad"
_PATCH = "_gategrad_patch"


@dataclass
class LayerPatch:
    """What a patched module carries.

    Attributes:
        config: the module's own config, to be put back; what stock code is, is read from it at every call.
        reason: why stock code runs, or None.
        down_bias: see `patch_moe`.
        chunk_tokens: see `moe_experts`.
        tape: what stock code and the operation keep for backward.
        health: the layer's counters.
    """

    config: Any
    reason: str | None = None
    down_bias: DownBias = "exact"
    chunk_tokens: ChunkTokens = "auto"
    tape: TapeEstimate = TapeEstimate(0, 0)
    health: LayerHealth = field(default_factory=LayerHealth)


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
    """

    name: str
    class_name: str
    status: Literal["active", "fallback"]
    reason: str = ""
    bytes_before: int | None = None
    bytes_after: int | None = None


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
        if self.fallback:
            table.add_column("reason", overflow="fold")
        groups: dict[tuple[Any, ...], list[str]] = {}
        for layer in self.layers:
            alike = (re.sub(r"\d+", "*", layer.name), layer.class_name, layer.status, layer.bytes_before,
                     layer.bytes_after, layer.reason)  # fmt: skip
            groups.setdefault(alike, []).append(layer.name)
        for (pattern, class_name, status, before, after, reason), names in groups.items():
            name = names[0] if len(names) == 1 else f"{pattern} ({len(names)} layers)"
            table.add_row(name, class_name, status, _kib(before), _kib(after), *[reason] * bool(self.fallback))
        return table


def _kib(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 1024:.1f}"


def patch_moe(model: nn.Module, *, down_bias: DownBias = "exact", chunk_tokens: ChunkTokens = "auto") -> PatchReport:
    """Makes every MoE layer of a model that can take the operation run it; the others keep stock code.

    Patching a patched model applies the new options. If patching fails, the model is as it was.

    Args:
        model: holds the layers, under any wrappers.
        down_bias: `"exact"` adds the bias's term to the gates' gradient; `"fallback"` runs stock code for a layer whose
            down projection has a bias.
        chunk_tokens: see `moe_experts`.

    Returns:
        Every MoE layer, what became of it and why.

    Raises:
        ValueError: on an option out of range.
    """
    check_options(down_bias=down_bias, chunk_tokens=chunk_tokens)
    unpatch_moe(model)
    reports = []
    try:
        for layer in find_moe_layers(model, down_bias=down_bias):
            before = after = None
            if layer.is_dispatched:
                patch = LayerPatch(layer.module.config, layer.reason, down_bias, chunk_tokens)
                if layer.reason is None:
                    patch.tape = estimate_tape(layer.module)
                    before, after = _per_token(patch)
                _attach(layer.module, patch)
            status: Literal["active", "fallback"] = "active" if layer.reason is None else "fallback"
            reports.append(
                LayerReport(layer.name, type(layer.module).__name__, status, layer.reason or "", before, after)
            )
    except BaseException:
        unpatch_moe(model)
        raise
    return PatchReport(tuple(reports))


def unpatch_moe(model: nn.Module) -> None:
    """Puts back what `patch_moe` changed. Does nothing to a model that is not patched."""
    for module in patched_modules(model):
        module.config = vars(module).pop(_PATCH).config  # type: ignore[assignment]


@contextmanager
def gategrad(
    model: nn.Module, *, down_bias: DownBias = "exact", chunk_tokens: ChunkTokens = "auto"
) -> Iterator[PatchReport]:
    """`patch_moe` on entering, `unpatch_moe` on leaving, also by an exception. Arguments as for `patch_moe`."""
    report = patch_moe(model, down_bias=down_bias, chunk_tokens=chunk_tokens)
    try:
        yield report
    finally:
        unpatch_moe(model)


@contextmanager
def stock_code(module: Any) -> Iterator[None]:
    """Has one experts module run what it would without its patch, if it carries one, inside the block."""
    config = module.config
    if _PATCH in vars(module):
        module.config = layer_patch(module).config
    try:
        yield
    finally:
        module.config = config


def check_options(*, down_bias: DownBias, chunk_tokens: ChunkTokens) -> None:
    """Raises ValueError on an option out of range, naming it."""
    if down_bias not in ("exact", "fallback"):
        raise ValueError(f"down_bias must be 'exact' or 'fallback', not {down_bias!r}")
    check_chunk_tokens(chunk_tokens)


def patched_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that carry a patch, active or not."""
    return [module for module in model.modules() if _PATCH in vars(module)]


def layer_patch(module: nn.Module) -> LayerPatch:
    """The patch that a module carries."""
    return vars(module)[_PATCH]


def _attach(module: Any, patch: LayerPatch) -> None:
    setattr(module, _PATCH, patch)
    module.config = copy.copy(patch.config)
    module.config._experts_implementation_internal = IMPLEMENTATION


def _per_token(patch: LayerPatch) -> tuple[int | None, int | None]:
    top_k = getattr(patch.config, "num_experts_per_tok", None)
    if not isinstance(top_k, int):
        return None, None
    return patch.tape.stock_per_row * top_k, patch.tape.kept_per_row * top_k


def _stock_experts(module: Any, config: Any, hidden_states: Tensor, top_k_index: Tensor, gates: Tensor) -> Tensor:
    """What the module would run if it had never been patched."""
    name = config._experts_implementation
    if name == IMPLEMENTATION:  # asked for by name, without patch_moe: Transformers' own default stands behind it
        name = "grouped_mm"
    stock = ALL_EXPERTS_FUNCTIONS.get_interface(name, stock_forward(module))
    return stock(module, hidden_states, top_k_index, gates)


@torch.compiler.disable
def gategrad_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts function in Transformers' signature, registered as `gategrad`.

    Runs the operation where it may, and otherwise what the layer had before; either is counted in backward. Compiled
    models break their graph here.

    Args:
        module: a decorated experts module, patched or only named `gategrad` in its config.
        hidden_states: (T, H).
        top_k_index: (T, K) integer.
        top_k_weights: (T, K) floating.

    Returns:
        (T, H).
    """
    is_patched = _PATCH in vars(module)
    patch = layer_patch(module) if is_patched else LayerPatch(module.config)
    gates = top_k_weights.view_as(top_k_weights)  # a tensor of our own, whose gradient is this layer's alone

    def stock(hidden_states: Tensor, top_k_index: Tensor, gates: Tensor) -> Tensor:
        return _stock_experts(module, patch.config, hidden_states, top_k_index, gates)

    contract = read_contract(module)
    reason = patch.reason or refusal(module, down_bias=patch.down_bias)
    if not is_patched:
        reason = reason or content_refusal(module)
    if reason is None:
        weights = contract.weights(module)
        reason = unsupported(weights.gate_up_proj, weights.down_proj)
    if reason is not None:
        if patch.reason is None:
            patch.reason = reason
            warnings.warn(f"{type(module).__name__} runs stock code after all: {reason}", stacklevel=2)
        output = stock(hidden_states, top_k_index, gates)
        patch.health.watch(output, gates, active=False, bias_fallback=reason == DOWN_BIAS)
        return output

    output = moe_experts(
        hidden_states,
        top_k_index,
        gates,
        **weights._asdict(),
        activation=contract.activation,
        is_transposed=contract.is_transposed,
        chunk_tokens=patch.chunk_tokens,
    )
    saved = (patch.tape.stock_per_row - patch.tape.kept_per_row) * top_k_index.numel()
    patch.health.watch(output, gates, active=True, tape_bytes_saved=saved)
    if patch.health.audit_due:
        patch.health.audit(stock, hidden_states, top_k_index, gates, output)
    return output


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, gategrad_experts)
