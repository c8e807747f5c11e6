"""PyTorch's modules and tensors: names that its wrappers put into paths, the parameters that a module computes with.

Private names read here, in torch 2.11 to 2.15: `_orig_mod` of `torch.compile`'s wrapper, `_checkpoint_wrapped_module`
of `checkpoint_wrapper`'s; a module's `_modules`, `_parameters` and `_buffers`, its `_forward_hooks`,
`_forward_pre_hooks`, `_backward_hooks` and `_backward_pre_hooks`; a tensor's `_backward_hooks` and
`_post_accumulate_grad_hooks`; `torch.compiler._is_exporting_flag`, and where `FakeTensor` is, `torch._subclasses`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

COMPILED = "_orig_mod"
_CHECKPOINTED = "_checkpoint_wrapped_module"


def without_wrappers(name: str) -> str:
    """A key or a path without the names that `torch.compile` and checkpoint wrappers put in."""
    return name.replace(f"{COMPILED}.", "").replace(f"{_CHECKPOINTED}.", "")


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor computes as PyTorch's own do, sharded or fake ones among them."""
    return _is_plain_class(type(tensor))


@cache
def _is_plain_class(tensor_class: Any) -> bool:
    has_own_class = tensor_class.__torch_dispatch__ is not Tensor.__torch_dispatch__  # Parameter and FSDP1's have not
    return not has_own_class or issubclass(tensor_class, (DTensor, FakeTensor))


def is_exporting() -> bool:
    """Whether `torch.export` traces this: `torch.compiler.is_exporting` says so in any compiled graph of torch 2.11."""
    return torch.compiler._is_exporting_flag


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has no values, as under `FakeTensorMode`."""
    return isinstance(tensor, FakeTensor)


@contextmanager
def replaced_parameters(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Has a module compute with these tensors in place of its parameters of the same names."""
    kept = {name: module._parameters[name] for name in tensors}
    module._parameters.update(tensors)  # type: ignore[arg-type]
    try:
        yield
    finally:
        module._parameters.update(kept)


def modules_of(root: nn.Module) -> Iterator[nn.Module]:
    """A module and all in it, once each. PyTorch's own `modules` takes several times as long."""
    seen: set[nn.Module] = set()
    left = [root]
    while left:
        module = left.pop()
        if module not in seen:
            seen.add(module)
            yield module
            if module._modules:
                left += [child for child in module._modules.values() if child is not None]


def tensors_of(module: nn.Module) -> list[Tensor]:
    """The parameters and buffers that a module itself has."""
    own = (module._parameters, module._buffers)
    return [tensor for tensors in own if tensors for tensor in tensors.values() if tensor is not None]


def trained_parameters(output: Tensor) -> Iterator[nn.Parameter]:
    """The parameters to which an output's backward adds gradients."""
    seen: set[Any] = set()
    left: list[Any] = [output.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [following for following, _ in node.next_functions]
            if isinstance(variable := getattr(node, "variable", None), nn.Parameter):
                yield variable


def gradient_hooks_of(tensor: Tensor) -> list[Any]:
    """The hooks that run when a parameter has its gradient."""
    return [hook for hooks in (tensor._backward_hooks, tensor._post_accumulate_grad_hooks) if hooks
            for hook in hooks.values()]  # fmt: skip


def hooks_of(module: nn.Module) -> list[Any]:
    """The hooks that run when the module is called, and in its backward."""
    own = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return [hook for hooks in own if hooks for hook in hooks.values()]
