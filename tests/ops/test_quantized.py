"""Tests of quantized weights: what may be done with them, and the operation over them."""

import copy
import io
import pickle
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers.quantized import MAKERS, quantized
from helpers.reference import (
    CORRUPTIONS,
    FACTORS,
    FLOAT32_TOLERANCE,
    assert_agrees,
    call,
    corrupt,
    gradients,
    largest_allocation,
    make_problem,
    relative_error,
    run,
    run_loop,
)
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from lightning_moe.ops import passes, projection
from lightning_moe.ops import quantized as module
from lightning_moe.ops.quantized import QuantizedWeight

SHAPE, LONG = (3, 64, 160), (2, 128, 192)


# As a parameter


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


@pytest.fixture
def parameter(make):
    return nn.Parameter(make(torch.randn(SHAPE, dtype=torch.bfloat16)), requires_grad=False)


def frozen(parameter):
    return f"frozen weight in {parameter.format.name}"


def test_it_looks_like_the_dense_weight_and_holds_fewer_bytes(parameter):
    assert isinstance(parameter, nn.Parameter)
    assert (tuple(parameter.shape), parameter.dtype, parameter.ndim) == (SHAPE, torch.bfloat16, 3)
    assert parameter.nbytes == sum(part.nbytes for part in parameter.parts.values())
    assert parameter.nbytes == pytest.approx(parameter.format.bytes_per_value * parameter.numel(), rel=0.1)
    assert f"({parameter.format.name}, " in repr(parameter)


def saved_and_loaded(weight):
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save", "clone", "detach", "to"])
def test_copies_stay_quantized(parameter, how):
    if how == "pickle" and parameter.format.name == "fp8":
        pytest.skip("PyTorch pickles float8 in torch.save alone")
    copies = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda weight: pickle.loads(pickle.dumps(weight)),
        "save": saved_and_loaded,
        "clone": torch.clone,
        "detach": torch.detach,
        "to": lambda weight: weight.to("cpu", copy=True),
    }
    copied = copies[how](parameter)
    assert isinstance(copied, QuantizedWeight)
    assert torch.equal(copied.dequantize(), parameter.dequantize())
    assert isinstance(copied, nn.Parameter) == (how in ("deepcopy", "pickle", "save"))
    for name, part in copied.parts.items():
        assert (part.data_ptr() == parameter.parts[name].data_ptr()) == (how == "detach")


def test_a_module_moves_casts_saves_and_loads_it(parameter, make):
    holder, other = nn.Module(), nn.Module()
    holder.weight = parameter
    other.weight = nn.Parameter(make(torch.randn(SHAPE, dtype=torch.bfloat16)), requires_grad=False)
    other.load_state_dict(holder.state_dict())
    assert torch.equal(other.weight.dequantize(), parameter.dequantize())
    holder.to("cpu").float()
    assert isinstance(holder.weight, QuantizedWeight)
    assert holder.weight.dequantize().dtype == torch.float32


def test_a_module_moves_and_casts_what_something_else_refers_to(parameter):
    """As a graph does that an error has left alive."""
    holder = nn.Module()
    holder.weight = parameter
    expected = parameter.dequantize()
    referred = weakref.ref(parameter)
    holder.float()
    assert referred() is holder.weight
    assert (holder.weight.dtype, holder.weight.dequantize().dtype) == (torch.float32, torch.float32)
    assert torch.equal(holder.weight.dequantize().to(expected.dtype), expected)
    holder.to("meta")
    assert isinstance(holder.weight, QuantizedWeight)
    assert isinstance(holder.weight, nn.Parameter)
    assert {part.device.type for part in holder.weight.parts.values()} == {"meta"}


def test_a_module_moves_it_to_a_gpu_by_setting_its_data(parameter):
    """Devices of dense tensors, as PyTorch sees them; nothing of a GPU is needed but the name."""
    holder = nn.Module()
    holder.weight = parameter
    wrapper = {"dtype": parameter.dtype, "device": "cuda"}
    on_gpu = torch.Tensor._make_wrapper_subclass(QuantizedWeight, parameter.shape, **wrapper)
    on_gpu.format, on_gpu.parts = parameter.format, {name: part.to("meta") for name, part in parameter.parts.items()}
    with torch.no_grad():
        holder._apply(lambda _: on_gpu)
    assert holder.weight is parameter
    assert holder.weight.device.type == "cuda"
    assert holder.weight.parts == on_gpu.parts


def test_its_parts_are_shared_between_processes(parameter):
    holder, expected = nn.Module(), parameter.dequantize()
    holder.weight = parameter
    holder.share_memory()
    assert all(part.is_shared() for part in holder.weight.parts.values())
    assert torch.equal(holder.weight.dequantize(), expected)


