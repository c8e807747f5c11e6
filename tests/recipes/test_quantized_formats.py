"""The recipe on checkpoints whose experts are in fp8 or mxfp4: trained as they are; what a user is told."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import qwen3_lora
import torch
import yaml
from helpers.models import qwen3_config
from helpers.quantized_checkpoint import load_dense, write_fp8, write_mxfp4
from helpers.recipe import ARCHITECTURE, data, module, trainer
from lora import base_model
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

from lightning_moe import MoEGateGradCallback, QuantizedExpertsConfig, QuantizedWeight

os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"  # Lightning's use of jsonargparse, not ours

pytestmark = [
    *(pytest.mark.filterwarnings(f"ignore:{message}") for message in qwen3_lora.UNHELPFUL_WARNINGS),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),  # pytest's own arguments are in sys.argv
    pytest.mark.filterwarnings("ignore:MoEGateGradCallback logs nowhere"),
    pytest.mark.filterwarnings("ignore:AdapterUpdateCheck"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]
CPU = torch.device("cpu")
GPT_OSS, GPT_OSS_120B = (
    Path(qwen3_lora.__file__).parent / "configs" / f"gpt_oss_{size}.yaml" for size in ("20b", "120b")
)


def write_gpt_oss(folder):
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=384, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
    )  # fmt: skip
    return write_mxfp4(GptOssForCausalLM(config), folder)


def write_qwen3(folder):
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 128}
    return write_fp8(module(ARCHITECTURE | sizes, dtype="bfloat16").build_base(), folder)


def weights(network, ending):
    return [parameter for name, parameter in network.named_parameters() if name.endswith(ending)]


def test_a_checkpoint_in_fp8_is_trained_as_it_is(tmp_path):
    tensors = write_qwen3(tmp_path)
    options = {"dtype": "bfloat16", "quantize": "fp8", "experts": True, "checkpointing": "selective"}
    network = module(**options, init="pretrained", name=str(tmp_path))
    trainer(tmp_path / "run", 2, MoEGateGradCallback(), precision="bf16-mixed").fit(network, data())
    (weight,) = weights(network, ".down_proj")
    name = "model.layers.0.mlp.experts.1.down_proj.weight"
    assert torch.equal(weight.parts["values"][1].float(), tensors[name].float())
    layer = network.network.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    assert type(layer) is nn.Linear
    assert torch.equal(layer.weight, load_dense(tmp_path).model.layers[0].self_attn.q_proj.weight)
    assert "experts in fp8" in network.description["base"]


@pytest.mark.parametrize("experts", [False, True])
def test_gpt_oss_is_trained_with_its_configuration(tmp_path, experts):
    tensors = write_gpt_oss(tmp_path / "base")
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path)}}
    cli = qwen3_lora.main(
        ["fit", f"--config={GPT_OSS}", f"--model.name={tmp_path / 'base'}", "--data.tokenizer=null",
         "--data.max_length=64", "--model.learning_rate=1e-2", f"--model.experts={experts}", "--model.warmup_steps=0",
         "--trainer.accelerator=cpu", "--trainer.max_steps=12", "--trainer.limit_val_batches=0",
         f"--trainer.logger={logger}", "--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false"]
    )  # fmt: skip
    losses = [metrics["train/loss"] for metrics in logged(tmp_path)]
    assert len(losses) == 12
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.3
    for layer, weight in enumerate(weights(cli.model, "experts.gate_up_proj" if not experts else ".gate_up_proj")):
        name = f"model.layers.{layer}.mlp.experts.gate_up_proj_blocks"
        assert isinstance(weight, QuantizedWeight)
        assert torch.equal(weight.parts["packed"], tensors[name].flatten(-2))
    assert layer == 1
    assert {row["gategrad/active_layers"] for row in logged(tmp_path)} == {2.0}


def logged(folder):
    (file,) = folder.glob("**/metrics.csv")
    names, *rows = (line.split(",") for line in file.read_text().splitlines())
    read = [{name: float(value) for name, value in zip(names, row, strict=True) if value} for row in rows]
    return [row for row in read if "train/loss" in row]


@pytest.mark.filterwarnings("ignore:GPU available but not used")
@pytest.mark.parametrize(
    ("overlays", "parameters", "gib"), [(1, 20_914_757_184, 12.82), (2, 116_829_156_672, 60.77)], ids=["20b", "120b"]
)
def test_gpt_oss_builds_on_the_meta_device(overlays, parameters, gib):
    """With the sizes of the real models."""
    architecture = {}
    for file in (GPT_OSS, GPT_OSS_120B)[:overlays]:
        architecture |= yaml.safe_load(file.read_text())["model"]["architecture"]
    config = base_model.read_config(None, architecture)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == parameters
    free = SimpleNamespace(available=(gib + 0.01) * 2**30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_model.psutil, "virtual_memory", lambda: free)
        base_model.place_experts(config, torch.bfloat16, CPU, QuantizedExpertsConfig("mxfp4"))
        free.available = (gib - 0.01) * 2**30
        expected = rf"{gib:.1f} GiB \({parameters / 1e9:.2f} billion parameters in torch.bfloat16 and mxfp4\)"
        with pytest.raises(ValueError, match=expected):
            base_model.place_experts(config, torch.bfloat16, CPU, QuantizedExpertsConfig("mxfp4"))


def test_the_room_that_experts_in_fp8_take_is_a_byte_a_value(monkeypatch):
    config = qwen3_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    experts = sum(p.numel() for name, p in model.named_parameters() if "experts" in name)
    wanted = 2 * model.num_parameters() - experts
    free = SimpleNamespace(available=wanted * 1.001)
    monkeypatch.setattr(base_model.psutil, "virtual_memory", lambda: free)
    base_model.place_experts(config, torch.bfloat16, CPU, QuantizedExpertsConfig("fp8"))
    free.available = wanted * 0.999
    with pytest.raises(ValueError, match="in torch.bfloat16 and fp8"):
        base_model.place_experts(config, torch.bfloat16, CPU, QuantizedExpertsConfig("fp8"))


@pytest.mark.parametrize(
    ("method", "remedy"),
    [
        ("fp8", "set --model.quantize fp8$"),
        ("mxfp4", "set --model.quantize mxfp4$"),
        ("bitsandbytes", "set --model.quantize nf4$"),
        ("gptq", "give the 16-bit model$"),
    ],
)
def test_a_quantized_checkpoint_without_the_option_is_an_error_that_names_it(tmp_path, method, remedy):
    config = qwen3_config().to_dict() | {"quantization_config": {"quant_method": method}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"has quantized weights .* config.json: {method}.: {remedy}"):
        base_model.read_config(str(tmp_path), {})
    assert base_model.read_config(str(tmp_path), {}, quantize=True).quantization_config is None


def test_the_wrong_option_names_the_right_one(tmp_path):
    write_qwen3(tmp_path)
    network = module(dtype="bfloat16", quantize="mxfp4", init="pretrained", name=str(tmp_path))
    with pytest.raises(ValueError, match="in the recipe, --model.quantize fp8$"):
        trainer(tmp_path / "run", 1, precision="bf16-mixed").fit(network, data())
