"""Checkpoints that bitsandbytes quantized expert by expert: their bytes in the model, and what is refused by name."""

import json
from collections import defaultdict

import pytest
import torch
from helpers.bitsandbytes_checkpoint import ATTENTION, EXPERTS, quantized, write
from helpers.models import SIZES, experts_modules, qwen3, tokens, with_expert_lora
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from lightning_moe import QuantizedExpertsConfig, QuantizedWeight, patch_moe
from lightning_moe.integrations.bitsandbytes_nf4 import QUANT_STATE

functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")

ROUTER = r".*\.mlp\.gate\.weight"
FIRST = "model.layers.0.mlp.experts.0.gate_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


def large_qwen3():
    """An expert's matrices have whole scales."""
    return qwen3(hidden_size=128, moe_intermediate_size=128, num_experts=4)


def small_qwen3():
    """A scale would belong to an expert's two matrices."""
    return qwen3(hidden_size=64, moe_intermediate_size=64, num_experts=4)


def mixtral():
    """Its experts have other names in a checkpoint."""
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 64}  # bitsandbytes' CPU kernel is wrong on rows of 32
    return MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2))


def load(folder, dtype=torch.bfloat16, **options):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, config=AutoConfig.from_pretrained(folder, quantization_config=None),
        quantization_config=QuantizedExpertsConfig(**options),
    )  # fmt: skip


def load_dense(dense, folder):
    """The model with the values that bitsandbytes makes of the checkpoint."""
    folder.mkdir()
    save_file(dense, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder.parent / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def values(parameter):
    from bitsandbytes.nn import Params4bit

    if isinstance(parameter, Params4bit):
        return functional.dequantize_4bit(parameter.data, parameter.quant_state)
    return parameter.dequantize() if isinstance(parameter, QuantizedWeight) else parameter


def no_values_are_computed(monkeypatch):
    def fail(*_, **__):
        pytest.fail("values are computed")

    monkeypatch.setattr(QuantizedWeight, "dequantize", fail)
    for name in ("quantize_4bit", "dequantize_4bit"):
        monkeypatch.setattr(functional, name, fail)


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "float32 absmax"])
@pytest.mark.parametrize("build", [large_qwen3, small_qwen3, mixtral])
def test_loaded_values_are_those_of_bitsandbytes(tmp_path, monkeypatch, build, nested):
    _, dense = write(build(), tmp_path, nested=nested)
    with monkeypatch.context() as patch:
        no_values_are_computed(patch)
        model = load(tmp_path)
    expected = dict(load_dense(dense, tmp_path / "dense").named_parameters())
    loaded = dict(model.named_parameters())
    assert loaded.keys() == expected.keys()
    assert {name for name, parameter in loaded.items() if not torch.equal(values(parameter), expected[name])} == set()
    experts = [getattr(module, name) for module in experts_modules(model) for name in ("gate_up_proj", "down_proj")]
    assert all(isinstance(each, QuantizedWeight) and not each.requires_grad for each in experts)


def test_loaded_bytes_are_those_of_the_file(tmp_path):
    tensors, _ = write(large_qwen3(), tmp_path)
    model = load(tmp_path)
    for number, module in enumerate(experts_modules(model)):
        for parameter, projections in (("gate_up_proj", ["gate_proj", "up_proj"]), ("down_proj", ["down_proj"])):
            for part, companion in (("packed", ""), ("absmax", ".absmax"), ("absmax_scale", ".nested_absmax")):
                prefix = f"model.layers.{number}.mlp.experts"
                for expert in range(4):
                    keys = [f"{prefix}.{expert}.{each}.weight{companion}" for each in projections]
                    joined = torch.cat([tensors[key].flatten() for key in keys])
                    assert torch.equal(getattr(module, parameter).parts[part][expert], joined)


