"""`lightning-moe inspect`: the report of a configuration is the model's own; bad input is one line and exit code 2."""

import json
import socket

import pytest
from helpers.models import gpt_oss, mixtral, qwen3
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, Llama4TextConfig, LlamaConfig, Qwen3VLMoeConfig

from lightning_moe import gategrad
from lightning_moe.cli import main
from lightning_moe.integrations.model_config import build_on_meta, read_config
from lightning_moe.integrations.transformers_experts import experts_per_token

PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(autouse=True)
def without_a_network(monkeypatch):
    def connect(*_):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", connect)


def fails(capsys, *arguments):
    """The one line on stderr of a run that exits with 2."""
    with pytest.raises(SystemExit, match="^2$"):
        main(["inspect", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lightning-moe inspect: ")
    assert err.count("\n") == 1
    return err


def written(folder, **fields):
    """A folder with a config.json of these fields."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def saved(model, folder):
    """A folder with the model's config.json, as `save_pretrained` of the model writes it."""
    return written(folder, **model.config.to_dict() | {"dtype": str(model.dtype).removeprefix("torch.")})


@pytest.mark.parametrize("experts", ["frozen", "lora", "full"])
@pytest.mark.parametrize("build", [qwen3, mixtral, gpt_oss])
def test_the_report_is_that_of_the_model_in_memory(build, experts, tmp_path, capsys):
    model = build()
    saved(model, tmp_path)
    model.requires_grad_(experts == "full")
    if experts == "lora":
        model = get_peft_model(model, LoraConfig(r=4, target_modules=[], target_parameters=PARAMETERS))
    with gategrad(model) as report:
        assert len(report.active) == 2
        assert bool(report[0].adapters) == (experts == "lora")
        expected = str(report)
    main(["inspect", str(tmp_path), "--experts", experts, "--rank", "4"])
    out, _ = capsys.readouterr()
    assert out.partition("\n")[2] == f"{expected}\n"
    assert out.startswith(f"{build().__class__.__name__}, 0.00 billion parameters in torch.float32; experts: {experts}")


def test_how_the_experts_train_changes_what_is_saved(tmp_path, capsys):
    said = []
    for options in (["frozen"], ["lora"], ["lora", "--rank", "32"], ["full"]):
        main(["inspect", str(saved(qwen3(), tmp_path)), "--experts", *options])
        said.append(capsys.readouterr().out.splitlines()[-2].replace("base_model.model.", ""))
    assert len(set(said)) == 4


def test_a_file_is_taken_as_its_folder(tmp_path, capsys):
    main(["inspect", str(saved(qwen3(), tmp_path))])
    folder = capsys.readouterr().out
    main(["inspect", str(tmp_path / "config.json")])
    assert capsys.readouterr().out == folder


def test_the_real_size_is_read_in_the_checkpoints_dtype_without_memory(tmp_path, capsys):
    sizes = {
        "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_experts": 128,
        "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "vocab_size": 151936, "dtype": "bfloat16",
    }  # fmt: skip
    model = build_on_meta(read_config(str(written(tmp_path, model_type="qwen3_moe", **sizes))))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    main(["inspect", str(tmp_path)])
    out, _ = capsys.readouterr()
    assert "Qwen3MoeForCausalLM, 30.53 billion parameters in torch.bfloat16; experts: frozen" in out
    # Per token 8 rows: 2 (H + 3 I) + routing, and 2 (2 I) + routing, of 18 bytes.
    assert f"{8 * (2 * (2048 + 3 * 768) + 18) / 1024:.1f}" in out
    assert f"{8 * (2 * 2 * 768 + 18) / 1024:.1f}" in out
    assert "model.layers.*.mlp.experts (48 layers)" in out


def test_a_layer_that_is_not_supported_is_named_with_its_code_and_merges_its_adapters(tmp_path, capsys):
    config = Llama4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, intermediate_size_mlp=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_local_experts=4,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="^1$"):
        main(["inspect", str(tmp_path), "--experts", "lora"])
    out, _ = capsys.readouterr()
    assert "0 active, 2 fallback" in out
    for said in ("Llama4TextExperts", "[outside_registry]", "PEFT merges", "[lora_layer_falls_back]"):
        assert said in out


@pytest.mark.parametrize(
    ("architectures", "name"),
    [
        (["Qwen3VLMoeForConditionalGeneration"], "model.language_model.layers"),
        (None, "language_model.layers"),
        (["NoSuchModel"], "language_model.layers"),
        (["AutoConfig"], "language_model.layers"),
    ],
)
def test_a_model_is_of_the_class_that_its_configuration_names(architectures, name, tmp_path, capsys):
    text = {"vocab_size": 64, "hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2, "num_experts": 4}
    Qwen3VLMoeConfig(text_config=text, architectures=architectures).save_pretrained(tmp_path)
    main(["inspect", str(tmp_path)])
    assert f"│ {name}.*.mlp.experts (2 layers)" in capsys.readouterr().out


def test_numbers_that_json_has_not_are_read(tmp_path, capsys):
    config = AutoConfig.for_model("nemotron_h")
    assert config.time_step_limit[1] == float("inf")
    config.save_pretrained(tmp_path)
    main(["inspect", str(tmp_path)])
    assert "NemotronHExperts │ active" in capsys.readouterr().out


def test_a_quantized_checkpoint_is_said(tmp_path, capsys):
    fields = qwen3().config.to_dict()
    main(["inspect", str(written(tmp_path, **fields))])
    assert "quantized" not in capsys.readouterr().out
    main(["inspect", str(written(tmp_path, **fields, quantization_config={"quant_method": "fp8"}))])
    out, _ = capsys.readouterr()
    assert "The checkpoint is quantized (fp8)" in out
    assert "2 active" in out


# Bad input


def test_what_is_not_there_is_named_without_a_network(tmp_path, capsys):
    assert f"there is no {tmp_path / 'config.json'}" in fails(capsys, tmp_path)
    assert f"there is no {tmp_path / 'nowhere'}" in fails(capsys, tmp_path / "nowhere")
    assert "there is no nowhere.json" in fails(capsys, "nowhere.json")
    assert "there is no nowhere" in fails(capsys, "./nowhere")


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no such/model/at/all"])
def test_a_name_that_the_hub_does_not_give_is_one_line(name, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = fails(capsys, name)
    assert f"{name!r} is no folder here, and its configuration cannot be had from the hub (" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"model_type": "qwen3_moe",', "is damaged: Expecting property name"),
        (b"", "is damaged: Expecting value: line 1 column 1"),
        (b"\xff\xfe\x00", "is damaged: 'utf-8' codec can't decode"),
        (b"[1]", "holds no object"),
        (b"{}", "has no model_type"),
        (b'{"model_type": 3}', "has no model_type"),
        (b'{"model_type": "no_such_family"}', "is of model_type 'no_such_family', which Transformers "),
        (b'{"model_type": "qwen3_moe", "hidden_size": "wide"}', "is damaged: "),
        (b'{"model_type": "qwen3_moe", "num_attention_heads": 0}', "no qwen3_moe can be built of this configuration: "),
    ],
)
def test_a_damaged_configuration_is_one_line(content, said, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes(content)
    assert said in fails(capsys, tmp_path)


def test_a_model_without_experts_is_one_line(tmp_path, capsys):
    LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=2).save_pretrained(tmp_path)
    assert f"{str(tmp_path)!r} has no MoE layers: LlamaForCausalLM" in fails(capsys, tmp_path)


def test_adapters_where_no_projection_is_one_for_all_experts_are_an_error(tmp_path, capsys, monkeypatch):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

    model = qwen3()
    for layer in model.model.layers:
        layer.mlp.experts = Experts()
    monkeypatch.setattr("lightning_moe.commands.inspect.build_on_meta", lambda _: model)
    assert "--experts lora: the experts have no gate_up_proj" in fails(
        capsys, saved(qwen3(), tmp_path), "--experts", "lora"
    )


@pytest.mark.parametrize("rank", ["0", "-1", "many"])
def test_a_rank_that_is_none_is_refused(rank, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        main(["inspect", "model", "--rank", rank])
    assert "--rank" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("family", "top_k"), [("qwen3_moe", 8), ("gpt_oss", 4), ("gemma4_text", 3), ("aria_text", 2), ("llama", None)]
)
def test_the_experts_of_a_token_are_read_by_each_familys_name_for_them(family, top_k):
    own = {"top_k_experts": 3} if family == "gemma4_text" else {}
    assert experts_per_token(AutoConfig.for_model(family, **own)) == top_k
