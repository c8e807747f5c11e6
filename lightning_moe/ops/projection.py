"""Rows times their expert's weight, with its low-rank updates beside it, and the sum over a token's experts."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_moe.ops.grouped import combine, grouped_linear
from lightning_moe.ops.low_rank import LowRank, join
from lightning_moe.ops.quantized import QuantizedView, QuantizedWeight
from lightning_moe.ops.routing import Routing


class Projection(NamedTuple):
    """Rows times their expert's W + BA, the sum never formed; `mT` takes a gradient back.

    Attributes:
        weight: (E, in, out), a view of W; quantized, it is made dense for each product.
        a: (E, in, R), A1 or A2, from the input to the rank; None where there are none.
        b: (E, R, out), B, from the rank to the output.
    """

    weight: Tensor | QuantizedView
    a: Tensor | None
    b: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, updates: list[LowRank], is_transposed: bool) -> "Projection":
        """The projection in the layout that the products take."""
        a, b = join(updates, weight.dtype) if updates else (None, None)
        view: Tensor | QuantizedView
        if isinstance(weight, QuantizedWeight):
            view = QuantizedView(weight, is_transposed=not is_transposed)
        else:
            view = weight if is_transposed else weight.mT
        return cls(view, None if a is None else a.mT, None if b is None else b.mT)

    @property
    def mT(self) -> "Projection":  # noqa: N802
        """What takes a gradient back through the projection."""
        return Projection(self.weight.mT, None if self.b is None else self.b.mT, None if self.a is None else self.a.mT)

    def dense(self) -> "Projection":
        """With a quantized weight made dense as a whole."""
        weight = self.weight
        return self if isinstance(weight, Tensor) else self._replace(weight=weight.dense(slice(0, weight.shape[2])))

    def to_rank(self, rows: Tensor, routing: Routing, *, gather: bool = False) -> Tensor | None:
        """The rows' (S, R) part in the updates; `gather` where the rows are one per token."""
        if self.a is None:
            return None
        return grouped_linear(
            rows, self.a, routing.offsets, tokens=routing.permutation if gather else None, top_k=routing.top_k,
            tiles=routing.tiles,
        )  # fmt: skip

    def project(
        self,
        rows: Tensor,
        in_rank: Tensor | None,
        routing: Routing,
        *,
        gather: bool = False,
        columns: slice | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """(S, out), or some columns of it; `in_rank` is what `to_rank` made of the rows, `bias` (E, out) is added."""
        weight, width = self.weight, self.weight.shape[2]
        if isinstance(weight, Tensor):
            dense = weight if columns is None else weight[..., columns]
            biases = None if bias is None else (bias, routing.expert_of_row())
            return self._product(rows, dense, in_rank, routing, gather, columns, bias=biases, absent=routing.absent())
        first, last = (0, width) if columns is None else (columns.start, min(columns.stop, width))
        step = weight.features_at_a_time
        out = rows.new_empty(routing.num_rows, last - first) if last - first > step else None
        for start in range(first, last, step):
            part = slice(start, min(start + step, last))
            into = None if out is None else (out, start - first)
            product = self._product(rows, weight.dense(part), in_rank, routing, gather, part, into=into)
        if bias is not None:
            product = (product + bias[:, first:last][routing.expert_of_row()]).to(product.dtype)
        absent = routing.absent()
        return product if absent is None else product.masked_fill(absent[:, None], 0)

    def _product(
        self,
        rows: Tensor,
        dense: Tensor,
        in_rank: Tensor | None,
        routing: Routing,
        gather: bool,
        columns: slice | None,
        **options: Any,
    ) -> Tensor:
        b = self.b if self.b is None or columns is None else self.b[..., columns]
        return grouped_linear(
            rows, dense, routing.offsets, tokens=routing.permutation if gather else None, top_k=routing.top_k,
            tiles=routing.tiles, low_rank=None if b is None or in_rank is None else (in_rank, b), **options,
        )  # fmt: skip


def pre_activation(x: Tensor, up: Projection, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor | None]:
    """The pre-activation h (S, N), and x A1ᵀ (S, R) where W1 has updates."""
    in_rank = up.to_rank(x, routing, gather=True)
    h = up.project(x, in_rank, routing, gather=True, bias=bias)
    return h, in_rank


def project_and_combine(
    rows: Tensor,
    projection: Projection,
    in_rank: Tensor | None,
    routing: Routing,
    routing_weights: Tensor | None,
    buffer_columns: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """Each row projected, summed over the slots: (S, in) to (T, H).

    The hidden features are independent here, so a bounded buffer takes some of them at a time and all rows: the
    products stay as efficient as they were, and nothing needs to be accumulated. Of a quantized weight it takes no more
    than are made dense at a time.
    """
    num_tokens, hidden = routing.num_rows // routing.top_k, projection.weight.shape[2]
    if not isinstance(projection.weight, Tensor):
        buffer_columns = min(buffer_columns, projection.weight.features_at_a_time)
    inverse = routing.inverse.view(num_tokens, routing.top_k)
    output = rows.new_empty(num_tokens, hidden, dtype=out_dtype)
    for start in range(0, hidden, buffer_columns):
        columns = slice(start, start + buffer_columns) if buffer_columns < hidden else None
        part = projection.project(rows, in_rank, routing, columns=columns)
        combine(part, inverse, routing_weights, output, start)
        del part
    return output