@pytest.mark.parametrize("linear", [True, False])
def test_linear_layers_are_as_in_the_file(tmp_path, linear):
    from bitsandbytes.nn import Linear4bit

    tensors, _ = write(large_qwen3(), tmp_path, which=(EXPERTS, r".*\.[qkv]_proj\.weight"))
    model = load(tmp_path, linear=linear)
    kinds = defaultdict(set)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            kinds[name.rpartition(".")[2]].add(type(module))
    assert kinds == dict.fromkeys(("q_proj", "k_proj", "v_proj"), {Linear4bit}) | dict.fromkeys(
        ("o_proj", "lm_head"), {nn.Linear}
    )
    layer = model.model.layers[1].self_attn.q_proj
    assert torch.equal(layer.weight.data, tensors["model.layers.1.self_attn.q_proj.weight"])
    assert layer.weight.quant_state.nested
    assert layer.compute_dtype == torch.bfloat16


def test_what_is_dense_has_the_dtype_that_is_asked_for(tmp_path):
    _, dense = write(large_qwen3(), tmp_path)
    model = load(tmp_path, torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.uint8:
            assert parameter.dtype == torch.float32, name
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(model.get_parameter(norm), dense[norm].float())


def test_a_router_in_nf4_is_dense(tmp_path):
    """Transformers 4 had routers that were linear layers, which bitsandbytes quantized."""
    tensors, dense = write(large_qwen3(), tmp_path, which=(EXPERTS, ROUTER))
    model = load(tmp_path)
    name = "model.layers.1.mlp.gate.weight"
    assert tensors[name].dtype == torch.uint8
    assert torch.equal(model.get_parameter(name), dense[name])
    assert type(model.get_parameter(name)) is nn.Parameter
    assert all(isinstance(module.down_proj, QuantizedWeight) for module in experts_modules(model))


def test_only_experts_may_be_quantized(tmp_path):
    write(large_qwen3(), tmp_path, which=(EXPERTS,))
    model = load(tmp_path)
    assert {type(module) for name, module in model.named_modules() if name.endswith("_proj")} == {nn.Linear}
    assert all(isinstance(module.down_proj, QuantizedWeight) for module in experts_modules(model))
    with pytest.raises(ValueError, match="its linear layers not in nf4: leave linear out"):
        load(tmp_path, linear=True)


def test_a_training_step_is_that_of_the_dense_model(tmp_path):
    _, dense = write(large_qwen3(), tmp_path, which=(EXPERTS,))
    found = []
    for model in (load(tmp_path), load_dense(dense, tmp_path / "dense")):
        adapted = with_expert_lora(model, attention=True).train()
        assert all(layer.reason is None for layer in patch_moe(adapted))
        trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
        optimizer = torch.optim.SGD(trained.values(), lr=0.1)
        before = {name: parameter.detach().clone() for name, parameter in trained.items()}
        ids = tokens()
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        assert all(not torch.equal(before[name], parameter) for name, parameter in trained.items())
        found.append((loss, trained))
    (loss, trained), (expected_loss, expected) = found
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(trained[name], parameter) for name, parameter in expected.items())


def without(*endings):
    return lambda tensors: {key: value for key, value in tensors.items() if not key.endswith(endings)}


def with_matrix(name=FIRST, **options):
    """Has one matrix quantized otherwise."""

    def change(tensors):
        kept = {key: value for key, value in tensors.items() if not key.startswith(name)}
        return kept | quantized(torch.randn(128, 128).bfloat16(), name, **options)[0]

    return change


def with_dense(name=FIRST, dtype=torch.bfloat16):
    def change(tensors):
        return {key: value for key, value in tensors.items() if not key.startswith(name)} | {
            name: torch.zeros(128, 128, dtype=dtype)
        }

    return change


