"""Exported adapters in both layouts, from a model and from a checkpoint: PEFT reads them back bit for bit.

What the per_expert layout looks like to other readers is in test_per_expert.py.
"""

import json
import os
import warnings

import pytest
import torch
from helpers.models import (
    EXPERT_TARGETS,
    Tiny,
    expert_lora_config,
    mixtral,
    qwen3,
    tokens,
    with_attention_lora,
    with_expert_lora,
)
from helpers.reference import relative_error
from helpers.training import LIGHTNING_WARNINGS, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import JambaConfig, JambaForCausalLM

from lightning_moe import AdapterExport, MoEGateGradCallback, export_adapter, gategrad
from lightning_moe.adapters.export import describe_adapters, export_checkpoint
from lightning_moe.adapters.files import CHECKPOINT_KEY, CONFIG, WEIGHTS
from lightning_moe.cli import main

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pattern keys did not match"),  # PEFT's loader; they do match afterwards
    *LIGHTNING_WARNINGS,
]

LAYOUTS = ["fused", "per_expert"]
GATE_UP, DOWN = EXPERT_TARGETS
SUBSETS = {"gate_up": (GATE_UP,), "down": (DOWN,), "both": EXPERT_TARGETS}


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def reload(build, folder):
    """PEFT's own loading; it warns where a key is missing or left over, and here a warning is an error."""
    return PeftModel.from_pretrained(build(), str(folder))


def assert_same(actual, wanted, layout):
    """Bit by bit if PEFT multiplies the same matrices, as it does with the fused layout.

    Of the other it makes matrices of another width, with zeros: a processor may sum such a product in another order.
    Then each output is off by the rounding of one such sum, which the layers behind it hand on.
    """
    if layout == "fused":
        assert torch.equal(actual, wanted)
    else:
        assert actual.dtype == wanted.dtype
        assert relative_error(actual, wanted) <= 16 * torch.finfo(wanted.dtype).eps


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("targets", SUBSETS)
@pytest.mark.parametrize("build", [qwen3, mixtral])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "r": 3, "lora_alpha": 5}], ids=["lora", "rslora"])
def test_a_round_trip_through_peft_gives_the_same_outputs(tmp_path, build, targets, options, layout):
    model = with_expert_lora(build(), SUBSETS[targets], attention=True, **options)
    with gategrad(model):
        export_adapter(model, tmp_path / "adapter", layout)
    again = reload(build, tmp_path / "adapter")
    wanted = logits(model)
    assert_same(logits(again), wanted, layout)
    assert relative_error(logits(build()), wanted) > 0.01


def test_round_trip_of_a_bfloat16_adapter(tmp_path):
    model = with_expert_lora(qwen3().bfloat16())
    for layout in LAYOUTS:
        export_adapter(model, tmp_path / layout, layout)
        assert_same(logits(reload(lambda: qwen3().bfloat16(), tmp_path / layout)), logits(model), layout)
    assert relative_error(logits(qwen3().bfloat16()), logits(model)) > 0.2


