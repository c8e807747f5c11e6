"""The products' benchmark: its variants compute the same; without a GPU it says so."""

import grouped_products
import pytest
import torch
from experts_layer import MODELS
from grouped_products import HEADERS, bench, error, main, products, variants

triton_kernels = pytest.importorskip("lightning_moe.ops.triton_kernels", reason="Triton is not installed")

SIZES = {"hidden_size": 32, "moe_intermediate_size": 16, "num_experts": 3}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs where there is no GPU")
def test_variants_compute_the_same_products(monkeypatch):
    monkeypatch.setattr(triton_kernels, "_shared_memory", lambda device: 2**17)
    index = torch.tensor([[0], [2], [0], [2], [2]])  # no row is the second expert's
    permutation, _, offsets, tiles, _ = triton_kernels.route(
        index, 3, is_expert_parallel=False, needs_tiles=True, compact_dtype=None
    )
    for name, product in products(SIZES, permutation, 5, torch.float16).items():
        calls = variants(product, offsets, tiles, has_descriptors=True)
        assert list(calls) == ["loop of mm", "grouped_mm", "pointers", "descriptors"]
        assert (product.tokens is not None) == ("gathered" in name)
        for variant, call in calls.items():
            assert error(call(), product, offsets) < 2**-10, (name, variant)
            assert error(call().roll(1, 0), product, offsets) > 0.1, (name, variant)
    assert "descriptors" not in variants(product, offsets, tiles, has_descriptors=False)


def test_ratios_are_to_the_loop(monkeypatch):
    monkeypatch.setattr(grouped_products, "variants", lambda *_, **__: dict.fromkeys(["loop of mm", "ours"], list))
    monkeypatch.setattr(grouped_products, "error", lambda *_: 0.25)
    monkeypatch.setattr(grouped_products, "milliseconds", lambda *_: {"loop of mm": 2.0, "ours": 0.5})
    monkeypatch.setattr(triton_kernels, "has_tensor_memory_accelerator", lambda device: False)
    cells = bench(
        SIZES | {"num_experts_per_tok": 2}, 4, 3, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    assert {len(row) for row in cells} == {len(HEADERS)}
    assert [row[3] for row in cells] == ["2.000 (1.00)", "0.500 (0.25)"] * 4
    assert cells[0] == ["4", "gate_up, gathered", "loop of mm", "2.000 (1.00)", "0", "2.5e-01"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_variant_is_a_row_on_a_gpu():
    rows = bench(MODELS["tiny"], 256, 3, torch.device("cuda", 0))
    assert all(0 < float(row[5]) < 2**-7 for row in rows)
    assert {row[2] for row in rows} >= {"loop of mm", "grouped_mm", "pointers"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="there is none here"):
        main()
