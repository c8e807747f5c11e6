"""The plan of a step's memory: each part beside what is really there, and the whole beside what GPUs measured."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from helpers.models import gpt_oss, mixtral, qwen3, qwen3_config
from helpers.quantized import needs_bitsandbytes, quantized
from lora import attention, attention_turns, checkpointing, loss, offload
from lora.adapters import add_adapters
from lora.checkpointing import kept_bytes
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import CONFIG_MAPPING, AutoConfig, LlamaConfig
from transformers.models.qwen3_moe import modeling_qwen3_moe

from lightning_moe import PlanOptions, gategrad, plan_memory, quantize_experts
from lightning_moe.cli import main
from lightning_moe.integrations.allocations import AllocationCounter
from lightning_moe.planning import stand_ins
from lightning_moe.planning.cards import CARDS, LENGTHS, SIZES, Card, cheaper, fits, longest_tokens, read_card, settle
from lightning_moe.planning.layer import LayerCounter, router_module
from lightning_moe.planning.recipe import read_recipe
from lightning_moe.planning.step import GIB, Planner
from lightning_moe.planning.weights import read_weights

CONFIGS = Path(__file__).parents[1] / "recipes" / "configs"
QWEN3 = CONFIGS / "qwen3_30b_a3b.yaml"
TINY = CONFIGS / "tiny.yaml"
PLAIN = PlanOptions(dtype="float32", liger=False)
WIDE = {"intermediate_size": 32, "moe_intermediate_size": 32}
PLANNERS = {}


def planner_of(recipe, layers=None):
    if (recipe, layers) not in PLANNERS:
        architecture = yaml.safe_load((CONFIGS / f"{recipe}.yaml").read_text())["model"]["architecture"]
        if layers is not None:
            architecture["num_hidden_layers"] = layers
        PLANNERS[recipe, layers] = Planner(CONFIG_MAPPING[architecture.pop("model_type")](**architecture))
    return PLANNERS[recipe, layers]


def weights_of(model, options):
    counter = LayerCounter(model)
    return read_weights(model, options, counter.layer_name, router_module(model, options))


@pytest.mark.parametrize("build", [qwen3, mixtral, gpt_oss])
def test_weights_are_those_of_the_model(build):
    model = build()
    want = sum(parameter.nbytes for parameter in model.parameters())
    planned = weights_of(model, PLAIN)
    assert planned.base.total() == want
    assert weights_of(model, replace(PLAIN, dtype="bfloat16")).base.total() == want // 2
    experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    assert planned.base["experts"] == experts
    heads = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    assert planned.base["embeddings and head"] == sum(weight.nbytes for weight in heads)


@pytest.mark.parametrize("format", ["nf4", "fp8", "mxfp4"])
def test_quantized_weights_take_the_bytes_of_their_parts(format):
    planned = weights_of(qwen3(**WIDE), replace(PLAIN, quantize=format))
    model = qwen3(**WIDE)
    if format == "nf4":  # without bitsandbytes
        for layer in model.model.layers:
            for name in ("gate_up_proj", "down_proj"):
                packed = quantized(getattr(layer.mlp.experts, name))
                setattr(layer.mlp.experts, name, nn.Parameter(packed, requires_grad=False))
    else:
        quantize_experts(model, format)
    assert planned.base.total() == sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize(
    "chosen",
    [
        {"experts": False},
        {"experts": True, "rank": 4},
        {"experts": True, "router": "lora"},
        {"router": "trained"},
        {"modules_to_save": ("lm_head",)},
    ],
)
def test_adapters_and_moments_are_those_that_train(chosen):
    planned = weights_of(qwen3(), replace(PLAIN, **chosen))
    options = {"experts": False, "router": "frozen", "rank": 16, "modules_to_save": (), "router_module": "mlp.gate"}
    options |= {"alpha": 32, "fused_lora": True, "target_modules": PLAIN.target_modules} | chosen
    model = add_adapters(qwen3(), options)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert planned.num_trained == sum(parameter.numel() for parameter in trained)
    assert len(planned.trained) == len(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(trained, fused=True)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert planned.optimizer_bytes("adamw") == sum(state.nbytes for state in states)
    assert planned.optimizer_bytes("adamw_8bit") < planned.optimizer_bytes("adamw")


@needs_bitsandbytes
def test_moments_of_8_bits_are_bitsandbytes():
    from bitsandbytes.optim import AdamW8bit

    shapes = [(16, 2048), (100, 50), (16, 100)]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = AdamW8bit(parameters)
    optimizer.check_overrides()
    planned = weights_of(qwen3(), PLAIN)
    planned.trained = shapes
    for number, parameter in enumerate(parameters):
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, number)
    own = ("state1", "state2", "absmax1", "absmax2")  # the tables of the codes are shared by all
    states = [state[name] for state in optimizer.state.values() for name in own if name in state]
    assert planned.optimizer_bytes("adamw_8bit") == sum(state.nbytes for state in states)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_layers_keep_what_the_recipes_checkpointing_keeps(mode):
    config = qwen3_config(num_attention_heads=4, head_dim=8)
    options = replace(PLAIN, tokens=128, checkpointing=mode)
    planner = Planner(config)
    kept = planner.counter("float32").count_layer(options).kept
    *others, (_, choice) = kept
    assert choice == 128 * config.num_experts_per_tok * 4
    want = 128 * kept_bytes(config, mode, torch.float32)
    assert config.num_hidden_layers * sum(size for _, size in others) == want
    assert planner.plan(options).kept == want + config.num_hidden_layers * choice


@pytest.mark.parametrize("experts", [False, True])
def test_a_layer_saves_for_backward_what_the_real_one_saves(experts):
    config = qwen3_config(num_attention_heads=4, head_dim=32, hidden_size=64)
    options = replace(PLAIN, tokens=128, checkpointing="none", experts=experts, rank=8)
    planned = Planner(config).counter("float32").count_layer(options).num_kept
    attention.register()
    base = qwen3_with(config)
    base.set_attn_implementation(attention.NAME)
    given = {"rank": 8, "alpha": 8, "router": "frozen", "router_module": "mlp.gate", "modules_to_save": ()}
    given |= {"experts": experts, "target_modules": PLAIN.target_modules, "fused_lora": True}
    layer = add_adapters(base, given).get_base_model().model.layers[0].train()
    x = torch.randn(1, 128, 64, requires_grad=True)
    positions = base.model.rotary_emb(x, torch.arange(128)[None])
    own = {parameter.untyped_storage() for parameter in layer.parameters()}
    own |= {tensor.untyped_storage() for tensor in positions}
    storages = set()

    def record(tensor):
        storages.add(tensor.untyped_storage())
        return tensor

    with gategrad(layer), saved_tensors_hooks(record, lambda tensor: tensor):
        output = layer(x, position_embeddings=positions)
    output = output[0] if isinstance(output, tuple) else output
    saved = [storage.nbytes() for storage in storages - own - {output.untyped_storage()}]
    # The device rounds each tensor up to 512 bytes.
    assert planned == sum(-(-size // 512) * 512 for size in saved)


def qwen3_with(config):
    torch.manual_seed(0)
    return type(qwen3())(config)


@pytest.mark.parametrize("liger", [True, False, None])
def test_in_a_process_with_ligers_kernels_none_of_them_runs(liger, monkeypatch):
    """They would read the meta device's addresses on the GPU, which ends the process."""

    def run(*_, **__):
        raise AssertionError("a kernel of Liger's ran")

    config = qwen3_config()
    options = replace(PLAIN, tokens=64, liger=liger)
    want = plan_memory(config, replace(options, liger=True)).parts
    norm = type("LigerRMSNorm", (modeling_qwen3_moe.Qwen3MoeRMSNorm,), {"forward": run})
    norm.__module__ = "liger_kernel.transformers.rms_norm"
    monkeypatch.setattr(modeling_qwen3_moe, "Qwen3MoeRMSNorm", norm)
    monkeypatch.setattr(modeling_qwen3_moe, "apply_rotary_pos_emb", run)
    assert plan_memory(config, options).parts == want