REMEDY = "Load the 16-bit checkpoint"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_matrix(blocksize=128), f"^{FIRST}: blocksize is 128, and 64 can be read. {REMEDY}"),
        (with_matrix(quant_type="fp4"), f"^{FIRST} is not in nf4: .*fp4. {REMEDY}"),
        (without(f"{FIRST}.absmax"), f"^the checkpoint lacks {FIRST}.absmax. {REMEDY}"),
        (without(f"{FIRST}.nested_absmax"), f"^the checkpoint lacks {FIRST}.nested_absmax. {REMEDY}"),
        (without(f"{FIRST}.nested_quant_map"), f"^the checkpoint lacks {FIRST}.nested_quant_map. {REMEDY}"),
        (without(f"{FIRST}.{QUANT_STATE}"), f"^the checkpoint lacks {FIRST}.{QUANT_STATE}. {REMEDY}"),
        (without(FIRST), f"^the checkpoint lacks {FIRST}. {REMEDY}"),
        (without("q_proj.weight.absmax"), f"^the checkpoint lacks .*0.self_attn.q_proj.weight.absmax. {REMEDY}"),
        (with_dense(), f"^{FIRST} is BF16 in a checkpoint with quantized weights, .* {REMEDY}"),
        (with_dense(dtype=torch.uint8), f"^{FIRST} is U8 in a checkpoint with quantized weights, and not in nf4. "),
        (with_dense(dtype=torch.float8_e4m3fn), f"^{FIRST} is in fp8 in a .* and not in nf4. {REMEDY}"),
        (with_dense(QUERY, torch.float8_e4m3fn), f"^{QUERY} is in fp8 .* {REMEDY}"),
        (with_dense(QUERY, torch.int8), f"^{QUERY} is I8 .* {REMEDY}"),
    ],
)
def test_what_cannot_be_loaded_is_an_error_before_any_weight_is_read(tmp_path, monkeypatch, change, message):
    write(large_qwen3(), tmp_path, change=change)
    read = "transformers.core_model_loading.spawn_materialize"
    monkeypatch.setattr(read, lambda *_, **__: pytest.fail("a tensor is read"))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_experts_that_are_not_in_nf4_are_an_error(tmp_path, dtype):
    """Linear layers in nf4 as Transformers quantizes them, or another format whose configuration is left out."""
    which, name = ((ATTENTION,), "BF16") if dtype == torch.bfloat16 else ((), "in fp8")
    write(large_qwen3(), tmp_path, which=which, change=with_dense(dtype=dtype))
    with pytest.raises(ValueError, match=f"^model.* is {name} in a checkpoint with quantized weights, .* {REMEDY}"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_linear_layers_in_another_format_beside_dense_experts_are_an_error(tmp_path, dtype):
    """Their values would be read without their scales."""
    write(large_qwen3(), tmp_path, which=(), change=with_dense(QUERY, dtype))
    with pytest.raises(ValueError, match=f"^{QUERY} is .* in a checkpoint with quantized weights, .* {REMEDY}"):
        load(tmp_path)


def test_experts_under_other_names_are_an_error_before_any_weight_is_read(tmp_path, monkeypatch):
    """As in GPTQ, AWQ or MXFP4: Transformers would make up dense ones first."""

    def change(tensors):
        return {
            key.replace(".weight", ".qweight") if ".experts." in key else key: tensor.int()
            if ".experts." in key
            else tensor
            for key, tensor in tensors.items()
        }

    write(large_qwen3(), tmp_path, which=(), change=change)
    read = "transformers.core_model_loading.spawn_materialize"
    monkeypatch.setattr(read, lambda *_, **__: pytest.fail("a tensor is read"))
    with pytest.raises(
        ValueError, match=f"^the checkpoint has nothing that .*gate_up_proj, and .*qweight is I32: .* {REMEDY}"
    ):
        load(tmp_path)


def test_a_block_of_two_experts_is_an_error(tmp_path):
    write(qwen3(hidden_size=8, moe_intermediate_size=4, num_experts=4), tmp_path)
    with pytest.raises(ValueError, match="experts.down_proj cannot be quantized to nf4: an expert of 8 x 4 values"):
        load(tmp_path, torch.float32)


def test_too_few_experts_are_an_error(tmp_path):
    """Transformers does not compare the shapes of what is quantized."""

    def change(tensors):
        return {key: tensor for key, tensor in tensors.items() if ".layers.1.mlp.experts.3." not in key}

    write(small_qwen3(), tmp_path, change=change)
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        load(tmp_path)
