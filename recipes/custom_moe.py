"""A custom mixture of experts, in twenty lines of PyTorch around `moe_experts`.

    python recipes/custom_moe.py        trains one for a few seconds on a CPU

Nothing is patched here and no callback is needed: `moe_experts` is differentiable by itself. An experts class that
shall keep its own forward is registered instead, and the callback patches it:

    register_experts(MyExperts)      # forward(hidden_states, top_k_index, top_k_weights), see its docstring
    Trainer(callbacks=[MoEGateGradCallback(audit_every_n_steps=100)])
"""

import torch
from rich.progress import track
from torch import Tensor, nn

from lightning_moe import moe_experts


class CustomMoE(nn.Module):
    """Routes each token to its `top_k` best experts of `num_experts`: (..., hidden) to (..., hidden)."""

    def __init__(self, hidden: int, intermediate: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(hidden, num_experts, bias=False)
        self.gate_up_proj = nn.Parameter(torch.randn(num_experts, 2 * intermediate, hidden) / hidden**0.5)
        self.down_proj = nn.Parameter(torch.randn(num_experts, hidden, intermediate) / intermediate**0.5)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The weighted sum of the chosen experts."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing_weights, experts = self.router(tokens).softmax(-1).topk(self.top_k)
        routing_weights = routing_weights / routing_weights.sum(-1, keepdim=True)
        output = moe_experts(tokens, experts, routing_weights, self.gate_up_proj, self.down_proj)
        return output.view_as(hidden_states)


def main() -> None:
    """Trains one module to compute what another does."""
    torch.manual_seed(0)
    teacher, student = CustomMoE(64, 32, 8, 2), CustomMoE(64, 32, 8, 2)
    student.router.load_state_dict(teacher.router.state_dict())
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    losses = []
    for _ in track(range(100), "training"):
        inputs = torch.randn(256, 64)
        with torch.no_grad():
            target = teacher(inputs)
        loss = nn.functional.mse_loss(student(inputs), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss, step 1 -> {len(losses)}: {losses[0]:.4f} -> {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
