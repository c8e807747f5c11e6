"""Checkpoints whose experts are quantized already: what is in them, and how it becomes parameters.

How a format's matrices are stored is a layout: `nf4_checkpoint`, `fp8_checkpoint`, `mxfp4_checkpoint`. Here is what
those share. Transformers collects the tensors of a parameter by the patterns of a `WeightConverter`, and calls its
operations with them. Here they join the experts' bytes; nothing is made dense.

Read in Transformers 5.17 to 5.24: `rename_source_key`, what operations are called with, and `hf_quantizer`, by which
those are told that take a checkpoint's tensors in the dtype that they have there.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol, Self

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.base import HfQuantizer

from lightning_moe.integrations.transformers_experts import read_flags
from lightning_moe.ops.quantized import QuantizedWeight

DENSE = ("F16", "BF16", "F32", "F64")  # as safetensors calls them
REMEDY = "Load the 16-bit checkpoint: its experts are quantized while it is loaded"


class Header(NamedTuple):
    """What a checkpoint says of a tensor.

    Attributes:
        dtype: as safetensors calls it.
        shape: of the tensor.
        value: only of what a layout names in `read`.
    """

    dtype: str
    shape: tuple[int, ...]
    value: Tensor | None = None


class Layout(Protocol):
    """How checkpoints have matrices in a format, each as several tensors.

    Attributes:
        format: its name.
        suffixes: what the names of a matrix's tensors have after the matrix's own.
        read: the suffixes of tensors whose values say how a matrix is quantized.
    """

    format: str
    suffixes: tuple[str, ...]
    read: tuple[str, ...]

    def matrix_of(self, key: str, header: Header) -> str | None:
        """The name of the matrix that a tensor is of; None if the tensor alone does not say that it is of this format.

        Args:
            key: the tensor's name.
            header: of the tensor.
        """

    def check(self, name: str, headers: Mapping[str, Header], shape: tuple[int, ...], is_transposed: bool) -> None:
        """Whether a matrix can be read, without its values.

        Args:
            name: of the matrix.
            headers: of all tensors, by name.
            shape: of the parameter that it goes into: the experts' (E, out, in), or one matrix.
            is_transposed: whether the parameter is (E, in, out).

        Raises:
            ValueError: with a tensor's name, if one is missing or is not as this layout has it.
        """

    def join(
        self, tensors: Mapping[str, Tensor], names: list[list[str]], dtype: torch.dtype, is_transposed: bool
    ) -> QuantizedWeight:
        """The weight of the experts' matrices.

        Args:
            tensors: of the checkpoint, by name, on one device.
            names: for each expert, of the matrices that are joined along the rows, such as
                `....experts.3.gate_proj.weight` and `....experts.3.up_proj.weight`. One for all experts where the
                layout has them fused.
            dtype: of what the weight is made dense to.
            is_transposed: whether the weight is (E, in, out).
        """

    def conversions(self, hf_quantizer: HfQuantizer, experts: list[str]) -> list[WeightConverter]:
        """How tensors are loaded that no converter of the model joins.

        Args:
            hf_quantizer: that the model is loaded with.
            experts: the names of the experts' parameters.
        """


def find_quantized(
    model: PreTrainedModel, files: Iterable[str], experts: list[str], layouts: Mapping[str, Layout], format: str
) -> set[str] | None:
    """The modules beside the experts whose weight a checkpoint has quantized; None if it has nothing quantized.

    Args:
        model: on the meta device.
        files: of the checkpoint; those that are no safetensors hold nothing quantized.
        experts: the names of the experts' parameters.
        layouts: by format.
        format: that the experts are to have.

    Raises:
        ValueError: with a tensor's name and the remedy, if weights are quantized otherwise, lack a part, or only some
            experts are quantized.
    """
    headers = _read_headers(files, [suffix for layout in layouts.values() for suffix in layout.read])
    formats = _read_formats(headers, layouts)
    parameters, converted = _parameters(model, formats)
    experts_keys = {key for key, parameter in parameters.items() if parameter in experts}
    described = {key: f"in {formats[key]}" if formats[key] else headers[key].dtype for key in formats}
    if not experts_keys and (odd := sorted(key for key in formats if described[key] not in DENSE)):
        raise ValueError(
            f"the checkpoint has nothing that becomes {experts[0]}, and {odd[0]} is {described[odd[0]]}: it is "
            f"quantized, and not as {format} can be read. {REMEDY}"
        )
    found = {formats[key] for key in experts_keys}
    if len(found) == 1 and (other := found.pop()) not in (format, None):
        raise ValueError(
            f"{min(experts_keys)} is in {other} in the checkpoint, as all its experts, and {format} is asked for: ask "
            f'for what it has, QuantizedExpertsConfig("{other}") or, in the recipe, --model.quantize {other}'
        )
    state = model.state_dict()
    may_be_dense = set(parameters) - (experts_keys if any(formats[key] for key in parameters) else set())
    # Dense ones last: of experts that are quantized in part, the other part says more.
    for key in sorted(parameters, key=lambda key: (described[key] in DENSE, key)):
        is_dense = described[key] in DENSE or not (formats[key] or state[parameters[key]].is_floating_point())
        if formats[key] != format and not (is_dense and key in may_be_dense):
            raise ValueError(
                f"{key} is {described[key]} in a checkpoint with quantized weights, and not in {format}. {REMEDY}"
            )
    quantized = sorted(key for key in parameters if formats[key])
    for key in quantized:
        shape = tuple(state[parameters[key]].shape)
        if key in converted - experts_keys:
            raise ValueError(f"{key} is in {format}, and Transformers splits or joins it while it is loaded. {REMEDY}")
        try:
            layouts[format].check(key, headers, shape, key in experts_keys and _is_transposed(model, parameters[key]))
        except ValueError as error:
            raise ValueError(f"{error}. {REMEDY}") from error
    return {parameters[key].removesuffix(".weight") for key in set(quantized) - experts_keys} if quantized else None


def _read_headers(files: Iterable[str], read: list[str]) -> dict[str, Header]:
    """Of a checkpoint's tensors, by name."""
    headers = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            continue
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                tensor = opened.get_slice(key)
                value = opened.get_tensor(key) if key.endswith(tuple(read)) else None
                headers[key] = Header(tensor.get_dtype(), tuple(tensor.get_shape()), value)
    return headers


