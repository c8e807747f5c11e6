"""ExpertLoadMonitor: the load that is logged is that of the routing, on any run."""

import contextlib

import pytest
import torch
from helpers.models import Tiny, experts_modules, qwen3
from helpers.training import LIGHTNING_WARNINGS, FailsTwice, fit, logged, trainer
from torch import nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from lightning_moe import ExpertLoadMonitor, MoEGateGradCallback
from lightning_moe import expert_load as counting

pytestmark = LIGHTNING_WARNINGS


class KnownRouting(nn.Module):
    """Two experts layers, of eight and of four experts, whose 24 tokens each go to expert 0 and to one in turn."""

    # Of 24 tokens: all to expert 0, eight to each of 1, 2 and 3; in the second layer, all to 0 and all to 3.
    rows = ([24, 8, 8, 8, 0, 0, 0, 0], [24, 0, 0, 24])
    load_max_over_mean, idle_experts = 24 / (48 / 8), 4 + 2

    def __init__(self, checkpoint=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 32)
        self.layers = nn.ModuleList([Qwen3MoeExperts(qwen3(num_experts=count).config) for count in (8, 4)])
        for parameter in self.layers.parameters():
            nn.init.normal_(parameter, std=0.1)
        self.checkpoint = checkpoint

    def forward(self, input_ids, labels):
        hidden = self.embed(input_ids).flatten(0, 1)
        gates = torch.full((24, 2), 0.5, requires_grad=True)
        turns = torch.arange(24) % 3 + 1, torch.full((24,), 3)
        for layer, turn in zip(self.layers, turns, strict=True):
            index = torch.stack([torch.zeros_like(turn), turn], dim=1)
            if self.checkpoint:
                out = torch.utils.checkpoint.checkpoint(layer, hidden, index, gates, use_reentrant=False)
            else:
                out = layer(hidden, index, gates)
            hidden = hidden + out
        self.loss = hidden.square().mean()
        return self


def fit_known_routing(tmp_path, checkpoint=False, accumulate=1, **options):
    """Three steps that are logged every second one, and the metrics that these have to have."""
    module, callback = Tiny(lambda: KnownRouting(checkpoint), num_batches=3 * accumulate), ExpertLoadMonitor()
    options = {"max_steps": 3, "log_every_n_steps": 2, "accumulate_grad_batches": accumulate} | options
    fit(tmp_path, module, callback, **options)
    assert logged(tmp_path, "moe/load_max_over_mean") == [KnownRouting.load_max_over_mean]
    assert logged(tmp_path, "moe/idle_experts") == [KnownRouting.idle_experts]
    assert {name: rows.tolist() for name, rows in callback.expert_load.items()} == {
        f"network.layers.{layer}": [3 * accumulate * count for count in rows]
        for layer, rows in enumerate(KnownRouting.rows)
    }
    return module, callback


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_load_of_the_experts_is_that_of_the_routing(tmp_path, checkpoint, accumulate):
    module, callback = fit_known_routing(tmp_path, checkpoint, accumulate)
    assert list(callback.expert_load) == [f"network.layers.{layer}" for layer in range(2)]
    assert {(rows.dtype, rows.device.type) for rows in callback.expert_load.values()} == {(torch.int64, "cpu")}


def test_a_wrong_count_of_the_load_shows(tmp_path, monkeypatch):
    right = counting.count_rows
    monkeypatch.setattr(counting, "count_rows", lambda index, num_experts: right(index[:, 1:], num_experts))
    with pytest.raises(AssertionError):
        fit_known_routing(tmp_path)


@pytest.mark.parametrize("callbacks", [[], [MoEGateGradCallback]])
@pytest.mark.parametrize("is_supported", [True, False])
def test_the_load_is_the_same_on_any_run(tmp_path, callbacks, is_supported):
    module, monitor = Tiny(KnownRouting), ExpertLoadMonitor()
    callbacks = [callback(on_missing="warn") for callback in callbacks]
    (first, _) = experts_modules(module)
    expected = contextlib.nullcontext()
    if not is_supported:
        first.has_post_expert_norm, first.post_expert_norm = True, nn.Identity()
        if callbacks:
            expected = pytest.warns(UserWarning, match="Some MoE layers run the default implementation")
    with expected:
        fit(tmp_path, module, monitor, *callbacks)
    assert logged(tmp_path, "moe/load_max_over_mean") == [KnownRouting.load_max_over_mean] * 4
    assert [rows.tolist() for rows in monitor.expert_load.values()] == [
        [4 * count for count in rows] for rows in KnownRouting.rows
    ]


def test_a_fit_starts_the_load_again_and_nothing_else_does(tmp_path):
    module, callback = fit_known_routing(tmp_path)
    load = callback.expert_load
    trainer(tmp_path, callback, limit_val_batches=None).validate(module)
    assert callback.expert_load is load
    fit(tmp_path / "again", module, callback, max_steps=1)
    assert [rows.tolist() for rows in callback.expert_load.values()] == list(KnownRouting.rows)


def test_a_layer_without_a_backward_is_idle(tmp_path):
    module, callback = Tiny(KnownRouting), ExpertLoadMonitor()
    module.network.unused = Qwen3MoeExperts(qwen3(num_experts=5).config)
    fit(tmp_path, module, callback)
    assert logged(tmp_path, "moe/idle_experts") == [KnownRouting.idle_experts + 5] * 4
    assert callback.expert_load["network.unused"].tolist() == [0] * 5


def test_the_heat_map_is_written_at_the_end_of_a_fit(tmp_path):
    monitor = ExpertLoadMonitor()
    fit(tmp_path, Tiny(KnownRouting), monitor, max_steps=1)
    assert monitor.heat_map == tmp_path / "expert_load.png"
    assert monitor.heat_map.read_bytes().startswith(b"\x89PNG")


def test_a_fit_without_a_logger_counts_and_warns(tmp_path):
    monitor = ExpertLoadMonitor()
    with pytest.warns(UserWarning, match="ExpertLoadMonitor logs nowhere"):
        fit(tmp_path, Tiny(KnownRouting), monitor, max_steps=1, logger=False)
    assert [rows.tolist() for rows in monitor.expert_load.values()] == list(KnownRouting.rows)


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_end", "teardown"])
def test_no_hook_stays_where_another_callback_fails(tmp_path, hook):
    module = Tiny(KnownRouting)
    with pytest.raises((ValueError, RuntimeError)):
        fit(tmp_path, module, FailsTwice(hook, ValueError("no")), ExpertLoadMonitor())
    assert not any(child._forward_hooks for child in module.modules())
