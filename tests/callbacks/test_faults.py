"""Faults: after an exception in any hook the model is fully restored, and the same callbacks train it again."""

import copy
import inspect
import signal
from itertools import product

import pytest
import torch
from helpers.models import Tiny, experts_modules, qwen3, tokens, with_expert_lora
from helpers.training import LIGHTNING_WARNINGS
from helpers.training import trainer as make_trainer
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_moe import AdapterUpdateCheck, ExpertLoadMonitor, MemoryMonitor, MoEGateGradCallback, gategrad
from lightning_moe.callbacks import restoring
from lightning_moe.ops import experts, passes, projection

pytestmark = [
    *LIGHTNING_WARNINGS,
    pytest.mark.filterwarnings("ignore:.*does not have a .LearningRateScheduler"),
]


class Fault(Exception):
    """What the tests raise."""


def public_functions(cls):
    return {name for name, _ in inspect.getmembers(cls, inspect.isroutine) if not name.startswith("_")}


CALLBACK_HOOKS = public_functions(Callback)
NOT_CALLED = dict.fromkeys(
    ["all_gather", "freeze", "load_from_checkpoint", "lr_schedulers", "manual_backward", "optimizers", "print",
     "remove_ignored_hparams", "save_hyperparameters", "to_onnx", "to_tensorrt", "to_torchscript", "toggle_optimizer",
     "toggled_optimizer", "unfreeze", "untoggle_optimizer"],
    "a method for the module's own code; no Trainer calls it",
) | {"configure_sharded_model": "deprecated; refused beside configure_model, which Tiny has"}  # fmt: skip
MODULE_HOOKS = public_functions(LightningModule) - public_functions(nn.Module) - NOT_CALLED.keys()


def entries(hook):
    """The entry points that call a hook, by its name."""
    if hook in ("setup", "teardown"):
        return ["fit", "validate", "test", "predict"]
    if hook == "on_validation_model_zero_grad":  # between training batches
        return ["fit"]
    words = hook.split("_")
    if "validation" in words or "val" in words:
        return ["fit", "validate"]
    return [next((entry for entry in ("test", "predict") if entry in words), "fit")]


OUR_HOOKS = CALLBACK_HOOKS & vars(MoEGateGradCallback).keys()
HOOKS = {"before": CALLBACK_HOOKS, "after": CALLBACK_HOOKS, "ours": OUR_HOOKS, "module": MODULE_HOOKS}
CASES = [(entry, where, hook) for where in HOOKS for hook in sorted(HOOKS[where]) for entry in entries(hook)]


class Module(Tiny):
    """Has a schedule too, and a batch size that a tuner may choose, so that every hook is called."""

    batch_size = 2

    def __init__(self, build):
        super().__init__(build, num_batches=2)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)]

    def train_dataloader(self):
        return DataLoader(TensorDataset(tokens(2 * self.num_batches)), batch_size=self.batch_size)


class Other(Callback):
    """Another callback, which has something to save."""

    def state_dict(self):
        return {"something": 1}


def raises(error, after=None):
    def fail(*args, **kwargs):
        if after is not None:
            after(*args, **kwargs)
        raise error

    return fail


def trainer(folder, *callbacks, **options):
    """As `helpers.training` has it, with validation and without a file of metrics."""
    defaults = {
        "max_epochs": 2,
        "max_steps": -1,
        "limit_val_batches": 1,
        "num_sanity_val_steps": 1,
        "logger": DummyLogger(),
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    }
    return make_trainer(folder, *callbacks, **defaults | options)


def one_layer():
    return qwen3(num_hidden_layers=1)


def ours():
    return [
        MoEGateGradCallback(audit_every_n_steps=1), MemoryMonitor(measure_activations_at_step=0), ExpertLoadMonitor(),
        AdapterUpdateCheck(after_n_steps=2),
    ]  # fmt: skip


