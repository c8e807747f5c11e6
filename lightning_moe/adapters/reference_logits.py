"""Reference logits: what a trained model answers to a few fixed tokens, with its adapter and without, kept beside it.

They lie in a folder of their own: SGLang reads every *.safetensors file beside an adapter as a part of it, and vLLM
every one beside a model of one file.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_moe.quantization import format_of_experts

REFERENCE = Path("reference", "logits.safetensors")

# At 64 tokens and 8 of 128 experts each, an even router leaves 2 % of the experts without a token.
NUM_TOKENS = 64
MAX_VOCABULARY = 4096  # two times 64 x 4096 float32: 2 MiB

# What a float32 product rounds its operands to on a GPU, by torch.get_float32_matmul_precision: TF32 has as many bits
# of a fraction as float16.
PRODUCTS = {"highest": torch.float32, "high": torch.float16, "medium": torch.bfloat16}


@dataclass(frozen=True)
class ReferenceLogits:
    """What a trained model answered.

    Attributes:
        input_ids: (1, T) int64.
        vocabulary: (V,) int64, the entries of the vocabulary whose logits are kept.
        trained: (T, V) float32, of the trained model.
        base: (T, V) float32, of the same model with its adapter disabled.
        model_type: Transformers' name of the base model's family.
        dtype: that the trained model's products round to.
        quantization: the format of the base's experts; empty where they are dense.
        quantizes_linear: whether other linear layers of the base are quantized too.
    """

    input_ids: Tensor
    vocabulary: Tensor
    trained: Tensor
    base: Tensor
    model_type: str
    dtype: torch.dtype
    quantization: str = ""
    quantizes_linear: bool = False

    @classmethod
    def compute(cls, model: nn.Module) -> "ReferenceLogits":
        """The logits of the one PEFT model inside `model`, which is left as it was; on its device, as autocast has it.

        Raises:
            ValueError: where a logit is not finite.
            Exception: whatever the model raises.
        """
        found = next(module for module in model.modules() if isinstance(module, PeftModel))
        base: Any = found.get_base_model()
        input_ids, vocabulary = _draw(base.config)
        with evaluating(found):
            trained = logits_of(found, input_ids, vocabulary)
            with found.disable_adapter():
                without = logits_of(found, input_ids, vocabulary)
        if not (trained.isfinite().all() and without.isfinite().all()):
            raise ValueError("some of the trained model's logits are not finite")
        return cls(
            input_ids, vocabulary, trained, without,
            model_type=base.config.model_type,
            dtype=_rounds_to(base),
            quantization=format_of_experts(base),
            quantizes_linear=bool(getattr(getattr(base.config, "quantization_config", None), "linear", False)),
        )  # fmt: skip

    def save(self, folder: Path) -> None:
        """Writes them into an adapter's folder, wholly or not at all. Raises OSError where it cannot."""
        tensors = {name: value.contiguous() for name, value in vars(self).items() if isinstance(value, Tensor)}
        metadata = {
            "model_type": self.model_type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "quantization": self.quantization,
            "quantizes_linear": str(self.quantizes_linear),
        }
        with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
            try:
                save_file(tensors, Path(partial, REFERENCE.name), metadata)
            except SafetensorError as error:
                raise OSError(f"{folder / REFERENCE} cannot be written: {error}") from error
            (folder / REFERENCE).parent.mkdir(exist_ok=True)
            os.replace(Path(partial, REFERENCE.name), folder / REFERENCE)

    @classmethod
    def read(cls, folder: Path) -> "ReferenceLogits":
        """Those in an adapter's folder. Raises ValueError where there are none, or they are damaged."""
        path = folder / REFERENCE
        if not path.is_file():
            raise ValueError(
                f"{folder} has no {REFERENCE}, the trained model's logits: AdapterExport writes them into an adapter's "
                "folder when a fit ends. Name such a folder as the reference"
            )
        try:
            with safe_open(path, "pt") as file:
                tensors, said = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
            names = ("input_ids", "vocabulary", "trained", "base")
            input_ids, vocabulary, trained, base = (tensors[name] for name in names)
            shape = input_ids.shape[1], *vocabulary.shape
            dtype = getattr(torch, said["dtype"])
            if not (input_ids.shape[0] == 1 and trained.shape == base.shape == shape and dtype in PRODUCTS.values()):
                raise ValueError(f"shapes {[tuple(tensors[name].shape) for name in names]}, {dtype}")
            return cls(
                input_ids, vocabulary, trained, base, said["model_type"], dtype, said["quantization"],
                said["quantizes_linear"] == "True",
            )  # fmt: skip
        except (SafetensorError, KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Has a model compute in eval mode and without gradients, and leaves its modes and what it trains as they were."""
    modes = {module: module.training for module in model.modules()}
    trains = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, requires_grad in trains.items():
            if parameter.requires_grad != requires_grad:  # PEFT sets it where it disables and enables adapters
                parameter.requires_grad_(requires_grad)


def logits_of(model: Any, input_ids: Tensor, vocabulary: Tensor) -> Tensor:
    """A causal language model's logits for these entries of the vocabulary, (T, V) float32 on the host."""
    device = model.device
    logits = model(input_ids=input_ids.to(device)).logits
    return logits[0][:, vocabulary.to(logits.device)].float().cpu()


def _draw(config: Any) -> tuple[Tensor, Tensor]:
    """Token ids, and the entries of the vocabulary to keep: the same at each call.

    Ids that the configuration names, such as padding's or an image's, are left out: a model may treat them otherwise.
    """
    size = config.get_text_config().vocab_size
    fields = config.to_dict() | config.get_text_config().to_dict()
    named = [value for name, value in fields.items() if name.endswith("token_id")]
    special = {one for value in named for one in (value if isinstance(value, list) else [value])}
    plain = torch.tensor([token for token in range(size) if token not in special])
    generator = torch.Generator().manual_seed(0)
    input_ids = plain[torch.randint(len(plain), (1, NUM_TOKENS), generator=generator)]
    return input_ids, torch.randperm(size, generator=generator)[:MAX_VOCABULARY].sort().values


def _rounds_to(base: Any) -> torch.dtype:
    kind = base.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    if base.dtype == torch.float32 and kind == "cuda":
        return PRODUCTS[torch.get_float32_matmul_precision()]
    return base.dtype