def _read_formats(headers: Mapping[str, Header], layouts: Mapping[str, Layout]) -> dict[str, str | None]:
    """The format of each quantized matrix, by its name, and None for what else there is."""
    matrices: dict[str, str | None] = {}
    others: dict[str, str | None] = {}
    for key, header in headers.items():
        found = [(layout.matrix_of(key, header), layout.format) for layout in layouts.values()]
        of_matrices = {name: format for name, format in found if name is not None}
        matrices |= of_matrices
        others |= {} if of_matrices else {key: None}
    return others | matrices


def _parameters(model: PreTrainedModel, keys: Iterable[str]) -> tuple[dict[str, str], set[str]]:
    """The parameter of the model that each of a checkpoint's tensors goes into, where there is one.

    And which of the tensors a converter of the model's makes something else of.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    parameters = model.state_dict()
    found, converted = {}, set()
    for key in sorted(keys):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
        if name in parameters or key in parameters:
            found[key] = name if name in parameters else key
            converted |= {key} if pattern and name in parameters else set()
    return found, converted


def _is_transposed(model: nn.Module, parameter: str) -> bool:
    return read_flags(model.get_submodule(parameter.rpartition(".")[0])).is_transposed


def fusing(converter: WeightConverter, layout: Layout, hf_quantizer: HfQuantizer) -> WeightConverter:
    """The converter that joins, as they are stored, what another one joins dense."""
    fused = joining(converter.source_patterns, converter.target_patterns[0], layout, hf_quantizer)
    fused.scope_prefix, fused.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
    return fused


def joining(sources: list[str], target: str, layout: Layout, hf_quantizer: HfQuantizer) -> WeightConverter:
    """The converter that makes a parameter of experts' matrices.

    Args:
        sources: the patterns of the matrices' names.
        target: the pattern of the parameter's.
        layout: of the matrices.
        hf_quantizer: that the model is loaded with.
    """
    # The longest first: of the patterns that match a tensor's name, Transformers takes the first.
    suffixes = sorted(layout.suffixes, key=len, reverse=True)
    patterns = [source + suffix for suffix in suffixes for source in sources]
    return WeightConverter(patterns, target, [JoinExperts(sources, layout, hf_quantizer)])


class JoinExperts(ConversionOps):
    """Joins the tensors of a parameter's experts.

    Args:
        sources: the patterns of the matrices' names.
        layout: of the matrices.
        hf_quantizer: that the model is loaded with.
    """

    def __init__(self, sources: list[str], layout: Layout, hf_quantizer: HfQuantizer) -> None:
        self.sources, self.layout, self.hf_quantizer = sources, layout, hf_quantizer

    def __deepcopy__(self, _: Any) -> Self:  # Transformers copies it for each tensor
        return self

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The parameter in place of lists of tensors, one for each pattern, in the experts' order.

        Raises:
            ValueError: if the tensors are no weight of the parameter's shape.
        """
        pairs = [(source, suffix) for source in self.sources for suffix in self.layout.suffixes]
        sources = [each for each in self.sources if each + self.layout.suffixes[0] in input_dict]
        num_experts = len(input_dict[sources[0] + self.layout.suffixes[0]])
        tensors = {  # taken out, so that nothing else holds them
            source.replace("*", str(expert)) + suffix: tensor
            for source, suffix in pairs
            for expert, tensor in enumerate(input_dict.pop(source + suffix, ()))
        }
        names = [[source.replace("*", str(expert)) for source in sources] for expert in range(num_experts)]
        name = kwargs["full_layer_name"]
        parameter = kwargs["model"].get_parameter(name)
        weight = self.layout.join(tensors, names, parameter.dtype, _is_transposed(kwargs["model"], name))
        if weight.shape != parameter.shape:
            raise ValueError(f"it is {tuple(weight.shape)} in the checkpoint, {tuple(parameter.shape)} in the model")
        return {kwargs["target_patterns"][0]: nn.Parameter(weight, requires_grad=False)}
