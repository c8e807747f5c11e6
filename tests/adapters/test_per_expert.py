"""The per_expert layout: whatever was trained, a reader that knows hub names, one rank and one alpha gets it right."""

import copy
import importlib
import json
import re

import pytest
import torch
from helpers import families
from helpers.adapter_cases import CASES, EXPERTS, MODELS, SIZES, adapted, lora, phimoe
from helpers.hub import PREFIX, add_adapter, hub_tensors, load_hub
from helpers.models import EXPERT_TARGETS, Tiny, expert_lora_config, gpt_oss, mixtral, qwen3, tokens, with_expert_lora
from helpers.reference import relative_error
from helpers.training import LIGHTNING_WARNINGS, trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from lightning_moe import AdapterExport, export_adapter
from lightning_moe.adapters.export import check_export, describe_adapters, export_checkpoint
from lightning_moe.adapters.files import CHECKPOINT_KEY, CONFIG, WEIGHTS
from lightning_moe.adapters.per_expert import CARRIED, UNRESTRICTED
from lightning_moe.integrations.expert_names import name_on_hub, names_before_fusion

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pattern keys did not match"),  # PEFT's loader; they do match afterwards
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern"),
    *LIGHTNING_WARNINGS,
]

ATTENTION = ["q_proj", "v_proj"]


def outputs(model):
    with torch.no_grad():
        torch.manual_seed(0)
        found = model.eval()(input_ids=tokens(), use_cache=False)
    return found.logits if "logits" in found else found[0]


def read(folder, base, change=lambda tensors: tensors):
    """What a plain reader computes with the adapter."""
    return outputs(load_hub(base, change(add_adapter(hub_tensors(base), folder))))


def parts(folder):
    return load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())


def assert_obeys_the_rules(folder, base):
    tensors, config = parts(folder)
    modules = {key.partition(".lora_")[0].removeprefix(PREFIX) for key in tensors if ".lora_" in key}
    weights = {name.removesuffix(".weight") for name in hub_tensors(base) if name.endswith(".weight")}
    assert modules <= weights
    assert {key.partition(".lora_")[2] for key in tensors} == {"A.weight", "B.weight"}
    for module in modules:
        a, b = (tensors[f"{PREFIX}{module}.lora_{side}.weight"] for side in "AB")
        assert a.shape[0] == b.shape[1] == config["r"]
    for layer in {module.partition(".experts.")[0] for module in modules if ".experts." in module}:
        assert {name for name in weights if name.startswith(f"{layer}.experts.")} <= modules
    assert config["target_modules"] == sorted({module.rpartition(".")[2] for module in modules})
    assert (config["init_lora_weights"], config["use_rslora"]) == (True, False)
    assert (
        config.keys() <= CARRIED | UNRESTRICTED.keys()
    )  # older versions of PEFT warn of options that they do not know
    restricting = ["rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "exclude_modules"]
    assert not any(config[name] for name in [*restricting, "target_parameters"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MODELS)
def test_what_was_trained_is_what_a_plain_reader_computes(tmp_path, name, case):
    build = MODELS[name]
    model = adapted(build, case)
    check_export(model, "per_expert")
    export_adapter(model, tmp_path, "per_expert")
    assert_obeys_the_rules(tmp_path, build())
    wanted = outputs(model)
    assert relative_error(read(tmp_path, build()), wanted) < 1e-5
    assert relative_error(outputs(build()), wanted) > 1e-3


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MODELS)
def test_what_was_trained_is_what_peft_reads(tmp_path, name, case):
    model = adapted(MODELS[name], case)
    export_adapter(model, tmp_path, "per_expert")
    torch.manual_seed(2)
    assert relative_error(outputs(PeftModel.from_pretrained(MODELS[name](), tmp_path)), outputs(model)) < 1e-5


def test_the_comparison_sees_a_wrong_reading(tmp_path):
    model = adapted(MODELS["qwen3"], "patterns")
    export_adapter(model, tmp_path, "per_expert")
    wanted = outputs(model)

    def neighbours(tensors):
        number = {f".experts.{i}.": f".experts.{(i + 1) % 8}." for i in range(8)}
        return {re.sub(r"\.experts\.\d\.", lambda match: number[match[0]], key): one for key, one in tensors.items()}

    assert relative_error(read(tmp_path, MODELS["qwen3"](), neighbours), wanted) > 1e-2
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] * 1.001}))
    assert relative_error(read(tmp_path, MODELS["qwen3"]()), wanted) > 5e-5


