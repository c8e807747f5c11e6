"""Small models of the families that matter, and a LightningModule around one."""

import torch
from lightning.pytorch import LightningModule
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

VOCABULARY = 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


def qwen3_config(**changes):
    own = {"moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
    return Qwen3MoeConfig(**SIZES | own | {"pad_token_id": 0} | changes)


def qwen3(**changes):
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(qwen3_config(**changes))


def mixtral(**changes):
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES | changes, num_local_experts=8, num_experts_per_tok=2))


def gpt_oss():
    torch.manual_seed(0)
    model = GptOssForCausalLM(
        GptOssConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2, layer_types=["full_attention"] * 2)
    )
    for name, parameter in model.named_parameters():
        if "bias" in name:  # zero as they come: a test of biases wants some
            torch.nn.init.normal_(parameter)
    return model


def qwen3_vl():
    """A vision-language model: the experts' config is one inside the model's."""
    text = {"moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2, "pad_token_id": 0}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4,
        "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    torch.manual_seed(0)
    config = Qwen3VLMoeConfig(text_config=SIZES | text | {"rope_parameters": rope}, vision_config=vision)
    return Qwen3VLMoeForConditionalGeneration(config)


def llama4():
    """A family whose gate multiplies the experts' input, outside the registry."""
    own = {"intermediate_size_mlp": 16, "num_local_experts": 4, "num_experts_per_tok": 1, "pad_token_id": 0}
    torch.manual_seed(0)
    return Llama4ForCausalLM(Llama4TextConfig(**SIZES | own))


def with_attention_lora(model):
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(model, config)


EXPERT_TARGETS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def expert_lora_config(targets=EXPERT_TARGETS, *, r=4, attention=False, **options):
    modules = ["q_proj", "v_proj"] if attention else []
    return LoraConfig(r=r, target_modules=modules, target_parameters=list(targets), init_lora_weights=False, **options)


def with_expert_lora(model, targets=EXPERT_TARGETS, **options):
    """PEFT's adapters on expert parameters, far from zero."""
    torch.manual_seed(1)
    return get_peft_model(model, expert_lora_config(targets, **options))


def experts_modules(model):
    return [module for module in model.modules() if type(module).__name__.endswith("Experts")]


def tokens(batch=2, length=12, seed=0):
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


class Dequantize(nn.Module):
    """A weight of one byte a value, computed anew at each reading, as bitsandbytes' parametrization is."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, packed):
        return packed * self.scale


def pack(experts, *names):
    """Quantizes expert weights by a parametrization."""
    for name in names or ("gate_up_proj", "down_proj"):
        weight = getattr(experts, name).detach()
        scale = weight.abs().max() / 127
        setattr(experts, name, nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False))
        register_parametrization(experts, name, Dequantize(scale), unsafe=True)


class Tiny(LightningModule):
    """Trains whatever `build` makes, built where `where` says: init, setup or configure_model."""

    def __init__(self, build=qwen3, where="init", num_batches=4, learning_rate=0.1):
        super().__init__()
        self.build, self.where, self.num_batches, self.lr = build, where, num_batches, learning_rate
        self.network = build() if where == "init" else None
        self.losses = []
        self.was_patched = []

    def setup(self, stage):
        if self.where == "setup" and self.network is None:
            self.network = self.build()

    def configure_model(self):
        if self.where == "configure_model" and self.network is None:
            self.network = self.build()

    def step(self, batch):
        (ids,) = batch
        self.was_patched.append(is_patched(self))
        return self.network(input_ids=ids, labels=ids).loss

    def training_step(self, batch, batch_idx):
        loss = self.step(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.step(batch))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.step(batch)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)

    def loader(self):
        return DataLoader(TensorDataset(tokens(2 * self.num_batches)), batch_size=2)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader


def is_patched(model):
    return any(module.config._experts_implementation == "gategrad" for module in experts_modules(model))
