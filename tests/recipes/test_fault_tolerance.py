"""Tests of fault tolerance: leaving on a signal, writing checkpoints whole, advice when memory runs out.

That a resumed run has the losses of one that was not interrupted is in test_qwen3_lora.py.
"""

import errno
import inspect
import os
import pickle
import re
import resource
import runpy
import signal
import sys
import time
import warnings
from contextlib import contextmanager

import psutil
import pytest
import torch
from helpers.launch import process, together
from helpers.line import At, Line, trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lora import fault_tolerance
from lora.data import InstructionData
from lora.fault_tolerance import AtomicCheckpointIO, OutOfMemoryAdvice
from lora.module import MoELoRA
from qwen3_lora import UNHELPFUL_WARNINGS
from torch.utils.data import DataLoader

pytestmark = [pytest.mark.filterwarnings(f"ignore:{message}") for message in UNHELPFUL_WARNINGS]


def fit(folder, *callbacks, length=12, **options):
    run = trainer(folder, *callbacks, **options)
    run.fit(Line(), DataLoader(range(length), batch_size=1))
    return run


@pytest.fixture(autouse=True)
def handlers():
    """What stood before stands after, whatever happened between."""
    before = [signal.getsignal(number) for number in fault_tolerance.SIGNALS]
    yield
    assert [signal.getsignal(number) for number in fault_tolerance.SIGNALS] == before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint_and_a_status(number, status, tmp_path):
    with pytest.raises(SystemExit) as leaving:
        fit(tmp_path, At(3, lambda: signal.raise_signal(number)))
    assert leaving.value.code == status
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["interrupted-step=4.ckpt"]


def test_with_accumulated_gradients_it_is_the_optimizers_step_that_is_finished(tmp_path):
    with pytest.raises(SystemExit):
        fit(tmp_path, At(3, lambda: signal.raise_signal(signal.SIGINT)), accumulate_grad_batches=3)
    assert (tmp_path / "kept" / "interrupted-step=2.ckpt").exists()


class Validating(Line):
    """Asked to leave while it validates."""

    def on_validation_epoch_start(self):
        signal.raise_signal(signal.SIGTERM)

    def validation_step(self, batch, batch_idx):
        pass


@pytest.mark.parametrize("at", [2, 4])
def test_asked_while_it_validates_it_leaves_after_the_next_step_or_ends_with_what_it_has(at, tmp_path):
    run = trainer(tmp_path, max_steps=4, val_check_interval=at, num_sanity_val_steps=0)
    batches = [DataLoader(range(4), batch_size=1) for _ in range(2)]
    if at == 2:
        with pytest.raises(SystemExit, match="143"):
            run.fit(Validating(), *batches)
    else:
        run.fit(Validating(), *batches)
    saved = torch.load(tmp_path / "kept" / f"interrupted-step={run.global_step}.ckpt", weights_only=True)
    assert saved["global_step"] == run.global_step == (3 if at == 2 else 4)


def test_a_second_signal_leaves_at_once(tmp_path):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as leaving:  # Lightning's answer to a KeyboardInterrupt
        fit(tmp_path, At(3, twice))
    signal.signal(signal.SIGINT, before)  # Lightning leaves Ctrl-C ignored then
    assert leaving.value.code == 1
    assert not (tmp_path / "kept").exists() or not list((tmp_path / "kept").iterdir())


def test_handlers_are_back_after_an_exception_too(tmp_path):
    def fail():
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        fit(tmp_path, At(3, fail))


def test_undisturbed_runs_end_as_usual(tmp_path):
    assert fit(tmp_path).global_step == 12


def train_for_long(folder):
    warnings.simplefilter("ignore")
    os.dup2(os.open(folder / "errors.txt", os.O_WRONLY | os.O_CREAT), 2)
    fit(folder, At(2, (folder / "ready").touch), length=10**7)


def test_a_signal_from_another_process(tmp_path):
    training = process(train_for_long, tmp_path)
    while not (tmp_path / "ready").exists():
        assert training.is_alive()
        time.sleep(0.01)
    os.kill(training.pid, signal.SIGTERM)
    training.join(timeout=300)
    errors = (tmp_path / "errors.txt").read_text()
    assert training.exitcode == 143, errors
    assert len(list((tmp_path / "kept").glob("interrupted-step=*.ckpt"))) == 1
    assert "--ckpt_path" in errors


def test_checkpoints_hold_what_lightnings_hold(tmp_path):
    checkpoint = {"state_dict": {"weight": torch.ones(3)}, "global_step": 3}
    AtomicCheckpointIO().save_checkpoint(checkpoint, tmp_path / "new" / "a.ckpt")
    loaded = AtomicCheckpointIO().load_checkpoint(tmp_path / "new" / "a.ckpt")
    assert loaded["global_step"] == 3
    assert torch.equal(loaded["state_dict"]["weight"], torch.ones(3))
    assert os.listdir(tmp_path / "new") == ["a.ckpt"]


