"""Tests of the loss: against the full logits, masked tokens, what is kept."""

import lora.loss
import pytest
import torch
from lora.chat import IGNORED
from lora.loss import CHUNK_TOKENS, next_token_loss
from torch import nn
from torch.nn.functional import cross_entropy

TOKENS = CHUNK_TOKENS + 300


def problem(dtype=torch.float32):
    torch.manual_seed(0)
    hidden = torch.randn(1, TOKENS, 32, dtype=dtype, requires_grad=True)
    head = nn.Linear(32, 200, bias=False, dtype=dtype)
    labels = torch.randint(0, 200, (1, TOKENS))
    labels[0, 5:400] = IGNORED
    return hidden, head, labels


def results(dtype=torch.float32, full_logits=False):
    hidden, head, labels = problem(dtype)
    if full_logits:
        hidden, head = hidden.detach().double().requires_grad_(), head.double()
        loss = cross_entropy(head(hidden)[0, :-1], labels[0, 1:])
    else:
        loss = next_token_loss(hidden, head, labels)
    loss.backward()
    return loss.detach(), hidden.grad, head.weight.grad


def test_loss_and_gradients_equal_those_of_the_full_logits():
    for mine, truth in zip(results(), results(full_logits=True), strict=True):
        torch.testing.assert_close(mine.double(), truth, atol=1e-7, rtol=1e-5)


def test_a_bfloat16_loss_is_not_rounded_to_bfloat16():
    loss, grad, _ = results(torch.bfloat16)
    truth, true_grad, _ = results(torch.bfloat16, full_logits=True)
    assert loss.dtype == torch.float32
    assert abs(loss - truth) < 1e-3 < abs(truth.bfloat16() - truth)
    assert (grad.double() - true_grad).norm() / true_grad.norm() < 1e-2


def test_no_label_no_loss():
    hidden, head, labels = problem()
    loss = next_token_loss(hidden, head, torch.full_like(labels, IGNORED))
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()


def test_each_token_predicts_the_next():
    hidden, head, labels = problem()
    shifted = next_token_loss(hidden, head, labels.roll(1, 1))
    assert abs(shifted - next_token_loss(hidden, head, labels)) > 1e-3


def test_no_logits_are_kept():
    saved = []

    def note(tensor):
        saved.append(tensor.numel())
        return tensor

    hidden, head, labels = problem()
    head.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = next_token_loss(hidden, head, labels)
    assert 0 < max(saved) <= hidden.numel()
    loss.backward()


def test_a_float32_head_trains_on_a_bfloat16_base():
    hidden, head, labels = problem()
    loss, _, grad = results()
    low = hidden.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = next_token_loss(low, head, labels)
    mixed.backward()
    assert (mixed.dtype, low.grad.dtype, head.weight.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    assert abs(mixed - loss) < 1e-2
    assert (head.weight.grad - grad).norm() / grad.norm() < 2e-2


def test_without_a_graph_no_gradients_are_formed():
    hidden, head, labels = problem()
    formed = []
    head.register_forward_hook(lambda *results: formed.append(results[2].requires_grad))
    with torch.no_grad():
        loss = next_token_loss(hidden, head, labels)
    assert formed == [False, False]
    assert loss == next_token_loss(hidden, head, labels)


def test_any_head_trains():
    """One with a bias and adapters, whose frozen weight gets no gradient."""
    hidden, head, labels = problem()
    head.requires_grad_(False)
    adapted = nn.Sequential(head, nn.Linear(200, 200))
    next_token_loss(hidden, adapted, labels).backward()
    ours = [tensor.grad.clone() for tensor in (hidden, *adapted[1].parameters())]
    hidden.grad = None
    adapted.zero_grad()
    cross_entropy(adapted(hidden)[0, :-1], labels[0, 1:]).backward()
    for mine, wanted in zip(ours, (hidden, *adapted[1].parameters()), strict=True):
        torch.testing.assert_close(mine, wanted.grad, atol=1e-7, rtol=1e-4)
    assert head.weight.grad is None


def with_labels():
    torch.manual_seed(0)
    targets = torch.randint(0, 1000, (300,))
    targets[100:200] = IGNORED
    return 3 * torch.randn(300, 1000, dtype=torch.bfloat16), targets


def test_the_compiler_sees_all_of_a_part_s_loss():
    given = with_labels()
    whole = torch.compile(lora.loss._loss_and_gradient, fullgraph=True, dynamic=True, backend="eager")(*given)
    assert all(map(torch.equal, whole, lora.loss._loss_and_gradient(*given)))


@pytest.mark.filterwarnings(r"ignore:\s*Online softmax is disabled", "ignore:TensorFloat32 tensor cores")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_on_a_gpu_it_is_the_same():
    logits, targets = (tensor.to("cuda") for tensor in with_labels())
    loss, gradient = lora.loss._loss_and_gradient(logits, targets)
    compiled_loss, compiled = lora.loss._compiled()(logits, targets)
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=0)
    assert (compiled - gradient).float().norm() / gradient.float().norm() < 2**-9  # of a rounding to bfloat16
    assert (compiled - gradient.roll(1, 0)).float().norm() / gradient.float().norm() > 1
    assert not compiled[100:200].any()
