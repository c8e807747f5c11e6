"""Tests of what a layer keeps: equal gradients in every mode, fewer saved activations, what fits."""

import importlib
from types import SimpleNamespace

import psutil
import pytest
import torch
from helpers.families import build, experts_classes, family_names, results
from helpers.models import VOCABULARY, gpt_oss, qwen3, qwen3_config
from lora.attention import NAME as VARLEN
from lora.attention import register
from lora.checkpointing import (
    TWO_BLOCKS,
    choose_checkpointing,
    draws_random_numbers,
    enable_checkpointing,
    kept_bytes,
)
from lora.kept_results import ATTENTION
from lora.linear import fuse_updates
from lora.offload import OffloadedBlock
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from lightning_moe import gategrad

MODES = [
    (mode, tile_tokens, has_two_blocks)
    for mode in ("none", "selective", "full")
    for tile_tokens in (0, 16)
    for has_two_blocks in ((False, True) if mode == "selective" else (True,))
]


def model():
    register()
    network = qwen3().train()
    network.set_attn_implementation(VARLEN)
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


@pytest.mark.parametrize(("mode", "tile_tokens", "has_two_blocks"), MODES)
@pytest.mark.parametrize("patched", [False, True])
def test_every_mode_gives_the_same_loss_and_gradients_with_the_routers_loss(mode, tile_tokens, has_two_blocks, patched):
    want_loss, want = step(model())
    network = model()
    enable_checkpointing(network.model.layers, mode, has_two_blocks=has_two_blocks, tile_tokens=tile_tokens)
    if patched:
        with gategrad(network):
            loss, grads = step(network)
    else:
        loss, grads = step(network)
    torch.testing.assert_close(loss, want_loss)
    for mine, theirs in zip(grads, want, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def family(name):
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    return build(name, experts_classes(module)[0])


def family_results(name, **options):
    network = family(name)
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules=r".*self_attn\.(q|k|v|o)_proj", init_lora_weights=False)
    inject_adapter_in_model(lora, network)
    fuse_updates(network)
    if options:
        enable_checkpointing(network.get_decoder().layers, "selective", **options)
    return results(network)


@pytest.mark.parametrize("name", sorted(TWO_BLOCKS & set(family_names())))
def test_layers_of_two_blocks_have_the_same_output_and_gradients(name):
    want, got = family_results(name), family_results(name, has_two_blocks=True)
    assert got.keys() == want.keys()
    for one, value in want.items():
        torch.testing.assert_close(got[one], value, msg=lambda message, one=one: f"{one}: {message}")


def test_that_comparison_sees_a_family_whose_residual_is_behind_its_norm():
    want, got = (family_results("minimax", has_two_blocks=has_two) for has_two in (False, True))
    assert "minimax" not in TWO_BLOCKS
    assert not torch.allclose(got["output"], want["output"], rtol=0.1)


def test_a_block_that_returns_a_pair_runs_in_tiles():
    def gradients(**options):
        network = gpt_oss()
        if options:
            enable_checkpointing(network.model.layers, "selective", **options)
        network(input_ids=torch.arange(40)[None], use_cache=False).logits.square().mean().backward()
        return {name: parameter.grad for name, parameter in network.named_parameters()}

    want = gradients()
    for has_two_blocks in (False, True):
        for name, grad in gradients(tile_tokens=16, has_two_blocks=has_two_blocks).items():
            torch.testing.assert_close(grad, want[name], atol=1e-5, rtol=1e-4)


def runs_of_blocks(mode, **options):
    """How often attention's projection of queries and the experts begin to run for each token of a step."""
    network = model()
    runs = []
    for layer in network.model.layers:
        for module in (layer.self_attn.q_proj, layer.mlp.experts):
            module.register_forward_pre_hook(lambda module, args: runs.append((type(module).__name__, len(args[0]))))
    enable_checkpointing(network.model.layers, mode, **options)
    step(network, tokens=48, balances=False)
    return sum(1 for name, _ in runs if name == "Linear"), sum(rows for name, rows in runs if name != "Linear") / 48


def test_each_block_is_computed_twice_in_tiles_too():
    num_layers = len(model().model.layers)
    assert runs_of_blocks("none") == (num_layers, num_layers)
    for tile_tokens in (0, 16):
        assert runs_of_blocks("selective", tile_tokens=tile_tokens, has_two_blocks=True) == (2 * num_layers,) * 2
    whole = runs_of_blocks("selective", tile_tokens=16)
    assert whole[0] == 2 * num_layers < whole[1]


def test_the_routers_loss_reaches_the_router():
    grads = [step(model(), balances=balances)[1][1] for balances in (False, True)]
    assert not torch.allclose(*grads, atol=1e-6, rtol=1e-4)


def kept_bytes_of_a_step(mode, tile_tokens=0):
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
    assert kept_bytes_of_a_step("none") > 2 * kept_bytes_of_a_step("full")
    assert kept_bytes_of_a_step("none", tile_tokens=16) < kept_bytes_of_a_step("none")


