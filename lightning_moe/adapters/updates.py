"""What an adapter adds to each tensor of a base checkpoint: low-rank factors, of which no product is formed here.

Both sides are brought to the parameters of the model that the base's config.json describes: PEFT's pairs of matrices by
`integrations/peft_targets`, the base's tensors, one for each expert or one for all, by `integrations/checkpoint_names`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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


class Piece(NamedTuple):
    """A low-rank update of some matrices of a tensor, from some row on.

    Attributes:
        matrix: the first one.
        row: the first one.
        factors: a (E, r, columns) and b (E, rows, r) of E matrices.
    """

    matrix: int
    row: int
    factors: LowRank


@dataclass
class Update:
    """What becomes of a tensor that is seen as matrices (E, rows, columns); see `as_matrices`.

    Attributes:
        whole: what is put in its place; None where the tensor stays.
        pieces: what is added then.
    """

    whole: Tensor | None = None
    pieces: list[Piece] = field(default_factory=list)

    def apply(self, weight: Tensor, matrix: int, row: int) -> Tensor:
        """The new values of some rows of one matrix, in float32.

        Args:
            weight: these rows of the base, (rows, columns), float32.
            matrix: which.
            row: the first of them.
        """
        new = weight if self.whole is None else self.whole[matrix, row : row + len(weight)].float()
        for piece in self.pieces:
            a, b, scaling = piece.factors.a, piece.factors.b, piece.factors.scaling
            start, stop = max(row, piece.row), min(row + len(weight), piece.row + b.shape[1])
            if 0 <= matrix - piece.matrix < len(b) and start < stop:
                left = b[matrix - piece.matrix, start - piece.row : stop - piece.row].float()
                product = (left @ a[matrix - piece.matrix].float()) * scaling
                new = new.clone() if new is weight else new
                new[start - row : stop - row] += product
        return new


def as_matrices(shape: Iterable[int]) -> tuple[int, int, int]:
    """The shape of a tensor that is seen as matrices: experts, or one; rows; columns."""
    shape = tuple(shape)
    if len(shape) == 3:
        return shape
    rows = shape[0] if len(shape) > 1 else 1
    return 1, rows, torch.Size(shape).numel() // max(rows, 1)


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
    trained = getattr(transformers, (adapter.config.get("auto_mapping") or {}).get("base_model_class", ""), None)
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
        a, b = next(
            (rest.pop(path + first), rest.pop(path + second, None))
            for first, second in (LINEAR, EMBEDDING)
            if path + first in rest
        )
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


def _read_piece(path: str, a: Tensor, b: Tensor | None, target: Target, shape: tuple[int, ...]) -> Piece:
    """A pair of matrices as an update of the parameter."""
    matrices, rows, columns = as_matrices(shape)
    count, expert = target.num_experts, target.place.expert
    if expert is not None:
        matrices, rows = int(expert < matrices), rows // target.place.parts
    wanted = (rows, columns) if not target.is_transposed else (columns, rows)
    wanted_a, wanted_b = (target.rank * count, wanted[1]), (wanted[0], target.rank * count)
    if b is None or count != matrices or tuple(a.shape) != wanted_a or tuple(b.shape) != wanted_b:
        raise ValueError(
            f"the adapter's matrices of {path} are {tuple(a.shape)} and {None if b is None else tuple(b.shape)}, and "
            f"{wanted_a} and {wanted_b} would fit the base and the config: it was trained on a model of other sizes"
        )
    factors = LowRank(split_a(a, count), split_b(b, count), target.scaling)
    if target.is_transposed:
        factors = LowRank(factors.b.mT, factors.a.mT, target.scaling)
    return Piece(expert or 0, target.place.part * rows, factors)


def _put(update: Update, key: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"the adapter's {key} is {tuple(tensor.shape)}, and the base's {shape}")
    update.whole = tensor.reshape(as_matrices(shape))


def _restrict(update: Update, key: str, place: Place, whole: tuple[int, ...], shape: tuple[int, ...]) -> Update:
    """A parameter's update as that of the tensor which is there in a base."""
    matrices, all_rows, columns = as_matrices(whole)
    rows = all_rows // place.parts
    first, count = (0, matrices) if place.expert is None else (place.expert, 1)
    straight = whole if place.expert is None else (rows, columns)
    is_transposed = place.is_transposed and shape != straight  # Transformers transposes only what does not fit
    if shape != ((*straight[:-2], *straight[:-3:-1]) if is_transposed else straight) or first >= matrices:
        raise ValueError(f"the base's {key} is {shape}, and its config.json makes it {straight}: they do not agree")
    start = place.part * rows
    out = Update(None if update.whole is None else update.whole[first : first + count, start : start + rows])
    for piece in update.pieces:
        matrix, stop_matrix = max(first, piece.matrix), min(first + count, piece.matrix + len(piece.factors.b))
        row, stop_row = max(start, piece.row), min(start + rows, piece.row + piece.factors.b.shape[1])
        if matrix >= stop_matrix or row >= stop_row:
            continue
        own = slice(matrix - piece.matrix, stop_matrix - piece.matrix)
        b = piece.factors.b[own, row - piece.row : stop_row - piece.row]
        out.pieces.append(Piece(matrix - first, row - start, LowRank(piece.factors.a[own], b, piece.factors.scaling)))
    return _transpose(out, key, rows) if is_transposed else out


def _transpose(update: Update, key: str, rows: int) -> Update:
    """The update of a tensor that has these rows as columns."""
    if any(piece.factors.b.shape[1] != rows for piece in update.pieces):
        raise ValueError(
            f"the base has {key} transposed, and the adapter changes some of its rows: use the fused layout"
        )
    pieces = [
        piece._replace(factors=LowRank(piece.factors.b.mT, piece.factors.a.mT, piece.factors.scaling))
        for piece in update.pieces
    ]
    return Update(None if update.whole is None else update.whole.mT, pieces)


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)
