"""DDP and FSDP2 over two gloo ranks: the same losses, gradients and metrics as one rank with the whole batch."""

import os
import re
import subprocess
import sys
import warnings
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from helpers.launch import together
from helpers.models import Tiny, gpt_oss, qwen3, tokens
from helpers.rank_fits import ADAPTERS, BATCH, LIMIT, METRICS, STEPS, Distributed, build, deviation, fit, outcome, run
from helpers.reference import LOW_PRECISION_SLACK, relative_error, with_scatter
from helpers.training import LIGHTNING_WARNINGS, is_restored, logged, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.weak import WeakIdKeyDictionary
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

from lightning_moe import (
    AdapterExport,
    AdapterUpdateCheck,
    ExpertLoadMonitor,
    MemoryMonitor,
    MoEGateGradCallback,
    export_adapter,
    gategrad,
)
from lightning_moe.adapter_updates import AdapterUpdates
from lightning_moe.adapters.export import export_checkpoint
from lightning_moe.adapters.files import WEIGHTS
from lightning_moe.callbacks import memory
from lightning_moe.integrations.sharding import full_tensor
from lightning_moe.patch_state import patch_of, patched_modules

pytestmark = LIGHTNING_WARNINGS


def check_as_one_process(folder, kind, make, num_processes):
    alone = outcome(folder / "one", "auto", make)
    results = together(outcome, folder / "all", kind, make, num_processes=num_processes)
    assert deviation(results, alone) < LIMIT
    for name in METRICS:
        assert logged(folder / "all", name) == logged(folder / "one", name), name
    assert min(logged(folder / "all", "gategrad/zero_gates")) > 0
    for each in results:
        assert each["load"].keys() == alone["load"].keys()
        assert all(torch.equal(each["load"][name], rows) for name, rows in alone["load"].items())


@pytest.mark.parametrize(
    ("kind", "adapters", "recompute"),
    [
        ("ddp", "none", False), ("ddp", "attention", True), ("ddp", "experts", False),
        ("fsdp", "none", True), ("fsdp", "attention", False), ("fsdp", "experts", True),
    ],
)  # fmt: skip
def test_two_ranks_train_as_one_does(tmp_path, kind, adapters, recompute):
    """Each two of the options meet; the three together are one rank's matter, or the experts' by FSDP2 below."""
    check_as_one_process(tmp_path, kind, partial(build, adapters, recompute, turned=True), 2)


def test_tensor_parallel_ranks_count_their_batch_once(tmp_path):
    check_as_one_process(tmp_path, "fsdp_twice", partial(build, "experts", False, turned=True), 4)


def test_ranks_that_do_not_share_exceed_the_limit(tmp_path):
    make = partial(build, "attention", False)
    alone = outcome(tmp_path / "one", "auto", make)
    half = outcome(tmp_path / "half", "auto", make, data=tokens(BATCH * STEPS)[::2].repeat_interleave(2, 0))
    assert deviation([half], alone) > 1000 * LIMIT


