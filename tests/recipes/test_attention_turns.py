"""Tests of attention's backward in turns: beside PyTorch's own, in what it keeps, and where it must not be used."""

import weakref
from functools import partial

import pytest
import torch
from lora import attention_turns
from lora.attention_turns import causal_attention
from lora.kept_results import keep_and_reuse, keeping
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_moe.integrations.allocations import AllocationCounter

HEADS, KV_HEADS, TOKENS, HEAD_DIM = 10, 5, 40, 16
SCALE = 0.3
FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def attention_inputs(
    dtype=torch.float32, device="cpu", heads=HEADS, kv_heads=KV_HEADS, tokens=TOKENS, dim=HEAD_DIM, batch=1
):
    """Queries, keys, values and the output's gradient, in the memory layout of a decoder layer's."""
    generator = torch.Generator(device).manual_seed(0)
    made = [
        torch.randn(batch, tokens, num, dim, device=device, generator=generator).to(dtype).transpose(1, 2)
        for num in (heads, kv_heads, kv_heads, heads)
    ]
    return [tensor.requires_grad_() for tensor in made[:3]], made[3]


def plain_attention(query, key, value):
    return scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=SCALE, enable_gqa=query.shape[1] != key.shape[1]
    )


def in_turns_of(monkeypatch, kv_heads, tokens=TOKENS):
    monkeypatch.setattr(attention_turns, "TOKEN_HEADS_IN_FLIGHT", kv_heads * tokens)


def takes_turns(output):
    return type(output.grad_fn).__name__ == "_BackwardInTurnsBackward"


class Calls(TorchDispatchMode):
    """Notes how many query heads and key-value heads each operation of attention is given."""

    def __init__(self):
        super().__init__()
        self.forward, self.backward = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is FORWARD:
            self.forward.append((args[0].shape[1], args[1].shape[1]))
        if func is BACKWARD:
            self.backward.append((args[1].shape[1], args[2].shape[1]))
        return func(*args, **(kwargs or {}))


