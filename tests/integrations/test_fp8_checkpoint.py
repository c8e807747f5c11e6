"""Checkpoints in fp8 with a scale for each block: the file's bytes in the model, dense values, what is refused."""

import importlib.util

import pytest
import torch
from helpers import bitsandbytes_checkpoint
from helpers.models import experts_modules, qwen3
from helpers.quantized import needs_bitsandbytes
from helpers.quantized_checkpoint import (
    ATTENTION,
    EXPERTS,
    assert_refused,
    assert_same_values,
    fp8_matrix,
    load,
    load_dense,
    replacing,
    training_step,
    without,
    write_fp8,
)
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import Transpose, WeightConverter
from transformers.integrations.finegrained_fp8 import FP8Experts

from lightning_moe import QuantizedWeight, patch_moe
from lightning_moe.integrations import quantized_checkpoint, transformers_quantizer
from lightning_moe.integrations.fp8_checkpoint import FP8Checkpoint
from lightning_moe.ops.fp8 import FP8

NUM_EXPERTS = 12
FIRST = "model.layers.0.mlp.experts.0.gate_proj.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"
REMEDY = "Load the 16-bit checkpoint"


def build(**changes):
    """Several blocks in a matrix, and more than ten experts, whose names as strings are in another order."""
    sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "head_dim": 128, "num_experts": NUM_EXPERTS}
    return qwen3(**sizes | changes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_are_those_that_transformers_makes_of_the_checkpoint(tmp_path, dtype):
    write_fp8(build(), tmp_path)
    model = load(tmp_path, "fp8", dtype=dtype)
    assert_same_values(model, load_dense(tmp_path, dtype=dtype))
    assert {type(module) for name, module in model.named_modules() if name.endswith("_proj")} == {nn.Linear}


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
def test_loaded_bytes_are_those_of_the_file(tmp_path, monkeypatch, scale_dtype):
    """Some blocks are smaller: those at the end of 192 features."""
    tensors = write_fp8(build(hidden_size=192), tmp_path, which=(EXPERTS,), scale_dtype=scale_dtype)
    assert tensors[f"{FIRST}_scale_inv"].shape == (1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(QuantizedWeight, "dequantize", lambda *_: pytest.fail("values are computed"))
        patch.setattr(transformers_quantizer.Quantize, "convert", lambda *_: pytest.fail("it is quantized again"))
        model = load(tmp_path, "fp8")
    for number, module in enumerate(experts_modules(model)):
        for parameter, projections in (("gate_up_proj", ["gate_proj", "up_proj"]), ("down_proj", ["down_proj"])):
            weight = getattr(module, parameter)
            assert weight.format == FP8()
            for part, suffix in (("values", ""), ("scales", "_scale_inv")):
                for expert in range(NUM_EXPERTS):
                    prefix = f"model.layers.{number}.mlp.experts.{expert}"
                    joined = torch.cat([tensors[f"{prefix}.{each}.weight{suffix}"] for each in projections])
                    found = weight.parts[part][expert]
                    assert found.dtype == (torch.float32 if suffix else torch.float8_e4m3fn)
                    assert torch.equal(found.float(), joined.float())


def test_a_training_step_is_that_of_the_dense_model(tmp_path):
    write_fp8(build(), tmp_path)
    found, expected = training_step(load(tmp_path, "fp8")), training_step(load_dense(tmp_path))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_one_parameter_is_copied_at_a_time(tmp_path, monkeypatch):
    """Beside the file's tensors there is the joined weight, and nothing is dense."""
    write_fp8(build(), tmp_path)
    sizes = []
    join = FP8Checkpoint.join

    def watched(self, tensors, names, *args):
        weight = join(self, tensors, names, *args)
        sizes.append((sum(each.nbytes for key, each in tensors.items() if not key.endswith("inv")), weight.nbytes))
        return weight

    monkeypatch.setattr(FP8Checkpoint, "join", watched)
    load(tmp_path, "fp8")
    gate_up, down = NUM_EXPERTS * 256 * 256, NUM_EXPERTS * 256 * 128
    scales = 4 * NUM_EXPERTS * 2
    assert sorted(sizes) == [(down, down + scales)] * 2 + [(gate_up, gate_up + 2 * scales)] * 2


def test_what_is_dense_in_the_file_stays_so(tmp_path):
    tensors = write_fp8(build(), tmp_path, which=(EXPERTS, r".*\.[qkv]_proj\.weight"))
    model = load(tmp_path, "fp8", dtype=torch.float32)
    for name in ("lm_head.weight", "model.layers.0.mlp.gate.weight", "model.layers.0.self_attn.o_proj.weight"):
        assert model.get_parameter(name).dtype == torch.float32
        assert torch.equal(model.get_parameter(name), tensors[name].float())


@pytest.mark.parametrize("which", [(), (ATTENTION,)], ids=["dense", "attention in fp8"])
def test_dense_experts(tmp_path, monkeypatch, which):
    """Those of a 16-bit checkpoint are quantized while it is loaded; beside linear layers in fp8 they are an error."""
    write_fp8(build(), tmp_path, which=which)
    if which:
        assert_refused(monkeypatch, tmp_path, "fp8", f"experts.0.down_proj.weight is BF16 in a checkpoint .* {REMEDY}")
    else:
        model = load(tmp_path, "fp8")
        assert all(module.down_proj.format == FP8() for module in experts_modules(model))


def in_fp8(name, rows=256, **options):
    return lambda tensors: tensors | fp8_matrix(torch.randn(rows, 256), name, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(f"{FIRST}_scale_inv"), f"^the checkpoint lacks {FIRST}_scale_inv. {REMEDY}"),
        (without(FIRST), f"^the checkpoint lacks {FIRST}. {REMEDY}"),
        (without(f"{QUERY}_scale_inv"), f"^the checkpoint lacks {QUERY}_scale_inv. {REMEDY}"),
        (
            replacing(f"{FIRST}_scale_inv", torch.ones(2, 4, dtype=torch.bfloat16)),
            rf"^{FIRST}_scale_inv is \(2, 4\), and \(1, 2\) can be read: .* block of 128 x 128 .*{REMEDY}",
        ),
        (
            replacing(f"{FIRST}_scale_inv", torch.ones((), dtype=torch.bfloat16)),
            rf"^{FIRST}_scale_inv is \(\), and \(1, 2\) can be read: one scale for each block",
        ),
        (
            replacing(f"{FIRST}_scale_inv", torch.ones(1, 2, dtype=torch.uint8)),
            f"^{FIRST}_scale_inv is U8, and F32, BF16, F16 can be read. {REMEDY}",
        ),
        (
            replacing(FIRST, torch.ones(128, 256, dtype=torch.float8_e5m2)),
            f"^{FIRST} is F8_E5M2, and F8_E4M3 can be read. {REMEDY}",
        ),
        (
            lambda tensors: without(f"{FIRST}_scale_inv")(
                replacing(FIRST, torch.ones(128, 256, dtype=torch.bfloat16))(tensors)
            ),
            f"^{FIRST} is BF16 in a checkpoint with quantized weights, and not in fp8. {REMEDY}",
        ),
        (
            replacing("model.layers.0.mlp.gate.weight", torch.ones(12, 256, dtype=torch.float8_e5m2)),
            "^model.layers.0.mlp.gate.weight is F8_E5M2 in a checkpoint with quantized weights",
        ),
        (in_fp8(QUERY, 128), rf"^{QUERY} is \(128, 256\) in the checkpoint, \(256, 256\) in the model. {REMEDY}"),
    ],
)
def test_what_cannot_be_loaded_is_an_error_before_any_weight_is_read(tmp_path, monkeypatch, change, message):
    write_fp8(build(), tmp_path, change=change)
    assert_refused(monkeypatch, tmp_path, "fp8", message)