def test_the_counter_follows_storages():
    counter = AllocationCounter("layer in flight")
    held = torch.empty(1024, device="meta")
    with counter:
        first = held.view(2, 512)  # nothing new
        assert counter.live.total() == 0
        first = torch.empty(256, device="meta")
        second = first.double()
        first.add_(1)
        view = second[:10]
        assert counter.live.total() == 1024 + 2048
        del first, second
        assert counter.live.total() == 2048
        with counter.tagged("odd"), counter.during("an odd moment"):
            last = torch.empty(257, device="meta")
        del view
        assert counter.live == {"layer in flight": 0, "odd": 1536}
        del last
    assert counter.peak == 2048 + 1536
    assert (counter.moment, counter.at_peak) == ("an odd moment", {"layer in flight": 2048, "odd": 1536})
    assert counter.traffic == 1024 + 2048 + 1536


def test_the_stand_ins_know_the_recipes_sizes():
    assert stand_ins.TOKEN_HEADS_IN_FLIGHT == attention_turns.TOKEN_HEADS_IN_FLIGHT
    assert stand_ins.LOSS_CHUNK_TOKENS == loss.CHUNK_TOKENS
    assert stand_ins.TWO_BLOCKS == checkpointing.TWO_BLOCKS
    assert stand_ins.SMALLEST_OFFLOADED_BYTES == offload.SMALLEST_OFFLOADED_BYTES


