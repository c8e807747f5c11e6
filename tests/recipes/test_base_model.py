"""Tests of the base model's loading: what is checked before training starts, and what comes onto the device."""

import json
import os
import pickle
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.models import qwen3, qwen3_config
from helpers.reference import relative_error
from lora import base_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM

from lightning_moe import QuantizedExpertsConfig, QuantizedWeight, quantize_experts

CPU = torch.device("cpu")
PYTORCH = tuple(map(int, torch.__version__.split(".")[:2]))
NF4 = QuantizedExpertsConfig("nf4")


@pytest.fixture
def folder(tmp_path):
    qwen3().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    return tmp_path / "base"


def test_a_folder_is_read_with_its_own_configuration_and_weights(folder):
    config = base_model.read_config(str(folder), {})
    base_model.check_weights(str(folder))
    loaded = base_model.build(str(folder), config, torch.bfloat16, CPU, "varlen", 0)
    assert loaded.config._attn_implementation == "varlen"
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    want = qwen3().state_dict()
    assert all(torch.equal(value, want[name].bfloat16()) for name, value in loaded.state_dict().items())


def test_rotary_frequencies_stay_float32():
    built = base_model.build(None, qwen3_config(), torch.bfloat16, CPU, "sdpa", 0)
    assert built.model.rotary_emb.inv_freq.dtype == torch.float32


def test_random_weights_depend_on_their_own_seed_alone():
    torch.manual_seed(1)
    one = base_model.build(None, qwen3_config(), torch.float32, CPU, "sdpa", 0)
    after = torch.rand(())
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(()))
    again = base_model.build(None, qwen3_config(), torch.float32, CPU, "sdpa", 0)
    other = base_model.build(None, qwen3_config(), torch.float32, CPU, "sdpa", 1)
    assert torch.equal(one.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def quantizable_config(**options):
    return qwen3_config(hidden_size=64, moe_intermediate_size=64, **options)


def test_a_random_base_is_quantized_layer_by_layer(monkeypatch):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    made, allocate = [], NF4.allocate
    monkeypatch.setattr(base_model, "quantize_experts", lambda *args: made.append(quantize_experts(*args)))
    monkeypatch.setattr(NF4, "allocate", lambda *args: made.append("room for all") or allocate(*args))
    one, again, other = (
        base_model.build(None, quantizable_config(), torch.bfloat16, CPU, "sdpa", seed, NF4) for seed in (0, 0, 1)
    )
    layers = [[".down_proj", ".gate_up_proj"]] * one.config.num_hidden_layers
    assert [each if isinstance(each, str) else sorted(each) for each in made] == ["room for all", *layers] * 3
    experts = one.model.layers[0].mlp.experts
    assert isinstance(experts.down_proj, QuantizedWeight)
    assert experts.down_proj.dequantize().float().std() == pytest.approx(one.config.initializer_range, rel=0.05)
    assert one.model.rotary_emb.inv_freq.dtype == torch.float32
    plain = base_model.build(None, quantizable_config(), torch.bfloat16, CPU, "sdpa", 0)
    assert torch.equal(one.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    assert torch.equal(one.model.norm.weight, plain.model.norm.weight)
    assert torch.equal(experts.down_proj.dequantize(), again.model.layers[0].mlp.experts.down_proj.dequantize())
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("quantization", [NF4, None], ids=["quantized", "on the host"])
def test_nothing_of_a_layer_s_experts_is_left_while_the_next_ones_are_drawn(quantization, monkeypatch):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    drawn, left = [], []
    to_empty = nn.Module.to_empty

    def noted(module, **options):
        if "Experts" not in type(module).__name__:
            return to_empty(module, **options)
        left.append([not storage.expired() for storage in drawn])
        made = to_empty(module, **options)
        drawn.extend(StorageWeakRef(weight.untyped_storage()) for weight in module.parameters())
        return made

    monkeypatch.setattr(nn.Module, "to_empty", noted)
    monkeypatch.setattr(base_model, "on_host", lambda weight, _: nn.Parameter(weight.clone(), requires_grad=False))
    config = quantizable_config(num_hidden_layers=3)
    base_model.build(None, config, torch.bfloat16, CPU, "sdpa", 0, quantization, experts_on_host=quantization is None)
    assert left == [[], [False] * 2, [False] * 4]


def test_a_read_base_has_the_bits_of_one_that_is_quantized_in_memory(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = base_model.build(None, quantizable_config(), torch.bfloat16, CPU, "sdpa", 0)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    read = base_model.build(str(tmp_path), quantizable_config(), torch.bfloat16, CPU, "sdpa", 0, NF4)
    quantize_experts(model)
    for name, parameter in model.named_parameters():
        same = read.get_parameter(name)
        assert type(same) is type(parameter)
        assert torch.equal(same + 0, parameter + 0), name


def test_the_room_that_quantized_experts_take_is_what_they_take():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(quantizable_config())
    experts = sum(p.numel() for name, p in model.named_parameters() if "experts" in name)
    wanted = 2 * (model.num_parameters() - experts) + 0.5161 * experts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_model.psutil, "virtual_memory", lambda: SimpleNamespace(available=wanted * 1.001))
        base_model.place_experts(quantizable_config(), torch.bfloat16, CPU, NF4)
        with pytest.raises(ValueError, match=r"in torch.bfloat16\), .* or quantize the experts"):
            base_model.place_experts(quantizable_config(), torch.bfloat16, CPU)
        patch.setattr(base_model.psutil, "virtual_memory", lambda: SimpleNamespace(available=wanted * 0.999))
        with pytest.raises(ValueError, match="in torch.bfloat16 and nf4"):
            base_model.place_experts(quantizable_config(), torch.bfloat16, CPU, NF4)


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match="model.architecture.model_type is 'qwen3_mow', which Transformers does not"):
        base_model.read_config(None, {"model_type": "qwen3_mow"})


def test_fields_that_no_model_has_are_named():
    fields = {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "head_dim": 8,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
    }
    assert base_model.read_config(None, fields).head_dim == 8
    with pytest.raises(ValueError, match="model.architecture has hiden_size, num_expert, which no qwen3_moe has"):
        base_model.read_config(None, fields | {"num_expert": 8, "hiden_size": 3})


def test_missing_shards_are_named(folder):
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 4
    shards[0].unlink()
    shards[1].unlink()
    with pytest.raises(ValueError, match=rf"lacks weights: {shards[0].name}, {shards[1].name}\. Copy the model again"):
        base_model.check_weights(str(folder))


@pytest.fixture
def download(monkeypatch, tmp_path):
    """A hub that would send 3 GiB, of which 1 GiB is here already."""
    files = [SimpleNamespace(file_size=2**30, will_download=number > 0) for number in range(3)]
    monkeypatch.setattr(base_model.huggingface_hub, "snapshot_download", lambda *args, **kwargs: files)
    monkeypatch.setattr(base_model.huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "not" / "there"))

    def disk(free_gib):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free_gib * 2**30))

    return disk


