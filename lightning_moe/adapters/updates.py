"""What an adapter adds to each tensor of a base checkpoint: low-rank factors, of which no product is formed here.

Both sides are brought to the parameters of the model that the base's config.json describes: PEFT's pairs of matrices by
`integrations/peft_targets`, the base's tensors, one for each expert or one for all, by `integrations/checkpoint_names`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_moe.adapters.source import Adapter
from lightning_moe.integrations.checkpoint_names import Place, find_places
from lightning_moe.integrations.peft_experts import split_a, split_b, unsupported_layout
from lightning_moe.integrations.peft_targets import (
    EMBEDDING,
    LINEAR,
    PREFIX,
    Target,
    Targets,
    read_config,
    read_targets,
    target_of,
    tied_parameters,
)
from lightning_moe.ops.low_rank import LowRank
from lightning_moe.ops.weight_update import Piece, Update, as_matrices, transpose


def find_updates(adapter: Adapter, model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Update]:
    """The update of each tensor of a base that has one.

    Args:
        adapter: every tensor of it has to have a place.
        model: that the base's config.json describes, on the meta device; left with the adapter on it.
        shapes: of the base's tensors, by name.

    Raises:
        ValueError: if the adapter does not fit the model, or the model not the base; names the tensors.
    """
    if adapter.model_type not in ("", model.config.model_type):
        raise ValueError(
            f"the adapter is for the family {adapter.model_type}, and the base is {model.config.model_type}: give the "
            "base that it was trained on"
        )
    trained = getattr(transformers, str((adapter.config.get("auto_mapping") or {}).get("base_model_class")), None)
    if trained is not None and trained is not type(model):
        raise ValueError(
            f"the adapter is for {trained.__name__}, and the base is {type(model).__name__}: give the base that it was "
            "trained on"
        )
    parameters = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    places = find_places(model, shapes)
    tied = tied_parameters(model)
    updates = _read_parameters(adapter, model, parameters)
    for name in updates:
        if name in tied:
            raise ValueError(
                f"the adapter changes {name}, whose weight the base shares with {', '.join(tied[name])} "
                "(tie_word_embeddings): use PEFT's merge, which can tell them apart"
            )
    covered = dict.fromkeys(updates, 0)
    found = {}
    for key, place in places.items():
        if place.parameter not in updates:
            continue
        if place.operations is not None:
            raise ValueError(f"the base has {key} in a form that cannot be merged here ({place.operations})")
        whole = parameters[place.parameter]
        found[key] = _restrict(updates[place.parameter], key, place, whole, shapes[key])
        covered[place.parameter] += torch.Size(shapes[key]).numel()
    for name, count in covered.items():
        if count != torch.Size(parameters[name]).numel():
            lacks = "none" if not count else f"{count} values"
            raise ValueError(
                f"the adapter changes {name}, which config.json makes {parameters[name]}, and the base's tensors hold "
                f"{lacks} of it: it is another model, or tensors are missing"
            )
    return {key: update for key, update in found.items() if update.whole is not None or update.pieces}


def _read_parameters(
    adapter: Adapter, model: PreTrainedModel, parameters: Mapping[str, tuple[int, ...]]
) -> dict[str, Update]:
    """The update of each of the model's parameters that has one."""
    config = read_config(adapter.config)
    endings = (*LINEAR, *EMBEDDING)
    paths = {key.removesuffix(end) for key in adapter.tensors for end in endings if key.endswith(end)}
    if config.target_parameters:
        if reason := unsupported_layout():
            raise ValueError(str(reason))
        targets = read_targets(model, config)
        if missing := [path for path in targets.pairs if path not in paths]:
            raise ValueError(
                f"the adapter lacks the matrices of {_listed(missing)}, which its config names: it is not complete, or "
                "was trained on another model"
            )
    else:
        targets = _read_targets_by_name(adapter, model, config, paths)
    updates: dict[str, Update] = {}
    rest = dict(adapter.tensors)
    for path, target in targets.pairs.items():
        a, b = (rest.pop(path + LINEAR[i], rest.pop(path + EMBEDDING[i], None)) for i in range(2))
        update = updates.setdefault(target.place.parameter, Update())
        update.pieces.append(_read_piece(path, a, b, target, parameters[target.place.parameter]))
        if (own := rest.pop(f"{path}.base_layer.weight", None)) is not None:  # PEFT saves an adapted embedding's own
            _put(update, path, own, parameters[target.place.parameter])
    for key, place in targets.whole.items():
        if key in rest:
            update = updates.setdefault(place.parameter, Update())
            _put(update, key, rest.pop(key), parameters[place.parameter])
    if rest:
        raise ValueError(
            f"{len(rest)} of the adapter's {len(adapter.tensors)} tensors have no place in the base, "
            f"{type(model).__name__}: {_listed(rest)}. It is for another model, or holds more than plain LoRA"
        )
    if not updates:
        raise ValueError("the adapter holds no tensors")
    return updates