# GiB above what is held between steps, measured: recipes/benchmarks/2026-11-30-blocks-on-an-h200.md, in nf4
# 2026-11-30-side-by-side-on-an-h200.md.
MEASURED = [
    ("qwen3_30b_a3b", {"tokens": 16_384}, None, 13.03),
    ("qwen3_30b_a3b", {"tokens": 16_384, "offload": True}, None, 1.27),
    ("qwen3_30b_a3b", {"tokens": 16_384, "experts": True}, None, 13.08),
    ("qwen3_30b_a3b", {"tokens": 16_384, "experts": True, "offload": True}, None, 3.57),
    ("qwen3_30b_a3b", {"tokens": 32_768, "checkpointing": "full", "offload": True}, None, 2.71),
    ("qwen3_30b_a3b", {"tokens": 4096, "offload": True, "quantize": "nf4"}, None, 0.52),
    ("qwen3_30b_a3b", {"tokens": 16_384, "offload": True, "quantize": "nf4", "gpu_gib": 139.8}, None, 2.08),
    ("qwen3_30b_a3b", {"tokens": 16_384, "quantize": "nf4", "gpu_gib": 139.8}, None, 13.89),
    ("qwen3_30b_a3b", {"tokens": 131_072, "offload": True}, 8, 8.38),
    ("gpt_oss_20b", {"tokens": 65_536, "offload": True, "quantize": "mxfp4"}, None, 6.53),
]


@pytest.mark.parametrize(("recipe", "chosen", "layers", "above"), MEASURED)
def test_a_step_takes_what_was_measured(recipe, chosen, layers, above):
    planner = planner_of(recipe, layers)
    plan = planner.plan(PlanOptions(**chosen))
    assert plan.above / GIB == pytest.approx(above, rel=0.02)
    other = planner.plan(replace(plan.options, offload=not plan.options.offload))
    assert other.above / GIB != pytest.approx(above, rel=0.05)


SMALL = {
    "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "moe_intermediate_size": 64, "intermediate_size": 64,
}  # fmt: skip


def test_shared_experts_after_quantized_ones_are_planned_where_a_gpu_has_w1_dense_through_backward():
    """Then h is made in backward, and what is computed again does not end with the experts."""
    config = CONFIG_MAPPING["qwen2_moe"](**SMALL, num_experts=8, shared_expert_intermediate_size=64)
    options = PlanOptions(tokens=8192, quantize="mxfp4", liger=False)
    small, large = (Planner(config).plan(replace(options, gpu_gib=gib)) for gib in (24, 80))
    assert large.above == small.above  # both have room for these weights
    assert large.parts["workspace of de-quantization"] > 0


def test_rotary_tables_that_are_one_tensor_are_planned():
    config = CONFIG_MAPPING["deepseek_v2"](
        **SMALL, n_routed_experts=8, num_experts_per_tok=2, first_k_dense_replace=0, q_lora_rank=None, kv_lora_rank=16,
        qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16, n_group=1, topk_group=1,
    )  # fmt: skip
    options = PlanOptions(tokens=64, target_modules=("o_proj",), liger=False)
    complex64 = 64 * 8 * 8
    assert Planner(config).plan(options).parts["token ids and rotary tables"] == 3 * 8 * 64 + complex64