def test_each_scaling_is_folded_into_b(tmp_path):
    """The expected numbers come from the definition: alpha / r, and half of it where the pattern says so."""
    torch.manual_seed(1)
    config = lora(target_modules=ATTENTION, rank_pattern={"q_proj": 8}, lora_alpha=16)
    model = get_peft_model(qwen3(), config)
    export_adapter(model, tmp_path, "per_expert")
    tensors, config = parts(tmp_path)
    assert (config["r"], config["lora_alpha"]) == (8, 32)
    prefix = "model.layers.0.self_attn"
    for name, factor in (("q_proj", 0.5), ("v_proj", 1)):
        own = getattr(model.base_model.model.model.layers[0].self_attn, name)
        b = tensors[f"{PREFIX}{prefix}.{name}.lora_B.weight"]
        assert torch.equal(b[:, : own.r["default"]], own.lora_B["default"].weight * factor)
        assert not b[:, own.r["default"] :].any()


def test_one_scaling_for_all_leaves_the_tensors_as_they_are(tmp_path):
    """rslora is alpha / sqrt(r), so of rank 4 its alpha is twice as large without it."""
    model = adapted(MODELS["qwen3"], "attention_rslora")
    export_adapter(model, tmp_path, "per_expert")
    tensors, config = parts(tmp_path)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 16, False)
    own = model.base_model.model.model.layers[0].self_attn.o_proj.lora_B["default"].weight
    assert torch.equal(tensors[f"{PREFIX}model.layers.0.self_attn.o_proj.lora_B.weight"], own)


def test_a_scaling_that_changed_after_training_is_kept(tmp_path):
    model = adapted(MODELS["qwen3"], "both")
    model.base_model.model.model.layers[0].self_attn.o_proj.set_scale("default", 3.0)
    export_adapter(model, tmp_path, "per_expert")
    assert relative_error(read(tmp_path, MODELS["qwen3"]()), outputs(model)) < 1e-5


@pytest.mark.parametrize("name", ["qwen3", "mixtral", "phimoe"])
def test_a_router_has_its_plain_name(tmp_path, name):
    build = {**MODELS, "phimoe": phimoe}[name]
    router = "mlp.router.weight" if name == "phimoe" else "mlp.gate.weight"
    torch.manual_seed(1)
    model = get_peft_model(build(), lora(target_parameters=[router]))
    if name == "phimoe":
        with pytest.warns(UserWarning, match="has no table for 'phimoe'"):
            export_adapter(model, tmp_path, "per_expert")
    else:
        export_adapter(model, tmp_path, "per_expert")
    tensors, config = parts(tmp_path)
    assert config["target_modules"] == ["gate"]
    block = "mlp" if name == "qwen3" else "block_sparse_moe"
    assert f"{PREFIX}model.layers.1.{block}.gate.lora_A.weight" in tensors
    assert relative_error(read(tmp_path, build()), outputs(model)) < 1e-5


def test_trained_modules_go_along(tmp_path):
    config = lora(target_parameters=EXPERTS, target_modules=ATTENTION, modules_to_save=["mlp.gate", "lm_head"])
    model = get_peft_model(qwen3(), config)
    for name, module in model.named_modules():
        if name.endswith("modules_to_save.default"):
            nn.init.normal_(module.weight)
    export_adapter(model, tmp_path, "per_expert")
    assert relative_error(read(tmp_path, qwen3()), outputs(model)) < 1e-5
    assert relative_error(outputs(PeftModel.from_pretrained(qwen3(), tmp_path)), outputs(model)) < 1e-5


def test_a_dense_layer_beside_experts_keeps_its_adapter(tmp_path):
    """A family that PEFT has no table of: it leaves the shared expert's layers linear."""
    torch.manual_seed(0)
    model, base = (shared_expert_model() for _ in range(2))
    torch.manual_seed(1)
    names = ["shared_expert.gate_proj", "shared_expert.down_proj"]
    model = get_peft_model(model, lora(target_parameters=EXPERTS, target_modules=names))
    with pytest.warns(UserWarning, match="has no table for 'qwen2_moe'"):
        export_adapter(model, tmp_path, "per_expert")
    assert_obeys_the_rules(tmp_path, base)
    assert relative_error(read(tmp_path, base), outputs(model)) < 1e-5


def shared_expert_model():
    module = importlib.import_module("transformers.models.qwen2_moe.modeling_qwen2_moe")
    return families.build("qwen2_moe", families.experts_classes(module)[0]).eval()


