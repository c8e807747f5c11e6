"""Verification: whether an exported adapter, or a merged model, computes as the trained model did.

Plain PEFT and Transformers load it; its logits are compared with those kept when training ended (reference_logits.py).
"""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lightning_moe.adapters.files import CONFIG, WEIGHTS
from lightning_moe.adapters.reference_logits import ReferenceLogits, evaluating, logits_of
from lightning_moe.quantization import FORMATS, QuantizedExpertsConfig, format_of_experts

# Errors are norms over all tokens and entries of the vocabulary, relative to that of the trained model's logits.
#
# What is rounding and what is not is measured: the base without an adapter is computed in both places, too. PEFT adds
# an update to a weight and rounds the sum, and the adapter's own products round: that comes to about as much again.
TIMES_BASE = 3
# At least, where the base is the same bit by bit: in float32 two layers that sum in another order are 2e-7 off, which
# leaves room for a hundred; in 16 bits four eps, since each layer's result is rounded by up to half of one.
AT_LEAST = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# At most: what is more is another base. A hundred layers round a thousand times by up to eps / 2, and roundings add up
# as a random walk: ten to twenty eps. In float32 there is room for more, and any other base is further off.
AT_MOST = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

# How much of the adapter's effect may be missing or too much: rounding averages out in a projection on it.
SHARE = 0.1

Outcome = Literal["same", "lost", "other_base", "other_format", "differs", "undecided"]


@dataclass(frozen=True)
class Verification:
    """What `verify_adapter` found. Prints as one sentence; `ok` says yes or no.

    Attributes:
        outcome: `same`, as the trained model; `lost`, as the base without the adapter; `other_base`, the base is not
            the one that was trained on; `other_format`, its experts were quantized and are not now, or the other way
            round; `differs`, otherwise; `undecided`, an adapter whose effect is as small as rounding.
        error: the norm of the logits' difference from the trained model's, relative to the norm of the latter.
        effect: the same for the trained model with and without its adapter.
        tolerance: how much of an error is rounding.
        base_error: the error of the base without adapters; None where no base was given.
        share: how much of the adapter's effect there is, by projection on it: 1 all, 0 nothing, 2 twice.
        largest: the largest difference of a logit.
        token: the first token where it differs, counted from 0.
        dtype: to which the coarser of both rounds.
        trained_on: the base that was trained on, in words.
        quantization: the format of the experts here; empty where they are dense.
    """

    outcome: Outcome
    error: float
    effect: float
    tolerance: float
    base_error: float | None
    share: float
    largest: float
    token: int
    dtype: torch.dtype
    trained_on: str
    quantization: str

    @property
    def ok(self) -> bool:
        """Whether it computes as the trained model."""
        return self.outcome == "same"

    def __str__(self) -> str:
        """The outcome, with its numbers."""
        dtype = str(self.dtype).removeprefix("torch.")
        rounding = f"rounding in {dtype}: up to {self.tolerance:.1e}"
        off = f"its logits are off by {self.error:.1e} of their norm ({rounding})"
        effect = f"the adapter's effect is {self.effect:.1e}"
        there = f"{self.share:.0%} of the adapter's effect is there"
        if self.outcome == "same":
            return f"yes, it computes as the trained model: {off}; {effect}, {self.share:.0%} of it is there"
        if self.outcome == "other_format":
            here = f"in {self.quantization}" if self.quantization else "dense"
            near = f"near the trained model ({self.trained_on}), not equal to it: its experts are {here}"
            return f"{near}, its logits are off by {self.error:.1e} of their norm; {effect}; {there}"
        if self.outcome == "lost":
            return f"no, the adapter is lost, it computes as the base without it: {off}; {effect}"
        if self.outcome == "other_base":
            limit = f"rounding in {dtype}: up to {AT_MOST[self.dtype]:.0e}"
            return (
                f"no, the base is not the one that was trained on ({self.trained_on}): without an adapter its logits "
                f"are off by {self.base_error:.1e} of their norm ({limit}); {there}"
            )
        if self.outcome == "undecided":
            return f"it cannot be told: {off}, and {effect}, no more than that"
        return (
            f"no, it differs from the trained model ({self.trained_on}): {off}; {effect}; {there}; "
            f"the largest difference is {self.largest:.2g}, the first is at token {self.token}"
        )


