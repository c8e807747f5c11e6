"""The recipe as its users run it: the tiny configuration, from the command line's arguments to the files it leaves."""

import csv
import json
import os
import pickle
import signal
import sys
from pathlib import Path

import pytest
import qwen3_lora
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from lora import module
from lora.data import InstructionData
from lora.module import MoELoRA
from lora.sharding import FullyShardStrategy
from peft import PeftModel
from qwen3_lora import main

from lightning_moe import patch_moe

os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"  # Lightning's use of jsonargparse, not ours

PACKED = "--data.packing=bfd"
ONE = "--data.batch_size=1"
CONFIGS = Path(qwen3_lora.__file__).parent / "configs"

pytestmark = [
    *(pytest.mark.filterwarnings(f"ignore:{message}") for message in qwen3_lora.UNHELPFUL_WARNINGS),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),  # pytest's own arguments are in sys.argv
    pytest.mark.filterwarnings("ignore:.*log_every_n_steps"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    # Lightning asks torch for a scheduler's order in a way that torch warns about on a resume.
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"),
]


def fit(folder, *overrides, steps):
    """A short run of the tiny configuration that logs every step under `folder`; returns the command line's objects."""
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(folder), "name": "log"},
    }
    return main(
        ["fit", "--config", str(CONFIGS / "tiny.yaml"), f"--trainer.max_steps={steps}", f"--trainer.logger={logger}",
         "--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false", *overrides]
    )  # fmt: skip


def logged(folder, name, version=0):
    """The values of one column, in order."""
    with open(folder / "log" / f"version_{version}" / "metrics.csv") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """The answers of the twenty steps have their whole length; of the other runs nobody reads them to the end."""
    monkeypatch.setattr(module, "GENERATED_TOKENS", 4)


@pytest.fixture(scope="module")
def twenty_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("twenty")
    return folder, fit(folder, steps=20)


def test_losses_equal_those_without_the_callback(twenty_steps, tmp_path, monkeypatch):
    folder, _ = twenty_steps
    monkeypatch.setenv("LIGHTNING_MOE_GATEGRAD", "0")
    fit(tmp_path, steps=20)
    ours, baseline = logged(folder, "train/loss"), logged(tmp_path, "train/loss")
    assert len(ours) == len(baseline) == 20
    assert max(abs(a - b) for a, b in zip(ours, baseline, strict=True)) < 1e-4
    assert logged(folder, "gategrad/active_layers") == [4.0] * 20
    with open(tmp_path / "log" / "version_0" / "metrics.csv") as file:
        assert "gategrad" not in file.readline()


def test_two_runs_are_bit_identical_and_losses_fall(twenty_steps, tmp_path):
    folder, _ = twenty_steps
    fit(tmp_path, steps=20)
    losses = logged(folder, "train/loss")
    assert losses == logged(tmp_path, "train/loss")
    assert losses[-1] < losses[0] - 1.0


def test_logs_health_and_memory(twenty_steps):
    folder, _ = twenty_steps
    assert logged(folder, "gategrad/nonpositive_gates") == [0.0] * 20
    assert min(logged(folder, "gategrad/activations_mib_saved")) > 0
    assert min(logged(folder, "memory/peak_allocated_gib")) > 0
    kept = logged(folder, "memory/moe_activations_mib")[0]
    assert kept <= 0.45 * logged(folder, "memory/moe_activations_baseline_mib")[0]


def test_nothing_stays_patched(twenty_steps):
    _, cli = twenty_steps
    configs = {id(m.config) for m in cli.model.modules() if type(m).__name__ == "Qwen3MoeExperts"}
    assert configs == {id(cli.model.network.base_model.model.config)}


def test_resumed_losses_equal_the_uninterrupted_runs(twenty_steps, tmp_path):
    folder, _ = twenty_steps
    fit(tmp_path, "--trainer.val_check_interval=8", steps=8)
    checkpoint = tmp_path / "log" / "version_0" / "checkpoints" / "last.ckpt"
    fit(tmp_path, f"--ckpt_path={checkpoint}", steps=12)
    assert logged(tmp_path, "train/loss", version=0) == logged(folder, "train/loss")[:8]
    assert logged(tmp_path, "train/loss", version=1) == logged(folder, "train/loss")[8:12]