def test_fused_layout_is_what_peft_writes(tmp_path):
    model = with_expert_lora(qwen3(), attention=True)
    model.save_pretrained(tmp_path / "peft")
    export_adapter(model, tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("ours", "peft"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert json.loads((tmp_path / "ours" / CONFIG).read_text()) == json.loads((tmp_path / "peft" / CONFIG).read_text())


def test_per_expert_layout_holds_a_pair_of_matrices_for_each_projection(tmp_path):
    model = with_expert_lora(qwen3(), attention=True)
    export_adapter(model, tmp_path, "per_expert")
    tensors = load_file(tmp_path / WEIGHTS)
    experts = {key: tensor for key, tensor in tensors.items() if ".experts." in key}
    assert len(experts) == 2 * 8 * 3 * 2
    prefix = "base_model.model.model.layers.1.mlp.experts.5"
    wrapper = model.base_model.model.model.layers[1].mlp.experts
    assert torch.equal(experts[f"{prefix}.down_proj.lora_A.weight"], wrapper.lora_A["default"].weight[20:24])
    assert torch.equal(experts[f"{prefix}.down_proj.lora_B.weight"], wrapper.lora_B["default"].weight[:, 5::8])
    b = wrapper.base_layer.lora_B["default"].weight[:, 5::8]
    assert torch.equal(experts[f"{prefix}.gate_proj.lora_B.weight"], b[:16])
    assert torch.equal(experts[f"{prefix}.up_proj.lora_B.weight"], b[16:])
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "q_proj", "up_proj", "v_proj"]
    assert config["target_parameters"] is None
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (4, 8, True)


def test_per_expert_layout_has_mixtrals_names_before_fusion(tmp_path):
    export_adapter(with_expert_lora(mixtral()), tmp_path, "per_expert")
    keys = load_file(tmp_path / WEIGHTS)
    assert "base_model.model.model.layers.0.block_sparse_moe.experts.7.w3.lora_A.weight" in keys


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_of_modules_to_save_and_of_attention_lora(tmp_path, layout):
    config = expert_lora_config(attention=True, modules_to_save=["lm_head"])
    model = get_peft_model(qwen3(), config)
    nn.init.normal_(model.base_model.model.lm_head.modules_to_save["default"].weight)
    export_adapter(model, tmp_path / "both", layout)
    assert_same(logits(reload(qwen3, tmp_path / "both")), logits(model), layout)
    model = with_attention_lora(qwen3())
    export_adapter(model, tmp_path / "attention", layout)
    assert torch.equal(logits(reload(qwen3, tmp_path / "attention")), logits(model))


# From a checkpoint


class AdapterOnly(Tiny):
    """Saves and loads the adapter only, as the recipe does."""

    def __init__(self, **options):
        super().__init__(build=lambda: with_expert_lora(qwen3(), attention=True), **options)
        self.strict_loading = False

    def on_save_checkpoint(self, checkpoint):
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}


def train(folder, module, *callbacks, **options):
    saving = ModelCheckpoint(folder, save_last=True)
    callbacks = [MoEGateGradCallback(), AdapterExport(), saving, *callbacks]
    trainer(folder, *callbacks, max_steps=3, enable_checkpointing=True, **options).fit(module)
    return folder / "last.ckpt"


def test_load_train_export_reload_and_generate(tmp_path):
    """One life of an expert adapter, on the tiny model."""
    module = AdapterOnly(learning_rate=0.5)
    before = logits(module.network)
    module.network.train()
    checkpoint = train(tmp_path, module)
    trained = logits(module.network)
    assert not torch.allclose(trained, before, atol=1e-3)

    prompt = tokens(1, 4)
    generation = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = module.network.generate(input_ids=prompt, **generation)
    for layout in LAYOUTS:
        main(["export", str(checkpoint), str(tmp_path / layout), "--layout", layout])
        model = reload(qwen3, tmp_path / layout)
        assert_same(logits(model), trained, layout)
        assert torch.equal(model.generate(input_ids=prompt, **generation), expected)
        with gategrad(model) as report:
            assert not report.merging
            assert torch.allclose(logits(model), trained, atol=1e-5)
            assert torch.equal(model.generate(input_ids=prompt, **generation), expected)

    again = PeftModel.from_pretrained(qwen3(), str(tmp_path / "fused"), is_trainable=True)
    resumed = Tiny(build=lambda: again)
    train(tmp_path / "again", resumed)
    assert not torch.allclose(logits(again), trained, atol=1e-4)


def test_export_of_a_checkpoint_equals_that_of_the_model(tmp_path):
    module = AdapterOnly()
    checkpoint = train(tmp_path, module)
    for layout in LAYOUTS:
        export_checkpoint(checkpoint, tmp_path / "a" / layout, layout)
        export_adapter(module, tmp_path / "b" / layout, layout)
        for name in (WEIGHTS, CONFIG):
            assert (tmp_path / "a" / layout / name).read_bytes() == (tmp_path / "b" / layout / name).read_bytes()


def with_options(name="default", base=qwen3, **options):
    def build():
        torch.manual_seed(1)
        config = expert_lora_config(attention=True)
        for key, value in options.items():
            setattr(config, key, value)
        return get_peft_model(base(), config, adapter_name=name)

    return build


def tied():
    return qwen3(tie_word_embeddings=True)


def with_attention_bias():
    return qwen3(attention_bias=True)