def is_close(mine, want, relative):
    """In no value further apart than this part of the largest one."""
    return bool((mine.double() - want.double()).abs().max() <= relative * want.double().abs().max())


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kv_heads", [HEADS, KV_HEADS], ids=["one head each", "two heads each"])
@pytest.mark.parametrize("step", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_are_those_of_all_heads_at_once(dtype, step, kv_heads, batch, monkeypatch):
    """Each head is computed alone, and a library may add in another order: eight roundings of the largest value."""
    in_turns_of(monkeypatch, step)
    inputs, grad = attention_inputs(dtype, kv_heads=kv_heads, batch=batch)
    mine, want = causal_attention(*inputs, SCALE), plain_attention(*inputs)
    assert takes_turns(mine)
    assert not takes_turns(want)
    assert torch.equal(mine, want)
    bound = 8 * torch.finfo(dtype).eps
    grads, want_grads = (torch.autograd.grad(output, inputs, grad) for output in (mine, want))
    for tensor, one, other in zip(inputs, grads, want_grads, strict=True):
        assert one.stride() == tensor.stride()
        assert is_close(one, other, bound)
        first = other.clone()
        first[:, -1] = 0  # a head is left out
        assert not is_close(first, other, bound)
        assert not is_close(other.roll(1, 1), other, bound)  # heads are swapped


def test_forward_runs_once_and_backward_a_few_heads_at_a_time(monkeypatch):
    in_turns_of(monkeypatch, 2)
    inputs, grad = attention_inputs()
    with Calls() as calls:
        torch.autograd.grad(causal_attention(*inputs, SCALE), inputs, grad)
    assert calls.forward == [(10, 5)]
    assert calls.backward == [(4, 2), (4, 2), (2, 1)]


def test_a_turn_is_no_less_than_a_key_value_head(monkeypatch):
    monkeypatch.setattr(attention_turns, "TOKEN_HEADS_IN_FLIGHT", TOKENS - 1)
    inputs, grad = attention_inputs()
    with Calls() as calls:
        torch.autograd.grad(causal_attention(*inputs, SCALE), inputs, grad)
    assert calls.backward == [(2, 1)] * 5


def test_turns_gradients_are_joined_one_tensor_after_the_other(monkeypatch):
    """In backward there are at most all turns' gradients and one whole tensor, beside the last turn's log-sum-exp."""
    in_turns_of(monkeypatch, 1)
    inputs, grad = attention_inputs(tokens=512, dim=64)
    output = causal_attention(*inputs, SCALE)
    with AllocationCounter("backward") as counter:
        grads = torch.autograd.grad(output, inputs, grad)
    whole, of_queries = sum(tensor.nbytes for tensor in grads), grads[0].nbytes
    log_sum_exp = 4 * 512 * HEADS // KV_HEADS
    assert whole + of_queries <= counter.peak <= whole + of_queries + log_sum_exp


def test_what_is_saved_is_saved_once(monkeypatch):
    """Queries, keys, values, the output and the log-sum-exp; nothing of the graph that PyTorch made."""

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor.detach()  # an output with its graph would hold itself

    def save(tensor):
        saved = Saved(tensor)
        made.append(weakref.ref(saved))
        return saved

    in_turns_of(monkeypatch, 1)
    made = []
    inputs, _ = attention_inputs()
    with saved_tensors_hooks(save, lambda saved: saved.tensor):
        output = causal_attention(*inputs, SCALE)
    held = [saved.tensor for saved in (reference() for reference in made) if saved is not None]
    assert len(made) > len(held) == 5
    assert {tensor.data_ptr() for tensor in (*inputs, output)} < {tensor.data_ptr() for tensor in held}
    assert [tuple(tensor.shape) for tensor in held if tensor.ndim == 3] == [(1, HEADS, TOKENS)]


@pytest.mark.parametrize("case", ["short", "no_grad", "no gradients wanted"])
def test_where_turns_would_gain_nothing_pytorchs_graph_is_used(case, monkeypatch):
    in_turns_of(monkeypatch, KV_HEADS if case == "short" else 1)
    inputs, _ = attention_inputs()
    if case == "no gradients wanted":
        inputs = [tensor.detach() for tensor in inputs]
    with torch.set_grad_enabled(case != "no_grad"):
        output = causal_attention(*inputs, SCALE)
    assert output.requires_grad == (case == "short")
    assert not takes_turns(output)
    assert torch.equal(output, plain_attention(*inputs))


@pytest.mark.parametrize("case", ["math", "autocast"])
def test_what_runs_on_other_tensors_than_these_is_left_to_pytorch(case, monkeypatch):
    """The math kernel expands key-value heads, autocast changes the dtype."""
    in_turns_of(monkeypatch, 1)
    inputs, grad = attention_inputs()
    context = sdpa_kernel(SDPBackend.MATH) if case == "math" else torch.autocast("cpu", torch.bfloat16)
    with context:
        mine, want = causal_attention(*inputs, SCALE), plain_attention(*inputs)
    assert mine.dtype == (torch.float32 if case == "math" else torch.bfloat16)
    assert not takes_turns(mine)
    found = [[output, *torch.autograd.grad(output, inputs, grad.to(output.dtype))] for output in (mine, want)]
    for one, other in zip(*found, strict=True):
        assert is_close(one, other, 2**-20)
        assert not is_close(other.roll(1, 1), other, 2**-20)


@pytest.mark.parametrize("keeps", [False, True])
def test_in_a_checkpointed_layer_forward_runs_once_where_its_results_are_kept(keeps, monkeypatch):
    in_turns_of(monkeypatch, 2)
    inputs, grad = attention_inputs()

    def layer(query, key, value):
        with keeping():
            return causal_attention(query * 2, key * 3, value.sin(), SCALE).sin()

    want = torch.autograd.grad(layer(*inputs), inputs, grad)
    with Calls() as calls:
        contexts = partial(keep_and_reuse, attention=keeps)
        output = checkpoint(layer, *inputs, use_reentrant=False, context_fn=contexts)
        found = [torch.autograd.grad(output, inputs, grad, retain_graph=True) for _ in range(2)]
    assert len(calls.forward) == (1 if keeps else 3)
    assert len(calls.backward) == 2 * 3
    for grads in found:
        for one, other in zip(grads, want, strict=True):
            assert is_close(one, other, 2**-20)
            assert not is_close(other.roll(1, 1), other, 2**-20)


def test_a_second_derivative_is_refused(monkeypatch):
    in_turns_of(monkeypatch, 1)
    inputs, _ = attention_inputs()
    (grad,) = torch.autograd.grad(causal_attention(*inputs, SCALE).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]


@on_gpu
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("kernel", KERNELS, ids=["cudnn", "flash"])
def test_on_a_gpu_gradients_are_those_of_all_heads_at_once(kernel, step, batch, monkeypatch):
    """The queries' gradient is added in any order; of the largest value, eight roundings to bfloat16."""
    in_turns_of(monkeypatch, step, tokens=512)
    inputs, grad = attention_inputs(torch.bfloat16, "cuda", 16, 4, 512, 64, batch)
    with sdpa_kernel(kernel):
        mine, want = causal_attention(*inputs, SCALE), plain_attention(*inputs)
        assert takes_turns(mine)
        found = [[output, *torch.autograd.grad(output, inputs, grad)] for output in (mine, want)]
    for tensor, one in zip(inputs, found[0][1:], strict=True):
        assert one.stride() == tensor.stride()
    for one, other in zip(*found, strict=True):
        assert is_close(one, other, 2**-5)
        first = other.clone()
        first[:, -1] = 0
        assert not is_close(first, other, 2**-5)
        assert not is_close(other.roll(1, 1), other, 2**-5)


@on_gpu
@pytest.mark.parametrize("kernel", KERNELS, ids=["cudnn", "flash"])
def test_on_a_gpu_backward_takes_less_memory_in_turns(kernel, monkeypatch):
    """In sizes of the queries, 5 at once: their gradient 1, its float32 sums 2, those of keys and values 2.

    In four turns, 1 of the whole and a quarter of 5; and where FlashAttention copies its arguments, a quarter of 2.
    """
    in_turns_of(monkeypatch, 1, tokens=2048)
    inputs, grad = attention_inputs(torch.bfloat16, "cuda", 32, 4, 2048, 128)
    peaks = []
    with sdpa_kernel(kernel):
        for output in (causal_attention(*inputs, SCALE), plain_attention(*inputs)):
            torch.autograd.grad(output, inputs, grad, retain_graph=True)  # plans and workspaces are made
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            torch.autograd.grad(output, inputs, grad)
            peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[0] < 0.65 * peaks[1]


@on_gpu
def test_on_a_gpu_deterministic_algorithms_give_the_same_bits(monkeypatch):
    in_turns_of(monkeypatch, 1, tokens=512)
    inputs, grad = attention_inputs(torch.bfloat16, "cuda", 8, 4, 512, 64)
    torch.use_deterministic_algorithms(True)
    try:
        outputs = [causal_attention(*inputs, SCALE) for _ in range(2)]
        assert all(map(takes_turns, outputs))
        found = [torch.autograd.grad(output, inputs, grad) for output in outputs]
        want = torch.autograd.grad(plain_attention(*inputs), inputs, grad)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, *found))
    for one, other in zip(found[0], want, strict=True):
        assert is_close(one, other, 2**-5)
        assert not is_close(other.roll(1, 1), other, 2**-5)
