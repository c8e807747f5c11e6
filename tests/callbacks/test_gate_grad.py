"""The callback in a Trainer: on where training is, off wherever it ends, its figures those of the tensors."""

import traceback
from pathlib import Path

import pytest
import torch
from helpers.models import Tiny, experts_modules, gpt_oss, qwen3, tokens, with_attention_lora
from helpers.patching import enable_checkpointing
from helpers.training import LIGHTNING_WARNINGS, Fails, FailsTwice, fit, is_restored, logged, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers.integrations.moe import use_experts_implementation
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import lightning_moe
from lightning_moe import MemoryMonitor, MoEGateGradCallback
from lightning_moe.integrations.peft_experts import _tried_layout
from lightning_moe.patch_state import patch_of

pytestmark = LIGHTNING_WARNINGS


@pytest.mark.parametrize("where", ["init", "setup", "configure_model"])
@pytest.mark.parametrize("entry", ["fit", "validate", "test", "predict"])
def test_attaches_in_every_entry_point(tmp_path, where, entry):
    module, callback = Tiny(where=where), MoEGateGradCallback()
    getattr(trainer(tmp_path, callback, limit_val_batches=None), entry)(module)
    assert module.was_patched
    assert all(module.was_patched)
    assert is_restored(module)
    assert callback.report is None


@pytest.mark.parametrize("where", ["init", "setup", "configure_model"])
def test_attaches_under_the_learning_rate_finder(tmp_path, where):
    module = Tiny(where=where, num_batches=20)
    Tuner(trainer(tmp_path, MoEGateGradCallback(), max_steps=50)).lr_find(module, num_training=5, update_attr=False)
    assert all(module.was_patched)
    assert is_restored(module)


def test_losses_equal_those_without_and_repeat(tmp_path):
    runs = [
        fit(tmp_path / str(n), Tiny(num_batches=20), MoEGateGradCallback(enabled=on), max_steps=20).losses
        for n, on in enumerate((False, True, True))
    ]
    baseline, ours, again = runs
    assert ours == again
    assert max(abs(a - b) for a, b in zip(baseline, ours, strict=True)) < 1e-4
    assert ours != baseline  # another code did run
    assert ours[-1] < ours[0]


HOOKS = ["on_fit_start", "on_train_start", "on_train_batch_start", "on_after_backward", "on_train_batch_end"]


@pytest.mark.parametrize("hook", [*HOOKS, "setup", "on_train_end", "on_fit_end", "teardown"])
@pytest.mark.parametrize("failing", [Fails, FailsTwice])
@pytest.mark.parametrize("first", [True, False])
def test_another_callbacks_failure_leaves_the_model_as_it_was(tmp_path, hook, failing, first):
    module = Tiny()
    callbacks = [failing(hook, ValueError("no")), MoEGateGradCallback()]
    with pytest.raises((ValueError, RuntimeError)):
        fit(tmp_path, module, *(callbacks if first else callbacks[::-1]))
    assert is_restored(module)


@pytest.mark.parametrize(("error", "seen"), [(ValueError("no"), ValueError), (KeyboardInterrupt(), SystemExit)])
def test_an_exception_in_training_step_leaves_the_model_as_it_was(tmp_path, error, seen):
    module = Tiny()
    before = module.network.state_dict()
    step = module.training_step

    def fail(batch, batch_idx):
        loss = step(batch, batch_idx)
        if batch_idx == 2:
            raise error
        return loss

    module.training_step = fail
    callback = MoEGateGradCallback()
    with pytest.raises(seen):
        fit(tmp_path, module, callback)
    assert is_restored(module)
    assert list(module.network.state_dict()) == list(before)
    module.training_step = step
    fit(tmp_path, module, callback)
    assert all(module.was_patched)
    assert is_restored(module)


class KnownGates(nn.Module):
    """Two experts layers whose gates are given: per token 0.5, -0.25, and 0 in every third token's last slot."""

    def __init__(self, checkpoint=False):
        super().__init__()
        torch.manual_seed(0)
        config = qwen3().config
        self.embed = nn.Embedding(64, 32)
        self.layers = nn.ModuleList([Qwen3MoeExperts(config) for _ in range(2)])
        for parameter in self.layers.parameters():
            nn.init.normal_(parameter, std=0.1)
        self.gate = nn.Parameter(torch.ones(()))
        self.checkpoint = checkpoint

    def forward(self, input_ids, labels):
        hidden = self.embed(input_ids).flatten(0, 1)
        gates = torch.tensor([0.5, -0.25]).repeat(hidden.shape[0], 1)
        gates[::3, 1] = 0
        index = torch.arange(hidden.shape[0])[:, None] % 4 + torch.tensor([0, 4])
        for layer in self.layers:
            if self.checkpoint:
                out = torch.utils.checkpoint.checkpoint(layer, hidden, index, gates * self.gate, use_reentrant=False)
            else:
                out = layer(hidden, index, gates * self.gate)
            hidden = hidden + out
        self.loss = hidden.square().mean()
        return self


