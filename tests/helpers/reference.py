"""The truth that the tests compare with: a float64 loop over tokens and slots; and the baseline, Transformers' own.

Every tensor is of scale 1 (weights are divided by the root of their fan-in), so that no error hides in small numbers.
"""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from lightning_moe import LowRank, moe_experts

WEIGHTS = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
DIFFERENTIABLE = ("hidden_states", "top_k_weights", *WEIGHTS)
# The factors of up to two low-rank updates of each projection, and their scalings.
SCALINGS = (2.0, 0.75)
FACTORS = tuple(f"{side}_{factor}{i}" for side in ("gate_up", "down") for i in range(2) for factor in "ab")

# Norm-wise, 16 last digits: a float32 sum of 64 terms is off by about 4 at most (half of one each, as a random walk),
# and four such sums follow each other between the input and its gradient.
FLOAT32_TOLERANCE = 2e-6

GATE_KINDS = ("positive", "negative", "zero", "subnormal", "mixed")


def silu_concatenated(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gpt_oss_interleaved(gate_up):
    gate, up = gate_up[..., ::2].clamp(max=7.0), gate_up[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def relu_squared(hidden):
    return F.relu(hidden).square()


@dataclass(frozen=True)
class Layout:
    """How an experts class stores its weights and what it computes between them."""

    activation: object = silu_concatenated
    is_gated: bool = True
    is_transposed: bool = False
    has_bias: bool = False


LAYOUTS = {
    "default": Layout(),
    "transposed": Layout(is_transposed=True),
    "interleaved": Layout(gpt_oss_interleaved),
    "no_gate_projection": Layout(relu_squared, is_gated=False),
    "biased": Layout(has_bias=True),
    "transposed_biased": Layout(is_transposed=True, has_bias=True),
    "gpt_oss": Layout(gpt_oss_interleaved, is_transposed=True, has_bias=True),
    "no_gate_projection_transposed_biased": Layout(relu_squared, False, True, True),
}


@dataclass(frozen=True)
class Problem:
    """One call: its tensors, the incoming gradient, and which tensors want one of their own."""

    layout: Layout
    tensors: dict
    top_k_index: torch.Tensor
    grad_output: torch.Tensor
    requires_grad: frozenset = field(default_factory=frozenset)

    @property
    def num_experts(self):
        return self.tensors["gate_up_proj"].shape[0]

    @property
    def everything(self):
        """The names of all that can want a gradient."""
        return tuple(name for name in (*DIFFERENTIABLE, *FACTORS) if name in self.tensors)

    def wanting(self, *names):
        return replace(self, requires_grad=frozenset(names) & self.tensors.keys())

    def with_tensors(self, **tensors):
        return replace(self, tensors=self.tensors | tensors)

    def leaves(self):
        """Fresh leaves, so that runs share neither gradients nor graphs."""
        return {
            name: tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_(name in self.requires_grad)
            for name, tensor in self.tensors.items()
        }


def make_gates(kind, shape, dtype, generator):
    sizes = torch.rand(shape, generator=generator) + 0.5
    smallest_normal = torch.finfo(dtype).tiny
    gates = {
        "positive": sizes,
        "negative": -sizes,
        "zero": torch.zeros(shape),
        "subnormal": (sizes * smallest_normal / 4).to(dtype),
    }
    if kind != "mixed":
        return gates[kind].to(dtype)
    choice = torch.arange(shape[0] * shape[1]).view(shape) % 4
    stacked = torch.stack([gates[name].to(dtype) for name in ("positive", "negative", "zero", "subnormal")])
    return stacked.gather(0, choice.unsqueeze(0)).squeeze(0)


def make_problem(
    layout="default",
    *,
    seed=0,
    dtype=torch.float32,
    hidden_dtype=None,
    gate_dtype=None,
    gates="positive",
    num_tokens=7,
    top_k=3,
    num_experts=5,
    hidden_size=16,
    intermediate_size=24,
    gate_up_ranks=(),
    down_ranks=(),
    factor_dtype=None,
    update_size=1.0,
    requires_grad=(*DIFFERENTIABLE, *FACTORS),
):
    layout = LAYOUTS[layout] if isinstance(layout, str) else layout
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    width = intermediate_size * (2 if layout.is_gated else 1)
    gate_up_proj = normal(num_experts, width, hidden_size) / hidden_size**0.5
    down_proj = normal(num_experts, hidden_size, intermediate_size) / intermediate_size**0.5
    if layout.is_transposed:
        gate_up_proj, down_proj = gate_up_proj.mT.contiguous(), down_proj.mT.contiguous()
    tensors = {"gate_up_proj": gate_up_proj.to(dtype), "down_proj": down_proj.to(dtype)}
    if layout.has_bias:
        tensors["gate_up_proj_bias"] = normal(num_experts, width).to(dtype)
        tensors["down_proj_bias"] = normal(num_experts, hidden_size).to(dtype)
    hidden_dtype = hidden_dtype or dtype
    tensors["hidden_states"] = normal(num_tokens, hidden_size).to(hidden_dtype)
    tensors["top_k_weights"] = make_gates(gates, (num_tokens, top_k), gate_dtype or dtype, generator)
    sides = ("gate_up", gate_up_ranks, hidden_size, width), ("down", down_ranks, intermediate_size, hidden_size)
    for side, ranks, width_in, width_out in sides:
        for i, rank in enumerate(ranks):
            a = normal(num_experts, rank, width_in) / width_in**0.5
            b = normal(num_experts, width_out, rank) * update_size / rank**0.5
            tensors |= {f"{side}_a{i}": a.to(factor_dtype or dtype), f"{side}_b{i}": b.to(factor_dtype or dtype)}
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    top_k_index = scores.argsort(dim=1)[:, :top_k].contiguous()
    grad_output = normal(num_tokens, hidden_size).to(hidden_dtype)
    return Problem(layout, tensors, top_k_index, grad_output).wanting(*requires_grad)


def updates(leaves, side):
    names = [(f"{side}_a{i}", f"{side}_b{i}", scaling) for i, scaling in enumerate(SCALINGS)]
    return [LowRank(leaves[a], leaves[b], scaling) for a, b, scaling in names if a in leaves]


def merged(layout, leaves):
    """The leaves without factors: each weight is W + Σ scaling · BA, in its own dtype, as PEFT makes it."""
    plain = {name: tensor for name, tensor in leaves.items() if name not in FACTORS}
    for name, side in (("gate_up_proj", "gate_up"), ("down_proj", "down")):
        for update in updates(leaves, side):
            a, b = update.a.to(plain[name].dtype), update.b.to(plain[name].dtype)
            left, right = (a.mT, b.mT) if layout.is_transposed else (b, a)
            plain[name] = torch.baddbmm(plain[name], left, right, alpha=update.scaling)
    return plain


def loop(layout, top_k_index, leaves):
    """The definition, one token and one slot at a time."""
    leaves = merged(layout, leaves)
    experts = {name: leaves[name].unbind() for name in WEIGHTS if name in leaves}
    rows = []
    for x, gates, chosen in zip(
        leaves["hidden_states"].unbind(), leaves["top_k_weights"].unbind(), top_k_index.tolist(), strict=True
    ):
        total = torch.zeros_like(x)
        for gate, expert in zip(gates.unbind(), chosen, strict=True):
            weights = {name: tensors[expert] for name, tensors in experts.items()}
            up, down = weights["gate_up_proj"], weights["down_proj"]
            if layout.is_transposed:
                up, down = up.t(), down.t()
            hidden = up @ x
            if layout.has_bias:
                hidden = hidden + weights["gate_up_proj_bias"]
            result = down @ layout.activation(hidden)
            if layout.has_bias:
                result = result + weights["down_proj_bias"]
            total = total + gate * result
        rows.append(total)
    # Of no tokens, still a function of every leaf.
    return torch.stack(rows) if rows else leaves["hidden_states"] + 0.0 * sum(leaf.sum() for leaf in leaves.values())


def gradients(problem, leaves, output):
    """The output and every gradient asked for. A tensor that no row touched has a gradient of zeros."""
    results = {"output": output.detach()}
    if problem.requires_grad:
        output.backward(problem.grad_output.to(output.dtype))
    for name in (*DIFFERENTIABLE, *FACTORS):
        if name in problem.requires_grad:
            grad = leaves[name].grad
            results[name] = torch.zeros_like(leaves[name]) if grad is None else grad
        elif name in leaves:
            assert leaves[name].grad is None
    return results


def run_loop(problem):
    """The truth, on the problem's own rounded inputs."""
    leaves = {
        name: tensor.detach().double().requires_grad_(name in problem.requires_grad)
        for name, tensor in problem.tensors.items()
    }
    return gradients(problem, leaves, loop(problem.layout, problem.top_k_index, leaves))


def call(problem, leaves, **options):
    return moe_experts(
        top_k_index=problem.top_k_index,
        activation=problem.layout.activation,
        is_transposed=problem.layout.is_transposed,
        gate_up_updates=updates(leaves, "gate_up"),
        down_updates=updates(leaves, "down"),
        **{name: tensor for name, tensor in leaves.items() if name not in FACTORS},
        **options,
    )


def buffer_mib(num_tokens):
    """The `output_buffer_mib` that as many tokens' expert outputs fill: 3 slots of 16 float32 features each."""
    return num_tokens * 3 * 16 * 4 / 2**20


def run(problem, **options):
    """The operation under test."""
    leaves = problem.leaves()
    return gradients(problem, leaves, call(problem, leaves, **options))


class StockExperts(nn.Module):
    """What Transformers' experts functions read from an experts module."""

    def __init__(self, layout, leaves):
        super().__init__()
        self.has_gate = layout.is_gated
        self.has_bias = layout.has_bias
        self.is_transposed = layout.is_transposed
        self.has_post_expert_norm = False
        self._is_expert_parallel = False
        self._apply_gate = self.act_fn = layout.activation
        up_name = "gate_up_proj" if layout.is_gated else "up_proj"
        setattr(self, up_name, leaves["gate_up_proj"])
        self.down_proj = leaves["down_proj"]
        self.num_experts = self.down_proj.shape[0]
        if layout.has_bias:
            setattr(self, f"{up_name}_bias", leaves["gate_up_proj_bias"])
            self.down_proj_bias = leaves["down_proj_bias"]


class SiluEager(StockExperts):
    """Qwen3-MoE's eager loop applies the activation to the gate half itself."""

    def __init__(self, layout, leaves):
        super().__init__(layout, leaves)
        self.act_fn = F.silu


# The eager loops are class bodies: each is right for the layouts of its own class only.
EAGER = {
    "default": (SiluEager, Qwen3MoeExperts),
    "no_gate_projection": (StockExperts, NemotronHExperts),
    "gpt_oss": (StockExperts, GptOssExperts),
}


def call_baseline(problem, leaves, implementation="grouped_mm"):
    leaves = merged(problem.layout, leaves)
    inputs = leaves["hidden_states"], problem.top_k_index, leaves["top_k_weights"]
    if implementation == "eager":
        module_class, donor = next(EAGER[name] for name in EAGER if LAYOUTS[name] == problem.layout)
        return donor.forward.__wrapped__(module_class(problem.layout, leaves), *inputs)
    functions = {"grouped_mm": grouped_mm_experts_forward, "batched_mm": batched_mm_experts_forward}
    return functions[implementation](StockExperts(problem.layout, leaves), *inputs)


def run_baseline(problem, implementation="grouped_mm"):
    """Transformers' own function and its autograd, on the same problem."""
    leaves = problem.leaves()
    return gradients(problem, leaves, call_baseline(problem, leaves, implementation))


def relative_error(actual, expected):
    """Norm of the difference over the norm of `expected`, in float64: 0 for equal zeros, inf for a missed zero."""
    actual, expected = actual.double(), expected.double()
    difference, size = (actual - expected).norm().item(), expected.norm().item()
    if difference == 0:
        return 0.0
    return difference / size if size > 0 else float("inf")


def assert_agrees(actual, expected, tolerance=FLOAT32_TOLERANCE):
    """Every result is there, of the same shape, and within `tolerance`."""
    assert actual.keys() == expected.keys()
    for name, truth in expected.items():
        assert actual[name].shape == truth.shape, name
        error = relative_error(actual[name], truth)
        assert error <= tolerance, f"{name} is off by {error:.3g}, allowed {tolerance:.3g}"


# In 16 bits, both codes round as often, but in different places: on the average over many draws the ratio of their
# errors is 0.9 to 1.03, by the tensor.
LOW_PRECISION_SLACK = 1.05


def pooled_error(results, truths, name):
    errors = [relative_error(result[name], truth[name]) for result, truth in zip(results, truths, strict=True)]
    return (sum(error**2 for error in errors) / len(errors)) ** 0.5


def with_scatter(slack, num_numbers):
    """What a ratio of two errors over so many numbers may be, where it is `slack` on the average.

    The ratio of two root mean squares of n rounding errors scatters by 1/√n, and by twice that where the numbers of a
    row share some. Three times that, as a thousand are compared.
    """
    return slack + 6 / num_numbers**0.5


def assert_no_worse(actual, baseline, truths, slack=LOW_PRECISION_SLACK):
    """Over several problems, every result is as close to the truth as the baseline's is, up to `slack` and scatter."""
    for name in truths[0]:
        assert actual[0][name].dtype == baseline[0][name].dtype, name
        allowed = with_scatter(slack, sum(truth[name].numel() for truth in truths)) * pooled_error(
            baseline, truths, name
        )
        error = pooled_error(actual, truths, name)
        assert error <= allowed, f"{name} is off by {error:.4g}, the baseline with slack by {allowed:.4g}"


def low_precision_problems(layout="default", **options):
    """Draws of some thousands of numbers, over which rounding errors average out."""
    sizes = {"num_tokens": 160, "top_k": 2, "num_experts": 3, "hidden_size": 64, "intermediate_size": 64}
    return [make_problem(layout, seed=seed, **(sizes | options)) for seed in range(4)]


def corrupt(problem, results, name, how):
    """What a broken operation would have given for one result; `how` is one of CORRUPTIONS."""
    corrupted = dict(results)
    if how == "zeros":
        corrupted[name] = torch.zeros_like(results[name])
    elif how == "permuted rows":
        corrupted[name] = results[name].roll(1, dims=0)
    else:
        factor = {"dropped gate": 0.0, "doubled gate": 2.0}[how]
        if name == "top_k_weights":  # does not depend on its own gate: its entry is what would be lost
            gates = results[name].clone()
            gates[1, 0] *= factor
            corrupted[name] = gates
        else:
            gates = problem.tensors["top_k_weights"].clone()
            gates[1, 0] *= factor
            corrupted[name] = run(problem.with_tensors(top_k_weights=gates))[name]
    return corrupted


CORRUPTIONS = ("zeros", "permuted rows", "dropped gate", "doubled gate")


class largest_allocation(TorchDispatchMode):  # noqa: N801 (a context manager)
    """The most elements that any one operation's result has."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, torch.Tensor) and not function.is_view:
                self.elements = max(self.elements, tensor.numel())
        return result