def test_a_download_needs_room_on_the_disk(download):
    download(2)
    base_model.check_weights("Qwen/Qwen3-30B-A3B")
    download(1)
    with pytest.raises(ValueError, match=r"would download 2.0 GiB and .* has 1.0 GiB free: make room, or set HF_HOME"):
        base_model.check_weights("Qwen/Qwen3-30B-A3B")


def test_a_hub_out_of_reach_is_said(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(base_model.huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ValueError, match=r"Qwen3-30B-A3B' is no folder, and the hub .* \(OSError\): connect to it"):
        base_model.check_weights("Qwen/Qwen3-30B-A3B")


def test_without_the_hub_the_cache_is_read(monkeypatch):
    monkeypatch.setattr(base_model.huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    base_model.check_weights("Qwen/Qwen3-30B-A3B")


def test_a_mistyped_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere' is no folder, .* \(HFValidationError\): .* give a folder"):
        base_model.check_weights(str(tmp_path / "nowhere"))


def test_attention_to_chunks_is_refused():
    config = qwen3_config(layer_types=["chunked_attention", "full_attention"])
    with pytest.raises(ValueError, match="layers of the model see chunks: set --model.attention sdpa"):
        base_model.build(None, config, torch.float32, torch.device("cpu"), "varlen", 0)
    windows = qwen3_config(use_sliding_window=True, sliding_window=8)
    base_model.build(None, windows, torch.float32, torch.device("cpu"), "varlen", 0)


def test_weights_that_do_not_fit_are_refused_with_both_sizes(monkeypatch):
    config = qwen3_config(hidden_size=2048, moe_intermediate_size=768, num_experts=128, vocab_size=151936)
    base_model.place_experts(qwen3_config(), torch.float32, CPU)
    monkeypatch.setattr(base_model.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**30))
    sizes = r"the weights take 3\.\d GiB \(1\.8\d billion .* torch.bfloat16\), 3\.\d GiB on cpu, which has 1.0"
    with pytest.raises(ValueError, match=sizes):
        base_model.place_experts(config, torch.bfloat16, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_norms_err_no_more_than_transformers_own(dtype):
    model = qwen3().to(dtype)
    norm = model.model.layers[0].input_layernorm
    torch.nn.init.normal_(norm.weight)
    hidden, grad = torch.randn(2, 3, 50, norm.weight.numel(), generator=torch.Generator().manual_seed(0)).to(dtype)

    def results(run, dtype=dtype):
        x = hidden.to(dtype, copy=True).requires_grad_()
        output = run(x)
        output.backward(grad.to(dtype))
        return output.detach(), x.grad

    weight, epsilon = norm.weight.detach().double(), norm.variance_epsilon
    truth = results(lambda x: weight * x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt(), torch.float64)
    own = results(norm)
    head_norm = model.model.layers[0].self_attn.q_norm
    base_model.use_fused_norms(model)
    assert "forward" in vars(norm)
    assert "forward" in vars(model.model.norm)
    assert "forward" not in vars(head_norm)
    for fused, stock, want in zip(results(norm), own, truth, strict=True):
        # Both round their result; by how much of a rounding these two differ is chance.
        assert relative_error(fused, want) <= relative_error(stock, want) + torch.finfo(dtype).eps / 4
        assert relative_error(fused.roll(1, 0), want) > 0.1
        assert relative_error(torch.zeros_like(fused), want) > 0.1


def test_fused_norms_keep_their_dtype_under_autocast_on_a_gpu():
    """PyTorch's own run in float32 there, from 2.12 on."""
    torch.set_autocast_enabled("cuda", True)  # the context asks for a GPU
    try:
        with FakeTensorMode():
            weight, hidden = torch.empty(2, 64, dtype=torch.bfloat16, device="cuda:0")
            norm = SimpleNamespace(weight=weight, variance_epsilon=1e-6)
            fused, plain = base_model._fused_norm(norm, hidden), F.rms_norm(hidden, weight.shape, weight, 1e-6)
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert fused.dtype == torch.bfloat16
    assert PYTORCH < (2, 12) or plain.dtype == torch.float32


def test_ligers_kernels_are_refused_where_they_cannot_be_had():
    assert base_model.apply_liger(qwen3(), None) == "Transformers' (they need a GPU)"
    assert base_model.apply_liger(qwen3(), False) == "Transformers' (they need a GPU)"
    with pytest.raises(ValueError, match="model.liger asks for Liger's kernels: they need a GPU"):
        base_model.apply_liger(qwen3(), True)


class Evil:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_weights_that_could_hold_code_do_not_run_it(folder, tmp_path):
    torch.save({"lm_head.weight": Evil(tmp_path / "ran")}, folder / "pytorch_model.bin")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps(content | {"weight_map": dict.fromkeys(content["weight_map"], "pytorch_model.bin")}))
    config = base_model.read_config(str(folder), {})
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        base_model.build(str(folder), config, torch.float32, CPU, "sdpa", 0)
    assert not (tmp_path / "ran").exists()
    for file in (index, *folder.glob("*.safetensors")):
        file.unlink()
    with pytest.raises(OSError, match="no file named model.safetensors"):
        base_model.build(str(folder), config, torch.float32, CPU, "sdpa", 0)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("free", "where"), [(4.0, False), (2.6, True)], ids=["all fits", "two layers fit"])
def test_experts_wait_on_the_host_where_a_gpu_does_not_hold_them(free, where, monkeypatch):
    wide = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "vocab_size": 384}
    config, gpu = qwen3_config(**wide, num_hidden_layers=3), torch.device("cuda")
    room = int(free * 2**30) + base_model.CONTEXT_BYTES
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (room, room))
    assert base_model.place_experts(config, torch.bfloat16, gpu, wanted="auto") == where
    assert base_model.place_experts(config, torch.bfloat16, gpu, wanted="host")
    if where:
        with pytest.raises(ValueError, match=r"3\.\d GiB on cuda, which has 2.6"):
            base_model.place_experts(config, torch.bfloat16, gpu, wanted="device")
        monkeypatch.setattr(base_model.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**30))
        with pytest.raises(ValueError, match=r"4\.\d GiB on the host, page-locked and rounded up, which has 1.0"):
            base_model.place_experts(config, torch.bfloat16, gpu, wanted="auto")
