"""The logic around CUDA graphs, with a stand-in that runs at each replay what it was given to record."""

import copy
import pickle

import pytest
import torch
from helpers.graphs import StandIn
from helpers.models import experts_modules, qwen3, tokens, with_expert_lora
from helpers.patching import equal
from torch import nn

from lightning_moe import GraphedFunction, measure_moe_activations, patch_moe, replayed_bytes
from lightning_moe.cuda_graph import MAX_SHAPES, WARMUP_STEPS, Recorder
from lightning_moe.expert_load import ExpertLoadCounter
from lightning_moe.patch_state import patch_of


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)
        self.calls = 0

    def loss(self, batch):
        self.calls += 1
        return (self.used(batch["x"]) * batch.get("factor", 1)).square().mean()


def graphed(model=None, function=None, mode=True, **options):
    model = model or Model()
    found = GraphedFunction(function or model.loss, model, mode)
    found._recorder = StandIn(**options)
    return found


def batch(seed=0, rows=3):
    return {"x": torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))}


def train_on(batches, function):
    for found in batches:
        function(found).backward()


def warm(function, rows=3):
    for seed in range(WARMUP_STEPS):
        function(batch(seed, rows)).backward()
    for parameter in function.module.parameters():
        parameter.grad = None
    return function


def train(function, module, micro_batches=12, accumulate=2, lr=0.1):
    """Losses, and the gradients before each step."""
    optimizer = torch.optim.SGD(module.parameters(), lr=lr)
    losses, gradients = [], []
    for seed in range(micro_batches):
        loss = function(batch(seed))
        (loss / accumulate).backward()
        losses.append(loss.item())
        if seed % accumulate == accumulate - 1:
            gradients.append({n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()})
            optimizer.step()
            optimizer.zero_grad()
    return losses, gradients


def test_training_with_accumulated_gradients_is_the_same_to_the_bit():
    alone, model = Model(), Model()
    function = graphed(model)
    wanted, found = train(alone.loss, alone), train(function, model)
    assert found[0] == wanted[0]
    for mine, theirs in zip(found[1], wanted[1], strict=True):
        assert equal(
            {n: g for n, g in mine.items() if g is not None}, {n: g for n, g in theirs.items() if g is not None}
        )
        assert {n for n, g in mine.items() if g is None} == {"unused.weight", "unused.bias"}
    assert function._recorder.replays == 2 * (12 - WARMUP_STEPS)


def test_a_gradient_that_another_left_is_added_to():
    model = Model()
    function = warm(graphed(model))
    function(batch(7)).backward()
    once = model.used.weight.grad.clone()
    model.used.weight.grad = torch.ones_like(once)
    function(batch(7)).backward()
    assert torch.allclose(model.used.weight.grad, once + 1)
    model.loss(batch(7)).backward()  # by itself, into what the graph added to
    assert torch.allclose(model.used.weight.grad, 2 * once + 1)


def test_the_incoming_gradient_counts():
    model = Model()
    function = warm(graphed(model))
    (3 * function(batch(7))).backward()
    scaled = model.used.weight.grad.clone()
    model.used.weight.grad = None
    model.loss(batch(7)).backward()
    assert torch.allclose(scaled, 3 * model.used.weight.grad)


def test_outputs_beside_the_loss_have_no_graph_and_stay_as_they_are():
    model = Model()
    function = graphed(model, lambda batch: (model.loss(batch), batch["x"].sum(), model.used.weight.detach().sum()))
    for seed in range(WARMUP_STEPS + 1):
        found = function(batch(seed))
        found[0].backward()
    again = function(batch(99))
    assert [output.requires_grad for output in again] == [True, False, False]
    assert found[1] == batch(WARMUP_STEPS)["x"].sum()
    assert again[1] == batch(99)["x"].sum()


def test_a_second_backward_and_one_that_comes_too_late_raise():
    function = warm(graphed())
    loss = function(batch(5))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward, before the next step begins"):
        loss.backward()
    first = function(batch(5))
    function(batch(6)).backward()
    with pytest.raises(RuntimeError, match="one backward, before the next step begins"):
        first.backward()
    first = function(batch(5))
    for _ in range(WARMUP_STEPS + 1):
        function(batch(6, rows=4))  # another shape, in the same memory
    with pytest.raises(RuntimeError, match="one backward, before the next step begins"):
        first.backward()


