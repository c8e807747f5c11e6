"""Each kernel, compiled as its launcher launches it, for GPUs that are not here: does a block have room for it?

Of shared and tensor memory, and of registers: those that it has too few of go to memory, which is called spilling.
A process of its own compiles: that kernels are interpreted, as the other tests have them, is settled at their import.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from itertools import islice, product
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

PACKAGE = Path(__file__).parents[2] / "lightning_moe"
FILES = (PACKAGE / "ops").glob("triton_*.py")
KERNELS = re.findall(r"^def (_\w+_kernel)\(", "".join(file.read_text() for file in FILES), re.MULTILINE)
# Bytes of shared memory that a block may have, by compute capability: A100, RTX 3090, RTX 4090, H100, B200, RTX 5090.
LIMITS = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
TENSOR_MEMORY = 512  # columns; on capability 10 only


def launches(kernels, torch, capability):
    """Calls of each launcher, with tensors that have no memory.

    Every capability gets the largest block of each kernel in every layout. What makes a block no larger (a dtype, a
    lower rank, an activation, fewer results, no low-rank term) is compiled for Hopper alone. Of the grouped products,
    those by pointers are compiled for all, and in every class before Hopper, which has no others; those by descriptors
    in every class for Hopper, and in all widths where there are fewer stages.
    """
    bf16, fp16, fp32, int32 = torch.bfloat16, torch.float16, torch.float32, torch.int32
    empty = partial(torch.empty, device="meta")
    num_rows, num_tokens, top_k, num_experts = 4096, 512, 8, 128
    offsets, tokens = empty(num_experts, dtype=int32), empty(num_rows, dtype=torch.int64)
    only_pointers = capability < 90  # descriptors are loaded from capability 9.0 on

    def factor(inner, columns, in_first, dtype):
        made = empty(num_experts, *((inner, columns) if in_first else (columns, inner)), dtype=dtype)
        return made if in_first else made.mT

    def linear(
        gather, in_first, factor_in_first=True, *, inner=2048, columns=1536, rank=0, dtype=bf16, pointers=only_pointers
    ):
        rows, weight = empty(num_rows, inner, dtype=dtype), factor(inner, columns, in_first, dtype)
        low_rank = (empty(num_rows, rank, dtype=dtype), factor(rank, columns, factor_in_first, dtype)) if rank else None
        tiles = empty(2, 160, dtype=int32)
        return partial(
            kernels.grouped_linear, rows, weight, offsets, tiles, tokens=tokens if gather else None, top_k=top_k,
            low_rank=low_rank, pointers=pointers,
        )  # fmt: skip

    def outer(gather, wide_first, rank=64, *, dtype=bf16, out_dtype=fp32):
        many = 2**14  # in several pieces
        wide, narrow = empty(num_tokens if gather else many, 2048, dtype=dtype), empty(many, rank, dtype=dtype)
        picked = empty(many, dtype=torch.int64) if gather else None
        if wide_first:
            call = partial(kernels.grouped_outer, wide, narrow, offsets, left_tokens=picked, right_tokens=None)
        else:
            call = partial(kernels.grouped_outer, narrow, wide, offsets, left_tokens=None, right_tokens=picked)
        return partial(call, out_dtype=out_dtype)

    def gated_backward(kind, needs, dtype):
        h, grad, gates = empty(num_rows, 1536, dtype=dtype), empty(num_rows, 768, dtype=dtype), empty(num_rows)
        return partial(kernels.gated_backward, h, grad, gates, kind, needs=needs, overwrite=True, pairs=tokens)

    def combine(weighted, columns, dtype, out_dtype):
        gates = empty(num_tokens, top_k, dtype=dtype) if weighted else None
        inverse, out = empty(num_tokens, top_k, dtype=int32), empty(num_tokens, columns, dtype=out_dtype)
        return partial(kernels.combine, empty(num_rows, columns, dtype=dtype), inverse, gates, out)

    def route(id_dtype, compact_dtype=None, tokens=num_tokens):
        return partial(
            kernels.route, empty(tokens, top_k, dtype=id_dtype), num_experts, is_expert_parallel=False,
            needs_tiles=True, compact_dtype=compact_dtype,
        )  # fmt: skip

    def count(choice_dtype, gate_dtype):
        counters, gates = empty(7, dtype=torch.int64), empty(num_tokens, top_k, dtype=gate_dtype)
        choice = None if choice_dtype is None else empty(num_tokens, top_k, dtype=choice_dtype)
        grads, choices = (None, None) if choice is None else (gates, (choice, choice))
        return partial(kernels.count, counters, gates, grads, tokens, offsets, choices=choices, bytes_saved=2**33)

    def dequantize_nf4(nested, dtype):
        parts = {"packed": empty(num_experts, 1536 * 1024, dtype=torch.uint8)}
        if nested:
            parts["absmax"] = empty(num_experts, 49152, dtype=torch.uint8)
            parts |= dict.fromkeys(("absmax_scale", "absmax_offset"), empty(num_experts, 192))
        else:
            parts["absmax"] = empty(num_experts, 49152)
        tables, out = (empty(16), empty(256)), empty(num_experts, 512, 2048, dtype=dtype)
        return partial(kernels.dequantize_nf4, parts, (num_experts, 1536, 2048), *tables, out, 512, 0, 64, 256)

    def dequantize_fp8(dtype, first_column):
        values, scales = empty(num_experts, 1536, 2048, dtype=torch.uint8), empty(num_experts, 12, 16)
        out = empty(num_experts, 512, 512, dtype=dtype)
        return partial(kernels.dequantize_fp8, values, scales, out, 512, first_column, 128)

    def dequantize_mxfp4(dtype, first_column):
        packed, scales = (empty(num_experts, 1536, width, dtype=torch.uint8) for width in (1024, 64))
        out = empty(num_experts, 512, 512, dtype=dtype)
        return partial(kernels.dequantize_mxfp4, packed, scales, out, 512, first_column, 32)

    for pointers, gather, in_first in product(sorted({only_pointers, True}), [True, False], [True, False]):
        yield linear(gather, in_first, gather == in_first, rank=64, pointers=pointers)  # any two of the options meet
    yield dequantize_nf4(True, bf16)
    for dtype, first_column in [(bf16, 256), (fp16, 1), (fp32, 2)]:
        yield dequantize_fp8(dtype, first_column)
        yield dequantize_mxfp4(dtype, first_column)
    yield route(torch.int64, torch.uint8)
    yield route(torch.int64, tokens=2**15)
    yield count(int32, fp32)
    for gather, wide_first in product([True, False], repeat=2):
        yield outer(gather, wide_first)
    yield partial(kernels.gated, empty(num_rows, 1536, dtype=bf16), "silu")
    yield gated_backward("silu", "gated a", bf16)
    yield combine(False, 2048, fp16, fp32)
    if capability != 100:
        for columns in (16, 32, 64, 128):  # the tile's width, and so its stages, follow them; the dtype does not count
            yield linear(columns in (16, 64), columns in (16, 128), columns=columns, dtype=fp16)
    if capability <= 90:
        for gather, in_first in product([True, False], repeat=2):
            yield linear(gather, in_first)
        yield linear(True, False, True, rank=16)
        yield linear(False, True, False, rank=32, dtype=fp16)
        yield linear(True, False, inner=72)  # the last step's loads are masked
        yield linear(False, True, columns=264, rank=8)  # and so are the last columns'
    if capability == 90:
        for gather, wide_first in product([True, False], repeat=2):
            yield outer(gather, wide_first, rank=8 if wide_first else 32, dtype=fp16, out_dtype=fp16)
        for kind, dtype in [("silu", fp16), ("gelu", bf16), ("gelu_tanh", fp16)]:
            yield partial(kernels.gated, empty(num_rows, 1536, dtype=dtype), kind)
        for kind, needs, dtype in [("silu", None, bf16), ("silu", "a", bf16), ("gelu", "gated a", bf16),
                                   ("gelu_tanh", "a", fp16)]:  # fmt: skip
            yield gated_backward(kind, needs, dtype)
        yield combine(True, 2048, bf16, bf16)
        yield combine(True, 64, fp16, fp16)
        yield route(int32)
        yield dequantize_nf4(False, fp16)
        yield count(torch.uint8, bf16)
        yield count(None, bf16)


def compile_offline(capability, shared_memory, num_launches, settings):
    """Prints the kernel, its constants, and what it takes of the device for each of the launches.

    The launchers are told that a block may have so much shared memory, and other settings of their module.
    """
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    device = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        utils=SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": shared_memory}),
    )

    def launcher(kernel, grid):
        def compile_only(*args, **options):
            with redirect_stdout(StringIO()) as log:
                made = kernel.warmup(*args, grid=grid, **options)
            if not log.getvalue():  # compiled before
                return
            registers, spilled = (
                int(re.search(said, log.getvalue())[1])
                for said in (r"Used (\d+) registers", r"(\d+) bytes spill stores")
            )
            constants = {kernel.arg_names[at]: value for (at, *_), value in made.src.constants.items()}
            taken = made.metadata.shared, made.metadata.tmem_size or 0, registers, spilled
            print(json.dumps([kernel.__name__, str(constants), *taken]))

        return compile_only

    triton.knobs.nvidia.dump_ptxas_log = True
    triton.runtime.driver.set_active(device)
    triton.JITFunction.__getitem__ = launcher
    for name in ("lightning_moe", "lightning_moe.ops"):  # without what they import the kernels are there sooner
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(PACKAGE.parent.joinpath(*name.split(".")))]
    kernels = importlib.import_module("lightning_moe.ops.triton_kernels")
    vars(kernels).update(settings)
    for launch in islice(launches(kernels, torch, capability), num_launches):
        launch()


@pytest.fixture
def compiled(tmp_path):
    """Has the launches compiled, all of them or the first few.

    Of each: kernel, constants, shared and tensor memory, registers, bytes spilled.
    """
    pytest.importorskip("triton", reason="Triton is not installed")

    def run(capability, shared_memory, num_launches=None, **settings):
        command = [sys.executable, __file__, json.dumps([capability, shared_memory, num_launches, settings])]
        environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def too_large(made, capability):
    return [launch for launch in made if launch[2] > LIMITS[capability] or launch[3] > TENSOR_MEMORY]


def spilling(made):
    kernels = ("_grouped_linear_pointers_kernel", "_dequantize_fp8_kernel", "_dequantize_mxfp4_kernel")
    return [launch for launch in made if launch[0] in kernels and launch[5]]


@pytest.mark.parametrize("capability", LIMITS)
def test_every_kernel_fits(capability, compiled):
    made = compiled(capability, LIMITS[capability])
    assert not too_large(made, capability)
    assert not spilling(made)
    assert {kernel for kernel, *_ in made} == set(KERNELS) - ({"_grouped_linear_kernel"} if capability < 90 else set())


def test_a_tile_that_is_too_large_is_seen(compiled):
    """The grouped product's tile on Hopper does not fit capability 12."""
    assert too_large(compiled(120, LIMITS[90], num_launches=1), 120)


def test_a_tile_with_too_few_registers_is_seen(compiled):
    assert spilling(compiled(80, LIMITS[80], num_launches=1, NUM_WARPS=4))


if __name__ == "__main__":
    compile_offline(*json.loads(sys.argv[1]))