def test_options_count_beside_a_checkpoint_and_another_model_is_refused(twenty_steps, tmp_path):
    checkpoint = f"--ckpt_path={twenty_steps[0] / 'log' / 'version_0' / 'checkpoints' / 'last.ckpt'}"
    changed = ["--model.learning_rate=1e-5", "--model.checkpointing=full"]
    cli = fit(tmp_path, *changed, checkpoint, steps=21)
    assert [cli.model.hparams[name] for name in ("learning_rate", "checkpointing")] == [1e-5, "full"]
    with pytest.raises(ValueError, match=r"another model: model.alpha is 64 and was 32. Set it as it was"):
        fit(tmp_path, "--model.alpha=64", checkpoint, steps=22)


def test_misspelt_options_are_named_before_training(tmp_path):
    with pytest.raises(ValueError, match="model.target_modules names 'qproj'"):
        fit(tmp_path, "--model.target_modules=[qproj, v_proj]", steps=1)
    with pytest.raises(ValueError, match="model.architecture has num_expert,"):
        fit(tmp_path, "--model.architecture.num_expert=4", steps=1)


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "32-true"), ("bfloat16", "bf16-mixed")])
def test_an_interrupted_run_goes_on_with_the_losses_of_one_that_was_not(dtype, precision, tmp_path, monkeypatch):
    options = [f"--model.dtype={dtype}", f"--trainer.precision={precision}", "--trainer.accumulate_grad_batches=2",
               PACKED, ONE, "--data.max_length=64", "--model.architecture.num_hidden_layers=2"]  # fmt: skip
    fit(tmp_path / "whole", *options, steps=6)

    def interrupt(module, batch, batch_idx):
        if batch_idx == 6:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(MoELoRA, "on_train_batch_start", interrupt)
    with pytest.raises(SystemExit, match="130"):
        fit(tmp_path / "parts", *options, steps=6)
    monkeypatch.undo()
    checkpoint = tmp_path / "parts" / "log" / "version_0" / "checkpoints" / "interrupted-step=4.ckpt"
    fit(tmp_path / "parts", *options, f"--ckpt_path={checkpoint}", steps=6)
    whole = logged(tmp_path / "whole", "train/loss")
    assert logged(tmp_path / "parts", "train/loss", version=1) == whole[4:]
    assert len(set(whole)) == 6


