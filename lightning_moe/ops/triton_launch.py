"""How a Triton kernel is launched, with little of the host's time; and what its grid is computed with."""

from typing import Any

from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

# What Triton has compiled, by the kernel and everything about a launch that it compiles for.
_compiled: dict[tuple[Any, ...], Any] = {}

# What a launcher raises, before it has written anything, where the device is too small for its kernel.
TOO_LARGE = (OutOfResources, PTXASError)


def run_kernel(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    constants: tuple[Any, ...],
    num_warps: int = 4,
    num_stages: int = 3,
    **options: Any,
) -> None:
    """Launches a kernel.

    Triton looks at every argument of a launch to find what it has compiled, which takes the host twice as long as the
    launch: the second time it is asked for, what was compiled is launched as it is.

    Args:
        kernel: of a module, so that it lives on.
        grid: of programs.
        args: tensors, descriptors, integers or None, by position.
        constants: the arguments after these. Where there is a descriptor, they say what its blocks are.
        num_warps: of Triton's options,
        num_stages: and of these, too.
        options: other ones of Triton's, the same at each launch of the kernel.
    """
    # By its id, since Triton hashes a kernel's source.
    key = (id(kernel), constants, num_warps, num_stages, args[0].get_device(), *map(_specialization, args))
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[(*grid, 1, 1)[:3]](*args, *constants)
        return
    compiled = kernel[grid](*args, *constants, num_warps=num_warps, num_stages=num_stages, **options)
    if compiled is not None:  # the interpreter compiles nothing
        _compiled[key] = compiled


def _specialization(arg: Any) -> Any:
    """What Triton compiles an argument of a kernel for. What is told apart soonest comes first."""
    if arg is None:
        return None
    if isinstance(arg, int):
        return arg == 1, arg % 16 == 0, arg < 2**31
    return (arg.dtype, arg.data_ptr() % 16 == 0) if isinstance(arg, Tensor) else arg.base.dtype


def cdiv(dividend: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-dividend // divisor)


def power_of_2(size: int) -> int:
    """The next power of two."""
    return 1 << max(size - 1, 0).bit_length()
