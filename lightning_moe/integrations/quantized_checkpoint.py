"""Checkpoints that bitsandbytes quantized, one matrix for each expert: what is in them, and how it becomes parameters.

Transformers collects the tensors of a parameter by the patterns of a `WeightConverter`, and calls its operations with
them. Here they join the experts' bytes; nothing is made dense.

Read in Transformers 5.17 to 5.24: `rename_source_key`, what operations are called with, and `hf_quantizer`, by which
those are told that take a checkpoint's tensors in the dtype that they have there.
"""

import re
from collections.abc import Iterable
from typing import Any, Self

from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.base import HfQuantizer

from lightning_moe.integrations.bitsandbytes_nf4 import COMPANIONS, check_matrix, fuse

COMPANION = re.compile(rf"(.+)\.({'|'.join(map(re.escape, COMPANIONS))})")
DENSE = ("F16", "BF16", "F32", "F64")  # as safetensors calls them
REMEDY = "Load the 16-bit checkpoint: its experts are quantized while it is loaded"


def find_quantized(model: PreTrainedModel, files: Iterable[str], experts: list[str]) -> set[str] | None:
    """The modules beside the experts whose weight a checkpoint has in nf4; None if it has nothing in nf4.

    Args:
        model: on the meta device.
        files: of the checkpoint; those that are no safetensors hold nothing quantized.
        experts: the names of the experts' parameters.

    Raises:
        ValueError: with a tensor's name and the remedy, if weights are quantized otherwise, lack a part, or only some
            experts are quantized.
    """
    dtypes, states = _read_headers(files)
    matches = filter(None, map(COMPANION.fullmatch, dtypes))
    quantized = {match[1] for match in matches}
    parameters = _parameters(model, quantized | {key for key in dtypes if not COMPANION.fullmatch(key)})
    experts_keys = [key for key, parameter in parameters.items() if parameter in experts]
    if not experts_keys and (odd := sorted(key for key in dtypes if dtypes[key] not in DENSE)):
        raise ValueError(
            f"the checkpoint has nothing that becomes {experts[0]}, and {odd[0]} in {dtypes[odd[0]]}: it is "
            f"quantized, and not in bitsandbytes' nf4. {REMEDY}"
        )
    floating = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for key, parameter in parameters.items():
        is_dense = dtypes.get(key) in DENSE or parameter not in floating
        if key not in quantized and (not is_dense or (quantized and parameter in experts)):
            raise ValueError(
                f"{key} is {dtypes[key]} in a checkpoint with quantized weights, and not in bitsandbytes' nf4 with its "
                f"{key}.absmax. {REMEDY}"
            )
    for key in sorted(quantized):
        try:
            check_matrix(key, dtypes, states)
        except ValueError as error:
            raise ValueError(f"{error}. {REMEDY}") from error
    others = parameters.keys() & quantized - set(experts_keys)
    return {parameters[key].removesuffix(".weight") for key in others} if quantized else None


def _read_headers(files: Iterable[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The dtypes of a checkpoint's tensors, by name, and those tensors that say how others are quantized."""
    dtypes, states = {}, {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            continue
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                dtypes[key] = opened.get_slice(key).get_dtype()
                if ".quant_state." in key:
                    states[key] = opened.get_tensor(key)
    return dtypes, states


def _parameters(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """The parameter of the model that each of a checkpoint's tensors goes into, where there is one."""
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    parameters = model.state_dict()
    found = {}
    for key in sorted(keys):
        name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
        if name in parameters or key in parameters:
            found[key] = name if name in parameters else key
    return found


def fusing(converter: WeightConverter, hf_quantizer: HfQuantizer) -> WeightConverter:
    """The converter that joins, in nf4, what another one joins dense."""
    # The longest first: of the sources that match a tensor's name, Transformers takes the first.
    sources = [f"{source}.{each}" for source in converter.source_patterns for each in COMPANIONS]
    fused = WeightConverter(
        [*sources, *converter.source_patterns], list(converter.target_patterns), [FuseExperts(hf_quantizer)]
    )
    fused.scope_prefix, fused.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
    return fused


class FuseExperts(ConversionOps):
    """Joins the experts' matrices and absmax of a parameter.

    Args:
        hf_quantizer: that the model is loaded with.
    """

    def __init__(self, hf_quantizer: HfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, _: Any) -> Self:  # Transformers copies it for each tensor
        return self

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The parameter in place of lists of tensors, one for each pattern, in the experts' order.

        Raises:
            ValueError: if the tensors are no weight of the parameter's shape.
        """
        tensors = {
            pattern.replace("*", str(expert)): tensor
            for pattern, experts in input_dict.items()
            for expert, tensor in enumerate(experts)
        }
        patterns = [each for each in kwargs["source_patterns"] if each in input_dict and not COMPANION.fullmatch(each)]
        num_experts = len(input_dict[patterns[0]])
        input_dict.clear()  # so that nothing else holds them
        names = [[pattern.replace("*", str(expert)) for pattern in patterns] for expert in range(num_experts)]
        parameter = kwargs["model"].get_parameter(kwargs["full_layer_name"])
        weight = fuse(tensors, names, parameter.dtype)
        if weight.shape != parameter.shape:
            raise ValueError(f"it is {tuple(weight.shape)} in the checkpoint, {tuple(parameter.shape)} in the model")
        return {kwargs["target_patterns"][0]: nn.Parameter(weight, requires_grad=False)}


class DenseElsewhere(ConversionOps):
    """Follows bitsandbytes' operation: what is not a linear layer's in nf4 is dense, in the model's dtype.

    Such as a router that was a linear layer where the checkpoint was made.
    """

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The weight by name, from a list where the checkpoint has it dense."""
        from bitsandbytes.functional import dequantize_4bit
        from bitsandbytes.nn import Linear4bit

        name = kwargs["full_layer_name"]
        ((key, value),) = input_dict.items()
        if isinstance(value, list):
            dense = value[0]
        elif isinstance(kwargs["model"].get_submodule(name.rpartition(".")[0]), Linear4bit):
            return input_dict
        else:
            dense = dequantize_4bit(value.data, value.quant_state)
        return {key: dense.to(kwargs["model"].get_parameter_or_buffer(name).dtype)}
