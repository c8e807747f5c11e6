"""Tests of experts in host memory: where they are, when they are copied, and that training is the same."""

from functools import partial

import lora.module
import pytest
import torch
from helpers.recipe import ARCHITECTURE, data, module, trained, trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lora import host_experts
from lora.host_experts import HostExperts, keep_on_host
from lora.sharding import check_strategy
from qwen3_lora import UNHELPFUL_WARNINGS
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_moe import MoEGateGradCallback

pytestmark = [
    *(pytest.mark.filterwarnings(f"ignore:{message}") for message in UNHELPFUL_WARNINGS),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:MoEGateGradCallback logs nowhere"),
    pytest.mark.filterwarnings("ignore:CUDA graph. the step runs without one"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]
FOUR_LAYERS = ARCHITECTURE | {"num_hidden_layers": 4}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 8, 8), requires_grad=False)

    def forward(self, x):
        return torch.tanh(x @ self.weight[0]) @ self.weight[1]


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = Block()


@pytest.fixture
def poisoned(monkeypatch):
    """Whatever computes with weights that are on the host, once they were on the device, gets no number."""
    put = host_experts._Weights.put

    used = set()

    def put_poisoned(weights, tensors):
        if tensors is not weights.tensors and tensors[0].numel():
            used.add(weights)
        if tensors is weights.tensors and weights in used:
            tensors = [nn.Parameter(torch.full_like(one, float("nan")), requires_grad=False) for one in tensors]
        put(weights, tensors)

    monkeypatch.setattr(host_experts._Weights, "put", put_poisoned)


@pytest.fixture
def copied(monkeypatch):
    """The layers in the order in which they are copied to the device."""
    order = []
    copies = host_experts._Weights.copies

    def noted(weights, device):
        order.append(weights)
        return copies(weights, device)

    monkeypatch.setattr(host_experts._Weights, "copies", noted)
    return order


def layers_of(number):
    torch.manual_seed(0)
    return nn.ModuleList(Layer() for _ in range(number))


def gradient(layers, recomputes=True):
    x = torch.ones(3, 8, requires_grad=True)
    y = x
    for layer in layers:
        y = checkpoint(layer.mlp.forward, y, use_reentrant=False) if recomputes else layer.mlp.forward(y)
    return torch.autograd.grad(y.sum(), x)[0]


def test_gradients_are_those_of_resident_experts(poisoned):
    want = gradient(layers_of(5))
    layers = layers_of(5)
    keep_on_host(layers, torch.device("cpu"))
    for _ in range(2):
        assert torch.equal(gradient(layers), want)
    assert layers[0].mlp.weight.isnan().all()
    assert gradient(layers_of(5), recomputes=False).isfinite().all()


def test_each_layer_is_copied_ahead_in_forward_and_in_backward(copied):
    layers = layers_of(4)
    experts = keep_on_host(layers, torch.device("cpu"))
    numbers = {weights: number for number, weights in enumerate(experts._on_host)}
    gradient(layers)
    # The last two stay for backward, the first two for the next step's forward.
    assert [numbers[weights] for weights in copied] == [0, 1, 2, 3, 1, 0]
    copied.clear()
    gradient(layers)
    assert [numbers[weights] for weights in copied] == [2, 3, 1, 0]


def test_two_layers_are_on_the_device_at_most(monkeypatch):
    layers = layers_of(6)
    experts = keep_on_host(layers, torch.device("cpu"))
    held, copy = [], HostExperts._copy

    def noted(self, layer):
        copy(self, layer)
        held.append(len(self._on_device))

    monkeypatch.setattr(HostExperts, "_copy", noted)
    gradient(layers)
    assert max(held) == 2
    assert experts.num_bytes == sum(layer.mlp.weight.nbytes for layer in layers)


def test_a_layer_in_tiles_is_copied_once(copied):
    layers = layers_of(3)
    experts = keep_on_host(layers, torch.device("cpu"))
    for number in (0, 1, 1, 1, 2, 2, 1, 1, 0):
        with experts.on_device(number):
            pass
    assert len(copied) == 4  # 0, 1, 2, and 0 again on the way back


def test_after_an_exception_in_a_layer_the_weights_are_there(poisoned):
    layers = layers_of(4)
    want = gradient(layers_of(4))
    experts = keep_on_host(layers, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="in the middle"), experts.on_device(2):
        raise RuntimeError("in the middle")
    assert layers[2].mlp.weight.isnan().all()  # the host's
    assert torch.equal(gradient(layers), want)


def test_moving_the_model_leaves_them(monkeypatch):
    layers = layers_of(2)
    experts = keep_on_host(layers, torch.device("cpu"))
    before = [layer.mlp.weight for layer in layers]
    with experts.left_out():
        layers.to(torch.float64)
        assert all(layer.mlp.weight.numel() == 0 for layer in layers)
    assert [layer.mlp.weight for layer in layers] == before
    assert before[0].dtype == torch.float32


