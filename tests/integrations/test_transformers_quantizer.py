"""Experts that are quantized while Transformers loads a checkpoint: the bits, what is alive then, what is refused."""

import copy
import gc
import importlib.util
import json

import pytest
import torch
from helpers.models import experts_modules, gpt_oss, llama4, mixtral, qwen3, tokens, with_expert_lora
from helpers.quantized import needs_bitsandbytes
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from lightning_moe import QuantizedExpertsConfig, QuantizedWeight, patch_moe, quantization, quantize_experts
from lightning_moe.integrations import bitsandbytes_nf4

NUM_EXPERTS, NUM_LAYERS = 4, 2


def small_qwen3(**changes):
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "num_experts": NUM_EXPERTS}
    return qwen3(**sizes | changes)


def qwen2_moe():
    """A family with a shared expert, and a router for it that is a linear layer."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_experts": 8,
        "num_key_value_heads": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 32,
    }  # fmt: skip
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes))


def write(model, folder, is_fused=False):
    """A checkpoint in shards as on the hub; or with the experts fused as the model has them."""
    model.save_pretrained(folder, max_shard_size="30KB")
    if is_fused:
        (folder / "model.safetensors.index.json").unlink()
        for shard in folder.glob("*.safetensors"):
            shard.unlink()
        save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(folder, *, dtype=torch.bfloat16, device_map=None, **options):
    config = QuantizedExpertsConfig(**options)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device_map, quantization_config=config)


def dense_of(model):
    """The same model with its experts de-quantized."""
    model = copy.deepcopy(model)
    for module in experts_modules(model):
        for name in ("gate_up_proj", "down_proj"):
            setattr(module, name, nn.Parameter(getattr(module, name).dequantize(), requires_grad=False))
    return model


def same_bits(actual, expected):
    if not isinstance(expected, QuantizedWeight):
        return not isinstance(actual, QuantizedWeight) and torch.equal(actual, expected)
    return (
        isinstance(actual, QuantizedWeight)
        and isinstance(actual, nn.Parameter)
        and not actual.requires_grad
        and (actual.shape, actual.dtype, actual.format) == (expected.shape, expected.dtype, expected.format)
        and actual.parts.keys() == expected.parts.keys()
        and all(torch.equal(actual.parts[name], part) for name, part in expected.parts.items())
    )


@needs_bitsandbytes
@pytest.mark.parametrize("device_map", [None, {"": torch.device("cpu")}, "auto"], ids=["no device map", "one", "auto"])
@pytest.mark.parametrize("is_fused", [False, True], ids=["per expert", "fused"])
@pytest.mark.parametrize("build", [small_qwen3, mixtral, gpt_oss, qwen2_moe])
def test_loaded_is_bit_for_bit_what_is_quantized_in_memory(tmp_path, build, is_fused, device_map):
    folder = write(build().to(torch.bfloat16), tmp_path, is_fused)
    keys = {key for shard in folder.glob("*.safetensors") for key in load_file(shard)}
    assert any(".experts.0." in key for key in keys) == (not is_fused and build is not gpt_oss)
    model = load(folder, device_map=device_map)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    names = quantize_experts(expected)
    expected = dict(expected.named_parameters())
    assert len(names) == 2 * NUM_LAYERS
    assert all(isinstance(expected[name], QuantizedWeight) for name in names)
    assert {name for name, parameter in model.named_parameters() if not same_bits(parameter, expected[name])} == set()
    assert model.state_dict().keys() == expected.keys()


@needs_bitsandbytes
def test_experts_have_the_dtype_that_is_asked_for(tmp_path):
    """They are cast before they are quantized, as without."""
    folder = write(small_qwen3().to(torch.bfloat16), tmp_path)
    model = load(folder, dtype=torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    quantize_experts(expected)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(map(same_bits, model.parameters(), expected.parameters()))


def dense_tensors(numel):
    """The dense tensors of at least so many values that anything holds, those that share memory once."""
    alive = (each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter))
    large = (each for each in alive if each.device.type == "cpu" and each.numel() >= numel)
    return {each.untyped_storage().data_ptr() for each in large if each.dtype == torch.bfloat16}


@needs_bitsandbytes
@pytest.mark.parametrize("is_fused", [False, True], ids=["per expert", "fused"])
def test_one_projection_is_dense_at_a_time(tmp_path, monkeypatch, is_fused):
    folder = write(small_qwen3(num_hidden_layers=3).to(torch.bfloat16), tmp_path, is_fused)
    gc.collect()
    before = dense_tensors(NUM_EXPERTS * 64 * 64)
    seen = []

    def quantize(weight, *options):
        gc.collect()
        seen.append((tuple(weight.shape), len(dense_tensors(NUM_EXPERTS * 64 * 64) - before)))
        return original(weight, *options)

    original = quantization.quantize
    monkeypatch.setattr(quantization, "quantize", quantize)
    load(folder)
    shapes = [(NUM_EXPERTS, 64, 64), (NUM_EXPERTS, 128, 64)]
    assert seen == [(shape, 1) for _ in range(3) for shape in shapes]


@needs_bitsandbytes
@pytest.mark.parametrize("format", quantization.FORMATS)
def test_experts_are_written_to_memory_that_was_allocated_for_all_at_once(tmp_path, monkeypatch, format):
    """Allocated one by one they would stand where dense tensors were, and leave holes between them."""
    folder = write(small_qwen3().to(torch.bfloat16), tmp_path)
    given, allocate = [], QuantizedExpertsConfig.allocate

    def noted(self, *args):
        given.append(allocate(self, *args))
        return dict(given[-1])

    monkeypatch.setattr(QuantizedExpertsConfig, "allocate", noted)
    model = load(folder, format=format)
    (room,) = given
    assert len(room) == 2 * NUM_LAYERS
    for name, weight in room.items():
        parts = model.get_parameter(name).parts
        assert {part: tensor.data_ptr() for part, tensor in parts.items()} == {
            part: tensor.data_ptr() for part, tensor in weight.parts.items()
        }


@needs_bitsandbytes
def test_a_weight_of_other_parts_than_were_allocated_stays_as_it_is(tmp_path, monkeypatch):
    """As where bitsandbytes' codes of nested absmax are not those that nf4 has here."""
    monkeypatch.setattr(bitsandbytes_nf4, "_stay_nested", lambda matrices: False)
    folder = write(small_qwen3().to(torch.bfloat16), tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    quantize_experts(expected)
    assert "absmax_scale" not in expected.model.layers[0].mlp.experts.down_proj.parts
    assert all(map(same_bits, load(folder).parameters(), expected.parameters()))


@needs_bitsandbytes
def test_what_is_allocated_in_advance_is_the_quantized_size(tmp_path):
    model = load(write(small_qwen3().to(torch.bfloat16), tmp_path), linear=True)
    quantizer = model.hf_quantizer
    for name, parameter in model.named_parameters():
        size = quantizer.param_element_size(model, name, parameter)
        if isinstance(parameter, QuantizedWeight):
            assert size * parameter.numel() == pytest.approx(parameter.nbytes, rel=0.01)
        else:
            assert (size < 1) == ("_proj" in name)
    assert quantizer.adjust_max_memory({0: 100}) == {0: 90}


@needs_bitsandbytes
@pytest.mark.parametrize("build", [small_qwen3, qwen2_moe])
def test_linear_layers_become_those_of_bitsandbytes(tmp_path, build):
    from bitsandbytes.nn import Linear4bit

    model = load(write(build().to(torch.bfloat16), tmp_path), linear=True)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    dense = {name.rpartition(".")[2] for name, module in linear.items() if not isinstance(module, Linear4bit)}
    assert dense == ({"lm_head"} if build is small_qwen3 else {"lm_head", "shared_expert_gate"})
    quantized = {name.rpartition(".")[2]: module for name, module in linear.items() if isinstance(module, Linear4bit)}
    own = {"gate_proj", "up_proj", "down_proj"} if build is qwen2_moe else set()
    assert quantized.keys() == {"q_proj", "k_proj", "v_proj", "o_proj", *own}
    for module in quantized.values():
        state = module.weight.quant_state
        assert (state.quant_type, state.nested, state.blocksize) == ("nf4", True, 64)
        assert module.compute_dtype == torch.bfloat16
    assert all(isinstance(module.down_proj, QuantizedWeight) for module in experts_modules(model))
    assert model.is_loaded_in_4bit


def test_routers_are_found_beside_the_experts():
    from lightning_moe.integrations.transformers_quantizer import routers_beside

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(32, 8)
            self.router = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 8))
            self.shared_expert = nn.Sequential(nn.Linear(32, 16))
            self.experts = nn.Module()
            self.experts.down_proj = nn.Parameter(torch.empty(8, 32, 16))

    model = nn.ModuleDict({"moe": Block(), "attention": nn.Sequential(nn.Linear(32, 8))})
    assert routers_beside(model, ["moe.experts.down_proj"]) == ["moe.gate", "moe.router.1"]


