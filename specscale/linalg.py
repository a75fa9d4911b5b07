"""Small batched linear algebra of the solvers: no random numbers, no shape that depends on the data.

Nothing here makes the host wait for an accelerator: `dominant_eigenvectors` avoids `eigh` there, and Cholesky factors
come without their check.
"""

import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

_ACCELERATOR = (torch.accelerator.current_accelerator() or torch.device("cpu")).type


def no_grad_full_precision(function: Callable[P, T]) -> Callable[P, T]:
    """Run the function without gradients, and outside any autocast, which would round its products."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast(_ACCELERATOR, enabled=False):
            return function(*args, **kwargs)

    return run


def can_sync(tensor: Tensor) -> bool:
    """Whether the host may read the tensor's values: an accelerator would stall, and a compiler has no values."""
    return tensor.is_cpu and not torch.compiler.is_compiling()


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is where its dtype is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def widest_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 where the device has nothing wider, as MPS."""
    return torch.float64 if has_float64(device) else torch.float32


def has_float64(device: torch.device) -> bool:
    """Whether the device computes in float64: MPS does not, and not every XPU does."""
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type != "mps"


def in_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64: on the CPU, where its own device has none."""
    return tensor.double() if has_float64(tensor.device) else tensor.cpu().double()


def concat(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.cat`, without a copy where there is only one tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """`x` at unit length along `dim`; a zero vector stays zero."""
    return x / torch.linalg.vector_norm(x, dim=dim, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`."""
    return a @ b


def gram(a: Tensor) -> Tensor:
    """`a^T a`."""
    return product(a.mT, a)


def smaller_gram(matrices: Tensor) -> Tensor:
    """The smaller of `W^T W` and `W W^T` for `W (..., m, n)`, in float64."""
    matrices = in_float64(matrices)
    return gram(matrices if matrices.shape[-2] >= matrices.shape[-1] else matrices.mT)


def scaled_to_one(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices `(..., m, n)` divided by their largest entry, and that entry `(...)`.

    The division keeps squares from over- and underflowing. A matrix that is not finite becomes zero, since a
    factorisation of it would raise; its scale stays NaN or infinite.
    """
    scale = matrices.abs().amax(dim=(-2, -1)) if matrices.numel() else matrices.new_zeros(matrices.shape[:-2])
    finite = torch.isfinite(scale) & (scale > 0)
    divisor = torch.where(finite, scale, torch.inf)[..., None, None]
    return torch.where(finite[..., None, None], matrices / divisor, 0), scale