@pytest.mark.parametrize("adapters", ["none", "experts"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_experts_without_a_token_in_one_rank(tmp_path, kind, adapters):
    data = tokens(BATCH * STEPS)
    data[1::2] = 7  # the second process has one token only, so that at most four of eight experts get rows there
    alone = outcome(tmp_path / "one", "auto", partial(build, adapters, False), data=data)
    results = together(outcome, tmp_path / "two", kind, partial(build, adapters, False), data=data)
    assert deviation(results, alone) < LIMIT


def rank_times_gib(device):
    return (torch.distributed.get_rank() + 1) * 2**30


def memory_fit(folder, kind):
    memory._allocated = rank_times_gib
    fit(
        folder,
        kind,
        partial(build, "attention", False),
        MoEGateGradCallback(),
        MemoryMonitor(measure_activations_at_step=0),
    )


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_memory_is_the_maximum(tmp_path, kind):
    together(memory_fit, tmp_path, kind)
    assert logged(tmp_path, "memory/peak_allocated_gib") == [2.0] * STEPS
    assert (
        0
        < logged(tmp_path, "memory/moe_activations_mib")[0]
        < logged(tmp_path, "memory/moe_activations_baseline_mib")[0]
    )


class Calls(TorchDispatchMode):
    """Counts what processes say to each other."""

    number = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        self.number += operation.namespace in ("c10d", "_c10d_functional") and "wait" not in operation.__name__
        return operation(*arguments, **options or {})


def collectives(folder, kind, every, check):
    """How many each step takes, and what comes after the last one."""
    callbacks = [] if check is None else [MoEGateGradCallback(), MemoryMonitor(), ExpertLoadMonitor()]
    callbacks += [AdapterUpdateCheck(check)] if check else []
    after = []

    class Noting(Callback):
        def on_train_batch_end(self, *_):
            after.append(calls.number)

    with Calls() as calls:
        fit(folder, kind, partial(build, "experts", False), *callbacks, Noting(), options={"log_every_n_steps": every})
    return [end - begin for begin, end in zip([0, *after], [*after, calls.number], strict=True)]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_nothing_is_communicated_between_log_steps(tmp_path, kind):
    ours, watching, baseline, logging = (
        together(collectives, tmp_path / f"{every}-{check}", kind, every, check)[0]
        for every, check in ((STEPS + 1, 0), (STEPS + 1, 2), (STEPS + 1, None), (1, 0))
    )
    *steps, end = baseline
    assert all(steps)
    assert ours[:-1] == steps
    assert ours[-1] > end  # the experts' rows when training ends, and where their heat map goes
    assert watching[2:] == ours[2:]
    gathers = [more - own for more, own in zip(watching[:2], ours[:2], strict=True)]
    assert gathers == [0, 0] if kind == "ddp" else all(number > 0 for number in gathers)
    assert all(more > own for more, own in zip(logging[:-1], steps, strict=True))


def kept_shapes(folder, kind, enabled):
    """The shapes of what each step keeps between forward and backward, parameters that are gathered again left out."""
    kept = []

    class Watched(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            kept[:] = [tensor for tensor in kept if tensor.untyped_storage().nbytes()]
            own = {p.untyped_storage()._cdata for p in pl_module.parameters() if not isinstance(p, DTensor)}
            shapes.append(sorted(tuple(t.shape) for t in kept if t.untyped_storage()._cdata not in own))
            kept.clear()

    class Recording(Distributed):
        def step(self, batch):
            with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
                return super().step(batch)

    shapes = []
    module = Recording(partial(build, "experts", False))
    run(folder, kind, MoEGateGradCallback(enabled), Watched()).fit(module)
    return shapes


def test_gathered_weights_are_not_kept_for_backward(tmp_path):
    """Beside FSDP2 as beside one process: what is kept has the sizes of tokens, not of experts' weights."""
    weights = {(8, 32, 32), (8, 32, 16)}
    ours, baseline = (together(kept_shapes, tmp_path, "fsdp", enabled)[0] for enabled in (True, False))
    assert len(ours) == STEPS
    for step in ours:
        assert step
        assert not weights & set(step)
    assert weights & set(baseline[0])  # PEFT's merged weights


def cast(folder, build, enabled, shards):
    """FSDP2 that casts float32 weights to bfloat16 for each call."""
    callback = MoEGateGradCallback(enabled, audit_every_n_steps=1)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    module, said = fit(folder, "fsdp", build, callback, shards=shards, policy=policy)
    return torch.tensor(module.losses), module.gradients, said


@pytest.mark.parametrize("shards", [("layers", "model"), ("experts", "layers", "model")])
def test_weights_cast_for_the_call(tmp_path, shards):
    """The audit's limit and the saved activations are those of bfloat16, though the weights at rest are float32."""
    make = partial(build, "attention", False)
    exact = outcome(tmp_path / "one", "auto", make)["gradients"]
    ours, baseline = (together(cast, tmp_path / str(on), make, on, shards)[0] for on in (True, False))
    assert relative_error(ours[0], baseline[0]) < 1e-3
    for name, gradient in exact.items():
        error, baseline_error = (relative_error(side[1][name], gradient) for side in (ours, baseline))
        # 64 to 128 numbers, few enough for the baseline to be lucky: then bfloat16's digit counts.
        assert error < with_scatter(LOW_PRECISION_SLACK, gradient.numel()) * baseline_error + 2**-8
    assert max(logged(tmp_path / "True", "gategrad/audit_rel_error")) > 1e-3
    assert not [message for message in ours[2] if "audit" in message]
    rows = BATCH // 2 * 12 * 2
    kept = 2 * (2 * 8 + 2) + 2 * 32  # a row's bfloat16 activations and output
    assert logged(tmp_path / "True", "gategrad/activations_mib_saved")[0] < 2 * rows * 2 * kept / 2**20


def sharded(data_parallel, tensor_parallel, shards=("layers", "model")):
    module = Distributed(partial(build, "attention", False))
    module.shards = shards
    how = ModelParallelStrategy(data_parallel, tensor_parallel, save_distributed_checkpoint=False)
    train = trainer("ignored", MoEGateGradCallback(), logger=CSVLogger("ignored"), strategy=how, devices=2, max_steps=1)
    return module, train


def refused(folder, *arguments):
    os.chdir(folder)
    module, train = sharded(*arguments)
    with pytest.raises(MisconfigurationException) as refusal:
        train.fit(module)
    assert is_restored(module)
    assert not module.losses
    return str(refusal.value)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("auto", "auto"), "sharded over a mesh of one rank"),
        ((1, 2), "sharded over a mesh of one rank"),
        ((2, 1, ()), "is not sharded"),
    ],
)
def test_unsynchronized_replicas_are_an_error(tmp_path, arguments, what):
    for said in together(refused, tmp_path, *arguments):
        assert what in said
        assert "data_parallel_size=2, tensor_parallel_size=1" in said