def test_a_dense_layer_that_peft_would_take_for_experts_is_warned_of(tmp_path):
    torch.manual_seed(0)
    own = {"num_experts": 4, "shared_expert_intermediate_size": 16, "layer_types": ["full_attention"] * 3}
    model = Qwen3NextForCausalLM(Qwen3NextConfig(**SIZES | own))
    config = lora(target_parameters=[*EXPERTS, "mlp.shared_expert.up_proj.weight"])
    with pytest.warns(UserWarning, match="takes up_proj on other layers for experts'"):
        export_adapter(get_peft_model(model, config), tmp_path, "per_expert")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_an_embeddings_adapter_is_padded_too(tmp_path):
    config = lora(
        target_modules=["embed_tokens", "o_proj"], rank_pattern={"o_proj": 6}, alpha_pattern={"embed_tokens": 2}
    )
    model = get_peft_model(qwen3(), config)
    export_adapter(model, tmp_path, "per_expert")
    tensors, _ = parts(tmp_path)
    key = f"{PREFIX}model.embed_tokens.lora_embedding_"
    assert (tensors[f"{key}A"].shape, tensors[f"{key}B"].shape) == ((6, 64), (32, 6))
    assert relative_error(outputs(PeftModel.from_pretrained(qwen3(), tmp_path)), outputs(model)) < 1e-5


# Every family


FAMILIES = [name for name in families.family_names() if any(map(names_before_fusion, (name, f"{name}_text")))]


