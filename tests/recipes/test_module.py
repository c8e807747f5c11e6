"""MoELoRA: float32 adapters on a bfloat16 base, families other than Qwen3-MoE, throughput."""

from collections import defaultdict

import pytest
import torch
from helpers.recipe import ARCHITECTURE, data, module, trained, trainer
from helpers.reference import relative_error
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ThroughputMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lora.data import num_documents, num_tokens
from qwen3_lora import UNHELPFUL_WARNINGS

from lightning_moe import AdapterExport, MoEGateGradCallback

pytestmark = [
    *(pytest.mark.filterwarnings(f"ignore:{message}") for message in UNHELPFUL_WARNINGS),
    pytest.mark.filterwarnings("ignore:.*log_every_n_steps"),
    pytest.mark.filterwarnings("ignore:.*no logger"),
]

OLMOE = {
    "model_type": "olmoe", "vocab_size": 384, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
MIXTRAL = {
    "model_type": "mixtral", "vocab_size": 384, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2,
    "sliding_window": None,
}  # fmt: skip


class Gradients(Callback):
    """The gradients of each backward, and those that the optimizer steps with."""

    def __init__(self):
        self.parts, self.summed, self.dtypes = defaultdict(list), {}, set()

    def on_train_start(self, trainer, pl_module):
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda grad, name=name: self.parts[name].append(grad.clone()))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.summed = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}
        self.dtypes |= {grad.dtype for grad in self.summed.values()}


@pytest.mark.parametrize("options", [{}, {"router": "trained", "modules_to_save": ["lm_head"]}])
def test_what_trains_is_float32_on_a_bfloat16_base(options, tmp_path):
    network = module(dtype="bfloat16", experts=True, **options)
    trainer(tmp_path, 1, precision="bf16-mixed").fit(network, data())
    dtypes = {p.requires_grad: set() for p in network.parameters()}
    for parameter in network.parameters():
        dtypes[parameter.requires_grad].add(parameter.dtype)
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}
    assert all(p.grad is None for p in network.parameters())  # not held until the next backward


@pytest.mark.parametrize("accumulate", [1, 3])
def test_gradients_of_micro_batches_add_up_in_float32(accumulate, tmp_path):
    gradients = Gradients()
    run = trainer(tmp_path, 1, gradients, accumulate_grad_batches=accumulate, precision="bf16-mixed")
    run.fit(module(dtype="bfloat16", experts=True), data())
    assert gradients.dtypes == {torch.float32}
    for name, grad in gradients.summed.items():
        assert len(gradients.parts[name]) == accumulate
        assert torch.equal(grad, sum(gradients.parts[name]))


def gradients_of(tmp_path, dtype, adapter_dtype=torch.float32):
    """The gradients of one step of a base with bfloat16 values, computed in `dtype`, from adapters far from zero."""

    class Prepare(Callback):
        def on_train_start(self, trainer, pl_module):
            generator = torch.Generator().manual_seed(1)
            for name, parameter in pl_module.named_parameters():
                values = parameter.data
                if "lora_B" in name:
                    values = torch.randn(parameter.shape, generator=generator) / 50
                parameter.data = values.bfloat16().to(adapter_dtype if parameter.requires_grad else parameter.dtype)

    gradients = Gradients()
    network = module(ARCHITECTURE | {"num_hidden_layers": 4}, dtype=dtype, experts=True, init_seed=3)
    precision = "bf16-mixed" if dtype == "bfloat16" else "32-true"
    options = {"precision": precision, "logger": CSVLogger(tmp_path)}
    trainer(tmp_path, 1, Prepare(), gradients, MoEGateGradCallback(), **options).fit(network, data())
    return torch.cat([grad.flatten().float() for grad in gradients.summed.values()])


def test_gradients_are_no_further_from_float32_than_those_of_bfloat16_adapters(tmp_path):
    """A micro-batch's gradient comes out of bfloat16 products either way; sums over micro-batches are tested above."""
    exact = gradients_of(tmp_path, "float32")
    ours, rounded = (
        relative_error(gradients_of(tmp_path, "bfloat16", d), exact) for d in (torch.float32, torch.bfloat16)
    )
    assert 0 < ours < 1.05 * rounded
    assert ours < 2**-5  # bfloat16 rounds by 2^-9; some twenty roundings in a row that add up as noise come to 2^-6.8


def test_autocast_does_not_change_what_patched_experts_compute(tmp_path):
    outputs = {}

    class Compare(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            layer = pl_module.network.get_base_model().model.layers[0].mlp
            generator = torch.Generator().manual_seed(0)
            hidden = torch.randn(24, 32, generator=generator).bfloat16()
            index = torch.randint(0, 4, (24, 2), generator=generator)
            weights = torch.rand(24, 2, generator=generator).bfloat16()
            for enabled in (False, True):
                with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                    outputs[enabled] = layer.experts(hidden, index, weights).detach()

    run = trainer(tmp_path, 1, MoEGateGradCallback(), Compare(), precision="bf16-mixed", logger=CSVLogger(tmp_path))
    run.fit(module(dtype="bfloat16", experts=True), data())
    assert outputs[True].dtype == torch.bfloat16
    assert outputs[True].any()
    assert torch.equal(outputs[True], outputs[False])


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_bfloat16_base_wants_bf16_mixed(precision, tmp_path):
    options = {"precision": precision}
    if precision == "16-mixed":
        options = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}
    with pytest.raises(ValueError, match=f"trainer.precision {precision} .* set --trainer.precision bf16-mixed"):
        trainer(tmp_path, 1, **options).fit(module(dtype="bfloat16"), data())


