"""Tests of what a recomputation takes from its forward: attention's results and the router's choice, nothing else."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from helpers.models import qwen3
from lora.attention import NAME as VARLEN
from lora.attention import register
from lora.checkpointing import enable_checkpointing
from lora.kept_results import keep_and_reuse, keeping, keeping_choice
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from lightning_moe import gategrad

TOKENS = 12


def nearly_tied(layer, seed):
    """Has the router give all experts the same probability but for 1e-6, by which it chooses."""
    generator = torch.Generator().manual_seed(seed)
    weight = layer.mlp.gate.weight
    weight.data = 1e-6 * torch.randn(weight.shape, generator=generator)


def gradients(checkpoint_layer=None, *, patched=False, flips=True):
    """Of a decoder layer's input and weights; between forward and backward its router changes its mind."""
    register()
    network = qwen3()
    network.set_attn_implementation(VARLEN)
    layer = network.model.layers[0].train()
    hidden_states = torch.randn(1, TOKENS, network.config.hidden_size, requires_grad=True)
    positions = network.model.rotary_emb(hidden_states, torch.arange(TOKENS)[None])
    nearly_tied(layer, seed=1)
    if checkpoint_layer:
        checkpoint_layer(layer)
    with gategrad(layer) if patched else nullcontext():
        loss = layer(hidden_states, position_embeddings=positions).square().sum()
        if flips:
            nearly_tied(layer, seed=2)
        return torch.autograd.grad(loss, (hidden_states, *layer.parameters()))


def largest_difference(got, want):
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("tile_tokens", [0, 5])
@pytest.mark.parametrize(
    ("mode", "has_two_blocks"), [("selective", True), ("selective", False), ("full", False), ("none", False)]
)
def test_gradients_are_those_of_the_experts_that_made_the_output(mode, has_two_blocks, tile_tokens, patched):
    def checkpoint_layer(layer):
        enable_checkpointing([layer], mode, has_two_blocks=has_two_blocks, tile_tokens=tile_tokens)

    got = gradients(checkpoint_layer, patched=patched)
    assert largest_difference(got, gradients(flips=False)) < 1e-4  # the probabilities differ by 1e-6 of their value


def test_without_the_forwards_choice_they_are_others():
    def plain(layer):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    assert largest_difference(gradients(plain), gradients(flips=False)) > 0.1


def attend(query, seen):
    with keeping():
        output = scaled_dot_product_attention(query, query, query, is_causal=True)
    seen.append(output.detach().clone())
    return output.sin()


def test_attentions_results_are_used_where_they_are_kept_only():
    for attention in (False, True):
        seen = []
        query = torch.randn(1, 2, TOKENS, 16, requires_grad=True)
        contexts = partial(keep_and_reuse, attention=attention)
        output = checkpoint(attend, query, seen, use_reentrant=False, context_fn=contexts)
        query.data.mul_(2)  # what is computed again differs
        output.sum().backward()
        assert torch.equal(*seen) == attention


def test_a_graph_that_is_retained_recomputes_again():
    query = torch.randn(1, 2, TOKENS, 16, requires_grad=True)
    contexts = partial(keep_and_reuse, attention=True)
    output = checkpoint(attend, query, [], use_reentrant=False, context_fn=contexts).sum()
    first, second = (torch.autograd.grad(output, query, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (plain,) = torch.autograd.grad(attend(query, []).sum(), query)
    torch.testing.assert_close(first, plain)


def test_what_is_kept_goes_through_pack_and_unpack():
    packed = []

    def pack(tensor):
        packed.append(tensor)
        return len(packed) - 1

    def unpack(number):
        return packed[number] if isinstance(number, int) else number

    query = torch.randn(1, 2, TOKENS, 16, requires_grad=True)
    contexts = partial(keep_and_reuse, attention=True, pack=pack, unpack=unpack)
    checkpoint(attend, query, [], use_reentrant=False, context_fn=contexts).sum().backward()
    assert [tuple(tensor.shape) for tensor in packed] == [(1, 2, TOKENS, 16), (1, 2, TOKENS)]
    (plain,) = torch.autograd.grad(attend(query, []).sum(), query)
    torch.testing.assert_close(query.grad, plain)


def test_the_recomputations_beginning_is_told():
    told = []

    def layer(x):
        told.append("layer")
        return attend(x * 1, [])

    contexts = partial(keep_and_reuse, attention=True, before_recomputation=lambda: told.append("before"))
    x = torch.randn(1, 2, TOKENS, 16, requires_grad=True)
    output = checkpoint(layer, x, use_reentrant=False, context_fn=contexts)
    assert told == ["layer"]
    output.sum().backward()
    assert told == ["layer", "before", "layer"]


def test_kept_results_do_not_hold_the_graph():
    held = []
    contexts = partial(keep_and_reuse, attention=True, pack=lambda tensor: held.append(tensor) or tensor)
    query = torch.randn(1, 2, TOKENS, 16, requires_grad=True)
    checkpoint(attend, query, [], use_reentrant=False, context_fn=contexts)
    assert held
    assert not any(tensor.requires_grad for tensor in held)


def test_a_recomputation_that_does_more_than_its_forward_is_an_error():
    calls = []

    def another_time(query):
        for _ in calls:
            attend(query.detach(), [])
        calls.append(1)
        return attend(query, [])

    query = torch.randn(1, 2, TOKENS, 16, requires_grad=True)
    contexts = partial(keep_and_reuse, attention=True)
    output = checkpoint(another_time, query, use_reentrant=False, context_fn=contexts)
    with pytest.raises(RuntimeError, match="2 times, its forward did 1"):
        output.sum().backward()


@pytest.mark.parametrize(
    "topk",
    [
        lambda scores: torch.topk(scores, 2),
        lambda scores: torch.topk(input=scores, k=2, dim=-1),
        lambda scores: scores.topk(2, -1, sorted=False),
        lambda scores: scores.t().topk(k=2, dim=0).values.t(),
    ],
    ids=["function", "keywords", "method", "other dimension"],
)
def test_a_choice_is_kept_however_topk_is_called(topk):
    def choose(scores):
        with keeping_choice():
            chosen = topk(scores)
        values = chosen if isinstance(chosen, torch.Tensor) else chosen.values
        values /= values.sum(-1, keepdim=True)  # as routers do, in place
        return values.square()

    scores = torch.rand(TOKENS, 8, requires_grad=True)
    (want,) = torch.autograd.grad(choose(scores).sum(), scores)
    output = checkpoint(choose, scores, use_reentrant=False, context_fn=partial(keep_and_reuse, attention=False))
    scores.data[want == 0] += 1  # computed again, the others would be chosen
    (got,) = torch.autograd.grad(output.sum(), scores)
    assert torch.equal(got != 0, want != 0)
    torch.testing.assert_close(got, want)
