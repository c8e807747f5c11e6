"""Adapters of every kind that the per_expert layout holds, on models of three families, for tests and `.ci/readers`."""

import torch
from helpers.models import EXPERT_TARGETS, mixtral, qwen3
from peft import LoraConfig, get_peft_model
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PhimoeConfig, PhimoeForCausalLM

GATE_UP, DOWN = EXPERT_TARGETS
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "pad_token_id": 0,
}  # fmt: skip


def deepseek():
    """Its first layer is dense, the others have shared experts beside the routed ones."""
    torch.manual_seed(0)
    own = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16}
    own |= {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES | own))


def phimoe():
    """Its router has another name on the hub."""
    torch.manual_seed(0)
    return PhimoeForCausalLM(PhimoeConfig(**SIZES, num_local_experts=4)).eval()


def lora(**options):
    return LoraConfig(**{"r": 4, "target_modules": [], "init_lora_weights": False} | options)


EXPERTS = [GATE_UP, DOWN]
CASES = {
    "gate_up": dict(target_parameters=[GATE_UP]),
    "down": dict(target_parameters=[DOWN]),
    "both": dict(target_parameters=EXPERTS, target_modules=["o_proj"]),
    "rslora": dict(target_parameters=EXPERTS, target_modules=["o_proj"], use_rslora=True, r=3, lora_alpha=5),
    "attention_rslora": dict(target_modules=["o_proj"], use_rslora=True),
    "patterns": dict(
        target_parameters=EXPERTS, target_modules=["o_proj"],
        rank_pattern={"gate_up_proj": 6, "o_proj": 2}, alpha_pattern={"gate_up_proj": 5, "down_proj": 3, "o_proj": 7},
    ),
    "patterns_rslora": dict(
        target_parameters=EXPERTS, target_modules=["o_proj"], use_rslora=True,
        rank_pattern={"gate_up_proj": 6, "o_proj": 2}, alpha_pattern={"down_proj": 3},
    ),
    "router": dict(target_parameters=[*EXPERTS, "mlp.gate.weight"], rank_pattern={"gate.weight": 2}),
    "router_alone": dict(target_parameters=["mlp.gate.weight"]),
    "restricted": dict(
        target_parameters=EXPERTS, target_modules=["o_proj", "v_proj"], layers_to_transform=[1],
        layers_pattern="layers", exclude_modules=r".*v_proj|.*experts.*",
    ),
    "some_layers": dict(target_parameters=[f"layers.1.{GATE_UP}", f"layers.1.{DOWN}"]),
    "layers_differ": dict(target_parameters=[f"layers.1.{DOWN}", f"layers.2.{GATE_UP}"], r=3),
    "peft_joins_gate_and_up": dict(target_modules=["gate_proj", "up_proj", "down_proj", "o_proj"]),
    "all_linear": dict(target_modules="all-linear"),
    "attention_by_pattern": dict(target_modules=r".*layers\.1\..*o_proj"),
}  # fmt: skip
MODELS = {
    "qwen3": lambda: qwen3(num_hidden_layers=3),
    "mixtral": lambda: mixtral(num_hidden_layers=3),
    "deepseek": deepseek,
}
MIXTRALS_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def adapted(build, case):
    """A model with such an adapter, far from zero."""
    config = lora(**CASES[case])
    if build is MODELS["mixtral"] and case == "peft_joins_gate_and_up":  # PEFT goes by the hub's names there
        config.target_modules = {MIXTRALS_NAMES.get(name, name) for name in config.target_modules}
    torch.manual_seed(1)
    return get_peft_model(build(), config)