NUM_GATES = 2 * 2 * 12 * 2  # layers, batch, length, slots: half of them negative, and of these every third zero


def test_a_model_that_the_module_let_go_of_is_put_back(tmp_path):
    module, kept = Tiny(), []

    def let_go():
        kept.append(module.network)
        module.network = None

    module.on_train_end = let_go
    fit(tmp_path, module, MoEGateGradCallback())
    assert is_restored(kept[0])


def test_twice_among_the_callbacks_is_refused(tmp_path):
    module = Tiny()
    with pytest.raises(MisconfigurationException, match="more than once: leave one"):
        fit(tmp_path, module, MoEGateGradCallback(), MoEGateGradCallback())
    assert is_restored(module)


class ByHand(Tiny):
    """Steps on every other batch, by hand."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 2 == 0:
            self.optimizers().step()
            self.optimizers().zero_grad()


def test_logs_under_manual_optimization(tmp_path):
    fit(tmp_path, ByHand(num_batches=8), MoEGateGradCallback(), MemoryMonitor(), log_every_n_steps=2)
    assert logged(tmp_path, "gategrad/active_layers") == [2.0] * 3  # the fourth step is the seventh batch
    assert len(logged(tmp_path, "memory/allocated_gib")) == 3


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("every", [1, 2])
def test_figures_are_those_of_the_tensors(tmp_path, checkpoint, accumulate, every):
    steps = 2
    module = Tiny(lambda: KnownGates(checkpoint), num_batches=steps * accumulate, learning_rate=0.0)
    options = {"max_steps": steps, "log_every_n_steps": every, "accumulate_grad_batches": accumulate}
    fit(tmp_path, module, MoEGateGradCallback(), **options)
    micro_batches = every * accumulate
    figures = {
        "nonpositive_gates": micro_batches * NUM_GATES / 2,
        "nonpositive_fraction": 0.5,
        "zero_gates": micro_batches * NUM_GATES / 6,
        "nonfinite_gate_grads": 0,
        "active_layers": 2,
        "fallback_layers": 0,
        "bias_fallback_layers": 0,
        # Per row of both layers, float32: the baseline keeps Y (32), silu(gate) (16), and, as the weights train, the
        # gathered x (32) and a (16) beside what the operation keeps.
        "activations_mib_saved": NUM_GATES * (32 + 16 + 32 + 16) * 4 / 2**20,
    }
    for name, value in figures.items():
        assert logged(tmp_path, f"gategrad/{name}") == pytest.approx([value] * (steps // every)), name
    assert not logged(tmp_path, "gategrad/audit_rel_error")


@pytest.mark.parametrize("down_bias", ["exact", "fallback"])
def test_bias_fallback_is_counted(tmp_path, down_bias):
    fallback = down_bias == "fallback"
    callback = MoEGateGradCallback(down_bias=down_bias, on_missing="warn")
    module = Tiny(gpt_oss)
    if fallback:
        with pytest.warns(UserWarning, match="down_proj_bias"):
            fit(tmp_path, module, callback)
    else:
        fit(tmp_path, module, callback)
    assert logged(tmp_path, "gategrad/bias_fallback_layers") == [2.0 * fallback] * 4
    assert logged(tmp_path, "gategrad/fallback_layers") == [2.0 * fallback] * 4
    assert logged(tmp_path, "gategrad/active_layers") == [2.0 * (not fallback)] * 4
    assert min(logged(tmp_path, "gategrad/nonpositive_fraction")) == 0


def test_layers_out_of_reach_are_counted(tmp_path):
    module = Tiny()
    experts = experts_modules(module)[0]
    experts.forward = lambda hidden, index, gates: hidden
    with pytest.warns(UserWarning, match="Some MoE layers run the default implementation"):
        fit(tmp_path, module, MoEGateGradCallback())
    assert logged(tmp_path, "gategrad/fallback_layers") == [1.0] * 4
    assert logged(tmp_path, "gategrad/active_layers") == [1.0] * 4


def test_the_host_waits_for_the_device_at_log_steps_only(tmp_path, monkeypatch):
    """On a CPU nothing waits, so the calls that would are watched: those that the package itself makes once patched."""
    synchronising, calls = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__"), []
    package = Path(lightning_moe.__file__).parent
    _tried_layout.cache_clear()  # as in a process whose first fit this is

    def watch(name):
        original = getattr(torch.Tensor, name)

        def watched(self, *args, **kwargs):
            # The check of expert ids runs where it costs nothing: on the CPU.
            frames = [frame for frame in traceback.extract_stack() if package in Path(frame.filename).parents]
            if frames and all(frame.name != "shape_problem" for frame in frames):
                calls.append((step(), name))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, watched)

    module = Tiny(lambda: with_attention_lora(qwen3()), num_batches=6)
    module.on_fit_start = calls.clear  # after the callbacks' own, which patches
    for name in synchronising:
        watch(name)
    seen = []
    training_step = module.training_step
    module.training_step = lambda batch, batch_idx: seen.append(batch_idx) or training_step(batch, batch_idx)

    def step():
        return len(seen)

    fit(tmp_path, module, MoEGateGradCallback(audit_every_n_steps=1), max_steps=6, log_every_n_steps=3)
    assert {at for at, _ in calls} == {3, 6}


def test_figures_can_be_monitored(tmp_path):
    stop = EarlyStopping("gategrad/nonpositive_gates", check_on_train_epoch_end=True, patience=1)
    keep = ModelCheckpoint(tmp_path, monitor="gategrad/active_layers", every_n_train_steps=2, mode="max")
    fit(tmp_path, Tiny(), MoEGateGradCallback(), stop, keep, enable_checkpointing=True, max_steps=20)
    assert stop.stopped_epoch > 0
    assert keep.best_model_score == 2


@pytest.mark.parametrize(("value", "on"), [("0", False), ("1", True), ("", True), (None, True)])
def test_the_environment_switches_it(tmp_path, monkeypatch, value, on):
    monkeypatch.delenv("LIGHTNING_MOE_GATEGRAD", raising=False)
    if value is not None:
        monkeypatch.setenv("LIGHTNING_MOE_GATEGRAD", value)
    module = fit(tmp_path, Tiny(), MoEGateGradCallback())
    assert set(module.was_patched) == {on}
    assert MoEGateGradCallback(enabled=not on).enabled == (not on)


def test_an_audit_that_a_layer_cannot_have_is_not_waited_for(tmp_path):
    """Each step until then would be run for it, and not as a CUDA graph."""
    due = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            due.append(sum(patch_of(experts).health.audit_due for experts in experts_modules(pl_module)))

    module = Tiny()
    module.network.model.requires_grad_(False)  # its routing weights need no gradient
    fit(tmp_path, module, MoEGateGradCallback(audit_every_n_steps=3), Watch())
    assert due == [1, 0, 0, 1]


def test_the_audit_passes_a_right_model(tmp_path):
    fit(tmp_path, Tiny(lambda: with_attention_lora(qwen3())), MoEGateGradCallback(audit_every_n_steps=2))
    errors = logged(tmp_path, "gategrad/audit_rel_error")
    assert len(set(errors)) == 2  # Lightning logs the last one again until there is another
    assert max(errors) < 1e-5


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_audit_flags_a_planted_non_linearity(tmp_path, checkpoint, monkeypatch):
    module = Tiny(lambda: KnownGates(checkpoint), learning_rate=0.0)
    eager = Qwen3MoeExperts.forward.__wrapped__

    def curved(self, hidden, index, gates):
        return eager(self, hidden, index, gates).tanh()

    monkeypatch.setattr("lightning_moe.integrations.transformers_dispatch.undecorated_forward", lambda module: curved)
    module.network.layers[0].config._experts_implementation_internal = "eager"
    with pytest.warns(UserWarning, match="audit found a gate gradient that differs"):
        fit(tmp_path, module, MoEGateGradCallback(audit_every_n_steps=1))
    assert min(logged(tmp_path, "gategrad/audit_rel_error")) > 1e-3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"enabled": "yes"}, "enabled must be a bool or None, not 'yes'"),
        ({"down_bias": "none"}, "down_bias must be 'exact' or 'fallback'"),
        ({"output_buffer_mib": 0}, "output_buffer_mib must be a positive number"),
        ({"audit_every_n_steps": -1}, "audit_every_n_steps must be an integer of at least 0"),
        ({"audit_every_n_steps": 0.5}, "audit_every_n_steps must be an integer of at least 0"),
        ({"on_missing": "ignore"}, "on_missing must be 'error' or 'warn'"),
    ],
)
def test_arguments_out_of_range(options, words):
    with pytest.raises(MisconfigurationException, match=f"MoEGateGradCallback: {words}"):
        MoEGateGradCallback(**options)


class Dense(nn.Module):
    """A model with no MoE layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 4)

    def forward(self, input_ids, labels):
        self.loss = self.embed(input_ids).square().mean()
        return self