# What belongs to an adapter is PEFT's to say, whatever the adapter's name and kind.
KINDS = {
    **{f"named_{name}": with_options(name) for name in ("experts", "mlp", "q_proj", "base_layer", "0", "lora_A")},
    "embedding": with_options(target_modules={"q_proj", "embed_tokens"}),
    "bias": with_options(base=with_attention_bias, bias="lora_only"),
    "trainable_tokens": with_options(trainable_token_indices=[1, 3]),
    "modules_to_save": with_options(modules_to_save=["lm_head", "gate"]),
    "pattern": with_options(target_modules=r".*\.(q|o)_proj"),
    "tied": with_options(base=tied, modules_to_save=["embed_tokens"]),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.filterwarnings("ignore:Could not find a config file")
@pytest.mark.parametrize("kind", KINDS)
def test_any_kind_of_adapter_exports_from_a_checkpoint_as_from_the_model(tmp_path, kind):
    module = Tiny(build=KINDS[kind])
    content = {"state_dict": module.state_dict()}
    content[CHECKPOINT_KEY] = describe_adapters(module, content["state_dict"])
    torch.save(content, tmp_path / "last.ckpt")
    export_adapter(module, tmp_path / "model")
    export_checkpoint(tmp_path / "last.ckpt", tmp_path / "checkpoint")
    ours, wanted = (load_file(tmp_path / name / WEIGHTS) for name in ("checkpoint", "model"))
    if kind != "embedding":  # PEFT then saves the embedding's own weight as well
        assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[key], wanted[key]) for key in ours)
    assert sum(".mlp.experts." in key for key in ours) == 2 * 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keys_of_compiled_layers_are_pefts(tmp_path, layout):
    model = with_expert_lora(qwen3(), attention=True)
    want = logits(model)
    layers = model.base_model.model.model.layers
    layers[0] = torch.compile(layers[0], backend="eager")
    module = Tiny(build=lambda: model)
    content = {"state_dict": module.state_dict()}
    torch.save(content | {CHECKPOINT_KEY: describe_adapters(module, content["state_dict"])}, tmp_path / "last.ckpt")
    export_adapter(module, tmp_path / "model", layout)
    export_checkpoint(tmp_path / "last.ckpt", tmp_path / "checkpoint", layout)
    for name in ("model", "checkpoint"):
        assert_same(logits(reload(qwen3, tmp_path / name)), want, layout)


def test_per_expert_layout_warns_of_a_family_that_peft_would_misread(tmp_path):
    model = with_expert_lora(jamba(), ("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"))
    with pytest.warns(UserWarning, match="PEFT on Transformers 5 has no table for 'jamba' and would misread"):
        export_adapter(model, tmp_path, "per_expert")
    assert any(".feed_forward.experts.0.up_proj.lora_A.weight" in key for key in load_file(tmp_path / WEIGHTS))


def jamba():
    config = JambaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_experts=4, attn_layer_period=1, attn_layer_offset=0, use_mamba_kernels=False,
        expert_layer_period=1, expert_layer_offset=0,
    )  # fmt: skip
    return JambaForCausalLM(config)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train(tmp_path_factory.mktemp("run"), AdapterOnly())


def changed(checkpoint, tmp_path, change):
    content = torch.load(checkpoint, weights_only=True)
    change(content)
    torch.save(content, tmp_path / "changed.ckpt")
    return tmp_path / "changed.ckpt"