def gradients(model):
    report = patch_moe(model)
    assert all(layer.reason is None for layer in report)
    ids = tokens()
    loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@needs_bitsandbytes
@pytest.mark.parametrize("linear", [False, True])
def test_a_step_with_adapters_has_the_bits_of_the_dense_model(tmp_path, linear):
    model = load(write(small_qwen3(), tmp_path), dtype=torch.float32, linear=linear)
    model, dense = (with_expert_lora(each, attention=True) for each in (model, dense_of(model)))
    loss, grads = gradients(model)
    dense_loss, dense_grads = gradients(dense)
    assert torch.equal(loss, dense_loss)
    assert len(grads) == NUM_LAYERS * 2 * 4
    assert grads.keys() == dense_grads.keys()
    assert all(torch.equal(grads[name], dense_grads[name]) and grads[name].any() for name in grads)
    kinds = {type(module).__name__ for name, module in model.named_modules() if name.endswith("q_proj")}
    assert kinds == {"Linear4bit" if linear else "Linear"}


@needs_bitsandbytes
def test_adapters_are_saved_and_the_model_is_not(tmp_path):
    model = load(write(small_qwen3().to(torch.bfloat16), tmp_path / "base"))
    with pytest.raises(ValueError, match="is not serializable"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with_expert_lora(model).save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {"adapter_model.safetensors"}


@needs_bitsandbytes
def test_a_dense_checkpoint_whose_config_asks_for_it_is_quantized(tmp_path):
    """As where a model's config was saved beside other weights."""
    folder = write(small_qwen3().to(torch.bfloat16), tmp_path)
    expected = load(folder)
    expected.config.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["format"] == "nf4"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert all(map(same_bits, model.parameters(), expected.parameters()))


def change(folder, how):
    """Rewrites each shard's tensors."""
    for shard in folder.glob("*.safetensors"):
        save_file(how(load_file(shard)), shard, metadata={"format": "pt"})


@needs_bitsandbytes
def test_experts_that_the_checkpoint_lacks_are_an_error_with_their_names(tmp_path):
    folder = write(small_qwen3().to(torch.bfloat16), tmp_path, is_fused=True)
    lacking = "model.layers.1.mlp.experts.down_proj"
    change(folder, lambda tensors: {key: tensor for key, tensor in tensors.items() if key != lacking})
    with pytest.raises(ValueError, match=f"stayed dense.*: {lacking}$"):
        load(folder)


@needs_bitsandbytes
def test_too_few_experts_are_an_error(tmp_path):
    """Transformers does not compare the shapes of what is quantized."""
    folder = write(small_qwen3().to(torch.bfloat16), tmp_path)
    index = folder / "model.safetensors.index.json"
    lacking = "model.layers.1.mlp.experts.3.down_proj.weight"
    written = json.loads(index.read_text())
    del written["weight_map"][lacking]
    index.write_text(json.dumps(written))
    change(folder, lambda tensors: {key: tensor for key, tensor in tensors.items() if key != lacking})
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        load(folder)


def nothing_is_read(monkeypatch):
    """Fails where a quantizer's errors come after the first tensor."""
    read = "transformers.core_model_loading.spawn_materialize"
    monkeypatch.setattr(read, lambda *_, **__: pytest.fail("a tensor is read"))


def llama():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (llama, "LlamaForCausalLM has no experts to quantize"),
        (llama4, "experts that would stay dense: model.layers.0.feed_forward.experts .*multiplies"),
        (lambda: small_qwen3(hidden_size=8, moe_intermediate_size=4), "0.mlp.experts.down_proj .* blocks of 64"),
    ],
    ids=["no experts", "unsupported experts", "a block would straddle experts"],
)
def test_what_cannot_be_quantized_is_an_error_before_anything_is_read(tmp_path, monkeypatch, build, message):
    folder = write(build(), tmp_path)
    nothing_is_read(monkeypatch)
    with pytest.raises(ValueError, match=message):
        load(folder, dtype=torch.float32)


