"""Checkpoints of gpt-oss, whose experts are in mxfp4: the file's bytes in the model, and what is refused."""

import pytest
import torch
from helpers.models import SIZES, experts_modules, qwen3
from helpers.quantized import needs_bitsandbytes
from helpers.quantized_checkpoint import (
    assert_refused,
    assert_same_values,
    load,
    load_dense,
    replacing,
    training_step,
    without,
    write_fp8,
    write_mxfp4,
)
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM

from lightning_moe import QuantizedWeight, quantize_experts
from lightning_moe.integrations import transformers_quantizer
from lightning_moe.ops.mxfp4 import MXFP4

NUM_EXPERTS = 12
FIRST = "model.layers.0.mlp.experts.gate_up_proj"
REMEDY = "Load the 16-bit checkpoint"


def build(**changes):
    """The experts' down projections are square, which hides a weight that is transposed by mistake."""
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 64, "num_local_experts": NUM_EXPERTS}
    model = GptOssForCausalLM(GptOssConfig(**sizes | {"num_experts_per_tok": 2} | changes))
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 96}], ids=["square", "not square"])
def test_values_are_those_that_transformers_makes_of_the_checkpoint(tmp_path, sizes):
    write_mxfp4(build(**sizes), tmp_path)
    assert_same_values(load(tmp_path, "mxfp4"), load_dense(tmp_path))


def test_loaded_bytes_are_those_of_the_file(tmp_path, monkeypatch):
    tensors = write_mxfp4(build(), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(QuantizedWeight, "dequantize", lambda *_: pytest.fail("values are computed"))
        patch.setattr(transformers_quantizer.Quantize, "convert", lambda *_: pytest.fail("it is quantized again"))
        model = load(tmp_path, "mxfp4")
    for number, module in enumerate(experts_modules(model)):
        for stem in ("gate_up_proj", "down_proj"):
            name, weight = f"model.layers.{number}.mlp.experts.{stem}", getattr(module, stem)
            assert weight.format == MXFP4(is_transposed=True)
            assert torch.equal(weight.parts["packed"], tensors[f"{name}_blocks"].flatten(-2))
            assert torch.equal(weight.parts["scales"], tensors[f"{name}_scales"])
            assert weight.nbytes == sum(tensors[f"{name}_{each}"].nbytes for each in ("blocks", "scales"))
            assert torch.equal(getattr(module, f"{stem}_bias"), tensors[f"{name}_bias"])


@pytest.mark.parametrize("place", ["in memory", "while loading"])
def test_16_bit_weights_are_quantized_to_the_layout_of_the_file(tmp_path, place):
    """Blocks along what is summed over, in a weight that is not square."""
    model = build(hidden_size=96).bfloat16()
    dense = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    if place == "in memory":
        quantize_experts(model, "mxfp4")
    else:
        model.save_pretrained(tmp_path)
        model = load(tmp_path, "mxfp4")
    for number in range(2):
        for stem in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{number}.mlp.experts.{stem}"
            weight, expected = model.get_parameter(name), MXFP4(is_transposed=True).encode(dense[name])
            assert weight.format == MXFP4(is_transposed=True)
            assert all(torch.equal(weight.parts[part], values) for part, values in expected.items())


def test_a_training_step_is_that_of_the_dense_model(tmp_path):
    write_mxfp4(build(), tmp_path)
    found, expected = training_step(load(tmp_path, "mxfp4")), training_step(load_dense(tmp_path))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_what_is_dense_has_the_dtype_that_is_asked_for(tmp_path):
    tensors = write_mxfp4(build(), tmp_path)
    model = load(tmp_path, "mxfp4", dtype=torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for name in (f"{FIRST}_bias", "model.layers.1.self_attn.sinks", "model.layers.1.mlp.router.weight"):
        assert torch.equal(model.get_parameter(name), tensors[name].float())


def test_experts_of_a_16_bit_checkpoint_are_quantized_while_it_is_loaded(tmp_path):
    write_mxfp4(build(), tmp_path, which=("no such name",))
    model = load(tmp_path, "mxfp4")
    weights = [getattr(module, stem) for module in experts_modules(model) for stem in ("gate_up_proj", "down_proj")]
    assert {weight.format.name for weight in weights} == {"mxfp4"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(f"{FIRST}_scales"), f"^the checkpoint lacks {FIRST}_scales. {REMEDY}"),
        (without(f"{FIRST}_blocks"), f"^the checkpoint lacks {FIRST}_blocks. {REMEDY}"),
        (
            replacing(f"{FIRST}_blocks", torch.zeros(NUM_EXPERTS, 128, 4, 8, dtype=torch.uint8)),
            rf"^{FIRST}_blocks is \(12, 128, 4, 8\), and \(12, 128, 2, 16\) can be read: 12 experts of 128 x 64 in "
            rf"blocks of 32. {REMEDY}",
        ),
        (
            replacing(f"{FIRST}_scales", torch.zeros(NUM_EXPERTS, 128, 4, dtype=torch.uint8)),
            rf"^{FIRST}_scales is \(12, 128, 4\), and \(12, 128, 2\) can be read",
        ),
        (
            replacing(f"{FIRST}_scales", torch.zeros(NUM_EXPERTS, 128, 2)),
            f"^{FIRST}_scales is F32, and U8 can be read. {REMEDY}",
        ),
        (
            replacing("model.layers.0.self_attn.q_proj.weight_blocks", torch.zeros(32, 2, 16, dtype=torch.uint8)),
            f"^model.layers.0.self_attn.q_proj.weight is not the experts', and is in mxfp4. {REMEDY}",
        ),
    ],
)
def test_what_cannot_be_loaded_is_an_error_before_any_weight_is_read(tmp_path, monkeypatch, change, message):
    write_mxfp4(build(), tmp_path, change=change)
    assert_refused(monkeypatch, tmp_path, "mxfp4", message)


def test_experts_that_are_dense_in_part_are_an_error(tmp_path, monkeypatch):
    write_mxfp4(build(), tmp_path, which=("down_proj",))
    message = f"^{FIRST} is BF16 in a checkpoint with quantized weights, and not in mxfp4. {REMEDY}"
    assert_refused(monkeypatch, tmp_path, "mxfp4", message)


@pytest.mark.parametrize("format", [pytest.param("nf4", marks=needs_bitsandbytes), "fp8"])
def test_another_format_than_the_file_s_names_the_one_to_ask_for(tmp_path, monkeypatch, format):
    write_mxfp4(build(), tmp_path)
    message = rf"is in mxfp4 .* and {format} is asked for: ask .* --model.quantize mxfp4$"
    assert_refused(monkeypatch, tmp_path, format, message)


def test_mxfp4_asked_of_a_checkpoint_in_fp8_names_fp8(tmp_path, monkeypatch):
    write_fp8(qwen3(hidden_size=128, moe_intermediate_size=128, head_dim=128, num_experts=4), tmp_path)
    assert_refused(monkeypatch, tmp_path, "mxfp4", "is in fp8 .* --model.quantize fp8$")