def test_each_shape_warms_up_and_is_captured_and_constants_count():
    function = warm(graphed())
    function(batch(5)).backward()
    for other in ({**batch(5), "factor": 2}, batch(5, rows=4)):
        replays = function._recorder.replays
        for _ in range(WARMUP_STEPS):
            function(other).backward()
        assert function._recorder.replays == replays
        assert function(other).item() == function.function(other).item()
        assert function._recorder.replays == replays + 1


def test_more_shapes_run_by_themselves_and_it_is_said_once():
    function = graphed(mode=True)

    def train_on_all():
        for rows in range(1, MAX_SHAPES + 3):
            for seed in range(WARMUP_STEPS + 1):
                function(batch(seed, rows)).backward()

    with pytest.warns(UserWarning, match=rf"more than {MAX_SHAPES} shapes.*graph_shapes") as said:
        train_on_all()
    assert len(said) == 1
    assert len(function._captured) == MAX_SHAPES
    assert function.reason is None


def test_without_gradients_the_function_runs():
    function = warm(graphed())
    with torch.no_grad():
        function(batch(1))
    assert function._recorder.replays == 0


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"takes": False}, "graph_device"),
        ({"fails": torch.OutOfMemoryError("CUDA out of memory.\nMore.")}, "graph_memory"),
        ({"fails": RuntimeError("operation not permitted when stream is capturing")}, "graph_failed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_captured_runs_by_itself_and_is_named_once(options, code):
    alone, model = Model(), Model()
    function = graphed(model, **options)
    with pytest.warns(UserWarning, match=code) as said:
        found = train(function, model)
    assert len(said) == 1
    assert found[0] == train(alone.loss, alone)[0]
    assert any(code in line for line in function.report())


OUTSIDE = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda model: lambda batch: model.loss({"x": OUTSIDE(batch["x"])}), "does not read from the module"),
        (
            lambda model: lambda batch, kept=model.used.weight: (batch["x"] @ kept).sum(),
            "does not read from the module",
        ),
        (lambda model: lambda batch: {"loss": model.loss(batch)}, "neither the loss nor a tuple"),
        (lambda model: lambda batch: (model.loss(batch), None), "neither the loss nor a tuple"),
        (lambda model: lambda batch: (model.loss(batch), model.used.weight.sum()), "wants a gradient: detach it"),
    ],
    ids=["outside", "kept", "mapping", "none", "auxiliary"],
)
def test_a_function_whose_replay_would_lose_something_runs_by_itself(make, what):
    """Gradients that would go nowhere, and what a training step reads from the results."""
    model = Model()
    function = graphed(model, make(model), runs=True)
    with pytest.warns(UserWarning, match=f"{what}.*graph_failed"):
        results = [function(batch(1)) for _ in range(WARMUP_STEPS + 2)]
    assert {type(result) for result in results} == {type(results[0])}
    assert not function._captured


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("x", batch(1)["x"].requires_grad_(), "a tensor that wants a gradient"),
        ("y", [1], "a list"),
        ("y", (torch.ones(2),), "a tuple"),
    ],
    ids=["gradient", "list", "tuple"],
)
def test_a_batch_that_a_replay_cannot_follow(name, value, what):
    model = Model()
    function = graphed(model)
    for seed in range(WARMUP_STEPS + 1):
        function(batch(seed)).backward()
    replays = function._recorder.replays
    with pytest.warns(UserWarning, match=f"{name} in the batch is {what}.*graph_batch"):
        train_on([{**batch(1), name: value}] * (WARMUP_STEPS + 2), function)
    assert function._recorder.replays == replays
    assert len(function._warmups) == 1
    if name == "x":
        assert value.grad.count_nonzero()


def test_a_tensor_on_another_device_is_python_s_to_read(monkeypatch):
    """Such as the lengths that packed sequences want on the host."""
    function = graphed()
    function._recorder.takes = lambda device: device.type == "cpu"
    with pytest.warns(UserWarning, match="this is on meta.*graph_device"):
        train_on([{**batch(1), "z": torch.ones(3, device="meta")}] * (WARMUP_STEPS + 2), function)
    assert not function._captured
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert [Recorder().takes(torch.device("cuda", index)) for index in (0, 1)] == [False, True]