@pytest.mark.parametrize("entry", ["fit", "validate", "test", "predict"])
def test_a_model_without_moe_layers_is_refused_before_any_step(tmp_path, entry):
    module, callback = Tiny(Dense), MoEGateGradCallback()
    with pytest.raises(
        MisconfigurationException, match=r"no layer of Tiny, in which it finds no MoE layer.*on_missing"
    ):
        getattr(trainer(tmp_path, callback, limit_val_batches=None), entry)(module)
    assert module.was_patched == []
    assert callback.report is None


def test_a_model_without_moe_layers_may_pass_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="finds no MoE layer"):
        module = fit(tmp_path, Tiny(Dense), MoEGateGradCallback(on_missing="warn"))
    assert len(module.losses) == 4


def test_a_fit_without_a_logger_patches_and_warns(tmp_path):
    module = Tiny()
    with pytest.warns(UserWarning, match="MoEGateGradCallback logs nowhere: the Trainer has no logger"):
        fit(tmp_path, module, MoEGateGradCallback(), logger=False)
    assert all(module.was_patched)
    assert is_restored(module)
    trainer(tmp_path, MoEGateGradCallback(), logger=False, limit_val_batches=None).validate(module)  # logs nothing


def end_well(*_):
    pass


def end_badly(*_):
    raise ValueError("no")