def drop_one(content):
    del content["state_dict"][next(key for key in content["state_dict"] if "layers.1.mlp.experts.lora_B" in key)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("state_dict"), "lacks 'state_dict': it is not a Lightning checkpoint"),
        (
            lambda content: content.pop(CHECKPOINT_KEY),
            "saved without the callback AdapterExport",
        ),
        (drop_one, r"lacks 1 of the 16 tensors .* base_model.model.model.layers.1.mlp.experts.lora_B.weight"),
    ],
)
def test_a_checkpoint_that_lacks_something_is_an_error_that_names_it(checkpoint, tmp_path, change, message):
    path = changed(checkpoint, tmp_path, change)
    with pytest.raises(ValueError, match=message):
        export_checkpoint(path, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def entry(content):
    return content[CHECKPOINT_KEY]["default"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: entry(content).pop("config"),
        lambda content: entry(content).update(config="[]"),
        lambda content: entry(content).update(config=3),
        lambda content: entry(content).update(model_type=["qwen3_moe"]),
        lambda content: entry(content).update(tensors={}),
        lambda content: entry(content).update(tensors=None),
        lambda content: entry(content).update(experts=None),
        lambda content: entry(content).update(experts=[("path", "down_proj", 0)]),
        lambda content: entry(content).update(experts=[("path", "down_proj", "8")]),
        lambda content: content[CHECKPOINT_KEY].update(default=None),
        lambda content: content[CHECKPOINT_KEY].update(default="text"),
    ],
)
def test_a_damaged_description_is_an_error(checkpoint, tmp_path, damage):
    with pytest.raises(ValueError, match="its entry 'lightning_moe_adapters' is damaged"):
        export_checkpoint(changed(checkpoint, tmp_path, damage), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("experts", [[("elsewhere", "down_proj", 8)], [("model.layers.0.mlp.experts", "down_proj", 7)]])
def test_experts_missing_from_a_checkpoint_are_an_error(checkpoint, tmp_path, experts):
    path = changed(checkpoint, tmp_path, lambda content: entry(content).update(experts=experts))
    with pytest.raises(ValueError, match=f"experts of {experts[0][0]} are not there"):
        export_checkpoint(path, tmp_path / "adapter", "per_expert")


def test_unknown_fields_of_a_description_are_ignored(checkpoint, tmp_path):
    path = changed(checkpoint, tmp_path, lambda content: entry(content).update(more=1))
    export_checkpoint(path, tmp_path / "adapter")
    assert (tmp_path / "adapter" / WEIGHTS).exists()


def refused(arguments, capsys):
    """The one line that the command ends with, and the status of bad input."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("failing", ["save_file", "os.replace"])
def test_a_full_disk_leaves_nothing_behind(checkpoint, tmp_path, monkeypatch, failing, capsys):
    def fail(*_, **__):
        raise SafetensorError("No space left") if failing == "save_file" else OSError("No space left")

    monkeypatch.setattr(f"lightning_moe.adapters.files.{failing}", fail)
    assert "No space left" in refused(["export", str(checkpoint), str(tmp_path / "adapter")], capsys)
    assert not list((tmp_path / "adapter").iterdir())


def test_a_file_in_the_folders_place_is_an_error(checkpoint, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert "is a file: name a folder" in refused(["export", str(checkpoint), str(tmp_path / "file")], capsys)


def test_two_peft_models_are_an_error(tmp_path):
    both = nn.ModuleList([with_attention_lora(qwen3()), with_attention_lora(qwen3())])
    with pytest.raises(ValueError, match="holds 2 PEFT models and must hold one: pass the one"):
        export_adapter(both, tmp_path)
    assert describe_adapters(both, both.state_dict()) == {}


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state_dict": {"weight": torch.zeros(1)}, CHECKPOINT_KEY: Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="without running its code"):
        export_checkpoint(tmp_path / "evil.ckpt", tmp_path / "adapter")
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_checkpoints_are_errors(tmp_path):
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        export_checkpoint(tmp_path / "text.ckpt", tmp_path / "adapter")
    with pytest.raises(FileNotFoundError):
        export_checkpoint(tmp_path / "none.ckpt", tmp_path / "adapter")
    with pytest.raises(ValueError, match="consolidate_checkpoint"):
        export_checkpoint(tmp_path, tmp_path / "adapter")


def test_the_command_line_exits_with_the_reason(tmp_path, capsys, checkpoint):
    said = refused(["export", str(tmp_path / "none.ckpt"), str(tmp_path / "adapter")], capsys)
    assert said.startswith("lightning-moe export: ")
    assert "No such file" in said
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert "per_expert" in capsys.readouterr().out
    main(["export", str(checkpoint), str(tmp_path / "adapter"), "--layout", "per_expert"])
    assert "per_expert adapter written" in capsys.readouterr().out
    said = refused(["export", str(checkpoint), str(tmp_path / "adapter")], capsys)
    assert "holds adapter_model.safetensors and adapter_config.json already" in said


# What cannot be exported


def test_an_earlier_export_is_not_overwritten(tmp_path):
    model = with_expert_lora(qwen3())
    export_adapter(model, tmp_path)
    first = (tmp_path / WEIGHTS).read_bytes()
    with pytest.raises(FileExistsError, match="name another folder"):
        export_adapter(model, tmp_path, "per_expert")
    assert (tmp_path / WEIGHTS).read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


def several():
    model = with_expert_lora(qwen3())
    model.add_adapter("other", expert_lora_config(r=2))
    return model


def test_one_of_several_adapters_has_to_be_named(tmp_path):
    model = several()
    with pytest.raises(ValueError, match="has the adapters default, other: name one of them, not None"):
        export_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="not 'third'"):
        export_adapter(model, tmp_path, adapter="third")
    export_adapter(model, tmp_path / "other", "per_expert", adapter="other")
    model.set_adapter("other")
    assert_same(logits(reload(qwen3, tmp_path / "other")), logits(model), "per_expert")
    assert describe_adapters(model, model.state_dict()).keys() == {"default", "other"}


def test_a_model_without_an_adapter_and_an_unknown_layout_are_errors(tmp_path):
    with pytest.raises(ValueError, match="holds 0 PEFT models and must hold one"):
        export_adapter(qwen3(), tmp_path)
    with pytest.raises(ValueError, match="layout must be 'fused' or 'per_expert', not 'flat'"):
        export_adapter(with_expert_lora(qwen3()), tmp_path, "flat")
    assert describe_adapters(qwen3(), {}) == {}


# What is not to be trusted


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


HOSTILE_NAMES = ["../../outside", "/outside", "..", ".", "a/b", "", "CON", "outside\0", "C:outside"]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_an_adapters_name_is_no_path(checkpoint, tmp_path, name):
    def rename(content):
        content[CHECKPOINT_KEY] = {name: entry(content)}

    path = changed(checkpoint, tmp_path, rename)
    export_checkpoint(path, tmp_path / "x" / "y" / "adapter", "per_expert")
    at = "x/y/adapter"
    assert files_in(tmp_path) == ["changed.ckpt", "x", "x/y", at, f"{at}/{CONFIG}", f"{at}/{WEIGHTS}"]


def test_names_that_differ_by_case_are_two_adapters(checkpoint, tmp_path):
    def double(content):
        content[CHECKPOINT_KEY]["DEFAULT"] = entry(content) | {"config": '{"r": 1}'}

    path = changed(checkpoint, tmp_path, double)
    export_checkpoint(path, tmp_path / "lower", adapter="default")
    export_checkpoint(path, tmp_path / "upper", adapter="DEFAULT")
    assert json.loads((tmp_path / "lower" / CONFIG).read_text())["r"] == 4
    assert json.loads((tmp_path / "upper" / CONFIG).read_text())["r"] == 1
    with pytest.raises(ValueError, match="name one of them, not 'Default'"):
        export_checkpoint(path, tmp_path / "mixed", adapter="Default")


@pytest.mark.parametrize("leads_somewhere", [True, False])
@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_link_in_an_adapters_place_is_not_followed(tmp_path, name, leads_somewhere):
    outside, folder = tmp_path / "outside", tmp_path / "adapter"
    folder.mkdir()
    if leads_somewhere:
        outside.write_text("mine")
    (folder / name).symlink_to(outside)
    with pytest.raises(FileExistsError, match=f"holds {name} already"):
        export_adapter(with_attention_lora(qwen3()), folder)
    assert outside.read_text() == "mine" if leads_somewhere else not outside.exists()
    assert files_in(folder) == [name]


def test_files_are_written_where_no_link_can_lie(tmp_path, monkeypatch):
    folder, outside = tmp_path / "adapter", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    for name in (WEIGHTS, CONFIG):  # where they were written once
        (folder / f".{name}.partial").symlink_to(outside / name)
    places = []

    def save(tensors, path, metadata):
        places.append((path.parent.parent, path.parent.stat().st_mode & 0o777, list(path.parent.iterdir())))
        save_file(tensors, path, metadata)

    monkeypatch.setattr("lightning_moe.adapters.files.save_file", save)
    export_adapter(with_attention_lora(qwen3()), folder)
    assert places == [(folder, 0o700, [])]
    assert not any(outside.iterdir())
    assert all((folder / name).is_file() and not (folder / name).is_symlink() for name in (WEIGHTS, CONFIG))
