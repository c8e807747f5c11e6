"""DeepSpeed's ZeRO over two gloo processes: as one process with the whole batch, and gathered weights let go of."""

import os
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from helpers.launch import together
from helpers.models import experts_modules, tokens
from helpers.rank_fits import BATCH, LIMIT, METRICS, STEPS, build, deviation, fit, outcome
from helpers.reference import relative_error
from helpers.training import LIGHTNING_WARNINGS, logged
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_moe import AdapterExport, AdapterUpdateCheck, MemoryMonitor, MoEGateGradCallback, export_adapter
from lightning_moe.adapters.export import export_checkpoint
from lightning_moe.adapters.files import WEIGHTS
from lightning_moe.integrations.sharding import is_sharded

pytestmark = [
    *LIGHTNING_WARNINGS,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install deepspeed"),
]
NOT_UPDATED = "adapters/experts_not_updated"


class OnCPU(DeepSpeedStrategy):
    """Lightning's own refuses to be without CUDA."""

    root_device = torch.device("cpu", 0)

    def setup_environment(self):
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self):
        import deepspeed

        deepspeed.ops.__compatible_ops__.clear()  # one of them would take a compiler and a minute
        self.set_world_ranks()
        self._init_deepspeed_distributed()


def zero(stage):
    """Every parameter is partitioned, however small."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    sizes = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    config = {"zero_allow_untested_optimizer": True, "zero_optimization": {"stage": stage} | sizes}
    return OnCPU(config=config, process_group_backend="gloo")


def whole_at_first(make):
    """Attributes of a module that is built whole, as constructors of Transformers need it without their own set-up."""
    return {"network": make(), "where": "init"}


def zero_outcome(folder, stage, make, **attributes):
    return outcome(folder, zero(stage), make, **whole_at_first(make), **attributes)


@pytest.mark.parametrize(
    ("stage", "adapters", "recompute"),
    [(stage, "experts", False) for stage in (1, 2)]
    + [(3, adapters, recompute) for adapters in ("none", "attention", "experts") for recompute in (False, True)],
)
def test_two_ranks_train_as_one_does(tmp_path, stage, adapters, recompute):
    make = partial(build, adapters, recompute, turned=True)
    alone = outcome(tmp_path / "one", "auto", make)
    results = together(zero_outcome, tmp_path / "two", stage, make)
    assert deviation(results, alone) < LIMIT
    for name in METRICS:
        assert logged(tmp_path / "two", name) == logged(tmp_path / "one", name), name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_experts_without_a_token(tmp_path, stage):
    """Other ones in either process, and some in both: those are named as one process names them."""
    data = tokens(BATCH * STEPS) % 2 + 3
    data[1::2] += 4
    alone = outcome(tmp_path / "one", "auto", partial(build, "experts", False), data=data)
    results = together(zero_outcome, tmp_path / "two", stage, partial(build, "experts", False), data=data)
    assert deviation(results, alone) < LIMIT
    assert logged(tmp_path / "two", NOT_UPDATED) == logged(tmp_path / "one", NOT_UPDATED) != [0.0] * 2
    assert [text for text in results[0]["said"] if "not updated" in text] == [
        text for text in alone["said"] if "not updated" in text
    ]


def accumulated(folder, stage):
    callbacks = MoEGateGradCallback(), AdapterUpdateCheck(2)
    make, data = partial(build, "experts", False), tokens(BATCH * STEPS * 2)
    fit(
        folder,
        zero(stage),
        make,
        *callbacks,
        options={"accumulate_grad_batches": 2},
        data=data,
        gradients={"none": None},
        **whole_at_first(make),
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_are_noted_where_they_are_accumulated(tmp_path, stage):
    together(accumulated, tmp_path, stage)
    assert set(logged(tmp_path, NOT_UPDATED)) == {0.0}


def measured(folder, kind):
    monitor = MemoryMonitor(measure_activations_at_step=0)
    strategy = zero(kind) if isinstance(kind, int) else kind
    make, callback = partial(build, "experts", False), MoEGateGradCallback(audit_every_n_steps=1)
    fit(folder, strategy, make, callback, monitor, **whole_at_first(make))
    return [(layer.num_bytes, layer.baseline_num_bytes) for layer in monitor.activations]


def test_saved_activations_and_the_audit(tmp_path):
    """What is gathered for a layer is a parameter, which is not counted as saved."""
    whole, partitioned = (together(measured, tmp_path / str(kind), kind)[0] for kind in ("ddp", 3))
    assert partitioned == whole
    assert max(logged(tmp_path / "3", "gategrad/audit_rel_error")) < LIMIT


def held_between_forward_and_backward(folder, enabled):
    """Which of the gathered experts' weights are there still when backward begins."""
    gathered, held = [], []

    def make():
        model = build("none", False)
        for module in experts_modules(model):
            module.register_forward_hook(
                lambda module, *_: gathered.extend(StorageWeakRef(p.untyped_storage()) for p in module.parameters())
            )
        return model

    class Look(MoEGateGradCallback):
        def on_before_backward(self, trainer, pl_module, loss):
            assert {tuple(parameter.shape) for parameter in pl_module.parameters()} == {(0,)}
            held.extend(not storage.expired() for storage in gathered)
            gathered.clear()

    fit(folder, zero(3), make, Look(enabled), **whole_at_first(make))
    return held


def test_weights_are_gathered_again_for_backward(tmp_path):
    ours, baseline = (together(held_between_forward_and_backward, tmp_path, enabled)[0] for enabled in (True, False))
    assert len(ours) == len(baseline) == 4 * STEPS
    assert not any(ours)
    assert all(baseline)


def exported(folder, stage):
    from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict

    saving = ModelCheckpoint(folder, "last", every_n_train_steps=STEPS)
    strategy = zero(stage) if stage else "auto"
    make, options = partial(build, "experts", False), {"enable_checkpointing": True}
    callbacks = MoEGateGradCallback(), AdapterExport(()), saving
    module, _ = fit(folder, strategy, make, *callbacks, options=options, **whole_at_first(make))
    first = not stage or torch.distributed.get_rank() == 0
    if first or is_sharded(module):
        export_adapter(module, folder / "adapter")
    if stage and first:
        convert_zero_checkpoint_to_fp32_state_dict(folder / "last.ckpt", folder / "whole.ckpt")
        export_checkpoint(folder / "whole.ckpt", folder / "again")


@pytest.mark.parametrize("stage", [2, 3])
def test_the_adapter_is_exported_whole(tmp_path, stage):
    exported(tmp_path / "one", None)
    together(exported, tmp_path / "two", stage)
    wanted = load_file(tmp_path / "one" / "adapter" / WEIGHTS)
    for folder in ("adapter", "again"):
        ours = load_file(tmp_path / "two" / folder / WEIGHTS)
        assert ours.keys() == wanted.keys()
        assert max(relative_error(ours[name], value) for name, value in wanted.items()) < LIMIT