def test_a_model_on_several_devices_runs_by_itself():
    model = Model()
    model.elsewhere = nn.Linear(2, 2, device="meta")
    function = graphed(model)
    with pytest.warns(UserWarning, match="this is on meta.*graph_device"):
        train_on([batch(1)] * (WARMUP_STEPS + 2), function)
    assert not function._captured


def test_backward_is_without_autocast():
    seen = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(torch.is_autocast_enabled("cpu"))
            return grad

    model = Model()
    function = graphed(model, lambda batch: Watched.apply(model.loss(batch)), runs=True)
    for seed in range(WARMUP_STEPS + 2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(batch(seed))
        loss.backward()
    assert function._captured
    assert not any(seen)


def test_what_is_compiled_is_not_compiled_anew():
    """Its kernels would be tried out while they are captured."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model = Model()
    used = torch.compile(model.used, backend=backend)
    function = graphed(model, lambda batch: used(batch["x"]).square().mean(), runs=True)
    for seed in range(WARMUP_STEPS + 2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(batch(seed))
        loss.backward()
    torch._dynamo.reset()
    assert function._captured
    assert len(compiled) == 1


def test_gradients_are_laid_out_as_autograd_lays_them_out():
    """Fused optimizers want them so."""
    model = Model()
    model.used.weight = nn.Parameter(torch.randn(4, 4).t())
    function = graphed(model)
    strides = set()
    for seed in range(WARMUP_STEPS + 2):
        model.zero_grad()
        function(batch(seed)).backward()
        strides.add(model.used.weight.grad.stride())
    assert function._captured
    assert strides == {(1, 4)}


def test_several_ranks_are_given_up_at_once(monkeypatch):
    """Data need not be filled up for them, nor the model looked at."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    function = graphed()
    with pytest.warns(UserWarning, match="2 ranks train.*graph_ranks"):
        function(batch(1)).backward()
    assert function.reason.code == "graph_ranks"


def test_hooks_that_run_python_are_named_and_those_that_count_on_the_device_are_not():
    model = Model()
    function = warm(graphed(model))
    handle = model.used.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"<lambda> on used runs Python.*graph_hook"):
        function(batch(1)).backward()
    assert function._recorder.replays == 0
    handle.remove()
    function(batch(1)).backward()
    assert function._recorder.replays == 2


def test_a_measured_step_runs_by_itself_and_nothing_is_said_of_it():
    model = qwen3(num_hidden_layers=1)
    patch_moe(model)
    function = graphed(model, lambda batch: model(**batch).loss)
    ids = {"input_ids": tokens(), "labels": tokens()}

    def is_replayed():
        replays = function._recorder.replays
        function(ids).backward()
        return function._recorder.replays > replays

    steps = [is_replayed() for _ in range(WARMUP_STEPS + 1)]
    with measure_moe_activations(model) as measured:
        steps += [is_replayed() for _ in range(2)]
    assert steps == [*[False] * WARMUP_STEPS, True, False, True]
    assert len(measured) == 1
    assert is_replayed()
    assert [line for line in function.report() if "not captured" in line] == []


def test_replays_that_are_not_faster_are_given_up():
    for replay, keeps in ((0.5, True), (0.99, False), (2.0, False)):
        function = graphed(mode="auto")
        for seed in range(WARMUP_STEPS + 4):
            function(batch(seed)).backward()
            function._recorder.now += 1.0 if seed < WARMUP_STEPS else 30.0 if seed == WARMUP_STEPS else replay
        assert (function.reason is None) == keeps
        assert bool(function._captured) == keeps
        assert function.report()[-1].startswith("a replay takes 0.500 s" if keeps else "not captured: a replay takes")
        assert function._recorder.resets == (0 if keeps else 2)


