"""The recipe's steps captured as CUDA graphs: packs of one shape, and on a GPU the same run as without."""

import csv
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers.graphs import StandIn
from helpers.recipe import data, module, trained, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lora.data import IGNORED, fill_up, num_documents, num_tokens
from lora.offload import SMALLEST_OFFLOADED_BYTES, ActivationOffload
from qwen3_lora import UNHELPFUL_WARNINGS

from lightning_moe import AdapterUpdateCheck, ExpertLoadMonitor, MemoryMonitor, MoEGateGradCallback, cuda_graph

pytestmark = [
    *(pytest.mark.filterwarnings(f"ignore:{message}") for message in UNHELPFUL_WARNINGS),
    pytest.mark.filterwarnings("ignore:AdapterUpdateCheck. by step"),  # a tiny router leaves experts idle
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),  # torch 2.11, in a thread's first product
]
LENGTH, LONGEST = 64, 32


def packed(**options):
    return data(packing="bfd", max_length=LONGEST, batch_size=2, **options)


class Batches(Callback):
    """The batches that are trained on."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append((batch, outputs["train/loss"].item()))


def fit_on_cpu(tmp_path, **options):
    batches = Batches()
    with pytest.warns(UserWarning, match="graph_device") if options["cuda_graph"] is True else not_warned():
        trainer(tmp_path, 4, batches).fit(module(**options), packed())
    return batches.seen


class not_warned:  # noqa: N801
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def test_packs_have_one_shape_and_the_same_loss(tmp_path):
    """Filled up they train as they are: what is added has no loss, and no document sees it."""
    as_they_are, filled = (fit_on_cpu(tmp_path, cuda_graph=wanted) for wanted in (False, True))
    shapes = {
        (batch["input_ids"].shape[1], batch["cu_seq_lens_q"].numel(), batch["max_length_q"]) for batch, _ in filled
    }
    assert len(shapes) == 1
    assert {length for length, *_ in shapes} == {LENGTH}
    assert len({batch["input_ids"].shape[1] for batch, _ in as_they_are}) > 1
    for (batch, loss), (other, same) in zip(as_they_are, filled, strict=True):
        assert same == pytest.approx(loss, abs=1e-6)
        assert (num_documents(other), num_tokens(other)) == (num_documents(batch), num_tokens(batch))


def test_fill_up_adds_documents_without_a_loss_and_empty_ones():
    ids = torch.arange(1, 6)[None]
    ends = torch.tensor([0, 2, 5], dtype=torch.int32)
    batch = {
        "input_ids": ids, "labels": ids, "position_ids": torch.tensor([[0, 1, 0, 1, 2]]), "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends, "max_length_q": 3, "max_length_k": 3, "weight": 1.0,
    }  # fmt: skip
    filled = fill_up(batch, 12, 4, 8)
    assert filled["input_ids"].tolist() == [[1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2]]
    assert filled["labels"].tolist() == [[1, 2, 3, 4, 5, *[IGNORED] * 7]]
    assert filled["position_ids"].tolist() == [[0, 1, 0, 1, 2, *range(7)]]
    assert filled["cu_seq_lens_q"].tolist() == filled["cu_seq_lens_k"].tolist() == [0, 2, 5, 12, 12, 12, 12]
    assert (filled["max_length_q"], filled["max_length_k"], filled["weight"]) == (8, 8, 1.0)
    full = fill_up(batch, 5, 2, 8)
    assert full["input_ids"].tolist() == ids.tolist()
    assert full["cu_seq_lens_q"].tolist() == [0, 2, 5, 5]
    much = fill_up(batch, 24, 4, 8)  # attention's kernel leaves out what a document has beyond the longest
    assert much["cu_seq_lens_q"].tolist() == [0, 2, 5, 13, 21, 24, 24, 24]
    assert much["position_ids"].tolist() == [[0, 1, 0, 1, 2, *range(8), *range(8), *range(3)]]
    assert much["cu_seq_lens_q"].dtype == torch.int32


def test_offload_is_not_captured_and_says_so(tmp_path, monkeypatch):
    fit_on_cpu(tmp_path, cuda_graph=True, checkpointing="full", offload=True)  # comes to the graph's reason
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    layer = ActivationOffload().next_block()
    with pytest.raises(RuntimeError, match="model.offload's copies"):
        layer.pack(SimpleNamespace(is_cuda=True, nbytes=SMALLEST_OFFLOADED_BYTES))


class Interrupt(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise RuntimeError("the machine goes down")


def metrics(folder, version):
    """What was logged, by name and step, memory aside."""
    found = defaultdict(dict)
    lines = (folder / "log" / f"version_{version}" / "metrics.csv").read_text().splitlines()
    for row in csv.DictReader(lines):
        for name, value in row.items():
            if value and name not in ("epoch", "step") and not name.startswith("memory/"):
                found[name][int(row["step"])] = value
    return found


def long_fit(folder, *callbacks, steps, on_gpu, ckpt_path=None):
    """`steps` with three validations, six checkpoints and five audits."""
    network = module(
        dtype="bfloat16" if on_gpu else "float32", checkpointing="selective", cuda_graph=True, experts=True,
        router_aux_loss=1e-2, learning_rate=1e-3, architecture=ARCHITECTURE,
    )  # fmt: skip
    run = trainer(
        folder, steps, MoEGateGradCallback(audit_every_n_steps=steps // 5), ExpertLoadMonitor(), MemoryMonitor(),
        AdapterUpdateCheck(), ModelCheckpoint(every_n_train_steps=steps // 6, save_last=True, save_top_k=0), *callbacks,
        accelerator="gpu" if on_gpu else "cpu", devices=1, precision="bf16-mixed" if on_gpu else "32-true",
        logger=CSVLogger(folder, "log"), limit_val_batches=1, val_check_interval=6 * steps // 5,
        check_val_every_n_epoch=None, accumulate_grad_batches=4, log_every_n_steps=steps // 30,
        gradient_clip_val=1.0, enable_checkpointing=True, deterministic=True,
    )  # fmt: skip
    run.fit(network, packed(), ckpt_path=ckpt_path)
    return network


ARCHITECTURE = {
    "model_type": "qwen3_moe", "vocab_size": 384, "hidden_size": 128, "intermediate_size": 64,
    "moe_intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip


NEEDS_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(
    ("steps", "on_gpu"), [pytest.param(30, False, id="stand-in"), pytest.param(300, True, marks=NEEDS_A_GPU, id="gpu")]
)
@pytest.mark.filterwarnings("ignore:.*deterministic")
def test_a_run_is_the_same_with_and_without(steps, on_gpu, tmp_path, monkeypatch, caplog):
    """With accumulated gradients, validations, checkpoints, an interruption and what resumes after it."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if not on_gpu:
        monkeypatch.setattr(cuda_graph, "Recorder", StandIn)
    fit = partial(long_fit, steps=steps, on_gpu=on_gpu)
    graphed = fit(tmp_path / "graphed")
    with pytest.raises(RuntimeError, match="goes down"):
        fit(tmp_path / "parts", Interrupt(steps // 2 + 3))
    resumed = fit(tmp_path / "parts", ckpt_path=str(tmp_path / "parts/log/version_0/checkpoints/last.ckpt"))
    assert caplog.text.count("CUDA graph: captured") == 3
    monkeypatch.setattr(cuda_graph.Recorder, "takes", lambda self, device: False)
    with pytest.warns(UserWarning, match="graph_device"):
        alone = fit(tmp_path / "alone")
    want = metrics(tmp_path / "alone", 0)
    assert len(want["train/loss"]) == 30
    assert len(want["val/loss"]) == 3
    assert metrics(tmp_path / "graphed", 0) == want
    after = metrics(tmp_path / "parts", 1)
    del after["adapters/experts_not_updated"]  # counted from a run's first step
    for name, values in after.items():
        assert values == {step: value for step, value in want[name].items() if step in values}, name
    for name, value in trained(alone).items():
        assert torch.equal(trained(graphed)[name], value), name
        assert torch.equal(trained(resumed)[name], value), name