def contents(network):
    """All that the submodules hold, by where it is held: their configs, forwards, hooks, parameters and the rest."""
    held = {}
    for path, module in network.named_modules():
        held[path, "__class__"] = type(module)
        for name, value in vars(module).items():
            if name == "training":  # Lightning's: an interrupted validation leaves the model in eval mode
                continue
            if isinstance(value, dict):
                held |= {(path, name, key): inner for key, inner in value.items()}
            else:
                held[path, name] = value
    return held


class Before:
    """A model before anything was done to it, to be compared with itself afterwards."""

    def __init__(self, module):
        self.module = module
        self.contents = contents(module.network)
        self.keys = list(module.network.state_dict())
        self.twin = copy.deepcopy(module.network)

    def check(self, running=None):
        """Fails unless the model is fully restored, bit for bit, and the Trainer and its callbacks let go of it."""
        self.check_contents(running)
        self.twin.load_state_dict(self.module.network.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(outcome(self.module.network), outcome(self.twin), strict=True))

    def check_contents(self, running):
        """The same, by what is where."""
        now = contents(self.module.network)
        assert now.keys() == self.contents.keys()
        assert [place for place, value in now.items() if value is not self.contents[place]] == []
        assert list(self.module.network.state_dict()) == self.keys
        if running is not None:
            assert "on_exception" not in vars(running.strategy)
            assert not any(type(callback).__module__ == restoring.__name__ for callback in running.callbacks)
            assert all(callback.report is None for callback in running.callbacks if hasattr(callback, "report"))

    def check_second_fit(self, folder, callbacks):
        """Fails unless the same callbacks train the model now, and restore it."""
        module = self.module.train()
        module.was_patched.clear()
        module.batch_size = 2  # whatever a tuner made of it
        previous = [parameter.detach().clone() for parameter in module.network.parameters()]
        fitting = trainer(folder, *callbacks, max_steps=1, num_sanity_val_steps=0, limit_val_batches=0)
        fitting.fit(module)
        assert module.was_patched == [True]
        moved = [not torch.equal(a, b) for a, b in zip(previous, module.network.parameters(), strict=True)]
        assert any(moved)
        self.check_contents(fitting)


def outcome(network):
    """The logits and the gradients of one forward and backward."""
    network.train().zero_grad()
    output = network(input_ids=tokens(), labels=tokens())
    output.loss.backward()
    gradients = [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]
    network.zero_grad()
    return [output.logits.detach(), *gradients]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a fit's first epoch."""
    folder = tmp_path_factory.mktemp("first epoch")
    fitting = trainer(folder, Other(), max_epochs=1)
    fitting.fit(Module(one_layer))
    fitting.save_checkpoint(folder / "first.ckpt")
    return folder / "first.ckpt"


def run(entry, module, callbacks, folder, checkpoint):
    """An entry point that calls every hook it has: a fit resumes, checks its validation first and saves."""
    saving = [ModelCheckpoint(folder, every_n_train_steps=1)] if entry == "fit" else []
    running = trainer(folder, *callbacks, *saving)
    options = {"ckpt_path": checkpoint, "weights_only": True} if entry == "fit" and checkpoint else {}
    try:
        getattr(running, entry)(module, **options)
    finally:
        module.last_trainer = running


