"""Quantized weights on a GPU: bitsandbytes' bits, the dense weights' results, a bounded workspace, graphs, no wait."""

import math

import pytest
import torch
from helpers.quantized import MAKERS
from torch import nn

from lightning_moe import GraphedFunction, LowRank, moe_experts
from lightning_moe.ops import quantized as module
from lightning_moe.ops.quantized import QuantizedWeight
from lightning_moe.quantization import quantize

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
EXPERTS, HIDDEN, INTERMEDIATE, TOKENS = 8, 1024, 768, 300


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def weights(make):
    shapes = (EXPERTS, 2 * INTERMEDIATE, HIDDEN), (EXPERTS, HIDDEN, INTERMEDIATE)
    return [make(torch.randn(shape, dtype=torch.bfloat16) / shape[2] ** 0.5).to("cuda") for shape in shapes]


def inputs():
    hidden = torch.randn(TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16)
    index = torch.rand(TOKENS, EXPERTS, device="cuda").topk(3).indices
    gates = torch.rand(TOKENS, 3, device="cuda", dtype=torch.bfloat16)
    return hidden, index, gates


def updates(rank=8):
    made = []
    for width_in, width_out in ((HIDDEN, 2 * INTERMEDIATE), (INTERMEDIATE, HIDDEN)):
        a, b = torch.randn(EXPERTS, rank, width_in, device="cuda"), torch.randn(EXPERTS, width_out, rank, device="cuda")
        made.append((a / width_in**0.5, b / rank**0.5))
    return made


def run(given, up, down, factors, **options):
    hidden, index, gates = given
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, gates, *factors[0], *factors[1])]
    low_rank = {
        "gate_up_updates": [LowRank(leaves[2], leaves[3], 0.5)], "down_updates": [LowRank(leaves[4], leaves[5], 0.5)],
    }  # fmt: skip
    output = moe_experts(leaves[0], index, leaves[1], up, down, **low_rank, **options)
    return [output, *torch.autograd.grad(output.square().sum(), leaves)]


@pytest.mark.parametrize("shape", [(3, 48, 320), (2, 1536, 2048)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_are_bitsandbytes_own(dtype, shape):
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    weight = torch.randn(shape, device="cuda", dtype=dtype)
    mine = quantize(weight, "nf4").dequantize()
    for expert, dense in zip(weight, mine, strict=True):
        packed, state = functional.quantize_4bit(expert, blocksize=64, compress_statistics=True, quant_type="nf4")
        assert torch.equal(functional.dequantize_4bit(packed, state), dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_are_those_of_the_cpu(dtype, make):
    weight = make(torch.randn(2, 160, 256, dtype=dtype))
    moved = weight.to("cuda")
    for rows, columns in [(slice(0, 160), slice(0, 256)), (slice(3, 100), slice(30, 131))]:
        assert torch.equal(moved.dequantize(rows, columns).cpu(), weight.dequantize(rows, columns))


@pytest.mark.parametrize("name", ["fp8", "mxfp4", "mxfp4_transposed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parts_are_those_that_the_cpu_makes(dtype, name):
    weight = torch.randn(2, 160, 256, dtype=dtype) * torch.logspace(-20, 20, 256).to(dtype)
    mine, expected = (MAKERS[name](weight.to(device)).parts for device in ("cuda", "cpu"))
    for part in expected:
        assert torch.equal(mine[part].cpu().view(torch.uint8), expected[part].view(torch.uint8))


def test_a_module_moves_it_there_and_back(make):
    holder, weight = torch.nn.Module(), make(torch.randn(2, 64, 128, dtype=torch.bfloat16))
    holder.weight, expected = torch.nn.Parameter(weight, requires_grad=False), weight.dequantize()
    for device in ("cuda", "cpu"):
        holder.to(device)
        devices = {holder.weight.device.type, *(part.device.type for part in holder.weight.parts.values())}
        assert devices == {device}
        assert torch.equal(holder.weight.dequantize().cpu(), expected)


@pytest.mark.parametrize("workspace_mib", [256, 1], ids=["at once", "in parts"])
def test_results_are_the_bits_of_the_dense_weights(workspace_mib, make, monkeypatch):
    monkeypatch.setattr(module, "WORKSPACE_BYTES", workspace_mib * 2**20)
    monkeypatch.setattr(module, "SHARE_OF_GPU", 0.0)
    given, factors, packed = inputs(), updates(), weights(make)
    dense = [weight.dequantize() for weight in packed]
    results, expected = run(given, *packed, factors), run(given, *dense, factors)
    assert all(map(torch.equal, results, expected))
    zeros = run(given, packed[0], dense[1].zero_(), factors)
    assert not torch.equal(results[0], zeros[0])


def test_the_workspace_is_bounded_and_gone_afterwards(make, monkeypatch):
    monkeypatch.setattr(module, "WORKSPACE_BYTES", 2**20)
    monkeypatch.setattr(module, "SHARE_OF_GPU", 0.0)
    given, factors, packed = inputs(), updates(), weights(make)
    run(given, *packed, factors)
    peaks = []
    for pair in (packed, [weight.dequantize() for weight in packed]):
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        del_me = run(given, *pair, factors)
        peaks.append(torch.cuda.max_memory_allocated() - held)
        del del_me
        assert torch.cuda.memory_allocated() == held
    workspace = EXPERTS * 2 * INTERMEDIATE * module.MIN_FEATURES * 2  # of the wider side
    assert peaks[0] <= peaks[1] + workspace + 2**20


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_nothing_waits_for_the_host(make):
    given, factors, packed = inputs(), updates(), weights(make)
    run(given, *packed, factors)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(given, *packed, factors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Layer(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.up, self.down = (nn.Parameter(weight, requires_grad=False) for weight in weights(make))
        self.scale = nn.Parameter(torch.ones(HIDDEN, device="cuda", dtype=torch.bfloat16))

    def loss(self, batch):
        output = moe_experts(batch["x"] * self.scale, batch["index"], batch["gates"], self.up, self.down)
        return (output.square().mean(),)


def test_a_captured_step_has_the_same_bits(make):
    layer = Layer(make)
    graphed = GraphedFunction(layer.loss, layer, True)
    for step in range(8):
        torch.manual_seed(step)
        batch = dict(zip(("x", "index", "gates"), inputs(), strict=True))
        found = []
        for function in (layer.loss, graphed):
            layer.scale.grad = None
            (loss,) = function(batch)
            loss.backward()
            found.append((loss.detach().clone(), layer.scale.grad.clone()))
        assert all(map(torch.equal, *found))
    assert graphed.reason is None
    assert isinstance(layer.up, QuantizedWeight)


@pytest.mark.parametrize("name", ["nf4", "fp8", "mxfp4"])
def test_more_values_than_an_int32_counts(name):
    shape = (33, 8192, 8192)
    assert math.prod(shape) > 2**31
    one = MAKERS[name](torch.randn(1, 128, 8192, dtype=torch.bfloat16)).to("cuda")
    parts = {key: part.repeat(33, 64, *(1 for _ in part.shape[2:])) for key, part in one.parts.items()}
    last = QuantizedWeight(one.format, parts, shape, torch.bfloat16).dequantize(slice(8064, 8192))
    for expert in (0, 32):
        assert torch.equal(last[expert], one.dequantize()[0])
