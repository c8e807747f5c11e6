"""Where checkpoints' tensors go in a model, and which model a config.json means."""

import pytest
from helpers.models import mixtral, qwen3, qwen3_vl
from transformers import Qwen3_5MoeConfig

from lightning_moe.integrations.checkpoint_names import Place, build_on_meta, find_places


def test_hub_names_of_experts_are_parts_of_a_parameter():
    hub = "model.layers.1.block_sparse_moe.experts.5"
    gate_up = "model.layers.1.mlp.experts.gate_up_proj"
    places = find_places(mixtral(), [f"{hub}.w1.weight", f"{hub}.w2.weight", f"{hub}.w3.weight", gate_up, "odd"])
    assert places == {
        f"{hub}.w1.weight": Place(gate_up, 5, 0, 2),
        f"{hub}.w3.weight": Place(gate_up, 5, 1, 2),
        f"{hub}.w2.weight": Place("model.layers.1.mlp.experts.down_proj", 5),
        gate_up: Place(gate_up),
    }


def test_names_in_the_model_stay():
    model = qwen3()
    names = [name for name in model.state_dict() if ".experts." not in name]
    assert find_places(model, names) == {name: Place(name) for name in names}


def test_transposed_experts_are_said_to_be():
    name = "model.language_model.layers.0.mlp.experts.down_proj"
    assert find_places(qwen3_vl(), [name]) == {name: Place(name, is_transposed=True)}


@pytest.mark.parametrize("model", ["Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeForCausalLM"])
def test_names_in_the_model_choose_its_class(tmp_path, model):
    """One config.json for a model that sees and for its text alone."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_experts": 2, "head_dim": 16}
    config = Qwen3_5MoeConfig(text_config=sizes | {"layer_types": ["full_attention"]}, vision_config={"depth": 1})
    config.architectures = ["Qwen3_5MoeForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    inside = "model.language_model.layers.0" if "Conditional" in model else "model.layers.0"
    assert type(build_on_meta(tmp_path, [f"{inside}.self_attn.q_proj"])).__name__ == model
