"""The building blocks of the operation: grouped products, activation, activation backward, combine.

Each function here is plain PyTorch and the reference of its kernel in triton_kernels.py. Which one runs is decided by
the tensors' device and dtype and by the activation, call by call; nothing outside this file knows. None of them records
anything for autograd.
"""

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]

# Rows that the plain paths gather at once.
CHUNK_ROWS = 2**16
# What the plain paths run an activation on at once, in float32: what it makes on the way is several times as large.
ACTIVATION_BYTES = 2**26
# The narrower side up to which a sum of outer products is a kernel's work: a low rank's.
NARROW = 256

# Stands for the result of a kernel that did not run.
NO_KERNEL = object()
# Kernels that a launch has found too large for this GPU, by the launcher's name.
_too_large: set[str] = set()


def silu_gated(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of concatenated halves: (R, 2 I) to (R, I)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_gated(gate_up: Tensor) -> Tensor:
    """`gelu(gate) * up` of concatenated halves: (R, 2 I) to (R, I)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate) * up


def gelu_tanh_gated(gate_up: Tensor) -> Tensor:
    """`gelu(gate) * up` of concatenated halves, gelu by its tanh approximation: (R, 2 I) to (R, I)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


# The activations that have kernels, by the name that the kernels know them by.
FUSED_ACTIVATIONS: dict[Activation, str] = {silu_gated: "silu", gelu_gated: "gelu", gelu_tanh_gated: "gelu_tanh"}


def has_grouped_linear(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a kernel multiplies rows of that dtype, so that `tiles` are needed."""
    return _takes(dtype, device) and _triton_kernels() is not None and _is_ampere_or_later(device)


def num_tiles(num_rows: int, num_experts: int) -> int:
    """How many tiles of the kernel's the rows take at most; their height is the kernel's."""
    return num_rows // 128 + num_experts


def grouped_linear(
    rows: Tensor,
    weight: Tensor,
    offsets: Tensor,
    *,
    tokens: Tensor | None = None,
    top_k: int = 1,
    tiles: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    bias: tuple[Tensor, Tensor] | None = None,
    absent: Tensor | None = None,
    into: tuple[Tensor, int] | None = None,
) -> Tensor:
    """Each row times its expert's weight: (R, out).

    No product is written to, nor any view: selective activation checkpointing may have saved the one, and puts what it
    saved in place of the other.

    Args:
        rows: (R, in), sorted by expert; or (T, in) where `tokens` says which of them each row is.
        weight: (E, in, out), contiguous along one of the two sides; a transposed view or a slice will do.
        offsets: (E,) int32, the end of each expert's rows.
        tokens: (R,) integer; the gathered rows are never written out where the kernel runs.
        top_k: if not 1, `tokens` are flat indices of (token, slot) pairs, token * top_k + slot.
        tiles: those of a `Routing`, where they were made.
        low_rank: (R, r), and (E, r, out) as `weight`: their products are added.
        bias: (E, out), and (R,) the expert of each row: its bias is added.
        absent: (R,) bool, rows past the last offset, which the products leave unwritten: zeros are put there.
        into: (R, out) or wider, to which the product is written from that column on; without `bias` or `absent`.
    """
    if tiles is not None:
        options = {"tokens": tokens, "top_k": top_k, "low_rank": low_rank, "into": into}
        product = launch("grouped_linear", rows, rows, weight, offsets, tiles, **options)
        if product is not NO_KERNEL:
            if bias is not None:
                product += bias[0][bias[1]]
            return product if absent is None else product.masked_fill_(absent[:, None], 0)
    if tokens is not None and top_k != 1:
        tokens = tokens // top_k
    num_rows = (rows if tokens is None else tokens).shape[0]
    chunk_rows = CHUNK_ROWS if tokens is not None or low_rank is not None or bias is not None else num_rows
    out = None
    for part, ends in _row_chunks(num_rows, offsets, chunk_rows):
        product = F.grouped_mm(rows[part] if tokens is None else rows[tokens[part]], weight, offs=ends)
        if low_rank is not None:
            product = product + F.grouped_mm(low_rank[0][part], low_rank[1], offs=ends)
        if bias is not None:
            product = (product + bias[0][bias[1][part]]).to(product.dtype)
        if absent is not None:
            product = product.masked_fill(absent[part, None], 0)
        if product.shape[0] == num_rows:
            out = product
            break
        out = rows.new_empty(num_rows, product.shape[1]) if out is None else out
        out.index_copy_(0, torch.arange(part.start, part.stop, device=out.device), product)
    assert out is not None
    if into is None:
        return out
    target, start = into
    return target.index_copy_(1, torch.arange(start, start + out.shape[1], device=out.device), out)


def grouped_outer(
    left: Tensor,
    right: Tensor,
    offsets: Tensor,
    *,
    left_tokens: Tensor | None = None,
    right_tokens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Sum over each expert's rows of `left ⊗ right`: (E, P, Q); zeros for an expert with no row.

    Args:
        left: (R, P), sorted by expert; or (T, P) where `left_tokens` says which of them each row is.
        right: (R, Q), or (T, Q) with `right_tokens`.
        offsets: (E,) int32, the end of each expert's rows.
        left_tokens: (R,) integer; the gathered rows are never written out where the kernel runs.
        right_tokens: the same for `right`.
        out_dtype: of the result; that of the rows where it is None.
    """
    out_dtype = out_dtype or left.dtype
    if min(left.shape[1], right.shape[1]) <= NARROW:
        options = {"left_tokens": left_tokens, "right_tokens": right_tokens, "out_dtype": out_dtype}
        out = launch("grouped_outer", left, left, right, offsets, **options)
        if out is not NO_KERNEL:
            return out
    if left_tokens is None and right_tokens is None:
        return F.grouped_mm(left.t(), right, offs=offsets).to(out_dtype)
    total: Tensor | None = None
    for part, ends in _row_chunks((left if left_tokens is None else left_tokens).shape[0], offsets, CHUNK_ROWS):
        lefts = left[part] if left_tokens is None else left[left_tokens[part]]
        rights = right[part] if right_tokens is None else right[right_tokens[part]]
        product = F.grouped_mm(lefts.t(), rights, offs=ends).to(out_dtype)
        total = product if total is None else total.add_(product)
    assert total is not None
    return total


def _row_chunks(num_rows: int, offsets: Tensor, chunk_rows: int) -> Iterator[tuple[slice, Tensor]]:
    """Slices of at most that many rows, at least one, with the ends of the experts' rows inside each."""
    for start in range(0, max(num_rows, 1), max(chunk_rows, 1)):
        size = min(chunk_rows, num_rows - start)
        yield slice(start, start + size), (offsets - start).clamp(0, size).to(torch.int32)


def grouped_sum(rows: Tensor, factors: Tensor, offsets: Tensor, *, tokens: Tensor | None = None) -> Tensor:
    """Sum of each expert's rows, times a factor each, in a fixed order: (E, N) float32.

    Args:
        rows: (R, N), sorted by expert; or (T, N) where `tokens` says which of them each row is.
        factors: (R, 1).
        offsets: (E,) int32, the end of each expert's rows.
        tokens: (R,) integer.
    """
    width = 16 // rows.element_size()  # the narrowest operand that grouped_mm takes
    wide = factors.to(rows.dtype).repeat(1, width)
    return grouped_outer(rows, wide, offsets, left_tokens=tokens, out_dtype=torch.float32)[..., 0]


def activate(activation: Activation, pre_activation: Tensor) -> Tensor:
    """The activation of h, row by row: (R, N) to (R, I)."""
    kind = FUSED_ACTIVATIONS.get(activation)
    out: Any = launch("gated", pre_activation, pre_activation, kind) if kind else NO_KERNEL
    if out is not NO_KERNEL:
        return out
    parts = pre_activation.split(rows_at_a_time(pre_activation))
    return activation(pre_activation) if len(parts) == 1 else torch.cat([activation(part) for part in parts])


def rows_at_a_time(pre_activation: Tensor) -> int:
    """How many rows of h (R, N) the plain paths run an activation on at once."""
    return max(1, ACTIVATION_BYTES // (4 * max(1, pre_activation.shape[1])))


def activation_backward(
    activation: Activation,
    pre_activation: Tensor,
    grad_unscaled: Tensor,
    row_weights: Tensor,
    *,
    needs: Literal["a", "gated a"] | None = None,
    overwrite: bool = False,
    pairs: Tensor | None = None,
    inner_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Recomputes the activation a = act(h) and returns dh, the gate's inner product and, on request, a or g·a.

    Args:
        activation: (R, N) to (R, I), row by row.
        pre_activation: h, (R, N).
        grad_unscaled: da' = G W2, (R, I): the gradient of a without the gate. What `needs` asks for takes its memory.
        row_weights: g, (R,).
        needs: what the gradients of the down projection's weights take.
        overwrite: whether dh may take h's memory.
        pairs: (R,) integer, a permutation: where a row's g stands in `row_weights` and its inner product is put; the
            row's own place where it is None.
        inner_dtype: of the inner products, which are summed in float32.

    Returns:
        dh = act'(h) · g · da' (R, N); <a, da'> (R,); what `needs` asks for (R, I), or None.
    """
    kind = FUSED_ACTIVATIONS.get(activation)
    if kind:
        out = launch(
            "gated_backward", pre_activation, pre_activation, grad_unscaled, row_weights, kind, needs=needs,
            overwrite=overwrite, pairs=pairs, inner_dtype=inner_dtype,
        )  # fmt: skip
        if out is not NO_KERNEL:
            return out
    if pairs is not None:
        row_weights = row_weights.index_select(0, pairs)
    grad = pre_activation if overwrite else torch.empty_like(pre_activation)
    inner = row_weights.new_empty(row_weights.shape[0], dtype=torch.float32)
    num_rows = rows_at_a_time(pre_activation)
    for start in range(0, row_weights.shape[0], num_rows):
        part = slice(start, start + num_rows)
        scale = row_weights[part].to(torch.float32).unsqueeze(-1)
        activated, grad_h = _differentiated(activation, pre_activation[part], scale * grad_unscaled[part])
        inner[part] = (activated.to(torch.float32) * grad_unscaled[part]).sum(-1)
        if needs is not None:
            grad_unscaled[part] = activated if needs == "a" else scale * activated
        grad[part] = grad_h
    inner = inner.to(inner_dtype)
    if pairs is not None:
        inner = torch.empty_like(inner).index_copy_(0, pairs, inner)
    return grad, inner, grad_unscaled if needs is not None else None


def _differentiated(activation: Activation, h: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The activation of h, and the gradient of h, from the activation's in float32."""
    if kind := FUSED_ACTIVATIONS.get(activation):  # as autograd does it, and also where there is none: in an operator
        (gate, up), activated = h.chunk(2, dim=-1), activation(h)
        grad = grad.to(activated.dtype)
        if kind == "silu":
            value, grad_gate = F.silu(gate), torch.ops.aten.silu_backward(grad * up, gate)
        else:
            approximate = "tanh" if kind == "gelu_tanh" else "none"
            value = F.gelu(gate, approximate=approximate)
            grad_gate = torch.ops.aten.gelu_backward(grad * up, gate, approximate=approximate)
        return activated, torch.cat([grad_gate, grad * value], dim=-1)
    with torch.enable_grad():
        h = h.detach().requires_grad_()
        activated = activation(h)
    (grad_h,) = torch.autograd.grad(activated, h, grad.to(activated.dtype))
    return activated.detach(), grad_h


def combine(rows: Tensor, inverse: Tensor, routing_weights: Tensor | None, out: Tensor, start: int = 0) -> None:
    """Writes each token's sum over its slots, in float32 and a fixed order, without atomics.

    Args:
        rows: (S, C), sorted by expert.
        inverse: (T, K), the sorted row of each (token, slot) pair.
        routing_weights: (T, K), multiplied in; None for a plain sum.
        out: (T, C) or wider, written.
        start: the first column that is written. Not a slice of `out`, in whose place selective activation checkpointing
            may put one that it saved.
    """
    if launch("combine", rows, rows, inverse, routing_weights, out, start) is not NO_KERNEL:
        return
    total: Any = None
    for slot, row in enumerate(inverse.unbind(1)):
        picked = rows[row].to(torch.float32)
        if routing_weights is not None:
            picked = picked * routing_weights[:, slot, None].to(torch.float32)
        total = picked if total is None else total + picked
    if total.shape == out.shape:
        out.copy_(total)
    else:
        columns = torch.arange(start, start + total.shape[1], device=out.device)
        out.index_copy_(1, columns, total.to(out.dtype))


@cache
def _triton_kernels() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("lightning_moe.ops.triton_kernels")


def _kernels(tensor: Tensor) -> ModuleType | None:
    """The Triton kernels if they take this tensor."""
    return _triton_kernels() if _takes(tensor.dtype, tensor.device) else None


def _takes(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there are kernels for tensors such as these: 16-bit floats and integers on CUDA."""
    return device.type == "cuda" and (dtype in (torch.bfloat16, torch.float16) or not dtype.is_floating_point)


def launch(name: str, judged: Tensor, *args: Any, **options: Any) -> Any:
    """What the launcher of that name returns; `NO_KERNEL` where plain code has to run.

    That is where the kernels do not take the tensor `judged`, or the device is too small for this one: a launch that
    fails so has written nothing, and is not tried again.
    """
    kernels = None if name in _too_large else _kernels(judged)
    if kernels is None:
        return NO_KERNEL
    try:
        return getattr(kernels, name)(*args, **options)
    except kernels.TOO_LARGE as error:
        _too_large.add(name)
        reason = str(error).splitlines()[0]
        warnings.warn(
            f"The Triton kernel {name} does not fit this GPU; plain PyTorch runs instead. {reason}", stacklevel=3
        )
        return NO_KERNEL


@cache
def _is_ampere_or_later(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)