@pytest.mark.parametrize("architecture", [OLMOE, MIXTRAL], ids=["olmoe", "mixtral"])
@pytest.mark.parametrize("router", ["frozen", "trained"])
def test_other_families_train_as_without_the_patch(architecture, router, tmp_path):
    losses = []

    class Losses(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(outputs["train/loss"].item())

    for enabled in (True, False):
        network = module(architecture, experts=True, router=router, router_aux_loss=0.01, modules_to_save=["lm_head"],
                         checkpointing="selective")  # fmt: skip
        patch = MoEGateGradCallback(enabled)
        trainer(tmp_path, 3, patch, Losses(), logger=CSVLogger(tmp_path)).fit(network, data())
        names = {name.split(".lora_")[0].split(".mlp.")[1] for name in trained(network) if ".mlp.experts" in name}
        assert names == {"experts", "experts.base_layer"}  # PEFT's wrappers around both projections
    assert losses[:3] == pytest.approx(losses[3:], abs=1e-5)
    assert len(set(losses[:3])) == 3


def test_names_that_a_family_does_not_have_are_refused(tmp_path):
    with pytest.raises(ValueError, match="model.router_module names 'mlp.router', and the model has no such module"):
        trainer(tmp_path, 1).fit(module(OLMOE, router="trained", router_module="mlp.router"), data())
    dense = {key: OLMOE[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    dense |= {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 1}
    with pytest.raises(ValueError, match="model.experts: llama has no experts"):
        trainer(tmp_path, 1).fit(module(dense, experts=True), data())
    with pytest.raises(ValueError, match="model.router_aux_loss: llama gives no router logits"):
        trainer(tmp_path, 1).fit(module(dense, router_aux_loss=0.1), data())


class Clock:
    now = 0.0


@pytest.mark.parametrize("accumulate", [1, 3])
def test_throughput_counts_tokens_of_each_batch(accumulate, tmp_path, monkeypatch):
    """One second a batch, a hundred for validation; Lightning's monitor does the rest."""
    logged, batches = [], []
    monkeypatch.setattr("lightning.pytorch.callbacks.throughput_monitor.time.perf_counter", lambda: Clock.now)

    class Tick(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            Clock.now += 1
            batches.append(num_tokens(batch))

        def on_validation_batch_start(self, *_):
            Clock.now += 100

    logger = CSVLogger(tmp_path)
    monkeypatch.setattr(logger, "log_metrics", lambda metrics, step=None: logged.append(dict(metrics)))
    monitor = ThroughputMonitor(num_documents, num_tokens, window_size=4)
    options = {"log_every_n_steps": 2, "limit_val_batches": 1, "val_check_interval": 4}
    run = trainer(tmp_path, 4, Tick(), monitor, logger=logger, accumulate_grad_batches=accumulate, **options)
    run.fit(module(), data(max_length=128))
    last = [row for row in logged if "train/device/items_per_sec" in row][-1]
    assert last["train/device/batches_per_sec"] == pytest.approx(1)
    assert last["train/device/items_per_sec"] == pytest.approx(sum(batches[-3:]) / 3)
    assert len(set(batches)) > 1


# Verifying the exported adapter


def exported(folder, **options):
    """A module after a short fit with adapters far from zero, and its adapter's folder."""
    export = AdapterExport()
    network = module(experts=True, learning_rate=0.1, **options)
    precision = "bf16-mixed" if options.get("dtype") == "bfloat16" else "32-true"
    trainer(folder, 3, MoEGateGradCallback(), export, precision=precision).fit(network, data())
    return network, str(export.folders["fused"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_exported_adapter_is_verified_on_a_second_base(dtype, tmp_path):
    network, folder = exported(tmp_path, dtype=dtype)
    assert network.verify(folder).startswith("yes, it computes as the trained model: ")
    network.hparams["init_seed"] = 1
    assert network.verify(folder).startswith("no, the base is not the one that was trained on")


def test_a_base_from_a_folder_is_loaded_by_transformers_alone(tmp_path):
    module().build_base().save_pretrained(tmp_path / "base")
    network, folder = exported(tmp_path, init="pretrained", name=str(tmp_path / "base"))
    network.build_base = lambda: 1 / 0
    assert network.verify(folder).startswith("yes, it computes as the trained model: ")


def test_without_room_for_a_second_base_the_command_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("no room")

    monkeypatch.setattr("lora.module.place_experts", refuse)
    assert module().verify("adapter") == "not verified, there is no room here for a second base"
    module().build_base().save_pretrained(tmp_path)
    said = module(init="pretrained", name=str(tmp_path)).verify("adapter")
    assert said.endswith(f"second base: python -m lightning_moe verify adapter --base {tmp_path}")
