"""What a checkpointed layer, or block, keeps of its forward's results, so that they are not computed again.

The experts that the router chose, which computed again could be others; and attention's output and log-sum-exp, which
take long to compute. A router runs within `keeping_choice()` and attention within `keeping()`: in a checkpointed
layer's forward their results are kept there, in its recomputation they are used. Elsewhere both do nothing.

torch.utils.checkpoint's own policies watch each operation of a layer, which costs the host as much as the operations,
have no way to bring results to host memory, and cannot keep the router's, which models change in place. Here too a
watched operation costs the host several times its own call: attention's kernel is watched below autograd, which it has
to be, and alone; a router's many small operations above it, where that costs half.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from threading import local
from typing import Any

import torch
import torch.nn.attention.varlen  # whose operation is among these
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ATTENTION = frozenset((
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.torch_attn._varlen_attn.default,
))  # fmt: skip
TOPK = frozenset((torch.topk, Tensor.topk))

Kept = dict[Any, list[Any]]
Run = Callable[[], Any]
_NOTHING = nullcontext()


def keep_and_reuse(
    *,
    attention: bool,
    pack: Callable[[Tensor], Any] = lambda tensor: tensor,
    unpack: Callable[[Any], Any] = lambda packed: packed,
    before_recomputation: Callable[[], None] | None = None,
    ends_with: nn.Module | None = None,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The two contexts that torch.utils.checkpoint asks of its `context_fn`: around forward, and the recomputation.

    Args:
        attention: whether to keep attention's results beside the router's choice.
        pack: what becomes of a tensor that is kept, such as being brought to the host.
        unpack: undoes that; what was not packed it gives back as it is.
        before_recomputation: called when it is about to begin.
        ends_with: the module whose output is the last of the forward's and goes nowhere else within.
    """
    kept: Kept = defaultdict(list)
    recomputation = _Recomputation(kept, attention, unpack, before_recomputation, ends_with)
    return _Within(_Forward(kept, attention, pack)), _Within(recomputation)


def keeping() -> AbstractContextManager[Any]:
    """A context around attention's operation, whose results a checkpointed layer may keep."""
    layers = [layer for layer in _thread.layers if layer.attention]
    return _WatchAttention(layers) if layers else _NOTHING


def keeping_choice() -> AbstractContextManager[Any]:
    """A context around a router, whose choice a checkpointed layer keeps."""
    return _WatchChoice(list(_thread.layers)) if _thread.layers else _NOTHING


def is_output_needed(module: nn.Module) -> bool:
    """Whether a module has to compute its output: not where a recomputation ends with it."""
    return not any(isinstance(layer, _Recomputation) and layer.ends_with is module for layer in _thread.layers)


class _Forward:
    """A layer's forward: keeps results as they come."""

    def __init__(self, kept: Kept, attention: bool, pack: Callable[[Tensor], Any]) -> None:
        self.attention = attention
        self._kept, self._pack = kept, pack

    def start(self) -> None:
        """Forward begins."""

    def choose(self, run: Run, scores: Tensor, dim: int) -> Any:
        """Runs `topk`, and keeps the choice: the values are a gather away, and routers normalize them in place."""
        results = run()
        self._kept[torch.topk].append(self._pack(results[1].to(torch.int32)))
        return results

    def attend(self, run: Run, operation: Any) -> Any:
        """Runs attention, and keeps the results."""
        results = run()
        # Autograd will write into these tensors that they have a graph, which would then hold itself.
        self._kept[operation].append([self._pack(r.detach()) if isinstance(r, Tensor) else r for r in results])
        return results


class _Recomputation:
    """A layer's recomputation: gives back what was kept, in its order."""

    def __init__(
        self,
        kept: Kept,
        attention: bool,
        unpack: Callable[[Any], Any],
        before: Callable[[], None] | None,
        ends_with: nn.Module | None,
    ) -> None:
        self.attention, self.ends_with = attention, ends_with
        self._kept, self._unpack, self._before = kept, unpack, before
        self._calls: Counter[Any] = Counter()

    def start(self) -> None:
        """A recomputation begins: the first, or another one where the graph is retained."""
        self._calls.clear()
        if self._before is not None:
            self._before()

    def choose(self, run: Run, scores: Tensor, dim: int) -> Any:
        """What `topk` of these scores gives for the choice that was kept."""
        if torch.topk not in self._kept:
            return run()
        indices = self._unpack(self._next(torch.topk)).long()
        return torch.return_types.topk((_Chosen.apply(scores, indices, dim), indices))

    def attend(self, run: Run, operation: Any) -> Any:
        """The results that were kept."""
        if operation not in self._kept:
            return run()
        results = map(self._unpack, self._next(operation))
        return tuple(r.detach() if isinstance(r, Tensor) else r for r in results)

    def _next(self, operation: Any) -> Any:
        kept, call = self._kept[operation], self._calls[operation]
        self._calls[operation] += 1
        if call >= len(kept):
            raise RuntimeError(
                f"a layer's recomputation calls {operation} {call + 1} times, its forward did {len(kept)}"
            )
        return kept[call]


class _Chosen(torch.autograd.Function):
    """Scores at the indices of a choice. Saves what `topk` does, which checkpointing compares."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, indices: Tensor, dim: int) -> Tensor:  # type: ignore[override]
        ctx.shape, ctx.dim = scores.shape, dim
        ctx.save_for_backward(indices)
        return scores.gather(dim, indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (indices,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).scatter(ctx.dim, indices, grad), None, None


class _WatchChoice(TorchFunctionMode):
    """Has layers, the outermost first, see to a router's `topk`."""

    def __init__(self, layers: list[_Forward | _Recomputation]) -> None:
        super().__init__()
        self._layers = layers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in TOPK:
            return func(*args, **kwargs)
        run = partial(func, *args, **kwargs)
        scores, dim = _scores_and_dim(*args, **kwargs)
        for layer in self._layers:
            run = partial(layer.choose, run, scores, dim)
        return run()


def _scores_and_dim(input: Tensor, k: int, dim: int = -1, *_: Any, **__: Any) -> tuple[Tensor, int]:  # noqa: A002
    """Of the arguments of `topk`."""
    return input, dim


class _WatchAttention(TorchDispatchMode):
    """Has layers, the outermost first, see to attention's operation."""

    def __init__(self, layers: list[_Forward | _Recomputation]) -> None:
        super().__init__()
        self._layers = layers

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in ATTENTION:
            return func(*args, **kwargs)
        run = partial(func, *args, **kwargs)
        for layer in self._layers:
            run = partial(layer.attend, run, func)
        return run()


class _Within(AbstractContextManager[None]):
    """A layer's forward or recomputation; may be entered again."""

    def __init__(self, layer: _Forward | _Recomputation) -> None:
        self._layer = layer

    def __enter__(self) -> None:
        self._layer.start()
        _thread.layers.append(self._layer)

    def __exit__(self, *exception: object) -> None:
        _thread.layers.pop()


class _Thread(local):
    """Backward, with its recomputations, runs in threads of its own.

    Attributes:
        layers: the checkpointed layers that this thread is in, the outermost first.
    """

    def __init__(self) -> None:
        self.layers: list[_Forward | _Recomputation] = []


_thread = _Thread()
