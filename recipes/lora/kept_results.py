"""What a checkpointed layer keeps of its forward's results, so that its recomputation need not compute them again.

The experts that the router chose, which computed again could be others; and attention's output and log-sum-exp, which
take long to compute. Code whose results may be kept runs within `keeping()`: in a checkpointed layer's forward they are
kept there, in its recomputation they are used. Elsewhere `keeping()` does nothing.

torch.utils.checkpoint's own policies watch each operation of a layer, which costs the host as much as the operations,
have no way to bring results to host memory, and cannot keep the router's, which models change in place.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from threading import local
from typing import Any

import torch
import torch.nn.attention.varlen  # whose operation is among these
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ATTENTION = frozenset((
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.torch_attn._varlen_attn.default,
))  # fmt: skip
TOPK = torch.ops.aten.topk.default

Kept = dict[Any, list[Any]]


def keep_and_reuse(
    *,
    attention: bool,
    pack: Callable[[Tensor], Any] = lambda tensor: tensor,
    unpack: Callable[[Any], Any] = lambda packed: packed,
    before_attention: Callable[[], None] | None = None,
    after_attention: Callable[[], None] | None = None,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The two contexts that torch.utils.checkpoint asks of its `context_fn`: around forward, and the recomputation.

    Args:
        attention: whether to keep attention's results beside the router's choice.
        pack: what becomes of a tensor that is kept, such as being brought to the host.
        unpack: undoes that; what was not packed it gives back as it is.
        before_attention: called when attention's backward is about to begin,
        after_attention: and when it is done.
    """
    kept: Kept = defaultdict(list)
    return _Layer(_Keep(kept, attention, pack, before_attention, after_attention)), _Layer(_Reuse(kept, unpack))


def keeping() -> ExitStack:
    """A context around operations whose results a checkpointed layer may keep."""
    stack = ExitStack()
    for mode in _modes():
        stack.enter_context(mode)
    return stack


def watch_attention(query: Tensor, output: Tensor) -> None:
    """Has a checkpointed layer know when backward comes to attention and when it leaves it."""
    for mode in _modes():
        if isinstance(mode, _Keep) and query.requires_grad:
            mode.watch_attention(query, output)


class _Keep(TorchDispatchMode):
    """Keeps results as they come."""

    def __init__(
        self,
        kept: Kept,
        attention: bool,
        pack: Callable[[Tensor], Any],
        before_attention: Callable[[], None] | None,
        after_attention: Callable[[], None] | None,
    ) -> None:
        super().__init__()
        self._kept, self._attention, self._pack = kept, attention, pack
        self._before_attention, self._after_attention = before_attention, after_attention

    def start(self) -> None:
        """Forward begins."""

    def watch_attention(self, query: Tensor, output: Tensor) -> None:
        """Has both callbacks called."""
        before, after = self._before_attention, self._after_attention
        if before is not None:
            output.register_hook(lambda _: before())
        if after is not None:
            query.register_hook(lambda _: after())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func is TOPK:  # the values are a gather away, and routers normalize them in place
            self._kept[func].append(self._pack(results[1].to(torch.int32)))
        elif self._attention and func in ATTENTION:
            # Autograd will write into these tensors that they have a graph, which would then hold itself.
            self._kept[func].append([self._pack(r.detach()) if isinstance(r, Tensor) else r for r in results])
        return results


class _Reuse(TorchDispatchMode):
    """Gives back what was kept, in its order."""

    def __init__(self, kept: Kept, unpack: Callable[[Any], Any]) -> None:
        super().__init__()
        self._kept, self._unpack = kept, unpack
        self._calls: Counter[Any] = Counter()

    def start(self) -> None:
        """A recomputation begins: the first, or another one where the graph is retained."""
        self._calls.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self._kept:
            return func(*args, **(kwargs or {}))
        kept, call = self._kept[func], self._calls[func]
        self._calls[func] += 1
        if call >= len(kept):
            raise RuntimeError(f"a layer's recomputation calls {func} {call + 1} times, its forward did {len(kept)}")
        if func is TOPK:
            dim = args[2] if len(args) > 2 else (kwargs or {}).get("dim", -1)
            indices = self._unpack(kept[call]).long()
            return args[0].gather(dim, indices), indices
        results = map(self._unpack, kept[call])
        return tuple(r.detach() if isinstance(r, Tensor) else r for r in results)


class _Layer(AbstractContextManager[None]):
    """Within it, `keeping` enters a mode; may be entered again."""

    def __init__(self, mode: _Keep | _Reuse) -> None:
        self._mode = mode

    def __enter__(self) -> None:
        self._mode.start()
        _modes().append(self._mode)

    def __exit__(self, *exception: object) -> None:
        _modes().pop()


_thread = local()  # backward, with its recomputations, runs in threads of its own


def _modes() -> list[_Keep | _Reuse]:
    """Of the checkpointed layers that this thread is in, the outermost first."""
    if not hasattr(_thread, "modes"):
        _thread.modes = []
    modes: list[_Keep | _Reuse] = _thread.modes
    return modes
