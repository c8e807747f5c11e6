"""Model FLOPs: against figures written out, what PyTorch counts on a model of known routing, and a published size."""

import pytest
from helpers.models import qwen3, qwen3_config, tokens
from lora.flops import model_flops
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3MoeConfig

EVERYTHING = dict.fromkeys(
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate", "experts.gate_up_proj", "experts.down_proj", "gate_proj",
     "up_proj", "down_proj", "lm_head"), "full",
)  # fmt: skip
SMALL = Qwen3MoeConfig(
    vocab_size=7, hidden_size=4, moe_intermediate_size=3, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=6, num_experts=6, num_experts_per_tok=2,
)  # fmt: skip

# SMALL's products for one token in forward: a layer's, and the head's.
QUERY, KEY, VALUE, OUT = 4 * 12, 4 * 6, 4 * 6, 12 * 4
ROUTER, UP, DOWN = 4 * 6, 2 * 4 * 6, 2 * 3 * 4
HEAD = 4 * 7
FORWARD = 2 * (QUERY + KEY + VALUE + OUT + ROUTER + UP + DOWN) + HEAD

# Two documents of 3 and 2 tokens: scores and weighted values of 12 channels over 9 / 2 + 4 / 2 pairs, in two layers.
ATTENTION = 2 * 2 * 2 * 12 * (3 * 3 + 2 * 2) // 2


@pytest.mark.parametrize(
    ("trained", "products"),
    [
        ({}, 2 * FORWARD),
        (EVERYTHING, 3 * FORWARD),
        ({"lm_head": "full"}, 2 * FORWARD + HEAD),
        ({"gate": "full"}, 2 * FORWARD + 2 * ROUTER),
        ({"q_proj": 8}, 2 * FORWARD + 2 * 3 * 8 * (4 + 12)),
        ({"o_proj": 1, "v_proj": 1}, 2 * FORWARD + 2 * 3 * (12 + 4 + 4 + 6)),
        ({"experts.gate_up_proj": 2, "experts.down_proj": 2}, 2 * FORWARD + 2 * 2 * 3 * 2 * (4 + 6 + 3 + 4)),
    ],
)
def test_by_hand(trained, products):
    assert model_flops(SMALL, 5, 3 * 3 + 2 * 2, trained) == 2 * 5 * products + 3 * ATTENTION


def test_sums_over_steps_give_the_flops_of_all():
    steps = [(5, 13), (9, 41)]
    tokens, squares = map(sum, zip(*steps, strict=True))
    assert model_flops(SMALL, tokens, squares, EVERYTHING) == sum(model_flops(SMALL, *s, EVERYTHING) for s in steps)


def test_qwen3_30b_a3b_has_its_active_parameters():
    config = Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
    )  # fmt: skip
    active = model_flops(config, 1, 0, EVERYTHING) / 6  # training takes 6 FLOPs per parameter and token
    assert (active + 151936 * 2048) / 1e9 == pytest.approx(3.3, abs=0.06)  # the embedding takes none


def counted(model, length):
    """PyTorch's count of a step with one document, the rotary embedding's products left out."""
    counter = FlopCounterMode(display=False)
    with counter:
        ids = tokens(1, length)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    by_module = {name: sum(flops.values()) for name, flops in counter.get_flop_counts().items()}
    # Transformers 5.17 forms the angles by a matrix product.
    return by_module["Global"] - sum(flops for name, flops in by_module.items() if name.endswith("rotary_emb"))


def eager(**changes):
    model = qwen3(**changes)
    model.set_attn_implementation("eager")  # its scores are whole squares, twice what is causal
    model.set_experts_implementation("eager")  # grouped_mm would not be counted
    return model


@pytest.mark.parametrize(
    "changes", [{}, {"num_experts_per_tok": 5}, {"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}]
)
def test_pytorch_counts_as_much_where_everything_trains(changes):
    flops = model_flops(qwen3_config(**changes), 24, 2 * 24**2, EVERYTHING)
    assert counted(eager(**changes), 24) == flops
    assert flops != model_flops(qwen3_config(**changes), 24, 24**2, EVERYTHING)


@pytest.mark.parametrize("trained", [{"q_proj": 4, "k_proj": 4, "v_proj": 4, "o_proj": 4}, {"o_proj": 8}])
def test_pytorch_counts_as_much_with_adapters(trained):
    rank = next(iter(trained.values()))
    model = get_peft_model(eager(), LoraConfig(r=rank, target_modules=list(trained), modules_to_save=["lm_head"]))
    model.enable_input_require_grads()  # the first layer's input wants a gradient, as we count
    assert counted(model, 24) == model_flops(qwen3_config(), 24, 2 * 24**2, trained | {"lm_head": "full"})


def test_what_it_does_not_know_is_named():
    with pytest.raises(ValueError, match="trained names gate_up_proj; known are q_proj, .*experts.gate_up_proj"):
        model_flops(SMALL, 1, 1, {"gate_up_proj": "full"})