def test_checkpoint_holds_the_adapter_only(twenty_steps):
    folder, cli = twenty_steps
    checkpoint = torch.load(folder / "log" / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
    trained = {name for name, parameter in cli.model.named_parameters() if parameter.requires_grad}
    assert set(checkpoint["state_dict"]) == trained
    assert not any("experts" in name for name in trained)


def test_adapter_folder_loads_with_peft(twenty_steps):
    folder, cli = twenty_steps
    tokens = torch.arange(40).view(1, 40)
    restored = PeftModel.from_pretrained(cli.model.build_base(), folder / "log" / "version_0" / "adapter").eval()
    with torch.no_grad():
        want = cli.model.network.eval()(tokens).logits
        bare = cli.model.build_base().eval()(tokens).logits
        assert torch.equal(restored(tokens).logits, want)
    assert not torch.allclose(bare, want)  # the adapter does something


@pytest.mark.filterwarnings("ignore:.*pattern keys did not match")  # PEFT's loader; they do match afterwards
@pytest.mark.filterwarnings("ignore:AdapterUpdateCheck. by step 10 some")  # a random router leaves experts idle
def test_with_adapters_on_the_experts(tmp_path, monkeypatch, capsys):
    layouts = tmp_path / "layouts.yaml"
    export = {"class_path": "lightning_moe.AdapterExport", "init_args": {"layouts": ["fused", "per_expert"]}}
    layouts.write_text(yaml.safe_dump({"trainer": {"callbacks+": [export]}}))
    options = ["--model.experts=true", f"--config={layouts}"]
    cli = fit(tmp_path / "ours", *options, steps=12)
    printed = capsys.readouterr().out
    on_experts = 4 * 16 * 16 * ((192 + 2 * 96) + (96 + 192))
    assert f"{on_experts:,}" in printed
    for words in ("PEFT adapter, fused", "PEFT adapter, per_expert"):
        assert words in printed
    summary = (tmp_path / "ours" / "log" / "version_0" / "report" / "summary.md").read_text()
    assert (
        summary.count("| verified | yes, it computes as the trained model: ") == 3
    )  # the configuration has one exporter of its own
    not_updated = logged(tmp_path / "ours", "adapters/experts_not_updated")
    assert len(not_updated) == 3  # from the tenth step on
    assert max(not_updated) <= 32

    run = tmp_path / "ours" / "log" / "version_0"
    tokens = torch.arange(40).view(1, 40)
    with torch.no_grad():
        want = cli.model.network.eval()(tokens).logits
        for name in ("adapter", "adapter_per_expert"):
            restored = PeftModel.from_pretrained(cli.model.build_base(), run / name).eval()
            assert torch.equal(restored(tokens).logits, want)
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert sum(".mlp.experts." in name for name in checkpoint["state_dict"]) == 4 * 4

    monkeypatch.setenv("LIGHTNING_MOE_GATEGRAD", "0")
    fit(tmp_path / "baseline", *options, steps=12)
    ours, baseline = (logged(tmp_path / name, "train/loss") for name in ("ours", "baseline"))
    assert max(abs(a - b) for a, b in zip(ours, baseline, strict=True)) < 1e-4
    assert baseline[-1] < baseline[0] - 1.0


@pytest.mark.filterwarnings("ignore:.*pattern keys did not match")  # PEFT's loader; they do match afterwards
def test_adapters_on_experts_and_router_are_exported_for_other_programs(tmp_path):
    layouts = tmp_path / "layouts.yaml"
    export = {"class_path": "lightning_moe.AdapterExport", "init_args": {"layouts": ["per_expert"]}}
    layouts.write_text(yaml.safe_dump({"trainer": {"callbacks+": [export]}}))
    cli = fit(tmp_path, "--model.experts=true", "--model.router=lora", f"--config={layouts}", steps=1)
    folder = tmp_path / "log" / "version_0" / "adapter_per_expert"
    assert "gate" in json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    tokens = torch.arange(40).view(1, 40)
    with torch.no_grad():
        restored = PeftModel.from_pretrained(cli.model.build_base(), folder).eval()
        want = cli.model.network.eval()(tokens).logits
        assert torch.allclose(restored(tokens).logits, want, atol=1e-5)
        assert not torch.allclose(cli.model.build_base().eval()(tokens).logits, want, atol=1e-4)


# The same program through each option: what the summary says of it, and that the losses are the baseline's.
OPTIONS = {
    "router trained, with its loss": (
        ["--model.router=trained", "--model.router_aux_loss=0.01"], "trained in full, load-balancing loss x 0.01"
    ),
    "router with LoRA": (["--model.router=lora", "--model.rank=4"], "LoRA of rank 4"),
    "each layer recomputed, tiled": (["--model.checkpointing=full", "--model.tile_tokens=64"], "each layer"),
    "all but attention recomputed": (["--model.checkpointing=selective"], "each layer but attention"),
    "what fits": (["--model.checkpointing=auto"], "each layer but attention"),
    "sdpa": (["--model.attention=sdpa", "--model.checkpointing=auto"], "| recomputed in backward | each layer |"),
    "eager attention, no packing": (["--model.attention=eager", "--data.packing=none", "--data.batch_size=2"], "eager"),
    "wrapped": (["--data.packing=wrapped"], "packs of 256 tokens, 100.0% full"),
    "whole loss": (["--data.assistant_only_loss=false", "--data.long_documents=skip",
                    "--data.max_length=80"], "are left out"),
}  # fmt: skip


# Of which the baseline has its own; options with none of these share one baseline.
PLAIN = {"--model.checkpointing": "none", "--model.tile_tokens": "0", "--model.attention": "sdpa"}


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """The losses of three steps without the callback, with the options but for the recipe's own ways to save."""
    known = {}

    def losses(*options):
        kept = tuple(option for option in options if option.partition("=")[0] not in PLAIN)
        if kept not in known:
            folder = tmp_path_factory.mktemp("baseline")
            plain = [f"{name}={value}" for name, value in PLAIN.items()]
            fit(folder, *kept, *plain, "--trainer.callbacks=null", steps=3)
            known[kept] = logged(folder, "train/loss")
        return known[kept]

    return losses


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_trains_as_the_baseline_does(name, baseline, tmp_path, capsys):
    options, words = OPTIONS[name]
    options = [PACKED, ONE, *options]
    fit(tmp_path, *options, steps=3)
    summary = (tmp_path / "log" / "version_0" / "report" / "summary.md").read_text()
    assert words in summary + capsys.readouterr().out
    ours = logged(tmp_path, "train/loss")
    assert ours == pytest.approx(baseline(*options), abs=1e-4)
    assert len(set(ours)) == 3
    assert f"{ours[0]:.4f} → {ours[2]:.4f}" in summary
    assert logged(tmp_path, "gategrad/active_layers") == [4.0] * 3


def test_chats_from_a_file_and_a_base_from_a_folder(tmp_path, capsys):
    cli = fit(tmp_path / "random", steps=1)
    cli.model.build_base().save_pretrained(tmp_path / "base")
    turns = [{"role": "user", "content": "Say {}."}, {"role": "assistant", "content": "{}!"}]
    chats = [[turn | {"content": turn["content"].format(number)} for turn in turns] for number in range(30)]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"messages": messages}) for messages in chats))
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role[0] + ':' + m.content + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    options = ["--model.init=pretrained", f"--model.name={tmp_path / 'base'}", f"--data.source={path}"]
    options += [
        f"--data.chat_template={template}",
        "--data.packing=bfd",
        "--data.assistant_only_loss=false",
        "--model.modules_to_save=[]",
    ]
    fit(tmp_path / "chats", *options, "--data.batch_size=1", "--data.max_length=64", steps=4)
    printed = capsys.readouterr().out
    assert "30 documents of 30" in printed
    summary = (tmp_path / "chats" / "log" / "version_0" / "report" / "summary.md").read_text()
    assert str(tmp_path / "base") in summary
    assert "u:Say 0." in summary


