"""Merged models: bit for bit PEFT's own merge, in the base's own files; whole or not there at all."""

import json
import shutil

import pytest
import torch
from helpers.models import (
    EXPERT_TARGETS,
    SIZES,
    Tiny,
    expert_lora_config,
    experts_modules,
    gpt_oss,
    mixtral,
    qwen3,
    qwen3_vl,
)
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from lightning_moe import export_adapter, merge_adapter, verify_adapter
from lightning_moe.adapters.base_files import CONFIG, INDEX, SINGLE
from lightning_moe.adapters.export import describe_adapters
from lightning_moe.adapters.files import CHECKPOINT_KEY, WEIGHTS
from lightning_moe.adapters.files import CONFIG as ADAPTER_CONFIG
from lightning_moe.adapters.reference_logits import ReferenceLogits
from lightning_moe.cli import main
from lightning_moe.ops.weight_update import Update
from lightning_moe.quantization import quantize

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pattern keys did not match"),  # PEFT's; they do
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]

GATE_UP, DOWN = EXPERT_TARGETS


def deepseek():
    """The first layer is dense, the second has shared experts beside the routed ones."""
    torch.manual_seed(0)
    own = {
        "moe_intermediate_size": 16, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 2, "pad_token_id": 0,
    }  # fmt: skip
    return DeepseekV3ForCausalLM(DeepseekV3Config(**{k: v for k, v in SIZES.items() if k != "head_dim"} | own))


def make_exact(parameters):
    """Values of few bits: float32 has their products and sums exactly, in whatever order a processor adds them."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randint(-31, 32, parameter.shape, generator=generator) / 16)


def prepare(folder, build=qwen3, layout="fused", *, modules=("q_proj",), targets=EXPERT_TARGETS, **options):
    """A model with an adapter, and the folders of both; the base in the hub's layout, in several files."""
    base = build()
    make_exact(base.parameters())
    base.save_pretrained(folder / "base", max_shard_size="30KB")
    (folder / "base" / "tokenizer.json").write_text('{"version":  "1.0"}')
    config = expert_lora_config(targets, **options)
    config.target_modules = modules if isinstance(modules, str) else set(modules)
    model = get_peft_model(base, config)
    make_exact(parameter for parameter in model.parameters() if parameter.requires_grad)
    export_adapter(model, folder / "adapter", layout)
    return model, folder / "adapter", folder / "base"


def tensors_in(folder):
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def merged_by_peft(model, folder):
    """In the hub's layout."""
    model.merge_and_unload().save_pretrained(folder, max_shard_size="30KB")
    return tensors_in(folder)


def assert_equal(ours, wanted):
    assert ours.keys() == wanted.keys()
    assert [key for key in ours if not torch.equal(ours[key], wanted[key])] == []


def changed(ours, base):
    return {key for key in ours if not torch.equal(ours[key], base[key])}


# What is merged

PER_EXPERT = {"qwen3": qwen3, "mixtral": mixtral, "deepseek": deepseek}
FAMILIES = PER_EXPERT | {"gpt_oss": gpt_oss, "qwen3_vl": qwen3_vl}
CASES = [(name, "fused") for name in FAMILIES] + [(name, "per_expert") for name in PER_EXPERT]


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_a_merged_model_is_pefts_bit_for_bit(tmp_path, family, layout):
    modules = ["q_a_proj", "shared_experts.down_proj"] if family == "deepseek" else ["q_proj"]
    if family == "deepseek" and layout == "per_expert":
        modules = ["q_a_proj"]  # the layout cannot tell shared experts' names from experts'
    model, adapter, base = prepare(tmp_path, FAMILIES[family], layout, modules=modules)
    report = merge_adapter(adapter, base, tmp_path / "out")
    ours, before = tensors_in(tmp_path / "out"), tensors_in(base)
    assert_equal(ours, merged_by_peft(model, tmp_path / "peft"))
    assert report.merged == len(changed(ours, before))
    assert report.survived == 1
    experts = [key for key in changed(ours, before) if ".experts." in key]
    layers = 1 if family == "deepseek" else 2
    assert len(experts) == layers * (8 * 3 if family in PER_EXPERT else 2)
    assert len({ours[key].sum().item() for key in experts}) > len(experts) / 2  # experts differ: none was permuted


