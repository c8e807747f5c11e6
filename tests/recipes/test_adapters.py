"""Tests of the options that make the adapters: what is misspelt is named, what a checkpoint does not fit is refused."""

import pytest
from helpers.models import qwen3, qwen3_config
from lora.adapters import add_adapters, check_checkpoint, check_names

OPTIONS = {
    "architecture": {"num_experts": 8, "hidden_size": 32}, "init": "random", "init_seed": 0, "name": None, "rank": 4,
    "alpha": 8, "target_modules": ("q_proj", "v_proj"), "modules_to_save": (), "experts": False, "router": "frozen",
    "router_module": "mlp.gate", "router_aux_loss": 0.0, "learning_rate": 1e-4, "checkpointing": "none",
    "dtype": "float32", "fused_lora": True,
}  # fmt: skip
PRETRAINED = OPTIONS | {"init": "pretrained", "name": "Qwen/one"}


@pytest.mark.parametrize(
    ("option", "wanted"), [("target_modules", "vproj"), ("target_modules", "proj"), ("modules_to_save", "lm_heads")]
)
def test_what_matches_no_module_is_named(option, wanted):
    options = OPTIONS | {option: ("q_proj", wanted)}
    with pytest.raises(ValueError, match=f"model.{option} names '{wanted}', and the model has no such .*, v_proj"):
        check_names(qwen3_config(), options)


@pytest.mark.parametrize(
    ("option", "wanted"),
    [("target_modules", "self_attn.q_proj"), ("target_modules", "0.self_attn.o_proj"), ("modules_to_save", "head"),
     ("modules_to_save", "model.norm")],
)  # fmt: skip
def test_what_peft_finds_is_taken(option, wanted):
    options = OPTIONS | {option: (wanted,)}
    check_names(qwen3_config(), options)
    trained = [name for name, p in add_adapters(qwen3(), options).named_parameters() if p.requires_grad]
    assert any(f"{wanted}." in name for name in trained)


@pytest.mark.parametrize(
    "changed",
    [
        {"rank": 8}, {"alpha": 4}, {"target_modules": ("q_proj",)}, {"modules_to_save": ("lm_head",)},
        {"experts": True}, {"router": "trained"}, {"init_seed": 1}, {"init": "pretrained", "name": "Qwen/one"},
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_model_is_refused(changed):
    (name, value), *_ = changed.items()
    shown = list(value) if isinstance(value, tuple) else value
    with pytest.raises(ValueError, match="Set it as it was, or train anew: no --ckpt_path") as refusal:
        check_checkpoint(OPTIONS | changed, OPTIONS)
    assert f"model.{name} is {shown!r} and was " in str(refusal.value)


def test_the_architectures_field_is_named():
    other = OPTIONS | {"architecture": {"num_experts": 16, "hidden_size": 32}}
    with pytest.raises(ValueError, match="another model: model.architecture.num_experts is 16 and was 8. Set"):
        check_checkpoint(other, OPTIONS)


def test_what_makes_no_other_weights_may_change():
    freely = {"learning_rate": 1.0, "checkpointing": "full", "dtype": "bfloat16"}
    check_checkpoint(OPTIONS | freely | {"target_modules": ["v_proj", "q_proj"]}, OPTIONS)
    check_checkpoint(PRETRAINED | freely | {"architecture": {}, "init_seed": 3}, PRETRAINED)


def test_a_folder_with_the_base_may_move_and_another_name_may_not(tmp_path):
    check_checkpoint(PRETRAINED | {"name": str(tmp_path)}, PRETRAINED | {"name": "/where/it/was"})
    with pytest.raises(ValueError, match="model.name is 'Qwen/two' and was 'Qwen/one'"):
        check_checkpoint(PRETRAINED | {"name": "Qwen/two"}, PRETRAINED)
