"""The smallest model of each family whose experts Transformers' registry dispatches, built from the family's config.

Families are found, not listed: whatever the installed Transformers decorates. `SIZES` shrinks a config by the names of
its fields, `OWN` says what one family needs besides.
"""

import copy
import importlib
import inspect
import re
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

SIZES = {
    r"(unpadded_)?vocab_size(_per_layer_input)?": 64,
    r"hidden_size": 32,
    r"(.*_)?intermediate_size|.*_ffn_dim|expert_dim": 16,
    r"num_hidden_layers": 2,
    r"(swa_)?num_attention_heads|index_n_heads": 2,
    r"(swa_|num_global_)?(num_)?key_value_heads": 2,
    r"(swa_|global_|index_)?head_dim|(swa_)?v_head_dim": 16,
    r"qk_(rope|nope)_head_dim": 8,
    r"linear_(key_|value_)?head_dim|mamba_head_dim|ssm_state_size": 16,
    r"linear_(num_heads|num_key_heads|num_value_heads)|mamba_num_heads": 4,
    r"moe_hidden_size": 32,
    r"(q|kv|o)_lora_rank": 16,
    r"num_experts|n_routed_experts|num_local_experts|moe_num_experts": 8,
    r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts": 2,
    r"n_group|topk_group|num_expert_group": 1,
    r"first_k_dense_replace|num_dense_layers": 1,
    r"pad_token_id": 0,
    r"(bos|eos)_token_id": 1,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
OWN = {
    "deepseek_ocr2": {"num_experts_per_tok": 2, "mlp_layer_types": ["sparse"] * 2},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 8, "n_shared_experts": 1},
    "dots3_note": {
        f"swa_{name}": size
        for name, size in {
            "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16,
            "head_dim": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16,
        }.items()
    },
    "ernie4_5_vl_moe": {"moe_intermediate_size": [16, 16], "rope_parameters": ROPE | {"mrope_section": [3, 3, 2]}},
    "flint": {"mlp_only_layers": []},
    "gemma4": {
        "enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 16,
    },
    "glm4v_moe": {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}},
    "glm5_next": {"qk_rope_head_dim": 0},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "hy_v4_vl": {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}},
    "jamba": {"num_hidden_layers": 4, "attn_layer_offset": 1, "attn_layer_period": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0},
    "mimo_v2_flash": {"num_key_value_heads": 1, "swa_num_key_value_heads": 1},
    "mistral4": {"head_dim": 16},
    "nemotron_h": {"n_groups": 1},
    "qwen3_omni_moe": {"shared_expert_intermediate_size": 16},
    "qwen4_exp": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 4,
        "indexer_compress_ratio": 1,
    },
    "step3p7": {"sliding_window": 4},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
LARGEST = torch.finfo(torch.float64).max  # what masks are filled with
# A text model where there is one: its inputs are token ids.
PREFERRED = ("ForCausalLM", "TextModel", "ForTokenClassification", "DecoderModel", "Model")


