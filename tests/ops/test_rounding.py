"""Stochastic rounding: to one of two neighbours, right on average."""

import pytest
import torch

from lightning_moe.ops.rounding import round_stochastic


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1.001, -1.001, 3e-5, -700.3, 1e-9])
def test_the_average_is_the_value(dtype, value):
    """To five standard deviations of the mean of so many draws, which the nearest value misses."""
    count = 100_000
    tensor = torch.full((count,), value)
    rounded = round_stochastic(tensor, dtype, torch.Generator().manual_seed(0))
    assert rounded.dtype == dtype
    levels = rounded.unique().double()
    if len(levels) == 1:  # a value so near to one that no draw left it
        assert abs(levels[0] / tensor[0] - 1) < 1e-4
        return
    low, high = levels  # and no third
    assert low < tensor[0] < high
    share = (tensor[0].double() - low) / (high - low)
    deviation = (high - low) * (share * (1 - share) / count).sqrt()
    assert abs(rounded.double().mean() - tensor[0]) < 5 * deviation
    assert abs(tensor[0].to(dtype).double() - tensor[0]) > 5 * deviation


def test_what_the_dtype_holds_stays():
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, 65280.0, float("inf"), -float("inf")])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(round_stochastic(exact, dtype), exact.to(dtype))
    assert round_stochastic(torch.tensor([float("nan")]), torch.bfloat16).isnan().all()
    assert torch.equal(round_stochastic(torch.tensor([1.001]), torch.float32), torch.tensor([1.001]))