@needs_bitsandbytes
def test_a_checkpoint_that_is_quantized_already_is_an_error(tmp_path, monkeypatch):
    folder = write(small_qwen3(), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps(config))
    nothing_is_read(monkeypatch)
    with pytest.raises(ValueError, match="quantized with BitsAndBytesConfig but you are passing a QuantizedExperts"):
        load(folder)


@pytest.mark.parametrize("linear", [False, True])
def test_bitsandbytes_is_asked_for_before_anything_is_read(tmp_path, monkeypatch, linear):
    folder = write(small_qwen3(), tmp_path)
    nothing_is_read(monkeypatch)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    with pytest.raises(ModuleNotFoundError, match="pip install bitsandbytes"):
        load(folder, linear=linear)


@needs_bitsandbytes
def test_experts_on_the_disk_or_partly_on_the_cpu_are_an_error(tmp_path):
    folder = write(small_qwen3(), tmp_path)
    for device_map in ({"model": "cpu", "lm_head": "disk"}, {"model": "cpu", "lm_head": 0}):
        with pytest.raises(ValueError, match="stay where they are loaded"):
            load(folder, device_map=device_map)


def test_another_format_is_an_error():
    with pytest.raises(ValueError, match="not to 'int3'"):
        QuantizedExpertsConfig("int3")


def test_the_config_goes_through_a_dictionary():
    config = QuantizedExpertsConfig("nf4", linear=True)
    assert QuantizedExpertsConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert json.loads(config.to_json_string()) == config.to_dict()