def verify_adapter(
    folder: str | os.PathLike[str],
    base: str | os.PathLike[str] | PreTrainedModel | None = None,
    *,
    reference: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Verification:
    """Whether an exported adapter, or a merged model, computes as the trained model did.

    Args:
        folder: of an adapter in PEFT's layout, `fused` or `per_expert`, or of a merged model.
        base: a folder or a hub name, or a model in memory without adapters, which an adapter is put on and left on. One
            by name is loaded with its experts quantized as in training. A merged model needs none; given one, rounding
            is measured on it.
        reference: the adapter's folder that holds the trained model's logits; by default `folder`.
        dtype: to load in; None for that of the files.
        device: to load to; None for a GPU where there is one.

    Raises:
        ValueError: on a folder that is neither, without the trained model's logits, or that cannot be loaded, on a base
            of another family, and on an adapter without a base.
    """
    folder = Path(folder)
    is_adapter = (folder / CONFIG).is_file()
    if not is_adapter and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds neither an adapter ({CONFIG}) nor a model (config.json)")
    if is_adapter and not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} lacks {WEIGHTS}")
    if is_adapter and base is None:
        raise ValueError(f"{folder} holds an adapter: name the base that it was trained on")
    kept = ReferenceLogits.read(Path(reference or folder))
    before = None
    if base is not None:
        model = base if isinstance(base, PreTrainedModel) else _load(base, kept, dtype, device)
        _check(model, kept)
        before = _run(model, kept)
    if not is_adapter:
        model = _load(folder, None, dtype, device)
        _check(model, kept)
        return _judge(kept, before, _run(model, kept), model)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*pattern keys did not match")  # of per_expert's; later they do
            adapted = PeftModel.from_pretrained(model, str(folder))
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, RuntimeError, KeyError, SafetensorError) as error:
        raise ValueError(f"PEFT cannot load {folder} onto this base: {_one_line(error)}") from error
    return _judge(kept, before, _run(adapted, kept), model)


def _load(
    name: str | os.PathLike[str],
    kept: ReferenceLogits | None,
    dtype: torch.dtype | None,
    device: str | torch.device | None,
) -> PreTrainedModel:
    """A model by Transformers, its experts quantized as those that `kept` is of."""
    options: dict[str, Any] = {}
    try:
        if kept is not None and kept.quantization in FORMATS:
            options["config"] = AutoConfig.from_pretrained(name, trust_remote_code=False, quantization_config=None)
            options["quantization_config"] = QuantizedExpertsConfig(kept.quantization, kept.quantizes_linear)
        return AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype or "auto", use_safetensors=True, trust_remote_code=False,
            device_map={"": device or ("cuda" if torch.cuda.is_available() else "cpu")}, **options,
        )  # fmt: skip
    except torch.OutOfMemoryError:
        raise
    except (ValueError, OSError, RuntimeError, AssertionError, KeyError, SafetensorError) as error:
        raise ValueError(f"Transformers cannot load {name}: {_one_line(error)}") from error


def _run(model: Any, kept: ReferenceLogits) -> Tensor:
    with evaluating(model):
        return logits_of(model, kept.input_ids, kept.vocabulary)


def _check(model: PreTrainedModel, kept: ReferenceLogits) -> None:
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("the base has adapters on it: give it without")
    if model.config.model_type != kept.model_type:
        raise ValueError(f"the adapter was trained on {kept.model_type}, and this is {model.config.model_type}")
    size = model.config.get_text_config().vocab_size
    if size <= max(kept.input_ids.max(), kept.vocabulary.max()):
        raise ValueError(f"the adapter was trained with a larger vocabulary than the {size} entries here")


def _judge(kept: ReferenceLogits, before: Tensor | None, after: Tensor, model: PreTrainedModel) -> Verification:
    """What the logits say.

    Args:
        kept: those of the trained model.
        before: those of the base, without an adapter, now; None where there is no base.
        after: those of the adapter on the base, or of the merged model, now.
        model: that computed them, or the base of it.
    """
    coarser = max(model.dtype, kept.dtype, key=lambda one: torch.finfo(one).eps)
    size = float(kept.trained.norm())
    update, wrong = kept.trained - kept.base, after - kept.trained
    effect, error = float(update.norm()) / size, float(wrong.norm()) / size
    base_error = None if before is None else float((before - kept.base).norm() / kept.base.norm())
    tolerance = AT_MOST[coarser] if base_error is None else max(AT_LEAST[coarser], TIMES_BASE * base_error)
    base = kept.base if before is None else before
    share = float(((after - base) * update).sum() / update.square().sum())
    outcome: Outcome = "same"
    if base_error is not None and not base_error <= AT_MOST[coarser]:
        outcome = "other_base"
    elif not error <= tolerance:
        outcome = "lost" if float((after - base).norm()) / size <= tolerance else "differs"
    elif effect <= 2 * tolerance:  # else a lost adapter would have shown
        outcome = "undecided"
    elif not abs(share - 1) <= SHARE:
        outcome = "differs"
    quantization = format_of_experts(model)
    if quantization != kept.quantization and outcome != "lost":
        outcome = "other_format"
    by_token = wrong.norm(dim=1) / kept.trained.norm(dim=1)
    quantized = f", experts in {kept.quantization}" if kept.quantization else ""
    return Verification(
        outcome, error, effect, tolerance, base_error,
        share=share,
        largest=float(wrong.abs().max()),
        token=int((by_token > tolerance).int().argmax() if (by_token > tolerance).any() else by_token.argmax()),
        dtype=coarser,
        trained_on=f"{kept.model_type}{quantized}",
        quantization=quantization,
    )  # fmt: skip


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
