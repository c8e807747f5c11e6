"""Verification: a right adapter is said to be right, and each kind of wrong one is told, with its numbers."""

import json

import pytest
import torch
from helpers.models import (
    gpt_oss,
    mixtral,
    qwen3,
    qwen3_config,
    tokens,
    with_attention_lora,
    with_expert_lora,
)
from helpers.reference import relative_error
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lightning_moe import export_adapter, gategrad, quantize_experts, verify_adapter
from lightning_moe.adapters import reference_logits
from lightning_moe.adapters.files import CONFIG, WEIGHTS
from lightning_moe.adapters.reference_logits import MAX_VOCABULARY, NUM_TOKENS, REFERENCE, ReferenceLogits
from lightning_moe.cli import main

LAYOUTS = ["fused", "per_expert"]


def trained(build=qwen3, *, attention=True, scale=1.0):
    """A model with adapters on its experts, as after training; `scale` is how large they are."""
    model = with_expert_lora(build(), attention=attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(scale)
    return model


def export(folder, model, layout="fused"):
    """An adapter's folder as AdapterExport leaves it."""
    export_adapter(model, folder, layout)
    ReferenceLogits.compute(model).save(folder)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A right adapter in each layout, not to be changed, and a base's folder."""
    folder = tmp_path_factory.mktemp("exported")
    for layout in LAYOUTS:
        export(folder / layout, trained(), layout)
    qwen3().save_pretrained(folder / "base")
    return folder


# What is right


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("build", [qwen3, mixtral])
def test_a_right_adapter_computes_as_the_trained_model(tmp_path, build, layout):
    found = verify_adapter(export(tmp_path / "adapter", trained(build), layout), build())
    assert found.ok
    assert str(found).startswith("yes, it computes as the trained model: its logits are off by ")
    assert found.error < 1e-6 < found.tolerance == 1e-5 < 0.1 < found.effect  # so that no other result would pass
    assert found.share == pytest.approx(1, abs=1e-4)


def test_a_family_that_has_the_fused_layout_only(tmp_path):
    model = with_expert_lora(gpt_oss())
    found = verify_adapter(export(tmp_path / "adapter", model), gpt_oss())
    assert found.ok
    assert found.error < 1e-6 < 0.1 < found.effect


def test_an_adapter_on_attention_alone(tmp_path):
    found = verify_adapter(export(tmp_path / "adapter", with_attention_lora(qwen3())), qwen3())
    assert found.ok
    assert found.effect > 0.1


def test_the_patched_models_logits_are_kept_as_well(tmp_path):
    model = trained()
    with gategrad(model):
        export(tmp_path / "adapter", model)
    assert verify_adapter(tmp_path / "adapter", qwen3()).ok


def test_a_base_is_named_by_its_folder(exported):
    found = verify_adapter(exported / "fused", exported / "base")
    assert found.ok
    assert found.dtype == torch.float32
    coarse = verify_adapter(exported / "fused", exported / "base", dtype=torch.bfloat16)
    assert coarse.ok
    assert coarse.dtype == torch.bfloat16
    assert coarse.error > 100 * found.error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_adapter_trained_in_bfloat16(tmp_path, dtype):
    export(tmp_path / "adapter", trained(lambda: qwen3().bfloat16()))
    found = verify_adapter(tmp_path / "adapter", qwen3().bfloat16().to(dtype))
    assert found.ok
    assert found.dtype == torch.bfloat16
    assert found.error < found.tolerance < 0.1 * found.effect
    assert dtype == torch.bfloat16 or found.error > 1e-3  # more than float32 would be allowed


# What is wrong


def damage(exported, tmp_path, layout, change=lambda tensors: None, **options):
    """A copy of a right adapter in which something is not."""
    folder = tmp_path / "damaged"
    (folder / REFERENCE).parent.mkdir(parents=True)
    tensors = load_file(exported / layout / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    config = json.loads((exported / layout / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | options))
    (folder / REFERENCE).write_bytes((exported / layout / REFERENCE).read_bytes())
    return folder


def permute_experts(tensors):
    for key in [key for key in tensors if ".layers.1.mlp.experts." in key]:
        if ".experts.0." in key:  # per_expert
            other = key.replace(".experts.0.", ".experts.1.")
            tensors[key], tensors[other] = tensors[other], tensors[key]
        elif ".experts.lora_B" in key:  # fused: (out, r·E), rank by rank
            out, _ = tensors[key].shape
            tensors[key] = tensors[key].view(out, -1, 8).roll(1, 2).reshape(out, -1).contiguous()


def drop_one_factor(tensors):
    """Of one expert in one layer, its down projection's B."""
    for key, tensor in tensors.items():
        if key.endswith(".layers.1.mlp.experts.3.down_proj.lora_B.weight"):
            tensor.zero_()
        if key.endswith(".layers.1.mlp.experts.lora_B.weight"):
            tensor[:, 3::8] = 0


def drop_the_experts(tensors):
    for key, tensor in tensors.items():
        if ".experts." in key and ".lora_B." in key:
            tensor.zero_()


def drop_all(tensors):
    for key, tensor in tensors.items():
        if ".lora_B." in key:
            tensor.zero_()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("change", [permute_experts, drop_one_factor, drop_the_experts])
def test_wrong_tensors_are_told(exported, tmp_path, change, layout):
    found = verify_adapter(damage(exported, tmp_path, layout, change), qwen3())
    assert found.outcome == "differs"
    assert not found.ok
    assert found.error > 100 * found.tolerance
    assert found.largest > 0
    assert 0 <= found.token < NUM_TOKENS
    assert "no, it differs from the trained model (qwen3_moe): its logits are off by " in str(found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_wrong_scaling_is_told_with_what_is_there(exported, tmp_path, layout):
    found = verify_adapter(damage(exported, tmp_path, layout, lora_alpha=4), qwen3())  # 8 is right
    assert found.outcome == "differs"
    assert 0.2 < found.share < 0.9
    assert f"{found.share:.0%} of the adapter's effect is there" in str(found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_lost_adapter_is_told(exported, tmp_path, layout):
    found = verify_adapter(damage(exported, tmp_path, layout, drop_all), qwen3())
    assert found.outcome == "lost"
    assert found.error == pytest.approx(found.effect, rel=1e-4)
    assert found.share == pytest.approx(0, abs=1e-4)
    assert str(found).startswith("no, the adapter is lost, it computes as the base without it")


def test_an_adapter_that_peft_finds_no_tensor_of_is_told(exported, tmp_path):
    def rename(tensors):
        for key in list(tensors):
            tensors[key.replace("base_model.model.model.", "base_model.model.")] = tensors.pop(key)

    folder = damage(exported, tmp_path, "fused", rename, init_lora_weights=True)
    with pytest.warns(UserWarning, match="Found missing adapter keys"):
        assert verify_adapter(folder, qwen3()).outcome == "lost"


def test_another_base_is_told(exported):
    other = qwen3()
    torch.nn.init.normal_(other.model.layers[0].mlp.experts.down_proj, std=0.02)
    found = verify_adapter(exported / "fused", other)
    assert found.outcome == "other_base"
    assert found.base_error > 1e-4
    assert "no, the base is not the one that was trained on (qwen3_moe): without an adapter" in str(found)


def test_logits_that_are_not_finite_are_no_success(exported, tmp_path):
    def spoil(tensors):
        tensors[next(iter(tensors))][0] = torch.nan

    assert verify_adapter(damage(exported, tmp_path, "fused", spoil), qwen3()).outcome == "differs"


@pytest.mark.parametrize(("dtype", "scale", "outcome"), [
    (torch.bfloat16, 1e-3, "undecided"), (torch.bfloat16, 1.0, "same"),
    (torch.float32, 1e-3, "same"), (torch.float32, 1e-7, "undecided"),
])  # fmt: skip
def test_an_effect_as_small_as_rounding_cannot_be_told(tmp_path, dtype, scale, outcome):
    export(tmp_path / "adapter", trained(lambda: qwen3().to(dtype), scale=scale))
    found = verify_adapter(tmp_path / "adapter", qwen3().to(dtype))
    assert found.outcome == outcome
    assert found.ok == (outcome == "same")
    assert ("it cannot be told" in str(found)) == (outcome == "undecided")


# A quantized base


def wide(**options):
    return qwen3(hidden_size=64, moe_intermediate_size=64, **options)


def in_mxfp4():
    model = wide()
    quantize_experts(model, "mxfp4")
    return model


def test_a_base_by_name_is_quantized_as_in_training(tmp_path):
    wide().save_pretrained(tmp_path / "base")
    export(tmp_path / "adapter", trained(in_mxfp4))
    assert verify_adapter(tmp_path / "adapter", tmp_path / "base").ok
    dense = verify_adapter(tmp_path / "adapter", wide())
    assert dense.outcome == "other_format"
    assert "(qwen3_moe, experts in mxfp4), not equal to it: its experts are dense" in str(dense)
    assert dense.share == pytest.approx(1, abs=0.1)


# Merged models


def merge(folder, model, dtype=torch.float32):
    model.merge_and_unload().to(dtype).save_pretrained(folder)
    return folder


def test_a_merged_model_computes_as_the_trained_one(exported, tmp_path):
    folder = merge(tmp_path / "merged", trained())
    for base, tolerance in ((None, 1e-4), (exported / "base", 1e-5)):
        found = verify_adapter(folder, base, reference=exported / "fused")
        assert found.ok
        assert found.error < 1e-6 < found.tolerance == tolerance < 0.1 < found.effect
    coarse = verify_adapter(merge(tmp_path / "coarse", trained(), torch.bfloat16), reference=exported / "fused")
    assert coarse.ok
    assert 1e-3 < coarse.error < coarse.tolerance == 0.1


def test_wrong_merged_models_are_told(exported, tmp_path):
    assert verify_adapter(exported / "base", reference=exported / "fused").outcome == "lost"
    without_attention = merge(tmp_path / "merged", trained(attention=False))
    found = verify_adapter(without_attention, reference=exported / "fused")
    assert found.outcome == "differs"
    assert found.error > 100 * found.tolerance


# What cannot be compared


def test_what_is_missing_is_named(exported, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds neither an adapter \(adapter_config.json\) nor a model"):
        verify_adapter(tmp_path / "empty", qwen3())
    with pytest.raises(ValueError, match="holds an adapter: name the base"):
        verify_adapter(exported / "fused")
    folder = damage(exported, tmp_path, "fused")
    (folder / REFERENCE).unlink()
    with pytest.raises(ValueError, match="has no reference/logits.safetensors, the trained model's logits"):
        verify_adapter(folder, qwen3())
    assert verify_adapter(folder, qwen3(), reference=exported / "fused").ok
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"lacks {WEIGHTS}"):
        verify_adapter(folder, qwen3())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (mixtral, "was trained on qwen3_moe, and this is mixtral"),
        (lambda: wide(), "PEFT cannot load .* onto this base: .*size mismatch"),
        (lambda: qwen3(vocab_size=32), "a larger vocabulary than the 32 entries"),
        (lambda: with_attention_lora(qwen3()).base_model.model, "has adapters on it: give it without"),
    ],
)
def test_a_base_that_does_not_fit_is_an_error(exported, build, message):
    with pytest.raises(ValueError, match=message):
        verify_adapter(exported / "fused", build())


def test_models_that_cannot_be_loaded_are_errors(exported, tmp_path):
    with pytest.raises(ValueError, match="Transformers cannot load .*nowhere"):
        verify_adapter(exported / "fused", tmp_path / "nowhere")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(qwen3_config().to_json_string())
    (tmp_path / "base" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="Transformers cannot load .*base"):
        verify_adapter(exported / "fused", tmp_path / "base")


@pytest.mark.parametrize("content", ["cut", "other"])
def test_damaged_reference_logits_are_an_error(exported, tmp_path, content):
    folder = damage(exported, tmp_path, "fused")
    if content == "cut":
        (folder / REFERENCE).write_bytes((folder / REFERENCE).read_bytes()[:100])
    else:
        tensors = load_file(folder / REFERENCE) | {"trained": torch.zeros(2, 3)}
        save_file(tensors, folder / REFERENCE, {"dtype": "float32"})
    with pytest.raises(ValueError, match=r"logits.safetensors is damaged: "):
        verify_adapter(folder, qwen3())


# What is kept


def test_computing_them_leaves_the_model_as_it_was():
    model = trained()
    model.train()
    model.base_model.model.lm_head.eval()
    frozen = next(parameter for name, parameter in model.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    before = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]
    wanted = model(input_ids=tokens()).logits
    first = ReferenceLogits.compute(model)
    assert ([module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]) == before
    assert torch.equal(model(input_ids=tokens()).logits, wanted)
    second = ReferenceLogits.compute(model)
    for name in ("input_ids", "vocabulary", "trained", "base"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert first.trained.shape == first.base.shape == (NUM_TOKENS, 64)
    model.eval()
    ids = first.input_ids
    with torch.no_grad():
        assert relative_error(first.trained, model(input_ids=ids).logits[0]) < 1e-6
        assert relative_error(first.base, qwen3()(input_ids=ids).logits[0]) < 1e-6
    assert relative_error(first.trained, first.base) > 0.1


def test_tokens_that_the_configuration_names_are_not_drawn():
    config = qwen3_config(vocab_size=8, eos_token_id=[1, 2], bos_token_id=3)
    input_ids, vocabulary = reference_logits._draw(config)
    assert set(input_ids.flatten().tolist()) == {4, 5, 6, 7}
    assert vocabulary.tolist() == list(range(8))
    _, some = reference_logits._draw(qwen3_config(vocab_size=3 * MAX_VOCABULARY))
    assert len(some.unique()) == MAX_VOCABULARY
    assert some.max() > 2 * MAX_VOCABULARY


def test_logits_that_are_not_finite_are_not_kept():
    model = trained()
    torch.nn.init.constant_(model.base_model.model.lm_head.weight, torch.inf)
    with pytest.raises(ValueError, match="not finite"):
        ReferenceLogits.compute(model)


def test_a_full_disk_leaves_no_part_of_them(tmp_path, monkeypatch):
    def fail(*_):
        raise SafetensorError("No space left")

    monkeypatch.setattr(reference_logits, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        ReferenceLogits.compute(trained()).save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_they_lie_where_no_reader_takes_them_for_weights(exported):
    """SGLang reads every *.safetensors file beside an adapter, and vLLM every one beside a model of one file."""
    assert [path.name for path in (exported / "fused").glob("*.safetensors")] == [WEIGHTS]
    assert (exported / "fused" / REFERENCE).is_file()


# The command


def test_the_command_says_yes_no_or_what_is_missing(exported, tmp_path, capsys):
    base = str(exported / "base")
    main(["verify", str(exported / "per_expert"), "--base", base])
    assert f"{exported / 'per_expert'}: yes, it computes as the trained model" in capsys.readouterr().out
    lost = damage(exported, tmp_path, "fused", drop_all)
    with pytest.raises(SystemExit, match="^1$"):
        main(["verify", str(lost), "--base", base, "--dtype", "bfloat16", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "no, the adapter is lost" in printed
    assert "rounding in bfloat16" in printed
    main(["verify", str(merge(tmp_path / "merged", trained())), "--reference", str(exported / "fused")])
    capsys.readouterr()
    with pytest.raises(SystemExit, match="^2$"):
        main(["verify", str(tmp_path / "nowhere"), "--base", base])
    assert capsys.readouterr().err.startswith(f"lightning-moe verify: {tmp_path / 'nowhere'} holds neither an adapter")