def test_quantized_weights_are_made_dense_in_more_memory_on_larger_gpus_as_the_operation_does():
    planner = planner_of("qwen3_30b_a3b")
    for quantize, num_plans in ((None, 1), ("nf4", 3)):
        given = {"tokens": 16_384, "offload": True, "quantize": quantize}
        plans = [planner.plan(settle(planner, given, Card("", SIZES[size]))) for size in (16, 24, 40, 80)]
        assert len({plan.above for plan in plans}) == num_plans
        assert [plan.options.gpu_gib for plan in plans] == [SIZES[size] for size in (16, 24, 40, 80)]
        assert plans[1].above <= plans[2].above <= plans[3].above
    weight = torch.empty(128, 1536, 2048, dtype=torch.bfloat16, device="meta")
    for gib in (23.4, 39, 78.5):
        num_bytes = PlanOptions(quantize="nf4", gpu_gib=gib).workspace_bytes
        assert (weight.nbytes <= num_bytes) == (gib == 78.5)


@pytest.mark.parametrize(
    ("recipe", "chosen", "card"),
    [
        ("qwen3_30b_a3b", {"quantize": "nf4"}, 19.24),
        ("qwen3_30b_a3b", {"tokens": 32_768, "experts": True}, 69.88),
        ("gpt_oss_20b", {"quantize": "mxfp4"}, 17.66),
    ],
)
def test_cards_hold_what_was_measured_beside_tensors(recipe, chosen, card):
    plan = planner_of(recipe).plan(PlanOptions(**{"tokens": 16_384, "offload": True} | chosen))
    assert 0.98 < plan.peak / GIB / card < 1.05
    assert plan.peak == sum(plan.parts.values()) > plan.allocated == plan.held + plan.above


def test_host_memory_is_rounded_up_to_powers_of_two():
    experts = planner_of("qwen3_30b_a3b").plan(PlanOptions(tokens=1024, experts_on="host"))
    assert experts.host["experts"] / GIB == 72  # for 54
    four = planner_of("qwen3_30b_a3b", 4)
    kept = four.plan(PlanOptions(tokens=262_144, offload=True)).host["kept by layers"]
    assert kept / GIB == pytest.approx(16.16, abs=0.01)
    more = four.plan(PlanOptions(tokens=262_145, offload=True)).host["kept by layers"]
    assert more > 1.7 * kept


def test_shards_and_replicas():
    planner = planner_of("qwen3_30b_a3b")
    options = PlanOptions(tokens=16_384, checkpointing="full")
    for gpus, measured in ((2, 36.46), (4, 22.20)):
        plan = planner.plan(replace(options, gpus=gpus, strategy="fsdp"))
        assert plan.allocated / GIB == pytest.approx(measured, rel=0.02)
    one, ddp = planner.plan(options), planner.plan(replace(options, gpus=2))
    assert ddp.held - one.held == 4 * one.trained


def test_a_models_configuration_stays_as_it_is():
    config = qwen3_config()
    before = config.to_dict()
    state = torch.get_rng_state()
    assert plan_memory(config, replace(PLAIN, tokens=64)).peak > plan_memory(config, replace(PLAIN, tokens=32)).peak
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_the_longest_sequence_fits_and_the_next_does_not():
    planner, options, card = planner_of("qwen3_30b_a3b"), PlanOptions(quantize="nf4", offload=True), Card("", 20.0)
    longest = longest_tokens(planner, lambda tokens: replace(options, tokens=tokens), card)
    after = LENGTHS[LENGTHS.index(longest) + 1]
    assert fits(planner.plan(replace(options, tokens=longest)), card)
    assert not fits(planner.plan(replace(options, tokens=after)), card)
    assert longest_tokens(planner, lambda tokens: replace(options, tokens=tokens), Card("", 10.0)) == 0