def test_an_audit_leaves_the_trial_its_times():
    """What ran by itself meanwhile is not counted, what was timed before is."""
    model = qwen3()
    patch_moe(model)
    function = GraphedFunction(lambda batch: model(**batch).loss, model)
    function._recorder = StandIn()
    sample = {"input_ids": tokens(1, 8), "labels": tokens(1, 8)}
    health = patch_of(experts_modules(model)[0]).health
    for step in range(WARMUP_STEPS + 5):
        health.audit_due = step == WARMUP_STEPS + 1
        function(sample).backward()
        function._recorder.now += 1.0 if step < WARMUP_STEPS else 0.1 if health.audit_due else 0.5
    assert function.report()[-1] == "a replay takes 0.500 s, the step by itself took 1.000 s"


def test_what_is_captured_is_of_these_weights_and_adapters():
    """New memory, other adapters, frozen weights: captured anew."""
    model = Model()
    function = warm(graphed(model))
    function(batch(1)).backward()
    changes = [
        lambda: setattr(model.used, "weight", nn.Parameter(torch.ones(4, 4))),
        lambda: setattr(model.used, "weight", nn.Parameter(model.used.weight.data)),
        lambda: model.used.bias.requires_grad_(False),
        lambda: model.eval(),
    ]
    for change in changes:
        replays = function._recorder.replays
        change()
        assert function(batch(1)).item() == model.loss(batch(1)).item()
        assert function._recorder.replays == replays
        for _ in range(WARMUP_STEPS):
            function(batch(1)).backward()
        assert function._recorder.replays > replays


def test_switched_adapters_are_captured_anew():
    model = with_expert_lora(qwen3())
    patch_moe(model)
    function = GraphedFunction(lambda batch: model(**batch).loss, model, True)
    function._recorder = StandIn()
    ids = tokens(1, 8)
    sample = {"input_ids": ids, "labels": ids}
    for _ in range(WARMUP_STEPS + 1):
        function(sample).backward()
    replays = function._recorder.replays
    with model.disable_adapter():
        without = model(**sample).loss.item()
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        assert function(sample).item() == without
    assert function._recorder.replays == replays


def test_health_load_and_audits_of_a_patched_model():
    """Each replay counts, as each step by itself does; an audited step runs by itself."""
    found = []
    for uses_graph in (False, True):
        model = qwen3()
        patch_moe(model)
        load = ExpertLoadCounter(model)
        function = GraphedFunction(lambda batch, model=model: model(**batch).loss, model, True)
        function._recorder = StandIn()
        for step in range(WARMUP_STEPS + 5):
            ids = tokens(1, 8, seed=step)
            sample = {"input_ids": ids, "labels": ids}
            health = [patch_of(experts).health for experts in experts_modules(model)]
            health[0].audit_due = step == WARMUP_STEPS + 2
            (function if uses_graph else function.function)(sample).backward()
        assert function._recorder.replays == (2 * 4 if uses_graph else 0)
        counts = [layer.drain(micro_batches=99) for layer in health]
        assert counts[0].audit_rel_error < 1e-5
        rows = load.drain(torch.device("cpu"))
        found.append([
            [(int(c.gates), int(c.active_layers), int(c.activation_bytes_saved)) for c in counts],
            [layer.tolist() for layer in rows.values()],
        ])  # fmt: skip
    assert found[0] == found[1]
    assert found[0][0][0][:2] == (8 * 8 * 2, 8)


def test_replayed_memory_is_asked_for_once():
    function = warm(graphed())
    replayed_bytes(torch.device("cpu"))
    function(batch(1)).backward()
    assert replayed_bytes(torch.device("cpu")) == 3 * 2**20
    assert replayed_bytes(torch.device("cpu")) == 0


def test_release_gives_back_and_what_follows_is_captured_anew():
    function = warm(graphed())
    function(batch(1)).backward()
    function.release()
    assert (function._recorder.resets, function._recorder.releases) == (2, 2)  # as the first step began, and now
    replays = function._recorder.replays
    warm(function)
    function(batch(1)).backward()
    assert function._recorder.replays == replays + 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda function: pickle.loads(pickle.dumps(function))])
def test_copies_are_of_the_copied_module_with_nothing_captured(copied):
    function = warm(graphed())
    function(batch(1)).backward()
    other = copied(function)
    assert other.module is not function.module
    assert other.function.__self__ is other.module
    assert not other._captured
