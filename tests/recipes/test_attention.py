"""Tests of the recipe's attention: packed documents against each alone, through the whole model."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from helpers.models import VOCABULARY, qwen3_config
from lora import attention, attention_turns
from lora.base_model import build
from lora.checkpointing import enable_checkpointing
from lora.kept_results import ATTENTION
from lora.sink_attention import attend_documents, masked_attention
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache, GptOssConfig
from transformers.data.data_collator import DataCollatorWithFlattening

LENGTHS = (20, 33, 11)

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def documents(seed=0, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": row, "labels": row} for row in rows]


def packed(docs, device="cpu"):
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(docs)
    batch.pop("labels")
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def model(implementation=attention.NAME, dtype=torch.float32, device="cpu", **changes):
    attention.register()
    torch.manual_seed(0)
    built = AutoModelForCausalLM.from_config(qwen3_config(**changes), attn_implementation=implementation, dtype=dtype)
    return built.to(device).train()


def hidden_states(network, docs):
    return network.model(**packed(docs, network.device), use_cache=False).last_hidden_state[0]


def test_a_packed_document_has_the_hidden_states_that_it_has_alone():
    network, docs = model(), documents()
    together = hidden_states(network, docs).split(LENGTHS)
    for doc, inside in zip(docs, together, strict=True):
        torch.testing.assert_close(inside, hidden_states(network, [doc]))


def test_changing_one_document_changes_no_other():
    network, docs = model(), documents()
    before = hidden_states(network, docs).split(LENGTHS)
    docs[1] = documents(seed=1)[1]
    after = hidden_states(network, docs).split(LENGTHS)
    torch.testing.assert_close(before[0], after[0])
    assert not torch.allclose(before[1], after[1])
    torch.testing.assert_close(before[2], after[2])


def test_without_boundaries_documents_do_see_each_other():
    network, docs = model(), documents()
    batch = packed(docs)
    boundless = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    seen = network.model(**boundless, use_cache=False).last_hidden_state[0].split(LENGTHS)
    alone = hidden_states(network, docs).split(LENGTHS)
    torch.testing.assert_close(seen[0], alone[0])
    assert not torch.allclose(seen[2], alone[2])


@pytest.mark.parametrize("baseline", ["sdpa", "eager"])
def test_hidden_states_and_gradients_equal_those_of_transformers_attention(baseline):
    results = []
    for implementation in (attention.NAME, baseline):
        network = model(implementation)
        hidden = hidden_states(network, documents())
        hidden.square().mean().backward()
        results.append((hidden, network.model.layers[0].self_attn.q_proj.weight.grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_generation_equals_transformers_attention():
    ids = torch.tensor([documents()[0]["input_ids"]])
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    answers = [
        model(implementation).eval().generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
        for implementation in (attention.NAME, "sdpa")
    ]
    assert torch.equal(*answers)


@pytest.mark.parametrize("turns", [1, 2])
def test_a_document_alone_has_the_gradients_of_transformers_attention(turns, monkeypatch):
    """Float32 sums in another order: 2**-12 of the largest value, where a head's or an expert's change is far more."""
    monkeypatch.setattr(attention_turns, "TOKEN_HEADS_IN_FLIGHT", 64 * 2 // turns)
    doc, found = documents(lengths=(64,)), []
    for implementation in (attention.NAME, "eager"):
        network = model(implementation, num_attention_heads=4, num_key_value_heads=2)
        with CountAttention() as calls:
            hidden = hidden_states(network, doc)
            hidden.square().mean().backward()
        if implementation == attention.NAME:
            layers = len(network.model.layers)
            assert (calls.number, calls.backward) == (layers, turns * layers)
        found.append([hidden.detach(), *(parameter.grad for parameter in network.model.layers.parameters())])
    for mine, theirs in zip(*found, strict=True):
        bound = 2**-12 * theirs.abs().max()
        assert (mine - theirs).abs().max() <= bound
        assert (theirs.roll(1, 0) - theirs).abs().max() > bound


@on_gpu
def test_packed_documents_on_a_gpu_equal_each_alone():
    network, docs = model(dtype=torch.bfloat16, device="cuda"), documents()
    together = hidden_states(network, docs).split(LENGTHS)
    for doc, inside in zip(docs, together, strict=True):
        torch.testing.assert_close(inside.float(), hidden_states(network, [doc]).float(), atol=0.1, rtol=0.1)
    docs[1] = documents(seed=1)[1]
    after = hidden_states(network, docs).split(LENGTHS)
    torch.testing.assert_close(together[2].float(), after[2].float(), atol=0.1, rtol=0.1)
    assert not torch.allclose(together[1].float(), after[1].float(), atol=0.1, rtol=0.1)


def attend_by_transformers(
    monkeypatch, tokens=5, cached=0, head_dim=16, value_dim=None, groups=2, config=None, **options
):
    """Whether one document's attention goes through Transformers' function."""
    query, key = torch.randn(1, 4, tokens, head_dim), torch.randn(1, 4 // groups, tokens + cached, head_dim)
    value = torch.randn(*key.shape[:3], value_dim or head_dim)
    calls, function = [], attention.sdpa_attention_forward
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *a, **rest: calls.append(1) or function(*a, **rest))
    module = SimpleNamespace(num_key_value_groups=groups, is_causal=True, training=True, config=config)
    attention.varlen_attention(module, query, key, value, None, scaling=0.1, **options)
    return bool(calls)


@pytest.mark.parametrize("is_long", [False, True])
def test_transformers_function_sees_to_what_it_alone_knows(is_long, monkeypatch):
    if is_long:
        monkeypatch.setattr(attention_turns, "TOKEN_HEADS_IN_FLIGHT", 1)
    assert not attend_by_transformers(monkeypatch)
    assert not attend_by_transformers(monkeypatch, value_dim=8, groups=1)
    assert attend_by_transformers(monkeypatch, value_dim=8)
    assert attend_by_transformers(monkeypatch, dropout=0.5)
    assert attend_by_transformers(monkeypatch, is_causal=False)
    assert attend_by_transformers(monkeypatch, tokens=1, cached=4)
    assert attend_by_transformers(monkeypatch, head_dim=320)
    with pytest.raises(ValueError, match="softcap"):
        attend_by_transformers(monkeypatch, softcap=30.0)


def gpt_oss(build):
    config = GptOssConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
    )  # fmt: skip
    torch.manual_seed(0)
    return build(config).train()


def test_packed_documents_of_gpt_oss_have_the_hidden_states_that_each_has_alone():
    """Transformers' masks, which are not made by position, let them see each other."""
    ours = gpt_oss(lambda config: build(None, config, torch.float32, torch.device("cpu"), "eager", 0))
    own = gpt_oss(lambda config: AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    own.load_state_dict(ours.state_dict())
    docs = documents()
    apart, together = (hidden_states(network, docs).split(LENGTHS) for network in (ours, own))
    for number, doc in enumerate(docs):
        alone = hidden_states(own, [doc])
        torch.testing.assert_close(apart[number], alone)
        assert torch.allclose(together[number], alone, atol=1e-5) == (number == 0)


@pytest.mark.parametrize("documents_", [LENGTHS, (64,)], ids=["three documents", "one"])
def test_gpt_oss_has_the_hidden_states_and_gradients_of_transformers_attention(documents_):
    """Windows of 8 tokens in one layer, none in the other, and sinks in both."""
    ours, eager = (
        gpt_oss(lambda config, name=name: build(None, config, torch.float32, torch.device("cpu"), name, 0))
        for name in (attention.NAME, "eager")
    )
    with torch.no_grad():
        for network in (ours, eager):
            for number, layer in enumerate(network.model.layers):
                layer.self_attn.sinks.copy_(torch.tensor([1.0, -0.5]) + number)
    states = [hidden_states(network, documents(lengths=documents_)) for network in (ours, eager)]
    grads = [torch.autograd.grad(state.square().sum(), list(network.model.layers.parameters()))
             for state, network in zip(states, (ours, eager), strict=True)]  # fmt: skip
    torch.testing.assert_close(*states, atol=2e-5, rtol=1e-5)
    names = [name for name, _ in ours.model.layers.named_parameters()]
    for name, mine, theirs in zip(names, *grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5 * float(theirs.abs().max()) + 1e-7, rtol=1e-3, msg=name)
        assert theirs.abs().max() > 1e-5 or "bias" in name
    with torch.no_grad():  # what the tolerance has to tell apart
        ours.model.layers[0].self_attn.sinks.add_(0.1)
        ours.model.layers[0].self_attn.sliding_window, full = None, hidden_states(ours, documents(lengths=documents_))
        wide = hidden_states(ours, documents(lengths=documents_))
    for wrong in (full, wide):
        assert not torch.allclose(wrong, states[1], atol=2e-4, rtol=1e-3)


def windowed(implementation):
    attention.register()
    torch.manual_seed(0)
    config = qwen3_config()
    config.use_sliding_window, config.sliding_window = True, 8
    config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).train()