def family_names():
    """Every family in which the registry dispatches a class."""
    files = (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")
    return sorted({file.parent.name for file in files if "@use_experts_implementation" in file.read_text("utf-8")})


def experts_classes(module):
    """The classes of a modeling module that dispatch through the registry."""
    return tuple(
        found
        for found in vars(module).values()
        if inspect.isclass(found)
        and found.__module__ == module.__name__
        and hasattr(getattr(found, "forward", None), "__wrapped__")
        and inspect.getclosurevars(found.forward).nonlocals.get("experts_interface") is ALL_EXPERTS_FUNCTIONS
    )


def small(config, own):
    """What to build a config of the same class from, for a model of a few thousand parameters."""
    options = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            options[name] = small(value, {})
        elif value is None or (isinstance(value, int) and not isinstance(value, bool)) or "token_id" in name:
            size = next((size for pattern, size in SIZES.items() if re.fullmatch(pattern, name)), None)
            if size is not None:
                options[name] = size
    if "qk_rope_head_dim" in options and "head_dim" in options:
        options["head_dim"] = options["qk_rope_head_dim"]
    kinds = getattr(config, "layer_types", None)
    if kinds and not isinstance(getattr(type(config), "layer_types", None), property):
        kinds = list(dict.fromkeys(kinds))
        options["layer_types"] = kinds if len(kinds) > 1 else kinds * 2
        options["num_hidden_layers"] = len(options["layer_types"])
    if kinds := getattr(config, "mlp_layer_types", None):
        sparse = [kind for kind in dict.fromkeys(kinds) if kind != "dense"]
        options["mlp_layer_types"] = [sparse[i % len(sparse)] for i in range(options["num_hidden_layers"])]
    return options | own


def model_classes(module, experts_class):
    """The modeling module's models: those named like the experts first, then those of text."""
    models = {
        name: found
        for name, found in vars(module).items()
        if inspect.isclass(found) and issubclass(found, PreTrainedModel) and found.__module__ == module.__name__
    }
    ordered = [
        name for suffix in PREFERRED for name in models if name.endswith(suffix) and not re.search("Vision|Audio", name)
    ]
    stem = experts_class.__name__.partition("Text")[0]
    return [models[name] for name in sorted(ordered, key=lambda name: not name.startswith(stem))]


def build(family, experts_class, seed=0):
    """The smallest model of the family that holds the class; no parameter is left at a constant."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    for model_class in model_classes(module, experts_class):
        torch.manual_seed(seed)
        config_class = model_class.config_class
        model = model_class(config_class(**small(config_class(), OWN.get(family, {}))))
        if any(isinstance(part, experts_class) for part in model.modules()):
            vary(model).train()
            for module in model.modules():
                if type(module).__name__ == "PhimoeTopKRouter":  # draws, and other numbers in float64
                    module.eval()
            return model
    raise LookupError(f"no model of {family} holds a {experts_class.__name__}")


@torch.no_grad()
def vary(model):
    """Moves what starts at a constant, so that biases, norms, scales and routing tables matter; fills the experts."""
    for parameter in model.parameters():
        if parameter.dim() == 3:  # some families leave their experts' memory as they found it
            parameter.normal_(std=0.2)
        elif parameter.numel() > 1 and (parameter == parameter.flatten()[0]).all():
            parameter += 0.2 * torch.randn(parameter.shape)
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):
            buffer.copy_(torch.randint(8, buffer.shape))
        elif name.endswith(("correction_bias", "expert_bias")):
            buffer += 0.1 * torch.randn(buffer.shape)
    return model


def adapted(model, how, seed=0):
    """The model as it trains: "full", or with PEFT's LoRA on "attention" or "experts"."""
    modules, parameters = [], []
    if how == "attention":
        linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
        modules = [name for name in linear if re.search(r"[.]([qkv]+_(a_|b_)?proj|in_proj)([.]linear)?$", name)]
    elif how == "experts":
        names = (name for name, _ in model.named_parameters())
        parameters = [name for name in names if re.search(r"experts[.](gate_up_proj|up_proj|down_proj)$", name)]
    if how == "full":
        return model
    assert modules or parameters, f"nothing of {type(model).__name__} to adapt"
    torch.manual_seed(1000 + seed)
    config = LoraConfig(r=4, target_modules=modules, target_parameters=parameters, init_lora_weights=False)
    return get_peft_model(model, config)


def results(model, seed=0):
    """The output and every gradient of one batch, by name."""
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(2000 + seed)
    ids = torch.randint(2, 60, (2, 12), generator=generator)
    inside = getattr(model, "base_model", model)
    if "Talker" in type(getattr(inside, "model", inside)).__name__ + type(inside).__name__:  # embeds nothing itself
        inputs = {"inputs_embeds": torch.randn(2, 12, 32, generator=generator).to(dtype)}
    else:
        inputs = {"input_ids": ids}
    model.zero_grad()
    torch.manual_seed(3000 + seed)  # some routers draw
    outputs = model(**inputs, use_cache=False)
    output = outputs.logits if "logits" in outputs else outputs[0]
    (output * torch.randn(output.shape, generator=generator).to(output.dtype)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"output": output.detach(), **{name: gradient.clone() for name, gradient in gradients.items()}}


def truth(model, seed=0):
    """The same in float64, by the family's own loop over experts."""
    return results(in_float64(model), seed)


def in_float64(model):
    """A copy in float64 that runs the family's own loop over experts."""
    exact = copy.deepcopy(model).double()
    for module in exact.modules():
        if hasattr(getattr(module, "config", None), "_experts_implementation_internal"):
            module.config._experts_implementation_internal = "eager"
        # These make their input float32, whatever their weight is.
        if type(module).__name__ in ("Inkling2TopKRouter", "Inkling2LoopTopKRouter"):
            module.float()
    return exact


class Rounding(TorchDispatchMode):
    """Moves every number that an operation makes, forward and backward, by about its last digit of float32."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(2**17, generator=generator, dtype=torch.float64)  # in turn: a draw a call takes long
        self.factors, self.used = 1 + torch.finfo(torch.float32).eps * noise, 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        made = operation(*arguments, **options or {})
        is_new = not operation.is_view and not operation._schema.is_mutable
        return tree_map_only(torch.Tensor, self.moved, made) if is_new else made

    def moved(self, tensor):
        if tensor.dtype != torch.float64:
            return tensor
        size = tensor.numel()
        if self.used + size > self.factors.numel():
            self.used = 1009  # no multiple of a size that comes again
        factors = self.factors[self.used : self.used + size].view(tensor.shape)
        self.used += size
        return (tensor * factors).clamp(-LARGEST, LARGEST)


def rounding(model, exact, seed=0, num_draws=8):
    """How far rounding to float32 moves each result of `exact`, the model's truth: root mean square over draws.

    Every weight, and every number that is computed, moves by about its last digit. So a sum counts by the size of its
    terms, however small it is itself, and no code's luck with a tensor of eight numbers comes in.
    """
    squares = dict.fromkeys(exact, 0.0)
    for draw in range(num_draws):
        other, moving = in_float64(model), Rounding(draw)
        for parameter in other.parameters():
            parameter.data = moving.moved(parameter.data)
        with moving:
            moved = results(other, seed)
        for name, tensor in exact.items():
            squares[name] += (moved[name] - tensor).norm() ** 2 / num_draws
    return {name: square.sqrt() for name, square in squares.items()}