def fit(folder, *, steps=3, **options):
    network = module(FOUR_LAYERS, checkpointing="full", **options)
    run = trainer(folder, steps, MoEGateGradCallback(audit_every_n_steps=2), limit_val_batches=1)
    run.fit(network, data())
    return network


@pytest.mark.parametrize("options", [{}, {"quantize": "nf4"}], ids=["dense", "nf4"])
def test_a_checkpoint_is_read_to_where_they_wait(options, tmp_path, request):
    if options:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = module(FOUR_LAYERS).build_base()
    base.save_pretrained(tmp_path / "base")
    options |= {"init": "pretrained", "name": str(tmp_path / "base")}
    resident = trained(fit(tmp_path, experts_on="device", **options))
    request.getfixturevalue("poisoned")
    on_host = trained(fit(tmp_path, experts_on="host", **options))
    assert all(torch.equal(value, resident[name]) for name, value in on_host.items())


@pytest.mark.parametrize("tile_tokens", [0, 16], ids=["whole", "in tiles"])
@pytest.mark.parametrize("options", [{}, {"experts": True}, {"quantize": "nf4"}], ids=["frozen", "lora", "nf4"])
def test_training_is_that_of_resident_experts(options, tile_tokens, tmp_path, request, monkeypatch):
    if "quantize" in options:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    else:  # whose random weights are drawn in another order
        build = lora.module.build
        monkeypatch.setattr(lora.module, "build", lambda *given: build(*given[:-1]))
    fit_ = partial(fit, tmp_path, tile_tokens=tile_tokens, **options)
    resident = trained(fit_(experts_on="device"))
    request.getfixturevalue("poisoned")
    on_host = fit_(experts_on="host")
    assert "experts in host memory" in on_host.description["base"]
    for name, value in trained(on_host).items():
        assert torch.equal(value, resident[name]), name
    assert on_host._host_experts.num_bytes > 0


def test_without_checkpointing_it_is_refused_before_the_model_is_built(tmp_path):
    network = module(experts_on="host")
    with pytest.raises(ValueError, match=r"Set --model.checkpointing auto"):
        trainer(tmp_path, 1).fit(network, data())
    assert network.network is None


def test_several_devices_are_refused():
    options = {"quantize": None, "experts_on": "host", "optimizer": "adamw"}
    check_strategy(SingleDeviceStrategy("cpu"), options)
    with pytest.raises(ValueError, match="model.experts_on host is for one device"):
        check_strategy(DDPStrategy(), options)


NEEDS_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Wide(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.weight = nn.Parameter(weight, requires_grad=False)
        self.mlp.forward = lambda x: torch.tanh(x @ self.mlp.weight[0] / 64)


def wide_layers():
    generator = torch.Generator("cuda").manual_seed(0)
    return nn.ModuleList(
        Wide(torch.randn(4, 4096, 4096, device="cuda", dtype=torch.bfloat16, generator=generator)) for _ in range(8)
    )


def with_peak(run):
    """What it returns, and the most bytes on the GPU above what was there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    return run(), torch.cuda.max_memory_allocated() - held


def wide_gradient(layers):
    x = torch.ones(8192, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = x
    for layer in layers:
        y = checkpoint(layer.mlp.forward, y, use_reentrant=False, preserve_rng_state=False)
    return torch.autograd.grad(y.sum(), x)[0]


def three_gradients_without_a_wait(layers):
    torch.cuda.set_sync_debug_mode("error")
    try:
        return [wide_gradient(layers) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")


@NEEDS_A_GPU
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_on_a_gpu_two_layers_are_there_and_nothing_waits_for_the_device():
    layers = wide_layers()
    size = layers[0].mlp.weight.nbytes
    wide_gradient(layers)  # cuBLAS's workspace is there from now on
    want, activations = with_peak(lambda: wide_gradient(layers))
    keep_on_host(layers, torch.device("cuda", torch.cuda.current_device()))
    found, peak = with_peak(lambda: three_gradients_without_a_wait(layers))
    assert all(torch.equal(one, want) for one in found)
    results = 2 * want.nbytes  # the first two of the three, beside the third's step
    assert size < peak - activations - results < 2.5 * size
    assert layers[0].mlp.weight.is_pinned()


@NEEDS_A_GPU
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_graph_that_would_copy_weights_is_refused():
    layers = wide_layers()[:1]
    keep_on_host(layers, torch.device("cuda", torch.cuda.current_device()))
    x = torch.ones(16, 4096, device="cuda", dtype=torch.bfloat16)
    layers[0].mlp.forward(x)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="no part of a graph"), torch.cuda.graph(graph):
        layers[0].mlp.forward(x)