def end_by_hand(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("end", [end_well, end_badly, end_by_hand])
@pytest.mark.parametrize("where", ["init", "setup", "configure_model"])
def test_afterwards_the_model_computes_bit_for_bit_what_an_unpatched_one_does(tmp_path, end, where):
    module = Tiny(where=where)
    module.on_train_batch_end = lambda *args: args[-1] == 2 and end()
    try:
        fit(tmp_path, module, MoEGateGradCallback())
    except (ValueError, SystemExit):
        assert end is not end_well
    assert len(module.losses) == (4 if end is end_well else 3)
    assert all(module.was_patched)
    assert is_restored(module)
    fresh = qwen3()
    fresh.load_state_dict(module.network.state_dict())

    def outcome(network):
        network.zero_grad()
        loss = network(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        return [loss, *(parameter.grad for parameter in network.parameters())]

    assert all(
        torch.equal(ours, baseline) for ours, baseline in zip(outcome(module.network), outcome(fresh), strict=True)
    )


class Sized(Tiny):
    """Lets a tuner choose its batch size."""

    batch_size = 1

    def train_dataloader(self):
        return DataLoader(TensorDataset(tokens(16)), batch_size=self.batch_size)


@pytest.mark.filterwarnings("ignore:.*does not have a .LearningRateScheduler")
@pytest.mark.parametrize("where", ["init", "setup", "configure_model"])
def test_attaches_under_the_batch_size_finder(tmp_path, where):
    module = Sized(where=where)
    tuner = Tuner(trainer(tmp_path, MoEGateGradCallback(), max_steps=50))
    tuner.scale_batch_size(module, max_trials=2, steps_per_trial=2)
    assert module.batch_size > 1
    assert all(module.was_patched)
    assert is_restored(module)


@use_experts_implementation
class CurvedExperts(Qwen3MoeExperts):
    """Has something non-linear between the down projection and the gate, in eager code only."""

    def forward(self, hidden, index, gates):
        out = torch.zeros_like(hidden)
        for expert in range(self.num_experts):
            token, slot = torch.where(index == expert)
            gate, up = nn.functional.linear(hidden[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            y = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
            out = out.index_add(0, token, self.bend(y) * gates[token, slot, None])
        return out


@pytest.mark.parametrize(("bend", "flagged"), [(torch.tanh, True), (lambda y: y, False)])
def test_the_audit_flags_what_stands_between_down_and_gate(tmp_path, bend, flagged, recwarn):
    def build():
        network = KnownGates()
        for layer in network.layers:
            layer.__class__, layer.bend = CurvedExperts, bend
            layer.down_proj.data.mul_(10)  # so that the tanh bends
            layer.config._experts_implementation_internal = "eager"
        return network

    fit(tmp_path, Tiny(build, learning_rate=0.0), MoEGateGradCallback(audit_every_n_steps=1))
    errors = logged(tmp_path, "gategrad/audit_rel_error")
    warned = any("audit found a gate gradient that differs" in str(warning.message) for warning in recwarn)
    assert len(errors) == 4
    assert min(errors) > 0.1 if flagged else max(errors) < 1e-5
    assert warned == flagged


def test_counts_since_the_last_log(tmp_path):
    """Gates that turn negative in the third of four steps show in the second of two logs."""
    module = Tiny(KnownGates, learning_rate=0.0)
    step, signs = module.training_step, (1.0, 1.0, -1.0, 1.0)

    def flip(batch, batch_idx):
        module.network.gate.data.fill_(signs[batch_idx])
        return step(batch, batch_idx)

    module.training_step = flip
    fit(tmp_path, module, MoEGateGradCallback(), log_every_n_steps=2)
    tokens_seen = NUM_GATES // 2
    negative, zero = tokens_seen * 2 // 3, tokens_seen // 3
    turned = tokens_seen + zero
    assert logged(tmp_path, "gategrad/nonpositive_gates") == [2 * (negative + zero), negative + zero + turned]


def test_nonfinite_gate_gradients_are_counted(tmp_path):
    module = Tiny(KnownGates, learning_rate=0.0)
    step = module.training_step
    module.training_step = lambda batch, batch_idx: step(batch, batch_idx) * (torch.nan if batch_idx == 1 else 1)
    fit(tmp_path, module, MoEGateGradCallback(), max_steps=2)  # no further: the step makes the weights NaN
    assert logged(tmp_path, "gategrad/nonfinite_gate_grads") == [0, NUM_GATES]


def test_routing_flips_are_logged(tmp_path):
    """The router of one layer takes the next expert for the last slot whenever it is run a second time."""
    module, calls = Tiny(), []
    enable_checkpointing(module.network, use_reentrant=False)
    router = module.network.model.layers[1].mlp.gate

    def choose_otherwise(_, args, output):
        *rest, index = output
        calls.append(index)
        if len(calls) % 2 == 0:
            index = index.clone()
            index[:, -1] = 0
        return *rest, index

    router.register_forward_hook(choose_otherwise)
    fit(tmp_path, module, MoEGateGradCallback())
    assert len(calls) == 8
    flips = [int((~(seen == 0).any(1)).sum()) for seen in calls[::2]]
    assert min(flips) > 0
    assert logged(tmp_path, "gategrad/routing_flips") == flips


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_reduced_precision(tmp_path, precision):
    baseline = fit(tmp_path / "baseline", Tiny(), precision=precision).losses
    ours = fit(tmp_path / "ours", Tiny(), MoEGateGradCallback(), precision=precision).losses
    assert ours == pytest.approx(baseline, rel=1e-3)
    assert logged(tmp_path / "ours", "gategrad/active_layers") == [2.0] * 4


def test_a_run_goes_on_from_a_checkpoint_as_it_does_without(tmp_path):
    def resumed(enabled):
        start = trainer(tmp_path / f"start {enabled}", MoEGateGradCallback(enabled), max_steps=2)
        start.fit(Tiny(num_batches=2))
        path = tmp_path / f"{enabled}.ckpt"
        start.save_checkpoint(path)
        module = Tiny(num_batches=2)
        rest = trainer(tmp_path / f"rest {enabled}", MoEGateGradCallback(enabled))
        rest.fit(module, ckpt_path=path, weights_only=True)
        assert set(module.was_patched) == {enabled}
        assert is_restored(module)
        return module.losses, list(torch.load(path, weights_only=True)["state_dict"])

    (ours, our_keys), (baseline, baseline_keys) = resumed(True), resumed(False)
    assert len(ours) == 2
    assert ours == pytest.approx(baseline, abs=1e-4)
    assert our_keys == baseline_keys


def test_the_trainers_callbacks_are_in_the_users_order_after_the_fit(tmp_path):
    stop, callback = EarlyStopping("gategrad/active_layers", check_on_train_epoch_end=True), MoEGateGradCallback()
    fitting = trainer(tmp_path, stop, callback)
    before = list(fitting.callbacks)
    fitting.fit(Tiny())
    assert fitting.callbacks == before


def test_every_audit_falls_on_a_layer_that_can_be_audited(tmp_path):
    module = Tiny()
    (first, _) = experts_modules(module)
    first.has_post_expert_norm, first.post_expert_norm = True, nn.Identity()
    audits = []
    callback = MoEGateGradCallback(audit_every_n_steps=1)
    log = callback._metric.update
    callback._metric.update = lambda counts, n: audits.append(float(counts.audit_rel_error)) or log(counts, n)
    with pytest.warns(UserWarning, match="Some MoE layers run the default implementation"):
        fit(tmp_path, module, callback)
    assert len(audits) == 4
    assert not any(error != error for error in audits)