class AttentionCalls(TorchDispatchMode):
    """Counts attention's forward operations."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in ATTENTION
        return func(*args, **(kwargs or {}))


def calls_of_attention(mode, **options):
    network = model()
    enable_checkpointing(network.model.layers, mode, **options)
    with AttentionCalls() as calls:
        step(network, balances=False)
    return calls.count


def test_selective_checkpointing_runs_attention_once():
    runs = {mode: calls_of_attention(mode) for mode in ("none", "selective", "full")}
    assert runs["none"] == runs["selective"] == len(model().model.layers)
    assert runs["full"] == 2 * runs["none"]
    assert calls_of_attention("selective", has_two_blocks=True) == runs["none"]


def test_outside_training_nothing_is_recomputed_or_tiled():
    network = model()
    enable_checkpointing(network.model.layers, "full", tile_tokens=4)
    runs = []
    network.model.layers[0].mlp.experts.register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        network.model(input_ids=torch.arange(VOCABULARY)[None], use_cache=False)
    assert runs == [1]


def test_offload_without_checkpointing_is_refused():
    with pytest.raises(ValueError, match="brings to the host what checkpointing keeps"):
        enable_checkpointing(model().model.layers, "none", offload=True)


@pytest.mark.parametrize(("mode", "has_two_blocks"), [("selective", True), ("selective", False), ("full", False)])
def test_on_the_cpu_offload_changes_nothing(mode, has_two_blocks):
    want_loss, want = step(model())
    network = model()
    enable_checkpointing(network.model.layers, mode, has_two_blocks=has_two_blocks, offload=True)
    loss, grads = step(network)
    assert torch.equal(loss, want_loss)
    assert all(map(torch.equal, grads, want))


@pytest.mark.parametrize(("trained", "unfetched"), [("q_proj", 1), ("mlp.gate", 2)])
def test_a_block_that_backward_does_not_come_to_is_not_fetched(trained, unfetched, monkeypatch):
    """With what precedes the first gate frozen, backward ends before the first layer's attention."""
    fetched = []
    monkeypatch.setattr(OffloadedBlock, "fetch", lambda block: fetched.append(block))
    network = model()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(trained in name)
    enable_checkpointing(network.model.layers, "selective", has_two_blocks=True, offload=True)
    for _ in range(2):  # the second step's blocks are not after the first one's, either
        fetched.clear()
        step(network, balances=False)
        assert len(set(fetched)) == len(fetched) == 2 * len(network.model.layers) - unfetched


def test_a_step_that_failed_in_forward_leaves_nothing_to_fetch(monkeypatch):
    fetched = []
    monkeypatch.setattr(OffloadedBlock, "fetch", lambda block: fetched.append(block))
    network = model()
    enable_checkpointing(network.model.layers, "selective", has_two_blocks=True, offload=True)

    def fail(*_):
        raise RuntimeError("out of memory")

    handle = network.model.layers[-1].mlp.experts.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        step(network)
    handle.remove()
    _, grads = step(network)
    assert len(fetched) == 2 * len(network.model.layers) - 1
    assert all(map(torch.equal, grads, step(model())[1]))


def test_kept_bytes_are_those_of_a_step():
    config = qwen3_config()
    attention = 4 * config.num_attention_heads * config.head_dim + 4 * config.num_attention_heads
    experts_input = 4 * config.hidden_size
    assert kept_bytes(config, "full", torch.bfloat16) == 2 * config.num_hidden_layers * config.hidden_size
    difference = kept_bytes(config, "selective", torch.float32) - kept_bytes(config, "full", torch.float32)
    assert difference == config.num_hidden_layers * (attention + experts_input)
    config.model_type = "minimax"
    difference = kept_bytes(config, "selective", torch.float32) - kept_bytes(config, "full", torch.float32)
    assert difference == config.num_hidden_layers * attention


# Half of the free memory is for what the layers keep: 2 of inputs, a little above 6 with attention and blocks' inputs.
@pytest.mark.parametrize(
    ("free_on_device", "free_on_host", "offload", "chosen"),
    [
        (14, 0, None, ("selective", False)),
        (12, 14, None, ("selective", True)),
        (12, 12, None, ("full", False)),
        (3, 12, None, ("full", True)),
        (3, 3, None, ("full", True)),
        (14, 14, True, ("selective", True)),
        (14, 12, True, ("full", True)),
        (12, 14, False, ("full", False)),
    ],
)
def test_what_fits_is_chosen(free_on_device, free_on_host, offload, chosen, monkeypatch):
    config = qwen3_config(num_attention_heads=2, num_key_value_heads=2, head_dim=32, hidden_size=64)
    inputs, selective = (kept_bytes(config, mode, torch.float16) for mode in ("full", "selective"))
    unit = inputs // 2
    assert 6 < selective / unit < 7
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100 * free_on_device * unit, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * free_on_host * unit))
    device = torch.device("cuda")
    assert choose_checkpointing(config, 100, torch.float16, device, offload=offload) == chosen


def test_full_is_chosen_where_attention_cannot_be_kept():
    chosen = choose_checkpointing(qwen3_config(), 1, torch.float32, torch.device("cpu"), modes=("full",))
    assert chosen == ("full", False)


def with_dropout():
    network = model()
    for layer in network.model.layers:
        layer.post_attention_layernorm = nn.Sequential(layer.post_attention_layernorm, nn.Dropout(0.5))
    return network


@pytest.mark.parametrize("is_random", [True, False])
def test_random_numbers_are_drawn_again_where_it_is_known_that_there_are_any(is_random):
    found = []
    for mode in ("none", "full"):
        network = with_dropout()
        assert draws_random_numbers(network)
        enable_checkpointing(network.model.layers, mode, is_random=is_random)
        torch.manual_seed(1)
        found.append(step(network)[1])
    close = [torch.allclose(mine, theirs, atol=1e-6, rtol=1e-4) for mine, theirs in zip(*found, strict=True)]
    assert all(close) == is_random


@pytest.mark.parametrize(("field", "draws"), [("attention_dropout", True), ("head_dim", False)])
def test_the_configuration_says_whether_there_are_random_numbers(field, draws):
    network = model()
    assert not draws_random_numbers(network)
    setattr(network.config, field, 0.5)
    assert draws_random_numbers(network) == draws
