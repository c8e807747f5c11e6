"""Experts' weights in fewer bits, in memory or while a checkpoint is loaded; `ops.quantized` has what they become."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config

from lightning_moe.discovery import find_moe_layers
from lightning_moe.integrations import bitsandbytes_nf4
from lightning_moe.integrations.transformers_experts import read_flags, read_spec
from lightning_moe.integrations.transformers_quantizer import METHOD, LoadedQuantizedConfig
from lightning_moe.ops.fp8 import FP8
from lightning_moe.ops.mxfp4 import MXFP4
from lightning_moe.ops.nf4 import NF4
from lightning_moe.ops.quantized import QuantizedWeight

FORMATS: dict[str, NF4 | FP8 | MXFP4] = {format.name: format for format in (NF4(), FP8(), MXFP4())}


def quantize(weight: Tensor, format: str, is_transposed: bool = False) -> QuantizedWeight:
    """A frozen weight in fewer bits, on its device.

    Args:
        weight: (E, out, in), floating.
        format: see `quantize_experts`.
        is_transposed: whether the weight is (E, in, out), as gpt-oss's. The 32 values of `mxfp4` lie along `in`.

    Raises:
        ValueError: on another format, or a shape that it does not take.
        ModuleNotFoundError: where bitsandbytes, which makes nf4, is not installed.
    """
    chosen = choose_format(format, is_transposed)
    if problem := chosen.shape_problem(tuple(weight.shape)):
        raise ValueError(f"a weight cannot be quantized to {format}: {problem}")
    if isinstance(chosen, NF4):
        bitsandbytes_nf4.check_installed()
        parts = bitsandbytes_nf4.encode(weight)
    else:
        parts = chosen.encode(weight)
    return QuantizedWeight(chosen, parts, tuple(weight.shape), weight.dtype)


def quantize_experts(model: nn.Module, format: str = "nf4") -> list[str]:
    """Replaces the weights of a model's experts by frozen ones in fewer bits, layer by layer.

    Adapters are put on afterwards. The model's other weights stay as they are. Patched (`patch_moe`,
    `MoEGateGradCallback`), a layer makes a projection dense when it is used and keeps nothing dense; unpatched it
    computes with dense copies, which backward saves.

    >>> from lightning_moe import quantize_experts
    >>> from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    >>> config = Qwen3MoeConfig(vocab_size=256, hidden_size=64, num_hidden_layers=1, num_experts=8)
    >>> model = Qwen3MoeForCausalLM(config)
    >>> quantize_experts(model, "mxfp4")
    ['model.layers.0.mlp.experts.gate_up_proj', 'model.layers.0.mlp.experts.down_proj']

    Args:
        model: in memory, on the device where it will train or on the host; its experts in Transformers' layout.
        format: `nf4`, bitsandbytes' four bits with blocks of 64 values and nested absmax: 0.516 bytes a value, 9.2 %
            off a normal distribution; `mxfp4`, four bits with a power of two for each 32: 0.531 bytes, 11.5 %; `fp8`,
            float8_e4m3fn with a scale for each 128 x 128: 1 byte, 2.6 %.

    Returns:
        The names of the parameters that are quantized now.

    Raises:
        ValueError: on another format, a model without such experts, or one in which some would stay dense, with their
            names; then nothing is changed.
        ModuleNotFoundError: where bitsandbytes, which makes nf4, is not installed.
    """
    names = find_quantizable(model, format)
    for name in names:
        path, _, stem = name.rpartition(".")
        module = model.get_submodule(path)
        weight = getattr(module, stem)
        if not isinstance(weight, QuantizedWeight):
            packed = quantize(weight, format, read_flags(module).is_transposed)
            setattr(module, stem, nn.Parameter(packed, requires_grad=False))
    return names


def find_quantizable(model: nn.Module, format: str) -> list[str]:
    """The names of the parameters that `quantize_experts` quantizes, and its ValueErrors; the model may be on meta."""
    check_format(format)
    layers = find_moe_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no experts to quantize")
    dense = [f"{x.shown_name} ({x.reason})" for x in layers if x.reason is not None or not x.is_dispatched]
    if dense:
        raise ValueError(f"experts that would stay dense: {'; '.join(dense)}")
    names = [f"{layer.name}.{stem}" for layer in layers for stem in read_spec(layer.module).stems]
    for name in names:
        shape = tuple(model.get_parameter(name).shape)
        if problem := format_of_parameter(model, name, format).shape_problem(shape):
            raise ValueError(f"{name} cannot be quantized to {format}: {problem}")
    return names


def format_of_experts(model: nn.Module) -> str:
    """The format that a model's experts are quantized to; empty where they are dense."""
    formats = [tensor.format.name for tensor in model.parameters() if isinstance(tensor, QuantizedWeight)]
    return formats[0] if formats else ""


