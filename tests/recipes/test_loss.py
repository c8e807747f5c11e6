"""Tests of the loss: every implementation against the full logits, masked tokens, the choice of one."""

import pytest
import torch
from lora.loss import CHUNK_TOKENS, IGNORED, choose_loss, next_token_loss
from torch import nn
from torch.nn.functional import cross_entropy

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TOKENS = CHUNK_TOKENS + 300
CPU = torch.device("cpu")
HAS_TORCHS = hasattr(nn.functional, "linear_cross_entropy")
IMPLS = ["chunked", pytest.param("torch", marks=pytest.mark.skipif(not HAS_TORCHS, reason="needs torch 2.13"))]


def problem(dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    hidden = torch.randn(1, TOKENS, 32, dtype=dtype, device=device, requires_grad=True)
    head = nn.Linear(32, 200, bias=False, dtype=dtype, device=device)
    labels = torch.randint(0, 200, (1, TOKENS), device=device)
    labels[0, 5:400] = IGNORED
    return hidden, head, labels


def results(impl, dtype=torch.float32, device="cpu"):
    hidden, head, labels = problem(dtype, device)
    if impl is None:
        hidden, head = hidden.detach().double().requires_grad_(), head.double()
        loss = cross_entropy(head(hidden)[0, :-1], labels[0, 1:])
    else:
        loss = next_token_loss(hidden, head, labels, impl)
    loss.backward()
    return loss.detach(), hidden.grad, head.weight.grad


@pytest.mark.parametrize("impl", IMPLS)
def test_loss_and_gradients_equal_those_of_the_full_logits(impl):
    for mine, truth in zip(results(impl), results(None), strict=True):
        torch.testing.assert_close(mine.double(), truth, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_bfloat16_loss_is_not_rounded_to_bfloat16(impl):
    loss, grad, _ = results(impl, torch.bfloat16)
    truth, true_grad, _ = results(None, torch.bfloat16)
    assert loss.dtype == torch.float32
    assert abs(loss - truth) < 1e-3 < abs(truth.bfloat16() - truth)
    assert (grad.double() - true_grad).norm() / true_grad.norm() < 1e-2


@on_gpu
def test_ligers_loss_equals_that_of_the_full_logits():
    pytest.importorskip("liger_kernel", reason="needs liger-kernel")
    for mine, truth in zip(results("liger", device="cuda"), results(None, device="cuda"), strict=True):
        torch.testing.assert_close(mine.double(), truth, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_label_no_loss(impl):
    hidden, head, labels = problem()
    loss = next_token_loss(hidden, head, torch.full_like(labels, IGNORED), impl)
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()


def test_each_token_predicts_the_next():
    hidden, head, labels = problem()
    shifted = next_token_loss(hidden, head, labels.roll(1, 1), "chunked")
    assert abs(shifted - next_token_loss(hidden, head, labels, "chunked")) > 1e-3


@pytest.mark.parametrize("impl", IMPLS)
def test_no_more_than_a_chunk_of_logits_is_kept(impl):
    kept = []

    def note(tensor):
        kept.append(tensor.numel())
        return tensor

    hidden, head, labels = problem()
    head.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        next_token_loss(hidden, head, labels, impl)
    assert max(kept) <= hidden.numel()


def test_auto_takes_the_first_that_the_head_and_the_device_allow():
    _, head, _ = problem()
    assert choose_loss("auto", head, CPU) == ("torch" if HAS_TORCHS else "chunked")
    assert choose_loss("auto", nn.Linear(4, 4, bias=True), CPU) == "chunked"


@pytest.mark.parametrize(
    ("impl", "head", "reason"),
    [
        ("liger", nn.Linear(4, 4, bias=False), "it needs a GPU"),
        ("torch", nn.Sequential(), "the head is a Sequential"),
        ("liger", nn.Linear(4, 4), "the head is a Linear"),
    ],
)
def test_an_implementation_that_cannot_be_taken_is_refused_with_the_reason(impl, head, reason):
    with pytest.raises(ValueError, match=reason):
        choose_loss(impl, head, CPU)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_float32_head_trains_on_a_bfloat16_base(impl):
    hidden, head, labels = problem()
    loss, _, grad = results(impl)
    low = hidden.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = next_token_loss(low, head, labels, impl)
    mixed.backward()
    assert (mixed.dtype, low.grad.dtype, head.weight.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    assert abs(mixed - loss) < 1e-2
    assert (head.weight.grad - grad).norm() / grad.norm() < 2e-2