def test_the_least_costly_options_that_fit():
    planner, options = planner_of("qwen3_30b_a3b"), PlanOptions(tokens=16_384)
    changes, plan = cheaper(planner, options, Card("", 65.0))
    assert changes == ["--offload true"]
    assert fits(plan, Card("", 65.0))
    changes, plan = cheaper(planner, options, Card("", 24.0))
    assert changes == ["--offload true", "--quantize nf4"]
    changes, plan = cheaper(planner, options, Card("", 12.0))
    assert changes == ["--offload true", "--experts-on host"]
    changes, plan = cheaper(planner, options, Card("", 5.5))
    assert changes[-1] == f"--tokens {plan.options.tokens}"
    assert plan.options.tokens < 16_384
    assert cheaper(planner, options, Card("", 1.0)) is None


def test_what_is_left_open_is_decided_as_the_recipe_does():
    planner = planner_of("qwen3_30b_a3b")
    given = {"tokens": 16_384, "checkpointing": "auto", "offload": None, "experts_on": "auto"}
    places = {
        gib: (chosen.checkpointing, chosen.offload, chosen.experts_on)
        for gib in (178.0, 71.0, 24.0)
        for chosen in [settle(planner, given, Card("", gib))]
    }
    assert places[178.0] == ("selective", False, "device")
    assert places[71.0] == ("selective", True, "device")
    assert places[24.0][2] == "host"
    assert settle(planner, given, None).offload is False


def test_cards_by_name_and_size():
    assert read_card("NVIDIA H100") is CARDS["h100"]
    assert read_card("24").gib == read_card("24GB").gib == SIZES[24]
    assert read_card("24 GiB").gib == 24
    assert read_card("23.1").gib == 23.1
    for name in ("H100 80GB", "NVIDIA H100 80GB HBM3", "h100-pcie"):
        assert read_card(name).name == "H100"
    assert read_card("rtx4090").name == "RTX 4090"
    with pytest.raises(ValueError, match="a card of 4090 GiB cannot be: .*RTX 4090"):
        read_card("4090")


def test_the_longest_sequence_is_one_that_is_planned_to_fit(capsys):
    """What is left to the recipe is chosen for each length: at 4,096 tokens it offloads nothing."""
    asked = ("--recipe", f"{QWEN3},{CONFIGS / 'nf4.yaml'}", "--gpu", "24", "--json")
    short = json.loads(run(capsys, *asked))
    assert short["options"]["offload"] is False
    assert short["longest_tokens"] > 49_152
    again = json.loads(run(capsys, *asked, "--tokens", short["longest_tokens"]))
    assert again["fits"] is True
    assert again["options"]["offload"] is True
    assert again["longest_tokens"] == short["longest_tokens"]


def test_what_is_planned_is_said(capsys):
    out = " ".join(run(capsys, "--recipe", QWEN3, "--gpu", "24", "--experts", "true", "--rank", 8).split())
    assert "LoRA r=8 on attention and experts, router frozen; experts in bfloat16 in host memory; checkpoint" in out


def test_more_tokens_than_are_planned_are_refused():
    with pytest.raises(ValueError, match="a step of 2,000,000 tokens is not planned: at most 1,048,576"):
        PlanOptions(tokens=1_000_000, batch=2)


def run(capsys, *arguments):
    main(["plan", *map(str, arguments)])
    return capsys.readouterr().out


def test_json(capsys):
    found = json.loads(run(capsys, "--recipe", QWEN3, "--json", "--gpu", "H100", "--offload", "true"))
    plan = planner_of("qwen3_30b_a3b").plan(PlanOptions(tokens=16_384, offload=True))
    assert found["peak_gib"] == pytest.approx(plan.peak / GIB, abs=0.001)
    assert sum(found["parts_gib"].values()) == pytest.approx(found["peak_gib"], abs=0.01)
    assert found["host_gib"] == pytest.approx(12.09, abs=0.01)
    assert found["fits"] is True
    assert found["cards_gb"]["24"]["fits_with"] == ["--experts-on host"]  # which is the recipe's own choice there
    assert found["cards_gb"]["24"]["host_gib"] > 72
    assert found["cards_gb"]["80"]["fits_with"] == []
    assert found["longest_tokens"] >= 65_536
    assert 0.5 < found["seconds_per_step"] < 3  # an H200 takes 1.3