OPTIONS = {
    "rslora": {"use_rslora": True, "r": 3, "lora_alpha": 5},
    "patterns": {"rank_pattern": {"down_proj": 2, "q_proj": 5}, "alpha_pattern": {"gate_up_proj": 3, "q_proj": 7}},
    "gate_up": {"targets": (GATE_UP,)},
    "down": {"targets": (DOWN,)},
    "router": {"targets": (*EXPERT_TARGETS, "mlp.gate.weight")},
    "modules_to_save": {"modules_to_save": ["lm_head", "mlp.gate", "norm"]},
    "attention": {"targets": (), "modules": ("q_proj", "o_proj")},
    "attention_patterns": {
        "targets": (),
        "rank_pattern": {"q_proj": 5},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 1},
    },
    "layers": {"targets": (), "layers_to_transform": [1]},
    "pattern_of_modules": {"targets": (), "modules": r".*1\.self_attn\.(q|k)_proj"},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_options_of_lora_are_honoured(tmp_path, options):
    model, adapter, base = prepare(tmp_path, **OPTIONS[options])
    merge_adapter(adapter, base, tmp_path / "out")
    ours = tensors_in(tmp_path / "out")
    assert_equal(ours, merged_by_peft(model, tmp_path / "peft"))
    assert changed(ours, tensors_in(base))


def test_an_adapted_embedding_and_its_own_weight_are_merged(tmp_path):
    """PEFT saves an adapted embedding's own weight beside its matrices."""
    config = {"modules": ("q_proj", "embed_tokens"), "targets": ()}
    model, adapter, base = prepare(tmp_path, **config)
    tensors = load_file(adapter / WEIGHTS)
    own = "base_model.model.model.embed_tokens.base_layer.weight"
    save_file(tensors | {own: torch.ones(64, 32)}, adapter / WEIGHTS)
    merge_adapter(adapter, base, tmp_path / "out")
    update = tensors_in(tmp_path / "out")["model.embed_tokens.weight"] - 1
    wanted = merged_by_peft(model, tmp_path / "peft")["model.embed_tokens.weight"]
    assert torch.equal(update, wanted - tensors_in(base)["model.embed_tokens.weight"])
    assert update.any()


