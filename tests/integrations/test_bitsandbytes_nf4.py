"""Experts in nf4 that a checkpoint has one by one, fused: the values of bitsandbytes, and what is refused by name."""

import json

import pytest
import torch

from lightning_moe.integrations.bitsandbytes_nf4 import QUANT_STATE, encode, fuse
from lightning_moe.ops.quantized import QuantizedWeight

functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")

WHOLE = (128, 128)  # 256 blocks: one scale's
NOT_WHOLE = (48, 128)  # 96 blocks
STEM = "model.layers.0.mlp.experts"


def save(weight, name, nested=True, blocksize=64, quant_type="nf4"):
    """A matrix as it is in a checkpoint, and as bitsandbytes makes it dense."""
    packed, state = functional.quantize_4bit(
        weight, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type
    )
    saved = {f"{name}.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
    return {name: packed} | saved, functional.dequantize_4bit(packed, state)


def checkpoint(shape, *, nested=True, dtype=torch.bfloat16, num_experts=3, projections=("gate_proj", "up_proj"), **how):
    """The tensors, the names of each expert's matrices, and the dense weight."""
    generator = torch.Generator().manual_seed(0)
    tensors, names, dense = {}, [], []
    for expert in range(num_experts):
        names.append([f"{STEM}.{expert}.{projection}.weight" for projection in projections])
        for name in names[-1]:
            size = 1 + 5 * len(tensors)  # so that scales and offsets differ
            saved, values = save(torch.randn(shape, generator=generator).to(dtype) * size, name, nested, **how)
            tensors |= saved
            dense.append(values)
    return tensors, names, torch.stack(dense).view(num_experts, -1, shape[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "float32 absmax"])
@pytest.mark.parametrize("projections", [("gate_proj", "up_proj"), ("down_proj",)], ids=["two", "one"])
@pytest.mark.parametrize("shape", [WHOLE, NOT_WHOLE], ids=["whole scales", "scales that would straddle"])
def test_fused_values_are_those_of_bitsandbytes(shape, projections, nested, dtype):
    tensors, names, dense = checkpoint(shape, nested=nested, dtype=dtype, projections=projections)
    weight = fuse(tensors, names, dtype)
    assert isinstance(weight, QuantizedWeight)
    assert torch.equal(weight.dequantize(), dense)
    stays = nested and (shape == WHOLE or projections == ("down_proj",))
    assert weight.parts["absmax"].dtype == (torch.uint8 if stays else torch.float32)
    assert ("absmax_scale" in weight.parts) == stays


def test_codes_of_an_older_bitsandbytes_are_computed():
    """Before 0.50 its CPU kernels made the lowest of them -1, in place."""
    tensors, names, _ = checkpoint(WHOLE, dtype=torch.float32, projections=("down_proj",))
    name = names[0][0]
    tensors[f"{name}.nested_quant_map"] = tensors[f"{name}.nested_quant_map"].clone()
    tensors[f"{name}.nested_quant_map"][0] = -1
    tensors[f"{name}.absmax"][5] = 0
    weight = fuse(tensors, names, torch.float32)
    saved = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
    state = functional.QuantState.from_dict(saved, torch.device("cpu"))
    assert weight.parts["absmax"].dtype == torch.float32
    assert torch.equal(weight.dequantize()[0], functional.dequantize_4bit(tensors[name], state))


def test_what_is_fused_is_what_is_encoded():
    """Experts of one matrix: the same parts."""
    weight = torch.randn(3, *NOT_WHOLE)
    tensors = {}
    for expert, values in enumerate(weight):
        tensors |= save(values, str(expert))[0]
    fused = fuse(tensors, [["0"], ["1"], ["2"]], torch.float32)
    encoded = encode(weight)
    assert fused.parts.keys() == encoded.keys()
    assert all(torch.equal(fused.parts[name], part) for name, part in encoded.items())


def test_the_bytes_may_have_another_type():
    tensors, names, dense = checkpoint(WHOLE)
    for expert in names:
        for name in expert:
            tensors[name] = tensors[name].flatten().view(torch.bfloat16)
    assert torch.equal(fuse(tensors, names, torch.bfloat16).dequantize(), dense)


@pytest.mark.parametrize(
    "companion", ["absmax", "quant_map", "nested_absmax", "nested_quant_map", QUANT_STATE, None]
)  # fmt: skip
def test_a_missing_tensor_is_named(companion):
    tensors, names, _ = checkpoint(WHOLE)
    lacking = ".".join(filter(None, (names[1][1], companion)))
    del tensors[lacking]
    with pytest.raises(ValueError, match=f"the checkpoint lacks {lacking}$"):
        fuse(tensors, names, torch.bfloat16)


def state_with(tensors, name, **changes):
    key = f"{name}.{QUANT_STATE}"
    state = json.loads(bytes(tensors[key].tolist())) | changes
    return {key: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


def test_other_formats_are_refused_by_name():
    name = f"{STEM}.2.up_proj.weight"
    for how, message in (
        ({"blocksize": 128}, f"^{name}: blocksize is 128, and 64 can be read"),
        ({"quant_type": "fp4"}, f"^{name} is not in nf4: the checkpoint has {name}.quant_state.bitsandbytes__fp4"),
    ):
        tensors, names, _ = checkpoint(WHOLE)
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(name)}
        tensors |= save(torch.randn(WHOLE), name, **how)[0]
        with pytest.raises(ValueError, match=message):
            fuse(tensors, names, torch.bfloat16)
    for changes, message in (
        ({"quant_type": "fp4"}, f"^{name}: quant_type is fp4, and nf4 can be read"),
        ({"nested_blocksize": 128}, f"^{name}: nested_blocksize is 128, and 256 can be read"),
        ({"shape": [128, 64]}, rf"^{name} is \(128, 64\), and cannot be fused with .*0.gate_proj"),
        ({"shape": [3, 8]}, f"^{name}: an expert of 3 x 8 values is no whole number of blocks of 64"),
    ):
        tensors, names, _ = checkpoint(WHOLE)
        with pytest.raises(ValueError, match=message):
            fuse(tensors | state_with(tensors, name, **changes), names, torch.bfloat16)


def test_tensors_of_another_size_are_refused_by_name():
    tensors, names, _ = checkpoint(WHOLE)
    name = names[0][0]
    for key in (name, f"{name}.absmax"):
        with pytest.raises(ValueError, match=rf"^{name}: .* are no \(128, 128\) in nf4"):
            fuse(tensors | {key: tensors[key][:-2]}, names, torch.bfloat16)
    with pytest.raises(ValueError, match=f"^{name}: its quant_map is not nf4's"):
        fuse(tensors | {f"{name}.quant_map": torch.zeros(16)}, names, torch.bfloat16)