def test_of_a_long_prompt_the_end_is_answered(twenty_steps, monkeypatch):
    _, cli = twenty_steps
    seen = []
    generate = cli.model.network.generate
    monkeypatch.setattr(cli.model.network, "generate", lambda **a: seen.append(a["input_ids"]) or generate(**a))
    end = "y" * cli.datamodule.max_length
    answers = [cli.model.generate(cli.datamodule, prompt) for prompt in ("x" * 1000 + end, end)]
    assert seen[0].shape[1] == cli.datamodule.max_length
    assert torch.equal(*seen)
    assert answers[0] == answers[1]


def test_lightnings_move_to_the_host_moves_nothing():
    module = MoELoRA(architecture={})
    module.large = torch.nn.Linear(2, 2, device="meta")
    assert module.cpu() is module
    assert module.large.weight.is_meta


def test_rounding_precision_is_refused(tmp_path):
    with pytest.raises(ValueError, match="set --trainer.precision bf16-mixed and --model.dtype bfloat16"):
        fit(tmp_path, "--trainer.precision=bf16-true", steps=1)


def test_without_a_logger_the_working_directory_stays_clean(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = str(CONFIGS / "tiny.yaml")
    main(["fit", "--config", tiny, "--trainer.logger=false", "--trainer.callbacks=null", "--trainer.max_steps=1"])
    assert os.listdir(tmp_path) == ["runs"]


def test_weights_that_are_not_there_are_named_before_training(tmp_path):
    with pytest.raises(ValueError, match="lacks weights: model.safetensors"):
        fit(tmp_path, "--model.init=pretrained", f"--model.name={tmp_path}", steps=1)


def test_a_report_is_left(twenty_steps):
    folder, _ = twenty_steps
    summary = (folder / "log" / "version_0" / "report" / "summary.md").read_text()
    for words in (
        "tokens per second",
        "most loaded expert",
        "| varlen, scaled_dot_product",
        "| verified | yes, it computes as the trained model: ",
        "--ckpt_path",
        "](../expert_load.png)",
    ):
        assert words in summary


def test_throughput_rate_and_gradients_are_logged(twenty_steps):
    folder, _ = twenty_steps
    for name in ("train/device/items_per_sec", "lr-AdamW", "train/grad_norm", "moe/load_max_over_mean"):
        assert min(logged(folder, name)) > 0


def test_summary_shows_what_a_user_looks_for(tmp_path, capsys):
    fit(tmp_path, steps=2)
    printed = capsys.readouterr().out
    for words in ("loss, first and last", "peak memory", "MoE activations, baseline and now",
                  "answer before", "answer after", "CSVLogger", "PEFT adapter", "parameters that train"):  # fmt: skip
        assert words in printed


def test_without_arguments_runs_the_tiny_configuration(monkeypatch):
    seen = {}
    monkeypatch.setattr(qwen3_lora, "LightningCLI", lambda *_, **kwargs: seen.update(kwargs))
    monkeypatch.setattr(sys, "argv", ["qwen3_lora.py"])
    main()
    assert seen["args"] == ["fit", "--config", str(CONFIGS / "tiny.yaml")]


def test_help_lists_the_options(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--help"])
    printed = capsys.readouterr().out
    assert "--model.rank" in printed
    assert "--data.batch_size" in printed


def test_wrong_key_is_named(tmp_path, capsys):
    config = tmp_path / "wrong.yaml"
    config.write_text((CONFIGS / "tiny.yaml").read_text().replace("  rank: 16", "  rnak: 16"))
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", str(config)])
    assert "rnak" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [
        "model.rank=0", "model.learning_rate=-1", "model.warmup_steps=-1", "model.tile_tokens=-1", "model.dtype=half",
        "data.batch_size=0", "data.max_length=0", "data.validation_every=1", "data.packing=seperate",
        "data.long_documents=cut",
    ],
)  # fmt: skip
def test_options_out_of_range(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", str(CONFIGS / "tiny.yaml"), f"--{option}"])
    error = capsys.readouterr().err
    assert option.partition("=")[0] in error
    assert option.partition("=")[2] in error


def test_options_that_do_not_go_together():
    with pytest.raises(ValueError, match="set model.name"):
        MoELoRA({}, init="pretrained")
    with pytest.raises(ValueError, match="set --model.checkpointing auto"):
        MoELoRA({}, offload=True, checkpointing="none")
    with pytest.raises(ValueError, match="varlen, not of 'sdpa': set --model.checkpointing full"):
        MoELoRA({}, checkpointing="selective", attention="sdpa")


def parse(*names):
    """The objects of configurations one on top of the other, without a hub and without a GPU."""
    configs = [f"--config={CONFIGS / name}.yaml" for name in names]
    return LightningCLI(
        MoELoRA, InstructionData, run=False,
        args=[*configs, "--model.init=random", "--data.tokenizer=null", "--trainer.accelerator=cpu"],
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:GPU available but not used")
@pytest.mark.parametrize("name", ["tiny", "qwen3_30b_a3b"])
def test_the_fsdp_overlay_changes_devices_and_strategy_alone(name):
    one, several = parse(name), parse(name, "fsdp")
    assert isinstance(several.trainer.strategy, FullyShardStrategy)
    assert several.trainer.num_devices == several.trainer.strategy.num_processes == 2
    configs = [cli.config.as_dict() for cli in (one, several)]
    strategies = [config["trainer"].pop("strategy") for config in configs]
    devices = [config["trainer"].pop("devices") for config in configs]
    assert strategies[0] == "auto"
    assert (strategies[1]["init_args"]["num_ranks"], *devices) == (2, 1, 2)
    for config in configs:
        config.pop("config")
    assert str(configs[0]) == str(configs[1])
    kinds = [[type(callback) for callback in cli.trainer.callbacks] for cli in (one, several)]
    assert kinds[0] == kinds[1]


@pytest.mark.filterwarnings("ignore:GPU available but not used")
def test_large_configuration_builds_on_the_meta_device():
    cli = parse("qwen3_30b_a3b")
    cli.model.hparams["checkpointing"] = "full"  # `auto` asks the trainer for the length of the data
    cli.model.to("meta")
    cli.model.configure_model()
    network = cli.model.network
    base = sum(p.numel() for name, p in network.named_parameters() if "lora_" not in name)
    assert round(base / 1e9, 2) == 30.53
    assert not any("mlp" in name for name, p in network.named_parameters() if p.requires_grad)
    report = patch_moe(network)
    assert (len(report.active), len(report.fallback)) == (48, 0)


def evil(folder):
    """What makes a folder where it is unpickled."""
    return type("Evil", (), {"__reduce__": lambda self: (os.mkdir, (str(folder),))})()


def test_a_hostile_checkpoint_is_refused(tmp_path):
    content = {"state_dict": {}, "pytorch-lightning_version": "2.6.6", "callbacks": evil(tmp_path / "ran")}
    torch.save(content, tmp_path / "evil.ckpt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        fit(tmp_path, f"--ckpt_path={tmp_path / 'evil.ckpt'}", steps=1)
    assert not (tmp_path / "ran").exists()


def test_a_configuration_is_data(tmp_path, capsys):
    (tmp_path / "evil.yaml").write_text(f"seed_everything: !!python/object/apply:os.mkdir [{tmp_path / 'ran'}]\n")
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(tmp_path / "evil.yaml")])
    assert "python/object/apply:os.mkdir" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_a_tokenizers_own_code_does_not_run(tmp_path):
    code = f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass Evil: pass\n"
    (tmp_path / "evil.py").write_text(code)
    settings = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="contains custom code"):
        InstructionData(tokenizer=str(tmp_path))
    assert not (tmp_path / "ran").exists()
