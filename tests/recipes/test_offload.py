"""Tests of activation offload: what comes back, where it waits, and when it is fetched."""

from contextlib import nullcontext

import pytest
import torch
from lora.offload import ActivationOffload
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def chain(weights, offload=None, early=False):
    """The gradients of layers one after the other, each computed again in backward."""
    x = torch.ones(4096, 1024, device="cuda", requires_grad=True)
    for weight in weights:
        block = offload.next_block() if offload else None
        with block.hooks() if block else nullcontext():
            x = checkpoint(lambda x, w=weight: torch.tanh(x @ w / 32), x, use_reentrant=False)
        if early:
            x.register_hook(lambda _, block=block: block.fetch_before())
    return torch.autograd.grad(x.sum(), weights)


@pytest.mark.parametrize("early", [False, True], ids=["fetched when asked for", "fetched early"])
def test_offloaded_activations_come_back_as_they_went(early):
    offload = ActivationOffload()
    weights = [torch.randn(1024, 1024, device="cuda", requires_grad=True) for _ in range(6)]
    want = chain(weights)
    for _ in range(3):
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        got = chain(weights, offload, early)
        assert all(map(torch.equal, got, want))
        del got
    assert torch.cuda.memory_allocated() <= held + 2**20  # nothing stays behind


def test_offloaded_activations_are_not_on_the_device_while_they_wait():
    offload = ActivationOffload()
    x = torch.ones(4096, 1024, device="cuda", requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    for _ in range(8):
        with offload.next_block().hooks():
            x = checkpoint(torch.sin, x, use_reentrant=False)
    assert torch.cuda.memory_allocated() - held <= 4 * x.nbytes  # without offload, 8


def test_a_block_is_fetched_at_once_and_again_for_another_backward():
    block = ActivationOffload().next_block()
    tensors = [torch.randn(1024, 1024, device="cuda").t(), torch.randn(2**20, device="cuda")]
    packed = [block.pack(tensor) for tensor in tensors]
    block.free_device_copies()
    assert not any(one.is_on_device for one in packed)
    for _ in range(2):
        first = block.unpack(packed[0])
        assert packed[1].is_on_device
        second = block.unpack(packed[1])
        assert torch.equal(first, tensors[0])
        assert torch.equal(second, tensors[1])
    assert first.stride() == tensors[0].stride()


def test_a_block_waits_on_the_host_from_the_next_but_one_on_and_is_fetched_whole():
    offload = ActivationOffload()
    first = offload.next_block()
    packed = [first.pack(torch.randn(2**20, device="cuda")) for _ in range(2)]
    second = offload.next_block()
    assert [one.is_on_device for one in packed] == [True, True]
    offload.next_block()
    assert [one.is_on_device for one in packed] == [False, False]
    second.fetch_before()
    assert [one.is_on_device for one in packed] == [True, True]


def test_small_tensors_and_what_was_not_packed_stay():
    block = ActivationOffload().next_block()
    small = torch.ones(8, device="cuda")
    assert block.pack(small) is small
    assert block.unpack(small) is small
    assert block.unpack(7) == 7