def test_a_table_from_a_folder_without_the_network(capsys, tmp_path, monkeypatch):
    qwen3_config(num_hidden_layers=1).save_pretrained(tmp_path)
    monkeypatch.setattr(AutoConfig, "from_pretrained", None)
    for model in (tmp_path, tmp_path / "config.json"):
        out = run(capsys, model, "--tokens", 64, "--gpu", "24", "--experts", "true")
        assert re.search(r"peak, in .*layer 1 of 1", out)
        assert "an estimate" not in out  # a size has no speed
        assert all(f"{size} GB" in out for size in SIZES)


def test_a_checkpoint_with_quantized_experts_trains_as_it_is(capsys, tmp_path):
    config = gpt_oss().config
    fields = config.to_dict() | {"quantization_config": {"quant_method": "mxfp4"}, "intermediate_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    found = json.loads(run(capsys, tmp_path, "--json"))
    dense = json.loads(run(capsys, tmp_path, "--json", "--quantize", "none"))
    assert (found["options"]["quantize"], dense["options"]["quantize"]) == ("mxfp4", None)
    assert "experts, mxfp4" in found["parts_gib"]
    assert "experts, bfloat16" in dense["parts_gib"]
    assert found["checkpoint_gib"] == dense["checkpoint_gib"]


def test_a_recipe_with_another_on_top_and_options():
    _, given = read_recipe(f"{QWEN3},{CONFIGS / 'nf4.yaml'}")
    assert (given["quantize"], given["optimizer"], given["tokens"]) == ("nf4", "adamw_8bit", 4096)
    assert (given["checkpointing"], given["offload"], given["output_buffer_mib"]) == ("auto", None, 256)
    config, given = read_recipe(f"{CONFIGS / 'gpt_oss_20b.yaml'},{CONFIGS / 'gpt_oss_120b.yaml'}")
    assert (config.num_hidden_layers, given["router_module"]) == (36, "mlp.router")
    _, given = read_recipe(f"{QWEN3},{CONFIGS / 'fsdp.yaml'}")
    assert (given["gpus"], given["strategy"]) == (2, "fsdp")
    _, given = read_recipe(str(TINY))
    assert given["modules_to_save"] == ("lm_head",)


def bad_input(tmp_path):
    for name, text in (("damaged", '{"model_type": "qwen3_moe", '), ("unknown", '{"model_type": "no_such"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "config.json").write_text('{"model_type": "qwen3_moe", "hidden_size": "a"}')
    (tmp_path / "recipe.yaml").write_text("model: {rank: [")
    LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32).save_pretrained(
        tmp_path / "dense"
    )
    (tmp_path / "empty").mkdir()
    yield ["no/such-model"], "'no/such-model' is no folder here"
    yield [tmp_path / "nowhere"], "there is no"
    yield [tmp_path / "empty"], "there is no .*config.json"
    yield [tmp_path / "dense"], "llama has no experts"
    yield [tmp_path / "damaged"], "is damaged"
    yield [tmp_path / "wrong"], "is damaged: .*hidden_size"
    yield [tmp_path / "unknown"], "is of model_type 'no_such'"
    yield ["--recipe", TINY, "--gpu", "H1000"], "no card 'H1000'.*H100"
    yield ["--recipe", TINY, "--gpu", "-3"], "cannot be"
    yield ["--recipe", tmp_path / "recipe.yaml"], "cannot be read"
    yield [], "which model"
    yield ["--recipe", TINY, "--gpus", 2, "--strategy", "fsdp", "--quantize", "nf4"], "fsdp"
    yield ["--recipe", TINY, "--offload", "true"], "offload"


def test_bad_input_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for arguments, said in bad_input(tmp_path):
        with pytest.raises(SystemExit) as stopped:
            run(capsys, *arguments)
        captured = capsys.readouterr()
        assert stopped.value.code == 2, arguments
        assert re.fullmatch(f"lightning-moe plan: .*{said}.*\n", captured.err), captured.err
        assert captured.out == ""


def test_options_that_do_not_go_together():
    for wrong in (
        {"tokens": 0}, {"router": "none"}, {"quantize": "int3"}, {"checkpointing": "none", "offload": True},
        {"checkpointing": "none", "experts_on": "host"}, {"experts_on": "host", "gpus": 2},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong)).partition("_")[0]):
            PlanOptions(**wrong)