def test_what_would_change_it_raises_and_what_computes_gets_a_dense_copy(parameter):
    dense = parameter.dequantize()
    assert parameter.copy_(dense) is parameter  # as DDP has one rank's weights copied to all
    for change in (
        lambda: parameter.mul_(2),
        lambda: parameter.copy_(dense + 1),
        lambda: parameter.data.add_(1),
        lambda: setattr(parameter, "data", dense),
        lambda: parameter.__iadd__(dense),
    ):
        with pytest.raises(RuntimeError, match=frozen(parameter)):
            change()
    assert torch.equal(parameter.dequantize(), dense)
    assert torch.equal(parameter * 2, dense * 2)
    assert torch.equal(torch.baddbmm(parameter, dense, dense.mT @ dense), torch.baddbmm(dense, dense, dense.mT @ dense))


def test_optimizers_and_others_that_change_it_in_a_list_raise(parameter):
    changes = [
        lambda: torch._foreach_mul_([parameter, torch.ones(2)], 2.0),
        lambda: torch.mul(torch.ones(SHAPE), 2, out=parameter),
    ]
    for change in changes:
        with pytest.raises(RuntimeError, match=frozen(parameter)):
            change()
    trained = nn.Parameter(parameter.detach(), requires_grad=True)
    for options in ({"fused": True}, {"foreach": True}, {"foreach": False}):
        optimizer = torch.optim.AdamW([trained], **options)
        trained.grad = torch.ones(SHAPE, dtype=torch.bfloat16)
        with pytest.raises(RuntimeError, match=frozen(parameter)):
            optimizer.step()


def test_only_a_weight_of_the_same_parts_is_copied_or_takes_its_place(parameter, make):
    before = parameter.dequantize()
    make_other = next(other for other in MAKERS.values() if other is not make)
    others = [
        make_other(torch.randn(SHAPE, dtype=torch.bfloat16)),
        make(torch.randn(SHAPE)),
        make(torch.randn(LONG, dtype=torch.bfloat16)),
    ]
    for other in others:
        with pytest.raises(RuntimeError, match=f"{frozen(parameter)}|must match|size"):
            parameter.copy_(other)
    for other in (others[0], others[2], before):
        with pytest.raises(RuntimeError, match=frozen(parameter)):
            parameter.data = other
        with pytest.raises(RuntimeError, match=frozen(parameter)):
            parameter.set_(other)
    assert torch.equal(parameter.dequantize(), before)
    same = make(torch.randn(SHAPE, dtype=torch.bfloat16))
    parameter.data = same
    assert torch.equal(parameter.dequantize(), same.dequantize())


def test_it_is_not_sharded(parameter):
    words = f"a weight in {parameter.format.name} is not sharded, as fully_shard would"
    with pytest.raises(NotImplementedError, match=words):
        torch.chunk(parameter, 2)


# The operation

SIZES = {"hidden_size": 32, "intermediate_size": 64}
TRAINED = ("hidden_states", "top_k_weights", "gate_up_proj_bias", "down_proj_bias", *FACTORS)


def problems(layout, ranks, dtype=torch.float32, make=quantized):
    """A problem with quantized weights, and the same with dense ones of the same values."""
    problem = make_problem(layout, **SIZES, **ranks, dtype=dtype, requires_grad=TRAINED)
    weights = {name: make(problem.tensors[name]) for name in ("gate_up_proj", "down_proj")}
    dense = {name: weight.dequantize() for name, weight in weights.items()}
    return problem.with_tensors(**weights), problem.with_tensors(**dense)


RANKS = {"frozen": {}, "both": {"gate_up_ranks": (4,), "down_ranks": (8,)}}


