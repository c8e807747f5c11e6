"""The same fit in one rank and in several: what it leaves, to be compared."""

import warnings
from functools import partial

import torch
from helpers.models import Tiny, experts_modules, qwen3, tokens, with_attention_lora, with_expert_lora
from helpers.reference import relative_error
from helpers.training import is_restored, trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_moe import AdapterUpdateCheck, ExpertLoadMonitor, MoEGateGradCallback
from lightning_moe.integrations.sharding import full_grad, full_tensor

ADAPTERS = {
    "none": lambda model: model,
    "attention": with_attention_lora,
    "experts": partial(with_expert_lora, attention=True),
}
BATCH, STEPS = 4, 3
METRICS = [
    *(f"gategrad/{name}_layers" for name in ("active", "fallback")),
    *(f"gategrad/{name}" for name in ("nonpositive_gates", "zero_gates", "nonpositive_fraction")),
    "moe/load_max_over_mean",
    "moe/idle_experts",
    "adapters/experts_not_updated",
]


def turn_gates(router, arguments, output):
    """Some gates zero and some negative, so that there is something to count."""
    logits, gates, index = output
    return logits, gates.masked_fill(index == 0, 0.0) * (1 - 2 * (index == 1)), index


def build(adapters, recompute, turned=False):
    model = ADAPTERS[adapters](qwen3())
    if recompute:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if turned:
        for module in model.modules():
            if type(module).__name__ == "Qwen3MoeTopKRouter":
                module.register_forward_hook(turn_gates)
    return model


class Distributed(Tiny):
    """A model in every rank, or a part of one; each batch is split over the ranks in order."""

    shards = ("layers", "model")
    policy = MixedPrecisionPolicy()
    data = None

    def __init__(self, build):
        super().__init__(build, "configure_model")
        self.gradients = {}

    def configure_model(self):
        super().configure_model()
        if self.device_mesh is None:
            return
        shard = partial(fully_shard, mesh=self.device_mesh["data_parallel"], mp_policy=self.policy)
        base = getattr(self.network, "get_base_model", lambda: self.network)()
        if "experts" in self.shards:
            for experts in experts_modules(base):
                shard(experts)
        if "layers" in self.shards:
            for layer in base.model.layers:
                shard(layer)
        if "model" in self.shards:
            shard(self.network)

    def on_before_optimizer_step(self, optimizer):
        if not self.gradients:
            gradients = {n: full_grad(p) for n, p in self.named_parameters() if p.requires_grad}
            self.gradients = {n: gradient.clone() for n, gradient in gradients.items() if gradient is not None}

    def train_dataloader(self):
        data = TensorDataset(tokens(BATCH * STEPS) if self.data is None else self.data)
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        if self.device_mesh is not None:
            ranks, rank = (
                self.device_mesh["data_parallel"].size(),
                self.device_mesh["data_parallel"].get_local_rank(),
            )
        sampler = DistributedSampler(data, ranks, rank, shuffle=False)
        return DataLoader(data, BATCH // ranks, sampler=sampler)


def strategy(kind):
    if kind == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    if kind in ("fsdp", "fsdp_twice"):
        return ModelParallelStrategy(2, 1 + (kind == "fsdp_twice"), save_distributed_checkpoint=False)
    return kind


def run(folder, kind, *callbacks, **options):
    devices = {"auto": 1, "fsdp_twice": 4}.get(kind, 2) if isinstance(kind, str) else 2
    defaults = {"max_steps": STEPS, "use_distributed_sampler": False, "devices": devices}
    return trainer(folder, *callbacks, strategy=strategy(kind), **defaults | options)


def fit(folder, kind, build, *callbacks, options=None, **attributes):
    """A fit in this process, as one of two ranks unless `kind` is "auto"; the module, and its warnings."""
    module = Distributed(build)
    for name, value in attributes.items():
        setattr(module, name, value)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run(folder, kind, *callbacks, **options or {}).fit(module)
    return module, [str(warning.message) for warning in said]


def outcome(folder, kind, build, enabled=True, **attributes):
    """What a fit leaves, for the test's own process to look at."""
    load = ExpertLoadMonitor()
    callbacks = [MoEGateGradCallback(enabled), load, AdapterUpdateCheck(2)]
    module, said = fit(folder, kind, build, *callbacks, **attributes)
    assert all(module.was_patched) == enabled
    assert is_restored(module)
    trained = {name: full_tensor(p).detach() for name, p in module.named_parameters() if p.requires_grad}
    return {
        "losses": torch.tensor(module.losses),
        "gradients": module.gradients,
        "trained": trained,
        "load": load.expert_load,
        "said": said,
    }


def deviation(results, alone):
    """The largest relative error of losses, gradients and trained values beside those of one rank."""
    errors = [relative_error(torch.stack([each["losses"] for each in results]).mean(0), alone["losses"])]
    for each in results:
        for what in ("gradients", "trained"):
            assert each[what].keys() == alone[what].keys()
            errors += [relative_error(each[what][name], value) for name, value in alone[what].items()]
    return max(errors)


LIMIT = 1e-5