@pytest.fixture
def interruptible():
    """Lightning turns a deaf ear to Ctrl-C while it shuts down, and may stay so."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def check_fault(entry, where, hook, error, folder, checkpoint, build=one_layer):
    module, callbacks, other = Module(build), ours(), Other()
    before = Before(module)
    place = {"module": module, "ours": callbacks[0]}.get(where, other)
    setattr(place, hook, raises(error, after=getattr(place, hook) if where == "ours" else None))
    if hook == "on_exception":
        module.training_step = raises(Fault("first"))
    listed = [other, *callbacks] if where == "before" else [*callbacks, other]
    with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else type(error)) as caught:
        run(entry, module, listed, folder, checkpoint)
    assert caught.value is error or isinstance(error, KeyboardInterrupt)
    before.check(module.last_trainer)
    delattr(place, hook)
    vars(module).pop("training_step", None)
    before.check_second_fit(folder, callbacks)


@pytest.mark.parametrize(("entry", "where", "hook"), CASES)
def test_an_exception_in_any_hook(tmp_path, checkpoint, entry, where, hook):
    check_fault(entry, where, hook, Fault(), tmp_path, checkpoint)


@pytest.mark.parametrize("entry", ["fit", "validate", "test", "predict"])
def test_methods_listed_as_no_hooks_are_not_called(tmp_path, checkpoint, entry):
    module = Module(one_layer)
    for name in NOT_CALLED.keys() - {"configure_sharded_model"}:
        setattr(module, name, raises(Fault(name)))
    run(entry, module, [*ours(), Other()], tmp_path, checkpoint)


SOME = [
    ("fit", "after", "setup"),
    ("fit", "module", "configure_model"),
    ("fit", "before", "on_fit_start"),
    ("fit", "before", "on_sanity_check_end"),
    ("fit", "module", "training_step"),
    ("fit", "after", "on_train_batch_end"),
    ("fit", "module", "on_validation_batch_start"),
    ("fit", "after", "teardown"),
    ("test", "module", "test_step"),
]


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("entry", "where", "hook"), SOME)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_an_interruption_in_a_hook(tmp_path, checkpoint, entry, where, hook, error):
    check_fault(entry, where, hook, error, tmp_path, checkpoint)


def with_adapters():
    return with_expert_lora(qwen3(), attention=True)


@pytest.mark.parametrize(("entry", "where", "hook"), SOME)
def test_an_exception_in_a_hook_with_unmerged_adapters(tmp_path, entry, where, hook):
    check_fault(entry, where, hook, Fault(), tmp_path, None, with_adapters)


def find_learning_rate(tuner, module):
    tuner.lr_find(module, num_training=3, update_attr=False)


def find_batch_size(tuner, module):
    tuner.scale_batch_size(module, init_val=2, max_trials=2, steps_per_trial=1)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("find", [find_learning_rate, find_batch_size])
@pytest.mark.parametrize(
    ("hook", "error"),
    [
        ("on_save_checkpoint", Fault()),
        ("on_train_start", Fault()),
        ("training_step", Fault()),
        ("training_step", KeyboardInterrupt()),
        ("training_step", SystemExit(3)),
        ("on_load_checkpoint", Fault()),
    ],
    ids=repr,
)
def test_an_exception_while_a_tuner_runs(tmp_path, find, hook, error):
    module, callbacks = Module(with_adapters), ours()
    before = Before(module)
    setattr(module, hook, raises(error))
    tuning = trainer(tmp_path, *callbacks, num_sanity_val_steps=0)
    with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else type(error)):
        find(Tuner(tuning), module)
    before.check(tuning)
    delattr(module, hook)
    before.check_second_fit(tmp_path, callbacks)


def test_out_of_memory_under_the_batch_size_finder(tmp_path):
    """Lightning takes this one as an answer and goes on."""
    module, callbacks = Module(one_layer), ours()
    before, step, module.num_batches = Before(module), module.training_step, 4

    def fail(batch, batch_idx):
        if len(batch[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(batch, batch_idx)

    module.training_step = fail
    tuning = trainer(tmp_path, *callbacks, num_sanity_val_steps=0)
    find_batch_size(Tuner(tuning), module)
    assert module.batch_size == 2
    before.check(tuning)
    del module.training_step
    module.num_batches = 2
    before.check_second_fit(tmp_path, callbacks)


class Listening(SingleDeviceStrategy):
    """Notes what it is told."""

    def __init__(self):
        super().__init__(device="cpu")
        self.heard = []

    def on_exception(self, exception):
        self.heard.append(exception)


@pytest.mark.parametrize("find", [None, find_learning_rate])
def test_the_strategys_on_exception_is_called_once(tmp_path, find):
    module, error = Module(one_layer), Fault()
    module.training_step = raises(error)
    running = trainer(tmp_path, *ours(), strategy=Listening())
    with pytest.raises(Fault):
        running.fit(module) if find is None else find(Tuner(running), module)
    assert running.strategy.heard == [error]


def test_an_on_exception_put_on_the_strategy_is_called_and_kept(tmp_path):
    module, error, heard = Module(one_layer), Fault(), []
    module.training_step = raises(error)
    running = trainer(tmp_path, *ours())
    running.strategy.on_exception = hook = heard.append
    with pytest.raises(Fault):
        running.fit(module)
    assert heard == [error]
    assert vars(running.strategy)["on_exception"] is hook


def send_sigterm(*_, **__):
    assert callable(signal.getsignal(signal.SIGTERM))  # Lightning's: without it the test run would end here
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("build", [one_layer, with_adapters])
@pytest.mark.parametrize("hook", ["on_train_start", "on_before_backward", "on_train_batch_end", "on_validation_end"])
def test_sigterm(tmp_path, hook, build):
    module, callbacks = Module(build), ours()
    before = Before(module)
    setattr(module, hook, send_sigterm)
    running = trainer(tmp_path, *callbacks, num_sanity_val_steps=0)
    with pytest.raises(SIGTERMException):
        running.fit(module)
    before.check(running)
    delattr(module, hook)
    before.check_second_fit(tmp_path, callbacks)


# What the operation calls, forward and backward.
OPERATIONS = [
    "sort_by_expert", "shape_problem", "activate", "activation_backward", "combine", "grouped_linear", "grouped_outer",
    "join", "split_gradients", "count",
]  # fmt: skip


def fail_at(monkeypatch, call, error):
    """Has the operation's calls counted, from 0, and one of them fail; the names called."""
    calls = []

    def counted(name, function):
        def count(*args, **kwargs):
            calls.append(name)
            if len(calls) - 1 == call:
                raise error
            return function(*args, **kwargs)

        return count

    for name, module in product(OPERATIONS, (experts, passes, projection)):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    return calls