def mixed(model):
    """LoRA on experts, attention and router, each of another rank and scaling."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    attention = [name for name in linear if re.search(r"[.]([qkv]+_(a_|b_)?proj|in_proj)([.]linear)?$", name)]
    names = [name for name, _ in model.named_parameters()]
    parameters = [name for name in names if re.search(r"\bexperts[.](gate_up_proj|down_proj)$", name)]
    routers = [name for name in names if re.search(r"[.](gate|router)[.]weight$", name)]
    parameters += [name for name in routers if name.removesuffix(".weight") not in linear]
    torch.manual_seed(1)
    config = lora(
        target_modules=attention, target_parameters=parameters,
        rank_pattern={"down_proj": 3, "weight": 5, ".*q_proj": 2}, alpha_pattern={"gate_up_proj": 5, "weight": 3},
    )  # fmt: skip
    return get_peft_model(model, config)


@pytest.mark.filterwarnings("ignore:PEFT on Transformers 5 has no table")
@pytest.mark.parametrize("family", FAMILIES)
def test_each_familys_names_are_the_hubs(tmp_path, family):
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    base = families.build(family, families.experts_classes(module)[0]).eval()
    model = mixed(copy.deepcopy(base))
    if names_before_fusion(base.config.model_type) is None:  # the text model of a family with a table of the whole
        with pytest.raises(ValueError, match="not known for the model type"):
            check_export(model, "per_expert")
        return
    check_export(model, "per_expert")
    export_adapter(model, tmp_path, "per_expert")
    assert_obeys_the_rules(tmp_path, base)
    assert relative_error(read(tmp_path, base), outputs(model)) < 1e-5
    assert relative_error(outputs(base), outputs(model)) > 1e-2


@pytest.mark.parametrize(
    ("model_type", "name", "on_hub"),
    [
        ("mixtral", "model.layers.3.mlp.experts.5.w2.weight", "model.layers.3.block_sparse_moe.experts.5.w2.weight"),
        ("mixtral", "model.layers.3.mlp.gate.weight", "model.layers.3.block_sparse_moe.gate.weight"),
        ("kimi_linear", "layers.0.mlp.experts.5.w2.weight", "layers.0.block_sparse_moe.experts.5.w2.weight"),
        ("phimoe", "model.layers.3.mlp.router.weight", "model.layers.3.block_sparse_moe.gate.weight"),
        ("qwen3_moe", "model.layers.3.mlp.gate.weight", "model.layers.3.mlp.gate.weight"),
        ("qwen3_moe", "model.layers.3.mlp.experts.gate_up_proj", None),
        ("kimi_linear", "model.layers.3.self_attn.conv1d.weight", None),
        ("gpt_oss", "model.layers.3.mlp.router.weight", "model.layers.3.mlp.router.weight"),
    ],
)  # fmt: skip
def test_names_on_the_hub(model_type, name, on_hub):
    assert name_on_hub(model_type, name) == on_hub


# What the layout cannot hold


def with_router_trained():
    return get_peft_model(mixtral(), lora(target_modules=ATTENTION, modules_to_save=["mlp.gate"]))


REFUSED = {
    "family": (lambda: with_expert_lora(gpt_oss()), "not known for the model type 'gpt_oss'"),
    "parameter": (
        lambda: get_peft_model(gpt_oss(), lora(target_parameters=["mlp.experts.down_proj_bias"])),
        "not known for the model type 'gpt_oss'",
    ),
    "dora": (
        lambda: get_peft_model(qwen3(), lora(target_modules=ATTENTION, use_dora=True)),
        "no place for use_dora=True",
    ),
    "lora_bias": (
        lambda: get_peft_model(qwen3(attention_bias=True), lora(target_modules=ATTENTION, lora_bias=True)),
        "no place for lora_bias=True",
    ),
    "pissa": (
        lambda: get_peft_model(qwen3(), lora(target_modules=ATTENTION, init_lora_weights="pissa")),
        "init_lora_weights='pissa' may change the base",
    ),
    "renamed_module": (with_router_trained, r"no place for an adapter on model.layers.0.mlp.gate.weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_layout_cannot_hold_is_an_error_before_training(tmp_path, case):
    build, message = REFUSED[case]
    module = Tiny(build)
    with pytest.raises(MisconfigurationException, match=f"{message}.*merge the adapter into the model"):
        trainer(tmp_path, AdapterExport(["per_expert"])).fit(module)
    assert module.losses == []
    with pytest.raises(ValueError, match=message):
        export_adapter(module, tmp_path / "adapter", "per_expert")
    assert not (tmp_path / "adapter").exists()


def test_a_parameter_that_is_no_projection_is_an_error():
    model = qwen3()
    for layer in model.model.layers:
        layer.mlp.experts.scale = nn.Parameter(torch.ones(8, 2, 2))
    model = get_peft_model(model, lora(target_parameters=["mlp.experts.scale"]))
    with pytest.raises(ValueError, match=r"no place for an adapter on model.layers.0.mlp.experts.scale"):
        check_export(model, "per_expert")


def checkpoint(tmp_path, change):
    model = Tiny(lambda: with_expert_lora(qwen3(), attention=True))
    content = {"state_dict": model.state_dict()}
    content[CHECKPOINT_KEY] = describe_adapters(model, content["state_dict"])
    change(content[CHECKPOINT_KEY]["default"])
    torch.save(content, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_a_checkpoint_without_scalings_is_an_error_where_they_are_needed(tmp_path):
    path = checkpoint(tmp_path, lambda entry: entry.pop("scalings"))
    with pytest.raises(ValueError, match=r"scaling of the adapter on .*was not saved: load the model and call"):
        export_checkpoint(path, tmp_path / "per_expert", "per_expert")
    export_checkpoint(path, tmp_path / "fused")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry.update(scalings={"path": "2"}), "is damaged"),
        (lambda entry: entry.update(scalings=[1.0]), "is damaged"),
        (lambda entry: entry.update(config="{}"), "has no rank and alpha, but r=None"),
    ],
)
def test_a_damaged_description_is_an_error(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        export_checkpoint(checkpoint(tmp_path, change), tmp_path / "adapter", "per_expert")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("name", ["q_proj", "experts"])
def test_a_vector_in_a_matrixs_place_is_an_error(tmp_path, name):
    path = checkpoint(tmp_path, lambda entry: None)
    content = torch.load(path, weights_only=True)
    key = next(key for key in content["state_dict"] if f"{name}.lora_B" in key)
    content["state_dict"][key] = content["state_dict"][key].flatten()
    torch.save(content, path)
    with pytest.raises(ValueError, match=f"{name}.lora_B.weight is not a matrix"):
        export_checkpoint(path, tmp_path / "adapter", "per_expert")
    assert not (tmp_path / "adapter").exists()


def test_a_fit_exports_rank_patterns_and_a_router(tmp_path):
    """As the recipe puts adapters on, with another rank on the attention."""

    def build():
        config = expert_lora_config([*EXPERT_TARGETS, "mlp.gate.weight"], attention=True, rank_pattern={"q_proj": 8})
        return get_peft_model(qwen3(), config)

    callback, module = AdapterExport(["per_expert"]), Tiny(build)
    trainer(tmp_path, callback).fit(module)
    assert relative_error(read(callback.folders["per_expert"], qwen3()), outputs(module.network)) < 1e-5