def test_a_window_is_that_of_transformers_attention():
    doc = documents()[:1]
    mine, theirs, whole = (
        hidden_states(network, doc) for network in (windowed(attention.NAME), windowed("sdpa"), model())
    )
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(mine, whole, atol=1e-3)


@pytest.mark.parametrize("implementation", ["eager", attention.NAME])
def test_gpt_oss_s_masks_beside_a_cache_are_those_of_transformers(implementation):
    network = gpt_oss(lambda config: build(None, config, torch.float32, torch.device("cpu"), implementation, 0)).eval()
    names = inspect.signature(type(network.model).forward).parameters
    cache = {"cache" if "cache" in names else "past_key_values": DynamicCache(config=network.config)}
    ids, positions = torch.tensor([documents()[0]["input_ids"]]), torch.arange(LENGTHS[0])[None]
    with torch.no_grad():
        whole = network(input_ids=ids, position_ids=positions).logits[:, -2:]
        network(input_ids=ids[:, :-2], position_ids=positions[:, :-2], **cache)
        last = network(input_ids=ids[:, -2:], position_ids=positions[:, -2:], **cache).logits
    torch.testing.assert_close(last, whole)


class CountAttention(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.number = self.backward = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func in ATTENTION
        self.backward += func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        return func(*args, **(kwargs or {}))


def test_padded_rows_of_gpt_oss_are_those_of_transformers_attention():
    ids = torch.tensor([row["input_ids"] for row in documents(lengths=(30, 30, 30))])
    mask = torch.ones_like(ids)
    mask[0, :7], mask[2, :20] = 0, 0
    mine, theirs = (
        gpt_oss(lambda config, name=name: build(None, config, torch.float32, torch.device("cpu"), name, 0)).eval()
        for name in (attention.NAME, "eager")
    )
    with torch.no_grad():
        found, expected, without = (
            network.model(input_ids=ids, attention_mask=given).last_hidden_state
            for network, given in ((mine, mask), (theirs, mask), (mine, None))
        )
    seen = mask.bool()
    torch.testing.assert_close(found[seen], expected[seen], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(without[seen], expected[seen], atol=1e-3)


def test_what_the_kernels_do_not_know_is_refused(monkeypatch):
    bias = torch.zeros(1, 4, 5, 5)
    with pytest.raises(ValueError, match="has no bias by position"):
        attend_by_transformers(monkeypatch, position_bias=bias)
    config = SimpleNamespace(sliding_window=4)
    with pytest.raises(ValueError, match="do not hand over their window of 4 tokens: set --model.attention sdpa"):
        attend_by_transformers(monkeypatch, config=config)
    assert not attend_by_transformers(monkeypatch, config=SimpleNamespace(sliding_window=4, use_sliding_window=False))
    assert not attend_by_transformers(monkeypatch, config=SimpleNamespace(sliding_window=5))
    assert not attend_by_transformers(monkeypatch, config=config, sliding_window=None)
    with pytest.raises(ValueError, match="layers of doge read it: set --model.attention eager"):
        attention.check_config(SimpleNamespace(model_type="doge"))


def attention_inputs(tokens=300, dtype=torch.bfloat16, device="cuda"):
    """Queries of 16 heads, keys and values of 2, sinks, and a gradient of the output."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = (tokens, 16, 64), (tokens, 2, 64), (tokens, 2, 64), (16,), (tokens, 16, 64)
    made = [torch.randn(shape, device=device, generator=generator).to(dtype) for shape in shapes]
    return [tensor.requires_grad_() for tensor in made[:4]], made[4]


def by_masks(query, key, value, sinks, lengths, window):
    """Document by document, in float64."""
    rows = [tensor.double().transpose(0, 1)[None].split(lengths, dim=2) for tensor in (query, key, value)]
    each = [
        masked_attention(nn.Module(), *row, None, s_aux=sinks.double(), sliding_window=window)[0][0]
        for row in zip(*rows, strict=True)
    ]
    return torch.cat(each)


@on_gpu
@pytest.mark.parametrize("window", [None, 1, 40], ids=["all", "itself", "40"])
def test_sinks_and_windows_on_a_gpu_are_those_of_a_mask(window):
    """Of the largest value, an error of eight roundings to bfloat16, and no larger than the masks' own in bfloat16."""
    lengths = (120, 53, 127)
    leaves, grad = attention_inputs()
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device="cuda")
    results = [attend_documents(*leaves[:3], ends, 127, None, window, leaves[3])]
    results.append(by_masks(*leaves, lengths, window))
    found = [[result, *torch.autograd.grad(result, leaves, grad.to(result.dtype))] for result in results]
    for mine, exact in zip(*found, strict=True):
        exact = exact.double()
        assert (mine.double() - exact).abs().max() < 2**-6 * exact.abs().max()
        assert (exact - exact.roll(1, 0)).abs().max() > 2**-3 * exact.abs().max()
    without = by_masks(*leaves[:3], torch.full_like(leaves[3], -1e4), lengths, window)
    assert (without - results[1]).abs().max() > 2**-3


@on_gpu
def test_gpt_oss_s_attention_runs_once_where_its_results_are_kept():
    """FlashAttention's backward adds up in any order: of the largest gradient, eight roundings to bfloat16."""
    found, device = [], torch.device("cuda", torch.cuda.current_device())
    for mode in ("none", "selective"):
        network = gpt_oss(lambda config: build(None, config, torch.bfloat16, device, attention.NAME, 0))
        enable_checkpointing(network.model.layers, mode, router="mlp.router", is_random=False)
        with CountAttention() as calls:
            hidden_states(network, documents()).float().square().sum().backward()
        found.append(({name: parameter.grad for name, parameter in network.model.named_parameters()}, calls.number))
    (want, number), (grads, number_again) = found
    assert number_again == number == 2
    for name, exact in want.items():
        torch.testing.assert_close(grads[name], exact, atol=2**-6 * float(exact.abs().max()), rtol=0, msg=name)
        assert exact.abs().max() > 0 or "bias" in name


@on_gpu
def test_gpt_oss_on_a_gpu_has_the_hidden_states_of_transformers_attention():
    docs, device = documents(), torch.device("cuda", torch.cuda.current_device())
    networks = [
        gpt_oss(lambda config, name=name: build(None, config, torch.bfloat16, device, name, 0))
        for name in (attention.NAME, "eager")
    ]
    mine, theirs = (hidden_states(network, docs).float() for network in networks)
    torch.testing.assert_close(mine, theirs, atol=0.1, rtol=0.1)
    assert not torch.allclose(mine.roll(1, 0), theirs, atol=0.1, rtol=0.1)