def _read_targets_by_name(adapter: Adapter, model: PreTrainedModel, config: Any, paths: Iterable[str]) -> Targets:
    """What an adapter holds whose pairs are named as tensors of the model, or of a checkpoint of it, are."""
    modules = dict(model.named_modules())
    names = {path: path.removeprefix(PREFIX).replace(".base_layer", "") for path in paths}
    others = {key: key.removeprefix(PREFIX) for key in adapter.tensors if ".lora_" not in key}
    places = find_places(model, [*(f"{name}.weight" for name in names.values()), *others.values()])
    return Targets(
        {
            path: target_of(
                config,
                name,
                place,
                is_transposed=path + EMBEDDING[0] in adapter.tensors or isinstance(modules.get(name), Conv1D),
            )
            for path, name in names.items()
            if (place := places.get(f"{name}.weight")) and place.operations is None
        },
        {key: place for key, name in others.items() if (place := places.get(name)) and place == Place(place.parameter)},
    )


def _read_piece(path: str, a: Tensor | None, b: Tensor | None, target: Target, shape: tuple[int, ...]) -> Piece:
    """A pair of matrices as an update of the parameter."""
    matrices, rows, columns = as_matrices(shape)
    count, expert = target.num_experts, target.place.expert
    if expert is not None:
        matrices, rows = int(expert < matrices), rows // target.place.parts
    wanted = (rows, columns) if not target.is_transposed else (columns, rows)
    wanted_a, wanted_b = (target.rank * count, wanted[1]), (wanted[0], target.rank * count)
    if a is None or b is None:
        raise ValueError(f"the adapter has one matrix of {path} without the other: it is not complete")
    if count != matrices or tuple(a.shape) != wanted_a or tuple(b.shape) != wanted_b:
        raise ValueError(
            f"the adapter's matrices of {path} are {tuple(a.shape)} and {tuple(b.shape)}, and {wanted_a} and "
            f"{wanted_b} would fit the base and the config: it was trained on a model of other sizes"
        )
    factors = LowRank(split_a(a, count), split_b(b, count), target.scaling)
    if target.is_transposed:
        factors = transpose(factors)
    return Piece(expert or 0, target.place.part * rows, factors)


def _put(update: Update, key: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"the adapter's {key} is {tuple(tensor.shape)}, and the base's {shape}")
    update.whole = tensor.reshape(as_matrices(shape))


def _restrict(update: Update, key: str, place: Place, whole: tuple[int, ...], shape: tuple[int, ...]) -> Update:
    """A parameter's update as that of the tensor which is there in a base."""
    matrices, all_rows, columns = as_matrices(whole)
    height = all_rows // place.parts
    experts = range(matrices) if place.expert is None else range(place.expert, place.expert + 1)
    rows = range(place.part * height, (place.part + 1) * height)
    straight = whole if place.expert is None else (height, columns)
    is_transposed = place.is_transposed and shape != straight  # Transformers transposes only what does not fit
    if shape != ((*straight[:-2], *straight[:-3:-1]) if is_transposed else straight) or experts.stop > matrices:
        raise ValueError(f"the base's {key} is {shape}, and its config.json makes it {straight}: they do not agree")
    part = update.restrict(experts, rows)
    return part.transpose(height) if is_transposed else part


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)