@pytest.mark.parametrize("build", [one_layer, with_adapters])
@pytest.mark.parametrize("recompute_gate_up", [False, True])
def test_an_exception_in_any_part_of_the_operation(monkeypatch, build, recompute_gate_up):
    """The model is restored after the block, and inside it the next forward and backward are as without a failure."""
    module = Module(build)
    before = Before(module)
    with gategrad(module, recompute_gate_up=recompute_gate_up), monkeypatch.context() as patch:
        names = fail_at(patch, None, None)
        want = outcome(module.network)
    assert set(names) == set(OPERATIONS) - ({"join"} if build is one_layer else set())
    for call in range(len(names)):
        with gategrad(module, recompute_gate_up=recompute_gate_up):
            with monkeypatch.context() as patch:
                fail_at(patch, call, torch.OutOfMemoryError(f"call {call}"))
                with pytest.raises(torch.OutOfMemoryError, match=f"call {call}$"):
                    outcome(module.network)
            assert all(torch.equal(a, b) for a, b in zip(outcome(module.network), want, strict=True))
        before.check()


class FailingSiLU(nn.SiLU):
    """Fails while it is told to."""

    failing = False

    def forward(self, h):
        if FailingSiLU.failing:
            raise Fault
        return super().forward(h)


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_backward"])
def test_an_activation_that_fails(tmp_path, monkeypatch, hook):
    """It does from the hook on: in forward, or in backward, which calls it again."""
    module, callbacks = Module(one_layer), ours()[:1]
    (layer,) = experts_modules(module)
    layer.act_fn = FailingSiLU()
    before = Before(module)
    setattr(module, hook, lambda *_: monkeypatch.setattr(FailingSiLU, "failing", True))
    running = trainer(tmp_path, *callbacks, num_sanity_val_steps=0)
    with pytest.raises(Fault):
        running.fit(module)
    assert len(module.losses) == (hook == "on_before_backward")
    delattr(module, hook)
    monkeypatch.undo()
    before.check(running)
    before.check_second_fit(tmp_path, callbacks)