def check_format(format: str) -> None:
    """Raises ValueError on a format that there is not."""
    if format not in FORMATS:
        raise ValueError(f"experts can be quantized to {', '.join(FORMATS)}, not to {format!r}")


def format_of_parameter(model: nn.Module, name: str, format: str) -> NF4 | FP8 | MXFP4:
    """The format of that name in the layout of an experts' parameter; the model may be on meta."""
    return choose_format(format, read_flags(model.get_submodule(name.rpartition(".")[0])).is_transposed)


def choose_format(name: str, is_transposed: bool) -> NF4 | FP8 | MXFP4:
    """The format of that name, of weights (E, out, in) or, transposed, (E, in, out); ValueError if there is none."""
    check_format(name)
    return MXFP4(is_transposed) if name == MXFP4.name else FORMATS[name]


@register_quantization_config(METHOD)
class QuantizedExpertsConfig(LoadedQuantizedConfig):
    """Has a checkpoint's experts quantized while it is loaded, each parameter as soon as its tensors are read.

    Neither the device nor the host ever holds the dense model. For a checkpoint in 16 or 32 bits, one weight for each
    expert or fused. What is not quantized is loaded as without. `save_pretrained` raises: save the adapters.

    >>> import tempfile, torch
    >>> from lightning_moe import QuantizedExpertsConfig
    >>> from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
    >>> config = Qwen3MoeConfig(vocab_size=256, hidden_size=64, num_hidden_layers=1, num_experts=8)
    >>> with tempfile.TemporaryDirectory() as checkpoint:  # or a name on the hub
    ...     Qwen3MoeForCausalLM(config).save_pretrained(checkpoint)
    ...     model = AutoModelForCausalLM.from_pretrained(
    ...         checkpoint, dtype=torch.bfloat16, quantization_config=QuantizedExpertsConfig("mxfp4")
    ...     )
    >>> model.model.layers[0].mlp.experts.down_proj.format.name
    'mxfp4'

    A checkpoint whose experts are in the format already is loaded as it is, nothing is quantized again, and what it has
    dense stays dense:

    - nf4, as bitsandbytes quantized them one by one. Linear layers in nf4 become bitsandbytes' own, with `linear` or
      without. Routers in nf4, as Transformers 4 and bitsandbytes made them, become dense.
    - fp8, as Qwen3-30B-A3B-FP8 has them, with a scale for each block of 128 x 128. Linear layers in fp8 become dense.
    - mxfp4, as gpt-oss has them.

    Transformers refuses another configuration than the checkpoint's own ("you are passing a QuantizedExpertsConfig"):
    leave that one out, with `config=AutoConfig.from_pretrained(name, quantization_config=None)`.

    Args:
        format: of the experts, see `quantize_experts`.
        linear: has the other linear layers become bitsandbytes' own, in nf4 with nested absmax and computing in
            bfloat16, all but the output's and those of the routers.
        quant_method: as Transformers writes it into a model's config.

    Raises:
        ValueError: on another format. `from_pretrained` raises it, before any weight is read, where `quantize_experts`
            would, and where a quantized checkpoint cannot be loaded as it is.
    """

    quant_method: Any

    def __init__(self, format: str = "nf4", linear: bool = False, quant_method: str = METHOD) -> None:
        check_format(format)
        self.format, self.linear, self.quant_method = format, linear, quant_method

    @property
    def bytes_per_value(self) -> float:  # type: ignore[override]
        """What a value of an expert's weight takes."""
        return FORMATS[self.format].bytes_per_value

    def find_parameters(self, model: nn.Module) -> list[str]:
        """The names of the parameters to quantize, in a model on the meta device. Raises ValueError if it cannot be."""
        return find_quantizable(model, self.format)

    def allocate(self, model: nn.Module, device_of: Callable[[str], torch.device]) -> dict[str, QuantizedWeight]:
        """Memory for the parameters to quantize, side by side, before dense ones come and go and leave holes there.

        `from_pretrained` has it for experts that it quantizes, not for those of a checkpoint that is quantized already.

        Args:
            model: on the meta device.
            device_of: where a parameter goes, by its name.

        Returns:
            For each name a weight whose values are still to be written, see `QuantizedWeight.copy_into`.
        """
        room = {}
        for name in self.find_parameters(model):
            parameter, format = model.get_parameter(name), format_of_parameter(model, name, self.format)
            room[name] = QuantizedWeight.empty(format, tuple(parameter.shape), parameter.dtype, device_of(name))
        return room

    def quantize(self, weight: Tensor, is_transposed: bool) -> QuantizedWeight:
        """What takes the weight's place."""
        return quantize(weight, self.format, is_transposed)
