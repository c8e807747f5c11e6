"""CUDA graphs on a GPU: the same bits as by itself, counts, failures while capturing, memory given back."""

import gc
import os

import pytest
import torch
from helpers.models import experts_modules, qwen3, tokens
from torch import nn

from lightning_moe import GraphedFunction, patch_moe
from lightning_moe.cuda_graph import WARMUP_STEPS, Recorder
from lightning_moe.expert_load import ExpertLoadCounter
from lightning_moe.patch_state import patch_of

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),  # torch 2.11, in a thread's first product
]

DEVICE = torch.device("cuda")


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def patched():
    model = qwen3(hidden_size=64, moe_intermediate_size=32, head_dim=32).to(DEVICE, torch.bfloat16).train()
    model.set_attn_implementation("sdpa")
    patch_moe(model)
    return model


def sample(seed):
    ids = tokens(1, 48, seed=seed).to(DEVICE)
    return {"input_ids": ids, "labels": ids}


def train(function, model, steps=8, accumulate=2):
    """Losses, and the parameters after every other micro-batch's step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    losses = []
    for step in range(steps):
        loss = function(sample(step))
        (loss / accumulate).backward()
        losses.append(loss.item())
        if step % accumulate == accumulate - 1:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return losses, [parameter.detach().clone() for parameter in model.parameters()]


def captured(model, function=None):
    return GraphedFunction(function or (lambda batch: model(**batch).loss), model, True)


def test_the_same_bits_and_counts_as_by_itself(deterministic):
    found = []
    for uses_graph in (False, True, True):
        model = patched()
        load = ExpertLoadCounter(model)
        function = captured(model)
        losses, values = train(function if uses_graph else function.function, model)
        counts = [patch_of(experts).health.drain(micro_batches=99) for experts in experts_modules(model)]
        rows = [part.tolist() for part in load.drain(DEVICE).values()]
        found.append((losses, values, [(int(c.gates), int(c.active_layers)) for c in counts], rows))
        assert bool(function._captured) == uses_graph, function.report()
    for other in found[1:]:
        assert other[0] == found[0][0]
        assert all(map(torch.equal, other[1], found[0][1]))
        assert other[2:] == found[0][2:]
    assert found[0][2][0] == (8 * 48 * 2, 8)


def test_adapters_on_other_weights_are_captured_anew():
    model = patched()
    function = captured(model)
    train(function, model)
    graph = next(iter(function._captured.values()))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    train(function, model)
    assert next(iter(function._captured.values())) is not graph


def fails_by_waiting(loss):
    return loss * (1 if loss.item() > -1 else 2)


def fails_by_memory(loss):
    if torch.cuda.is_current_stream_capturing():
        torch.empty(2**45, device=DEVICE)
    return loss


@pytest.mark.parametrize(
    ("fails", "code"), [(fails_by_waiting, "graph_failed"), (fails_by_memory, "graph_memory")], ids=["waits", "memory"]
)
def test_a_failure_while_capturing_leaves_a_step_by_itself(fails, code):
    alone, model = patched(), patched()
    want, _ = train(lambda batch: fails(alone(**batch).loss), alone)
    function = captured(model, lambda batch: fails(model(**batch).loss))
    with pytest.warns(UserWarning, match=code):
        found, _ = train(function, model)
    assert found == pytest.approx(want, abs=1e-2)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    first, second = (torch.nn.functional.dropout(torch.ones(999, device=DEVICE)) for _ in range(2))
    assert not torch.equal(first, second)
    other = patched()
    again = captured(other)
    train(again, other)
    assert again._captured, again.report()


def test_random_numbers_are_new_at_each_replay():
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5)).to(DEVICE)
    function = captured(model, lambda batch: model(batch["x"]).sum())
    ones = {"x": torch.ones(8, 64, device=DEVICE)}
    losses = []
    for _ in range(WARMUP_STEPS + 4):
        loss = function(ones)
        loss.backward()
        losses.append(loss.item())
    assert len(set(losses)) == len(losses)


def test_memory_is_given_back():
    model = nn.Linear(2048, 2048).to(DEVICE)
    function = captured(model, lambda batch: model(batch["x"]).relu().square().sum())
    batch = {"x": torch.ones(32768, 2048, device=DEVICE)}

    def reserved():
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    function(batch).backward()
    model.zero_grad()
    before = reserved()
    for _ in range(WARMUP_STEPS + 1):
        function(batch).backward()
    model.zero_grad()
    assert function._captured
    held = reserved() - before
    assert held > 2 * batch["x"].nbytes
    function.release()
    assert reserved() - before < held / 4  # cuBLAS keeps the workspaces of the stream that was captured


def test_shapes_share_their_memory():
    model = nn.Linear(2048, 2048).to(DEVICE)
    function = captured(model, lambda batch: model(batch["x"]).relu().square().sum())
    held = []
    for rows in (8192, 8000, 7000):
        for _ in range(WARMUP_STEPS + 1):
            function({"x": torch.ones(rows, 2048, device=DEVICE)}).backward()
        held.append(function._recorder.pool_bytes())
    assert len(function._captured) == 3
    assert held[2] < 1.6 * held[0]


def test_the_recorder_takes_a_gpu():
    assert Recorder().takes(DEVICE)
    assert not Recorder().takes(torch.device("cpu"))
