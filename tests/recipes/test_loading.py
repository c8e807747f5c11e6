"""Tests of the benchmark of loading: the made-up checkpoint is one that Transformers reads, and what is measured."""

import loading
import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig, Qwen3MoeConfig

from lightning_moe import QuantizedExpertsConfig

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
SMALL = {
    "vocab_size": 64, "hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2, "num_experts": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "num_experts_per_tok": 2,
}  # fmt: skip


def test_the_checkpoint_has_every_weight(tmp_path):
    largest = loading.write_checkpoint(Qwen3MoeConfig(**SMALL), tmp_path, torch.device("cpu"))
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 3
    assert largest == max(file.stat().st_size for file in files)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize(("format", "config"), [
    ("fp8", Qwen3MoeConfig(**SMALL | {"moe_intermediate_size": 128})),
    ("mxfp4", GptOssConfig(**{name: SMALL[name] for name in SMALL if "moe" not in name and name != "num_experts"},
                           intermediate_size=64, num_local_experts=4)),
])  # fmt: skip
def test_a_quantized_checkpoint_is_one_that_is_read_as_it_is(format, config, tmp_path):
    loading.write_checkpoint(config, tmp_path, torch.device("cpu"), format)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=QuantizedExpertsConfig(format), output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.hf_quantizer.pre_quantized
    weight = model.model.layers[1].mlp.experts.down_proj
    assert 0.005 < weight.dequantize().float().std() < 0.1


def test_the_host_s_peak_is_seen():
    with loading.HostPeak() as host:
        held = torch.ones(2**26)
        held += 1
    assert 0.9 * held.nbytes < host.bytes < 1.5 * held.nbytes


def test_the_table(tmp_path):
    loading.main(layers=1, out=tmp_path)
    (row,) = [line for line in (tmp_path / "loading.md").read_text().splitlines() if line.startswith("| 0.")]
    cells = [float(cell) for cell in row.split("|")[1:-1]]
    assert cells[0] > cells[1] > 0
    assert cells[3] < cells[0]
