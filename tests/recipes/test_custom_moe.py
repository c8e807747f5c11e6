"""The custom mixture of experts equals a loop over its experts, and learns."""

import torch
from custom_moe import CustomMoE, main
from helpers.reference import LAYOUTS, loop, relative_error


def test_custom_moe_equals_the_loop():
    torch.manual_seed(0)
    module, inputs = CustomMoE(16, 24, 5, 3), torch.randn(2, 7, 16)
    routing_weights, index = module.router(inputs.view(-1, 16)).softmax(-1).topk(3)
    leaves = {
        "hidden_states": inputs.view(-1, 16),
        "top_k_weights": routing_weights / routing_weights.sum(-1, keepdim=True),
        "gate_up_proj": module.gate_up_proj,
        "down_proj": module.down_proj,
    }
    expected = loop(LAYOUTS["default"], index, leaves).view_as(inputs)
    assert relative_error(module(inputs), expected) < 1e-6
    assert relative_error(module(inputs.roll(1, 0)), expected) > 0.1


def test_custom_moe_learns(capsys):
    main()
    first, last = map(float, capsys.readouterr().out.rpartition(":")[2].split("->"))
    assert last < 0.8 * first