def test_blocks_of_two_matrices_are_an_error(tmp_path, monkeypatch):
    write_fp8(build(moe_intermediate_size=64), tmp_path)
    message = rf"^{FIRST} has 64 rows, and is joined with another matrix: a block of 128 rows .*{REMEDY}"
    assert_refused(monkeypatch, tmp_path, "fp8", message)


def test_fused_experts_are_an_error(tmp_path, monkeypatch):
    """No checkpoint that is known has a scale for each block of those."""

    def fuse(tensors):
        kept = {key: value for key, value in tensors.items() if ".experts." not in key}
        shapes = {"gate_up_proj": (12, 256, 256), "down_proj": (12, 256, 128)}
        values = {
            f"model.layers.{layer}.mlp.experts.{name}": torch.zeros(shape, dtype=torch.float8_e4m3fn)
            for layer in range(2)
            for name, shape in shapes.items()
        }
        return kept | values | {f"{name}_scale_inv": torch.ones(12, 2, 2) for name in values}

    write_fp8(build(), tmp_path, change=fuse)
    assert_refused(monkeypatch, tmp_path, "fp8", rf"down_proj is \(12, 256, 128\), and one matrix .*{REMEDY}")


def test_what_transformers_takes_apart_is_an_error(tmp_path, monkeypatch):
    """Such as one matrix for queries, keys and values: its scales would not follow."""

    def mapping(model):
        name = "self_attn.q_proj.weight"
        return [*own(model), WeightConverter(name, name, [Transpose(0, 1)])]

    own = quantized_checkpoint.get_model_conversion_mapping
    monkeypatch.setattr(quantized_checkpoint, "get_model_conversion_mapping", mapping)
    write_fp8(build(), tmp_path)
    assert_refused(monkeypatch, tmp_path, "fp8", f"q_proj.weight is in fp8, and Transformers splits or .* {REMEDY}")


@pytest.mark.parametrize("format", [pytest.param("nf4", marks=needs_bitsandbytes), "mxfp4"])
def test_another_format_than_the_file_s_names_the_one_to_ask_for(tmp_path, monkeypatch, format):
    write_fp8(build(), tmp_path)
    message = rf'is in fp8 .* and {format} is asked for: .* QuantizedExpertsConfig\("fp8"\) .* --model.quantize fp8$'
    assert_refused(monkeypatch, tmp_path, format, message)


@needs_bitsandbytes
def test_nf4_in_the_file_names_itself(tmp_path, monkeypatch):
    bitsandbytes_checkpoint.write(build(), tmp_path)
    assert_refused(monkeypatch, tmp_path, "fp8", r"is in nf4 .* and fp8 is asked for: .* --model.quantize nf4$")


@needs_bitsandbytes
def test_linear_layers_in_nf4_are_refused_beside_experts_in_fp8(tmp_path, monkeypatch):
    write_fp8(build(), tmp_path)
    assert_refused(monkeypatch, tmp_path, "fp8", "its linear layers not in nf4: leave linear out", linear=True)


def test_bitsandbytes_is_not_needed(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == "bitsandbytes" else find_spec(name, *args)
    )
    write_fp8(build(), tmp_path)
    load(tmp_path, "fp8")


def test_transformers_own_experts_in_fp8_are_not_patched(tmp_path, monkeypatch):
    """They are a class of their own, whose calls another registry dispatches."""
    write_fp8(build(), tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # without a GPU Transformers makes all dense
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert any(isinstance(module, FP8Experts) for module in model.modules())
    layers = patch_moe(model)
    assert [(layer.status, layer.reason.code) for layer in layers] == [("fallback", "other_registry")] * 2
