"""The recipe on quantized experts: trained, resumed, asked; what a checkpoint says of its base."""

import pytest
import torch
from helpers.bitsandbytes_checkpoint import write
from helpers.recipe import ARCHITECTURE, data, module, trained, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lora.module import MoELoRA
from qwen3_lora import UNHELPFUL_WARNINGS

from lightning_moe import MoEGateGradCallback, QuantizedWeight

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytestmark = [
    *(pytest.mark.filterwarnings(f"ignore:{message}") for message in UNHELPFUL_WARNINGS),
    pytest.mark.filterwarnings("ignore:MoEGateGradCallback logs nowhere"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]
OPTIONS = {"dtype": "bfloat16", "quantize": "nf4", "experts": True, "checkpointing": "selective"}
BF16 = {"precision": "bf16-mixed"}


def fit(folder, steps, *callbacks, ckpt_path=None, **options):
    network = module(**OPTIONS | options)
    run = trainer(folder, steps, MoEGateGradCallback(), *callbacks, enable_checkpointing=bool(callbacks), **BF16)
    run.fit(network, data(), ckpt_path=ckpt_path)
    return network, run


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(tmp_path):
    def every_three():
        return ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)

    whole, _ = fit(tmp_path, 6, every_three())
    resumed, run = fit(tmp_path, 6, every_three(), ckpt_path=str(tmp_path / "step=3.ckpt"))
    assert run.global_step == 6
    start = module(**OPTIONS)
    start.configure_model()
    for name, value in trained(whole).items():
        assert torch.equal(trained(resumed)[name], value), name
    assert any(not torch.equal(trained(start)[name], value) for name, value in trained(whole).items())


def test_a_checkpoint_holds_the_adapters_and_names_the_format(tmp_path):
    _, run = fit(tmp_path, 1)
    run.save_checkpoint(tmp_path / "one.ckpt")
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert all("lora_" in name for name in saved["state_dict"])
    with pytest.raises(ValueError, match="model.quantize is None and was 'nf4'"):
        fit(tmp_path, 2, ckpt_path=str(tmp_path / "one.ckpt"), quantize=None)


def test_adapters_and_gradients_are_those_over_dense_experts(tmp_path, monkeypatch):
    """The same steps with the experts made dense for good."""
    quantized, _ = fit(tmp_path, 4)
    build = MoELoRA.build_base

    def dense(self):
        base = build(self)
        for part in base.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                if isinstance(parameter, QuantizedWeight):
                    setattr(part, name, torch.nn.Parameter(parameter.dequantize(), requires_grad=False))
        return base

    monkeypatch.setattr(MoELoRA, "build_base", dense)
    plain, _ = fit(tmp_path, 4)
    assert not any(isinstance(parameter, QuantizedWeight) for parameter in plain.parameters())
    for name, value in trained(plain).items():
        assert torch.equal(trained(quantized)[name], value), name


def test_linear_layers_are_quantized_too_if_asked(tmp_path):
    from bitsandbytes.nn import Linear4bit

    module(ARCHITECTURE | {"hidden_size": 64}, dtype="bfloat16").build_base().save_pretrained(tmp_path / "base")
    network = module(**OPTIONS | {"init": "pretrained", "name": str(tmp_path / "base"), "quantize_linear": True})
    trainer(tmp_path, 2, MoEGateGradCallback(), **BF16).fit(network, data())
    assert isinstance(network.network.get_base_model().model.layers[0].self_attn.q_proj.base_layer, Linear4bit)
    assert "experts in nf4, linear layers too" in network.description["base"]
    with pytest.raises(ValueError, match="model.quantize_linear is for a pretrained model"):
        module(**OPTIONS, quantize_linear=True)


@pytest.mark.parametrize("linear", [False, True])
def test_a_checkpoint_that_bitsandbytes_quantized_is_trained_as_it_is(tmp_path, linear):
    base = module(ARCHITECTURE | {"hidden_size": 64, "moe_intermediate_size": 64}, dtype="bfloat16").build_base()
    tensors, _ = write(base, tmp_path)
    options = {"init": "pretrained", "name": str(tmp_path), "quantize_linear": linear}
    network, _ = fit(tmp_path / "run", 2, **options)
    (weight,) = (parameter for name, parameter in network.named_parameters() if name.endswith(".down_proj"))
    assert isinstance(weight, QuantizedWeight)
    layer = network.network.get_base_model().model.layers[0]
    name = "model.layers.0.mlp.experts.1.down_proj.weight"
    assert torch.equal(weight.parts["packed"][1], tensors[name].flatten())
    assert torch.equal(layer.self_attn.q_proj.base_layer.weight, tensors["model.layers.0.self_attn.q_proj.weight"])
    assert "experts in nf4, linear layers too" in network.description["base"]