def test_weights_that_are_stored_input_first_are_merged(tmp_path):
    """Conv1D, for which PEFT has fan_in_fan_out."""
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    make_exact(base.parameters())
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    make_exact(parameter for parameter in model.parameters() if parameter.requires_grad)
    model.save_pretrained(tmp_path / "adapter")
    report = merge_adapter(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    assert report.merged == 1
    assert_equal(tensors_in(tmp_path / "out"), merged_by_peft(model, tmp_path / "peft"))


def test_per_expert_matrices_are_merged_into_a_base_with_fused_experts(tmp_path):
    model, adapter, base = prepare(tmp_path, layout="per_expert")
    fused = AutoModelForCausalLM.from_pretrained(base)
    shutil.rmtree(base)
    fused.save_pretrained(base, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensors_in(base)
    merge_adapter(adapter, base, tmp_path / "out")
    wanted = model.merge_and_unload().state_dict()
    assert_equal(tensors_in(tmp_path / "out"), dict(wanted))


def test_a_checkpoint_is_merged_as_its_adapter(tmp_path):
    model, adapter, base = prepare(tmp_path, modules_to_save=["lm_head"])
    path = save_checkpoint(model, tmp_path)
    merge_adapter(path, base, tmp_path / "checkpoint")
    merge_adapter(adapter, base, tmp_path / "folder")
    assert_equal(tensors_in(tmp_path / "checkpoint"), tensors_in(tmp_path / "folder"))
    assert changed(tensors_in(tmp_path / "checkpoint"), tensors_in(base))


def save_checkpoint(model, folder, **entries):
    module = Tiny(build=lambda: model)
    state = module.state_dict()
    content = {"state_dict": state, CHECKPOINT_KEY: describe_adapters(module, state)} | entries
    torch.save(content, folder / "last.ckpt")
    return folder / "last.ckpt"


# What is written


def headers_in(path):
    with safe_open(path, "pt") as opened:
        return opened.metadata(), {key: opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118


def test_files_and_names_are_the_bases(tmp_path):
    _, adapter, base = prepare(tmp_path)
    (base / "templates").mkdir()
    (base / "templates" / "tool.jinja").write_text("{{ tool }}")
    (base / ".cache").mkdir()
    (base / ".cache" / "left").touch()
    (base / "consolidated.00.pth").touch()
    merge_adapter(adapter, base, tmp_path / "out")
    names = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (base, tmp_path / "out")]
    assert names[0] - names[1] == {".cache", ".cache/left", "consolidated.00.pth"}
    assert names[1] <= names[0]
    shards = sorted(base.glob("*.safetensors"))
    assert len(shards) > 2
    for path in base.rglob("*"):
        other = tmp_path / "out" / path.relative_to(base)
        if path in shards:
            assert headers_in(path) == headers_in(other)
            assert path.stat().st_size == other.stat().st_size
        elif other.is_file():
            assert path.read_bytes() == other.read_bytes()
    assert (tmp_path / "out").stat().st_mode == base.stat().st_mode


def test_a_base_in_one_file_stays_in_one(tmp_path):
    model, adapter, base = prepare(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(base)
    shutil.rmtree(base)
    whole.save_pretrained(base)
    merge_adapter(adapter, base, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("model*")) == [SINGLE]
    assert_equal(tensors_in(tmp_path / "out"), merged_by_peft(model, tmp_path / "peft"))


# What is rounded


def in_bfloat16(base):
    """Makes a base one in bfloat16, but for one router."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.model.layers[0].mlp.gate.float()
    shutil.rmtree(base)
    model.save_pretrained(base, max_shard_size="30KB")


def test_the_sum_is_rounded_once(tmp_path):
    model, adapter, base = prepare(tmp_path, targets=(*EXPERT_TARGETS, "mlp.gate.weight"))
    before = tensors_in(base)
    in_bfloat16(base)
    merge_adapter(adapter, base, tmp_path / "out")
    ours, wanted = tensors_in(tmp_path / "out"), merged_by_peft(model, tmp_path / "peft")
    router = "model.layers.0.mlp.gate.weight"
    assert [key for key, tensor in ours.items() if tensor.dtype != torch.bfloat16] == [router]
    assert_equal(ours, {key: wanted[key].to(ours[key].dtype) for key in wanted})
    twice = {key: before[key].bfloat16() + (wanted[key] - before[key]).bfloat16() for key in wanted}
    assert changed(ours, twice) - {router}


def test_another_dtype_is_the_models_and_its_configs(tmp_path):
    model, adapter, base = prepare(tmp_path)
    in_bfloat16(base)
    report = merge_adapter(adapter, base, tmp_path / "out", dtype=torch.float32)
    assert_equal(tensors_in(tmp_path / "out"), merged_by_peft(model, tmp_path / "peft"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32
    index, old = (json.loads((folder / INDEX).read_text()) for folder in (tmp_path / "out", base))
    assert index["metadata"]["total_size"] == report.nbytes > old["metadata"]["total_size"]
    assert index["weight_map"] == old["weight_map"]
    config, old = (json.loads((folder / CONFIG).read_text()) for folder in (tmp_path / "out", base))
    assert old.pop("dtype") == "bfloat16"
    assert config.pop("dtype") == "float32"
    assert config == old

    merge_adapter(adapter, base, tmp_path / "half", dtype=torch.float16)
    kinds = {tensor.dtype for tensor in tensors_in(tmp_path / "half").values()}
    assert kinds == {torch.float16, torch.float32}  # the router stays


def small_update(folder):
    """A base in bfloat16, and an update of 1e-3 of it."""
    base = qwen3().bfloat16()
    base.save_pretrained(folder / "base")
    model = get_peft_model(base, expert_lora_config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, 0.02 if "lora_A" in name else 2.5e-4)
    export_adapter(model, folder / "adapter")
    return folder / "adapter", folder / "base"


def test_what_survives_rounding_is_measured(tmp_path):
    adapter, base = small_update(tmp_path)
    nearest = merge_adapter(adapter, base, tmp_path / "nearest")
    assert 0.1 < nearest.survived < 0.9
    assert "--rounding stochastic" in str(nearest)
    by_chance = merge_adapter(adapter, base, tmp_path / "stochastic", rounding="stochastic")
    assert 0.9 < by_chance.survived < 1.1
    exact = merge_adapter(adapter, base, tmp_path / "float32", dtype=torch.float32)
    assert 1 - 1e-4 < exact.survived < 1 + 1e-4
    assert "--rounding" not in str(exact)
    # And it is what it says.
    old, new, whole = (tensors_in(folder) for folder in (base, tmp_path / "nearest", tmp_path / "float32"))
    change = torch.cat([(whole[key] - old[key]).flatten() for key in old]).double()
    kept = torch.cat([(new[key] - old[key]).flatten() for key in old]).double()
    assert (change @ kept / (change @ change)).item() == pytest.approx(nearest.survived, abs=1e-3)


def test_stochastic_rounding_is_that_of_its_seed(tmp_path):
    adapter, base = small_update(tmp_path)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        merge_adapter(adapter, base, tmp_path / name, rounding="stochastic", seed=seed)
    a, b, c = (tensors_in(tmp_path / name) for name in "abc")
    assert_equal(a, b)
    assert changed(a, c)


def test_an_adapter_that_was_not_trained_is_said_to_change_nothing(tmp_path):
    _, adapter, base = prepare(tmp_path)
    tensors = load_file(adapter / WEIGHTS)
    save_file({key: tensor * (".lora_B." not in key) for key, tensor in tensors.items()}, adapter / WEIGHTS)
    report = merge_adapter(adapter, base, tmp_path / "out")
    assert "changes nothing" in str(report)
    assert_equal(tensors_in(tmp_path / "out"), tensors_in(base))


# What is whole or not there


def stop_after(monkeypatch, calls, error):
    """The merge of the block after so many others fails."""
    apply, count = Update.apply, iter(range(calls))

    def fail(*arguments):
        if next(count, None) is None:
            raise error
        return apply(*arguments)

    monkeypatch.setattr(Update, "apply", fail)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), RuntimeError("odd")])
def test_a_merge_that_fails_leaves_nothing(tmp_path, monkeypatch, error):
    _, adapter, base = prepare(tmp_path)
    before = tensors_in(base)
    with monkeypatch.context() as patched:
        stop_after(patched, 30, error)
        with pytest.raises(type(error)):
            merge_adapter(adapter, base, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    assert_equal(tensors_in(base), before)
    merge_adapter(adapter, base, tmp_path / "out")


def test_nothing_looks_whole_while_it_is_written(tmp_path, monkeypatch):
    _, adapter, base = prepare(tmp_path)
    apply, seen = Update.apply, set()

    def look(*arguments):
        seen.update(str(path.relative_to(tmp_path)) for path in tmp_path.glob("**/config.json"))
        seen.update(path.name for path in tmp_path.iterdir() if not path.name.startswith("."))
        return apply(*arguments)

    monkeypatch.setattr(Update, "apply", look)
    merge_adapter(adapter, base, tmp_path / "out")
    assert seen == {"adapter", "base", "base/config.json"}


def test_room_is_checked_first(tmp_path, monkeypatch):
    _, adapter, base = prepare(tmp_path)
    size = sum(path.stat().st_size for path in base.iterdir())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size // 2))
    stop_after(monkeypatch, 0, AssertionError("it began"))
    with pytest.raises(OSError, match="GiB free, and the merged model takes"):
        merge_adapter(adapter, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_is_filled_and_another_one_refused(tmp_path):
    _, adapter, base = prepare(tmp_path)
    (tmp_path / "out").mkdir()
    merge_adapter(adapter, base, tmp_path / "out")
    for taken in (tmp_path / "out", base, adapter / WEIGHTS):
        with pytest.raises(FileExistsError, match="name another folder or move it"):
            merge_adapter(adapter, base, taken)


# What cannot be merged


def edit(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-16])


def shard_with(base, name):
    return next(path for path in sorted(base.glob("*.safetensors")) if any(name in key for key in load_file(path)))


def rename_tensors(path, old, new):
    save_file({key.replace(old, new): tensor for key, tensor in load_file(path).items()}, path)


def drop_tensors(path, name):
    save_file({key: tensor for key, tensor in load_file(path).items() if name not in key}, path)


def cut_tensors(path, name):
    save_file({k: t[:, :-1].contiguous() if name in k else t for k, t in load_file(path).items()}, path)


FAULTS = {
    "no config": (lambda a, b: (a / ADAPTER_CONFIG).unlink(), "has no adapter_config.json: it is no adapter's folder"),
    "no weights": (lambda a, b: (a / WEIGHTS).unlink(), "has no adapter_model.safetensors"),
    "damaged config": (lambda a, b: (a / ADAPTER_CONFIG).write_text("{"), "adapter_config.json is damaged"),
    "damaged adapter": (lambda a, b: truncate(a / WEIGHTS), "adapter_model.safetensors is damaged"),
    "elsewhere": (
        lambda a, b: rename_tensors(a / WEIGHTS, "layers.1.self_attn.q_proj", "layers.7.self_attn.q_proj"),
        "lacks the matrices of .*layers.1.self_attn.q_proj",
    ),
    "extra": (
        lambda a, b: save_file(load_file(a / WEIGHTS) | {"base_model.model.odd.weight": torch.ones(1)}, a / WEIGHTS),
        "1 of the adapter's 13 tensors have no place in the base, Qwen3MoeForCausalLM: base_model.model.odd.weight",
    ),
    "incomplete": (
        lambda a, b: drop_tensors(a / WEIGHTS, "1.mlp.experts.lora"),
        "lacks the matrices of .*1.mlp.experts",
    ),
    "half a pair": (lambda a, b: drop_tensors(a / WEIGHTS, "1.mlp.experts.lora_B"), "1.mlp.experts without the other"),
    "other half": (lambda a, b: drop_tensors(a / WEIGHTS, "1.mlp.experts.lora_A"), "1.mlp.experts without the other"),
    "other rank": (
        lambda a, b: edit(a / ADAPTER_CONFIG, r=8),
        r"\(4, 32\) and \(32, 4\), and \(8, 32\) and \(32, 8\) would fit",
    ),
    "no LoRA": (lambda a, b: edit(a / ADAPTER_CONFIG, peft_type="LOHA"), "peft_type is 'LOHA', and only LORA"),
    "DoRA": (lambda a, b: edit(a / ADAPTER_CONFIG, use_dora=True), "the adapter has DoRA: only plain LoRA"),
    "bias": (lambda a, b: edit(a / ADAPTER_CONFIG, bias="all"), r"the base's biases \(bias='all'\)"),
    "tokens": (lambda a, b: edit(a / ADAPTER_CONFIG, trainable_token_indices=[1]), "single trained tokens"),
    "PiSSA": (lambda a, b: edit(a / ADAPTER_CONFIG, init_lora_weights="pissa_niter_4"), "changes the base's weights"),
    "other class": (
        lambda a, b: edit(a / ADAPTER_CONFIG, auto_mapping={"base_model_class": "MixtralForCausalLM"}),
        "the adapter is for MixtralForCausalLM, and the base is Qwen3MoeForCausalLM",
    ),
    "NaN": (
        lambda a, b: save_file({k: t * float("nan") for k, t in load_file(a / WEIGHTS).items()}, a / WEIGHTS),
        "would not be finite",
    ),
    "no base": (lambda a, b: shutil.rmtree(b), "is no folder: download the base first"),
    "no config.json": (lambda a, b: (b / CONFIG).unlink(), "has no config.json: it is no model's folder"),
    "no index": (lambda a, b: (b / INDEX).unlink(), "has neither model.safetensors nor model.safetensors.index.json"),
    "damaged index": (lambda a, b: (b / INDEX).write_text("{}"), "it has no weight_map"),
    "missing shard": (
        lambda a, b: sorted(b.glob("model-00002-of-*"))[0].unlink(),
        r"lacks model-00002-of-\d+.safetensors, which its index names",
    ),
    "damaged shard": (lambda a, b: truncate(shard_with(b, "lm_head")), r"model-\d+-of-\d+.safetensors is damaged"),
    "hostile index": (lambda a, b: edit(b / INDEX, weight_map={"a": "../x.safetensors"}), "is no file of the folder"),
    "missing tensor": (
        lambda a, b: drop_tensors(shard_with(b, "1.mlp.experts.3.up"), "1.mlp.experts.3.up"),
        "lacks model.layers.1.mlp.experts.3.up_proj.weight, which its index names",
    ),
    "missing parameter": (
        lambda a, b: (drop_tensors(shard_with(b, "1.mlp.experts.3.up"), "1.mlp.experts.3.up"), no_names(b)),
        "changes model.layers.1.mlp.experts.gate_up_proj, .* hold 7680 values of it",
    ),
    "other names": (
        lambda a, b: (rename_tensors(shard_with(b, "1.self_attn.q_proj"), "self_attn", "attention"), no_names(b)),
        "changes model.layers.1.self_attn.q_proj.weight, .* hold none of it",
    ),
    "other shapes": (
        lambda a, b: cut_tensors(shard_with(b, "1.self_attn.q_proj"), "1.self_attn.q_proj"),
        r"1.self_attn.q_proj.weight is \(32, 31\), and its config.json makes it \(32, 32\)",
    ),
    "other sizes": (lambda a, b: edit(b / CONFIG, moe_intermediate_size=8), "trained on a model of other sizes"),
    "unknown family": (lambda a, b: edit(b / CONFIG, model_type="odd"), "cannot make a model of its config"),
    "quantized": (
        lambda a, b: edit(b / CONFIG, quantization_config={"quant_method": "fp8"}),
        r"has quantized weights \(quantization_config: fp8\): give the 16-bit base",
    ),
    "tied": (lambda a, b: edit(b / CONFIG, tie_word_embeddings=True), "lm_head.weight, whose weight the base shares"),
}


def no_names(base):
    """The index then names files, and of tensors only what each holds."""
    names = {key: path.name for path in base.glob("*.safetensors") for key in load_file(path)}
    edit(base / INDEX, weight_map=names)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_an_error_that_names_it(tmp_path, fault):
    _, adapter, base = prepare(tmp_path, modules=("q_proj", "lm_head") if fault == "tied" else ("q_proj",))
    spoil, message = FAULTS[fault]
    spoil(adapter, base)
    with pytest.raises(ValueError, match=message):
        merge_adapter(adapter, base, tmp_path / "out")
    assert sorted({path.name for path in tmp_path.iterdir()} - {"base"}) == ["adapter"]


def test_float16_that_is_too_small_is_an_error(tmp_path):
    _, adapter, base = prepare(tmp_path)
    tensors = load_file(adapter / WEIGHTS)
    save_file({key: tensor * 1e3 for key, tensor in tensors.items()}, adapter / WEIGHTS)
    with pytest.raises(ValueError, match="would not be finite: .* or float16 is too small"):
        merge_adapter(adapter, base, tmp_path / "out", dtype=torch.float16)
    merge_adapter(adapter, base, tmp_path / "out")


@pytest.mark.parametrize("layout", ["fused", "per_expert"])
def test_an_adapter_for_another_family_is_an_error(tmp_path, layout):
    model, adapter, _ = prepare(tmp_path / "qwen3", layout=layout, task_type="CAUSAL_LM")
    _, _, base = prepare(tmp_path / "mixtral", mixtral)
    if layout == "per_expert":
        with pytest.raises(ValueError, match="96 of the adapter's 100 tensors have no place in the base, Mixtral"):
            merge_adapter(adapter, base, tmp_path / "out")
    with pytest.raises(ValueError, match="for the family qwen3_moe, and the base is mixtral"):
        merge_adapter(save_checkpoint(model, tmp_path), base, tmp_path / "out")


@pytest.mark.parametrize("given", ["checkpoint", "folder"])
def test_an_adapter_trained_over_quantized_experts_is_merged_when_asked(tmp_path, given):
    expected = merged_by_peft(prepare(tmp_path / "again")[0], tmp_path / "peft")
    model, adapter, base = prepare(tmp_path)
    for experts in experts_modules(model):
        for name in ("gate_up_proj", "down_proj"):
            weight = nn.Parameter(quantize(getattr(experts, name), "fp8"), requires_grad=False)
            setattr(experts, name, weight)
    if given == "checkpoint":
        state = {name: tensor for name, tensor in Tiny(build=lambda: model).state_dict().items() if "lora_" in name}
        adapter = save_checkpoint(model, tmp_path, state_dict=state)
    else:
        adapter = tmp_path / "over_fp8"
        export_adapter(model, adapter)
        ReferenceLogits.compute(model).save(adapter)
    with pytest.raises(ValueError, match="trained over experts in fp8 .* near the trained one, not equal to it"):
        merge_adapter(adapter, base, tmp_path / "out")
    merge_adapter(adapter, base, tmp_path / "out", onto_16_bit=True)
    assert_equal(tensors_in(tmp_path / "out"), expected)
    if given == "folder":
        found = verify_adapter(tmp_path / "out")
        assert found.outcome == "other_format"
        assert "(qwen3_moe, experts in fp8), not equal to it: its experts are dense" in str(found)


def test_a_merged_model_has_the_logits_to_verify_it_by(tmp_path):
    model, adapter, base = prepare(tmp_path)
    ReferenceLogits.compute(model).save(adapter)
    merge_adapter(adapter, base, tmp_path / "out")
    assert verify_adapter(tmp_path / "out", base).ok


def test_an_adapter_without_a_module_that_its_config_names_is_an_error(tmp_path):
    _, adapter, base = prepare(tmp_path, modules_to_save=["lm_head"])
    tensors = load_file(adapter / WEIGHTS)
    save_file({key: tensor for key, tensor in tensors.items() if "lm_head" not in key}, adapter / WEIGHTS)
    with pytest.raises(ValueError, match="lacks lm_head, which its config names in modules_to_save"):
        merge_adapter(adapter, base, tmp_path / "out")


def test_a_file_that_is_no_checkpoint_and_odd_arguments_are_errors(tmp_path):
    _, adapter, base = prepare(tmp_path)
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        merge_adapter(tmp_path / "text.ckpt", base, tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        merge_adapter(tmp_path / "none.ckpt", base, tmp_path / "out")
    torch.save({"state_dict": {"weight": torch.ones(1)}}, tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="saved without the callback AdapterExport"):
        merge_adapter(tmp_path / "plain.ckpt", base, tmp_path / "out")
    with pytest.raises(ValueError, match="rounding must be"):
        merge_adapter(adapter, base, tmp_path / "out", rounding="up")
    with pytest.raises(ValueError, match="dtype must be"):
        merge_adapter(adapter, base, tmp_path / "out", dtype=torch.float64)


def test_one_of_several_adapters_has_to_be_named(tmp_path):
    model, _, base = prepare(tmp_path)
    model.add_adapter("other", expert_lora_config(r=2))
    path = save_checkpoint(model, tmp_path)
    with pytest.raises(ValueError, match="has the adapters default, other: name one of them, not None"):
        merge_adapter(path, base, tmp_path / "out")
    merge_adapter(path, base, tmp_path / "out", adapter_name="default")
    assert_equal(tensors_in(tmp_path / "out"), merged_by_peft(model, tmp_path / "peft"))


# The command line


def test_the_command_merges_and_says_what_survived(tmp_path, capsys):
    adapter, base = small_update(tmp_path)
    arguments = [str(path) for path in (adapter, base, tmp_path / "out")]
    main(["merge", *arguments])
    said = capsys.readouterr().out
    assert "48 of 69 tensors merged" in said
    assert "% of the update survived rounding" in said
    assert "--rounding stochastic" in said
    main(["merge", *arguments[:2], str(tmp_path / "exact"), "--dtype", "float32"])
    assert "100.0 % of the update" in capsys.readouterr().out
    main(["merge", *arguments[:2], str(tmp_path / "seeded"), "--rounding", "stochastic", "--seed", "1"])
    assert changed(tensors_in(tmp_path / "seeded"), tensors_in(tmp_path / "out"))


def test_the_command_exits_with_two_and_one_line(tmp_path, capsys, monkeypatch):
    adapter, base = small_update(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(["merge", str(adapter), str(base), str(base)])
    assert exit.value.code == 2
    said = capsys.readouterr()
    assert said.err == f"lightning-moe merge: {base} is there already: name another folder or move it\n"
    stop_after(monkeypatch, 3, KeyboardInterrupt())
    with pytest.raises(SystemExit) as exit:
        main(["merge", str(adapter), str(base), str(tmp_path / "out")])
    assert exit.value.code == 130
    # rich ends a bar that it does not show with an empty line until 14.2.
    assert capsys.readouterr().err.lstrip() == "lightning-moe merge: interrupted; nothing is left of it\n"
    assert not (tmp_path / "out").exists()