class OverTheWrongRanks(Distributed):
    """Those that get the same batches."""

    def configure_model(self):
        Tiny.configure_model(self)
        fully_shard(self.network, mesh=self.device_mesh["tensor_parallel"])


def wrongly_sharded(folder):
    module = OverTheWrongRanks(partial(build, "attention", False))
    with pytest.raises(MisconfigurationException, match="sharded over the wrong ranks"):
        run(folder, "fsdp_twice", MoEGateGradCallback()).fit(module)
    return is_restored(module)


def test_a_model_over_the_wrong_mesh_is_refused(tmp_path):
    assert all(together(wrongly_sharded, tmp_path, num_processes=4))


class Kept(Distributed):
    """Weights stay gathered after a forward without a backward."""

    def configure_model(self):
        if self.network is not None:
            return
        Tiny.configure_model(self)
        shard = partial(fully_shard, mesh=self.device_mesh["data_parallel"], reshard_after_forward=False)
        if "layers" in self.shards:
            for layer in self.network.get_base_model().model.layers:
                shard(layer)
        shard(self.network)

    def val_dataloader(self):
        return DataLoader(TensorDataset(tokens(2)), batch_size=1)

    def validation_step(self, batch, batch_idx):
        self.network(input_ids=batch[0])


def validated(folder, shards, before):
    module = Kept(partial(build, "experts", False))
    module.shards = shards
    callbacks = MoEGateGradCallback(), AdapterUpdateCheck(2)
    fitting = run(folder, "fsdp", *callbacks, num_sanity_val_steps=1 - before, limit_val_batches=1)
    if before:
        fitting.validate(module, verbose=False)
    fitting.fit(module)
    return module.losses, fitting.logged_metrics["adapters/experts_not_updated"].item()


@pytest.mark.parametrize(("shards", "before"), [(("layers",), False), ((), False), ((), True)])
def test_adapter_updates_after_a_validation_that_left_weights_gathered(tmp_path, shards, before):
    ours = together(validated, tmp_path, shards, before)
    alone = outcome(tmp_path / "one", "auto", partial(build, "experts", False))
    assert relative_error(torch.tensor([each[0] for each in ours]).mean(0), alone["losses"]) < LIMIT
    assert {each[1] for each in ours} == {0.0}


def test_unsynced_parameters_are_named(tmp_path):
    parts = partial(build, "none", False)
    for shards, alone in ((("layers",), True), (("layers", "model"), False)):
        said = together(outcome, tmp_path / str(alone), "fsdp", parts, shards=shards)[0]["said"]
        named = [message for message in said if "no rank shares the gradients of network." in message]
        assert bool(named) == alone


def side_by_side(folder):
    monitor, callback = MemoryMonitor(measure_activations_at_step=0), MoEGateGradCallback()
    make = partial(build, "experts", False)
    module, said = fit(folder, "fsdp", make, callback, monitor, shards=("experts", "layers", "model"))
    assert all(layer.num_bytes and layer.baseline_num_bytes is None for layer in monitor.activations)
    return {name: full_tensor(p).detach() for name, p in module.named_parameters() if p.requires_grad}, said


def test_a_layer_that_only_the_operation_can_run_trains_and_is_measured(tmp_path):
    """PEFT cannot merge where the experts are sharded by themselves: its factors are gathered, the weights are not."""
    alone = outcome(tmp_path / "one", "auto", partial(build, "experts", False))["trained"]
    results = together(side_by_side, tmp_path / "two")
    unmeasured = [sum("activations cannot be measured" in message for message in said) for _, said in results]
    assert unmeasured == [2, 0]  # once for each layer, in one rank
    for trained, _ in results:
        assert max(relative_error(trained[name], value) for name, value in alone.items()) < LIMIT
    assert len(logged(tmp_path / "two", "memory/moe_activations_mib")) == STEPS


class Living(TorchDispatchMode):
    """The most bytes that tensors made inside held at once."""

    def __init__(self):
        super().__init__()
        self.storages, self.most = WeakIdKeyDictionary(), 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        made = operation(*arguments, **options or {})
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, DTensor):
                self.storages[tensor.untyped_storage()] = None
        self.most = max(self.most, sum(storage.nbytes() for storage in list(self.storages)))
        return made


