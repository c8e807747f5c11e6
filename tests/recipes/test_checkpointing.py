"""Tests of what a layer keeps: equal gradients in every mode, fewer saved activations, layers' inputs on the host."""

import pytest
import torch
from helpers.models import VOCABULARY, qwen3
from lora.checkpointing import ActivationOffload, enable_checkpointing
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from lightning_moe import gategrad

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

MODES = [("none", 0), ("none", 16), ("attention", 0), ("attention", 16), ("full", 0), ("full", 16)]


def model(device="cpu"):
    network = qwen3().to(device).train()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    for layer in network.model.layers:
        layer.self_attn.q_proj.weight.requires_grad_()
        layer.mlp.gate.weight.requires_grad_()
    return network


def step(network, tokens=50, balances=True):
    ids = torch.arange(tokens, device=network.device)[None] % VOCABULARY
    outputs = network.model(input_ids=ids, use_cache=False, output_router_logits=balances)
    loss = outputs.last_hidden_state.square().mean()
    if balances:
        config = network.config
        loss = loss + load_balancing_loss_func(outputs.router_logits, config.num_experts, config.num_experts_per_tok)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in network.parameters() if p.requires_grad]


@pytest.mark.parametrize(("mode", "tile_tokens"), MODES)
@pytest.mark.parametrize("patched", [False, True])
def test_every_mode_gives_the_same_loss_and_gradients_with_the_routers_loss(mode, tile_tokens, patched):
    want_loss, want = step(model())
    network = model()
    enable_checkpointing(network.model.layers, mode, tile_tokens=tile_tokens)
    if patched:
        with gategrad(network):
            loss, grads = step(network)
    else:
        loss, grads = step(network)
    torch.testing.assert_close(loss, want_loss)
    for mine, theirs in zip(grads, want, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_the_routers_loss_reaches_the_router():
    grads = [step(model(), balances=balances)[1][1] for balances in (False, True)]
    assert not torch.allclose(*grads, atol=1e-6, rtol=1e-4)


def kept_bytes(mode, tile_tokens=0):
    network = model()
    enable_checkpointing(network.model.layers, mode, tile_tokens=tile_tokens)
    frozen = {p.untyped_storage().data_ptr() for p in network.parameters()}
    storages = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is given twice
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        network.model(input_ids=torch.arange(VOCABULARY)[None], use_cache=False)
    return sum(size for size, _ in storages.values())


def test_more_recomputation_keeps_less():
    kept = [kept_bytes(mode) for mode in ("none", "attention", "full")]
    assert kept[0] > 1.2 * kept[1] > 2 * kept[2]
    assert kept_bytes("none", tile_tokens=16) < kept[0]


def test_attention_checkpointing_runs_attention_twice_and_experts_once():
    network = model()
    enable_checkpointing(network.model.layers, "attention")
    runs = {"self_attn": 0, "mlp": 0}
    for name in runs:
        module = getattr(network.model.layers[0], name)
        inner = module.q_proj if name == "self_attn" else module.experts
        inner.register_forward_hook(lambda *_, name=name: runs.update({name: runs[name] + 1}))
    step(network, balances=False)
    assert runs == {"self_attn": 2, "mlp": 1}


def test_outside_training_nothing_is_recomputed_or_tiled():
    network = model()
    enable_checkpointing(network.model.layers, "full", tile_tokens=4)
    runs = []
    network.model.layers[0].mlp.experts.register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        network.model(input_ids=torch.arange(VOCABULARY)[None], use_cache=False)
    assert runs == [1]


def test_offload_without_full_checkpointing_is_refused():
    with pytest.raises(ValueError, match="only checkpointing 'full' saves, not 'attention'"):
        enable_checkpointing(model().model.layers, "attention", offload=True)


def test_on_the_cpu_offload_changes_nothing():
    want_loss, want = step(model())
    network = model()
    enable_checkpointing(network.model.layers, "full", offload=True)
    loss, grads = step(network)
    assert torch.equal(loss, want_loss)
    assert all(map(torch.equal, grads, want))


@on_gpu
@pytest.mark.parametrize("large", [2**40, 0], ids=["fetched early", "fetched when asked for"])
def test_offloaded_activations_come_back_as_they_went(large, monkeypatch):
    monkeypatch.setattr("lora.checkpointing.LARGEST_FETCHED_EARLY_BYTES", large)
    offload = ActivationOffload()
    weights = [torch.randn(1024, 1024, device="cuda", requires_grad=True) for _ in range(6)]

    def chain(hooks):
        x = torch.ones(4096, 1024, device="cuda", requires_grad=True)
        for weight in weights:
            with hooks():
                x = checkpoint(lambda x, w=weight: torch.tanh(x @ w / 32), x, use_reentrant=False)
        return torch.autograd.grad(x.sum(), weights)

    want = chain(lambda: saved_tensors_hooks(lambda t: t, lambda t: t))
    for _ in range(3):
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        got = chain(offload.hooks)
        assert all(map(torch.equal, got, want))
        del got
    assert torch.cuda.memory_allocated() <= held + 2**20  # nothing stays behind


@on_gpu
def test_offloaded_activations_are_not_on_the_device_while_they_wait():
    offload, kept = ActivationOffload(), []
    x = torch.ones(4096, 1024, device="cuda", requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    for _ in range(8):
        with offload.hooks():
            x = checkpoint(torch.sin, x, use_reentrant=False)
    kept.append(x)
    assert torch.cuda.memory_allocated() - held <= 3 * x.nbytes  # without offload, 8