@pytest.mark.parametrize("recompute_gate_up", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("layout", ["default", "transposed_biased", "gpt_oss", "no_gate_projection"])
def test_results_are_the_bits_of_the_dense_weights(layout, ranks, dtype, recompute_gate_up, make):
    mine, dense = (
        run(problem, recompute_gate_up=recompute_gate_up) for problem in problems(layout, RANKS[ranks], dtype, make)
    )
    assert mine.keys() == dense.keys()
    for name, result in dense.items():
        assert torch.equal(mine[name], result), name


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("layout", ["default", "gpt_oss"])
def test_a_small_workspace_takes_some_features_at_a_time(layout, ranks, make, monkeypatch):
    """Products of some features round as the CPU's library likes: on a GPU they are the same bits."""
    monkeypatch.setattr(module, "MIN_FEATURES", 16)
    monkeypatch.setattr(module, "WORKSPACE_BYTES", 5 * 32 * 16 * 4)  # 16 features of the narrower side
    problem, dense = problems(layout, RANKS[ranks], make=make)
    leaves = problem.leaves()
    with largest_allocation() as largest:
        results = gradients(problem, leaves, call(problem, leaves))
    assert largest.elements <= 5 * 128 * 16  # 16 features of the wider side; the whole projection has 32
    truth = run_loop(dense)
    assert_agrees(results, truth)
    for how in CORRUPTIONS:
        wrong = corrupt(dense, results, "output", how)
        assert relative_error(wrong["output"], truth["output"]) > 100 * FLOAT32_TOLERANCE, how


def test_no_more_columns_are_buffered_than_are_made_dense_at_a_time(make, monkeypatch):
    monkeypatch.setattr(module, "MIN_FEATURES", 16)
    monkeypatch.setattr(module, "WORKSPACE_BYTES", 5 * 32 * 16 * 4)
    combine, widths = projection.combine, []
    monkeypatch.setattr(projection, "combine", lambda rows, *args: (widths.append(rows.shape[1]), combine(rows, *args)))
    pair = problems("default", RANKS["frozen"], make=make)
    for problem, at_a_time in zip(pair, (16, SIZES["hidden_size"]), strict=True):
        run(problem)
        assert set(widths) == {at_a_time}
        widths.clear()


def test_nothing_dense_is_saved(make):
    problem, _ = problems("default", RANKS["both"], make=make)
    saved = []

    def note(tensor):
        saved.append(tensor)
        return tensor

    leaves = problem.leaves()
    with saved_tensors_hooks(note, lambda tensor: tensor):
        output = call(problem, leaves)
    sizes = {problem.tensors[name].numel() for name in ("gate_up_proj", "down_proj")}
    of_a_size = [tensor for tensor in saved if tensor.numel() in sizes]
    assert len(of_a_size) == 2
    assert all(isinstance(tensor, QuantizedWeight) for tensor in of_a_size)
    gradients(problem, leaves, output)


def made_dense(monkeypatch):
    """A list that from now on gets the shape of each weight that is made dense, each time."""
    made = []
    dequantize = QuantizedWeight.dequantize

    def noted(self, *args, **options):
        made.append(self.shape)
        return dequantize(self, *args, **options)

    monkeypatch.setattr(QuantizedWeight, "dequantize", noted)
    return made


@pytest.mark.parametrize(("workspace", "times"), [(2**28, 1), (2**10, 2 + 8)], ids=["once", "in parts"])
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("layout", ["default", "gpt_oss"])
def test_checkpointing_has_the_up_projection_dense_once_where_there_is_room(
    layout, ranks, workspace, times, make, monkeypatch
):
    """For h made again, of 32 features, and for the gradient of x, of 128."""
    monkeypatch.setattr(module, "MIN_FEATURES", 16)
    monkeypatch.setattr(module, "WORKSPACE_BYTES", workspace)
    problem, dense = problems(layout, RANKS[ranks], make=make)
    leaves = problem.leaves()
    output = checkpoint(partial(call, problem, leaves), use_reentrant=False)
    made = made_dense(monkeypatch)
    results = gradients(problem, leaves, output)
    assert made.count(problem.tensors["gate_up_proj"].shape) == times
    truth = run_loop(dense)
    assert_agrees(results, truth)
    for how in CORRUPTIONS:
        wrong = corrupt(dense, results, "hidden_states", how)
        assert relative_error(wrong["hidden_states"], truth["hidden_states"]) > 100 * FLOAT32_TOLERANCE, how


@pytest.mark.parametrize("ranks", RANKS)
def test_backward_lets_go_of_x_once_h_is_made_unless_a_factor_needs_it(ranks, make, monkeypatch):
    problem, _ = problems("default", RANKS[ranks], make=make)
    leaves, given, is_gone = problem.leaves(), [], []
    pre_activation, activation_backward = passes.pre_activation, passes.activation_backward

    def note_x(x, *args):
        given.append(StorageWeakRef(x.untyped_storage()))
        return pre_activation(x, *args)

    def note_whether_it_is_gone(*args, **options):
        is_gone.append(given[-1].expired())
        return activation_backward(*args, **options)

    monkeypatch.setattr(passes, "pre_activation", note_x)
    monkeypatch.setattr(passes, "activation_backward", note_whether_it_is_gone)
    x = leaves["hidden_states"]
    checkpoint(lambda x: call(problem, leaves | {"hidden_states": 1 * x}), x, use_reentrant=False).sum().backward()
    assert is_gone == [ranks == "frozen"]


def test_backward_leaves_the_up_projection_alone_where_the_input_needs_no_gradient(monkeypatch):
    problem, _ = problems("default", {})
    problem = replace(problem, requires_grad=frozenset({"top_k_weights"}))
    leaves = problem.leaves()
    output = call(problem, leaves)
    made = made_dense(monkeypatch)
    gradients(problem, leaves, output)
    assert made == [problem.tensors["down_proj"].shape]


def test_a_quantized_weight_that_is_to_train_is_refused():
    problem, _ = problems("default", {})
    leaves = problem.leaves()
    leaves["down_proj"].requires_grad_(True)
    with pytest.raises(ValueError, match="down_proj is quantized and cannot train: freeze it"):
        call(problem, leaves)