def experts_alive(folder, enabled, adapters):
    """The most that a step makes, over the weights of one layer's experts, tokens being few beside these."""

    def build_wide():
        sizes = {"hidden_size": 128, "moe_intermediate_size": 64, "num_experts": 32, "num_hidden_layers": 4}
        return ADAPTERS[adapters](qwen3(**sizes))

    class Measured(Distributed):
        def training_step(self, batch, batch_idx):
            if batch_idx == 0:
                living.__enter__()
            return super().training_step(batch, batch_idx)

        def on_before_optimizer_step(self, optimizer):
            if self.global_step == 0:
                living.__exit__(None, None, None)

    living, module = Living(), Measured(build_wide)
    run(folder, "fsdp", MoEGateGradCallback(enabled)).fit(module)
    return living.most / (32 * 3 * 64 * 128 * 4)


def test_no_second_copy_of_a_layers_experts_is_made(tmp_path):
    """FSDP2 holds three layers at most: one at work, one that comes, and one that is being laid out."""
    most = {
        (adapters, on): together(experts_alive, tmp_path, on, adapters)[0]
        for adapters in ("attention", "experts")
        for on in (True, False)
    }
    assert most["attention", True] <= most["attention", False] < 3.5
    assert most["experts", True] < 3.5
    assert most["experts", False] > 6  # PEFT's merged weights


def flattened(adapters, recompute, on):
    """FSDP1, without Lightning, which wants a GPU for it; patched when the parameters have been taken apart."""
    warnings.simplefilter("ignore")
    torch.distributed.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]))
    model = FullyShardedDataParallel(
        build(adapters, recompute), auto_wrap_policy=ModuleWrapPolicy({Qwen3MoeDecoderLayer}), use_orig_params=True,
        device_id=torch.device("cpu"),
    )  # fmt: skip
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    with gategrad(model) if on else nullcontext() as report:
        watch = AdapterUpdates(model)
        for step in range(STEPS):
            ids = tokens(BATCH, seed=step).chunk(2)[torch.distributed.get_rank()]
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            watch.note_gradients()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert watch.conclude() == (0, [])  # of nothing
        if on:
            assert str(report)
            assert [layer.status for layer in report] == ["active"] * 2
            assert all(patch_of(module).reason is None for module in patched_modules(model))
            assert all(patch_of(module).estimate.saved_per_row for module in patched_modules(model))
    return losses


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("adapters", ADAPTERS)
def test_fsdp1_parameters_are_judged_at_the_call(adapters, recompute):
    losses = []
    model = build(adapters, recompute)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(STEPS):
        ids = tokens(BATCH, seed=step)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    ours = torch.tensor(together(flattened, adapters, recompute, True)).mean(0)
    assert relative_error(ours, torch.tensor(losses)) < LIMIT
    assert losses[0] != losses[-1]


def save_in_parts(folder):
    warnings.simplefilter("ignore")
    saving = ModelCheckpoint(folder, "parts", every_n_train_steps=STEPS)
    how, module = ModelParallelStrategy(2, 1), Distributed(partial(build, "experts", False))
    run(folder, how, MoEGateGradCallback(), AdapterExport(()), saving, enable_checkpointing=True).fit(module)
    export_adapter(module.network, folder / "adapter")


def test_a_sharded_checkpoint_is_exported_as_the_error_says(tmp_path):
    together(save_in_parts, tmp_path)
    parts = tmp_path / "parts.ckpt"
    with pytest.raises(ValueError, match="consolidate_checkpoint") as refusal:
        export_checkpoint(parts, tmp_path / "again")
    command = re.search("`python (.*?)`", str(refusal.value))[1]
    subprocess.run([sys.executable, *command.split(), str(parts)], check=True)
    export_checkpoint(f"{parts}.consolidated", tmp_path / "again")
    ours, wanted = (load_file(tmp_path / folder / WEIGHTS) for folder in ("again", "adapter"))
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[name], value) for name, value in wanted.items())


def what_is_said(folder, kind):
    callback = MoEGateGradCallback(down_bias="fallback", on_missing="warn")
    module, said = fit(folder, kind, gpt_oss, callback)
    return torch.tensor(module.losses), [message for message in said if "MoE layers run" in message]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_fallbacks_are_reported_once_and_counted_by_every_rank(tmp_path, kind):
    (first, said), (second, nothing) = together(what_is_said, tmp_path / "two", kind)
    alone, _ = what_is_said(tmp_path / "one", "auto")
    assert relative_error((first + second) / 2, alone) < LIMIT
    assert any("Some MoE layers run the default implementation" in message for message in said)
    assert not nothing
    for name in ("fallback_layers", "bias_fallback_layers"):
        assert logged(tmp_path / "two", f"gategrad/{name}") == [2.0] * STEPS