@contextmanager
def limited(num_bytes):
    """A file larger than this cannot be written: a disk that is full, for one process."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, most))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_is_reported_and_leaves_the_earlier_checkpoint(tmp_path):
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"weight": torch.ones(3)}, path)
    before = path.read_bytes()
    said = r"last.ckpt could not be written .*MiB free. Earlier checkpoints are as they were"
    with limited(100_000), pytest.raises(OSError, match=said):
        io.save_checkpoint({"weight": torch.ones(1_000_000)}, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_leaving_at_once_within_a_save_leaves_no_part_of_it(tmp_path, monkeypatch):
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"weight": torch.ones(3)}, path)
    before = path.read_bytes()

    def interrupted(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(fault_tolerance.torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        io.save_checkpoint({"weight": torch.ones(3)}, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_a_failed_save_ends_the_run_with_the_earlier_checkpoint_whole(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill():
        monkeypatch.setattr(fault_tolerance.torch, "save", full)

    checkpoint = ModelCheckpoint(tmp_path / "mine", every_n_train_steps=2, filename="{step}", save_top_k=-1)
    run = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=1,
        plugins=[AtomicCheckpointIO()], callbacks=[checkpoint, At(5, fill)], default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(OSError, match="No space left on device"):
        run.fit(Line(), DataLoader(range(12), batch_size=1))
    assert sorted(os.listdir(tmp_path / "mine")) == ["step=2.ckpt", "step=4.ckpt"]
    assert torch.load(tmp_path / "mine" / "step=4.ckpt", weights_only=True)["global_step"] == 4


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_prints_the_advice(error):
    with pytest.warns(UserWarning, match=r"out of memory. (.|\n)*--model.offload true(.|\n)*--data.max_length"):
        OutOfMemoryAdvice().on_exception(None, None, error)


def test_the_options_of_the_advice_are_the_recipes():
    kinds = {"model": MoELoRA, "data": InstructionData}
    options = re.findall(r"--(model|data)\.(\w+)", fault_tolerance.OUT_OF_MEMORY_ADVICE)
    assert len(options) == 7
    assert all(name in inspect.signature(kinds[kind]).parameters for kind, name in options)


def test_other_errors_get_no_advice(recwarn):
    OutOfMemoryAdvice().on_exception(None, None, RuntimeError("something else"))
    assert not recwarn.list


class Evil:
    """A pickle that makes a folder where it is loaded without care."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_no_code_in_a_checkpoint_runs(tmp_path, monkeypatch):
    torch.save({"state_dict": {}, "loops": Evil(tmp_path / "ran")}, tmp_path / "evil.ckpt")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # what others load is theirs
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran").exists()
    AtomicCheckpointIO().load_checkpoint(tmp_path / "evil.ckpt", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_nor_in_one_on_the_web(monkeypatch):
    """Of which Lightning runs the code unless it is told not to."""
    asked = []
    monkeypatch.setattr(TorchCheckpointIO, "load_checkpoint", lambda self, *arguments: asked.append(arguments[2]))
    for weights_only in (None, True, False):
        AtomicCheckpointIO().load_checkpoint("https://localhost/evil.ckpt", weights_only=weights_only)
    assert asked == [True, True, False]


def leave_together(folder, asked, number):
    """How a fit ends on each of two ranks, one of which gets a signal in the fourth step."""
    warnings.simplefilter("ignore")
    rank = int(os.environ["LOCAL_RANK"])
    action = (lambda: signal.raise_signal(number)) if rank == asked else (lambda: None)
    run = trainer(folder, At(3, action), devices=2, strategy=DDPStrategy(process_group_backend="gloo"))
    with pytest.raises(SystemExit) as leaving:
        run.fit(Line(), DataLoader(range(24), batch_size=1))
    return leaving.value.code, run.global_step


@pytest.mark.parametrize("asked", [0, 1])
def test_all_ranks_leave_after_the_same_step(asked, tmp_path):
    assert together(leave_together, tmp_path, asked, signal.SIGTERM) == [(143, 4), (0, 4)]
    assert len(list(tmp_path.glob("**/interrupted-step=4.ckpt"))) == 1


FAILS = """
import os, sys, time
from pathlib import Path
from lightning.pytorch.strategies import DDPStrategy
from helpers.line import At, Line, trainer
from torch.utils.data import DataLoader
folder, failing = Path(sys.argv[1]), sys.argv[2]

def fail():
    if os.environ.get("LOCAL_RANK", "0") == failing:
        raise RuntimeError("the pump is broken")
    time.sleep(600)  # as one that waits for a GPU does

(folder / f"pid-{os.environ.get('LOCAL_RANK', '0')}").write_text(str(os.getpid()))
run = trainer(folder, At(3, fail), devices=2, strategy=DDPStrategy(process_group_backend="gloo"))
run.fit(Line(), DataLoader(range(24), batch_size=1))
"""


def run_script(*arguments):
    """As `python` with these arguments does, and Lightning starts the other ranks; but what it imports is there."""
    os.dup2(os.open(arguments[1] / "errors.txt", os.O_WRONLY | os.O_CREAT), 2)
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.argv = list(map(str, arguments))
    runpy.run_path(sys.argv[0], run_name="__main__")


def is_gone(process):
    try:
        psutil.Process(process).wait(timeout=60)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return False
    return True


@pytest.mark.parametrize("failing", ["0", "1"])
def test_a_rank_that_fails_ends_the_others_with_its_error(failing, tmp_path):
    """As Lightning starts them: well before the half hour that a rank waits for another."""
    script = tmp_path / "fails.py"
    script.write_text(FAILS)
    launcher = process(run_script, script, tmp_path, failing)
    launcher.join(timeout=300)
    assert launcher.exitcode
    assert "RuntimeError: the pump is broken" in (tmp_path / "errors.txt").read_text()
    for rank in (0, 1):
        assert is_gone(int((tmp_path / f"pid-{rank}").read_text()))
