"""AdapterExport: folders at the end of a fit, and a description in checkpoints that needs no base model."""

import json

import pytest
import torch
from helpers.models import Tiny, gpt_oss, qwen3, with_attention_lora, with_expert_lora
from helpers.training import LIGHTNING_WARNINGS, fit, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file

from lightning_moe import AdapterExport, MoEGateGradCallback, export_adapter, verify_adapter
from lightning_moe.adapters.files import CONFIG, WEIGHTS
from lightning_moe.adapters.reference_logits import REFERENCE, ReferenceLogits
from lightning_moe.cli import main

pytestmark = LIGHTNING_WARNINGS


def expert_lora():
    return with_expert_lora(qwen3())


def has_same_tensors(one, other):
    ours, theirs = (load_file(folder / WEIGHTS) for folder in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def is_same_adapter(one, other):
    return has_same_tensors(one, other) and (one / CONFIG).read_text() == (other / CONFIG).read_text()


@pytest.mark.parametrize("layouts", [("fused",), ("per_expert",), ("fused", "per_expert")])
def test_writes_a_folder_for_each_layout(tmp_path, layouts):
    callback = AdapterExport(layouts)
    module = fit(tmp_path, Tiny(expert_lora), callback)
    names = {"fused": "adapter", "per_expert": "adapter_per_expert"}
    assert callback.folders == {layout: tmp_path / names[layout] for layout in layouts}
    for layout, folder in callback.folders.items():
        export_adapter(module, tmp_path / "wanted" / layout, layout)
        assert is_same_adapter(folder, tmp_path / "wanted" / layout)


def test_an_earlier_runs_adapter_stays(tmp_path):
    folders = []
    for _ in range(2):
        callback = AdapterExport()
        fit(tmp_path, Tiny(expert_lora), callback, max_steps=1)
        folders.append(callback.folders["fused"].name)
    assert folders == ["adapter", "adapter-1"]


def test_nothing_is_written_where_a_fit_fails(tmp_path):
    module, callback = Tiny(expert_lora), AdapterExport()
    module.training_step = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, module, callback)
    assert callback.folders == {}
    assert not list(tmp_path.glob("adapter*"))


def test_a_checkpoint_becomes_the_same_adapter_on_the_command_line(tmp_path, capsys):
    callback, saving = AdapterExport(), ModelCheckpoint(tmp_path, "last", every_n_train_steps=4)
    fit(tmp_path, Tiny(expert_lora), callback, saving, enable_checkpointing=True)
    main(["export", str(tmp_path / "last.ckpt"), str(tmp_path / "again")])
    assert is_same_adapter(tmp_path / "again", callback.folders["fused"])
    assert "fused adapter written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("build", "layouts", "words"),
    [
        (qwen3, ("fused",), "holds 0 PEFT models and must hold one"),
        (lambda: with_expert_lora(gpt_oss()), ("per_expert",), "layout is not known for the model type"),
    ],
)
def test_an_adapter_that_cannot_be_written_is_an_error_before_training(tmp_path, build, layouts, words):
    module = Tiny(build)
    with pytest.raises(MisconfigurationException, match=words):
        trainer(tmp_path, AdapterExport(layouts)).fit(module)
    assert module.losses == []


@pytest.mark.parametrize("layouts", ["fused", ["square"]])
def test_a_layout_that_does_not_exist_is_an_error(layouts):
    with pytest.raises(MisconfigurationException, match="layouts must be a list of fused, per_expert"):
        AdapterExport(layouts)


def test_a_model_without_expert_adapters_has_one_too(tmp_path):
    callback = AdapterExport(("fused", "per_expert"))
    fit(tmp_path, Tiny(lambda: with_attention_lora(qwen3())), callback, max_steps=1)
    assert has_same_tensors(*callback.folders.values())
    configs = [json.loads((folder / CONFIG).read_text()) for folder in callback.folders.values()]
    for config in configs:
        config["target_modules"].sort()  # PEFT writes a set
    assert {name for name in configs[1] if (configs[0][name] or None) != (configs[1][name] or None)} == {
        "init_lora_weights"
    }


# The trained model's logits


def in_bfloat16():
    model = with_expert_lora(qwen3().bfloat16())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return model


def test_the_trained_models_logits_are_kept_beside_each_adapter(tmp_path):
    callback = AdapterExport(("fused", "per_expert"))
    fit(tmp_path, Tiny(expert_lora), MoEGateGradCallback(), callback)
    for folder in callback.folders.values():
        found = verify_adapter(folder, qwen3())
        assert found.ok
        assert found.error < found.tolerance < 0.1 < found.effect
    untrained = verify_adapter(
        callback.folders["fused"], qwen3(), reference=keep(tmp_path / "untrained", expert_lora())
    )
    assert untrained.outcome == "differs"  # they are those of the end of training


def keep(folder, model):
    folder.mkdir()
    ReferenceLogits.compute(model).save(folder)
    return folder


def test_they_are_computed_in_the_trainers_precision(tmp_path):
    callback = AdapterExport()
    fit(tmp_path, Tiny(in_bfloat16), callback, precision="bf16-mixed")
    assert ReferenceLogits.read(callback.folders["fused"]).dtype == torch.bfloat16
    assert verify_adapter(callback.folders["fused"], qwen3().bfloat16()).ok


class Modes(Callback):
    """Whether each module trains, and each parameter."""

    def on_train_start(self, trainer, pl_module):
        pl_module.network.base_model.model.lm_head.eval()

    def on_train_end(self, trainer, pl_module):
        self.seen = [m.training for m in pl_module.modules()], [p.requires_grad for p in pl_module.parameters()]


def test_the_model_is_left_as_it_was(tmp_path):
    before, after = Modes(), Modes()
    fit(tmp_path, Tiny(expert_lora), before, AdapterExport(), after)
    assert after.seen == before.seen
    assert {True, False} == set(after.seen[0]) == set(after.seen[1])


def test_a_model_that_cannot_compute_them_loses_nothing(tmp_path):
    class Refuses(Callback):
        def on_train_end(self, trainer, pl_module):
            pl_module.network.base_model.model.model.forward = lambda *_, **__: 1 / 0

    module, callback = Tiny(expert_lora), AdapterExport()
    with pytest.warns(UserWarning, match="adapter is written, but the trained model's logits could not be kept"):
        fit(tmp_path, module, Refuses(), callback)
    assert (callback.folders["fused"] / WEIGHTS).is_file()
    assert not (callback.folders["fused"] / REFERENCE).exists()
    assert module.network.training


@pytest.mark.parametrize("reason", ["strategy", "shards", "experts"])
def test_they_are_not_computed_where_that_takes_all_ranks(tmp_path, monkeypatch, caplog, reason):
    names = {"strategy": "is_strategy", "shards": "is_sharded", "experts": "is_expert_parallel"}
    callback = AdapterExport()
    module = Tiny(expert_lora)
    monkeypatch.setattr(f"lightning_moe.callbacks.adapter_export.{names[reason]}", lambda *_: reason != "strategy")
    fit(tmp_path, module, callback)
    assert (callback.folders["fused"] / WEIGHTS).is_file()
    assert not (callback.folders["fused"] / REFERENCE).exists()
    assert "logits are not kept, since it may take all ranks" in caplog.text
